"""How good a model is, and how far from its original: perplexity, KL divergence, top-1 agreement, all streamed block by block.

KL is KL(original || compressed) in nats, the mean over predicted tokens. Perplexity is exp of the mean negative
log-likelihood of each window's tokens after its first, so it depends on the window's length, which is always stated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress.data import Tokens
from compress.formats import Dense
from compress.graph import total
from compress.state import State
from compress.stream import Batch, Stream


@dataclass(frozen=True)
class Scores:
    """perplexity: None for models that do not predict the next token. kl (nats) and agreement (share of equal top-1
    tokens) are to the original; None when there is none to compare with. tokens: how many predictions were scored."""

    perplexity: float | None
    kl: float | None
    agreement: float | None
    tokens: int
    length: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """tensor_bytes: of all tensors. linear_bits: average bits per weight of the matrices inside blocks, scales counted.
    file_bits: bits per weight of everything."""

    tensor_bytes: int
    linear_bits: float
    file_bits: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


def hidden(state: State, config: Any, tokens: Tokens, device: str) -> tuple[Stream, list[Batch]]:
    """Every batch passed through all blocks."""
    stream = Stream(state, config, device)
    batches = stream.start(state, tokens.batches())
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    return stream, batches


def compare(
    original: State | None, state: State, config: Any, tokens: Tokens, device: str = "cpu"
) -> tuple[Scores | None, Scores]:
    """The scores of the original (None without one) and of `state`, on the same tokens."""
    mine = hidden(state, config, tokens, device)
    if original is None:
        return None, score((None for _ in mine[1]), mine[0].logits(state, mine[1]), mine[1], state.graph.causal)
    theirs = hidden(original, config, tokens, device)
    with torch.no_grad():
        base = score((None for _ in theirs[1]), theirs[0].logits(original, theirs[1]), theirs[1], state.graph.causal)
        new = score(theirs[0].logits(original, theirs[1]), mine[0].logits(state, mine[1]), mine[1], state.graph.causal)
    return base, new


def score(base: Iterator[Tensor | None], new: Iterator[Tensor], batches: list[Batch], causal: bool) -> Scores:
    """Scores from two streams of logits [b, t, vocabulary], the first of which may give None."""
    nll = kl = agree = 0.0
    count = compared = 0
    for batch, ours in zip(batches, new, strict=True):
        theirs = next(base)
        log_q = ours.float().log_softmax(-1)
        if causal:
            log_q = log_q[:, :-1]
            nll -= float(log_q.gather(-1, batch.tokens[:, 1:, None].to(log_q.device)).sum(dtype=torch.float64))
        count += log_q.shape[0] * log_q.shape[1]
        if theirs is not None:
            log_p = theirs.float().log_softmax(-1)[:, : log_q.shape[1]]
            kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            compared += log_q.shape[0] * log_q.shape[1]
    perplexity = math.exp(min(nll / count, 700.0)) if causal else None
    length = int(batches[0].tokens.shape[1])
    if not compared:
        return Scores(perplexity, None, None, count, length)
    return Scores(perplexity, kl / compared, agree / compared, count, length)


def sizes(state: State, tensor_bytes: int) -> Sizes:
    """Bytes and bits of a state; `tensor_bytes` as its exporter lays them out."""
    graph = state.graph
    linear = graph.linear
    dense = Dense(state.dtype)
    formats = {s.name: state.format(s) or (state.plan.formats.get(s.name) if state.plan else None) or dense for s in linear}
    stored = sum(formats[s.name].nbytes(s.shape) for s in linear)
    weights = total(s for s in graph if s.role != "embed") + sum(math.prod(shape) for shape in graph.parameters.values())
    return Sizes(tensor_bytes, 8 * stored / total(linear), 8 * tensor_bytes / weights)
