"""Which windows of a pool cover what a model does with it: one streamed sweep, and a clustering of what is seen.

Of every window the mean and the root of the mean square of the residual are taken at three depths, and projected to `NUMBERS`
numbers each by a random matrix. These are made uncorrelated over the pool, as many of them as the pool can tell apart, and
clustered (k-means); of each cluster the window nearest to its centre is chosen. So windows of a kind that is rare in the pool
are chosen too, and of many that are alike only a few.

The pool goes through the model in rounds of as many windows as are chosen, so it takes no more memory than they will.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.model.data import Tokens
from compress.model.lockstep import Batch
from compress.model.seeds import seeded
from compress.model.stream import Stream
from compress.state import State

DEPTHS = (0.25, 0.5, 0.75)  # of the blocks
NUMBERS = 32  # for each statistic and depth
TOLD_APART = 4  # windows for each number that is kept: what fewer say of a direction is chance
ROUNDS, TRIES = 100, 8  # of k-means, which settles in about ten rounds, and each time elsewhere
NOTHING = 1e-9  # of the largest variance
DECIMALS = 6  # that count, so that windows which differ by rounding alone are equal

Tick = Callable[[int], None]  # told how many blocks are behind


def depths(blocks: int) -> list[int]:
    """After how many blocks the residual is looked at."""
    return sorted({max(1, round(share * blocks)) for share in DEPTHS})


def statistics(state: State, ids: Tensor, device: str, seed: int, tick: Tick = lambda done: None) -> Tensor:
    """What the residual is in each window [windows, numbers], fp64."""
    stream = Stream(state, device)
    batches = stream.start(state, Tokens(ids, "").batches())
    generator = seeded(seed, "projection")
    looked_at, found = depths(len(state.graph.blocks)), []
    for index in range(looked_at[-1]):
        stream.advance(state, index, batches)
        tick(index + 1)
        if index + 1 in looked_at:
            found += projected(batches, generator)
    return torch.cat(found, 1)


def projected(batches: list[Batch], generator: torch.Generator) -> list[Tensor]:
    """Mean and root mean square of each window's hidden states, each [windows, NUMBERS]."""
    mean = torch.cat([batch.hidden.float().mean(1) for batch in batches])
    size = torch.cat([batch.hidden.float().square().mean(1).sqrt() for batch in batches])
    width = mean.shape[1]
    return [s_nd.cpu().double() @ torch.randn(width, NUMBERS, generator=generator, dtype=torch.float64) for s_nd in (mean, size)]


def chosen(found: Tensor, count: int, seed: int) -> list[int]:
    """`count` windows that cover the others best, ascending; the first of those that are equal."""
    points, generator = uncorrelated(found), seeded(seed, "centres")
    tries = [clustered(points, count, generator) for _ in range(TRIES)]
    centres = min(tries, key=lambda centres: float(apart(points, centres).amin(1).square().sum()))
    distances = apart(centres, points)
    taken: list[int] = []
    for near in distances:
        near[taken] = torch.inf  # of equal windows, two may be asked for
        taken.append(int(near.argmin()))
    return sorted(taken)


def uncorrelated(found: Tensor) -> Tensor:
    """The same numbers, made uncorrelated and of one variance: those directions in which the pool varies most."""
    off = found - found.mean(0)
    u, s, _ = torch.linalg.svd(off, full_matrices=False)
    kept = min(int((s.square() > NOTHING * s[0].square()).sum()), max(1, len(found) // TOLD_APART))
    return torch.round(u[:, :kept], decimals=DECIMALS)


def clustered(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The centres of k-means, begun by k-means++."""
    centres = spread(points, count, generator)
    for _ in range(ROUNDS):
        nearest = apart(points, centres).argmin(1)
        sizes = nearest.bincount(minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def apart(one: Tensor, other: Tensor) -> Tensor:
    """The distance of each point of one set from each of the other; exactly none between equal ones."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first centres: each a point drawn in proportion to its squared distance from those before it."""
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    picked = [int(drawn[0] * len(points))]
    squares = (points - points[picked[0]]).square().sum(1)
    for share in drawn[1:]:
        sums = squares.cumsum(0)
        picked.append(min(int(torch.searchsorted(sums, share * sums[-1], right=True)), len(points) - 1))
        squares = torch.minimum(squares, (points - points[picked[-1]]).square().sum(1))
    return points[picked]
