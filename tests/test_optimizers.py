"""What moves one tensor: each rule against its plain form, what it remembers against its formula, and selections of blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.training import eight_bits, galore, optimizers
from compress.training import options as said
from compress.training.choice import Learnt
from compress.training.eight_bits import AdamW8bit
from compress.training.galore import Galore
from compress.training.moving import Optimizer, remembered, rule_of
from compress.training.optimizers import AdamW, Factored, Rule, begun, nbytes
from compress.training.selection import Selection

M, N = 48, 80
WAYS: list[said.Way] = [kind() for kind in said.OPTIMIZERS.values()]


def slopes(count: int, shape: tuple[int, ...] = (M, N), seed: int = 0) -> list[Tensor]:
    """Gradients that have something in common, as those of a training do."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=g)
    return [0.1 * (common + 0.5 * torch.randn(shape, generator=g)) for _ in range(count)]


def moved(rule: Rule, gradients: list[Tensor], rate: float = 0.01) -> Tensor:
    p = torch.ones(gradients[0].shape)
    kept = begun(rule, p)
    for g in gradients:
        rule.move(p, g.clone(), kept, rate)
    assert {n: (tuple(t.shape), t.dtype) for n, t in kept.items()} == {
        n: (tuple(shape), dtype) for n, (shape, dtype) in rule.remembers(p.shape).items()
    }
    return p


def torchs(kind: Any, gradients: list[Tensor], rate: Any = 0.01, **options: Any) -> Tensor:
    """A parameter moved by an optimizer of torch's; `rate` may be asked for with the parameter as it is."""
    p = nn.Parameter(torch.ones(gradients[0].shape))
    optimizer = kind([p], lr=0.01, **options)
    for g in gradients:
        optimizer.param_groups[0]["lr"] = rate(p) if callable(rate) else rate
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_adamw_is_torchs() -> None:
    g = slopes(5)
    assert torch.equal(moved(AdamW(), g), torchs(torch.optim.AdamW, g, betas=(0.9, 0.95), weight_decay=0.0, fused=True))


@pytest.mark.parametrize("shape", [(M, N), (N, M), (N,)])
def test_factored_second_moments_are_those_of_adafactor(shape: tuple[int, ...]) -> None:
    """Torch's rate is a share of what a tensor's size is now; ours is what comes of that."""
    g = slopes(6, shape)
    theirs = torchs(torch.optim.Adafactor, g, 0.01, eps=(1e-30, 1e-3), weight_decay=0.0)
    p, rule = torch.ones(shape), Factored()
    kept = begun(rule, p)
    for one in g:
        rule.move(p, one.clone(), kept, 0.01 * float(p.norm()) / math.sqrt(p.numel()))
    torch.testing.assert_close(p, theirs, rtol=2e-4, atol=2e-5)


def test_the_first_moment_of_adafactor_is_the_mean_of_updates() -> None:
    (g,) = slopes(1)
    torch.testing.assert_close(moved(Factored(0.9), [g]), moved(Factored(), [g]))
    apart = 1 - moved(Factored(0.9), [g, torch.zeros_like(g) + 1e-20])
    assert torch.equal(apart.sign(), g.sign())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_bytes_of_factored_moments(m: int, n: int) -> None:
    assert nbytes(Factored().remembers((m, n))) - 4 == 4 * (m + n)
    assert nbytes(Factored(0.9).remembers((m, n))) - 4 == 4 * (m * n + m + n)


# --- a byte each -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_a_byte(signed: bool) -> None:
    found = eight_bits.levels(signed)
    assert len(found) == 256
    assert bool((found[1:] > found[:-1]).all())
    assert float(found.max()) == 1
    assert 0 in found
    assert float(found[found > 0].min()) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.booleans(), st.floats(1e-8, 1e4))
def test_numbers_in_a_byte_are_near(seed: int, signed: bool, size: float) -> None:
    x = size * torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
    x = x if signed else x.abs()
    codes, largest = torch.zeros(4, 256, dtype=torch.uint8), torch.zeros(4)
    eight_bits.encode(x, codes, largest, signed)
    again = eight_bits.decode(codes, largest, signed)
    assert float((again - x).abs().max()) <= 0.01 * float(x.abs().max())
    near = x.abs() > 0.1 * largest[:, None]
    assert float(((again - x).abs() / x.abs())[near].max()) < 0.08


