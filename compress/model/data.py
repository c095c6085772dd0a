"""Token batches: the same recipe gives the same tokens, and a hash of them goes into every key that depends on them.

A text is tokenized without special tokens and cut into windows of `length` tokens that do not overlap; the first `sequences`
windows are used. Documents of a file of records or a hub data set are joined by the tokenizer's end-of-text token.

The windows are those of the whole text, and cost what they hold: a text is tokenized from its start to somewhat behind the last
window, and what follows is never looked at. That gives the same tokens because tokenizers look ahead no further than a word, a
run of spaces or a few merges; `MARGIN` tokens behind the windows are left out. (A normalizer whose pattern is anchored to the end
of the text would be the exception.) Tokenizing piece by piece would cost less where many windows are wanted, but many tokenizers
treat the start of a text as something else than its middle.

Beside the tokens goes which of them are learnt from, where only answers are (answers.py); it is cut as they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.documents import local_path
from compress.errors import DataError
from compress.model import records, texts
from compress.model.answers import HOW, Span, covered, learnt_from
from compress.model.tokenizer import Tokenizer, tokenizer_of
from compress.model.vocabulary import cut_tokenizer

START = 1 << 16  # characters that are tokenized at first
BATCH = 4096  # tokens that go through a model at once, or one window
MARGIN = 256  # tokens behind the windows
MOST = 2**40  # tokens that anybody may ask for
POOL = 8  # windows that each chosen one is chosen from

T = TypeVar("T")


class Source(BaseModel):
    """A text: exactly one of `text`, `jsonl` and `dataset`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = Field(None, description="path of a text file in UTF-8; gzip, bzip2 and xz are unpacked")
    jsonl: str | None = Field(
        None,
        description="path of a file of records: JSONL, a JSON array, or parquet; `field` names the text, or the chat messages",
    )
    dataset: str | None = Field(None, description="a hub data set, `name` or `name:config`; needs the extra `datasets`")
    field: str = Field("text", description="the field that holds the text or messages, for jsonl and dataset")
    split: str = Field("train", description="the split, for dataset")

    @field_validator("text", "jsonl")
    @classmethod
    def _a_path(cls, named: str | None) -> str | None:
        if named is not None:
            local_path(named)
        return named

    @model_validator(mode="before")
    @classmethod
    def _nothing_learnt(cls, given: Any) -> Any:
        if isinstance(given, dict) and "answers" in given and "answers" not in cls.model_fields:
            raise ValueError("'answers' says what 'distill' learns from; put it under data.training, or leave it out")
        return given

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        if sum(k is not None for k in (self.text, self.jsonl, self.dataset)) > 1:
            raise ValueError("give only one of text, jsonl, dataset")
        return self

    @property
    def place(self) -> str:
        return self.text or self.jsonl or self.dataset or ""


class Text(Source):
    """One source of text, and how much it gives."""

    weight: float = Field(1.0, gt=0, le=1e9, description="share of the windows that this source gives, among several")


class Windows(Text):
    """Token windows: `sequences` of `length` tokens, from one source or from several `sources` by weight."""

    sequences: int = Field(128, gt=0, le=MOST, description="number of windows")
    length: int = Field(2048, gt=1, le=MOST, description="tokens in a window; the context length of every figure")
    bos: bool = Field(False, description="put the tokenizer's begin-of-text token first in every window (Gemma wants it)")
    sources: tuple[Text, ...] = Field((), description="several sources with weights, instead of one")

    @property
    def reading(self) -> Windows | None:
        """What is read for it; None where nothing is."""
        return self

    @model_validator(mode="after")
    def _some_source(self) -> Windows:
        if bool(self.place) == bool(self.sources):
            raise ValueError("give one source (text, jsonl or dataset) or a list of sources, not both")
        if not all(s.place for s in self.sources):
            raise ValueError("every source needs text, jsonl or dataset")
        return self


