"""State: what flows through the passes. Structure, where each tensor lies, the plan, and what holds so far.

Immutable; a pass returns a new State that shares everything it did not touch. No tensor lives here: each is the source's, or
lies in a file of the run, and is read when asked for.

A pass may change any tensor, shape, or value of the config. What it foresees stands in the same fields as what it did: `specs`
are the dense tensors as they are to be, and a site that is to be encoded has a promise among the `codes`. So whoever asks a state
for its formats (exporters, engines, reports, before the run or after it, of a run or of an artifact) asks the codes, and nothing
else says which format a matrix has; the plan only says what an allocation wishes for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import ModelError
from compress.formats import Dense, Format, Packed, Served
from compress.formats.served import Rounding
from compress.formats.sparsity import Sparsity
from compress.state.checkpoint import Spec
from compress.state.graph import Graph, Site
from compress.state.overlay import Overlay, Written
from compress.state.plan import BitPlan


class Fact(enum.Flag):
    """What holds for a state; a pass needs, gives and breaks facts, so an illegal order fails before anything loads."""

    NONE = 0
    DENSE = enum.auto()
    PLANNED = enum.auto()
    QUANTIZED = enum.auto()
    ADAPTED = enum.auto()
    PRUNED = enum.auto()
    FACTORED = enum.auto()


class Aspect(enum.Flag):
    """What of a state a pass writes: graph, config or shapes; dense tensors; formats; the plan; what an engine is told."""

    NONE = 0
    STRUCTURE = enum.auto()
    WEIGHTS = enum.auto()
    ENCODING = enum.auto()
    PLAN = enum.auto()
    SERVING = enum.auto()


@dataclass(frozen=True)
class Promised:
    """A site that is to be encoded: its format and shape, and no tensors yet."""

    format: Format
    shape: tuple[int, int]

    def load(self) -> Packed:
        raise AssertionError("a foreseen state has formats, and no tensors")


@dataclass(frozen=True)
class Stored(Promised):
    """A site's packed tensors in a safetensors file, under the names `prefix` + suffix."""

    path: Path
    prefix: str

    def load(self) -> Packed:
        try:
            with safe_open(self.path, framework="pt") as file:
                suffixes = self.format.tensors(self.shape)
                return Packed(self.format, self.shape, {s: file.get_tensor(f"{self.prefix}{s}") for s in suffixes})
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{self.path}: '{self.prefix}' cannot be read ({e}); the file is damaged") from None


