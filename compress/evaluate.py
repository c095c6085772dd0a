"""How good a model is, and how far from its original: perplexity, KL divergence, top-1 agreement.

A state is streamed block by block; an engine is asked.

KL is KL(original || compressed) in nats, the mean over predicted tokens. Perplexity is exp of the mean negative
log-likelihood of each window's tokens after its first, so it depends on the window's length, which is always stated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from compress.formats import Dense
from compress.model.data import Tokens
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import total


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


Ask = Callable[[Tensor], Tensor]  # windows of token ids [b, t] -> their logits [b, t, vocabulary]


def streamed(state: State, tokens: Tokens, device: str) -> Iterator[Tensor]:
    """The logits of every batch, in the order of `tokens.batches()`, with one block's weights in memory."""
    stream = Stream(state, device)
    batches = stream.start(state, [state.ids(batch) for batch in tokens.batches()])
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    yield from stream.logits(state, batches)


def compare(
    original: State | None, state: State, tokens: Tokens, device: str = "cpu", ask: Ask | None = None
) -> tuple[Scores | None, Scores]:
    """The scores of the original (None without one) and of `state`, on the same tokens; with `ask`, those of its answers instead
    of the state's own logits.

    Where the state knows some of the original's tokens only, both are asked about those: the original's probabilities are those
    under the condition that one of them comes.
    """
    batches, causal = [state.ids(batch) for batch in tokens.batches()], state.graph.causal
    before, after = (Sums(int(tokens.ids.shape[1]), causal) for _ in range(2))
    found = map(ask, batches) if ask else streamed(state, tokens, device)
    theirs: Iterable[Tensor | None] = [None] * len(batches)
    known = None if state.vocabulary is None else list(state.vocabulary)
    if original is not None:
        theirs = streamed(original, tokens, device)
    with torch.no_grad():
        for batch, logits, reference in zip(batches, found, theirs, strict=True):
            log_q, log_p = predictions(logits, causal), None
            if reference is not None:
                log_p = predictions(reference if known is None else reference[..., known], causal).to(log_q.device)
                before.add(batch, log_p, None)
            after.add(batch, log_q, log_p)
    return before.scores if original is not None else None, after.scores


def predictions(logits: Tensor, causal: bool) -> Tensor:
    """Log-probabilities, fp32; of a causal model without the last position, which has nothing to predict here."""
    return (logits[:, :-1] if causal else logits).float().log_softmax(-1)


@dataclass
class Sums:
    """What is summed over batches on the way to `Scores`."""

    length: int
    causal: bool
    nll: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    count: int = 0
    compared: int = 0

    def add(self, tokens: Tensor, log_q: Tensor, log_p: Tensor | None) -> None:
        """One batch: tokens [b, t], log-probabilities of the model in hand, and of the original where there is one."""
        places = log_q.shape[0] * log_q.shape[1]
        self.count += places
        if self.causal:
            self.nll -= float(log_q.gather(-1, tokens[:, 1:, None].to(log_q.device)).sum(dtype=torch.float64))
        if log_p is not None:
            self.kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            self.agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            self.compared += places

    @property
    def scores(self) -> Scores:
        perplexity = math.exp(min(self.nll / self.count, 700.0)) if self.causal else None
        kl = self.kl / self.compared if self.compared else None
        agreement = self.agree / self.compared if self.compared else None
        return Scores(perplexity, kl, agreement, self.count, self.length)


def sizes(state: State, tensor_bytes: int) -> Sizes:
    """Bytes and bits of a state; `tensor_bytes` as its exporter lays them out."""
    graph = state.graph
    linear = graph.linear
    dense = Dense(state.dtype)
    stored = sum((state.format(s) or dense).nbytes(s.shape) for s in linear)
    own = {s.weight for s in graph} | {s.joined for s in graph if s.expert is not None}
    weights = total(graph) + sum(math.prod(spec.shape) for spec in state.specs if spec.name not in own)
    return Sizes(tensor_bytes, 8 * stored / total(linear), 8 * tensor_bytes / weights)
