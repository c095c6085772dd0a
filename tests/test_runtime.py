"""Artifacts in transformers with their matrices packed: what they compute, what they keep, and what is refused."""

from __future__ import annotations

import doctest
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers import auto

import compress.export.runtime as runtime
from compress import pipeline
from compress.errors import CompressError, ModelError
from compress.export.artifact import config as artifact_config
from compress.export.artifact import files as artifact_files
from compress.export.artifact.proof import logits
from compress.export.compressed_tensors import reader as compressed_reader
from compress.export.native import reader
from compress.export.runtime import loading, reading
from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.experts import PackedExperts
from compress.export.runtime.linear import Packed, PackedLinear
from compress.formats import Dense, parse
from compress.formats.grid import plain
from compress.state import State
from compress.state.checkpoint import OWN_INDEX
from tests.conftest import FAMILIES, ROOT, covered, make_model, rare
from tests.cooking import KINDS, bake, steps
from tests.nursery import Nursery
from tests.test_native import told

MIXED = {"*.up": "int4:g32", "*.o": "lut3:g32", "*.down": "int3:g64:asym", "layers.0.*.o": "fp16"}
SEPARATE = {"*.q": "int4:channel", "*.v": "nf3:g32:dq8x16"}  # where there are such
JOINED = {"*.qkv": "nf3:g32:dq8x16"}
RANKED = {"*.up": "int3:g64+r4", "layers.0.*.o": "nf4:g64+r2:int8:channel", "layers.1.*.o": "lut2:g32+r4:fp32",
          "*.down": "int5:channel:asym+r1"}  # fmt: skip
ROLES = {"phi3": {"*.gate_up": "int4:g32", "*.o": "lut3:g32", "*.down": "int3:g64:asym", **JOINED}, "gpt2": MIXED | JOINED,
         "gpt_neox": MIXED | JOINED}  # fmt: skip
TIGHT, LOOSE = 1e-4, 2e-2  # of the largest logit: in fp32, in bf16
FILE = "compress-00001.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def ids(count: int = 20) -> Tensor:
    return torch.randint(0, 256, (2, count), generator=torch.Generator().manual_seed(7))


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return next(iter(outcome.artifacts.values()))[0]


@pytest.fixture(scope="module")
def folder_of(baked: Any) -> Callable[..., Path]:
    """folder_of(family, format, pins, exporter) -> the artifact's folder, made once."""

    def get(name: str, form: str = "int6:g32", pins: Any = None, exporter: str = "native") -> Path:
        pins = ROLES.get(name, MIXED | SEPARATE) if pins is None else pins
        return artifact_of(baked(name, exporter, steps(form, pins=pins)))

    return get


@pytest.fixture
def copy(folder_of: Any, tmp_path: Path) -> Path:
    """A llama's artifact, to damage."""
    shutil.copytree(folder_of("llama"), tmp_path / "intact")
    return Path(shutil.copytree(folder_of("llama"), tmp_path / "artifact"))


def packed(model: nn.Module) -> dict[str, Packed]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Packed)}


def off(folder: Path, state: State, dtype: torch.dtype, model: Any = None) -> float:
    """How far the runtime's logits are from the streamed ones, as a share of the largest."""
    model = model or runtime.load(folder, dtype=dtype)
    with torch.no_grad():
        found = model(input_ids=ids()).logits.float()
    (wanted,) = logits(replace(state, dtype=dtype), [ids()], "cpu")
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(FAMILIES, "llama"))
def test_every_family(mixed: Any, name: str) -> None:
    """With formats of every kind among its matrices."""
    folder = artifact_of(mixed(name))
    state = replace(reader.read(folder), dtype=torch.float32)
    model = runtime.load(folder, dtype=torch.float32)
    assert off(folder, state, torch.float32, model) < TIGHT
    formats = [state.format(s) for s in state.graph if s.name in state.codes]
    assert sorted(m.format for m in packed(model).values()) == sorted(str(f) for f in formats if not isinstance(f, Dense))
    if state.graph.causal:
        text = model.generate(ids()[:1], max_new_tokens=8, do_sample=False, pad_token_id=258)
        (path,) = logits(state, [text], "cpu")
        assert torch.equal(path[0, 19:-1].argmax(-1), text[0, 20:])