@dataclass(frozen=True)
class Part:
    """What a step has committed at once. codes: by site. dense: by name in the checkpoint. serving: see `State`."""

    codes: Mapping[str, Stored] = field(default_factory=dict)
    dense: Mapping[str, Written] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a model is at one point of a recipe.

    graph: structure. config: transformers' config, as it now is; never changed in place. dtype: what the model computes in.
    specs: every dense tensor as it is to be, in the order of a checkpoint. dense: where the dense tensors lie: the source's
    checkpoint, overlaid by the files of steps. codes: site -> its tensors in a format, for encoded sites only. serving: site or
    "cache" -> JSON that an engine or a tool must know besides weights. sparsity: site -> how it is found which of its neurons a
    token needs; thresholds and predictors are dense tensors beside the matrix. vocabulary: the source's ids of the tokens that
    are still there, in the order of their new ids; None where all are. plan: what each site is meant to become. facts: what
    holds. history: the text of every pass so far.
    """

    graph: Graph
    config: Any = field(compare=False)
    dtype: torch.dtype
    specs: tuple[Spec, ...]
    dense: Overlay
    codes: Mapping[str, Promised] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)
    sparsity: Mapping[str, Sparsity] = field(default_factory=dict)
    vocabulary: tuple[int, ...] | None = None
    plan: BitPlan | None = None
    facts: Fact = Fact.DENSE
    history: tuple[str, ...] = ()

    # --- what changes ---

    def with_part(self, part: Part) -> State:
        """With what a step has committed; a tensor or site that was there before is replaced."""
        dense = self.dense.with_written(part.dense) if part.dense else self.dense
        return replace(self, dense=dense, codes={**self.codes, **part.codes}, serving={**self.serving, **part.serving})

    def promising(self, formats: Mapping[str, Format]) -> State:
        """With sites that are to be encoded, for `foresee`; one that has its format already keeps its tensors."""
        new = {n: Promised(f, self.graph[n].shape) for n, f in formats.items() if self.format(self.graph[n]) != f}
        return replace(self, codes={**self.codes, **new})

    # --- what is asked ---

    def ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids of the source (int64, any shape) as this state numbers them; IndexError for one that is there no longer."""
        return tokens if self._numbers is None else self._numbers[tokens]

    @cached_property
    def _numbers(self) -> torch.Tensor | None:
        if self.vocabulary is None:
            return None
        found = torch.full((max(self.vocabulary) + 1,), -1)
        found[list(self.vocabulary)] = torch.arange(len(self.vocabulary))
        return found

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Site -> format of every encoded site, in the graph's order; all others are as the last dense step left them."""
        return {site.name: self.codes[site.name].format for site in self.graph if site.name in self.codes}

    def format(self, site: Site) -> Format | None:
        """The format that the site is encoded in, or None where it is dense."""
        found = self.codes.get(site.name)
        return found.format if found else None

    def weight(self, site: Site) -> torch.Tensor:
        """The site's matrix [out, in] as its engine would see it, in the model's dtype, on CPU."""
        if site.tied:
            return self.weight(self.graph[site.tied])
        if site.name in self.codes:
            return self.codes[site.name].load().dequantize(self.dtype)
        return self.reference(site).to(self.dtype)

    def inputs(self, site: Site) -> Rounding | None:
        """What the inputs of a site are rounded by where its matrix multiplies; None where they are taken as they are."""
        return self.codes[site.name].load().inputs if isinstance(self.format(site), Served) else None

    def skips(self, site: Site) -> dict[str, torch.Tensor]:
        """The thresholds, and a predictor's factors, of a site that has a sparsity, by their suffixes; ModelError where they hold
        what nothing is compared with."""
        how = self.sparsity[site.name]
        found = {suffix: self.dense.read(f"{site.stem}.{suffix}") for suffix in how.tensors(site.shape)}
        how.require(found, site.stem)
        return found

    def rows(self, site: Site, rows: slice | list[int]) -> torch.Tensor:
        """Some rows of the matrix of a site that is no expert's, in the model's dtype: no others are read, nor decoded."""
        if site.tied:
            return self.rows(self.graph[site.tied], rows)
        if site.name in self.codes:
            return self.codes[site.name].load().rows(rows, self.dtype)
        return self.dense.read_rows(site.weight, rows).to(self.dtype)

    def reference(self, site: Site) -> torch.Tensor:
        """The site's matrix [out, in] as the last dense step left it, whatever codes there are; ModelError where it holds a NaN
        or an infinity."""
        if site.tied:
            return self.reference(self.graph[site.tied])
        if site.weight in self.dense:
            weight = self.dense.read_finite(site.weight)
        else:
            weight = self.dense.read_rows(site.joined, site.expert or 0)
            if site.role != "down":
                weight = weight.chunk(2)[site.role == "up"]
        return weight.T.contiguous() if site.transposed else weight

    def stored(self, matrices: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint that hold matrices [out, in] by site, in the dtype that they have there: for `commit`.

        Experts that a checkpoint keeps in one tensor come as the whole of it, the others in it as they are.
        """
        found: dict[str, torch.Tensor] = {}
        for name, matrix in matrices.items():
            site = self.graph[name]
            if site.weight in self.dense:
                dtype = self.dense.specs[site.weight].dtype
                found[site.weight] = (matrix.T if site.transposed else matrix).to(dtype).contiguous()
                continue
            whole = found[site.joined] if site.joined in found else self.dense.read(site.joined).clone()
            part = whole[site.expert or 0]
            part = part if site.role == "down" else part.chunk(2)[site.role == "up"]
            part.copy_(matrix)
            found[site.joined] = whole
        return found

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are stored in: fp16 in an fp16 model, else bf16."""
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    def entries(self) -> Iterator[tuple[Spec, Site | None, str]]:
        """Every tensor of a checkpoint of this state, in order: its spec, its site where it is encoded, and the suffix within
        the site."""
        by_weight = {s.weight: s for s in self.graph if s.name in self.codes}
        joined: dict[str, list[Site]] = {}
        for site in self.graph:
            if site.expert is not None:
                joined.setdefault(site.joined, []).append(site)
        for spec in self.specs:
            sites = [by_weight[spec.name]] if spec.name in by_weight else []
            if any(s.name in self.codes for s in joined.get(spec.name, ())):
                sites = joined[spec.name]
            if not sites:
                yield spec, None, ""
            for site in sites:
                yield from site_entries(site, self.format(site), spec.dtype, self.scale_dtype)


def site_entries(site: Site, fmt: Format | None, dtype: torch.dtype, scale: torch.dtype) -> Iterator[tuple[Spec, Site, str]]:
    """The tensors of one site in a format; None is one expert left dense beside quantized ones."""
    if fmt is None:
        yield Spec(site.weight, dtype, site.shape), site, "weight"
        return
    for suffix, (kind, shape) in fmt.tensors(site.shape, scale).items():
        flip = site.transposed and isinstance(fmt, Dense)
        yield Spec(f"{site.stem}.{suffix}", kind, shape[::-1] if flip else shape), site, suffix


def changed(before: State, after: State) -> Aspect:
    """What really differs between two states."""
    aspect = Aspect.NONE
    structure = [(state.graph, state.specs, state.vocabulary, dict(state.sparsity)) for state in (before, after)]
    if structure[0] != structure[1] or config_of(before) != config_of(after):
        aspect |= Aspect.STRUCTURE
    if before.dense != after.dense or dict(before.codes) != dict(after.codes):
        aspect |= Aspect.WEIGHTS
    if before.formats != after.formats:
        aspect |= Aspect.ENCODING
    if before.plan != after.plan:
        aspect |= Aspect.PLAN
    if dict(before.serving) != dict(after.serving):
        aspect |= Aspect.SERVING
    return aspect


def config_of(state: State) -> dict[str, Any]:
    """The values of a state's config."""
    values: dict[str, Any] = state.config.to_dict()
    return values


def broken_promises(foreseen: State, made: State) -> list[str]:
    """In words, where a state is not what was foreseen of it: structure, config, the tensors that are there and their shapes,
    formats. Empty where it is."""
    found = [f"{name} is not what it foresaw" for name in ("graph", "specs", "dtype", "vocabulary", "sparsity") if
             getattr(foreseen, name) != getattr(made, name)]  # fmt: skip
    ours, theirs = config_of(foreseen), config_of(made)
    found += [f"config.{k} is not what it foresaw" for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    for spec in made.specs:
        held = made.dense.specs.get(spec.name)
        if held != spec:
            what = "missing" if held is None else f"{str(held.dtype)[6:]} {list(held.shape)}"
            found.append(f"'{spec.name}' is {what}, it foresaw {str(spec.dtype)[6:]} {list(spec.shape)}")
    known = {spec.name for spec in made.specs}
    found += [f"'{name}' was written, and is no tensor that it foresaw" for name in made.dense.written if name not in known]
    if foreseen.serving.keys() != made.serving.keys():
        found.append(f"serving has {sorted(made.serving)}, it foresaw {sorted(foreseen.serving)}")
    for name in foreseen.formats.keys() | made.formats.keys():
        wished, held_as = foreseen.formats.get(name), made.formats.get(name)
        if wished != held_as:
            found.append(f"'{name}' is {held_as or 'dense'}, it foresaw {wished or 'dense'}")
    return found
