"""What may be chosen for a model, as an integer program: matrices that go together, their formats, and what each would use.

A group is a set of matrices that get one format, because an engine joins them or because the user says so; ranks of a
low-rank correction may differ inside a group, unless it is large. An option of a group is a tuple of formats, one for each
member. Pins narrow the options before anything is solved. Each budget becomes one limit in whole bytes:

    3.0 bits          bytes of the matrices inside the blocks <= 3.0 / 8 of their number of weights
    1.2 GiB, 45 %     bytes of the whole file: every other tensor and the header are set aside first, and each option carries
                      the bytes of its own header entries, so a choice that keeps the limit makes a file that does
    limits: {...}     the same for the tensors of the sites that a pattern names
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CompressError, FormatError, MatchError, RecipeError
from compress.formats import Dense, Format, LowRank, Rotated, base_of, parse
from compress.passes.allocate_core import Item, Limit, Problem
from compress.state import State
from compress.state.checkpoint import Layout, Spec
from compress.state.graph import Graph, Site, matches
from compress.state.plan import Budget, check_fits, size
from compress.state.state import site_entries

ADAPTED = 40  # bytes by which the name of a factor may grow where factors lie in a file of their own
MANY = 6  # members of a group from which on all of them have one rank
Option = tuple[Format, ...]


class Bounds(BaseModel):
    """The least and the most that a site may get, as formats: by the bytes they take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: str | None = Field(None, description="at least the bytes of this format")
    max: str | None = Field(None, description="at most the bytes of this format")


@dataclass(frozen=True)
class Group:
    """Sites that go together, and the options they have."""

    sites: tuple[Site, ...]
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        names = [s.name for s in self.sites]
        return " + ".join(names) if len(names) < MANY else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class Space:
    """Everything that may be chosen. notes: what the user should know about formats that do not fit everywhere."""

    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    sites: tuple[Site, ...] = ()  # that formats are chosen for, pinned ones included: what averages are taken over

    def wanted(self) -> dict[str, list[Format]]:
        """Site -> the quantized formats that it may get: what has to be measured."""
        found: dict[str, dict[Format, None]] = {}
        for group in self.groups:
            for i, site in enumerate(group.sites):
                found[site.name] = {o[i]: None for o in group.options if not isinstance(o[i], Dense)}
        return {name: list(formats) for name, formats in found.items()}

    def measured(self, whole: Graph) -> Space:
        """The same of a smaller model, without formats that did not fit the matrices as they were: nothing is known of them."""
        groups = []
        for group in self.groups:
            shapes = [whole[s.name].shape for s in group.sites]
            known = tuple(o for o in group.options if all(map(fits, o, shapes)))
            if not known:
                raise FormatError(f"'{group.name}': none of the formats fits it both as it is and smaller", ("formats",))
            groups.append(replace(group, options=known))
        return replace(self, groups=tuple(groups))

    def plan(self, choice: Sequence[int], own: Format) -> dict[str, Format]:
        """The formats of a choice, one option for each group; what stays as it is (`own`) is left out."""
        chosen = {s.name: f for g, i in zip(self.groups, choice, strict=True) for s, f in zip(g.sites, g.options[i], strict=True)}
        return {name: fmt for name, fmt in chosen.items() if fmt != own}


def space(
    state: State,
    formats: Sequence[Format],
    ranks: Sequence[int],
    factors: Format,
    pins: Mapping[str, str | Bounds],
    together: str | Sequence[Sequence[str]],
    also: Sequence[str] = (),
) -> Space:
    """The groups of a state's sites and their options, pins respected.

    Raises FormatError and MatchError, with the place in the options, where a pattern matches nothing, a format fits nowhere, or
    pins contradict each other or the groups.
    """
    graph, own = state.graph, Dense(state.dtype)
    allowed: dict[str, list[Format]] = {}
    misfits: dict[Format, list[Site]] = {}
    sites = [*graph.linear, *outside(graph, also)]
    for site in sites:
        allowed[site.name] = fitting(site, formats, ranks if site.role != "embed" else (0,), factors, misfits)
    for pattern, pin in pins.items():
        allowed |= pinned(graph, pattern, pin, allowed, own)
    for name, fmts in allowed.items():
        if not fmts:
            why = f"none of the formats fits its shape {list(graph[name].shape)}"
            if graph[name].role == "embed" and any(isinstance(fmt, Rotated) for fmt in formats):
                why += "; of rotated ones an embedding takes those of inputs alone, such as tcq3:ri128"
            raise FormatError(f"'{name}': {why}; add one that does, or pin it", ("formats",))
    groups = (Group(tuple(members), options_of(members, allowed)) for members in gathered(graph, allowed, together))
    return Space(tuple(groups), tuple(misfit(fmt, odd) for fmt, odd in misfits.items()), tuple(sites))