class Lesson(Text):
    """A text to learn from."""

    answers: bool = Field(
        False, description="learn from the answers of conversations alone, and read the rest; for a jsonl or dataset of messages"
    )

    @model_validator(mode="after")
    def _in_conversations(self) -> Lesson:
        if self.answers and self.text is not None:
            raise ValueError("answers stand in conversations, and a plain text has none; name a jsonl or dataset of messages, or "
                             "leave 'answers' out")  # fmt: skip
        return self


class Lessons(Windows, Lesson):
    """Windows to learn from."""

    sources: tuple[Lesson, ...] = Field((), description="several sources with weights, instead of one")

    @model_validator(mode="after")
    def _each_its_own(self) -> Lessons:
        if self.answers and self.sources:
            raise ValueError("'answers' belongs to each of several sources; put it beside their jsonl or dataset")
        return self


class Prompts(Source):
    """What sampled windows begin with: pieces of a text."""

    tokens: int = Field(8, gt=1, le=MOST, description="tokens that each window takes from the text")

    @model_validator(mode="after")
    def _some_source(self) -> Prompts:
        if not self.place:
            raise ValueError("prompts need text, jsonl or dataset")
        return self


Temperature = Annotated[float, Field(gt=0, le=100)]


class Generate(BaseModel):
    """How windows are sampled from the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: tuple[Temperature, Temperature] = Field(
        (1.0, 1.0), description="of the first token, and of those from `first` tokens on; in between it falls evenly"
    )
    first: int = Field(16, gt=0, le=MOST, description="tokens after which the temperature is the second one")
    prompts: Prompts | None = Field(None, description="a text to go on from; else windows begin after the begin-of-text token")


class Calibration(Windows):
    """Windows to calibrate on: the first of a text, those of a larger pool that cover it best, or sampled from the model."""

    select: Literal["first", "activations"] = Field(
        "first", description="which windows of the text: the first, or of `pool` times as many those that cover the activations"
    )
    pool: int | None = Field(None, ge=1, le=10_000, description="for select: activations, windows per chosen one; default 8")
    generate: Generate | None = Field(None, description="sample the windows from the model, instead of a text")

    @model_validator(mode="after")
    def _some_source(self) -> Calibration:
        if self.generate is None:
            super()._some_source()  # type: ignore[operator]
        elif self.place or self.sources:
            raise ValueError("generate samples text from the model; leave out text, jsonl, dataset and sources, or put a text to "
                             "go on from under generate: prompts")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _all_of_use(self) -> Calibration:
        if self.pool is not None and self.select == "first":
            raise ValueError("pool is for select: activations; without it the first windows are taken")
        if self.generate and self.select != "first":
            raise ValueError("select chooses among windows of a text, and generate samples no more than are used; leave one out")
        if self.generate and self.generate.prompts and self.generate.prompts.tokens + self.bos >= self.length:
            raise ValueError(f"prompts of {self.generate.prompts.tokens} tokens fill windows of {self.length}; ask for fewer")
        return self

    @property
    def candidates(self) -> int:
        """How many windows are read."""
        return self.sequences * (self.pool or POOL) if self.select == "activations" else self.sequences

    @property
    def measured(self) -> bool:
        """Whether reading is not all: the model has to be asked which windows, or for them."""
        return self.generate is not None or self.candidates > self.sequences

    @property
    def reading(self) -> Windows | None:
        """A pool, prompts, or the windows themselves; nothing where windows begin with the begin-of-text token."""
        if self.generate is None:
            return self.model_copy(update={"sequences": self.candidates})
        prompts = self.generate.prompts
        if prompts is None:
            return None
        source = prompts.model_dump(exclude={"tokens"})
        return Windows(**source, sequences=self.sequences, length=prompts.tokens + self.bos, bos=self.bos)


class Data(BaseModel):
    """What a run reads: text to calibrate on, text to learn from, and other text to evaluate on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Calibration | None = Field(None, description="what GPTQ sees")
    training: Lessons | None = Field(None, description="what 'distill' learns from; the calibration windows where it is absent")
    evaluation: Windows | None = Field(None, description="what the figures of the report are measured on")


