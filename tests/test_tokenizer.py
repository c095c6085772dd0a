"""Tokenizers that fail, hang or die are one line; windows are those of the whole text, and cost what they hold."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Rust

from compress.errors import DataError
from compress.model import apart, data, records, texts
from compress.model.apart import Apart, Failed
from compress.model.data import Windows, read
from compress.model.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import Project, covered

# --- a child that can be ended ----------------------------------------------------------------------------------------


class Panic(BaseException):
    """As Rust's: no Exception."""


def raises(e: BaseException) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise e

    return act


def spin() -> None:
    while True:
        pass


def refused(act: Callable[[], Any], seconds: float = 5.0) -> str:
    with Apart(act) as child, pytest.raises(Failed) as caught:
        child.ask(seconds)
    return str(caught.value)


def test_a_child_answers_as_often_as_it_is_asked():
    with Apart(lambda *words: (os.getpid(), *words)) as child:
        (first, *one), (second, *two) = child.ask(5.0, "a", 1), child.ask(5.0)
    assert (one, two) == (["a", 1], [])
    assert first == second != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_whatever_foreign_code_does_is_an_answer(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(apart, "PATIENCE", 0.2)
    assert refused(raises(Panic("index out of bounds\nand more"))) == "index out of bounds"
    assert refused(raises(KeyboardInterrupt("pressed"))) == "pressed"
    assert refused(raises(RecursionError("too deep"))) == "too deep"
    assert refused(os.abort) == "ended the process, SIGABRT"
    assert refused(lambda: os._exit(3)) == "ended the process, exit code 3"
    assert refused(lambda: time.sleep(1000), 0.5) == "did not end within 0 s"
    assert refused(lambda: len(bytearray(1 << 45))) == "took too much memory"
    assert refused(lambda: os.write(2, b"panicked at src/lib.rs") and 1 / 0) == "division by zero"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_search_without_end_is_ended():
    assert refused(spin, 0.5).startswith("did not end within")


def test_an_interrupt_ends_the_child(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("multiprocessing.connection.Connection.poll", raises(KeyboardInterrupt()))
    with Apart(spin) as child:
        number = child._child
        with pytest.raises(KeyboardInterrupt):
            child.ask(60.0)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


# --- tokenizers that fail ---------------------------------------------------------------------------------------------

UNKNOWN = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}, "normalizer": None, "pre_tokenizer": None,
           "post_processor": None, "decoder": None, "added_tokens": []}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no unknown token": (UNKNOWN, {}, r"the tokenizer fails on the text \(WordLevel error: Missing"),
    "a panic": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}}, {}, r"\(index out of bounds"),
    "a catastrophic pattern": ({"normalizer": {"type": "Replace", "pattern": {"Regex": r"([a-z]+ ?)+\z"}, "content": ""}}, {},
        r"the tokenizer fails on the text \("),
    "a pattern that is none": ({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, {},
        r"no tokenizer that transformers can read \("),
    "a length in words": ({}, {"model_max_length": "x"}, r"the tokenizer fails on the text \("),
    "code of its own": ({}, {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.E", None]}},
        r"no tokenizer that transformers can read \("),
}  # fmt: skip


def settle(folder: Path, table: dict[str, Any], options: dict[str, Any]) -> None:
    for name, change in (("tokenizer.json", table), ("tokenizer_config.json", options)):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("name", BAD)
def test_a_tokenizer_that_fails_is_one_line(project: Project, name: str):
    table, options, expected = BAD[name]
    settle(project.model, table, options)
    project.text.write_text("the cat sat on a mat and saw two red birds fly over seven hills\n" * 500)
    line = project.plan().line
    assert line.startswith(f"{project.recipe}:5:3  {project.model}: "), line
    assert re.search(expected, line), line


def test_a_pipe_among_the_files_is_not_waited_for(project: Project):
    (project.model / "tokenizer.json").unlink()
    os.mkfifo(project.model / "tokenizer.json")
    assert project.plan().line.endswith("tokenizer.json: is no regular file")


# --- the windows of a long text ---------------------------------------------------------------------------------------


def prose(seed: int, size: int) -> str:
    """Words, runs of spaces and of one letter, line ends, emoji, characters without spaces between them."""
    draw = random.Random(seed)
    letters = "etaoinshrdlu"
    kinds = [lambda: "".join(draw.choices(letters, k=draw.randint(1, 9))), lambda: " " * draw.randint(2, 40), lambda: "\r\n\n",
             lambda: draw.choice("aé") * draw.randint(20, 150), lambda: "".join(draw.choices("中文字語言模型", k=30)),
             lambda: "👩‍👩‍👧 e\u0301", lambda: "don't 12345.67"]  # fmt: skip
    parts = []
    while size > 0:
        parts.append(kinds[draw.choices(range(len(kinds)), [40, 1, 1, 1, 1, 1, 2])[0]]())
        size -= len(parts[-1]) + 1
    return " ".join(parts)


def spaced() -> Any:
    """Spaces as marks and no words, as Llama's: one search over the whole text."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def made(kind: str, folder: Path) -> Path:
    """A folder with a tokenizer of a kind, trained on a little prose."""
    rust = {"bytes": Rust(models.BPE()), "llama": Rust(models.BPE(byte_fallback=True, unk_token="<unk>")),
            "unigram": Rust(models.Unigram()), "words": Rust(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=60)),
            "lines": Rust(models.Unigram())}[kind]  # fmt: skip
    if kind == "bytes":
        rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    elif kind == "llama":
        rust.normalizer = spaced()
    elif kind == "unigram":
        rust.normalizer, rust.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "words":
        rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    else:
        rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+"), "merged_with_next")
    options: dict[str, Any] = {"vocab_size": 400, "special_tokens": ["<unk>"], "show_progress": False}
    trainer = {"bytes": trainers.BpeTrainer, "llama": trainers.BpeTrainer, "words": trainers.WordPieceTrainer}.get(kind)
    trainer = trainer(**options) if trainer else trainers.UnigramTrainer(unk_token="<unk>", **options)
    rust.train_from_iterator([line for line in prose(7, 12_000).split("\n") if line], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", covered(["bytes", "llama", "unigram", "words", "lines"], "bytes"))
def test_windows_are_those_of_the_whole_text(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    """For tokenizers of every make, wherever the text that was looked at ends."""
    folder, path = made(kind, tmp_path / "model"), tmp_path / "a.txt"
    tokenizer = open_tokenizer(folder)
    looked: list[int] = []
    plain = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (looked.append(len(text)), plain(self, text))[1])
    for seed, share in enumerate((None, 40, 3)):
        path.write_text(prose(seed, 30_000), encoding="utf-8", newline="")
        whole = path.read_text(encoding="utf-8")
        monkeypatch.setattr(data, "START", 100 + 371 * seed)
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        sequences = share or len(ids) // 20
        got = read(Windows(text=str(path), sequences=sequences, length=20), folder, tmp_path, 10**6)
        assert torch.equal(got.ids.flatten(), torch.tensor(ids[: sequences * 20]))
        assert not share or min(looked) < len(whole) // 2
        looked.clear()


@pytest.mark.slow
def test_a_text_is_read_no_further_than_its_windows(project: Project, monkeypatch: pytest.MonkeyPatch):
    """A file of 64 GiB, most of it a hole."""
    read_on: list[int] = []
    plain = texts.decoded
    monkeypatch.setattr(texts, "decoded", lambda path: (read_on.append(len(p)) or p for p in plain(path)))
    with project.text.open("ab") as file:
        file.truncate(1 << 36)
    assert project.plan().code == 0
    assert max(read_on) <= texts.PIECE
    assert len(read_on) == 2  # once for each use of it


def test_a_long_record_costs_what_its_windows_hold(project: Project, monkeypatch: pytest.MonkeyPatch):
    looked: list[int] = []
    plain = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: (looked.append(len(text)), plain(self, text))[1])
    (project.folder / "a.jsonl").write_text(json.dumps({"text": "once upon a time " * 200_000}))
    project.edit("calibration: {text: words.txt", "calibration: {jsonl: a.jsonl")
    assert project.plan().code == 0
    assert max(looked) < 100_000


def test_where_a_text_is_no_text_is_told_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a character lies across two pieces."""
    monkeypatch.setattr(texts, "PIECE", 7)
    path = tmp_path / "a.txt"
    for good in ("", "abc", "ééééé", "中文字語言模型", "a👩b👩c👩"):
        for tail in (b"\xff", b"\xc3", b"\xe4\xb8", b"\xc3("):
            path.write_bytes(good.encode() + tail)
            with pytest.raises(UnicodeDecodeError) as wanted:
                path.read_text("utf-8")
            with pytest.raises(DataError) as caught:
                "".join(texts.decoded(path))
            assert str(caught.value) == f"{path}: is no UTF-8 text ({wanted.value.reason} at byte {wanted.value.start})"
        path.write_bytes(f"{good}\r\n{good}\r{good}\n".encode())
        assert "".join(texts.decoded(path)) == path.read_text("utf-8")


# --- records ----------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]


@pytest.fixture
def talker(family: Any, tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    shutil.copytree(family("llama"), tmp_path / "talker")
    (tmp_path / "talker" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "talker"


def first_words(model: Path, folder: Path, record: Any, **options: Any) -> str:
    """What the first window of a JSONL file says."""
    (folder / "a.jsonl").write_text(json.dumps(record) + "\n")
    got = read(Windows(jsonl="a.jsonl", sequences=1, **{"length": 20, **options}), model, folder, 272)
    return str(open_tokenizer(model).decode(got.ids[0].tolist()))


def test_chat_records_go_through_the_template(talker: Path, tmp_path: Path):
    said = "<user>hello\n<assistant>hi\n"[:20]
    assert first_words(talker, tmp_path, {"messages": TURNS}, field="messages") == said
    assert first_words(talker, tmp_path, {"conversations": SHARED}, field="conversations") == said
    assert first_words(talker, tmp_path, {"dialog": SHARED}, field="dialog") == said
    assert first_words(talker, tmp_path, {"id": 3, "messages": TURNS}) == said
    assert first_words(talker, tmp_path, {"messages": TURNS, "text": "x" * 30}) == "x" * 20


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user"}]}, "{path}:1: item 1 of 'messages' is no chat message; needs role and content, or from "
         "and value"),
        ({"messages": [TURNS[0], 3]}, "{path}:1: item 2 of 'messages' is no chat message; needs role and content, or from and "
         "value"),
        ({"messages": []}, "{path}:1: has no text field 'messages'; found: messages; 'messages' holds a list, "
         "neither a text nor messages"),
        ({"text": "a \ud83d b"}, "{path}:1: holds half a character (\\ud83d); the text was cut inside an emoji, leave the "
         "line out"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "{path}:1: holds half a character (\\udc00); the text was cut "
         "inside an emoji, leave the line out"),
        ({"messages": [{"role": "fail", "content": "x"}]}, "{path}:1: {model}: the tokenizer's chat template fails on the "
         "messages (no such role)"),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_read(talker: Path, tmp_path: Path, record: Any, expected: str):
    refusal = "{% if messages[0].role == 'fail' %}{{ raise_exception('no such role') }}{% endif %}"
    (talker / "chat_template.jinja").write_text(TEMPLATE + refusal)
    with pytest.raises(DataError) as caught:
        first_words(talker, tmp_path, record)
    assert str(caught.value) == expected.format(path=tmp_path / "a.jsonl", model=talker)


def test_chat_records_without_a_template(family: Any, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        first_words(family("llama"), tmp_path, {"messages": TURNS})
    assert str(caught.value) == (f"{tmp_path / 'a.jsonl'}:1: holds chat messages, and the tokenizer in {family('llama')} has no "
                                 "chat template; name a field that holds text")  # fmt: skip


def test_an_emoji_in_two_escapes_is_one(talker: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read(Windows(jsonl="a.jsonl", sequences=1, length=4), talker, tmp_path, 272).ids.shape == (1, 4)


def test_a_record_without_end_is_no_record(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "LONGEST", 1000)
    with pytest.raises(DataError, match=r"a.jsonl:1: this line has more than 1,000 bytes; write one record a line"):
        first_words(family("llama"), tmp_path, {"text": "x" * 1000})


@pytest.mark.slow
def test_a_text_that_is_a_device_or_a_pipe(family: Any, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        for kind in ("text", "jsonl"):
            with pytest.raises(DataError, match=r"is no regular file; save the text to one$"):
                read(Windows(**{kind: name}, sequences=1, length=4), family("llama"), tmp_path, 272)


def test_the_positions_of_a_model_bound_every_verb(project: Project, family: Any):
    said = "windows of 300 tokens are longer than the 256 positions that the model has; ask for length: 256 or less"
    for name in ("gpt2", "opt", "roberta"):
        length = "600" if name == "roberta" else "300"
        line = project("eval", family(name), "--text", project.text, "--length", length, "--sequences", "2").line
        assert line == said or name == "roberta"
        assert line.startswith(f"windows of {length} tokens are longer")
