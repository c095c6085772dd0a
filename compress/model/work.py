"""What one token takes on its way through the blocks of a model, for estimates of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.state import State
from compress.state.graph import Site

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
    sites = [(site, _share(site, state)) for site in state.graph.linear]
    keys = {(s.block, s.input_key): (s.shape[1], share) for s, share in sites}
    return Work(
        sum(share * s.numel for s, share in sites),
        sum(share * sum(s.shape) for s, share in sites),
        sum(share * k * k for k, share in keys.values()),
    )


def _share(site: Site, state: State) -> float:
    """Of all tokens, those that a matrix sees."""
    if site.expert is None:
        return 1.0
    config: Any = state.config.get_text_config()
    used = next((getattr(config, name) for name in USED if isinstance(getattr(config, name, None), int)), None)
    experts = sum(s.block == site.block and s.role == site.role for s in state.graph.linear)
    return min(1.0, used / experts) if used else 1.0
