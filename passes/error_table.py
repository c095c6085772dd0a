"""The error table: what each candidate format would do to each matrix, by the very quantizer that the recipe will run.

For Δ = Ŵ - W, with Ŵ the deployed weights, three figures are kept, so that the metric is chosen later:

    output   tr(ΔHΔᵀ) / tr(WHWᵀ), the relative error of the matrix's outputs on the calibration text
    weight   |Δ|², which LQ-LoRA's data-free allocation adds up (arXiv 2311.12023, section 3.2)
    kl       ½ Σ_n g_n (ΔHΔᵀ)_nn with g_n the mean squared gradient of the log-likelihood at output n: the KL per token to second
             order, the outputs taken as independent; or, as LQ-LoRA has it (section 3.3), ½ Σ F_nk Δ_nk² with that at the weights

Every matrix is quantized alone, on the inputs of the unquantized model: the table answers for one matrix at a time, and adding
its entries up is the allocator's assumption, not the table's. Outputs are solved one by one and errors are sums over them, so of
a matrix with many outputs some are drawn (`DRAWN`), the same for all formats, and stand for the rest; except for corrections of
low rank, which are fitted to all outputs at once. The table is kept part by part, a block and a family of formats in each,
so a killed measurement goes on where it was, another budget measures nothing, and one more format measures only itself.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.formats import Format, LowRank, base_of, parse
from compress.manager import Context, Record, Store
from compress.passes import gptq_core as core
from compress.passes.solver import Case, Shared, Solver, Solves, precision
from compress.state import State
from compress.state.graph import Site

DRAWN = 256  # outputs
Wanted = Mapping[str, Sequence[Format]]  # site -> candidates
Squares = Callable[[Site], Tensor]  # squared gradients at a site's outputs [N] or at its weights [N, K]


class Tries(Solves, Protocol):
    """A pass that can say what several formats would make of a matrix."""

    def tries(
        self, W_nk: Tensor, factor: core.Factor | None, formats: Sequence[Format], case: Case
    ) -> Iterator[tuple[Format, Tensor]]: ...


@dataclass(frozen=True)
class Entry:
    """What one format does to one site; see the head of this file. None: not measured."""

    output: float
    weight: float
    kl: float | None = None


@dataclass(frozen=True)
class ErrorTable:
    """(site, format) -> its entry."""

    entries: Mapping[tuple[str, Format], Entry]

    @classmethod
    def of(cls, records: Sequence[Record]) -> ErrorTable:
        return cls({(r["site"], parse(r["format"])): Entry(r["output"], r["weight"], r["kl"]) for r in records})

    def __getitem__(self, key: tuple[str, Format]) -> Entry:
        return self.entries[key]


class Meter(Solver):
    """Solves every candidate of a site and keeps its errors instead of its codes."""

    def __init__(self, solver: Tries, state: State, ctx: Context, wanted: Wanted, gradients: Squares | None):
        super().__init__(solver, state, ctx)
        self.formats = {name: formats[0] for name, formats in wanted.items() if formats}
        self.wanted, self.gradients, self.tries = wanted, gradients, solver.tries

    def _together(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        yield from ([s] for s in sites)

    def solve_together(self, sites: Sequence[Site], shared: Shared) -> None:
        (site,) = sites
        formats, rows = self.wanted[site.name], torch.arange(site.shape[0])
        if len(rows) > DRAWN and not any(isinstance(f, LowRank) for f in formats):
            rows = torch.randperm(len(rows), generator=self.ctx.generator(site))[:DRAWN].sort().values
        W_nk = self.state.reference(site)[rows].to(self.ctx.device, torch.float32)
        energy = float(core.loss(W_nk, shared.factor).sum()) or 1.0
        squares = self.gradients(site)[rows].to(W_nk) if self.gradients else None
        for fmt, made in self.tries(W_nk, shared.factor, formats, Case(site, self.state, self.ctx)):
            D_nk, share = made - W_nk, site.shape[0] / len(rows)
            loss_n = core.loss(D_nk, shared.factor)
            self.records.append({
                "site": site.name, "format": str(fmt), "output": float(loss_n.sum()) / energy,
                "weight": share * float(D_nk.square().sum()),
                "kl": None if squares is None else share * half_fisher(squares, D_nk, loss_n),
            })  # fmt: skip


def half_fisher(squares: Tensor, D_nk: Tensor, loss_n: Tensor) -> float:
    """Half the Fisher information of a change, from squared gradients at the outputs, [N], or at the weights, [N, K]."""
    return 0.5 * float((squares * D_nk.square()).sum() if squares.ndim == 2 else squares @ loss_n)


def measure(solver: Tries, state: State, ctx: Context, wanted: Wanted, store: Store, gradients: Squares | None) -> ErrorTable:
    """The table of all wanted candidates, from what `store` holds and, for the rest, one pass of the calibration text."""
    missing = [list(absent(state, block.sites, wanted, store)) for block in state.graph.blocks]
    if any(missing):
        with precision("bf16"):
            _measure(solver, state, ctx, missing, store, gradients)
    return ErrorTable.of(store.records)


def absent(state: State, names: Sequence[str], wanted: Wanted, store: Store) -> Iterator[tuple[str, dict[str, list[Format]]]]:
    """The parts of a block that were not measured before: a name, and what is in it. Those that were are read."""
    families: dict[str, dict[str, list[Format]]] = {}
    for name in names:
        for fmt in wanted.get(name, ()):
            families.setdefault(str(base_of(fmt)), {}).setdefault(name, []).append(fmt)
    for family, members in families.items():
        content = json.dumps({name: list(map(str, formats)) for name, formats in members.items()}).encode()
        part = f"block-{state.graph[names[0]].block:04}-{family.replace(':', '_')}-{zlib.crc32(content):08x}"
        if store.committed(part) is None:
            yield part, members


def _measure(
    solver: Tries, state: State, ctx: Context, missing: Sequence[Sequence[tuple[str, dict[str, list[Format]]]]], store: Store,
    gradients: Squares | None,
) -> None:  # fmt: skip
    last = max(i for i, parts in enumerate(missing) if parts)
    stream, batches = (None, []) if ctx.calibration is None else ctx.stream(state)
    for block, parts in zip(state.graph.blocks[: last + 1], missing, strict=False):
        ctx.progress(block.index, len(state.graph.blocks), f"measuring {block.module}")
        everything: dict[str, list[Format]] = {}
        for _, members in parts:
            for name, formats in members.items():
                everything.setdefault(name, []).extend(formats)
        meter = Meter(solver, state, ctx, everything, gradients)
        sites = meter.sites([s for s in block.sites if s in everything])
        if stream is None:
            for site in sites:
                meter.solve_together([site], Shared())
        elif sites:
            stream.calibrate(state, block.index, batches, sites, meter.observe, meter.solve)
        else:
            stream.advance(state, block.index, batches)
        for part, members in parts:
            mine = {(n, str(f)) for n, formats in members.items() for f in formats}
            store.commit(part, records=[r for r in meter.records if (r["site"], r["format"]) in mine])
