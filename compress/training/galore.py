"""GaLore: AdamW in a subspace of a matrix's gradient (Zhao et al., arXiv 2403.03507).

Of a matrix W [m, n], m <= n (a tall one is taken by its transpose), G its gradient, every T steps (algorithm 2)

    P [m, r]   the r first left singular vectors of G           (equations 12 and 13; the shorter side alone, section 4.2)
    R = Pᵀ G   the gradient in the subspace [r, n]               (equation 8)
    N          what an optimizer makes of R, as if R were all there is
    W ← W - ρ √(m/r) P N                                         (equation 9 with α = √(m/r))

so 2 rn + rm numbers are kept instead of 2mn. P has orthonormal columns, so without α a number moves √(r/m) ρ: α makes it ρ, as
everywhere here, and a `rate` means the same for every rank (the paper takes α = 0.25 and rates that suit it). Means are neither
reset nor turned where P changes, as in the paper's code, but of a singular vector and its opposite the one is taken that lies on
the side of the old: decompositions return either, and a mean of the other's sign would push back.

Singular vectors are found by a randomized range finder with two power iterations and eight vectors more than asked for (Halko
et al., arXiv 0909.4061, algorithms 4.4 and 5.1; GaLore 2, 2504.20437, does so too): a full decomposition of 4096 x 11008 takes
seconds. Any rule can be the optimizer inside; here it is AdamW, or AdamW in bytes. A gradient that is no number keeps the old
P. For embeddings and heads, whose gradients are sparse and whose decomposition is huge, and for what is no matrix of a block,
the optimizer inside is used as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.model.seeds import seeded
from compress.training.optimizers import STEP, Kinds, Remembered, Rule, Shape, direction

MORE, POWERS = 8, 2  # vectors beside those asked for; how often the range is improved


class Galore:
    """inside: the optimizer of what is projected. rank: of P, None for a quarter of the shorter side. gap: T."""

    def __init__(self, inside: Rule, rank: int | None, gap: int):
        self.inside, self.rank, self.gap = inside, rank, gap

    def rank_of(self, shape: Shape) -> int:
        return min(min(shape), self.rank or max(1, min(shape) // 4))

    def remembers(self, shape: Shape) -> Kinds:
        r = self.rank_of(shape)
        within = self.inside.remembers((r, max(shape)))
        return {**{f"inside.{n}": kind for n, kind in within.items()}, "P": ((min(shape), r), torch.float32),
                "steps": STEP["step"]}  # fmt: skip

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        wide = g.shape[0] <= g.shape[1]
        G_mn, P_mr, steps = g if wide else g.T, kept["P"], int(kept["steps"])
        if steps % self.gap == 0 and bool(G_mn.isfinite().all()):
            found = leading(G_mn, P_mr.shape[1], steps)
            P_mr.copy_(found * torch.where((found * P_mr).sum(0) < 0, -1.0, 1.0))
        kept["steps"] += 1
        within = {n.removeprefix("inside."): t for n, t in kept.items() if n.startswith("inside.")}
        N_rn = direction(self.inside, P_mr.T @ G_mn, within)
        (p if wide else p.T).addmm_(P_mr, N_rn, alpha=-rate * math.sqrt(P_mr.shape[0] / P_mr.shape[1]))


def leading(G_mn: Tensor, r: int, number: int) -> Tensor:
    """The r first left singular vectors of a matrix [m, r], m <= n; `number` tells draws apart."""
    m, n = G_mn.shape
    if r + MORE >= m:
        Q = torch.eye(m, device=G_mn.device)
    else:
        drawn = torch.randn(n, r + MORE, generator=seeded(number, f"range {m} {n}")).to(G_mn.device)
        Q = torch.linalg.qr(G_mn @ drawn)[0]
        for _ in range(POWERS):
            Q = torch.linalg.qr(G_mn @ torch.linalg.qr(G_mn.T @ Q)[0])[0]
    R = torch.linalg.qr((Q.T @ G_mn).T)[1]  # of the short side alone: Qᵀ G = Rᵀ (orthonormal)
    found: Tensor = (Q @ torch.linalg.svd(R.T)[0])[:, :r]
    return found