def test_adamw_in_bytes_moves_as_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    g = slopes(20)
    found, exact = moved(AdamW8bit(), g) - 1, moved(AdamW(), g) - 1
    assert float((found - exact).norm() / exact.norm()) < 0.05
    monkeypatch.setattr(eight_bits, "NUMBERS", 512)  # two blocks at a time
    assert torch.equal(moved(AdamW8bit(), g) - 1, found)
    odd = slopes(2, (67, 71))  # whose last block is not whole
    assert float((moved(AdamW8bit(), odd) - moved(AdamW(), odd)).abs().max()) < 2e-3
    share = nbytes(AdamW8bit().remembers((512, 512))) / nbytes(AdamW().remembers((512, 512)))
    assert share == pytest.approx(0.254, abs=1e-3)
    assert AdamW8bit().remembers((4095,)).keys() == AdamW().remembers((4095,)).keys()


def test_adamw_in_bytes_is_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes to compare with it")
    g = slopes(10, (128, 64))
    theirs = torchs(bnb.optim.AdamW8bit, g, betas=(0.9, 0.95), weight_decay=0.0)
    ours, exact = moved(AdamW8bit(), g), moved(AdamW(), g)
    assert float((ours - exact).norm()) < 1.5 * float((theirs - exact).norm())


# --- a subspace ---------------------------------------------------------------------------------------------------------


def by_algorithm_2(gradients: list[Tensor], r: int, gap: int, rate: float = 0.01) -> Tensor:
    """GaLore as the paper has it, by a full decomposition, for m <= n."""
    (m, n), P = gradients[0].shape, torch.zeros(0)
    W = torch.ones(m, n)
    M, V = torch.zeros(r, n), torch.zeros(r, n)
    for t, G in enumerate(gradients, 1):
        if (t - 1) % gap == 0:
            found = torch.linalg.svd(G, full_matrices=False)[0][:, :r]
            P = found * (found * P).sum(0).sign() if t > 1 else found
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.95 * V + 0.05 * R**2
        W = W - rate * math.sqrt(m / r) * P @ ((M / (1 - 0.9**t)) / ((V / (1 - 0.95**t)).sqrt() + 1e-8))
    return W


