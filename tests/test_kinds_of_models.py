"""Models as people have them: language models inside of others, with tensors that transformers does not load, and with matrices
that no table names. An artifact is loaded as its users load it, and gives what transformers computes from its matrices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.cli import main
from compress.errors import CompressError
from compress.export import runtime
from compress.model.model import open_model
from compress.passes.edit import Edit
from compress.state import State
from tests.conftest import GROUPED, SMALL, covered, rare, saved
from tests.cooking import recipe

WIDE = {**SMALL, **GROUPED}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
         "patch_size": 14}  # fmt: skip
TURNS = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
QWEN = {"image_token_id": 259, "video_token_id": 260, "vision_start_token_id": 261, "vision_end_token_id": 262}
MLA = {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
       "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
       "first_k_dense_replace": 1}  # fmt: skip
MOE = {**WIDE, "head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}

WRAPPERS: dict[str, tuple[Any, Any]] = {
    "gemma3": (
        transformers.Gemma3ForConditionalGeneration,
        lambda: transformers.Gemma3Config(
            text_config={**WIDE, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16},
            vision_config=TOWER,
            mm_tokens_per_image=4,
            image_token_index=259,
            boi_token_index=260,
            eoi_token_index=261,
        ),
    ),
    "qwen2.5-vl": (
        transformers.Qwen2_5_VLForConditionalGeneration,
        lambda: transformers.Qwen2_5_VLConfig(
            text_config={**WIDE, **TURNS},
            vision_config={
                "depth": 3,
                "hidden_size": 64,
                "intermediate_size": 172,
                "num_heads": 4,
                "out_hidden_size": 64,
                "patch_size": 14,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            **QWEN,
        ),
    ),
    "llava": (
        transformers.LlavaForConditionalGeneration,
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**WIDE),
            vision_config=transformers.CLIPVisionConfig(**TOWER),
            image_token_index=259,
        ),
    ),
    "mistral3": (
        transformers.Mistral3ForConditionalGeneration,
        lambda: transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**WIDE, head_dim=16),
            vision_config=transformers.PixtralVisionConfig(**TOWER),
            image_token_index=259,
        ),
    ),
    "idefics3": (
        transformers.Idefics3ForConditionalGeneration,
        lambda: transformers.Idefics3Config(
            text_config=transformers.LlamaConfig(**WIDE, pad_token_id=258), vision_config=dict(TOWER), image_token_id=259
        ),
    ),
}
NAMED: dict[str, tuple[Any, Any]] = {
    "deepseek v2": (transformers.DeepseekV2ForCausalLM, lambda: transformers.DeepseekV2Config(**MLA)),
    "deepseek v2 lite": (
        transformers.DeepseekV2ForCausalLM,
        lambda: transformers.DeepseekV2Config(**{**MLA, "q_lora_rank": None}),
    ),
    "deepseek v3": (transformers.DeepseekV3ForCausalLM, lambda: transformers.DeepseekV3Config(**MLA, n_group=2, topk_group=1)),
    "gpt-oss": (
        transformers.GptOssForCausalLM,
        lambda: transformers.GptOssConfig(**WIDE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    ),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        lambda: transformers.ModernBertConfig(**SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    ),
    "distilbert": (
        transformers.DistilBertModel,
        lambda: transformers.DistilBertConfig(
            vocab_size=272, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=256
        ),
    ),
    "deberta": (transformers.DebertaV2ForSequenceClassification, lambda: transformers.DebertaV2Config(**SMALL)),
    "qwen3-next": (
        transformers.Qwen3NextForCausalLM,
        lambda: transformers.Qwen3NextConfig(
            **MOE,
            num_experts=4,
            shared_expert_intermediate_size=32,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
}
TOKENS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))


def made(folder: Path, kind: Any, config: Any) -> Path:
    """A random model of a class, as a folder."""
    torch.manual_seed(0)
    return saved(folder, kind(config))


def ran(folder: Path, model: Path, text: Path, *exporters: str, evaluated: bool = False, **more: Any) -> pipeline.Outcome:
    """A run of GPTQ in 4 bits with some exporters, `evaluated` or not; `more` are further keys of the recipe."""
    path = recipe(folder, model, text, format="int4:g32")
    content = {**yaml.safe_load(path.read_text()), "export": [{name: {}} for name in exporters], **more}
    if evaluated:
        content["data"]["evaluation"] = content["data"]["calibration"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)


def filled(source: Path, kind: Any, state: State) -> Any:
    """The original with the artifact's matrices in it."""
    model = kind.from_pretrained(source, dtype=torch.bfloat16, experts_implementation="eager").eval()
    for name in state.codes:
        site, module = state.graph[name], model.get_submodule(state.graph[name].module)
        matrix = state.codes[name].load().dequantize(torch.bfloat16)
        if site.expert is None:
            module.weight.data.copy_(matrix)
        elif site.role == "down":
            module.down_proj.data[site.expert] = matrix
        else:
            half = matrix.shape[0] * (site.role == "up")
            module.gate_up_proj.data[site.expert, half : half + matrix.shape[0]] = matrix
    return model


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        model(input_ids=TOKENS)  # stock transformers unpacks in the first pass
        out: Tensor = model(input_ids=TOKENS)[0].float()
    return out


