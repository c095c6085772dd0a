"""Damaged and hostile GGUF files end in one line, quickly; nothing beside the folder is read."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.cli import main
from compress.errors import CompressError, ExportError, ModelError
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK
from compress.export.gguf import exporter as gguf
from compress.export.gguf import reader as gguf_reader
from compress.export.gguf.file import ALIGNMENT, FILE, KINDS, File, Found, Tensor, read_file
from compress.export.gguf.metadata import NOTE
from compress.model.model import open_model
from tests.conftest import covered
from tests.cooking import bake

PASS = {"quantize": {"method": "rtn", "clip": "minmax", "format": "int4:g32:asym", "pins": {"layers.0.*": "int8:g64"}}}


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bake(tmp_path_factory.mktemp("made"), family("llama"), text, "gguf", PASS)


@pytest.fixture
def copy(made: Any, tmp_path: Path) -> Path:
    """The artifact, to damage; its mark taken away, as an attacker would."""
    folder = Path(shutil.copytree(made.artifacts["gguf"][0], tmp_path / "artifact"))
    (folder / MARK).unlink()
    return folder


def unpacked(folder: Path) -> None:
    state = gguf.read(folder)
    for site in state.graph:
        state.weight(site)
    for name in state.graph.parameters:
        state.dense.read(name)


def refused(folder: Path, says: str = ".") -> None:
    begun = time.monotonic()
    with pytest.raises(ModelError, match=says) as caught:
        unpacked(folder)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 5


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, tuple[Tensor, torch.Tensor]]], Any]) -> None:
    """Write the file again after a change of its note and its tensors."""
    found = read_file(folder / FILE)
    note = json.loads(found.metadata[NOTE])
    tensors = {name: (tensor, found.read(name)) for name, (tensor, _) in found.tensors.items()}
    change(note, tensors)
    File({NOTE: json.dumps(note)}, tuple(t for t, _ in tensors.values())).write(folder, [data for _, data in tensors.values()])


def test_intact(copy: Path) -> None:
    unpacked(copy)
    rewritten(copy, lambda note, tensors: None)
    unpacked(copy)


# --- the container ----------------------------------------------------------------------------------------------------


def header(*parts: tuple[str, Any]) -> bytes:
    return b"GGUF" + b"".join(p[1] if p[0] == "raw" else struct.pack("<" + p[0], *p[1]) for p in parts)


def named(text: str) -> tuple[str, bytes]:
    return "raw", struct.pack("<Q", len(text)) + text.encode()


HUGE = 2**63 - 1
HOSTILE = {
    "empty": (b"", "broken GGUF file"),
    "another kind": (b"PK\x03\x04" + bytes(60), "does not begin as GGUF version 3 does"),
    "version 2": (header(("IQQ", (2, 0, 0))), "does not begin as GGUF version 3 does"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "does not begin as GGUF version 3 does"),
    "many tensors": (header(("IQQ", (3, HUGE, 0))), "it says 9223372036854775807 tensors"),
    "many keys": (header(("IQQ", (3, 0, HUGE))), "tensors and 9223372036854775807 keys"),
    "a long key": (header(("IQQ", (3, 0, 1)), ("Q", (HUGE,))), "a string of 9223372036854775807 bytes"),
    "a long string": (header(("IQQ", (3, 0, 1)), named("a"), ("IQ", (8, HUGE))), "goes beyond its end"),
    "a long array": (header(("IQQ", (3, 0, 1)), named("a"), ("IIQ", (9, 8, HUGE))), "an array of 9223372036854775807 items"),
    "an array of arrays": (header(("IQQ", (3, 0, 1)), named("a"), ("IIQ", (9, 9, 1))), "a value of type 9"),
    "an array beyond the end": (header(("IQQ", (3, 1, 1)), named("a"), ("IIQ", (9, 10, 1 << 20))), "broken GGUF file"),
    "another type": (header(("IQQ", (3, 0, 1)), named("a"), ("I", (77,))), "a value of type 77"),
    "a key twice": (header(("IQQ", (3, 0, 2)), *[named("a"), ("IB", (0, 1))] * 2), "'a' is there twice"),
    "no UTF-8": (header(("IQQ", (3, 0, 1)), ("Q", (1,)), ("raw", b"\xff")), "broken GGUF file"),
    "dimensions": (header(("IQQ", (3, 1, 0)), named("t"), ("I", (2**31,))), "has 2147483648 dimensions"),
    "no dimensions": (header(("IQQ", (3, 1, 0)), named("t"), ("I", (0,))), "has 0 dimensions"),
    "a huge tensor": (header(("IQQ", (3, 1, 0)), named("t"), ("IQQIQ", (2, HUGE, HUGE, 0, 0))), "its header says"),
    "an empty tensor": (header(("IQQ", (3, 1, 0)), named("t"), ("IQIQ", (1, 0, 0, 0))), "which is not read"),
    "a type of tensors": (header(("IQQ", (3, 1, 0)), named("t"), ("IQIQ", (1, 32, 14, 0))), "is of type 14"),
    "half a block": (header(("IQQ", (3, 1, 0)), named("t"), ("IQIQ", (1, 33, 2, 0))), r"shape \[33\], which is not read"),
    "an offset": (header(("IQQ", (3, 1, 0)), named("t"), ("IQIQ", (1, 8, 0, HUGE))), "'t' does not begin where"),
    "overlap": (header(("IQQ", (3, 2, 0)), named("t"), ("IQIQ", (1, 8, 0, 0)), named("u"), ("IQIQ", (1, 8, 0, 0))),
                "'u' does not begin where"),
    "a name twice": (header(("IQQ", (3, 2, 0)), named("t"), ("IQIQ", (1, 8, 0, 0)), named("t"), ("IQIQ", (1, 8, 0, 32)))
                     + bytes(6 + 64), "two tensors have one name"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_containers_that_lie(copy: Path, name: str) -> None:
    data, says = HOSTILE[name]
    (copy / FILE).write_bytes(data)
    refused(copy, says)
    assert main(["inspect", str(copy)]) == 2


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_cut_short(copy: Path, share: float) -> None:
    data = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(data[: int(len(data) * share)])
    refused(copy)


def test_something_behind_it(copy: Path) -> None:
    with (copy / FILE).open("ab") as file:
        file.write(bytes(ALIGNMENT))
    refused(copy, "its header says")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_in_the_header_never_crash(made: Any, tmp_path: Path, data: st.DataObject) -> None:
    source = made.artifacts["gguf"][0] / FILE
    content = bytearray(source.read_bytes())
    small = read_file(source).header
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, small - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / FILE
    path.write_bytes(content)
    try:
        found = read_file(path)
        for name, (tensor, _) in found.tensors.items():
            assert len(found.read(name)) == tensor.nbytes
    except ModelError as e:
        if "\n" in str(e):
            raise


@settings(max_examples=25, deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes_behind_the_magic(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / FILE
    path.write_bytes(struct.pack("<4sI", b"GGUF", 3) + data)
    with pytest.raises(ModelError):
        read_file(path)


VALUES = st.one_of(st.text(max_size=9), st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False))


@settings(max_examples=25, deadline=None)
@given(metadata=st.dictionaries(st.text(max_size=9), VALUES, max_size=5), kind=st.sampled_from(list(KINDS)),
       shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), max_size=4))  # fmt: skip
def test_what_is_written_is_found(tmp_path_factory: pytest.TempPathFactory, metadata: Any, shapes: Any, kind: str) -> None:
    tensors = tuple(Tensor(f"t{i}", KINDS[kind], (*s[:-1], s[-1] * KINDS[kind].block)) for i, s in enumerate(shapes))
    data = [torch.randint(0, 256, (t.nbytes,), dtype=torch.uint8) for t in tensors]
    file, folder = File(metadata, tensors), tmp_path_factory.mktemp("file")
    file.write(folder, data)
    found: Found = read_file(folder / FILE)
    assert (folder / FILE).stat().st_size == file.nbytes
    assert found.metadata == metadata
    assert [t for t, _ in found.tensors.values()] == list(tensors)
    assert all(torch.equal(found.read(t.name), d) for t, d in zip(tensors, data, strict=True))


# --- what it says of itself -------------------------------------------------------------------------------------------

Q = "blk.1.attn_q.weight"


def zeros(tensor: Tensor) -> tuple[Tensor, torch.Tensor]:
    return tensor, torch.zeros(tensor.nbytes, dtype=torch.uint8)


@pytest.mark.parametrize(("change", "says"), [
    (lambda n, t: n.update(version=2), "is of version 2, and 1 is the newest that is read; upgrade"),
    (lambda n, t: n.update(dtype="int8"), r"compress\.formats is broken \(KeyError\)"),
    (lambda n, t: n.update(formats=[1]), r"is broken \(AttributeError\)"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "int4:g33"}), r"is broken \(FormatError\)"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "nf4:g64"}), "names formats that no blocks hold"),
    (lambda n, t: n["formats"].update({"layers.9.attn.q": "int4:g32"}), "gives a format to 'layers.9.attn.q', which is no"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "int8:g32"}), "is Q5_0, and compress.formats says int8:g32"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "int5:g16"}), "is Q5_0, and compress.formats says int5:g16"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "int5:g128"}), "groups of 128 do not divide 64"),
    (lambda n, t: n["formats"].update({"layers.1.attn.q": "int5:g64"}), "holds codes or scales that are not those of int5:g64"),
    (lambda n, t: n["formats"].pop("layers.1.attn.q"), "is quantized, but compress.formats names no format"),
    (lambda n, t: n["dtypes"].update({"output_norm.weight": 3}), r"is broken \(KeyError\)"),
    (lambda n, t: t.pop(Q), "'blk.1.attn_q.weight' is missing"),
    (lambda n, t: t.update(x=zeros(Tensor("x", KINDS["F32"], (3,)))), "holds 'x', which the model does not"),
    (lambda n, t: t.update({Q: zeros(Tensor(Q, KINDS["Q5_0"], (64, 32)))}), r"is \[64, 32\], the config says \[64, 64\]"),
    (lambda n, t: t.update({Q: zeros(Tensor(Q, KINDS["F32"], (64, 64)))}), "is F32, and compress.formats says int4:g32:asym"),
    (lambda n, t: t[Q][1].fill_(0xFF), "holds codes or scales that are not those of int4:g32:asym"),
    (lambda n, t: t["output_norm.weight"][1].fill_(0x11), "is not bfloat16, as compress.formats says"),
])  # fmt: skip
def test_notes_and_tensors_that_do_not_belong(copy: Path, change: Any, says: str) -> None:
    rewritten(copy, change)
    refused(copy, says)


def test_a_file_of_somebody_else(copy: Path) -> None:
    File({"general.architecture": "llama"}, ()).write(copy, [])
    refused(copy, "was not written by compress, and only such files are read")


def test_a_config_of_another_model(copy: Path, family: Any) -> None:
    shutil.copy(family("gpt2") / "config.json", copy)
    refused(copy, "is of 'gpt2', which is not written to GGUF")


def test_a_file_that_is_not_the_one_that_was_written(made: Any, copy: Path) -> None:
    shutil.copy(made.artifacts["gguf"][0] / MARK, copy)
    unpacked(copy)
    data = bytearray((copy / FILE).read_bytes())
    data[-1000] ^= 1
    (copy / FILE).write_bytes(data)
    refused(copy, r"is not the file that was written \(see compress\.json\)")


def test_weights_beside_it_are_what_the_folder_is(copy: Path, family: Any) -> None:
    assert gguf_reader.is_artifact(copy)
    shutil.copy(family("llama") / "model.safetensors", copy)
    assert not gguf_reader.is_artifact(copy)


# --- an artifact proves itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(["", "token_embd.weight", "blk.1.attn_norm.weight", Q, "blk.0.ffn_down.weight"], "", Q))
def test_a_flipped_bit_is_caught(made: Any, family: Any, tmp_path: Path, name: str) -> None:
    exporter, job = gguf.Gguf(), Job(open_model(str(family("llama"))), made.state, None, "key", lambda facts: "")
    exporter.write(job, tmp_path)
    assert exporter.prove(job, tmp_path).difference == 0
    data = bytearray((tmp_path / FILE).read_bytes())
    at = read_file(tmp_path / FILE).tensors[name][1] + 5 if name else data.index(b"rope.freq_base") + 18
    data[at] ^= 1
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(
        CompressError, match=r"on disk differ|keys or its table of tensors are not|is not bfloat16|not those"
    ) as e:
        exporter.prove(job, tmp_path)
    assert isinstance(e.value, ExportError | ModelError)
