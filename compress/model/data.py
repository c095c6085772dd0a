"""Token batches: the same recipe gives the same tokens, and a hash of them goes into every key that depends on them.

A text is tokenized whole, without special tokens, and cut into windows of `length` tokens that do not overlap; the first
`sequences` windows are used. Documents of a JSONL file or a hub data set are joined by the tokenizer's end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import DataError, first_line
from compress.model.custom import refuse_tokenizer_code


class Text(BaseModel):
    """One source of text: exactly one of `text`, `jsonl` and `dataset`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, description="path of a plain text file (UTF-8)")
    jsonl: str | None = Field(None, description="path of a JSONL file; `field` names the text in each line")
    dataset: str | None = Field(None, description="a hub data set, `name` or `name:config`; needs the extra `datasets`")
    field: str = Field("text", description="the field that holds the text, for jsonl and dataset")
    split: str = Field("train", description="the split, for dataset")
    weight: float = Field(1.0, gt=0, description="share of the windows that this source gives, among several")

    @model_validator(mode="after")
    def _one_kind(self) -> Text:
        if sum(k is not None for k in (self.text, self.jsonl, self.dataset)) > 1:
            raise ValueError("give only one of text, jsonl, dataset")
        return self

    @property
    def place(self) -> str:
        return self.text or self.jsonl or self.dataset or ""


class Windows(Text):
    """Token windows: `sequences` of `length` tokens, from one source or from several `sources` by weight."""

    sequences: int = Field(128, gt=0, description="number of windows")
    length: int = Field(2048, gt=1, description="tokens in a window; the context length of every figure")
    bos: bool = Field(False, description="put the tokenizer's begin-of-text token first in every window (Gemma wants it)")
    sources: tuple[Text, ...] = Field((), description="several sources with weights, instead of one")

    @model_validator(mode="after")
    def _some_source(self) -> Windows:
        if bool(self.place) == bool(self.sources):
            raise ValueError("give one source (text, jsonl or dataset) or a list of sources, not both")
        if not all(s.place for s in self.sources):
            raise ValueError("every source needs text, jsonl or dataset")
        return self


class Data(BaseModel):
    """What a run reads: text to calibrate on, and other text to evaluate on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Windows | None = Field(None, description="what GPTQ sees")
    evaluation: Windows | None = Field(None, description="what the figures of the report are measured on")


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [sequences, length]. place: where they come from, for people. hash: of the ids."""

    ids: torch.Tensor
    place: str

    @property
    def hash(self) -> str:
        shape = f"{tuple(self.ids.shape)}".encode()
        return hashlib.sha256(shape + self.ids.numpy().tobytes()).hexdigest()

    def batches(self, tokens: int = 4096) -> list[torch.Tensor]:
        """Batches of whole windows, about `tokens` tokens each and at least one window."""
        return list(self.ids.split(max(1, tokens // self.ids.shape[1])))


def read(windows: Windows, model: Path, base: Path, vocabulary: int) -> Tokens:
    """The windows as token ids; relative paths count from `base`.

    Raises DataError where a source is missing, has no such field, is shorter than asked, or does not fit the model.
    """
    tokenizer = open_tokenizer(model)
    sources = windows.sources or (windows,)
    length = windows.length - windows.bos
    parts = [cut(tokenizer, source, base, n, length)
             for source, n in zip(sources, shares(windows.sequences, [s.weight for s in sources]), strict=True)]  # fmt: skip
    ids = torch.cat(parts)
    if windows.bos:
        if tokenizer.bos_token_id is None:
            raise DataError("data: bos is true, but the tokenizer has no begin-of-text token; remove it")
        ids = torch.cat([torch.full((len(ids), 1), tokenizer.bos_token_id), ids], 1)
    if int(ids.max()) >= vocabulary:
        raise DataError(f"{model}: the tokenizer gives token {int(ids.max())}, the model knows only {vocabulary}; "
                        "they do not belong together")  # fmt: skip
    return Tokens(ids, ", ".join(s.place for s in sources))


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` split in proportion to `weights`, by largest remainder; the parts sum to `total`."""
    exact = [total * w / sum(weights) for w in weights]
    parts = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def cut(tokenizer: Any, source: Text, base: Path, sequences: int, length: int) -> torch.Tensor:
    """The first windows of one source, int64 [sequences, length]."""
    ids: list[int] = []
    for document in documents(source, base):
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= sequences * length:
            break
    if len(ids) < sequences * length:
        fewer = f"ask for at most {len(ids) // length} sequences" if len(ids) >= length else "ask for shorter windows"
        raise DataError(f"{source.place}: holds {len(ids):,} tokens, {sequences} windows of {length} need "
                        f"{sequences * length:,}; give more text or {fewer}")  # fmt: skip
    return torch.tensor(ids[: sequences * length], dtype=torch.int64).view(sequences, length)


def documents(source: Text, base: Path) -> Iterator[str]:
    if source.dataset is not None:
        yield from hub_documents(source)
        return
    path = base / Path(source.place).expanduser()
    try:
        if source.text is not None:
            yield path.read_text(encoding="utf-8")
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield jsonl_field(line, source.field, f"{path}:{number}")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is no UTF-8 text ({e.reason} at byte {e.start})") from None


def jsonl_field(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: this line is no UTF-8 text ({e.reason} at byte {e.start} of it)") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: this line is no JSON") from None
    return field_of(record, field, where)


def field_of(record: Any, field: str, where: str) -> str:
    """The text in a field of one record; DataError naming the fields that there are."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        fields = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: has no text field '{field}'; found: {fields or 'none'}")
    text: str = record[field]
    return text


def hub_documents(source: Text) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise DataError("data: 'dataset' needs the extra 'datasets':  pip install 'compress-pipeline[datasets]'") from None
    name, _, config = (source.dataset or "").partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=source.split, streaming=True)
        for row in rows:
            yield field_of(row, source.field, f"data set '{source.dataset}'")
    except DataError:
        raise
    except Exception as e:  # the library raises its own, the network's and the author's errors
        raise DataError(f"data set '{source.dataset}': {first_line(e)}") from e


def open_tokenizer(model: Path) -> Any:
    refuse_tokenizer_code(model)
    try:
        return transformers.AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever the tokenizer's files make it raise
        raise DataError(f"{model}: no tokenizer that transformers can read ({first_line(e)})") from e
