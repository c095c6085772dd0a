"""What replacing one matrix does to the whole model: the KL of its logits, and the law that it follows.

The damage of a small change is quadratic in it, so KL = a · error with `error` the relative squared error of the matrix's
outputs and `a` the matrix's own (HIGGS, arXiv 2411.17525, states this for perplexity). Measured with one matrix replaced at a
time, by what the quantizer really makes of it at two widths, KL = a · error^p fits all widths between and beyond: on Llamas of
0.3 and 7 million weights the fit ranks 35 x 7 single replacements as their measured KL does (rank correlation 0.998), where the
errors alone, unweighted, reach 0.8.

The alternative not taken is gradients: one backward pass gives every coefficient (`metric: fisher`), but only to second order
around the unquantized model, which at 2 and 3 bits is far away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.formats import Dense, Format, LowRank
from compress.manager import Context, Record, Store
from compress.model.stream import Stream
from compress.passes.error_table import Meter, Tries, Wanted
from compress.passes.solver import precision
from compress.state import State
from compress.state.graph import Site

HELD = 1 << 31  # bytes of hidden states of variants that may be in memory at once
FLOOR = "floor"


@dataclass(frozen=True)
class Probe:
    """One matrix replaced: the relative error of its outputs and the KL (nats per token) of the whole model's."""

    output: float
    kl: float


@dataclass
class _Variant:
    unit: str
    output: float
    batches: list[Any]
    kl: float = 0.0


@dataclass(frozen=True)
class Unit:
    """What is replaced at once: a matrix, or all experts of a block."""

    name: str
    sites: tuple[str, ...]


def units(state: State, names: Sequence[str]) -> list[Unit]:
    """The units that the named sites make up, in the graph's order."""
    found: dict[str, list[str]] = {}
    for name in names:
        site = state.graph[name]
        found.setdefault(name if site.expert is None else f"layers.{site.block}.experts", []).append(name)
    return [Unit(name, tuple(sites)) for name, sites in found.items()]


@dataclass
class Prober:
    """Measures what replacing single matrices does to the model's logits.

    A variant is the model with one unit replaced by what a candidate format makes of it. Variants are born behind their block, go
    through all later blocks together, and meet the output head: one pass over the model for as many as memory holds (`HELD`).
    """

    solver: Tries
    state: State
    ctx: Context
    sample: Sequence[Tensor]
    formats: Mapping[str, tuple[Format, ...]]
    store: Store
    variants: list[_Variant] = field(default_factory=list)

    def run(self) -> dict[str, list[Probe]]:
        """Unit -> its probes, by falling error; `FLOOR` -> what dither of half a unit in the last place does."""
        graph = self.state.graph
        each = sum(t.numel() for t in self.sample) * graph["embed"].shape[1] * self.state.dtype.itemsize
        per_block = max(2 * len(b.sites) for b in graph.blocks)
        step = max(1, int(HELD // (each * per_block)))
        for start in range(0, len(graph.blocks), step):
            part = f"blocks-{start:04}-{min(start + step, len(graph.blocks)) - 1:04}"
            if self.store.committed(part) is None:
                self.store.commit(part, records=self._round(range(start, min(start + step, len(graph.blocks)))))
        found: dict[str, list[Probe]] = {}
        for r in self.store.records:
            found.setdefault(r["site"], []).append(Probe(r["output"], r["kl"]))
        return found

    def _round(self, blocks: range) -> list[Record]:
        self.variants = []
        stream, batches = self.ctx.stream(self.state)
        plain = stream.start(self.state, self.sample)
        for block in self.state.graph.blocks:
            self.ctx.progress(block.index, len(self.state.graph.blocks), f"probing from {block.module}")
            made = self._made(stream, block.index, batches) if block.index in blocks else None
            if block.index < blocks.start:
                with precision("bf16"):
                    stream.advance(self.state, block.index, batches)
            with stream.block(self.state, block.index) as module:
                for variant in self.variants:
                    for batch in variant.batches:
                        batch.hidden = stream.call(module, batch, block.index)
                for unit, output, matrices in made or ():
                    with stream.swapped(matrices):
                        born = [type(b)(b.tokens, stream.call(module, b, block.index), b.calls) for b in plain]
                    self.variants.append(_Variant(unit, output, born))
                for batch in plain:
                    batch.hidden = stream.call(module, batch, block.index)
        self._read(stream, plain)
        return [{"site": v.unit, "output": v.output, "kl": v.kl} for v in self.variants]

    def _made(self, stream: Stream, index: int, batches: Sequence[Any]) -> list[tuple[str, float, dict[str, Tensor]]]:
        """The replacements of one block's units, while the calibration batches pass through it."""
        names = [n for n in self.state.graph.blocks[index].sites if n in self.formats]
        meter = Meter(self.solver, self.state, self.ctx, {n: self.formats[n] for n in names}, None)
        with precision("bf16"):
            stream.calibrate(self.state, index, batches, meter.sites(names), meter.observe, meter.solve)
        energy = {r["site"]: r["energy"] for r in meter.records}
        found = []
        for unit in units(self.state, names):
            whole = sum(energy[n] for n in unit.sites)
            for level in zip(*(self.formats[n] for n in unit.sites), strict=True):
                pairs = list(zip(unit.sites, level, strict=True))
                output = sum(meter.made[p][1] * energy[p[0]] for p in pairs) / whole
                found.append((unit.name, output, {p[0]: meter.made[p][0] for p in pairs}))
        if index == len(self.state.graph.blocks) // 2 and names:
            found.append((FLOOR, 0.0, {names[0]: self._dithered(self.state.graph[names[0]])}))
        return found

    def _dithered(self, site: Site) -> Tensor:
        W_nk = self.state.reference(site).float()
        noise = torch.rand(W_nk.shape, generator=self.ctx.generator(site)) - 0.5
        return W_nk * (1 + torch.finfo(self.state.dtype).eps * noise)

    def _read(self, stream: Stream, plain: Sequence[Any]) -> None:
        """Fill in the KL of every variant, batch by batch."""
        tokens = sum(t.numel() for t in self.sample)
        with stream.outer(self.state):
            for i, batch in enumerate(plain):
                log_p = stream.head(batch).float().log_softmax(-1)
                for variant in self.variants:
                    log_q = stream.head(variant.batches[i]).float().log_softmax(-1)
                    variant.kl += max(0.0, float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))) / tokens


