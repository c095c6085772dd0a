"""What training takes, by category, before anything is allocated.

Parameters, gradients and what the optimizer remembers are counted from shapes. What a block keeps for its way back is found by
running it on fake tensors (shapes and dtypes without memory) under autograd's own hooks, every storage counted once and those of
weights not at all: so whatever an architecture computes is in it. Of a model on 7 B weights that takes a second.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compress.errors import RecipeError
from compress.formats.grid import Quantized
from compress.model.experts import foreseeable
from compress.model.probe import Probe
from compress.model.skeleton import skeleton
from compress.model.work import block_bytes
from compress.state import State
from compress.state.graph import Site
from compress.state.plan import size
from compress.training.choice import Choice, Kind
from compress.training.loss import NUMBERS

FP32 = 4
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class Numbers:
    """What a training keeps its numbers in. gradient: bytes of one. remembered: bytes that the optimizer holds of what learns.
    computes: dtype of parameters and activations. fused: a gradient is used up as soon as it is there; one is held at a time."""

    gradient: int = 4
    remembered: int = 8  # AdamW's two means
    computes: torch.dtype = torch.float32
    fused: bool = False


OURS = Numbers()
_KNOWN: dict[Any, tuple[int, ...]] = {}  # asked of one model in several settings


@dataclass(frozen=True)
class Setting:
    """How a model is trained: windows of `length` tokens, `together` at once. again: blocks are run again on the way back."""

    again: bool
    teacher: str
    together: int
    length: int
    numbers: Numbers = OURS


@dataclass(frozen=True)
class Split:
    """Bytes at the highest point of a step. parameters: of the student. teacher: of its teacher. activations: what is kept for
    the way back, and matrices that are made for the block in hand. logits: of the rows in hand, with the matrix of the head."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def split(state: State, choice: Choice, setting: Setting) -> Split:
    """What training a state takes."""
    learnt, numbers_ = learning(state, choice), setting.numbers
    at_once = max((numbers(state, choice, s) for s in state.graph), default=0) if numbers_.fused else learnt
    kept, block = activations(state, choice, setting)
    behind = logits(state, choice, setting)
    higher = max(block, behind)  # the head is done before the first block is on its way back
    return Split(
        parameters=held(state, choice, setting.numbers.computes.itemsize),
        gradients=numbers_.gradient * at_once, optimizer=numbers_.remembered * learnt,
        activations=kept + (block if block == higher else 0), logits=0 if block == higher else behind,
        teacher=teacher(state, setting),
    )  # fmt: skip


# --- what learns ------------------------------------------------------------------------------------------------------


def numbers(state: State, choice: Choice, site: Site) -> int:
    """How many numbers of a site learn."""
    kind, (n, k) = choice.kind(site), site.shape
    fmt = choice.format(state, site)
    found = n * k if Kind.WEIGHTS in kind else 0
    if Kind.SCALES in kind:
        base = getattr(fmt, "base", fmt)
        assert isinstance(base, Quantized)
        found += n * base.groups(k)
    if Kind.FACTORS in kind:
        found += getattr(fmt, "rank", choice.rank) * (n + k)
    return found


def learning(state: State, choice: Choice) -> int:
    """How many numbers learn."""
    others = sum(math.prod(spec.shape) for spec in state.specs if spec.name in choice.tensors)
    return others + sum(numbers(state, choice, site) for site in state.graph if not site.tied)


def held(state: State, choice: Choice, width: int = FP32) -> int:
    """Bytes of a student: what learns in fp32, matrices that do not as they are stored, codes beside what learns of them."""
    total, sites = 0, {s.weight for s in state.graph}
    for site in (s for s in state.graph if not s.tied):
        fmt = state.format(site)
        stored = fmt.nbytes(site.shape) if fmt is not None else site.numel * state.dtype.itemsize
        total += (0 if Kind.WEIGHTS in choice.kind(site) else stored) + width * numbers(state, choice, site)
    joined = {s.joined for s in state.graph if s.expert is not None}
    return total + width * sum(math.prod(s.shape) for s in state.specs if s.name not in sites and s.name not in joined)


def teacher(state: State, setting: Setting) -> int:
    """Bytes of the weights of a teacher: of the source's, whatever has become of its student; streamed, of one block of as many
    as the student has layers."""
    whole = sum(spec.nbytes for spec in state.dense.base.specs.values())
    if setting.teacher == "live":
        return whole
    now = sum(spec.nbytes for spec in state.specs)
    return round(block_bytes(state) * max(1.0, whole / now)) if setting.teacher == "streamed" else 0


# --- what is kept -----------------------------------------------------------------------------------------------------


def made(state: State, choice: Choice, site: Site, computes: torch.dtype) -> int:
    """Bytes of a matrix that is made when it is needed; none where a parameter itself is used."""
    fmt = state.format(site)
    plain = fmt is None and state.dtype == computes and not choice.kind(site) & Kind.FACTORS
    return 0 if plain else FP32 * site.numel


