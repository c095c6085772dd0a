"""An artifact is what we say: stock transformers computes with it exactly what our dequantized weights give, to the bit.

The peer of every comparison is the original model in transformers with our dequantized matrices put in.
"""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.errors import CompressError, ExportError, ModelError
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK
from compress.export.compressed_tensors import exporter as ct
from compress.export.compressed_tensors import reader as compressed_tensors_reader
from compress.export.native.exporter import Native
from compress.formats import Int
from compress.model.model import open_model
from compress.state import State
from compress.state.checkpoint import INDEX
from compress.state.graph import Graph
from tests import stock
from tests.conftest import FAMILIES, GROUPED, IDS, KINDS_OF_FAMILIES, SMALL, covered, make_model, rare
from tests.cooking import bake, cook, recipe, steps
from tests.sharing import SharingConfig

MOE = ("mixtral", "qwen3_moe")
MIXED = {"layers.0.attn.[qkv]*": "int3:g32", "*.attn.o": "int6:g16", "*.down": "int5:g32", "layers.1.mlp.*": "int8:channel"}
EXPERTS = {"*.attn.*": "int8:g32"}  # stock transformers reads all experts with one scheme
ALL = covered(FAMILIES, *KINDS_OF_FAMILIES)
LOADABLE = [f for f in FAMILIES if f != "gpt2"]


def pins_of(name: str) -> dict[str, str]:
    return EXPERTS if name in MOE else MIXED


def ids() -> list[Tensor]:
    return [torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(7))]


def dequantized(source: Path, state: State, **options: Any) -> Any:
    """The original in transformers, every changed matrix replaced by what ours dequantizes to."""
    model = stock.load(source, **options)
    stock.substitute(model, state.graph, {name: state.weight(state.graph[name]) for name in state.codes})
    return model


def exact(artifact: Path, source: Path, state: State, **options: Any) -> None:
    """Stock transformers loads the artifact, and its logits are those of the dequantized weights, and no others."""
    ours = stock.logits(dequantized(source, state, **options), ids())[0]
    theirs = stock.logits(stock.load(artifact, **options), ids())[0]
    original = stock.logits(stock.load(source, **options), ids())[0]
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, original)


@pytest.fixture(scope="module")
def cooked(baked: Any) -> Callable[[str], pipeline.Outcome]:
    """cooked(family) -> what a run with mixed formats made of it, once."""
    return lambda name: baked(name, "compressed_tensors", steps("int4:g32", pins=pins_of(name)))


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["compressed_tensors"][0]


# --- stock transformers loads it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(LOADABLE, "llama", "phi3"))
def test_stock_transformers_computes_what_the_dequantized_weights_give(cooked: Any, family: Any, name: str) -> None:
    made = cooked(name)
    exact(artifact_of(made), family(name), made.state)
    proof = made.artifacts["compressed_tensors"][1]
    assert proof.engine == "transformers"
    assert proof.difference == 0


