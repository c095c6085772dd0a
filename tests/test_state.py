"""One truth about every tensor and format: overlays of files, promises held against deeds, bytes that are what was hashed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from compress import manager
from compress.cli import main
from compress.errors import ContractError, ModelError, RunError
from compress.export.artifact.proof import logits
from compress.export.table import KINDS
from compress.formats import parse
from compress.manager import Context, Pass
from compress.model.model import open_model
from compress.parts import read_part
from compress.passes.quantize import Quantize
from compress.run import Parts
from compress.state import Aspect, Fact, State
from compress.state.checkpoint import Spec
from compress.state.overlay import Overlay
from tests.conftest import FAMILIES, Project, covered, make_model, rare
from tests.cooking import bake
from tests.pass_laws import TOKENS, attempt, check_pass, step_of

LAYERS = 2  # of a project


class Scale(Pass):
    """Multiply every norm, and every matrix of a block, by a constant."""

    name: ClassVar[str] = "scale"
    needs: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS
    factor: float = Field(2.0, description="what to multiply by")

    def foresee(self, state: State) -> State:
        return state

    def run(self, state: State, ctx: Context) -> State:
        for block in state.graph.blocks:
            part = f"block-{block.index:04}"
            done = ctx.store.committed(part)
            if done is None:
                sites = {s.name: state.reference(s) * self.factor for s in state.graph.of_block(block.index)}
                norms = {n: state.dense.read(n) * self.factor for n in state.graph.parameters if n.startswith(f"{block.module}.")}
                done = ctx.store.commit(part, dense=state.stored(sites) | norms)
            state = state.with_part(done)
        return state


class Narrow(Scale):
    """Keep the first 64 neurons of every MLP, in a config that says so."""

    name: ClassVar[str] = "narrow"
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.STRUCTURE

    def foresee(self, state: State) -> State:
        from copy import deepcopy

        from compress.model.discover import discover
        from compress.model.names import anchor
        from compress.model.skeleton import skeleton

        config = deepcopy(state.config)
        config.intermediate_size = 64
        shapes = {s.weight: (64, 64) for s in state.graph if s.role in ("gate", "up", "down")}
        specs = tuple(replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in state.specs)
        return replace(
            state, graph=anchor(discover(model := skeleton(config), config), state.dense, model), config=config, specs=specs
        )

    def run(self, state: State, ctx: Context) -> State:
        made = self.foresee(state)
        for block in state.graph.blocks:
            cut = {s.weight: state.reference(s)[:64] if s.role != "down" else state.reference(s)[:, :64].contiguous()
                   for s in state.graph.of_block(block.index) if s.role in ("gate", "up", "down")}  # fmt: skip
            made = made.with_part(ctx.store.commit(f"block-{block.index:04}", dense=cut))
        return made


# --- laws, on passes that are no part of the table ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["llama", "mixtral", "gpt2"], "mixtral"))
def test_a_pass_that_changes_norms_and_matrices_keeps_the_laws(family: Any, tmp_path: Path, name: str) -> None:
    check_pass(Scale(), family(name), tmp_path)


@pytest.mark.slow
def test_a_pass_that_changes_shapes_and_config_keeps_the_laws(family: Any, tmp_path: Path) -> None:
    check_pass(Narrow(), family("llama"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["compressed_tensors native gguf", rare("onnx")])
def test_a_changed_norm_and_shape_are_in_the_artifact(
    family: Any, tmp_path: Path, text: Path, kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.passes import PASSES

    for cls in (Scale, Narrow):
        monkeypatch.setitem(PASSES, cls.name, cls)
    done = bake(
        tmp_path, family("llama"), text, kinds, {"scale": {"factor": 1.5}}, {"narrow": {}}, {"quantize": {"format": "int4:g32"}}
    )
    assert list(done.artifacts) == kinds.split()
    for kind, (place, _) in done.artifacts.items():
        assert json.loads((place / "config.json").read_text())["intermediate_size"] == 64
        again = next(k for k in KINDS if k.name == kind).read(place)
        norm = "model.layers.1.input_layernorm.weight"
        assert torch.equal(again.dense.read(norm), open_model(str(family("llama"))).checkpoint.read(norm) * 1.5)
        assert again.graph["layers.0.mlp.up"].shape == (64, 64)


# --- promises ----------------------------------------------------------------------------------------------------------


class Forgetful(Scale):
    """Foresees a norm in another dtype, and leaves it as it is."""

    name: ClassVar[str] = "forgetful"
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.STRUCTURE

    def foresee(self, state: State) -> State:
        specs = tuple(replace(s, dtype=torch.float32) if s.name == "model.norm.weight" else s for s in state.specs)
        return replace(state, specs=specs)

    def run(self, state: State, ctx: Context) -> State:
        return self.foresee(state)


class Undone(Quantize):
    """Promises formats, and does nothing."""

    name: ClassVar[str] = "undone"

    def run(self, state: State, ctx: Context) -> State:
        return self.planned(state)


@pytest.mark.parametrize(("p", "says"), [
    (Forgetful(), r"pass author: after 'forgetful' 'model.norm.weight' is bfloat16 \[64\], it foresaw float32 \[64\]"),
    (Undone(format=parse("int4:g32")), r"pass author: after 'undone' '.*' is dense, it foresaw int4:g32 \(and 13 more\)"),
])  # fmt: skip
def test_deeds_are_held_against_promises(family: Any, tmp_path: Path, p: Pass, says: str) -> None:
    model = open_model(str(family("llama")))
    with pytest.raises(ContractError, match=says):
        manager.fold([p], model.state, lambda number, q: step_of(q, model, tmp_path))


def test_codes_are_the_one_truth_about_formats(family: Any, tmp_path: Path) -> None:
    """A plan that wishes for more changes nothing that an exporter or an engine is told."""
    made = attempt(Quantize(format=parse("int4:g32"), method="rtn"), open_model(str(family("llama"))), tmp_path)
    wishing = replace(made, plan=None)
    assert wishing.formats == made.formats
    assert {str(f) for f in made.formats.values()} == {"int4:g32"}


# --- overlays ----------------------------------------------------------------------------------------------------------


def test_an_overlay_reads_what_was_written_moved_and_kept(family: Any, tmp_path: Path) -> None:
    base, parts = open_model(str(family("llama"))).checkpoint, Parts(tmp_path, "x", "0" * 64)
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    written = parts.commit("one", dense={norm: torch.ones(3)}).dense
    over = Overlay(base).with_written(written)
    assert over.specs[norm] == Spec(norm, torch.float32, (3,))
    assert torch.equal(over.read(norm), torch.ones(3))
    assert torch.equal(over.read(up), base.read(up))
    moved = over.moved({"a": norm, "b": up})
    assert set(moved.specs) == {"a", "b"}
    assert torch.equal(moved.read("a"), torch.ones(3))
    assert torch.equal(moved.read("b"), base.read(up))
    assert over == Overlay(base).with_written(written) != Overlay(base)


def test_a_part_that_is_committed_again_is_replaced(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "x", "0" * 64)
    parts.commit("one", dense={"w": torch.zeros(2)}, records=[{"site": "a"}])
    part = parts.commit("one", dense={"w": torch.ones(2)}, records=[{"site": "b"}], serving={"model": {"cache": "fp8"}})
    assert torch.equal(part.dense["w"].load(), torch.ones(2))
    assert parts.records == [{"site": "b"}]
    assert Parts(tmp_path, "x", "0" * 64).committed("one") == part
    assert part.serving == {"model": {"cache": "fp8"}}


@pytest.mark.parametrize("at", [4, 30, 200, -40, -1])
def test_one_flipped_bit_anywhere_in_a_part_is_noticed(tmp_path: Path, at: int) -> None:
    parts = Parts(tmp_path, "x", "0" * 64)
    parts.commit("one", dense={"w": torch.arange(64.0)}, records=[{"site": "a"}])
    path = next(tmp_path.rglob("one.safetensors"))
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"one.safetensors: is damaged \(.*\); delete this file and run again"):
        read_part(path)


# --- what is reused is what was hashed ---------------------------------------------------------------------------------


def test_weights_that_are_replaced_while_a_run_goes_on_end_it(family: Any, tmp_path: Path) -> None:
    """Also where somebody puts them back, with the times that they had."""
    folder = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    checkpoint, path = open_model(str(folder)).checkpoint, folder / "model.safetensors"
    known, kept, times = checkpoint.fingerprint, path.read_bytes(), path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # touched, and the same
    checkpoint.read("model.norm.weight")
    other = bytearray(kept)
    other[-9] ^= 1
    path.write_bytes(other)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ModelError, match=r"model.safetensors: was changed while it was being read"):
        checkpoint.read("model.norm.weight")
    path.write_bytes(kept)
    checkpoint.read("model.norm.weight")
    assert checkpoint.fingerprint == known


# --- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "compressed_tensors", rare("onnx"), "gguf"])
def test_nan_outside_of_matrices_is_named_without_data(family: Any, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"'model.layers.1.input_layernorm.weight' holds NaN or infinite values"):
        bake(tmp_path, folder, None, kind, {"quantize": {"method": "rtn", "format": "int4:g32"}})


@pytest.mark.slow
def test_activations_that_overflow_name_the_block(tmp_path: Path, text: Path) -> None:
    folder = make_model(tmp_path / "model", FAMILIES["llama"](), torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.1.mlp" in name:
            tensors[name] *= 200
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"^model.layers.1: what it puts out in float16 is not finite; .*to bf16"):
        bake(tmp_path, folder, text, "native", {"quantize": {"format": "int4:g32"}})


# --- a config that ties, and weights that do not -----------------------------------------------------------------------


@pytest.fixture
def own_head(tmp_path: Path) -> Path:
    """A model whose config ties its head, and whose file holds another one, as transformers loads it."""
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 1
    folder = make_model(tmp_path / "model", config, torch.float32)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
    return folder


def test_a_head_of_its_own_is_read_though_the_config_ties(own_head: Path) -> None:
    from tests import stock

    state = open_model(str(own_head)).state
    assert state.graph["lm_head"].tied is None
    theirs = stock.logits(stock.load(own_head), [TOKENS.ids[:1]])[0]
    torch.testing.assert_close(logits(state, [TOKENS.ids[:1]], "cpu")[0], theirs.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["compressed_tensors gptq gguf native", rare("onnx")])
def test_an_own_head_goes_into_every_artifact(own_head: Path, tmp_path: Path, text: Path, kinds: str) -> None:
    done = bake(tmp_path, own_head, text, kinds, {"quantize": {"format": "int8:g32"}})
    assert list(done.artifacts) == kinds.split()
    for kind, (place, _) in done.artifacts.items():
        assert json.loads((place / "config.json").read_text())["tie_word_embeddings"] is False
        state = next(k for k in KINDS if k.name == kind).read(place)
        assert torch.equal(state.weight(state.graph["lm_head"]), done.state.weight(done.state.graph["lm_head"]))
        assert not torch.equal(state.weight(state.graph["lm_head"]), state.weight(state.graph["embed"]))


def test_equal_bytes_stay_tied(tmp_path: Path) -> None:
    folder = make_model(tmp_path, FAMILIES["qwen2"](), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert open_model(str(folder)).state.graph["lm_head"].tied == "embed"


# --- eval measures what the artifact is --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [
    rare("gpt2", {"quantize": {"format": "int4:g32"}}), ("llama", {"quantize": {"format": "int3:g32:asym"}}),
    rare("llama", {"lqlora": {"format": "int2:g32", "rank": 8}}),
])  # fmt: skip
def test_eval_and_bench_measure_the_artifact_itself(
    family: Any, tmp_path: Path, text: Path, capsys: Any, name: str, steps: dict[str, Any]
) -> None:
    """What stock transformers cannot load goes through our runtime, which says so; figures are those of the run."""
    done = bake(tmp_path, family(name), text, "compressed_tensors", steps)
    seen = {}
    for what in (done.artifacts["compressed_tensors"][0], done.out):
        capsys.readouterr()
        assert main(["eval", str(what), "--text", str(text), "--sequences", "2", "--length", "32", "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        (ours,) = logits(done.state, [TOKENS.ids[:1]], "cpu")
        assert seen["kl"] < 2, "not a model with random weights"
    assert "compress runtime (not in stock transformers" in seen["engine"] or "PEFT" in seen["engine"]
    assert ours.isfinite().all()


@pytest.mark.slow
def test_the_quantizer_sees_what_the_pass_before_it_left(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense change before `quantize` is what is quantized: the very model of the pages on passes."""
    from compress.passes import PASSES

    monkeypatch.setitem(PASSES, "scale", Scale)
    project.edit("passes:\n", "passes:\n  - scale: {factor: 0.5}\n")
    assert project.run().code == 0
    again = next(k for k in KINDS if k.name == "compressed_tensors").read(project.artifact)
    source = open_model(str(project.model)).state
    for name in ("layers.0.attn.q", "layers.1.mlp.down"):
        ours, theirs = again.weight(again.graph[name]).float(), source.weight(source.graph[name]).float() * 0.5
        assert float((ours - theirs).norm() / theirs.norm()) < 0.2
