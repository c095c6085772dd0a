"""What blocks take, for estimates: of time and memory for each token on its way through them, of memory for one in hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from compress.model.data import BATCH
from compress.model.speed import computing
from compress.state import State
from compress.state.graph import ATTENTION, Site

USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")  # names of it in configs


@dataclass(frozen=True)
class Work:
    """weights: entries of matrices that a token is multiplied with. numbers: what those read and write; all else that blocks do
    goes with it. squares: of inputs, by all Hessians: their operations, where these use the symmetry.

    waiting: numbers that are held for a token that waits within a block (see `stream.py`). passing: those in the hands of a batch
    that goes on."""

    weights: float
    numbers: float
    squares: float
    waiting: float
    passing: float


def per_token(state: State) -> Work:
    """The work for one token; of experts, for as many as it is sent to."""
    sites = list(_shares(state))
    keys = {(s.block, s.input_key): (s.shape[1], share) for s, share in sites}
    return Work(
        sum(share * s.numel for s, share in sites),
        sum(share * sum(s.shape) for s, share in sites),
        sum(share * k * k for k, share in keys.values()),
        *_held(state, sites),
    )


def _shares(state: State) -> Iterator[tuple[Site, float]]:
    """Every matrix inside blocks, and the share of the tokens that it sees."""
    used, experts = experts_used(state), Counter((s.block, s.role) for s in state.graph.linear if s.expert is not None)
    for s in state.graph.linear:
        yield s, 1.0 if s.expert is None else min(1.0, used / experts[s.block, s.role])


def _held(state: State, sites: list[tuple[Site, float]]) -> tuple[float, float]:
    """What waits, and what passes.

    A paused frame holds what went into the block, the residual, the input of its stage and, in front of o, what q, k and v put
    out. That is not all there at once. But what one stage frees is of other sizes than what the next one asks for, and glibc
    keeps it, so the inputs of all stages are added up. What passes is what the matrices of a stage put out, and half as much
    that is made of it: rotated, or gate and up in one.
    """
    waits, passes = defaultdict[int | None, float](float), defaultdict[tuple[int | None, str], float](float)
    for s, share in {(s.block, s.input_key): (s, share) for s, share in sites}.values():
        waits[s.block] += share * s.shape[1]
    for s, share in sites:
        waits[s.block] += s.shape[0] * (s.role in ATTENTION and s.role != "o")
        passes[s.block, s.stage] += share * s.shape[0]
    width = state.graph["embed"].shape[1]
    return 2 * width + max(waits.values(), default=0), 1.5 * max(passes.values(), default=0)


def waiting_bytes(state: State, tokens: int, models: int = 1) -> int:
    """Bytes of activations while batches of some tokens wait within a block, of as many models, and one of them goes on."""
    work = per_token(state)
    return int(computing(state.dtype).itemsize * (models * tokens * work.waiting + min(tokens, BATCH) * work.passing))


def advancing_bytes(state: State, tokens: int, batch: int = BATCH) -> int:
    """The same while batches go through blocks one after the other, and only what went in and what came out is held."""
    width, work = state.graph["embed"].shape[1], per_token(state)
    batch = min(tokens, batch)
    return int(computing(state.dtype).itemsize * (tokens * width + batch * (work.waiting + work.passing)))


def block_bytes(state: State) -> int:
    """Bytes of the largest block's matrices, as it computes."""
    largest = max(sum(s.numel for s in state.graph.of_block(b.index)) for b in state.graph.blocks)
    return largest * computing(state.dtype).itemsize


def cached(state: State) -> int:
    """Numbers that a cache of keys and values holds for each token."""
    return sum(cached_in(state, block.index) for block in state.graph.blocks)


def cached_in(state: State, block: int) -> int:
    """The same of one block: what k and v put out, and of a matrix that holds q as well all that is not q, which is as wide as
    the input of o."""
    rows = {s.role: s.shape for s in state.graph.of_block(block) if s.role in ("k", "v", "qkv", "o")}
    found = sum(shape[0] for role, shape in rows.items() if role != "o")
    return found - (rows["o"][1] if {"qkv", "o"} <= rows.keys() else 0)


def experts_used(state: State) -> float:
    """How many experts of a block a token is sent to; all, where no config says so."""
    config: Any = state.config.get_text_config()
    return next((getattr(config, name) for name in USED if isinstance(getattr(config, name, None), int)), inf)