def owners(graph: Graph, sites: Sequence[Site]) -> list[Site]:
    """The sites, each once; of those that share another's matrix, that one."""
    return list(dict.fromkeys(graph.owner(s) for s in sites))


def outside(graph: Graph, also: Sequence[str]) -> list[Site]:
    """The matrices outside the blocks that patterns name, each once: of two sites that share one, its owner."""
    found: dict[str, Site] = {}
    for pattern in also:
        try:
            sites = graph.match(pattern)
        except MatchError as e:
            raise MatchError(str(e), ("also",)) from None
        inside = next((s.name for s in sites if s.block is not None), None)
        if inside:
            raise RecipeError(f"'{inside}' lies inside the blocks, which are allocated anyway; name embed or lm_head", ("also",))
        found |= {s.name: s for s in owners(graph, sites)}
    return [site for site in graph if site.name in found]


def misfit(fmt: Format, sites: Sequence[Site]) -> str:
    """That a candidate fits some sites and not these."""
    more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    return f"{fmt} does not fit {sites[0].name} ({sites[0].shape[1]} inputs){more}"


def fitting(
    site: Site, formats: Sequence[Format], ranks: Sequence[int], factors: Format, misfits: dict[Format, list[Site]]
) -> list[Format]:
    """The candidates that a site can have, with and without correction; others are noted in `misfits`."""
    found: list[Format] = []
    for base in formats:
        for rank in ranks if not isinstance(base, Dense) else (0,):
            # what the types do not allow here, LowRank itself refuses
            fmt = LowRank(base, rank, factors) if rank else base  # type: ignore[arg-type]
            try:
                check_fits(site, fmt, ("formats",))
                found.append(fmt)
            except FormatError:
                misfits.setdefault(fmt, []).append(site)
    return found


def fits(fmt: Format, shape: tuple[int, int]) -> bool:
    """Whether a matrix of this shape can have a format."""
    try:
        fmt.check(shape)
    except FormatError:
        return False
    return True


def pinned(
    graph: Graph, pattern: str, pin: str | Bounds, allowed: Mapping[str, list[Format]], own: Format
) -> dict[str, list[Format]]:
    """What one pin leaves of the candidates, by site."""
    at = ("pins", pattern)
    try:
        sites = graph.match(pattern)
        if isinstance(pin, str):
            fmt = parse(pin)
            for site in owners(graph, sites):
                check_fits(site, fmt, at)
            return {s.name: [fmt] for s in owners(graph, sites)}
        low, high = (None if text is None else parse(text) for text in (pin.min, pin.max))
    except CompressError as e:
        raise type(e)(str(e), at) from None
    left = {}
    sites = owners(graph, sites)
    chosen = [site for site in sites if site.name in allowed]
    if not chosen:
        raise MatchError(f"'{sites[0].name}' is not allocated; name it in 'also', or pin it to one format", at)
    for site in chosen:
        least, most = low.nbytes(site.shape) if low else 0, high.nbytes(site.shape) if high else float("inf")
        left[site.name] = [f for f in allowed[site.name] if least <= stored(f, site.shape) <= most]
        if not left[site.name]:
            raise FormatError(f"'{site.name}': no candidate lies between min and max; its formats: "
                              f"{', '.join(map(str, allowed[site.name]))}", at)  # fmt: skip
    return left


