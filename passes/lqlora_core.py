"""W ≈ Q + L: a quantized matrix and a low-rank correction of it, fitted to each other. Pure functions on tensors.

Shapes. N outputs, K inputs, rank r, m = min(N, K); letters after an underscore are dimensions. L = B A, with B_nr [N, r] and
A_rk [r, K], so that a layer computes Qx + B(Ax).

The problem. As in gptq_core, the outputs miss tr(Δ H Δᵀ), here with Δ = W - Q - L. For a given Q, with E = W - Q, the best L
has a closed form. Let H = C Cᵀ and U_r the r leading eigenvectors of E H Eᵀ, that is, left singular vectors of E C:

    tr((E - L) H (E - L)ᵀ) = |EC - LC|² ≥ |EC - SVD_r(EC)|² = Σ_{i>r} λ_i(E H Eᵀ)       (Eckart-Young; LC has rank ≤ r)
    SVD_r(EC) = U_r U_rᵀ E C,   so   L = U_r U_rᵀ E   reaches the bound:   B = U_r,   A = U_rᵀ E

This is theorem 3.1 of CLoQ (arXiv 2501.18475) and theorem 1 of QERA (2410.06040), in a form without C: nothing is inverted or
damped, and H may be singular. The tail sums of one set of eigenvalues are the losses of every rank, so that an allocator gets
the whole curve for the price of a point. Where N > K, E = P R with P orthonormal, and the K×K matrix R H Rᵀ has the same
eigenvalues. Weights g_n on the outputs take E to G^½E, and L back from there.

Q and L are fitted in turn: Q by GPTQ to W - L, L to W - Q. That need not descend, since GPTQ only approximates, so the best is
kept. Both ends to begin at are followed: Q of W first (LoftQ, CLoQ), and L of W first (PiSSA, LQ-LoRA). The second often starts
behind and gains more by each round, so that which is better shows only after the rounds: the second nearly always at a rank of
4 % of K or more, by up to a third, and either below. Factors are stored rounded; every residual is taken against the rounded
ones, and A is fitted to the rounded B, so that the loss reported is the loss deployed.

`alternate` is the initialisation that LQ-LoRA published (arXiv 2311.12023, section 3.1, algorithm 1), which needs no inputs.

Measured on 21 matrices of a Llama of 7 million weights (width 256) at rank 16, groups of 64, loss over energy on held-out text:

             rounding  as published  with mse clip   GPTQ   and SVD   closed form of the better end   2 rounds   5 rounds
    3 bits     .0222      .0141          .0101      .0102    .0084               .0076                  .0069      .0064
    2 bits     .0933      .1505          .0439      .0431    .0355               .0316                  .0286      .0264

Alternatives not taken.
- SVD of the residual itself: the best L in the norm of the weights, which is the wrong norm.
- LoftQ (arXiv 2310.08659): that SVD and plain rounding in turn, Q first. The weights come nearer by each; the outputs need not.
- L = SVD_r(E H^½) H^-½, as QERA computes it: two matrix square roots and an inverse for the same L, and damping for singular H.
- Random projections for the eigenvectors in the closed form: past a few large ones the eigenvalues lie close together, and there
  they converge slowly.

Limits. The rank is given, not chosen. The loss is that of one matrix on the calibration inputs; L has r(N + K) free numbers and
overfits few tokens sooner than Q does. `closed_form` with its two rounds runs GPTQ six times and solves seven m×m eigenproblems
in fp64, each 2 s for m = 2048 on one CPU core and growing with m³.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.formats.grid import Grid, Quantized, restore
from compress.passes import gptq_core
from compress.passes.gptq_core import Factor, Solved

Hessian = Tensor | Factor | None  # H itself [K, K], or what `gptq_core.factor` made of it; None is the identity
Factors = Callable[[Tensor], Tensor]  # a factor, A [r, K] or Bᵀ [r, N], as the format that stores it will give it back

_OVERSAMPLED, _POWER = 10, 2  # the range finder: columns beyond the rank, and power iterations
_EXACT = 256  # up to this many rows or columns an exact SVD is as fast
_LEAST = 1e-4  # of the largest: weights of rows and columns are held above it, so that they can be divided by


@dataclass(frozen=True, eq=False)
class Split:
    """W ≈ decode(codes [N, K], grid [N, G]) + B A, and what each output lost with the factors as they are stored.

    `loss_n`, `rounding_loss_n` (to nearest, uncorrected) and `energy_n` (of W) are in one unit: that of H, as in
    `gptq_core.Solved`, or that of the weights given to `alternate`. `losses_by_round` are the totals of the iterates as they were
    made; the least of them is the one at hand.
    """

    codes: Tensor
    grid: Grid
    A_rk: Tensor
    B_nr: Tensor
    loss_n: Tensor
    rounding_loss_n: Tensor
    energy_n: Tensor
    losses_by_round: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def weights(self, fmt: Quantized) -> Tensor:
        """The matrix [N, K] that is deployed, Q + B A."""
        return torch.addmm(restore(self.codes, self.grid, fmt).to(self.A_rk.dtype), self.B_nr, self.A_rk)


# --- the closed form ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_losses(E_nk: Tensor, H: Hessian, g_n: Tensor | None = None) -> Tensor:
    """What the best correction of each rank leaves of tr(G E H Eᵀ): fp64 [m + 1], for the ranks 0 ... m = min(N, K)."""
    S_mm, _ = _small(E_nk if g_n is None else g_n.to(E_nk.dtype).sqrt()[:, None] * E_nk, H)
    tails = torch.linalg.eigvalsh(S_mm).clamp_(min=0).cumsum(0)
    return torch.cat([tails.flip(0), tails.new_zeros(1)])


@torch.no_grad()
def correction(E_nk: Tensor, H: Hessian, rank: int, g_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] for which tr(G (E - BA) H (E - BA)ᵀ) is least; see the head of this file.

    `g_n` weighs the outputs; zeros are allowed. Without it the columns of B are orthonormal. A rank above min(N, K) is filled
    up with zeros.
    """
    T_nk, root_n = _weighted(E_nk, g_n)
    S_mm, P_nm = _small(T_nk, H)
    U_mr = torch.linalg.eigh(S_mm)[1].flip(1)[:, :rank].to(E_nk.dtype)
    U_nr = U_mr if P_nm is None else P_nm @ U_mr
    return _filled(U_nr.T @ T_nk, U_nr / root_n[:, None], rank)


