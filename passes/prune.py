"""The pass `prune`: fewer neurons in every MLP, fewer groups of heads, fewer experts, and a plain smaller model.

The mathematics is in obs_core.py; which tensors lose what with a unit is in model/couplings.py; here is the walk over the model.
A unit goes out of the matrix that reads it (down, o), whose other columns then make up for it on the calibration text. As in
`quantize`, the inputs of every block carry the error of the blocks before it, and a twin of the model as it was says what the
outputs ought to be. The block in hand is passed at its old size, with zeros for the columns that go; then the smaller block takes
its place, and what it puts out is compared with that, so that a coupling which an architecture does not have in truth is found by
the first block. Experts are chosen in prune_experts.py by what the same walk shows of them; there nothing is made up for, and
the check is another one.

Every layer keeps the same number, so that the result loads wherever the model did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.manager import Context, Cost, Pass, Record
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, named, without
from compress.model.experts import heard
from compress.model.lockstep import Batch, Inputs
from compress.model.mixtures import Fewer, fewer, numbers
from compress.model.speed import computing, precision
from compress.model.stream import Stream, Twin
from compress.model.work import block_bytes, per_token
from compress.passes import gptq_core
from compress.passes import obs_core as core
from compress.passes.prune_experts import Mixture, alike
from compress.passes.solver import Drift
from compress.state import Aspect, Fact, State
from compress.state.state import Part

SAME = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the block's largest output
WIDE = 1024  # neurons from which engines want multiples of 128


class Prune(Pass):
    """Take neurons of MLPs, groups of heads and experts away, and make up for them in what is left."""

    name: ClassVar[str] = "prune"
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.PRUNED
    writes: ClassVar[Aspect] = Aspect.STRUCTURE | Aspect.WEIGHTS

    mlp: float = Field(1.0, gt=0, le=1, description="share of the neurons of every MLP that stays")
    kv_groups: float = Field(1.0, gt=0, le=1, description="share of the groups of heads, with their keys and values, that stays")
    experts: float = Field(1.0, gt=0, le=1, description="share of the experts of every mixture that stays")
    method: Literal["obs", "wanda", "flap", "magnitude"] = Field(
        "obs",
        description="who goes: by what the others can make up for (obs), by weights and activations, or by weights alone; "
        "experts by what they put out, weighted by the gate (obs), or by weights alone (magnitude), and by no other",
    )
    compensate: bool = Field(True, description="whether what stays makes up for what goes, by least squares")
    multiple: int | None = Field(
        None, ge=1, description="what the number of neurons is rounded up to; default: 128 in wide MLPs, less in narrow ones"
    )
    damp: float | None = Field(
        None, gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal; default: 0.01, more for few tokens"
    )
    drift: float = Field(0.5, ge=0, le=1, description="share of the error in a block's inputs that it makes up for")

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if self.mlp == self.kv_groups == self.experts == 1:
            raise RecipeError("'prune' takes nothing away; name a share below 1 under mlp, kv_groups or experts, or leave it out")
        if self.experts < 1 and self.method not in ("obs", "magnitude"):
            raise RecipeError(f"'{self.method}' does not rank experts; use obs or magnitude, or two steps 'prune'", ("method",))
        if not calibrated and (self.method != "magnitude" or self._compensates):
            raise RecipeError("'prune' needs data.calibration; add it, or use method: magnitude with compensate: false")

    @property
    def _compensates(self) -> bool:
        """Whether there is a matrix that makes up for what goes: what is lost with experts nothing makes up for."""
        return self.compensate and (self.mlp < 1 or self.kv_groups < 1)

    @property
    def corrects(self) -> bool:
        """Whether a twin of the model as it was runs beside."""
        return self._compensates and self.drift > 0

    def foresee(self, state: State) -> State:
        if state.plan is not None:
            raise RecipeError("an earlier step has planned formats for these shapes; move 'prune' in front of it")
        return self._smaller(state).state

    def _smaller(self, state: State) -> Fewer:
        """Experts go after everything else."""
        state = self._narrower(state)
        if self.experts == 1:
            return Fewer(state, {}, ())
        try:
            units, least = numbers(state)
            count = max(1, math.ceil(units * self.experts - 1e-9))
            if count == units:
                raise RecipeError(f"{self.experts:g} of {units} experts, rounded up, are all of them")
            if count < least:
                raise RecipeError(f"{self.experts:g} of {units} experts are {count}, and every token wants {least}; "
                                  f"keep at least {least} of {units}")  # fmt: skip
            return fewer(state, count)
        except (ModelError, RecipeError) as e:
            raise type(e)(str(e), ("experts",)) from None

    def _narrower(self, state: State) -> State:
        """With fewer neurons and groups of heads."""
        if self.mlp == self.kv_groups == 1:
            return state
        found, counts = self._wanted(state)
        if self.kv_groups == 1:
            return without(state, found, counts)
        groups = next(c.units for c in found if c.kind == KV_GROUPS)
        refused: ModelError | None = None
        for count in range(counts[KV_GROUPS], groups):  # some architectures allow only some numbers of heads
            try:
                return without(state, found, {**counts, KV_GROUPS: count})
            except ModelError as e:
                refused = refused or e
        assert refused is not None
        raise ModelError(str(refused), ("kv_groups",))

    def _wanted(self, state: State) -> tuple[list[Coupling], dict[str, int]]:
        """The couplings that lose units, and how many of each kind are to stay."""
        every, found, counts = list(couplings(state)), [], {}
        for kind, share in ((MLP, self.mlp), (KV_GROUPS, self.kv_groups)):
            if share == 1:
                continue
            mine = [c for c in every if c.kind == kind]
            if not mine:
                raise ModelError(f"'{state.graph.family}' has no {named(kind)} that 'prune' knows; leave '{kind}' out", (kind,))
            odd = next((c for c in mine if c.obstacle), None)
            if odd is not None:
                raise ModelError(
                    f"{named(kind)} of '{state.graph.family}' cannot go: {odd.obstacle}; leave '{kind}' out", (kind,)
                )
            if len({c.units for c in mine}) > 1:
                raise ModelError(f"layers of '{state.graph.family}' differ in their {named(kind)}; leave '{kind}' out", (kind,))
            units = mine[0].units
            step = 1 if kind == KV_GROUPS else self.multiple or natural(units)
            counts[kind] = min(units, max(1, -int(-units * share // step)) * step)
            if counts[kind] == units:
                raise RecipeError(f"{share:g} of {units} {named(kind)}, rounded up to {step}s, are all of them", (kind,))
            found += mine
        return found, counts

    def remarks(self, state: State) -> Iterator[str]:
        """How many of each kind stay, what the config then says, and what becomes smaller."""
        smaller = self._smaller(state)
        made = smaller.state
        now = {(c.kind, c.block): c.units for c in couplings(made)}
        for kind in (MLP, KV_GROUPS):
            found = next((c for c in couplings(state) if c.kind == kind), None)
            if found is not None and now[kind, found.block] != found.units:
                yield f"prune keeps {now[kind, found.block]} of {found.units} {named(kind)} in every layer"
        if self.experts < 1:
            yield f"prune keeps {numbers(made)[0]} of {numbers(state)[0]} experts in every layer"
        if smaller.gone:
            yield "prune takes away what predicts further tokens: it has experts of its own, which no text reaches here"
        before, after = (s.config.get_text_config().to_dict() for s in (state, made))
        told = [f"{k} {before.get(k)} → {v}" for k, v in sorted(after.items()) if isinstance(v, int) and before.get(k) != v]
        counts = [f"{sum(math.prod(spec.shape) for spec in s.specs):,}" for s in (state, made)]
        yield f"prune: {', '.join(told)}; {' → '.join(counts)} parameters{_cache(state, made)}"

    def run(self, state: State, ctx: Context) -> State:
        (found, _), smaller = self._wanted(state), self._smaller(state)
        left = {(c.kind, c.block): c.units for c in couplings(smaller.state)}
        aim = _Aim(smaller.state, found, left, smaller.cuts)
        if ctx.calibration is None:
            return self._without_data(state, aim, ctx)
        with precision("bf16"):
            return self._walk(state, aim, ctx)

    def _walk(self, before: State, aim: _Aim, ctx: Context) -> State:
        stream, batches = ctx.stream(before)
        made, twin, smaller, ours = aim.made, self._twin(before, ctx), None, list[Batch]()
        for block in before.graph.blocks:
            ctx.progress(block.index, len(before.graph.blocks), block.module)
            done, work = ctx.store.committed(f"block-{block.index:04}"), None
            if done is None:
                work = _Block.of(self, before, ctx, aim, block.index)
                work.see(stream, batches, twin)
                done = work.commit()
            elif twin:
                twin.stream.advance(twin.state, block.index, twin.batches)
            made = made.with_part(done)
            if smaller is None:  # the first block has its tensors only now
                smaller, ours = ctx.stream(made)
            with work.heard_after(smaller) if work else nullcontext():
                smaller.advance(made, block.index, ours)
            if work:
                work.compare(made, block.module, ours[0].hidden, batches[0].hidden)
            for mine, theirs in zip(batches, ours, strict=True):
                mine.hidden = theirs.hidden
        return made

    def _twin(self, state: State, ctx: Context) -> Twin | None:
        if not self.corrects:
            return None
        stream, batches = ctx.stream(state)
        return Twin(stream, state, batches)

    def _without_data(self, state: State, aim: _Aim, ctx: Context) -> State:
        """By weights alone: nothing streams."""
        made = aim.made
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), block.module)
            done = ctx.store.committed(f"block-{block.index:04}")
            if done is None:
                work = _Block.of(self, state, ctx, aim, block.index)
                for coupling in work.couplings:
                    work.cut(coupling, None)
                done = work.commit()
            made = made.with_part(done)
        return made

    def cost(self, state: State, tokens: int) -> Cost:
        """Forward passes of the model as it was, of its twin, and of the smaller one; the Hessians of readers, in fp64."""
        readers = [c.reader for c in couplings(state) if (self.mlp if c.kind == MLP else self.kv_groups) < 1]
        if not (readers or self.experts < 1) or not tokens:
            return Cost(peak_bytes=block_bytes(state))
        work, widest = per_token(state), max((s.shape[1] for s in readers), default=0)
        passes = (2 + self.corrects) * tokens
        hessians = sum(1.0 * s.shape[1] ** 2 for s in readers)
        solving = sum(4.0 * float(s.shape[1]) ** 3 + 4.0 * s.numel * s.shape[1] for s in readers)
        held = (2 + self.corrects) * tokens * computing(state.dtype).itemsize * (widest + 2 * state.graph["embed"].shape[1])
        peak = held + 2 * block_bytes(state) + 28 * widest**2
        return Cost(2.0 * passes * work.weights + 4.0 * tokens * hessians, solving, 0, peak, numbers=passes * work.numbers)


def natural(units: int) -> int:
    """What the number of neurons is rounded up to: what formats and engines divide them by."""
    most = 128 if units >= WIDE else 32
    step = 1
    while step < most and units % (2 * step) == 0:
        step *= 2
    return step


def _cache(before: State, after: State) -> str:
    """What the cache of keys and values takes for a token, where that changes."""
    found = [sum(site.shape[0] for site in s.graph.linear if site.role in ("k", "v")) * s.dtype.itemsize
             for s in (before, after)]  # fmt: skip
    return "" if found[0] == found[1] else f"; {found[0]:,} → {found[1]:,} bytes of cache for each token"


@dataclass(frozen=True)
class _Aim:
    """What is to be: the smaller model; the couplings that lose units, and what is left of each kind and block; and, by block and
    tensor, the dimension along which experts go."""

    made: State
    found: Sequence[Coupling]
    left: dict[tuple[str, int], int]
    cuts: Mapping[int, Mapping[str, int]]


@dataclass
class _Block:
    """One block's worth of pruning: sums as they are seen, then tensors."""

    options: Prune
    state: State
    ctx: Context
    index: int
    couplings: list[Coupling]
    left: dict[tuple[str, int], int]
    mixture: Mixture | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    hessian: Tensor | None = None
    mean: Tensor | None = None
    drift: Drift | None = None
    tokens: int = 0

    @classmethod
    def of(cls, options: Prune, state: State, ctx: Context, aim: _Aim, index: int) -> _Block:
        mine, cuts = [c for c in aim.found if c.block == index], aim.cuts.get(index)
        mixture = Mixture(state, index, numbers(aim.made)[0], cuts) if cuts else None
        return cls(options, state, ctx, index, mine, aim.left, mixture)

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
        with heard(stream.blocks[self.index], self.mixture.see) if self.mixture else nullcontext():
            if readers:
                stream.calibrate(self.state, self.index, batches, readers, self._observe, self._solve, twin)
                return
            stream.advance(self.state, self.index, batches)
        if twin:
            twin.stream.advance(twin.state, self.index, twin.batches)

    def _observe(self, stage: str, inputs: Inputs, clean: Inputs | None) -> None:
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
                self.drift = Drift([self._coupling(stage).reader], self.state, K, self.ctx.device)
            self.drift.see(X_tk, clean[None])

    def _coupling(self, stage: str) -> Coupling:
        return next(c for c in self.couplings if c.reader.stage == stage)

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
        gone = self._order(c, problem)[: c.units - self.left[c.kind, c.block]]
        kept = problem.kept(gone)
        columns = c.columns[kept].flatten()
        solved = core.compensate(problem, kept) if self.options.compensate else problem.W_nk[:, columns]
        dtype = self.state.dense.specs[c.reader.weight].dtype
        solved = solved.to(dtype)
        for name, cut in c.cuts.items():
            whole = self.state.dense.read_finite(name)
            self.tensors[name] = whole.index_select(cut.dim, cut.left(whole.shape[cut.dim], kept)).contiguous()
        order = columns.argsort()
        small = solved[:, order].cpu()
        self.tensors[c.reader.weight] = (small.T if c.reader.transposed else small).contiguous()
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
        return core.prepare(W_nk, H_kk, c.columns.to(W_nk.device), damp=damp), notes

    def _order(self, c: Coupling, p: core.Problem) -> Tensor:
        """The units in the order in which they go."""
        if self.options.method == "obs":
            return core.sweep(p, c.units - self.left[c.kind, c.block]).order_u
        if self.options.method == "wanda":
            return core.ranked(core.wanda(p))
        if self.options.method == "flap":
            assert self.mean is not None
            return core.ranked(core.flap(p, self.mean / self.tokens))
        return core.ranked(core.magnitude(p, self._producers(c).to(p.W_nk.device)))

    def _producers(self, c: Coupling) -> Tensor:
        """The squared norm of the rows that make each unit's inputs [units]."""
        total = torch.zeros(c.units, dtype=torch.float64)
        for name, cut in c.cuts.items():
            tensor = self.state.dense.read_finite(name)
            if name != c.reader.weight and tensor.ndim == 2:
                total += tensor.double().square().sum(1 - cut.dim)[cut.rows].sum(1)
        return total

    def _note(self, c: Coupling, loss: float, energy: float, notes: tuple[str, ...], start: float) -> None:
        count, error = self.left[c.kind, c.block], loss / (energy or 1.0)
        record = {"site": c.reader.name, "kind": c.kind, "kept": count, "units": c.units, "error": error,
                  "seconds": time.perf_counter() - start,
                  "notes": [f"{count} of {c.units} {named(c.kind)}, error {error:.2e}", *notes]}  # fmt: skip
        self.records.append(record)
        self.ctx.say(record)


def same(state: State, path: str, found: Tensor, wanted: Tensor) -> None:
    """ModelError where the smaller block does not compute what the block with zeros did: then its units are not those cut."""
    off = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-9))
    if not off <= SAME[state.dtype]:
        raise ModelError(f"{path}: without what was cut it computes something else, by {off:.2%}; 'prune' does not know "
                         f"'{state.graph.family}': leave out mlp or kv_groups, or the pass")  # fmt: skip
