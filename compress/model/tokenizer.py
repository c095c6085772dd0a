"""A model's tokenizer, at arm's length: it is opened and asked in a process of its own (apart.py)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from compress.documents import one_line
from compress.errors import DataError
from compress.model.answers import Answers, answers_in
from compress.model.apart import Apart, Failed
from compress.model.custom import refuse_tokenizer_code

OPENING = 60.0  # seconds of CPU time
ENCODING, SPEED = 20.0, 20_000  # seconds for a text, and one more for so many characters; usual are a million
FAILS = "the tokenizer's chat template fails on the messages"


@dataclass(frozen=True)
class Tokenizer:
    """An opened tokenizer. begin, end: its begin-of-text and end-of-text tokens, where it has them."""

    model: Path
    apart: Apart
    begin: int | None
    end: int | None
    has_template: bool

    def encode(self, text: str) -> array[int]:
        """The tokens of a text, without special ones; DataError where the tokenizer fails on it."""
        found: array[int] = array("q")
        found.frombytes(self._ask("the tokenizer fails on the text", len(text), "encode", text))
        return found

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """The text of a conversation, as the tokenizer's chat template writes it; DataError where it fails on it."""
        text: str = self._ask(FAILS, len(repr(messages)), "chat", messages)
        return text

    def placed(self, text: str) -> tuple[array[int], array[int], array[int]]:
        """The same tokens, and of each the characters that it stands for: from which one on, and up to which."""
        found = self._ask("the tokenizer cannot tell where its tokens stand in the text", len(text), "placed", text)
        ids, starts, ends = array("q"), array("q"), array("q")
        for numbers, data in zip((ids, starts, ends), found, strict=True):
            numbers.frombytes(data)
        return ids, starts, ends

    def answers(self, wanted: list[int], messages: list[dict[str, Any]]) -> Answers | str:
        """The same text, and where the answers of these numbers stand in it; or why that cannot be told."""
        length = len(repr(messages)) * (1 + 2 * len(wanted))  # the template is asked about what comes before each
        found: Answers | str = self._ask(FAILS, length, "answers", messages, wanted)
        return found

    def whole(self) -> tuple[str, list[int]]:
        """The tokenizer as a tokenizer.json, with all that its class made of the files, and the ids of its special tokens."""
        found: tuple[str, list[int]] = self._ask("the tokenizer cannot be written down", 0, "whole")
        return found

    def ids(self) -> dict[str, int]:
        """Text of every token -> its id."""
        found: dict[str, int] = self._ask("the tokenizer cannot tell its tokens", 0, "ids")
        return found

    def special(self) -> list[int]:
        """The ids of its special tokens."""
        found: list[int] = self._ask("the tokenizer cannot tell its special tokens", 0, "special")
        return found

    def _ask(self, failure: str, length: int, *request: Any) -> Any:
        try:
            return self.apart.ask(ENCODING + length / SPEED, *request)
        except Failed as e:
            raise DataError(f"{self.model}: {failure} ({one_line(str(e))})") from None


@contextmanager
def tokenizer_of(model: Path, folder: Path | None = None) -> Iterator[Tokenizer]:
    """Inside, the tokenizer of a model's folder answers, or another one of it, in `folder`; DataError where there is none that
    transformers can read."""
    strange = next((p for p in sorted(model.iterdir()) if p.exists() and not p.is_file() and not p.is_dir()), None)
    if strange:  # opening a pipe would wait for somebody who writes to it
        raise DataError(f"{strange}: is no regular file")
    _ = transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # imported here, once, and not in every child
    with Apart(Server(folder or model)) as apart:
        try:
            begin, end, has_template = apart.ask(OPENING, "open")
        except Failed as e:
            raise DataError(f"{model}: no tokenizer that transformers can read ({one_line(str(e))})") from None
        yield Tokenizer(model, apart, begin, end, has_template)


class Server:
    """The other side: answers in the child."""

    def __init__(self, model: Path):
        self.model = model
        self.tokenizer: Any = None

    def __call__(self, what: str, *content: Any) -> Any:
        return getattr(self, f"_{what}")(*content)

    def _open(self) -> tuple[int | None, int | None, bool]:
        self.tokenizer = open_tokenizer(self.model)
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return begin if type(begin) is int else None, end if type(end) is int else None, bool(self.tokenizer.chat_template)

    def _whole(self) -> tuple[str, list[int]]:
        return self.tokenizer.backend_tokenizer.to_str(), [int(i) for i in self.tokenizer.all_special_ids]

    def _ids(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())

    def _special(self) -> list[int]:
        return [int(i) for i in self.tokenizer.all_special_ids]

    def _encode(self, text: str) -> bytes:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, return_attention_mask=False)
        return array("q", found["input_ids"]).tobytes()

    def _placed(self, text: str) -> list[bytes]:
        if not self.tokenizer.is_fast:
            raise TypeError("it is none of the library 'tokenizers'")
        found = self.tokenizer(
            text, add_special_tokens=False, verbose=False, return_attention_mask=False, return_offsets_mapping=True
        )
        starts, ends = zip(*found["offset_mapping"], strict=True) if found["offset_mapping"] else ((), ())
        return [array("q", numbers).tobytes() for numbers in (found["input_ids"], starts, ends)]

    def _answers(self, messages: list[dict[str, Any]], wanted: list[int]) -> Answers | str:
        return answers_in(self.tokenizer, messages, wanted)

    def _chat(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return text


def open_tokenizer(model: Path) -> Any:
    """transformers' own; raises whatever the files make it raise. No code from the folder is run."""
    refuse_tokenizer_code(model)
    return transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
