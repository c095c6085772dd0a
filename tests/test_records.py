"""Texts and records as people have them: compressed, marked, in one array, in tables; read no further than the windows reach."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import DataError
from compress.model import records, texts
from compress.model.data import Windows, read
from compress.model.records import Array, found_in
from tests.conftest import covered

PACKERS: dict[str, Callable[[bytes], bytes]] = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
RECORDS = [
    {"text": "abcd"},
    {"text": "é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
    {"text": "ef", "n": [1, {}]},
]


def put(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def held(path: Path) -> list[Any]:
    return [record for _, record in found_in(path)]


def bytes_read(family: Any, folder: Path, **options: Any) -> bytes:
    """What the windows of a source say; the tests' tokenizer gives every byte a token."""
    ids = read(Windows(**options), family("llama"), folder, 272).ids.flatten().tolist()
    return str(records_tokenizer(family).decode([i for i in ids if i < 256])).encode()


def records_tokenizer(family: Any) -> Any:
    from compress.model.tokenizer import open_tokenizer

    return open_tokenizer(family("llama"))


# --- compressed, and marked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["bare", "marked"])
@pytest.mark.parametrize("packer", PACKERS)
def test_what_a_file_is_its_bytes_say(tmp_path: Path, packer: str, mark: bytes):
    pack = PACKERS[packer]
    text = "first\r\nsecond é 😀\rthird"
    assert "".join(texts.decoded(put(tmp_path / "a", pack(mark + text.encode())))) == "first\nsecond é 😀\nthird"
    lines = "\n".join(map(json.dumps, RECORDS))
    assert held(put(tmp_path / "b", pack(mark + lines.encode()))) == RECORDS
    for indent in (None, 2):
        array = json.dumps(RECORDS, indent=indent, ensure_ascii=indent is None)
        assert held(put(tmp_path / "c", pack(mark + b" \n" + array.encode() + b"\n"))) == RECORDS


def test_a_mark_is_not_counted_among_the_bytes_but_its_place_is_a_text_s(tmp_path: Path):
    for data in (b"\xef\xbb\xbf", b""):
        assert list(found_in(put(tmp_path / "a", data))) == []
        assert "".join(texts.decoded(tmp_path / "a")) == ""
    assert "".join(texts.decoded(put(tmp_path / "a", "\ufeff\ufeffx"))) == "\ufeffx"  # only the first is a mark


