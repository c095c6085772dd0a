"""What is found in a model: every matrix of every family, under the names its checkpoint uses, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.model.model import open_model
from compress.state.graph import Graph
from tests.conftest import FAMILIES, SMALL, make_model
from tests.conftest import GROUPED as HEADS_2
from tests.sharing import SharingConfig

# For each family: module path of a block, then our name -> (path in the block, (out, in)).
SELF = "self_attn"
GROUPED = {"attn.q": (f"{SELF}.q_proj", (64, 64)), "attn.k": (f"{SELF}.k_proj", (32, 64)), "attn.v": (f"{SELF}.v_proj", (32, 64)),
           "attn.o": (f"{SELF}.o_proj", (64, 64))}  # fmt: skip
GATED = {"mlp.gate": ("mlp.gate_proj", (128, 64)), "mlp.up": ("mlp.up_proj", (128, 64)), "mlp.down": ("mlp.down_proj", (64, 128))}
LLAMA = ("model.layers", {**GROUPED, **GATED})
BLOCKS: dict[str, tuple[str, dict[str, tuple[str, tuple[int, int]]]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), LLAMA),
    "phi3": ("model.layers", {
        "attn.qkv": (f"{SELF}.qkv_proj", (128, 64)), "attn.o": (f"{SELF}.o_proj", (64, 64)),
        "mlp.gate_up": ("mlp.gate_up_proj", (256, 64)), "mlp.down": ("mlp.down_proj", (64, 128))}),
    "opt": ("model.decoder.layers", {
        "attn.q": (f"{SELF}.q_proj", (64, 64)), "attn.k": (f"{SELF}.k_proj", (64, 64)), "attn.v": (f"{SELF}.v_proj", (64, 64)),
        "attn.o": (f"{SELF}.out_proj", (64, 64)), "mlp.up": ("fc1", (128, 64)), "mlp.down": ("fc2", (64, 128))}),
    "gpt2": ("transformer.h", {
        "attn.qkv": ("attn.c_attn", (192, 64)), "attn.o": ("attn.c_proj", (64, 64)),
        "mlp.up": ("mlp.c_fc", (256, 64)), "mlp.down": ("mlp.c_proj", (64, 256))}),
    "gpt_neox": ("gpt_neox.layers", {
        "attn.qkv": ("attention.query_key_value", (192, 64)), "attn.o": ("attention.dense", (64, 64)),
        "mlp.up": ("mlp.dense_h_to_4h", (128, 64)), "mlp.down": ("mlp.dense_4h_to_h", (64, 128))}),
    "roberta": ("roberta.encoder.layer", {
        **{f"attn.{r}": (f"attention.self.{n}", (64, 64)) for r, n in (("q", "query"), ("k", "key"), ("v", "value"))},
        "attn.o": ("attention.output.dense", (64, 64)),
        "mlp.up": ("intermediate.dense", (128, 64)), "mlp.down": ("output.dense", (64, 128))}),
}  # fmt: skip
EXPERTS = {"mixtral": (128, "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
           "qwen3_moe": (64, "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"))}  # fmt: skip
TIED = {"qwen2", "gemma2", "gemma3", "opt", "gpt2", "roberta"}
HEADS = {"gpt_neox": "embed_out.weight", "roberta": "lm_head.decoder.weight"}
INPUTS = {"q": "attn.in", "k": "attn.in", "v": "attn.in", "qkv": "attn.in", "o": "attn.out",
          "gate": "mlp.in", "up": "mlp.in", "gate_up": "mlp.in", "down": "mlp.mid"}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_every_matrix_of_a_block_is_found(family: Any, name: str) -> None:
    graph = open_model(str(family(name))).graph
    path, wanted = BLOCKS[name]
    for i, block in enumerate(graph.blocks):
        assert (block.index, block.module) == (i, f"{path}.{i}")
        found = {s.name: (s.module, s.shape, s.weight, s.input_key) for s in graph.of_block(i)}
        assert found == {
            f"layers.{i}.{n}": (f"{path}.{i}.{m}", shape, f"{path}.{i}.{m}.weight", INPUTS[n.partition(".")[2]])
            for n, (m, shape) in wanted.items()
        }
        assert all(s.role == s.name.rpartition(".")[2] and s.block == i for s in graph.of_block(i))
        assert all(s.transposed == (name == "gpt2") for s in graph.of_block(i))


@pytest.mark.parametrize("name", EXPERTS)
def test_every_matrix_of_every_expert_is_a_site(family: Any, name: str) -> None:
    graph = open_model(str(family(name))).graph
    width, path, names = EXPERTS[name]
    for i in range(2):
        found = {s.name: (s.role, s.shape, s.weight) for s in graph.of_block(i) if s.expert is not None}
        roles = zip(("gate", "up", "down"), names, ((width, 64), (width, 64), (64, width)), strict=True)
        assert found == {
            f"layers.{i}.experts.{e}.{role}": (role, shape, f"model.layers.{i}.{path.format(e)}{theirs}.weight")
            for role, theirs, shape in roles
            for e in range(4)
        }
        assert [s.role for s in graph.of_block(i) if s.expert is None] == ["q", "k", "v", "o"]
    assert any(n.endswith("gate.weight") for n in graph.parameters), "the router stays as it is"


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_and_parameters_together_are_the_checkpoint(family: Any, name: str) -> None:
    """Each tensor on disk is one site's weight or one parameter that stays (biases, norms, positions, routers)."""
    model = open_model(str(family(name)))
    graph = model.graph
    weights = [s.weight for s in graph if not s.tied]
    assert len(set(weights)) == len(weights)
    assert not set(weights) & set(graph.parameters)
    assert set(weights) | set(graph.parameters) == set(model.checkpoint.specs)
    assert all(graph.parameters[n] == model.checkpoint.specs[n].shape for n in graph.parameters)
    assert {n for n in model.checkpoint.specs if n.endswith("bias")} <= set(graph.parameters)


