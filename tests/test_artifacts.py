"""What holds for every kind of artifact: other bytes than were written, and links out of the folder, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export import runtime
from compress.export.artifact.files import MARK
from compress.export.artifact.place import held, mark
from compress.export.table import EXPORTERS, KINDS
from compress.formats import parse
from compress.model.model import open_model
from compress.passes.allocate import Allocate
from compress.passes.quantize import Quantize
from compress.state.checkpoint import Layout
from tests.conftest import LIGHT, covered, rare
from tests.cooking import several

WEIGHTS = {"compressed_tensors": "model.safetensors", "gptq": "model.safetensors", "gguf": "model.gguf",
           "native": "compress-00001.safetensors", "onnx": "model.onnx.data"}  # fmt: skip
NAMES = covered(WEIGHTS, *LIGHT)  # test_onnx.py damages its own in every run
FILES = [(name, file) if name in LIGHT else rare(name, file)
         for name, file in (*WEIGHTS.items(), ("onnx", "model.onnx"), *((name, "config.json") for name in WEIGHTS))]  # fmt: skip


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made(exporter) -> its artifact; that of ONNX apart, as it takes seconds."""

    @cache
    def run(*names: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("artifacts")
        done = several(folder, family("llama", blocks=1), text, *names, format="int4:g32", method="rtn")
        return {name: place for name, (place, _) in done.artifacts.items()}

    return lambda name: run(*(LIGHT if name in LIGHT else (name,)))[name]


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path) -> Any:
    """copy(exporter) -> a copy of its artifact, to damage."""
    return lambda name: Path(shutil.copytree(made(name), tmp_path / name))


def refusal(folder: Path, capsys: Any) -> str:
    """The one line with which a folder is refused."""
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 2
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_every_exporter_is_tried_here() -> None:
    assert WEIGHTS.keys() == EXPORTERS.keys()
    assert len(KINDS) == len(EXPORTERS)


@pytest.mark.parametrize("name", NAMES)
def test_an_intact_artifact_is_read(copy: Any, capsys: Any, name: str) -> None:
    assert main(["inspect", str(copy(name))]) == 0
    assert "int4:g32" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_flipped_bit_is_noticed(copy: Any, capsys: Any, name: str, file: str) -> None:
    folder = copy(name)
    data = bytearray((folder / file).read_bytes())
    at = data.rindex(b"1") if file == "config.json" else len(data) - 40  # of JSON, a digit: it stays JSON
    data[at] ^= 3
    (folder / file).write_bytes(data)
    said = refusal(folder, capsys)
    assert f"{folder / file}: " in said or file in ("config.json", "model.onnx")


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_link_out_of_the_folder_is_refused(copy: Any, tmp_path: Path, capsys: Any, name: str, file: str) -> None:
    folder = copy(name)
    (folder / file).rename(tmp_path / "outside")
    (folder / file).symlink_to(tmp_path / "outside")
    (folder / MARK).unlink()
    assert f"{folder / file}: is a link out of the artifact; copy the file itself" in refusal(folder, capsys)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_links_in_a_hub_cache_is_no_such_thing(copy: Any, tmp_path: Path, capsys: Any, name: str) -> None:
    """The hub's cache keeps files under their hashes, and a snapshot of links to them."""
    intact, snapshot, blobs = copy(name), tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(p for p in intact.iterdir() if p.is_file())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(blobs / str(i))
    assert main(["inspect", str(snapshot)]) == 0


def spoilt(note: dict[str, Any]) -> list[Any]:
    """A note with one field gone, of another type, or with other contents, at a time."""
    found: list[Any] = ["", "{", "[]", "null", json.dumps(note)[:50], "\xff"]
    for key, value in note.items():
        found += [{k: v for k, v in note.items() if k != key}, note | {key: None}, note | {key: [value]}]
    proof, sizes = note["proof"], note["sizes"]
    found += [note | {"proof": proof | {"difference": "x"}}, note | {"proof": proof | {"greedy": 1.5}},
              note | {"proof": {k: v for k, v in proof.items() if k != "engine"}}, note | {"sizes": {}},
              note | {"sizes": {name: str(size) for name, size in sizes.items()}},
              note | {"sha256": {name: 3 for name in sizes}}]  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(WEIGHTS, "native"))