def _weighted(E_nk: Tensor, g_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """G^½ E and the diagonal of G^½, which can be divided by."""
    if g_n is None:
        return E_nk, E_nk.new_ones(len(E_nk))
    root_n = _positive(g_n.to(E_nk.dtype).sqrt())
    return root_n[:, None] * E_nk, root_n


def _positive(x: Tensor) -> Tensor:
    """Weights relative to the largest, and at least _LEAST: rows and columns that nothing reached are corrected with the rest."""
    largest = x.max()
    return (x / largest).clamp_(min=_LEAST) if bool(largest > 0) else torch.ones_like(x)


def _small(E_nk: Tensor, H: Hessian) -> tuple[Tensor, Tensor | None]:
    """E H Eᵀ in fp64, or where N > K the K×K matrix S and orthonormal columns P with E H Eᵀ = P S Pᵀ."""
    P_nk = None
    if E_nk.shape[0] > E_nk.shape[1]:
        P_nk, E_nk = torch.linalg.qr(E_nk)
    X, XH = _times(E_nk, H)
    return (XH @ X.T).double(), P_nk


def _times(X_nk: Tensor, H: Hessian) -> tuple[Tensor, Tensor]:
    """X and XH, the columns of both in the order in which `H` holds the inputs."""
    if H is None:
        return X_nk, X_nk
    if isinstance(H, Tensor):
        return X_nk, X_nk @ H
    X_nk = X_nk.index_select(1, H.order_k)
    if H.lam == 0:  # the identity
        return X_nk, X_nk
    return X_nk, (X_nk @ H.A_kk).sub_(X_nk, alpha=H.lam)


def _loss(D_nk: Tensor, H: Hessian) -> Tensor:
    """tr(Δ H Δᵀ) by outputs."""
    D, DH = _times(D_nk, H)
    return (D * DH).sum(1).clamp_(min=0)


def _filled(A_rk: Tensor, B_nr: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = rank - len(A_rk)
    return pad(A_rk, (0, 0, 0, short)), pad(B_nr, (0, short))


# --- with GPTQ ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def closed_form(
    W_nk: Tensor,
    f: Factor,
    fmt: Quantized,
    rank: int,
    *,
    clip: str = "mse",
    scale_dtype: torch.dtype = torch.bfloat16,
    rounds: int = 2,
    factors: Factors | None = None,
    start: Solved | None = None,
    g_n: Tensor | None = None,
) -> Split:
    """GPTQ and the closed form fitted to each other: the best over `rounds` rounds from each end.

    `start` is GPTQ of W with the same options, where it is at hand. `factors` rounds each factor as it will be stored. `g_n`
    weighs the outputs in the choice of L and of the best iterate; `losses_by_round` are then weighted, `loss_n` is not. The
    iterates are GPTQ alone, 1 + `rounds` from Q first, and as many from L first. Never worse than GPTQ alone: where rounded
    factors do harm, they are zero, and a note says so.
    """
    W_nk = W_nk.to(f.L_kk.dtype)
    solve = partial(gptq_core.quantize, f=f, fmt=fmt, clip=clip, scale_dtype=scale_dtype)
    fit = partial(_stored, H=f, rank=rank, factors=factors or _exactly, g_n=g_n)
    first = start or solve(W_nk)

    def tried(s: Solved, E_nk: Tensor, A_rk: Tensor, B_nr: Tensor) -> Split:
        loss_n = _loss(_without(E_nk, A_rk, B_nr), f)
        return Split(s.codes, s.grid, A_rk, B_nr, loss_n, first.rounding_loss_n, first.energy_n, notes=first.notes)

    def corrected(s: Solved) -> Split:
        E_nk = W_nk - restore(s.codes, s.grid, fmt)
        return tried(s, E_nk, *fit(E_nk))

    none = _filled(W_nk[:0], W_nk[:, :0], rank)
    seen = [tried(first, W_nk - restore(first.codes, first.grid, fmt), *none)]
    for s in (first, solve(_without(W_nk, *fit(W_nk)))) if rank else ():
        seen.append(corrected(s))
        for _ in range(rounds):
            seen.append(corrected(solve(_without(W_nk, seen[-1].A_rk, seen[-1].B_nr))))
    best = min(seen, key=partial(_total, g_n=g_n))
    harmful = rank and best is seen[0] and _total(best, g_n) > 0
    notes = ("the correction does not pay with factors rounded so coarsely; it is zero",) if harmful else ()
    return replace(best, losses_by_round=tuple(_total(s, g_n) for s in seen), notes=best.notes + notes)


def _exactly(x: Tensor) -> Tensor:
    return x


def _without(W_nk: Tensor, A_rk: Tensor, B_nr: Tensor) -> Tensor:
    return torch.addmm(W_nk, B_nr, A_rk, alpha=-1)


def _stored(E_nk: Tensor, H: Hessian, rank: int, factors: Factors, g_n: Tensor | None) -> tuple[Tensor, Tensor]:
    """The correction as it will be stored: B rounded, then the A that is best beside the rounded B, rounded.

    That A is the least-squares solution of BA = E, each row weighted by g_n; it is the same for every H.
    """
    B_nr = factors(correction(E_nk, H, rank, g_n)[1].T).T.to(E_nk.dtype)
    T_nk, root_n = _weighted(E_nk, g_n)
    return factors(torch.linalg.pinv(root_n[:, None] * B_nr) @ T_nk).to(E_nk.dtype), B_nr


def _total(s: Split, g_n: Tensor | None) -> float:
    return float((s.loss_n if g_n is None else s.loss_n * g_n).sum(dtype=torch.float64))


# --- as LQ-LoRA published it --------------------------------------------------------------------------------------------


@torch.no_grad()
def alternate(
    W_nk: Tensor,
    fmt: Quantized,
    rank: int,
    *,
    generator: torch.Generator,
    row_n: Tensor | None = None,
    col_k: Tensor | None = None,
    weight_nk: Tensor | None = None,
    iterations: int = 100,
    clip: str = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    factors: Factors | None = None,
) -> Split:
    """L <- SVD_r(W - Q), Q <- W - L rounded to nearest, from Q = 0 and until |W - Q - L| no longer falls.

    `weight_nk` is the diagonal of the Fisher information F. The SVD is then that of D_row (W - Q) D_col, with D_row² and D_col²
    the means of F over rows and columns, since the best L under any F is NP-hard to find; the error is |√F (W - Q - L)|, with F
    in full. `row_n` and `col_k` replace D_row and D_col; without F they weigh the error too. Rounding knows no weights.
    """
    row_n, col_k = _roots(W_nk, row_n, col_k, weight_nk)
    F_nk = row_n.square()[:, None] * col_k.square() if weight_nk is None else weight_nk.float()
    root_n, root_k = _positive(row_n), _positive(col_k)
    nearest = partial(gptq_core.round_to_nearest, f=None, fmt=fmt, clip=clip, scale_dtype=scale_dtype)
    rounded, stored = nearest(W_nk), factors or _exactly
    W_nk = W_nk.float()
    plain_n, energy_n = _squares(W_nk - restore(rounded.codes, rounded.grid, fmt), F_nk), _squares(W_nk, F_nk)
    Q_nk, best, losses = torch.zeros_like(W_nk), None, list[float]()
    for _ in range(iterations):
        A_rk, B_nr = _svd(root_n[:, None] * (W_nk - Q_nk) * root_k, rank, generator)
        A_rk, B_nr = A_rk / root_k, B_nr / root_n[:, None]
        if rank > 0:
            A_rk, B_nr = stored(A_rk).float(), stored(B_nr.T).T.float()
        R_nk = _without(W_nk, A_rk, B_nr)
        s = nearest(R_nk)
        Q_nk = restore(s.codes, s.grid, fmt)
        loss_n = _squares(R_nk - Q_nk, F_nk)
        losses.append(float(loss_n.sum(dtype=torch.float64)))
        if best is not None and losses[-1] >= losses[-2]:
            break  # the published code keeps this iterate, which is the worse one
        best = Split(s.codes, s.grid, A_rk, B_nr, loss_n, plain_n, energy_n)
    assert best is not None, "at least one iteration"
    return replace(best, losses_by_round=tuple(losses))


def _roots(W_nk: Tensor, row_n: Tensor | None, col_k: Tensor | None, F_nk: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonals of D_row and D_col: as given, or from F, or ones."""
    ones = W_nk.new_ones(()).float()
    if F_nk is not None:
        row_n = F_nk.float().mean(1).sqrt() if row_n is None else row_n
        col_k = F_nk.float().mean(0).sqrt() if col_k is None else col_k
    row_n = ones.expand(W_nk.shape[0]) if row_n is None else row_n.float()
    col_k = ones.expand(W_nk.shape[1]) if col_k is None else col_k.float()
    return row_n, col_k


def _squares(D_nk: Tensor, F_nk: Tensor) -> Tensor:
    return D_nk.square().mul_(F_nk).sum(1)


def _svd(M_nk: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """√S Vᵀ [r, K] and U √S [N, r] of the leading part U S Vᵀ of M; above _EXACT by a seeded range finder (arXiv 0909.4061)."""
    columns = rank + _OVERSAMPLED
    if min(M_nk.shape) <= max(_EXACT, 2 * columns):
        U, S, V = torch.linalg.svd(M_nk, full_matrices=False)
    else:
        X = torch.randn(M_nk.shape[1], columns, generator=generator, device=generator.device).to(M_nk)
        P = torch.linalg.qr(M_nk @ X)[0]
        for _ in range(_POWER):
            P = torch.linalg.qr(M_nk @ torch.linalg.qr(M_nk.T @ P)[0])[0]
        U, S, V = torch.linalg.svd(P.T @ M_nk, full_matrices=False)
        U = P @ U
    half = S[:rank].sqrt()
    return _filled(half[:, None] * V[:rank], U[:, :rank] * half, rank)
