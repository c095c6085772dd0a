from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.passes import gptq_core, obs_core
from compress.passes.obs_core import Problem

F64 = torch.float64
NONE = torch.arange(0)
seeds = st.integers(0, 10**6)


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(k: int, tokens: int = 0, seed: int = 0) -> Tensor:
    """Correlated inputs of different size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=F64) / k**0.5 + torch.eye(k, dtype=F64)
    return torch.randn(tokens or 8 * k, k, generator=g, dtype=F64) @ mix * torch.exp(torch.randn(k, generator=g, dtype=F64) / 2)


def problem(n: int, units: int, w: int = 1, *, tokens: int = 0, seed: int = 0, damp: float = 0.01, dead: int = 0) -> Problem:
    """A problem whose units have scattered columns, `dead` of which no input ever reaches."""
    k, g = units * w, torch.Generator().manual_seed(seed + 1)
    X = inputs(k, tokens, seed)
    X[:, torch.randperm(k, generator=g)[:dead]] = 0
    columns = torch.randperm(k, generator=g).view(units, w)
    return obs_core.prepare(torch.randn(n, k, generator=g, dtype=F64), X.T @ X / len(X), columns, damp=damp)


def damped(p: Problem) -> Tensor:
    return p.H_kk.double() + p.lam * torch.diag(p.seen_k.double())


def best(p: Problem, kept: Tensor) -> tuple[Tensor, float]:
    """The best weights of some units, and their loss, by least squares anew: of |(W - W')R|² with H + λI = R Rᵀ.

    Weights of inputs that were never seen come as zeros.
    """
    columns, W = p.columns_uw[kept].flatten(), p.W_nk * p.seen_k
    R = torch.linalg.cholesky(damped(p) + torch.diag((~p.seen_k).double()))
    found = torch.linalg.lstsq(R[columns].T, (W @ R).T).solution.T
    return found, float((W @ R - found @ R[columns]).square().sum())


def naive(p: Problem, stop: int | None = None) -> tuple[list[int], list[float]]:
    """Greedy elimination by its definition: every candidate's loss is that of a least-squares problem solved for it alone."""
    order, increase, total, free = list[int](), list[float](), 0.0, p.free().tolist()
    while len(order) < (len(p.columns_uw) if stop is None else stop):
        left = p.kept(torch.tensor(order, dtype=torch.long)).tolist()
        scores = [-1.0 if free[u] else best(p, p.kept(torch.tensor([*order, u])))[1] - total for u in left]
        u = scores.index(min(scores))
        order.append(left[u])
        increase.append(max(scores[u], 0.0))
        total += increase[-1]
    return order, increase


def close(a: Tensor | float, b: Tensor | float | list[float], scale: float = 1.0) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=1e-8, atol=1e-8 * max(1.0, scale)
    )


def energy(p: Problem) -> float:
    return float((p.W_nk @ damped(p) * p.W_nk).sum())


@given(st.integers(1, 6), st.integers(2, 8), st.integers(1, 3), seeds)
@settings(deadline=None, max_examples=15)
def test_one_removal_is_what_least_squares_says(n: int, units: int, w: int, seed: int) -> None:
    p = problem(n, units, w, seed=seed)
    score = obs_core.obs(p)
    for u in range(units):
        kept = p.kept(torch.tensor([u]))
        weights, loss = best(p, kept)
        close(score[u], loss, energy(p))
        close(obs_core.compensate(p, kept), weights, float(p.W_nk.abs().max()))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5), st.integers(1, 5), seeds)
@settings(deadline=None, max_examples=20)
def test_a_sweep_is_the_greedy_choice(n: int, units: int, w: int, dead: int, batch: int, seed: int) -> None:
    """Whatever the batch, also where units or parts of them are dead: the order and the losses of the definition."""
    p = problem(n, units, w, seed=seed, dead=dead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs_core, "_BATCH", batch)
        found = obs_core.sweep(p)
    order, increase = naive(p)
    assert found.order_u.tolist() == order
    close(found.increase_u, increase, energy(p))