@dataclass(frozen=True)
class Tokens:
    """ids: int64 [sequences, length]. place: where they come from, for people. sources: of several ones that gave windows, in
    order, each one's name and number of windows. learnt: bool [sequences, length], of each token whether the one behind it, which
    it is to predict, is learnt from; None: all are. hash: of ids and learnt."""

    ids: torch.Tensor
    place: str
    sources: tuple[tuple[str, int], ...] = ()
    learnt: torch.Tensor | None = None

    @property
    def hash(self) -> str:
        shape = f"{tuple(self.ids.shape)}".encode()
        learnt = b"" if self.learnt is None else self.learnt.numpy().tobytes()
        return hashlib.sha256(shape + self.ids.numpy().tobytes() + learnt).hexdigest()

    def batches(self, tokens: int = BATCH) -> list[torch.Tensor]:
        """Batches of whole windows, about `tokens` tokens each and at least one window."""
        return list(self.ids.split(max(1, tokens // self.ids.shape[1])))


def read(windows: Windows, model: Path, base: Path, size: int, vocabulary: tuple[int, ...] | None = None) -> Tokens:
    """The windows as token ids of a model that has `size` of them; relative paths count from `base`. With a
    `vocabulary`, texts are made of the tokens in it alone; the ids are the model's all the same.

    Raises DataError where a source is missing, has no such field, is shorter than asked, or does not fit the model.
    """
    sources = windows.sources or (windows,)
    length = windows.length - windows.bos
    counts = shares(windows.sequences, [s.weight for s in sources])
    with tokenizer_of(model) if vocabulary is None else cut_tokenizer(model, vocabulary) as tokenizer:
        parts = [cut(tokenizer, source, base, n, length) for source, n in zip(sources, counts, strict=True)]
    ids, learnt = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if windows.bos:
        if tokenizer.begin is None:
            raise DataError("data: bos is true, but the tokenizer has no begin-of-text token; remove it")
        ids = torch.cat([torch.full((len(ids), 1), tokenizer.begin), ids], 1)
    if vocabulary is not None:
        ids = torch.tensor(vocabulary)[ids]
    if int(ids.max()) >= size:
        raise DataError(f"{model}: the tokenizer gives token {int(ids.max())}, the model knows only {size}; "
                        "they do not belong together")  # fmt: skip
    given = [(source.place, n) for source, n in zip(sources, counts, strict=True) if n]
    place = ", ".join(s.place for s in sources)
    if not learnt.any():
        raise DataError(f"{place}: {len(ids)} windows of {windows.length} tokens hold no token of an answer; give more, or leave "
                        "'answers' out")  # fmt: skip
    asked = any(isinstance(s, Lesson) and s.answers for s in sources)
    return Tokens(ids, place, tuple(given) if len(given) > 1 else (), learnt[:, not windows.bos :] if asked else None)


def beginnings(model: Path, count: int) -> Tokens:
    """The begin-of-text token `count` times, as windows of one token; DataError where the tokenizer has none."""
    with tokenizer_of(model) as tokenizer:
        if tokenizer.begin is None:
            raise DataError("generate: the tokenizer has no begin-of-text token to begin with; name a text under prompts")
    return Tokens(torch.full((count, 1), tokenizer.begin), "the begin-of-text token")


def check_length(length: int, config: Any) -> None:
    """DataError where windows are longer than the positions that a model has learned (rotary positions have no such end)."""
    learned = getattr(config, "max_position_embeddings", None)
    if learned and config.model_type == "roberta":  # its positions start behind the padding token's
        learned -= (config.pad_token_id or 0) + 1
    if learned is not None and length > learned and not hasattr(config, "rope_parameters"):
        raise DataError(f"windows of {length} tokens are longer than the {learned} positions that the model has; "
                        f"ask for length: {learned} or less")  # fmt: skip


def shares(total: int, weights: list[float]) -> list[int]:
    """`total` split in proportion to `weights`, by largest remainder; the parts sum to `total`."""
    exact = [total * w / sum(weights) for w in weights]
    parts = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: parts[i] - exact[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def cut(tokenizer: Tokenizer, source: Text, base: Path, sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first windows of one source, int64 [sequences, length]; and which tokens are learnt from, bool [sequences, length + 1]:
    those of each window, and the one behind it."""
    ids, learnt = array("q"), array("b")
    wanted, answers = sequences * length, isinstance(source, Lesson) and source.answers
    for document in documents(tokenizer, source, base):
        if ids and tokenizer.end is not None:
            ids.append(tokenizer.end)
            learnt.append(not answers)
        more = first_tokens(tokenizer, document, wanted - len(ids) + answers)
        ids += more[0]
        learnt += more[1]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        fewer = f"ask for at most {len(ids) // length} sequences" if len(ids) >= length else "ask for shorter windows"
        raise DataError(f"{source.place}: holds {len(ids):,} tokens, {sequences} windows of {length} need "
                        f"{wanted:,}; give more text or {fewer}")  # fmt: skip
    learnt.append(not answers)  # what comes behind the last window, where that was not read
    places = torch.arange(sequences)[:, None] * length + torch.arange(length + 1)
    return (torch.tensor(ids[:wanted], dtype=torch.int64).view(sequences, length),
            torch.tensor(learnt[: wanted + 1], dtype=torch.bool)[places])  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A text, read as far as it is asked for. answers: the stretches of it that are learnt from; None: all of it."""

    text: texts.Text
    answers: list[Span] | None = None

    def encoded(self, tokenizer: Tokenizer, part: str) -> tuple[array[int], array[int]]:
        """The tokens of the text's beginning, and 1 for each of them that is learnt from."""
        if self.answers is None:
            ids = tokenizer.encode(part)
            return ids, array("b", [1]) * len(ids)
        ids, starts, ends = tokenizer.placed(part)
        return ids, covered(starts, ends, self.answers)


def documents(tokenizer: Tokenizer, source: Text, base: Path) -> Iterator[Document]:
    """The texts of one source, each read as far as it is asked for."""

    def chat(messages: list[dict[str, Any]], where: str) -> str:
        return told(tokenizer, tokenizer.chat, messages, where)

    def plain(record: Any, where: str) -> Document:
        return Document(texts.Text(iter([texts.text_of(record, source.field, where, chat)])))

    def answered(record: Any, where: str) -> Document:
        messages = texts.messages_of(record, source.field, where)
        found = told(tokenizer, partial(tokenizer.answers, learnt_from(messages, where)), messages, where)
        if isinstance(found, str):
            raise DataError(f"{where}: where its answers are cannot be told, {found}; {HOW}")
        text, spans = found
        return Document(texts.Text(iter([texts.whole(text, where)])), spans)

    read = answered if isinstance(source, Lesson) and source.answers else plain
    if source.text is not None:
        yield Document(texts.file_text(texts.located(base, source.text)))
    elif source.dataset is not None:
        yield from records.rows(source.dataset, source.split, read)
    else:
        yield from records.records(texts.located(base, source.place), read)


def told(tokenizer: Tokenizer, ask: Callable[[list[dict[str, Any]]], T], messages: list[dict[str, Any]], where: str) -> T:
    """What a tokenizer's chat template says of messages; DataError with where they stand."""
    if not tokenizer.has_template:
        raise DataError(f"{where}: holds chat messages, and the tokenizer in {tokenizer.model} has no chat template; "
                        "name a field that holds text")  # fmt: skip
    try:
        return ask(messages)
    except DataError as e:
        raise DataError(f"{where}: {e}") from None


def first_tokens(tokenizer: Tokenizer, document: Document, wanted: int) -> tuple[array[int], array[int]]:
    """The first tokens of a text, `wanted` of them or more if it has so many, else all; and 1 for each that is learnt from."""
    size = START + 4 * max(0, wanted)
    while True:
        part, whole = document.text.upto(size)
        ids, learnt = document.encoded(tokenizer, part)
        if whole or len(ids) >= wanted + MARGIN:
            return (ids, learnt) if whole else (ids[:wanted], learnt[:wanted])
        needed = len(part) * (wanted + MARGIN) // max(1, len(ids))
        size = min(max(size + size // 2, needed + needed // 8), 8 * size)
