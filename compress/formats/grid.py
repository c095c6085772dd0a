"""What formats are made of: grids, the two protocols that they fulfil, and what all formats with groups share.

A **grid** says where the levels of each group of weights lie. Solvers hold grids and hand them back to the format; what
a code means on a grid, only the format knows. Names of dimensions: N outputs, K inputs, G groups in a row, S super-blocks.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.errors import FormatError

Shape = tuple[int, ...]
Listing = dict[str, tuple[torch.dtype, Shape]]  # suffix -> what the tensor of that name is

GROUPS = tuple(range(16, 257, 8))
_LEAST_SCALE = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24, torch.float32: 2.0**-126}
_CHUNK = 1 << 18  # weights decoded at a time, so that the temporaries stay in cache


class Can(enum.Flag):
    """What can be done with a matrix in a format, beyond what all formats can."""

    NOTHING = 0
    LEARN = enum.auto()  # its numbers move by descent
    GIVE_ROWS = enum.auto()  # some rows are decoded without all others
    SKIP_ROWS = enum.auto()  # a row lies together, so that a product may leave some unread
    SKIP_COLUMNS = enum.auto()  # it can be turned over, so that a product may leave columns unread


@dataclass(frozen=True, eq=False)
class Double:
    """Scales as double quantization stores them: `codes` uint8 [N, G], `top` [S] in its stored dtype, `offset` [] fp32."""

    codes: Tensor
    top: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the levels of each group lie: `scale` [...] and, for asymmetric formats, `zero` [...] as unsigned codes.

    For codebooks also `table`, fp32 [levels], ascending, which all groups of the matrix share; and for scales that are
    themselves quantized `double`, their stored form, which belongs to a whole matrix: a part of a grid has none.

    In super-blocks (superblocks.py) levels begin at `low` [...], and scale and low are multiples of `unit` and `low_unit` [...].
    """

    scale: Tensor
    zero: Tensor | None = None
    table: Tensor | None = None
    double: Double | None = None
    low: Tensor | None = None
    unit: Tensor | None = None
    low_unit: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Grid:
        """The grid with `f` applied to what each group has: to slice, transpose, reshape or convert it. Without `double`."""
        zero, low, unit, low_unit = (x if x is None else f(x) for x in (self.zero, self.low, self.unit, self.low_unit))
        return Grid(f(self.scale), zero, self.table, None, low, unit, low_unit)

    def where(self, keep: Tensor, other: Grid) -> Grid:
        """This grid where `keep` [...] is true, `other` elsewhere; both have the same table. Without `double`."""

        def chosen(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else torch.where(keep, mine, theirs)

        pairs = ((self.zero, other.zero), (self.low, other.low), (self.unit, other.unit), (self.low_unit, other.low_unit))
        zero, low, unit, low_unit = (chosen(*pair) for pair in pairs)
        return Grid(torch.where(keep, self.scale, other.scale), zero, self.table, None, low, unit, low_unit)

    def on(self, table: Tensor) -> Grid:
        """The grid with the same scales on another table. Without `double`."""
        return replace(self, table=table, double=None)

    def to(self, device: torch.device | str) -> Grid:
        """The grid with all its tensors on `device`."""
        part = self.map(lambda t: t.to(device))
        table = None if self.table is None else self.table.to(device)
        double = self.double and Double(*(t.to(device) for t in (self.double.codes, self.double.top, self.double.offset)))
        return replace(part, table=table, double=double)

    @cached_property
    def middles(self) -> Tensor:
        """The points halfway between the levels of `table`, fp32 [levels - 1]."""
        assert self.table is not None
        return (self.table[1:] + self.table[:-1]) / 2


def join(parts: list[Grid], whole: Grid) -> Grid:
    """Grids [n, G] of consecutive outputs of `whole` [N, G] as one, with its table and its `double`."""

    def all_of(name: str) -> Tensor | None:
        found = [x for p in parts if (x := getattr(p, name)) is not None]
        return torch.cat(found) if found else None

    low, unit, low_unit = all_of("low"), all_of("unit"), all_of("low_unit")
    return Grid(torch.cat([p.scale for p in parts]), all_of("zero"), whole.table, whole.double, low, unit, low_unit)


@runtime_checkable
class Storage(Protocol):
    """What every format can do: name its tensors, count their bytes, and give the weights back."""

    @property
    def can(self) -> Can: ...
    @property
    def joint(self) -> bool: ...
    def check(self, shape: Shape) -> None: ...
    def tensors(self, shape: Shape, scale_dtype: torch.dtype = ...) -> Listing: ...
    def nbytes(self, shape: Shape) -> int: ...
    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor: ...


class Rounds(Protocol):
    """All that GPTQ's feedback asks of a format."""

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class Quantized(Storage, Protocol):
    """A format with a grid. Solvers use only this, so integers and codebooks are alike to them.

    `joint`: some parameters belong to the whole matrix, so that rows of several matrices cannot be solved as one.
    `learned`: the table may be fitted to the matrix. `rescalable`: `rescale` can move a scale without moving others.
    `settle`: a grid [N, G] of a whole matrix as it will be stored; weights are to be encoded on that.
    """

    @property
    def levels(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def learned(self) -> bool: ...
    @property
    def rescalable(self) -> bool: ...
    def groups(self, in_features: int) -> int: ...
    def width(self, in_features: int) -> int: ...
    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid: ...
    def settle(self, grid: Grid) -> Grid: ...
    def rescale(self, grid: Grid, by: Tensor) -> Grid: ...
    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor: ...
    def encode(self, w: Tensor, grid: Grid) -> Tensor: ...
    def decode(self, codes: Tensor, grid: Grid) -> Tensor: ...
    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]: ...
    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]: ...