@pytest.mark.parametrize("name", covered(["llama", "gpt2", "qwen3_moe"], "llama", "gpt2"))
def test_in_16_bits(mixed: Any, tmp_path: Path, name: str) -> None:
    """Experts are all asked: else a router rounded otherwise on another machine chooses another one, and all is different."""
    folder = shutil.copytree(artifact_of(mixed(name)), tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    if "num_local_experts" in config:
        (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": config["num_local_experts"]}))
        (folder / artifact_files.MARK).unlink()
    assert off(folder, reader.read(folder), torch.bfloat16) < LOOSE


def test_every_kind_of_format(mixed: Any) -> None:
    """In one model of each of the two halves of KINDS; every matrix by itself is what the format says, to the bit."""
    found = set()
    for folder in (artifact_of(mixed("llama")), artifact_of(mixed("llama", 14, lm_head="nf4:g64:dq8x256"))):
        state = replace(reader.read(folder), dtype=torch.float32)
        model = runtime.load(folder, dtype=torch.float32)
        assert off(folder, state, torch.float32, model) < TIGHT
        for site in state.graph.linear:
            module = model.get_submodule(site.module)
            assert torch.equal(module.weight, state.weight(site)), site.name
            found.add(str(state.format(site) or "bf16"))
    assert found == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("form", KINDS)
def test_a_model_of_one_format(folder_of: Any, form: str) -> None:
    folder = folder_of("llama", form, {} if "+r" in form else {"lm_head": form})
    assert off(folder, reader.read(folder), torch.float32) < TIGHT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_low_rank(folder_of: Any, name: str) -> None:
    folder = folder_of(name, "int4:g32+r4", RANKED)
    assert off(folder, reader.read(folder), torch.float32) < TIGHT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_other_dtypes(family: Any, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Scales are in 16 bits of the model's kind, and stay so whatever dtype is asked for."""
    done = bake(tmp_path, family("llama", dtype), text, "native", steps("int4:g32"))
    for asked in (torch.float32, torch.float16, torch.bfloat16):
        model = runtime.load(artifact_of(done), dtype=asked)
        assert {m.weight_scale.dtype for m in packed(model).values()} == {dtype}
        assert model.model.embed_tokens.weight.dtype == asked
        assert off(artifact_of(done), done.state, asked, model) < LOOSE


@pytest.mark.slow
def test_several_files(text: Path, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 8000
    source = make_model(tmp_path / "model", config)
    folder = artifact_of(bake(tmp_path / "run", source, text, "native", steps("nf4:g64"), shard_bytes=1_000_000))
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert off(folder, reader.read(folder), torch.float32) < TIGHT
    index = folder / OWN_INDEX
    said = index.read_text()
    for other in ("compress-00001", "../../x/compress-00002"):
        index.write_text(said.replace("compress-00002", other))
        with pytest.raises(ModelError, match="says something else than the weight files themselves"):
            runtime.load(folder)
    index.unlink()
    with pytest.raises(ModelError, match=r"several weight files and no compress\.safetensors\.index\.json"):
        runtime.load(folder)


@pytest.mark.slow
def test_experts_that_stay_dense_beside_packed_ones(folder_of: Any) -> None:
    for name in ("mixtral", "qwen3_moe"):
        folder = folder_of(
            name, "int4:g32", {"layers.0.experts.1.*": "bf16", "layers.0.experts.2.up": "nf3:g32", "layers.1.experts.*": "bf16"}
        )
        model = runtime.load(folder)
        blocks = [m for m in model.modules() if isinstance(m, PackedExperts)]
        assert [type(m).__name__ for m in blocks[0].down] == ["PackedLinear", "Linear", "PackedLinear", "PackedLinear"]  # type: ignore
        assert len(blocks) == 1  # the other block's experts are all dense, in transformers' own module
        assert off(folder, reader.read(folder), torch.float32) < TIGHT


@pytest.mark.slow
def test_tensors_that_belong_to_no_module(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("qwen2"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.0.old_buffer"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    folder = artifact_of(bake(tmp_path / "run", source, text, "native", steps("nf4:g64")))
    assert off(folder, reader.read(folder), torch.float32) < TIGHT


# --- in transformers --------------------------------------------------------------------------------------------------


def test_from_pretrained(folder_of: Any) -> None:
    first = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    assert type(first).__name__ == "LlamaForCausalLM"
    assert first.dtype == torch.bfloat16
    wanted = first(input_ids=ids()).logits
    for options in ({"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"), **options)
        assert torch.equal(model(input_ids=ids()).logits, wanted)
    assert not any(p.is_meta for p in (*first.parameters(), *first.buffers()))
    assert "format=int4:g32" in repr(first)


def test_disk_is_no_place_for_packed_matrices(folder_of: Any, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"device_map": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}},
        {"device_map": "auto", "max_memory": {"cpu": 60_000}},
    ]
    for options in asked:
        with pytest.raises(ModelError, match="packed matrices are not offloaded to disk"):
            transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"), offload_folder=tmp_path, **options)


@pytest.mark.slow
def test_nothing_is_made_dense(folder_of: Any) -> None:
    """What the matrices hold is what their formats count, and a byte more only for a shape."""
    folder = folder_of("llama", "int3:g64", {})
    model, state = runtime.load(folder), reader.read(folder)
    held = sum(b.nbytes for m in packed(model).values() for b in m.buffers())
    assert held == sum(s.load().nbytes for s in state.codes.values())
    assert not any("proj" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_the_dtypes_of_a_format_survive_moves(folder_of: Any) -> None:
    """transformers refuses `.half()` on a quantized model, but modules are moved by other ways too."""
    layer = runtime.load(folder_of("llama", "int4:g32+r4", RANKED)).model.layers[0].mlp
    before = {name: (b.dtype, b.clone()) for name, b in layer.named_buffers()}
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16, torch.int32, torch.int64}
    for dtype in (torch.half, torch.bfloat16, torch.double, torch.float):
        layer.to(dtype)
        after = dict(layer.named_buffers())
        assert all(after[name].dtype == was and torch.equal(after[name], b) for name, (was, b) in before.items())
        assert {m.weight.dtype for m in packed(layer).values()} == {dtype}
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


@pytest.mark.slow
def test_it_compiles_in_full_graphs(folder_of: Any) -> None:
    model = runtime.load(folder_of("llama", "int4:g32+r4", RANKED), dtype=torch.float32)
    graph = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(graph(input_ids=ids()).logits, model(input_ids=ids()).logits, atol=1e-5)
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_trainable


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_further(folder_of: Any, backend: str) -> None:
    model = runtime.load(folder_of("llama"), dtype=torch.float32)
    with torch.no_grad():
        wanted = model(input_ids=ids()).logits
        assert torch.allclose(torch.compile(model, fullgraph=True, backend=backend)(input_ids=ids()).logits, wanted, atol=1e-4)


@pytest.mark.slow
def test_saving_is_refused_and_an_adapter_is_saved(folder_of: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = runtime.load(folder_of("llama"))
    assert not hasattr(model.config, "transformers_weights")
    model.config.save_pretrained(tmp_path / "config")
    saved = json.loads((tmp_path / "config" / "config.json").read_text())
    assert "transformers_weights" not in saved
    assert saved["quantization_config"] == artifact_config.declared(folder_of("llama"))
    with pytest.raises(ModelError, match="copy the folder that it was loaded from"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*", "ignore:.*gradient_checkpointing.*")
@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "down_proj"]), rare("gpt2", ["c_attn"])])
def test_an_adapter_learns_upon_it(folder_of: Any, name: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(runtime.load(folder_of(name), dtype=torch.float32), peft.LoraConfig(r=4, target_modules=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, 1e-2), []
    for _ in range(3):
        losses.append(model(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[1] < losses[0]
    assert any(type(m).__module__.startswith("peft") and isinstance(m.base_layer, PackedLinear) for m in model.modules()
               if hasattr(m, "base_layer"))  # fmt: skip
    for safe in (False, True):
        with pytest.raises(ModelError, match="nothing merges into it"):
            model.merge_and_unload(safe_merge=safe)


@pytest.mark.slow
def test_from_the_hubs_cache(folder_of: Any, tmp_path: Path) -> None:
    """A hub id whose files lie in the cache: links into its store of blobs."""
    cache = tmp_path / "hub" / "models--some--llama"
    snapshot, commit = cache / "snapshots" / ("0" * 40), "0" * 40
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    for file in folder_of("llama").iterdir():
        shutil.copy(file, cache / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    program = ("import compress.export.runtime, transformers, torch\n"
               "model = transformers.AutoModelForCausalLM.from_pretrained('some/llama')\n"
               f"compress.export.runtime.load({str(snapshot)!r})\n"
               "print(type(model.model.layers[0].mlp.down_proj).__name__)")  # fmt: skip
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == "PackedLinear", done.stderr


def test_the_page_runs() -> None:
    outcome = doctest.testfile(str(ROOT / "docs" / "runtime.md"), module_relative=False)
    assert outcome.attempted > 5
    assert not outcome.failed


def test_it_needs_nothing_of_the_compressor(folder_of: Any, nursery: Nursery, tmp_path: Path) -> None:
    """In a process in which the compressor's dependencies and its other modules cannot be imported."""
    blocked = ("pydantic scipy compressed_tensors psutil greenlet onnx onnxruntime peft compress.model compress.manager "
               "compress.run compress.passes compress.export.native compress.export.artifact.tensors")  # fmt: skip
    program = ("import sys\nfrom transformers import LlamaForCausalLM\n"  # which takes what it found when the process began
               f"assert 'compress' not in sys.modules\nblocked = {blocked.split()}\n"
               "held = [name for name in sys.modules if name.startswith(tuple(f'{each}.' for each in blocked))]\n"
               "sys.modules |= dict.fromkeys([*blocked, *held])\n"
               "import compress.export.runtime as runtime, torch\n"
               "for folder in sys.argv[1:]:\n"
               "    print(runtime.load(folder)(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.shape)")  # fmt: skip
    folders = [folder_of("llama"), folder_of("llama", "int3:g64:asym", {"*.o": "int4:g32"}, "compressed_tensors")]
    done = nursery.run(program, *folders, cwd=tmp_path)
    assert done.out.split("\n")[:2] == ["torch.Size([1, 4, 272])"] * 2, done.err


# --- compressed-tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form", "pins"), [
    ("llama", "int3:g64:asym", {"*.down": "int4:g32", "lm_head": "int8:g32", "*.o": "int5:channel:asym"}),
    rare("gpt2", "int4:g32:asym", {}),
    rare("mixtral", "int4:g32", {"*.o": "int2:g16:asym"}), rare("roberta", "int4:g32", {}),
    rare("llama", "int3:g64+r4", {"*.o": "int4:g32", "*.up": "int3:g64+r2:fp32", "*.gate": "int3:g64+r2:fp32"}),
    rare("gpt2", "int4:g32+r3", {}),
])  # fmt: skip
def test_integers_of_compressed_tensors_stay_packed(folder_of: Any, name: str, form: str, pins: dict[str, str]) -> None:
    folder = folder_of(name, form, pins, "compressed_tensors")
    state = compressed_reader.read(folder)
    model = runtime.load(folder, dtype=torch.float32)
    assert off(folder, state, torch.float32, model) < TIGHT
    assert {m.format for m in packed(model).values()} == {str(state.format(s)) for s in state.graph if s.name in state.codes}


@pytest.mark.slow
def test_keep_packed_can_be_undone(folder_of: Any) -> None:
    folder = folder_of("llama", "int4:g32", {}, "compressed_tensors")
    stock = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)

    def loaded() -> str:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return type(model.model.layers[0].mlp.down_proj).__name__

    with runtime.keep_packed():
        assert loaded() == "PackedLinear"
        with runtime.keep_packed():
            runtime.keep_packed()
        assert loaded() == "PackedLinear"
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == stock
    runtime.keep_packed()
    assert loaded() == "PackedLinear"
    runtime.keep_packed(False)
    assert loaded() == "Linear"
    assert (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)) == stock


@pytest.mark.parametrize("change", [
    lambda c: c["config_groups"]["group_0"]["weights"].update(type="float"),
    lambda c: c["config_groups"]["group_0"].update(format="naive-quantized"),
    lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
    lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=16), lambda c: c.update(transform_config={"x": 1}),
    lambda c: c.pop("config_groups"), lambda c: c.update(config_groups=[]), lambda c: c["config_groups"].update(group_0=None),
])  # fmt: skip
def test_other_kinds_of_compressed_tensors_are_for_stock_transformers(folder_of: Any, tmp_path: Path, change: Any) -> None:
    folder = Path(shutil.copytree(folder_of("llama", "int4:g32", {}, "compressed_tensors"), tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "STOCK", (type("Stock", (), {"from_dict": staticmethod(asked.append)}), None))
        loading.ChosenConfig.from_dict(config["quantization_config"])
    assert asked == [config["quantization_config"]]
    with pytest.raises(ModelError) as caught:
        runtime.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("targets", "says"), [
    (["Linear"], ""), ([r"re:.*_proj$"], ""), (["re:("], "is no pattern"), (["model.norm"], "is packed, but no target"),
    ([3], "is no pattern"),
])  # fmt: skip
def test_targets_of_other_tools(folder_of: Any, tmp_path: Path, targets: list[Any], says: str) -> None:
    folder = Path(shutil.copytree(folder_of("llama", "int4:g32", {}, "compressed_tensors"), tmp_path / "a"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = targets
    (folder / "config.json").write_text(json.dumps(config))
    (folder / artifact_files.MARK).unlink()  # other tools write none
    if says:
        with pytest.raises(ModelError, match=says):
            runtime.load(folder)
    else:
        assert len(packed(runtime.load(folder))) == 14


@pytest.mark.slow
@pytest.mark.parametrize(("change", "says"), [
    ({"lora_alpha": 16}, "by another number than 1"), ({"use_dora": True}, "more than plain LoRA"),
    ({"target_modules": 3}, "no adapter of ours"),
    ({"target_modules": ["../../x"]}, "does not name"), ({"r": 3, "lora_alpha": 3}, "are not those of"),
    ({"r": 0, "lora_alpha": 0}, "a rank is 1 or more"),
])  # fmt: skip
def test_an_adapter_that_is_not_ours(folder_of: Any, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = Path(shutil.copytree(folder_of("llama", "int3:g64+r4", {}, "compressed_tensors"), tmp_path / "a"))
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=says) as caught:
        runtime.load(folder)
    assert "\n" not in str(caught.value)


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_repacked_for_a_kernel(folder_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with a dense product in the kernel's place."""
    dense = lambda x, parts, bias, fmt, shape: nn.functional.linear(x, cuda.dequantize(parts, fmt, shape, x.dtype), bias)  # noqa: E731
    monkeypatch.setattr(cuda, "linear", dense)
    model = runtime.load(folder_of("llama", "int4:g32+r2", {"*.q": "int3:g64+r4:int8:channel", "*.down": "lut3:g32"}))
    wanted = model(input_ids=ids()).logits
    matrices = {name: m.weight for name, m in packed(model).items()}
    for module in packed(model).values():
        module.repack()
    assert {m.layout for m in packed(model).values()} == {"tiles"}
    assert not any("weight" in name or "lora" in name for m in packed(model).values() for name, _ in m.named_buffers())
    for name, module in packed(model).items():
        assert torch.allclose(module.weight.float(), matrices[name].float(), atol=2e-2)
    found = model(input_ids=ids()).logits
    assert float((found - wanted).abs().max()) <= 5e-2 * float(wanted.abs().max())  # factors too are in 16 bits
    x = torch.randn(3, 64)
    assert next(iter(packed(model).values()))(x).dtype == torch.float32  # inputs of another dtype are taken in the module's
    with pytest.raises(ModelError, match="stays there in its dtype; load it again"):
        model.model.layers[0].mlp.half()


@pytest.mark.slow
def test_what_the_kernel_does_not_take_is_said(folder_of: Any) -> None:
    model = runtime.load(folder_of("llama", "int5:g32", {}))
    module = next(iter(packed(model).values()))
    with pytest.warns(UserWarning, match="no kernel for int5:g32: 5-bit codes; torch decodes it at every use"):
        module.repack()
    assert module.layout == "canonical"


# --- hostile and damaged folders --------------------------------------------------------------------------------------


def refused(folder: Path, says: str) -> None:
    """By the reader of headers, by the state's reader, and by transformers, in one line."""
    for read in (reading.open_native, reader.read, runtime.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ModelError, match=says) as caught:
            read(folder)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / artifact_files.MARK).unlink()  # as an attacker would


@pytest.mark.parametrize("version", [2, 0, True, "1", None])
def test_another_version(copy: Path, version: Any) -> None:
    told(copy, format_version=version)
    refused(copy, r"format_version is .*, and 1 is the newest that is read here; upgrade")


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(f"{Q}.weight_scale"), f"'{Q}.weight_scale' is missing"),
    (lambda t: t.update({f"{Q}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}), r"weight_packed' is int32 \[64, 7\]"),
    (lambda t: t.update({f"{Q}.weight_packed": torch.zeros(64, 8)}), r"weight_packed' is float32 \[64, 8\]"),
    (lambda t: t.pop(f"{Q}.weight_shape"), "weight_shape' is missing"),
])  # fmt: skip
def test_tensors_that_are_not_as_the_format_says(copy: Path, change: Any, says: str) -> None:
    rewrite(copy, change)
    refused(copy, says)


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop("model.norm.weight"), "asks for 'model.norm.weight', which the weights do not hold"),
    (lambda t: t.update(extra=torch.zeros(1)), "holds 'extra', which is no tensor of LlamaForCausalLM"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(63)}), r"'model.norm.weight' is float32 \[63\], the config says"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), r"'model.norm.weight' is int32 \[64\]"),
    (lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 1 << 40])}), "which is no shape of a matrix"),
    (lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 96])}), r"needs int32 \[64, 12\]"),
    (lambda t: t.update({f"{Q}.weight_shape": torch.zeros(3)}), r"says \[\], which is no shape of a matrix"),
])  # fmt: skip
def test_tensors_that_are_missing_or_too_many_or_of_another_shape(copy: Path, change: Any, says: str) -> None:
    """transformers would warn, and go on with random numbers."""
    rewrite(copy, change)
    for read in (runtime.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ModelError, match=says) as caught:
            read(copy)  # type: ignore[operator]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["../../etc/passwd", "model.norm", "model.layers.7.self_attn.q_proj", "", "x\ny"])
