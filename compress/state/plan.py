"""What may be spent and on what: `Budget`, and `BitPlan`, which format each site is to have, with a forecast of the damage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from compress.errors import CompressError, FormatError
from compress.formats import Dense, Factored, Format, LowRank, Rotated, Served, parse
from compress.state.graph import Graph, Site

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(bits?|%|[KMG]?i?B)")
MOST_BYTES, MOST_BITS = 2**60, 10**6  # of a budget: no model has more, and solvers count in 64 bits


def size(n: float) -> str:
    """Bytes for people: 1.27 GiB."""
    for unit in ("GiB", "MiB", "KiB"):
        if n >= UNITS[unit]:
            return f"{n / UNITS[unit]:.2f} {unit}"
    return f"{n:.0f} B"


@dataclass(frozen=True)
class Budget:
    """What may be spent: `bits` per weight on average, `bytes` in all, or a `share` of the original's bytes."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``3.0 bits``, ``1.2 GiB``, ``45 %``; FormatError where it is none of them."""
        match = _BUDGET.fullmatch(str(text).strip())
        if match is None or (match[2] not in UNITS and match[2] not in ("%", "bit", "bits")):
            raise FormatError(f"'{text}' is no budget; write bits per weight (3.0 bits), bytes of the file (1.2 GiB; units: "
                              f"{', '.join(UNITS)}) or a share of the original (45 %)")  # fmt: skip
        unit = "bits" if match[2].startswith("bit") else match[2]
        amount, most = float(match[1]), MOST_BYTES // UNITS[unit] if unit in UNITS else MOST_BITS
        if amount > most:
            raise FormatError(f"'{str(text)[:40]}' is more than any model takes; a budget is at most {most:,} {unit}")
        return cls(amount, unit)

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"

    @property
    def average(self) -> bool:
        """Whether it is an average over weights, not a number of bytes."""
        return self.unit == "bits"

    def bytes(self, numel: int, original: int) -> int:
        """The bytes that it allows for `numel` weights that took `original` bytes."""
        if self.average:
            return int(self.amount * numel / 8 + 1e-6)
        return int(self.amount / 100 * original) if self.unit == "%" else int(self.amount * UNITS[self.unit])


@dataclass(frozen=True)
class Point:
    """One point of the frontier: at `bits` per weight (`bytes` in all, of what the budget counts) expect `damage`."""

    bits: float
    bytes: int
    damage: float


@dataclass(frozen=True)
class Trial:
    """One allocation that was tried for real: predicted and measured damage, how many sites differ from the first."""

    predicted: float
    measured: float
    differs: int
    chosen: bool


@dataclass(frozen=True)
class Spent:
    """What an allocation uses of one limit, in bytes, of what it allows; price: the damage that one byte more would save."""

    name: str
    used: int
    allowed: int
    price: float


def per_step(batch: int) -> str:
    """What so many tokens at once are called."""
    return "a token" if batch == 1 else f"a step of {batch} tokens"


@dataclass(frozen=True)
class Latency:
    """Seconds that a decode step of `batch` tokens is expected to take in matrices, and takes as the model is. allowed, price:
    where it is limited, by how much, and the damage that a millisecond more would save."""

    expected: float
    original: float
    batch: int
    allowed: float | None = None
    price: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """What an allocation is expected to do. spent: of each limit, the main budget first. damage: by site, in the metric's units
    (nats for ``kl``); structure: the same by sublayer that becomes smaller. `total` is the sum of both, and `bound` what no
    allocation within the limits is predicted to go below, `gap` what the predicted optimum may lack to it. measured: whether the
    damages were; else they are a guess. table: the name of the error table in the run folder. latency: where it is known.
    """

    metric: str
    spent: tuple[Spent, ...]
    damage: Mapping[str, float]
    total: float
    bound: float
    gap: float
    method: str
    frontier: tuple[Point, ...] = ()
    trials: tuple[Trial, ...] = ()
    measured: bool = True
    notes: tuple[str, ...] = ()
    table: str = ""
    structure: Mapping[str, float] = field(default_factory=dict)
    latency: Latency | None = None

    @property
    def used(self) -> int:
        """Bytes of the main budget."""
        return self.spent[0].used

    @classmethod
    def of_json(cls, d: Mapping[str, Any]) -> Forecast:
        """ValueError where it is none."""
        from pydantic import TypeAdapter  # not at the head: the runtime passes by here, and needs no pydantic

        return TypeAdapter(cls).validate_python(d)