@runtime_checkable
class Lowered(Quantized, Protocol):
    """One whose levels begin at a number of each group's own, which `relow` moves to the nearest that can be stored."""

    def relow(self, grid: Grid, low: Tensor) -> Grid: ...


class Grouped:
    """What all formats share whose inputs come in groups of `group`; None is one group for all inputs of an output."""

    group: int | None

    def width(self, in_features: int) -> int:
        """The number of inputs in a group of a row of `in_features`; the last group of a row may hold fewer."""
        return self.group or in_features

    def check(self: Quantized, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        self.groups(shape[1])

    def nbytes(self: Storage, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`; plain scales take 16 bits."""
        return listed_bytes(self.tensors(shape))

    def dequantize(self: Quantized, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`, from the packed tensors."""
        return restore(*self.unpack(tensors), self, dtype)


def in_groups(x: Tensor, width: int, dim: int) -> Tensor:
    """The dimension `dim` of `x`, K inputs, as two: [G, width]. Zeros fill a last group that is shorter; else it is a view."""
    short = -x.shape[dim] % width
    if short:
        x = torch.cat([x, x.new_zeros(*x.shape[:dim], short, *x.shape[dim + 1 :])], dim)
    groups: Tensor = x.unflatten(dim, (-1, width))
    return groups


def plain(W_nk: Tensor, fmt: Quantized, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Grid]:
    """Codes [N, K] and grid [N, G] of W rounded to nearest over the whole range of each group: no search, no data."""
    fmt.check(tuple(W_nk.shape))
    W_nGg = in_groups(W_nk, fmt.width(W_nk.shape[1]), 1)
    grid = fmt.settle(fmt.fit(W_nGg.amin(-1), W_nGg.amax(-1), scale_dtype))
    return encoded(W_nk, grid, fmt), grid


def encoded(W_nk: Tensor, grid: Grid, fmt: Quantized) -> Tensor:
    """The codes [N, K] of the levels on a grid [N, G] that are nearest to W."""
    k = W_nk.shape[1]
    codes = fmt.encode(in_groups(W_nk, fmt.width(k), 1), grid.map(lambda t: t[..., None]))
    return codes.flatten(1)[:, :k].contiguous()


def restore(codes_nk: Tensor, grid: Grid, fmt: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [N, K] in `dtype` of codes [N, K] on a grid [N, G]."""
    n, k = codes_nk.shape
    width, out = fmt.width(k), torch.empty(n, k, dtype=dtype, device=codes_nk.device)
    rows = max(1, _CHUNK // k)
    for i in range(0, n, rows):
        part = grid.map(lambda t, i=i: t[i : i + rows, :, None])  # type: ignore[misc]
        out[i : i + rows] = fmt.decode(in_groups(codes_nk[i : i + rows], width, 1), part).flatten(1)[:, :k]
    return out


def round_scale(s: Tensor, dtype: torch.dtype) -> Tensor:
    """`s` rounded to `dtype`: finite, at least the least number that engines do not flush, and 1 where it was 0 or NaN."""
    size = s.abs().clamp_(_LEAST_SCALE[dtype], torch.finfo(dtype).max)
    s = torch.where((s == 0) | s.isnan(), torch.ones_like(s), size.copysign_(s))
    return s.to(dtype)


def refuse_nan(W_nk: Tensor) -> None:
    """FormatError where a weight that is to be encoded holds what is no number."""
    if not bool(W_nk.sum(dtype=torch.float32).isfinite()):
        raise FormatError("the weight holds NaN or infinite numbers; it cannot be quantized")


def listed_bytes(listing: Listing) -> int:
    """Bytes of all tensors of a listing."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in listing.values())
