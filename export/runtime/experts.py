"""The experts of a mixture, each matrix packed by itself, in the place of transformers' module with two tensors for all.

Experts that stay dense beside packed ones are ordinary Linears. Tokens are sorted by expert in the plain loop of transformers
("eager"), whose steps depend on the data: such a model runs and generates, and is compiled around this module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROLES = ("gate", "up", "down")


class PackedExperts(nn.Module):
    """`stock` is transformers' module, whose activation is taken; `matrices` has the module of every expert and role."""

    def __init__(self, stock: Any, matrices: dict[tuple[int, str], nn.Module]):
        super().__init__()
        self.count = 1 + max(expert for expert, _ in matrices)
        for role in ROLES:
            self.add_module(role, nn.ModuleList([matrices[e, role] for e in range(self.count)]))
        for name in ("gate_up_proj", "down_proj"):
            delattr(stock, name)
        stock._is_hf_initialized = True  # transformers need not look for what is gone
        self.stock = stock

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [t, in], the experts chosen [t, top] and their weights [t, top] -> [t, in]."""
        out = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            if expert < self.count:  # one more stands for none
                token, place = torch.where(chosen == expert)
                x = hidden[token]
                gate, up, down = (self.get_submodule(f"{role}.{expert}") for role in ROLES)
                x = down(self.stock._apply_gate(torch.cat([gate(x), up(x)], -1)))
                out.index_add_(0, token, (x * weights[token, place, None]).to(out.dtype))
        return out
