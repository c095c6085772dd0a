"""W ≈ B A: a matrix as the product of two smaller ones, which have fewer weights. Pure functions on tensors.

Shapes. N outputs, K inputs, rank r, m = min(N, K); letters after an underscore are dimensions: A_rk [r, K], B_nr [N, r]. A layer
then computes B(Ax), with r(N + K) multiplications a token in place of N K: fewer below the rank N K / (N + K), at which they are
as many.

The problem. Over inputs X_tk, with H = XᵀX, the outputs miss tr((W - BA) H (W - BA)ᵀ). With any root H = C Cᵀ this is |WC -
BAC|², and since AC may be any matrix of rank r where C is invertible, the best product is the truncated singular value
decomposition of W C, with C taken off again (Eckart-Young; SVD-LLM, arXiv 2403.07378, calls C⁻¹ whitening). What is left is the
sum of the squared singular values behind the r-th.

The form used here needs no root and no inverse. With U_r the r leading eigenvectors of W H Wᵀ, the left singular vectors of W C,
SVD_r(WC) C⁻¹ = U_r U_rᵀ W: the outputs are projected on the r directions in which they have most energy. So B = U_r, A = U_rᵀ W,
and H may be singular, as where there were fewer tokens than inputs. That is the correction of `lqlora_core`, of all of W. A and
B share the size: A H Aᵀ = diag(σ²), so a row of A is divided by √σ, and a column of B multiplied. Then BᵀB = A H Aᵀ = diag(σ):
rows of A are independent of each other in what they cost, and so are columns of B, which is what a quantizer that takes rows one
by one assumes; and neither factor leaves the range of 16 bits.

H is damped as GPTQ's is (H + λI). With few tokens the undamped form projects on directions that only these tokens have.

Alternatives not taken.
- SVD of W itself: the best product in the norm of the weights, which is the wrong norm. It is there as `method: svd`, for what
  has no data: `H` is None.
- C by Cholesky, its inverse by substitution, as SVD-LLM has it: the same product, from a worse conditioned problem.
- The mean of outputs taken off first (a bias of its own): engines would need a bias where the model has none.
- Fitting B and A in turn to the loss of the model by gradients: it is training.

Ranks (`program`). Given what every rank of every matrix loses, choose ranks that lose least in sum and take no more weights than
allowed. Each matrix is a curve of (weights, loss), falling, and convex where its points are ranks alone, since singular values
fall. Taking always the step that saves most loss for a weight, over the lower convex hulls of the curves, visits exactly the
points where the sum is least for as many weights as were taken until then: a choice that loses less would have a cheaper step
somewhere, which had been taken before. So what is found is exact but for the steps that no longer fit, which are passed over for
smaller ones. To leave a matrix as it is is a point of its curve as well: N K weights, no loss.

Limits. Low rank is no method for size: a matrix that training has filled has singular values that fall slowly, and at the rank
at which anything is saved much of them is lost already (docs/recipes.md measures it against rounding to 3 bits). The loss is
that of one matrix, on the calibration inputs. The eigenproblem is m x m in fp64, 2 s for m = 2048 on one core, growing with m³.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.passes.gptq_core import Factor
from compress.passes.lqlora_core import correction, rank_losses

ALIKE = 1e-9  # slopes that differ by no more are one, and the point between them stays: slopes are negative
RIDGES = (1e-4, 1e-3, 1e-2)  # of the mean diagonal: what is added to A H Aᵀ where `refit` inverts it, more where that fails
Point = tuple[int, float]  # weights, and the loss that they leave


def even_rank(shape: tuple[int, int]) -> float:
    """The rank at which the factors of a matrix have as many weights as itself."""
    n, k = shape
    return n * k / (n + k)


def rank_of(share: float, shape: tuple[int, int], multiple: int) -> int:
    """So much of `even_rank`: a multiple of `multiple` where there is one below, else the whole number; at least 1."""
    rank = int(share * even_rank(shape) + 1e-9)
    return max(1, rank - rank % multiple if rank >= multiple else rank)


def hessian(f: Factor | None) -> Tensor | None:
    """H + λI [K, K] with its inputs in their own order; None where nothing was seen."""
    if f is None or f.lam == 0:
        return None
    back_k = torch.argsort(f.order_k)
    if bool((back_k[1:] > back_k[:-1]).all()):
        return f.A_kk
    return f.A_kk.index_select(0, back_k).index_select(1, back_k)


@torch.no_grad()
def factors(W_nk: Tensor, H_kk: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] for which tr((W - BA) H (W - BA)ᵀ) is least, in the dtype of W; without `H_kk`, |W - BA|²."""
    A_rk, B_nr = correction(W_nk, H_kk, rank)
    size_r = ((A_rk if H_kk is None else A_rk @ H_kk) * A_rk).sum(1).double().clamp_(min=0)
    least = size_r.max() * torch.finfo(torch.float32).tiny  # a direction in which nothing was put out stays as it is
    root_r = torch.where(size_r > least, size_r, torch.ones_like(size_r)).pow(0.25).to(W_nk.dtype)
    return A_rk / root_r[:, None], B_nr * root_r


