"""The pass `prune`: fewer neurons in every MLP, fewer groups of heads, fewer experts, and a plain smaller model.

The mathematics is in obs_core.py; which tensors lose what with a unit is in model/couplings.py; here is the walk over the model.
A unit goes out of the matrix that reads it (down, o), whose other columns then make up for it on the calibration text. As in
`quantize`, the inputs of every block carry the error of the blocks before it, and a twin of the model as it was says what the
outputs ought to be. The block in hand is passed at its old size, with zeros for the columns that go; then the smaller block takes
its place, and what it puts out is compared with that, so that a coupling which an architecture does not have in truth is found by
the first block. Experts are chosen in prune_experts.py by what the same walk shows of them; there nothing is made up for, and
the check is another one.

Where every layer keeps the same number the result loads wherever the model did. Where layers are given their own, by patterns, it
is a model of free shapes (see shapes.py), which fewer engines load. How many stay is found in prune_counts.py.
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
from compress.model.couplings import KV_GROUPS, MLP, couplings, named, span
from compress.model.feeds import norms_behind
from compress.model.lockstep import Batch
from compress.model.mixtures import Fewer, fewer, numbers
from compress.model.skeleton import free
from compress.model.speed import precision
from compress.model.stream import Twin
from compress.model.work import advancing_bytes, block_bytes, cached, per_token, waiting_bytes
from compress.passes.prune_block import Aim, Block
from compress.passes.prune_counts import Counts, Stays, as_before, cuts, differing, fitted, losing, wanted
from compress.state import Aspect, Fact, State

SWEEP, JUDGED = 8.0, 12.0  # operations, as of fp32, for K³ of a reader's sweep and factors, and for N K² of its losses
SOLVED = 26  # bytes for K²: the Hessian, and two matrices in fp64 with what is in hand of them


class Prune(Pass):
    """Take neurons of MLPs, groups of heads and experts away, and make up for them in what is left."""

    name: ClassVar[str] = "prune"
    version: ClassVar[int] = 2
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.PRUNED
    writes: ClassVar[Aspect] = Aspect.STRUCTURE | Aspect.WEIGHTS

    mlp: Stays = Field(
        1.0,
        description="share of the neurons of every MLP that stays; or pattern -> share or number, for layers of their own "
        "shapes, 0 for one without an MLP: later ones win, layers that none names stay whole",
    )
    kv_groups: Stays = Field(
        1.0, description="share of the groups of heads, with their keys and values, that stays; or by pattern, as `mlp`"
    )
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
        if not self._narrows and self.experts == 1:
            raise RecipeError("'prune' takes nothing away; name a share below 1 under mlp, kv_groups or experts, or leave it out")
        if self.experts < 1 and self.method not in ("obs", "magnitude"):
            raise RecipeError(f"'{self.method}' does not rank experts; use obs or magnitude, or two steps 'prune'", ("method",))
        if not calibrated and (self.method != "magnitude" or self._compensates):
            raise RecipeError("'prune' needs data.calibration; add it, or use method: magnitude with compensate: false")

    @property
    def _narrows(self) -> bool:
        return cuts(self.mlp) or cuts(self.kv_groups)

    @property
    def _compensates(self) -> bool:
        """Whether there is a matrix that makes up for what goes: what is lost with experts nothing makes up for."""
        return self.compensate and self._narrows

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
        if not self._narrows:
            return state
        fixed = isinstance(self.kv_groups, dict) and any(type(n) is int for n in self.kv_groups.values())
        return fitted(state, self._counts(state), fixed)

    def _counts(self, state: State) -> Counts:
        """Of each kind that loses units, how many are asked for in each block that loses some."""
        options = ((MLP, self.mlp), (KV_GROUPS, self.kv_groups))
        return {kind: wanted(state, kind, stays, self.multiple) for kind, stays in options if cuts(stays)}

    def remarks(self, state: State, foreseen: State) -> Iterator[str]:
        """How many of each kind stay, what the config then says, and what becomes smaller."""
        now = units(foreseen)
        for kind in (MLP, KV_GROUPS):
            before = {c.block: c.units for c in couplings(state) if c.kind == kind}
            after = {block: now.get((kind, block), 0) for block in before}
            if after != before:
                where = "in every layer" if len(set(after.values())) == 1 else "by layer"
                yield f"prune keeps {span(after)} of {span(before)} {named(kind)} {where}"
        if self.experts < 1:
            yield f"prune keeps {numbers(foreseen)[0]} of {numbers(state)[0]} experts in every layer"
        experts = {site.weight for site in state.graph if site.expert is not None}
        if {spec.name for spec in state.specs} - {spec.name for spec in foreseen.specs} - experts:
            yield "prune takes away what predicts further tokens: it has experts of its own, which no text reaches here"
        old, new = (s.config.get_text_config().to_dict() for s in (state, foreseen))
        told = [f"{k} {old.get(k)} → {v}, " for k, v in sorted(new.items()) if isinstance(v, int) and old.get(k) != v]
        counts = [f"{sum(math.prod(spec.shape) for spec in s.specs):,}" for s in (state, foreseen)]
        cache = [cached(s) * s.dtype.itemsize for s in (state, foreseen)]
        smaller = f"; {cache[0]:,} → {cache[1]:,} bytes of cache for each token" if cache[0] != cache[1] else ""
        yield f"prune: {''.join(told).removesuffix(', ')}{'; ' * bool(told)}{' → '.join(counts)} parameters{smaller}"
        if free(foreseen.config):
            yield f"{differing('prune')}: one share for all layers gives a model that they load"

    def run(self, state: State, ctx: Context) -> State:
        smaller = self._smaller(state)
        found = losing(state, self._counts(state)) if self._narrows else []
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
        shapes = [(n, k) for kind, stays in ((MLP, self.mlp), (KV_GROUPS, self.kv_groups)) if cuts(stays)
                  for n, k in as_before(state, kind, stays)]  # fmt: skip
        if not (shapes or self.experts < 1) or not tokens:
            return Cost(peak_bytes=block_bytes(state))
        work, models, block = per_token(state), 1 + self.corrects, block_bytes(state)
        exact = sum(1.0 * tokens * k * k * models + SWEEP * k**3 + JUDGED * n * k * k for n, k in shapes)
        numbers = (1 + models) * tokens * work.numbers
        held = waiting_bytes(state, tokens, models) + advancing_bytes(state, tokens)
        solved = max((SOLVED * k * k + 24 * n * k for n, k in shapes), default=0)
        return Cost(2.0 * (1 + models) * tokens * work.weights, exact, peak_bytes=held + models * block + solved, numbers=numbers)


def units(state: State) -> dict[tuple[str, int], int]:
    """How many units there are of each kind in each block."""
    return {(c.kind, c.block): c.units for c in couplings(state)}
