"""What training takes, by category, before anything is allocated.

Parameters, gradients and what the optimizer remembers are counted from shapes, the last by the very rules that allocate it.
What a block keeps for its way back is found by running it on fake tensors (shapes and dtypes without memory) under autograd's
own hooks, every storage counted once and those of weights not at all: so whatever an architecture computes is in it. Of a model
on 7 B weights that takes a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.formats import LowRank
from compress.model.experts import foreseeable
from compress.model.probe import Probe, Stop
from compress.model.skeleton import skeleton
from compress.model.speed import computing
from compress.model.work import advancing_bytes, block_bytes
from compress.state import State
from compress.state.graph import Site
from compress.state.plan import size
from compress.training.checkpoints import COPIES, TOGETHER
from compress.training.choice import Choice, Kind, Learnt, learnt
from compress.training.loss import DIVERGENCES, NUMBERS
from compress.training.moving import remembered
from compress.training.optimizers import nbytes
from compress.training.options import Block, Checkpoint, Fused, Int8, Kept, Memory, Velora, Way, WtaCrs, ZerothOrder
from compress.training.saved import anew, smaller, worth
from compress.training.sketches import Foreseen, install
from compress.training.windows import ASKED, LOOKED, MICRO

FP32 = 4
WIDE = {"kl": 5.25, "reverse_kl": 6.25, "js": 8.5}  # numbers beside each of the teacher's, as torch's allocator counts them
ASKED_LOGITS = 3  # numbers beside each logit of a teacher that is asked once: its own, log-softmax, and what is between them
TABLE = "embed:"  # what the name of a table that a head may share begins with


@dataclass(frozen=True)
class Numbers:
    """What a training keeps its numbers in. gradient: bytes of one. remembered: bytes that the optimizer holds of what learns,
    where that is not its own to say. computes: dtype of parameters and activations."""

    gradient: int = 4
    remembered: int | None = None
    computes: torch.dtype = torch.float32


OURS = Numbers()
_KNOWN: dict[Any, tuple[int, ...]] = {}  # asked of one model in several settings


@dataclass(frozen=True)
class Setting:
    """How a model is trained: windows of `length` tokens, `together` at once, `batch` in a step (0: no more than that). windows:
    how many a cached teacher is asked about before."""

    memory: Memory
    teacher: str
    together: int
    length: int
    numbers: Numbers = OURS
    batch: int = 0
    loss: tuple[str, ...] = ("kl",)
    windows: int = 0

    @property
    def again(self) -> bool:
        """Whether blocks are run again on the way back."""
        return any(isinstance(way, Checkpoint) for way in self.memory.keeps)

    @property
    def forward(self) -> bool:
        """Whether there is no way back."""
        return isinstance(self.memory.slopes, ZerothOrder)


@dataclass(frozen=True)
class Split:
    """Bytes at the highest point of a step. parameters: of the student. teacher: of its teacher. activations: what is kept for
    the way back, and matrices that are made for the block in hand. logits: of the rows in hand, with the matrix of the head.
    checkpoint: by how much writing one, when nothing else is there, takes more than a step. asking: by how much a cached teacher,
    before there is a student, takes more than all of that."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    teacher: int = 0
    checkpoint: int = 0
    asking: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def split(state: State, choice: Choice, setting: Setting) -> Split:
    """What training a state takes: at the head, when all is kept for the way back and no gradients are there but the head's, or
    at its end, when all of those are and the first block is in hand, whichever is more."""
    what = learnt(state, choice)
    kept, block = activations(state, choice, setting)
    slopes = setting.numbers.gradient * gradients(state, what, setting.memory)
    held_ = Split(
        parameters=held(state, choice, setting.numbers.computes.itemsize, setting.memory.weights == "streamed"),
        optimizer=optimizer(what, setting), teacher=teacher(state, setting),
    )  # fmt: skip
    parts = setting.batch > setting.together  # whose gradients add up: those of the first are there when the next begins
    at_head = replace(held_, activations=kept, logits=logits(state, choice, setting), gradients=slopes if parts else 0)
    at_end = replace(held_, activations=block + (kept if parts else 0), gradients=slopes)
    found = max(at_head, at_end, key=lambda moment: moment.total)
    passing = found.gradients + found.activations + found.logits
    found = replace(found, checkpoint=max(0, writing(what, found.optimizer) - passing))
    return replace(found, asking=max(0, asking(state, setting) - found.total))


