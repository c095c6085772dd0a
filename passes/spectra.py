"""What every rank of every matrix would lose: one pass of the calibration text over a dense model, and the ranks chosen by it.

The curve of a site has a point for each rank that it may have, and one for leaving it as it is. Losses are shares of what the
site puts out, on the inputs of the unchanged model. They are kept as an analysis of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compress.formats import Factored
from compress.manager import Context, Record
from compress.model.speed import precision
from compress.passes import factorize_core as core
from compress.passes.solver import Shared, Solver, Solves
from compress.state import State
from compress.state.graph import Graph, Site

PART = "ranks"
STEPS = 32  # ranks, about, that a matrix may have
Ladders = Mapping[str, Sequence[int]]  # site -> the ranks that it may have


def ladder(shape: tuple[int, int], uniform: int, multiple: int) -> list[int]:
    """The ranks that a matrix may have, up to that at which nothing is saved: multiples, where the `uniform` one is one."""
    most, step = int(core.even_rank(shape)), multiple if uniform >= multiple else 1
    step *= max(1, most // (step * STEPS))
    return sorted({min(step, uniform), *range(step, most + 1, step)})


class Spectrometer(Solver):
    """Keeps what the ranks of each site would lose, and changes nothing."""

    def __init__(self, options: Solves, state: State, ctx: Context, ladders: Ladders):
        super().__init__(options, state, ctx)
        self.ladders, self.formats = ladders, {name: Factored(1) for name in ladders}

    def solve_together(self, sites: Sequence[Site], shared: Shared) -> None:
        for site in sites:
            W_nk = self.state.reference(site).to(self.ctx.device, torch.float32)
            lost = core.losses(W_nk, core.hessian(shared.factor))
            self.records.append({"site": site.name, "losses": [float(lost[rank]) for rank in self.ladders[site.name]]})


def measured(options: Solves, state: State, ladders: Ladders, ctx: Context) -> dict[str, list[float]]:
    """What each rank of its ladder would lose, by site; all lie inside the blocks."""
    store = ctx.store.analysis("spectra", {"version": 1, "ladders": ladders, "damp": options.damp})
    with precision("bf16"):
        stream, batches = ctx.stream(state)
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), f"measuring {block.module}")
            part = f"block-{block.index:04}"
            if store.committed(part) is not None:
                stream.advance(state, block.index, batches)
                continue
            meter = Spectrometer(options, state, ctx, ladders)
            stream.calibrate(state, block.index, batches, meter.sites(block.sites), meter.observe, meter.solve)
            store.commit(part, records=meter.records)
    return {r["site"]: r["losses"] for r in store.records}


def record(graph: Graph, uniform: Mapping[str, int], ladders: Ladders, lost: Mapping[str, Sequence[float]]) -> Record:
    """The ranks of all sites: of those with a ladder by what they lose, as many weights in all as `uniform` has for them."""
    names = list(ladders)
    curves = [curve(graph[n].shape, ladders[n], lost[n]) for n in names]
    picked = core.program(curves, sum(uniform[n] * sum(graph[n].shape) for n in names))
    ranks: dict[str, int | None] = dict(uniform)
    ranks |= {n: ladders[n][i] if i < len(ladders[n]) else None for n, i in zip(names, picked, strict=True)}
    before = sum(lost[n][nearest(ladders[n], uniform[n])] for n in names) / len(names)
    after = sum(points[i][1] for points, i in zip(curves, picked, strict=True)) / len(names)
    whole = [n for n in names if ranks[n] is None]
    shares = sorted((r / core.even_rank(graph[n].shape), n) for n in names if (r := ranks[n]) is not None)
    note = f"{after:.2%} of what matrices put out is lost in the mean, {before:.2%} with one share for all"
    note += f"; shares from {shares[0][0]:.2f} ({shares[0][1]}) to {shares[-1][0]:.2f} ({shares[-1][1]})" if shares else ""
    note += f"; {len(whole)} stay as they are" if whole else ""
    return {"site": "ranks", "ranks": ranks, "notes": [note]}


def curve(shape: tuple[int, int], ranks: Sequence[int], lost: Sequence[float]) -> list[core.Point]:
    """Weights and losses of the ranks, and of the matrix as it is behind them."""
    n, k = shape
    return [*((rank * (n + k), loss) for rank, loss in zip(ranks, lost, strict=True)), (n * k, 0.0)]


def nearest(ranks: Sequence[int], rank: int) -> int:
    """The index of the last rank that is not above another."""
    return max(i for i, r in enumerate(ranks) if r <= rank)


def chosen(records: Sequence[Record]) -> dict[str, int]:
    """Site -> rank, as a step's records say; a site that stays as it is has none."""
    found = next(r["ranks"] for r in records if "ranks" in r)
    return {name: rank for name, rank in found.items() if rank is not None}
