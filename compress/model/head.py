"""The output head of a model, piece by piece: logits of some predictions for a part of the vocabulary at a time.

Logits of real models are larger than anything else in a run: 4,096 tokens of Gemma 3 make 4.3 GB of them in fp32. But what is
asked of them (their maximum, the logarithm of their sum, the expectation of a difference) can be summed up over the vocabulary.
So the head's matrix goes through memory in parts of `ROWS` rows, each met by all predictions, `PIECE` of them at once. The module
itself is called, with a part of its matrix, so that what an architecture does to logits one by one (a scale, a soft cap) stays.

A model without a head of its own (an embedder, a classifier; see `with_logits`) gives all that stands for logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats import Can
from compress.model.attention import See, attention_by
from compress.model.lockstep import Batch
from compress.model.stream import Stream
from compress.state import State

ROWS = 8192  # of the vocabulary
PIECE = 256  # predictions


@dataclass(frozen=True)
class Piece:
    """Some predictions of one window: token ids [1, n], what stands behind the last block [1, n, d], and, where a model predicts
    the next token, those that came [n]."""

    tokens: Tensor
    hidden: Tensor
    targets: Tensor | None


class Head:
    """The head of a state whose batches have passed all blocks. size: rows of its matrix; None where all logits come at once."""

    def __init__(self, stream: Stream, state: State):
        self.stream, self.state = stream, state
        self.site = next((site for site in state.graph if site.role == "head"), None)
        self.size = None if self.site is None else self.site.shape[0]
        held = None if self.site is None else state.graph.owner(self.site)
        codes = state.codes.get(held.name) if held else None
        whole = held is not None and (held.transposed or (codes is not None and Can.GIVE_ROWS not in codes.format.can))
        self._matrix = state.weight(held) if held and whole else None  # other matrices are read by their rows

    @contextmanager
    def part(self, rows: slice | list[int]) -> Iterator[Callable[[Piece], Tensor]]:
        """Inside, what gives the logits [n, rows] of a piece, fp32, for some rows of the vocabulary: a range or a list."""
        if self.site is None:
            with self.stream.behind(self.state):
                yield lambda piece: self._logits(piece)[:, rows]
            return
        module = self.stream.model.get_submodule(self.site.module)
        whole = dict(module._parameters)
        try:
            self.stream.load_rows(self.state, self.site, rows, self._matrix)
            with self.stream.behind(self.state):
                yield self._logits
        finally:
            module._parameters.update(whole)

    def _logits(self, piece: Piece) -> Tensor:
        found = self.stream.head(Batch(piece.tokens, piece.hidden, []))
        return found.reshape(-1, found.shape[-1]).float()


def cut(batches: Sequence[Batch], causal: bool, first: int = 0) -> list[Piece]:
    """The predictions of batches from a place in each window on, `PIECE` of them at once; of a causal model without the last,
    which has nothing to predict."""
    found = []
    for batch in batches:
        length = batch.tokens.shape[1] - causal
        for tokens, hidden in zip(batch.tokens.split(1), batch.hidden.split(1), strict=True):
            for start in range(first, length, PIECE):
                end = min(start + PIECE, length)
                targets = tokens[0, start + 1 : end + 1].to(hidden.device) if causal else None
                found.append(Piece(tokens[:, start:end], hidden[:, start:end], targets))
    return found


def parts(size: int | None) -> Iterator[slice]:
    """The rows of a vocabulary, `ROWS` at a time; all of them at once where their number is not known."""
    if size is None:
        yield slice(None)
        return
    for start in range(0, size, ROWS):
        yield slice(start, min(start + ROWS, size))


@dataclass(frozen=True)
class Streamed:
    """A model behind all its blocks: its head, and pieces of what the last block put out."""

    head: Head
    pieces: list[Piece]

    @classmethod
    def of(
        cls,
        state: State,
        ids: Sequence[Tensor],
        device: str,
        causal: bool,
        exact: bool = False,
        see: See | None = None,
        start: int = 0,
    ) -> Streamed:
        """Pass batches of token ids [b, t], as the state numbers them, through its blocks, one block's weights in memory.
        `causal`: see `cut`; `exact`: see `Stream`; `see`: what is asked at every attention (attention.py); `start`: the
        place in each window from which on there are predictions."""
        stream = Stream(state, device, exact)
        batches = stream.start(state, ids)
        with attention_by(stream, see) if see else nullcontext():
            for block in state.graph.blocks:
                stream.advance(state, block.index, batches)
        return cls(Head(stream, state), cut(batches, causal, start))

    @contextmanager
    def part(self, rows: slice, known: list[int] | None = None) -> Iterator[Callable[[int], Tensor]]:
        """Inside, the logits [n, rows] of a piece by its number; with `known`, rows are of this list."""
        with self.head.part(rows if known is None else known[rows]) as ask:
            yield lambda i: ask(self.pieces[i])


def both(theirs: Streamed | None, ours: Streamed, known: list[int] | None = None) -> list[Compared]:
    """The vocabulary in parts, each met by all predictions of two models; `known` are the rows of the original that are ours."""
    found = [Compared.of(piece) for piece in ours.pieces]
    for rows in parts(ours.head.size):
        with ours.part(rows) as q, theirs.part(rows, known) if theirs else nullcontext() as p:
            for i, compared in enumerate(found):
                compared.add(rows.start or 0, p(i) if p else None, q(i))
    return found


class Softmax:
    """What is known of the softmax of n predictions once parts of the vocabulary have been seen.

    targets [n]: the tokens that came, or None. top [n]: the largest logit; best [n]: its token; total [n], fp64: the sum of
    exp(z - top); target [n]: the logit of the token that came.
    """

    def __init__(self, n: int, targets: Tensor | None = None, device: torch.device | str = "cpu"):
        # All that stays is made here and filled in place: small tensors made beside large ones would leave holes in the heap.
        self.targets = targets
        self.top = torch.full((n,), -torch.inf, device=device)
        self.best = torch.zeros(n, dtype=torch.int64, device=device)
        self.total, self.target = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))

    def add(self, start: int, z_nv: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the tokens from `start` on. Returns what to multiply earlier sums by [n], and exp(z - top) [n, v]."""
        highest = z_nv.amax(-1)
        better = (highest > self.top).nonzero()[:, 0]  # fewer with every part, and an argmax is slow
        self.best[better] = z_nv[better].argmax(-1) + start
        top = torch.maximum(self.top, highest)
        decay, e_nv = (self.top - top).exp().double(), (z_nv - top[:, None]).exp_()
        self.top.copy_(top)
        self.total.mul_(decay).add_(e_nv.sum(-1).double())
        if self.targets is not None:
            inside = (self.targets >= start) & (self.targets < start + z_nv.shape[1])
            index = (self.targets - start).clamp(0, z_nv.shape[1] - 1)
            self.target.copy_(torch.where(inside, z_nv.gather(-1, index[:, None])[:, 0].double(), self.target))
        return decay, e_nv

    @property
    def log_total(self) -> Tensor:
        """The logarithm of the sum of exponentials [n], fp64."""
        return self.top.double() + self.total.log()


