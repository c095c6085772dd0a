"""A matrix as the CUDA kernels read it: codes in the order of tensor-core operands, and scales beside them.

The layout is drawn at the head of kernels/tile.cuh; here it is made from a format's own tensors and taken apart again, by
reshapes and shifts that run on any device. It is not stored: on disk there is one stream of bits whatever reads it.

    words     int32 [row tiles, units, 64*bits]   tiles of 16 outputs x 64 inputs, two of them a unit
    scales    int32 [row tiles, blocks, 8, 2*groups in a block]   fp32, or its upper three bytes and a zero point
    levels    fp32 [2**bits]                      only of tables

Outputs are padded to 16 and inputs to 128, with code 0 and scale 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.formats import Int
from compress.formats.codebooks import NF, Lut
from compress.formats.grid import Grid

ROWS, TILE, UNIT = 16, 64, 128  # outputs of a tile, inputs of a tile and of a unit
_PAIRS, _LANES = 16, 32  # a lane holds 16 pairs of codes of a tile

Base = Int | NF | Lut


@dataclass(frozen=True)
class Layout:
    """What shapes the words and scales of a format: `group` is 0 where an output has one scale; `table`: codes are indices."""

    bits: int
    group: int
    zeros: bool
    table: bool

    @staticmethod
    def of(fmt: Base) -> Layout:
        """The layout of matrices in `fmt`."""
        return Layout(fmt.bits, fmt.group or 0, not fmt.symmetric, not isinstance(fmt, Int))

    @property
    def count(self) -> int:
        """The number of groups in a block of scales."""
        return UNIT // self.group if 0 < self.group < UNIT else 1

    def blocks(self, in_features: int) -> int:
        """The number of blocks of scales in a row: a block is a unit, or a group where that is larger."""
        return -(-in_features // max(self.group, UNIT)) if self.group else 1


def pack(fmt: Base, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """[words, scales] or [words, scales, levels] of the tensors that `fmt.tensors(shape)` lists, on their device."""
    codes, grid = fmt.unpack(tensors)
    layout = Layout.of(fmt)
    parts = [pack_codes(codes, layout), pack_scales(grid, layout, codes.shape[1])]
    return parts if grid.table is None else [*parts, grid.table.float().contiguous()]


def unpack(parts: list[Tensor], fmt: Base, shape: tuple[int, int]) -> tuple[Tensor, Grid]:
    """The codes [N, K], uint8, and the grid [N, G] in fp32, of what `pack` made of a matrix of `shape` [N, K]."""
    layout = Layout.of(fmt)
    grid = unpack_scales(parts[1], layout, (shape[0], fmt.groups(shape[1])))
    return unpack_codes(parts[0], layout, shape), Grid(grid.scale, grid.zero, parts[2] if layout.table else None)


def pack_codes(codes_nk: Tensor, layout: Layout) -> Tensor:
    """Codes [N, K], uint8, as words."""
    n, k = codes_nk.shape
    codes = pad(codes_nk, (0, -k % UNIT, 0, -n % ROWS))
    # row tile, row >= 8, g | unit, tile, inputs >= 32, t, inputs >= 4, inputs >= 2, half of a pair
    split = codes.view(-1, 2, 8, codes.shape[1] // UNIT, 2, 2, 4, 2, 2, 2)
    pairs = split.permute(0, 3, 2, 6, 4, 5, 7, 8, 1, 9).reshape(*split.shape[0:4:3], _LANES, 2, _PAIRS, 2)
    words = torch.zeros(*pairs.shape[:4], layout.bits, dtype=torch.int32, device=codes.device)
    for pair, half, field in _fields(layout):
        part = (pairs[..., pair, half].int() >> field.bit) & ((1 << field.width) - 1)
        words[..., field.word] |= part << field.at
    return _to_vectors(words.flatten(3))


def unpack_codes(words: Tensor, layout: Layout, shape: tuple[int, int]) -> Tensor:
    """The codes [N, K], uint8, of a matrix of `shape` [N, K]."""
    lanes = _from_vectors(words, 2 * layout.bits).unflatten(-1, (2, layout.bits))
    pairs = torch.zeros(*lanes.shape[:4], _PAIRS, 2, dtype=torch.uint8, device=words.device)
    for pair, half, field in _fields(layout):
        part = (lanes[..., field.word] >> field.at) & ((1 << field.width) - 1)
        pairs[..., pair, half] |= (part << field.bit).to(torch.uint8)
    split = pairs.view(*pairs.shape[:2], 8, 4, 2, 2, 2, 2, 2, 2).permute(0, 8, 2, 1, 4, 5, 3, 6, 7, 9)
    return split.reshape(ROWS * pairs.shape[0], UNIT * pairs.shape[1])[: shape[0], : shape[1]].contiguous()


def pack_scales(grid: Grid, layout: Layout, in_features: int) -> Tensor:
    """The scales and zero points of a grid [N, G] as words."""
    words = grid.scale.float().contiguous().view(torch.int32)
    if grid.zero is not None:
        words = words | grid.zero.int()  # a 16-bit scale leaves the last byte free
    n, groups = words.shape
    words = pad(words, (0, layout.blocks(in_features) * layout.count - groups, 0, -n % ROWS))
    return words.view(-1, 2, 8, layout.blocks(in_features), layout.count).permute(0, 3, 2, 4, 1).flatten(3).contiguous()


def unpack_scales(words: Tensor, layout: Layout, shape: tuple[int, int]) -> Grid:
    """The grid, fp32 and uint8, of `shape` [N, G]."""
    rows = words.unflatten(3, (-1, 2)).permute(0, 4, 2, 1, 3).flatten(3).flatten(0, 2)[: shape[0], : shape[1]].contiguous()
    if not layout.zeros:
        return Grid(rows.view(torch.float32))
    return Grid((rows & -256).view(torch.float32), (rows & 255).to(torch.uint8))


@dataclass(frozen=True)
class _Field:
    """`width` bits of a code, from its bit `bit` up, lie in word `word` of a lane's tile from bit `at` up."""

    word: int
    at: int
    bit: int
    width: int


