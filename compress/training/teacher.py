"""The model that a student learns from, in three ways: in memory, streamed block by block, or asked once and kept on disk.

    live       all weights in memory, in the dtype that they are stored in
    streamed   one block's weights in memory; the whole model is read for every step
    cached     streamed once over all windows; of each prediction the k most likely tokens and their log-probabilities are kept,
               6 bytes each, in parts that a later run finds again. Nothing of the teacher is in memory while the student learns.

The first two know all probabilities, and what each block puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.model.data import Tokens
from compress.model.lockstep import Batch
from compress.model.stream import Stream
from compress.state import State
from compress.state.state import Part
from compress.training.choice import Choice
from compress.training.loss import NUMBERS, Known, Rows
from compress.training.student import Student
from compress.training.windows import ASKED, LOOKED, MICRO

KEPT = 6  # bytes of a log-probability and its token, cached

Keep = Callable[[str, dict[str, Tensor] | None], Part | None]  # a part by its name: kept where tensors are given, else looked for
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Look:
    """What a teacher says of some windows. known: its predictions, by rows of all their tokens; None where it has none. hidden:
    what each block put out [b, t, d]; empty where it is not known."""

    known: Callable[[Rows], Known] | None
    hidden: Sequence[Tensor] = ()


class Present:
    """A teacher that is asked when it is needed; `vocabulary`: the tokens that the student knows; `seen`: whether what blocks put
    out is asked for too, which is kept for as long as a look lasts."""

    def __init__(self, state: State, tokens: Tokens, vocabulary: Sequence[int] | None, stream: Stream, seen: bool = False):
        self.state, self.tokens, self.stream, self.seen = state, tokens, stream, seen
        self.which = None if vocabulary is None else torch.tensor(vocabulary)

    def through(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What windows [b, t] come to behind all blocks [b, t, d], and behind each, where that is asked for."""
        raise NotImplementedError

    @contextmanager
    def look(self, numbers: Sequence[int]) -> Iterator[Look]:
        tokens = self.tokens.ids[list(numbers)]
        with torch.no_grad():
            last, hidden = self.through(tokens)
        flat = last.reshape(-1, last.shape[-1])
        ids = tokens.reshape(-1).to(last.device)

        def known(rows: Rows) -> Known:
            with torch.no_grad():
                found = [
                    self.logits(Batch(ids[part, None], flat[part, None], [])).log_softmax(-1)
                    for part in self.bounded(rows, len(ids))
                ]
            return Known(found[0] if len(found) == 1 else torch.cat(found))

        with self.heading():
            yield Look(known, hidden)

    def bounded(self, rows: Rows, count: int) -> Sequence[Rows]:
        """Some rows of `count`, as many at once as whoever knows all of the teacher's tokens asks for: a student that knows
        fewer asks for more."""
        if self.which is None:
            return [rows]
        few: tuple[Tensor, ...] = torch.arange(count)[rows].split(max(1, NUMBERS // self.state.graph["embed"].shape[0]))
        return few

    def logits(self, batch: Batch) -> Tensor:
        """Of the tokens that the student knows [n, V], for n windows of one token: a row is none of a text any more."""
        z = self.stream.head(batch).float()[:, 0]
        return z if self.which is None else z[:, self.which.to(z.device)]

    @contextmanager
    def heading(self) -> Iterator[None]:
        with self.stream.behind(self.state):
            yield


class Live(Present):
    """A teacher whose weights stay in memory."""

    stream: Student

    def __init__(self, state: State, tokens: Tokens, vocabulary: Sequence[int] | None, device: str, seen: bool = False):
        super().__init__(state, tokens, vocabulary, Student(state, Choice({}, frozenset(), {}, 0), 0, device), seen)

    def through(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden: list[Tensor] = []
        batch = self.stream.forward(ids, (lambda _, h: hidden.append(h)) if self.seen else None)
        return batch.hidden, hidden

    @contextmanager
    def heading(self) -> Iterator[None]:
        with self.stream.behind(self.state), self.stream.holding_head():
            yield


class Streamed(Present):
    """A teacher of which one block is in memory, and inside of that as many tokens as pass a student at once."""

    def __init__(self, state: State, tokens: Tokens, vocabulary: Sequence[int] | None, device: str, seen: bool = False):
        super().__init__(state, tokens, vocabulary, Stream(state, device), seen)

    def through(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = []
        batches = self.stream.start(self.state, ids.split(max(1, MICRO // ids.shape[1])))
        for block in self.state.graph.blocks:
            self.stream.advance(self.state, block.index, batches)
            if self.seen:
                hidden.append(torch.cat([batch.hidden for batch in batches]))
        return torch.cat([batch.hidden for batch in batches]), hidden


class Cached:
    """What a teacher said of every window, in parts on disk; what is not there yet is asked and kept."""

    def __init__(
        self, state: State, tokens: Tokens, vocabulary: Sequence[int] | None, device: str, k: int, keep: Keep, progress: Progress
    ):
        length = tokens.ids.shape[1]
        self.each, self.length = max(1, ASKED // length), length
        self.parts: list[Part] = []
        asked: Streamed | None = None
        starts = range(0, len(tokens.ids), self.each)
        for number, start in enumerate(starts):
            part = keep(_part(number), None)
            if part is None:
                progress(number, len(starts), "asking the teacher")
                asked = asked or Streamed(state, tokens, vocabulary, device)
                part = keep(_part(number), most_likely(asked, range(start, min(start + self.each, len(tokens.ids))), k))
            assert part is not None
            self.parts.append(part)

    @contextmanager
    def look(self, numbers: Sequence[int]) -> Iterator[Look]:
        found = [self._window(n) for n in numbers]
        known = Known(torch.cat([log_p for log_p, _ in found]), torch.cat([which for _, which in found]))
        yield Look(known.rows)

    def _window(self, number: int) -> tuple[Tensor, Tensor]:
        part, at = self.parts[number // self.each], number % self.each
        rows = slice(at * self.length, (at + 1) * self.length)
        log_p, which = (part.dense[name].load()[rows] for name in ("log_p", "which"))
        return log_p.float(), which.long()


class Nobody:
    """No teacher, for a student that learns from the text alone."""

    @contextmanager
    def look(self, numbers: Sequence[int]) -> Iterator[Look]:
        yield Look(None)


def _part(number: int) -> str:
    return f"windows-{number:05}"


def most_likely(teacher: Present, numbers: Sequence[int], k: int) -> dict[str, Tensor]:
    """log_p, fp16 [tokens, k], and which, int32: the likeliest tokens of every prediction of some windows."""
    found = []
    with teacher.look(numbers) as look:
        total = len(numbers) * teacher.tokens.ids.shape[1]
        step = min(LOOKED, max(1, NUMBERS // teacher.state.graph["embed"].shape[0]))
        for start in range(0, total, step):
            assert look.known is not None
            log_p = look.known(slice(start, min(start + step, total))).log_p
            found.append(log_p.topk(min(k, log_p.shape[1]), -1))
    return {
        "log_p": torch.cat([f.values for f in found]).half().cpu(),
        "which": torch.cat([f.indices for f in found]).int().cpu(),
    }