@pytest.mark.parametrize("r", [2, 12])
def test_galore_is_its_algorithm(r: int) -> None:
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, M, generator=g))[0] for n in (M, N))
    common = U @ torch.diag(0.8 ** torch.arange(M)) @ V.T
    g = [common * (1 + 0.1 * t) + 1e-6 * torch.randn(M, N, generator=g) for t in range(9)]
    wide = moved(Galore(AdamW(), r, 4), g)
    torch.testing.assert_close(wide.norm(), by_algorithm_2(g, r, 4).norm(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide, by_algorithm_2(g, r, 4), rtol=2e-2, atol=2e-2)
    tall = moved(Galore(AdamW(), r, 4), [one.T.contiguous() for one in g])
    torch.testing.assert_close(tall, wide.T, rtol=1e-4, atol=1e-4)


def test_the_subspace_is_the_largest() -> None:
    """To a thousandth of what a full decomposition finds in it, for a spectrum that falls slowly."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 128, generator=g))[0] for n in (128, 300))
    G = U @ torch.diag(1.0 / torch.arange(1.0, 129)) @ V.T
    P = galore.leading(G, 32, 0)
    torch.testing.assert_close(P.T @ P, torch.eye(32), atol=1e-5, rtol=0)
    exact = torch.linalg.svdvals(G)[:32].square().sum()
    assert float((P.T @ G).square().sum() / exact) > 0.999


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(1, 70))
def test_bytes_of_a_subspace(a: int, b: int, rank: int) -> None:
    m, n, r = min(a, b), max(a, b), min(a, b, rank)
    assert nbytes(Galore(AdamW(), rank, 9).remembers((a, b))) == 4 * (2 * r * n + r * m) + 8
    assert Galore(AdamW(), None, 9).rank_of((64, 256)) == 16


def test_a_gradient_that_is_no_number_leaves_the_subspace() -> None:
    rule, p = Galore(AdamW(), 4, 1), torch.ones(M, N)
    kept = begun(rule, p)
    rule.move(p, slopes(1)[0], kept, 0.01)
    before = kept["P"].clone()
    rule.move(p, torch.full((M, N), float("nan")), kept, 0.01)
    assert torch.equal(kept["P"], before)


@pytest.mark.parametrize("way", WAYS, ids=list(said.OPTIMIZERS))
def test_a_number_moves_by_about_the_rate(way: said.Way) -> None:
    """Whatever the optimizer: so one rate means the same to all. LOMO's limit is the whole's, see `limited`."""
    what = Learnt("w", (M, N), 0, True)
    optimizer = Optimizer(way, {"w": nn.Parameter(torch.ones(M, N))}, [what], [0.01])
    for g in slopes(10):
        share = 1.0 if optimizer.clip is None else optimizer.limited(float((100 * g).norm()))
        optimizer.move("w", 100 * g, share)
    apart = float((optimizer.learns["w"].detach() - 1).norm()) / math.sqrt(M * N)
    assert 0.03 < apart < 0.13
    assert nbytes(remembered(way, what)) == sum(t.nbytes for t in optimizer.state["w"].values())


def test_what_is_projected_is_a_matrix_of_a_block() -> None:
    assert isinstance(rule_of(said.Galore(), Learnt("w", (M, N), 0, True)), Galore)
    assert isinstance(rule_of(said.Galore(), Learnt("embed:W_nk", (M, N), None)), AdamW)
    assert isinstance(rule_of(said.Galore8bit(), Learnt("norm", (M,), 0)), AdamW8bit)


@pytest.mark.parametrize("rule", [Factored(), Factored(0.9)])
def test_a_few_rows_at_a_time_come_to_the_same(monkeypatch: pytest.MonkeyPatch, rule: Rule) -> None:
    g = slopes(3)
    whole = moved(rule, g)
    monkeypatch.setattr(optimizers, "NUMBERS", 3 * N)
    torch.testing.assert_close(moved(rule, g), whole)


# --- some blocks at a time ----------------------------------------------------------------------------------------------


def chosen(selection: Selection, turns: int, norms: dict[int, float]) -> list[set[int]]:
    found = []
    for turn in range(turns):
        step = turn * selection.options.interval
        assert selection.due(step)
        assert not selection.due(step + 1)
        selection.choose(step, norms)
        found.append(selection.chosen)
    return found


def test_blocks_in_turn_and_drawn() -> None:
    one = Selection(said.Block(select="cyclic", active=2, interval=3), range(6), 0)
    assert chosen(one, 4, {}) == [{5, 4}, {3, 2}, {1, 0}, {5, 4}]
    drawn = [chosen(Selection(said.Block(select="random", active=2), range(6), seed), 40, {}) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set.union(*drawn[0]) == set(range(6))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=6))
def test_visits_are_in_proportion_to_damage(damage: list[float]) -> None:
    """By highest averages: no block is more than one visit below its share."""
    selection = Selection(said.Block(select="damage"), range(len(damage)), 0, dict(enumerate(damage)))
    chosen(selection, 60, {})
    for visits, d in zip(selection.visits.tolist(), damage, strict=True):
        assert visits > 60 * d / sum(damage) - len(damage)


def test_what_sleeps_is_forgotten() -> None:
    learns = {f"layers.{b}.w": nn.Parameter(torch.ones(M, N)) for b in range(4)}
    known = [Learnt(n, (M, N), b, True) for b, n in enumerate(learns)]
    optimizer = Optimizer(said.Block(active=1), learns, known, [0.01] * 4)
    assert not optimizer.state
    full = sum(nbytes(AdamW().remembers(p.shape)) for p in learns.values())
    for turn, norms in enumerate(({2: 9.0}, {1: 9.0, 2: 1.0})):
        optimizer.choose(turn * 20, norms)
        (name,) = optimizer.awake
        optimizer.move(name, slopes(1)[0], 1.0)
        assert [n for n, p in learns.items() if p.requires_grad] == [name]
        assert 4 * sum(t.nbytes for kept in optimizer.state.values() for t in kept.values()) == full
    assert name == "layers.1.w"
