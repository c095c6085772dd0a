"""Batches that pass through one block as coroutines: all wait at one stage, or all are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import greenlet
from torch import Tensor, nn

from compress.errors import ModelError

Inputs = dict[int | None, Tensor]  # by expert; None for a matrix that is no expert's


@dataclass(frozen=True)
class Clean:
    """What a twin sees where a batch waits. ahead: by how much its residual stream is ahead of the batch's [tokens, out], where
    what the stage puts out is added to just that; else None."""

    inputs: Inputs
    ahead: Tensor | None = None


@dataclass
class Batch:
    """One batch on its way: token ids [b, t], hidden states [b, t, d], and the call of every block."""

    tokens: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)


class Lockstep:
    """One block's batches as coroutines: all of them wait at one stage, or all are done and hold their new hidden states."""

    def __init__(self, call: Callable[..., Tensor], block: nn.Module, batches: Sequence[Batch], index: int):
        self.batches = batches
        self.runs = [greenlet.greenlet(call) for _ in batches]
        self.out: list[Any] = [run.switch(block, batch, index) for run, batch in zip(self.runs, batches, strict=True)]
        self._settle()

    @property
    def waiting(self) -> bool:
        return not all(run.dead for run in self.runs)

    @property
    def stage(self) -> str:
        stages = {w[0] for run, w in zip(self.runs, self.out, strict=True) if not run.dead}
        if len(stages) != 1 or any(run.dead for run in self.runs):
            raise ModelError(f"batches visit the stages of a block in different order ({sorted(stages)}); cannot calibrate")
        stage: str = stages.pop()
        return stage

    @property
    def inputs(self) -> list[Inputs]:
        return [w[1] for w in self.out]

    @property
    def residuals(self) -> list[Tensor | None]:
        """What the outputs of the stage will be added to [b, t, out], where that is known."""
        return [w[2] for w in self.out]

    def clean(self, twin: Lockstep) -> Iterator[Clean]:
        """What a twin sees at the same stage, batch by batch."""
        for inputs, theirs, ours in zip(twin.inputs, twin.residuals, self.residuals, strict=True):
            yield Clean(inputs, None if theirs is None or ours is None else (theirs - ours).flatten(0, -2))

    def go_on(self) -> None:
        self.out.clear()  # else what a batch has passed would be held until the last has passed it
        self.out = [run.switch() for run in self.runs]
        self._settle()

    def _settle(self) -> None:
        if not self.waiting:
            for batch, hidden in zip(self.batches, self.out, strict=True):
                batch.hidden = hidden


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference between what two blocks put out, as a share of the largest number that was wanted."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-9))