@dataclass(frozen=True)
class BitPlan:
    """Site name -> format, in the graph's order; a site that is not named stays as it is. forecast: of an allocation."""

    formats: Mapping[str, Format]
    forecast: Forecast | None = None

    @classmethod
    def of(cls, graph: Graph, default: Format, pins: Mapping[str, str], dtype: torch.dtype) -> BitPlan:
        """`default` for every matrix in a block, then each pin in order, the later one winning.

        A dense pin of the model's own `dtype` leaves its site as it is. A matrix that two sites share is planned under the name
        of the one that owns it, whichever is pinned.

        Raises MatchError for a pattern that matches nothing and FormatError for a format
        that does not fit its matrix.
        """
        chosen: dict[str, Format] = {site.name: default for site in graph.linear}
        source: dict[str, tuple[str, ...]] = {name: ("format",) for name in chosen}
        for pattern, text in pins.items():
            at = ("pins", pattern)
            try:
                pinned = parse(text)
                sites = graph.match(pattern)
            except CompressError as e:
                raise type(e)(str(e), at) from None
            chosen |= {site.name: pinned for site in sites}
            source |= {site.name: at for site in sites}
        for site in [s for s in graph if s.tied and s.name in chosen]:
            tied, owner, place = chosen.pop(site.name), site.tied or "", source[site.name]
            if chosen.setdefault(owner, tied) != tied:
                raise FormatError(f"'{owner}' and '{site.name}' are one matrix, and the pins give it {chosen[owner]} and {tied}; "
                                  "pin one of them", place)  # fmt: skip
            source.setdefault(owner, place)
        ordered = {s.name: chosen[s.name] for s in graph if s.name in chosen}
        for name, fmt in ordered.items():
            check_fits(graph[name], fmt, source[name])
        return cls({n: f for n, f in ordered.items() if f != Dense(dtype)})

    @classmethod
    def of_json(cls, d: Mapping[str, Any]) -> BitPlan:
        forecast = d.get("forecast")
        return cls({n: parse(f) for n, f in d["formats"].items()}, Forecast.of_json(forecast) if forecast else None)

    def json(self) -> dict[str, Any]:
        """As JSON values, from which `of_json` makes the same plan."""
        formats = {n: str(f) for n, f in self.formats.items()}
        return {"formats": formats, "forecast": asdict(self.forecast) if self.forecast else None}

    def quantized(self, graph: Graph) -> list[Site]:
        """The sites that get a grid."""
        return [graph[name] for name, fmt in self.formats.items() if not isinstance(fmt, Dense)]

    def bits(self, sites: Iterable[Site], dense_bytes: int = 2) -> float:
        """Average stored bits per weight over `sites`, scales and zero points counted."""
        sites = list(sites)
        stored = sum(self.nbytes(s, dense_bytes) for s in sites)
        return 8 * stored / sum(s.numel for s in sites) if sites else 8.0 * dense_bytes

    def nbytes(self, site: Site, dense_bytes: int) -> int:
        """Bytes of one site's tensors; `dense_bytes` per weight where it stays as it is."""
        fmt = self.formats.get(site.name)
        return site.numel * dense_bytes if fmt is None else fmt.nbytes(site.shape)


def check_fits(site: Site, fmt: Format, at: tuple[str, ...]) -> None:
    """FormatError where a site cannot have a format, in words that name the site."""
    if site.role == "embed" and isinstance(fmt, LowRank):
        raise FormatError(f"'{site.name}' is a token embedding, which has no inputs that a low-rank correction could be fitted "
                          f"to: pin it to {fmt.base}", at)  # fmt: skip
    if site.role == "embed" and isinstance(fmt, Factored):
        raise FormatError(f"'{site.name}' is a token embedding, whose rows are looked up and multiply nothing; leave it out", at)
    if site.role == "embed" and isinstance(fmt, Rotated) and not fmt.inputs_only:
        raise FormatError(f"'{site.name}' is a token embedding, whose rows are looked up one by one, and a rotation of outputs "
                          f"mixes rows: pin it to {replace(fmt, inputs_only=True)}", at)  # fmt: skip
    if isinstance(fmt, Served) and (site.block is None or site.expert is not None):
        what = "lies outside the blocks" if site.block is None else "is an expert's"
        raise FormatError(f"'{site.name}' {what}, and inputs are rounded for the other matrices inside the blocks: pin it to "
                          f"{fmt.weight} or bf16", at)  # fmt: skip
    try:
        fmt.check(site.shape)
    except FormatError as e:
        raise FormatError(f"'{site.name}': {e}  (or pin this site to another format)", at) from None
