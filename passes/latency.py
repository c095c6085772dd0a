"""What a decoded token costs in time: a table of seconds that was measured on a machine, and what choices come to by it.

A step of decoding passes every matrix once, and a matrix takes what its shape and its format take. So the time of a model is a
sum over sites as its bytes are, and a limit of it one more row of the integer program, exact like the others. What is summed is
the time in matrices: a look-up of the embedding is free, and attention over the cache, norms and what Python does between them
are left out, for no choice here changes them much. A token sees few of a mixture's experts, and each counts by how often.

The table is of one machine. `compress bench RECIPE --table FILE` makes it (compress/timing.py says how) for every shape and
format that a recipe could choose; a pair that it lacks is an error and no guess.
"""

from __future__ import annotations

import math
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.documents import json_mapping, one_line
from compress.errors import RecipeError
from compress.formats import Dense, Format, parse
from compress.model.work import experts_used
from compress.passes.choices import Resource, Space, fits
from compress.state import State
from compress.state.graph import Site
from compress.state.plan import Latency, per_step

LATENCY = "latency"
KIND: Literal["compress latency table"] = "compress latency table"
NS = 1e9  # the program counts whole nanoseconds
MOST = 2**60  # nanoseconds, for it counts in 64 bits
TODO = "make it anew: compress bench RECIPE --table FILE"
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Side = Annotated[int, Field(gt=0, lt=2**31)]
Shape = tuple[int, int]


class Entry(BaseModel):
    """One shape in one format."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Side, Side] = Field(description="of the matrix: outputs, inputs")
    format: str = Field(description="text of the format")
    seconds: Seconds = Field(description="of one step, the median of the turns")
    least: Seconds = Field(description="the quickest turn")
    most: Seconds = Field(description="the slowest turn")

    @field_validator("format")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return str(parse(text))


class LatencyTable(BaseModel):
    """Seconds of a decode step in each matrix, by shape and format, and where they were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["compress latency table"] = Field(description="what this file is")
    compress: str = Field(description="version of compress that measured it")
    cpu: str = Field(description="name of the processor")
    threads: int = Field(ge=1, description="threads that it was measured with")
    batch: int = Field(ge=1, description="tokens of a step")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(description="what is computed in")
    turns: int = Field(ge=1, description="how often each entry was timed")
    entries: tuple[Entry, ...] = Field(min_length=1, description="the measurements")

    @model_validator(mode="after")
    def _once(self) -> LatencyTable:
        twice, count = Counter((e.shape, e.format) for e in self.entries).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{said(*twice)} is there {count} times")
        return self

    def elsewhere(self) -> str:
        """That it was measured on another machine than this one, or with other threads; empty where it was not."""
        here, threads = cpu_name(), torch.get_num_threads()
        if self.cpu != here:
            return f"the latency table was measured on '{one_line(self.cpu, 100)}', and this is '{here}': times are not its own"
        if self.threads != threads:
            return f"the latency table was measured with {self.threads} threads, and here are {threads}"
        return ""


def read_table(path: Path) -> LatencyTable:
    """The table in a file; RecipeError in one line where it is none."""
    held = json_mapping(path, RecipeError, TODO)
    try:
        return LatencyTable.model_validate(held)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        why = f"{at}: {first['msg']}" if at else first["msg"]
        raise RecipeError(f"{path}: is no latency table ({one_line(why)}); {TODO}") from None


