"""Packed matrices back into weights, a block of rows at a time, in plain torch: what runs on a CPU, and wherever no kernel does.

A block is as large as stays in cache, so the weight is never whole in memory. What a block holds is what
`format.dequantize(tensors, dtype)` has in these rows, bit for bit. Ways that were measured for codes to levels, 4 bits, one
thread, 2**24 weights: one lookup for a chunk of codes 6 ms; `F.embedding` 17; `take` 14; shifts and a conversion 10. The lookup
is fast because the levels of a chunk are moved as one wide number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import (
    Ecq,
    Factored,
    Float,
    Format,
    Ggml,
    Int,
    LowRank,
    Served,
    Tcq,
    base_of,
    bitpack,
    entropy,
    parse,
)
from compress.formats.codebooks import NF, Lut, lut_table, nf_table

Shape = tuple[int, int]
_BLOCK = 1 << 20  # bytes of a block on a CPU: 64 rows of 4096 in fp32
_ELSEWHERE = 1 << 28  # on other devices launches cost more than memory
_CHUNK = {2: 8, 3: 12, 4: 8, 6: 12, 8: 8}  # bits looked up at a time; codes of 5 and 7 bits are unpacked sooner than looked up
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # a dtype for as many bytes


@lru_cache(maxsize=4096)
def format_of(text: str) -> Format:
    """`parse`, remembered."""
    return parse(text)


DECODED = ("weight_codes", "weight_step", "weight_base", "weight_scale")  # the parts of the layout "codes"


def turned_names(fmt: Format) -> tuple[str, ...]:
    """The parts of the layout "neurons", of which neurons.py says more."""
    assert isinstance(fmt, Int | NF | Lut)
    more = () if fmt.symmetric else ("neuron_zero",)
    return ("neuron_packed", "neuron_scale", *more, *(("weight_table",) if fmt.learned else ()))


@lru_cache(maxsize=4096)
def part_names(text: str, n: int, k: int, layout: str = "canonical") -> tuple[str, ...]:
    """The suffixes of a matrix's tensors in order, without shapes: what the parts of all layouts but tiles are."""
    if layout == "codes":
        return DECODED
    if layout == "neurons":
        return turned_names(format_of(text))
    return tuple(name for name in format_of(text).tensors((n, k)) if not name.endswith("weight_shape"))


def named(text: str, shape: Shape, parts: list[Tensor], layout: str = "canonical") -> dict[str, Tensor]:
    """The parts under their suffixes; FormatError where their number is wrong."""
    names = part_names(text, *shape, layout)
    if len(names) != len(parts):
        raise FormatError(f"{text} has {len(names)} parts, not {len(parts)}: {', '.join(names)}")
    return dict(zip(names, parts, strict=True))


