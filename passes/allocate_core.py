"""Spending a budget exactly: one option for each item, the least damage in sum, no limit broken. Pure mathematics on arrays.

Letters in names: I items, J options, C limits; D_ij is the damage of option j of item i, U_cij its use of limit c, an integer.

The problem. Least Σ D under Σ U_c <= limit c for all c at once is a multiple-choice knapsack: NP-hard, yet easy in practice,
because with prices λ_c >= 0 on the limits the items part,

    L(λ) = Σ_i min_j (D_ij + Σ_c λ_c U_cij) - Σ_c λ_c limit_c   <=   the optimum,

and any choice costs L(λ) + Σ r_ij + Σ λ_c s_c, with r_ij >= 0 the reduced costs and s_c its slacks. So a choice that beats an
incumbent has no r above Δ = incumbent - L(λ), and no s_c above Δ / λ_c. That leaves a few hundred of a hundred thousand options.

`solve`. Options that another of their item beats or equals in everything are dropped; of equals the first stays. One limit's
price is where the merged convex hulls of all items reach it; several limits' are found in turn. The choice at these prices,
filled up and improved by changes of one item or two, is the incumbent. HiGHS does the rest: first on the few options of least
r, for a better incumbent, then on all that this one leaves. Its tolerances are not trusted: limits are checked in integers,
and an answer that breaks one is forbidden by a cut that forbids nothing else. `bound` lies below every choice, also where time
ran out; equal input gives an equal answer unless it did. Among choices of equal damage (to 12 digits) it is one whose use no
change of one item or two lowers, limits compared in order.

Alternatives not taken. Gurobi: a licence for what takes seconds without. Dynamic programming over bytes: one limit only.
Annealing, evolution: no bound, another answer each time. Greedy by damage per byte: a part in a thousand off, or more; here
only the start. HiGHS on everything: scipy gives it no warm start, and its time goes to options that cannot matter.

Limits. Damages are taken to add up. Whether several limits can be met at all is settled whatever time it takes. Bounds are
floats with a margin for rounding: a gap below 1e-10 means nothing. There is at least one item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

optimize: Any = scipy.optimize  # scipy has no types
sparse: Any = scipy.sparse
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Choice = tuple[int, ...]

_ROUNDING = 1e-12  # relative; two damages nearer than this are equal
_GRAIN = 1e-6  # of the damage, is 1 to HiGHS, whose own tolerance is 1e-6 of that
_LARGEST = 2.0**20  # coefficients of HiGHS are scaled below it, by a power of two
_PAIRED = 600  # moves of which all pairs are tried in a round of the local search


@dataclass(frozen=True, eq=False)
class Item:
    """What takes one of J options: a damage [J] >= 0 and a use [C, J] of every limit, zero where the limit is not about it."""

    name: str
    damage: Floats
    use: Ints

    def __post_init__(self) -> None:
        damage, use = np.array(self.damage, np.float64), np.array(self.use)
        shaped = damage.ndim == 1 and damage.size and use.shape[1:] == damage.shape and use.dtype.kind in "iu"
        if not (shaped and np.isfinite(damage).all() and damage.min() >= 0):
            raise ValueError(f"{self.name}: not a damage [J], finite and not negative, and a use [C, J] in integers")
        self.__dict__.update(damage=damage, use=use.astype(np.int64))


@dataclass(frozen=True)
class Limit:
    """An upper limit of the sum of a use, as `Item.use` has them in order."""

    name: str
    at_most: int


@dataclass(frozen=True, eq=False)
class Problem:
    """Items and limits."""

    items: Sequence[Item]
    limits: Sequence[Limit]


@dataclass(frozen=True)
class Solution:
    """A choice, its damage, a bound below every choice's, (damage - bound) / damage, the use of each limit and its price, the
    damage that a unit more would save; `method` is "exact" where the gap asked for is proven, else "lagrangian: time limit".
    """

    choice: Choice
    damage: float
    bound: float
    gap: float
    used: tuple[int, ...]
    price: tuple[float, ...]
    method: str


@dataclass(frozen=True)
class Point:
    """The Lagrangian choice at one budget; no choice within the budget has less damage than `bound`."""

    budget: int
    used: int
    damage: float
    bound: float
    choice: Choice


class Infeasible(Exception):  # noqa: N818
    """No choice keeps all limits; `least` is the smallest value of limit `limit_index` for which one would.

    It is the first for which that is so with all others as they are; else the first impossible alone, else with those before it.
    """

    def __init__(self, limit_index: int, least: int, limit: Limit):
        super().__init__(f"limit '{limit.name}' is {limit.at_most}, but no choice uses less than {least} of it")
        self.limit_index, self.least = limit_index, least


@dataclass(frozen=True, eq=False)
class _Table:
    """Options side by side, in columns; those that an item lacks have infinite damage. A choice [I] here is one of columns.

    Uses count from each item's least; `base` is the sum of these, and `room` what the limits leave above it.
    """

    D_ij: Floats
    U_cij: Ints
    option_ij: Ints
    room_c: Ints
    base_c: Ints

    @property
    def rows(self) -> Ints:
        return np.arange(len(self.D_ij))

    def damage(self, choice: Ints) -> float:
        return math.fsum(self.D_ij[self.rows, choice])

    def slack(self, choice: Ints) -> Ints:
        slack_c: Ints = self.room_c - self.U_cij[:, self.rows, choice].sum(1)
        return slack_c

    def used(self, choice: Ints) -> tuple[int, ...]:
        return tuple((self.base_c + self.room_c - self.slack(choice)).tolist())

    def options(self, choice: Ints) -> Choice:
        return tuple(self.option_ij[self.rows, choice].tolist())

    def fits(self, choice: Ints) -> bool:
        return bool((self.slack(choice) >= 0).all())

    def changes(self, choice: Ints) -> tuple[Floats, Ints]:
        return self.D_ij - self.D_ij[self.rows, choice, None], self.U_cij - self.U_cij[:, self.rows, choice, None]

    def take(self, columns_ij: Ints) -> _Table:
        D_ij, U_cij = np.take_along_axis(self.D_ij, columns_ij, 1), np.take_along_axis(self.U_cij, columns_ij[None], 2)
        return replace(self, D_ij=D_ij, U_cij=U_cij, option_ij=np.take_along_axis(self.option_ij, columns_ij, 1))

    def reduced(self, price_c: Floats) -> tuple[Floats, float]:
        """Reduced costs r_ij, and a number that is below L(λ) however the floats were rounded."""
        V_ij = self.D_ij + np.tensordot(price_c, self.U_cij, 1)
        least_i, paid = V_ij.min(1), float(price_c @ self.room_c)
        least = math.fsum(least_i)
        return V_ij - least_i[:, None], least - paid - _ROUNDING * (least + abs(paid))


def _table(problem: Problem) -> _Table:
    C, I = len(problem.limits), len(problem.items)  # noqa: E741
    J = max(len(item.damage) for item in problem.items)
    D_ij, U_cij = np.full((I, J), np.inf), np.zeros((C, I, J), np.int64)
    for i, item in enumerate(problem.items):
        n = len(item.damage)
        D_ij[i, :n], U_cij[:, i, :n], U_cij[:, i, n:] = item.damage, item.use, item.use[:, :1]
    base_ci = U_cij.min(2)
    room = [limit.at_most - int(b) for limit, b in zip(problem.limits, base_ci.sum(1), strict=True)]
    table = _Table(D_ij, U_cij - base_ci[:, :, None], np.tile(np.arange(J), (I, 1)), np.array(room, np.int64), base_ci.sum(1))
    return _undominated(table)


def _undominated(table: _Table) -> _Table:
    """The options that none of the same item beats or equals in everything, by rising damage, at the front of fewer columns."""
    table = table.take(np.lexsort((*table.U_cij[::-1], table.D_ij), axis=-1))
    keep, U_cij = np.isfinite(table.D_ij), table.U_cij
    earlier = np.tri(keep.shape[1], k=-1, dtype=bool)  # row j: the columns before it
    for i in table.rows:
        keep[i] &= ~(earlier & (U_cij[:, i, None, :] <= U_cij[:, i, :, None]).all(0)).any(1)
    table = replace(table, D_ij=np.where(keep, table.D_ij, np.inf))
    return table.take(np.argsort(~keep, axis=1, kind="stable")[:, : int(keep.sum(1).max(initial=1))])


_Hulls = tuple[Ints, Ints, Ints, Floats, Ints]


def _along(hulls: _Hulls, room: int) -> tuple[Ints, float]:
    """The choice that as many segments as fit lead to, and the slope of the next one."""
    start, item_s, column_s, slope_s, use_s = hulls
    k, choice = int(np.searchsorted(use_s, room, side="right")), start.copy()
    choice[item_s[:k]] = column_s[:k]  # of one item's the last is kept
    return choice, float(slope_s[k]) if k < len(slope_s) else 0.0


def _hulls(table: _Table, c: int) -> _Hulls:
    """The convex hulls of damage over one use: each item's start, and all segments, the steepest first: item, column that it
    leads to, damage saved for a unit more, use of the choice after it. All items step at once, of equal slopes to the farthest.
    """
    start = here = np.where(table.U_cij[c] == 0, table.D_ij, np.inf).argmin(1)
    i, last, steps = table.rows, np.full(len(start), np.inf), list[tuple[Ints, Ints, Floats, Ints]]()
    while len(i):
        use = table.U_cij[c][i] - table.U_cij[c][i, here, None]
        saved = table.D_ij[i, here, None] - table.D_ij[i]
        slope = np.where((use > 0) & (saved > 0), saved / np.maximum(use, 1), 0.0)
        row, to = np.arange(len(i)), slope.argmax(1)
        last = np.minimum(last, slope[row, to])  # a hull's slopes fall; rounding must not reorder them
        steps.append((i, to, last, use[row, to]))
        i, here, last = i[last > 0], to[last > 0], last[last > 0]
    item, column, slope, use = map(np.concatenate, zip(*steps, strict=True))
    order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope > 0)]
    return start, item[order], column[order], slope[order], use[order].cumsum()


def _prices(table: _Table, sweeps: int = 8) -> Floats:
    """Coordinate ascent of L: each limit in turn gets its best price, given the others'. One limit needs no second sweep."""
    price_c = np.zeros(len(table.room_c))
    for c in [*range(len(price_c))] * (sweeps if len(price_c) > 1 else 1):
        price_c[c] = 0.0
        priced = replace(table, D_ij=table.D_ij + np.tensordot(price_c, table.U_cij, 1))
        price_c[c] = _along(_hulls(priced, c), int(table.room_c[c]))[1]
    return price_c