@pytest.mark.slow
@pytest.mark.parametrize(("units", "w"), [(2 * obs_core._BATCH + 5, 1), (7, obs_core._BATCH + 3), (obs_core._STRIP + 9, 2)])
def test_a_sweep_over_several_batches_and_strips(units: int, w: int) -> None:
    """Matrices are updated and closed up on the way; the losses are still those of the sets, and each choice the least."""
    p = problem(5, units, w, seed=3)
    found = obs_core.sweep(p)
    assert sorted(found.order_u.tolist()) == list(range(units))
    for r in range(1, units, max(1, units // 6)):
        close(found.loss_r[r], best(p, p.kept(found.order_u[:r]))[1], energy(p))
        left = p.kept(found.order_u[:r])
        close(found.increase_u[r], float(scores(p, left).min()), energy(p))


def scores(p: Problem, left: Tensor) -> Tensor:
    """What each of these units would add to the loss now, from an inverse taken anew."""
    columns = p.columns_uw[left].flatten()
    M = torch.linalg.inv(damped(p)[columns][:, columns])
    W = p.W_nk @ damped(p)[:, columns] @ M
    blocks = range(0, len(columns), p.columns_uw.shape[1])
    at = [slice(a, a + p.columns_uw.shape[1]) for a in blocks]
    return torch.stack([(W[:, i] @ torch.linalg.inv(M[i, i]) * W[:, i]).sum() for i in at])


@given(st.integers(1, 5), st.integers(2, 40), st.integers(0, 3), seeds)
@settings(deadline=None, max_examples=15)
def test_single_columns_and_units_of_several_are_one_algorithm(n: int, units: int, dead: int, seed: int) -> None:
    """A column that never sees anything, joined to each unit, takes it from the scalar path to that of blocks."""
    p = problem(n, units, seed=seed, dead=dead)
    W = torch.cat((p.W_nk, torch.ones_like(p.W_nk)), 1)
    H = torch.block_diag(p.H_kk, torch.zeros_like(p.H_kk))
    wide = obs_core.prepare(W, H, torch.cat((p.columns_uw, torch.arange(units)[:, None] + units), 1))
    one, two = obs_core.sweep(p), obs_core.sweep(wide)
    assert torch.equal(one.order_u, two.order_u)
    close(one.increase_u, two.increase_u, energy(p))
    close(obs_core.obs(p), obs_core.obs(wide), energy(p))


@pytest.mark.parametrize("w", [1, 3])
def test_levels_of_one_sweep_are_those_of_separate_ones(w: int) -> None:
    p = problem(4, 150 // w, w, seed=7, dead=2)
    whole = obs_core.sweep(p)
    for stop in (0, 1, 2, 3, 31, 32, 33, 50):
        part = obs_core.sweep(p, stop)
        assert torch.equal(part.order_u, whole.order_u[:stop])
        close(part.loss_r, whole.loss_r[: stop + 1])


@given(st.integers(1, 5), st.integers(2, 12), st.integers(1, 3), st.integers(0, 4), seeds)
@settings(deadline=None, max_examples=15)
def test_the_loss_of_a_level_is_that_of_its_compensated_weights(n: int, units: int, w: int, dead: int, seed: int) -> None:
    p = problem(n, units, w, seed=seed, dead=dead)
    found = obs_core.sweep(p)
    for r in range(units + 1):
        kept = p.kept(found.order_u[:r])
        D = p.W_nk.clone()
        D[:, p.columns_uw[kept].flatten()] -= obs_core.compensate(p, kept)
        close(found.loss_r[r], float((D @ damped(p) * D).sum()), energy(p))
        close(obs_core.loss(p, kept, obs_core.compensate(p, kept)), float((D @ p.H_kk * D).sum()), energy(p))


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 2), st.integers(0, 4), seeds)
@settings(deadline=None, max_examples=15)
def test_any_order_can_be_followed(n: int, units: int, w: int, dead: int, seed: int) -> None:
    p = problem(n, units, w, seed=seed, dead=dead)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))[: max(1, units - 1)]
    found = obs_core.along(p, order)
    assert torch.equal(found.order_u, order)
    for r in range(len(order) + 1):
        close(found.loss_r[r], best(p, p.kept(order[:r]))[1], energy(p))
    own = obs_core.sweep(p)
    assert torch.equal(obs_core.along(p, own.order_u).increase_u, own.increase_u)


