"""A GGUF file where a model is named: made dense once, whole or not at all, and said wherever figures are told."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress.errors import ModelError
from compress.export.artifact.proof import logits
from compress.export.gguf.file import File, read_file
from compress.export.table import KINDS
from compress.model import gguf_source
from compress.model.gguf_header import read_header
from compress.model.gguf_keys import complete
from compress.model.model import open_model
from tests.conftest import Project, contents
from tests.cooking import bake, steps

NOTE = "tiny.gguf was quantized before: its matrices lie on the grid of Q4_0 (14), so figures at about that width flatter; "


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compress" / "gguf"


@pytest.fixture(scope="module")
def artifact(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with a GGUF file: Q4_0 in the blocks, bf16 around, and words with merges, which transformers asks for."""
    folder = tmp_path_factory.mktemp("source")
    words(Path(shutil.copytree(family("llama"), folder / "model")), text)
    made = bake(folder, folder / "model", None, "gguf", {"quantize": {"method": "rtn", "format": "int4:g32"}})
    return made.artifacts["gguf"][0]


def words(folder: Path, text: Path) -> None:
    """A tokenizer with merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=268, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text.read_text()], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    fast.save_pretrained(folder)


@pytest.fixture
def tiny(artifact: Path, tmp_path: Path) -> Path:
    """The file alone, as people download it."""
    return Path(shutil.copyfile(artifact / "model.gguf", tmp_path / "tiny.gguf"))


@pytest.fixture
def of_file(project: Project, tiny: Path) -> Project:
    project.edit("model: ./model", f"model: {tiny}")
    return project


def test_the_dense_model_is_the_file_s(artifact: Path, tiny: Path) -> None:
    (kind,) = (k for k in KINDS if k.is_artifact(artifact))
    known, got = kind.read(artifact), open_model(str(tiny)).state
    assert set(known.graph.sites) == set(got.graph.sites)
    for site in got.graph:
        assert torch.equal(got.weight(site), known.weight(known.graph[site.name]).to(torch.bfloat16)), site.name


@pytest.mark.slow
def test_it_is_made_once_and_said(of_file: Project, cache: Path, tiny: Path) -> None:
    first = of_file.plan()
    assert re.search(rf"^tiny.gguf: made dense in bfloat16 in \d+ s, once, and kept in {cache}", first.err)
    assert f"note: {NOTE}" in first.out
    (folder,) = (p for p in cache.iterdir() if p.is_dir())
    before = {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}
    run = of_file.run()
    assert (run.code, "made dense" in run.out) == (0, False)
    assert f"note: {NOTE}" in run.out
    assert {name: (folder / name).stat().st_mtime_ns for name in contents(folder)} == before
    assert [NOTE in (of_file.out / name).read_text() for name in ("report.md", "report.html")] == [True, True]
    assert NOTE in (of_file.artifact / "README.md").read_text()
    for words in (("eval", of_file.out), ("eval", tiny, "--text", of_file.text, "--length", "32", "--sequences", "2")):
        assert f"note: {NOTE}" in of_file(*words).out
        assert json.loads(of_file(*words, "--json").out)["remarks"][0].startswith(NOTE)
    moved = tiny.rename(tiny.with_name("other.gguf"))  # what a file is, its bytes say
    assert "other.gguf was quantized before" in of_file("inspect", moved).out
    assert sum(p.is_dir() for p in cache.iterdir()) == 1


@pytest.mark.slow
def test_what_a_kill_left_is_made_anew_and_what_was_damaged_is_said(tiny: Path, cache: Path, project: Project) -> None:
    digest = gguf_source.place_of(tiny).name
    (cache / f"{digest}.partial" / "tiny").mkdir(parents=True)
    (cache / f"{digest}.partial" / "tiny" / "model.safetensors").write_bytes(b"half")
    folder = open_model(str(tiny)).folder
    assert not (cache / f"{digest}.partial").exists()
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    said = "holds no longer what was made of a GGUF file; delete the folder, and it is made again"
    assert project("inspect", tiny).line == f"{cache / digest}: {said}"
    shutil.rmtree(cache / digest)
    assert project("inspect", tiny).code == 0


@pytest.mark.slow
def test_what_lies_beside_the_file_is_none_of_its_business(tiny: Path, project: Project, family: Any) -> None:
    """Folders of such files hold configs and tokenizers of all kinds."""
    alone = contents(open_model(str(tiny)).folder)
    shutil.rmtree(gguf_source.cache())
    (tiny.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "bos_token": "no"}')
    (tiny.parent / "generation_config.json").write_text('{"temperature": 7.0}')
    shutil.copyfile(family("gpt2") / "config.json", tiny.parent / "config.json")
    assert "llama, 2 blocks" in project("plan", tiny).out
    assert contents(open_model(str(tiny)).folder) == alone


@pytest.mark.slow
def test_made_again_it_is_the_same_model(of_file: Project, cache: Path) -> None:
    """Also to a key that holds times, as those of large files do."""
    assert of_file.run().code == 0
    (stamp,) = (p.stat().st_mtime_ns for p in cache.rglob("model.safetensors"))
    shutil.rmtree(cache)
    again = of_file.run()
    assert "(finished before)" in again.out
    assert [p.stat().st_mtime_ns for p in cache.rglob("model.safetensors")] == [stamp]


def test_nothing_is_left_of_a_failure(tiny: Path, cache: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(gguf_source, "write_tokenizer", broken)
    assert "No space left on device" in project("inspect", tiny).line
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: b"", r"tiny.gguf: broken GGUF file \(.*empty.*\); download it again"),
        (lambda data: data[:100], r"tiny.gguf: broken GGUF file \(.*\); download it again"),
        (lambda data: b"<html>" + data, r"broken GGUF file \(it does not begin as GGUF version 2 or 3 does\); download it again"),
        (
            lambda data: data[:8] + struct.pack("<QQ", 2**60, 3) + data[24:],
            r"broken GGUF file \(it says \d+ tensors and 3 keys\)",
        ),
        (
            lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:],
            r"broken GGUF file \(it ends before \d+ bytes that it says",
        ),
        (lambda data: data[: len(data) // 2], r"tiny.gguf: "),
        (
            lambda data: data.replace(b"general.architecture", b"general.architecturf"),
            r"transformers cannot read it \(.*\); name",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tiny: Path, cache: Path, project: Project, change: Any, expected: str) -> None:
    tiny.write_bytes(change(tiny.read_bytes()))
    for verb in ("inspect", "plan"):
        assert re.search(expected, project(verb, tiny).line)
        if expected == r"tiny.gguf: ":
            break  # its header is whole, and of a plan nothing more is read
    assert not cache.exists() or [p for p in cache.iterdir() if p.is_dir()] == []


def test_a_header_with_any_bytes_changed_is_read_or_refused(artifact: Path, tmp_path: Path) -> None:
    """In no time, and with no memory of what it only says."""
    whole = (artifact / "model.gguf").read_bytes()
    generator = random.Random(0)
    path, said = tmp_path / "a.gguf", []
    for _ in range(300):
        data = bytearray(whole[: generator.choice([len(whole), 20_000])])
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(12_000)] = generator.choice([0, 1, 8, 9, 10, 127, 255])
        path.write_bytes(data)
        try:
            assert read_header(path).weights >= 0
        except ModelError as e:
            said.append(str(e))
    assert len(said) > 100
    assert all(line.startswith(f"{path}: broken GGUF file (") and line.isprintable() for line in said)


def test_an_absent_file_and_a_folder_of_files(project: Project, tmp_path: Path, tiny: Path) -> None:
    assert project("plan", tmp_path / "no.gguf").line == f"{tmp_path / 'no.gguf'}: no such file"
    project.edit("model: ./model", "model: ./no.gguf")
    assert project.plan().line.endswith(f"recipe.yaml:1:1  {tmp_path / 'no.gguf'}: no such file")
    (tmp_path / "only").mkdir()
    shutil.move(tiny, tmp_path / "only")
    assert f"no config.json; name the GGUF file, {tmp_path / 'only' / 'tiny.gguf'}" in project("inspect", tmp_path / "only").line


@pytest.mark.slow
def test_a_relative_path_and_capitals(tiny: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.rename(tiny.with_name("TINY.GGUF"))
    monkeypatch.chdir(tiny.parent)
    project.edit("model: ./model", "model: ./TINY.GGUF")
    for words in (("plan", "TINY.GGUF"), ("inspect", "TINY.GGUF"), ("plan", project.recipe)):
        assert "note: TINY.GGUF was quantized before" in project(*words).out


def test_without_the_packages(tiny: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "find_spec", lambda name: None)
    line = project("inspect", tiny).line
    assert line == f"{tiny}: to read GGUF needs gguf and accelerate:  pip install 'compress-pipeline[gguf]'"


def test_one_part_of_several(tmp_path: Path, project: Project) -> None:
    key = b"split.count"
    data = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key + struct.pack("<IH", 2, 3)
    (tmp_path / "a-00001-of-00003.gguf").write_bytes(data)
    assert read_header(tmp_path / "a-00001-of-00003.gguf").parts == 3
    line = project("inspect", tmp_path / "a-00001-of-00003.gguf").line
    assert line.endswith("is one of 3 files; join them first, by llama.cpp's llama-gguf-split --merge")


def test_no_room(tiny: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "ROOM", 1e15)
    assert "to make it dense takes" in project("inspect", tiny).line


# --- what transformers does not read of a file ------------------------------------------------------------------------

ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
]


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_embeddings(family: Any, tmp_path: Path, rope: dict[str, Any], project: Project) -> None:
    model = Path(shutil.copytree(family("llama"), tmp_path / "scaled"))
    config = json.loads((model / "config.json").read_text()) | {"rope_parameters": rope}
    (model / "config.json").write_text(json.dumps(config))
    words(model, project.text)
    folder = bake(tmp_path / "run", model, None, "gguf", steps("int8:g32")).artifacts["gguf"][0]
    (kind,) = (k for k in KINDS if k.is_artifact(folder))
    ids = torch.randint(3, 250, (2, 100), generator=torch.Generator().manual_seed(2))
    theirs, ours = (logits(state, [ids], "cpu")[0] for state in (open_model(str(folder / "model.gguf")).state, kind.read(folder)))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("said", [
    {"type": "longrope", "factor": 2.0}, {"type": "yarn", "factor": 2.0}, {"type": "linear"},
    {"type": "yarn", "factor": 2.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
])  # fmt: skip
def test_scaling_that_is_not_read(tiny: Path, project: Project, said: dict[str, Any]) -> None:
    found = read_file(tiny)
    tensors = tuple(tensor for tensor, _ in found.tensors.values())
    keys = {"general.architecture": "llama", **{f"llama.rope.scaling.{key}": value for key, value in said.items()}}
    config = transformers.LlamaConfig()
    with pytest.raises(ModelError, match=f"are scaled as by '{said['type']}', with .*, which is not read here; name the model"):
        complete(config, keys)
    whole = {k: v for k, v in found.metadata.items() if k.startswith(("general.", "llama."))}
    File(whole | keys, tensors, tiny.name).write(tiny.parent, [found.read(t.name) for t in tensors])
    assert project("plan", tiny).line.startswith(f"{tiny}: its rotary embeddings are scaled as by '{said['type']}'")


def test_a_pattern_of_another_number_of_layers() -> None:
    for pattern in ((True,), (True, False, True), 3.5, "6"):
        keys = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 8,
                "gemma3.attention.sliding_window_pattern": pattern}  # fmt: skip
        with pytest.raises(ModelError, match="sliding_window_pattern is not of as many layers as it has"):
            complete(transformers.Gemma3TextConfig(num_hidden_layers=2), keys)


@pytest.mark.parametrize(("name", "blocks", "width", "scalar"), [("Gemma2", 46, 4608, 144), ("Gemma3Text", 62, 5376, 168)])
def test_the_largest_gemmas_divide_queries_otherwise(name: str, blocks: int, width: int, scalar: int) -> None:
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=blocks, hidden_size=width, num_attention_heads=32)
    arch = name.lower().removesuffix("text")
    complete(config, {"general.architecture": arch, f"{arch}.attention.sliding_window": 8})
    assert config.query_pre_attn_scalar == scalar


@pytest.mark.slow
def test_what_an_earlier_version_made_is_made_again(tiny: Path, cache: Path, project: Project) -> None:
    folder = open_model(str(tiny)).folder
    said = folder.parent / "source.json"
    said.write_text(said.read_text().replace('"version": 2', '"version": 1'))
    (folder / "config.json").write_text("{}")
    assert project("inspect", tiny).code == 0
    assert open_model(str(tiny)).config.model_type == "llama"
    assert '"version": 2' in said.read_text()
