"""Texts to make tokens of: a file, or what a record holds. Each is read as far as it is asked for, and no further.

A record (records.py says where they come from) holds a text, or a conversation: a list of messages, which the tokenizer's chat
template makes a text of. What cannot be read is a DataError that names the file, and the line where there is one.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compress.documents import kind, local_path, one_line
from compress.errors import DataError
from compress.model.unpacked import opened

PIECE = 1 << 20  # bytes read at once
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
    """The characters of a file in pieces, line ends as \\n; DataError with the byte of the unpacked text where it is no UTF-8."""
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


def text_of(record: Any, field: str, where: str, chat: Chat) -> str:
    """The text of one record: what its field says, or what the chat template makes of the messages there."""
    field = field_of(record, field, where)
    value = record.get(field)
    if is_conversation(value):
        value = chat(conversation(value, field, where), where)
    if not isinstance(value, str):
        raise DataError(f"{where}: has no text field '{field}'; found: {found_in(record, field)}")
    return whole(value, where)


def field_of(record: Any, field: str, where: str) -> str:
    """The field of a record that is read where `field` is named; DataError where the record has no fields."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: has no text field '{field}'; found: {kind(record)}, where a record is a mapping")
    if field == "text" and field not in record:
        return next((name for name in CONVERSATIONS if name in record), field)
    return field


def messages_of(record: Any, field: str, where: str) -> list[dict[str, Any]]:
    """The conversation that one record holds; DataError where its field holds none."""
    field = field_of(record, field, where)
    if not is_conversation(record.get(field)):
        names = [name for name, value in record.items() if is_conversation(value)]
        advice = f"name those in '{one_line(names[0])}', as field: {one_line(names[0])}" if names else "leave 'answers' out"
        raise DataError(f"{where}: has no chat messages in '{field}', and answers stand in nothing else; {advice}")
    return conversation(record[field], field, where)


def is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def found_in(record: dict[str, Any], field: str) -> str:
    """The fields of a record, and what to do: which of them to name, the one with most to read; or what is wrong with the one."""
    names = one_line(", ".join(map(str, record)) or "none")
    sizes = {name: len(str(value)) for name, value in record.items() if isinstance(value, str) or is_conversation(value)}
    if field in record:
        names += f"; '{field}' holds {kind(record[field])}, neither a text nor messages"
    return names + (f"; name one of them, as field: {one_line(max(sizes, key=lambda name: sizes[name]))}" if sizes else "")


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
        silent = content is None and known.get("tool_calls")  # a call of a tool need say nothing
        if not isinstance(role, str) or not (isinstance(content, str | list) or silent):
            raise DataError(f"{where}: item {number} of '{field}' is no chat message; needs role and content, or from and value")
        found.append({**known, "role": ROLES.get(role, role), "content": content})
    return found


def located(base: Path, name: str) -> Path:
    """Where a text lies, named by a path that counts from `base`."""
    try:
        return base / local_path(name)
    except ValueError as e:
        raise DataError(str(e)) from None
