"""Our writer's files are read by the safetensors library, our reader refuses what is broken, and sizes are known beforehand."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.errors import ModelError, RunError
from compress.state.checkpoint import (
    CODES,
    INDEX,
    SINGLE,
    Checkpoint,
    Layout,
    Spec,
    places_in,
    read_header,
    tensor_bytes,
    write_all,
)

letters = st.characters(codec="utf-8", exclude_categories=("Cs",))
names = st.text(letters, min_size=1, max_size=20).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
tables = st.dictionaries(names, st.tuples(st.sampled_from(sorted(CODES, key=str)), shapes), min_size=1, max_size=6)


def specs_of(tensors: dict[str, torch.Tensor]) -> list[Spec]:
    return [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def fill(table: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of random bytes for {name: (dtype, shape)}."""
    rng = random.Random(1)
    out = {}
    for name, (dtype, shape) in table.items():
        spec = Spec(name, dtype, shape)
        data = bytes(rng.randrange(2 if dtype == torch.bool else 256) for _ in range(spec.nbytes))
        out[name] = torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
    return out


@given(tables, st.sampled_from([10, 100, 10**9]))
@settings(max_examples=25, deadline=None)
def test_what_we_write_is_read_by_the_library_and_has_the_size_we_said(tmp_path_factory: Any, table: dict[str, Any], shard: int):
    folder = tmp_path_factory.mktemp("written")
    tensors = fill(table)
    layout = Layout.of(list(specs_of(tensors)), shard)
    layout.write(folder, tensors.items())
    assert sum(p.stat().st_size for p in folder.iterdir()) == layout.nbytes
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [f.name for f in layout.files]
    for file in layout.files:
        with safe_open(folder / file.name, framework="pt") as held:
            assert held.metadata() == {"format": "pt"}
        found = load_file(folder / file.name)
        for spec in file.specs:
            assert found[spec.name].dtype == spec.dtype
            assert bytes(tensor_bytes(found[spec.name])) == bytes(tensor_bytes(tensors[spec.name]))
    checkpoint = Checkpoint(folder)
    assert checkpoint.specs == {s.name: s for s in specs_of(tensors)}
    assert checkpoint.nbytes == layout.tensor_bytes == sum(t.nbytes for t in tensors.values())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_shards_hold_their_limit_and_keep_the_order(sizes: list[int], limit: int):
    specs = [Spec(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)]
    layout = Layout.of(specs, limit)
    assert [s for f in layout.files for s in f.specs] == specs
    for file in layout.files:
        assert file.specs
        assert sum(s.nbytes for s in file.specs) <= limit or len(file.specs) == 1
    index = json.loads(layout.index[1]) if layout.index else None
    assert (index is None) == (len(layout.files) == 1)
    if index:
        assert index["weight_map"] == {s.name: f.name for f in layout.files for s in f.specs}
        assert index["metadata"]["total_size"] == sum(sizes)


def test_data_is_aligned(tmp_path: Path):
    """Engines map the file: tensors begin at a multiple of eight bytes as long as their sizes are such."""
    for name in ("a", "ab", "abc", "abcdefgh"):
        (file,) = Layout.of([Spec(name, torch.float32, (2,))]).files
        assert len(file.header) % 8 == 0


def test_writing_takes_one_tensor_at_a_time(tmp_path: Path):
    """The stream is asked for a tensor only when its turn has come."""
    asked: list[int] = []

    def stream() -> Any:
        for i in range(4):
            asked.append(i)
            yield str(i), torch.full((1000,), i, dtype=torch.float32)
            assert (tmp_path / SINGLE).stat().st_size >= 4000 * (i + 1)

    Layout.of([Spec(str(i), torch.float32, (1000,)) for i in range(4)]).write(tmp_path, stream())
    assert asked == [0, 1, 2, 3]


def test_a_tensor_that_is_not_what_the_layout_says_is_our_mistake(tmp_path: Path):
    layout = Layout.of([Spec("a", torch.float32, (2,))])
    for wrong in (("b", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2, dtype=torch.float16))):
        with pytest.raises(AssertionError, match="expected"):
            layout.write(tmp_path, [wrong])
    with pytest.raises(AssertionError, match="more tensors"):
        layout.write(tmp_path, [("a", torch.zeros(2)), ("b", torch.zeros(2))])


def test_strides_and_views_are_written_as_they_read(tmp_path: Path):
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    for tensor in (base.T, base[:, ::2], base[2:], base.expand(2, 4, 6)):
        assert bytes(tensor_bytes(tensor)) == tensor.contiguous().numpy().tobytes()


def test_a_full_disk_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunError, match="the disk is full; free some space and run again, finished blocks are kept"):
        write_all(1, b"data", tmp_path)


