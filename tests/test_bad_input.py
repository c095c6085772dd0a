"""Whatever is wrong with what a user brings: one line, exit code 2, no traceback, and not a byte of theirs changed."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.cli import main
from tests.conftest import Project, contents, covered, rare

LAYERS = 2  # of a project

Change = Callable[[Project], Any]
AGAIN = "download it again"
APART = "config and weights do not belong together"


def weights(project: Project) -> Path:
    return project.model / "model.safetensors"


def cut(size: int) -> Change:
    """Keep the first bytes of the weights; a negative size counts from the end."""
    return lambda p: weights(p).write_bytes(weights(p).read_bytes()[:size])


def header(text: bytes) -> Change:
    return lambda p: weights(p).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Rewrite the weights."""

    def apply(project: Project) -> None:
        held = load_file(weights(project))
        change(held)
        save_file(held, weights(project), metadata={"format": "pt"})

    return apply


def put(name: str, value: float) -> Change:
    return tensors(lambda held: held[name].view(-1).__setitem__(7, value))


def config(**options: Any) -> Change:
    def apply(project: Project) -> None:
        path = project.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return apply


def shards(project: Project) -> list[Path]:
    """The model saved again in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(project.model)
    weights(project).unlink()
    model.save_pretrained(project.model, max_shard_size="60KB")
    return sorted(project.model.glob("model-*.safetensors"))


def index(change: Callable[[dict[str, Any]], Any]) -> Change:
    """The model in several files, with another index."""

    def apply(project: Project) -> None:
        shards(project)
        path = project.model / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        new = change(table)
        path.write_text(json.dumps(table if new is None else new))

    return apply


def file(name: str, data: bytes | None) -> Change:
    """One file of the model's folder replaced, or removed."""
    return lambda p: (p.model / name).unlink() if data is None else (p.model / name).write_bytes(data)


def text(data: bytes | None) -> Change:
    return lambda p: p.text.unlink() if data is None else p.text.write_bytes(data)


def jsonl(data: bytes) -> Change:
    def apply(project: Project) -> None:
        (project.folder / "a.jsonl").write_bytes(data)
        project.edit("calibration: {text: words.txt", "calibration: {jsonl: a.jsonl")

    return apply


