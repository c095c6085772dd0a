"""The pass `prune`: a plain smaller model that every engine loads, and that is as near to the original as what is left allows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.export.artifact.proof import logits
from compress.export.table import KINDS
from compress.model.couplings import couplings
from compress.model.feeds import norms_behind
from compress.model.model import open_model
from compress.passes.prune import Prune
from compress.passes.prune_counts import natural
from tests.conftest import FAMILIES, LIGHT, Project, covered, make_model
from tests.cooking import bake
from tests.pass_laws import TOKENS, attempt

LAYERS = 2  # of a project's model

METHODS = ("obs", "wanda", "flap", "magnitude")


def redundant(folder: Path, name: str = "llama") -> Path:
    """A model whose second half of neurons, and of groups of heads, does nothing."""
    make_model(folder, FAMILIES[name](), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for c in couplings(open_model(str(folder)).state):
        gone = c.columns[c.units // 2 :].flatten()
        tensors[c.reader.weight].index_fill_(int(not c.reader.transposed), gone, 0.0)
        for cut in (cut for n, cut in c.cuts.items() if n != c.reader.weight):
            other = next(n for n, x in c.cuts.items() if x is cut)
            tensors[other].index_fill_(cut.dim, cut.rows[c.units // 2 :].flatten(), 0.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("method", covered(METHODS, "obs", "flap"))
def test_what_does_nothing_goes_first_and_nothing_changes(tmp_path: Path, method: str) -> None:
    folder = redundant(tmp_path / "model")
    options = {"mlp": 0.5, "kv_groups": 0.5, "method": method}
    model = open_model(str(folder))
    after = attempt(Prune.model_validate(options), model, tmp_path / "steps")
    assert (after.config.intermediate_size, after.config.num_key_value_heads, after.config.num_attention_heads) == (64, 1, 2)
    ours, theirs = (logits(s, [TOKENS.ids[:2]], "cpu")[0] for s in (after, model.state))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def smaller(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """smaller(kind) -> a run that made a smaller artifact of this kind: one for all, of two blocks, and one for onnx, where a
    block takes seconds."""

    @cache
    def run(kinds: str, blocks: int) -> Any:
        folder, config = tmp_path_factory.mktemp("smaller"), FAMILIES["qwen3"]()
        config.num_hidden_layers, config.layer_types = blocks, config.layer_types[:blocks]
        source = make_model(folder / "model", config, torch.float32)
        return bake(folder, source, text, kinds, {"prune": {"mlp": 0.5, "kv_groups": 0.5}}, {"quantize": {"format": "int4:g32"}})

    return lambda kind: run("onnx", 1) if kind == "onnx" else run("compressed_tensors native gguf gptq", 2)


@pytest.mark.parametrize("kind", covered(["compressed_tensors", "native", "gguf", "gptq", "onnx"], *LIGHT))
def test_smaller_shapes_go_through_every_exporter_and_back(smaller: Any, kind: str) -> None:
    done = smaller(kind)
    place, proof = done.artifacts[kind]
    assert proof.difference >= 0
    config = json.loads((place / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"], config["head_dim"]) == (64, 1, 16)
    again = next(k for k in KINDS if k.name == kind).read(place)
    assert {site.shape for site in again.graph if site.role == "down"} == {(64, 64)}
    ours, theirs = (logits(s, [TOKENS.ids[:1]], "cpu")[0] for s in (done.state, again))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["gemma3", "phi3", "gpt2", "opt"], "gpt2"))
def test_alone_it_gives_a_plain_model_that_transformers_loads(tmp_path: Path, text: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", FAMILIES[name](), torch.float32)
    options = {"mlp": 0.5, **({} if name in ("gpt2", "opt") else {"kv_groups": 0.5})}
    done = bake(tmp_path, folder, text, "compressed_tensors", {"prune": options})
    place = done.artifacts["compressed_tensors"][0]
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    found = {n: tuple(t.shape) for n, t in load_file(place / "model.safetensors").items()}
    assert found == {s.name: s.shape for s in done.state.specs}
    with torch.no_grad():
        wanted = logits(done.state, [TOKENS.ids[:2]], "cpu")[0]
        torch.testing.assert_close(stock(input_ids=TOKENS.ids[:2]).logits, wanted, atol=1e-5, rtol=1e-5)
        cached = stock.generate(TOKENS.ids[:1, :8], max_new_tokens=5, do_sample=False)
        plain = stock.generate(TOKENS.ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.slow
def test_what_is_left_makes_up_for_what_goes(tmp_path: Path) -> None:
    """Whoever goes, the error in the outputs is less with compensation."""
    model = open_model(str(make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)))
    wanted = logits(model.state, [TOKENS.ids], "cpu")[0]
    for method in METHODS:
        off = []
        for compensate in (True, False):
            p = Prune.model_validate({"mlp": 0.5, "method": method, "compensate": compensate})
            after = attempt(p, model, tmp_path / f"{method}{compensate}" / "steps")
            off.append(float((logits(after, [TOKENS.ids], "cpu")[0] - wanted).square().mean()))
        assert off[0] < off[1], method


def test_a_unit_keeps_its_rows(tmp_path: Path) -> None:
    """Without compensation the tensors that are left are the source's, entry by entry."""
    model = open_model(str(make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)))
    p = Prune(mlp=0.5, method="wanda", compensate=False)
    after = attempt(p, model, tmp_path / "steps")
    whole, left = (s.dense.read("model.layers.0.mlp.up_proj.weight") for s in (model.state, after))
    kept = [next(i for i, row in enumerate(whole) if torch.equal(row, r)) for r in left]
    assert kept == sorted(kept)
    down, small = (s.dense.read("model.layers.0.mlp.down_proj.weight") for s in (model.state, after))
    assert torch.equal(small, down[:, kept])