@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_and_head(family: Any, name: str) -> None:
    graph = open_model(str(family(name))).graph
    embed, head = graph["embed"], graph["lm_head"]
    assert embed.shape == head.shape == (272, 64)
    assert head.tied == ("embed" if name in TIED else None)
    if name not in TIED:
        assert head.weight == HEADS.get(name, "lm_head.weight")
    assert graph.causal == (name != "roberta")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_alone_gives_the_same_structure(family: Any, tmp_path: Path, name: str) -> None:
    """Sites, shapes and bytes are known without weights, so that `plan` can be asked before a download."""
    full = open_model(str(family(name)))
    shutil.copy(full.folder / "config.json", tmp_path)
    bare = open_model(str(tmp_path / "config.json"))
    assert not bare.has_weights
    assert bare.graph == full.graph
    assert {(s.name, s.dtype, s.shape) for s in bare.specs} == {(s.name, s.dtype, s.shape) for s in full.specs}
    with pytest.raises(ModelError, match=r"found no weights; needs model.safetensors .*'plan' works without"):
        _ = bare.state


# --- how checkpoints differ from what transformers writes today -------------------------------------------------------


def rewritten(source: Path, folder: Path, change: Any) -> Graph:
    """The graph of a copy of a model whose tensors went through `change`; its weights must be the source's."""
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    before, after = open_model(str(source)).state, open_model(str(folder)).state
    for site in before.graph:
        assert torch.equal(before.weight(site), after.weight(after.graph[site.name])), site.name
    return after.graph


