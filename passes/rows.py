"""Matrices that solvers read some rows at a time: a tensor, or a table of tokens, which is nowhere whole in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 22  # weights solved at a time; outputs are independent, so this bounds the memory only
WHOLE = 256  # rows in hand are a multiple: rings of trellis codes, and the largest blocks in which outputs are turned


class Matrix(Protocol):
    """Numbers [N, K] in fp32, of which a slice gives rows; a tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Rows:
    """A matrix of `shape` [N, K] whose rows are read when they are asked for, anew each time."""

    shape: tuple[int, int]
    read: Callable[[slice], Tensor]
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.read(rows)

    def through(self, f: Callable[[Tensor], Tensor]) -> Rows:
        """What `f` makes of any rows."""
        return Rows(self.shape, lambda rows: f(self.read(rows)), self.device)


def at_once(inputs: int) -> int:
    """How many outputs of a matrix with so many inputs are in hand at once."""
    return max(64, CHUNK // inputs)


def wholes_at_once(inputs: int) -> int:
    """The same as a multiple of `WHOLE`."""
    return max(1, CHUNK // inputs // WHOLE) * WHOLE


def parts(W_nk: Matrix, rows: int) -> list[slice]:
    """Where some rows after the other begin and end."""
    return [slice(i, min(i + rows, len(W_nk))) for i in range(0, len(W_nk), rows)]


def every(W_nk: Matrix, step: int, rows: int) -> Tensor:
    """Each `step`-th row, from the first on, `rows` in hand at a time."""
    return torch.cat([W_nk[at][-at.start % step :: step] for at in parts(W_nk, rows)])