# Name -> what is done, and what the line says (a regular expression).
MODEL: dict[str, tuple[Change, str]] = {
    "no folder": (lambda p: shutil.rmtree(p.model),
        r"recipe.yaml:1:1  model './model': no folder .*/model, and no hub id either"),
    "a file": (lambda p: (shutil.rmtree(p.model), p.model.write_text("x")), r"recipe.yaml:1:1  model './model': no folder"),
    "empty folder": (lambda p: (shutil.rmtree(p.model), p.model.mkdir()),
        r"no config.json; is this the folder of a transformers"),
    "no config": (file("config.json", None), r"no config.json"),
    "empty config": (file("config.json", b""), r"config.json: transformers cannot read it \("),
    "broken config": (file("config.json", b'{"model_type": '), r"config.json: transformers cannot read it \("),
    "config is a list": (file("config.json", b"[]"), r"config.json: transformers cannot read it \("),
    "config is null": (file("config.json", b"null"), r"config.json: transformers cannot read it \("),
    "config is binary": (file("config.json", b"\xff\xfe\x00"), r"config.json: transformers cannot read it \("),
    "unknown architecture": (config(model_type="nope"), r"config.json: transformers cannot read it \(.*`nope`"),
    "no weights": (lambda p: weights(p).unlink(), r"found no weights; needs model.safetensors"),
    "other weights": (lambda p: weights(p).rename(p.model / "pytorch_model.bin"), r"found only pytorch_model.bin; needs"),
    "weights are a folder": (lambda p: (weights(p).unlink(), weights(p).mkdir()), r"model.safetensors: Is a directory"),
    **{
        f"cut at {n}": (cut(n), rf"model.safetensors: truncated or not a safetensors file; {AGAIN}")
        for n in (0, 4, 8, 100, 2000)
    },
    **{f"cut at {n}": (cut(n), rf"holds [\d,]+ bytes, its header says [\d,]+; .*, {AGAIN}") for n in (3000, 100_000, -1)},
    "too long": (lambda p: weights(p).write_bytes(weights(p).read_bytes() + b"x"), r"holds [\d,]+ bytes, its header says"),
    "header too long": (lambda p: weights(p).write_bytes(b"\xff" * 500), rf"truncated or not a safetensors file; {AGAIN}"),
    "header is no text": (header(b"\xff\xff"), rf"broken safetensors header \(.*\); {AGAIN}"),
    "header is no JSON": (header(b"{{"), rf"broken safetensors header \(.*\); {AGAIN}"),
    "header is a list": (header(b"[]"), rf"broken safetensors header \(.*\); {AGAIN}"),
    "header of numbers": (header(b'{"a": 3}'), rf"broken safetensors header \(.*\); {AGAIN}"),
    "header of unknown dtype": (header(b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}'),
        "broken safetensors header"),
    "header of another model": (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
        rf"asks for .*; {APART}"),
    "a tensor missing": (tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), r"'model.layers.1.mlp.up_proj.weight', "
                         rf"which the weights do not hold \(1 tensors? missing\); {APART}"),
    "a norm missing": (tensors(lambda t: t.pop("model.norm.weight")), rf"asks for 'model.norm.weight', .*; {APART}"),
    "a tensor of integers": (tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int16)})),
                             r"'lm_head.weight' is int16; needs bf16, fp16 or fp32 weights"),
    "nan": (put("model.layers.1.mlp.down_proj.weight", float("nan")),
        r"'model.layers.1.mlp.down_proj.weight' holds NaN or infinite"),
    "inf": (put("model.layers.0.self_attn.q_proj.weight", float("inf")),
        r"'model.layers.0.self_attn.q_proj.weight' holds NaN or"),
    "too large to be squared": (put("model.layers.1.mlp.down_proj.weight", 1e30),
        r"'model.layers.1.mlp.down_proj.weight' holds NaN or infinite values, or such of 1e19"),
    "nan in the embedding": (put("model.embed_tokens.weight", float("nan")),
        r"'model.embed_tokens.weight' holds NaN or infinite"),
    "hidden size": (config(hidden_size=128),
        rf"'model.embed_tokens.weight' is \[272, 64\], the config says \[272, 128\]; {APART}"),
    "more layers": (config(num_hidden_layers=3), rf"asks for 'model.layers.2.self_attn.q_proj.weight', .*; {APART}"),
    "no layers": (config(num_hidden_layers=0), r"this architecture cannot be read"),
    "vocabulary": (config(vocab_size=300), rf"'model.embed_tokens.weight' is \[272, 64\], the config says \[300, 64\]; {APART}"),
    "heads": (config(num_attention_heads=8), rf"q_proj.weight' is \[64, 64\], the config says \[128, 64\]; {APART}"),
    "impossible size": (config(hidden_size=-64), r"transformers cannot build LlamaForCausalLM from this config \("),
    "impossible activation": (config(hidden_act="nope"), r"transformers cannot build LlamaForCausalLM from this config \("),
    "impossible dtype": (config(dtype="float99"), r"config.json: transformers cannot read it \("),
    "quantized already": (config(quantization_config={"quant_method": "gptq"}),
        r"is quantized already \(gptq\); name the original"),
    "a shard missing": (lambda p: shards(p)[1].unlink(),
        r"model-00002-of-0000\d.safetensors: no such file; is a shard missing\?"),
    "a shard cut": (lambda p: (s := shards(p)[1]).write_bytes(s.read_bytes()[:-5]), r"model-00002-of-0000\d.safetensors: holds"),
    "index of absent tensors": (index(lambda t: t["weight_map"].update({"model.x": t["weight_map"]["model.norm.weight"]})),
                                rf"index.json: says that 'model.x' is in model-.*, which does not hold it; {AGAIN}"),
    "index of absent files": (index(lambda t: t["weight_map"].update({"model.x": "no.safetensors"})),
        r"no.safetensors: no such file"),
    "index without map": (index(lambda t: {"metadata": {}}), rf"index.json: broken index \(.*\); {AGAIN}"),
    "index of nothing": (index(lambda t: {"weight_map": {}}), rf"asks for .*; {APART}"),
    "no tokenizer": (file("tokenizer.json", None), r"no tokenizer that transformers can read"),
    "broken tokenizer": (file("tokenizer.json", b"{"), r"no tokenizer that transformers can read"),
    "binary tokenizer": (file("tokenizer.json", b"\xff\xfe\x00"), r"no tokenizer that transformers can read"),
}  # fmt: skip

DATA: dict[str, tuple[Change, str]] = {
    "no text": (text(None), r"recipe.yaml:5:3  .*words.txt: No such file or directory"),
    "empty text": (text(b""), r"holds 0 tokens, 8 windows of 32 need 256; give more text or ask for shorter windows"),
    "short text": (text(b"x" * 100),
        r"holds 100 tokens, 8 windows of 32 need 256; give more text or ask for at most 3 sequences"),
    "text that is no text": (text(b"ab\xff" * 900), r"words.txt: is no UTF-8 text \(invalid start byte at byte 2\)"),
    "text is a folder": (lambda p: (p.text.unlink(), p.text.mkdir()), r"words.txt: Is a directory"),
    "jsonl without the field": (jsonl(b'{"body": "a"}\n'),
        r"recipe.yaml:5:3  .*a.jsonl:1: has no text field 'text'; found: body"),
    "jsonl with a bad line": (jsonl(b'{"text": "a"}\n{"text"\n'), r"a.jsonl:2: this line is no JSON"),
    "evaluation text too short": (lambda p: p.edit("sequences: 4", "sequences: 4000"), r"recipe.yaml:6:3  words.txt: holds"),
    "group that does not divide": (lambda p: p.edit("int4:g32", "int4:g48"),
        r"recipe.yaml:9:7  'layers.0.attn.q': int4:g48: groups"),
}  # fmt: skip


