"""Where to cut a group's range: the grid of least error, found by search.

Shapes: G groups, g inputs in a group, N outputs. Weights come transposed, W_Ggn, so that each step is a few long vector
operations over the outputs and a sum over g runs down the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import Grid, Quantized

CLIPS = ("minmax", "mse", "hessian")
_TRIALS = 6  # shrunken ranges tried
_REACH = 1.1  # the last is 1 - _REACH / sqrt(levels) of the range: 0.45 of it at 2 bits, 0.73 at 4, 0.93 at 8
_CHUNK = 1 << 16  # weights searched at a time, so that the temporaries stay in cache


def search(W_Ggn: Tensor, fmt: Quantized, clip: str, scale_dtype: torch.dtype, weight_Gg: Tensor | None = None) -> Grid:
    """The grid [G, N] of least squared error for each group and output.

    `clip`: "minmax" covers the whole range; "mse" weighs all inputs alike; "hessian" weighs them by `weight_Gg`.
    """
    assert clip in CLIPS, clip
    G, g, n = W_Ggn.shape
    if clip == "minmax":
        return fmt.fit(W_Ggn.amin(1), W_Ggn.amax(1), scale_dtype)
    parts = []
    step = max(1, _CHUNK // (g * n))
    for i in range(0, G, step):
        weight = weight_Gg[i : i + step, :, None] if clip == "hessian" and weight_Gg is not None else None
        parts.append(_search(W_Ggn[i : i + step], fmt, scale_dtype, weight))
    zero = None if parts[0].zero is None else torch.cat([p.zero for p in parts if p.zero is not None])
    return Grid(torch.cat([p.scale for p in parts]), zero)


def refit(A_kk: Tensor, group_k: Tensor, fmt: Quantized, grid: Grid, Q_kn: Tensor, D_kn: Tensor) -> Grid:
    """The grid [G, N] with its scales refitted, one group after another, to make tr(Δ A Δᵀ) least while all codes stay.

    In the scale of one group the loss is a parabola: with Q_g the group's rows it is least at the factor
    1 - Q_gᵀ(AΔ)_g / Q_gᵀ A_gg Q_g. Each group sees the rounded scales of those before it. Rows may come in any order; `group_k`
    names the group of each. The levels `Q_kn` and the changes `D_kn` follow in place.
    """
    scale_Gn, dtype = grid.scale.clone(), Q_kn.dtype
    for g in range(len(scale_Gn)):
        at = (group_k == g).nonzero()[:, 0]
        A_gk, Q_gn = A_kk.index_select(0, at), Q_kn.index_select(0, at)
        slope_n = (A_gk @ D_kn).mul_(Q_gn).sum(0)
        bend_n = (A_gk.index_select(1, at) @ Q_gn).mul_(Q_gn).sum(0)
        by_n = torch.where(bend_n > 0, 1 - slope_n / bend_n, 1.0).clamp_(0.5, 2)
        scale_Gn[g] = fmt.rescale(Grid(scale_Gn[g]), by_n).scale
        step_gn = Q_gn * (scale_Gn[g].to(dtype) / grid.scale[g].to(dtype) - 1)
        Q_kn.index_add_(0, at, step_gn)
        D_kn.index_add_(0, at, step_gn)
    return Grid(scale_Gn, grid.zero)


def _search(W: Tensor, fmt: Quantized, scale_dtype: torch.dtype, weight: Tensor | None) -> Grid:
    lo, hi = W.amin(1), W.amax(1)
    grid = fmt.fit(lo, hi, scale_dtype)
    buf = torch.empty_like(W)
    best = _error(W, fmt, grid, weight, buf)
    for i in range(1, _TRIALS + 1):
        p = 1 - i / _TRIALS * _REACH / fmt.levels**0.5
        trial = fmt.fit(lo * p, hi * p, scale_dtype)
        error = _error(W, fmt, trial, weight, buf)
        better = error < best
        grid, best = trial.where(better, grid), torch.minimum(error, best)
    return grid


def _error(W: Tensor, fmt: Quantized, grid: Grid, weight: Tensor | None, buf: Tensor) -> Tensor:
    """The weighted squared error [G, N] of rounding to `grid`; `buf` is overwritten."""
    fmt.nearest(W, grid.map(lambda t: t[:, None]), out=buf).sub_(W).square_()
    if weight is not None:
        buf.mul_(weight)
    return buf.sum(1)
