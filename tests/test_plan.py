"""`compress plan` says what a run will do, to the byte, without touching a weight."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress import pipeline
from compress.model import speed
from compress.run import Step
from compress.stages import BASELINE_BYTES
from compress.state.checkpoint import Checkpoint, Layout
from tests.conftest import RECIPE, ROOT, Project, covered, rare
from tests.nursery import COMMAND, Nursery

GOLDEN = Path(__file__).with_name("golden")
BIG = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64,
       "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16"}  # fmt: skip


def masked(text: str) -> str:
    """A plan without what depends on the machine."""
    return re.sub(r"time about .* on this machine", "time about … on this machine", text)


def weight_bytes(folder: Path) -> int:
    """Bytes of the files that hold tensors, and of their index."""
    return sum(p.stat().st_size for p in folder.iterdir() if ".safetensors" in p.name)


def promised(plan: str) -> int:
    found = re.search(r"compressed_tensors: ([\d,]+) bytes", plan)
    assert found, plan
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    "sets",
    [
        rare([]),
        ["quantize.format=int3:g64:asym"],
        rare(["quantize.format=int2:channel", "quantize.pins={}"]),
        rare(["quantize.format=bf16", "quantize.pins={}"]),
        rare(["quantize.format=fp32"]),
        ["quantize.pins={layers.0.*: bf16, '*.down': 'int5:g16'}"],
    ],
)
def test_a_run_writes_the_bytes_that_its_plan_promised(project: Project, sets: list[str]):
    plan = project.plan("quantize.method=rtn", *sets)
    assert plan.code == 0, plan.err
    result = project.run("quantize.method=rtn", *sets)
    assert result.code == 0, result.err
    assert weight_bytes(project.artifact) == promised(plan.out)


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["qwen2", "gpt2", "mixtral", "phi3", "opt"], "gpt2"))
def test_the_promise_holds_for_every_kind_of_layout(project: Project, family: Any, name: str):
    """Tied heads, transposed matrices, experts in one tensor, joined matrices, biases; and several files."""
    shutil.rmtree(project.model)
    shutil.copytree(family(name), project.model)
    sets = ["quantize.method=rtn", "quantize.pins={}"]
    assert project.run(*sets).code == 0
    assert weight_bytes(project.artifact) == promised(project.plan(*sets).out)
    planned = pipeline.plan(project.recipe, sets)
    specs = [s for f in planned.layouts["compressed_tensors"].files for s in f.specs]
    for shard in (20_000, 60_000):  # smaller than an exporter's option allows
        layout = Layout.of(specs, shard)
        assert len(layout.files) > 1
        folder = project.folder / str(shard)
        folder.mkdir()
        layout.write(folder, ((s.name, torch.zeros(s.shape, dtype=s.dtype)) for s in specs))
        assert weight_bytes(folder) == layout.nbytes
    assert planned.prepared.foreseen.graph.family == name


def test_a_plan_reads_no_tensor(project: Project, monkeypatch: pytest.MonkeyPatch):
    def read(*_: Any) -> None:
        raise AssertionError("a plan read a weight")

    whole = project.plan().out
    monkeypatch.setattr(Checkpoint, "read", read)
    monkeypatch.setattr(Checkpoint, "read_rows", read)
    monkeypatch.setattr("compress.state.checkpoint.mapped", read)
    monkeypatch.setattr("safetensors.safe_open.get_tensor", read, raising=False)
    assert project.plan().out == whole
    assert not project.out.exists()


@pytest.mark.slow
def test_the_state_of_a_step(project: Project, monkeypatch: pytest.MonkeyPatch):
    def state(*sets: str) -> str:
        return project.plan(*sets).out.splitlines()[2].rpartition("  ")[2].strip()

    assert state() == "to do"
    with monkeypatch.context() as patch:
        patch.setattr(Step, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert project.run().code == 130
    assert state() == "in part"
    assert project.run().code == 0
    assert state() == "cached"
    assert state("seed=5") == "to do"
    assert project("plan", project.recipe, "--out", project.folder / "other").out.count("to do") == 1


@pytest.mark.parametrize(
    ("name", "sets", "remark"),
    [
        ("llama", [], "note: compressed_tensors loads in stock transformers"),
        ("llama", ["quantize.format=int4:g32:asym"], "asymmetric formats"),
        ("gpt2", ["quantize.pins={}"], "'gpt2' keeps its matrices in Conv1D modules"),
    ],
)
def test_remarks_say_what_engines_can_do(project: Project, family: Any, name: str, sets: list[str], remark: str):
    shutil.rmtree(project.model)
    shutil.copytree(family(name), project.model)
    plan = project.plan(*sets)
    assert plan.code == 0, plan.err
    assert remark in plan.out


def test_a_config_alone_is_enough(project: Project):
    """The plan of a config is that of the model that transformers would write for it."""
    whole = project.plan().out
    (project.model / "model.safetensors").unlink()
    bare = project.plan()
    assert bare.code == 0, bare.err
    assert promised(bare.out) == promised(whole)
    assert "holds no weights: sizes are those of the config in bfloat16" in bare.out
    assert bare.out.splitlines()[2].endswith("?")
    project.edit("./model", "./model/config.json")
    assert project.plan().out == bare.out


@pytest.mark.slow
def test_seventy_billion_weights_in_a_minute_and_two_gigabytes(tmp_path: Path, nursery: Nursery):
    """Nothing but the config is there, and none of the 140 GB is ever allocated."""
    transformers.LlamaConfig(**BIG, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("int4:g32", "int4:g128").replace("int8:g32", "bf16"))
    done = nursery.run(COMMAND, "plan", tmp_path / "recipe.yaml", cwd=ROOT)
    assert done.code == 0, done.err
    assert done.seconds < 60
    assert done.peak < 2 * 2**30
    plan = done.out
    weights = 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert f"{weights:,}" in plan
    assert "560 change" in plan
    dense = 2 * 2 * 128256 * 8192 + 2 * (2 * 80 + 1) * 8192
    packed = weights // 2 + 2 * (weights // 128) + 560 * 16
    assert 0 < promised(plan) - dense - packed < 500_000  # headers and index
    assert "bits per weight in linear layers" in plan


@pytest.mark.slow
def test_a_mixture_of_twelve_thousand_experts_in_a_minute(tmp_path: Path, nursery: Nursery):
    """Of 235 billion weights: what is counted for each matrix is not counted against each other one."""
    sizes = {"hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
             "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
             "vocab_size": 151936, "tie_word_embeddings": False}  # fmt: skip
    transformers.Qwen3MoeConfig(**sizes, architectures=["Qwen3MoeForCausalLM"]).save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("int4:g32", "int4:g128").replace("int8:g32", "bf16"))
    done = nursery.run(COMMAND, "plan", tmp_path / "recipe.yaml", cwd=ROOT)
    assert done.code == 0, done.err
    assert done.seconds < 60
    assert f"{94 * (4 + 3 * 128)} change" in done.out.replace(",", "")


def test_the_plan_of_the_quickstart(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole text, so that a change of it is seen: tests/golden/plan-quickstart.txt. On a machine that computes in fp32."""
    monkeypatch.setattr(speed, "matrix_speed", {torch.float32: 1e11, torch.bfloat16: 1e10}.__getitem__)
    result = project("plan", ROOT / "recipes" / "quickstart.yaml", "--out", tmp_path / "none")
    assert result.code == 0, result.err
    assert masked(result.out) == (GOLDEN / "plan-quickstart.txt").read_text()


