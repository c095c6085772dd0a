"""The block formats of llama.cpp that are no plain integers: K-quants, and the 4-bit ones on a table.

    kind     bits a weight   a block                levels of a group of inputs, code q
    q2_k     2.625           256 in 16 groups       d sc q - m mn      q 0..3     sc, mn 0..15
    q3_k     3.4375          256 in 16 groups       d sc (q - 4)       q 0..7     sc -32..31
    q4_k     4.5             256 in 8 groups        d sc q - m mn      q 0..15    sc, mn 0..63
    q5_k     5.5             256 in 8 groups        d sc q - m mn      q 0..31    sc, mn 0..63
    q6_k     6.5625          256 in 16 groups       d sc (q - 32)      q 0..63    sc -128..127
    iq4_xs   4.25            256 in 8 groups        d sc table[q]      16 levels  sc -32..31
    iq4_nl   4.5             32, one group          d table[q]         16 levels
    q4_1     5               32, one group          d q - m            q 0..15
    q5_1     6               32, one group          d q - m            q 0..31

d and m are fp16 numbers of the block, its **units**; sc and mn are integers of the group. `weight_blocks`, uint8 [N, bytes of a
row], is what lies in a GGUF file, byte for byte (ggml.py), so an export to one is a copy; beside it lies `weight_shape` alone.

How they fit the protocol of grids: `fit` gives each group the scale and the least level it wants, in fp32; `settle` finds a
block's units and rounds what the groups want to multiples of them; `rescale` and `relow` move one group's number along these, so
a solver refits scales to codes as it does elsewhere, and never leaves what can be stored. A scale of 0 is never stored: 1 serves
a group of zeros as well, and levels can then be divided by.

Every product is exact in fp32 (11 bits of d, up to 8 of sc, up to 8 of a level: 24 at most, for each kind), and the sum with the
least level is rounded once: llama.cpp computes the same number, whether it fuses the two or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.ggml import KINDS, SCALES, Kind, Plane, Stored
from compress.formats.grid import Grid, Grouped, round_scale

_TRIES = 18  # units tried for a block: where its extreme lands at the end of the integers, and on fewer of them
_LEAST = 2.0**-24


@dataclass(frozen=True)
class Blocks(Stored, Grouped):
    """A type of blocks of llama.cpp, by its name in lower case."""

    kind: str
    joint: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    rescalable: ClassVar[bool] = True
    double: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"the types of blocks are {', '.join(KINDS)}, not {self.kind}")

    @property
    def of(self) -> Kind:
        return KINDS[self.kind]

    @property
    def bits(self) -> int:
        return self.of.bits

    @property
    def group(self) -> int:  # type: ignore[override]
        return self.of.group

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.of.bits

    @property
    def symmetric(self) -> bool:
        """Whether levels go with the scale alone."""
        return not self.of.low

    def groups(self, in_features: int) -> int:
        """The number of groups G in a row; FormatError where whole blocks do not fill it."""
        Stored.check(self, (1, in_features))
        return in_features // self.of.group

    # --- grids ---------------------------------------------------------------------------------------------------------

    def fit(self, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Grid:
        """The finest levels that cover lo[...] ... hi[...] and zero, in fp32: `settle` rounds them."""
        kind, lo, hi = self.of, lo.clamp(max=0), hi.clamp(min=0)
        if kind.low:
            return Grid(_positive((hi - lo) / (self.levels - 1)), low=lo.float())
        big, small = torch.maximum(hi, -lo), torch.minimum(hi, -lo)
        below, above = (-kind.table[0], kind.table[-1]) if kind.table else (kind.zero, kind.zero - 1)
        step = torch.maximum(big / below, small / above)
        return Grid(_positive(step).copysign(lo.abs() - hi), table=self._table(lo))

    def settle(self, grid: Grid) -> Grid:
        """The grid [N, G] in what can be stored: units of blocks, and multiples of them."""
        kind = self.of
        if kind.least is None or kind.most is None:  # a group is a block
            scale = round_scale(grid.scale, torch.float16).float()
            low = None if grid.low is None else _half(grid.low).float()
            return Grid(scale, table=grid.table, low=low)
        per = kind.block // kind.group
        unit, whole = _units(grid.scale.unflatten(-1, (-1, per)), kind.least, kind.most)
        found = Grid((unit * _nonzero(whole)).flatten(-2), table=grid.table, unit=_spread(unit, per))
        if grid.low is None:
            return found
        below, steps = _units(-grid.low.unflatten(-1, (-1, per)), 0, kind.most)
        return Grid(found.scale, low=-(below * steps).flatten(-2), unit=found.unit, low_unit=_spread(below, per))

    def rescale(self, grid: Grid, by: Tensor) -> Grid:
        """The grid with each scale multiplied by `by`, as a multiple of its unit again; the units and least levels stay."""
        wanted, kind = grid.scale.to(by.dtype) * by, self.of
        if grid.unit is None:
            scale = round_scale(wanted, torch.float16).float()
        else:
            scale = grid.unit * _nonzero((wanted / grid.unit).round_().clamp_(kind.least, kind.most))
        return Grid(scale.to(grid.scale.dtype), table=grid.table, low=grid.low, unit=grid.unit, low_unit=grid.low_unit)

    def relow(self, grid: Grid, low: Tensor) -> Grid:
        """The grid with its least levels at the nearest to `low` that can be stored."""
        if grid.low_unit is None:
            low = low.clamp(max=0) if self.of.least is not None else _half(low).float()
        else:
            low = -grid.low_unit * (-low / grid.low_unit).round_().clamp_(0, self.of.most)
        return Grid(grid.scale, table=grid.table, low=low.to(grid.scale.dtype), unit=grid.unit, low_unit=grid.low_unit)

    def encode(self, w: Tensor, grid: Grid) -> Tensor:
        """The codes, uint8, of the levels nearest to `w`; elementwise, `grid` broadcasts."""
        return self._find(w, grid).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """The weights, fp32 (fp64 for an fp64 grid), that `codes` stand for."""
        dtype = torch.float64 if grid.scale.dtype == torch.float64 else torch.float32
        if grid.table is not None:
            return torch.take(grid.table.to(dtype), codes.long()).mul_(grid.scale.to(dtype))
        level = (codes.to(dtype) - self.of.zero).mul_(grid.scale.to(dtype))
        return level if grid.low is None else level.add_(grid.low.to(dtype))

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        """`decode(encode(w))` without the codes in between: the level nearest to `w`, in the dtype of `w`."""
        scale = grid.scale.to(w.dtype)
        if grid.table is not None:
            return torch.take(grid.table.to(w.dtype), self._find(w, grid), out=out).mul_(scale)
        if grid.low is None:
            zero = self.of.zero
            return torch.div(w, scale, out=out).round_().clamp_(-zero, zero - 1).mul_(scale)
        low = grid.low.to(w.dtype)
        level = torch.sub(w, low, out=out).div_(scale).round_().clamp_(0, self.levels - 1)
        return level.mul_(scale).add_(low)

    def _find(self, w: Tensor, grid: Grid) -> Tensor:
        """Indices of the nearest levels."""
        scale = grid.scale.to(w.dtype)
        if grid.table is not None:
            return torch.bucketize(w / scale, grid.middles.to(w.dtype))
        q = w / scale if grid.low is None else (w - grid.low.to(w.dtype)) / scale
        return q.round_().add_(self.of.zero).clamp_(0, self.levels - 1)

    def _table(self, like: Tensor) -> Tensor | None:
        return None if self.of.table is None else _levels(self.kind).to(like.device)

    # --- bytes ---------------------------------------------------------------------------------------------------------

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Codes [N, K] and settled grid [N, G] as the tensors that `tensors` lists."""
        kind, blocks = self.of, codes.unflatten(-1, (-1, self.of.block))
        wide = grid.map(lambda t: t.unflatten(-1, (blocks.shape[1], -1)).cpu())
        scale, low = wide.scale.float(), None if wide.low is None else -wide.low.float()
        held = {"d": scale[..., 0], "m": low[..., 0] if low is not None else scale[..., 0]}
        sc, mn = torch.zeros(1), torch.zeros(1)
        if wide.unit is not None:
            held["d"], sc = wide.unit[..., 0], (scale / wide.unit).round_() - (kind.least or 0) * (kind.bits != 6)
            if low is not None and wide.low_unit is not None:
                held["m"], mn = wide.low_unit[..., 0], (low / wide.low_unit).round_()
        if kind.low and wide.unit is None:
            held["m"] = -held["m"]  # of these the file has the least level itself
        parts = []
        for field in kind.fields:
            if isinstance(field, Plane):
                parts.append(field.write(blocks.cpu()))
            elif field in SCALES:
                parts.append(SCALES[field].write(sc.to(torch.int16), mn.to(torch.int16)).to(torch.uint8))
            else:
                parts.append(held[field].to(torch.float16)[..., None].contiguous().view(torch.uint8))
        return {"weight_blocks": torch.cat(parts, -1).flatten(1).contiguous(), "weight_shape": torch.tensor(codes.shape)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Grid]:
        """The codes [N, K], uint8, and the grid [N, G] that `pack` stored."""
        kind, data = self.of, tensors["weight_blocks"].unflatten(-1, (-1, self.of.nbytes))
        codes, held, at = torch.zeros(*data.shape[:2], kind.block, dtype=torch.uint8, device=data.device), {}, 0
        sc = mn = None
        for field in kind.fields:
            size = field.nbytes(kind.block) if isinstance(field, Plane) else kind.width(field)
            part, at = data[..., at : at + size], at + size
            if isinstance(field, Plane):
                codes |= field.read(part)
            elif field in SCALES:
                sc, mn = SCALES[field].read(part.to(torch.int16))
            else:
                held[field] = part.contiguous().view(torch.float16).float()
        return codes.flatten(1), self._grid(held, sc, mn)

    def _grid(self, held: Mapping[str, Tensor], sc: Tensor | None, mn: Tensor | None) -> Grid:
        """The grid of units [N, blocks, 1] and, where there are, integers [N, blocks, groups] as they are stored."""
        kind, table = self.of, self._table(held["d"])
        if sc is None or mn is None or kind.least is None:
            return Grid(held["d"].flatten(1), table=table, low=held["m"].flatten(1) if kind.low else None)
        whole = sc.to(torch.uint8).view(torch.int8) if kind.bits == 6 else sc + kind.least
        per = kind.block // kind.group
        unit = _spread(held["d"], per)
        if not kind.low:
            return Grid((held["d"] * whole).flatten(1), table=table, unit=unit)
        return Grid((held["d"] * whole).flatten(1), low=-(held["m"] * mn).flatten(1), unit=unit, low_unit=_spread(held["m"], per))