class Compared:
    """The predictions of a piece by two models, summed up over the vocabulary: q is the model in hand, p the original."""

    def __init__(self, n: int, targets: Tensor | None = None, device: torch.device | str = "cpu"):
        self.p, self.q = Softmax(n, targets, device), Softmax(n, targets, device)
        self.difference = torch.zeros_like(self.p.total)  # sum over the vocabulary of exp(p - top of p) (p - q) [n]
        self.compared = False

    @classmethod
    def of(cls, piece: Piece) -> Compared:
        """Of the predictions of a piece, before anything has been seen."""
        return cls(piece.hidden.shape[:2].numel(), piece.targets, piece.hidden.device)

    def add(self, start: int, p_nv: Tensor | None, q_nv: Tensor) -> None:
        """The logits [n, v] of the tokens from `start` on."""
        self.q.add(start, q_nv)
        if p_nv is not None:
            self.compared = True
            decay, e_nv = self.p.add(start, p_nv)
            self.difference.mul_(decay).add_(e_nv.mul_(p_nv - q_nv).sum(-1).double())

    @property
    def kl(self) -> Tensor:
        """KL(p || q) of each prediction [n], nats: E_p[p - q] less the difference of the two normalizations."""
        return self.difference / self.p.total - (self.p.log_total - self.q.log_total)