def test_a_plan_is_a_value_for_programs(project: Project):
    planned = pipeline.plan(project.recipe, ["quantize.format=int2:g64"])
    assert planned.layouts["compressed_tensors"].nbytes < planned.original.nbytes
    assert planned.seconds > 0
    assert planned.largest.peak_bytes > BASELINE_BYTES
    assert [s[0] for s in planned.steps] == ["quantize"]


def test_what_a_wrong_recipe_says_it_says_in_the_plan(project: Project):
    """The plan is the check: nothing that `run` refuses before it starts passes it."""
    for change in ("quantize.format=int4:g48", "quantize.pins={nope: bf16}", "data.calibration.sequences=99999"):
        assert project.plan(change).line == project.run(change).line
        assert not project.out.exists()


@pytest.mark.parametrize("change", ["evaluation", "folder"])
def test_the_plan_looks_where_the_run_will_look(project: Project, change: str):
    if change == "evaluation":
        project.edit("sequences: 4", "sequences: 4000")
    else:
        project.out.mkdir()
        (project.out / "thesis.txt").write_text("years of work")
    assert project.run().code == 2
    assert project.plan().code == 2


def test_options_that_are_not_default_are_shown(project: Project):
    line = project.plan("quantize.damp=0.05").out.splitlines()[2]
    assert line.startswith("1  quantize  format int4:g32, pins {lm_head: int8:g32}, damp 0.05  to do")
