"""Free shapes: every layer gets its own, from the same program as its formats.

One item of the program is a sublayer whose size may change: its options are the levels, each with every combination of formats
for its matrices, so that at a smaller level a format costs fewer bytes. Matrices of nothing that changes are items as they are
without `structure`. Constraints on the shape are limits beside those on bytes. What a sublayer loses besides matrices (biases,
sinks) counts for limits of the whole file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from compress.errors import RecipeError
from compress.model.couplings import KV_GROUPS, Coupling, couplings
from compress.model.work import cached_in
from compress.passes import allocate_core as core
from compress.passes import joint
from compress.passes.allocate_core import Item, Limit, Problem
from compress.passes.allocate_menu_core import Floats, Ints
from compress.passes.choices import Group, Option, Resource, Space, fits, stored
from compress.passes.structure import Counts, Damages, some
from compress.passes.trials import Damage, steps
from compress.state import State
from compress.state.checkpoint import Spec
from compress.state.graph import Site
from compress.state.plan import Point

MOST = 200_000  # options of one item


@dataclass(frozen=True)
class Choice:
    """An item of the program. coupling: the sublayer that it is, if it is one; units [J]: how many stay with each option."""

    name: str
    coupling: Coupling | None
    units: Ints
    damage: Floats
    use: Ints
    bytes: Ints  # [J], of matrices inside blocks


@dataclass(frozen=True)
class Program:
    """Shapes and formats of all layers at once; `limits` are those on bytes, behind which come the constraints on the shape."""

    state: State
    choices: tuple[Choice, ...]
    limits: Sequence[Resource]
    room: Mapping[str, int]  # constraint -> what it allows
    fixed: Mapping[str, int]  # constraint -> what is used of it whatever is chosen

    @classmethod
    def of(
        cls, state: State, counts: Counts, sp: Space, limits: Sequence[Resource], constraints: Mapping[str, str], damage: Damage,
        damages: Damages,
    ) -> Program:  # fmt: skip
        """RecipeError where matrices of two sublayers are to go together."""
        room, inside = joint.allowed(state, constraints), {s.name for s in state.graph.linear}
        made, left, near = list[Choice](), {id(g): g for g in sp.groups}, dict[int | None, list[Group]]()
        for g in sp.groups:
            near.setdefault(g.sites[0].block, []).append(g)
        specs, matrices = {spec.name: spec for spec in state.specs}, {s.weight for s in state.graph}
        fixed = {name: used for name, used in joint.amounts(state).items() if name in room}
        for c in (c for c in couplings(state) if counts.get(c.kind)):
            groups = tuple(g for g in near[c.block] if any(s.weight in c.cuts for s in g.sites))
            odd = next((s.name for g in groups for s in g.sites if s.weight not in c.cuts), None)
            if odd is not None:
                raise RecipeError(f"'{odd}' goes together with matrices of another sublayer, and with shapes: free each has its "
                                  "own shape; leave it out of 'together'", ("together",))  # fmt: skip
            for g in groups:
                left.pop(id(g), None)
            cache = cached_in(state, c.block) * state.dtype.itemsize if c.kind == KV_GROUPS else 0
            tensors = Tensors(c, [specs[name] for name in c.cuts if name in specs], matrices, cache)
            had = tensors.constrained(c.units)
            fixed = {name: used - had[name] for name, used in fixed.items()}
            made.append(sublayer(tensors, groups, [c.units, *counts[c.kind]], limits, [*room], damage, damages, inside))
        made += [plain(g, limits, len(room), damage, inside) for g in left.values()]
        return cls(state, tuple(made), limits, room, fixed)

    def solved(self, seconds: float) -> Found:
        """The best of all; RecipeError where nothing keeps to the limits."""
        shape = [Limit(name, most - self.fixed[name]) for name, most in self.room.items()]
        items = [Item(c.name, c.damage, c.use) for c in self.choices]
        problem = Problem(items, [Limit(r.name, r.allowed) for r in self.limits] + shape)
        try:
            return Found(self, problem, core.solve(problem, time_limit=seconds))
        except core.Infeasible as e:
            if e.limit_index < len(self.limits):
                raise joint.infeasible([joint.Tight(self.limits[e.limit_index], e.least)]) from None
            over = list(self.room)[e.limit_index - len(self.limits)]
            raise joint.too_many(self.state, over, self.room[over], e.least + self.fixed[over]) from None

    def bits(self, choice: Sequence[int]) -> float:
        """Average bits of the matrices inside blocks, for each weight that there was."""
        total = sum(int(c.bytes[j]) for c, j in zip(self.choices, choice, strict=True))
        return 8 * total / sum(s.numel for s in self.state.graph.linear)


@dataclass(frozen=True)
class Found:
    """The optimum of a program."""

    program: Program
    problem: Problem
    solution: core.Solution

    @property
    def stays(self) -> joint.Stays:
        """What stays of each layer."""
        found = dict[str, dict[str, int]]()
        for c, j in zip(self.program.choices, self.solution.choice, strict=True):
            count = int(c.units[j])
            if c.coupling is not None and count < c.coupling.units:
                found.setdefault(c.coupling.kind, {})[f"layers.{c.coupling.block}.*"] = count
        return found

    def frontier(self) -> tuple[Point, ...]:
        """What to expect at other budgets, shapes and formats chosen anew."""
        uses, fixed = [item.use[0] for item in self.problem.items], self.program.limits[0].fixed
        budgets = steps(sum(int(u.min()) for u in uses), sum(int(u.max()) for u in uses))
        found = {p.used: Point(self.program.bits(p.choice), p.used + fixed, p.damage)
                 for p in core.frontier(self.problem, budgets)}  # fmt: skip
        return tuple(found.values())


def guess(state: State, counts: Counts) -> Damages:
    """Damage of levels before anything is measured, as `choices.guess` has it of formats: of every weight that goes, all."""
    matrices = {s.weight: s.numel for s in state.graph}
    return {(c.kind, c.block, n): sum(matrices.get(name, 0) for name in c.cuts) * (1 - n / c.units)
            for c in couplings(state) for n in counts.get(c.kind, ())}  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """What becomes shorter with a coupling: its tensors, which of all are matrices, and the bytes of its cache for each token."""

    coupling: Coupling
    specs: Sequence[Spec]
    matrices: Collection[str]
    cache: int

    def besides(self, count: int) -> int:
        """Bytes that go where so many units stay, and are no matrix's, below zero."""
        cuts = self.coupling.cuts
        loose = [spec for spec in self.specs if spec.name not in self.matrices]
        return -sum(self._gone(spec, count) * spec.nbytes // spec.shape[cuts[spec.name].dim] for spec in loose)

    def constrained(self, count: int) -> dict[str, int]:
        """What is used of each constraint with so many units: of what goes with them."""
        cuts, left = self.coupling.cuts, 0
        for spec in self.specs:
            numel = math.prod(spec.shape)
            left += numel - self._gone(spec, count) * numel // spec.shape[cuts[spec.name].dim]
        return {"parameters": left, "kv_cache": self.cache * count // self.coupling.units}

    def _gone(self, spec: Spec, count: int) -> int:
        """By how much a tensor becomes shorter."""
        return (self.coupling.units - count) * self.coupling.cuts[spec.name].rows.shape[1]


def sublayer(
    tensors: Tensors, groups: tuple[Group, ...], counts: Sequence[int], limits: Sequence[Resource], room: Sequence[str],
    damage: Damage, damages: Damages, inside: set[str],
) -> Choice:  # fmt: skip
    """Every level of a sublayer, with all formats that its matrices may then have."""
    columns, c = [], tensors.coupling
    for count in counts:
        shape = tensors.constrained(count)
        extra = [tensors.besides(count) if r.file else 0 for r in limits] + [shape[name] for name in room]
        lost = damages[c.kind, c.block, count] if count < c.units else 0.0
        if not count:  # no matrix is left
            columns.append((np.zeros(1, np.int64), np.full(1, lost), np.array(extra, np.int64)[:, None], np.zeros(1, np.int64)))
            continue
        smaller = [tuple(shrunk(s, c, count) for s in g.sites) for g in groups]
        options = [[o for o in g.options if all(fits(f, s.shape) for f, s in zip(o, sites, strict=True))]
                   for g, sites in zip(groups, smaller, strict=True)]  # fmt: skip
        if all(options):
            tables = [table(sites, mine, limits, damage, inside) for sites, mine in zip(smaller, options, strict=True)]
            D, U, B = reduce(added, tables)
            U = padded(U, len(room)) + np.array(extra, np.int64)[:, None]
            columns.append((np.full(len(D), count), D + lost, U, B))
    units, D, U, B = (np.concatenate(parts, -1) for parts in zip(*columns, strict=True))
    if len(D) > MOST:
        raise RecipeError(f"layer {c.block} has {len(D):,} combinations of levels and formats; name fewer formats or ranks, or "
                          "let more matrices go together", ("formats",))  # fmt: skip
    return Choice(f"layers.{c.block}.{c.kind}", c, units, D, U, B)


def padded(U: Ints, more: int) -> Ints:
    """Uses of limits, with zeros for `more` of them."""
    return np.concatenate([U, np.zeros((more, U.shape[1]), np.int64)])


def plain(g: Group, limits: Sequence[Resource], room: int, damage: Damage, inside: set[str]) -> Choice:
    """A group of matrices that keep their size."""
    D, U, B = table(g.sites, g.options, limits, damage, inside)
    return Choice(g.name, None, np.zeros(len(D), np.int64), D, padded(U, room), B)


Table = tuple[Floats, Ints, Ints]  # damage [J], use [C, J], bytes [J]


def table(
    sites: Sequence[Site], options: Sequence[Option], limits: Sequence[Resource], damage: Damage, inside: set[str]
) -> Table:
    """What each option of a group would do and use."""
    pairs = [list(zip(sites, o, strict=True)) for o in options]
    return (np.array([sum(damage(s, f) for s, f in o) for o in pairs], np.float64),
            np.array([[sum(r.use(s, f) for s, f in o) for o in pairs] for r in limits], np.int64),
            np.array([sum(stored(f, s.shape) for s, f in o if s.name in inside) for o in pairs], np.int64))  # fmt: skip


def added(a: Table, b: Table) -> Table:
    """Of every option of one group with every option of another."""
    D = (a[0][:, None] + b[0]).reshape(-1)
    return D, (a[1][:, :, None] + b[1][:, None]).reshape(len(a[1]), -1), (a[2][:, None] + b[2]).reshape(-1)


def smaller(state: State, counts: Counts) -> Iterator[Site]:
    """Every matrix as it would be at each level that leaves something of it."""
    for c in couplings(state):
        cut = [s for s in state.graph.of_block(c.block) if s.weight in c.cuts and s.expert is None]
        yield from (shrunk(s, c, count) for count in some(counts.get(c.kind, ())) for s in cut)


def shrunk(site: Site, c: Coupling, count: int) -> Site:
    """A matrix of a sublayer of which so many units stay."""
    cut, (out, width) = c.cuts[site.weight], site.shape
    gone = (c.units - count) * cut.rows.shape[1]
    return replace(site, shape=(out, width - gone) if cut.dim == int(not site.transposed) else (out - gone, width))