def same_as_its_matrices(done: pipeline.Outcome, source: Path, kind: Any, loaded: dict[str, Any]) -> None:
    wanted = outputs(filled(source, kind, done.state))
    for exporter, load in loaded.items():
        model = load(done.artifacts[exporter][0])
        assert type(model) is kind
        torch.testing.assert_close(outputs(model), wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()), msg=exporter)


def stock(kind: Any) -> Any:
    return lambda folder: kind.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager")


def packed(folder: Path) -> Any:
    return runtime.load(folder, "cpu", torch.bfloat16)


# --- language models inside of others --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(WRAPPERS, "gemma3"))
def test_of_a_model_with_a_tower_the_language_model_is_compressed(name: str, text: Path, tmp_path: Path) -> None:
    kind, config = WRAPPERS[name]
    source = made(tmp_path / "model", kind, config())
    done = ran(tmp_path / "run", source, text, "compressed_tensors", "native", "gptq", evaluated=True)
    assert len(done.state.graph.blocks) == 2
    assert len(done.state.codes) == 14
    assert done.scores["original"]["perplexity"]
    assert done.scores["compressed"]["kl"] > 0
    assert done.artifacts["compressed_tensors"][1].engine == "transformers"
    same_as_its_matrices(done, source, kind, {"compressed_tensors": stock(kind), "native": packed})
    before = load_file(source / "model.safetensors")
    after = load_file(next(done.artifacts["compressed_tensors"][0].glob("*.safetensors")))
    for tensor in before.keys() - {site.weight for site in done.state.graph.linear}:
        assert torch.equal(before[tensor], after[tensor]), f"{tensor} is not the language model's, or a vector"


def test_a_tower_as_older_files_name_it(tmp_path: Path) -> None:
    """LLaVA's files say `language_model.model.layers`, transformers writes `model.language_model.layers` where it is told to."""
    kind, config = WRAPPERS["llava"]
    source = made(tmp_path / "model", kind, config())
    tensors = load_file(source / "model.safetensors")
    assert any(name.startswith("language_model.model.layers.") for name in tensors)
    model = kind.from_pretrained(source)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    save_file({n: p.detach().clone() for n, p in model.state_dict().items()}, copy / "model.safetensors", {"format": "pt"})
    one, other = (open_model(str(folder)).state for folder in (source, copy))
    assert one.graph["layers.0.attn.q"].weight != other.graph["layers.0.attn.q"].weight
    assert all(torch.equal(one.weight(s), other.weight(other.graph[s.name])) for s in one.graph)
    with pytest.raises(CompressError, match=r"whose towers a graph of tokens would leave out"):
        ran(tmp_path / "run", source, tmp_path, "onnx")


def test_experts_in_another_layout_are_told_apart(tmp_path: Path) -> None:
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64, "num_heads": 4, "patch_size": 14}
    config = transformers.Qwen3VLMoeConfig(
        text_config={**MOE, **TURNS, "num_experts": 4}, vision_config={**tower, "deepstack_visual_indexes": [0]}, **QWEN
    )
    source = made(tmp_path / "model", transformers.Qwen3VLMoeForConditionalGeneration, config)
    with pytest.raises(CompressError, match=r"transformers makes .model.language_model.layers.0.mlp.experts.* of another layout"):
        _ = open_model(str(source)).graph


