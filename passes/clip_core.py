"""Where to cut a group's range: the grid of least error, found by search.

Shapes: G groups, g inputs in a group, N outputs. Weights come transposed, W_Ggn, so that each step is a few long vector
operations over the outputs and a sum over g runs down the rows. A last group that is shorter is filled with zeros of no weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.formats.floats import Float
from compress.formats.grid import Grid, Lowered, Quantized, in_groups, join

CLIPS = ("minmax", "mse", "hessian")
_TRIALS = 6  # shrunken ranges tried
# Of floating-point numbers, whose levels are not even, wider ranges are as good as narrower ones: the largest weight may become 4
# or something like 5 in place of e2m1's 6. e4m3 is fine enough everywhere.
_FLOATS = {"nvfp4": (0.8, 0.87, 0.93, 1.07, 1.15, 1.25, 1.35, 1.5), "mxfp4": (0.5, 2.0)}
_REACH = 1.1  # the last is 1 - _REACH / sqrt(levels) of the range: 0.45 of it at 2 bits, 0.73 at 4, 0.93 at 8
_CHUNK = 1 << 16  # weights searched at a time, so that the temporaries stay in cache
_ROUNDS = 5  # of moving a table's levels to the means of what they stand for
_FP16_MAX = 65504.0
_SAMPLE = 1 << 20  # weights to which a table is fitted: every n-th output, so that there are no more


class Matrix:
    """A matrix W [N, K] for which grids are sought, `rows` outputs at a time in `dtype`; inputs are weighed by `weight_k`."""

    def __init__(self, W_nk: Tensor, fmt: Quantized, weight_k: Tensor | None, dtype: torch.dtype, rows: int):
        self.W_nk, self.fmt, self.dtype, self.rows = W_nk, fmt, dtype, rows
        self.width = fmt.width(W_nk.shape[1])
        if weight_k is None and W_nk.shape[1] % self.width:
            weight_k = torch.ones(W_nk.shape[1], dtype=dtype, device=W_nk.device)
        self.weight_Gg = None if weight_k is None else in_groups(weight_k.to(dtype), self.width, 0)

    def grouped(self, W_nk: Tensor) -> Tensor:
        """Some outputs as W_Ggn."""
        return in_groups(W_nk.T.to(self.dtype).contiguous(), self.width, 0)

    def parts(self, grid: Grid) -> Iterator[tuple[Tensor, Grid]]:
        """A few outputs at a time: W_Ggn and their grid [G, n], of a grid [N, G]."""
        for i in range(0, len(self.W_nk), self.rows):
            at = slice(i, i + self.rows)
            yield self.grouped(self.W_nk[at]), grid.map(lambda t, at=at: t[at].T.contiguous())  # type: ignore[misc]

    def search(self, clip: str, scale_dtype: torch.dtype, start: Grid | None = None) -> Grid:
        """The best grid [N, G], not settled; no group's is worse than in `start`, whose table is kept."""
        if start is None:
            found = [search(self.grouped(W), self.fmt, clip, scale_dtype, self.weight_Gg) for W in self.W_nk.split(self.rows)]
        else:
            found = [search(W, self.fmt, clip, scale_dtype, self.weight_Gg, part) for W, part in self.parts(start)]
        return join([part.map(lambda t: t.T.contiguous()) for part in found], start or found[0])

    def error(self, grid: Grid) -> float:
        """The weighted squared error of rounding the matrix to a grid [N, G]."""
        weight = None if self.weight_Gg is None else self.weight_Gg[..., None]
        return sum(float(_error(W, self.fmt, part, weight).sum(dtype=torch.float64)) for W, part in self.parts(grid))

    def sample(self, grid: Grid) -> tuple[Tensor, Grid]:
        """Every n-th output, so that there are at most `_SAMPLE` weights: W_Ggn and their grid [G, n]."""
        step = -(-self.W_nk.numel() // _SAMPLE)
        return self.grouped(self.W_nk[::step]), grid.map(lambda t: t[::step].T.contiguous())


def fit(
    W_nk: Tensor,
    fmt: Quantized,
    clip: str,
    scale_dtype: torch.dtype,
    weight_k: Tensor,
    dtype: torch.dtype = torch.float32,
    rows: int = 1 << 12,
) -> Grid:
    """The grid [N, G] of a whole matrix W [N, K], as it will be stored; clip "hessian" weighs the inputs by `weight_k`.

    Where the format has a table that may be learned, it is fitted to the matrix between two searches for the scales.
    `rows` outputs are searched at a time, in `dtype`.
    """
    matrix = Matrix(W_nk, fmt, weight_k if clip == "hessian" else None, dtype, rows)
    grid = matrix.search(clip, scale_dtype)
    if fmt.learned:
        learned = grid.on(_fit_table(*matrix.sample(grid), fmt, matrix.weight_Gg))
        learned = matrix.search(clip, scale_dtype, learned)
        grid = min(grid, learned, key=matrix.error)
    return fmt.settle(grid)


def search(
    W_Ggn: Tensor,
    fmt: Quantized,
    clip: str,
    scale_dtype: torch.dtype,
    weight_Gg: Tensor | None = None,
    start: Grid | None = None,
) -> Grid:
    """The grid [G, N] of least squared error for each group and output, its inputs weighed by `weight_Gg`, if given.

    `clip` "minmax" covers the whole range and searches nothing. With `start` only its scales are searched: its table is kept, and
    no group's error grows.
    """
    assert clip in CLIPS, clip
    if clip == "minmax":
        return start or fmt.fit(W_Ggn.amin(1), W_Ggn.amax(1), scale_dtype)
    G, g, n = W_Ggn.shape
    parts = []
    step = max(1, _CHUNK // (g * n))
    for i in range(0, G, step):
        at = slice(i, i + step)
        weight = None if weight_Gg is None else weight_Gg[at, :, None]
        given = start and start.map(lambda t, at=at: t[at])  # type: ignore[misc]
        parts.append(_search(W_Ggn[at], fmt, scale_dtype, weight, given))
    return join(parts, parts[0])


def refit(A_kk: Tensor, group_k: Tensor, fmt: Quantized, grid: Grid, Q_kn: Tensor, D_kn: Tensor) -> Grid:
    """The grid [G, N] with its scales refitted, one group after another, to make tr(Δ A Δᵀ) least while all codes stay.

    In the scale of one group the loss is a parabola: with Q_g the group's rows it is least at the factor
    1 - Q_gᵀ(AΔ)_g / Q_gᵀ A_gg Q_g. Each group sees the rounded scales of those before it. Rows may come in any order; `group_k`
    names the group of each. The levels `Q_kn` and the changes `D_kn` follow in place.
    """
    parts = []
    for g in range(len(grid.scale)):
        at, part = (group_k == g).nonzero()[:, 0], grid.map(lambda t, g=g: t[g])  # type: ignore[misc]
        A_gk, Q_gn = A_kk.index_select(0, at), Q_kn.index_select(0, at)
        if part.low is not None:
            Q_gn -= part.low.to(Q_gn.dtype)
        found = fmt.rescale(part, _factor(A_gk, at, Q_gn, D_kn))
        ratio_n = (found.scale.to(Q_gn.dtype) / part.scale.to(Q_gn.dtype)).nan_to_num_(1.0)  # 0/0: a group of zeros
        _move(Q_gn * (ratio_n - 1), at, Q_kn, D_kn)
        if part.low is not None:
            found = _lowered(A_gk, at, fmt, found, Q_kn, D_kn)
        parts.append(found.map(lambda t: t[None]))
    return join(parts, grid)


def _factor(A_gk: Tensor, at: Tensor, Q_gn: Tensor, D_kn: Tensor) -> Tensor:
    """The factor on the levels Q of some inputs at which the loss is least, by outputs."""
    slope_n = (A_gk @ D_kn).mul_(Q_gn).sum(0)
    bend_n = (A_gk.index_select(1, at) @ Q_gn).mul_(Q_gn).sum(0)
    return torch.where(bend_n > 0, 1 - slope_n / bend_n, 1.0).clamp_(0.5, 2)


def _lowered(A_gk: Tensor, at: Tensor, fmt: Quantized, part: Grid, Q_kn: Tensor, D_kn: Tensor) -> Grid:
    """The grid of a group whose least level is the best that can be stored: it moves all weights of the group alike."""
    assert isinstance(fmt, Lowered)
    assert part.low is not None
    low_n = part.low - (A_gk @ D_kn).sum(0) / A_gk.index_select(1, at).sum()
    found = fmt.relow(part, low_n)
    assert found.low is not None
    _move((found.low - part.low).to(Q_kn.dtype).expand(len(at), -1), at, Q_kn, D_kn)
    return found


def _move(step_gn: Tensor, at: Tensor, Q_kn: Tensor, D_kn: Tensor) -> None:
    Q_kn.index_add_(0, at, step_gn)
    D_kn.index_add_(0, at, step_gn)


def _fit_table(W: Tensor, grid: Grid, fmt: Quantized, weight_Gg: Tensor | None) -> Tensor:
    """The best of the tables to which the levels move, in fp16 numbers, as fp32; the scales [G, n] stay."""
    weight = W.new_ones(1, 1, 1) if weight_Gg is None else weight_Gg[..., None]
    assert grid.table is not None
    table = best = grid.table
    least = float("inf")
    for _ in range(_ROUNDS + 1):
        moved, error = _centroids(W, grid.on(table), fmt, weight)
        if error < least:
            best, least = table, error
        table = moved
    return best


def _centroids(W: Tensor, grid: Grid, fmt: Quantized, weight: Tensor) -> tuple[Tensor, float]:
    """Each level's best place for the weights that now go to it, Σ w s x / Σ w s²; and the error Σ w (x - s t)² as it is.

    A level that nothing goes to stays; the others stay between the same midpoints, so the order holds.
    """
    assert grid.table is not None
    wide = grid.map(lambda t: t[:, None])
    codes = fmt.encode(W, wide)
    scale, w = wide.scale.double(), weight.double()
    error = float((w * (fmt.decode(codes, wide) - W).square()).sum())
    above, below = (_by_level(x, codes, fmt.levels) for x in (w * scale * W, w * scale.square()))
    moved = torch.where(below > 0, above / below, grid.table.double())
    return moved.clamp_(-_FP16_MAX, _FP16_MAX).half().float(), error


def _by_level(x: Tensor, codes: Tensor, levels: int) -> Tensor:
    """The sum of `x` over the weights of each level; not by scattering, whose order, so whose sums, vary on some devices."""
    return torch.stack([torch.where(codes == level, x, 0.0).sum() for level in range(levels)])


def _search(W: Tensor, fmt: Quantized, scale_dtype: torch.dtype, weight: Tensor | None, start: Grid | None) -> Grid:
    lo, hi = W.amin(1), W.amax(1)
    grid = start or fmt.fit(lo, hi, scale_dtype)
    buf = torch.empty_like(W)
    best = _error(W, fmt, grid, weight, buf)
    for p in ([1.0] if start else []) + shares(fmt):
        trial = fmt.fit(lo * p, hi * p, scale_dtype)
        if start and start.table is not None:
            trial = trial.on(start.table)
        error = _error(W, fmt, trial, weight, buf)
        better = error < best
        grid, best = trial.where(better, grid), torch.minimum(error, best)
    if grid.low is None:
        return grid
    trial = _regressed(W, fmt, grid, weight)
    return trial.where(_error(W, fmt, trial, weight, buf) < best, grid)


def _regressed(W: Tensor, fmt: Quantized, grid: Grid, weight: Tensor | None) -> Grid:
    """The scales and least levels that are nearest to W, by least squares, for the codes that it has on a grid with both."""
    assert isinstance(fmt, Lowered)
    code = fmt.encode(W, grid.map(lambda t: t[:, None])).to(W.dtype)
    w = torch.ones_like(W) if weight is None else weight.expand_as(W)
    total = w.sum(1)
    mean_c, mean_w = (w * code).sum(1) / total, (w * W).sum(1) / total
    off = code - mean_c[:, None]
    spread = (w * off.square()).sum(1)
    scale = torch.where(spread > 0, (w * off * W).sum(1) / spread, grid.scale)  # codes rise with W, so it is positive
    return fmt.relow(Grid(scale), mean_w - scale * mean_c)


def shares(fmt: Quantized) -> list[float]:
    """The shares of a group's range that are tried beside the whole of it."""
    if isinstance(fmt, Float):
        return list(_FLOATS.get(fmt.text, ()))
    return [1 - i / _TRIALS * _REACH / fmt.levels**0.5 for i in range(1, _TRIALS + 1)]


def _error(W: Tensor, fmt: Quantized, grid: Grid, weight: Tensor | None, buf: Tensor | None = None) -> Tensor:
    """The weighted squared error [G, N] of rounding to `grid`; `buf` is overwritten."""
    buf = torch.empty_like(W) if buf is None else buf
    fmt.nearest(W, grid.map(lambda t: t[:, None]), out=buf).sub_(W).square_()
    if weight is not None:
        buf.mul_(weight)
    return buf.sum(1)
