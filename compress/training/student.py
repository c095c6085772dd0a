"""A state's model in memory, to be trained: everything between its blocks is the architecture's own (model/stream.py).

Unlike a stream it holds all of its weights at once, computes in fp32, and its graph reaches from the logits to whatever learns.
Of a block it keeps what autograd needs, or its input alone: the block is then run again on the way back (`checkpoint`). What is
kept may be kept smaller (saved.py, sketches.py). Nothing is kept of blocks in front of the first that learns. Matrices that do
not learn can be read whenever their layer is called: then one of them is in memory, as in a stream, and what learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compress.errors import ModelError
from compress.formats import LowRank, Packed
from compress.model.lockstep import Batch
from compress.model.seeds import seeded
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site
from compress.training import matrices
from compress.training.choice import Choice, Kind, learnt
from compress.training.options import Checkpoint, Way
from compress.training.saved import anew
from compress.training.saving import Saving
from compress.training.sketches import install


class Student(Stream):
    """A model whose chosen parts learn. learns: parameter -> its tensor, fp32, in a fixed order."""

    def __init__(self, state: State, choice: Choice, seed: int, device: str = "cpu", keeps: Sequence[Way] = (),
                 streamed: bool = False, folder: Path | None = None):  # fmt: skip
        """keeps: what of activations, see options.py. streamed: matrices that do not learn are read when they are needed.
        folder: where activations go that do not stay in memory."""
        super().__init__(state, device, dtype=torch.float32)
        self.state, self.choice, self.streamed = state, choice, streamed
        self.again = any(isinstance(way, Checkpoint) for way in keeps)
        self.saving = Saving(keeps, self.device, folder, heads=not anew(self.model.config))
        self.remaking = matrices.Remaking()
        self.matrices: dict[str, matrices.Matrix] = {}
        self.tensors: dict[str, nn.Parameter] = {}  # those that are no site's and learn, by their names in the checkpoint
        self._held: dict[nn.Module, dict[str, Tensor]] = {}
        self._seed = seed
        for path, module in self._everything():
            self._fill(path, module)
        for index, block in enumerate(self.graph.blocks):
            self._names.load_buffers(state, self.blocks[index], block.module)
            if self.saving.sketch is not None:
                install(self.blocks[index], block.module, self.saving.sketch)
        self._learn_output_kind(state, torch.zeros(1, 2, dtype=torch.int64))
        found = {f"{site}:{n}": p for site, m in self.matrices.items() for n, p in m.named_parameters() if p.requires_grad}
        self.learns: dict[str, nn.Parameter] = found | self.tensors
        self._learnt = {what.name: what for what in learnt(state, choice)}

    def begin(self, step: int) -> None:
        """A step: what is drawn in its passes is drawn from its number."""
        self.saving.begin(seeded(self._seed, f"activations {step}").initial_seed())

    @property
    def _first(self) -> int:
        """The first block that learns now."""
        blocks = [what.first for n, what in self._learnt.items() if self.learns[n].requires_grad]
        return min((b for b in blocks if b is not None), default=len(self.blocks))

    # --- what it is made of ---

    def _everything(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module with parameters of its own, by its path in the model."""
        yield from ((p, m) for p, m in self.model.named_modules() if m._parameters)
        for index in range(len(self.blocks)):
            yield from self._modules(index)

    def _fill(self, path: str, module: nn.Module) -> None:
        for name in list(module._parameters):
            full = f"{path}.{name}"
            if full not in self._names.meta:
                continue
            sites = self._names.sites.get(full)
            if sites:
                parts = [(site, self._matrix(self.graph[site.tied] if site.tied else site)) for site in sites]
                self._lend(module, name, partial(_joined, parts, self.state.dtype))
            else:
                module._parameters[name] = parameter = self._other(full)
                if parameter.requires_grad:
                    self._lend(module, name, partial(_as_stored, parameter, self.state.dense.specs[self._held_as(full)].dtype))

    def _other(self, full: str) -> nn.Parameter:
        """A parameter that is no site's."""
        held = self._held_as(full)
        if held in self.tensors:
            return self.tensors[held]
        tensor = self.state.dense.read_finite(held).to(self.device)
        learns = held in self.choice.tensors
        parameter = nn.Parameter(tensor.float() if tensor.is_floating_point() else tensor, requires_grad=learns)
        if learns:
            self.tensors[held] = parameter
        return parameter

    def _held_as(self, full: str) -> str:
        """The name in the checkpoint of such a parameter."""
        names = self._names._names_of(full)
        held = next((self._names.places[n] for n in names if self._names.places.get(n, "") in self.state.dense), None)
        if held is None:
            raise ModelError(f"{self.state.dense.folder}: no tensor for '{full}'; config and weights do not belong together")
        return held

    def _matrix(self, site: Site) -> matrices.Matrix:
        if site.name not in self.matrices:
            self.matrices[site.name] = self._made(site, self.choice.kind(site))
        return self.matrices[site.name]

    def _made(self, site: Site, kind: Kind) -> matrices.Matrix:
        fmt = self.state.format(site)
        if self.streamed and not kind & (Kind.WEIGHTS | Kind.SCALES) and not isinstance(fmt, LowRank):
            codes = self.state.codes[site.name].load if fmt is not None else None
            read = matrices.Read(self.device, partial(self.state.reference, site), codes)
            return self._corrected(site, read, self.choice.formats.get(site.name)) if Kind.FACTORS in kind else read
        if fmt is None:
            dense = matrices.Free(self.state.reference(site).to(self.device), Kind.WEIGHTS in kind)
            return self._corrected(site, dense, None) if Kind.FACTORS in kind else dense
        packed = self.state.codes[site.name].load()
        if isinstance(fmt, LowRank):
            factors = {n: t for n, t in packed.tensors.items() if n.startswith("lora_")}
            base = Packed(fmt.base, packed.shape, {n: t for n, t in packed.tensors.items() if n not in factors})
            A_rk, B_nr = (f.to(self.device) for f in fmt.factor_matrices(packed.tensors))
            return matrices.Corrected(self._coded(base, kind), A_rk, B_nr, fmt, None if Kind.FACTORS in kind else factors)
        coded = self._coded(packed, kind)
        return self._corrected(site, coded, self.choice.formats[site.name]) if Kind.FACTORS in kind else coded

    def _coded(self, packed: Packed, kind: Kind) -> matrices.Matrix:
        if Kind.WEIGHTS in kind:
            return matrices.Rounded(packed, self.device)
        return (matrices.Scaled if Kind.SCALES in kind else matrices.Packed)(packed, self.device)

    def _corrected(self, site: Site, base: matrices.Matrix, fmt: LowRank | None) -> matrices.Matrix:
        """With new factors: A drawn, B zero, so that nothing changes at first (LoRA, arXiv 2106.09685, section 4.1)."""
        (n, k), r = site.shape, self.choice.rank
        A_rk = torch.randn(r, k, generator=seeded(self._seed, site.name)) / k**0.5
        return matrices.Corrected(base, A_rk.to(self.device), torch.zeros(n, r, device=self.device), fmt)

    # --- how modules come by their matrices ---

    def _lend(self, module: nn.Module, name: str, make: Callable[[], Tensor]) -> None:
        """The module finds what is made under this name while it is called, and at no other time."""

        def give(_: nn.Module, args: Any) -> None:
            if module is self._spared:
                return
            held = self._held.get(module, {})
            if name not in held:
                matrix = make()
                self.remaking.lend(matrix, make)
                if module in self._held:
                    held[name] = matrix
            else:
                matrix = held[name]
            module.__dict__[name] = matrix

        def take(_: nn.Module, args: Any, out: Any) -> None:
            matrix = module.__dict__.pop(name, None)
            if matrix is not None and name not in self._held.get(module, {}):
                self.remaking.take_back(matrix)

        module.register_forward_pre_hook(give)
        module.register_forward_hook(take)

    @contextmanager
    def holding_head(self) -> Iterator[None]:
        """Inside, the matrix of the output head is made once, however often it is called."""
        site = next((s for s in self.graph if s.role == "head"), self.graph["embed"])
        modules = [self.model.get_submodule(path) for path in (site.module, *site.aliases)]
        for module in modules:
            self._held[module] = {}
        try:
            yield
        finally:
            for module in modules:
                for matrix in self._held.pop(module).values():
                    self.remaking.take_back(matrix)

    # --- its forward pass ---

    @contextmanager
    def outer(self, state: State) -> Iterator[None]:
        yield

    @contextmanager
    def block(self, state: State, index: int) -> Iterator[nn.Module]:
        yield self.blocks[index]

    def forward(self, ids: Tensor, seen: Callable[[int, Tensor], None] | None = None) -> Batch:
        """Token ids [b, t] through all blocks; `seen` is shown what each puts out."""
        with nullcontext() if self.choice.kind(self.graph["embed"]) else self._looked_up(self.state, [ids]):
            self._until(len(self.probes) - 1, ids)
        batch = Batch(ids, self.probes[0].hidden, [probe.call for probe in self.probes])
        learning, first = torch.is_grad_enabled(), 0 if batch.hidden.requires_grad else self._first
        for index, block in enumerate(self.blocks):
            if learning and index == first and not batch.hidden.requires_grad:
                batch.hidden = batch.hidden.detach().requires_grad_()
            with torch.set_grad_enabled(learning and index >= first):
                batch.hidden = self._through(block, batch, index)
            if seen is not None:
                seen(index, batch.hidden)
        return batch

    def _through(self, block: nn.Module, batch: Batch, index: int) -> Tensor:
        if self.again and torch.is_grad_enabled():

            def run(hidden: Tensor) -> Tensor:
                return self.call(block, Batch(batch.tokens, hidden, batch.calls), index)

            with self.remaking.kept_as_notes(self.saving.over(batch.tokens)):
                found: Any = checkpoint(run, batch.hidden, use_reentrant=True, preserve_rng_state=False)
            return torch.as_tensor(found)
        with self.remaking.kept_as_notes(self.saving.over(batch.tokens)):
            return self.call(block, batch, index)


def _joined(parts: list[tuple[Site, matrices.Matrix]], dtype: torch.dtype) -> Tensor:
    """The tensor that a module holds, rounded to the model's dtype: a matrix, its transpose, or all experts' matrices in one."""
    made = _parts(parts)
    return made if dtype == torch.float32 else matrices.through(made, lambda W: W.to(dtype))


def _as_stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm, a bias and the like that learns, rounded as it will be stored."""
    return parameter if dtype == torch.float32 else matrices.through(parameter, lambda p: p.to(dtype))


def _parts(parts: list[tuple[Site, matrices.Matrix]]) -> Tensor:
    if parts[0][0].expert is None:
        site, matrix = parts[0]
        made: Tensor = matrix()
        return made.T if site.transposed else made
    experts: dict[int, dict[str, Tensor]] = {}
    for site, matrix in parts:
        experts.setdefault(site.expert or 0, {})[site.role] = matrix()
    if "down" in experts[0]:
        return torch.stack([experts[e]["down"] for e in sorted(experts)])
    return torch.stack([torch.cat([experts[e]["gate"], experts[e]["up"]]) for e in sorted(experts)])
