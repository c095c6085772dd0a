"""A matrix in a format <-> the tensors that ONNX nodes take. Numbers only: the nodes are in nodes.py.

There are three encodings of a quantized matrix [N = outputs, K = inputs], with G groups in a row.

**NBits** is what com.microsoft's MatMulNBits and GatherBlockQuantized take: integers inside the model.

    weight_codes       uint8 [N, B, block*c/8]   codes of c bits (2, 4 or 8), lowest bit first, in B = ceil(K/block) blocks
    weight_scale       16 bits [N, G]            as the run has it; the graph repeats it over the blocks of a group
    weight_zero_codes  uint8 [N, ceil(B*c/8)]    asymmetric only: the zero point of each block, packed like codes

There are no kernels for other widths, so 3 bits lie in a container of 4, and 5 to 7 in one of 8. The kernel's default zero point
is the middle of the container: codes of symmetric formats are shifted there, and no zero points are stored. Its blocks are
powers of two, of 16 and more, so a group of 48 is three blocks of 16 with one scale, a `channel` blocks of 128, 64 or 32.

**Codes** is for everything else, tables and quantized low-rank factors: standard operators turn it into the dense matrix, with
the same products and sums in fp32 that the format itself takes.

    weight_codes         uint4, or uint8 above 4 bits [N, G*group]    the last group is filled up with zeros
    weight_scale         16 bits [N, G]
    weight_scale_codes   uint4 or uint8 [S*block]  instead, where scales are doubly quantized: of S super-blocks, with
                         weight_scale_top [S] and weight_scale_offset [1] as they are
    weight_zero_codes    uint8 [N, G]              asymmetric integers
    weight_table         fp16 [2**b]               fitted tables

**Bytes** is for integers of 8 bits whose inputs are rounded too: MatMulInteger multiplies them as they are.

    weight        int8 [N, K]    the code less 128
    weight_scale  16 bits [N, 1]

The standard's own DequantizeLinear was the other way for integers. onnxruntime fuses it to MatMulNBits only where weights are
stored [K, N], and it has neither 3 bits nor groups such as 48.

Both directions are exact: `decode(encode(x)) == x` for every tensor of every format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.errors import FormatError
from compress.formats import Dense, Factored, Format, Int, LowRank, Served, bitpack
from compress.formats.codebooks import NF, Lut
from compress.formats.grid import Grid

KINDS = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT"}
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
WIDTHS = {"UINT4": 4, "UINT8": 8, "INT8": 8, "BFLOAT16": 16, "FLOAT16": 16, "FLOAT": 32}
FAST = (128, 64, 32)  # blocks for which onnxruntime has fast kernels on CPU
Shape = tuple[int, int]
Turn = Callable[[Any, Shape, Mapping[str, Tensor]], dict[str, Tensor]]  # format, shape [N, K], tensors -> the others


@dataclass(frozen=True)
class Slot:
    """One tensor in the data file: its name, ONNX's word for its type, its shape in elements."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) * WIDTHS[self.kind] // 8)


