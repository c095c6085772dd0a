"""The walk over a model that passes share which change matrices one by one: block by block, stage by stage.

The inputs of every stage carry the error of what was changed before it, because the stream has the new weights in place by then.
Where a pass corrects that, a twin of the model runs beside, as the last dense step left it. What is done to a matrix is the
pass's `solve`; one block's worth of it is solver.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from compress.formats import Dense, Float, Format, numbers_of
from compress.manager import Context
from compress.model.lockstep import Batch
from compress.model.speed import precision
from compress.model.stream import Stream, Twin
from compress.passes.learned import Learner
from compress.passes.solver import LOOKED_UP, Shared, Solver, Solves
from compress.state import State
from compress.state.graph import Site

EMBEDDING, HEAD = "embedding", "head"
UNSEEN = "no inputs: rounded, and the error is that of the weights"


class Walks(Solves, Protocol):
    """A pass, seen from the walk. by_inputs: whether matrices are solved under what they are given. corrects: whether a twin runs
    beside, to correct the drift of inputs. sees_inputs: whether they are looked at at all."""

    @property
    def by_inputs(self) -> bool: ...
    @property
    def corrects(self) -> bool: ...
    def sees_inputs(self, state: State) -> bool: ...


@dataclass(frozen=True)
class Walk:
    """One run of a pass over a model whose plan says what each site is to become. learns: for how many steps each block is
    learned once its matrices are solved."""

    options: Walks
    ctx: Context
    learns: int = 0

    def run(self, state: State) -> State:
        """The state with every site in its format, each block committed."""
        if self.ctx.calibration is None or not self.options.sees_inputs(state):
            return self._without_data(state)
        with precision("bf16"):
            return self._calibrated(state)

    def _calibrated(self, state: State) -> State:
        ctx, before, state = self.ctx, state, self._embedding(state)
        stream, batches = ctx.stream(state)
        twin = self.twin(before)
        learner = Learner(self.learns, state, ctx, stream) if self.learns else None
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), block.module)
            done = ctx.store.committed(f"block-{block.index:04}")
            if done is None:
                solver, given = Solver(self.options, state, ctx, learner is not None), [batch.hidden for batch in batches]
                sites = solver.sites(block.sites)
                stream.calibrate(state, block.index, batches, sites, solver.observe, solver.solve, twin, solver.rounding)
                if learner:
                    for batch, hidden in zip(batches, given, strict=True):
                        batch.hidden = hidden
                    learner.learn(solver, state, block.index, batches, twin)
                state = state.with_part(ctx.store.commit(f"block-{block.index:04}", solver.packed, records=solver.records))
                if learner:
                    stream.advance(state, block.index, batches)
            else:
                state = state.with_part(done)
                stream.advance(state, block.index, batches)
                if twin:
                    twin.stream.advance(twin.state, block.index, twin.batches)
        return self._head(state, stream, batches)

    def _embedding(self, state: State) -> State:
        """The token embedding where a pin names it, before the blocks, so that the inputs of all of them carry its error."""
        ctx, solver = self.ctx, Solver(self.options, state, self.ctx)
        tables = solver.sites([s.name for s in state.graph if s.role == "embed"])
        if not tables:
            return state
        ctx.progress(0, len(state.graph.blocks), tables[0].module)
        done = ctx.store.committed(EMBEDDING)
        if done is None:
            head = next((s for s in state.graph if s.tied == tables[0].name), None)
            if head is None or not self.options.by_inputs or ctx.calibration is None:
                solver.solve_together(tables, Shared(notes=(UNSEEN,)))
            else:
                solver.looked_up = LOOKED_UP
                solver.see_head(head, tables[0].stage)
                solver.solve_stage(tables[0].stage)
            done = ctx.store.commit(EMBEDDING, solver.packed, records=solver.records)
        return state.with_part(done)

    def twin(self, state: State) -> Twin | None:
        if not self.options.corrects:
            return None
        before = replace(state, codes={n: s for n, s in state.codes.items() if isinstance(s.format, Dense)})
        stream, batches = self.ctx.stream(before)
        return Twin(stream, before, batches)

    def _head(self, state: State, stream: Stream, batches: Sequence[Batch]) -> State:
        ctx, solver = self.ctx, Solver(self.options, state, self.ctx)
        heads = solver.sites([s.name for s in state.graph if s.role == "head"])
        if not heads:
            return state
        done = ctx.store.committed(HEAD)
        if done is None:
            stream.watch_head(state, batches, heads[0], solver.observe)
            solver.solve(heads[0].input_key)
            done = ctx.store.commit(HEAD, solver.packed, records=solver.records)
        return state.with_part(done)

    def _without_data(self, state: State) -> State:
        """Where there is no calibration data, or nothing asks for it: nothing streams, errors are those of the weights."""
        ctx, state = self.ctx, self._embedding(state)
        parts = {f"block-{b.index:04}": b.sites for b in state.graph.blocks}
        parts[HEAD] = tuple(s.name for s in state.graph if s.role == "head")
        for i, (part, names) in enumerate(parts.items()):
            ctx.progress(i, len(parts), part)
            done = ctx.store.committed(part)
            if done is None:
                solver = Solver(self.options, state, ctx)
                for same in joined(solver.sites(names), solver.formats):
                    solver.solve_together(same, Shared())
                done = ctx.store.commit(part, solver.packed, records=solver.records)
            state = state.with_part(done)
        return state


def joined(sites: Sequence[Site], formats: Mapping[str, Format]) -> Iterator[list[Site]]:
    """Sites to be solved one by one; but as one those of one input that are to share a global scale."""
    shared: dict[tuple[str, Format, int | None], list[Site]] = {}
    for site in sites:
        fmt = formats[site.name]
        if isinstance(numbers := numbers_of(fmt), Float) and numbers.shared:
            shared.setdefault((site.input_key, fmt, site.expert), []).append(site)
        else:
            yield [site]
    yield from shared.values()