def _start(table: _Table, price_c: Floats, problem: Problem) -> Ints:
    """The choice at these prices, or at the first higher ones at which it fits, or any that fits; or Infeasible."""
    for times in (1.0, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 10.0):
        near = table.reduced(times * price_c)[0] <= _ROUNDING * table.D_ij[np.isfinite(table.D_ij)].max()
        choice: Ints = np.where(near, table.D_ij, -1.0).argmax(1)
        if table.fits(choice):
            return choice
    return _settled(table, problem)


def _fill(table: _Table, choice: Ints) -> Ints:
    """The change that saves most of those that fit, until none saves."""
    choice = choice.copy()
    while True:
        D_ij, U_cij = table.changes(choice)
        D_ij[(U_cij > table.slack(choice)[:, None, None]).any(0)] = np.inf
        i, j = np.unravel_index(int(D_ij.argmin()), D_ij.shape)
        if not D_ij[i, j] < 0:
            return choice
        choice[i] = j


def _pairs(table: _Table, choice: Ints, price_c: Floats, moves: int) -> tuple[Floats, Ints, Ints, Ints]:
    """All pairs of the `moves` changes that cost least at these prices, as far as limits allow: damage, use, items, columns.

    Move 0 changes nothing, item 0 stays as it is: pairs with it are changes of one item, and the first pair is no change.
    """
    D_ij, U_cij = table.changes(choice)
    D_ij[table.rows, choice] = np.inf
    i, j = np.nonzero(np.isfinite(D_ij))
    i, j = np.stack([i, j])[:, np.argsort((D_ij + np.tensordot(price_c, U_cij, 1))[i, j], kind="stable")[:moves]]
    D_m, U_cm = np.append(0.0, D_ij[i, j]), np.pad(U_cij[:, i, j], ((0, 0), (1, 0)))
    mover_m, item_m, column_m = np.append(-1, i), np.append(0, i), np.append(choice[0], j)
    fits = np.triu(mover_m[:, None] != mover_m, 1)
    fits[0, 0] = True
    for U_m, slack in zip(U_cm, table.slack(choice), strict=True):
        fits &= U_m[:, None] <= slack - U_m
    a, b = np.nonzero(fits)
    return D_m[a] + D_m[b], U_cm[:, a] + U_cm[:, b], item_m[np.stack([a, b])], column_m[np.stack([a, b])]


