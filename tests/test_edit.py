"""The pass `edit`: shapes and config travel through every exporter and back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, ModelError
from compress.export.artifact.proof import logits
from compress.export.table import EXPORTERS, KINDS
from compress.model.layers import renumbered
from compress.model.model import open_model
from compress.passes.edit import Edit
from compress.passes.prune import Prune
from tests.conftest import FAMILIES, LIGHT, Project, covered, make_model
from tests.cooking import bake
from tests.pass_laws import TOKENS

LAYERS = 2  # of a project

DEEP = ["llama", "qwen2", "gemma3", "gpt2", "opt", "phi3", "mixtral", "gpt_neox"]


def deep(folder: Path, name: str, layers: int = 4) -> Path:
    """A random model of several layers, all of one kind where kinds go by number."""
    config = FAMILIES[name]()
    config.num_hidden_layers = layers
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"][:layers] if (
            name in ("gemma2", "gemma3")) else ["full_attention"] * layers  # fmt: skip
    return make_model(folder, config, torch.float32)


def without(folder: Path, kept: list[int]) -> torch.nn.Module:
    """transformers' model with only some of its layers, cut in memory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    held = [stack[i] for i in kept]
    del stack[:]
    stack.extend(held)
    model.config.get_text_config().num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    return model.eval()


