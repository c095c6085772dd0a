"""How fast a model answers: two engines in one run, by turns, so that a busy machine slows both.

Prefill is one pass over a prompt; decode is a token at a time through the cache. What a pass must read of the weights is the
floor under decoding, so it stands beside the times. A number without a spread says little: each is a median with its extremes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from compress.export.artifact.engines import Engine
from compress.report.page import Row
from compress.state.plan import size


@dataclass
class Speed:
    """Seconds of each prefill of the prompt, and of a decoded token, the mean over one continuation. weight_bytes: of all that a
    pass may read; unread: of these what the prefill, and what a decoded token, asked nothing of."""

    engine: str
    weight_bytes: int
    unread: tuple[float, float] = (0.0, 0.0)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def measure(engines: Sequence[Engine], prompt: torch.Tensor, new: int, repeats: int, tick: Callable[[int], None]) -> list[Speed]:
    """Time each engine on a prompt [1, t] and `new` tokens after it, `repeats` times by turns after a first that does not count.

    `tick` is told how many turns are done.
    """
    speeds = [Speed(e.name, 0) for e in engines]
    for turn in range(repeats + 1):
        for engine, speed in zip(engines, speeds, strict=True):
            prefill, decode, speed.unread = once(engine, prompt, new)
            if turn:
                speed.prefill.append(prefill)
                speed.decode.append(decode)
        tick(turn + 1)
    for engine, speed in zip(engines, speeds, strict=True):
        speed.weight_bytes = engine.weight_bytes()  # asked last: some engines unpack in their first pass
    return speeds


def once(engine: Engine, prompt: torch.Tensor, new: int) -> tuple[float, float, tuple[float, float]]:
    """Seconds of the prefill, and of a decoded token; bytes of weights that each left unread."""
    engine.unread()
    start = time.perf_counter()
    logits, cache = engine.prefill(prompt)
    filled = time.perf_counter() - start
    spared, start = engine.unread(), time.perf_counter()
    for _ in range(new):
        logits, cache = engine.step(logits[:, -1:].argmax(-1), cache)
    return filled, (time.perf_counter() - start) / new, (spared, engine.unread() / new)


def rows(original: Speed, ours: Speed, prompt: int) -> list[Row]:
    """The figures side by side, ratios last; more than 1 is better for us."""

    def rates(seconds: list[float], tokens: int) -> str:
        low, middle, high = (tokens / s for s in (max(seconds), median(seconds), min(seconds)))
        return f"{middle:.4g} ({low:.4g} to {high:.4g})"

    def faster(which: str) -> str:
        return f"{median(getattr(original, which)) / median(getattr(ours, which)):.2f}"

    def read(which: str, at: int, tokens: int) -> Row:
        theirs, mine = (speed.weight_bytes - speed.unread[at] for speed in (original, ours))
        sizes = size(round(theirs / tokens)), size(round(mine / tokens))
        return [f"weights read per token, {which}", *sizes, f"{theirs / max(1, mine):.2f}"]

    return [["engine", original.engine, ours.engine, ""],
            ["prefill, tokens/s", rates(original.prefill, prompt), rates(ours.prefill, prompt), faster("prefill")],
            ["decode, tokens/s", rates(original.decode, 1), rates(ours.decode, 1), faster("decode")],
            read("prefill", 0, prompt), read("decode", 1, 1)]  # fmt: skip


def json_of(original: Speed, ours: Speed, prompt: int) -> dict[str, Any]:
    """The medians, for machines."""
    return {name: {"engine": s.engine, "prefill_tokens_per_second": prompt / median(s.prefill),
                   "decode_tokens_per_second": 1 / median(s.decode), "weight_bytes": s.weight_bytes,
                   "weight_bytes_read_per_token": s.weight_bytes - s.unread[1]}
            for name, s in (("original", original), ("artifact", ours))}  # fmt: skip
