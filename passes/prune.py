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
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.manager import Context, Cost, Pass
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, named, without
from compress.model.feeds import norms_behind
from compress.model.lockstep import Batch
from compress.model.mixtures import Fewer, fewer, numbers
from compress.model.speed import precision
from compress.model.stream import Twin
from compress.model.work import advancing_bytes, block_bytes, cached, per_token, waiting_bytes
from compress.passes.prune_block import Aim, Block
from compress.state import Aspect, Fact, State

SWEEP, JUDGED = 8.0, 12.0  # operations, as of fp32, for K³ of a reader's sweep and factors, and for N K² of its losses
SOLVED = 26  # bytes for K²: the Hessian, and two matrices in fp64 with what is in hand of them
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
            return Fewer(state, {})
        try:
            had, least = numbers(state)
            count = max(1, math.ceil(had * self.experts - 1e-9))
            if count == had:
                raise RecipeError(f"{self.experts:g} of {had} experts, rounded up, are all of them")
            if count < least:
                raise RecipeError(f"{self.experts:g} of {had} experts are {count}, and every token wants {least}; "
                                  f"keep at least {least} of {had}")  # fmt: skip
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
            had = mine[0].units
            step = 1 if kind == KV_GROUPS else self.multiple or natural(had)
            counts[kind] = min(had, max(1, -int(-had * share // step)) * step)
            if counts[kind] == had:
                raise RecipeError(f"{share:g} of {had} {named(kind)}, rounded up to {step}s, are all of them", (kind,))
            found += mine
        return found, counts

    def remarks(self, state: State, foreseen: State) -> Iterator[str]:
        """How many of each kind stay, what the config then says, and what becomes smaller."""
        now = units(foreseen)
        for kind in (MLP, KV_GROUPS):
            found = next((c for c in couplings(state) if c.kind == kind), None)
            if found is not None and now[kind, found.block] != found.units:
                yield f"prune keeps {now[kind, found.block]} of {found.units} {named(kind)} in every layer"
        if self.experts < 1:
            yield f"prune keeps {numbers(foreseen)[0]} of {numbers(state)[0]} experts in every layer"
        experts = {site.weight for site in state.graph if site.expert is not None}
        if {spec.name for spec in state.specs} - {spec.name for spec in foreseen.specs} - experts:
            yield "prune takes away what predicts further tokens: it has experts of its own, which no text reaches here"
        before, after = (s.config.get_text_config().to_dict() for s in (state, foreseen))
        told = [f"{k} {before.get(k)} → {v}" for k, v in sorted(after.items()) if isinstance(v, int) and before.get(k) != v]
        counts = [f"{sum(math.prod(spec.shape) for spec in s.specs):,}" for s in (state, foreseen)]
        cache = [cached(s) * s.dtype.itemsize for s in (state, foreseen)]
        smaller = f"; {cache[0]:,} → {cache[1]:,} bytes of cache for each token" if cache[0] != cache[1] else ""
        yield f"prune: {', '.join(told)}; {' → '.join(counts)} parameters{smaller}"

    def run(self, state: State, ctx: Context) -> State:
        (found, _), smaller = self._wanted(state), self._smaller(state)
        aim = Aim(smaller.state, found, units(smaller.state), smaller.cuts, self.norms(state))
        if ctx.calibration is None:
            return self._without_data(state, aim, ctx)
        with precision("bf16"):
            return self._walk(state, aim, ctx)

    def norms(self, state: State) -> dict[str, Tensor]:
        """Reader -> what the norm behind it multiplies each of its outputs by."""
        if self.method != "obs":
            return {}
        return {name: norm.offset + state.dense.read_finite(norm.weight).float()
                for name, norm in norms_behind(state).items() if norm.offset is not None}  # fmt: skip

    def _walk(self, before: State, aim: Aim, ctx: Context) -> State:
        stream, batches = ctx.stream(before)
        made, twin, smaller, ours = aim.made, self._twin(before, ctx), None, list[Batch]()
        for block in before.graph.blocks:
            ctx.progress(block.index, len(before.graph.blocks), block.module)
            done, work = ctx.store.committed(f"block-{block.index:04}"), None
            if done is None:
                work = Block.of(self, before, ctx, aim, block.index)
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

    def _without_data(self, state: State, aim: Aim, ctx: Context) -> State:
        """By weights alone: nothing streams."""
        made = aim.made
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), block.module)
            done = ctx.store.committed(f"block-{block.index:04}")
            if done is None:
                work = Block.of(self, state, ctx, aim, block.index)
                for coupling in work.couplings:
                    work.cut(coupling, None)
                done = work.commit()
            made = made.with_part(done)
        return made

    def cost(self, state: State, tokens: int) -> Cost:
        """Forward passes of the model as it was, of its twin, and of the smaller one; for each reader, at its old width, a
        Hessian, what `obs_core` makes of it, and the weights as they are solved and judged."""
        shares = {MLP: self.mlp, KV_GROUPS: self.kv_groups}
        shapes = [(c.reader.shape[0], round(c.reader.shape[1] / shares[c.kind]))
                  for c in couplings(state) if shares[c.kind] < 1]  # fmt: skip
        if not (shapes or self.experts < 1) or not tokens:
            return Cost(peak_bytes=block_bytes(state))
        work, models, block = per_token(state), 1 + self.corrects, block_bytes(state)
        exact = sum(1.0 * tokens * k * k * models + SWEEP * k**3 + JUDGED * n * k * k for n, k in shapes)
        numbers = (1 + models) * tokens * work.numbers
        held = waiting_bytes(state, tokens, models) + advancing_bytes(state, tokens)
        solved = max((SOLVED * k * k + 24 * n * k for n, k in shapes), default=0)
        return Cost(2.0 * (1 + models) * tokens * work.weights, exact, peak_bytes=held + models * block + solved, numbers=numbers)


def natural(units: int) -> int:
    """What the number of neurons is rounded up to: what formats and engines divide them by."""
    most = 128 if units >= WIDE else 32
    step = 1
    while step < most and units % (2 * step) == 0:
        step *= 2
    return step


def units(state: State) -> dict[tuple[str, int], int]:
    """How many units there are of each kind in each block."""
    return {(c.kind, c.block): c.units for c in couplings(state)}
