"""Factors are the best that there are: no product of the rank has outputs nearer, no ranks of as many weights lose less."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.formats import parse
from compress.formats.grid import plain
from compress.passes import factorize_core as core
from compress.passes import gptq_core

SIDES = st.integers(1, 12)


def problem(n: int, k: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix, and the Hessian of inputs some of which are far larger than others."""
    g = torch.Generator().manual_seed(seed)
    X_tk = torch.randn(tokens, k, generator=g, dtype=torch.float64) * torch.logspace(-2, 1, k, dtype=torch.float64)
    mixed = X_tk @ torch.randn(k, k, generator=g, dtype=torch.float64)
    return torch.randn(n, k, generator=g, dtype=torch.float64), mixed.T @ mixed / tokens


def loss(D_nk: Tensor, H_kk: Tensor | None) -> float:
    return float((D_nk * (D_nk if H_kk is None else D_nk @ H_kk)).sum())


@settings(deadline=None, max_examples=25)
@given(SIDES, SIDES, st.integers(0, 1000))
def test_full_rank_gives_the_matrix_back(n: int, k: int, seed: int) -> None:
    W, H = problem(n, k, 40, seed)
    A, B = core.factors(W, H, min(n, k))
    assert float((B @ A - W).abs().max()) < 1e-9 * float(W.abs().max())


@settings(deadline=None, max_examples=25)
@given(SIDES, SIDES, st.data(), st.integers(0, 1000))
def test_no_other_product_of_the_rank_comes_nearer(n: int, k: int, data: st.DataObject, seed: int) -> None:
    """Neither random ones, each with the best second factor for its first, nor those near by."""
    rank = data.draw(st.integers(1, min(n, k)))
    W, H = problem(n, k, 40, seed)
    A, B = core.factors(W, H, rank)
    best, g = loss(W - B @ A, H), torch.Generator().manual_seed(seed)
    for _ in range(8):
        P = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=torch.float64))[0]
        assert loss(W - P @ (P.T @ W), H) >= best * (1 - 1e-9) - 1e-12
        near = [F + 1e-3 * F.abs().mean() * torch.randn(F.shape, generator=g, dtype=torch.float64) for F in (A, B)]
        assert loss(W - near[1] @ near[0], H) >= best * (1 - 1e-9) - 1e-12


@settings(deadline=None, max_examples=25)
@given(SIDES, SIDES, st.data(), st.booleans(), st.integers(0, 1000))
def test_what_is_lost_is_the_tail_of_the_spectrum(n: int, k: int, data: st.DataObject, plain: bool, seed: int) -> None:
    """Eckart-Young: the squared singular values behind the rank, of W C with H = C Cᵀ, or of W where every input counts alike."""
    rank = data.draw(st.integers(0, min(n, k)))
    W, H = problem(n, k, 40, seed)
    C = torch.eye(k, dtype=torch.float64) if plain else torch.linalg.cholesky(H)
    squares = torch.linalg.svdvals(W @ C).square()
    told = core.losses(W, None if plain else H)
    torch.testing.assert_close(told[rank], squares[rank:].sum() / squares.sum(), rtol=1e-6, atol=1e-9)
    if rank:
        A, B = core.factors(W, None if plain else H, rank)
        lost = loss(W - B @ A, None if plain else H) / float(squares.sum())
        assert lost == pytest.approx(float(squares[rank:].sum() / squares.sum()), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    """A singular Hessian, as it is and as the solver damps it: finite, and exact on what was seen."""
    W, H = problem(10, 12, max(1, tokens), 0)
    H = H if tokens else torch.zeros_like(H)
    A, B = core.factors(W, H, 4)
    assert bool(A.isfinite().all() and B.isfinite().all())
    assert loss(W - B @ A, H) <= 1e-9 * max(1.0, loss(W, H))
    damped = core.hessian(gptq_core.factor(H.float().clone(), damp=0.1))
    A, B = core.factors(W.float(), damped, 4)
    assert bool(A.isfinite().all() and B.isfinite().all())


def test_a_matrix_of_zeros_and_one_without_all_its_rank() -> None:
    _, H = problem(6, 8, 40, 0)
    for W in (torch.zeros(6, 8, dtype=torch.float64), torch.ones(6, 8, dtype=torch.float64)):
        A, B = core.factors(W, H, 3)
        torch.testing.assert_close(B @ A, W)
        assert core.losses(W, H)[1:].abs().max() < 1e-12


def test_both_factors_share_the_size() -> None:
    """Rows of A cost independently of each other, and columns of B: what quantizers that take rows one by one assume."""
    W, H = problem(9, 12, 40, 0)
    A, B = core.factors(W, H, 5)
    G, C = A @ H @ A.T, B.T @ B
    torch.testing.assert_close(G, C, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(G, torch.diag(G.diagonal()), rtol=1e-6, atol=1e-6 * float(G.max()))
    assert bool((G.diagonal().diff() <= 0).all())


def test_the_hessian_comes_back_in_the_order_of_the_inputs() -> None:
    _, H = problem(4, 9, 40, 3)
    f = gptq_core.factor(H.float().clone(), damp=0.01, order="activation")
    found = core.hessian(f)
    assert found is not None
    torch.testing.assert_close(found, H.float() + f.lam * torch.eye(9))
    assert core.hessian(None) is None
    assert core.hessian(gptq_core.factor(torch.zeros(9, 9), damp=0.01)) is None


def test_refit_makes_up_for_a_changed_first_factor() -> None:
    W, H = problem(24, 32, 200, 1)
    A, B = core.factors(W, H, 8)
    fmt = parse("int4:channel")
    rough = fmt.dequantize(fmt.pack(*plain(A.float(), fmt)), torch.float32).double()  # type: ignore[union-attr]
    again, G = core.refit(W, rough, B, H)
    torch.testing.assert_close(G, rough @ H @ rough.T)
    best = W @ H @ rough.T @ torch.linalg.inv(G)
    exact, refitted, kept = (loss(W - F @ rough, H) for F in (best, again, B))
    assert exact <= refitted <= exact * 1.01 < kept


# --- ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "shape", "multiple", "rank"), [
    (0.5, (64, 64), 64, 16), (0.5, (4096, 4096), 64, 1024), (0.5, (4096, 14336), 64, 1536), (1.0, (64, 64), 64, 32),
    (0.001, (64, 64), 64, 1), (0.75, (640, 2048), 1, 365), (0.75, (640, 2048), 64, 320), (1.0, (2048, 2048), 1, 1024),
])  # fmt: skip
def test_ranks_of_a_share(share: float, shape: tuple[int, int], multiple: int, rank: int) -> None:
    assert core.rank_of(share, shape, multiple) == rank
    assert rank * sum(shape) <= max(sum(shape), share * shape[0] * shape[1])