def _fields(layout: Layout) -> Iterator[tuple[int, int, _Field]]:
    """Where the codes of a tile lie: pair, half, field; see FIELDS in tile.cuh."""
    bits = layout.bits
    apart, step = (bits, 2 * bits) if layout.table else (16, bits)  # bits between the halves of a pair, and between pairs
    if bits == 8:
        apart, step = 8, 16
    for pair in range(_PAIRS):
        for half in range(2):
            if bits == 3 and pair == 15:
                for bit in range(3):
                    place = 3 * half + bit
                    word, at = (place // 2, 30 + place % 2) if layout.table else (bit, 15 + 16 * half)
                    yield pair, half, _Field(word, at, bit, 1)
            else:
                word, index = divmod(pair, 5 if bits == 3 else 16 // bits)
                yield pair, half, _Field(word, step * index + apart * half, 0, bits)


def _to_vectors(lanes: Tensor) -> Tensor:
    """[.., lane, words] as vectors [.., vector, lane, 4], for 3 bits one more of 2 words; flat."""
    whole = lanes.shape[-1] // 4 * 4
    vectors = lanes[..., :whole].unflatten(-1, (-1, 4)).transpose(2, 3).flatten(2)
    return torch.cat([vectors, lanes[..., whole:].flatten(2)], -1)


def _from_vectors(words: Tensor, each: int) -> Tensor:
    """What `_to_vectors` took."""
    whole = each // 4 * 4
    vectors = words[..., : whole * _LANES].unflatten(-1, (-1, _LANES, 4)).transpose(2, 3).flatten(3)
    return torch.cat([vectors, words[..., whole * _LANES :].unflatten(-1, (_LANES, -1))], -1) if each % 4 else vectors
