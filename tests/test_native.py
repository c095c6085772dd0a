"""The native artifact holds every format: what is read back is the run's, to the bit, and what was tampered with is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers import auto

from compress import pipeline
from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export.artifact import config as artifact_config
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK, sha256
from compress.export.artifact.proof import logits
from compress.export.native import engine as native_engine
from compress.export.native import exporter as native
from compress.export.native import reader as native_reader
from compress.export.runtime.linear import PackedLinear
from compress.formats import parse
from compress.model.model import open_model
from compress.state import State
from compress.state.checkpoint import OWN, OWN_INDEX
from tests import stock
from tests.conftest import FAMILIES, contents, covered, make_model
from tests.cooking import bake, steps

FORMATS = ("int3:g64:asym", "nf3:g32:dq8x16", "nf4:g64", "lut2:g64", "lut3:g32:shared", "int4:g32+r4", "nf3:g32+r4:int8:channel",
           "int3:g32:r64")  # fmt: skip
OF_FAMILIES = ("llama", "qwen3", "gpt2", "mixtral", "opt")
PINS = {"layers.0.*.o": "int8:channel", "layers.1.*.o": "fp16", "layers.1.*.down": "bf16"}
FILE = f"{OWN}-00001.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["native"][0]


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """A llama in five formats, with factors and pins."""
    pins = {"*.v": "nf4:g64:dq8x16", "*.down": "lut3:g32+r4:int8:channel", "*.o": "fp16", "lm_head": "lut2:g64"}
    return bake(tmp_path_factory.mktemp("made"), family("llama"), text, "native", steps("int3:g64:asym+r4", pins=pins))


@pytest.fixture
def copy(made: pipeline.Outcome, tmp_path: Path) -> Path:
    """The artifact, to damage."""
    return Path(shutil.copytree(artifact_of(made), tmp_path / "artifact"))


# --- every format, every family ---------------------------------------------------------------------------------------


def same_state(ours: State, theirs: State) -> None:
    """Two states agree in every format and every bit."""
    for site in ours.graph:
        twin = theirs.graph[site.name]
        assert theirs.format(twin) == ours.format(site), site.name
        assert torch.equal(theirs.weight(twin), ours.weight(site)), site.name
    for name in ours.graph.parameters:
        assert torch.equal(theirs.dense.read(name), ours.dense.read(name)), name


@pytest.mark.parametrize("name", covered(FAMILIES, "llama", "roberta"))
def test_what_is_written_is_read_back(mixed: Any, family: Any, name: str) -> None:
    """Every family, with formats of every kind among its matrices."""
    done = mixed(name)
    read_back(done)
    asked = yaml.safe_load((done.out.parent / "recipe.yaml").read_text())["passes"][0]["lqlora"]["pins"]
    assert {n: str(done.state.format(done.state.graph[n]) or "bf16") for n in asked} == asked


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", OF_FAMILIES)
def test_what_is_written_is_read_back_whatever_the_format(family: Any, text: Path, tmp_path: Path, name: str, form: str) -> None:
    done = bake(tmp_path, family(name), text, "native", steps(form, pins=PINS))
    read_back(done)
    found = {str(done.state.format(s) or "as it is") for s in done.state.graph.linear}
    assert found == {form, "int8:channel", "fp16", "as it is"}


def read_back(done: pipeline.Outcome) -> None:
    """The artifact alone gives the run's state back, the runtime proved it, and its files are those planned, to the byte."""
    artifact, proof = done.artifacts["native"]
    assert proof.engine == native_engine.ENGINE
    assert proof.difference < 0.1
    assert proof.remark == "compared in fp32"
    same_state(done.state, native_reader.read(artifact))
    layout = pipeline.plan(done.out.parent / "recipe.yaml").layouts["native"]
    assert {f.name: f.nbytes for f in layout.files} == {p.name: p.stat().st_size for p in artifact.glob("*.safetensors")}
    assert layout.nbytes == sum(p.stat().st_size for p in artifact.rglob("*safetensors*"))
    assert layout.index is None