@pytest.mark.slow
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 2), seeds)
@settings(deadline=None, max_examples=20)
def test_greedy_is_the_best_set_where_units_are_uncorrelated(n: int, units: int, w: int, seed: int) -> None:
    p = problem(n, units, w, seed=seed)
    unit_k = torch.empty(units * w, dtype=torch.long)
    unit_k[p.columns_uw.flatten()] = torch.arange(units).repeat_interleave(w)
    p = replace(p, H_kk=p.H_kk * (unit_k[:, None] == unit_k))
    found = obs_core.sweep(p)
    for r in range(units):
        sets = itertools.combinations(range(units), r)
        close(found.loss_r[r], min(best(p, p.kept(torch.tensor(s, dtype=torch.long)))[1] for s in sets), energy(p))


@given(st.integers(1, 5), st.integers(2, 12), st.integers(1, 3), st.integers(1, 60), st.integers(0, 4), st.data())
@settings(deadline=None, max_examples=25)
def test_compensation_is_never_worse_than_deletion(
    n: int, units: int, w: int, tokens: int, dead: int, data: st.DataObject
) -> None:
    """For any kept set, with fewer tokens than inputs too, at the outputs and under the damped Hessian alike."""
    p = problem(n, units, w, tokens=tokens, seed=data.draw(seeds), dead=dead, damp=data.draw(st.sampled_from([1e-4, 0.01, 1.0])))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, units - 1)))), dtype=torch.long)
    weights = obs_core.compensate(p, kept)
    assert bool(weights.isfinite().all())
    deleted = obs_core.loss(p, kept)
    assert obs_core.loss(p, kept, weights) <= deleted * (1 + 1e-8) + 1e-9
    under = replace(p, H_kk=damped(p))
    assert obs_core.loss(under, kept, weights) <= obs_core.loss(under, kept) * (1 + 1e-8) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_nothing_removed_is_nothing_changed(dtype: torch.dtype) -> None:
    p = problem(6, 11, 3, seed=1, dead=2)
    p = obs_core.prepare(p.W_nk.to(dtype), p.H_kk.float(), p.columns_uw)
    kept = torch.arange(11)
    weights = obs_core.compensate(p, kept)
    assert weights.dtype == dtype
    assert torch.equal(weights, p.W_nk[:, p.columns_uw.flatten()])
    assert obs_core.loss(p, kept, weights) == obs_core.loss(p, kept) == obs_core.sweep(p).loss_r[0] == 0


def test_everything_removed_loses_the_energy() -> None:
    p = problem(6, 11, seed=1)
    assert obs_core.compensate(p, NONE).shape == (6, 0)
    close(obs_core.loss(p, NONE), float((p.W_nk @ p.H_kk * p.W_nk).sum()))
    close(obs_core.sweep(p).loss_r[-1], energy(p))


def test_the_matrix_and_its_hessian_stay_as_they_are() -> None:
    p = problem(6, 80, seed=1)
    before = p.W_nk.clone(), p.H_kk.clone()
    found = obs_core.sweep(p)
    obs_core.compensate(p, p.kept(found.order_u[:20]))
    obs_core.loss(p, p.kept(found.order_u[:20]))
    assert torch.equal(p.W_nk, before[0])
    assert torch.equal(p.H_kk, before[1])


def test_dead_units_go_first_for_nothing_and_keep_their_weights_if_kept() -> None:
    p = problem(4, 20, seed=2)
    H = p.H_kk.clone()
    dead = torch.tensor([3, 11, 12])
    columns = p.columns_uw[dead].flatten()
    H[columns], H[:, columns] = 0, 0
    p = obs_core.prepare(p.W_nk, H, p.columns_uw)
    found = obs_core.sweep(p)
    assert found.order_u[:3].tolist() == dead.tolist()
    assert found.increase_u[:3].tolist() == [0, 0, 0]
    assert found.increase_u[3] > 0
    assert obs_core.obs(p)[dead].tolist() == [0, 0, 0]
    kept = torch.tensor([3, 5, 11, 19])
    weights = obs_core.compensate(p, kept)
    assert torch.equal(weights[:, [0, 2]], p.W_nk[:, p.columns_uw[dead[:2]].flatten()])