def test_formats_for_what_is_no_matrix(copy: Path, module: str) -> None:
    told(copy, formats=artifact_config.declared(copy)["formats"] | {module: "int4:g64"})
    with pytest.raises(ModelError, match="is missing") as caught:
        runtime.load(copy)
    assert "\n" not in str(caught.value)


def with_packed(folder: Path, name: str, fmt: str, W_nk: Tensor) -> Tensor:
    """Pack one more matrix of an artifact by hand, one that is dense in it; what it stands for."""
    base: Any = parse(fmt)
    tensors = base.pack(*plain(W_nk, base))

    def moved(held: dict[str, Tensor]) -> None:
        del held[f"{name}.weight"]
        held.update({f"{name}.{suffix}": t for suffix, t in tensors.items()})

    rewrite(folder, moved)
    told(folder, formats=artifact_config.declared(folder)["formats"] | {name: fmt})
    matrix: Tensor = base.dequantize(tensors, torch.float32)
    return matrix


def test_a_packed_embedding(copy: Path) -> None:
    table = load_file(copy / FILE)["model.embed_tokens.weight"]
    dense = runtime.load(copy, dtype=torch.float32)
    dense.model.embed_tokens.weight.data = with_packed(copy, "model.embed_tokens", "int8:g16:asym", table.float())
    model = runtime.load(copy, dtype=torch.float32)
    assert type(model.model.embed_tokens).__name__ == "PackedEmbedding"
    assert torch.equal(model(input_ids=ids()).logits, dense(input_ids=ids()).logits)


