"""Scales of outputs: where they begin, and the best of them once all else is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.grid import refuse_nan, round_scale
from compress.passes import gptq_core as core
from compress.passes.rows import Matrix, parts


@dataclass(frozen=True)
class Fitted:
    """Scales [N], and by outputs the loss then, and the energy of W; off_n: the squared change of its weights."""

    scale_n: Tensor
    loss_n: Tensor
    energy_n: Tensor
    off_n: Tensor


def sizes(W_nk: Matrix, scale_dtype: torch.dtype, step: int) -> Tensor:
    """The scale of each output [N]: its root mean square. FormatError where W is not finite."""
    found = []
    for rows in parts(W_nk, step):
        refuse_nan(W := W_nk[rows])
        found.append(round_scale(W.square().mean(1).sqrt(), scale_dtype))
    return torch.cat(found)


def refitted(W_nk: Matrix, ones: Callable[[slice], Tensor], scale_n: Tensor, f: core.Factor, step: int) -> Fitted:
    """The scales [N], t = wᵀHq / qᵀHq, under which matrices come nearest to W in H + λI; `ones` gives rows q of what is scaled,
    and `step` rows are in hand at once."""
    scales, losses, energies, squares = (list[Tensor]() for _ in range(4))
    for rows in parts(W_nk, step):
        W, one, scale = W_nk[rows], ones(rows), scale_n[rows]
        Q, P = (x.index_select(1, f.order_k).to(f.L_kk.dtype) for x in (one, W))
        HQ = Q if f.lam == 0 else Q @ f.A_kk
        best = (P * HQ).sum(1) / (Q * HQ).sum(1)
        scales.append(torch.where(best.isfinite() & (best > 0), round_scale(best, scale.dtype), scale))
        off = one * scales[-1].float()[:, None] - W
        losses.append(core.loss(off, f))
        energies.append(core.loss(W, f))
        squares.append(off.square().sum(1))
    return Fitted(*(torch.cat(x) for x in (scales, losses, energies, squares)))
