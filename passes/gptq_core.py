"""GPTQ: rounding a weight matrix so that its outputs, not its entries, change least. Pure functions on tensors.

Shapes. N outputs, K inputs, T tokens, G groups; letters after an underscore are dimensions: W_nk is [N, K]. Everything inside
runs on transposed data, W_kn: then one input's weights are a contiguous vector of N numbers.

The problem. Over inputs X_tk, a change Δ of the weights costs Σ|XΔᵀ|² = tr(Δ H Δᵀ) at the outputs, with H = XᵀX. The outputs
are independent, and for each it is a closest-vector problem, NP-hard. GPTQ (Frantar et al., arXiv 2210.17323) rounds one
input after another and lets the inputs that are still free make up for the error: with F the free inputs,
err = (w_i - q_i) / [H_F⁻¹]_ii and w_F -= err [H_F⁻¹]_iF (its equations 2 and 3, where the paper reads the rows of H_F⁻¹ off
a Cholesky factor of H⁻¹).

The form used here. Factor H + λI = Lᵀ D L, with L lower triangular, its diagonal 1, and D diagonal. With Δ_kn transposed,

    cost of output n + λ|Δ_n|² = Σ_i D_i η_in²,   η = L Δ,   so   η_i = q_i - t_i,   t_i = w_i - Σ_{j<i} L_ij Δ_j

and the level nearest to t_i makes term i least, given the choices before it. This is the LDLQ form, which QuIP (arXiv
2307.13304, theorem 6) proves equal to GPTQ. It takes one Cholesky factorisation (of H in reversed order) where the paper takes
two and an inversion: a quarter of the work, and better conditioned. It reads the original weights, never updated ones,
and the loss of each output falls out of the loop.

Speed. Inside a block of a few inputs a step is about eight operations on vectors of N; between blocks the matrix is halved
recursively and the second half corrected by one product with the changes of the first, so that nearly all arithmetic is in
large matrix products, whatever the cache.

Choices, each by the divergence from the unquantized model on held-out text (Llamas of 0.3 and 7 million weights):
- The grid is fixed before the loop, from the original weights ("static groups"). Grids taken inside the loop from updated
  weights are no better, and would make the next choice cost a permutation in every forward pass.
- Inputs go by falling diag H: those that matter most are rounded while most others can still make up for them.
- Afterwards the scales are refitted to the codes by least squares in H, and one sweep of coordinate descent moves each
  weight to the level that is best given all others (`refine`). Both can only lower the loss.
- Outputs are independent, so one that plain rounding serves better keeps its rounding: none is ever worse than rounded.
- An input that calibration never saw has a zero row in H: it is rounded to nearest and takes no part in the feedback. (The
  original sets its weights to zero, which is wrong the first time that the input is seen.)
- `retarget` moves the weights to where they undo the error that arrives with the inputs; see there.

Limits. The loss is that of one matrix, on the calibration inputs: with fewer tokens than inputs it is overfitted, and of the
layers behind it knows nothing. H_kk is held in fp64 while it is factored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.formats.grid import Grid, Quantized, Rounds, in_groups, join, refuse_nan
from compress.passes import clip_core
from compress.passes.rows import Matrix, at_once

ORDERS = ("activation", "natural")
# Where nothing else is said: at least the first, and the second times inputs per token (see `damp_for`); benchmarks/damping.py
# measures what that is worth.
LEAST_DAMP, DAMP_BY_INPUTS_PER_TOKEN = 0.01, 0.4
_DAMPS = (1, 10, 100)  # times `damp`, in turn, while the factorisation fails
_TILE = 128  # inputs; side of the blocks in which triangular products skip what is zero
_STRIP = 256  # columns that the factorisation has in hand
_TOKENS = 2048  # tokens in one product, so that they stay in cache


@dataclass(frozen=True, eq=False)
class Factor:
    """H + lam I = Lᵀ D L over the inputs in the order `order_k`; `notes` says what went wrong on the way, if anything did.

    `turned` keeps the same of H in rotated coordinates, by block, once somebody asked for it (see rotated.py).
    """

    A_kk: Tensor  # H + lam I itself, in that order
    L_kk: Tensor
    D_k: Tensor
    lam: float
    order_k: Tensor
    diag_k: Tensor  # diag H, in the original order
    notes: tuple[str, ...] = ()
    turned: dict[int, Factor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, eq=False)
class Solved:
    """Codes [N, K], their grid [N, G], and what each output lost, in units of H.

    `loss_n` is tr(ΔHΔᵀ) by outputs, `rounding_loss_n` the same for rounding to nearest with the same clip search, and
    `energy_n` is tr(WHWᵀ): loss over energy is the relative error.
    """

    codes: Tensor
    grid: Grid
    loss_n: Tensor
    rounding_loss_n: Tensor
    energy_n: Tensor
    notes: tuple[str, ...] = ()


def accumulate(H_kk: Tensor, X_tk: Tensor) -> None:
    """Add XᵀX to the upper triangle of H, in place and in the dtype of H; X may have leading dimensions and any float dtype.

    Only blocks on and above the diagonal are computed, so H is of no use before `finish`.
    """
    K = len(H_kk)
    for X in X_tk.reshape(-1, K).split(_TOKENS):
        X = X.to(H_kk.dtype)
        for i in range(0, K, _TILE):
            H_kk[i : i + _TILE, i:].addmm_(X[:, i : i + _TILE].T, X[:, i:])


def finish(H_kk: Tensor) -> Tensor:
    """Mirror the upper triangle of H into the lower, in place; returns H."""
    for i in range(0, len(H_kk), _TILE):
        j = i + _TILE
        H_kk[j:, i:j] = H_kk[i:j, j:].T
    return H_kk


def damp_for(inputs: int, tokens: int) -> float:
    """The damping, as a share of the mean diagonal, of a Hessian that so many tokens were seen for.

    A sum over few tokens has eigenvalues that are too far apart, by about the square root of inputs per token, and what is solved
    under it fits those tokens and no others. Toward the identity it is drawn by a share that grows with inputs per token.
    """
    return min(1.0, max(LEAST_DAMP, DAMP_BY_INPUTS_PER_TOKEN * inputs / max(1, tokens)))


def factor(H_kk: Tensor, *, damp: float = 0.01, order: str = "activation", overwrite: bool = False) -> Factor:
    """Factor H + λI, with λ = `damp` times the mean diagonal of the inputs that were seen.

    It never fails. While H + λI is not positive definite λ grows tenfold, twice; where H is hopeless (not finite, or no
    input seen) the identity stands in, under which GPTQ is plain rounding. `notes` tells. With `overwrite` the factor lives
    where H was: little more than 9 K² bytes are held then at most, H's among them, and 4 K² more without.
    """
    assert order in ORDERS, order
    diag_k = H_kk.diagonal().clone()
    if not bool(H_kk.sum().isfinite()):
        return _identity(H_kk, "H is not finite; rounded to nearest")
    if not bool((diag_k > 0).any()):
        return _identity(H_kk, "H is zero, no input was seen; rounded to nearest")
    mean = float(diag_k[diag_k > 0].mean(dtype=torch.float64))
    order_k = torch.arange(len(H_kk), device=H_kk.device)
    if order == "activation":
        order_k = torch.argsort(diag_k, descending=True, stable=True)
    A_kk = _ordered(H_kk, order_k, overwrite)
    for times in _DAMPS:
        lam = damp * times * mean
        found = ldl(A_kk, lam)
        if found is not None:
            A_kk.diagonal().add_(lam)
            notes = () if times == 1 else (f"H is not positive definite; damping raised to {damp * times:g}",)
            return Factor(A_kk, *found, lam, order_k, diag_k, notes)
    return _identity(A_kk, "H cannot be factored; rounded to nearest")


def _ordered(H_kk: Tensor, order_k: Tensor, overwrite: bool) -> Tensor:
    """H with its inputs in an order; only columns of the lower triangle are held twice."""
    strips = [H_kk.index_select(1, order_k[a:b]).index_select(0, order_k[a:]) for a, b in _strips(len(H_kk))]
    A_kk = H_kk if overwrite else torch.empty_like(H_kk)
    for (a, b), strip in zip(_strips(len(H_kk)), strips, strict=True):
        A_kk[a:, a:b] = strip
        A_kk[a:b, a:] = strip.T
    return A_kk


def _strips(K: int) -> list[tuple[int, int]]:
    """Where some columns begin and end."""
    return [(i, min(i + _STRIP, K)) for i in range(0, K, _STRIP)]


def ldl(A_kk: Tensor, lam: float = 0.0) -> tuple[Tensor, Tensor] | None:
    """L and D of A + lam I = Lᵀ D L in the dtype of A, or None; by Cholesky in fp64 of A in reversed order.

    With A in reversed order C Cᵀ, row i of L is column i from the end of C over its diagonal, read backwards. Of C only the lower
    triangle is held, some columns at a time, and those go when they have been read.
    """
    K = len(A_kk)
    columns = _cholesky(A_kk, lam)
    if columns is None:
        return None
    L_kk, c_k = torch.zeros_like(A_kk), torch.empty(K, dtype=torch.float64, device=A_kk.device)
    for a, b in _strips(K):
        C_kb = columns.pop(0)
        c_k[a:b] = C_kb.diagonal()
        L_kk[K - b : K - a, : K - a] = C_kb.div_(c_k[a:b]).flip(0, 1).T
    return L_kk, c_k.square().flip(0).to(A_kk.dtype)


def _cholesky(A_kk: Tensor, lam: float) -> list[Tensor] | None:
    """The lower Cholesky factor, fp64, of A + lam I in reversed order, by strips of columns from their diagonal down; or None."""
    K, done = len(A_kk), list[Tensor]()
    for a, b in _strips(K):
        C_kb = A_kk[: K - a, K - b : K - a].flip(0, 1).double()
        C_kb[: b - a].diagonal().add_(lam)
        for (i, _), before in zip(_strips(K), done, strict=False):
            C_kb.addmm_(before[a - i :], before[a - i : b - i].T, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(C_kb[: b - a])
        if int(info) != 0:
            return None
        C_kb[b - a :] = torch.linalg.solve_triangular(corner.T, C_kb[b - a :], upper=True, left=False)
        C_kb[: b - a] = corner
        done.append(C_kb)
    return done


def _identity(H_kk: Tensor, *notes: str) -> Factor:
    I_kk = torch.eye(len(H_kk), dtype=H_kk.dtype, device=H_kk.device)
    one_k = torch.ones_like(I_kk[0])
    return Factor(I_kk, I_kk, one_k, 0.0, torch.arange(len(H_kk), device=H_kk.device), one_k, notes)


def nothing_seen(W_nk: Matrix) -> Factor:
    """What stands for a Hessian where nothing streams: losses are those of the weights, and no K×K matrix is made."""
    none, one_k = torch.empty(0, 0, device=W_nk.device), torch.ones(W_nk.shape[1], device=W_nk.device)
    return Factor(none, none, one_k, 0.0, torch.arange(len(one_k), device=W_nk.device), one_k)


@torch.no_grad()
def retarget(W_nk: Tensor, E_nk: Tensor, f: Factor, strength: float) -> Tensor:
    """The weights whose outputs, on inputs X̃ that carry earlier error, come nearest to wanted outputs Y.

    `E_nk` is (Y - X̃Wᵀ)ᵀX̃, summed over the tokens that H = X̃ᵀX̃ sums. With Y = XWᵀ, X the inputs in the unquantized model, it
    is W·(X - X̃)ᵀX̃. The least-squares answer is W + E(H + λI)⁻¹; the step is scaled by `strength`. To quantize it in place of
    W corrects the drift of the inputs, exactly as Qronos (arXiv 2505.11695) does, at the price of a second, unquantized
    stream of activations.
    """
    moved_nk, rows = torch.empty_like(W_nk), at_once(W_nk.shape[1])
    for i in range(0, len(W_nk), rows):
        at = slice(i, i + rows)
        E_kn = E_nk[at].T.to(f.L_kk.dtype).index_select(0, f.order_k)
        E_kn = torch.linalg.solve_triangular(f.L_kk.T, E_kn, upper=True, unitriangular=True).div_(f.D_k[:, None])
        E_kn = torch.linalg.solve_triangular(f.L_kk, E_kn, upper=False, unitriangular=True)
        S_nk = torch.empty_like(E_kn).index_copy_(0, f.order_k, E_kn).T
        moved_nk[at] = W_nk[at] + strength * S_nk
    return moved_nk


@torch.no_grad()
def quantize(
    W_nk: Tensor,
    f: Factor,
    fmt: Quantized,
    *,
    clip: str = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    refine: int = 1,
    block: int = 32,
) -> Solved:
    """The codes and grid of W by GPTQ under the Hessian that was factored, then `refine` rounds of scale refit and sweep.

    No output loses more than by rounding to nearest (`round_to_nearest` with the same `clip`). `block` is the number of
    inputs handled one by one between two matrix products; it changes speed, not results. FormatError if the groups of
    `fmt` do not divide K, or W is not finite.
    """
    return _chunked(W_nk, f, fmt, clip, scale_dtype, refine, block)


@torch.no_grad()
def round_to_nearest(
    W_nk: Tensor,
    f: Factor | None,
    fmt: Quantized,
    *,
    clip: str = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Solved:
    """As `quantize`, without feedback: every weight goes to its nearest level. Without `f` the losses are those of W itself."""
    f = f or nothing_seen(W_nk)
    return _chunked(W_nk, f, fmt, clip, scale_dtype, 0, None)


def _chunked(
    W_nk: Tensor, f: Factor, fmt: Quantized, clip: str, scale_dtype: torch.dtype, refine: int, block: int | None
) -> Solved:
    """The grid of the whole matrix first, since some formats share parameters over it; then some outputs at a time."""
    fmt.check(tuple(W_nk.shape))
    refuse_nan(W_nk)
    rows = at_once(W_nk.shape[1])
    grid = clip_core.fit(W_nk, fmt, clip, scale_dtype, f.diag_k, f.L_kk.dtype, rows)
    starts = range(0, len(W_nk), rows)
    parts = [_solve(W_nk[i : i + rows], f, fmt, grid.map(lambda t, i=i: t[i : i + rows]), refine, block) for i in starts]  # type: ignore[misc]
    return _join(parts, grid, f.notes)


def _join(parts: list[Solved], grid: Grid, notes: tuple[str, ...]) -> Solved:
    return Solved(
        torch.cat([p.codes for p in parts]),
        join([p.grid for p in parts], grid),
        torch.cat([p.loss_n for p in parts]),
        torch.cat([p.rounding_loss_n for p in parts]),
        torch.cat([p.energy_n for p in parts]),
        notes,
    )


def _solve(W_nk: Tensor, f: Factor, fmt: Quantized, grid_nG: Grid, refine: int, block: int | None) -> Solved:
    """Plain rounding first; where feedback is asked for (`block`), what it finds replaces it output by output if better."""
    W_kn = W_nk.T.to(f.L_kk.dtype).contiguous()
    grid = grid_nG.map(lambda t: t.T.contiguous())
    Q_kn = _by_group(fmt.nearest, W_kn, fmt, grid)
    P_kn, R_kn = W_kn.index_select(0, f.order_k), Q_kn.index_select(0, f.order_k)
    loss_n = rounding_n = _loss(R_kn - P_kn, f)
    if block is not None:
        T_kn, new, new_n = _descend(P_kn, f, fmt, grid, refine, block)
        better = new_n < loss_n
        Q_kn.index_copy_(0, f.order_k, torch.where(better, T_kn, R_kn))
        grid, loss_n = new.where(better, grid), torch.minimum(new_n, loss_n)
    codes = _by_group(fmt.encode, Q_kn, fmt, grid).T.contiguous()
    return Solved(codes, grid.map(lambda t: t.T.contiguous()), loss_n, rounding_n, _loss(P_kn, f))


def _by_group(f: Callable[[Tensor, Grid], Tensor], W_kn: Tensor, fmt: Quantized, grid: Grid) -> Tensor:
    """`f`, a method of the format, on all weights and their grid [G, N]."""
    K = len(W_kn)
    return f(in_groups(W_kn, fmt.width(K), 0), grid.map(lambda t: t[:, None])).flatten(0, 1)[:K]


def loss(D_nk: Tensor, f: Factor | None) -> Tensor:
    """tr(Δ H Δᵀ) by outputs, [N], for a change Δ [N, K] of the weights; without `f`, or where the identity stands in, |Δ|²."""
    if f is None or f.lam == 0:
        return D_nk.square().sum(1)
    return _loss(D_nk.T.to(f.L_kk.dtype).index_select(0, f.order_k), f)


def _loss(D_kn: Tensor, f: Factor) -> Tensor:
    """tr(Δ H Δᵀ) by outputs, for Δ in the order of `f`."""
    if f.lam == 0:  # the identity
        return D_kn.square().sum(0)
    loss_n = torch.zeros_like(D_kn[0])
    for i in range(0, len(D_kn), _TILE):
        j = i + _TILE
        loss_n += f.D_k[i:j] @ (f.L_kk[i:j, :j] @ D_kn[:j]).square_()
        loss_n -= D_kn[i:j].square().sum(0).mul_(f.lam)
    return loss_n.clamp_(min=0)


def _descend(P_kn: Tensor, f: Factor, fmt: Quantized, grid: Grid, refine: int, block: int) -> tuple[Tensor, Grid, Tensor]:
    """GPTQ and its refinement for the weights P in the order of `f`: the levels Q [K, N], the grid [G, N], the losses [N]."""
    group_k = f.order_k // fmt.width(len(P_kn))
    Q_kn, D_kn = torch.empty_like(P_kn), torch.zeros_like(P_kn)
    feedback(P_kn.clone(), P_kn, f, fmt, _columns(grid, group_k, P_kn.dtype), Q_kn, D_kn, block)
    for _ in range(refine):
        if fmt.rescalable:
            grid = clip_core.refit(f.A_kk, group_k, fmt, grid, Q_kn, D_kn)
        _sweep(f.A_kk, fmt, _columns(grid, group_k, P_kn.dtype), Q_kn, D_kn, block)
    return Q_kn, grid, _loss(D_kn, f)


def _columns(grid: Grid, group_k: Tensor, dtype: torch.dtype) -> list[Grid]:
    """The grid [N] of each input, in the order in which inputs are handled."""
    wide = grid.map(lambda t: t.to(dtype))
    rows = [wide.map(lambda t, g=g: t[g]) for g in range(len(grid.scale))]  # type: ignore[misc]
    return [rows[g] for g in group_k.tolist()]


def feedback(
    T_kn: Tensor, P_kn: Tensor, f: Factor, fmt: Rounds, grids: list[Grid], Q_kn: Tensor, D_kn: Tensor, block: int, a: int = 0
) -> None:
    """Fill Q and Δ for the inputs a... that these views hold; the targets T start as the weights P and are overwritten."""
    n = len(P_kn)
    if n <= block:
        _leaf(T_kn, P_kn, f.L_kk[a : a + n, a : a + n].tril(-1), fmt, grids, Q_kn, D_kn)
        return
    m = -(-n // (2 * block)) * block
    feedback(T_kn[:m], P_kn[:m], f, fmt, grids[:m], Q_kn[:m], D_kn[:m], block, a)
    T_kn[m:].addmm_(f.L_kk[a + m : a + n, a : a + m], D_kn[:m], alpha=-1)
    feedback(T_kn[m:], P_kn[m:], f, fmt, grids[m:], Q_kn[m:], D_kn[m:], block, a + m)


def _sweep(A_kk: Tensor, fmt: Quantized, grids: list[Grid], Q_kn: Tensor, D_kn: Tensor, block: int) -> None:
    """One sweep of coordinate descent on tr(Δ A Δᵀ), in place: each weight to its best level given all others.

    Along weight i the loss is a parabola with its least value at q_i - (A Δ)_i / A_ii, so the level nearest to it is the best.
    """
    for a in range(0, len(Q_kn), block):
        b = a + block
        A_bk = A_kk[a:b] / A_kk.diagonal()[a:b, None]
        old, step = Q_kn[a:b].clone(), torch.zeros_like(Q_kn[a:b])
        T = torch.addmm(old, A_bk, D_kn, alpha=-1)
        _leaf(T, old, A_bk[:, a:b].tril(-1), fmt, grids[a:b], Q_kn[a:b], step)
        D_kn[a:b] += step


def _leaf(T: Tensor, base: Tensor, L: Tensor, fmt: Rounds, grids: list[Grid], Q: Tensor, D: Tensor) -> None:
    """For each row i in turn: q_i = the level nearest to t_i - Σ_j L_ij d_j, and d_i = q_i - base_i; D comes zeroed."""
    done = D.T
    with _one_thread():
        for t, start, row, grid, q, d in zip(T, base, L, grids, Q, D, strict=True):
            t.addmv_(done, row, alpha=-1)
            torch.sub(fmt.nearest(t, grid, out=q), start, out=d)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for the small operations of a block: several would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
