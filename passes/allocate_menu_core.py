"""The problem of allocate_core.py, where its letters are explained, and what prices on the limits say of it.

Options that another of their item beats or equals in everything are dropped; of equals the first stays. One limit's price is
where the merged convex hulls of all items reach it; several limits' are found in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Choice = tuple[int, ...]
ROUNDING = 1e-12  # relative; two damages nearer than this are equal


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


class Infeasible(Exception):  # noqa: N818
    """No choice keeps all limits; `least` is the smallest value of limit `limit_index` for which one would.

    It is the first for which that is so with all others as they are; else the first impossible alone, else with those before it.
    """

    def __init__(self, limit_index: int, least: int, limit: Limit):
        super().__init__(f"limit '{limit.name}' is {limit.at_most}, but no choice uses less than {least} of it")
        self.limit_index, self.least = limit_index, least


@dataclass(frozen=True, eq=False)
class Menu:
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

    def take(self, columns_ij: Ints) -> Menu:
        D_ij, U_cij = np.take_along_axis(self.D_ij, columns_ij, 1), np.take_along_axis(self.U_cij, columns_ij[None], 2)
        return replace(self, D_ij=D_ij, U_cij=U_cij, option_ij=np.take_along_axis(self.option_ij, columns_ij, 1))

    def reduced(self, price_c: Floats) -> tuple[Floats, float]:
        """Reduced costs r_ij, and a number that is below L(λ) however the floats were rounded."""
        V_ij = self.D_ij + np.tensordot(price_c, self.U_cij, 1)
        least_i, paid = V_ij.min(1), float(price_c @ self.room_c)
        least = math.fsum(least_i)
        return V_ij - least_i[:, None], least - paid - ROUNDING * (least + abs(paid))


def menu_of(problem: Problem) -> Menu:
    C, I = len(problem.limits), len(problem.items)  # noqa: E741
    J = max(len(item.damage) for item in problem.items)
    D_ij, U_cij = np.full((I, J), np.inf), np.zeros((C, I, J), np.int64)
    for i, item in enumerate(problem.items):
        n = len(item.damage)
        D_ij[i, :n], U_cij[:, i, :n], U_cij[:, i, n:] = item.damage, item.use, item.use[:, :1]
    base_ci = U_cij.min(2)
    room = [limit.at_most - int(b) for limit, b in zip(problem.limits, base_ci.sum(1), strict=True)]
    menu = Menu(D_ij, U_cij - base_ci[:, :, None], np.tile(np.arange(J), (I, 1)), np.array(room, np.int64), base_ci.sum(1))
    return undominated(menu)


def undominated(menu: Menu) -> Menu:
    """The options that none of the same item beats or equals in everything, by rising damage, at the front of fewer columns."""
    menu = menu.take(np.lexsort((*menu.U_cij[::-1], menu.D_ij), axis=-1))
    keep, U_cij = np.isfinite(menu.D_ij), menu.U_cij
    earlier = np.tri(keep.shape[1], k=-1, dtype=bool)  # row j: the columns before it
    for i in menu.rows:
        keep[i] &= ~(earlier & (U_cij[:, i, None, :] <= U_cij[:, i, :, None]).all(0)).any(1)
    menu = replace(menu, D_ij=np.where(keep, menu.D_ij, np.inf))
    return menu.take(np.argsort(~keep, axis=1, kind="stable")[:, : int(keep.sum(1).max(initial=1))])


Hulls = tuple[Ints, Ints, Ints, Floats, Ints]


def along(hulls: Hulls, room: int) -> tuple[Ints, float]:
    """The choice that as many segments as fit lead to, and the slope of the next one."""
    start, item_s, column_s, slope_s, use_s = hulls
    k, choice = int(np.searchsorted(use_s, room, side="right")), start.copy()
    choice[item_s[:k]] = column_s[:k]  # of one item's the last is kept
    return choice, float(slope_s[k]) if k < len(slope_s) else 0.0


def hulls(menu: Menu, c: int) -> Hulls:
    """The convex hulls of damage over one use: each item's start, and all segments, the steepest first: item, column that it
    leads to, damage saved for a unit more, use of the choice after it. All items step at once, of equal slopes to the farthest.
    """
    start = here = np.where(menu.U_cij[c] == 0, menu.D_ij, np.inf).argmin(1)
    i, last, steps = menu.rows, np.full(len(start), np.inf), list[tuple[Ints, Ints, Floats, Ints]]()
    while len(i):
        use = menu.U_cij[c][i] - menu.U_cij[c][i, here, None]
        saved = menu.D_ij[i, here, None] - menu.D_ij[i]
        slope = np.where((use > 0) & (saved > 0), saved / np.maximum(use, 1), 0.0)
        row, to = np.arange(len(i)), slope.argmax(1)
        last = np.minimum(last, slope[row, to])  # a hull's slopes fall; rounding must not reorder them
        steps.append((i, to, last, use[row, to]))
        i, here, last = i[last > 0], to[last > 0], last[last > 0]
    item, column, slope, use = map(np.concatenate, zip(*steps, strict=True))
    order = np.argsort(-slope, kind="stable")[: np.count_nonzero(slope > 0)]
    return start, item[order], column[order], slope[order], use[order].cumsum()


def prices(menu: Menu, sweeps: int = 8) -> Floats:
    """Coordinate ascent of L: each limit in turn gets its best price, given the others'. One limit needs no second sweep."""
    price_c = np.zeros(len(menu.room_c))
    for c in [*range(len(price_c))] * (sweeps if len(price_c) > 1 else 1):
        price_c[c] = 0.0
        priced = replace(menu, D_ij=menu.D_ij + np.tensordot(price_c, menu.U_cij, 1))
        price_c[c] = along(hulls(priced, c), int(menu.room_c[c]))[1]
    return price_c
