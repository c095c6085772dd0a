"""One block's worth of pruning: what its readers are given, who goes, and the tensors that are left.

Rows of a reader are solved one by one, so what an output counts for matters to nothing but the choice of who goes. Where a norm
stands behind the reader, as in Gemma, its weights say that: they differ by factors of a thousand, and unweighed errors are
those of a few outputs. Left out, they made the choice no better than Wanda's on Gemma 3 270M, and worse once it was compensated.
The Fisher information of the outputs, from a backward pass, was tried in their place, and gained little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import ModelError, naming
from compress.manager import Context, Record
from compress.model.couplings import Coupling, named
from compress.model.experts import heard
from compress.model.lockstep import Batch, Clean, Inputs, apart
from compress.model.mixtures import numbers
from compress.model.speed import precision
from compress.model.stream import Stream, Twin
from compress.passes import gptq_core
from compress.passes import obs_core as core
from compress.passes.drift import Drift
from compress.passes.prune_experts import Mixture, alike
from compress.state import State
from compress.state.state import Part

SAME = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the block's largest output


class Cuts(Protocol):
    """The options of `prune` that are asked here."""

    @property
    def method(self) -> str: ...
    @property
    def compensate(self) -> bool: ...
    @property
    def corrects(self) -> bool: ...
    @property
    def damp(self) -> float | None: ...
    @property
    def drift(self) -> float: ...


@dataclass(frozen=True)
class Aim:
    """What is to be: the smaller model; the couplings that lose units, and what is left of each kind and block; and, by block and
    tensor, the dimension along which experts go. norms: reader -> what a norm behind it multiplies its outputs [N] by."""

    made: State
    found: Sequence[Coupling]
    left: dict[tuple[str, int], int]
    cuts: Mapping[int, Mapping[str, int]]
    norms: Mapping[str, Tensor]


@dataclass
class Block:
    """One block's worth of pruning: sums as they are seen, then tensors."""

    options: Cuts
    state: State
    ctx: Context
    aim: Aim
    index: int
    couplings: list[Coupling]
    mixture: Mixture | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    hessian: Tensor | None = None
    mean: Tensor | None = None
    drift: Drift | None = None
    tokens: int = 0

    @classmethod
    def of(cls, options: Cuts, state: State, ctx: Context, aim: Aim, index: int) -> Block:
        mine, cuts = [c for c in aim.found if c.block == index], aim.cuts.get(index)
        mixture = Mixture(state, index, numbers(aim.made)[0], cuts) if cuts else None
        return cls(options, state, ctx, aim, index, mine, mixture)

    def commit(self) -> Part:
        """Choose the experts, which have all been seen by now, and keep everything that is left."""
        if self.mixture:
            tensors, record = self.mixture.cut(self.options.method == "magnitude")
            self.tensors |= tensors
            self.records.append(record)
            self.ctx.say(record)
        return self.ctx.store.commit(f"block-{self.index:04}", dense=self.tensors, records=self.records)

    def heard_after(self, stream: Stream) -> AbstractContextManager[None]:
        """Inside, what the smaller mixture does with the first batch is noted."""
        return heard(stream.blocks[self.index], self.mixture.see_after) if self.mixture else nullcontext()

    def compare(self, made: State, path: str, found: Tensor, wanted: Tensor) -> None:
        """ModelError where the smaller block does not compute what it should; what comes out of a mixture cannot be compared."""
        if self.mixture is None:
            return same(made, path, found, wanted)
        before, after = self.mixture.routings
        same(made, path, after.hidden, before.hidden)
        alike(path, made.graph.family, before, after, self.mixture.kept)

    def see(self, stream: Stream, batches: Sequence[Batch], twin: Twin | None) -> None:
        """Pass the batches through the block, and cut each coupling once what its reader is given has been seen."""
        readers = [c.reader for c in self.couplings]
        with self._silenced(stream), heard(stream.blocks[self.index], self.mixture.see) if self.mixture else nullcontext():
            if readers:
                stream.calibrate(self.state, self.index, batches, readers, self._observe, self._solve, twin)
                return
            stream.advance(self.state, self.index, batches)
        if twin:
            twin.stream.advance(twin.state, self.index, twin.batches)

    @contextmanager
    def _silenced(self, stream: Stream) -> Iterator[None]:
        """Inside, sublayers that go whole put out zeros, whatever biases they have: what stands behind them is to see that."""
        block, path = stream.blocks[self.index], f"{self.state.graph.blocks[self.index].module}."
        gone = [block.get_submodule(c.reader.module.removeprefix(path)) for c in self.couplings if self._lost(c) == c.units]
        hooks = [module.register_forward_hook(lambda _, args, out: torch.zeros_like(out)) for module in gone]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _observe(self, stage: str, inputs: Inputs, clean: Clean | None) -> None:
        X_tk = inputs[None]
        K = X_tk.shape[1]
        if self.hessian is None:
            self.hessian, self.mean = torch.zeros(K, K, device=X_tk.device), torch.zeros(K, device=X_tk.device)
        assert self.mean is not None
        gptq_core.accumulate(self.hessian, X_tk)
        self.mean += X_tk.float().sum(0)
        self.tokens += len(X_tk)
        if clean is not None and self.options.corrects:
            if self.drift is None:
                self.drift = Drift.of_stage([self._coupling(stage).reader], self.state, clean, self.ctx.device)
            self.drift.see(X_tk, clean)

    def _coupling(self, stage: str) -> Coupling:
        return next(c for c in self.couplings if c.reader.stage == stage)

    def _lost(self, c: Coupling) -> int:
        """How many units go."""
        return c.units - self.aim.left.get((c.kind, c.block), 0)  # a sublayer that goes has no units any more

    def _solve(self, stage: str) -> dict[str, Tensor]:
        assert self.hessian is not None
        coupling = self._coupling(stage)
        with precision("ieee"):
            matrix = self.cut(coupling, gptq_core.finish(self.hessian).div_(self.tokens))
        self.hessian = self.mean = self.drift = None
        self.tokens = 0
        return {coupling.reader.name: matrix}

    def cut(self, c: Coupling, H_kk: Tensor | None) -> Tensor:
        """Choose what stays, keep the tensors that are left; the reader's matrix [out, in], with zeros for what goes."""
        start, W_nk = time.perf_counter(), self.state.reference(c.reader).to(self.ctx.device, torch.float32)
        problem, notes = self._problem(c, W_nk, H_kk)
        gone = self._order(c, problem)[: self._lost(c)]
        kept = problem.kept(gone)
        columns = c.columns[kept].flatten()
        solved = core.compensate(problem, kept) if self.options.compensate else problem.W_nk[:, columns]
        dtype = self.state.dense.specs[c.reader.weight].dtype
        solved = solved.to(dtype)
        if len(kept):
            small = solved[:, columns.argsort()].cpu()
            self.tensors[c.reader.weight] = (small.T if c.reader.transposed else small).contiguous()
        for name, cut in c.producers.items() if len(kept) else ():
            whole = self.state.dense.read_finite(name)
            self.tensors[name] = whole.index_select(cut.dim, cut.left(whole.shape[cut.dim], kept)).contiguous()
        self._note(c, core.loss(problem, kept, solved), core.loss(problem, problem.columns_uw.new_empty(0)), notes, start)
        return torch.zeros_like(W_nk, dtype=dtype).index_copy_(1, columns, solved)

    def _problem(self, c: Coupling, W_nk: Tensor, H_kk: Tensor | None) -> tuple[core.Problem, tuple[str, ...]]:
        """W, aimed at the outputs of the model as it was, and the Hessian of its inputs; the identity where nothing was seen."""
        if H_kk is None:
            H_kk = torch.eye(W_nk.shape[1], device=W_nk.device)
        notes: tuple[str, ...] = ()
        damp = self.options.damp or gptq_core.damp_for(len(H_kk), self.tokens)
        if self.drift is not None:
            factor = gptq_core.factor(H_kk, damp=damp)
            notes = factor.notes
            if factor.lam > 0:
                W_nk = gptq_core.retarget(W_nk, self.drift.of([c.reader], W_nk), factor, self.options.drift / self.drift.tokens)
        with naming(c.reader.name):
            return core.prepare(W_nk, H_kk, c.columns.to(W_nk.device), damp=damp), notes

    def _order(self, c: Coupling, p: core.Problem) -> Tensor:
        """The units in the order in which they go."""
        if self.options.method == "obs":
            norm = self.aim.norms.get(c.reader.name)
            if norm is not None:  # rows are independent but for the choice of who goes
                p = replace(p, W_nk=p.W_nk * norm.to(p.W_nk)[:, None])
            with naming(c.reader.name):
                return core.sweep(p, self._lost(c)).order_u
        if self.options.method == "wanda":
            return core.ranked(core.wanda(p))
        if self.options.method == "flap":
            assert self.mean is not None
            return core.ranked(core.flap(p, self.mean / self.tokens))
        return core.ranked(core.magnitude(p, self._producers(c).to(p.W_nk.device)))

    def _producers(self, c: Coupling) -> Tensor:
        """The squared norm of the rows that make each unit's inputs [units]."""
        total = torch.zeros(c.units, dtype=torch.float64)
        for name, cut in c.producers.items():
            tensor = self.state.dense.read_finite(name)
            if tensor.ndim == 2:
                total += tensor.double().square().sum(1 - cut.dim)[cut.rows].sum(1)
        return total

    def _note(self, c: Coupling, loss: float, energy: float, notes: tuple[str, ...], start: float) -> None:
        count, error = c.units - self._lost(c), loss / (energy or 1.0)
        record = {"site": c.reader.name, "kind": c.kind, "kept": count, "units": c.units, "error": error,
                  "seconds": time.perf_counter() - start,
                  "notes": [f"{count} of {c.units} {named(c.kind)}, error {error:.2e}", *notes]}  # fmt: skip
        self.records.append(record)
        self.ctx.say(record)


def same(state: State, path: str, found: Tensor, wanted: Tensor) -> None:
    """ModelError where the smaller block does not compute what the block with zeros did: then its units are not those cut."""
    off = apart(found, wanted)
    if not off <= SAME[state.dtype]:
        raise ModelError(f"{path}: without what was cut it computes something else, by {off:.2%}; 'prune' does not know "
                         f"'{state.graph.family}': leave out mlp or kv_groups, or the pass")  # fmt: skip
