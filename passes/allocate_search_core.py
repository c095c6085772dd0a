"""The search of allocate_core.py: a choice that fits, better ones near it, and HiGHS for the options that are left.

The tolerances of HiGHS are not trusted: limits are checked in integers, and an answer that breaks one is forbidden by a cut that
forbids nothing else.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import scipy

from compress.passes.allocate_menu_core import ROUNDING, Floats, Infeasible, Ints, Menu, Problem

optimize: Any = scipy.optimize  # scipy has no types
sparse: Any = scipy.sparse
GRAIN = 1e-6  # of the damage, is 1 to HiGHS, whose own tolerance is 1e-6 of that
LARGEST = 2.0**20  # coefficients of HiGHS are scaled below it, by a power of two
PAIRED = 600  # moves of which all pairs are tried in a round of the local search


def start(menu: Menu, price_c: Floats, problem: Problem) -> Ints:
    """The choice at these prices, or at the first higher ones at which it fits, or any that fits; or Infeasible."""
    for times in (1.0, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 10.0):
        near = menu.reduced(times * price_c)[0] <= ROUNDING * menu.D_ij[np.isfinite(menu.D_ij)].max()
        choice: Ints = np.where(near, menu.D_ij, -1.0).argmax(1)
        if menu.fits(choice):
            return choice
    return settled(menu, problem)


def fill(menu: Menu, choice: Ints) -> Ints:
    """The change that saves most of those that fit, until none saves."""
    choice = choice.copy()
    while True:
        D_ij, U_cij = menu.changes(choice)
        D_ij[(U_cij > menu.slack(choice)[:, None, None]).any(0)] = np.inf
        i, j = np.unravel_index(int(D_ij.argmin()), D_ij.shape)
        if not D_ij[i, j] < 0:
            return choice
        choice[i] = j


def pairs(menu: Menu, choice: Ints, price_c: Floats, moves: int) -> tuple[Floats, Ints, Ints, Ints]:
    """All pairs of the `moves` changes that cost least at these prices, as far as limits allow: damage, use, items, columns.

    Move 0 changes nothing, item 0 stays as it is: pairs with it are changes of one item, and the first pair is no change.
    """
    D_ij, U_cij = menu.changes(choice)
    D_ij[menu.rows, choice] = np.inf
    i, j = np.nonzero(np.isfinite(D_ij))
    i, j = np.stack([i, j])[:, np.argsort((D_ij + np.tensordot(price_c, U_cij, 1))[i, j], kind="stable")[:moves]]
    D_m, U_cm = np.append(0.0, D_ij[i, j]), np.pad(U_cij[:, i, j], ((0, 0), (1, 0)))
    mover_m, item_m, column_m = np.append(-1, i), np.append(0, i), np.append(choice[0], j)
    fits = np.triu(mover_m[:, None] != mover_m, 1)
    fits[0, 0] = True
    for U_m, slack in zip(U_cm, menu.slack(choice), strict=True):
        fits &= U_m[:, None] <= slack - U_m
    a, b = np.nonzero(fits)
    return D_m[a] + D_m[b], U_cm[:, a] + U_cm[:, b], item_m[np.stack([a, b])], column_m[np.stack([a, b])]


def improve(menu: Menu, choice: Ints, price_c: Floats, deadline: float) -> Ints:
    """The best change of one item or two, until none lowers the damage, or at equal damage the use."""
    choice = choice.copy()
    while perf_counter() < deadline:
        D_p, U_cp, items, columns = pairs(menu, choice, price_c, PAIRED)
        near, p = ROUNDING * menu.damage(choice), int(D_p.argmin())
        if D_p[p] >= -near:
            p = int(np.lexsort((*U_cp[::-1], D_p > near))[0])
        if p == 0:
            break
        choice[items[:, p]] = columns[:, p]
    return choice


def integer(menu: Menu, cost_ij: Floats, price_c: Floats, span: float, seconds: float, gap: float) -> tuple[Any, float]:
    """The choice with the least Σ cost + price·slack, to within `gap`, or None if late or above `span`; a bound of it."""
    item, column = np.nonzero(np.isfinite(cost_ij))
    U_cv = menu.U_cij[:, item, column]
    least_ci = np.minimum.reduceat(U_cv, np.searchsorted(item, menu.rows), axis=1)
    U_cv, room_c = U_cv - least_ci[:, item], menu.room_c - least_ci.sum(1)
    cost_v, paid = cost_ij[item, column] - price_c @ U_cv, float(price_c @ room_c)
    low_c = [int(r - 1.001 * span / p) if p * r > 1.001 * span else 0 for r, p in zip(room_c, price_c, strict=True)]
    variables, unit_c = np.arange(len(item)), np.maximum(np.gcd.reduce(U_cv, axis=1), 1)
    scale_c = np.exp2(np.minimum(0, np.floor(np.log2(LARGEST / np.maximum(U_cv.max(1, initial=1) // unit_c, 1)))))
    rows = [optimize.LinearConstraint(sparse.csr_array((np.ones(len(item)), (item, variables))), 1, 1)]
    if len(room_c):
        use = sparse.csr_array(U_cv // unit_c[:, None] * scale_c[:, None])
        rows.append(optimize.LinearConstraint(use, np.array(low_c) // unit_c * scale_c, room_c // unit_c * scale_c))
    deadline = perf_counter() + seconds
    while True:
        options = {"mip_rel_gap": gap / (span + paid), "time_limit": max(deadline - perf_counter(), 0.0)}
        with silence():
            found = optimize.milp(cost_v, integrality=np.ones(len(item)), bounds=(0, 1), constraints=rows, options=options)
        bound = -math.inf if found.mip_dual_bound is None else found.mip_dual_bound + paid
        if found.x is None:
            return None, bound
        chosen = np.nonzero(found.x > 0.5)[0]
        if len(chosen) == len(menu.rows) and menu.fits(column[chosen]):
            return column[chosen], bound
        rows.append(optimize.LinearConstraint(np.isin(variables, chosen).astype(float), -np.inf, len(chosen) - 1))


def search(menu: Menu, choice: Ints, price_c: Floats, options: int, seconds: float, gap: float) -> tuple[Ints, float]:
    """The best choice among that many options of least reduced cost, and a bound of all choices."""
    reduced_ij, below = menu.reduced(price_c)
    damage, span = menu.damage(choice), menu.damage(choice) - below
    reach = min(span, float(np.sort(np.append(reduced_ij, math.inf))[options]))
    cost_ij, grain = np.where(reduced_ij <= reach, reduced_ij, np.inf), GRAIN * damage
    cost_ij[menu.rows, choice] = reduced_ij[menu.rows, choice]
    found, bound = integer(menu, cost_ij / grain, price_c / grain, span / grain, seconds, gap / GRAIN)
    better = found is not None and menu.damage(found) < damage
    return found if better else choice, min(below + bound * grain - 10 * ROUNDING * damage, below + reach)


def settled(menu: Menu, problem: Problem) -> Ints:
    """A choice that keeps all limits; raises Infeasible if there is none."""
    every = range(len(problem.limits))
    given = [(c, [k for k in every if k != c]) for c in every]
    for c, others in [*given, *((c, []) for c in every), *((c, [*range(c)]) for c in every)]:
        if (choice := least(menu, c, others)) is not None and menu.slack(choice)[c] < 0:
            raise Infeasible(c, menu.used(choice)[c], problem.limits[c])
        if choice is not None and menu.fits(choice):
            return choice
    raise AssertionError("the last test is the whole problem")


def least(menu: Menu, c: int, others: list[int]) -> Ints | None:
    """The choice of least use of limit c of those that keep the others; None if there is none."""
    given = replace(menu, U_cij=menu.U_cij[others], room_c=menu.room_c[others], base_c=menu.base_c[others])
    use_ij = np.where(np.isfinite(menu.D_ij), menu.U_cij[c], np.inf)
    least: Ints | None = use_ij.argmin(1) if (given.room_c >= 0).all() else None
    if least is not None and not given.fits(least):
        unit = max(float(menu.U_cij[c].max()) / LARGEST, 1.0)
        least, _ = integer(given, use_ij / unit, np.zeros(len(others)), math.inf, math.inf, 0.0)
    return least


@contextmanager
def silence() -> Iterator[None]:
    """Inside, what native code prints to standard output is dropped: HiGHS has a line of its own now and then."""
    sys.stdout.flush()
    before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)
