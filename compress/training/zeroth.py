"""No gradient at all: what the loss does along a direction says how far to go along it (MeZO, LOZO).

With z a direction over everything that learns, drawn anew for every step, and s the size of each tensor, so that ε is a share
of it as a rate is (MeZO, arXiv 2305.17333, definition 1, for s = 1):

    c = [F(θ + ε s z) - F(θ - ε s z)] / 2ε                the slope along z, from two forward passes
    θ ← θ - ρ (c / √v) s z,    v the mean of c² so far    (decay 0.9, corrected for its start)

c is one number whose size nobody knows beforehand; divided by its own mean size it leaves ρ to say how far a step goes. It
changes no direction. z is a Gaussian for mezo and for tensors that are no matrices; for lozo, of a matrix [m, n] (arXiv
2410.07698, equation 4),

    z = U Vᵀ / √r,    U [m, r] drawn for every step, V [n, r] every `lazy` steps

A direction is never kept: it is drawn again from the seed, the step and the tensor's name whenever it is gone along, some rows
at a time. Four times a step: forth, twice as far back, forth again, and the step. So it is the same each time, and V is that of
its period in the step that begins one as well, which LOZO's own code draws from another place in its stream. State: v and its
count.

What learns is used as it will be stored, so nothing here differs for packed weights, scales, norms and factors, nor does
anything need a way back. But what is stored in 16 bits does not see a change of less than a 256th of a number: that is why ε is
a hundredth.

Limits. A step of N numbers by one number c is worth little: its direction has a cosine of about 1/√N with the gradient's. It is
for few parameters, and where there is no way back at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compress.model.seeds import seeded
from compress.training.gradients import Pass
from compress.training.moving import Optimizer
from compress.training.optimizers import pieces
from compress.training.options import ZerothOrder

DECAY, RANK, LAZY = 0.9, 2, 50


class Directions:
    """Stands in the place of gradients (`Slopes`). rate: what rates are, of a tensor's size."""

    def __init__(self, optimizer: Optimizer, options: ZerothOrder, rate: float, seed: int):
        self.optimizer, self.options, self.rate, self.seed = optimizer, options, rate, seed
        self.mean = torch.zeros(2, dtype=torch.float64)  # of c², and how many there were

    def behind(self) -> None:
        """There are no gradients."""

    def step(self, number: int, share: float, learn: Pass, look: Pass) -> float:
        epsilon, found = self.options.epsilon, []
        for far in (epsilon, -2 * epsilon):
            self.go(number, far)
            found.append(look())
        self.go(number, epsilon)
        slope = (found[0] - found[1]) / (2 * epsilon)
        if math.isfinite(slope):
            self.mean[0].mul_(DECAY).add_((1 - DECAY) * slope**2)
            self.mean[1] += 1
            usual = math.sqrt(float(self.mean[0]) / (1 - DECAY ** float(self.mean[1])))
            self.go(number, -self.rate * share * slope / usual if usual else 0.0)
        return sum(found) / 2

    def go(self, number: int, far: float) -> None:
        """Move everything along the direction of a step, by a share of its size."""
        for name, p in self.optimizer.learns.items():
            size = self.optimizer.rates[name] / self.rate
            rows_of = p.data if p.dim() == 2 else p.data[None]
            for rows, z in zip(pieces(rows_of), self.drawn(number, name, rows_of.shape), strict=True):
                rows_of[rows].add_(z.to(p.device), alpha=far * size)

    def drawn(self, number: int, name: str, shape: torch.Size) -> Iterator[Tensor]:
        """The direction of one tensor in a step, as `pieces` of its rows."""
        every, rank = seeded(self.seed, f"{name} {number}"), self.options.rank or RANK
        parts = [len(range(*rows.indices(shape[0]))) for rows in pieces(torch.empty(shape, device="meta"))]
        if self.options.kind == "mezo" or min(shape) <= rank:
            yield from (torch.randn(rows, *shape[1:], generator=every) for rows in parts)
            return
        V_nr = torch.randn(shape[1], rank, generator=seeded(self.seed, f"{name} columns {number // (self.options.lazy or LAZY)}"))
        yield from (torch.randn(rows, rank, generator=every) @ V_nr.T / math.sqrt(rank) for rows in parts)

    # --- on disk ---

    def tensors(self) -> dict[str, Tensor]:
        return {"direction/mean": self.mean}

    def take(self, tensor: Tensor) -> None:
        self.mean = tensor.clone()
