"""The forward of a module of experts with a pause in front of each matrix, in place of transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from transformers.integrations import moe

from compress.model.skeleton import is_experts


@dataclass(frozen=True, eq=False)
class Routing:
    """Where a mixture of `experts` experts sent some tokens, and what came of it.

    hidden [tokens, width]: what the experts were given. index [tokens, slots]: the experts of each token; one beyond the last
    leaves the slot empty. weights [tokens, slots]: the gate's. norms [tokens, slots]: ‖f(x)‖₂ of what each put out, unweighted.
    """

    experts: int
    hidden: Tensor
    index: Tensor
    weights: Tensor
    norms: Tensor

    def by_expert(self, values: Tensor) -> Tensor:
        """Values of slots [tokens, slots] by expert [tokens, experts], in fp32; zero where a token was not sent."""
        found = values.new_zeros(len(values), self.experts + 1, dtype=torch.float32)
        return found.scatter_(1, self.index.clamp(max=self.experts), values.float())[:, : self.experts]


@contextmanager
def foreseeable() -> Iterator[None]:
    """Inside, mixtures run on fake tensors: torch cannot say what its product of groups gives in fp32. transformers' own, for
    machines without that one, keeps the same for the way back."""
    before = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = before


def run_experts_one_by_one(block: nn.Module) -> None:
    """Replace the forward of every experts module by one that visits experts in order and pauses at its taps."""
    for module in block.modules():
        if is_experts(module):
            module.forward = Experts(module)


@contextmanager
def heard(block: nn.Module, hear: Callable[[Routing], None]) -> Iterator[None]:
    """Inside, `hear` is told of every batch that passes through the experts of a block."""
    found: list[Any] = [module for module in block.modules() if is_experts(module)]
    for module in found:
        module.hear = hear
    try:
        yield
    finally:
        for module in found:
            del module.hear


class Experts:
    """The forward of a module of experts: real routing, one expert after the other.

    The result is sum over experts of weight * down(act(gate(x)) * up(x)), accumulated in the order of the experts, as in
    transformers' own loop. How gate and up meet is the module's own method: some architectures clamp there.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        m: Any = self.module
        count = m.gate_up_proj.shape[0]
        routed = [torch.where(top_k_index == e) for e in range(count)]
        inputs = {e: hidden[token] for e, (token, _) in enumerate(routed)}
        self._pause("experts.in", inputs)
        middle = {}
        for e, x in inputs.items():
            y = nn.functional.linear(x, m.gate_up_proj[e])
            self._show(e, ("gate", "up"), x, y)
            middle[e] = m._apply_gate(y)
        self._pause("experts.mid", middle)
        out = torch.zeros_like(hidden)
        hear = getattr(m, "hear", None)
        norms = torch.zeros_like(top_k_weights, dtype=torch.float32)
        for e, (token, slot) in enumerate(routed):
            y = nn.functional.linear(middle[e], m.down_proj[e])
            self._show(e, ("down",), middle[e], y)
            if hear:
                norms[token, slot] = y.float().norm(dim=-1)
            out.index_add_(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        if hear:
            hear(Routing(count, hidden, top_k_index, top_k_weights, norms))
        return out

    def _pause(self, stage: str, inputs: dict[int | None, Tensor] | dict[int, Tensor]) -> None:
        if stage in getattr(self.module, "taps", ()):
            greenlet.getcurrent().parent.switch((stage, inputs, None))

    def _show(self, expert: int, roles: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        """Who watches (model/backward.py) is shown an expert's inputs and the outputs of the matrices of these roles."""
        if watch := getattr(self.module, "watch", None):
            watch(expert, roles, x, y)
