"""Spending a budget exactly: one option for each item, the least damage in sum, no limit broken. Pure mathematics on arrays.

Letters in names: I items, J options, C limits; D_ij is the damage of option j of item i, U_cij its use of limit c, an integer.

The problem. Least Σ D under Σ U_c <= limit c for all c at once is a multiple-choice knapsack: NP-hard, yet easy in practice,
because with prices λ_c >= 0 on the limits the items part,

    L(λ) = Σ_i min_j (D_ij + Σ_c λ_c U_cij) - Σ_c λ_c limit_c   <=   the optimum,

and any choice costs L(λ) + Σ r_ij + Σ λ_c s_c, with r_ij >= 0 the reduced costs and s_c its slacks. So a choice that beats an
incumbent has no r above Δ = incumbent - L(λ), and no s_c above Δ / λ_c. That leaves a few hundred of a hundred thousand options.

`solve`. The best prices come from convex hulls (allocate_menu_core.py). The choice at these prices, filled up and improved by
changes of one item or two, is the incumbent. HiGHS does the rest (allocate_search_core.py): first on the few options of least
r, for a better incumbent, then on all that this one leaves. `bound` lies below every choice, also where time ran out; equal
input gives an equal answer unless it did. Among choices of equal damage (to 12 digits) it is one whose use no change of one
item or two lowers, limits compared in order.

Alternatives not taken. Gurobi: a licence for what takes seconds without. Dynamic programming over bytes: one limit only.
Annealing, evolution: no bound, another answer each time. Greedy by damage per byte: a part in a thousand off, or more; here
only the start. HiGHS on everything: scipy gives it no warm start, and its time goes to options that cannot matter.

Limits. Damages are taken to add up. Whether several limits can be met at all is settled whatever time it takes. Bounds are
floats with a margin for rounding: a gap below 1e-10 means nothing. There is at least one item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from compress.passes.allocate_menu_core import ROUNDING, Choice, Infeasible, Item, Limit, Problem, along, hulls, menu_of, prices
from compress.passes.allocate_search_core import PAIRED, fill, improve, least, pairs, search, start

__all__ = ["Choice", "Infeasible", "Item", "Limit", "Point", "Problem", "Solution", "frontier", "neighbours", "solve"]


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


def solve(problem: Problem, *, time_limit: float = 60.0, gap: float = 1e-6) -> Solution:
    """The choice of least damage that keeps all limits, proven to a relative `gap` if the seconds are enough; or Infeasible."""
    deadline = perf_counter() + time_limit
    menu = menu_of(problem)
    price_c = prices(menu)
    choice = improve(menu, fill(menu, start(menu, price_c, problem)), price_c, deadline)
    bound = max(menu.reduced(price_c)[1], menu.damage(menu.D_ij.argmin(1)))
    for options in (min(2 * len(menu.rows), menu.D_ij.size), menu.D_ij.size):
        if menu.damage(choice) - bound > gap * menu.damage(choice) and perf_counter() < deadline:
            choice, found = search(menu, choice, price_c, options, deadline - perf_counter(), gap)
            bound = max(bound, found)
    choice = improve(menu, choice, price_c, deadline)
    damage, bound = menu.damage(choice), min(bound, menu.damage(choice))
    left = (damage - bound) / max(damage, float(np.finfo(float).tiny))
    method = "exact" if left <= max(gap, 100 * ROUNDING) else "lagrangian: time limit"
    return Solution(menu.options(choice), damage, bound, left, menu.used(choice), tuple(price_c.tolist()), method)


def frontier(problem: Problem, budgets: Sequence[int], limit: int = 0) -> list[Point]:
    """The Lagrangian choice, filled up, at each budget of one limit; damage falls as it rises; no point where it cannot be met.

    Where that choice breaks another limit the last one that did not is filled up; the bound takes no notice, and is wide there.
    """
    menu, points, others = menu_of(problem), dict[int, Point](), [c for c in range(len(problem.limits)) if c != limit]
    edges, best, room_c = hulls(menu, limit), least(menu, limit, others), menu.room_c.copy()
    for budget in sorted(set(budgets)):
        room_c[limit] = budget - int(menu.base_c[limit])
        at = replace(menu, room_c=room_c)
        if best is None or not at.fits(best):
            continue
        choice, slope = along(edges, int(room_c[limit]))
        best = min((fill(at, c) for c in (choice, best) if at.fits(c)), key=menu.damage)
        bound, damage = at.reduced(np.where(np.arange(len(room_c)) == limit, slope, 0.0))[1], menu.damage(best)
        points[budget] = Point(budget, menu.used(best)[limit], damage, min(max(bound, 0.0), damage), menu.options(best))
    return [points[budget] for budget in budgets if budget in points]


def neighbours(problem: Problem, solution: Solution, count: int) -> list[Choice]:
    """Up to `count` other choices that keep all limits, least damage first, with the options of one item or two changed.

    Never to a dominated option; pairs are made of the 1200 changes that cost least at the solution's prices.
    """
    menu, price_c = menu_of(problem), np.array(solution.price)
    choice = (np.isfinite(menu.D_ij) & (menu.option_ij == np.array(solution.choice)[:, None])).argmax(1)
    D_p, U_cp, items, columns = pairs(menu, choice, price_c, 2 * PAIRED)
    best = 1 + np.lexsort((*U_cp[::-1, 1:], D_p[1:]))[:count]
    changed = np.repeat(choice[None], len(best), 0)
    np.put_along_axis(changed, items.T[best], columns.T[best], 1)
    return [menu.options(c) for c in changed]
