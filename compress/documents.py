"""Files that somebody else wrote, before anything in them is believed: their size, their encoding, and their JSON.

Every JSON file that is read goes through `json_document`: what is wrong with one is an error of the caller's class, in one line
that names the file. Nothing here imports more than Python's own library, so that an artifact's reader may use it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from compress.errors import CompressError

MOST_JSON = 100_000_000  # bytes: the index of the largest model known has a tenth of that


def read_bytes(path: Path, most: int, error: type[CompressError]) -> bytes:
    """The bytes of a regular file of at most `most` bytes; else an `error` that names it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise error(f"{path}: is no regular file")  # a pipe that nobody writes to would be waited for
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None
    if len(data) > most:
        raise error(f"{path}: has more than {most:,} bytes; that is no file of its kind")
    return data


def read_text(path: Path, most: int, error: type[CompressError]) -> str:
    """As `read_bytes`, decoded from UTF-8 whatever the locale is."""
    try:
        return read_bytes(path, most, error).decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{path}: is no UTF-8 text ({e.reason} at byte {e.start})") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError in one line where it is none, however deep it is nested."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested without end") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"no UTF-8 text: {e.reason} at byte {e.start}") from None


def json_document(path: Path, error: type[CompressError], todo: str = "", most: int = MOST_JSON) -> Any:
    """The value of a JSON file; an `error` that names the file and ends with what `todo` where it cannot be read."""
    text = read_text(path, most, error)
    try:
        return parse_json(text)
    except ValueError as e:
        raise error(f"{path}: is no JSON ({one_line(str(e))}){todo and f'; {todo}'}") from None


def json_mapping(path: Path, error: type[CompressError], todo: str = "", most: int = MOST_JSON) -> dict[str, Any]:
    """As `json_document`, of a file that holds a mapping."""
    found = json_document(path, error, todo, most)
    if not isinstance(found, dict):
        raise error(f"{path}: holds {kind(found)} where a mapping is needed{todo and f'; {todo}'}")
    return found


def kind(value: Any) -> str:
    """What a value read from JSON is, for a message."""
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def one_line(text: str, most: int = 200) -> str:
    """Foreign text for a message: without control characters, at most `most` characters."""
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", text)[:most]


def local_path(text: str) -> Path:
    """A path that a person wrote, with ~ expanded; ValueError where no file can have such a name."""
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    try:
        path = Path(text).expanduser()
        os.fsencode(path)
    except RuntimeError:  # ~somebody
        raise ValueError(f"'{one_line(text)}' begins with a user whom this machine does not know") from None
    except UnicodeEncodeError as e:
        bad = f"U+{ord(text[e.start]):04X}" if e.start < len(text) else "a character"
        raise ValueError(f"'{one_line(text)}' holds {bad}, which the name of a file cannot have here") from None
    if any(len(os.fsencode(part)) > 255 for part in path.parts) or len(os.fsencode(path)) > 4000:
        raise ValueError(f"'{one_line(text, 60)}…' is too long for the name of a file")
    return path
