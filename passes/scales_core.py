"""Scales of outputs: where they begin, and the best of them once all else is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.grid import round_scale
from compress.passes import gptq_core as core


@dataclass(frozen=True)
class Fitted:
    """Scales [N], and by outputs the loss then, and the energy of W."""

    scale_n: Tensor
    loss_n: Tensor
    energy_n: Tensor


def sizes(W_nk: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each output [N]: its root mean square."""
    return round_scale(W_nk.square().mean(1).sqrt(), scale_dtype)


def refitted(W_nk: Tensor, ones: Callable[[slice], Tensor], scale_n: Tensor, f: core.Factor, step: int) -> Fitted:
    """The scales [N], t = wᵀHq / qᵀHq, under which matrices come nearest to W in H + λI; `ones` gives rows q of what is scaled,
    and `step` rows are in hand at once."""
    scales, losses, energies = list[Tensor](), list[Tensor](), list[Tensor]()
    for i in range(0, len(W_nk), step):
        rows = slice(i, min(len(W_nk), i + step))
        W, one, scale = W_nk[rows], ones(rows), scale_n[rows]
        Q, P = (x.index_select(1, f.order_k).to(f.L_kk.dtype) for x in (one, W))
        HQ = Q if f.lam == 0 else Q @ f.A_kk
        best = (P * HQ).sum(1) / (Q * HQ).sum(1)
        scales.append(torch.where(best.isfinite() & (best > 0), round_scale(best, scale.dtype), scale))
        losses.append(core.loss(one * scales[-1].float()[:, None] - W, f))
        energies.append(core.loss(W, f))
    return Fitted(torch.cat(scales), torch.cat(losses), torch.cat(energies))
