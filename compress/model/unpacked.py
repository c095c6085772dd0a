"""Files of text as people have them: plain or compressed, with the mark of UTF-8 in front or without it.

What a file is, its first bytes say, not its name. gzip, bzip2 and xz are unpacked as they are read, so of a large file only what
is asked for is unpacked at all.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from compress.documents import one_line
from compress.errors import DataError, first_line

UNPACKERS: dict[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
SIGNATURES = (  # none of which a text begins with
    (b"\x1f\x8b", "gzip"),
    (b"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2"),
    (b"\xfd7zXZ\\x00", "xz"),
    (b"\\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it, or use gzip, bzip2 or xz"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\xff\xfe|\xfe\xff", "is UTF-16; save it as UTF-8"),
)
PARQUET = b"PAR1"  # at both of its ends
MARK = "\ufeff".encode()  # what some editors put in front of UTF-8
LONGEST_SIGNATURE = 16


class Unpacking(io.RawIOBase):
    """What a compressed file holds, as bytes; DataError where it is damaged."""

    def __init__(self, path: Path, unpacked: Any, file: BinaryIO):
        self._path, self._unpacked, self._file = path, unpacked, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._unpacked.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
            raise DataError(f"{self._path}: cannot be unpacked ({one_line(first_line(e))}); make it anew") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._unpacked.close()
        self._file.close()  # which the one above leaves open
        super().close()


def opened(path: Path) -> BinaryIO:
    """What a regular file holds, unpacked, without the mark of UTF-8; DataError where it can be no text."""
    if is_parquet(path):
        raise DataError(f"{path}: is a parquet file, which holds records; name it with 'jsonl', and its column with 'field'")
    file = plain(path)
    start = file.peek(LONGEST_SIGNATURE)[:LONGEST_SIGNATURE]
    found = next((found for pattern, found in SIGNATURES if re.match(pattern, start)), "")
    if found in UNPACKERS:
        file = io.BufferedReader(Unpacking(path, UNPACKERS[found](file), file))
    elif found:
        file.close()
        raise DataError(f"{path}: {found}")
    if file.peek(len(MARK)).startswith(MARK):
        file.read(len(MARK))
    return file


def plain(path: Path) -> io.BufferedReader:
    """A regular file to read; DataError where it is none."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a text is read again whenever a run goes on
            raise DataError(f"{path}: is no regular file; save the text to one")
        return path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def is_parquet(path: Path) -> bool:
    with plain(path) as file:
        start = file.read(len(PARQUET))
        file.seek(max(0, path.stat().st_size - len(PARQUET)))
        return start == PARQUET == file.read()