def test_plan_says_what_stays(project: Project) -> None:
    project.edit("passes:\n", "passes:\n  - prune: {mlp: 0.6, kv_groups: 0.5}\n")
    said = project.plan().out
    assert "note: prune keeps 96 of 128 neurons of an MLP in every layer" in said
    assert "note: prune: head_dim" not in said
    assert "intermediate_size 128 → 96" in said
    assert "num_attention_heads 4 → 2, num_key_value_heads 2 → 1" in said
    assert "256 → 128 bytes of cache for each token" in said


def test_numbers_are_rounded_to_what_engines_divide_by() -> None:
    assert [natural(units) for units in (14336, 2048, 1000, 768, 128, 100, 7)] == [128, 128, 8, 32, 32, 4, 1]


def test_an_allocation_behind_it_counts_the_smaller_model(tmp_path: Path) -> None:
    state = open_model(str(make_model(tmp_path, FAMILIES["llama"](), torch.float32))).state
    after = Prune(mlp=0.5).foresee(state)
    assert sum(s.numel for s in after.graph.linear) < sum(s.numel for s in state.graph.linear)
    assert after.config.intermediate_size == 64
    assert state.config.intermediate_size == 128


@pytest.mark.parametrize(("options", "says"), [
    ("{}", "'prune' takes nothing away"),
    ("{mlp: 0.99}", "0.99 of 128 neurons of an MLP, rounded up to 32s, are all of them"),
    ("{mlp: 0}", "'mlp' must be greater than 0"),
    ("{kv_groups: 1.5}", "'kv_groups' must be less than or equal to 1"),
    ("{mlp: 0.5, method: obsolete}", "'method' is 'obs', 'wanda', 'flap' or 'magnitude', not 'obsolete'"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(project: Project, options: str, says: str) -> None:
    assert says in project.refused(f"prune: {options}")


@pytest.mark.parametrize(("name", "options", "says"), [
    ("gpt2", {"kv_groups": 0.5}, "'gpt2' has no shape with 2 of its groups of heads"),
    ("mixtral", {"mlp": 0.5}, "'mixtral' has no neurons of an MLP that 'prune' knows; leave 'mlp' out"),
])  # fmt: skip
def test_a_family_that_cannot_says_why(tmp_path: Path, name: str, options: dict[str, Any], says: str) -> None:
    state = open_model(str(make_model(tmp_path, FAMILIES[name](), torch.float32))).state
    with pytest.raises(CompressError, match=says):
        Prune.model_validate(options).foresee(state)


def test_it_stands_in_front_of_formats(project: Project) -> None:
    project.recipe.write_text(project.recipe.read_text() + "")
    project.edit("export:\n", "  - prune: {mlp: 0.5}\nexport:\n")
    assert "'prune' needs DENSE weights; step 1 'quantize' removed them" in project.plan().line


def test_without_data_weights_alone_can_say(tmp_path: Path) -> None:
    folder = redundant(tmp_path / "model")
    done = bake(tmp_path, folder, None, "native", {"prune": {"mlp": 0.5, "method": "magnitude", "compensate": False}})
    whole, left = (s.dense.read("model.layers.0.mlp.up_proj.weight") for s in (open_model(str(folder)).state, done.state))
    assert torch.equal(left, whole[:64])
    with pytest.raises(CompressError, match=r"needs data\.calibration"):
        Prune(mlp=0.5).check(calibrated=False)


@pytest.mark.parametrize(("name", "expected"), [
    ("gemma3", {"layers.1.attn.o": "post_attention_layernorm", "layers.1.mlp.down": "post_feedforward_layernorm"}),
    ("llama", {}),
    ("gpt2", {}),
])  # fmt: skip
def test_the_norm_behind_a_reader_is_found(family: Any, name: str, expected: dict[str, str]) -> None:
    found = norms_behind(open_model(str(family(name))).state)
    behind = {site: norm.weight.split(".")[-2] for site, norm in found.items() if site.startswith("layers.1.")}
    assert behind == expected


@pytest.mark.slow
def test_outputs_count_by_the_norm_behind_them(tmp_path: Path) -> None:
    """Neurons whose outputs the norm takes away go first, however large these are."""
    folder = make_model(tmp_path / "model", FAMILIES["gemma3"](), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        down = tensors[f"model.layers.{i}.mlp.down_proj.weight"]
        down[:32], down[32:, :64], down[:32, 64:] = 0.0, 0.0, 0.0
        down[:32, :64] = 10 * torch.randn(32, 64, generator=torch.Generator().manual_seed(i))
        tensors[f"model.layers.{i}.post_feedforward_layernorm.weight"][:32] = -1.0  # Gemma computes with 1 + w
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_model(str(folder))
    after = attempt(Prune(mlp=0.5), model, tmp_path / "steps")
    whole, left = (s.dense.read("model.layers.1.mlp.up_proj.weight") for s in (model.state, after))
    assert torch.equal(left, whole[64:])
