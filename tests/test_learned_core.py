"""Learned rounding as mathematics: where a matrix starts, what a step may do, how near it comes to the best of all roundings."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from compress.formats import parse
from compress.formats.grid import Grid, Quantized, restore
from compress.passes import gptq_core
from compress.passes import learned_core as core

FORMATS = ["int2:g16", "int3:g32:asym", "int4:channel", "int8:g32", "nf3:g32", "nf3:g32:dq8x16", "lut2:g32", "lut3:g48:shared"]


def solved(text: str, n: int = 8, k: int = 64, seed: int = 0) -> tuple[Quantized, torch.Tensor, gptq_core.Solved]:
    fmt, draw = parse(text), torch.Generator().manual_seed(seed)
    assert isinstance(fmt, Quantized)
    W, X = torch.randn(n, k, generator=draw), torch.randn(4 * k, k, generator=draw)
    return fmt, W, gptq_core.quantize(W, gptq_core.factor(X.T @ X / len(X)), fmt)


@pytest.mark.parametrize("text", FORMATS)
def test_it_starts_at_the_very_codes_it_was_given(text: str) -> None:
    fmt, W, start = solved(text)
    for aim in (W, 100 * W, torch.zeros_like(W)):
        latent = core.Latent(start.codes, start.grid, aim, fmt)
        assert torch.equal(latent.codes(), start.codes)
        assert torch.equal(latent.grid.scale, start.grid.scale)
        assert torch.equal(latent.rounded(), restore(start.codes, start.grid, fmt))


@pytest.mark.parametrize("text", FORMATS)
def test_whatever_the_slopes_are_codes_and_scales_are_ones_that_the_format_stores(text: str) -> None:
    fmt, W, start = solved(text)
    latent, draw = core.Latent(start.codes, start.grid, W, fmt), torch.Generator().manual_seed(1)
    for step in range(20):
        latent.step(1e6 * torch.randn(W.shape, generator=draw) ** 3, 10 * core.share(step, 20))
    packed = fmt.pack(latent.codes(), latent.grid)
    assert not torch.equal(latent.codes(), start.codes)
    assert int(latent.codes().max()) < fmt.levels
    assert torch.equal(fmt.dequantize(packed, torch.float32), latent.rounded())
    assert {s: (t.dtype, tuple(t.shape)) for s, t in packed.items()} == fmt.tensors(tuple(W.shape), start.grid.scale.dtype)
    assert torch.equal(latent.grid.scale, start.grid.scale) == (not fmt.rescalable)


def test_a_weight_goes_no_farther_than_its_reach_and_a_scale_no_farther_than_its_stretch() -> None:
    fmt, W, start = solved("int8:g32")
    latent = core.Latent(start.codes, start.grid, restore(start.codes, start.grid, fmt), fmt)
    for step in range(50):
        latent.step(torch.ones_like(W), core.share(step, 50))
    moved = (latent.codes().int() - start.codes.int()).abs()
    assert int(moved.max()) <= 128 * core.STRETCH + core.REACH + 2, "codes move with the scale, at most by so much"
    assert bool(((latent.grid.scale.float() / start.grid.scale.float() - 1).abs() < 1.1 * core.STRETCH).all())


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_the_steps_are_the_whole_way_and_become_shorter(steps: int) -> None:
    shares = [core.share(i, steps) for i in range(steps)]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert min(shares) > 0


def test_every_token_counts_by_its_own_length() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    assert float(core.relative(wanted, wanted)) == 0
    assert float(core.relative(0.9 * wanted, wanted)) == pytest.approx(0.01)
    assert float(core.relative(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))) == 0


def test_nothing_to_learn_changes_nothing() -> None:
    """Where no gradient comes, as to an expert that no token is sent to."""
    fmt, W, start = solved("int3:g32")
    latent = core.Latent(start.codes, start.grid, W, fmt)
    for step in range(5):
        latent.step(torch.zeros_like(W), core.share(step, 5))
    assert torch.equal(latent.rounded(), restore(start.codes, start.grid, fmt))


@pytest.mark.slow
def test_most_of_what_the_best_of_all_roundings_gains_is_found() -> None:
    """One output of six inputs, two bits: all 4096 roundings are tried on the grid that it starts on."""
    fmt = parse("int2:channel")
    assert isinstance(fmt, Quantized)
    left = []
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        W, X = torch.randn(1, 6, generator=draw), torch.randn(64, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
        start = gptq_core.round_to_nearest(W, None, fmt)
        every = torch.tensor(list(product(range(4), repeat=6)), dtype=torch.uint8)
        best = loss(restore(every, Grid(start.grid.scale.expand(len(every), 1)), fmt), W, X).min()
        first = loss(restore(start.codes, start.grid, fmt), W, X).min()
        latent, found = core.Latent(start.codes, start.grid, W, fmt), first
        for step in range(100):
            q = latent.rounded().requires_grad_()
            (slope,) = torch.autograd.grad(loss(q, W, X).sum(), q)
            latent.step(slope, core.share(step, 100))
            found = torch.minimum(found, loss(latent.rounded(), W, X).min())
        left.append(float((found - best) / first))
    assert sum(left) / len(left) < 0.2, left


def loss(Q_nk: torch.Tensor, W_1k: torch.Tensor, X_tk: torch.Tensor) -> torch.Tensor:
    return ((Q_nk - W_1k) @ X_tk.T).square().sum(1)
