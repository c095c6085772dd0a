"""Formats whose levels are a table: NF, with optional double quantization of the scales, and Lut.

    nf4:g64                   the 16 NormalFloat levels, one 16-bit scale for 64 inputs
    nf3:g64:dq8x256           8 levels; the scales as 8-bit codes, 256 of them under one number in bf16
    nf4:g64:dq8x256:fp32      the same with that number in fp32 (or fp16)
    lut3:g64                  8 levels fitted to the matrix and stored with it
    lut3:g64:shared           8 levels that are constants of this file, the best for normal data

A code is an index into the table, which is ascending; it stands for the weight table[code] * scale. A weight goes to the
level that is nearest to w / scale; one that lies halfway goes to the lower code. The last group of a row may be shorter
than the others. A group of zeros gets the scale 0, under which every code is an exact 0.

NF is NormalFloat of QLoRA (arXiv 2305.14314) for any number of bits, and its double quantization is that of LQ-LoRA
(arXiv 2311.12023): the offset is the least scale of the matrix, where QLoRA takes the mean, so that what is left is
positive and the codes are unsigned. Its scale is the group's largest magnitude.

Lut has signed scales: the scale is the extreme of larger magnitude, with its sign, which so lands on +1 always, and the table
need not be symmetric: it spends no level on a -1 that half of the groups do not have. This costs no bit. The table is in fp16
and the scale in 16 bits, so fp32 holds their product exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import bitpack
from compress.formats.grid import GROUPS, Can, Double, Grid, Grouped, Listing, Shape, round_scale

_DELTA = 1 - (1 / 32 + 1 / 30) / 2  # the outermost quantile: that of bitsandbytes' NF4, used for any number of bits
_TOPS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOP_NAMES = {v: k for k, v in _TOPS.items()}
_BLOCKS = range(16, 4097)
# least squared error for normal data in groups of 64, each divided by its extreme with the sign
_LLOYD: dict[int, tuple[float, ...]] = {
    2: (-0.5237, -0.1276, 0.2191, 0.6590),
    3: (-0.7297, -0.4503, -0.2383, -0.0515, 0.1305, 0.3250, 0.5583, 0.9013),
    4: (-0.8617, -0.6777, -0.5342, -0.4137, -0.3068, -0.2083, -0.1149, -0.0241,
        0.0663, 0.1582, 0.2539, 0.3561, 0.4689, 0.5989, 0.7585, 0.9763),
}  # fmt: skip


class Codebook(Grouped):
    """What NF and Lut share: levels that are a table times a scale."""

    bits: int
    group: int
    symmetric: ClassVar[bool] = True  # there are no zero points

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    def groups(self, in_features: int) -> int:
        """The number of groups G in a row of `in_features` inputs; the last may be shorter than the others."""
        return -(-in_features // self.group)

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """The codes, uint8, of the levels nearest to `w`; elementwise, `grid` broadcasts."""
        return self._find(w, grid).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights, fp32 (fp64 for an fp64 grid), that `codes` stand for: one product, level times scale."""
        assert grid.table is not None
        dtype = torch.float64 if grid.scale.dtype == torch.float64 else torch.float32
        return torch.take(grid.table.to(dtype), codes.long()).mul_(grid.scale.to(dtype))

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """`decode(encode(w))` without the codes in between: the level nearest to `w`, in the dtype of `w`."""
        assert grid.table is not None
        level = torch.take(grid.table.to(w.dtype), self._find(w, grid), out=out)
        return level.mul_(grid.scale.to(w.dtype))

    def _find(self, w: Tensor, grid: Grid) -> Tensor:
        """Indices of the nearest levels. Under the scale 0 any will do: infinities find an end, 0/0 the last."""
        return torch.bucketize(w / grid.scale.to(w.dtype), grid.middles.to(w.dtype))

    def _listed(self, shape: Shape) -> Listing:
        return {
            "weight_packed": (torch.int32, (shape[0], bitpack.words(shape[1], self.bits))),
            "weight_shape": (torch.int64, (2,)),
        }

    def _pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {
            "weight_packed": bitpack.pack(codes, self.bits),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def _check_options(self, widths: tuple[int, ...]) -> None:
        kind = type(self).__name__.lower()
        if self.bits not in widths:
            raise FormatError(f"{kind} has {', '.join(map(str, widths))} bits, not {self.bits}")
        if self.group not in GROUPS:
            raise FormatError(f"a group of {kind} has 16 to 256 inputs, a multiple of 8, not {self.group}")


@dataclass(frozen=True)
class DoubleQuant:
    """Scales as codes of `bits` bits; `block` of them, running on over the rows, share a number of `dtype`.

    With o the least scale of the matrix and m the largest s - o of a super-block, a code c stands for the scale
    o + c * m / (2**bits - 1) (LQ-LoRA, arXiv 2311.12023). The last super-block may be shorter.
    """

    bits: int
    block: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.bits not in NF.WIDTHS:
            raise FormatError(f"doubly quantized scales have {', '.join(map(str, NF.WIDTHS))} bits, not {self.bits}")
        if self.block not in _BLOCKS:
            raise FormatError(f"a super-block has {_BLOCKS[0]} to {_BLOCKS[-1]} groups, not {self.block}")
        if self.dtype not in _TOP_NAMES:
            raise FormatError(f"the second level of scales is one of {', '.join(_TOPS)}, not {self.dtype}")

    def __str__(self) -> str:
        top = "" if self.dtype == torch.bfloat16 else f":{_TOP_NAMES[self.dtype]}"
        return f"dq{self.bits}x{self.block}{top}"

    def tensors(self, count: int) -> Listing:
        """The tensors written for `count` scales."""
        return {
            "weight_scale_packed": (torch.int32, (bitpack.words(count, self.bits),)),
            "weight_scale_top": (self.dtype, (-(-count // self.block),)),
            "weight_scale_offset": (torch.float32, (1,)),
        }

    def store(self, scale_nG: Tensor) -> Double:
        """Scales [N, G] of a whole matrix, none negative, as they are stored. A super-block of equal scales has m = 0."""
        flat = scale_nG.flatten().float()
        offset = flat.min()
        over = torch.nn.functional.pad(flat - offset, (0, -len(flat) % self.block)).view(-1, self.block)
        top = over.amax(1).clamp_(max=torch.finfo(self.dtype).max).to(self.dtype)
        share = torch.where(top[:, None] > 0, over / top.float()[:, None], 0.0)
        codes = (share * self._most).round_().clamp_(0, self._most).to(torch.uint8)
        return Double(codes.flatten()[: len(flat)].view(scale_nG.shape), top, offset)

    def scales(self, double: Double) -> Tensor:
        """The scales [N, G], fp32, that are stored: in fp32 code times m, over 2**bits - 1, plus the offset."""
        top = double.top.float().repeat_interleave(self.block)[: double.codes.numel()]
        steps = double.codes.flatten().float() * top
        # divided by a tensor: by a number, some devices would multiply with its rounded inverse
        return (steps / torch.full_like(top, self._most) + double.offset).view(double.codes.shape)

    def pack(self, double: Double) -> dict[str, Tensor]:
        """The tensors that `tensors` lists."""
        return {
            "weight_scale_packed": bitpack.pack(double.codes.flatten(), self.bits),
            "weight_scale_top": double.top.contiguous(),
            "weight_scale_offset": double.offset.reshape(1),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Double:
        """What `pack` stored of scales of `shape` [N, G]."""
        codes = bitpack.unpack(tensors["weight_scale_packed"], self.bits, shape[0] * shape[1])
        return Double(codes.view(shape), tensors["weight_scale_top"], tensors["weight_scale_offset"][0])

    @property
    def _most(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class NF(Codebook):
    """NormalFloat of `bits` bits over groups of `group` inputs; `double` quantizes the scales, else they take 16 bits.

    QLoRA (arXiv 2305.14314), with LQ-LoRA's (arXiv 2311.12023) choice of bits and double quantization.
    """

    bits: int
    group: int
    double: DoubleQuant | None = None
    WIDTHS: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    learned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_options(self.WIDTHS)

    def __str__(self) -> str:
        return f"nf{self.bits}:g{self.group}" + (f":{self.double}" if self.double else "")

    @property
    def can(self) -> Can:
        """Where scales are stored together no part of a matrix is read by itself."""
        return Can.LEARN if self.double else Can.LEARN | Can.SKIP_ROWS | Can.SKIP_COLUMNS

    @property
    def joint(self) -> bool:
        """Doubly quantized scales share an offset over the matrix, and their super-blocks cross rows."""
        return self.double is not None

    @property
    def rescalable(self) -> bool:
        """Whether one scale can move alone: not where they lie on a grid of their own."""
        return self.double is None

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, groups = shape[0], self.groups(shape[1])
        if self.double:
            return self._listed(shape) | self.double.tensors(n * groups)
        return self._listed(shape) | {"weight_scale": (scale_dtype, (n, groups))}

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid that covers lo[...] ... hi[...]: the scale is the largest magnitude, 0 for an empty range.

        It is rounded to `scale_dtype`, or stays in fp32 where `settle` is to quantize it.
        """
        big = torch.maximum(hi, -lo).clamp(min=0)
        return Grid(_scale_or_zero(big, torch.float32 if self.double else scale_dtype), None, _on(big, nf_table(self.bits)))

    def settle(self, grid: Grid) -> Grid:
        """The grid [N, G] with its scales as they will be stored."""
        if self.double is None:
            return grid
        stored = self.double.store(grid.scale)
        return Grid(self.double.scales(stored), None, grid.table, stored)

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by` and rounded again; doubly quantized scales stay as they are."""
        return grid if self.double else _rescaled(grid, by)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes [N, K] and settled grid [N, G] as the tensors that `tensors` lists; FormatError for a grid not settled."""
        grid = grid.to(codes.device)
        if self.double is None:
            return self._pack(codes) | {"weight_scale": grid.scale.contiguous()}
        if grid.double is None:
            raise FormatError(f"{self}: the grid is not that of a whole matrix as it is stored; encode on what `settle` gives")
        return self._pack(codes) | self.double.pack(grid.double)

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """The codes [N, K], uint8, and the grid [N, G] that `pack` stored."""
        n, k = (int(x) for x in tensors["weight_shape"])
        codes = bitpack.unpack(tensors["weight_packed"], self.bits, k)
        table = _on(codes, nf_table(self.bits))
        if self.double is None:
            return codes, Grid(tensors["weight_scale"], None, table)
        stored = self.double.unpack(tensors, (n, self.groups(k)))
        return codes, Grid(self.double.scales(stored), None, table, stored)


@dataclass(frozen=True)
class Lut(Codebook):
    """A table of 2**bits fp16 levels, fitted to the matrix or, `shared`, a constant; signed 16-bit scales by groups."""

    bits: int
    group: int
    shared: bool = False
    can: ClassVar[Can] = Can.LEARN | Can.SKIP_ROWS | Can.SKIP_COLUMNS
    WIDTHS: ClassVar[tuple[int, ...]] = (2, 3, 4)
    rescalable: ClassVar[bool] = True
    double: ClassVar[None] = None

    def __post_init__(self) -> None:
        self._check_options(self.WIDTHS)

    def __str__(self) -> str:
        return f"lut{self.bits}:g{self.group}" + (":shared" if self.shared else "")

    @property
    def joint(self) -> bool:
        """A fitted table belongs to one matrix."""
        return not self.shared

    @property
    def learned(self) -> bool:
        """Whether solvers may fit the table."""
        return not self.shared

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        listing = self._listed(shape) | {"weight_scale": (scale_dtype, (shape[0], self.groups(shape[1])))}
        return listing if self.shared else listing | {"weight_table": (torch.float16, (self.levels,))}

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid that takes the extreme of lo[...] ... hi[...] of larger magnitude to +1, on the table for normal data.

        The scale is that extreme, with its sign, rounded to `scale_dtype`; 0 for an empty range.
        """
        return Grid(_scale_or_zero(torch.where(hi >= -lo, hi, lo), scale_dtype), None, _on(lo, lut_table(self.bits)))

    def settle(self, grid: Grid) -> Grid:
        """The grid as it is: scales and table are rounded already."""
        return grid

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by` and rounded again; the table stays."""
        return _rescaled(grid, by)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes [N, K] and grid [N, G] as the tensors that `tensors` lists."""
        grid = grid.to(codes.device)
        out = self._pack(codes) | {"weight_scale": grid.scale.contiguous()}
        assert grid.table is not None
        return out if self.shared else out | {"weight_table": grid.table.to(torch.float16)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """The codes [N, K], uint8, and the grid [N, G] that `pack` stored."""
        codes = bitpack.unpack(tensors["weight_packed"], self.bits, int(tensors["weight_shape"][1]))
        table = _on(codes, lut_table(self.bits)) if self.shared else tensors["weight_table"].float()
        return codes, Grid(tensors["weight_scale"], None, table)


def paper_grid() -> list[NF]:
    """The 432 configurations among which LQ-LoRA's code (arXiv 2311.12023) chooses, 2.03 to 8.63 bits a weight."""
    choices = product(NF.WIDTHS, NF.WIDTHS, _TOPS.values(), (16, 32, 64), (16, 64, 256))
    return [NF(bits, group, DoubleQuant(bits0, block, dtype)) for bits, bits0, dtype, group, block in choices]


@cache
def nf_table(bits: int) -> Tensor:
    """The NormalFloat levels, fp32 [2**bits]: quantiles of the normal distribution from -1 to 1, with an exact 0.

    Evenly spaced quantiles 1-d ... 1/2 below zero, 1/2 ... d above, where there is one level more; over the outermost.
    """
    half = 1 << (bits - 1)
    below = torch.linspace(1 - _DELTA, 0.5, half, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, _DELTA, half + 1, dtype=torch.float64)
    values: Tensor = torch.special.ndtri(torch.cat([below, above]))
    return (values / values[-1]).float()


@cache
def lut_table(bits: int) -> Tensor:
    """The shared levels, fp16 numbers as fp32 [2**bits]; see `_LLOYD`."""
    return torch.tensor(_LLOYD[bits], dtype=torch.float16).float()


def _on(like: Tensor, table: Tensor) -> Tensor:
    return table.to(like.device)


def _scale_or_zero(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`s` as a scale in `dtype`; only 0 itself becomes 0."""
    return torch.where(s == 0, torch.zeros((), dtype=dtype, device=s.device), round_scale(s, dtype))


def _rescaled(grid: Grid, by: Tensor) -> Grid:
    return Grid(_scale_or_zero(grid.scale.to(by.dtype) * by, grid.scale.dtype), None, grid.table)