def test_a_write_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system may take fewer bytes than it was given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda d, data: real(d, data[:3]))
    with (tmp_path / "a").open("wb") as file:
        write_all(file.fileno(), b"0123456789", tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file with two tensors."""
    save_file({"a": torch.arange(600.0).view(30, 20), "b": torch.ones(3, dtype=torch.int64)}, tmp_path / SINGLE)
    return tmp_path


def test_reading(folder: Path):
    checkpoint = Checkpoint(folder)
    assert checkpoint.specs["a"] == Spec("a", torch.float32, (30, 20))
    assert torch.equal(checkpoint.read("a"), torch.arange(600.0).view(30, 20))
    assert torch.equal(checkpoint.read_rows("a", 7), torch.arange(600.0).view(30, 20)[7])
    assert "b" in checkpoint
    assert "c" not in checkpoint


def test_nothing_stays_open(folder: Path):
    checkpoint = Checkpoint(folder)
    checkpoint.read("a")
    held = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")}
    assert not any(str(folder) in h for h in held)


def test_every_truncation_is_seen(folder: Path):
    path = folder / SINGLE
    whole = path.read_bytes()
    for size in [*range(200), *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="download it again"):
            read_header(path)


@given(st.integers(0, 170), st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_a_flipped_bit_in_the_header_is_an_error_or_still_a_table(tmp_path_factory: Any, at: int, bit: int):
    """What the header says after it is either refused, or consistent with the file's size."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "flipped.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(3, dtype=torch.int64)}, path)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        specs = read_header(path)
    except ModelError as e:
        assert "\n" not in str(e)  # noqa: PT017
    else:
        assert all(isinstance(s, Spec) for s in specs.values())


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4]},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: dict[str, Any]):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ModelError, match="download it again"):
        read_header(tmp_path / SINGLE)


def test_an_unreadable_tensor_names_its_file(folder: Path):
    checkpoint = Checkpoint(folder)
    (folder / SINGLE).write_bytes(b"")
    with pytest.raises(ModelError, match=r"model.safetensors: tensor 'a' cannot be read"):
        checkpoint.read("a")


def test_tensors_that_begin_anywhere_are_what_the_library_reads(tmp_path: Path):
    """Of every dtype, behind others of odd lengths, in parts, and without any entry; the file is not what is written to."""
    made = {f"{'odd' * odd}{code}": torch.arange(7 * 3).view(7, 3).to(dtype) if not odd else torch.ones(1, dtype=torch.uint8)
            for dtype, code in CODES.items() for odd in (False, True)} | {"none": torch.zeros(0, 3)}  # fmt: skip
    Layout.of(specs_of(made)).write(tmp_path, made.items())
    checkpoint, library = Checkpoint(tmp_path), load_file(tmp_path / SINGLE)
    for name, tensor in library.items():
        ours = checkpoint.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert tensor_bytes(ours) == tensor_bytes(tensor) == tensor_bytes(made[name])
        for rows in (slice(2, 5), [3, 0]) if len(tensor) == 7 else ():
            assert tensor_bytes(checkpoint.read_rows(name, rows)) == tensor_bytes(tensor[rows])
    checkpoint.read("U8").zero_()
    assert all(tensor_bytes(t) == tensor_bytes(made[n]) for n, t in load_file(tmp_path / SINGLE).items())


def test_where_tensors_lie_is_known_for_as_long_as_the_file_is_the_same(folder: Path):
    before = places_in.cache_info().misses
    checkpoint = Checkpoint(folder)
    for _ in range(3):
        for name in checkpoint.specs:
            checkpoint.read(name)
    assert places_in.cache_info().misses == before + 1
    name = next(iter(checkpoint.specs))
    wanted = torch.full_like(checkpoint.read(name), 3)
    save_file({"before": torch.zeros(5), name: wanted}, folder / SINGLE)
    assert torch.equal(checkpoint.read(name), wanted)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_bytes(folder: Path, tmp_path_factory: Any):
    other = tmp_path_factory.mktemp("copy")
    (other / SINGLE).write_bytes((folder / SINGLE).read_bytes())
    assert Checkpoint(other).fingerprint == Checkpoint(folder).fingerprint


@pytest.mark.parametrize("at", [-1, -1000, 300])
def test_another_weight_is_another_fingerprint(folder: Path, at: int):
    before = Checkpoint(folder).fingerprint
    data = bytearray((folder / SINGLE).read_bytes())
    data[at] ^= 1
    (folder / SINGLE).write_bytes(data)
    assert Checkpoint(folder).fingerprint != before


def test_one_changed_weight_in_a_large_file_is_another_fingerprint(tmp_path: Path):
    weight = torch.zeros(1_000_000)
    save_file({"a": weight}, tmp_path / SINGLE)
    before = Checkpoint(tmp_path).fingerprint
    weight[10_000] = 1.0
    save_file({"a": weight}, tmp_path / SINGLE)
    assert Checkpoint(tmp_path).fingerprint != before


def test_the_names_of_files_are_those_of_the_hub():
    specs = [Spec(str(i), torch.uint8, (10,)) for i in range(3)]
    assert [f.name for f in Layout.of(specs, 10).files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert (SINGLE, INDEX) == ("model.safetensors", "model.safetensors.index.json")