def refuse(project: Project, expected: str, *options: str | Path) -> str:
    """`run` says one line that matches, leaves every file of the user's as it was, and makes no artifact."""
    before = contents(project.folder)
    line = project("run", project.recipe, *options).line
    assert re.search(expected, line), line
    after = {k: v for k, v in contents(project.folder).items() if not k.startswith("out/")}
    assert after == before
    assert not project.artifact.exists()
    return line


@pytest.mark.parametrize("name", MODEL)
def test_a_bad_model(project: Project, name: str):
    change, expected = MODEL[name]
    change(project)
    refuse(project, expected)


@pytest.mark.parametrize("name", DATA)
def test_bad_data_and_options(project: Project, name: str):
    change, expected = DATA[name]
    change(project)
    refuse(project, expected)
    assert not project.out.exists()


def test_a_vocabulary_larger_than_the_model(project: Project, family: Any):
    path = project.model / "tokenizer.json"
    table = json.loads(path.read_text())
    table["model"]["vocab"]["e"] = 9999
    path.write_text(json.dumps(table))
    refuse(project, "the tokenizer gives token 9999, the model knows only 272; they do not belong together")


@pytest.mark.parametrize(
    ("device", "expected"), [("gpu", "--device gpu: "), ("cuda:99", "--device cuda:99: "), ("", "--device : ")]
)
def test_an_unknown_device(project: Project, device: str, expected: str):
    assert refuse(project, "^--device", "--device", device).startswith(expected)
    assert not project.out.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "broken safetensors header"),
        (index(lambda t: []), "broken index"),
        (index(lambda t: {"weight_map": {"a": 3}}), "/3: no such file; is a shard missing"),
        (config(num_hidden_layers=1), "model.layers.1"),
        (put("model.norm.weight", float("nan")), "'model.norm.weight' holds NaN"),
    ],
)
def test_damage_that_hides_deeper(project: Project, change: Change, expected: str):
    change(project)
    refuse(project, expected)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [rare(b"[]"), b'{"cache_implementation": "zz"}'])
def test_what_only_the_engine_dislikes_is_told_and_the_artifact_is_proven_otherwise(project: Project, damaged: bytes):
    (project.model / "generation_config.json").write_bytes(damaged)
    result = project.run()
    assert result.code == 0
    assert "not proven in an engine: transformers' LlamaForCausalLM fails on it" in result.out


def test_a_device_that_cannot_compute(project: Project):
    refuse(project, "--device meta", "--device", "meta")


def test_windows_longer_than_the_model_knows_positions(project: Project, family: Any):
    shutil.rmtree(project.model)
    shutil.copytree(family("gpt2"), project.model)
    project.edit("sequences: 8, length: 32", "sequences: 2, length: 300")
    project.edit('      pins: {"lm_head": "int8:g32"}\n', "")
    refuse(project, "length")


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Inside, no file grows beyond `size`; Python ignores the signal, so a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_disk_that_fills_up_anywhere_stops_the_run_cleanly(project: Project):
    """The limit on a file's size is raised step by step: it meets records, blocks, then the artifact; the last run ends."""
    before = contents(project.folder)
    reached = []
    for size in (10, 1_000, 15_000, 30_000, 60_000, 10**9):
        with files_at_most(size):
            result = project.run()
        if result.code:
            assert re.search(r"/out\S*: cannot write \(File too large\)$", result.line), result.line
            assert not project.artifact.exists()
            assert [p for p in project.out.rglob("*.tmp")] == []
        reached.append(len(list(project.out.rglob("*.safetensors"))))
    assert result.code == 0
    assert reached[:3] == [0, 0, 0]  # not even one block
    assert reached[3:] == [3, 3, 4]  # all blocks and the head; then the artifact, which is there whole or not at all
    whole = contents(project.artifact)
    shutil.rmtree(project.out)
    assert project.run().code == 0
    assert contents(project.artifact) == whole
    assert {k: v for k, v in contents(project.folder).items() if not k.startswith("out/")} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KiB; skips where it may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    gc.collect()  # a map of the artifact may live in a cycle
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_says_so_and_a_larger_one_goes_on(project: Project, small_disk: Path):
    """As the disk grows, each run goes on where the one before it had no more room."""
    out = small_disk / "run"
    reached = []
    for size in ("16k", "48k", "72k", "128k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", small_disk], check=True)
        line = project.run(out=out).line
        assert line.endswith(": the disk is full; free some space and run again, finished blocks are kept")
        assert not (out / "compressed_tensors").exists()
        reached.append(len(list((out / "steps").rglob("*.safetensors"))))
    assert reached == [0, 1, 2, 3]
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    again = project.run(out=out)
    assert again.code == 0, again.err
    assert "(finished before)" in again.out