def writing(what: Sequence[Learnt], remembered_: int) -> int:
    """What writing a checkpoint takes: copies of the part in hand."""
    whole, largest = FP32 * sum(one.numel for one in what) + remembered_, FP32 * max((one.numel for one in what), default=0)
    return COPIES * max(min(TOGETHER, whole), largest)


# --- what learns ------------------------------------------------------------------------------------------------------


def gradients(state: State, what: Sequence[Learnt], memory: Memory) -> int:
    """How many numbers of gradients there are at most at once."""
    if isinstance(memory.slopes, ZerothOrder):
        return 0
    if not isinstance(memory.slopes, Fused):
        return sum(one.numel for one in awake(what, memory))
    moving, heads = awake(what, memory), [s for s in state.graph if s.role == "head"]
    whole = sum(one.numel for one in moving if one.name.startswith(TABLE)) if any(s.tied for s in heads) else 0
    whole += sum(one.numel for one in moving if one.block is None and one.first is not None)
    return whole + max((one.numel for one in moving if not whole or one.block is not None), default=0)


def optimizer(what: Sequence[Learnt], setting: Setting) -> int:
    """Bytes of what is remembered."""
    if setting.numbers.remembered is not None:
        return setting.numbers.remembered * sum(one.numel for one in what)
    return sum(nbytes(remembered(setting.memory.by, one)) for one in awake(what, setting.memory))


def awake(what: Sequence[Learnt], memory: Memory) -> Sequence[Learnt]:
    """What learns at a time, in the largest case."""
    if not isinstance(memory.by, Block):
        return what
    sizes: dict[int, int] = {}
    for one in what:
        if one.block is not None:
            sizes[one.block] = sizes.get(one.block, 0) + one.numel
    largest = sorted(sizes, key=lambda b: -sizes[b])[: memory.by.active]
    return [one for one in what if one.block in largest]


def held(state: State, choice: Choice, width: int = FP32, streamed: bool = False) -> int:
    """Bytes of a student: what learns in `width` bytes each, matrices that do not as they are stored (unless they are read when
    they are needed), codes beside what learns of them."""
    total, sites = width * sum(one.numel for one in learnt(state, choice)), {s.weight for s in state.graph}
    for site in (s for s in state.graph if not s.tied):
        fmt, kind = state.format(site), choice.kind(site)
        stored = fmt.nbytes(site.shape) if fmt is not None else site.numel * state.dtype.itemsize
        total += 0 if Kind.WEIGHTS in kind or (streamed and reads(state, choice, site)) else stored
    joined = {s.joined for s in state.graph if s.expert is not None}
    others = [s for s in state.specs if s.name not in sites and s.name not in joined and s.name not in choice.tensors]
    return total + width * sum(math.prod(s.shape) for s in others)


def reads(state: State, choice: Choice, site: Site) -> bool:
    """Whether a matrix can be read when it is needed: it does not learn, nor is it one with factors of its own."""
    return not choice.kind(site) & (Kind.WEIGHTS | Kind.SCALES) and not isinstance(state.format(site), LowRank)


def teacher(state: State, setting: Setting) -> int:
    """Bytes of a teacher that is there in a step: of the source's weights, whatever has become of its student; streamed, of one
    block; and of what all of its blocks put out, where that is learnt from."""
    if setting.teacher == "cached":
        return 0
    tokens, number = setting.together * setting.length, FP32 if setting.teacher == "live" else computing(state.dtype).itemsize
    seen = number * tokens * state.graph["embed"].shape[1] * len(state.graph.blocks) if "hidden_cosine" in setting.loss else 0
    whole = sum(spec.nbytes for spec in state.dense.base.specs.values())
    return seen + (whole if setting.teacher == "live" else whole_block(state))