def test_names_without_the_base_prefix_are_read(family: Any, tmp_path: Path) -> None:
    """GPT-2 on the hub says 'h.0.attn.c_attn.weight' where transformers' tree says 'transformer.h.0...'."""
    strip = lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()}  # noqa: E731
    graph = rewritten(family("gpt2"), tmp_path / "gpt2", strip)
    assert graph["layers.0.attn.qkv"].weight == "h.0.attn.c_attn.weight"
    assert graph["layers.0.attn.qkv"].module == "transformer.h.0.attn.c_attn"
    assert "ln_f.bias" in graph.parameters


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_joined_into_one_tensor_on_disk_are_read(family: Any, tmp_path: Path, name: str) -> None:
    def join(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = open_model(str(family(name))).state
        for i in range(2):
            sites = {s.name: s for s in state.graph.of_block(i) if s.expert is not None}
            parts = {k: tensors.pop(s.weight) for k, s in sites.items()}
            at = f"layers.{i}.experts"
            gate_up = [torch.cat([parts[f"{at}.{e}.gate"], parts[f"{at}.{e}.up"]]) for e in range(4)]
            tensors[sites[f"{at}.0.gate"].joined] = torch.stack(gate_up)
            tensors[sites[f"{at}.0.down"].joined] = torch.stack([parts[f"{at}.{e}.down"] for e in range(4)])
        return tensors

    rewritten(family(name), tmp_path / name, join)


def test_a_matrix_that_serves_two_modules_is_one_site(tmp_path: Path) -> None:
    folder = make_model(tmp_path, SharingConfig(**SMALL, **HEADS_2, tie_word_embeddings=True))
    graph = open_model(str(folder)).graph
    assert [s.role for s in graph.of_block(1)] == ["q", "k", "o", "gate", "up", "down"]
    assert graph["layers.1.attn.k"].aliases == ("model.layers.1.self_attn.v_proj",)
    assert not any(s.aliases for s in graph if s.role != "k")


def test_shards_are_read(tmp_path: Path, family: Any) -> None:
    """The same model in one file and in many, as save_pretrained cuts it."""
    folder = make_model(tmp_path / "many", FAMILIES["llama"](), max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    one, many = open_model(str(family("llama"))).state, open_model(str(folder)).state
    assert one.graph == many.graph
    assert all(torch.equal(one.weight(s), many.weight(s)) for s in one.graph)
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-\d+\.safetensors: no such file; is a shard missing\?"):
        _ = open_model(str(folder)).graph


# --- what cannot be read ----------------------------------------------------------------------------------------------


def says(folder: Path | str, *parts: str) -> None:
    """Opening gives a ModelError of one line that holds every part."""
    with pytest.raises(ModelError) as caught:
        _ = open_model(str(folder)).graph
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


TINY = {"hidden_size": 64, "num_hidden_layers": 2}
HEADED = {**TINY, "num_attention_heads": 4, "intermediate_size": 128}
UNREADABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "t5": (lambda: transformers.T5Config(d_model=64, num_layers=2, num_heads=4, architectures=["T5ForConditionalGeneration"]),
           ("T5ForConditionalGeneration: found an encoder and a decoder", "only models that are one of the two")),
    "t5 without a class": (lambda: transformers.T5Config(d_model=64, num_layers=2, num_heads=4),
                           ("found architecture 't5'", "transformers has no class for it that predicts tokens")),
    "vit": (lambda: transformers.ViTConfig(**HEADED, architectures=["ViTForImageClassification"]),
            ("ViTForImageClassification: found layers but no token embedding",)),
    "clip": (transformers.CLIPConfig, ("found architecture 'clip'", "no language model")),
    "mamba": (lambda: transformers.MambaConfig(**TINY),
              ("MambaForCausalLM: found 2 known matrices but cannot tell what these compute", "layers.0.mixer.in_proj")),
    "albert": (lambda: transformers.AlbertConfig(**HEADED, num_hidden_groups=1, architectures=["AlbertModel"]),
               ("AlbertModel: passes 2 times through 1 set(s) of weights", "share the weights of layers")),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_architecture_that_cannot_be_read_says_what_was_found_and_what_is_missing(tmp_path: Path, name: str) -> None:
    config, parts = UNREADABLE[name]
    config().save_pretrained(tmp_path)
    says(tmp_path, *parts)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    says(tmp_path, f"{tmp_path}: no config.json; is this the folder of a transformers model?")
    (tmp_path / "config.json").write_text("{")
    says(tmp_path, "config.json: transformers cannot read it")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    says(tmp_path, "config.json: transformers cannot read it", "`lama`")
    says(tmp_path / "absent", "no folder", "no hub id either (owner/name or owner/name@revision)")


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says("nobody/no-such-model", "model 'nobody/no-such-model': no folder", "and the hub says: ")
    says("nobody/no-such-model@main", "and the hub says: ")


def test_config_and_weights_that_disagree_are_told_apart(family: Any, tmp_path: Path) -> None:
    def edited(name: str, **changes: Any) -> Path:
        folder = shutil.copytree(family("llama"), tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    says(
        edited("wide", intermediate_size=256),
        "mlp.gate_proj.weight' is [128, 64], the config says [256, 64]",
        "do not belong together",
    )
    says(edited("deep", num_hidden_layers=3), "the config asks for 'model.layers.2.", "(9 tensors missing)")
    folder = edited("ints")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    says(folder, "'lm_head.weight' is int8; needs bf16, fp16 or fp32")


def test_a_pickle_checkpoint_is_named(family: Any, tmp_path: Path) -> None:
    shutil.copy(family("llama") / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found only pytorch_model.bin; needs model.safetensors"):
        _ = open_model(str(tmp_path)).state
