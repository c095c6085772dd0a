"""Texts to make tokens of: files, JSONL, data sets of the hub. Each is read as far as it is asked for, and no further.

A record of JSONL or of a data set is a text, or a conversation: a list of messages, which the tokenizer's chat template makes a
text of. What cannot be read is a DataError that names the file, and the line where there is one.
"""

from __future__ import annotations

import codecs
import io
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from compress.documents import local_path, one_line, parse_json
from compress.errors import DataError, first_line

PIECE = 1 << 20  # bytes read at once
LONGEST_LINE = 100_000_000  # bytes of one record
CONVERSATIONS = ("messages", "conversations")  # fields that hold messages where no other is named
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}  # as others name them

Chat = Callable[[list[dict[str, Any]], str], str]


class Text:
    """A text that comes in pieces, held as far as it was asked for."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._held = pieces, ""

    def upto(self, size: int) -> tuple[str, bool]:
        """About the first `size` characters, cut in front of white space where there is some near, and whether that is all."""
        parts, held = [self._held], len(self._held)
        while held <= size and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            held += len(piece)
        self._held = "".join(parts)
        if held <= size:
            return self._held, True
        cut = next((i for i in range(size, max(1, size - 1000), -1) if self._starts_space(i)), size)
        return self._held[:cut], False

    def _starts_space(self, i: int) -> bool:
        return self._held[i].isspace() and not self._held[i - 1].isspace()


def file_text(path: Path) -> Text:
    """The text of a file."""
    return Text(decoded(path))


def decoded(path: Path) -> Iterator[str]:
    """The characters of a file in pieces, line ends as \\n; DataError with the byte where it is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    at = 0
    with opened(path) as file:
        while True:
            data, kept = file.read(PIECE), len(decoder.getstate()[0])
            try:
                yield lines.decode(decoder.decode(data, final=not data), final=not data)
            except UnicodeDecodeError as e:
                raise DataError(f"{path}: is no UTF-8 text ({e.reason} at byte {at - kept + e.start})") from None
            at += len(data)
            if not data:
                return


def opened(path: Path) -> BinaryIO:
    """A regular file to read; DataError where it is none."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a text is read again whenever a run goes on
            raise DataError(f"{path}: is no regular file; save the text to one")
        return path.open("rb")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def records(path: Path, field: str, chat: Chat) -> Iterator[str]:
    """The texts of a JSONL file, one a line."""
    number = 0
    with opened(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}:{number}: this line has more than {LONGEST_LINE:,} bytes; write one record a line")
            if line.strip():
                yield text_of(record_of(line, f"{path}:{number}"), field, f"{path}:{number}", chat)


def record_of(line: bytes, where: str) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: this line is no UTF-8 text ({e.reason} at byte {e.start} of it)") from None
    except ValueError:
        raise DataError(f"{where}: this line is no JSON") from None


def rows(dataset: str, split: str, field: str, chat: Chat) -> Iterator[str]:
    """The texts of a data set of the hub, streamed."""
    try:
        import datasets
    except ImportError:
        raise DataError("data: 'dataset' needs the extra 'datasets':  pip install 'compress-pipeline[datasets]'") from None
    name, _, config = dataset.partition(":")
    try:
        for row in datasets.load_dataset(name, config or None, split=split, streaming=True):
            yield text_of(row, field, f"data set '{dataset}'", chat)
    except DataError:
        raise
    except Exception as e:  # the library raises its own, the network's and the author's errors
        raise DataError(f"data set '{dataset}': {one_line(first_line(e))}") from e


def text_of(record: Any, field: str, where: str, chat: Chat) -> str:
    """The text of one record: what its field says, or what the chat template makes of the messages there."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: has no text field '{field}'; found: {type(record).__name__}")
    if field == "text" and field not in record:
        field = next((name for name in CONVERSATIONS if name in record), field)
    value = record.get(field)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = chat(conversation(value, field, where), where)
    if not isinstance(value, str):
        found = ", ".join(map(str, record)) or "none"
        raise DataError(f"{where}: has no text field '{field}'; found: {one_line(found)}")
    return whole(value, where)


def whole(text: str, where: str) -> str:
    """The text; DataError where it holds half a character, as JSON may: its escapes are halves of emoji."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        half = f"\\u{ord(text[e.start]):04x}"
        raise DataError(
            f"{where}: holds half a character ({half}); the text was cut inside an emoji, leave the line out"
        ) from None
    return text


def conversation(turns: list[Any], field: str, where: str) -> list[dict[str, Any]]:
    """Messages as chat templates know them, from role and content or from `from` and `value`; DataError where they are none."""
    found: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, 1):
        known = dict(turn) if isinstance(turn, dict) else {}
        role, content = known.pop("role", known.pop("from", None)), known.pop("content", known.pop("value", None))
        if not isinstance(role, str) or not isinstance(content, str | list):
            raise DataError(f"{where}: item {number} of '{field}' is no chat message; needs role and content, or from and value")
        found.append({**known, "role": ROLES.get(role, role), "content": content})
    return found


def located(base: Path, name: str) -> Path:
    """Where a text lies, named by a path that counts from `base`."""
    try:
        return base / local_path(name)
    except ValueError as e:
        raise DataError(str(e)) from None
