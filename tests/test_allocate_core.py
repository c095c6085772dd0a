from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.passes import allocate_search_core
from compress.passes.allocate_core import Choice, Infeasible, Item, Limit, Problem, frontier, neighbours, solve
from compress.passes.allocate_menu_core import hulls, menu_of

quick = settings(deadline=None, max_examples=25)
DAMAGES = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]), st.floats(1e-6, 10))


@st.composite
def problems(draw: st.DrawFn, limits: int | None = None, scale: int = 1) -> Problem:
    """Up to 5 items of up to 4 options (one is a pin), 1 to 3 limits between what is impossible and what is no limit."""
    C = limits or draw(st.integers(1, 3))
    items = []
    for i in range(draw(st.integers(1, 5))):
        J = draw(st.integers(1, 4))
        within = [1] + [draw(st.integers(0, 1)) for _ in range(C - 1)]
        use = [[scale * w * draw(st.integers(0, 12)) for _ in range(J)] for w in within]
        items.append(Item(str(i), [draw(DAMAGES) for _ in range(J)], use))
    most = [sum(int(item.use[c].max()) for item in items) for c in range(C)]
    return Problem(items, [Limit(f"limit {c}", draw(st.integers(m // 4, m))) for c, m in enumerate(most)])


def use(problem: Problem, choice: Choice) -> list[int]:
    every = range(len(problem.limits))
    return [sum(int(i.use[c][j]) for i, j in zip(problem.items, choice, strict=True)) for c in every]


def damage(problem: Problem, choice: Choice) -> float:
    return math.fsum(i.damage[j] for i, j in zip(problem.items, choice, strict=True))


def fits(problem: Problem, choice: Choice, but: int | None = None) -> bool:
    pairs = zip(use(problem, choice), problem.limits, strict=True)
    return all(u <= limit.at_most for c, (u, limit) in enumerate(pairs) if c != but)


def choices(problem: Problem) -> list[Choice]:
    return list(itertools.product(*(range(np.size(i.damage)) for i in problem.items)))


def optimum(problem: Problem) -> float:
    return min((damage(problem, c) for c in choices(problem) if fits(problem, c)), default=math.inf)


def at(problem: Problem, budget: int) -> Problem:
    return replace(problem, limits=[Limit("budget", budget), *problem.limits[1:]])


def large(seed: int = 0, items: int = 60, limits: int = 1) -> Problem:
    """Bytes of 1e9 to 1e11 without a common unit, damages from 1e-6 on."""
    draw = np.random.default_rng(seed)
    bits = np.sort(draw.uniform(2, 9, 12))
    size = draw.integers(10**9, 10**10, items)
    made = []
    for i in range(items):
        U_j = np.rint(size[i] * bits).astype(np.int64) + draw.integers(0, 1000, 12)
        within = np.array([[1], [i % 3 == 0], [i < 10]])[:limits]
        made.append(Item(str(i), 1e-4 * draw.lognormal(0, 1.5) * 4.0**-bits * draw.lognormal(0, 0.1, 12), within * U_j))
    room = [4 * int(size.sum()), 3 * int(size[::3].sum()), 5 * int(size[:10].sum())]
    return Problem(made, [Limit(str(c), room[c]) for c in range(limits)])


@given(problems())
@quick
def test_it_finds_what_brute_force_finds(problem: Problem) -> None:
    best = optimum(problem)
    if best == math.inf:
        with pytest.raises(Infeasible):
            solve(problem, gap=0.0)
        return
    found = solve(problem, gap=0.0)
    assert fits(problem, found.choice)
    assert found.damage == damage(problem, found.choice) == pytest.approx(best, rel=1e-9, abs=0)
    assert found.used == tuple(use(problem, found.choice))
    assert found.bound <= best
    assert found.method == "exact"
    assert found.gap <= 1e-10
    assert all(price >= 0 for price in found.price)
    assert solve(problem, gap=0.0) == found


@given(problems(), st.sampled_from([0.0, 1e-9]), st.sampled_from([0.0, 1e-3, 0.2]))
@quick
def test_bounds_and_limits_hold_when_there_is_no_time_or_a_wide_gap(problem: Problem, seconds: float, gap: float) -> None:
    best = optimum(problem)
    if best == math.inf:
        return
    for found in (solve(problem, time_limit=seconds, gap=gap), solve(problem, gap=gap)):
        assert fits(problem, found.choice)
        assert found.bound <= best <= found.damage * (1 + 1e-12)
        assert found.damage * (1 - found.gap) == pytest.approx(found.bound, rel=1e-9, abs=1e-300)
        assert (found.method == "exact") == (found.gap <= max(gap, 1e-10))


@given(problems())
@quick
def test_the_infeasible_is_named_with_the_least_that_would_do(problem: Problem) -> None:
    every = range(len(problem.limits))
    if optimum(problem) < math.inf:
        return
    with pytest.raises(Infeasible) as caught:
        solve(problem)
    for c in every:  # the first that, changed alone, would do
        least = min((use(problem, x)[c] for x in choices(problem) if fits(problem, x, but=c)), default=None)
        if least is not None:
            assert (caught.value.limit_index, caught.value.least) == (c, least)
            assert str(least) in str(caught.value)
            return
    c, least = caught.value.limit_index, min(use(problem, x)[caught.value.limit_index] for x in choices(problem))
    alone = [k for k in every if min(use(problem, x)[k] for x in choices(problem)) > problem.limits[k].at_most]
    assert not alone or (c, caught.value.least) == (alone[0], least)


def test_where_no_single_limit_helps_the_first_that_is_impossible_after_those_before_it_is_named() -> None:
    either = Item("a", [0.0, 0.0], [[0, 4], [4, 0], [0, 0], [0, 0]])
    other = Item("b", [0.0, 0.0], [[0, 0], [0, 0], [0, 7], [7, 0]])
    with pytest.raises(Infeasible, match="limit '1' is 3, but no choice uses less than 4") as caught:
        solve(Problem([either, other], [Limit(str(c), 3) for c in range(4)]))
    assert (caught.value.limit_index, caught.value.least) == (1, 4)


@given(problems(limits=1) | problems())
@quick
def test_the_frontier_falls_and_keeps_its_bounds(problem: Problem) -> None:
    budgets = list(range(0, 60, 3))
    points = frontier(problem, budgets)
    best = {b: optimum(at(problem, b)) for b in budgets}
    assert [p.budget for p in points] == [b for b in budgets if best[b] < math.inf]
    for point in points:
        assert fits(at(problem, point.budget), point.choice)
        assert point.used == use(problem, point.choice)[0]
        assert point.bound <= best[point.budget] <= point.damage * (1 + 1e-12)
        assert point.damage == damage(problem, point.choice)
    assert all(a.damage >= b.damage for a, b in itertools.pairwise(points))


@given(problems(limits=1))
@quick
def test_the_frontier_is_exact_on_the_hull(problem: Problem) -> None:
    menu = menu_of(problem)
    corners = [int(menu.base_c[0]), *(int(menu.base_c[0] + u) for u in hulls(menu, 0)[4])]
    for point in frontier(problem, corners):
        assert point.damage == pytest.approx(optimum(at(problem, point.budget)), rel=1e-9, abs=1e-15)
        assert point.bound == pytest.approx(point.damage, rel=1e-9, abs=1e-11)


def undominated(item: Item) -> list[int]:
    rows = [(item.damage[j], *(int(u[j]) for u in item.use)) for j in range(np.size(item.damage))]

    def beaten(j: int, k: int) -> bool:
        return all(a <= b for a, b in zip(rows[k], rows[j], strict=True)) and (rows[k] != rows[j] or k < j)

    return [j for j in range(len(rows)) if not any(beaten(j, k) for k in range(len(rows)) if k != j)]


@given(problems())
@quick
def test_neighbours_are_the_best_changes_of_one_item_or_two(problem: Problem) -> None:
    if optimum(problem) == math.inf:
        return
    found = solve(problem, gap=0.0)
    options = [undominated(item) for item in problem.items]
    near = [c for c in itertools.product(*options) if 1 <= sum(a != b for a, b in zip(c, found.choice, strict=True)) <= 2]
    expected = sorted(damage(problem, c) for c in near if fits(problem, c))
    others = neighbours(problem, found, 6)
    assert len(set(others)) == len(others)
    assert set(others) <= set(near)
    assert all(fits(problem, c) for c in others)
    assert [damage(problem, c) for c in others] == pytest.approx(expected[:6], rel=1e-9, abs=1e-12)
    assert others == neighbours(problem, found, 6)


@pytest.mark.parametrize("limits", [1, 2, 3])
def test_large_numbers(limits: int) -> None:
    problem = large(limits=limits)
    found = solve(problem, time_limit=30, gap=1e-4)
    assert fits(problem, found.choice)
    assert found.used == tuple(use(problem, found.choice))
    assert found.damage == damage(problem, found.choice)
    assert found.method == "exact"
    assert found.gap <= 1e-4
    assert found.price[0] > 0
    hurried = solve(problem, time_limit=0.0, gap=1e-9)
    assert fits(problem, hurried.choice)
    assert hurried.bound <= found.damage
    assert hurried.method == "lagrangian: time limit"
    assert len(set(neighbours(problem, found, 50))) == 50


@given(problems(scale=8_000_000_011))
@settings(deadline=None, max_examples=20)
def test_it_finds_the_optimum_whatever_the_unit(problem: Problem) -> None:
    best = optimum(problem)
    if best < math.inf:
        assert solve(problem, gap=0.0).damage == pytest.approx(best, rel=1e-9, abs=0)


def test_an_answer_that_breaks_a_limit_by_rounding_is_forbidden_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, real, seen = large(items=8), allocate_search_core.optimize.milp, list[int]()

    def careless(cost: object, **options: object) -> object:
        found = real(cost, **options)
        seen.append(len(options["constraints"]))
        if len(seen) == 1:  # each item's dearest option: far over the limit
            first = options["constraints"][0].A.toarray()
            found.x = np.zeros(first.shape[1])
            found.x[first.shape[1] - 1 - first[:, ::-1].argmax(1)] = 1
            found.x[first.argmax(1)] *= 0
            found.x[first.argmax(1)] = 1
        return found

    honest = solve(problem, gap=0.0)
    monkeypatch.setattr(allocate_search_core.optimize, "milp", careless)
    assert solve(problem, gap=0.0).choice == honest.choice
    assert seen[1] == seen[0] + 1


def test_of_equals_the_one_of_less_use_and_the_first() -> None:
    item = Item("a", [1.0, 1.0, 1.0, 0.5], [[5, 3, 3, 9]])
    assert solve(Problem([item], [Limit("bytes", 8)])).choice == (1,)


def test_without_options_to_spare_nothing_is_searched() -> None:
    pins = [Item("a", [2.0], [[3]]), Item("b", [0.0], [[4]])]
    found = solve(Problem(pins, [Limit("bytes", 7)]))
    assert (found.choice, found.damage, found.bound, found.gap, found.price) == ((0, 0), 2.0, 2.0, 0.0, (0.0,))


@pytest.mark.parametrize(
    ("damages", "uses"), [([1.0, float("nan")], [[1, 2]]), ([-1.0], [[1]]), ([1.0], [[1, 2]]), ([1.0], [[0.5]]), ([], [[]])]
)
def test_items_that_make_no_sense_are_refused(damages: list[float], uses: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="odd:"):
        Item("odd", damages, uses)