@pytest.mark.parametrize(("name", "family_name", "says"), [
    ("model.norm", "llama", "is a LlamaRMSNorm"),
])  # fmt: skip
def test_matrices_that_stay_dense(folder_of: Any, tmp_path: Path, name: str, family_name: str, says: str) -> None:
    folder = Path(shutil.copytree(folder_of(family_name), tmp_path / "a"))
    with_packed(folder, name, "int4:channel", torch.randn(272, 64))
    with pytest.raises(ModelError, match=f"{says}, which the runtime keeps dense; use 'compress eval'"):
        runtime.load(folder)


def test_other_bytes_of_the_same_size(copy: Path) -> None:
    data = bytearray((copy / FILE).read_bytes())
    data[-1] ^= 1
    (copy / FILE).write_bytes(data)
    refused(copy, r"is not the file that was written \(see compress\.json\)")


@pytest.mark.parametrize("name", [FILE, "model.safetensors", "model.safetensors.index.json"])
def test_links_and_strangers(copy: Path, tmp_path: Path, name: str) -> None:
    if name == FILE:
        (copy / FILE).rename(tmp_path / "elsewhere.safetensors")
        (copy / FILE).symlink_to(tmp_path / "elsewhere.safetensors")
        refused(copy, "is a link out of the artifact")
        (tmp_path / "elsewhere.safetensors").rename(copy / "inside.bin")
        (copy / FILE).unlink()
        (copy / FILE).symlink_to("inside.bin")
        assert packed(runtime.load(copy))
    else:
        (copy / name).write_text('{"weight_map": {"x": "../../elsewhere.safetensors"}}')
        refused(copy, "beside compress-00001.safetensors; they do not belong together")


