"""Low-rank factors as a PEFT adapter: PEFT on stock transformers computes what our matrices Q + B A give.

Compared in fp32, where the two agree to rounding: PEFT adds B A x to what the module gives, we put B A into the matrix, and in
16 bits the difference between the two is as large as that of other kernels.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export.artifact.exporter import Job
from compress.export.compressed_tensors import adapter, reader
from compress.export.compressed_tensors import exporter as ct
from compress.formats import LowRank
from compress.model.model import open_model
from compress.state import State
from tests import stock
from tests.conftest import contents, rare
from tests.cooking import bake

PINS = {"layers.0.attn.q": "int3:g64+r8", "*.down": "int4:g32+r4", "*.o": "int4:g32", "layers.1.mlp.*": "bf16"}
STEP = {"lqlora": {"format": "int3:g64", "rank": 2, "rounds": 0, "pins": PINS}}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="needs PEFT: pip install 'compress-pipeline[test]'")


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """A llama with three ranks, sites without a rank, and sites as they are."""
    return bake(tmp_path_factory.mktemp("made"), family("llama"), text, "compressed_tensors", STEP)


@pytest.fixture
def copy(made: pipeline.Outcome, tmp_path: Path) -> Path:
    """The artifact, to damage."""
    return Path(shutil.copytree(artifact_of(made), tmp_path / "artifact"))


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["compressed_tensors"][0]


def ids() -> Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(7))


def loaded(peft: Any, artifact: Path, **options: Any) -> Any:
    """As the model card says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact, **options)
    model(torch.tensor([[0]]))
    return peft.PeftModel.from_pretrained(model, artifact / "adapter").eval()


def wanted(source: Path, state: State, dtype: torch.dtype, **options: Any) -> Tensor:
    """The original in transformers with our matrices put in."""
    model = stock.load(source, dtype=dtype, **options)
    wide = replace(state, dtype=dtype)
    stock.substitute(model, state.graph, {n: wide.weight(state.graph[n]) for n in state.codes})
    return stock.logits(model, [ids()])[0].float()


# --- PEFT loads it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [
    ("llama", STEP["lqlora"]),
    rare("qwen3", {"format": "int4:g32", "rank": 4}),
    rare("opt", {"format": "int4:g32", "rank": 4, "factors": "fp32"}),
    pytest.param("gpt_neox", {"format": "int8:channel", "rank": 3, "factors": "fp16", "pins": {"lm_head": "int4:g32+r2"}},
                 marks=pytest.mark.slow),
    rare("phi3", {"format": "int4:g32", "rank": 4}),
])  # fmt: skip
def test_peft_computes_what_our_matrices_give(
    peft: Any, family: Any, text: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    done = bake(tmp_path, family(name), text, "compressed_tensors", {"lqlora": {"rounds": 0, **options}})
    artifact, proof = done.artifacts["compressed_tensors"]
    assert (proof.engine, proof.remark) == ("transformers with PEFT", "compared in fp32")
    assert proof.difference < 1e-3
    with torch.no_grad():
        model = loaded(peft, artifact, dtype=torch.float32)
        theirs = model(input_ids=ids()).logits
        with model.disable_adapter():
            without = model(input_ids=ids()).logits
    ours = wanted(family(name), done.state, torch.float32)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())
    assert float((ours - without).abs().max()) > 1e-2 * float(ours.abs().max())


@pytest.mark.slow
def test_in_the_models_own_precision(peft: Any, made: pipeline.Outcome, family: Any) -> None:
    with torch.no_grad():
        theirs = loaded(peft, artifact_of(made))(input_ids=ids()).logits.float()
    ours = wanted(family("llama"), made.state, torch.bfloat16)
    assert float((ours - theirs).abs().mean()) < 1e-2 * float(ours.abs().max())


@pytest.mark.slow
def test_beside_quantized_experts(peft: Any, family: Any, text: Path, tmp_path: Path) -> None:
    """transformers unpacks experts in 16 bits, whatever dtype is asked for, so the run compares in our runtime, and says so.

    Here all experts are asked: a router that is rounded otherwise, on another machine, would choose another one.
    """
    options = {"format": "int4:g32", "rank": 4, "pins": {"*.experts.*": "int4:g32"}}
    done = bake(tmp_path, family("mixtral"), text, "compressed_tensors", {"lqlora": {"rounds": 0, **options}})
    artifact, proof = done.artifacts["compressed_tensors"]
    assert (proof.engine, proof.greedy) == ("compress runtime", 16)
    assert "adapters are compared in fp32, and it unpacks experts in 16 bits" in proof.remark
    assert "PeftModel" in (artifact / "README.md").read_text()
    with torch.no_grad():
        theirs = loaded(peft, artifact, num_experts_per_tok=4, **stock.EAGER)(input_ids=ids()).logits.float()
    ours = wanted(family("mixtral"), done.state, torch.bfloat16, num_experts_per_tok=4)
    assert float((ours - theirs).abs().mean()) < 1e-2 * float(ours.abs().max())


