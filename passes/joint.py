"""Shape and bits from one budget: which levels of `structure` and which formats together do the least damage.

Damages of shapes (structure.py) and of formats (error_table.py) are added up, and one program chooses both. Where every layer
has the same shape, as engines want it, there are few shapes: for each the formats are chosen exactly (allocate_core.py), and the
best of these choices is the best of all. A model that keeps its shape is one of them.

A limit in bits is per weight of the model as it was, or pruning would raise what it allows. Limits of the shape alone
(`constraints`) leave shapes out before formats are chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from compress.documents import one_line
from compress.errors import FormatError, RecipeError
from compress.model.couplings import named, span
from compress.model.work import cached
from compress.passes.choices import Resource
from compress.passes.prune import Prune, units
from compress.passes.structure import EVERY, Counts, Damages, made_of, some
from compress.passes.trials import Solved, steps
from compress.state import State
from compress.state.plan import BitPlan, Point

MOST = 2**60  # of a limit: no model has more, and solvers count in 64 bits
CONSTRAINED = {"parameters": "parameters", "kv_cache": "bytes of cache for each token"}
Stays = Mapping[str, Mapping[str, int]]  # kind -> pattern -> units that stay, as `prune` is told


@dataclass(frozen=True)
class Shape:
    """A model as it would be: what stays of it, in words too, the state that this leaves, and what it costs by sublayer."""

    text: str
    stays: Stays
    state: State
    damages: Mapping[str, float]

    @property
    def damage(self) -> float:
        return sum(self.damages.values())

    @property
    def prune(self) -> Prune | None:
        """What makes it so; None where the model is."""
        return made_of({kind: dict(stays) for kind, stays in self.stays.items()}) if self.stays else None


def shaped(state: State, stays: Stays, damages: Damages | None = None) -> Shape:
    """A model of which only so much stays."""
    shape = Shape("as it is", stays, state, {})
    if shape.prune is None:
        return shape
    made, text, lost = shape.prune.foresee(state), dict[str, None](), dict[str, float]()
    before, after = units(state), units(made)
    for kind in stays:
        left = {block: after.get((k, block), 0) for k, block in before if k == kind}
        text[f"{span(left)} of {span({b: n for (k, b), n in before.items() if k == kind})} {named(kind)}"] = None
        lost |= {f"layers.{block}.{kind}": damages[kind, block, count] if damages is not None else 0.0
                 for block, count in left.items() if count < before[kind, block]}  # fmt: skip
    return Shape(", ".join(text), stays, made, lost)


def uniform(state: State, counts: Counts, constraints: Mapping[str, str], damages: Damages | None) -> Iterator[Shape]:
    """Every shape with all layers alike that is within the constraints, the largest first. RecipeError where none is."""
    room, least = allowed(state, constraints), dict[str, int]()
    for chosen in product(*([None, *some(counts[kind])] for kind in counts)):
        stays = {kind: {EVERY: count} for kind, count in zip(counts, chosen, strict=True) if count is not None}
        shape = shaped(state, stays, damages)
        used = amounts(shape.state)
        least = {name: min(used[name], least.get(name, used[name])) for name in used}
        if all(used[name] <= room[name] for name in room):
            yield shape
    over = next((name for name in room if least[name] > room[name]), None)
    if over is not None:
        raise too_many(state, over, room[over], least[over])


def too_many(state: State, over: str, room: int, least: int) -> RecipeError:
    """That a constraint cannot be kept, and the least that can."""
    return RecipeError(f"no shape has {room:,} {CONSTRAINED[over]} or fewer; the least that 'structure' allows is {least:,}, "
                       f"{least / amounts(state)[over]:.1%} of what there are", ("constraints", over))  # fmt: skip


# --- what a shape must keep to ---------------------------------------------------------------------------------------


def amounts(state: State) -> dict[str, int]:
    """What `constraints` are about, counted."""
    return {"parameters": sum(math.prod(spec.shape) for spec in state.specs), "kv_cache": cached(state) * state.dtype.itemsize}


def allowed(state: State, constraints: Mapping[str, str]) -> dict[str, int]:
    """The constraints on a state as numbers."""
    have, found = amounts(state), {}
    for name, text in constraints.items():
        number, share = parsed(text)
        found[name] = math.floor(min(number / 100 * have[name] + 1e-9 if share else number, MOST))
    return found


def parsed(text: str, unit: str = "") -> tuple[float, bool]:
    """A number, behind which its unit may stand, and whether it is a share in per cent. ValueError where it is none."""
    match = re.fullmatch(rf"(?:<=)?\s*(\d+(?:\.\d+)?)\s*(%|{unit}|)", text.strip())
    if match is None:
        raise ValueError(
            f"'{one_line(text)}' is no limit; write '<= 80 %' of what the model has, or a number{unit and f' of {unit}'}"
        )
    return float(match[1]), match[2] == "%"


# --- the best of all -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tight:
    """A limit that cannot be kept, and the least of it that is possible."""

    resource: Resource
    least: int


@dataclass(frozen=True)
class Best:
    """The shape and the formats of least damage. every: the best formats of each uniform shape that can keep to the limits.
    points, bound: the frontier and what no choice goes below, where these are not all that there is."""

    shape: Shape
    solved: Solved
    every: tuple[tuple[Shape, Solved], ...]
    notes: tuple[str, ...] = ()
    points: tuple[Point, ...] | None = None
    bound: float | None = None

    @classmethod
    def of(cls, found: Sequence[tuple[Shape, Solved | Tight | FormatError]]) -> Best:
        """RecipeError where no shape can keep to the limits."""
        able = [(shape, solved) for shape, solved in found if isinstance(solved, Solved)]
        if not able:
            raise infeasible([solved for _, solved in found if not isinstance(solved, Solved)])
        notes = tuple(f"a shape is left out, {shape.text}: {e}" for shape, e in found if isinstance(e, FormatError))
        if any(shape.stays for shape, _ in able):
            notes += ("bits of a budget are per weight of the model as it was",)
        shape, solved = min(able, key=lambda pair: pair[0].damage + pair[1].solution.damage)  # of equals the larger shape
        return cls(shape, solved, tuple(able), notes)

    @property
    def damage(self) -> float:
        """Of shape and formats."""
        return self.shape.damage + self.solved.solution.damage

    def plan(self, measured: bool = True) -> BitPlan:
        """The formats, with what is expected of them and of the shape."""
        plan = self.solved.plan(measured)
        forecast = plan.forecast
        if forecast is None or not any(shape.stays for shape, _ in self.every):
            return plan
        bound = min(shape.damage + solved.solution.bound for shape, solved in self.every) if self.bound is None else self.bound
        total = forecast.total + self.shape.damage
        points = () if not measured else self.frontier() if self.points is None else self.points
        return replace(plan, forecast=replace(
            forecast, total=total, bound=bound, gap=(total - bound) / total if total else 0.0, structure=self.shape.damages,
            frontier=points, notes=(*forecast.notes, *self.notes),
        ))  # fmt: skip

    def frontier(self) -> tuple[Point, ...]:
        """What the best shape at each budget would do."""
        reach = [solved.reach() for _, solved in self.every]
        budgets = steps(min(least for least, _ in reach), max(most for _, most in reach))
        best: dict[int, Point] = {}
        for shape, solved in self.every:
            low, high = solved.reach()
            within = [min(b, high) for b in budgets if b >= low]
            points = list(solved.at(within))
            for budget, p in zip([b for b in budgets if b >= low][-len(points) :], points, strict=True):
                p = replace(p, damage=p.damage + shape.damage)
                if budget not in best or p.damage < best[budget].damage:
                    best[budget] = p
        return tuple({p.bytes: p for _, p in sorted(best.items())}.values())


def infeasible(found: Sequence[Tight | FormatError]) -> Exception:
    """Why no shape will do: the limit of which one comes nearest, or what hinders every one."""
    tight = [e for e in found if isinstance(e, Tight)]
    if not tight:
        return next(e for e in found if isinstance(e, FormatError))
    nearest = min(tight, key=lambda e: e.least / max(1, e.resource.allowed))
    r = nearest.resource
    return RecipeError(f"no allocation keeps to {r.name}; the least possible is {r.say(nearest.least)}.  {r.todo}", r.at)