def test_files_of_compressed_tensors_stay_in_their_folder(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("llama", "int4:g32", {}, "compressed_tensors"), tmp_path / "a"))
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}')
    with pytest.raises(ModelError, match=r"names '\.\./x\.safetensors', which is no weight file of this folder"):
        reading.open_packed(folder)


def damaged(data: bytes, at: int, how: int) -> bytes:
    """Cut short where `how` is 0, else with one byte changed."""
    at %= len(data)
    return data[:at] + bytes([data[at] ^ how]) + data[at + 1 :] if how else data[:at]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([FILE, FILE, "config.json", artifact_files.MARK]), at=st.integers(0, 1 << 20),
       how=st.just(0) | st.integers(1, 255), marked=st.booleans())  # fmt: skip
def test_any_damage_is_an_error_or_does_not_matter(copy: Path, name: str, at: int, how: int, marked: bool) -> None:
    """It ends in one line of ours, or the model is the same. Without compress.json the header alone can be checked."""
    kept = {n: (copy / n).read_bytes() for n in (FILE, "config.json", artifact_files.MARK)}
    marked |= name != FILE
    if not marked:
        at %= 8 + int.from_bytes(kept[FILE][:8], "little")
        (copy / artifact_files.MARK).unlink()
    (copy / name).write_bytes(damaged(kept[name], at, how))
    try:
        for read in (reading.open_native, reader.read, runtime.load):
            try:
                found = read(copy)  # type: ignore[operator]
            except CompressError as e:
                assert "\n" not in str(e)  # noqa: PT017
            else:
                assert name == artifact_files.MARK or not marked
                if read is runtime.load:
                    same_buffers(found, runtime.load(copy.with_name("intact")))
    finally:
        for n, data in kept.items():
            (copy / n).write_bytes(data)


def same_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    """Nothing but the metadata of the file can have been changed."""
    intact = theirs.state_dict()
    assert ours.state_dict().keys() == intact.keys()
    assert all(torch.equal(t, intact[name]) for name, t in ours.state_dict().items())