# --- tensors that transformers does not load --------------------------------------------------------------------------


def further(source: Path, folder: Path, where: str, **told: Any) -> dict[str, Tensor]:
    """A copy of a model with a layer that predicts further tokens, made of its last; what the weights hold."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    last = {n: v for n, v in tensors.items() if n.startswith("model.layers.1.")}
    tensors |= {n.replace("model.layers.1.", where): v.clone() for n, v in last.items()}
    join = "eh_proj" if where.startswith("model") else "fc"
    tensors[f"{where.replace('layers.0.', '')}{join}.weight"] = torch.randn(64, 128).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | told))
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where", "told"), [
    ("deepseek v3", "model.layers.2.", {"num_nextn_predict_layers": 1}),
    rare("deepseek v3", "model.layers.2.", {}),
    rare("qwen3-next", "mtp.layers.0.", {}),
])  # fmt: skip
def test_what_transformers_does_not_load_goes_along(
    name: str, where: str, told: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, config = NAMED[name]
    plain, folder = made(tmp_path / "plain", kind, config()), tmp_path / "model"
    before = further(plain, folder, where, **told)
    extra = {n for n in before if n.startswith(where.partition(".layers.0")[0])}
    done = ran(tmp_path / "run", folder, text, "compressed_tensors", "native")
    same_as_its_matrices(done, plain, kind, {"compressed_tensors": stock(kind), "native": packed})
    told_of = json.loads((done.artifacts["compressed_tensors"][0] / "config.json").read_text())["quantization_config"]["ignore"]
    joins = next(n for n in extra if n.endswith((".eh_proj.weight", ".fc.weight")))
    assert joins.removesuffix(".weight") in told_of, "engines that load it are to take it as it is"
    for path, _ in done.artifacts.values():
        after = load_file(next(path.glob("*.safetensors")))
        assert all(torch.equal(before[n], after[n]) for n in extra)
    assert main(["run", str(tmp_path / "run" / "recipe.yaml")]) == 0
    said = [line for line in "".join(capsys.readouterr()).splitlines() if "none that transformers loads" in line]
    assert len(said) == 1
    assert f"{len(extra)} tensors" in said[0]


def test_a_layer_too_many_is_no_layer_that_predicts(family: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CompressError, match="the config has only 1 layers"):
        _ = open_model(str(folder)).graph


def test_a_layer_that_predicts_stays_the_last_where_others_go(tmp_path: Path) -> None:
    kind, config = NAMED["deepseek v3"]
    further(made(tmp_path / "plain", kind, config()), tmp_path / "model", "model.layers.2.")
    state = open_model(str(tmp_path / "model")).state
    after = Edit(drop_layers=(0,)).foresee(replaced(state))
    assert torch.equal(after.dense.read("model.layers.1.eh_proj.weight"), state.dense.read("model.layers.2.eh_proj.weight"))
    assert not any(spec.name.startswith("model.layers.2.") for spec in after.specs)


def replaced(state: State) -> State:
    """The same, its first layer no other than the second."""
    state.config.first_k_dense_replace = 0
    return state


# --- matrices that no table names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(NAMED, "deberta"))
def test_architectures_with_names_of_their_own(name: str, text: Path, tmp_path: Path) -> None:
    kind, config = NAMED[name]
    source = made(tmp_path / "model", kind, config())
    done = ran(tmp_path / "run", source, text, "compressed_tensors", "native")
    assert set(done.state.codes) == {site.name for site in done.state.graph.linear}
    ways = {"compressed_tensors": stock(kind), "native": packed}
    if name == "modernbert":  # its own code asks packed modules for their weight
        ways["compressed_tensors"] = packed
    same_as_its_matrices(done, source, kind, ways)


def test_what_reads_the_narrow_vectors_of_mla_waits_for_them(tmp_path: Path) -> None:
    graph = open_model(str(made(tmp_path, *(x if i == 0 else x() for i, x in enumerate(NAMED["deepseek v3"]))))).graph
    keys = {s.role: s.input_key for s in graph.of_block(0)}
    assert [keys[r] for r in ("q_a", "kv_a", "q_b", "kv_b", "o")] == ["attn.in", "attn.in", "attn.q", "attn.kv", "attn.out"]
    assert ("q_a", "kv_a") in [tuple(s.role for s in group) for group in graph.fused()]


def test_experts_of_another_layout_stay_and_the_user_is_told(tmp_path: Path) -> None:
    model = open_model(str(made(tmp_path, *(x if i == 0 else x() for i, x in enumerate(NAMED["gpt-oss"])))))
    assert model.graph.left == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert any("2 modules of experts" in remark for remark in model.remarks)


UNNAMED = transformers.MPNetConfig(**SMALL, pad_token_id=1)


@pytest.mark.slow
def test_the_line_that_is_offered_leaves_what_nobody_knows(text: Path, tmp_path: Path) -> None:
    source = made(tmp_path / "model", transformers.MPNetModel, UNNAMED)
    with pytest.raises(CompressError, match="cannot tell what these compute") as caught:
        ran(tmp_path / "run", source, text, "native")
    offered = yaml.safe_load(str(caught.value).rpartition("put into the recipe: ")[2])
    done = ran(tmp_path / "run", source, text, "compressed_tensors", "native", **offered)
    assert set(done.state.codes) == {f"layers.{i}.mlp.{role}" for i in range(2) for role in ("up", "down")}
    same_as_its_matrices(
        done, source, transformers.MPNetModel, {"compressed_tensors": stock(transformers.MPNetModel), "native": packed}
    )
    for folder, _ in done.artifacts.values():  # nothing of the recipe is needed to read them
        assert main(["inspect", str(folder)]) == 0


@pytest.mark.slow
def test_a_recipe_leaves_matrices_that_have_names(family: Any, text: Path, tmp_path: Path) -> None:
    plain = ran(tmp_path / "a", family("llama"), text, "gptq")
    left = ran(tmp_path / "b", family("llama"), text, "compressed_tensors", "gptq", "gguf", "native", leave=["*.o_proj"])
    assert set(plain.state.codes) - set(left.state.codes) == {"layers.0.attn.o", "layers.1.attn.o"}
    assert left.state.graph.left == ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    for folder, _ in left.artifacts.values():
        assert main(["inspect", str(folder)]) == 0
    same_as_its_matrices(
        left, family("llama"), transformers.LlamaForCausalLM, {"compressed_tensors": stock(transformers.LlamaForCausalLM)}
    )


def test_what_vllm_joins_is_left_together(family: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CompressError, match=r"vLLM joins 'model\.layers\.0\.self_attn\.k_proj', which 'leave' keeps as it is, with"
    ):
        ran(tmp_path, family("llama"), text, "compressed_tensors", leave=["*.k_proj"])


@pytest.mark.parametrize(("pattern", "says"), [
    ("*.q_prj", r"leave: pattern '\*.q_prj' matched no matrix in a layer.  Nearest: 'model.layers.\d.self_attn.q_proj'"),
    ("lm_head", "leave: pattern 'lm_head' matched no matrix in a layer"),
])  # fmt: skip
def test_a_pattern_that_leaves_nothing(family: Any, text: Path, tmp_path: Path, pattern: str, says: str) -> None:
    with pytest.raises(CompressError, match=rf"recipe.yaml:\d+:\d+  {says}"):
        ran(tmp_path, family("llama"), text, "native", leave=[pattern])


def test_experts_are_kept_by_a_pin(family: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"keep them as they are by a pin: \"layers.0.experts.\*\": bf16"):
        ran(tmp_path, family("mixtral"), text, "native", leave=["*.mlp.experts"])


@pytest.mark.slow
def test_a_native_artifact_says_by_which_classes_it_loads(family: Any, text: Path, tmp_path: Path) -> None:
    folder, _ = ran(tmp_path, family("llama"), text, "native").artifacts["native"]
    assert runtime.load(folder) is not None
    with pytest.raises(CompressError, match="told by transformers' Auto classes only"):
        transformers.LlamaForCausalLM.from_pretrained(folder)