@pytest.mark.parametrize("packer", covered(["gz", "bz2", "xz"], "gz"))
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_damaged_file_is_one_line(family: Any, tmp_path: Path, packer: str, kind: str):
    whole = PACKERS[packer](b'{"text": "' + bytes(97 + i * i % 26 for i in range(9000)) + b'"}\n')
    for data in (whole[: len(whole) // 2], whole[:40] + bytes(20) + whole[60:]):
        path = put(tmp_path / "a", data)
        with pytest.raises(DataError, match=r"/a: cannot be unpacked \(.*\); make it anew$"):
            read(Windows(**{kind: str(path)}, sequences=90, length=100), family("llama"), tmp_path, 272)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x28\xb5\x2f\xfd\x04\x00", "is compressed with zstd; unpack it, or use gzip, bzip2 or xz"),
        (b"PK\x03\x04\x14\x00", "is a zip archive; unpack it"),
        ("hello".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("\ufeffhello".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_is_no_text_says_what_it_is(family: Any, tmp_path: Path, data: bytes, expected: str, kind: str):
    path = put(tmp_path / "a", data)
    with pytest.raises(DataError) as caught:
        read(Windows(**{kind: "a"}, sequences=1, length=2), family("llama"), tmp_path, 272)
    assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize("start", ["BZh is a name", "PK", "PAR1S is a town", "( text"])
def test_a_text_that_begins_nearly_like_another_kind_is_a_text(tmp_path: Path, start: str):
    assert "".join(texts.decoded(put(tmp_path / "a", start))) == start


def test_no_more_is_unpacked_than_the_windows_need(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What follows is damaged, and nobody sees it. A gigabyte of text would be no hindrance either."""
    monkeypatch.setattr(texts, "PIECE", 1 << 12)
    good, start = bytes(97 + i * i % 23 for i in range(100_000)), b"[" + json.dumps({"text": "x" * 400}).encode()
    for kind, data in (("text", good), ("jsonl", start + b', {"text": "' + good + b'"}]'),
                       ("jsonl", start[1:] + b'\n{"text": "' + good + b'"}\n')):  # fmt: skip
        packed = gzip.compress(data * (1 if kind == "jsonl" else 9), 0)
        put(tmp_path / "a.gz", packed[:-40_000])
        assert read(Windows(**{kind: "a.gz"}, sequences=2, length=100), family("llama"), tmp_path, 272).ids.shape == (2, 100)


# --- arrays -----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def array_of(pieces: Iterator[str]) -> Array:
    array = Array(Path("a.json"))
    array._pieces = pieces
    return array


@settings(max_examples=25, deadline=None)
@given(st.lists(JSON, max_size=6), st.integers(1, 40), st.sampled_from([None, 0, 3]), st.booleans())
def test_an_array_in_pieces_is_the_array(items: list[Any], size: int, indent: int | None, plain: bool):
    text = json.dumps(items, indent=indent, ensure_ascii=plain) + "\n"
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    assert [item for _, item in array_of(pieces).read()] == items


@settings(max_examples=25, deadline=None)
@given(st.lists(JSON, min_size=1, max_size=4), st.data())
def test_an_array_that_is_cut_is_one_line(items: list[Any], data: st.DataObject):
    text = json.dumps(items)
    cut = text[: data.draw(st.integers(1, len(text) - 1))]
    with pytest.raises(DataError, match=r"^a.json: record \d+: is no JSON \(.*\)$"):
        list(array_of(iter([cut])).read())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"text": "a"} {"text": "b"}]', "{path}: record 1: is no JSON (a comma or the end of the array has to follow it)"),
        ('[{"text": "a"}, {"text": oh no, and more}]', "{path}: record 2: is no JSON (Expecting value at character 9 of it)"),
        ('[{"text": "a"}, {"text": "b"},]', "{path}: record 3: is no JSON (Expecting value at character 0 of it)"),
        ('[{"text": "a"}, {"text": "b', "{path}: record 2: is no JSON (the file ends inside it)"),
        ('[{"text": "a"}, {"text": \n', "{path}: record 2: is no JSON (the file ends inside it)"),
        ('[{"text": "a"}, ', "{path}: record 2: is no JSON (the file ends inside it)"),
        ('[{"text": "a"} ', "{path}: record 1: is no JSON (the file ends inside the array)"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "{path}: goes on behind the end of its array; keep one array, or one record a line"),
        ('[{"text": "a"}, 5]', "{path}: record 2: has no text field 'text'; found: a number, where a record is a mapping"),
        ('[{"text": "a"}, {"text": null}]', "{path}: record 2: has no text field 'text'; found: text; 'text' holds nothing, "
         "neither a text nor messages"),
        ('[{"text": "a"}, {"text": "\\ud83d"}]', "{path}: record 2: holds half a character (\\ud83d); the text was cut inside an "
         "emoji, leave the line out"),
        ("[" + "9" * 5000 + "]", "{path}: record 1: is no JSON (Exceeds the limit (4300 digits) for integer string conversion: "
         "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit)"),
        ('[{"instruction": "do", "input": "", "output": "it is done"}]', "{path}: record 1: has no text field 'text'; found: "
         "instruction, input, output; name one of them, as field: output"),
    ],
)  # fmt: skip
def test_an_array_that_cannot_be_read(family: Any, tmp_path: Path, text: str, expected: str):
    path = put(tmp_path / "a.json", text)
    with pytest.raises(DataError) as caught:
        read(Windows(jsonl="a.json", sequences=1, length=50), family("llama"), tmp_path, 272)
    assert str(caught.value) == expected.format(path=path)


def test_an_item_without_end_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(texts, "PIECE", 100)
    with pytest.raises(DataError, match=r"a.json: record 1: has more than 1,000 characters; split it"):
        held(put(tmp_path / "a.json", '["' + "x" * 5000 + '"]'))


def test_what_is_wrong_is_told_before_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read_so_far: list[int] = []

    def pieces() -> Iterator[str]:
        yield '[{"text": no}, ' + "x" * 100
        for _ in range(1000):
            read_so_far.append(1)
            yield "x" * 100

    with pytest.raises(DataError, match="record 1: is no JSON"):
        list(array_of(pieces()).read())
    assert read_so_far == []


# --- tables -----------------------------------------------------------------------------------------------------------


def test_parquet_without_its_library(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = put(tmp_path / "a.parquet", b"PAR1 and so on PAR1")
    with pytest.raises(DataError) as caught:
        read(Windows(jsonl="a.parquet", sequences=1, length=2), family("llama"), tmp_path, 272)
    assert str(caught.value) == f"{path}: is a parquet file, and to read it needs pyarrow:  pip install pyarrow"
    with pytest.raises(DataError, match="is a parquet file, which holds records; name it with 'jsonl', and its column"):
        read(Windows(text="a.parquet", sequences=1, length=2), family("llama"), tmp_path, 272)


def test_parquet(family: Any, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"body": "ab", "id": 1}, {"body": "cd", "id": 2}, {"body": None, "id": 3}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert bytes_read(family, tmp_path, jsonl="a.parquet", field="body", sequences=1, length=5) == b"abcd"
    with pytest.raises(DataError, match=r"a.parquet: row 3: has no text field 'body'; found: body, id; 'body' holds nothing"):
        read(Windows(jsonl="a.parquet", field="body", sequences=1, length=50), family("llama"), tmp_path, 272)
    with pytest.raises(DataError, match=r"row 1: has no text field 'text'; found: body, id; name one of them, as field: body"):
        read(Windows(jsonl="a.parquet", sequences=1, length=5), family("llama"), tmp_path, 272)
    put(tmp_path / "b.parquet", b"PAR1 and so on PAR1")
    with pytest.raises(DataError, match=r"b.parquet: cannot be read as parquet \("):
        read(Windows(jsonl="b.parquet", sequences=1, length=5), family("llama"), tmp_path, 272)


def test_sources_of_every_kind_give_their_shares(family: Any, tmp_path: Path):
    put(tmp_path / "a.txt.gz", gzip.compress(b"a" * 99))
    put(tmp_path / "b.json", json.dumps([{"text": "b" * 50}, {"text": "b" * 50}]))
    put(tmp_path / "c.jsonl.xz", lzma.compress(json.dumps({"said": "c" * 99}).encode()))
    sources = [{"text": "a.txt.gz"}, {"jsonl": "b.json", "weight": 2}, {"jsonl": "c.jsonl.xz", "field": "said"}]
    assert bytes_read(family, tmp_path, sources=sources, sequences=4, length=4) == b"aaaabbbbbbbbcccc"