@pytest.mark.slow
def test_experts_are_exact_in_the_stock_loop_as_well(cooked: Any, family: Any) -> None:
    exact(artifact_of(cooked("mixtral")), family("mixtral"), cooked("mixtral").state, **stock.EAGER)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_precisions(family: Any, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    source = family("llama", dtype)
    made = cook(tmp_path, source, text, method="rtn", format="int4:g32", pins=MIXED)
    exact(artifact_of(made), source, made.state)
    scale = torch.float16 if dtype == torch.float16 else torch.bfloat16
    held = load_file(artifact_of(made) / "model.safetensors")
    assert {t.dtype for n, t in held.items() if n.endswith("_scale")} == {scale}
    assert held["model.norm.weight"].dtype == dtype


def test_every_bit_width_and_group_in_one_model(family: Any, text: Path, tmp_path: Path) -> None:
    pins = {"layers.0.attn.[qkv]": "int2:g16", "layers.0.attn.o": "int3:channel", "layers.0.mlp.[gu]*": "int4:g64",
            "layers.0.mlp.down": "int5:g128", "layers.1.attn.[qkv]": "int6:g32", "layers.1.attn.o": "int7:g16",
            "layers.1.mlp.[gu]*": "int8:g64", "layers.1.mlp.down": "int3:g64"}  # fmt: skip
    made = cook(tmp_path, family("llama"), text, method="rtn", pins=pins, format="bf16")
    assert len({made.state.format(s) for s in made.state.graph.linear}) == 8
    exact(artifact_of(made), family("llama"), made.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_an_untied_head_can_be_quantized(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    made = cook(tmp_path, family(name, blocks=1), text, method="rtn", format="int4:g32", pins={"lm_head": "int8:g32"})
    assert str(made.state.format(made.state.graph["lm_head"])) == "int8:g32"
    exact(artifact_of(made), family(name, blocks=1), made.state)
    stem = made.state.graph["lm_head"].stem
    assert (
        f"{stem}.weight_packed"
        in open_model(str(family(name, blocks=1))).checkpoint.specs
        | compressed_tensors_reader.open_artifact(artifact_of(made)).checkpoint.specs
    )


def test_a_tied_head_is_quantized_elsewhere(family: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="look rows up in dense tables only; export native, onnx or gguf, or put 'edit: "):
        cook(tmp_path, family("qwen2"), text, method="rtn", format="int4:g32", pins={"lm_head": "int8:g32"})


@pytest.mark.slow
def test_a_matrix_may_be_pinned_to_another_precision(family: Any, text: Path, tmp_path: Path) -> None:
    pins = {"layers.0.attn.[qkv]": "fp16", "lm_head": "fp32"}
    made = cook(tmp_path, family("llama"), text, method="rtn", format="int4:g32", pins=pins)
    exact(artifact_of(made), family("llama"), made.state)
    held = load_file(artifact_of(made) / "model.safetensors")
    assert held["lm_head.weight"].dtype == torch.float32
    assert held["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float16


@pytest.mark.slow
def test_parts_of_a_model_may_stay_as_they_are(family: Any, text: Path, tmp_path: Path) -> None:
    made = cook(tmp_path, family("llama"), text, method="rtn", format="int4:g32", pins={"layers.0.*": "bf16"})
    assert all(n.startswith("layers.1.") for n in made.state.codes)
    exact(artifact_of(made), family("llama"), made.state)


@pytest.mark.slow
def test_experts_kept_in_one_tensor_on_disk(family: Any, text: Path, tmp_path: Path) -> None:
    """A checkpoint whose experts are joined is written expert by expert, as engines want them."""
    source = shutil.copytree(family("qwen3_moe"), tmp_path / "joined")
    tensors = load_file(source / "model.safetensors")
    for i in range(2):
        at = f"model.layers.{i}.mlp.experts"
        one = lambda e, n, at=at: tensors.pop(f"{at}.{e}.{n}.weight")  # noqa: E731
        tensors[f"{at}.gate_up_proj"] = torch.stack([torch.cat([one(e, "gate_proj"), one(e, "up_proj")]) for e in range(4)])
        tensors[f"{at}.down_proj"] = torch.stack([one(e, "down_proj") for e in range(4)])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    made = cook(tmp_path / "run", source, text, method="rtn", format="int4:g32", pins=EXPERTS)
    exact(artifact_of(made), family("qwen3_moe"), made.state)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() for n, t in tensors.items()}


def wide_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.float() if "norm" in n else t for n, t in tensors.items()}


def bare_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("model."): t for n, t in tensors.items()}


def leftovers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the tied head and a table of rotary frequencies, as older versions of transformers wrote them."""
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    return tensors | extra


@pytest.mark.parametrize(
    ("name", "make"), [("llama", wide), rare("llama", wide_norms), rare("llama", bare_names), rare("qwen2", leftovers)]
)
def test_checkpoints_of_other_makes(family: Any, text: Path, tmp_path: Path, name: str, make: Any) -> None:
    """fp32 under a bf16 config, norms in fp32, names without the base prefix, tensors that are no longer written."""
    source = shutil.copytree(family(name), tmp_path / "model")
    save_file(make(load_file(source / "model.safetensors")), source / "model.safetensors", {"format": "pt"})
    made = cook(tmp_path / "run", source, text, method="rtn", format="int4:g32", pins=MIXED)
    exact(artifact_of(made), source, made.state)
    same_bytes(pipeline.plan(tmp_path / "run" / "recipe.yaml"), made)


def test_an_artifact_is_no_source(cooked: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is quantized already \(compressed-tensors\); name the original model"):
        cook(tmp_path, artifact_of(cooked("llama")), text, method="rtn", format="int4:g32")


@pytest.mark.slow
def test_small_shards_load(family: Any, text: Path, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 8000
    source = make_model(tmp_path / "model", config)
    made = cook(tmp_path / "run", source, text, exports={"shard_bytes": 1_000_000}, method="rtn", format="int4:g32")
    files = sorted(p.name for p in artifact_of(made).glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    exact(artifact_of(made), source, made.state)


# --- what stock transformers cannot load ------------------------------------------------------------------------------


def test_conv1d_runs_in_our_runtime_and_the_plan_warns_of_stock(cooked: Any, family: Any, text: Path, tmp_path: Path) -> None:
    """compressed-tensors passes over Conv1D: transformers then keeps random weights and tells so only in its log."""
    made = cooked("gpt2")
    artifact, proof = made.artifacts["compressed_tensors"]
    assert (proof.engine, proof.greedy) == ("compress runtime", 16)
    planned = pipeline.plan(recipe(tmp_path, family("gpt2"), text, method="rtn", format="int4:g32"))
    for said in (proof.remark, *planned.remarks):
        assert "'gpt2' keeps its matrices in Conv1D modules" in said
    read_back(artifact, made.state)
    _, report = transformers.GPT2LMHeadModel.from_pretrained(artifact, output_loading_info=True)
    assert "transformer.h.0.attn.c_attn.weight" in report["missing_keys"], "no longer so: the remark can go"
    assert "transformers" not in next(line for line in (artifact / "README.md").read_text().splitlines() if "Loads in" in line)


@pytest.mark.slow
def test_asymmetric_formats_run_in_our_runtime_and_the_plan_warns_of_stock(family: Any, text: Path, tmp_path: Path) -> None:
    made = cook(tmp_path, family("llama"), text, format="int4:g32:asym", pins={"*.down": "int3:g64:asym", "*.o": "int8:g32"})
    artifact, proof = made.artifacts["compressed_tensors"]
    assert (proof.engine, proof.difference) == ("compress runtime", 0.0)
    assert proof.greedy
    assert "runtime.load(" in (artifact / "README.md").read_text()
    planned = pipeline.plan(tmp_path / "recipe.yaml")
    for said in (proof.remark, *planned.remarks):
        assert "asymmetric formats" in said
    read_back(artifact, made.state)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        stock.load(artifact)


def read_back(artifact: Path, state: State) -> None:
    """Our reader gives every matrix and every other tensor of the run back, from the artifact alone."""
    again = compressed_tensors_reader.read(artifact)
    assert set(again.codes) == set(state.codes)
    for site in state.graph:
        assert torch.equal(again.weight(again.graph[site.name]), state.weight(site)), site.name
    for name in state.graph.parameters:
        assert torch.equal(again.dense.read(name), state.dense.read(name)), name


@pytest.mark.parametrize("name", covered(FAMILIES, "llama", "gpt2", "mixtral"))
def test_our_reader_gives_everything_back(cooked: Any, name: str) -> None:
    read_back(artifact_of(cooked(name)), cooked(name).state)


@pytest.mark.slow
def test_an_architecture_that_stock_fails_on_is_kept_and_said_so(text: Path, tmp_path: Path) -> None:
    """Falcon's own Linear reads its `weight`, which a packed module lacks; vLLM has its own code for it."""
    plain = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    source = make_model(tmp_path / "model", transformers.FalconConfig(**plain, **IDS))
    made = cook(tmp_path / "run", source, text, method="rtn", format="int4:g32")
    artifact, proof = made.artifacts["compressed_tensors"]
    assert proof.engine == "our own reader"
    assert "FalconForCausalLM fails on it" in proof.remark
    assert "transformers" not in next(line for line in (artifact / "README.md").read_text().splitlines() if "Loads in" in line)


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_vllm_is_named_where_a_model_predicts_the_next_token(cooked: Any, name: str) -> None:
    """It does not find the attention of RoBERTa."""
    made = cooked(name)
    said = ct.CompressedTensors().remarks(made.state)
    card = (artifact_of(made) / "README.md").read_text()
    assert ("vLLM" in said[0], "vLLM" in card, "vllm serve" in card) == (name != "roberta",) * 3


# --- the config -------------------------------------------------------------------------------------------------------


def hits(target: str, name: str) -> bool:
    return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name


def module_names(graph: Graph, site: str) -> set[str]:
    """Under which names engines ask about a site's module: in the module tree, and on disk."""
    found = graph[site]
    path = f"{found.module}.{found.expert}.{found.role}_proj" if found.expert is not None else found.module
    return {path, found.stem}


@pytest.mark.parametrize("name", ALL)
def test_every_quantized_module_is_named_by_exactly_one_target_and_no_other_is(cooked: Any, name: str) -> None:
    made = cooked(name)
    config = json.loads((artifact_of(made) / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    targets = [t for g in groups for t in g["targets"]]
    assert len(set(targets)) == len(targets)
    for site in made.state.graph:
        fmt = made.state.format(site)
        for module in module_names(made.state.graph, site.name):
            named = [g["weights"] for g in groups for t in g["targets"] if hits(t, module)]
            if not isinstance(fmt, Int):
                assert not named, module
            elif site.expert is not None or module == site.module:
                assert [(w["num_bits"], w["group_size"], w["symmetric"]) for w in named] == [(fmt.bits, fmt.group, fmt.symmetric)]
    assert not any(hits(t, i) for t in targets for i in config["ignore"])


@pytest.mark.parametrize("name", ALL)
def test_every_quantized_module_is_named_in_the_model_without_a_head_too(cooked: Any, family: Any, name: str) -> None:
    """And under `model`, which is vLLM's name for the model without a head, whatever its own is."""
    made = cooked(name)
    groups = json.loads((artifact_of(made) / "config.json").read_text())["quantization_config"]["config_groups"].values()
    prefix = stock.load(family(name)).base_model_prefix
    for site in made.state.graph:
        fmt = made.state.format(site)
        if isinstance(fmt, Int) and site.block is not None:
            module = site.module if site.expert is None else f"{site.module}.{site.expert}.{site.role}_proj"
            assert module.startswith(f"{prefix}.")
            for path in (bare := module.removeprefix(f"{prefix}."), f"model.{bare}"):
                named = [g["weights"] for g in groups for t in g["targets"] if hits(t, path)]
                assert [(w["num_bits"], w["group_size"], w["symmetric"]) for w in named] == [(fmt.bits, fmt.group, fmt.symmetric)]


@pytest.mark.parametrize("name", ["llama", "roberta", "mixtral", "opt"])
def test_every_matrix_module_that_keeps_its_weights_is_ignored(cooked: Any, family: Any, name: str) -> None:
    """vLLM raises for a linear module that is neither targeted nor ignored."""
    config = json.loads((artifact_of(cooked(name)) / "config.json").read_text())["quantization_config"]
    targets = [t for g in config["config_groups"].values() for t in g["targets"]]
    for path, module in stock.load(family(name)).named_modules():
        if isinstance(module, torch.nn.Linear):
            assert path in config["ignore"] or any(hits(t, path) for t in targets), path
    if name == "mixtral":
        assert "model.layers.0.block_sparse_moe.gate" in config["ignore"]


@pytest.mark.parametrize(
    ("name", "pins", "says"),
    [
        (
            "llama",
            {"*.q": "int8:g32"},
            "vLLM joins q,k,v into one matrix and needs one format for them, here layers.0.attn.q int8:g32",
        ),
        ("llama", {"layers.1.attn.v": "bf16"}, "layers.1.attn.v as it is"),
        ("llama", {"layers.0.mlp.up": "int4:g64"}, "vLLM joins gate,up into one matrix"),
        (
            "mixtral",
            {"*.experts.2.down": "int8:g32"},
            "vLLM joins experts of one block into one matrix and needs one format for them, here "
            "layers.0.experts.0.gate int4:g32, layers.0.experts.2.down int8:g32;",
        ),
    ],
)
def test_formats_that_split_what_engines_join_are_refused_before_the_run(
    family: Any, text: Path, tmp_path: Path, name: str, pins: dict[str, str], says: str
) -> None:
    with pytest.raises(ExportError) as caught:
        pipeline.plan(recipe(tmp_path, family(name), text, method="rtn", format="int4:g32", pins=pins))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert re.match(r".*recipe\.yaml:\d+:\d+ ", str(caught.value))


@pytest.mark.slow
def test_experts_of_different_blocks_may_differ_and_the_plan_says_who_can_read_that(
    family: Any, text: Path, tmp_path: Path
) -> None:
    pins = {"layers.1.experts.*": "int8:g32"}
    made = cook(tmp_path, family("mixtral"), text, method="rtn", format="int4:g32", pins=pins)
    assert "experts of different formats" in made.artifacts["compressed_tensors"][1].remark
    read_back(artifact_of(made), made.state)


@pytest.mark.parametrize(("steps", "says"), [
    ({"quantize": {"format": "nf3:g64", "method": "rtn"}},
     "compressed_tensors holds integers; 'layers.0.attn.q' has nf3:g64: export native instead, or use int formats only"),
    ({"quantize": {"format": "int4:g32", "method": "rtn", "pins": {"*.down": "lut2:g32:shared"}}},
     "compressed_tensors holds integers; 'layers.0.mlp.down' has lut2:g32:shared: export native instead"),
    ({"lqlora": {"format": "nf4:g32", "rank": 4}}, "compressed_tensors holds integers; 'layers.0.attn.q' has nf4:g32"),
    ({"lqlora": {"format": "int4:g32", "rank": 4, "factors": "int8:channel"}},
     "'layers.0.attn.q' has int4:g32+r4:int8:channel, and a PEFT adapter keeps factors in 16 or 32 bits; write int4:g32+r4"),
    ({"lqlora": {"format": "int4:g32", "rank": 4, "pins": {"layers.1.attn.k": "int5:g32+r4"}}},
     "vLLM joins q,k,v into one matrix and needs one format for them, here layers.1.attn.q int4:g32, layers.1.attn.k int5:g32"),
])  # fmt: skip
def test_what_integers_or_adapters_cannot_hold_is_refused_before_the_run(
    family: Any, text: Path, tmp_path: Path, steps: dict[str, Any], says: str
) -> None:
    with pytest.raises(ExportError) as caught:
        bake(tmp_path, family("llama"), text, "compressed_tensors", steps)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert re.match(r".*recipe\.yaml:\d+:\d+ ", str(caught.value))
    assert not (tmp_path / "out").exists()


def test_experts_with_factors_are_refused(family: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"'layers.0.experts.0.gate' has int4:g32\+r4, and PEFT has no adapter for single experts"
    ):
        bake(tmp_path, family("mixtral"), text, "compressed_tensors", {"lqlora": {"format": "int4:g32", "rank": 4}})


@pytest.mark.parametrize("kind", covered([ct.CompressedTensors, Native], ct.CompressedTensors))
def test_a_matrix_whose_tensors_fall_into_two_files_is_read(cooked: Any, family: Any, tmp_path: Path, kind: Any) -> None:
    """A shard may end between a matrix's codes and its scales."""
    made, exporter = cooked("llama"), kind.model_construct(shard_bytes=3000)
    job = Job(open_model(str(family("llama"))), made.state, ids()[0], "key", lambda facts: "")
    files = exporter.layout(job.model, made.state).files
    assert any(a.specs[-1].name.endswith("_packed") for a in files)
    exporter.write(job, tmp_path)
    assert exporter.prove(job, tmp_path).difference == 0


@pytest.mark.slow
def test_the_dtype_is_written_where_the_source_leaves_it_out(family: Any, text: Path, tmp_path: Path) -> None:
    """Else readers would take that of the first number in the file, which may be a scale."""
    source = shutil.copytree(family("llama", torch.float32, 1), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    made = cook(tmp_path / "run", source, text, method="rtn", format="int4:g32", pins={"lm_head": "int8:g32"})
    assert json.loads((artifact_of(made) / "config.json").read_text())["dtype"] == "float32"
    exact(artifact_of(made), source, made.state)


@pytest.mark.slow
def test_a_matrix_that_serves_two_modules_is_refused(text: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", SharingConfig(**SMALL, **GROUPED, **IDS, tie_word_embeddings=True))
    with pytest.raises(ExportError, match=r"'layers.0.attn.k' is one matrix for 2 modules .*v_proj.*pin it to bf16"):
        cook(tmp_path / "run", source, text, method="rtn", format="int4:g32")
    pins = {"*.attn.[qk]": "bf16"}
    made = cook(tmp_path / "run", source, text, method="rtn", format="int4:g32", pins=pins)
    exact(artifact_of(made), source, made.state)


# --- what else lies in the folder -------------------------------------------------------------------------------------


def test_everything_else_is_carried_over(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("opt", blocks=1), tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"max_length": 77, "eos_token_id": 257}))
    (source / "README.md").write_text("the original's card")
    artifact = artifact_of(cook(tmp_path / "run", source, text, method="rtn", format="int4:g32"))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (artifact / name).read_bytes() == (source / name).read_bytes()
    assert "the original's card" not in (artifact / "README.md").read_text()
    words = "the cat sat on seven hills"
    old, new = (transformers.AutoTokenizer.from_pretrained(f) for f in (source, artifact))
    assert old(words) == new(words)
    config, was = (json.loads((f / "config.json").read_text()) for f in (artifact, source))
    assert config.pop("quantization_config")
    assert config == was
    before, after = (load_file(f / "model.safetensors") for f in (source, artifact))
    kept = [n for n in before if n in after]
    assert sum(n.endswith("bias") for n in kept) == sum(n.endswith("bias") for n in before) > 0
    assert all(torch.equal(before[n], after[n]) for n in kept)
    assert set(before) - set(kept) == {s.weight for s in open_model(str(source)).graph.linear}


def test_the_source_is_left_as_it_was(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("llama", blocks=1), tmp_path / "model")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    cook(tmp_path / "run", source, text, method="rtn", format="int4:g32")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before


# --- law 1: the plan is the file --------------------------------------------------------------------------------------

RECIPES: dict[str, dict[str, Any]] = {
    "asymmetric": {"format": "int3:g16:asym"},
    "channel": {"format": "int5:channel"},
    "partly": {"format": "int4:g32", "pins": {"layers.1.*": "bf16"}},
}


@pytest.mark.parametrize("name", ALL)
def test_planned_bytes_are_written_bytes(cooked: Any, name: str) -> None:
    made = cooked(name)
    same_bytes(pipeline.plan(made.out.parent / "recipe.yaml"), made)


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=() if i == j else pytest.mark.slow)
    for i, name in enumerate(("llama", "qwen2", "gpt2", "mixtral")) for j, kind in enumerate((*RECIPES, "mixed"))
])  # fmt: skip
def test_planned_bytes_of_other_formats_are_written_bytes(family: Any, tmp_path: Path, name: str, kind: str) -> None:
    """Planned before anything is there."""
    options = RECIPES.get(kind, {"format": "int4:g32", "pins": pins_of(name)})
    path = recipe(tmp_path, family(name), exports={"shard_bytes": 1_000_000}, method="rtn", clip="minmax", **options)
    planned = pipeline.plan(path)
    made = pipeline.run(path)
    same_bytes(planned, made)


