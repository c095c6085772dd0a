"""The error table: what each candidate format would do to each matrix, by the very quantizer that the recipe will run.

For Δ = Ŵ - W, with Ŵ the deployed weights, three figures are kept, so that the metric is chosen later:

    output   tr(ΔHΔᵀ) / tr(WHWᵀ), the relative error of the matrix's outputs on the calibration text
    weight   |Δ|², which LQ-LoRA's data-free allocation adds up (arXiv 2311.12023, section 3.2)
    kl       ½ Σ_n g_n (ΔHΔᵀ)_nn / Σ_n g_n, with g_n the mean squared gradient of the log-likelihood at output n, and H the mean
             of w_t x xᵀ, w_t that gradient's squared length at a token: the KL per token to second order, outputs taken as
             independent and g_tn as a product of both; or, as LQ-LoRA has it (section 3.3), ½ Σ F_nk Δ_nk², F at the weights

The first two are of the calibration text. `kl` is of the tokens that gradients were measured on, which nothing was solved for:
where tokens are few, errors of the text that a matrix was fitted to are half as large as those of another. And tokens count by
what comes of them, or a few huge inputs that do nothing would decide (see gradients.py).

Every matrix is quantized alone, on the inputs of the unquantized model: the table answers for one matrix at a time, and adding
its entries up is the allocator's assumption, not the table's. Outputs are solved one by one and errors are sums over them, so of
a matrix with many outputs some are drawn (`DRAWN`), the same for all formats, and stand for the rest; except for corrections of
low rank, which are fitted to all outputs at once, and for rotations, which mix them. A matrix outside the blocks has a row for
every token, and few of them weigh: those with the largest gradients and those that are looked up are all taken, and some of the
rest; where a format rotates, these are mixed with each other. An embedding's `kl` is that of its rows looked up, a shared one's
that plus the head's. Of entropy-coded formats two rates are solved, and what lies between them is on a line (rates.py). The table
is kept part by part, a block and a family of formats in each, so a killed measurement goes on where it was, another budget
measures nothing, and one more format measures only itself.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.formats import Format, LowRank, Rotated, Served, base_of, parse
from compress.formats.rotated import BLOCKS
from compress.manager import Context, Record, Store
from compress.model.data import Tokens
from compress.model.lockstep import Clean, Inputs
from compress.model.speed import precision
from compress.passes import gptq_core as core
from compress.passes import rates
from compress.passes.gradients import Response, TableSquares
from compress.passes.rounding_core import Sample
from compress.passes.solver import LOOKED_UP, Case, Shared, Solver, Solves, is_table
from compress.state import State
from compress.state.graph import Site

DRAWN = 256  # outputs
CERTAIN, SOME = 2048, 1024  # rows of a table: those that weigh most, and some of the others
Wanted = Mapping[str, Sequence[Format]]  # site -> candidates
Squares = Callable[[Site], Response]  # squared gradients of a site
POOLED = 0.1  # of an expert's damage, what comes of the mean of all experts


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

    def damage(self, metric: str) -> Callable[[Site, Format], float]:
        """Damage of a site in a format by one of the figures; none where it stays as it is."""
        return lambda site, fmt: float(getattr(self[site.name, fmt], metric)) if (site.name, fmt) in self.entries else 0.0


@dataclass(frozen=True)
class Held:
    """Windows that were held back: they come behind so many batches of others; tokens: how many they have."""

    ids: Sequence[Tensor]
    behind: int

    @property
    def tokens(self) -> int:
        return sum(batch.numel() for batch in self.ids)


class Meter(Solver):
    """Solves every candidate of a site and keeps its errors instead of its codes."""

    def __init__(
        self,
        solver: Tries,
        state: State,
        ctx: Context,
        wanted: Wanted,
        gradients: Squares | None,
        tables: TableSquares | None = None,
        held: Held | None = None,
    ):
        super().__init__(solver, state, ctx)
        self.tables, self.held = tables, held
        self._passed: dict[str, int] = {}  # batches, by stage
        self._weighed: dict[str, tuple[Tensor, int]] = {}  # site -> sum of w x xᵀ, and tokens that were
        self._samples: dict[str, Sample] = {}  # of inputs, by stage; weighed ones by site
        self.formats = {name: formats[0] for name, formats in wanted.items() if formats}
        self.wanted, self.gradients, self.tries = wanted, gradients, solver.tries

    def _together(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        yield from ([s] for s in sites)

    def observe(self, stage: str, inputs: Inputs, clean: Clean | None) -> None:
        """Batches that are held back come behind the others, and count by their responses."""
        number = self._passed[stage] = self._passed.get(stage, 0) + 1
        if self.held is None or number <= self.held.behind:
            super().observe(stage, inputs, clean)
            self._sample(stage, inputs)
            return
        assert self.gradients is not None
        for site in self._active[stage]:
            tokens = self.gradients(site).tokens
            if tokens is not None and site.expert in inputs:
                self._weigh(site, inputs[site.expert], tokens)

    def _sample(self, stage: str, inputs: Inputs) -> None:
        """Keep some inputs where a candidate rounds them."""
        if None in inputs and any(isinstance(f, Served) for s in self._active[stage] for f in self.wanted[s.name]):
            self._samples.setdefault(stage, Sample()).see(inputs[None])

    def _weigh(self, site: Site, X_tk: Tensor, tokens: Tensor) -> None:
        k = X_tk.shape[1]
        if site.name not in self._weighed:
            self._weighed[site.name] = X_tk.new_zeros(k, k, dtype=torch.float32), 0
        H_kk, seen = self._weighed[site.name]
        w_t = tokens[seen : seen + len(X_tk)].to(H_kk)
        if len(w_t) < len(X_tk):  # a router that sent others here than before
            w_t = tokens.mean().expand(len(X_tk)).to(H_kk)
        core.accumulate(H_kk, X_tk.float() * w_t.sqrt()[:, None])
        if any(isinstance(f, Served) for f in self.wanted[site.name]):
            self._samples.setdefault(site.name, Sample()).see(X_tk, w_t)
        self._weighed[site.name] = H_kk, seen + len(X_tk)

    def _looking_up(self, H_kk: Tensor) -> Tensor:
        self.head_kk = H_kk
        return super()._looking_up(H_kk)

    def solve_together(self, sites: Sequence[Site], shared: Shared) -> None:
        (site,) = sites
        if is_table(site):
            self._measure_table(site, shared)
            return
        asked, rows = self.wanted[site.name], torch.arange(site.shape[0])
        formats, first = rates.ends(asked), len(self.records)
        if len(rows) > DRAWN and not any(isinstance(f, LowRank | Rotated) for f in formats):
            rows = torch.randperm(len(rows), generator=self.ctx.generator(site))[:DRAWN].sort().values
        W_nk = self.state.reference(site)[rows].to(self.ctx.device, torch.float32)
        energy = float(core.loss(W_nk, shared.factor).sum()) or 1.0
        response = self.gradients(site) if self.gradients else None
        H_kk = core.finish(self._weighed.pop(site.name)[0]) if site.name in self._weighed else None
        for fmt, made in self.tries(W_nk, shared.factor, formats, Case(site, self.state, self.ctx)):
            D_nk, share = made - W_nk, site.shape[0] / len(rows)
            loss_n, weighed_n = core.loss(D_nk, shared.factor), None
            if isinstance(fmt, Served) and site.stage in self._samples:
                loss_n = loss_n + self._samples[site.stage].loss_n(made, fmt) / (shared.tokens or 1)
                weighed_n = self._samples[site.name].loss_n(made, fmt) if site.name in self._samples else None
            self.records.append({
                "site": site.name, "format": str(fmt), "output": float(loss_n.sum()) / energy,
                "weight": share * float(D_nk.square().sum()),
                "kl": None if response is None else share * self._kl(response, rows, H_kk, D_nk, loss_n, weighed_n),
            })  # fmt: skip
        self._samples.pop(site.name, None)
        self.records += rates.between(asked, self.records[first:])

    def _kl(
        self, response: Response, rows: Tensor, H_kk: Tensor | None, D_nk: Tensor, loss_n: Tensor, weighed_n: Tensor | None
    ) -> float:
        """Half the Fisher information of a change of some rows: `H_kk` is of tokens that were weighed, if any came; `loss_n` is
        theirs on the calibration text; `weighed_n` what rounded inputs add, of the former."""
        squares = response.squares[rows].to(D_nk)
        if squares.ndim == 2:
            return 0.5 * float((squares * D_nk.square()).sum())
        assert self.held is not None
        found, total = 0.0, float(response.squares.sum())
        if H_kk is not None and total > 0:
            off_n = ((D_nk @ H_kk) * D_nk).sum(1)
            off_n = off_n if weighed_n is None else off_n + weighed_n
            found = 0.5 * float(squares @ off_n) / total / self.held.tokens
        if response.mean is None:
            return found
        return (1 - POOLED) * found + POOLED * 0.5 * response.mean * float(loss_n.sum())

    def _measure_table(self, site: Site, shared: Shared) -> None:
        """A head, an embedding, or both in one: errors of some rows, each standing for `stands` of them."""
        rows, stands, counts = self._rows_of(site)
        W_nk = self.state.rows(site, rows.tolist()).float()
        H_kk = self.head_kk.cpu() if shared.factor else torch.eye(site.shape[1])
        energy = float((stands * ((W_nk @ H_kk) * W_nk).sum(1)).sum()) or 1.0
        whole, asked, first = W_nk.to(self.ctx.device), self.wanted[site.name], len(self.records)
        for fmt, made in self.tries(whole, shared.factor, rates.ends(asked), Case(site, self.state, self.ctx)):
            D_nk = made.cpu() - W_nk
            loss_n = ((D_nk @ H_kk) * D_nk).sum(1)
            kl = 0.0
            if self.tables and shared.factor:  # it makes logits
                kl += 0.5 * float((stands * self.tables.head_v[rows] * loss_n).sum())
            if self.tables and site.role == "embed":
                kl += 0.5 * float(((counts / counts.sum()) @ D_nk.square() * self.tables.embed_d).sum())
            self.records.append({
                "site": site.name, "format": str(fmt), "output": float((stands * loss_n).sum()) / energy,
                "weight": float((stands * D_nk.square().sum(1)).sum()), "kl": kl if self.tables else None,
            })  # fmt: skip
        self.records += rates.between(asked, self.records[first:])

    def _rows_of(self, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """The rows to look at, how many rows each stands for, and how often each was looked up."""
        n, generator = site.shape[0], self.ctx.generator(site)
        counts, certain = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        if self.tables:
            counts = self.tables.tokens.bincount(minlength=n).float()
            certain = counts > 0
            certain[self.tables.head_v.topk(min(n, CERTAIN)).indices] = True
        rest = (~certain).nonzero()[:, 0]
        count = SOME + turned_alike(n, int(certain.sum()) + SOME)
        some = rest[torch.randperm(len(rest), generator=generator)[:count]]
        stands = torch.zeros(n)
        stands[certain] = 1.0
        stands[some] = len(rest) / max(1, len(some))
        rows = (stands > 0).nonzero()[:, 0]
        return rows, stands[rows], counts[rows]


def turned_alike(outputs: int, rows: int) -> int:
    """How many rows more than `rows` a rotation turns in blocks of the same side as a matrix with so many outputs."""
    side = min(BLOCKS[-1], outputs & -outputs)
    more = -rows % side
    return more + side * (side < BLOCKS[-1] and (rows + more) // side % 2 == 0)


def measure(
    solver: Tries,
    state: State,
    ctx: Context,
    wanted: Wanted,
    store: Store,
    gradients: Squares | None,
    tables: TableSquares | None = None,
    held: Tokens | None = None,
) -> ErrorTable:
    """The table of all wanted candidates, from what `store` holds and, for the rest, one pass of the calibration text; one more
    for what lies outside the blocks."""
    missing = [list(absent(state, block.sites, wanted, store)) for block in state.graph.blocks]
    outside = [site for site in state.graph if site.block is None and wanted.get(site.name)]
    missing_tables = [(site, list(absent(state, [site.name], wanted, store))) for site in outside]
    with precision("bf16"):
        if any(missing):
            _measure(solver, state, ctx, missing, store, gradients, held)
        for site, found in missing_tables:
            if found:
                _measure_table(solver, state, ctx, site, found, store, tables)
    return ErrorTable.of(store.records)


def _measure_table(
    solver: Tries, state: State, ctx: Context, site: Site, missing: Sequence[tuple[str, dict[str, list[Format]]]], store: Store,
    tables: TableSquares | None,
) -> None:  # fmt: skip
    """What candidates would do to an embedding or a head, the latter under the Hessian of what it is given."""
    everything = {site.name: [fmt for _, members in missing for fmt in members[site.name]]}
    meter = Meter(solver, state, ctx, everything, None, tables)
    head = site if site.role == "head" else next((s for s in state.graph if s.tied == site.name), None)
    meter.sites([site.name])
    if head is None or ctx.calibration is None:
        meter.solve_together([site], Shared())
    else:
        meter.see_head(head, site.stage)
        meter.looked_up = LOOKED_UP if site.role == "embed" else 0.0
        meter.solve_stage(site.stage)
    for part, members in missing:
        texts = {str(fmt) for fmt in members[site.name]}
        store.commit(part, records=[r for r in meter.records if r["format"] in texts])


def absent(state: State, names: Sequence[str], wanted: Wanted, store: Store) -> Iterator[tuple[str, dict[str, list[Format]]]]:
    """The parts of a block that were not measured before: a name, and what is in it. Those that were are read."""
    families: dict[str, dict[str, list[Format]]] = {}
    for name in names:
        for fmt in wanted.get(name, ()):
            families.setdefault(rates.line_of(fmt) or str(base_of(fmt)), {}).setdefault(name, []).append(fmt)
    for family, members in families.items():
        content = json.dumps({name: list(map(str, formats)) for name, formats in members.items()}).encode()
        block = state.graph[names[0]].block
        part = f"{names[0] if block is None else f'block-{block:04}'}-{re.sub('[:/]', '_', family)}-{zlib.crc32(content):08x}"
        if store.committed(part) is None:
            yield part, members


def _measure(
    solver: Tries, state: State, ctx: Context, missing: Sequence[Sequence[tuple[str, dict[str, list[Format]]]]], store: Store,
    gradients: Squares | None, held: Tokens | None,
) -> None:  # fmt: skip
    last = max(i for i, parts in enumerate(missing) if parts)
    stream, batches = (None, []) if ctx.calibration is None else ctx.stream(state)
    apart = None
    if stream is not None and gradients and held:
        apart = Held([state.ids(window) for window in held.ids.split(1)], len(batches))
        batches += stream.start(state, apart.ids)
    for block, parts in zip(state.graph.blocks[: last + 1], missing, strict=False):
        ctx.progress(block.index, len(state.graph.blocks), f"measuring {block.module}")
        everything: dict[str, list[Format]] = {}
        for _, members in parts:
            for name, formats in members.items():
                everything.setdefault(name, []).extend(formats)
        meter = Meter(solver, state, ctx, everything, gradients, held=apart)
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


def keep(table: ErrorTable, damage: Callable[[Site, Format], float], state: State, ctx: Context) -> str:
    """Keep the table where `inspect` finds it, every candidate's bytes, errors and damage; the name it is found by."""
    rows = [{"site": name, "format": str(fmt), "bytes": fmt.nbytes(state.graph[name].shape), **asdict(entry),
             "damage": damage(state.graph[name], fmt)} for (name, fmt), entry in table.entries.items()]  # fmt: skip
    name = f"table-{zlib.crc32(json.dumps(rows).encode()):08x}"
    store = ctx.store.analysis("tables", {})
    if store.committed(name) is None:
        store.commit(name, records=rows)
    return name