def _improve(table: _Table, choice: Ints, price_c: Floats, deadline: float) -> Ints:
    """The best change of one item or two, until none lowers the damage, or at equal damage the use."""
    choice = choice.copy()
    while perf_counter() < deadline:
        D_p, U_cp, items, columns = _pairs(table, choice, price_c, _PAIRED)
        near, p = _ROUNDING * table.damage(choice), int(D_p.argmin())
        if D_p[p] >= -near:
            p = int(np.lexsort((*U_cp[::-1], D_p > near))[0])
        if p == 0:
            break
        choice[items[:, p]] = columns[:, p]
    return choice


def _integer(table: _Table, cost_ij: Floats, price_c: Floats, span: float, seconds: float, gap: float) -> tuple[Any, float]:
    """The choice with the least Σ cost + price·slack, to within `gap`, or None if late or above `span`; a bound of it."""
    item, column = np.nonzero(np.isfinite(cost_ij))
    U_cv = table.U_cij[:, item, column]
    least_ci = np.minimum.reduceat(U_cv, np.searchsorted(item, table.rows), axis=1)
    U_cv, room_c = U_cv - least_ci[:, item], table.room_c - least_ci.sum(1)
    cost_v, paid = cost_ij[item, column] - price_c @ U_cv, float(price_c @ room_c)
    low_c = [int(r - 1.001 * span / p) if p * r > 1.001 * span else 0 for r, p in zip(room_c, price_c, strict=True)]
    variables, unit_c = np.arange(len(item)), np.maximum(np.gcd.reduce(U_cv, axis=1), 1)
    scale_c = np.exp2(np.minimum(0, np.floor(np.log2(_LARGEST / np.maximum(U_cv.max(1, initial=1) // unit_c, 1)))))
    rows = [optimize.LinearConstraint(sparse.csr_array((np.ones(len(item)), (item, variables))), 1, 1)]
    if len(room_c):
        use = sparse.csr_array(U_cv // unit_c[:, None] * scale_c[:, None])
        rows.append(optimize.LinearConstraint(use, np.array(low_c) // unit_c * scale_c, room_c // unit_c * scale_c))
    deadline = perf_counter() + seconds
    while True:
        options = {"mip_rel_gap": gap / (span + paid), "time_limit": max(deadline - perf_counter(), 0.0)}
        found = optimize.milp(cost_v, integrality=np.ones(len(item)), bounds=(0, 1), constraints=rows, options=options)
        bound = -math.inf if found.mip_dual_bound is None else found.mip_dual_bound + paid
        if found.x is None:
            return None, bound
        chosen = np.nonzero(found.x > 0.5)[0]
        if len(chosen) == len(table.rows) and table.fits(column[chosen]):
            return column[chosen], bound
        rows.append(optimize.LinearConstraint(np.isin(variables, chosen).astype(float), -np.inf, len(chosen) - 1))


def _search(table: _Table, choice: Ints, price_c: Floats, options: int, seconds: float, gap: float) -> tuple[Ints, float]:
    """The best choice among that many options of least reduced cost, and a bound of all choices."""
    reduced_ij, below = table.reduced(price_c)
    damage, span = table.damage(choice), table.damage(choice) - below
    reach = min(span, float(np.sort(np.append(reduced_ij, math.inf))[options]))
    cost_ij, grain = np.where(reduced_ij <= reach, reduced_ij, np.inf), _GRAIN * damage
    cost_ij[table.rows, choice] = reduced_ij[table.rows, choice]
    found, bound = _integer(table, cost_ij / grain, price_c / grain, span / grain, seconds, gap / _GRAIN)
    better = found is not None and table.damage(found) < damage
    return found if better else choice, min(below + bound * grain - 10 * _ROUNDING * damage, below + reach)


def _settled(table: _Table, problem: Problem) -> Ints:
    """A choice that keeps all limits; raises Infeasible if there is none."""
    every = range(len(problem.limits))
    given = [(c, [k for k in every if k != c]) for c in every]
    for c, others in [*given, *((c, []) for c in every), *((c, [*range(c)]) for c in every)]:
        if (choice := _least(table, c, others)) is not None and table.slack(choice)[c] < 0:
            raise Infeasible(c, table.used(choice)[c], problem.limits[c])
        if choice is not None and table.fits(choice):
            return choice
    raise AssertionError("the last test is the whole problem")


def _least(table: _Table, c: int, others: list[int]) -> Ints | None:
    """The choice of least use of limit c of those that keep the others; None if there is none."""
    given = replace(table, U_cij=table.U_cij[others], room_c=table.room_c[others], base_c=table.base_c[others])
    use_ij = np.where(np.isfinite(table.D_ij), table.U_cij[c], np.inf)
    least: Ints | None = use_ij.argmin(1) if (given.room_c >= 0).all() else None
    if least is not None and not given.fits(least):
        unit = max(float(table.U_cij[c].max()) / _LARGEST, 1.0)
        least, _ = _integer(given, use_ij / unit, np.zeros(len(others)), math.inf, math.inf, 0.0)
    return least


def solve(problem: Problem, *, time_limit: float = 60.0, gap: float = 1e-6) -> Solution:
    """The choice of least damage that keeps all limits, proven to a relative `gap` if the seconds are enough; or Infeasible."""
    deadline = perf_counter() + time_limit
    table = _table(problem)
    price_c = _prices(table)
    choice = _improve(table, _fill(table, _start(table, price_c, problem)), price_c, deadline)
    bound = max(table.reduced(price_c)[1], table.damage(table.D_ij.argmin(1)))
    for options in (min(2 * len(table.rows), table.D_ij.size), table.D_ij.size):
        if table.damage(choice) - bound > gap * table.damage(choice) and perf_counter() < deadline:
            choice, found = _search(table, choice, price_c, options, deadline - perf_counter(), gap)
            bound = max(bound, found)
    choice = _improve(table, choice, price_c, deadline)
    damage, bound = table.damage(choice), min(bound, table.damage(choice))
    left = (damage - bound) / max(damage, float(np.finfo(float).tiny))
    method = "exact" if left <= max(gap, 100 * _ROUNDING) else "lagrangian: time limit"
    return Solution(table.options(choice), damage, bound, left, table.used(choice), tuple(price_c.tolist()), method)


def frontier(problem: Problem, budgets: Sequence[int], limit: int = 0) -> list[Point]:
    """The Lagrangian choice, filled up, at each budget of one limit; damage falls as it rises; no point where it cannot be met.

    Where that choice breaks another limit the last one that did not is filled up; the bound takes no notice, and is wide there.
    """
    table, points, others = _table(problem), dict[int, Point](), [c for c in range(len(problem.limits)) if c != limit]
    hulls, best, room_c = _hulls(table, limit), _least(table, limit, others), table.room_c.copy()
    for budget in sorted(set(budgets)):
        room_c[limit] = budget - int(table.base_c[limit])
        at = replace(table, room_c=room_c)
        if best is None or not at.fits(best):
            continue
        choice, slope = _along(hulls, int(room_c[limit]))
        best = min((_fill(at, c) for c in (choice, best) if at.fits(c)), key=table.damage)
        bound, damage = at.reduced(np.where(np.arange(len(room_c)) == limit, slope, 0.0))[1], table.damage(best)
        points[budget] = Point(budget, table.used(best)[limit], damage, min(max(bound, 0.0), damage), table.options(best))
    return [points[budget] for budget in budgets if budget in points]


def neighbours(problem: Problem, solution: Solution, count: int) -> list[Choice]:
    """Up to `count` other choices that keep all limits, least damage first, with the options of one item or two changed.

    Never to a dominated option; pairs are made of the 1200 changes that cost least at the solution's prices.
    """
    table, price_c = _table(problem), np.array(solution.price)
    choice = (np.isfinite(table.D_ij) & (table.option_ij == np.array(solution.choice)[:, None])).argmax(1)
    D_p, U_cp, items, columns = _pairs(table, choice, price_c, 2 * _PAIRED)
    best = 1 + np.lexsort((*U_cp[::-1, 1:], D_p[1:]))[:count]
    changed = np.repeat(choice[None], len(best), 0)
    np.put_along_axis(changed, items.T[best], columns.T[best], 1)
    return [table.options(c) for c in changed]