def same_bytes(planned: pipeline.Planned, made: pipeline.Outcome) -> None:
    layout, artifact = planned.layouts["compressed_tensors"], artifact_of(made)
    assert {f.name: f.nbytes for f in layout.files} == {p.name: p.stat().st_size for p in artifact.glob("*.safetensors")}
    index = artifact / INDEX
    assert ((INDEX, index.read_bytes()) if index.exists() else None) == layout.index
    assert layout.nbytes == sum(p.stat().st_size for p in artifact.iterdir() if "safetensors" in p.name)
    state = made.state
    formats = {n: state.format(state.graph[n]) for n in state.codes}
    untouched = [s for s in planned.original.files[0].specs if s.name not in {state.graph[n].weight for n in formats}]
    changed = sum(f.nbytes(state.graph[n].shape) for n, f in formats.items() if f)
    assert layout.tensor_bytes == changed + sum(s.nbytes for s in untouched)
    for file in artifact.glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            assert list(held.offset_keys()) == [s.name for f in layout.files if f.name == file.name for s in f.specs]


@pytest.mark.slow
def test_planned_shards_are_written_shards(text: Path, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 8000
    source = make_model(tmp_path / "model", config)
    path = recipe(tmp_path / "run", source, text, exports={"shard_bytes": 1_000_000}, method="rtn", format="int4:g32")
    planned, made = pipeline.plan(path), pipeline.run(path)
    same_bytes(planned, made)
    assert len(planned.layouts["compressed_tensors"].files) == 3


def test_a_config_alone_is_planned_to_the_byte(family: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(family("mixtral") / "config.json", bare)
    planned = [
        pipeline.plan(recipe(tmp_path / str(m), m, method="rtn", pins=EXPERTS, format="int4:g32"))
        for m in (bare, family("mixtral"))
    ]
    assert planned[0].layouts["compressed_tensors"].tensor_bytes == planned[1].layouts["compressed_tensors"].tensor_bytes
    assert any("holds no weights" in r for r in planned[0].remarks)


# --- an artifact proves itself ----------------------------------------------------------------------------------------


@pytest.fixture
def proving(cooked: Any, family: Any, tmp_path: Path) -> Any:
    """prove(change, name='llama', tokens=True): write the artifact anew, let `change` damage its tensors, prove it."""

    def prove(change: Callable[[dict[str, Tensor]], None], name: str = "llama", tokens: bool = True) -> Any:
        exporter = ct.CompressedTensors()
        job = Job(open_model(str(family(name))), cooked(name).state, ids()[0] if tokens else None, "key", lambda facts: "")
        folder = tmp_path / "artifact"
        folder.mkdir()
        exporter.write(job, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return exporter.prove(job, folder)

    return prove


Q = "model.layers.1.self_attn.q_proj"


def flip(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_packed"][3, 2] ^= 1 << 9


def rescale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_scale"][0, 0] *= 2


def drop(tensors: dict[str, Tensor]) -> None:
    for suffix in ("packed", "scale", "shape"):
        del tensors[f"{Q}.weight_{suffix}"]
    tensors[f"{Q}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)


def renorm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] *= 1.5


def test_an_intact_artifact_proves_itself(proving: Any) -> None:
    assert proving(lambda tensors: None).difference == 0


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize(("change", "says"), [
    (flip, "'layers.1.attn.q': weight_packed on disk differs"),
    (rescale, "'layers.1.attn.q': weight_scale on disk differs"),
    (drop, "'layers.1.attn.q': weight_packed on disk differs"),
])  # fmt: skip
def test_damage_to_codes_or_scales_is_caught(proving: Any, change: Any, says: str, tokens: bool) -> None:
    with pytest.raises(ExportError, match=re.escape(says)):
        proving(change, tokens=tokens)


@pytest.mark.parametrize("tokens", [True, False])
def test_damage_to_what_was_not_quantized_is_caught(proving: Any, tokens: bool) -> None:
    with pytest.raises(ExportError, match=r"'model\.norm\.weight' on disk differs"):
        proving(renorm, tokens=tokens)


def test_a_config_that_contradicts_the_tensors_is_caught(cooked: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact_of(cooked("llama")), tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [target.replace(r"self_attn\.q_proj|", "") for target in group["targets"]]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / MARK).unlink()  # which would notice first
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.self_attn\.q_proj' is packed, but no target"):
        compressed_tensors_reader.read(folder)


def test_an_artifact_that_fails_its_proof_is_not_kept(
    family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in packing, planted: what lies at the final name is a proven artifact or nothing."""
    written = ct.tensors

    def wrong(state: State) -> Any:
        for name, tensor in written(state):
            yield name, -tensor if name == f"{Q}.weight_scale" else tensor

    monkeypatch.setattr(ct, "tensors", wrong)
    with pytest.raises(ExportError, match=r"'layers\.1\.attn\.q': weight_scale on disk differs"):
        cook(tmp_path, family("llama"), text, method="rtn", format="int4:g32")
    assert not (tmp_path / "out" / "compressed_tensors").exists()
    monkeypatch.undo()
    assert (artifact_of(pipeline.run(tmp_path / "recipe.yaml")) / MARK).exists()


# --- damaged sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bad"), [
    (f"{Q}.weight", float("nan")), ("model.layers.0.input_layernorm.weight", float("inf")), ("lm_head.weight", float("-inf")),
])  # fmt: skip
def test_a_weight_that_is_no_number_is_named(family: Any, text: Path, tmp_path: Path, name: str, bad: float) -> None:
    source = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError) as caught:
        cook(tmp_path / "run", source, text, method="rtn", format="int4:g32")
    assert isinstance(caught.value, ModelError)
    where = f"{source / 'model.safetensors'}: '{name}'"
    assert str(caught.value) == f"{where} holds NaN or infinite values, or such of 1e19 and more; the model is damaged"
