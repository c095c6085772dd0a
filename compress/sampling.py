"""Windows of text that a model makes up itself, where there is no text that is like what it has learned.

The model is loaded whole, in transformers, and asked for one token after the other through its cache, some windows at a time. A
token is drawn from all that the model thinks possible; the first ones may be drawn at a higher temperature, so that windows begin
differently. Where the model ends a text it goes on behind the end, as texts in a file are joined.

The random numbers of a window are its own, so it is the same whichever windows are sampled beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import Tensor

from compress.errors import DataError, ModelError
from compress.export.artifact.engines import Engine, EngineError, dense
from compress.manager import Cost
from compress.model.data import Generate
from compress.model.model import Model
from compress.model.seeds import seeded
from compress.model.speed import computing
from compress.model.work import cached, per_token
from compress.state import State
from compress.state.checkpoint import Layout
from compress.state.plan import size

TOGETHER = 16  # windows that are sampled at a time: a step reads all weights, for one of them or for all
SPREAD = 20  # bytes for each logit of a step: in the model's dtype, in fp32 and, summed up, in fp64
READ = 8e9  # bytes of weights a second, on one core of a server CPU
DRAWN = 6.0  # softmaxes in the time that a draw from as many logits takes

Tick = Callable[[int], None]  # told how many tokens of a window are there


@dataclass(frozen=True)
class Sampler:
    """How to draw: the options, tokens of a window without what stands in front of it, and which tokens may come (None: all)."""

    options: Generate
    length: int
    seed: int
    vocabulary: tuple[int, ...] | None = None

    def temperature(self, index: int) -> float:
        """Of a window's token, counted from the first that is drawn."""
        start, end = self.options.temperature
        return start + (end - start) * min(1.0, index / self.options.first)

    def window(self, engine: Engine, prompts: Tensor, first: int, tick: Tick) -> Tensor:
        """Windows [b, length] that begin with prompts [b, p]; `first` is the number of the first among all windows."""
        ids, draws = prompts[:, :1], self._draws(first, len(prompts))
        logits, cache = engine.prefill(ids)
        while ids.shape[1] < self.length:
            at = ids.shape[1]
            given = at < prompts.shape[1]
            token = prompts[:, at] if given else self.drawn(logits[:, -1], at - prompts.shape[1], draws[:, at])
            ids = torch.cat([ids, token[:, None]], 1)
            tick(at + 1)
            if cache is None:
                raise EngineError(f"{engine.name}: keeps no cache of what it has read")
            if at + 1 < self.length:
                logits, cache = engine.step(ids[:, -1:], cache)
        return ids

    def _draws(self, first: int, count: int) -> Tensor:
        """A number in [0, 1) for every token of some windows [count, length]."""
        generators = [seeded(self.seed, f"window {first + i}") for i in range(count)]
        return torch.stack([torch.rand(self.length, generator=g, dtype=torch.float64) for g in generators])

    def drawn(self, logits: Tensor, index: int, shares: Tensor) -> Tensor:
        """The tokens [b] at these shares of the probabilities, summed up over the vocabulary; logits [b, v]."""
        if self.vocabulary is not None:
            logits = logits[:, list(self.vocabulary)]
        sums = torch.softmax(logits / self.temperature(index), -1).double().cumsum(-1)
        found = torch.searchsorted(sums, (shares * sums[:, -1])[:, None], right=True)[:, 0]
        found = found.clamp(max=sums.shape[1] - 1)
        return found if self.vocabulary is None else torch.tensor(self.vocabulary)[found]


def windows(model: Model, state: State, sampler: Sampler, prompts: Tensor, device: str,
            known: Callable[[int], Tensor | None], tick: Callable[[float], None]) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """(number of the first, windows [b, length]), `TOGETHER` at a time; those that are `known` are not sampled again.

    DataError where the model does not fit into memory, or predicts no next token.
    """
    engine: Engine | None = None
    for first in range(0, len(prompts), TOGETHER):
        found = known(first)
        if found is None:
            engine = engine or loaded(model, state, sampler.length, device)
            step: Tick = partial(lambda first, at: tick(first + TOGETHER * at / sampler.length), first)
            try:
                found = sampler.window(engine, prompts[first : first + TOGETHER], first, step)
            except EngineError as e:
                raise ModelError(f"generate: {e}; give a text to calibrate on") from None
        yield first, found


def check(state: State) -> None:
    """DataError where a model cannot be asked for a text."""
    if not state.graph.causal:
        raise DataError("generate: the model does not predict the next token; give a text to calibrate on")


def loaded(model: Model, state: State, length: int, device: str) -> Engine:
    """The model whole, in transformers; DataError where it does not fit."""
    need, has = memory(state, length, device), psutil.virtual_memory().available
    if need > has:
        raise DataError(f"generate: holds the whole model in memory, {size(need)}, and {size(has)} are free; give a text, or "
                        "sample one on a larger machine and copy the run folder's 'analyses'")  # fmt: skip
    try:
        return dense(model, device, computing(state.dtype, device))
    except EngineError as e:
        raise ModelError(f"generate: {e}; give a text to calibrate on") from None


def memory(state: State, length: int, device: str = "cpu") -> int:
    """Bytes: all weights, the cache, and the logits of a step."""
    number = computing(state.dtype, device).itemsize
    weights = Layout.of(state.specs).tensor_bytes * number // state.dtype.itemsize
    return weights + TOGETHER * (length * cached(state) * number + SPREAD * state.graph["embed"].shape[0])


def cost(state: State, sequences: int, length: int) -> Cost:
    """A step for each token of a window, which reads all weights and draws from all logits."""
    rounds, work = -(-sequences // TOGETHER), per_token(state)
    read = sum(s.numel for s in state.graph) * computing(state.dtype).itemsize
    vocabulary, width = state.graph["embed"].shape
    tokens = float(sequences) * length
    return Cost(model_flops=2 * tokens * (work.weights + vocabulary * width), numbers=tokens * work.numbers,
                logits=DRAWN * tokens * vocabulary, seconds=rounds * length * read / READ,
                peak_bytes=memory(state, length))  # fmt: skip
