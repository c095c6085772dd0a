"""How llama.cpp's blocks lie in bytes: fields, planes of bits, and the integers of groups. What they mean is in superblocks.py
and lattice.py.

The order of bytes is that of ggml (github.com/ggml-org/llama.cpp, ggml-common.h). A `Plane` has the bits from `shift` on of each
code; those of codes that are `width` apart share a byte, the first lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.grid import Can, Listing, Shape, listed_bytes

SUPER = 256
NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's table of iq4


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes of a block: `bits` of each from `shift` on; codes `width` apart share a byte."""

    shift: int
    bits: int
    width: int

    def write(self, codes: Tensor) -> Tensor:
        """uint8 [..., weights of a block * bits / 8] of codes [..., weights of a block]."""
        parts = (codes >> self.shift & (1 << self.bits) - 1).unflatten(-1, (-1, 8 // self.bits, self.width))
        shifts = torch.arange(0, 8, self.bits, device=codes.device, dtype=torch.uint8)[:, None]
        found: Tensor = (parts << shifts).sum(-2, dtype=torch.uint8).flatten(-2)
        return found

    def read(self, data: Tensor) -> Tensor:
        """The inverse, with all other bits of the codes zero."""
        shifts = torch.arange(0, 8, self.bits, device=data.device, dtype=torch.uint8)[:, None]
        parts = data.unflatten(-1, (-1, 1, self.width)) >> shifts & (1 << self.bits) - 1
        found: Tensor = parts.flatten(-3) << self.shift
        return found

    def nbytes(self, block: int) -> int:
        return block * self.bits // 8


@dataclass(frozen=True)
class Kind:
    """What a type of blocks is made of, its fields in the order of bytes; see the table above.

    least, most: of the groups' integers; None where a group is a block. low: whether levels begin at a number of their own.
    zero: the code that stands for 0 without one. table: the levels, where they are no integers in a row.
    """

    bits: int
    block: int
    group: int
    fields: tuple[str | Plane, ...]
    least: int | None = None
    most: int | None = None
    low: bool = False
    table: tuple[int, ...] | None = None

    @property
    def zero(self) -> int:
        return 0 if self.low or self.table else 1 << (self.bits - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(f.nbytes(self.block) if isinstance(f, Plane) else self.width(f) for f in self.fields)

    def width(self, field: str) -> int:
        return SCALES[field].nbytes if field in SCALES else 2


# --- how the integers of groups lie in bytes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scales:
    """Bytes [..., nbytes] of the integers sc and, or zeros, mn [..., groups], and back; both as unsigned numbers, int16."""

    nbytes: int
    write: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def _halves(sc: Tensor, mn: Tensor) -> Tensor:
    return sc | mn << 4


def _halves_back(b: Tensor) -> tuple[Tensor, Tensor]:
    return b & 15, b >> 4


def _sixes(sc: Tensor, mn: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes: the first four of each whole, the upper bits of the last four above them."""
    first, last = slice(0, 4), slice(4, 8)
    return torch.cat([sc[..., first] | sc[..., last] >> 4 << 6, mn[..., first] | mn[..., last] >> 4 << 6,
                      sc[..., last] & 15 | (mn[..., last] & 15) << 4], -1)  # fmt: skip


def _sixes_back(b: Tensor) -> tuple[Tensor, Tensor]:
    top, low, both = b[..., 0:4], b[..., 4:8], b[..., 8:12]
    sc = torch.cat([top & 63, both & 15 | top >> 6 << 4], -1)
    return sc, torch.cat([low & 63, both >> 4 | low >> 6 << 4], -1)


def _signed_sixes(sc: Tensor, _: Tensor) -> Tensor:
    """16 scales of 6 bits in 12 bytes: lower halves of the first and last eight, then the upper bits, four to a byte."""
    upper = (sc >> 4).unflatten(-1, (4, 4)) << torch.arange(0, 8, 2, device=sc.device, dtype=sc.dtype)[:, None]
    return torch.cat([sc[..., :8] & 15 | (sc[..., 8:] & 15) << 4, upper.sum(-2, dtype=sc.dtype)], -1)


def _signed_sixes_back(b: Tensor) -> tuple[Tensor, Tensor]:
    lower = torch.cat([b[..., :8] & 15, b[..., :8] >> 4], -1)
    shifts = torch.arange(0, 8, 2, device=b.device, dtype=b.dtype)[:, None]
    upper = (b[..., None, 8:] >> shifts & 3).flatten(-2)
    return lower | upper << 4, torch.zeros_like(lower)


def _split_sixes(sc: Tensor, _: Tensor) -> Tensor:
    """8 scales of 6 bits: the upper two of each in 16 bits, then the lower four of two in a byte."""
    upper = ((sc >> 4).unflatten(-1, (2, 4)) << torch.arange(0, 8, 2, device=sc.device, dtype=sc.dtype)).sum(-1, dtype=sc.dtype)
    pairs = sc.unflatten(-1, (4, 2)) & 15
    return torch.cat([upper, pairs[..., 0] | pairs[..., 1] << 4], -1)


def _split_sixes_back(b: Tensor) -> tuple[Tensor, Tensor]:
    upper = (b[..., :2, None] >> torch.arange(0, 8, 2, device=b.device, dtype=b.dtype) & 3).flatten(-2)
    lower = torch.stack([b[..., 2:] & 15, b[..., 2:] >> 4], -1).flatten(-2)
    return lower | upper << 4, torch.zeros_like(lower)


SCALES: Mapping[str, Scales] = {
    "halves": Scales(16, _halves, _halves_back),
    "sixes": Scales(12, _sixes, _sixes_back),
    "signed sixes": Scales(12, _signed_sixes, _signed_sixes_back),
    "split sixes": Scales(6, _split_sixes, _split_sixes_back),
    "bytes": Scales(16, lambda sc, _: sc, lambda b: (b, torch.zeros_like(b))),
}

KINDS: Mapping[str, Kind] = {
    "q2_k": Kind(2, SUPER, 16, ("halves", Plane(0, 2, 32), "d", "m"), 0, 15, low=True),
    "q3_k": Kind(3, SUPER, 16, (Plane(2, 1, 32), Plane(0, 2, 32), "signed sixes", "d"), -32, 31),
    "q4_k": Kind(4, SUPER, 32, ("d", "m", "sixes", Plane(0, 4, 32)), 0, 63, low=True),
    "q5_k": Kind(5, SUPER, 32, ("d", "m", "sixes", Plane(4, 1, 32), Plane(0, 4, 32)), 0, 63, low=True),
    "q6_k": Kind(6, SUPER, 16, (Plane(0, 4, 64), Plane(4, 2, 32), "bytes", "d"), -128, 127),
    "iq4_xs": Kind(4, SUPER, 32, ("d", "split sixes", Plane(0, 4, 16)), -32, 31, table=NL),
    "iq4_nl": Kind(4, 32, 32, ("d", Plane(0, 4, 16)), table=NL),
    "q4_1": Kind(4, 32, 32, ("d", "m", Plane(0, 4, 16)), low=True),
    "q5_1": Kind(5, 32, 32, ("d", "m", Plane(4, 1, 1), Plane(0, 4, 16)), low=True),
}  # fmt: skip


# --- vector codes: points, signs, and the integers of groups ----------------------------------------------------------------


@dataclass(frozen=True)
class LatticeKind:
    """What a vector type is made of; see lattice.py. even: 7 bits of signs are stored. nbytes: of a block, d included.

    write, read: bytes behind d [..., nbytes - 2] of points [..., 256 / dim], signs of eight [..., 32] and integers of groups
    [..., 256 / group], all int64, and back.
    """

    dim: int
    group: int
    even: bool
    c: float
    nbytes: int
    write: Callable[[Tensor, Tensor, Tensor], Tensor]
    read: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    block: int = SUPER


def _bytes(x: Tensor, count: int) -> Tensor:
    """Little-endian bytes [..., n * count] of numbers [..., n]."""
    found: Tensor = (x[..., None] >> torch.arange(0, 8 * count, 8, device=x.device) & 255).flatten(-2).to(torch.uint8)
    return found


def _numbers(b: Tensor, count: int) -> Tensor:
    """Numbers [..., n] of little-endian bytes [..., n * count]."""
    found: Tensor = (b.unflatten(-1, (-1, count)) << torch.arange(0, 8 * count, 8, device=b.device)).sum(-1)
    return found


def _fields(x: Tensor, width: int) -> Tensor:
    """Numbers [..., n / m] that hold m of `width` bits, where the last dimension is m: [..., n, m] -> [..., n]."""
    return (x << torch.arange(0, width * x.shape[-1], width, device=x.device)).sum(-1)


def _split(x: Tensor, width: int, count: int) -> Tensor:
    return x[..., None] >> torch.arange(0, width * count, width, device=x.device) & (1 << width) - 1


def _signs_and_scale(signs: Tensor, s: Tensor) -> Tensor:
    """32 bits a group of 32: four times seven signs, and the integer on top."""
    return _fields(signs.unflatten(-1, (-1, 4)) & 127, 7) | s << 28


def _write_2xxs(index: Tensor, signs: Tensor, s: Tensor) -> Tensor:
    first, second = _bytes(index, 1).unflatten(-1, (-1, 4)), _bytes(_signs_and_scale(signs, s), 4).unflatten(-1, (-1, 4))
    return torch.cat([first, second], -1).flatten(-2)


def _read_2xxs(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = b.unflatten(-1, (-1, 8))
    word = _numbers(parts[..., 4:].flatten(-2), 4)
    return parts[..., :4].flatten(-2), _split(word, 7, 4).flatten(-2), word >> 28


def _write_2xs(index: Tensor, signs: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_bytes(index | (signs & 127) << 9, 2), _bytes(_fields(s.unflatten(-1, (-1, 2)), 4), 1)], -1)


def _read_2xs(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    word = _numbers(b[..., :64], 2)
    return word & 511, word >> 9, _split(b[..., 64:], 4, 2).flatten(-2)


def _write_2s(index: Tensor, signs: Tensor, s: Tensor) -> Tensor:
    high = _fields(index.unflatten(-1, (-1, 4)) >> 8, 2)
    return torch.cat([_bytes(x, 1) for x in (index, signs, high, _fields(s.unflatten(-1, (-1, 2)), 4))], -1)


def _read_2s(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = _split(b[..., 64:72], 2, 4).flatten(-2)
    return b[..., :32] | high << 8, b[..., 32:64], _split(b[..., 72:], 4, 2).flatten(-2)


def _write_3xxs(index: Tensor, signs: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_bytes(index, 1), _bytes(_signs_and_scale(signs, s), 4)], -1)


def _read_3xxs(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    word = _numbers(b[..., 64:], 4)
    return b[..., :64], _split(word, 7, 4).flatten(-2), word >> 28


def _write_3s(index: Tensor, signs: Tensor, s: Tensor) -> Tensor:
    high = _fields(index.unflatten(-1, (-1, 8)) >> 8, 1)
    return torch.cat([_bytes(x, 1) for x in (index, high, signs, _fields(s.unflatten(-1, (-1, 2)), 4))], -1)


def _read_3s(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = _split(b[..., 64:72], 1, 8).flatten(-2)
    return b[..., :64] | high << 8, b[..., 72:104], _split(b[..., 104:], 4, 2).flatten(-2)


LATTICES: Mapping[str, LatticeKind] = {
    "iq2_xxs": LatticeKind(8, 32, True, 0.125, 66, _write_2xxs, _read_2xxs),
    "iq2_xs": LatticeKind(8, 16, True, 0.125, 74, _write_2xs, _read_2xs),
    "iq2_s": LatticeKind(8, 16, False, 0.125, 82, _write_2s, _read_2s),
    "iq3_xxs": LatticeKind(4, 32, True, 0.25, 98, _write_3xxs, _read_3xxs),
    "iq3_s": LatticeKind(4, 32, False, 1.0, 110, _write_3s, _read_3s),
}
TYPES: Mapping[str, Kind | LatticeKind] = {**KINDS, **LATTICES}


class Stored:
    """What all types share that lie in llama.cpp's blocks: their tensors, and which matrices they fit."""

    kind: str
    can: ClassVar[Can] = Can.GIVE_ROWS | Can.SKIP_ROWS

    def __str__(self) -> str:
        return self.kind

    @property
    def of(self) -> Kind | LatticeKind:
        raise NotImplementedError

    def check(self, shape: Shape) -> None:
        """FormatError where whole blocks do not fill the rows of a weight [N, K]."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        if shape[1] % self.of.block:
            fitting = [name for name, kind in KINDS.items() if shape[1] % kind.block == 0]
            hint = f"those of 32 do: {', '.join(fitting)}" if fitting else "none of llama.cpp's do; use int<bits>:g<group>"
            raise FormatError(f"{self}: blocks of {self.of.block} do not divide {shape[1]} inputs; {hint}")

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight [N, K]; units are fp16 whatever `scale_dtype`."""
        self.check(shape)
        row = shape[1] // self.of.block * self.of.nbytes
        return {"weight_blocks": (torch.uint8, (shape[0], row)), "weight_shape": (torch.int64, (2,))}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`."""
        return listed_bytes(self.tensors(shape))
