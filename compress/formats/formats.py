"""What a weight becomes on disk: frozen value objects that know codes, bytes and dequantization.

A format has a text form that round-trips, `parse(str(f)) == f`:

    int4:g128          4-bit integers, one scale for 128 inputs, symmetric
    int3:g64:asym      3-bit integers, a scale and a zero point for 64 inputs
    int8:channel       8-bit integers, one scale for each output
    nf3:g64:dq8x256    a table of levels, see codebooks.py; so do lut3:g64 and lut3:g64:shared
    int3:g64+r16       any of these plus a product of two factors of rank 16
    bf16 fp16 fp32     no quantization

Two laws hold for every format. `nbytes(shape)` is exactly what the exporter writes for the matrix, scales and zero points
included. And a format knows nothing of calibration: rounding, GPTQ and every other solver drive the same `fit`, `encode`
and `decode`, so each format works under each solver.

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

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError, did_you_mean
from compress.formats import bitpack
from compress.formats.codebooks import NF, DoubleQuant, Lut
from compress.formats.grid import GROUPS, Grid, Grouped, Listing, Shape, Storage, listed_bytes, plain, restore, round_scale

_DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_BITS = range(2, 9)


@dataclass(frozen=True)
class Int(Grouped):
    """Uniform integers of `bits` bits; `group` inputs share a scale, or all inputs of an output when it is None."""

    bits: int
    group: int | None
    symmetric: bool = True
    joint: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    rescalable: ClassVar[bool] = True
    double: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise FormatError(f"an integer format has {_BITS[0]} to {_BITS[-1]} bits, not {self.bits}")
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
    joint: ClassVar[bool] = False
    _names: ClassVar[dict[torch.dtype, str]] = {v: k for k, v in _DENSE.items()}

    def __post_init__(self) -> None:
        if self.dtype not in self._names:
            raise FormatError(f"a dense format is one of {', '.join(_DENSE)}, not {self.dtype}")

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


@dataclass(frozen=True)
class LowRank:
    """A quantized matrix Q plus a product of rank `rank`: W = Q + B A, with A [r, K] and B [N, r], stored in `factors`.

    Quantized factors are A [r, K] and the transpose of B, [r, N], so that groups run along the long side. Dense ones are
    `lora_A.weight` [r, K] and `lora_B.weight` [N, r], as PEFT names and shapes them.
    """

    base: Int | NF | Lut
    rank: int
    factors: Int | NF | Lut | Dense = Dense(torch.bfloat16)

    def __post_init__(self) -> None:
        if not isinstance(self.base, Int | NF | Lut):
            raise FormatError(f"low-rank factors go with a quantized matrix, as in int4:g64+r16, not with {self.base}")
        if not isinstance(self.factors, Int | NF | Lut | Dense):
            raise FormatError(f"low-rank factors are dense or quantized, as in int4:g64+r16:int8:g64, not {self.factors}")
        if self.rank < 1:
            raise FormatError(f"a rank is 1 or more, not {self.rank}; without factors it is {self.base}")

    def __str__(self) -> str:
        return f"{self.base}+r{self.rank}" + ("" if self.factors == Dense(torch.bfloat16) else f":{self.factors}")

    @property
    def joint(self) -> bool:
        """The factors belong to one matrix."""
        return True

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        self.base.check(shape)
        if self.rank > min(shape):
            raise FormatError(f"{self}: the rank is above {min(shape)}, the smaller side of the matrix {list(shape)}; lower it")
        for side in shape:
            self.factors.check((self.rank, side))

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]: Q's, then `lora_A.*`, `lora_B.*`."""
        self.check(shape)
        listing = self.base.tensors(shape, scale_dtype)
        for name, side in self.factor_shapes(shape).items():
            listing |= {f"{name}.{suffix}": entry for suffix, entry in self.factors.tensors(side, scale_dtype).items()}
        return listing

    def factor_shapes(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """The factors' names, and their shapes as they are stored beside a matrix of `shape` [N, K]."""
        n, k = shape
        return {"lora_A": (self.rank, k), "lora_B": (n, self.rank) if isinstance(self.factors, Dense) else (self.rank, n)}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`, factors included."""
        return listed_bytes(self.tensors(shape))

    def pack(
        self, base: Mapping[str, Tensor], A_rk: Tensor, B_nr: Tensor, scale_dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Tensor]:
        """The packed tensors of Q and the factors, fp32, as the tensors that `tensors` lists; the factors are rounded to nearest.

        FormatError where the factors are not of this rank, or do not go with the matrix.
        """
        shape = tuple(int(x) for x in base["weight_shape"])
        if (B_nr.shape[0], A_rk.shape[1]) != shape or {A_rk.shape[0], B_nr.shape[1]} != {self.rank}:
            raise FormatError(f"{self}: factors {list(B_nr.shape)} and {list(A_rk.shape)} do not go with a matrix {list(shape)}; "
                              "give B [outputs, rank] and A [rank, inputs]")  # fmt: skip
        self.check(shape)
        out = dict(base)
        for name, factor in (("lora_A", A_rk), ("lora_B", B_nr.T)):
            out |= {f"{name}.{suffix}": t for suffix, t in self._pack_factor(factor, name == "lora_B", scale_dtype).items()}
        return out

    def factor_matrices(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r], fp32, as they are stored."""
        a, b = ({s.removeprefix(p): t for s, t in tensors.items() if s.startswith(p)} for p in ("lora_A.", "lora_B."))
        B = self.factors.dequantize(b, torch.float32)
        return self.factors.dequantize(a, torch.float32), B if isinstance(self.factors, Dense) else B.T

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Q + B A [N, K], summed in fp32 and rounded once, to `dtype`.

        The product is taken in fp64 and rounded to fp32: how an fp32 product is summed depends on threads and settings.
        """
        A_rk, B_nr = self.factor_matrices(tensors)
        W_nk = self.base.dequantize(tensors, torch.float32)
        A_rk, rows = A_rk.double(), max(1, _CHUNK // A_rk.shape[1])
        for i in range(0, len(W_nk), rows):
            W_nk[i : i + rows] += (B_nr[i : i + rows].double() @ A_rk).float()
        return W_nk.to(dtype)

    def _pack_factor(self, F_rx: Tensor, transposed: bool, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(self.factors, Dense):
            return {"weight": (F_rx.T if transposed else F_rx).to(self.factors.dtype).contiguous()}
        return self.factors.pack(*plain(F_rx.float().contiguous(), self.factors, scale_dtype))


Format = Int | NF | Lut | Dense | LowRank


def base_of(fmt: Format) -> Int | NF | Lut | Dense:
    """A format without its low-rank correction, if it has one."""
    return fmt.base if isinstance(fmt, LowRank) else fmt


def integers(formats: Mapping[str, Format]) -> dict[str, Int]:
    """Those of some sites' formats that are plain integers: what most engines have kernels for."""
    return {name: fmt for name, fmt in formats.items() if isinstance(fmt, Int)}


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

    def rows(self, rows: slice | list[int], dtype: torch.dtype) -> Tensor:
        """Some rows of the weight in `dtype`; of integers no others are decoded."""
        if not isinstance(self.format, Int):
            return self.dequantize(dtype)[rows]
        fmt, (n, k) = self.format, self.shape
        zero = None
        if not fmt.symmetric:
            zero = bitpack.unpack(self.tensors["weight_zero_point"].T, fmt.bits, n).T[rows].contiguous()
        codes = bitpack.unpack(self.tensors["weight_packed"][rows], fmt.bits, k)
        return restore(codes, Grid(self.tensors["weight_scale"][rows], zero), fmt, dtype)


_INT = re.compile(r"int(\d+):(?:g(\d+)|channel)(:asym)?")
_NF = re.compile(r"nf(\d+):g(\d+)(?::dq(\d+)x(\d+)(?::(bf16|fp16|fp32))?)?")
_LUT = re.compile(r"lut(\d+):g(\d+)(:shared)?")
_LOW_RANK = re.compile(r"([^+]+)\+r(\d+)(?::([^+]+))?")
_CHUNK = 1 << 22  # weights to which a product of factors is added at a time
_USUAL = [
    *(f"int{b}:{g}{a}" for b in _BITS for g in ("g32", "g64", "g128", "g256", "channel") for a in ("", ":asym")),
    *(f"nf{b}:g64{d}" for b in NF.WIDTHS for d in ("", ":dq8x256", ":dq8x256:fp32")),
    *(f"lut{b}:g64{s}" for b in Lut.WIDTHS for s in ("", ":shared")),
    *(f"{base}+r{r}" for base in ("int3:g64", "int4:g64", "nf3:g64:dq8x256") for r in (16, 64)),
    *_DENSE,
]
_ALLOWED = (
    "int<2..8>:g<16..256>[:asym], int<2..8>:channel[:asym], nf<2,3,4,8>:g<16..256>[:dq<2,3,4,8>x<16..4096>[:fp16|:fp32]], "
    "lut<2..4>:g<16..256>[:shared], <any of these>+r<rank>[:<format of factors>], " + ", ".join(_DENSE)
)


def parse(text: str) -> Format:
    """The format that `text` names; FormatError says what is allowed and the nearest right text."""
    if found := _LOW_RANK.fullmatch(text):
        base, rank, factors = found.groups()
        # what the types do not allow here, LowRank itself refuses
        return LowRank(parse(base), int(rank), parse(factors or "bf16"))  # type: ignore[arg-type]
    if text in _DENSE:
        return Dense(_DENSE[text])
    if found := _INT.fullmatch(text):
        bits, group, asym = found.groups()
        return Int(int(bits), int(group) if group else None, asym is None)
    if found := _NF.fullmatch(text):
        bits, group, *double = found.groups()
        return NF(int(bits), int(group), _double(*double) if double[0] else None)
    if found := _LUT.fullmatch(text):
        return Lut(int(found[1]), int(found[2]), found[3] is not None)
    raise FormatError(f"unknown format '{text}'{did_you_mean(text, _USUAL)}   allowed: {_ALLOWED}")


def _double(bits: str, block: str, top: str | None) -> DoubleQuant:
    return DoubleQuant(int(bits), int(block), _DENSE[top or "bf16"])