def test_a_damaged_mark_is_named_by_whoever_asks_it(copy: Any, capsys: Any, text: Path, name: str) -> None:
    """The hashes in it are what damage is found by: without them nothing would be compared."""
    folder = copy(name)
    notes = spoilt(json.loads((folder / MARK).read_text()))
    for note in notes:
        (folder / MARK).write_bytes((note if isinstance(note, str) else json.dumps(note)).encode("latin-1"))
        assert f"{folder / MARK}: is " in refusal(folder, capsys), note
    for verb in (["eval", "--text", str(text), "--length", "32", "--sequences", "1"], ["bench", "--against", str(folder)]):
        assert main([verb[0], str(folder), *verb[1:]]) == 2
        assert f"{folder / MARK}: is " in capsys.readouterr().err
    if name in ("native", "compressed_tensors"):
        with pytest.raises(ModelError, match=f"{MARK}: is "):
            runtime.load(folder)


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_without_a_mark_is_read(copy: Any, name: str) -> None:
    folder = copy(name)
    (folder / MARK).unlink()
    assert main(["inspect", str(folder)]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_the_tokenizer_is_noticed(copy: Any, capsys: Any, name: str) -> None:
    folder = copy(name)
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data.replace(b"a", b"b", 1))
    assert f"{folder / 'tokenizer.json'}: is not the file that was written" in refusal(folder, capsys)


def test_a_config_that_no_longer_says_what_it_is_is_noticed(copy: Any, capsys: Any) -> None:
    folder = copy("native")
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("quantization_config", "quantizatiom_config")
    )
    assert f"{folder / 'config.json'}: is not the file that was written" in refusal(folder, capsys)


@pytest.mark.parametrize("note", [{"sizes": [], "proof": 1}, {"sizes": {}, "proof": {}}, {"sizes": {}, "proof": {"engine": 1}}])
def test_a_broken_mark_is_that_of_another_run(copy: Any, note: dict[str, Any]) -> None:
    folder = copy("native")
    assert held(folder) == mark(folder)["key"]
    (folder / MARK).write_text(json.dumps(note | {"key": "k"}))
    assert held(folder) is None


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name != "gptq"])
def test_what_a_matrix_takes_beyond_its_format_is_told_by_format(family: Any, name: str) -> None:
    """So a budget of a file can be kept before there is a file: beside formats and what they grow by, artifacts hold the same."""
    exporter, model, beside = EXPORTERS[name](), open_model(str(family("llama"))), {}
    for text in ("int2:g32", "int3:g32", "int3:g32:asym", "int4:g32", "int4:g64:asym", "int5:g64", "int8:g32"):
        state = Quantize(format=parse(text)).foresee(model.state)
        try:
            exporter.check(state)
        except ExportError:
            continue
        own = Layout.of([spec for spec, _, _ in state.entries()]).tensor_bytes
        more = sum(state.graph[site].numel * exporter.grown(fmt) / 8 for site, fmt in state.formats.items())
        beside[text] = exporter.layout(model, state).tensor_bytes - own - more
    assert len(beside) > 1
    assert max(beside.values()) - min(beside.values()) < 0.005 * own, beside


def test_what_a_budget_of_the_file_finds_by_itself_counts_and_is_not_told_as_an_option() -> None:
    asked = Allocate(budget="1 MiB")
    found = asked.beside_files(lambda: 5, lambda _: 0.5)
    assert found.beside == 5
    assert set(found.grown.values()) == {0.5}
    assert found.model_dump(exclude_unset=True) == asked.model_dump(exclude_unset=True) == {"budget": "1 MiB"}
    assert found.model_dump() != asked.model_dump()  # so it is a part of the step's key