@torch.no_grad()
def losses(W_nk: Tensor, H_kk: Tensor | None) -> Tensor:
    """What the best product of each rank loses, as a share of what is put out: fp64 [m + 1], for the ranks 0 ... m."""
    tails = rank_losses(W_nk, H_kk)
    return tails / tails[0] if float(tails[0]) > 0 else torch.zeros_like(tails)


@torch.no_grad()
def refit(W_nk: Tensor, A_rk: Tensor, B_nr: Tensor, H_kk: Tensor) -> tuple[Tensor, Tensor]:
    """The B that is best beside an A that has been changed, and what it is given, G = A H Aᵀ [r, r].

    The least-squares answer is W H Aᵀ G⁻¹. A small ridge draws it towards the B at hand, for what A says little of.
    """
    AH_rk = (A_rk @ H_kk).double()
    G_rr = AH_rk @ A_rk.double().T
    C_nr = W_nk.double() @ AH_rk.T - B_nr.double() @ G_rr
    mean, one_rr = G_rr.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny), torch.eye(len(G_rr)).to(G_rr)
    for ridge in RIDGES:
        L_rr, info = torch.linalg.cholesky_ex(G_rr + ridge * mean * one_rr)
        if int(info) == 0:
            return (B_nr.double() + torch.cholesky_solve(C_nr.T, L_rr).T).to(W_nk.dtype), G_rr.to(W_nk.dtype)
    return B_nr, G_rr.to(W_nk.dtype)  # nothing that could be inverted: what A puts out is not a number, or all but nothing


# --- ranks --------------------------------------------------------------------------------------------------------------


def program(curves: Sequence[Sequence[Point]], most: int) -> list[int]:
    """For each curve the index of its point: the sum of losses least, that of weights at most `most`; see the head of this file.

    The points of a curve come by rising weights. Each curve begins with its first point, whatever `most` is.
    """
    hulls = [hull(points) for points in curves]
    chosen, left = [h[0] for h in hulls], most - sum(points[h[0]][0] for points, h in zip(curves, hulls, strict=True))
    queue = [(_slope(curves[i], h[0], h[1]), i, 1) for i, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(queue)
    while queue:
        _, i, to = heapq.heappop(queue)
        cost = curves[i][hulls[i][to]][0] - curves[i][chosen[i]][0]
        if cost > left:
            continue  # whatever lies behind on this curve costs more
        chosen[i], left = hulls[i][to], left - cost
        if to + 1 < len(hulls[i]):
            heapq.heappush(queue, (_slope(curves[i], chosen[i], hulls[i][to + 1]), i, to + 1))
    return chosen


def hull(points: Sequence[Point]) -> list[int]:
    """The indices of the points on the lower convex hull, from the first to the one of least loss."""
    found: list[int] = []
    for i, point in enumerate(points):
        if found and point[1] >= points[found[-1]][1]:
            continue
        if found and point[0] == points[found[-1]][0]:  # as many weights, and better
            found.pop()
        while len(found) > 1 and _slope(points, found[-1], i) < (1 + ALIKE) * _slope(points, found[-2], found[-1]):
            found.pop()
        found.append(i)
    return found


def _slope(points: Sequence[Point], a: int, b: int) -> float:
    """Loss for a weight, from one point to another: negative, the steepest first."""
    return (points[b][1] - points[a][1]) / max(1, points[b][0] - points[a][0])
