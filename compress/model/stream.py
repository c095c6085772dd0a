"""Run a model block by block, with one block's weights in memory.

The skeleton's own forward is used for everything between the blocks, so masks, rotary tables and residual scalings are the
architecture's and not ours: its blocks are replaced by probes that let activations pass and note what else each block
is given (the calls). A block in hand is loaded, run on every batch, and dropped.

Calibration needs more: the inputs of o must carry the error of q, k, v as already quantized, and so on down the block.
Three ways were considered. Running the block once per stage and stopping early repeats the work, 2.4 forward passes for a
Llama block. One call with all sequences at once needs every intermediate of every sequence together. Here each batch runs
as a coroutine (greenlet) that pauses at a tap, in front of the first matrix of a stage; when all batches wait there, the
stage is solved, its new weights are put in place, and all go on. One forward pass, and what is held for each batch is just
what its paused frame holds: the residual and the stage's input. The limit: a block's forward must visit its stages in the
same order for every batch, which holds for every family that we know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.formats.served import Rounding
from compress.model.binding import Binding, get_matrix, put_matrix, within
from compress.model.caching import rounding
from compress.model.experts import run_experts_one_by_one
from compress.model.feeds import residuals
from compress.model.known import hash_of
from compress.model.lockstep import Batch, Clean, Inputs, Lockstep
from compress.model.probe import Probe, Stop
from compress.model.rounding import Rounds
from compress.model.skeleton import skeleton, stand_on
from compress.model.skips import skipping
from compress.model.speed import computing
from compress.state import State
from compress.state.graph import Site

Observe = Callable[[str, Inputs, Clean | None], None]
_TUPLES: dict[bytes, int] = {}  # of how many, where the blocks of a model return tuples; by the hash of its config


@dataclass
class Twin:
    """The model as it was, beside the one in hand: its own stream and state, and the same batches at the same block."""

    stream: Stream
    state: State
    batches: list[Batch]


class Stream:
    """A state's model, streamed. `device` holds the block in hand and the activations.

    dtype: what blocks compute in, which is the model's own where that is fast, or where it is to be `exact` (see speed.py),
    unless another is given.
    """

    def __init__(self, state: State, device: str = "cpu", exact: bool = False, dtype: torch.dtype | None = None):
        self.device = torch.device(device)
        self.dtype = dtype or (state.dtype if exact else computing(state.dtype, device))
        self.graph = state.graph
        self.model = skeleton(state.config)
        self.blocks: list[nn.Module] = [self.model.get_submodule(b.module) for b in self.graph.blocks]
        self.probes = [Probe(block) for block in self.blocks]
        self._names = Binding(state, self.model, self.dtype)
        self._rounds = Rounds()
        self._spared: nn.Module | None = None  # a module outside the blocks that is not to be loaded
        self._names.load_buffers(state, self.model)
        stand_on(self.model, self.device, self.dtype)
        self._put(self.probes)
        _move_buffers(self.model, self.device)
        for block in self.blocks:
            _move_buffers(block, self.device)
            run_experts_one_by_one(block)

    def _put(self, modules: Sequence[nn.Module]) -> None:
        for block, module in zip(self.graph.blocks, modules, strict=True):
            parent, _, name = block.module.rpartition(".")
            self.model.get_submodule(parent)._modules[name] = module

    # --- outside the blocks ---

    @contextmanager
    def behind(self, state: State) -> Iterator[None]:
        """As `outer`, for what stands behind the blocks: where a head makes logits, the embedding, which is called in vain, gives
        zeros, and its table is not read."""
        if not any(site.role == "head" for site in self.graph):  # the embedding stands for a head then
            with self.outer(state):
                yield
            return
        site = self.graph["embed"]
        module = self.model.get_submodule(site.module)
        module.forward = lambda ids, *_: torch.zeros(*ids.shape, site.shape[1], dtype=self.dtype, device=self.device)
        self._spared = module
        try:
            with self.outer(state):
                yield
        finally:
            self._spared = None
            del module.forward

    @contextmanager
    def outer(self, state: State) -> Iterator[None]:
        """Inside, every module outside the blocks loads its own parameters when it is first called; then they go."""
        inside = {id(m) for block in self.probes for m in block.modules()} | {id(self._spared)}
        modules = [(p, m) for p, m in self.model.named_modules() if m._parameters and id(m) not in inside]
        hooks = [m.register_forward_pre_hook(self._loader(state, p), prepend=True) for p, m in modules]
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for path, module in modules:
                self._names.drop(path, module)

    def _loader(self, state: State, path: str) -> Callable[..., None]:
        def load(module: nn.Module, _: Any) -> None:
            if any(p is not None and p.is_meta for p in module._parameters.values()):
                self._names.load(state, path, module, self.device)

        return load

    def start(self, state: State, tokens: Sequence[Tensor]) -> list[Batch]:
        """Embed each batch of token ids [b, t]; the calls that the blocks will get are noted."""
        batches = []
        with self._looked_up(state, tokens):
            self._learn_output_kind(state, tokens[0][:1, :8])
            with self.outer(state):
                for ids in tokens:
                    self._until(len(self.probes) - 1, ids)
                    batches.append(Batch(ids, self.probes[0].hidden, [p.call for p in self.probes]))
        return batches

    @contextmanager
    def _looked_up(self, state: State, tokens: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the embedding holds the rows of these tokens alone, where it can be read by rows: no more is looked up."""
        site = self.graph["embed"]
        if site.transposed or (site.name not in state.codes and site.weight not in state.dense):
            yield
            return
        module: Any = self.model.get_submodule(site.module)
        known = torch.cat([ids.flatten() for ids in tokens]).unique()
        whole, padding = module._parameters["weight"], module.padding_idx
        rows = state.rows(site, known.tolist()).to(self.device, self.dtype)
        known = known.to(self.device)
        hook = module.register_forward_pre_hook(lambda _, args: (torch.searchsorted(known, args[0].contiguous()), *args[1:]))
        module._parameters["weight"], module.padding_idx = nn.Parameter(rows, requires_grad=False), None
        self._spared = module
        try:
            yield
        finally:
            self._spared = None
            hook.remove()
            module._parameters["weight"], module.padding_idx = whole, padding

    def _until(self, last: int, ids: Tensor) -> None:
        for i, probe in enumerate(self.probes):
            probe.stop = i == last
        with suppress(Stop):
            self.model(input_ids=ids.to(self.device), use_cache=False)
        for probe in self.probes:
            probe.stop = False

    def _learn_output_kind(self, state: State, ids: Tensor) -> None:
        """Whether blocks return a tensor or a tuple: asked of the first one, since the model's forward relies on it. It is the
        same for all models of a config, so the first of them is asked."""
        key = hash_of(type(self.model), state.config)
        if key not in _TUPLES:
            with self.outer(state):
                self._until(0, ids)
            args, kwargs = self.probes[0].call
            with self.block(state, 0) as block:
                kind = block(self.probes[0].hidden, *args, **kwargs)
            _TUPLES[key] = len(kind) if isinstance(kind, tuple) else 0
        for probe in self.probes:
            probe.tuple_out = _TUPLES[key]

    def logits(self, state: State, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """The logits [b, t, vocabulary] of each batch, whose hidden states have passed all blocks."""
        with self.behind(state):
            for batch in batches:
                yield self.head(batch)

    def load_rows(self, state: State, site: Site, rows: slice | list[int], matrix: Tensor | None) -> None:
        """Give the module of a head some rows of its matrix, and of a bias; `matrix` stands for the one that the state has."""
        self._names.load_rows(state, site, self.model.get_submodule(site.module), rows, matrix, self.device)

    def watch_head(self, state: State, batches: Sequence[Batch], head: Site, observe: Observe) -> None:
        """Show `observe` what the output head is given, for every batch."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            observe(head.input_key, {None: args[0].reshape(-1, args[0].shape[-1])}, None)
            raise Stop

        hook = self.model.get_submodule(head.module).register_forward_pre_hook(note, prepend=True)
        try:
            with self.behind(state):
                for batch in batches:
                    with suppress(Stop):
                        self.head(batch)
        finally:
            hook.remove()

    def head(self, batch: Batch) -> Tensor:
        """The logits of a batch that has passed all blocks; inside `behind`."""
        self.probes[-1].output = batch.hidden
        try:
            out: Tensor = self.model(input_ids=batch.tokens.to(self.device), use_cache=False).logits
        finally:
            self.probes[-1].output = None
        return out

    # --- the block in hand ---

    @contextmanager
    def block(self, state: State, index: int) -> Iterator[nn.Module]:
        """The block with this state's weights, on the device; back on meta afterwards."""
        with torch.no_grad():
            for name, module in self._modules(index):
                self._names.load(state, name, module, self.device)
            self._names.load_buffers(state, self.blocks[index], self.graph.blocks[index].module)
            _move_buffers(self.blocks[index], self.device)
            try:
                with (
                    skipping(state, index, self.holders),
                    self._rounds.within(state, index, self.holders),
                    rounding(state, index, self.blocks[index]),
                ):
                    yield self.blocks[index]
            finally:
                for name, module in self._modules(index):
                    self._names.drop(name, module)

    @contextmanager
    def without(self, state: State, index: int) -> Iterator[None]:
        """Inside, the block in hand has no weights, while something else needs the memory; it has this state's afterwards."""
        for name, module in self._modules(index):
            self._names.drop(name, module)
        yield
        for name, module in self._modules(index):
            self._names.load(state, name, module, self.device)

    def _modules(self, index: int) -> list[tuple[str, nn.Module]]:
        """The modules of a block that have parameters of their own, by their paths in the model."""
        block, path = self.blocks[index], self.graph.blocks[index].module
        return [(f"{path}.{p}" if p else path, m) for p, m in block.named_modules() if m._parameters]

    def advance(self, state: State, index: int, batches: Sequence[Batch]) -> None:
        """Pass every batch through one block as the state has it."""
        with self.block(state, index) as block:
            for batch in batches:
                batch.hidden = self.call(block, batch, index)
        self._finite(index, batches)

    def _finite(self, index: int, batches: Sequence[Batch]) -> None:
        """ModelError, naming the block, where what it put out is not finite: nothing behind it would mean anything."""
        if all(bool(batch.hidden.isfinite().all()) for batch in batches):
            return
        path, kind = self.graph.blocks[index].module, str(self.dtype)[6:]
        why = "the model is damaged, or its numbers are too large for it"
        if self.dtype == torch.float16:
            why = "its activations are too large for fp16; convert the model to bf16 or fp32 and name that one"
        raise ModelError(f"{path}: what it puts out in {kind} is not finite; {why}")

    def call(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        """The hidden states behind a block in hand."""
        args, kwargs = batch.calls[index]
        out = block(batch.hidden, *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def calibrate(
        self,
        state: State,
        index: int,
        batches: Sequence[Batch],
        sites: Sequence[Site],
        observe: Observe,
        solve: Callable[[str], dict[str, Tensor]],
        twin: Twin | None = None,
        rounds: Callable[[str], Rounding | None] | None = None,
    ) -> None:
        """Pass every batch through one block, stage by stage.

        At each tap (a stage of `sites`), `observe(stage, {expert or None: X [tokens, in]}, clean)` is called for every
        batch; once all have been seen, `solve(stage)` returns new matrices [out, in] by site name, and the forward pass
        goes on with them. With a `twin`, its batches go through its own weights in step, and `clean` is what it sees at the
        same place, and how far its residual stream is from the batch's; else None. What is observed has not been rounded;
        with `rounds`, the inputs of what was solved are from there on.
        """
        with ExitStack() as stack:
            beside = residuals(state) if twin else {}
            mine = self._lockstep(stack, state, index, batches, sites, beside)
            theirs = twin.stream._lockstep(stack, twin.state, index, twin.batches, sites, beside) if twin else None
            while mine.waiting:
                stage = mine.stage
                for inputs, clean in zip(mine.inputs, mine.clean(theirs) if theirs else repeat(None), strict=False):
                    observe(stage, inputs, clean)
                with twin.stream.without(twin.state, index) if twin else nullcontext():
                    made = solve(stage)
                    self._install(made)
                self._rounds.known |= {name: rounds(name) for name in made} if rounds else {}
                mine.go_on()
                if theirs:
                    theirs.go_on()
        self._finite(index, batches)

    def _lockstep(self, stack: ExitStack, state: State, index: int, batches: Sequence[Batch], sites: Sequence[Site],
                  beside: Mapping[str, str]) -> Lockstep:  # fmt: skip
        block = stack.enter_context(self.block(state, index))
        stack.enter_context(self._taps(block, index, sites, beside))
        return Lockstep(self.call, block, batches, index)

    @contextmanager
    def _taps(self, block: nn.Module, index: int, sites: Sequence[Site], beside: Mapping[str, str]) -> Iterator[None]:
        """Pause in front of the first matrix of each stage that holds one of `sites`, with what the module that is named for its
        site in `beside` was given."""
        path = self.graph.blocks[index].module
        stages: dict[str, list[Site]] = {}
        for site in sites:
            stages.setdefault(site.stage, []).append(site)
        hooks = []
        for stage, members in stages.items():
            module: Any = self.model_module(path, block, members[0].module)
            if members[0].expert is not None:
                module.taps = (*getattr(module, "taps", ()), stage)
            else:
                paths = [p for s in members for p in within(s, path)]
                given: dict[int, Tensor] = {}
                if members[0].name in beside:
                    module = self.model_module(path, block, beside[members[0].name])
                    hooks.append(module.register_forward_pre_hook(_noting(given)))
                hooks += self._pausing_hooks(path, block, stage, paths, given)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in block.modules():
                if hasattr(module, "taps"):
                    del module.taps

    def _pausing_hooks(self, path: str, block: nn.Module, stage: str, modules: list[str], given: dict[int, Tensor]) -> list[Any]:
        seen: set[int] = set()  # coroutines that have passed this stage: its other matrices need no pause

        def pause(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            me = greenlet.getcurrent()
            if id(me) not in seen:
                seen.add(id(me))
                me.parent.switch((stage, {None: x.reshape(-1, x.shape[-1])}, given.pop(id(me), None)))

        return [self.model_module(path, block, m).register_forward_pre_hook(pause, prepend=True, with_kwargs=True)
                for m in modules]  # fmt: skip

    def model_module(self, path: str, block: nn.Module, module: str) -> nn.Module:
        return block.get_submodule(module.removeprefix(path).lstrip("."))

    @contextmanager
    def swapped(self, matrices: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, sites of the block in hand have other matrices [out, in]."""
        before = {name: get_matrix(next(self.holders(self.graph[name])), self.graph[name]) for name in matrices}
        try:
            self._install(matrices)
            yield
        finally:
            self._install(before)

    def _install(self, matrices: Mapping[str, Tensor]) -> None:
        for name, matrix in matrices.items():
            site = self.graph[name]
            for module in self.holders(site):
                put_matrix(module, site, matrix.to(self.device, self.dtype))

    def holders(self, site: Site) -> Iterator[nn.Module]:
        """The modules of the block in hand that hold the site's matrix."""
        block = self.graph.blocks[site.block or 0]
        for path in within(site, block.module):
            yield self.model_module(block.module, self.blocks[block.index], path)


def _noting(given: dict[int, Tensor]) -> Callable[..., None]:
    """A hook that notes what its module is given in a coroutine."""
    return lambda _, args: given.update({id(greenlet.getcurrent()): args[0]})


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers to the device; their dtype is the architecture's business and stays."""
    for m in module.modules():
        for name, buffer in m._buffers.items():
            if buffer is not None:
                m._buffers[name] = buffer.to(device)
