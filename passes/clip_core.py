"""Where to cut a group's range: the grid of least error, found by search.

Shapes: G groups, g inputs in a group, N outputs. Weights come transposed, W_Ggn, so that each step is a few long vector
operations over the outputs and a sum over g runs down the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats import Grid, Quantized

CLIPS = ("minmax", "mse", "hessian")
SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
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


def refit(W_kn: Tensor, Q_kn: Tensor, A_kk: Tensor, group_k: Tensor) -> Tensor:
    """Factors [G, N] on the scales that make tr(Δ A Δᵀ) least, Δ = W - Q, while all codes stay.

    For each output it is least squares in G unknowns: M f = c, M_ab = Q_aᵀ A Q_b, c_a = Q_aᵀ A W over the rows of groups a, b.
    A small ridge towards 1 holds groups without weight. Rows may come in any order; `group_k` names the group of each.
    """
    order_k = torch.argsort(group_k, stable=True)
    G, N = int(group_k.max()) + 1, W_kn.shape[1]
    W_kn, Q_kn, A_kk = W_kn[order_k], Q_kn[order_k], A_kk.index_select(0, order_k).index_select(1, order_k)
    g = len(W_kn) // G
    M_GGn, c_Gn = W_kn.new_zeros(G, G, N), W_kn.new_zeros(G, N)
    for a in range(G):
        part = slice(a * g, (a + 1) * g)
        Y_kn = A_kk[:, part] @ Q_kn[part]
        c_Gn[a] = Y_kn.mul(W_kn).sum(0)
        M_GGn[a] = Y_kn.mul_(Q_kn).view(G, g, N).sum(1)
    return _solve_positive(M_GGn.permute(2, 0, 1), c_Gn.T).T.clamp(0.5, 2)


def _solve_positive(M_nGG: Tensor, c_nG: Tensor) -> Tensor:
    ridge_n = 1e-5 * M_nGG.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + torch.finfo(c_nG.dtype).tiny
    M_nGG = M_nGG + torch.diag_embed(ridge_n.expand_as(c_nG))
    C_nGG, info_n = torch.linalg.cholesky_ex(M_nGG)
    f_nG = torch.cholesky_solve((c_nG + ridge_n)[..., None], C_nGG)[..., 0]
    return torch.where((info_n == 0)[:, None] & f_nG.isfinite(), f_nG, torch.ones_like(f_nG))


def _search(W: Tensor, fmt: Quantized, scale_dtype: torch.dtype, weight: Tensor | None) -> Grid:
    lo, hi = W.amin(1), W.amax(1)
    grid = fmt.fit(lo, hi, scale_dtype)
    buf = torch.empty_like(W)
    best = _error(W, fmt, grid, weight, buf)
    for p in SHRINKS:
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
