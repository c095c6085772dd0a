"""A model with one change at a time, and the KL of each from the model as it was: the model is streamed, logits are not kept.

A change is run from what stands in front of it, so L of them, one in each layer, take about L²/2 passes of a block and L of the
head. All that are on their way go through a block together, so its weights are loaded once for all of them, or for as many as
`HELD` bytes of hidden states allow; of the model without any change, only what stands in front of the next one is held. A part of
the vocabulary is met by the original once, and by all changes (model/head.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compress.manager import Context, Cost
from compress.model.data import BATCH, Tokens
from compress.model.head import PIECE, ROWS, Compared, Head, Piece, cut, parts
from compress.model.lockstep import Batch
from compress.model.speed import computing
from compress.model.stream import Stream
from compress.model.work import advancing_bytes, block_bytes, per_token
from compress.state import State
from compress.state.graph import Site

HELD = 1 << 30  # bytes of hidden states of changes that are on their way at once
Modules = Callable[[Site], nn.Module]  # of the block in hand, by its sites
Inside = Callable[[Modules], AbstractContextManager[None]]  # inside, the block in hand is another


@dataclass(frozen=True, eq=False)
class Change:
    """One block as another: `inside` makes it so for as long as it is open; None takes the block away."""

    name: str
    block: int
    inside: Inside | None


def silent(sites: Sequence[Site]) -> Inside:
    """The modules of these sites put out zeros, as they will with zeros in their matrices and biases."""

    @contextmanager
    def inside(modules: Modules) -> Iterator[None]:
        hooks = [m.register_forward_hook(lambda _, args, out: torch.zeros_like(out)) for m in dict.fromkeys(map(modules, sites))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    return inside


def replaced(site: Site, matrix: Callable[[], Tensor]) -> Inside:
    """The module of a site has another matrix [out, in], which is asked for when its block is in hand."""

    @contextmanager
    def inside(modules: Modules) -> Iterator[None]:
        module = modules(site)
        before = module._parameters["weight"]
        assert before is not None
        other = matrix().to(before)
        module._parameters["weight"] = nn.Parameter((other.T if site.transposed else other).contiguous(), requires_grad=False)
        try:
            yield
        finally:
            module._parameters["weight"] = before

    return inside


def room(hidden: int) -> int:
    """How many changes may be on their way, each with so many bytes of hidden states."""
    return max(1, HELD // hidden)


def spread(tokens: Tokens, count: int) -> Tokens:
    """So many windows, evenly spread, so that each source of a text has its share; all where there are no more."""
    have = len(tokens.ids)
    rows = [i * have // count for i in range(count)] if count < have else list(range(have))
    return replace(tokens, ids=tokens.ids[rows])


class Perturbed:
    """A model, streamed, to be seen with some changes. Nothing is loaded before something is asked."""

    def __init__(self, state: State, ctx: Context, sample: Tokens):
        self.state, self.device = state, ctx.device
        self.ids = [state.ids(batch) for batch in sample.batches()]
        self.count = len(state.graph.blocks)

    @cached_property
    def stream(self) -> Stream:
        return Stream(self.state, self.device)

    @cached_property
    def start(self) -> list[Batch]:
        """The batches in front of the first block."""
        return self.stream.start(self.state, self.ids)

    @cached_property
    def original(self) -> list[Piece]:
        """What the model as it is puts out behind its last block."""
        batches = copies(self.start)
        for index in range(self.count):
            self.stream.advance(self.state, index, batches)
        return cut(batches, causal=False)

    def angles(self, changes: Sequence[Change], ctx: Context) -> dict[str, float | None]:
        """1 - cos between what a layer is given and what it puts out, the mean over tokens."""
        batches, found = copies(self.start), dict[str, float | None]()
        names = {change.block: change.name for change in changes}
        for index in range(self.count):
            ctx.progress(index, self.count, "measuring angles")
            given = [batch.hidden for batch in batches]
            self.stream.advance(self.state, index, batches)
            cosines = [torch.cosine_similarity(x.float(), b.hidden.float(), -1).flatten()
                       for x, b in zip(given, batches, strict=True)]  # fmt: skip
            if index in names:
                found[names[index]] = 1 - float(torch.cat(cosines).mean())
        return found

    def kl(self, always: Sequence[Change], changes: Sequence[Change], ctx: Context) -> dict[str, float | None]:
        """KL (nats per token) from the original of the model with what is always changed and each of `changes`; None where it is
        not finite. Both are in the order of their blocks."""
        _ = self.original
        size = room(sum(b.hidden.numel() * b.hidden.element_size() for b in self.start))
        prefix, first, found = copies(self.start), 0, dict[str, float | None]()
        for at in range(0, len(changes), size):
            some, rest = changes[at : at + size], changes[at + size :]
            end = rest[0].block if rest else some[-1].block
            inner = ctx.part(at / len(changes), (at + len(some)) / len(changes))
            found |= self._compared(self._behind(always, some, prefix, first, end, inner))
            first = end
        return found

    def _behind(
        self, always: Sequence[Change], some: Sequence[Change], prefix: Sequence[Batch], first: int, end: int, ctx: Context
    ) -> dict[str, list[Batch]]:
        """Each of `some` changes -> what the last block puts out with it. `prefix` stands in front of block `first`, and
        afterwards of block `end`."""
        flight: dict[str, list[Batch]] = {}
        for index in range(first, self.count):
            ctx.progress(index - first, self.count - first, f"measuring {len(some)} candidates")
            here = [change.inside for change in always if change.block == index]
            insides = [inside for inside in here if inside is not None]
            if len(insides) < len(here):
                continue
            with self.stream.block(self.state, index) as block, ExitStack() as stack:
                modules = self._modules(block, index)
                for inside in insides:
                    stack.enter_context(inside(modules))
                for batches in flight.values():
                    self._through(block, index, batches)
                for change in (c for c in some if c.block == index):
                    flight[change.name] = copies(prefix)
                    if change.inside is not None:
                        with change.inside(modules):
                            self._through(block, index, flight[change.name])
                self._through(block, index, prefix if index < end else [])
        return flight

    def _through(self, block: nn.Module, index: int, batches: Sequence[Batch]) -> None:
        for batch in batches:
            batch.hidden = self.stream.call(block, batch, index)

    def _modules(self, block: nn.Module, index: int) -> Modules:
        path = self.state.graph.blocks[index].module
        return lambda site: self.stream.model_module(path, block, site.module)

    def _compared(self, flight: Mapping[str, Sequence[Batch]]) -> dict[str, float | None]:
        """The KL of each change; the original's logits are made once for all of them."""
        pieces = {name: cut(batches, causal=False) for name, batches in flight.items()}
        sums = {name: [Compared.of(piece) for piece in self.original] for name in flight}
        head = Head(self.stream, self.state)
        with torch.no_grad():
            for rows in parts(head.size):
                with head.part(rows) as ask:
                    for i, piece in enumerate(self.original):
                        p_nv = ask(piece)
                        for name, theirs in pieces.items():
                            sums[name][i].add(rows.start or 0, p_nv, ask(theirs[i]))
        found = {name: torch.cat([each.kl for each in compared]).mean() for name, compared in sums.items()}
        return {name: float(kl) if bool(kl.isfinite()) else None for name, kl in found.items()}


def walking(state: State, tokens: int, windows: int, passes: float, heads: int, most: int) -> Cost:
    """What so many `passes` of a block take on windows of text, and so many of the head; `most` changes are on their way."""
    work, blocks, table = per_token(state), len(state.graph.blocks), state.graph["embed"]
    number = computing(state.dtype).itemsize
    hidden = tokens * table.shape[1] * number
    batch = advancing_bytes(state, tokens, max(BATCH, tokens // windows)) - hidden
    head = min(ROWS, table.shape[0]) * (6 * 4 * PIECE + 4 * table.shape[1]) * (heads > 0)
    held = hidden * (4 + min(most, room(hidden))) if heads else 2 * hidden
    return Cost(2.0 * tokens * (passes * work.weights / blocks + heads * table.numel),
                peak_bytes=held + max(block_bytes(state) + batch, head), logits=2.0 * heads * tokens * table.shape[0],
                numbers=tokens * passes * work.numbers / blocks)  # fmt: skip


def copies(batches: Sequence[Batch]) -> list[Batch]:
    """Batches that go their own way from here; what they hold is shared, since no block writes into what it is given."""
    return [replace(batch) for batch in batches]
