"""How long a gradient lives: until the step, or until it has been used.

`Kept` is what everybody does: all gradients of a step add up, then everything moves. `Fused` moves a tensor inside the backward
pass, as soon as its gradient is whole, and drops it (LOMO, arXiv 2306.09782, section 3.2): at no time is there more than one
gradient, and a hook for each tensor does it (torch's `register_post_accumulate_grad_hook`). Both come to the same numbers, bit
for bit, since a rule sees one tensor at a time.

What lies outside the blocks gets its gradient in parts, since the head is asked a few rows at a time (loss.py): it moves when
those rows are done, and a table that head and embedding share, when all is. So with such a table, which is often the largest
tensor there is, two gradients are held for a while. What serves several blocks, a matrix or a norm, waits for all of them:
each gives a part.

Where the norm of all gradients together is limited, nobody knows it before the last of them: `Fused` goes forward and back twice,
first to add up norms, then to move (section 3.3, "two backward passes"). The forward pass is run again as well: to keep its graph
for both, as LOMO's code does, would keep every activation to the end of the first.

Limits. Used up, gradients cannot be added up: a step must be one micro-batch (settings.py refuses others).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from compress.training.moving import Optimizer

Pass = Callable[[], float]  # all windows of a step through the student: their loss
TABLE = "embed:"  # what the name of a table that the head may share begins with


class Slopes(Protocol):
    """What becomes of gradients in a step."""

    def step(self, number: int, share: float, learn: Pass, look: Pass) -> float:
        """The loss of a step, at a share of every rate. learn: forward and back; look: forward alone."""

    def behind(self) -> None:
        """The head is done: what lies behind the blocks alone has its whole gradient."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be known to go on with the same numbers, by names that begin with "direction/"."""

    def take(self, tensor: Tensor) -> None:
        """The one of these, from disk."""


class Kept:
    """Gradients are held until the step."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self._used: Callable[[str, Tensor], None] | None = None  # what becomes of a gradient as soon as it is whole

    def step(self, number: int, share: float, learn: Pass, look: Pass) -> float:
        self._choose(number, learn)
        loss = learn()
        found = {name: g for name in self.optimizer.awake if (g := self.optimizer.learns[name].grad) is not None}
        if self.optimizer.clip is not None:
            share *= self.optimizer.limited(math.sqrt(sum(square(g) for g in found.values())))
        for name, g in found.items():
            self.optimizer.move(name, g, share)
            self.optimizer.learns[name].grad = None  # or it would be there while a checkpoint is written
        return loss

    def behind(self) -> None:
        if self._used is not None:
            self._use(lambda name: self.optimizer.known[name].first is None and not name.startswith(TABLE))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def take(self, tensor: Tensor) -> None:
        raise AssertionError("gradients are remembered by optimizers")

    def norms(self, learn: Pass) -> dict[str, float]:
        """The square of the norm of every gradient, each dropped as soon as it is known."""
        found: dict[str, float] = {}
        with self.used_up(lambda name, g: found.update({name: square(g)})):
            learn()
        return found

    @contextmanager
    def used_up(self, use: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, gradients are given to `use` as soon as they are whole, and dropped."""
        learns, known = self.optimizer.learns, self.optimizer.known

        def hook(name: str) -> Callable[[Tensor], None]:
            return lambda p: self._drop(name)

        inside = [n for n in self.optimizer.learns if known[n].block is not None and learns[n].requires_grad]
        hooks = [learns[n].register_post_accumulate_grad_hook(hook(n)) for n in inside]
        self._used = use
        try:
            yield
            self._use(lambda name: True)
        finally:
            self._used = None
            for one in hooks:
                one.remove()

    def _use(self, which: Callable[[str], bool]) -> None:
        for name, p in self.optimizer.learns.items():
            if p.grad is not None and which(name):
                self._drop(name)

    def _drop(self, name: str) -> None:
        p = self.optimizer.learns[name]
        assert self._used is not None
        assert p.grad is not None
        self._used(name, p.grad)
        p.grad = None

    def _choose(self, number: int, learn: Pass) -> None:
        """Which blocks learn from this step on, where that is chosen now."""
        selection, norms = self.optimizer.selection, dict[int, float]()
        if selection is None or not selection.due(number):
            return
        if selection.options.select == "gradnorm":
            self.optimizer.wake([n for n, what in self.optimizer.known.items() if what.block is not None])
            for name, found in self.norms(learn).items():
                block = self.optimizer.known[name].block
                norms[block or 0] = norms.get(block or 0, 0.0) + found
        self.optimizer.choose(number, {b: math.sqrt(n) for b, n in norms.items()})


class Fused(Kept):
    """Gradients are used up as they come."""

    def step(self, number: int, share: float, learn: Pass, look: Pass) -> float:
        self._choose(number, learn)
        if self.optimizer.clip is not None:
            share *= self.optimizer.limited(math.sqrt(sum(self.norms(learn).values())))
        with self.used_up(lambda name, g: self.optimizer.move(name, g, share)):
            return learn()


def square(g: Tensor) -> float:
    """Of a gradient's norm."""
    return float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2
