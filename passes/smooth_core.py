"""Activation-aware scaling: input k of a matrix is multiplied by s_k in the weights and divided by it where the input is made.

    y = W x = (W diag(s)) (diag(s)⁻¹ x),   s_k = a_k^α,   a_k = √H_kk, the root mean square of input k

A quantizer spends the same grid on large and small inputs; with s > 1 on inputs of large activation their weights are larger
than those of the same group and lose less (AWQ, arXiv 2306.00978, section 3.2; there a_k is the mean magnitude). α is searched;
α = 0 is no scaling.

Where inputs are rounded as well as weights, what is large in one is to be even with the other (SmoothQuant, arXiv 2211.10438,
equation 4), and both by their largest magnitudes, which set a token's scale and a row's:

    s_k = x_k^α / w_k^(1-α),   x_k = max |X_tk|,   w_k = max |W_nk|

Powers of two for s would fold into weights of any float format without rounding. They were tried and buy nothing: on a trained
model of 0.28 M weights the gain of the search at 3 bits vanished, since most useful scales lie between 1/2 and 2. So s is free,
and a 16-bit model is rounded once more, by far less than a step of the grid.

    rows      where several inputs are made by one row (the query heads of a group read one row of v), they share its scale
    H'        diag(s)⁻¹ H diag(s)⁻¹, the Hessian of the scaled inputs; the error of Ŵ' for W' = W diag(s) is tr(ΔH'Δᵀ),
              Δ = Ŵ' - W'

Legend: N outputs, K inputs, R rows of the producer.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0**6  # and 1 / LARGEST: beyond, fp16 weights would lose digits


def scales(diag_k: Tensor, alpha: float, rows_k: Tensor | None = None) -> Tensor:
    """s [K] > 0 of the mean squares of the inputs, diag H [K]; equal where `rows_k` [K] says the same row.

    An input that was never seen keeps the scale 1. The geometric middle of the range is 1.
    """
    power_k, seen_k = _by_rows(diag_k, rows_k)
    return _centred(0.5 * alpha * power_k.log2(), seen_k, alpha)


def balanced(largest_k: Tensor, weight_k: Tensor, alpha: float, rows_k: Tensor | None = None) -> Tensor:
    """The same of the largest magnitudes of the inputs [K] and of the weights that they meet [K]; 1 at alpha 0."""
    largest_k, seen_k = _by_rows(largest_k, rows_k)
    weight_k, _ = _by_rows(weight_k.clamp(min=1e-6), rows_k)
    return _centred(alpha * largest_k.log2() - (1 - alpha) * weight_k.log2(), seen_k, alpha)


def _by_rows(size_k: Tensor, rows_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sizes [K] > 0, the mean of those that one row makes; and which were seen."""
    seen_k, size_k = size_k > 0, size_k.clamp(min=torch.finfo(torch.float32).tiny)
    if rows_k is None:
        return size_k, seen_k
    total = torch.zeros(int(rows_k.max()) + 1, dtype=size_k.dtype, device=size_k.device)
    count = total.clone().index_add_(0, rows_k, seen_k.to(size_k.dtype))
    size_k = (total.index_add_(0, rows_k, size_k * seen_k) / count.clamp(min=1))[rows_k]
    return size_k.clamp(min=torch.finfo(torch.float32).tiny), count[rows_k] > 0


def _centred(exponent_k: Tensor, seen_k: Tensor, alpha: float) -> Tensor:
    """Two to these powers, the middle of the range 1; 1 for what was never seen, and all where alpha is 0."""
    if alpha == 0 or not bool(seen_k.any()):
        return torch.ones_like(exponent_k)
    exponent_k = exponent_k - (exponent_k[seen_k].max() + exponent_k[seen_k].min()) / 2
    s_k = exponent_k.exp2().clamp(1 / LARGEST, LARGEST)
    return torch.where(seen_k, s_k, torch.ones_like(s_k))


def scaled(H_kk: Tensor, s_k: Tensor) -> Tensor:
    """H', the Hessian of inputs that were divided by s."""
    return H_kk / s_k[:, None] / s_k


def error(made_nk: Tensor, W_nk: Tensor, H_kk: Tensor) -> float:
    """tr(ΔHΔᵀ)."""
    D_nk = made_nk - W_nk
    return float(((D_nk @ H_kk) * D_nk).sum())


def divided_norm(weight_k: Tensor, s_k: Tensor, offset: float) -> Tensor:
    """The weight of a norm x̂ (offset + weight) that gives 1/s of what it gave."""
    return (weight_k.double() + offset) / s_k.double() - offset


def divided_rows(W_nk: Tensor, rows_k: Tensor, s_k: Tensor) -> Tensor:
    """W [N, K] (or a bias [N]) with each row that makes input k divided by s_k; rows that make none stay."""
    by_row = torch.ones(len(W_nk), dtype=torch.float64)
    by_row[rows_k] = s_k.double().cpu()
    return W_nk.double() / (by_row[:, None] if W_nk.ndim == 2 else by_row)
