"""The plain formats: integers with a scale for each group, and numbers as they are.

The tensors of integers are those of compressed-tensors' `pack-quantized` (>= 0.18), for a weight [N = outputs, K = inputs]
with G groups:

    weight_packed      int32 [N, ceil(K*bits/32)]   the codes of a row as one bit stream (see bitpack.py)
    weight_scale       16-bit float [N, G]
    weight_zero_point  int32 [ceil(N*bits/32), G]   only asymmetric; the same stream, along N
    weight_shape       int64 [2]                    N, K

A code u is unsigned, 0 <= u < 2**bits, and stands for the weight (u - z) * s, where z is the zero point, or 2**(bits-1) in
a symmetric format. The difference has at most 9 bits and the scale at most 11, so fp32 holds the product exactly: the one
rounding is the last, to the model's dtype, and an engine that multiplies in bf16 or fp16 gets the same bits.

The symmetric grid has one level more below zero than above. The sign of the scale is free, so a group's larger extreme can
always lie on the side that has the extra level: `fit` makes the scale negative where the largest weight is positive. This
takes the step of b bits from max/(2**(b-1) - 1) towards max/2**(b-1): half at 2 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import bitpack
from compress.formats.grid import GROUPS, Can, Grid, Grouped, Listing, Shape, listed_bytes, round_scale

DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BITS = range(2, 9)


@dataclass(frozen=True)
class Int(Grouped):
    """Uniform integers of `bits` bits; `group` inputs share a scale, or all inputs of an output when it is None."""

    bits: int
    group: int | None
    symmetric: bool = True
    can: ClassVar[Can] = Can.LEARN | Can.GIVE_ROWS | Can.SKIP_ROWS | Can.SKIP_COLUMNS
    joint: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    rescalable: ClassVar[bool] = True
    double: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise FormatError(f"an integer format has {BITS[0]} to {BITS[-1]} bits, not {self.bits}")
        if self.group is not None and self.group not in GROUPS:
            raise FormatError(f"a group has 16 to 256 inputs, a multiple of 8, not {self.group}; or use 'channel'")

    def __str__(self) -> str:
        group = "channel" if self.group is None else f"g{self.group}"
        return f"int{self.bits}:{group}" + ("" if self.symmetric else ":asym")

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    @property
    def _middle(self) -> int:
        return self.levels // 2

    def groups(self, in_features: int) -> int:
        """The number of groups G in a row of `in_features` inputs; FormatError if they do not divide it."""
        if self.group is None:
            return 1
        if in_features % self.group:
            fitting = ", ".join(f"g{g}" for g in GROUPS if in_features % g == 0)
            hint = f"groups that do: {fitting}, or channel" if fitting else "only 'channel' does"
            raise FormatError(f"{self}: groups of {self.group} do not divide {in_features} inputs; {hint}")
        return in_features // self.group

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, k = shape
        listing: Listing = {
            "weight_packed": (torch.int32, (n, bitpack.words(k, self.bits))),
            "weight_scale": (scale_dtype, (n, self.groups(k))),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            listing["weight_zero_point"] = (torch.int32, (bitpack.words(n, self.bits), self.groups(k)))
        return listing

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The finest grid that covers lo[...] ... hi[...] and zero, its scale rounded to `scale_dtype`.

        Symmetric: the scale's sign puts the larger extreme on the side with one level more. An empty range (0, 0) gets
        the scale 1, under which zeros stay zeros. The scale is finite and never 0.
        """
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if self.symmetric:
            big, small = torch.maximum(hi, -lo), torch.minimum(hi, -lo)
            step = torch.maximum(big / self._middle, small / (self._middle - 1))
            return Grid(round_scale(torch.where(hi > -lo, -step, step), scale_dtype))
        scale = round_scale((hi - lo) / (self.levels - 1), scale_dtype)
        zero = (-lo / scale.to(lo.dtype)).round_().clamp_(0, self.levels - 1)
        return Grid(scale, zero.to(torch.uint8))

    def settle(self, grid: Grid) -> Grid:
        """The grid as it is: `fit` rounds already."""
        return grid

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by` and rounded again; zero points stay."""
        return Grid(round_scale(grid.scale.to(by.dtype) * by, grid.scale.dtype), grid.zero)

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """The codes, uint8, of the levels nearest to `w`; elementwise, `grid` broadcasts."""
        q = (w / grid.scale.to(w.dtype)).round_()
        q += self._middle if grid.zero is None else grid.zero.to(w.dtype)
        return q.clamp_(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights, fp32 (fp64 for an fp64 grid), that `codes` stand for; exact, see the head of this file."""
        dtype = torch.float64 if grid.scale.dtype == torch.float64 else torch.float32
        zero = self._middle if grid.zero is None else grid.zero.to(dtype)
        return (codes.to(dtype) - zero).mul_(grid.scale.to(dtype))

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """`decode(encode(w))` without the codes in between: the level nearest to `w`, in the dtype of `w`."""
        scale = grid.scale.to(w.dtype)
        q = torch.div(w, scale, out=out).round_()
        if grid.zero is None:
            return q.clamp_(-self._middle, self._middle - 1).mul_(scale)
        zero = grid.zero.to(w.dtype)
        return q.add_(zero).clamp_(0, self.levels - 1).sub_(zero).mul_(scale)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes [N, K] and grid [N, G] as the tensors that `tensors` lists."""
        out = {
            "weight_packed": bitpack.pack(codes, self.bits),
            "weight_scale": grid.scale.contiguous(),
            "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if grid.zero is not None:
            out["weight_zero_point"] = bitpack.pack(grid.zero.T, self.bits).T.contiguous()
        return out

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """The codes [N, K], uint8, and the grid [N, G] that `pack` stored."""
        n, k = (int(x) for x in tensors["weight_shape"])
        zero = None
        if not self.symmetric:
            zero = bitpack.unpack(tensors["weight_zero_point"].T, self.bits, n).T.contiguous()
        return bitpack.unpack(tensors["weight_packed"], self.bits, k), Grid(tensors["weight_scale"], zero)


@dataclass(frozen=True)
class Dense:
    """No quantization: one tensor `weight` in bf16, fp16 or fp32."""

    dtype: torch.dtype
    can: ClassVar[Can] = Can.LEARN | Can.SKIP_ROWS | Can.SKIP_COLUMNS
    joint: ClassVar[bool] = False
    _names: ClassVar[dict[torch.dtype, str]] = {v: k for k, v in DENSE.items()}

    def __post_init__(self) -> None:
        if self.dtype not in self._names:
            raise FormatError(f"a dense format is one of {', '.join(DENSE)}, not {self.dtype}")

    def __str__(self) -> str:
        return self._names[self.dtype]

    def check(self, shape: Shape) -> None:
        """Any shape will do."""

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """The one tensor written; `scale_dtype` is not used."""
        return {"weight": (self.dtype, tuple(shape))}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the tensor."""
        return listed_bytes(self.tensors(shape))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`."""
        return tensors["weight"].to(dtype)


BF16 = Dense(torch.bfloat16)
