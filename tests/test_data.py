"""The same recipe gives the same tokens; what cannot be read says why in one line."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import DataError
from compress.model.data import Tokens, Windows, read, shares
from compress.model.tokenizer import open_tokenizer

END, BEGIN = 257, 256  # of the tests' tokenizer, which gives every byte a token


@pytest.fixture
def tokens(family: Any, tmp_path: Path) -> Callable[..., Tokens]:
    """tokens(**options of Windows) -> Tokens, paths counted from `tmp_path`."""
    return lambda **options: read(Windows(**options), family("llama"), tmp_path, 272)


@pytest.fixture
def decode(family: Any) -> Callable[[torch.Tensor], str]:
    tokenizer = open_tokenizer(family("llama"))
    return lambda ids: str(tokenizer.decode(ids.tolist()))


def put(folder: Path, name: str, data: str | bytes) -> str:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return name


def test_windows_are_the_first_of_the_text_and_do_not_overlap(tokens: Any, decode: Any, tmp_path: Path):
    text = "".join(chr(33 + i % 90) for i in range(999))
    got = tokens(text=put(tmp_path, "a.txt", text), sequences=7, length=11)
    assert got.ids.shape == (7, 11)
    assert got.ids.dtype == torch.int64
    assert [decode(row) for row in got.ids] == [text[i : i + 11] for i in range(0, 77, 11)]


def test_the_same_text_gives_the_same_tokens_and_hash(tokens: Any, tmp_path: Path):
    name = put(tmp_path, "a.txt", "abcdefgh" * 40)
    one, two = (tokens(text=name, sequences=4, length=16) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert one.hash == two.hash


@pytest.mark.parametrize("change", [{"sequences": 5}, {"length": 17}, {"bos": True}, {"sequences": 8, "length": 8}])
def test_the_hash_tells_windows_apart(tokens: Any, tmp_path: Path, change: dict[str, Any]):
    base = {"text": put(tmp_path, "a.txt", "abcdefgh" * 40), "sequences": 4, "length": 16}
    assert tokens(**base).hash != tokens(**{**base, **change}).hash


@pytest.mark.slow
def test_the_hash_tells_texts_apart_only_where_they_are_read(tokens: Any, tmp_path: Path):
    texts = ("a" * 16, "a" * 15 + "b", "a" * 16 + "b")
    hashes = [tokens(text=put(tmp_path, "a.txt", text), sequences=2, length=8).hash for text in texts]
    assert hashes[0] != hashes[1]
    assert hashes[0] == hashes[2]


def test_bos_takes_the_place_of_one_token(tokens: Any, decode: Any, tmp_path: Path):
    got = tokens(text=put(tmp_path, "a.txt", "abcdefghijkl"), sequences=3, length=5, bos=True)
    assert got.ids[:, 0].tolist() == [BEGIN] * 3
    assert [decode(row[1:]) for row in got.ids] == ["abcd", "efgh", "ijkl"]


def test_documents_are_joined_by_the_end_token(tokens: Any, tmp_path: Path):
    lines = [json.dumps({"body": text, "id": i}) for i, text in enumerate(["abc", "", "de", "fghi"])]
    got = tokens(jsonl=put(tmp_path, "a.jsonl", "\n".join([*lines, "", ""])), field="body", sequences=1, length=9)
    first = got.ids[0, 0].item()
    assert [t - first if t < 256 else t for t in got.ids[0].tolist()] == [0, 1, 2, END, END, 3, 4, END, 5]


def test_what_lies_behind_the_windows_is_not_read(tokens: Any, tmp_path: Path):
    name = put(tmp_path, "a.jsonl", json.dumps({"text": "x" * 50}) + "\nno JSON\n")
    assert tokens(jsonl=name, sequences=5, length=10).ids.shape == (5, 10)


# --- several sources --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_shares_sum_exactly_and_are_within_one_of_their_weight(total: int, weights: list[float]):
    parts = shares(total, weights)
    assert sum(parts) == total
    assert all(abs(p - total * w / sum(weights)) < 1 + 1e-6 for p, w in zip(parts, weights, strict=True))


def test_several_sources_give_their_shares_in_order(tokens: Any, decode: Any, tmp_path: Path):
    put(tmp_path, "a.txt", "a" * 100)
    put(tmp_path, "b.jsonl", json.dumps({"text": "b" * 100}))
    sources = [{"text": "a.txt", "weight": 3}, {"jsonl": "b.jsonl", "weight": 1}]
    got = tokens(sources=sources, sequences=8, length=4)
    assert [decode(row) for row in got.ids] == ["aaaa"] * 6 + ["bbbb"] * 2
    assert got.place == "a.txt, b.jsonl"


def test_a_source_may_be_too_light_for_a_window(tokens: Any, decode: Any, tmp_path: Path):
    put(tmp_path, "a.txt", "a" * 100)
    put(tmp_path, "b.txt", "b" * 100)
    got = tokens(sources=[{"text": "a.txt", "weight": 1e-3}, {"text": "b.txt"}], sequences=2, length=4)
    assert [decode(row) for row in got.ids] == ["bbbb"] * 2


def test_batches_hold_whole_windows_and_lose_none():
    ids = torch.arange(70).view(7, 10)
    for tokens_each, sizes in ((1, [1] * 7), (30, [3, 3, 1]), (10_000, [7])):
        batches = Tokens(ids, "").batches(tokens_each)
        assert [len(b) for b in batches] == sizes
        assert torch.equal(torch.cat(batches), ids)


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "options", "expected"),
    [
        ("a.txt", None, {}, "{path}: No such file or directory"),
        ("a.txt", b"", {}, "a.txt: holds 0 tokens, 4 windows of 16 need 64; give more text or ask for shorter windows"),
        ("a.txt", b"x" * 63, {}, "a.txt: holds 63 tokens, 4 windows of 16 need 64; give more text or "
         "ask for at most 3 sequences"),
        ("a.txt", b"x" * 9 + b"\xff" * 90, {}, "{path}: is no UTF-8 text (invalid start byte at byte 9)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, "{path}:2: this line is no JSON; records stand one "
         "a line, or in one JSON array"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, "{path}:2: this line is no UTF-8 text "
         "(invalid start byte at byte 10 of it)"),
        ("a.jsonl", b'{"body": "a", "id": 3}\n', {}, "{path}:1: has no text field 'text'; found: body, id; "
         "name one of them, as field: body"),
        ("a.jsonl", b'{"text": ["a"]}\n', {}, "{path}:1: has no text field 'text'; found: text; 'text' holds a list, "
         "neither a text nor messages"),
        ("a.jsonl", b"{}\n", {}, "{path}:1: has no text field 'text'; found: none"),
        ("a.jsonl", b"\n\n3\n", {}, "{path}:3: has no text field 'text'; found: a number, where a record is a mapping"),
        ("a.jsonl", b"[" * 90_000, {}, "{path}: record 1: is no JSON (nested without end)"),
        ("a.jsonl", b'{"text": "ab"}\n', {"sequences": 1, "length": 3}, "a.jsonl: holds 2 tokens, 1 windows of 3 need 3; "
         "give more text or ask for shorter windows"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_read(tokens: Any, tmp_path: Path, name: str, data: bytes | None, options: Any, expected: str):
    if data is not None:
        put(tmp_path, name, data)
    with pytest.raises(DataError) as caught:
        tokens(**{name.partition(".")[2].replace("txt", "text"): name, "sequences": 4, "length": 16, **options})
    assert str(caught.value) == expected.format(path=tmp_path / name)


def test_a_folder_is_no_text(tokens: Any, tmp_path: Path):
    with pytest.raises(DataError, match="Is a directory"):
        tokens(text=".", sequences=1, length=2)


def test_tokens_beyond_the_model(family: Any, tmp_path: Path):
    windows = Windows(text=put(tmp_path, "a.txt", "zzz~~~" * 9), sequences=2, length=8)
    with pytest.raises(DataError, match=r"the tokenizer gives token \d+, the model knows only 50; they do not belong together"):
        read(windows, family("llama"), tmp_path, 50)


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(DataError, match="no tokenizer that transformers can read"):
        read(Windows(text=put(tmp_path, "a.txt", "abc"), sequences=1, length=2), tmp_path, tmp_path, 272)


def test_bos_without_a_begin_token(family: Any, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((family("llama") / "config.json").read_text())
    (model / "tokenizer.json").write_text((family("llama") / "tokenizer.json").read_text())
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="bos is true, but the tokenizer has no begin-of-text token; remove it"):
        read(Windows(text=put(tmp_path, "a.txt", "abcabc"), sequences=1, length=4, bos=True), model, tmp_path, 272)


# --- data sets of the hub ---------------------------------------------------------------------------------------------


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[Any]:
    """A module `datasets` whose every data set is `rows`; what it was asked is noted."""
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_data_set_without_the_extra(tokens: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as caught:
        tokens(dataset="c4", sequences=1, length=4)
    assert str(caught.value) == "data: 'dataset' needs the extra 'datasets':  pip install 'compress-pipeline[datasets]'"


def test_a_data_set_is_streamed(tokens: Any, decode: Any, monkeypatch: pytest.MonkeyPatch):
    asked = fake_datasets(monkeypatch, iter([{"body": "abcd"}, {"body": "efgh"}]))
    got = tokens(dataset="allenai/c4:en", split="validation", field="body", sequences=1, length=4)
    assert decode(got.ids[0]) == "abcd"
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]


def test_a_data_set_without_the_field(tokens: Any, monkeypatch: pytest.MonkeyPatch):
    fake_datasets(monkeypatch, [{"body": "abcd"}])
    with pytest.raises(DataError) as caught:
        tokens(dataset="c4", sequences=1, length=4)
    assert str(caught.value) == "data set 'c4': has no text field 'text'; found: body; name one of them, as field: body"


def test_a_data_set_that_fails(tokens: Any, monkeypatch: pytest.MonkeyPatch):
    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionError("no network\nand more")

    fake_datasets(monkeypatch, rows())
    with pytest.raises(DataError) as caught:
        tokens(dataset="c4", sequences=1, length=4)
    assert str(caught.value) == "data set 'c4': no network"