def asking(state: State, setting: Setting) -> int:
    """Bytes of a cached teacher while it is asked: a block, what some windows are between blocks, and fewer inside of one; then
    the head's matrix and the logits of some rows, with what is made of them."""
    if setting.teacher != "cached" or not DIVERGENCES.keys() & set(setting.loss):
        return 0
    tokens, once = min(ASKED, setting.windows * setting.length), max(MICRO, setting.length)
    base, embed = state.dense.base.specs, state.graph["embed"]
    vocabulary = base[embed.weight].shape[0] if embed.weight in base and not embed.transposed else embed.shape[0]
    number, rows = computing(state.dtype).itemsize, min(tokens, LOOKED, max(1, NUMBERS // vocabulary))
    held_ = number * tokens * embed.shape[1]
    block = whole_block(state) + advancing_bytes(state, tokens, once)
    return max(block, held_ + vocabulary * (number * embed.shape[1] + ASKED_LOGITS * FP32 * rows))


def whole_block(state: State) -> int:
    """Bytes of a block of the source, as large against the student's as the whole is."""
    whole, now = (sum(spec.nbytes for spec in specs) for specs in (state.dense.base.specs.values(), state.specs))
    return round(block_bytes(state) * max(1.0, whole / now))


# --- what is kept -----------------------------------------------------------------------------------------------------


def made(state: State, choice: Choice, site: Site, computes: torch.dtype) -> int:
    """Bytes of a matrix that is made when it is needed; none where a parameter itself is used."""
    fmt = state.format(site)
    plain = fmt is None and state.dtype == computes and not choice.kind(site) & Kind.FACTORS
    return 0 if plain else FP32 * site.numel


def activations(state: State, choice: Choice, setting: Setting) -> tuple[int, int]:
    """What all blocks keep until the way back, and what there is when the first is on it."""
    keeps, dtype, count = setting.memory.keeps, setting.numbers.computes, len(state.graph.blocks)
    saved = saved_by_block(state, setting.together, setting.length, dtype, Kept() if setting.again else keeps[0])
    hidden = setting.together * setting.length * state.graph["embed"].shape[1]
    weights = [sum(made(state, choice, s, dtype) for s in state.graph.of_block(i)) for i in range(count)]
    largest = [max((FP32 * s.numel for s in state.graph.of_block(i)), default=0) for i in range(count)]
    if setting.forward:
        return 0, max(s // 2 + g for s, g in zip(saved, largest, strict=True))  # nothing waits for a way back
    first = first_block(state, choice)
    if setting.again:
        one = smaller(dtype.itemsize * hidden, hidden, type(keeps[-1]))
        return (count - first) * one, one + max(s + w + g for s, w, g in zip(saved, weights, largest, strict=True))
    return sum(saved[first:]), max(
        s + 2 * g for s, g in zip(saved, largest, strict=True)
    )  # a matrix, made anew, and its gradient


def first_block(state: State, choice: Choice) -> int:
    """The first block that anything is kept of: the first that learns, or that of a table in front of all."""
    what = learnt(state, choice)
    if any(one.name.startswith(TABLE) for one in what):
        return 0
    return min((one.first for one in what if one.first is not None), default=len(state.graph.blocks))


def logits(state: State, choice: Choice, setting: Setting) -> int:
    """Of the rows that are in hand: logits and what the loss makes of them; the head's matrix and its gradient."""
    head = next((s for s in state.graph if s.role == "head"), state.graph["embed"])
    vocabulary = state.graph["embed"].shape[0]
    rows = min(max(1, NUMBERS // vocabulary), setting.together * setting.length)
    shared = state.graph[head.tied] if head.tied else head
    matrix = made(state, choice, shared, setting.numbers.computes)
    slope = FP32 * head.numel if choice.kind(head) and not setting.forward else 0
    return round(FP32 * wide(setting) * rows * vocabulary) + matrix + slope


def wide(setting: Setting) -> float:
    """How many numbers a loss holds of each logit at most: log-softmax and gradient, and where the teacher's are as many, those
    and what is made of both."""
    if setting.teacher == "cached" or not DIVERGENCES.keys() & set(setting.loss):
        return 2 if setting.forward else 3
    return 1 + max(WIDE[part] for part in DIVERGENCES.keys() & set(setting.loss))


def saved_by_block(
    state: State, together: int, length: int, dtype: torch.dtype = torch.float32, way: Way | None = None
) -> tuple[int, ...]:
    """Bytes that each block keeps for its way back from `together` windows of `length` tokens, in some way; of equal blocks one
    is run."""
    way = way or Kept()
    key = (
        json.dumps(state.config.to_dict(), sort_keys=True, default=str),
        together,
        length,
        dtype,
        type(way),
        way.model_dump_json(),
    )
    if key not in _KNOWN:
        _KNOWN[key] = _run_on_fakes(state, together, length, dtype, way)
    return _KNOWN[key]


def _run_on_fakes(state: State, together: int, length: int, dtype: torch.dtype, way: Way) -> tuple[int, ...]:
    model = skeleton(state.config)
    blocks = [model.get_submodule(b.module) for b in state.graph.blocks]
    probes = [Probe(block) for block in blocks]
    for b, probe in zip(state.graph.blocks, probes, strict=True):
        parent, _, name = b.module.rpartition(".")
        model.get_submodule(parent)._modules[name] = probe
    known: dict[Any, int] = {}
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), foreseeable():
        for module in (model, *blocks):
            _fake(module, dtype)
        ids, probes[0].stop = torch.zeros(together, length, dtype=torch.int64), True
        with suppress(Stop), torch.no_grad():
            model(input_ids=ids, use_cache=False)
        with torch.no_grad():  # what blocks return, a tensor or a tuple, the model's forward relies on
            made = blocks[0](probes[0].hidden, *probes[0].call[0], **probes[0].call[1])
        probes[0].stop = False
        for probe in probes:
            probe.tuple_out = len(made) if isinstance(made, tuple) else 0
        model(input_ids=ids, use_cache=False)
        hidden = probes[0].hidden.detach().requires_grad_()
        for block, probe in zip(blocks, probes, strict=True):
            key = (type(block), getattr(probe, "attention_type", None), getattr(probe, "layer_type", None),
                   tuple((n, p.shape) for n, p in block.named_parameters()))  # fmt: skip
            if key not in known:
                args, kwargs = probe.call
                if isinstance(way, Velora | WtaCrs):
                    install(block, "", Foreseen(way))
                run = partial(block, hidden, *args, **kwargs)
                known[key] = _saved(run, block, way, together * length, isinstance(way, Int8) and anew(model.config))
            found.append(known[key])
    return tuple(found)


def _fake(module: nn.Module, dtype: torch.dtype) -> None:
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.is_floating_point())


def _saved(run: Callable[[], Any], block: nn.Module, way: Way, tokens: int, exact: bool) -> int:
    """Bytes of the storages that autograd keeps, less those of parameters; `exact`: attention's as they are."""
    storages: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage()._cdata] = t
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run()
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    total = 0
    for t in (t for key, t in storages.items() if key not in own):
        whole = t.untyped_storage().nbytes()
        total += smaller(whole, whole // t.itemsize, type(way)) if worth(t, tokens) and not (exact and t.dim() == 4) else whole
    del out
    return total


def told(found: Split) -> str:
    """In words, the largest first."""
    parts = sorted(((getattr(found, f.name), f.name) for f in fields(found)), reverse=True)
    return f"{size(found.total)}: " + ", ".join(f"{name} {size(n)}" for n, name in parts if n)