def gathered(graph: Graph, names: Iterable[str], together: str | Sequence[Sequence[str]]) -> Iterable[list[Site]]:
    """The sites to allocate in groups, in the graph's order."""
    sets: list[list[str]] = []
    if together == "engine":
        sets = [[s.name for s in group] for group in graph.fused()]
    elif together != "none":
        sets = [same for patterns in together for same in by_block(graph, patterns)]
    key: dict[str, int] = {}
    for i, members in enumerate(sets):
        for name in members:
            if key.setdefault(name, i) != i:
                raise RecipeError(f"'{name}' is in two groups; let the patterns of 'together' not overlap", ("together",))
    groups: dict[str | int, list[Site]] = {}
    wanted = set(names)
    for site in graph:
        if site.name in wanted:
            groups.setdefault(key.get(site.name, site.name), []).append(site)
    return groups.values()


def by_block(graph: Graph, patterns: Sequence[str]) -> Iterable[list[str]]:
    """The sites that one entry of `together` names, block by block."""
    for pattern in patterns:
        try:
            outside = [s.name for s in graph.match(pattern) if s.block is None]
        except MatchError as e:
            raise MatchError(str(e), ("together",)) from None
        if outside:
            raise RecipeError(f"'{outside[0]}' lies outside the blocks; groups are made within a block", ("together",))
    for block in graph.blocks:
        members = [s.name for s in graph.of_block(block.index) if any(matches(s, p) for p in patterns)]
        if members:
            yield members


def options_of(sites: Sequence[Site], allowed: Mapping[str, list[Format]]) -> tuple[Option, ...]:
    """Tuples of formats with one base for all sites; every combination of ranks in a small group, one rank in a large one."""
    by_base = [families(allowed[s.name]) for s in sites]
    shared = [b for b in by_base[0] if all(b in others for others in by_base)]
    if not shared:
        names, todo = ", ".join(s.name for s in sites[:4]), "pin them alike, or set together: none"
        raise FormatError(f"{names} go together, but their pins leave them no common format; {todo}", ("pins",))
    options: list[Option] = []
    for base in shared:
        members = [{rank_of(f): f for f in family[base]} for family in by_base]
        if len(sites) < MANY:
            options += itertools.product(*(m.values() for m in members))
        else:
            options += [tuple(m[rank] for m in members) for rank in members[0] if all(rank in m for m in members)]
    return tuple(options)


def families(formats: Sequence[Format]) -> dict[Format, list[Format]]:
    """Formats by their base."""
    found: dict[Format, list[Format]] = {}
    for fmt in formats:
        found.setdefault(base_of(fmt), []).append(fmt)
    return found


def rank_of(fmt: Format) -> int:
    return fmt.rank if isinstance(fmt, LowRank) else 0


# --- the integer program ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resource:
    """One limit: its name, where in the options it stands, what it allows, and what a site uses of it in a format."""

    name: str
    at: tuple[str, ...]
    allowed: int
    use: Callable[[Site, Format], int]
    fixed: int  # bytes that count towards it whatever is chosen; `allowed` is what they leave
    numel: int  # weights that an average is over; 0 where it is not one
    file: bool = False  # whether it is about all tensors of the file
    todo: str = "Raise it, allow smaller formats, or prune first"  # where it cannot be kept

    def say(self, least: int) -> str:
        """A number of bytes of what may be chosen, in the unit of the budget."""
        total = least + self.fixed
        return f"{8 * total / self.numel:.4g} bits" if self.numel else f"{total:,} bytes ({size(total)})"


def resources(
    state: State,
    sp: Space,
    budgets: Sequence[str],
    limits: Mapping[str, str],
    whole: State,
    beside: int = 0,
    grown: Mapping[str, float] = MappingProxyType({}),
) -> list[Resource]:
    """The limits of a recipe, the main budget first; bits and shares are of the `whole` model, of which `state` may be a smaller
    one. beside: what a file holds beyond what is counted; grown: bits a weight beyond a format's own.
    FormatError and MatchError with the place in the options."""
    found = [resource(state, sp, text, None, ("budget",), whole, beside, grown) for text in budgets]
    return found + [resource(state, sp, text, pattern, ("limits", pattern), whole) for pattern, text in limits.items()]