def activations(state: State, choice: Choice, setting: Setting) -> tuple[int, int]:
    """What all blocks keep until the way back, and what the largest takes on top when it is on it."""
    saved = saved_by_block(state, setting.together, setting.length, setting.numbers.computes)
    hidden = setting.numbers.computes.itemsize * setting.together * setting.length * state.graph["embed"].shape[1]
    count = len(state.graph.blocks)
    weights = [sum(made(state, choice, s, setting.numbers.computes) for s in state.graph.of_block(i)) for i in range(count)]
    largest = [max((FP32 * s.numel for s in state.graph.of_block(i)), default=0) for i in range(count)]
    if setting.again:
        return count * hidden, max(s + w + g for s, w, g in zip(saved, weights, largest, strict=True))
    return sum(saved), max(2 * g for g in largest)  # a matrix, made once more, and its gradient


def logits(state: State, choice: Choice, setting: Setting) -> int:
    """Of the rows that are in hand: logits, their log-softmax, gradient and temporaries; the head's matrix and its gradient."""
    head = next((s for s in state.graph if s.role == "head"), state.graph["embed"])
    vocabulary = state.graph["embed"].shape[0]
    rows = min(max(1, NUMBERS // vocabulary), setting.together * setting.length)
    shared = state.graph[head.tied] if head.tied else head
    matrix = made(state, choice, shared, setting.numbers.computes)
    return FP32 * 5 * rows * vocabulary + matrix + (FP32 * head.numel if choice.kind(head) else 0)


def saved_by_block(state: State, together: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Bytes that each block keeps for its way back from `together` windows of `length` tokens; of equal blocks one is run."""
    key = (json.dumps(state.config.to_dict(), sort_keys=True, default=str), together, length, dtype)
    if key not in _KNOWN:
        _KNOWN[key] = _run_on_fakes(state, together, length, dtype)
    return _KNOWN[key]


def _run_on_fakes(state: State, together: int, length: int, dtype: torch.dtype) -> tuple[int, ...]:
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
        model(input_ids=torch.zeros(together, length, dtype=torch.int64), use_cache=False)
        hidden = probes[0].hidden.detach().requires_grad_()
        for block, probe in zip(blocks, probes, strict=True):
            key = (type(block), getattr(probe, "attention_type", None), getattr(probe, "layer_type", None),
                   tuple((n, p.shape) for n, p in block.named_parameters()))  # fmt: skip
            if key not in known:
                args, kwargs = probe.call
                known[key] = _saved(lambda b=block, a=args, k=kwargs: b(hidden, *a, **k), block)  # type: ignore[misc]
            found.append(known[key])
    return tuple(found)


def _fake(module: nn.Module, dtype: torch.dtype) -> None:
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.is_floating_point())


def _saved(run: Callable[[], Any], block: nn.Module) -> int:
    """Bytes of the storages that autograd keeps, less those of parameters."""
    storages: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage()._cdata] = t
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run()
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    total = sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)
    del out
    return total


# --- limits -----------------------------------------------------------------------------------------------------------


def parsed(limit: str) -> int:
    """Bytes of a text such as 8 GiB; ValueError where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|)", limit.strip())
    if match is None or not 0 < float(match[1]) < 1e15:
        raise ValueError(f"'{limit[:40]}' is no amount of memory; write 8 GiB")
    return int(float(match[1]) * UNITS[match[2]])


def within(state: State, choice: Choice, setting: Setting, limit: str | None) -> Split:
    """What training takes; RecipeError where that is above the limit, naming a setting that would fit."""
    found = split(state, choice, setting)
    if limit is None or found.total <= parsed(limit):
        return found
    other = next(((words, s) for words, s in others(setting) if split(state, choice, s).total <= parsed(limit)), None)
    todo = (
        f"{other[0]} would fit" if other else "no other setting would fit, unless less is trained (train: lora, scales, patterns)"
    )
    raise RecipeError(f"training takes {told(found)}, above the limit of {limit}; {todo}", ("memory", "limit"))


def others(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings that take less, the quickest first, in a recipe's words."""
    for teacher_, again in ((setting.teacher, True), ("cached", setting.again), ("cached", True)):
        words = [
            w
            for w, new in (
                (f"teacher: {teacher_}", teacher_ != setting.teacher),
                ("activations: checkpoint", again and not setting.again),
            )
            if new
        ]
        if words:
            yield " and ".join(words), replace(setting, teacher=teacher_, again=again)


def told(found: Split) -> str:
    """In words, the largest first."""
    parts = sorted(((getattr(found, f.name), f.name) for f in fields(found)), reverse=True)
    return f"{size(found.total)}: " + ", ".join(f"{name} {size(n)}" for n, name in parts if n)
