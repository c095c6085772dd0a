"""What a weight becomes on disk: frozen value objects that know codes, bytes and dequantization.

A format has a text form that round-trips, `parse(str(f)) == f`:

    int4:g128          4-bit integers, one scale for 128 inputs, symmetric
    int3:g64:asym      3-bit integers, a scale and a zero point for 64 inputs
    int8:channel       8-bit integers, one scale for each output
    bf16 fp16 fp32     no quantization

Two laws hold for every format. `nbytes(shape)` is exactly what the exporter writes for the matrix, scales and zero points
included. And a format knows nothing of calibration: rounding, GPTQ and every other solver drive the same `fit`, `encode`
and `decode`, so each format works under each solver.

The tensors are those of compressed-tensors' `pack-quantized` (>= 0.18), for a weight [N = outputs, K = inputs] with G groups:

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

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from compress import bitpack
from compress.errors import FormatError, did_you_mean

Shape = tuple[int, ...]
Spec = dict[str, tuple[torch.dtype, Shape]]

SCALE_BYTES = 2
_LEAST_SCALE = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float32: 2.0**-126}
_DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GROUPS = tuple(range(16, 257, 8))
_BITS = range(2, 9)


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the levels of each group lie: `scale` [...] and, for asymmetric formats, `zero` [...] as unsigned codes."""

    scale: Tensor
    zero: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Grid:
        """The grid with `f` applied to each of its tensors: to slice, transpose, reshape or convert it."""
        return Grid(f(self.scale), None if self.zero is None else f(self.zero))

    def where(self, keep: Tensor, other: Grid) -> Grid:
        """This grid where `keep` [...] is true, `other` elsewhere."""
        zero = None
        if self.zero is not None and other.zero is not None:
            zero = torch.where(keep, self.zero, other.zero)
        return Grid(torch.where(keep, self.scale, other.scale), zero)


@runtime_checkable
class Storage(Protocol):
    """What every format can do: name its tensors, count their bytes, and give the weights back."""

    def check(self, shape: Shape) -> None: ...
    def tensors(self, shape: Shape, scale_dtype: torch.dtype = ...) -> Spec: ...
    def nbytes(self, shape: Shape) -> int: ...
    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor: ...


@runtime_checkable
class Quantized(Storage, Protocol):
    """A format with a grid. Solvers use only this, so integers and codebooks are alike to them."""

    @property
    def levels(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    def groups(self, in_features: int) -> int: ...
    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid: ...
    def rescale(self, grid: Grid, by: Tensor) -> Grid: ...
    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor: ...
    def encode(self, w: Tensor, grid: Grid) -> Tensor: ...
    def decode(self, codes: Tensor, grid: Grid) -> Tensor: ...
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]: ...
    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]: ...