def with_shapes(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their `weight_shape` entries, as the format's own functions ask for them."""
    found = {**tensors, "weight_shape": torch.tensor(shape)}
    if isinstance(fmt, LowRank | Factored):
        found |= {f"{name}.weight_shape": torch.tensor(side) for name, side in fmt.factor_shapes(shape).items()}
    return found


def blocks(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """First row, end row and weights [rows, K] of one block after the other; of a low-rank format the quantized part alone."""
    n, k = shape
    held = _BLOCK if next(iter(tensors.values())).device.type == "cpu" else _ELSEWHERE
    rows = max(1, held // (k * dtype.itemsize))
    every = rows_of(base_of(fmt), shape, tensors, dtype)
    for start in range(0, n, rows):
        yield start, min(n, start + rows), every.at(slice(start, start + rows))


def decoded(fmt: Ecq, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of the layout "codes" of an entropy-coded matrix: its codes, a byte each, and what they are multiplied by."""
    return {"weight_codes": fmt.codes(with_shapes(fmt, shape, tensors)), **{name: tensors[name] for name in DECODED[1:]}}


def rows_of(
    fmt: Format, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Rows | CodedRows | TrellisRows | BlockRows | PlainRows:
    """The weights of any rows of a matrix."""
    if isinstance(fmt, Served) and not fmt.bytes_of_codes:
        fmt = fmt.weight
    if isinstance(fmt, Float | Served):
        return PlainRows(fmt, tensors, dtype)
    if isinstance(fmt, Ggml):
        return BlockRows(fmt, tensors["weight_blocks"], dtype)
    kind = CodedRows if isinstance(fmt, Ecq) else TrellisRows if isinstance(fmt, Tcq) else Rows
    return kind(fmt, shape, tensors, dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class BlockRows:
    """Of a matrix in blocks of llama.cpp's, which lie in rows."""

    fmt: Ggml
    blocks: Tensor
    dtype: torch.dtype

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [rows, K] in the dtype."""
        return self.fmt.dequantize({"weight_blocks": self.blocks[rows]}, self.dtype)


class CodedRows:
    """Of an entropy-coded matrix: from its codes, or, where they are still coded, all of them decoded first."""

    def __init__(self, fmt: Ecq, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        held = tensors if "weight_codes" in tensors else decoded(fmt, shape, tensors)
        self.codes, self.scale, self.dtype = held["weight_codes"], held["weight_scale"], dtype
        self.step = entropy.steps(held)

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [rows, K] in the dtype."""
        return entropy.restored(self.codes[rows], self.step, self.scale[rows], self.dtype)


class TrellisRows:
    """Of a trellis-coded matrix: outputs that lie one after the other, or any that are looked up."""

    def __init__(self, fmt: Tcq, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self.fmt, self.outputs, self.tensors, self.dtype = fmt, shape[0], tensors, dtype

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [rows, K] in the dtype."""
        if not isinstance(rows, slice):
            return self.fmt.picked(self.tensors, rows, self.dtype)
        start, stop, _ = rows.indices(self.outputs)
        return self.fmt.rows(self.tensors, start, stop, self.dtype)


class PlainRows:
    """Of a matrix whose codes, and scales, lie row by row: what the format makes of those."""

    def __init__(self, fmt: Float | Served, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        self.fmt, self.tensors, self.dtype = fmt, tensors, dtype

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [rows, K] in the dtype."""
        held = {name: t if t.ndim == 1 else t[rows] for name, t in self.tensors.items()}
        return self.fmt.dequantize(held, self.dtype)


class Rows:
    """The weights of any rows of a matrix. `shape` is [N, K]; `tensors` are the format's, without shapes.

    Levels times scales of integers are rounded once where the scales have the dtype of the weights: a level has at most 9 bits,
    so the product in 16 bits is the rounded product in fp32. All else is multiplied in fp32.
    """

    def __init__(self, fmt: Format, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        assert isinstance(fmt, Int | NF | Lut)
        self.fmt, self.shape, self.dtype = fmt, shape, dtype
        self.packed = tensors["weight_packed"]
        self.scale = self._scales(tensors)
        self.inner = dtype if isinstance(fmt, Int) and self.scale.dtype == dtype else torch.float32
        self.zero = None
        if not fmt.symmetric:
            self.zero = bitpack.unpack(tensors["weight_zero_point"].T, fmt.bits, shape[0]).T
        self.table = self._table(tensors)

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [rows, K] in the dtype."""
        k, width = self.shape[1], self.fmt.width(self.shape[1])
        levels, scale = self._levels(self.packed[rows])[:, :k], self.scale[rows].to(self.inner)
        whole = k // width * width
        if whole:
            grouped = levels[:, :whole].unflatten(1, (-1, width))
            if self.zero is not None:
                grouped -= self.zero[rows].to(self.inner)[:, :, None]
            grouped *= scale[:, : whole // width, None]
        if whole < k:  # a shorter last group, which only tables have
            levels[:, whole:] *= scale[:, -1:]
        return levels.to(self.dtype)

    def _scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if double := self.fmt.double:
            return double.scales(double.unpack(tensors, (self.shape[0], self.fmt.groups(self.shape[1]))))
        return tensors["weight_scale"]

    def _table(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        if self.fmt.bits not in _CHUNK:
            return None
        if self.fmt.learned:
            return chunked(tensors["weight_table"].float(), self.fmt.bits)
        return constant_table(LEVELS[type(self.fmt), self.fmt.symmetric], self.fmt.bits, self.inner, self.packed.device)

    def _levels(self, packed: Tensor) -> Tensor:
        """The levels [rows, K or more], in `inner`, of packed rows; of asymmetric integers before the zero point."""
        if self.table is None:
            codes = bitpack.unpack(packed, self.fmt.bits, self.shape[1]).to(self.inner)
            return codes if self.zero is not None else codes.sub_(self.fmt.levels // 2)
        found = self.table.index_select(0, chunks(packed, self.fmt.bits))
        return found.view(self.inner).view(len(packed), -1)


def chunks(packed: Tensor, bits: int) -> Tensor:
    """The words [rows, words] as int32 numbers of `_CHUNK[bits]` bits, flat; rows are filled up to a whole number of both."""
    if _CHUNK[bits] == 8:
        return packed.contiguous().view(torch.uint8).view(-1).int()
    if packed.shape[1] % 3:
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 3))
    packed = packed.reshape(-1, 3)
    out = torch.empty(len(packed), 8, dtype=torch.int32, device=packed.device)  # 3 words are 8 numbers of 12 bits
    for i in range(8):
        word, shift = divmod(12 * i, 32)
        part = packed[:, word] >> shift
        if shift > 20:  # over two words
            part = part & ((1 << (32 - shift)) - 1) | packed[:, word + 1] << (32 - shift)
        torch.bitwise_and(part, 4095, out=out[:, i])
    return out.view(-1)


@lru_cache(maxsize=64)
def constant_table(levels: Callable[[int], Tensor], bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The `chunked` table of levels that are the same for all matrices, an entry of `LEVELS`."""
    return chunked(levels(bits).to(dtype), bits).to(device)


LEVELS: Mapping[tuple[type, bool], Callable[[int], Tensor]] = {
    (Int, False): lambda bits: torch.arange(1 << bits, dtype=torch.float32),
    (Int, True): lambda bits: torch.arange(1 << bits, dtype=torch.float32) - (1 << bits) // 2,
    (NF, True): nf_table,
    (Lut, True): lut_table,
}  # by the kind of the format, and whether it is symmetric: else these are levels before the zero point


def chunked(levels: Tensor, bits: int) -> Tensor:
    """For each chunk the levels [2**bits] of its codes side by side, as one wide number: [2**_CHUNK[bits]]."""
    codes = codes_of_chunks(bits, levels.device)
    table = levels[codes]
    return table.view(_WIDE[table.shape[1] * table.element_size()]).view(-1)


@lru_cache(maxsize=64)
def codes_of_chunks(bits: int, device: torch.device) -> Tensor:
    """The codes in every chunk, int64 [2**_CHUNK[bits], codes], the lowest bits first."""
    chunk = torch.arange(1 << _CHUNK[bits], device=device)
    return torch.stack([chunk >> shift & ((1 << bits) - 1) for shift in range(0, _CHUNK[bits], bits)], 1)
