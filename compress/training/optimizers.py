"""What moves parameters, and what it remembers of each: one rule for a tensor, so that gradients can be used up one by one.

A rule knows one tensor W [m, n] at a time, its gradient G, and what it remembers of it, tensors only; `remembers` says which,
by shape, so that what `plan` counts is what is allocated. Rates ρ are shares of a tensor's size times that size (`distill`),
and every rule moves a tensor by about ρ a number, so one `rate` serves all of them. t counts a tensor's steps from 1.

    AdamW       M ← β1 M + (1-β1) G,  V ← β2 V + (1-β2) G²,  W ← W - ρ M̂ / (√V̂ + ε)      arXiv 1711.05101, algorithm 2
                torch's own, with β = (0.9, 0.95) and without decay: 2mn numbers
    Factored    βt = 1 - t^-0.8;  r ← βt r + (1-βt) mean over columns of G²,  c likewise over rows;
                U = G / √(r cᵀ / mean r);  U ← U / max(1, rms U);  W ← W - ρ U             1804.04235, algorithms 4 and 5
                adalomo: as it is, m + n numbers (2310.10195, algorithm 1, is this one, a tensor at a time)
                adafactor: U is first averaged, M ← β1 M + (1-β1) U, and M / (1 - β1^t) used: mn + m + n numbers
    Descent     W ← W - ρ √N G min(1, c/‖G‖) / c,  ‖G‖ over all N numbers that learn           2306.09782, section 3.3
                lomo: no numbers

LOMO's own rate is one for all models. Here a step whose gradient has the norm c, or more, has the length ρ √N, which is ρ a
number in the mean square; below c it is shorter in proportion, as gradient descent is. Adafactor and AdaLomo differ in the
literature by when gradients are used, which is another seam here; what is left of the difference is the mean, which Adafactor may
have and is given.

Alternatives not taken. lomo-optim 0.1.1 asks for a GPU in AdaLomo; galore-torch keeps a Python object among its state, and
bitsandbytes steps a whole tensor and cannot be asked for its direction, which GaLore projects back; torch's Adafactor scales by
what a tensor is now, and scales that learn begin at 0. Gradients are used up: rules write into them, so that a step makes no
tensor of a matrix's size; 1-D tensors have no rows and columns, and keep a whole V.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

Shape = Sequence[int]
Kinds = Mapping[str, tuple[Shape, torch.dtype]]
Remembered = dict[str, Tensor]
BETAS, EPS = (0.9, 0.95), 1e-8
LITTLE = 1e-30  # added to squares, so that rows of zeros divide
NUMBERS = 1 << 17  # of a tensor in hand at once, where a rule needs another beside it


class Rule(Protocol):
    """How one tensor moves."""

    def remembers(self, shape: Shape) -> Kinds:
        """Shape and dtype of what is kept of a tensor, by name; all begin at zero."""

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        """Move p, in place, by its gradient g, which is used up."""


def begun(rule: Rule, p: Tensor) -> Remembered:
    """What a rule remembers of a tensor before its first step."""
    return {name: torch.zeros(tuple(shape), dtype=dtype, device=p.device) for name, (shape, dtype) in
            rule.remembers(p.shape).items()}  # fmt: skip


def nbytes(kinds: Kinds) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())


STEP: Kinds = {"step": ((), torch.float32)}


class AdamW:
    """Two means of every number."""

    def remembers(self, shape: Shape) -> Kinds:
        return {**STEP, "exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        adamw([p], [g], [kept["exp_avg"]], [kept["exp_avg_sq"]], [], [kept["step"]], fused=True, amsgrad=False, beta1=BETAS[0],
              beta2=BETAS[1], lr=rate, weight_decay=0.0, eps=EPS, maximize=False)  # fmt: skip


class Factored:
    """Means of squares by rows and columns; `momentum`: decay of a mean of the update, None for none."""

    def __init__(self, momentum: float | None = None):
        self.momentum = momentum

    def remembers(self, shape: Shape) -> Kinds:
        squares = {"row": (shape[:1], torch.float32), "column": (shape[1:], torch.float32)} if len(shape) == 2 else {
            "square": (shape, torch.float32)}  # fmt: skip
        return {**STEP, **squares, **({} if self.momentum is None else {"mean": (shape, torch.float32)})}

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        kept["step"] += 1
        new = float(kept["step"]) ** -0.8  # 1 - βt
        if "square" in kept:
            square = kept["square"].lerp_(g.square().add_(LITTLE), new)
            g.div_(square.sqrt())
        else:
            self._scale(g, kept["row"], kept["column"], new)
        g.div_(max(1.0, rms(g)))
        if self.momentum is not None:
            g, rate = kept["mean"].lerp_(g, 1 - self.momentum), rate / (1 - self.momentum ** float(kept["step"]))
        p.sub_(g, alpha=rate)

    def _scale(self, g: Tensor, row: Tensor, column: Tensor, new: float) -> None:
        """Divide G by the root of its squares' mean, as rows and columns know it."""
        of_rows, of_columns = torch.empty_like(row), torch.zeros_like(column)
        for rows in pieces(g):
            squares = g[rows].square().add_(LITTLE)
            of_rows[rows] = squares.mean(1)
            of_columns += squares.sum(0)
        row.lerp_(of_rows, new)
        column.lerp_(of_columns / len(g), new)
        g.mul_((row / row.mean()).rsqrt()[:, None]).mul_(column.rsqrt()[None])


class Descent:
    """Gradient descent; what limits its norm is the whole's, so it stands in `Optimizer`."""

    def remembers(self, shape: Shape) -> Kinds:
        return {}

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        p.sub_(g, alpha=rate)


def pieces(t: Tensor) -> list[slice]:
    """Rows of a matrix, `NUMBERS` numbers at a time."""
    step = max(1, NUMBERS // max(1, t[0].numel()))
    return [slice(i, i + step) for i in range(0, len(t), step)]


def rms(t: Tensor) -> float:
    return float(t.norm()) / math.sqrt(t.numel())


def direction(rule: Rule, g: Tensor, kept: Remembered) -> Tensor:
    """By how much a rule would move a tensor at rate 1, [the shape of g], which is used up."""
    still = torch.zeros_like(g)
    rule.move(still, g, kept, 1.0)
    return still.neg_()