@pytest.fixture(scope="module")
def ran_before(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run has imported all that a run imports: a stranger may not read Python itself, where that lies in a home of root's."""
    assert main(["run", str(Project.make(tmp_path_factory.mktemp("before"), family("llama", blocks=1), text))]) == 0


@pytest.fixture
def nobody(ran_before: None, project: Project) -> Iterator[None]:
    """Inside, this process may do what a stranger may; skips where it is no superuser."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    above = [p for p in project.folder.parents if p.stat().st_mode & 0o005 != 0o005]  # pytest keeps its folders to itself
    modes = {p: p.stat().st_mode for p in above}
    for path in [*modes, project.folder, *project.folder.rglob("*")]:
        path.chmod(0o755)
    yield
    os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


def test_a_folder_that_may_not_be_written(project: Project, nobody: None):
    project.out.mkdir(mode=0o555)
    os.seteuid(65534)
    assert refuse(project, r"cannot write \(Permission denied\)") == f"{project.out}: cannot write (Permission denied)"
    deeper = project.folder / "a" / "b"
    assert refuse(project, "denied", "--out", deeper) == f"{deeper}: cannot write (Permission denied)"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_may_not_be_read(project: Project, nobody: None, name: str):
    path = project.model / name
    path.chmod(0)
    os.seteuid(65534)
    line = project.run().line
    os.seteuid(0)
    assert "ermission denied" in line or name == "tokenizer.json"
    assert str(project.model) in line


# --- noise ------------------------------------------------------------------------------------------------------------


def noisy(data: bytes, rng: random.Random, end: int) -> bytes:
    """The data with a few bits flipped, bytes dropped, or an end cut off, all before `end`."""
    spoilt = bytearray(data)
    kind = rng.random()
    if kind < 0.2:
        return bytes(spoilt[: rng.randrange(end)])
    if kind < 0.4:
        at = rng.randrange(end)
        del spoilt[at : at + rng.randint(1, 8)]
        return bytes(spoilt)
    for _ in range(rng.randint(1, 3)):
        spoilt[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def answered(project: Project, *command: str | Path) -> int:
    """A command ends well, or with one line; anything else raises."""
    result = project(*command)
    assert result.code == 0 or result.line
    return result.code


@pytest.mark.parametrize("name", covered(["config.json", "model.safetensors"], "model.safetensors"))
@pytest.mark.parametrize("copies", [20, rare(100)])
def test_noise_never_gives_a_traceback(project: Project, name: str, copies: int):
    """Spoilt copies of each file, planned; a plan reads all of both."""
    rng = random.Random(name)
    path = project.model / name
    whole = path.read_bytes()
    end = len(whole) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
    codes = []
    for _ in range(copies):
        path.write_bytes(noisy(whole, rng, end))
        codes.append(answered(project, "plan", project.recipe))
    assert 2 in codes


@pytest.mark.slow
def test_noise_in_the_weights_never_gives_a_traceback(project: Project):
    rng = random.Random(2)
    whole = weights(project).read_bytes()
    for _ in range(6):
        spoilt = bytearray(whole)
        for _ in range(rng.choice((1, 30))):
            spoilt[rng.randrange(3000, len(whole))] ^= 1 << rng.randrange(8)
        weights(project).write_bytes(spoilt)
        shutil.rmtree(project.out, ignore_errors=True)
        answered(project, "run", project.recipe, "--set", "quantize.method=rtn", "--set", "export=[]")


def test_the_network_is_not_asked_for_a_folder_that_is_missing(project: Project, monkeypatch: pytest.MonkeyPatch):
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    for name in ("./model2", "../model2", "/no/such/folder", "model2"):
        refuse(project, f"model '{name}': no folder", "--set", f"model={name}")


def test_a_hub_that_does_not_answer(project: Project, monkeypatch: pytest.MonkeyPatch):
    def silent(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", silent)
    refuse(
        project, r"model 'some/model@v1': no folder .*, and the hub says: no route to the hub$", "--set", "model=some/model@v1"
    )


def test_verbose_shows_the_traceback(project: Project):
    weights(project).write_bytes(b"")
    for command in (["-v", "run", project.recipe], ["run", "-v", project.recipe], ["run", project.recipe, "--verbose"]):
        result = project(*command)
        assert result.code == 2
        assert "Traceback (most recent call last)" in result.err
        assert result.err.splitlines()[-1].startswith("compress: ")
        assert pipeline.__file__ in result.err