def test_ranks_and_scales_are_per_module(peft: Any, made: pipeline.Outcome) -> None:
    from peft.tuners.lora import LoraLayer

    model = loaded(peft, artifact_of(made))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    formats = {s.module: made.state.format(s) for s in made.state.graph}
    assert layers.keys() == {m for m, f in formats.items() if isinstance(f, LowRank)}
    for name, layer in layers.items():
        fmt = formats[name]
        assert isinstance(fmt, LowRank)
        assert (layer.r["default"], layer.scaling["default"]) == (fmt.rank, 1.0)
    assert {f.rank for f in formats.values() if isinstance(f, LowRank)} == {2, 4, 8}


def test_peft_needs_a_forward_pass_first(peft: Any, made: pipeline.Outcome) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact_of(made))
    with pytest.raises(AttributeError, match="no attribute 'weight'"):  # no longer so: the pass can go, here and in the card
        peft.PeftModel.from_pretrained(model, artifact_of(made) / "adapter")


def test_the_base_alone_is_a_plain_checkpoint(made: pipeline.Outcome, family: Any) -> None:
    """Engines that know nothing of the adapter get the quantized matrices, to the bit."""
    state = made.state
    base = {n: s.load() for n, s in state.codes.items()}
    matrices = {n: (p.format.base if isinstance(p.format, LowRank) else p.format).dequantize(p.tensors, state.dtype)
                for n, p in base.items()}  # fmt: skip
    model = stock.load(family("llama"))
    stock.substitute(model, state.graph, matrices)
    assert torch.equal(stock.logits(stock.load(artifact_of(made)), [ids()])[0], stock.logits(model, [ids()])[0])


# --- what is written --------------------------------------------------------------------------------------------------


def test_planned_bytes_are_written_bytes(made: pipeline.Outcome) -> None:
    planned = pipeline.plan(made.out.parent / "recipe.yaml")
    layout, artifact = planned.layouts["compressed_tensors"], artifact_of(made)
    files = {p.relative_to(artifact).as_posix(): p.stat().st_size for p in artifact.rglob("*.safetensors")}
    assert {f.name: f.nbytes for f in layout.files} == files
    assert set(files) == {"model.safetensors", "adapter/adapter_model.safetensors"}
    assert layout.nbytes == sum(files.values())
    assert layout.index is None
    changed = sum(f.nbytes(s.shape) for s in made.state.graph if (f := made.state.format(s)))
    kept = sum(
        spec.nbytes for spec in made.state.specs if spec.name not in {made.state.graph[n].weight for n in made.state.codes}
    )
    assert layout.tensor_bytes == changed + kept
    assert any("--max-lora-rank of 8 or more (not tried)" in r for r in planned.remarks)


def test_shards_and_an_adapter(made: pipeline.Outcome, family: Any, tmp_path: Path) -> None:
    exporter = ct.CompressedTensors.model_construct(shard_bytes=20_000)
    job = Job(open_model(str(family("llama"))), made.state, None, "key", lambda facts: "")
    exporter.write(job, tmp_path)
    exporter.prove(job, tmp_path)
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any("lora" in name or "adapter" in file for name, file in weights.items())
    layout = exporter.layout(job.model, made.state)
    assert layout.nbytes == sum(p.stat().st_size for p in tmp_path.rglob("*safetensors*"))


def test_names_and_the_card(made: pipeline.Outcome) -> None:
    held = load_file(artifact_of(made) / "adapter" / "adapter_model.safetensors")
    assert held[f"base_model.model.{Q}.lora_A.weight"].shape == (8, 64)
    assert held[f"base_model.model.{Q}.lora_B.weight"].shape == (64, 8)
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    card = (artifact_of(made) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    assert "PEFT adapter in `adapter/`" in card


def test_the_cards_code_runs(peft: Any, made: pipeline.Outcome) -> None:
    card = (artifact_of(made) / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(artifact_of(made))), scope)
    assert isinstance(scope["model"], peft.PeftModel)