@pytest.mark.parametrize("name", covered(DEEP, "llama", "gpt2", "mixtral"))
def test_a_model_without_two_layers_is_transformers_without_them(tmp_path: Path, name: str) -> None:
    folder = deep(tmp_path / "model", name)
    state = Edit(drop_layers=(1, 2) if name != "gemma3" else (0, 1)).foresee(open_model(str(folder)).state)
    kept = [0, 3] if name != "gemma3" else [2, 3]
    assert len(state.graph.blocks) == state.config.num_hidden_layers == 2
    with torch.no_grad():
        wanted = without(folder, kept)(input_ids=TOKENS.ids[:2], use_cache=False).logits
    torch.testing.assert_close(logits(state, [TOKENS.ids[:2]], "cpu")[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def edited(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """edited(kind) -> a run that made an artifact of that kind: one for all but onnx, which takes seconds."""

    @cache
    def run(kinds: str) -> Any:
        folder = tmp_path_factory.mktemp("edited")
        source = deep(folder / "model", "qwen2", 2)  # whose head is tied
        return bake(folder, source, text, kinds, {"edit": {"drop_layers": [0], "untie": True}},
                    {"quantize": {"format": "int4:g32", "pins": {"lm_head": "int8:g32"}}})  # fmt: skip

    return lambda kind: run(kind if kind == "onnx" else " ".join(LIGHT))


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPORTERS)
def test_fewer_layers_and_an_own_head_go_through_every_exporter_and_back(edited: Any, kind: str) -> None:
    done = edited(kind)
    place, proof = done.artifacts[kind]
    assert "not proven" not in proof.remark or kind == "gptq"  # transformers reads no packed head there
    config = json.loads((place / "config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (1, False)
    again = next(k for k in KINDS if k.name == kind).read(place)
    assert [b.index for b in again.graph.blocks] == [0]
    assert again.formats == done.state.formats
    assert str(again.format(again.graph["lm_head"])) == "int8:g32"
    ours, theirs = (logits(s, [TOKENS.ids[:1]], "cpu")[0] for s in (done.state, again))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_alone_it_gives_a_plain_checkpoint_of_the_architecture(tmp_path: Path) -> None:
    folder = deep(tmp_path / "model", "llama")
    done = bake(tmp_path, folder, None, "compressed_tensors", {"edit": {"drop_layers": [2]}})
    place = done.artifacts["compressed_tensors"][0]
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    stock = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    with torch.no_grad():
        found = stock(input_ids=TOKENS.ids[:2]).logits
    torch.testing.assert_close(found, without(folder, [0, 1, 3])(input_ids=TOKENS.ids[:2], use_cache=False).logits)
    assert (place / "model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size


def test_no_byte_is_copied(tmp_path: Path) -> None:
    folder = deep(tmp_path / "model", "qwen2")
    state = Edit(drop_layers=(0,), untie=True).foresee(open_model(str(folder)).state)
    assert not state.dense.written
    assert state.dense.names["lm_head.weight"] == "model.embed_tokens.weight"
    assert state.dense.names["model.layers.0.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


def test_layers_that_would_change_their_kind_are_refused(tmp_path: Path) -> None:
    """Qwen3-MoE says by number which layers are dense: without layer 0 the others would move."""
    config = FAMILIES["qwen3_moe"]()
    config.num_hidden_layers, config.mlp_only_layers = 3, [0]
    state = open_model(str(make_model(tmp_path, config))).state
    with pytest.raises(ModelError):
        Edit(drop_layers=(0,)).foresee(state)
    assert len(Edit(drop_layers=(2,)).foresee(state).graph.blocks) == 2


@pytest.mark.parametrize(("options", "says"), [
    ("drop_layers: [7]", "layer 7 is none of the layers, which are 0 to 1"),
    ("drop_layers: [-1]", "layer -1 is none of the layers"),
    ("drop_layers: [1, 1]", "layer 1 is named twice"),
    ("drop_layers: [0, 1]", "these are all 2 layers; keep one"),
    ("drop_layers: [true]", "item 1 of 'drop_layers' needs a whole number, not 'True'"),
    ("untie: true", "has a matrix of its own already; leave 'untie' out"),
    ("", "'edit' names nothing to change"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(project: Project, options: str, says: str) -> None:
    assert says in project.refused(f"edit: {{{options}}}")


def test_behind_a_plan_it_is_out_of_order(project: Project) -> None:
    """Which names layers by the numbers that they had."""
    project.edit(
        "passes:\n",
        'passes:\n  - allocate: {budget: 4 bits, formats: ["int3:g32", "int4:g32"], trials: 0}\n  - edit: {drop_layers: [1]}\n',
    )
    project.edit('      format: "int4:g32"\n      pins: {"lm_head": "int8:g32"}\n', "      method: gptq\n")
    assert "an earlier step has planned formats for layers by their numbers; move 'edit' in front of it" in project.plan().line


def test_behind_quantize_it_is_out_of_order(project: Project) -> None:
    project.edit("export:", "  - edit: {untie: true}\nexport:")
    assert "needs DENSE weights" in project.plan().line


def test_names_are_renumbered_by_the_list_of_layers_alone() -> None:
    """Other stacks, such as those of an encoder beside it, keep their numbers."""
    names = ["h.0.ln.weight", "h.1.x.h.0.weight", "h.2.ln.h.0.weight", "wte.weight", "mtp.h.1.w"]
    found: dict[str, Any] = renumbered(names, "h", [0, 2])
    assert found == {"h.0.ln.weight": "h.0.ln.weight", "h.2.ln.h.0.weight": "h.1.ln.h.0.weight", "wte.weight": "wte.weight",
                     "mtp.h.1.w": "mtp.h.1.w"}  # fmt: skip


def test_lists_that_are_as_long_as_the_model_is_deep_by_chance_stay(tmp_path: Path) -> None:
    folder = deep(tmp_path, "llama")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"eos_token_id": [1, 2, 3, 4], "my_list": [1, 2, 3, 4]}))
    config = Edit(drop_layers=(1,)).foresee(open_model(str(folder)).state).config
    assert (config.eos_token_id, config.my_list, config.num_hidden_layers) == ([1, 2, 3, 4], [1, 2, 3, 4], 3)


@pytest.mark.slow
def test_an_equal_head_in_the_file_of_a_tied_model_can_be_untied(tmp_path: Path, text: Path) -> None:
    folder = deep(tmp_path / "model", "qwen2", 2)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = bake(
        tmp_path,
        folder,
        text,
        "compressed_tensors",
        {"edit": {"untie": True}},
        {"quantize": {"pins": {"lm_head": "int8:g32"}, "format": "int4:g32"}},
    )
    assert str(done.state.format(done.state.graph["lm_head"])) == "int8:g32"


def test_a_tied_head_stays_tied_where_nobody_asks(tmp_path: Path) -> None:
    state = Edit(drop_layers=(0,)).foresee(open_model(str(deep(tmp_path, "qwen2"))).state)
    assert state.graph["lm_head"].tied == "embed"
    with pytest.raises(CompressError):
        Edit(untie=True).foresee(Edit(untie=True).foresee(open_model(str(tmp_path)).state))


def test_behind_a_pass_that_has_changed_shapes_it_is_foreseen_as_it_will_be(tmp_path: Path) -> None:
    """What `prune` is going to write has other shapes than what lies there while it is foreseen."""
    smaller = Prune(mlp=0.5).foresee(open_model(str(deep(tmp_path, "qwen2"))).state)
    state = Edit(drop_layers=(1,), untie=True).foresee(smaller)
    assert {s.shape for s in state.graph.linear if s.role == "down"} == {(64, 64)}
    assert len(state.graph.blocks) == 3