Curves = list[list[tuple[int, float]]]


@st.composite
def curves(draw: st.DrawFn) -> Curves:
    """Curves as matrices have them: a cost for a rank, losses that fall by less and less, and the matrix as it is behind them."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        cost = draw(st.integers(1, 9))
        gains = sorted(draw(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5)), reverse=True)
        tails = [sum(gains[i:]) for i in range(1, len(gains) + 1)]
        rest = draw(st.floats(0.0, 0.5))
        points = [(cost * (i + 1), tail + rest) for i, tail in enumerate(tails)]
        found.append([*points, (points[-1][0] + draw(st.integers(0, cost)), 0.0)])
    return found


@settings(deadline=None, max_examples=60)
@example([[(1, 1.0), (2, 0.0), (2, 0.0)], [(1, 1.5), (2, 0.5), (2, 0.0)]], 0.25)  # the matrix as it is has as many weights
@given(curves(), st.floats(0, 1))
def test_no_ranks_of_as_many_weights_lose_less(given_curves: Curves, share: float) -> None:
    """Against all choices that there are, at every number of weights that the steps in their order come to."""
    hulls = [core.hull(c) for c in given_curves]
    steps = sorted(((c[b][1] - c[a][1]) / max(1, c[b][0] - c[a][0]), i, at, c[b][0] - c[a][0])
                   for i, (c, h) in enumerate(zip(given_curves, hulls, strict=True))
                   for at, (a, b) in enumerate(itertools.pairwise(h)))  # fmt: skip
    taken = steps[: round(share * len(steps))]
    most = sum(c[0][0] for c in given_curves) + sum(cost for *_, cost in taken)
    weights, lost = total(given_curves, core.program(given_curves, most))
    every = [(sum(p[0] for p in points), sum(p[1] for p in points)) for points in itertools.product(*given_curves)]
    assert weights <= most
    assert lost <= min(loss for cost, loss in every if cost <= most) + 1e-6


@settings(deadline=None, max_examples=40)
@given(curves(), st.integers(0, 60))
def test_what_is_allowed_is_kept_and_more_of_it_loses_no_more(given_curves: Curves, more: int) -> None:
    least = sum(c[0][0] for c in given_curves)
    weights, lost = total(given_curves, core.program(given_curves, least + more))
    first = total(given_curves, core.program(given_curves, least))
    assert weights <= least + more
    assert lost <= first[1]
    assert total(given_curves, core.program(given_curves, 10**6))[1] == 0.0, "all as they are, where that is allowed"


def total(given_curves: Curves, chosen: list[int]) -> tuple[int, float]:
    points = [c[i] for c, i in zip(given_curves, chosen, strict=True)]
    return sum(p[0] for p in points), sum(p[1] for p in points)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 20))
def test_where_ranks_cost_alike_the_greedy_choice_is_the_best(gains: list[list[float]], more: int) -> None:
    found = []
    for each in gains:
        falling = sorted(each, reverse=True)
        found.append([(i, sum(falling[i:])) for i in range(len(falling) + 1)])
    chosen = core.program(found, more)
    _, lost = total(found, chosen)
    every = ((sum(p[0] for p in points), sum(p[1] for p in points)) for points in itertools.product(*found))
    assert lost == pytest.approx(min(loss for cost, loss in every if cost <= more), abs=1e-9)