@pytest.mark.parametrize("name", covered(["llama", "gpt2", "opt"], "llama"))
def test_transformers_computes_what_the_matrices_give(mixed: Any, family: Any, name: str) -> None:
    """The original in transformers with the matrices read from the artifact put in: our streaming has no part in that."""
    artifact = artifact_of(mixed(name))
    state, model = native_reader.read(artifact), stock.load(family(name))
    stock.substitute(model, state.graph, {n: state.weight(state.graph[n]) for n in state.codes})
    tokens = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(7))
    (ours,) = logits(state, [tokens], "cpu")
    theirs = stock.logits(model, [tokens])[0].float()
    assert float((ours - theirs).abs().max()) <= 1e-2 * float(theirs.abs().max())


@pytest.mark.slow
def test_a_run_repeated_gives_the_same_bytes(made: pipeline.Outcome, family: Any, text: Path, tmp_path: Path) -> None:
    recipe = (made.out.parent / "recipe.yaml").read_text().replace(str(made.out), str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert contents(artifact_of(pipeline.run(tmp_path / "recipe.yaml"))) == contents(artifact_of(made))


@pytest.mark.slow
def test_small_files(text: Path, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 8000
    source = make_model(tmp_path / "model", config)
    done = bake(tmp_path / "run", source, text, "native", steps("nf4:g64"), shard_bytes=1_000_000)
    artifact = artifact_of(done)
    assert sorted(p.name for p in artifact.glob("*.safetensors")) == [f"compress-{i:05}.safetensors" for i in (1, 2, 3)]
    same_state(done.state, native_reader.read(artifact))
    assert done.artifacts["native"][1].remark == "compared in fp32", (
        "in 16 bits a large model's logits differ by what order sums have"
    )
    table = json.loads((artifact / OWN_INDEX).read_text())["weight_map"]
    assert {n: p.name for n, p in native_reader.open_artifact(artifact).checkpoint.files.items()} == table
    (artifact / "compress-00002.safetensors").unlink()
    refused(artifact, r"a weight file is missing")


@pytest.mark.slow
def test_tensors_that_the_model_does_not_use_are_kept(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("qwen2"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = bake(tmp_path / "run", source, text, "native", steps("nf4:g64"))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in artifact_config.declared(artifact_of(done))["others"]
    same_state(done.state, native_reader.read(artifact_of(done)))


@pytest.mark.slow
def test_beside_compressed_tensors(family: Any, text: Path, tmp_path: Path, capsys: Any) -> None:
    """Both from one run, and both hold the same weights."""
    bake(tmp_path, family("llama"), text, "compressed_tensors", steps("int4:g32"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "- native: {}\n")
    done = pipeline.run(recipe)
    assert list(done.artifacts) == ["compressed_tensors", "native"]
    same_state(done.state, native_reader.read(artifact_of(done)))


# --- other tools ------------------------------------------------------------------------------------------------------


def test_stock_transformers_stops_instead_of_making_weights_up(made: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):  # as if nobody had imported the runtime
        monkeypatch.delitem(table, "compress", raising=False)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(artifact_of(made))


def test_an_artifact_is_no_source(made: pipeline.Outcome, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is quantized already \(compress\); name the original model"):
        bake(tmp_path, artifact_of(made), text, "native", steps("nf4:g64"))


def test_the_folder_says_what_it_is(made: pipeline.Outcome, family: Any) -> None:
    artifact = artifact_of(made)
    config, was = (json.loads((f / "config.json").read_text()) for f in (artifact, family("llama")))
    said = config.pop("quantization_config")
    assert config == was
    assert (said["quant_method"], said["format_version"]) == ("compress", 1)
    assert {m: parse(t) for m, t in said["formats"].items()} == {
        made.state.graph[n].stem: made.state.format(made.state.graph[n]) for n in made.state.codes
    }
    card = (artifact / "README.md").read_text()
    assert "vllm serve THIS_FOLDER" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(artifact)), scope)
    assert any(isinstance(m, PackedLinear) for m in scope["model"].modules())
    note = json.loads((artifact / MARK).read_text())
    assert note["sha256"] == {p.name: sha256(p) for p in artifact.iterdir() if p.name != MARK}
    assert note["sizes"] == {p.name: p.stat().st_size for p in artifact.iterdir() if p.name != MARK}
    assert {p.name for p in artifact.iterdir()} >= {"tokenizer.json", "generation_config.json"}


@pytest.mark.slow
def test_the_card_of_experts(mixed: Any) -> None:
    done = mixed("mixtral")
    assert "vllm" not in (artifact_of(done) / "README.md").read_text().lower()
    assert not any("vLLM" in r for r in pipeline.plan(done.out.parent / "recipe.yaml").remarks)


def test_eval_and_inspect_read_it(made: pipeline.Outcome, text: Path, capsys: Any) -> None:
    for where in (made.out, artifact_of(made)):
        assert main(["inspect", str(where), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert {s["site"]: s["format"] for s in shown["sites"] if s["format"] != "as it is"} == {
            n: str(made.state.format(made.state.graph[n])) for n in made.state.codes
        }
        assert sum(s["bytes"] for s in shown["sites"]) < shown["tensor_bytes"]
        assert main(["eval", str(where), "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert scores["engine"] == native_engine.ENGINE
        assert scores["kl"] > 0
        assert scores["tensor_bytes"] == shown["tensor_bytes"]
    assert main(["inspect", str(artifact_of(made)), "layers.0.attn.q"]) == 0


def test_lm_eval_is_given_the_runtime(made: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    done = type("Done", (), {"returncode": 0})
    monkeypatch.setattr("compress.commands.subprocess.run", lambda words, check: asked.append(words) or done)
    monkeypatch.setattr("compress.commands.importlib.util.find_spec", lambda name: object())
    assert main(["eval", str(artifact_of(made)), "--tasks", "arc_easy"]) == 0
    (words,) = asked
    assert f"pretrained={artifact_of(made)}" in words
    assert any(word.startswith("import compress.export.runtime;") for word in words)


# --- an artifact proves itself ----------------------------------------------------------------------------------------


def proved(made: pipeline.Outcome, source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], tokens: bool) -> Any:
    exporter = native.Native()
    sample = torch.zeros(1, 8, dtype=torch.int64) if tokens else None
    job = Job(open_model(str(source)), made.state, sample, "key", lambda facts: "")
    folder.mkdir()
    exporter.write(job, folder)
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    return exporter.prove(job, folder)


def bit(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Flip the lowest bit of the first number of a tensor."""

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1

    return flip


@pytest.mark.parametrize("tokens", covered([True, False], True))
@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.weight_packed", f"{Q}.weight_zero_point", f"{Q}.lora_A.weight", f"{Q}.lora_B.weight",
    "model.layers.1.self_attn.v_proj.weight_scale_top", "model.layers.1.mlp.down_proj.weight_table",
    "model.layers.1.mlp.down_proj.lora_B.weight_packed", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight",
    "model.embed_tokens.weight", "lm_head.weight_scale",
])  # fmt: skip
def test_a_flipped_bit_is_caught(made: Any, family: Any, tmp_path: Path, name: str, tokens: bool) -> None:
    with pytest.raises(ExportError, match="on disk differs from the"):
        proved(made, family("llama"), tmp_path / "a", bit(name), tokens)


def test_an_intact_artifact_proves_itself(made: Any, family: Any, tmp_path: Path) -> None:
    proof = proved(made, family("llama"), tmp_path / "a", lambda tensors: None, True)
    assert (proof.engine, proof.remark, proof.greedy) == (native_engine.ENGINE, "compared in fp32", 16)
    assert proof.difference < 1e-4


def test_what_the_runtime_cannot_load_our_reader_proves(
    made: Any, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise ModelError("not today")

    monkeypatch.setattr("compress.export.runtime.load", refuse)
    proof = proved(made, family("llama"), tmp_path / "a", lambda tensors: None, True)
    assert (proof.engine, proof.difference, proof.remark) == ("our own reader", 0.0, "not proven in an engine: not today")


def test_a_format_that_reads_the_same_tensors_otherwise_is_caught(
    made: Any, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = native.quantization_config
    swapped = lambda state: json.loads(json.dumps(written(state)).replace("nf4:g64:dq8x16", "nf4:g64:dq8x24"))  # noqa: E731
    monkeypatch.setattr(native, "quantization_config", swapped)
    with pytest.raises((ExportError, ModelError)):
        proved(made, family("llama"), tmp_path / "a", lambda tensors: None, False)


# --- hostile and damaged folders --------------------------------------------------------------------------------------


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        native_reader.read(folder)
    assert "\n" not in str(caught.value)
    assert main(["inspect", str(folder)]) == 2


def told(folder: Path, **changes: Any) -> None:
    """Change keys of the quantization_config; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in {**config["quantization_config"], **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": kept}))
    (folder / MARK).unlink(missing_ok=True)  # as an attacker would


def formats_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = artifact_config.declared(folder)["formats"]
    return found


@pytest.mark.parametrize("version", [2, 0, -1, 1.0, "1", None, True, [1]])
def test_another_version(copy: Path, version: Any) -> None:
    told(copy, format_version=version)
    refused(copy, r"format_version is .*, and 1 is the newest that is read here; upgrade")


@pytest.mark.parametrize("formats", [None, [], "int4:g64", {Q: 4}, {Q: None}])
def test_broken_formats(copy: Path, formats: Any) -> None:
    told(copy, formats=formats)
    refused(copy, "'formats' is to map modules to formats")


@pytest.mark.parametrize(("form", "says"), [
    ("int5:g63", "a group has 16 to 256 inputs"), ("q9_k", "unknown format 'q9_k'"), ("int4:g64+r99999", "the rank is above"),
    ("int4:g" + "9" * 5000, "is no format"), ("", "unknown format ''"), ("int8:g64:asym+r4", r"weight_packed' is int32"),
    ("int3:g64:asym+r5", r"lora_A.weight' is bfloat16 \[4, 64\], .* needs bfloat16 \[5, 64\]"),
    ("int3:g64:asym+r4:fp16", r"lora_A.weight' is bfloat16 \[4, 64\], .* needs float16"),
    ("int3:g64:asym", r"holds 'model.layers.1.self_attn.q_proj.lora_A.weight', which config.json does not account for"),
    ("lut3:g64", r"weight_table' is missing"), ("fp32", r"q_proj.weight' is missing"), ("int3:g48:asym+r4", "do not divide 64"),
])  # fmt: skip
def test_a_format_that_is_not_that_of_the_tensors(copy: Path, form: str, says: str) -> None:
    told(copy, formats=formats_of(copy) | {Q: form})
    refused(copy, says)


@pytest.mark.parametrize("module", ["../../etc/passwd", "/etc/passwd", "model.layers.7.self_attn.q_proj", "", "model.norm"])
def test_formats_for_what_is_no_matrix(copy: Path, module: str) -> None:
    told(copy, formats=formats_of(copy) | {module: "int4:g64"})
    refused(copy, "which is no matrix of this model")


def test_a_matrix_without_a_format(copy: Path) -> None:
    told(copy, formats={m: t for m, t in formats_of(copy).items() if m != Q})
    refused(copy, f"holds '{Q}.lora_A.weight', which config.json does not account for")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / MARK).unlink()  # as an attacker would


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(f"{Q}.weight_scale"), f"'{Q}.weight_scale' is missing"),
    (lambda t: t.pop("model.norm.weight"), r"asks for 'model\.norm\.weight'"),
    (lambda t: t.update(extra=torch.zeros(1)), "holds 'extra', which config.json does not account for"),
    (lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)}), "is missing|does not account for"),
    (lambda t: t.update({f"{Q}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}), r"weight_packed' is int32 \[64, 7\]"),
    (lambda t: t.update({f"{Q}.weight_packed": torch.zeros(64, 6)}), r"weight_packed' is float32 \[64, 6\]"),
])  # fmt: skip
def test_tensors_that_are_missing_or_too_many_or_of_another_shape(copy: Path, change: Any, says: str) -> None:
    rewrite(copy, change)
    refused(copy, says)


def test_a_shape_that_lies(copy: Path) -> None:
    rewrite(copy, lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 1 << 40])}))
    state = native_reader.read(copy)
    with pytest.raises(ModelError, match=r"weight_shape' says \[64, 1099511627776\], the config \[64, 64\]"):
        state.weight(state.graph["layers.1.attn.q"])


def test_a_tensor_in_two_files(copy: Path) -> None:
    shutil.copy(copy / FILE, copy / f"{OWN}-00002.safetensors")
    refused(copy, "two weight files hold the same tensor")


def test_other_bytes_of_the_same_size(copy: Path) -> None:
    tensors = load_file(copy / FILE)
    bit(f"{Q}.weight_packed")(tensors)
    save_file(tensors, copy / "other.safetensors", {"format": "pt"})
    data = bytearray((copy / FILE).read_bytes())
    (copy / "other.safetensors").unlink()
    data[-1] ^= 1
    (copy / FILE).write_bytes(data)
    refused(copy, r"is not the file that was written \(see compress\.json\)")


def test_a_folder_without_a_mark_is_read(copy: Path, made: pipeline.Outcome) -> None:
    (copy / MARK).unlink()
    same_state(made.state, native_reader.read(copy))
