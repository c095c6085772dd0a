"""How good a model is, and how far from its original: perplexity, KL divergence, top-1 agreement.

A state is streamed block by block, and its logits are never all there (model/head.py); an engine is asked.

KL is KL(original || compressed) in nats, the mean over predicted tokens. Perplexity is exp of the mean negative
log-likelihood of each window's tokens after its first, so it depends on the window's length, which is always stated.

Where the windows come from several sources, each has figures of its own: an average hides a language or a kind of text that
suffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats import Dense
from compress.model.data import Tokens
from compress.model.head import Compared, Softmax, Streamed, both, cut, parts
from compress.model.lockstep import Batch
from compress.state import State
from compress.state.graph import total


@dataclass(frozen=True)
class Scores:
    """perplexity: None for models that do not predict the next token. kl (nats) and agreement (share of equal top-1
    tokens) are to the original; None when there is none to compare with. tokens: how many predictions were scored. sources: the
    same of each source alone, where there are several; source: the one that these figures are of."""

    perplexity: float | None
    kl: float | None
    agreement: float | None
    tokens: int
    length: int
    source: str | None = None
    sources: tuple[Scores, ...] = ()

    def json(self) -> dict[str, Any]:
        found = asdict(self) | {"sources": [each.json() for each in self.sources]}
        return {k: v for k, v in found.items() if k not in ("source", "sources") or v}


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


def compare(
    original: State | None, state: State, tokens: Tokens, device: str = "cpu", ask: Ask | None = None
) -> tuple[Scores | None, Scores]:
    """The scores of the original (None without one) and of `state`, on the same tokens; with `ask`, those of its answers instead
    of the state's own logits.

    Where the state knows some of the original's tokens only, both are asked about those: the original's probabilities are those
    under the condition that one of them comes.
    """
    known = None if state.vocabulary is None else list(state.vocabulary)
    causal = state.graph.causal
    theirs = None if original is None else Streamed.of(original, tokens.batches(), device, causal)
    with torch.no_grad():
        if ask is None:
            ours = Streamed.of(state, [state.ids(batch) for batch in tokens.batches()], device, causal)
            found = both(theirs, ours, known)
        else:
            found = asked(theirs, ask, state.ids(tokens.ids), causal, known)
        finite(found)
        return None if theirs is None else told(original_scores, found, tokens), told(scores, found, tokens)


def finite(found: list[Compared]) -> None:
    """ModelError where logits are not finite: a mean over them would be NaN, and a comparison with it nothing at all."""
    if not all(bool(each.q.log_total.isfinite().all()) for each in found):
        raise ModelError(
            "the logits to be judged are not finite: a weight or a scale is NaN, or too large for the activations' dtype"
        )


def told(of: Callable[[list[Compared], int], Scores], found: list[Compared], tokens: Tokens) -> Scores:
    """The scores of all windows, with those of each source where there are several."""
    length, pieces = int(tokens.ids.shape[1]), len(found) // len(tokens.ids)
    sources, start = [], 0
    for name, windows in tokens.sources:
        end = start + windows * pieces
        sources.append(replace(of(found[start:end], length), source=name))
        start = end
    return replace(of(found, length), sources=tuple(sources))


def asked(theirs: Streamed | None, ask: Ask, ids: Tensor, causal: bool, known: list[int] | None) -> list[Compared]:
    """An engine gives all logits of a window at once: window by window, each then in the same parts as the original's."""
    found: list[Compared] = []
    for window in ids.split(1):
        logits = ask(window)
        mine = cut([Batch(window, logits, [])], causal)
        compared = [Compared.of(piece) for piece in mine]
        for rows in parts(logits.shape[-1] if theirs is None or theirs.head.size else None):
            with theirs.part(rows, known) if theirs else nullcontext() as p:
                for i, (piece, sums) in enumerate(zip(mine, compared, strict=True)):
                    q_nv = piece.hidden[0, :, rows].float()
                    sums.add(rows.start or 0, p(len(found) + i).to(q_nv.device) if p else None, q_nv)
        found += compared
    return found


def scores(found: list[Compared], length: int) -> Scores:
    """The scores of the model in hand."""
    count = sum(len(each.q.total) for each in found)
    compared = all(each.compared for each in found)
    kl = sum(float(each.kl.sum()) for each in found) / count if compared else None
    agree = sum(int((each.p.best == each.q.best).sum()) for each in found) / count if compared else None
    return Scores(perplexity([each.q for each in found], count), kl, agree, count, length)


def original_scores(found: list[Compared], length: int) -> Scores:
    """The scores of the original, which has no distance to be told."""
    count = sum(len(each.p.total) for each in found)
    return Scores(perplexity([each.p for each in found], count), None, None, count, length)


def perplexity(found: list[Softmax], count: int) -> float | None:
    """exp of the mean negative log-likelihood, no more than exp(700); None where nothing came to be predicted."""
    if found[0].targets is None:
        return None
    nll = sum(float((each.log_total - each.target).sum()) for each in found)
    return math.exp(min(nll / count, 700.0))


def sizes(state: State, tensor_bytes: int) -> Sizes:
    """Bytes and bits of a state; `tensor_bytes` as its exporter lays them out."""
    graph = state.graph
    linear = graph.linear
    dense = Dense(state.dtype)
    stored = sum((state.format(s) or dense).nbytes(s.shape) for s in linear)
    own = {s.weight for s in graph} | {s.joined for s in graph if s.expert is not None}
    weights = total(graph) + sum(math.prod(spec.shape) for spec in state.specs if spec.name not in own)
    bits = 8 * stored / total(linear) if linear else 8.0 * state.dtype.itemsize
    return Sizes(tensor_bytes, bits, 8 * tensor_bytes / weights)