def response(probes: Sequence[Probe], floor: float) -> tuple[float, float]:
    """(a, p) of the fit KL = a · error^p through a unit's probes.

    Two levels give a straight line in logarithms, its slope held between ½ and 2: near 1, where KL is quadratic in the change,
    as it is for small ones. A level that lies within twice the noise `floor` is not believed; with one level left the slope is
    1.
    """
    seen = [p for p in probes if p.output > 0 and p.kl > 2 * floor] or list(probes[:1])
    high = max(seen, key=lambda p: p.output)
    low = min(seen, key=lambda p: p.output)
    if high.output <= 0 or high.kl <= 0:
        return 0.0, 1.0
    if low.output >= high.output or low.kl <= 0:
        return high.kl / high.output, 1.0
    ratio = torch.tensor([high.kl / low.kl, high.output / low.output], dtype=torch.float64).log()
    slope = min(2.0, max(0.5, float(ratio[0] / ratio[1])))
    return high.kl / high.output**slope, slope


def probe_formats(wanted: Wanted, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Format, ...]]:
    """The two candidates to replace each site by: the coarsest, and that which takes nearest to two bits more."""
    chosen: dict[str, tuple[Format, ...]] = {}
    for name, formats in wanted.items():
        measurable = [f for f in formats if not isinstance(f, Dense)]
        bases = [f for f in measurable if not isinstance(f, LowRank)] or measurable
        if bases:
            n = shapes[name][0] * shapes[name][1]
            bits = {f: 8 * f.nbytes(shapes[name]) / n for f in bases}
            least = min(bases, key=lambda f: bits[f])
            chosen[name] = least, min(bases, key=lambda f: (abs(bits[f] - bits[least] - 2), f is least))
    return chosen


def divergence(original: State, changed: State, ctx: Context, sample: Sequence[Tensor]) -> list[float]:
    """KL (nats per token) of a changed model's predictions from the original's, window by window, both streamed."""
    runs = []
    for state in (original, changed):
        stream = Stream(state, ctx.device)
        batches = stream.start(state, sample)
        for block in state.graph.blocks:
            stream.advance(state, block.index, batches)
        runs.append(stream.logits(state, batches))
    found: list[float] = []
    with torch.no_grad():  # the two generators leave each other's setting behind
        for p, q in zip(*runs, strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            found += (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).mean(-1).tolist()
    return found