@cache
def cpu_name() -> str:
    """What the processor calls itself."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "cpu model") and value.strip():
                return one_line(value.strip(), 100)
    with suppress(OSError, subprocess.SubprocessError):  # macOS
        told = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True, timeout=10
        )
        return one_line(told.stdout.strip(), 100)
    return platform.processor() or platform.machine()


def said(shape: Shape, fmt: str) -> str:
    return f"{fmt} of {shape[0]} x {shape[1]}"


# --- what choices come to --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed(Resource):
    """A limit of time, in nanoseconds. original: what the model takes as it is."""

    original: int = 0
    batch: int = 1
    todo: str = "Raise it, allow formats that are quicker here, or smaller shapes by 'structure'"

    def say(self, least: int) -> str:
        total = least + self.fixed
        return f"{1e3 * total / NS:.4g} ms {per_step(self.batch)}, {total / max(1, self.original):.1%} of what it takes as it is"

    def expected(self, pairs: Iterable[tuple[Site, Format]], limited: bool, price: float = 0.0) -> Latency:
        """What a choice would take. price: the damage that a nanosecond more would save, if it is limited."""
        total = self.fixed + sum(self.use(site, fmt) for site, fmt in pairs)
        allowed = (self.allowed + self.fixed) / NS if limited else None
        return Latency(total / NS, self.original / NS, self.batch, allowed, price * NS / 1e3)


@dataclass(frozen=True, eq=False)
class Clock:
    """A table, asked about the matrices of a model and what they may become. visits: how often a step goes through each site."""

    table: LatencyTable
    own: Format
    known: Mapping[tuple[Shape, str], int]
    visits: Mapping[str, float]

    @classmethod
    def of(cls, table: LatencyTable, whole: State) -> Clock:
        """RecipeError where the table is of another dtype than the model."""
        own = Dense(whole.dtype)
        if table.dtype != str(own):
            raise RecipeError(f"the latency table is of a model in {table.dtype}, and this one is in {own}; {TODO}", ("latency",))
        known = {(e.shape, e.format): max(1, round(e.seconds * NS)) for e in table.entries}
        return cls(table, own, known, visits(whole, table.batch))

    def use(self, site: Site, fmt: Format) -> int:
        """Nanoseconds of a step in a site; RecipeError where the table does not know."""
        often = self.visits[site.name]
        if not often:
            return 0
        fmt = self.own if isinstance(fmt, Dense) else fmt  # an engine computes with numbers in the model's dtype
        self.check({(site.shape, fmt): site.name})
        return round(often * self.known[site.shape, str(fmt)])

    def check(self, wanted: Mapping[tuple[Shape, Format], str]) -> None:
        """RecipeError where the table lacks what sites of these names may be."""
        for (shape, fmt), name in wanted.items():
            if (shape, str(fmt)) not in self.known:
                raise RecipeError(f"the latency table has no {said(shape, str(fmt))}, as '{name}' may be; {TODO}", ("latency",))

    def limit(
        self, sp: Space, state: State, whole: State, text: str = "", number: float = math.inf, share: bool = False
    ) -> Timed:
        """The limit of a state, as milliseconds or as a share of what the `whole` model takes; without a number it is none."""
        chosen = {s.name for g in sp.groups for s in g.sites}
        original = sum(self.use(s, self.own) for s in whole.graph)
        fixed = sum(self.use(s, self.own) for s in state.graph if s.name not in chosen)
        most = min(number / 100 * original if share else number * NS / 1e3, MOST)
        return Timed(f"latency {text}", ("constraints", "latency"), math.floor(most + 1e-6) - fixed, self.use, fixed, 0,
                     original=original, batch=self.table.batch)  # fmt: skip


def visits(state: State, batch: int) -> dict[str, float]:
    """How often a step of so many tokens goes through each site. A look-up is no visit, unless its table is the head as well; of
    experts it is how often some token of the batch is sent there, were all as likely."""
    experts, used = Counter((s.block, s.role) for s in state.graph if s.expert is not None), experts_used(state)
    shared = {s.tied for s in state.graph}
    found = dict[str, float]()
    for s in state.graph:
        if s.tied is not None:
            found[s.name] = 0.0  # counted where its matrix is
        elif s.role == "embed":
            found[s.name] = float(s.name in shared)
        elif s.expert is None:
            found[s.name] = 1.0
        else:
            found[s.name] = 1 - (1 - min(1.0, used / experts[s.block, s.role])) ** batch
    return found


def pairs(sites: Iterable[Site], formats: Mapping[str, Iterable[Format]], own: Format) -> dict[tuple[Shape, Format], str]:
    """Every shape with every format that sites of it may get, its `own` among them, and the name of a site of each."""
    found: dict[tuple[Shape, Format], str] = {}
    for s in sites:
        packed = (fmt for fmt in formats.get(s.name, ()) if not isinstance(fmt, Dense))
        found |= {(s.shape, fmt): s.name for fmt in (own, *packed) if fits(fmt, s.shape)}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1]))))
