"""What FastGen's rungs recover and keep of calibration prompts, and the T that meets a budget in the mean. Mathematics on arrays.

Letters: w windows, each a prompt as a whole; u KV heads of all layers in order; r rungs (compress/cache/ladder.py).

One pass over the windows measures what every rung of every head recovers and how many entries it keeps. Which rung a head takes
at a T follows from that, and so do the bytes of every prompt at every T, so that T and the budget measure nothing:

    r_wu(T) = the first r with recovered_wur >= T,    bytes_w(T) = Σ_u kept_wu,r(T) · bytes of an entry

T of a budget is found by halving, in ten-thousandths: the largest with a mean of bytes_w(T) within it. Bytes grow with T but for
one place: an entry of `full` takes a few bytes less than one of the rung before it, which may keep as many. So there may be a
larger T that fits too; what is found does fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.cache.ladder import Ladder
from compress.cache.policy import Policy
from compress.cache.rules import RUNGS, entry_bytes, resident, scores
from compress.manager import Record
from compress.model.attention import Attended, Heads
from compress.model.speed import precision

STEPS = 10_000  # of T between nothing and everything


@dataclass(frozen=True)
class Climbed:
    """recovered and kept [w, u, r]; nbytes [w, u, r] of those entries."""

    recovered: np.ndarray
    kept: np.ndarray
    nbytes: np.ndarray

    @classmethod
    def of(cls, found: Sequence[Heads], by_layer: Mapping[int, Record], dtype: str) -> Climbed:
        """From what a `Climb` of each layer has noted."""
        recovered, kept, each = [], [], []
        for layer in found:
            recovered.append(np.array(by_layer[layer.layer]["recovered"]))
            kept.append(np.array(by_layer[layer.layer]["kept"], dtype=np.int64))
            each.append(kept[-1] * np.array([entry_bytes(dtype, rung, layer.width) for rung in RUNGS]))
        return cls(*(np.concatenate(parts, 1) for parts in (recovered, kept, each)))

    def taken(self, recovery: float) -> np.ndarray:
        """The rung of each head [w, u] at a T."""
        found: np.ndarray = (self.recovered >= recovery).argmax(-1)
        return found

    def prompts(self, recovery: float) -> np.ndarray:
        """Bytes of each prompt [w] at a T."""
        found: np.ndarray = np.take_along_axis(self.nbytes, self.taken(recovery)[..., None], -1).sum((1, 2))
        return found

    def within(self, budget: int) -> float | None:
        """T by a budget of bytes; None where even the first rung takes more."""
        low, high = 0, STEPS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.prompts(middle / STEPS).mean() <= budget else (low, middle - 1)
        return low / STEPS if low else None

    def told(self, recovery: float, units: slice) -> str:
        """Which rungs some heads take, in words."""
        count = np.bincount(self.taken(recovery)[:, units].ravel(), minlength=len(RUNGS))
        return ", ".join(f"{rung} {n / count.sum():.0%}" for rung, n in zip(RUNGS, count, strict=True) if n)


class Climb:
    """Sees the attention of one block: of each window in order, what every rung of every head recovers and keeps."""

    def __init__(self, layer: Heads, policy: Policy, ladder: Ladder, tokens: Sequence[Tensor]):
        self.layer, self.ladder = layer, ladder
        self.kinds = iter([policy.kinds(ids) for ids in tokens])
        self.recovered: list[list[list[float]]] = []
        self.kept: list[list[list[int]]] = []

    def __call__(self, a: Attended, out: Tensor) -> Tensor:
        assert a.layer == self.layer.layer, "attention counts layers as the graph does"
        total, kinds = a.q.shape[2], next(self.kinds).to(a.q.device)
        at, there = a.resident(total, self.layer.sliding), resident(total, self.layer.sliding)
        for row in range(len(a.q)):
            heads = []
            for head in range(self.layer.units):
                mine = slice(head * a.group, (head + 1) * a.group)
                with precision("ieee"):
                    score_t = scores({RUNGS[2]}, a.q[row, mine], a.k[row, head], a.scale, a.allowed(row))["all"]
                heads.append([*self.ladder.climbed(at, total, 0, there, score_t[at], kinds[row][at])])
            self.recovered.append([[recovered for _, _, recovered in rungs] for rungs in heads])
            self.kept.append([[len(kept_k) for _, kept_k, _ in rungs] for rungs in heads])
        return out

    def record(self) -> Record:
        return {"recovered": self.recovered, "kept": self.kept}
