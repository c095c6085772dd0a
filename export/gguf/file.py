"""The GGUF container, version 3: keys with values, a table of tensors, their data.

    "GGUF"  u32 3  u64 number of tensors  u64 number of keys
    each key       string key, u32 type, value; an array is u32 type of items, u64 count, items
    each tensor    string name, u32 number of dimensions, u64 dimensions (innermost first), u32 type, u64 offset
    zeros up to a multiple of 32; then each tensor at its offset from here, and zeros up to a multiple of 32

A string is u64 bytes and UTF-8. All numbers are little-endian. Quantized tensors are blocks of weights along a row: those of
formats/superblocks.py, and blocks of 32 for plain integers:

    Q4_0   18 bytes   fp16 d, 16 bytes of codes: w = (code - 8) * d
    Q5_0   22 bytes   fp16 d, 4 bytes of fifth bits, 16 bytes of codes: w = (code - 16) * d
    Q8_0   34 bytes   fp16 d, 32 int8: w = code * d
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch

from compress.errors import ModelError
from compress.formats import ggml
from compress.model.gguf_header import ARRAY, SCALARS, STRING, Cursor
from compress.state.checkpoint import tensor_bytes, write_all

FILE = "model.gguf"
BLOCK = 32  # weights that share a scale
ALIGNMENT = 32
_MOST_KEYS, _MOST_ITEMS, _MOST_TENSORS = 1 << 12, 1 << 23, 1 << 17  # what no model comes near
_U32, _I32, _F32, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True)
class Kind:
    """A type of tensors: its number, and its bytes for each `block` weights."""

    name: str
    number: int
    block: int
    nbytes: int


NUMBERS = {"q4_1": 3, "q5_1": 7, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14, "iq2_xxs": 16, "iq2_xs": 17,
           "iq3_xxs": 18, "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23}  # fmt: skip
KINDS = {
    kind.name: kind
    for kind in (Kind("F32", 0, 1, 4), Kind("F16", 1, 1, 2), Kind("BF16", 30, 1, 2),
                 Kind("Q4_0", 2, BLOCK, 18), Kind("Q5_0", 6, BLOCK, 22), Kind("Q8_0", 8, BLOCK, 34),
                 *(Kind(name.upper(), NUMBERS[name], kind.block, kind.nbytes) for name, kind in ggml.TYPES.items()))
}  # fmt: skip
_BY_NUMBER = {kind.number: kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Tensor:
    """A tensor in the file: its shape as torch has it, the innermost dimension last."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.kind.block * self.kind.nbytes

    @property
    def padded(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


# --- written ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file as it will be, to the byte. metadata: str, bool, int (u32; in a list i32), float (f32), or lists of one of them."""

    metadata: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    name: str = FILE

    @cached_property
    def header(self) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.metadata))]
        parts += [string(key) + typed(value) for key, value in self.metadata.items()]
        starts = accumulate((tensor.padded for tensor in self.tensors), initial=0)
        for tensor, start in zip(self.tensors, starts, strict=False):
            parts += [string(tensor.name), struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1]),
                      struct.pack("<IQ", tensor.kind.number, start)]  # fmt: skip
        text = b"".join(parts)
        return text + bytes(-len(text) % ALIGNMENT)

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.padded for tensor in self.tensors)

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def files(self) -> Sequence[File]:
        return (self,)

    def write(self, folder: Path, data: Iterable[torch.Tensor]) -> None:
        """Write the file from the bytes of its tensors, in order, one in memory at a time."""
        with (folder / self.name).open("wb") as out:
            write_all(out.fileno(), self.header, folder)
            for tensor, found in zip(self.tensors, data, strict=True):
                assert found.nbytes == tensor.nbytes, f"{tensor} has {found.nbytes} bytes"
                write_all(out.fileno(), tensor_bytes(found), folder)
                write_all(out.fileno(), bytes(tensor.padded - tensor.nbytes), folder)
            os.fsync(out.fileno())


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """The type and the bytes of a value."""
    if isinstance(value, list):
        kind = _I32 if type(value[0]) is int else kind_of(value[0])  # llama.cpp takes token types in no other
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(plain(item, kind) for item in value)
    kind = kind_of(value)
    return struct.pack("<I", kind) + plain(value, kind)


def kind_of(value: Any) -> int:
    kinds: dict[type, int] = {str: STRING, bool: _BOOL, int: _U32, float: _F32}
    return kinds[type(value)]


def plain(value: Any, kind: int) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)


# --- read ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a file holds: its single values by key (of arrays only their length), and where each tensor begins."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[Tensor, int]]
    header: int

    def read(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8; ModelError where the file has become shorter."""
        tensor, start = self.tensors[name]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = bytearray(file.read(tensor.nbytes))
        except OSError as e:
            raise ModelError(f"{self.path}: {e.strerror}") from None
        if len(data) != tensor.nbytes:
            raise ModelError(f"{self.path}: '{name}' cannot be read; the file is damaged")
        return torch.frombuffer(data, dtype=torch.uint8)


def read_file(path: Path) -> Found:
    """The header of a file; ModelError where it is missing, cut short or damaged, or tensors do not lie one behind the other."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Table(data, path).file()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    except (ValueError, struct.error) as e:  # mmap refuses an empty file; the cursor says what it met
        raise e if isinstance(e, ModelError) else ModelError(f"{path}: broken GGUF file ({e}); copy it again") from None


class Table(Cursor):
    """Reads the header of a file of ours: every key once, every text UTF-8, tensors one behind the other."""

    most_items = _MOST_ITEMS

    def __init__(self, data: mmap.mmap, path: Path):
        super().__init__(data)
        self.path = path

    def file(self) -> Found:
        magic, version, tensors, keys = self.take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError("it does not begin as GGUF version 3 does")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"it says {tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.text()
            if key in metadata:
                raise ValueError(f"'{key[:40]}' is there twice")
            metadata[key] = self.value(*self.take("<I"))
        table = [self.tensor() for _ in range(tensors)]
        begin = -(-self.at // ALIGNMENT) * ALIGNMENT
        end = begin
        for tensor, start in table:
            if begin + start != end:
                raise ValueError(f"'{tensor.name[:40]}' does not begin where the tensor before it ends")
            end += tensor.padded
        if end != len(self.data):
            raise ValueError(f"it holds {len(self.data):,} bytes, its header says {end:,}")
        placed = {tensor.name: (tensor, begin + start) for tensor, start in table}
        if len(placed) != len(table):
            raise ValueError("two tensors have one name")
        return Found(self.path, metadata, placed, begin)

    def text(self) -> str:
        (length,) = self.take("<Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a string of {length} bytes goes beyond its end")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def pass_text(self) -> None:
        self.text()

    def tensor(self) -> tuple[Tensor, int]:
        name, (count,) = self.text(), self.take("<I")
        if not 1 <= count <= 4:
            raise ValueError(f"'{name[:40]}' has {count} dimensions")
        shape = self.take(f"<{count}Q")[::-1]
        number, start = self.take("<IQ")
        if number not in _BY_NUMBER or min(shape) < 1 or shape[-1] % _BY_NUMBER[number].block:
            raise ValueError(f"'{name[:40]}' is of type {number} and shape {list(shape)}, which is not read")
        return Tensor(name, _BY_NUMBER[number], shape), start
