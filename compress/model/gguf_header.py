"""The header of a GGUF file: its keys and which types its tensors have, read in one pass before a library believes any of it.

    "GGUF"  u32 2 or 3  u64 number of tensors  u64 number of keys
    each key       string key, u32 type, value; an array is u32 type of items, u64 count, items
    each tensor    string name, u32 number of dimensions, u64 dimensions (innermost first), u32 type, u64 offset

A string is u64 bytes and UTF-8. All numbers are little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compress.documents import one_line
from compress.errors import ModelError

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_KEYS, MOST_ITEMS, MOST_TENSORS, MOST_DIMENSIONS = 1 << 12, 1 << 24, 1 << 18, 4  # what no model comes near
MOST_LAYERS = 1 << 10  # numbers of a list that is kept
SPLITS = "split.count"


@dataclass(frozen=True)
class Header:
    """What a file says it holds. types: of matrices, by number, with how many have each. weights: of all tensors. parts: the
    files that the model was split into. keys: single values, and short lists of numbers; of other lists their length."""

    types: dict[int, int]
    weights: int
    parts: int
    keys: dict[str, Any]


def read_header(path: Path) -> Header:
    """The header of a file; ModelError where it is damaged."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Types(data).header()
    except (ValueError, struct.error) as e:  # mmap refuses an empty file; the cursor says what it met
        raise ModelError(f"{path}: broken GGUF file ({one_line(str(e))}); download it again") from None


class Cursor:
    """Reads a header from front to back; ValueError where it cannot go on. What is made of a header is for its subclasses."""

    most_items = MOST_ITEMS

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.items = data, 0, 0

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends before {count} bytes that it says it holds")
        self.at += count

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at].decode(errors="replace")

    def value(self, kind: int) -> Any:
        """A value; of an array its length."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take("<" + self.scalar(kind))[0]
        kind, count = self.take("<IQ")
        self.items += count
        if self.items > self.most_items:
            raise ValueError(f"it has an array of {count} items")
        if kind == STRING:
            for _ in range(count):
                self.pass_text()
            return count
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> Any:
        """What is made of an array of numbers: its length."""
        self.skip(count * struct.calcsize("<" + self.scalar(kind)))
        return count

    def pass_text(self) -> None:
        self.skip(*self.take("<Q"))

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise ValueError(f"it has a value of type {kind}")
        return SCALARS[kind]


class Types(Cursor):
    """What a file of any maker says it holds."""

    def header(self) -> Header:
        magic, version, tensors, keys = self.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as GGUF version 2 or 3 does")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ValueError(f"it says {tensors} tensors and {keys} keys")
        known = {self.text(): self.value(*self.take("<I")) for _ in range(keys)}
        found = [self.tensor() for _ in range(tensors)]
        types = Counter(kind for kind, shape in found if len(shape) > 1)
        parts = known.get(SPLITS)
        return Header(dict(types), sum(prod(shape) for _, shape in found), parts if isinstance(parts, int) else 1, known)

    def numbers(self, kind: int, count: int) -> Any:
        return super().numbers(kind, count) if count > MOST_LAYERS else self.take(f"<{count}{self.scalar(kind)}")

    def tensor(self) -> tuple[int, tuple[int, ...]]:
        """Type and shape."""
        name, (count,) = self.text(), self.take("<I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise ValueError(f"'{name[:40]}' has {count} dimensions")
        shape, (kind, start) = self.take(f"<{count}Q"), self.take("<IQ")
        if start > len(self.data) or prod(shape) > 32 * len(self.data):
            raise ValueError(f"'{name[:40]}' lies beyond its end")
        return kind, shape