@dataclass(frozen=True)
class NBits:
    """How integers of some format lie in blocks: bits of a code, inputs of a block, blocks in a row, blocks with one scale."""

    bits: int
    block: int
    blocks: int
    repeats: int

    @classmethod
    def of(cls, fmt: Int, inputs: int) -> NBits:
        """FormatError where the groups are no multiple of 16."""
        bits = next(c for c in (2, 4, 8) if c >= fmt.bits)
        if fmt.group is None:
            block = next((b for b in FAST if inputs % b == 0), 32)
            return cls(bits, block, -(-inputs // block), -(-inputs // block))
        if fmt.group % 16:
            raise FormatError(f"{fmt}: blocks are of 16, 32, 64 or 128 inputs, and {fmt.group} is no multiple of 16")
        block = next(b for b in (*FAST, 16) if fmt.group % b == 0)
        return cls(bits, block, fmt.groups(inputs) * fmt.group // block, fmt.group // block)

    def shift(self, fmt: Int) -> int:
        """What is added to a code so that the container's middle stands for zero."""
        return (1 << (self.bits - 1)) - (1 << (fmt.bits - 1)) if fmt.symmetric else 0


@dataclass(frozen=True)
class Encoding:
    """How the matrices of a kind of format lie in the data file: their tensors, the way there and the way back."""

    slots: Callable[[Any, Shape, torch.dtype, str], list[Slot]]
    encode: Turn
    decode: Turn


def slots(fmt: Format, shape: Shape, scale_dtype: torch.dtype, prefix: str = "") -> list[Slot]:
    """The tensors of a matrix of `shape` [N, K], their names after `prefix`."""
    return MATRICES[type(fmt)].slots(fmt, shape, scale_dtype, prefix)


def encode(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `slots` lists, by name, of the tensors of the format; uint4 as bytes, two numbers in each."""
    return MATRICES[type(fmt)].encode(fmt, shape, tensors)


def decode(fmt: Format, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the format, of those that `encode` gave; FormatError where a number is no code of the format."""
    return MATRICES[type(fmt)].decode(fmt, shape, raw)


# --- dense: one tensor as it is --------------------------------------------------------------------------------------


def dense_slots(fmt: Dense, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    return [Slot(f"{prefix}weight", KINDS[fmt.dtype], shape)]


def unchanged(fmt: Dense, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": tensors["weight"]}


# --- Bytes: integers that are multiplied as such ---------------------------------------------------------------------


def bytes_slots(fmt: Served, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    return [Slot(f"{prefix}weight", "INT8", shape), Slot(f"{prefix}weight_scale", KINDS[scale_dtype], (shape[0], 1))]


def same_bytes(fmt: Served, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": tensors["weight"].view(torch.int8), "weight_scale": tensors["weight_scale"]}


# --- NBits -----------------------------------------------------------------------------------------------------------


def nbits_slots(fmt: Int, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    n, k = shape
    form = NBits.of(fmt, k)
    found = [Slot(f"{prefix}weight_codes", "UINT8", (n, form.blocks, form.block * form.bits // 8)),
             Slot(f"{prefix}weight_scale", KINDS[scale_dtype], (n, fmt.groups(k)))]  # fmt: skip
    if not fmt.symmetric:
        found.append(Slot(f"{prefix}weight_zero_codes", "UINT8", (n, -(-form.blocks * form.bits // 8))))
    return found


def encode_nbits(fmt: Int, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    codes, grid = fmt.unpack(tensors)
    form = NBits.of(fmt, shape[1])
    codes = pad(codes + form.shift(fmt), (0, form.blocks * form.block - shape[1]))
    out = {"weight_codes": as_bytes(codes, form.bits).view(shape[0], form.blocks, -1), "weight_scale": grid.scale.contiguous()}
    if grid.zero is not None:
        out["weight_zero_codes"] = as_bytes(grid.zero.repeat_interleave(form.repeats, 1), form.bits)
    return out


def decode_nbits(fmt: Int, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    form, (n, k) = NBits.of(fmt, shape[1]), shape
    codes = from_bytes(raw["weight_codes"].reshape(n, -1), form.bits, form.blocks * form.block)[:, :k]
    codes = shifted(codes, form.shift(fmt))
    zero = None
    if not fmt.symmetric:
        zero = from_bytes(raw["weight_zero_codes"], form.bits, form.blocks)[:, :: form.repeats]
    return fmt.pack(codes, Grid(raw["weight_scale"], zero))


def shifted(codes: Tensor, by: int) -> Tensor:
    """Codes less `by`; FormatError where one would fall below zero."""
    if by and bool((codes < by).any()):
        raise FormatError("holds numbers that are no codes of its format")
    return codes - by


# --- Codes -----------------------------------------------------------------------------------------------------------

VERBATIM = ("weight_scale", "weight_scale_top", "weight_scale_offset", "weight_table")


def codes_slots(fmt: Int | NF | Lut, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    (n, k), groups = shape, fmt.groups(shape[1])
    found = [Slot(f"{prefix}weight_codes", kind_of(fmt.bits), (n, groups * fmt.width(k)))]
    if fmt.double:
        spans = -(-n * groups // fmt.double.block)
        found += [Slot(f"{prefix}weight_scale_codes", kind_of(fmt.double.bits), (spans * fmt.double.block,)),
                  Slot(f"{prefix}weight_scale_top", KINDS[fmt.double.dtype], (spans,)),
                  Slot(f"{prefix}weight_scale_offset", "FLOAT", (1,))]  # fmt: skip
    else:
        found.append(Slot(f"{prefix}weight_scale", KINDS[scale_dtype], (n, groups)))
    if not fmt.symmetric:
        found.append(Slot(f"{prefix}weight_zero_codes", "UINT8", (n, groups)))
    if fmt.learned:
        found.append(Slot(f"{prefix}weight_table", "FLOAT16", (fmt.levels,)))
    return found


def encode_codes(fmt: Int | NF | Lut, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    codes, grid = fmt.unpack(tensors)
    k = codes.shape[1]
    out = {"weight_codes": as_kind(pad(codes, (0, fmt.groups(k) * fmt.width(k) - k)), fmt.bits)}
    if fmt.double and grid.double:
        flat = grid.double.codes.flatten()
        out["weight_scale_codes"] = as_kind(pad(flat, (0, -len(flat) % fmt.double.block)), fmt.double.bits)
    if grid.zero is not None:
        out["weight_zero_codes"] = grid.zero.contiguous()
    return out | {s: tensors[s] for s in VERBATIM if s in tensors}


def decode_codes(fmt: NF | Lut, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {"weight_packed": bitpack.pack(codes_in(fmt, shape, raw), fmt.bits), "weight_shape": torch.tensor(shape)}
    if fmt.double:
        scales = from_kind(raw["weight_scale_codes"], fmt.double.bits, shape[0] * fmt.groups(shape[1]))
        out["weight_scale_packed"] = bitpack.pack(scales, fmt.double.bits)
    return out | {s: raw[s] for s in VERBATIM if s in raw}


def decode_integers(fmt: Int, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return fmt.pack(codes_in(fmt, shape, raw), Grid(raw["weight_scale"], raw.get("weight_zero_codes")))


def codes_in(fmt: Int | NF | Lut, shape: Shape, raw: Mapping[str, Tensor]) -> Tensor:
    (n, k), groups = shape, fmt.groups(shape[1])
    return from_kind(raw["weight_codes"], fmt.bits, n * groups * fmt.width(k)).view(n, -1)[:, :k]


# --- low rank: the base's encoding, and two factors -------------------------------------------------------------------


def corrected_slots(fmt: LowRank, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    found = slots(fmt.base, shape, scale_dtype, prefix)
    for name, side in fmt.factor_shapes(shape).items():
        found += FACTORS[type(fmt.factors)].slots(fmt.factors, side, scale_dtype, f"{prefix}{name}.")
    return found


def encode_corrected(fmt: LowRank, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return encode(fmt.base, shape, tensors) | by_factor(FACTORS[type(fmt.factors)].encode, fmt, shape, tensors)


def decode_corrected(fmt: LowRank, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return decode(fmt.base, shape, raw) | by_factor(FACTORS[type(fmt.factors)].decode, fmt, shape, raw)


def by_factor(turn: Turn, fmt: LowRank | Factored, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `turn` makes of the tensors of either factor."""
    out: dict[str, Tensor] = {}
    for name, side in fmt.factor_shapes(shape).items():
        part = {s.removeprefix(f"{name}."): t for s, t in tensors.items() if s.startswith(f"{name}.")}
        out |= {f"{name}.{suffix}": t for suffix, t in turn(fmt.factors, side, part).items()}
    return out


# --- two factors in place of a matrix: each as a matrix of its own ------------------------------------------------------


def factored_slots(fmt: Factored, shape: Shape, scale_dtype: torch.dtype, prefix: str) -> list[Slot]:
    sides = fmt.factor_shapes(shape).items()
    return [slot for name, side in sides for slot in slots(fmt.factors, side, scale_dtype, f"{prefix}{name}.")]


def encode_factored(fmt: Factored, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return by_factor(encode, fmt, shape, tensors)


def decode_factored(fmt: Factored, shape: Shape, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return by_factor(decode, fmt, shape, raw) | {"weight_shape": torch.tensor(shape)}


# --- codes and bytes -------------------------------------------------------------------------------------------------


def kind_of(bits: int) -> str:
    return "UINT4" if bits <= 4 else "UINT8"


def as_bytes(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes [..., n] as bytes [..., ceil(n*bits/8)], lowest bit first."""
    return bitpack.pack(codes, bits).view(torch.uint8)[..., : -(-codes.shape[-1] * bits // 8)].contiguous()


def as_kind(codes: Tensor, bits: int) -> Tensor:
    """Codes as numbers of `kind_of(bits)`: all of the tensor as one row of bytes."""
    return as_bytes(codes.flatten(), 4 if bits <= 4 else 8)


def from_bytes(raw: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of bytes."""
    return bitpack.unpack(pad(raw, (0, -raw.shape[-1] % 4)).view(torch.int32), bits, count)


def from_kind(raw: Tensor, bits: int, count: int) -> Tensor:
    width = 4 if bits <= 4 else 8
    return from_bytes(raw.flatten()[: -(-count * width // 8)], width, count)


DENSE = Encoding(dense_slots, unchanged, unchanged)
BYTES = Encoding(bytes_slots, same_bytes, same_bytes)
NBITS = Encoding(nbits_slots, encode_nbits, decode_nbits)
CODES = Encoding(codes_slots, encode_codes, decode_codes)
INTEGERS = Encoding(codes_slots, encode_codes, decode_integers)
CORRECTED = Encoding(corrected_slots, encode_corrected, decode_corrected)
FACTORED = Encoding(factored_slots, encode_factored, decode_factored)
MATRICES: Mapping[type, Encoding] = {
    Dense: DENSE, Int: NBITS, NF: CODES, Lut: CODES, LowRank: CORRECTED, Factored: FACTORED, Served: BYTES,
}  # fmt: skip
FACTORS: Mapping[type, Encoding] = {Dense: DENSE, Int: INTEGERS, NF: CODES, Lut: CODES}
