"""Models whose layers differ in shape: cut, exported, loaded, and never taken for something else."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, ModelError
from compress.export.artifact.proof import logits
from compress.export.runtime import load
from compress.export.table import KINDS
from compress.model import known
from compress.model.couplings import KV_GROUPS, MLP, couplings, without
from compress.model.layers import fewer
from compress.model.model import open_model
from compress.passes.prune import Prune
from compress.shapes import of_layer, values_of
from tests.conftest import FAMILIES, Project, covered, make_model, rare
from tests.cooking import bake
from tests.nursery import Nursery
from tests.pass_laws import TOKENS, attempt, check_pass
from tests.test_couplings import WIDE_HEADS, loaded

LAYERS = 2  # of a project's model
FREE: dict[str, Any] = {"mlp": {"layers.*": 0.75, "layers.0.*": 32}, "kv_groups": {"layers.1.*": 0.5}}
INT4 = {"quantize": {"format": "int4:g32"}}


def free(folder: Path, name: str, kind: str, left: dict[int, int]) -> tuple[Path, Path]:
    """A model in which nothing reads some units, and the one without them: with `left` of a kind by block."""
    source = make_model(folder / "whole", FAMILIES[name](), torch.float32)
    found = [c for c in couplings(open_model(str(source)).state) if c.kind == kind]
    kept = {c.block: torch.randperm(c.units, generator=torch.Generator().manual_seed(c.block))[: left[c.block]].sort()[0]
            for c in found}  # fmt: skip
    made = without(open_model(str(source)).state, found, {kind: left})
    tensors = load_file(source / "model.safetensors")
    for c in found:
        gone = [unit for unit in range(c.units) if unit not in kept[c.block]]
        tensors[c.reader.weight].index_fill_(int(not c.reader.transposed), c.columns[gone].flatten(), 0.0)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    smaller = folder / "smaller"
    shutil.copytree(source, smaller)
    for c in found:
        for tensor, cut in c.cuts.items():
            stays = cut.left(tensors[tensor].shape[cut.dim], kept[c.block])
            tensors[tensor] = tensors[tensor].index_select(cut.dim, stays).contiguous()
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {s.name: s.shape for s in made.specs}
    save_file(tensors, smaller / "model.safetensors", {"format": "pt"})
    made.config.save_pretrained(smaller)
    return source, smaller


@pytest.mark.parametrize("kind", covered([MLP, KV_GROUPS], MLP))
@pytest.mark.parametrize("name", covered(sorted(FAMILIES), "llama"))
def test_each_layer_loses_its_own_and_nothing_changes(tmp_path: Path, name: str, kind: str) -> None:
    left = {MLP: {0: 96, 1: 64}, KV_GROUPS: {0: 2, 1: 1}}[kind]
    if (name, kind) in {("mixtral", MLP), ("qwen3_moe", MLP)}:
        return
    if kind == KV_GROUPS and name in WIDE_HEADS:
        with pytest.raises(ModelError, match=f"'{name}' has no shape with 1 to 2 of its groups of heads"):
            free(tmp_path, name, kind, left)
        return
    source, smaller = free(tmp_path, name, kind, left)
    ours, whole = loaded(smaller), loaded(source)
    with torch.no_grad():
        found, wanted = (m(input_ids=TOKENS.ids[:2]).logits for m in (ours, whole))
        torch.testing.assert_close(
            found, wanted, rtol=1e-5, atol=1e-4
        )  # sums of fewer zeros are split otherwise on some machines
        if whole.can_generate():
            texts = [m.generate(TOKENS.ids[:1, :8], max_new_tokens=6, do_sample=False) for m in (ours, whole)]
            assert torch.equal(*texts)
    streamed = logits(open_model(str(smaller)).state, [TOKENS.ids[:2]], "cpu")[0]
    torch.testing.assert_close(streamed, logits(open_model(str(source)).state, [TOKENS.ids[:2]], "cpu")[0], atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert values_of(open_model(str(tmp_path / "again")).config) == values_of(open_model(str(smaller)).config) != {}
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "again")(input_ids=TOKENS.ids[:2]).logits, ours(input_ids=TOKENS.ids[:2]).logits)


def test_a_model_is_copied_and_pickled_like_any_other(tmp_path: Path) -> None:
    model = loaded(free(tmp_path, "phi3", KV_GROUPS, {0: 2, 1: 1})[1])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_attn_implementation("eager")
        assert {layer.self_attn.config._attn_implementation for layer in other.model.layers} == {"eager"}
        with torch.no_grad():
            torch.testing.assert_close(other(input_ids=TOKENS.ids[:1]).logits, model(input_ids=TOKENS.ids[:1]).logits)
    assert model.config._attn_implementation != "eager"


def test_attention_of_another_kind_is_set_for_every_layer(tmp_path: Path) -> None:
    """Layers have configs of their own, which must hear of it."""
    model = loaded(free(tmp_path, "llama", KV_GROUPS, {0: 2, 1: 1})[1])
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    assert len({type(layer.self_attn.config) for layer in model.model.layers}) == 1  # a class is long in the making
    with torch.no_grad():
        assert model(input_ids=TOKENS.ids[:1], output_attentions=True).attentions[1].shape[1] == 2


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_every_kind_of_cache_has_the_heads_of_its_layer(tmp_path: Path, implementation: str) -> None:
    model = loaded(free(tmp_path, "qwen3", KV_GROUPS, {0: 2, 1: 1})[1])
    texts = [model.generate(TOKENS.ids[:2, :8], max_new_tokens=6, do_sample=False, **options)
             for options in ({"cache_implementation": implementation}, {"use_cache": False})]  # fmt: skip
    assert torch.equal(*texts)


@pytest.mark.parametrize("mapping", [{"layers.*": 0.5}, {"layers.0.*": 0.5, "layers.1.*": 64}, {"*.down": 64}])
def test_the_same_for_all_layers_is_the_plain_form(tmp_path: Path, mapping: dict[str, Any]) -> None:
    state = open_model(str(make_model(tmp_path, FAMILIES["llama"](), torch.float32))).state
    by_layer, plain = Prune(mlp=mapping).foresee(state), Prune(mlp=0.5).foresee(state)
    assert by_layer == plain
    assert by_layer.config.to_dict() == plain.config.to_dict()
    assert "per_layer_config" not in by_layer.config.to_dict()


def test_a_share_of_what_each_layer_has(tmp_path: Path) -> None:
    """A second `prune` takes its share from each layer; one that makes them alike again leaves a plain config."""
    state = open_model(str(make_model(tmp_path, FAMILIES["llama"](), torch.float32))).state
    first = Prune.model_validate(FREE).foresee(state)
    assert values_of(first.config) == {
        0: {"intermediate_size": 32}, 1: {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    }  # fmt: skip
    again = Prune(mlp=0.5).foresee(first)
    assert [again.graph[f"layers.{i}.mlp.down"].shape[1] for i in range(2)] == [32, 64]
    alike = Prune(mlp={"layers.1.*": 32}, kv_groups={"layers.0.*": 1}).foresee(again)
    assert values_of(alike.config) == {}
    assert (alike.config.intermediate_size, alike.config.num_key_value_heads, alike.config.num_attention_heads) == (32, 1, 2)


def test_later_patterns_win(tmp_path: Path) -> None:
    state = open_model(str(make_model(tmp_path, FAMILIES["llama"](), torch.float32))).state
    widths = []
    for mapping in ({"layers.*": 0.5, "layers.0.*": 1.0}, {"layers.0.*": 1.0, "layers.*": 0.5}):
        p = Prune(mlp=mapping)
        widths.append([p.foresee(state).graph[f"layers.{i}.mlp.down"].shape[1] for i in range(2)])
        assert list(mapping) == [name for name in p.text().split('"') if name.startswith("layers")], "the key knows the order"
    assert widths == [[128, 64], [64, 64]]


@pytest.mark.slow
def test_the_laws_of_a_pass_hold_where_layers_differ(tmp_path: Path) -> None:
    check_pass(
        Prune.model_validate(FREE), make_model(tmp_path / "source", FAMILIES["llama"]()), tmp_path / "run", stopped="everywhere"
    )


def test_layers_that_lose_nothing_keep_every_byte(tmp_path: Path) -> None:
    model = open_model(str(make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)))
    after = attempt(Prune(mlp={"layers.1.*": 64}), model, tmp_path / "steps")
    assert {name.split(".mlp.")[0] for name in after.dense.written} == {"model.layers.1"}


@pytest.mark.parametrize("quantized", covered([True, False], False))
@pytest.mark.parametrize("kind", ["native", rare("onnx")])
def test_free_shapes_go_out_and_come_back(tmp_path: Path, text: Path, kind: str, quantized: bool) -> None:
    folder = make_model(tmp_path / "model", FAMILIES["qwen3"](), torch.float32)
    done = bake(tmp_path, folder, text, kind, {"prune": FREE}, *([INT4] if quantized else []))
    place, proof = done.artifacts[kind]
    assert proof.greedy > 0
    assert json.loads((place / "config.json").read_text())["per_layer_config"]["0"] == {"intermediate_size": 32}
    again = next(k for k in KINDS if k.name == kind).read(place)
    assert [again.graph[f"layers.{i}.attn.k"].shape[0] for i in range(2)] == [32, 16]
    ours, theirs = (logits(s, [TOKENS.ids[:1]], "cpu")[0] for s in (done.state, again))
    assert torch.equal(ours, theirs)
    assert "What is left of each layer" in (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<title>layers.0: 32 of 128 neurons of an MLP</title>" in page
    assert "<title>layers.1: 1 of 2 groups of heads</title>" in page


@pytest.mark.slow
@pytest.mark.parametrize("quantized", covered([True, False], True))
def test_the_runtime_loads_them_and_stock_transformers_stops(
    tmp_path: Path, text: Path, quantized: bool, stock_says: Callable[[Path], str]
) -> None:
    folder = make_model(tmp_path / "model", FAMILIES["gemma3"]())
    done = bake(tmp_path, folder, text, "native", {"prune": FREE}, *([INT4] if quantized else []))
    place = done.artifacts["native"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    wanted = logits(done.state, [TOKENS.ids[:1]], "cpu")[0]
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=TOKENS.ids[:1]).logits, load(place, dtype=torch.float32)(input_ids=TOKENS.ids[:1]).logits
        )
        torch.testing.assert_close(load(place)(input_ids=TOKENS.ids[:1]).logits.float(), wanted, atol=5e-2, rtol=5e-2)
    cached, plain = (model.generate(TOKENS.ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    assert stock_says(place) != ""
    if not quantized:
        model.save_pretrained(tmp_path / "saved")
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
        for again in (load(tmp_path / "saved"), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
            with torch.no_grad():
                assert torch.equal(again(input_ids=TOKENS.ids[:1]).logits, model(input_ids=TOKENS.ids[:1]).logits)
        assert stock_says(tmp_path / "saved") != ""


@pytest.mark.parametrize("name", ["llama", *(rare(n) for n in ("opt", "gpt2", "phi3"))])
def test_a_plain_folder_stops_stock_transformers_too(tmp_path: Path, name: str, stock_says: Callable[[Path], str]) -> None:
    assert "per-layer attribute" in stock_says(free(tmp_path, name, MLP, {0: 96, 1: 64})[1])


@pytest.fixture
def stock_says(nursery: Nursery) -> Callable[[Path], str]:
    """The error that a process without our import ends with; empty where it loads the folder."""
    program = ("import sys, transformers\nprint('compress' in sys.modules)\n"
               "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])")  # fmt: skip

    def said(folder: Path) -> str:
        done = nursery.run(program, folder, cwd=folder)
        assert done.out == "False\n"
        return done.err.strip().splitlines()[-1] if done.code else ""

    return said


@pytest.mark.parametrize("kind", ["compressed_tensors", "gptq", "gguf"])
def test_exporters_for_stock_engines_refuse(project: Project, kind: str) -> None:
    project.edit("passes:\n", "passes:\n  - prune: {mlp: {layers.0.*: 0.5}}\n")
    project.edit("compressed_tensors", kind)
    line = project.plan().line
    assert f"{kind}: layers differ in shape, and no stock engine loads such a 'llama'" in line
    assert "export native or onnx" in line


def test_plan_shows_what_is_left(project: Project) -> None:
    project.edit("passes:\n", "passes:\n  - prune: {mlp: {layers.0.*: 0.5}, kv_groups: {layers.1.*: 1}}\n")
    project.edit("compressed_tensors", "native")
    said = project.plan().out
    assert "note: prune keeps 64 to 128 of 128 neurons of an MLP by layer" in said
    assert "note: prune: layers differ in shape; native (where compress-pipeline is installed) and onnx load that" in said
    assert "0      ████████████████ 2 of 2  ████████░░░░░░░░ 64 of 128\n" in said
    assert "and in vLLM where compress-pipeline is installed; other engines refuse it" in said


@pytest.mark.slow
def test_plan_says_where_vllm_needs_attentions(project: Project) -> None:
    project.edit("passes:\n", "passes:\n  - prune: {kv_groups: {layers.1.*: 0}}\n")
    project.edit("compressed_tensors", "native")
    assert "in vLLM where compress-pipeline is installed and vLLM has code of its own for 'llama'" in project.plan().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "says"), [("mlp", "beside vLLM\n"), ("kv_groups", "and vLLM has code of its own for 'llama'")]
)
def test_the_card_says_how_vllm_serves_it(family: Any, text: Path, tmp_path: Path, layers: str, says: str) -> None:
    done = bake(tmp_path, family("llama"), text, "native", {"prune": {layers: {"layers.1.*": 0}}})
    card = (done.artifacts["native"][0] / "README.md").read_text()
    assert "vllm serve THIS_FOLDER" in card
    assert says in card


@pytest.mark.parametrize(("options", "says"), [
    ("{mlp: {layers.9.*: 0.5}}", "pattern 'layers.9.*' matched no site"),
    ("{mlp: {'*.q': 0.5}}", "pattern '*.q' names no neurons of an MLP"),
    ("{mlp: {layers.0.*: 1.5}}", "'layers.0.*' is 1.5; a share is more than 0 and at most 1.0, a whole number is so many"),
    ("{mlp: {layers.0.*: 0.0}}", "'layers.0.*' is 0.0; a share is more than 0"),
    ("{mlp: {layers.0.*: -1}}", "'layers.0.*' is -1; a share is more than 0"),
    ("{mlp: {layers.*: 0}}", "no layer would have an MLP; keep at least one"),
    ("{kv_groups: {layers.*: 0}}", "no layer would have an attention; keep at least one"),
    ("{mlp: {layers.0.*: true}}", "'layers.0.*' is True; a share is more than 0"),
    ("{mlp: {layers.0.*: 129}}", "layer 0 has 128 neurons of an MLP, not 129"),
    ("{mlp: {layers.*: 1.0}}", "'prune' takes nothing away"),
    ("{mlp: {layers.*: 128}}", "every layer keeps all neurons of an MLP"),
    ("{mlp: {}}", "'prune' takes nothing away"),
    ("{mlp: half}", "'mlp' needs a number, not 'half'"),
    ("{mlp: [0.5]}", "'mlp' needs a number, not a list"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(project: Project, options: str, says: str) -> None:
    assert says in project.refused(f"prune: {options}")


@pytest.mark.parametrize("values", [{"9": {"intermediate_size": 64}}, {"0": {"intermediate_size": "wide"}}, ["x"], {"0": 5},
                                    {"0": {"hidden_size": 32}}, {"0": {"intermediate_size": 64}}])  # fmt: skip
def test_a_config_that_the_weights_do_not_have_is_one_line(tmp_path: Path, values: Any) -> None:
    folder = make_model(tmp_path, FAMILIES["llama"](), torch.float32)
    config = json.loads((folder / "config.json").read_text()) | {"per_layer_config": values}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError) as e:
        assert open_model(str(folder)).state
    assert "\n" not in str(e.value)


def test_layers_that_go_take_their_shapes_with_them(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    state = open_model(str(make_model(tmp_path, config, torch.float32))).state
    state = Prune(mlp={"layers.1.*": 64, "layers.3.*": 32}).foresee(state)
    assert values_of(fewer(state, [0, 3, 1]).config) == {1: {"intermediate_size": 32}, 2: {"intermediate_size": 64}}
    assert of_layer(fewer(state, [3]).config, 0).intermediate_size == 32


@pytest.mark.slow
@pytest.mark.parametrize("then", [{"edit": {"drop_layers": [1]}}, {"depth": {"drop": 1}}])
def test_free_shapes_and_fewer_layers_in_one_recipe(tmp_path: Path, text: Path, then: dict[str, Any]) -> None:
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 3
    folder = make_model(tmp_path / "model", config, torch.float32)
    done = bake(tmp_path, folder, text, "native", {"prune": {"mlp": {"layers.2.*": 32}}}, then, INT4)
    assert done.artifacts["native"][1].greedy == 16
    widths = [of_layer(done.state.config, i).intermediate_size for i in range(2)]
    assert widths == [done.state.graph[f"layers.{i}.mlp.down"].shape[1] for i in range(2)]


# --- sublayers that are not there ------------------------------------------------------------------------------------

LESS: dict[str, Any] = {"mlp": {"layers.1.*": 0, "layers.2.*": 64}, "kv_groups": {"layers.0.*": 0, "layers.2.*": 1}}
WHOLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def deeper(name: str) -> Any:
    """The config of a family, with three layers."""
    config = FAMILIES[name]()
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * 2)[:3]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(WHOLE, "llama"))
def test_sublayers_that_put_out_zeros_go_whole_and_no_bit_changes(tmp_path: Path, name: str) -> None:
    """The first layer has no attention, the second no MLP."""
    source = make_model(tmp_path / "whole", deeper(name), torch.float32)
    tensors = load_file(source / "model.safetensors")
    for c in couplings(open_model(str(source)).state):
        if (c.kind, c.block) in ((KV_GROUPS, 0), (MLP, 1)):
            tensors[c.reader.weight].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    p = Prune(mlp={"layers.1.*": 0}, kv_groups={"layers.0.*": 0}, method="magnitude", compensate=False)
    after = attempt(p, open_model(str(source)), tmp_path / "steps")
    names = {spec.name for spec in after.specs}
    gone = {name for name in tensors if "layers.0.self_attn." in name or "layers.1.mlp." in name}
    assert names == tensors.keys() - gone - {n for n in tensors if n not in names and "norm" in n}
    assert "model.layers.0.input_layernorm.weight" not in names
    assert "model.layers.1.input_layernorm.weight" in names
    smaller = tmp_path / "smaller"
    shutil.copytree(source, smaller)
    save_file({n: t for n, t in tensors.items() if n in names}, smaller / "model.safetensors", {"format": "pt"})
    after.config.save_pretrained(smaller)
    ours, whole = loaded(smaller), loaded(source)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=TOKENS.ids[:2]).logits, whole(input_ids=TOKENS.ids[:2]).logits)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        texts = [m.generate(TOKENS.ids[:2, :20], max_new_tokens=6, do_sample=False, **options) for m in (ours, whole)]
        assert torch.equal(*texts), options
    ours.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "again")(input_ids=TOKENS.ids[:2]).logits, ours(input_ids=TOKENS.ids[:2]).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exporters"), [
    ("llama", "native"), *(rare(name, "native onnx") for name in ("llama", "gemma3")),
])  # fmt: skip
def test_models_without_some_sublayers_go_out_and_come_back(
    tmp_path: Path, text: Path, name: str, exporters: str, stock_says: Callable[[Path], str]
) -> None:
    folder = make_model(tmp_path / "model", deeper(name), torch.float32)
    done = bake(tmp_path, folder, text, exporters, {"prune": LESS}, {"smooth": {}}, INT4)
    assert done.artifacts["native"][1].engine == "compress runtime"
    for kind, (place, proof) in done.artifacts.items():
        assert proof.greedy > 0
        again = next(k for k in KINDS if k.name == kind).read(place)
        assert [site.role for site in again.graph.of_block(0)] == ["gate", "up", "down"]
        assert [site.role for site in again.graph.of_block(1)] == ["q", "k", "v", "o"]
        assert torch.equal(*(logits(s, [TOKENS.ids[:1]], "cpu")[0] for s in (done.state, again)))
    assert stock_says(done.artifacts["native"][0]) != ""
    assert "layers.1: 0 of 128 neurons of an MLP" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_laws_of_a_pass_hold_without_some_sublayers(tmp_path: Path) -> None:
    check_pass(Prune.model_validate(LESS), make_model(tmp_path / "source", deeper("llama")), tmp_path / "run")


@pytest.mark.slow
def test_a_plain_folder_without_some_sublayers_stops_stock_transformers(
    tmp_path: Path, stock_says: Callable[[Path], str]
) -> None:
    folder = make_model(tmp_path, deeper("llama"), torch.float32)
    for options in ({"mlp": {"layers.1.*": 0}}, {"kv_groups": {"layers.1.*": 0}}):
        Prune.model_validate(options).foresee(open_model(str(folder)).state).config.save_pretrained(tmp_path / "config")
        (tmp_path / "config" / "model.safetensors").unlink(missing_ok=True)
        shutil.copy(folder / "model.safetensors", tmp_path / "config")
        assert "per-layer attribute" in stock_says(tmp_path / "config")


@pytest.mark.slow
def test_a_deeper_model_takes_no_more_copies_to_foresee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    copy = known.Kept.copy
    monkeypatch.setattr(known.Kept, "copy", lambda kept: made.append(kept) or copy(kept))
    counts = []
    for layers in (3, 6):
        config = deeper("llama")
        config.num_hidden_layers = layers
        state = open_model(str(make_model(tmp_path / str(layers), config, torch.float32))).state
        made.clear()
        monkeypatch.setattr(known, "_KEPT", type(known._KEPT)())  # what other tests have asked for
        Prune.model_validate({**LESS, "mlp": {"layers.*": 0, "layers.2.*": 64}}).foresee(state)
        counts.append(len(made))
    assert counts[0] == counts[1]


SHORT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 272, "pad_token_id": 0}  # fmt: skip
ODD = {
    "shared norm": (transformers.CohereConfig, "mlp", {"mlp"}),
    "shared norm and biases": (transformers.PhiConfig, "kv_groups", {"self_attn"}),
    "norm within": (transformers.BitNetConfig, "kv_groups", {"self_attn", "input_layernorm"}),
    "side by side": (transformers.GPTNeoXConfig, "mlp", {"mlp", "post_attention_layernorm"}),
    "norms behind": (transformers.Glm4Config, "mlp", {"mlp", "post_attention_layernorm", "post_mlp_layernorm"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", covered(ODD, "norm within"))
def test_what_goes_with_a_sublayer_is_seen_of_each_architecture(tmp_path: Path, case: str) -> None:
    """The pass itself compares what the layer computes without it."""
    kind, option, gone = ODD[case]
    config = kind(**{name: value for name, value in SHORT.items() if kind is not transformers.GPTNeoXConfig or "key" not in name})
    model = open_model(str(make_model(tmp_path / "model", config, torch.float32)))
    after = attempt(Prune.model_validate({option: {"layers.1.*": 0}}), model, tmp_path / "steps")
    assert values_of(after.config)[1]["absent_modules"].keys() == gone
    assert logits(after, [TOKENS.ids[:1]], "cpu")[0].isfinite().all()


@pytest.mark.slow
def test_a_sublayer_takes_its_biases_with_it(tmp_path: Path, text: Path) -> None:
    folder = make_model(tmp_path / "model", FAMILIES["gpt2"](), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name in (name for name in tensors if name.endswith("bias")):
        tensors[name].normal_(generator=torch.Generator().manual_seed(1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = bake(tmp_path, folder, text, "native", {"prune": {"mlp": {"layers.0.*": 0, "layers.1.*": 64}}})
    assert done.artifacts["native"][1].greedy == 16
    assert not any(spec.name.startswith(("transformer.h.0.mlp.", "transformer.h.0.ln_2.")) for spec in done.state.specs)


@pytest.mark.parametrize(("name", "kind", "says"), [
    ("opt", "mlp", "has no module that is its MLP alone"),
    ("roberta", "kv_groups", "does more with its attention than add its outputs"),
    ("gpt2", "kv_groups", "has no config of a layer without an attention"),
])  # fmt: skip
def test_sublayers_that_leave_a_trace_stay(tmp_path: Path, name: str, kind: str, says: str) -> None:
    state = open_model(str(make_model(tmp_path, FAMILIES[name](), torch.float32))).state
    with pytest.raises(CompressError, match=says):
        Prune.model_validate({kind: {"layers.1.*": 0}}).foresee(state)
