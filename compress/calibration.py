"""Calibration windows that take more than reading: those of a pool that cover it best, and those that the model makes up.

They are measured or sampled once, from the model as it was before any step, and kept in the run folder with what else was
measured (`analyses/`), under all that they depend on. A run that is stopped, or another budget, finds them there; a step is told
the tokens, whose hash is in its key, as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from compress import sampling
from compress.errors import DataError, ModelError
from compress.manager import Cost
from compress.model import selection
from compress.model.data import BATCH, Calibration, Tokens
from compress.model.speed import computing
from compress.model.work import advancing_bytes, block_bytes, per_token
from compress.prepare import Prepared
from compress.report.console import Console
from compress.run import ANALYSES, Parts, digest
from compress.state import State

VERSION = 1  # raised when the same options give other windows
CHOSEN, SAMPLED = "chosen", "text sampled from the model"


def recalled(ready: Prepared, out: Path, device: str) -> Prepared:
    """The same with its calibration windows, where the run folder holds them; nothing is measured."""
    if ready.settled:
        return ready
    work = Work.of(ready, out, device)
    known = [work.known(name) for name in work.parts]
    return ready if any(part is None for part in known) else work.settled([part for part in known if part is not None])


def settled(ready: Prepared, out: Path, device: str, console: Console) -> Prepared:
    """The same with its calibration windows, from the run folder or measured now and kept there."""
    ready = recalled(ready, out, device)
    if ready.settled:
        return ready
    work = Work.of(ready, out, device)
    try:
        with torch.no_grad():
            return work.settled(work.sampled(console) if work.windows.generate else [work.chosen(console)])
    except (DataError, ModelError) as e:
        raise type(e)(f"{ready.recipe.place(('data', 'calibration'))}  {e}") from None


@dataclass(frozen=True)
class Work:
    """What makes the windows: the recipe's wish, the pool or the prompts that were read for it, and where parts are kept."""

    ready: Prepared
    windows: Calibration
    pool: Tokens
    store: Parts
    device: str

    @classmethod
    def of(cls, ready: Prepared, out: Path, device: str) -> Work:
        windows, pool = ready.recipe.document.data.calibration, ready.pool
        assert windows is not None
        assert pool is not None
        g = windows.generate
        how = [windows.select, windows.sequences] if g is None else [windows.length, windows.bos, g.temperature, g.first]
        computes = str(computing(ready.start.dtype, device))
        key = digest(VERSION, ready.root_key, pool.hash, ready.foreseen.vocabulary, ready.seed, computes, how)
        return cls(ready, windows, pool, Parts(out / ANALYSES, "windows", key), device)

    @property
    def parts(self) -> list[str]:
        """The parts that hold the result."""
        if self.windows.generate is None:
            return [CHOSEN]
        return [sampled_part(first) for first in range(0, self.windows.sequences, sampling.TOGETHER)]

    def known(self, part: str) -> Tensor | None:
        """The tensor of a finished part."""
        found = self.store.committed(part)
        return None if found is None else next(iter(found.dense.values())).load()

    def keep(self, part: str, tensor: Tensor) -> Tensor:
        self.store.commit(part, dense={part: tensor})
        return tensor

    def settled(self, parts: Sequence[Tensor]) -> Prepared:
        """The recipe with the windows that finished parts tell."""
        if self.windows.generate is not None:
            return replace(self.ready, asked=Tokens(torch.cat(list(parts)), SAMPLED))
        return replace(self.ready, asked=picked(self.pool, parts[0].tolist()))

    def chosen(self, console: Console) -> Tensor:
        """The numbers of the windows that cover the pool best."""
        start, count = self.ready.start, self.windows.sequences
        console.note(f"choosing {count} of {len(self.pool.ids)} calibration windows by the model's activations")
        rounds, deepest = self.pool.ids.split(count), selection.depths(len(start.graph.blocks))[-1]
        found = []
        for i, ids in enumerate(rounds):
            part, before = f"round-{i:04}", i * deepest
            seen = self.known(part)
            if seen is None:
                tick = lambda done, before=before: console.progress(before + done, len(rounds) * deepest, "blocks")  # noqa: E731
                seen = self.keep(part, selection.statistics(start, ids, self.device, self.ready.seed, tick))
            found.append(seen)
        numbers = selection.chosen(torch.cat(found), count, self.ready.seed)
        tokens = picked(self.pool, numbers)
        if tokens.sources:
            console.note("chosen: " + ", ".join(f"{windows} of {name}" for name, windows in tokens.sources))
        return self.keep(CHOSEN, torch.tensor(numbers))

    def sampled(self, console: Console) -> list[Tensor]:
        """All windows, sampled; `TOGETHER` of them are a part."""
        asked, generate = self.windows, self.windows.generate
        assert generate is not None
        hidden = 0 if generate.prompts or asked.bos else 1  # the begin-of-text token in front, where windows are not to hold it
        sampler = sampling.Sampler(generate, asked.length + hidden, self.ready.seed, self.ready.foreseen.vocabulary)
        console.note(f"sampling {asked.sequences} calibration windows from the model")
        rounds = sampling.windows(self.ready.model, self.ready.start, sampler, self.pool.ids, self.device,
                                  lambda first: self.known(sampled_part(first)),
                                  lambda done: console.progress(done, asked.sequences, "windows"))  # fmt: skip
        found = []
        for first, ids in rounds:
            seen = self.known(sampled_part(first))
            found.append(self.keep(sampled_part(first), ids[:, hidden:]) if seen is None else seen)
        return found


def sampled_part(first: int) -> str:
    return f"sampled-{first:06}"


def picked(pool: Tokens, numbers: Sequence[int]) -> Tokens:
    """Some windows of a pool, with what each source gave of them."""
    ends = list(accumulate(count for _, count in pool.sources))
    starts = [0, *ends[:-1]]
    counts = [sum(start <= n < end for n in numbers) for start, end in zip(starts, ends, strict=False)]
    given = [(name, count) for (name, _), count in zip(pool.sources, counts, strict=True)]
    return Tokens(pool.ids[list(numbers)], pool.place, tuple(given))


def costs(windows: Calibration | None, state: State) -> dict[str, Cost]:
    """What comes before the first step, by the option that asks for it."""
    if windows is None or not windows.measured:
        return {}
    if windows.generate is not None:
        return {"generate": sampling.cost(state, windows.sequences, windows.length)}
    return {"select": selecting(windows, state)}


def selecting(windows: Calibration, state: State) -> Cost:
    """A forward pass over the pool, as deep as is looked; memory for the hidden states of as many windows as are chosen."""
    blocks, work = len(state.graph.blocks), per_token(state)
    share = selection.depths(blocks)[-1] / blocks
    tokens = share * windows.candidates * windows.length
    held = advancing_bytes(state, windows.sequences * windows.length, max(BATCH, windows.length))
    return Cost(2 * tokens * work.weights, numbers=tokens * work.numbers, peak_bytes=held + block_bytes(state))
