"""What blocks take, for estimates: of time for each token on its way through them, of memory for one in hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import Any

from compress.model.speed import computing
from compress.state import State

USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")  # names of it in configs


@dataclass(frozen=True)
class Work:
    """weights: entries of matrices that a token is multiplied with. numbers: what those read and write; all else that blocks do
    goes with it. squares: of inputs, by all Hessians: their operations, where these use the symmetry."""

    weights: float
    numbers: float
    squares: float


def per_token(state: State) -> Work:
    """The work for one token; of experts, for as many as it is sent to."""
    used, experts = experts_used(state), Counter((s.block, s.role) for s in state.graph.linear if s.expert is not None)
    sites = [(s, 1.0 if s.expert is None else min(1.0, used / experts[s.block, s.role])) for s in state.graph.linear]
    keys = {(s.block, s.input_key): (s.shape[1], share) for s, share in sites}
    return Work(
        sum(share * s.numel for s, share in sites),
        sum(share * sum(s.shape) for s, share in sites),
        sum(share * k * k for k, share in keys.values()),
    )


def block_bytes(state: State) -> int:
    """Bytes of the largest block's matrices, as it computes."""
    largest = max(sum(s.numel for s in state.graph.of_block(b.index)) for b in state.graph.blocks)
    return largest * computing(state.dtype).itemsize


def experts_used(state: State) -> float:
    """How many experts of a block a token is sent to; all, where no config says so."""
    config: Any = state.config.get_text_config()
    return next((getattr(config, name) for name in USED if isinstance(getattr(config, name, None), int)), inf)