@dataclass(frozen=True)
class Int:
    """Uniform integers of `bits` bits; `group` inputs share a scale, or all inputs of an output when it is None."""

    bits: int
    group: int | None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise FormatError(f"an integer format has {_BITS[0]} to {_BITS[-1]} bits, not {self.bits}")
        if self.group is not None and self.group not in _GROUPS:
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
            fitting = ", ".join(f"g{g}" for g in _GROUPS if in_features % g == 0)
            hint = f"groups that do: {fitting}, or channel" if fitting else "only 'channel' does"
            raise FormatError(f"{self}: groups of {self.group} do not divide {in_features} inputs; {hint}")
        return in_features // self.group

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        self.groups(shape[1])

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Spec:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, k = shape
        spec: Spec = {
            "weight_packed": (torch.int32, (n, bitpack.words(k, self.bits))),
            "weight_scale": (scale_dtype, (n, self.groups(k))),
            "weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            spec["weight_zero_point"] = (torch.int32, (bitpack.words(n, self.bits), self.groups(k)))
        return spec

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`; the scales take 16 bits."""
        return _spec_bytes(self.tensors(shape))

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The finest grid that covers lo[...] ... hi[...] and zero, its scale rounded to `scale_dtype`.

        Symmetric: the scale's sign puts the larger extreme on the side with one level more. An empty range (0, 0) gets
        the scale 1, under which zeros stay zeros. The scale is finite and never 0.
        """
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        if self.symmetric:
            big, small = torch.maximum(hi, -lo), torch.minimum(hi, -lo)
            step = torch.maximum(big / self._middle, small / (self._middle - 1))
            return Grid(_scale(torch.where(hi > -lo, -step, step), scale_dtype))
        scale = _scale((hi - lo) / (self.levels - 1), scale_dtype)
        zero = (-lo / scale.to(lo.dtype)).round_().clamp_(0, self.levels - 1)
        return Grid(scale, zero.to(torch.uint8))

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by` and rounded again; zero points stay."""
        return Grid(_scale(grid.scale.to(by.dtype) * by, grid.scale.dtype), grid.zero)

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

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`, from the packed tensors."""
        codes, grid = self.unpack(tensors)
        grouped = codes.unflatten(1, (grid.scale.shape[1], -1))
        out = torch.empty(grouped.shape, dtype=dtype, device=codes.device)
        rows = max(1, _CHUNK // codes.shape[1])
        for i in range(0, len(codes), rows):
            part = grid.map(lambda t, i=i: t[i : i + rows, :, None])  # type: ignore[misc]
            out[i : i + rows] = self.decode(grouped[i : i + rows], part)
        return out.flatten(1)


@dataclass(frozen=True)
class Dense:
    """No quantization: one tensor `weight` in bf16, fp16 or fp32."""

    dtype: torch.dtype
    _names: ClassVar[dict[torch.dtype, str]] = {v: k for k, v in _DENSE.items()}

    def __post_init__(self) -> None:
        if self.dtype not in self._names:
            raise FormatError(f"a dense format is one of {', '.join(_DENSE)}, not {self.dtype}")

    def __str__(self) -> str:
        return self._names[self.dtype]

    def check(self, shape: Shape) -> None:
        """Any shape will do."""

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Spec:
        """The one tensor written; `scale_dtype` is not used."""
        return {"weight": (self.dtype, tuple(shape))}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of the tensor."""
        return _spec_bytes(self.tensors(shape))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`."""
        return tensors["weight"].to(dtype)


Format = Int | Dense


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in a format: the tensors that are written, under the names of `format.tensors`."""

    format: Storage
    shape: Shape
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which `format.nbytes(shape)` predicted."""
        return sum(t.nbytes for t in self.tensors.values())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return self.format.dequantize(self.tensors, dtype)


_TEXT = re.compile(r"int(\d+):(?:g(\d+)|channel)(:asym)?")
_CHUNK = 1 << 18  # weights decoded at a time, so that the temporaries stay in cache
_USUAL = [f"int{b}:{g}{a}" for b in _BITS for g in ("g32", "g64", "g128", "g256", "channel") for a in ("", ":asym")]


def parse(text: str) -> Format:
    """The format that `text` names; FormatError says what is allowed and the nearest right text."""
    if text in _DENSE:
        return Dense(_DENSE[text])
    match = _TEXT.fullmatch(text)
    if match is None:
        allowed = "int<2..8>:g<16..256>[:asym], int<2..8>:channel[:asym], " + ", ".join(_DENSE)
        raise FormatError(f"unknown format '{text}'{did_you_mean(text, [*_USUAL, *_DENSE])}   allowed: {allowed}")
    bits, group, asym = match.groups()
    return Int(int(bits), int(group) if group else None, asym is None)


def _scale(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`s` rounded to `dtype`: finite, at least the least number that engines do not flush, and 1 where it was 0 or NaN."""
    size = s.abs().clamp_(_LEAST_SCALE[dtype], torch.finfo(dtype).max)
    s = torch.where((s == 0) | s.isnan(), torch.ones_like(s), size.copysign_(s))
    return s.to(dtype)


def _spec_bytes(spec: Spec) -> int:
    return sum(dtype.itemsize * prod(shape) for dtype, shape in spec.values())