def resource(
    state: State, sp: Space, text: str, pattern: str | None, at: tuple[str, ...], whole: State, beside: int = 0,
    grown: Mapping[str, float] = MappingProxyType({}),
) -> Resource:  # fmt: skip
    try:
        budget = Budget.parse(text)
        sites = sp.sites if pattern is None else owners(state.graph, state.graph.match(pattern))
    except CompressError as e:
        raise type(e)(str(e), at) from None
    inside = {s.name for s in sites}
    numel = sum(whole.graph[s.name].numel for s in sites if not s.tied)
    own = state.dtype.itemsize
    if pattern is not None or budget.average:

        def plain(site: Site, fmt: Format) -> int:
            return stored(fmt, site.shape) if site.name in inside else 0

        loose = sum(s.numel * own for s in sites if s.name not in {m.name for g in sp.groups for m in g.sites} and not s.tied)
        name = str(budget) if pattern is None else f"{pattern}: {budget}"
        return Resource(name, at, budget.bytes(numel, numel * own) - loose, plain, loose, numel if budget.average else 0)
    before = Layout.of(whole.specs).nbytes
    digits = len(str(before))
    fixed = aside(state, sp, digits) + beside

    def written(site: Site, fmt: Format) -> int:
        entries = site_entries(site, fmt, state.dtype, state.scale_dtype)
        more = int(site.numel * grown.get(str(fmt), 0.0) / 8) if grown else 0
        return more + sum(s.nbytes + header_bytes(s, digits) for s, _, _ in entries)

    return Resource(str(budget), at, budget.bytes(0, before) - fixed, written, fixed, 0, file=True)


def aside(state: State, sp: Space, digits: int) -> int:
    """Bytes of the file that no choice changes: other tensors, their header entries, and what a header has in any case."""
    example = {s.name: f for g in sp.groups for s, f in zip(g.sites, g.options[0], strict=True)}
    entries = state.promising(example).entries()
    rest = [spec for spec, site, _ in entries if site is None or site.name not in example]
    return sum(s.nbytes + header_bytes(s, digits) for s in rest) + 2 * len(Layout.of([]).files[0].header) + 16


def header_bytes(spec: Spec, digits: int) -> int:
    """At most what a tensor takes in a header whose offsets have `digits` digits, and in the index of a large model."""
    offset = 10**digits - 1
    entry = {spec.name: {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [offset, offset]}}
    prefix = ADAPTED if ".lora_" in spec.name else 0
    index = len(f' "{spec.name}": "model-00001-of-00001.safetensors",\n') if digits > 9 else 0
    return len(json.dumps(entry, separators=(",", ":"))) + index + prefix


def problem(sp: Space, limits: Sequence[Resource], damage: Callable[[Site, Format], float]) -> Problem:
    """The integer program: damages add up over sites, and so does what they use."""
    items = []
    for group in sp.groups:
        damages = [sum(damage(s, f) for s, f in zip(group.sites, o, strict=True)) for o in group.options]
        use = [[sum(r.use(s, f) for s, f in zip(group.sites, o, strict=True)) for o in group.options] for r in limits]
        items.append(Item(group.name, np.array(damages, np.float64), np.array(use, np.int64)))
    return Problem(items, [Limit(r.name, r.allowed) for r in limits])


def guess(site: Site, fmt: Format) -> float:
    """Damage before anything is measured: every weight counts alike, each bit more divides the squared error by four, and a
    correction takes away the share of it that lies in as many of equal directions."""
    if isinstance(fmt, Dense):
        return 0.0
    bits = 8 * stored(base_of(fmt), site.shape) / site.numel
    return float(site.numel * 4.0**-bits * (1 - rank_of(fmt) / min(site.shape)))


@cache
def stored(fmt: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix in a format; asked for many times."""
    return fmt.nbytes(shape)
