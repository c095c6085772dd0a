"""Weights as small floating-point numbers with a scale for each group, as engines of today's GPUs multiply by them.

    fp8:channel   e4m3 numbers, a 16-bit scale for each output
    nvfp4         e2m1 numbers in groups of 16, e4m3 scales over one fp32 number: 4.5 bits
    mxfp4         e2m1 numbers in groups of 32, scales that are powers of two: 4.25 bits
    mxfp8         e4m3 numbers in groups of 32, scales that are powers of two: 8.25 bits

The tensors are those of compressed-tensors (0.20), for a weight [N outputs, K inputs] with G groups:

    fp8:channel   weight e4m3 [N, K]           weight_scale 16-bit float [N, 1]
    nvfp4         weight_packed uint8 [N, K/2] weight_scale e4m3 [N, G]   weight_global_scale fp32 [1]
    mxfp4         weight_packed uint8 [N, K/2] weight_scale uint8 [N, G]
    mxfp8         weight e4m3 [N, K]           weight_scale uint8 [N, G]

Of a byte of `weight_packed` the lower half is the first input. A code of e2m1 is its sign, above the number of its magnitude. A
byte e of scales stands for 2^(e - 127). NVFP4's global scale is a divisor: a weight is code × (scale / global), both in fp32. So
are all others, but for the division: a product has few enough digits for fp32 to hold it exactly, and the one rounding is the
last, to the model's dtype.

These are grids like others, whose scales may not take any value. `fit` and `rescale` give such as can be stored, so a search
that only compares errors finds the best of them, and a refit by least squares, rounded to the nearest, never loses. NVFP4 needs
its global scale before that: `bound` fixes it for a matrix, or several that an engine joins, which so share it by construction.
It is such that the scale of the largest weight is 256: then the same weight may also become 4 in place of 6, with a scale of 384
(arXiv 2512.02010, "four over six"), which e4m3 holds; 448 would leave that out, and buys nothing since e4m3 is a float.
MX's scale is that of compressed-tensors (see activations.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.activations import BIAS, E2M1_MAX, E4M3, E4M3_MAX, divisor, power_of_two, rounded
from compress.formats.grid import Can, Grid, Grouped, Listing, Shape, round_scale

_TOP = 256.0  # NVFP4's largest scale, as stored: 1.5 times of it is still an e4m3 number
_E4M3_LEAST = 2.0**-9
CHUNK = 1 << 17  # bytes of codes decoded at a time, so that the temporaries stay in cache


@dataclass(frozen=True)
class Kind:
    """element: e2m1 or e4m3. group: inputs that share a scale; None: all. scale: what it is stored in, `own` being 16 bits."""

    element: str
    group: int | None
    scale: str


KINDS: dict[str, Kind] = {
    "fp8:channel": Kind("e4m3", None, "own"),
    "nvfp4": Kind("e2m1", 16, "e4m3"),
    "mxfp4": Kind("e2m1", 32, "e8m0"),
    "mxfp8": Kind("e4m3", 32, "e8m0"),
}


@dataclass(frozen=True)
class Float(Grouped):
    """Floating-point numbers of 4 or 8 bits, one of `KINDS`. unit: the global scale of NVFP4, once it is `bound`."""

    text: str
    unit: float | None = field(default=None, compare=False, repr=False)
    can: ClassVar[Can] = Can.SKIP_ROWS
    symmetric: ClassVar[bool] = True
    joint: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    rescalable: ClassVar[bool] = True
    double: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.text not in KINDS:
            raise FormatError(f"small floating-point formats are {', '.join(KINDS)}, not '{self.text}'")

    def __str__(self) -> str:
        return self.text

    @property
    def kind(self) -> Kind:
        return KINDS[self.text]

    @property
    def group(self) -> int | None:  # type: ignore[override]
        return self.kind.group

    @property
    def bits(self) -> int:
        return 4 if self.kind.element == "e2m1" else 8

    @property
    def levels(self) -> int:
        """The number of codes; one of them is a second zero, and of e4m3 two are no numbers."""
        return 1 << self.bits

    @property
    def shared(self) -> bool:
        """Whether there is a global scale, which an engine that joins matrices takes one of."""
        return self.kind.scale == "e4m3"

    def groups(self, in_features: int) -> int:
        """The number of groups G in a row of `in_features` inputs; FormatError if they do not divide it."""
        width = self.kind.group or in_features
        if in_features % width:
            raise FormatError(f"{self}: groups of {width} do not divide {in_features} inputs")
        if self.bits == 4 and in_features % 2:
            raise FormatError(f"{self}: two codes share a byte, and {in_features} inputs are odd")
        return in_features // width

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, k = shape
        stored = {"own": scale_dtype, "e4m3": E4M3, "e8m0": torch.uint8}[self.kind.scale]
        listing: Listing = {"weight_packed": (torch.uint8, (n, k // 2))} if self.bits == 4 else {"weight": (E4M3, (n, k))}
        listing["weight_scale"] = (stored, (n, self.groups(k)))
        return listing | ({"weight_global_scale": (torch.float32, (1,))} if self.shared else {})

    def bound(self, W_nk: Tensor) -> Float:
        """The format with the global scale that fits a matrix, or several below each other; itself where it has none."""
        return replace(self, unit=divisor(float(W_nk.abs().max()), _TOP)) if self.shared else self

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid whose largest number is at lo[...] or hi[...], as near as scales allow; their scales are never 0."""
        most = torch.maximum(hi, -lo).clamp(min=0)
        if self.kind.scale == "e8m0":
            return Grid(power_of_two(most.float(), BIAS[self.kind.element]).clamp(min=2.0**-126))
        most = most / (E2M1_MAX if self.bits == 4 else E4M3_MAX)
        return Grid(self._allowed(most, scale_dtype))

    def settle(self, grid: Grid) -> Grid:
        """The grid as it is: `fit` rounds already."""
        return grid

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by` and rounded to the nearest that can be stored."""
        return Grid(self._allowed(grid.scale.to(by.dtype) * by, grid.scale.dtype))

    def _allowed(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The nearest scales that can be stored: in `dtype` where they have 16 bits, else in fp32 as weights meet them."""
        if self.kind.scale == "own":
            return round_scale(scale, dtype)
        if self.kind.scale == "e8m0":
            mantissa, exponent = torch.frexp(scale.float())
            return torch.ldexp(torch.ones_like(mantissa), exponent - 1 + (mantissa >= 0.75).int()).clamp(2.0**-126, 2.0**127)
        assert self.unit is not None, "a matrix's global scale comes first: see `bound`"
        return (scale.float() * self.unit).clamp(_E4M3_LEAST, E4M3_MAX).to(E4M3).float() / self._unit(scale)

    def _unit(self, like: Tensor) -> Tensor:
        """The global scale as a tensor: divided by a number, some devices would multiply with its rounded inverse."""
        return torch.full((), self.unit or 1.0, dtype=torch.float32, device=like.device)

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """The level nearest to `w`, ties to even, in the dtype of `w`; elementwise, `grid` broadcasts."""
        scale = grid.scale.to(w.dtype)
        found = rounded(w / scale, self.kind.element).mul_(scale)
        return found if out is None else out.copy_(found)

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """The codes, uint8, of the levels nearest to `w`; of the two zeros the positive one."""
        value = rounded((w / grid.scale.to(w.dtype)).float(), self.kind.element)
        value = torch.where(value == 0, 0.0, value)
        if self.bits == 8:
            return value.to(E4M3).view(torch.uint8)
        size = value.abs()
        number = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
        return (number + 8 * (value < 0)).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights, fp32 (fp64 for an fp64 grid), that `codes` stand for: one product, number times scale."""
        dtype = torch.float64 if grid.scale.dtype == torch.float64 else torch.float32
        if self.bits == 8:
            return codes.view(E4M3).to(dtype).mul_(grid.scale.to(dtype))
        return e2m1_table(codes.device).to(dtype)[codes.long()].mul_(grid.scale.to(dtype))

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes [N, K] and grid [N, G] as the tensors that `tensors` lists."""
        scale = grid.scale.to(codes.device)
        codes = codes.contiguous()
        found = {"weight": codes.view(E4M3)} if self.bits == 8 else {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4}
        if self.kind.scale == "own":
            return found | {"weight_scale": scale.contiguous()}
        if self.kind.scale == "e8m0":
            return found | {"weight_scale": (torch.frexp(scale).exponent + 126).to(torch.uint8).contiguous()}
        kept = (scale.float() * self._unit(scale)).to(E4M3).contiguous()
        return found | {"weight_scale": kept, "weight_global_scale": self._unit(scale).reshape(1)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """The codes [N, K], uint8, and the grid [N, G] that `pack` stored."""
        if self.bits == 8:
            codes = tensors["weight"].contiguous().view(torch.uint8)
        else:
            packed = tensors["weight_packed"]
            codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
        return codes, Grid(self.scales(tensors))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`, from the packed tensors of all its rows or of some; a byte at a time is looked up."""
        codes = tensors["weight"].view(torch.uint8) if self.bits == 8 else tensors["weight_packed"]
        scale, (n, m) = self.scales(tensors), codes.shape
        out = torch.empty(n, m * 8 // self.bits, dtype=dtype, device=codes.device)
        table, rows = numbers_of_bytes(self.kind.element, codes.device), max(1, CHUNK // m)
        for i in range(0, n, rows):
            found = table.index_select(0, codes[i : i + rows].flatten().int()).view(torch.float32).view(-1, out.shape[1])
            grouped = found.unflatten(1, (scale.shape[1], -1)).mul_(scale[i : i + rows, :, None].float())
            out[i : i + rows] = grouped.flatten(1)
        return out

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scales of some rows [n, G] as weights meet them."""
        stored = tensors["weight_scale"]
        if self.kind.scale == "own":
            return stored
        if self.kind.scale == "e8m0":
            return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - 127)
        return stored.float() / tensors["weight_global_scale"]


@cache
def numbers_of_bytes(element: str, device: torch.device) -> Tensor:
    """What each byte of codes stands for: an fp32 number, or two of them as one wide one [256]."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    if element == "e4m3":
        return codes.view(E4M3).float().to(device)
    pairs = torch.stack([codes & 15, codes >> 4], 1).long()
    return e2m1_table()[pairs].view(torch.int64).flatten().to(device)


@cache
def e2m1_table(device: torch.device | str = "cpu") -> Tensor:
    """The numbers of e2m1 by code, fp32 [16]."""
    size = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
    return torch.cat([size, -size]).to(device)
