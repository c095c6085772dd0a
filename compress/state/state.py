"""State: what flows through the passes. Structure, where each tensor lies, the plan, and what holds so far.

Immutable; a pass returns a new State that shares everything it did not touch. No tensor lives here: a site is either still
the source's or `Stored` in a file of the run, and both are read when asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import ModelError
from compress.formats import Format, Packed
from compress.state.checkpoint import Checkpoint, Spec
from compress.state.graph import Graph, Site
from compress.state.plan import BitPlan


class Fact(enum.Flag):
    """What holds for a state; a pass needs, gives and breaks facts, so an illegal order fails before anything loads."""

    NONE = 0
    DENSE = enum.auto()
    PLANNED = enum.auto()
    QUANTIZED = enum.auto()
    ADAPTED = enum.auto()
    PRUNED = enum.auto()


class Aspect(enum.Flag):
    """What of a state a pass writes."""

    NONE = 0
    STRUCTURE = enum.auto()
    WEIGHTS = enum.auto()
    ENCODING = enum.auto()
    PLAN = enum.auto()


@dataclass(frozen=True)
class Stored:
    """A site's packed tensors in a safetensors file, under the names `prefix` + suffix."""

    path: Path
    prefix: str
    format: Format
    shape: tuple[int, int]

    def load(self) -> Packed:
        try:
            with safe_open(self.path, framework="pt") as file:
                suffixes = self.format.tensors(self.shape)
                return Packed(self.format, self.shape, {s: file.get_tensor(f"{self.prefix}{s}") for s in suffixes})
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{self.path}: '{self.prefix}' cannot be read ({e}); the file is damaged") from None


@dataclass(frozen=True)
class State:
    """graph: structure. checkpoint: where unchanged tensors lie. dtype: what the model computes in. specs: every tensor of the
    source, in its order. changed: site -> where its new tensors lie. plan: what each site is meant to become. facts: what
    holds. history: the text of every pass so far."""

    graph: Graph
    checkpoint: Checkpoint
    dtype: torch.dtype
    specs: tuple[Spec, ...] = ()
    changed: Mapping[str, Stored] = field(default_factory=dict)
    plan: BitPlan | None = None
    facts: Fact = Fact.DENSE
    history: tuple[str, ...] = ()

    def with_sites(self, sites: Mapping[str, Stored]) -> State:
        return replace(self, changed={**self.changed, **sites})

    def weight(self, site: Site) -> torch.Tensor:
        """The site's matrix [out, in] as its engine would see it, in the model's dtype, on CPU."""
        if site.tied:
            return self.weight(self.graph[site.tied])
        if site.name in self.changed:
            return self.changed[site.name].load().dequantize(self.dtype)
        return self.original(site).to(self.dtype)

    def original(self, site: Site) -> torch.Tensor:
        """The site's matrix [out, in] as the source stores it; ModelError where it holds a NaN or an infinity."""
        checkpoint = self.checkpoint
        if site.tied:
            return self.original(self.graph[site.tied])
        if site.weight in checkpoint:
            weight = checkpoint.read_finite(site.weight)
        else:
            weight = checkpoint.read_rows(site.joined, site.expert or 0)
            if site.role != "down":
                weight = weight.chunk(2)[site.role == "up"]
        return weight.T.contiguous() if site.transposed else weight

    def format(self, site: Site) -> Format | None:
        """The format the site is stored in, or None where it is as the source has it."""
        stored = self.changed.get(site.name)
        return stored.format if stored else None

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are stored in: fp16 in an fp16 model, else bf16."""
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    def entries(self) -> Iterator[tuple[Spec, Site | None, str]]:
        """Every tensor of a checkpoint of this state as it is planned, in the source's order: its spec, its site where it
        changes, and the suffix within the site."""
        formats = self.plan.formats if self.plan else {}
        by_weight = {s.weight: s for s in self.graph if s.name in formats}
        joined: dict[str, list[Site]] = {}
        for site in self.graph:
            if site.expert is not None:
                joined.setdefault(site.joined, []).append(site)
        for spec in self.specs:
            sites = [by_weight[spec.name]] if spec.name in by_weight else []
            if any(s.name in formats for s in joined.get(spec.name, ())):
                sites = joined[spec.name]
            if not sites:
                yield spec, None, ""
            for site in sites:
                yield from site_entries(site, formats.get(site.name), spec.dtype, self.scale_dtype)


def site_entries(site: Site, fmt: Format | None, dtype: torch.dtype, scale: torch.dtype) -> Iterator[tuple[Spec, Site, str]]:
    """The tensors of one site in a format; None is one expert left dense beside quantized ones."""
    if fmt is None:
        yield Spec(site.weight, dtype, site.shape), site, "weight"
        return
    for suffix, (kind, shape) in fmt.tensors(site.shape, scale).items():
        flip = site.transposed and suffix == "weight"
        yield Spec(f"{site.stem}.{suffix}", kind, shape[::-1] if flip else shape), site, suffix


def changed(before: State, after: State) -> Aspect:
    """What really differs between two states."""
    aspect = Aspect.NONE
    if before.graph != after.graph:
        aspect |= Aspect.STRUCTURE
    if dict(before.changed) != dict(after.changed):
        aspect |= Aspect.WEIGHTS
        if any(before.format(s) != after.format(s) for s in after.graph):
            aspect |= Aspect.ENCODING
    if before.plan != after.plan:
        aspect |= Aspect.PLAN
    return aspect