@pytest.mark.slow
def test_a_run_repeated_gives_the_same_bytes(made: pipeline.Outcome, tmp_path: Path) -> None:
    text = (made.out.parent / "recipe.yaml").read_text().replace(str(made.out), str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(text)
    assert contents(artifact_of(pipeline.run(tmp_path / "recipe.yaml"))) == contents(artifact_of(made))


# --- our own reader ---------------------------------------------------------------------------------------------------


def same_state(ours: State, theirs: State) -> None:
    for site in ours.graph:
        assert theirs.format(theirs.graph[site.name]) == ours.format(site), site.name
        assert torch.equal(theirs.weight(theirs.graph[site.name]), ours.weight(site)), site.name


def test_our_reader_gives_everything_back(made: pipeline.Outcome) -> None:
    same_state(made.state, reader.read(artifact_of(made)))


@pytest.mark.slow
def test_conv1d_runs_in_our_runtime(family: Any, text: Path, tmp_path: Path) -> None:
    done = bake(tmp_path, family("gpt2"), text, "compressed_tensors", {"lqlora": {"format": "int4:g32", "rank": 4, "rounds": 0}})
    artifact, proof = done.artifacts["compressed_tensors"]
    assert (proof.engine, proof.greedy) == ("compress runtime", 16)
    assert proof.difference < 1e-3
    assert json.loads((artifact / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    same_state(done.state, reader.read(artifact))
    assert "PeftModel" not in (artifact / "README.md").read_text()


@pytest.mark.slow
def test_without_peft_ours_proves_it_and_says_so(
    made: pipeline.Outcome, family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "installed", lambda: False)
    exporter = ct.CompressedTensors()
    job = Job(open_model(str(family("llama"))), made.state, ids(), "key", lambda facts: "")
    exporter.write(job, tmp_path)
    proof = exporter.prove(job, tmp_path)
    assert (proof.engine, proof.greedy) == ("compress runtime", 16)
    assert "the adapter needs PEFT, which is not installed" in proof.remark


def test_eval_and_inspect_see_the_corrections(made: pipeline.Outcome, text: Path, capsys: Any) -> None:
    assert main(["inspect", str(artifact_of(made)), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert next(s["format"] for s in shown["sites"] if s["site"] == "layers.0.attn.q") == "int3:g64+r8"
    sample = ["--text", str(text), "--length", "32", "--sequences", "2", "--json"]
    assert main(["eval", str(artifact_of(made)), *sample]) == 0
    scores = json.loads(capsys.readouterr().out)
    files = artifact_of(made).rglob("*.safetensors")
    assert scores["tensor_bytes"] == shown["tensor_bytes"] == sum(t.nbytes for f in files for t in load_file(f).values())


def test_lm_eval_is_given_the_adapter(made: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    done = type("Done", (), {"returncode": 0})
    monkeypatch.setattr("compress.commands.subprocess.run", lambda words, check: asked.append(words) or done)
    monkeypatch.setattr("compress.commands.importlib.util.find_spec", lambda name: object())
    assert main(["eval", str(artifact_of(made)), "--tasks", "arc_easy"]) == 0
    (words,) = asked
    assert f"pretrained={artifact_of(made)},peft={artifact_of(made) / 'adapter'}" in words


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", adapter.SUFFIXES)
@pytest.mark.parametrize("tokens", [True, False])
def test_a_damaged_factor_is_caught(made: pipeline.Outcome, family: Any, tmp_path: Path, suffix: str, tokens: bool) -> None:
    exporter = ct.CompressedTensors()
    job = Job(open_model(str(family("llama"))), made.state, ids() if tokens else None, "key", lambda facts: "")
    exporter.write(job, tmp_path)
    held = load_file(tmp_path / adapter.WEIGHTS)
    held[f"base_model.model.{Q}.{suffix}"][0, 0] += 1
    save_file(held, tmp_path / adapter.WEIGHTS)
    with pytest.raises(ExportError, match=f"'layers.0.attn.q': {suffix} on disk differs from the run's"):
        exporter.prove(job, tmp_path)


def config_of(folder: Path, **changes: Any) -> None:
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "says"), [
    ({"lora_alpha": 16}, "by another number than 1"), ({"use_dora": True}, "only plain LoRA is read, not use_dora: True"),
    ({"peft_type": "LOHA"}, "only plain LoRA is read, not LOHA"), ({"target_modules": 3}, "is broken"),
    ({"target_modules": ["../../x"]}, "'../../x' is no quantized matrix of this model"), ({"r": "many"}, "another number|broken"),
    ({"target_modules": ["lm_head"]}, "'lm_head' is no quantized matrix"), ({"rank_pattern": {"(": 3}}, "is broken"),
    ({"target_modules": [Q]}, "which adapter_config.json does not name"), ({"r": -1, "lora_alpha": -1}, "a rank is 1 or more"),
    ({"r": 3, "lora_alpha": 3}, r"lora_A.weight' is bfloat16 \[8, 64\]"), ({"use_rslora": 1}, "not use_rslora"),
])  # fmt: skip
def test_an_adapter_that_is_not_ours(copy: Path, changes: dict[str, Any], says: str) -> None:
    config_of(copy, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        reader.read(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", [adapter.WEIGHTS, adapter.CONFIG])
def test_half_an_adapter(copy: Path, lost: str) -> None:
    (copy / lost).unlink()
    with pytest.raises(ModelError, match=r"no such file|is broken"):
        reader.read(copy)