@cache
def _levels(kind: str) -> Tensor:
    return torch.tensor(KINDS[kind].table, dtype=torch.float32)


def _positive(step: Tensor) -> Tensor:
    """Steps that can be divided by: the least that fp16 has where there is none, which moves no unit of a block."""
    return step.clamp(min=_LEAST).float()


def _nonzero(whole: Tensor) -> Tensor:
    return torch.where(whole == 0, torch.ones_like(whole), whole)


def _half(x: Tensor) -> Tensor:
    """As fp16, as near as its range allows."""
    return x.clamp(-65504.0, 65504.0).to(torch.float16)


def _spread(unit: Tensor, per: int) -> Tensor:
    """A number of each block [N, blocks, 1] for each of its groups: [N, G]."""
    return unit.expand(*unit.shape[:-1], per).flatten(-2)


def _units(wanted: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """For blocks of numbers [N, blocks, groups]: the unit [N, blocks, 1], an fp16 number as fp32, and integers least ... most
    whose products with it are nearest to them, by the sum of squares. The extreme of a block lands on the far end or near it."""
    far = most if -least < most else least
    extreme = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True)).float()
    found = []
    for i in range(_TRIES):
        # from a little over the end, where the others are finer, to half of it
        unit = round_scale(extreme / (far * (1 + (1 - i) * 0.03)), torch.float16).float()
        found.append((unit, (wanted / unit).round_().clamp_(least, most)))
    errors = torch.stack([(unit * whole - wanted).square_().sum(-1) for unit, whole in found])
    best = errors.argmin(0)[None, ..., None]
    units, wholes = (torch.stack(parts) for parts in zip(*found, strict=True))
    return units.gather(0, best)[0], wholes.gather(0, best.expand_as(wholes[:1]))[0]
