"""What rounding the inputs of a matrix adds to the error of its outputs, on a sample of them.

With Q the rounding of an engine, Ŵ the stored weights and Δ = Ŵ - W, an output is off by

    Q(x)Ŵᵀ - xWᵀ = xΔᵀ + (Q(x) - x)Ŵᵀ

The first part is tr(ΔHΔᵀ), which GPTQ makes small. The second knows nothing of Δ and is hardly correlated with the first, since
rounding errors are about as often up as down; so the two add up, and are measured apart. To solve for Q(x) in place of x was
tried: the Hessian of Q(x) is that of x to three digits, and weights that are moved to undo the rounding of the inputs do worse on
text that they were not moved for. What is left to do about the second part is to choose: scales that go from the inputs into the
weights (`smooth`), or other formats (`allocate`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.formats import Served
from compress.formats.activations import divisor

MOST = 64  # tokens of a batch, evenly spread


@dataclass
class Sample:
    """Some of what the matrices of a stage are given, [t, K] by batches, what each token counts, and for how many they stand."""

    parts: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    seen: int = 0

    def see(self, X_tk: Tensor, weight_t: Tensor | None = None) -> None:
        """Keep some tokens of a batch; without weights each counts once."""
        self.seen += len(X_tk)
        step = max(1, -(-len(X_tk) // MOST))
        self.parts.append(X_tk[::step].float())
        self.weights.append(X_tk.new_ones(len(self.parts[-1])).float() if weight_t is None else weight_t[::step].float())

    @property
    def largest_k(self) -> Tensor:
        """The largest magnitude of each input among them, [K]."""
        return torch.stack([part.abs().amax(0) for part in self.parts if len(part)]).amax(0)

    def loss_n(self, W_nk: Tensor, fmt: Served, s_k: Tensor | None = None) -> Tensor:
        """Σ ((Q(x) - x)Ŵᵀ)² by outputs, over all tokens that were seen. s: what the inputs are divided by before."""
        X_tk = torch.cat(self.parts)
        if not len(X_tk):
            return W_nk.new_zeros(len(W_nk))
        X_tk = X_tk if s_k is None else X_tk / s_k
        number = torch.tensor([divisor(float(X_tk.abs().max()))], device=X_tk.device) if fmt.input.measured else None
        off_tk = fmt.input.round(X_tk, number) - X_tk
        off_tn = (off_tk @ W_nk.T.to(off_tk.dtype)).square()
        return torch.cat(self.weights) @ off_tn * (self.seen / len(X_tk))