def test_where_nothing_was_seen_everything_is_free() -> None:
    W = torch.randn(3, 6)
    p = obs_core.prepare(W, torch.zeros(6, 6))
    found = obs_core.sweep(p, 4)
    assert found.order_u.tolist() == [0, 1, 2, 3]
    assert found.loss_r.tolist() == [0] * 5
    assert obs_core.obs(p).tolist() == [0] * 6
    assert torch.equal(obs_core.compensate(p, torch.tensor([4, 5])), W[:, 4:])


@pytest.mark.parametrize("w", [1, 2])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_ties_go_by_number(w: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are the same in all respects are removed from the lowest, though rounding makes their scores differ."""
    monkeypatch.setattr(obs_core, "_BATCH", batch)
    copies, kinds = 4, 5
    X, g = inputs(kinds * w, 200), torch.Generator().manual_seed(0)
    rest = torch.randn(200, copies * kinds * w, generator=g, dtype=F64)
    Q = torch.linalg.qr(torch.cat((X, rest), 1)).Q  # orthogonal to one another, in groups of equal size and weight
    sizes = torch.linspace(1, 3, kinds, dtype=F64).repeat_interleave(w).repeat(copies)
    X = Q[:, : copies * kinds * w] * sizes
    W = torch.randn(3, kinds * w, generator=g, dtype=F64).repeat(1, copies)
    p = obs_core.prepare(W, X.T @ X, torch.arange(copies * kinds * w).view(-1, w))
    order = obs_core.sweep(p).order_u.tolist()
    for kind in range(kinds):
        places = [order.index(kind + kinds * copy) for copy in range(copies)]
        assert places == list(range(places[0], places[0] + copies))


def test_of_two_equal_inputs_one_goes_nearly_for_nothing_and_the_other_stands_in() -> None:
    X = inputs(30)
    X[:, 17] = X[:, 4]
    p = obs_core.prepare(torch.randn(5, 30, dtype=F64, generator=torch.Generator().manual_seed(0)), X.T @ X / len(X), damp=1e-6)
    found = obs_core.sweep(p, 1)
    assert found.order_u.tolist() in ([4], [17])
    kept = p.kept(found.order_u)
    weights = obs_core.compensate(p, kept)
    assert obs_core.loss(p, kept, weights) < 1e-6 * obs_core.loss(p, kept)
    other = 21 - int(found.order_u)
    torch.testing.assert_close(weights[:, kept.tolist().index(other)], p.W_nk[:, 4] + p.W_nk[:, 17], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("w", [1, 4])
def test_fewer_tokens_than_inputs(w: int) -> None:
    """The Hessian is singular: all is finite, no loss is negative, and what the tokens do not need goes for next to nothing."""
    p = problem(6, 96 // w, w, tokens=20, seed=4)
    found = obs_core.sweep(p)
    assert bool(found.increase_u.isfinite().all())
    assert float(found.increase_u.min()) >= 0
    close(found.loss_r[-1], energy(p), energy(p))
    for r in (8 // w, 48 // w, 90 // w):
        kept = p.kept(found.order_u[:r])
        assert obs_core.loss(p, kept, obs_core.compensate(p, kept)) < obs_core.loss(p, kept)
    half = p.kept(found.order_u[: 48 // w])
    assert obs_core.loss(p, half, obs_core.compensate(p, half)) < 0.01 * energy(p)


@pytest.mark.slow
def test_the_same_every_time_and_with_any_number_of_threads() -> None:
    p = problem(8, 300, seed=5)
    first = obs_core.sweep(p)
    again = obs_core.sweep(p)
    torch.set_num_threads(2)
    threaded = obs_core.sweep(p)
    assert torch.equal(first.order_u, again.order_u)
    assert torch.equal(first.increase_u, again.increase_u)
    assert torch.equal(first.order_u, threaded.order_u)
    close(first.increase_u, threaded.increase_u, energy(p))


def test_a_hessian_of_fp32_is_as_good() -> None:
    p = problem(8, 120, seed=6)
    half = obs_core.prepare(p.W_nk.float(), p.H_kk.float(), p.columns_uw)
    exact, found = obs_core.sweep(p, 60), obs_core.sweep(half, 60)
    torch.testing.assert_close(found.loss_r, exact.loss_r, rtol=1e-3, atol=1e-3)
    kept = half.kept(found.order_u)
    weights = obs_core.compensate(half, kept)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), obs_core.compensate(p, kept), rtol=1e-3, atol=1e-4)


def test_compensating_what_was_retargeted_solves_for_the_wanted_outputs() -> None:
    """Inputs with error: gptq_core moves the weights, and the rest is the same least squares as for the outputs wanted."""
    X, g = inputs(24), torch.Generator().manual_seed(0)
    drifted = X + 0.3 * torch.randn(X.shape, generator=g, dtype=F64)
    W, H = torch.randn(5, 24, generator=g, dtype=F64), drifted.T @ drifted / len(X)
    E = W @ (X - drifted).T @ drifted / len(X)
    p = obs_core.prepare(gptq_core.retarget(W, E, gptq_core.factor(H), 1.0), H)
    kept = torch.arange(0, 24, 3)
    wanted = W @ X.T @ drifted[:, kept] / len(X) + p.lam * W[:, kept]
    close(obs_core.compensate(p, kept), torch.linalg.solve(damped(p)[kept][:, kept], wanted.T).T)


def test_kept_columns_come_in_the_order_asked_for() -> None:
    p = problem(4, 6, 2, seed=8)
    a, b = obs_core.compensate(p, torch.tensor([1, 4])), obs_core.compensate(p, torch.tensor([4, 1]))
    close(a, b.view(4, 2, 2).flip(1).reshape(4, 4))


def test_baselines_by_hand() -> None:
    W = torch.tensor([[1.0, -2.0, 0.0, 4.0], [3.0, 0.0, -1.0, 2.0]])
    H = torch.diag(torch.tensor([4.0, 1.0, 9.0, 16.0]))
    H[0, 1] = H[1, 0] = 0.5
    p = obs_core.prepare(W, H, torch.tensor([[0, 1], [3, 2]]))
    close(obs_core.magnitude(p, torch.tensor([5.0, 7.0])), [14.0 + 5, 21.0 + 7])
    close(obs_core.wanda(p), [2 * 2.0 + 1 * 1.0, 3 * 4.0 + 0.5 * 3.0])
    close(obs_core.flap(p, torch.tensor([1.0, 1.0, 2.0, 5.0])), [10 * 3.0 + 4 * 0.0, 20 * 0.0 + 1 * 5.0])
    assert obs_core.ranked(torch.tensor([2.0, 1.0, 2.0, 1.0, 0.5])).tolist() == [4, 1, 3, 0, 2]


def test_scores_that_know_the_inputs_put_dead_ones_first() -> None:
    p = problem(4, 12, seed=9, dead=3)
    dead = p.free().nonzero().flatten().tolist()
    for score in (obs_core.wanda(p), obs_core.flap(p, torch.zeros(12)), obs_core.obs(p)):
        assert obs_core.ranked(score)[:3].tolist() == dead


def test_greedy_with_compensation_beats_every_baseline() -> None:
    """On inputs of low rank and noise; that greedy beats one round of its own scores too is not a theorem but a fact there."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(900, 25, generator=g, dtype=F64) @ torch.randn(25, 100, generator=g, dtype=F64) / 5
    X += 0.3 * torch.randn(X.shape, generator=g, dtype=F64)
    p = obs_core.prepare(torch.randn(20, 100, generator=g, dtype=F64), X.T @ X / len(X))
    found = obs_core.sweep(p, 50)
    others = obs_core.obs(p), obs_core.wanda(p), obs_core.flap(p, X.mean(0)), obs_core.magnitude(p, torch.zeros(100))
    for score in others:
        order = obs_core.ranked(score)[:50]
        assert found.loss_r[-1] < 0.95 * obs_core.along(p, order).loss_r[-1]
        assert found.loss_r[-1] < 0.5 * obs_core.loss(p, p.kept(order))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    W, H = torch.ones(2, 3), torch.eye(3)
    for wrong in ((W.clone().fill_(bad), H), (W, H.clone().fill_(bad))):
        with pytest.raises(CompressError, match="NaN or infinite"):
            obs_core.prepare(*wrong)


def test_a_singular_hessian_without_damping_is_refused() -> None:
    X = inputs(6)
    X[:, 5] = X[:, 0]
    p = obs_core.prepare(torch.ones(2, 6, dtype=F64), -(X.T @ X) + 2 * torch.diag((X * X).sum(0)), damp=0.0)
    with pytest.raises(CompressError, match="raise `damp`"):
        obs_core.sweep(p)
