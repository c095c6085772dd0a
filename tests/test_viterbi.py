"""The search of a trellis: rings, the same from every loop, the best through their seam, and nearly the best of all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.formats import trellis, viterbi
from compress.formats.viterbi import Trellis
from tests.conftest import rare

BITS = ((1, 1), (1, 2), (2, 2), (2, 1), (2, 3), (3, 3))


def values(size: int, seed: int = 0) -> Tensor:
    return torch.randn(1 << size, generator=torch.Generator().manual_seed(seed))


def targets(rings: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randn(rings, steps, generator=torch.Generator().manual_seed(100 + seed))


def are_rings(states: Tensor, size: int, bits: tuple[int, int]) -> bool:
    """Whether every state is the one before it, moved up by the bits of its step."""
    new = torch.tensor(bits)[torch.arange(states.shape[1]) % 2]
    return bool(((states >> new) == (states.roll(1, 1) & ((1 << (size - new)) - 1))).all())


def costs(states: Tensor, x_rt: Tensor, code: Tensor) -> Tensor:
    return (code[states.long()].double() - x_rt.double()).square().sum(1)


@settings(max_examples=16, deadline=None)
@given(st.integers(1, 3), st.integers(3, 12), st.sampled_from(BITS), st.integers(6, 7), st.integers(0, 99))
def test_every_loop_finds_the_same_path(rings: int, half: int, bits: tuple[int, int], size: int, seed: int) -> None:
    """The one that is compiled runs as Python here, and compiled where numba is installed."""
    x, code = targets(rings, 2 * half, seed), values(size, seed)
    plain = torch.from_numpy(viterbi.together(x.numpy(), code.numpy(), bits))
    assert are_rings(plain, size, bits)
    found = np.empty(x.shape, np.int32)
    viterbi.one_by_one(x.numpy(), viterbi.turned(code.numpy(), bits), size, *bits, viterbi.seen(2 * half), found)
    assert torch.equal(plain, torch.from_numpy(found))
    assert torch.equal(plain, Trellis(code, bits).search(x))


@pytest.mark.parametrize("bits", [(2, 2), (1, 2), (3, 3), (5, 5)])
def test_threads_and_parts_and_ties_change_nothing(bits: tuple[int, int]) -> None:
    code = trellis.values(12)
    x = targets(19, 256)
    x[3] = 0.0
    x[4] = x[5].round()
    found = Trellis(code, bits).search(x)
    assert are_rings(found, 12, bits)
    assert torch.equal(Trellis(code, bits, threads=3).search(x), found)
    some = torch.tensor([0, 3, 4, 18])
    assert torch.equal(torch.from_numpy(viterbi.together(x[some].numpy(), code.numpy(), bits)), found[some])


def all_rings(size: int, bits: tuple[int, int], steps: int) -> Tensor:
    """The states [rings, steps] of every ring, from bits written one after the other."""
    total = steps // 2 * sum(bits)
    widths = [bits[t % 2] for t in range(steps)]
    ends = list(itertools.accumulate(widths))
    rings = []
    for content in range(1 << total):
        row = [(content >> (total - 1 - i)) & 1 for i in range(total)]  # the first bit is the oldest
        rings.append([int("".join(str(row[(end - size + i) % total]) for i in range(size)), 2) for end in ends])
    return torch.tensor(rings)


@pytest.mark.parametrize(("size", "bits", "steps"), [(4, (1, 1), 10), (5, (2, 2), 6), (6, (1, 2), 8), (6, (3, 3), 4)])
def test_short_rings_are_the_best_through_their_seam_and_nearly_the_best_of_all(
    size: int, bits: tuple[int, int], steps: int
) -> None:
    """Against every ring there is, in fp64."""
    code, x = values(size), targets(60, steps)
    every = all_rings(size, bits, steps)
    assert are_rings(every, size, bits)
    cost = (code[every].double()[None] - x.double()[:, None]).square().sum(2)
    states = Trellis(code, bits).search(x)
    found, seam = costs(states, x, code), every[:, -1] & ((1 << (size - bits[0])) - 1)
    through = cost.masked_fill(seam[None] != (states[:, -1:] & ((1 << (size - bits[0])) - 1)), torch.inf).amin(1)
    torch.testing.assert_close(found, through, rtol=1e-5, atol=1e-9)
    assert float(found.mean()) < 1.5 * float(cost.amin(1).mean())


@pytest.mark.parametrize(("size", "bits"), [(6, (2, 2)), (6, (1, 2)), (5, (1, 1))])
def test_long_rings_cost_what_the_best_of_all_seams_does(size: int, bits: tuple[int, int]) -> None:
    """Against a search from every edge at the seam, in fp64."""
    steps, code = 64, values(size).double().numpy()
    x = targets(40, steps)
    edges = 1 << (size - bits[0])
    least = np.full(len(x), np.inf)
    for seam in range(edges):
        m = np.full((len(x), edges), np.inf)
        m[:, seam] = 0
        for at in range(steps):
            new, dropped = bits[at % 2], bits[1 - at % 2]
            every = np.repeat(m, 1 << new, axis=1) + (x.double().numpy()[:, at, None] - code) ** 2  # by states
            m = every.reshape(len(x), 1 << dropped, -1).min(1)
        least = np.minimum(least, m[:, seam])
    found = costs(Trellis(values(size), bits).search(x), x, values(size))
    assert float(least.mean()) <= float(found.mean()) < 1.01 * float(least.mean())


SLOWER = [(3, 0.149), (4, 0.0745), (6, 0.0197), (8, 0.0055), (10, 0.0015)]


@pytest.mark.parametrize(
    ("halves", "most"),
    [(2, 0.29), (5, 0.0382), *(rare(*case) for case in SLOWER)],
)
def test_a_normal_source_is_coded_as_well_as_is_said(halves: int, most: float) -> None:
    """4096 states; the scale is the one that the solver takes."""
    from compress.passes import gptq_core, trellis_core

    fmt, W = trellis.Tcq(halves), torch.randn(512, 96, generator=torch.Generator().manual_seed(2))
    found = trellis_core.solve(W, gptq_core.nothing_seen(W), fmt, torch.bfloat16)
    error = float((fmt.dequantize(found.tensors, torch.float32) - W).square().mean() / W.square().mean())
    assert error < most
    assert error == pytest.approx(trellis_core.DISTORTION[12][halves], rel=0.05)
