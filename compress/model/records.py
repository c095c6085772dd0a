"""Records of a file or of a data set, one after the other, each with where it stands.

A file of records is JSONL, one on a line; or one JSON array of them; or parquet. What it is, it says itself: an array begins with
a bracket, and parquet with its name. Arrays are read as streams as well, so a long one costs what is used of it: the decoder is
asked for one value after the other, and where a value goes on behind what was read, twice as much is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from compress.documents import one_line, parse_json
from compress.errors import DataError, first_line
from compress.model.texts import decoded
from compress.model.unpacked import is_parquet, opened

LONGEST = 100_000_000  # bytes of a line, characters of an item: one record
LONGEST_TOKEN = 16  # characters of the longest thing in JSON that is cut anywhere and then another: an escape, -Infinity
ROWS = 64  # of parquet at once

T = TypeVar("T")
Record = tuple[str, Any]  # where it stands, what it is


def records(path: Path, read: Callable[[Any, str], T]) -> Iterator[T]:
    """What `read` makes of each record of a file, told where it stands."""
    for where, record in found_in(path):
        yield read(record, where)


def found_in(path: Path) -> Iterator[Record]:
    """The records of a file."""
    if is_parquet(path):
        return of_parquet(path)
    return of_array(path) if begins_array(path) else of_lines(path)


def begins_array(path: Path) -> bool:
    with opened(path) as file:
        start = next((found for piece in iter(lambda: file.read(4096), b"") if (found := piece.strip())), b"")
    return start.startswith(b"[")


# --- lines -----------------------------------------------------------------------------------------------------------


def of_lines(path: Path) -> Iterator[Record]:
    """JSONL."""
    number = 0
    with opened(path) as file:
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST:
                raise DataError(f"{where}: this line has more than {LONGEST:,} bytes; write one record a line")
            if line.strip():
                yield where, of_line(line, where)


def of_line(line: bytes, where: str) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: this line is no UTF-8 text ({e.reason} at byte {e.start} of it)") from None
    except ValueError:
        raise DataError(f"{where}: this line is no JSON; records stand one a line, or in one JSON array") from None


# --- one array -------------------------------------------------------------------------------------------------------


class Array:
    """A JSON array that comes in pieces: its items as they are asked for."""

    def __init__(self, path: Path):
        self._path, self._pieces = path, decoded(path)
        self._held, self._at, self._ended = "", 0, False
        self._number = 0
        self._decoder = json.JSONDecoder()

    def read(self) -> Iterator[Record]:
        """Each item with its place; the text begins with a bracket."""
        self._next()
        self._at += 1
        if self._next() == "]":
            return
        while True:
            self._number += 1
            yield self._where, self._item()
            if (then := self._next()) == "]":
                self._at += 1
                break
            if then != ",":
                self._refuse("a comma or the end of the array has to follow it" if then else "the file ends inside the array")
            self._at += 1
        if self._next():
            raise DataError(f"{self._path}: goes on behind the end of its array; keep one array, or one record a line")

    @property
    def _where(self) -> str:
        return f"{self._path}: record {self._number}"

    def _refuse(self, why: str) -> NoReturn:
        raise DataError(f"{self._where}: is no JSON ({one_line(why)})")

    def _next(self) -> str:
        """The next character that is no space; nothing at the end."""
        while True:
            while self._at < len(self._held):
                if self._held[self._at] not in " \t\r\n":
                    return self._held[self._at]
                self._at += 1
            if not self._more(1):
                return ""

    def _more(self, least: int) -> bool:
        """Read on, by `least` characters or more; False where there are none."""
        parts, found = [self._held[self._at :]], 0
        while found < least and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            parts.append(piece or "")
            found += len(parts[-1])
        self._held, self._at = "".join(parts), 0
        return found > 0

    def _item(self) -> Any:
        """The value that begins here."""
        self._next()
        while True:
            start = self._at
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
                if end + LONGEST_TOKEN <= len(self._held) or not self._more(1):  # a number may go on
                    self._at += end - start  # from where what is held begins now
                    return value
            except json.JSONDecodeError as e:
                within, last = e.msg.startswith("Unterminated string"), len(self._held.rstrip())
                cut = within or e.pos >= len(self._held) - LONGEST_TOKEN
                if not cut or not self._more(len(self._held) - start):
                    ended = within or e.pos >= last
                    self._refuse("the file ends inside it" if ended else f"{e.msg} at character {e.pos - start} of it")
            except (ValueError, RecursionError) as e:  # a number of thousands of digits
                self._refuse("nested without end" if isinstance(e, RecursionError) else first_line(e))
            if len(self._held) - self._at > LONGEST:
                raise DataError(f"{self._where}: has more than {LONGEST:,} characters; split it")


def of_array(path: Path) -> Iterator[Record]:
    """The items of a JSON array."""
    return Array(path).read()


# --- tables ----------------------------------------------------------------------------------------------------------


def of_parquet(path: Path) -> Iterator[Record]:
    """The rows of a parquet file, by columns' names."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: is a parquet file, and to read it needs pyarrow:  pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            found = (row for batch in file.iter_batches(ROWS) for row in batch.to_pylist())
            for number, row in enumerate(found, 1):
                yield f"{path}: row {number}", row
    except Exception as e:  # the library raises its own, and Python's, for whatever a file makes of it
        raise DataError(f"{path}: cannot be read as parquet ({one_line(first_line(e))})") from None


def rows(dataset: str, split: str, read: Callable[[Any, str], T]) -> Iterator[T]:
    """The same of a data set of the hub, streamed."""
    try:
        import datasets
    except ImportError:
        raise DataError("data: 'dataset' needs the extra 'datasets':  pip install 'compress-pipeline[datasets]'") from None
    name, _, config = dataset.partition(":")
    try:
        for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
            yield read(row, f"data set '{dataset}'")
    except DataError:
        raise
    except Exception as e:  # the library raises its own, the network's and the author's errors
        raise DataError(f"data set '{dataset}': {one_line(first_line(e))}") from e
