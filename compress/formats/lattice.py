"""The vector codes of llama.cpp: eight weights of an output at a time, their signs apart, their magnitudes a point of a table.

    kind      bits a weight   points   of        signs of eight            a scale for
    iq2_xxs   2.0625             256   8 inputs  7 bits, an even number    32 inputs
    iq2_xs    2.3125             512   8         7 bits, an even number    16
    iq2_s     2.5625            1024   8         8 bits                    16
    iq3_xxs   3.0625             256   4         7 bits, an even number    32
    iq3_s     3.4375             512   4         8 bits                    32

A block has 256 weights and one fp16 number d; a group of 16 or 32 has an integer s of 4 bits, and a weight of it is

    d c (2 s + 1) point sign,    c = 1/8 for iq2, 1/4 for iq3_xxs, 1 for iq3_s

which fp32 holds exactly (11 bits of d, 5 of the odd number, 6 of the point). The points lie near spheres of the lattices E8 and
D4, thinned to what data wants; they are those of ggml (github.com/ggml-org/llama.cpp, ggml-common.h), and are read from the
package `gguf`, which has them. `weight_blocks`, uint8 [N, bytes of a row], is what a GGUF file has, byte for byte.

Eight weights share a choice, so there is no level nearest to a weight alone, and no grid: a solver of their own
(passes/lattice_core.py) does what GPTQ does for grids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.ggml import LATTICES, SUPER, LatticeKind, Stored
from compress.formats.grid import Shape

EIGHT = 8  # inputs that share signs
_CHUNK = 1 << 20  # weights decoded at a time


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the blocks of some rows hold: points int16 [N, K / dim], negative bool [N, K], odd (2 s + 1) int16 [N, groups], and
    d, fp16 numbers as fp32 [N, K / 256]."""

    points: Tensor
    negative: Tensor
    odd: Tensor
    d: Tensor


@dataclass(frozen=True)
class Lattice(Stored):
    """A vector type of llama.cpp, by its name in lower case."""

    kind: str
    joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in LATTICES:
            raise FormatError(f"the vector types of llama.cpp are {', '.join(LATTICES)}, not {self.kind}")

    @property
    def of(self) -> LatticeKind:
        return LATTICES[self.kind]

    @property
    def table(self) -> Tensor:
        """The points, fp32 [points, dim]."""
        return points(self.kind)

    def check(self, shape: Shape) -> None:
        """FormatError unless a weight of `shape` [N, K] can have this format, and its points are at hand."""
        super().check(shape)
        points(self.kind)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`."""
        blocks = tensors["weight_blocks"]
        rows = max(1, _CHUNK * self.of.nbytes // (SUPER * blocks.shape[1]))
        return torch.cat([self.restore(self.unpack(part)).to(dtype) for part in blocks.split(rows)])

    def restore(self, chosen: Chosen) -> Tensor:
        """The weights [N, K], fp32, that choices stand for."""
        scale = chosen.d[..., None] * self.of.c * chosen.odd.unflatten(-1, (-1, SUPER // self.of.group))
        table = self.table.to(chosen.points.device)
        found = table[chosen.points.long()].flatten(-2).unflatten(-1, (-1, self.of.group)) * scale.flatten(-2)[..., None]
        found = found.flatten(-2)
        return torch.where(chosen.negative, -found, found)

    def pack(self, chosen: Chosen) -> dict[str, Tensor]:
        """The tensors that `tensors` lists; with signs of 7 bits, of eight an even number has to be negative."""
        n, k = chosen.negative.shape
        blocks = k // SUPER
        d = chosen.d.to(torch.float16).view(n, blocks, 1).view(torch.uint8)
        index = chosen.points.view(n, blocks, -1).to(torch.int64)
        signs = _bits(chosen.negative.view(n, blocks, SUPER // EIGHT, EIGHT).to(torch.int64))
        s = (chosen.odd.view(n, blocks, -1).to(torch.int64) - 1) // 2
        body = self.of.write(index, signs, s)
        return {"weight_blocks": torch.cat([d, body], -1).flatten(1).contiguous(), "weight_shape": torch.tensor([n, k])}

    def unpack(self, blocks: Tensor) -> Chosen:
        """What the blocks [N, bytes of a row] hold."""
        data = blocks.unflatten(-1, (-1, self.of.nbytes))
        d = data[..., :2].contiguous().view(torch.float16).float()[..., 0]
        index, signs, s = self.of.read(data[..., 2:].to(torch.int64))
        if self.of.even:
            signs = signs | _odd(signs) << 7
        negative = (signs[..., None] >> torch.arange(EIGHT, device=signs.device) & 1).bool()
        return Chosen(index.flatten(1).to(torch.int16), negative.flatten(1), (2 * s + 1).flatten(1).to(torch.int16), d)


@cache
def points(kind: str) -> Tensor:
    """The points of a kind, fp32 [points, dim]; FormatError where the package that has them is not installed."""
    try:
        from gguf import quants
    except ImportError:
        todo = "pip install 'compress-pipeline[gguf]'"
        raise FormatError(f"{kind} needs the package gguf, which has its points:  {todo}") from None
    source = getattr(quants, kind.upper())
    source.init_grid()
    return torch.from_numpy(source.grid.copy()).view(-1, LATTICES[kind].dim)


def _bits(flags: Tensor) -> Tensor:
    """The numbers whose bits, the lowest first, are the last dimension."""
    return (flags << torch.arange(flags.shape[-1], device=flags.device)).sum(-1)


def _odd(signs: Tensor) -> Tensor:
    """Whether an odd number of seven bits is set."""
    return (signs[..., None] >> torch.arange(7, device=signs.device) & 1).sum(-1) & 1
