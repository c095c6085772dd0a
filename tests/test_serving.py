"""What engines are told, and what they would make of an artifact: their rules, rounded caches, serve.json, and the check of
folders for which there is no kernel here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export.artifact.proof import logits
from compress.export.artifact.schemes import cache_args
from compress.export.compressed_tensors.lint import faults
from compress.export.compressed_tensors.reader import read
from compress.export.runtime import load
from compress.export.table import EXPORTERS
from compress.formats import parse
from compress.formats.caches import kept, scales
from compress.formats.engines import AS_MEASURED, ENGINES, WEIGHTS_ONLY, by_engine, made_of, refusal
from compress.model.model import open_model
from compress.passes.kv_cache import KvCache
from tests.conftest import rare
from tests.cooking import bake, refused
from tests.pass_laws import TOKENS, step_of

# --- which engine runs what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "made"), [
    ("int4:g128", "rrrrrr"), ("int3:g64", "rrrrr-"), ("int8:channel/int8:token", "rrrrrr"), ("int4:g64/int8:token", "rrrrr-"),
    ("int4:g128/fp8:token", "---r--"), ("int4:g64/fp8:token", "------"), ("fp8:channel/fp8:token", "ssrrrr"),
    ("fp8:channel", "rrrrr-"), ("nvfp4/nvfp4", "ssssr-"), ("nvfp4", "rrrrr-"), ("mxfp4/mxfp4", "-sssr-"), ("mxfp4", "-rrr--"),
    ("mxfp8/mxfp8", "ssssr-"), ("mxfp8", "------"), ("int8:g64/int8:token", "------"), ("nf4:g64", "------"), ("bf16", "rrrrrr"),
    ("int4:g64+r8", "rrrrrr"),
])  # fmt: skip
def test_the_table_of_engines(text: str, made: str) -> None:
    """r: as measured, s: weights only, -: not at all; engines in the order of the table."""
    fmt = parse(text)
    found = "".join({AS_MEASURED: "r", WEIGHTS_ONLY: "s"}.get(made_of(engine, fmt), "-") for engine in ENGINES)
    assert found == made
    for engine, letter in zip(ENGINES, made, strict=True):
        assert (refusal(engine, fmt) is None) == (letter == "r")


def test_of_several_formats_the_worst_counts() -> None:
    found = by_engine(map(parse, ["nvfp4/nvfp4", "int8:channel/int8:token", "bf16"]))
    assert found["vllm:sm100"] == AS_MEASURED
    assert found["vllm:sm90"] == WEIGHTS_ONLY
    assert found["vllm:cpu"].startswith("nvfp4/nvfp4: ")


@pytest.mark.parametrize(("engine", "options", "says"), [
    ("vllm:sm90", {"formats": ["nvfp4", "nvfp4/nvfp4"]}, "nvfp4/nvfp4: vllm:sm90 takes its inputs as they are .* use nvfp4$"),
    ("vllm:sm100", {"formats": ["int4:g64", "mxfp4"]}, "mxfp4: vllm:sm100 does not run it: vLLM rounds .* use mxfp4/mxfp4"),
    ("vllm:cpu", {"formats": ["int4:g64"], "pins": {"*.o": "int8:g64"}}, "int8:g64: vllm:cpu does not run it: .* 4 bits alone"),
    ("vllm:sm70", {}, "engine"),
])  # fmt: skip
def test_allocate_refuses_by_name_what_its_engine_does_not_serve(
    family: Any, text: Path, tmp_path: Path, engine: str, options: dict[str, Any], says: str
) -> None:
    passes = [{"allocate": {"budget": "6 bits", "engine": engine, **options}}, {"quantize": {}}]
    refused(tmp_path, family("llama"), text, passes, says)


# --- a cache of 8 bits -----------------------------------------------------------------------------------------------

INT8 = {"quantize": {"method": "rtn", "format": "int8:channel/int8:token"}}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "layers"), [("llama", "fp8", "all"), rare("gemma2", "fp8:head", "full")])
def test_stock_transformers_keeps_the_cache_that_the_run_measured(
    family: Any, text: Path, tmp_path: Path, name: str, kind: str, layers: str
) -> None:
    """Logits of windows to the last bit, and a text through the real cache; the folder read back says the same."""
    step = {"kv_cache": {"format": kind, "layers": layers}}
    done = bake(tmp_path, family(name), text, "compressed_tensors", INT8, step)
    folder, proof = done.artifacts["compressed_tensors"]
    assert (proof.engine, proof.difference) == ("transformers", 0)
    assert proof.greedy > 0
    said = done.state.serving["kv_cache"]
    assert {each["rounded"] for each in said["scales"].values()} == ({True} if layers == "all" else {True, False})
    assert read(folder).serving == done.state.serving
    plain = replace(done.state, serving={})
    ours, theirs = (logits(s, [TOKENS.ids[:2]], "cpu")[0] for s in (done.state, plain))
    assert float((ours - theirs).abs().max()) > 1e-3 * float(ours.abs().max())


def test_scales_are_those_of_what_a_cache_would_hold(family: Any, tmp_path: Path) -> None:
    """The largest key, behind its rotary embedding, and value that stock transformers puts into its own cache."""
    source, p = open_model(str(family("llama"))), KvCache(format="fp8:head")
    state = p.run(source.state, step_of(p, source, tmp_path).context())
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(input_ids=TOKENS.ids, use_cache=True).past_key_values
    for layer, each in zip(cache.layers, state.serving["kv_cache"]["scales"].values(), strict=True):
        for held, scale in ((layer.keys, each["k"]), (layer.values, each["v"])):
            assert torch.allclose(torch.tensor(scale), held.abs().amax((0, 2, 3)) / 448, rtol=2e-2)


def test_a_cache_rounds_as_compressed_tensors_does() -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(**cache_args("fp8:head"))
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(1)) * 40
    scale = torch.tensor(scales(x.abs().amax((0, 2, 3)) / 2, "fp8:head", torch.bfloat16)).reshape(3, 1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = forward.fake_quantize(x.to(dtype), scale.to(dtype), None, args)
        assert torch.equal(kept(x.to(dtype), scale), theirs)


@pytest.mark.parametrize(("name", "passes", "says"), [
    ("llama", [{"kv_cache": {"format": "int8"}}], "vLLM takes caches of fp8 alone from a checkpoint"),
    ("llama", [{"kv_cache": {}}, INT8], "'quantize' behind it changes that; move it behind 'quantize'"),
    ("llama", [{"kv_cache": {}}, {"kv_cache": {}}], "keep one 'kv_cache'"),
    ("mistral", [{"kv_cache": {"layers": "full"}}], "every layer has a sliding window"),
    ("gpt2", [{"kv_cache": {}}], "has 0 attentions with k_proj and v_proj"),
    ("roberta", [{"kv_cache": {}}], "it does not generate"),
])  # fmt: skip
def test_caches_that_cannot_be_are_refused(
    family: Any, text: Path, tmp_path: Path, name: str, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, family(name), text, passes, says)


@pytest.mark.parametrize("exporter", sorted(EXPORTERS.keys() - {"compressed_tensors"}))
def test_other_exporters_refuse_a_cache_beforehand(family: Any, text: Path, tmp_path: Path, exporter: str) -> None:
    with pytest.raises(ExportError, match="has no place for the scales of a cache"):
        bake(tmp_path, family("llama"), text, exporter, {"kv_cache": {}})


# --- serve.json ------------------------------------------------------------------------------------------------------


def test_serve_json_says_what_to_start_and_what_engines_make_of_it(family: Any, text: Path, tmp_path: Path) -> None:
    step = {"quantize": {"method": "rtn", "format": "nvfp4/nvfp4", "pins": {"*.down": "int8:channel/int8:token"}}}
    done = bake(tmp_path, family("gemma2"), text, "compressed_tensors", step, {"kv_cache": {"layers": "full"}})
    folder = done.artifacts["compressed_tensors"][0]
    said = json.loads((folder / "serve.json").read_text())
    assert said["quantization"] == "compressed-tensors"
    assert said["vllm"]["flags"] == ["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "sliding_window"]
    assert said["vllm"]["engines"]["vllm:sm100"] == AS_MEASURED
    assert said["vllm"]["engines"]["vllm:sm80"] == WEIGHTS_ONLY
    assert said["vllm"]["engines"]["vllm:cpu"].startswith("nvfp4/nvfp4: ")
    assert any("older ones multiply by the inputs as they are" in note for note in said["notes"])
    card = (folder / "README.md").read_text()
    assert "vllm serve THIS_FOLDER --kv-cache-dtype fp8 --kv-cache-dtype-skip-layers sliding_window" in card
    assert "with its cache in 8 bits" in card


def test_an_exporter_with_an_engine_refuses_what_any_pass_may_make(family: Any, text: Path, tmp_path: Path) -> None:
    passes = [{"allocate": {"budget": "6 bits", "formats": ["int4:g64", "int8:channel"]}}, {"quantize": {}}]
    with pytest.raises(ExportError, match=r"has int8:channel, and vllm:cpu does not run it: .* 4 bits alone"):
        bake(tmp_path, family("llama"), text, "compressed_tensors", *passes, engine="vllm:cpu")


# --- folders for which there is no kernel here -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with small floats, packed integers and a cache, as it is exported: without a fault, or it would not be there."""
    step = {"quantize": {"method": "rtn", "format": "nvfp4/nvfp4", "pins": {"*.down": "int4:g64", "*.o": "fp8:channel"}}}
    place = tmp_path_factory.mktemp("lint")
    return bake(place, family("llama", blocks=1), text, "compressed_tensors", step, {"kv_cache": {}}).artifacts[
        "compressed_tensors"
    ][0]


AT = "model.layers.0"
Q, OUT, DOWN = f"{AT}.self_attn.q_proj", f"{AT}.self_attn.o_proj", f"{AT}.mlp.down_proj"
BREAKS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "global": (lambda t, c: t.update({f"{Q}.weight_global_scale": t[f"{Q}.weight_global_scale"] * 2}),
               "differs from those it is joined with"),
    "input": (lambda t, c: t.pop(f"{Q}.input_global_scale"), "input_global_scale': is missing; vLLM wants one number of fp32"),
    "dtype": (lambda t, c: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].bfloat16()}), "of float8_e4m3fn are wanted"),
    "zero": (lambda t, c: t[f"{Q}.weight_scale"].view(torch.uint8)[0].zero_(), "a scale that is not above 0"),
    "nan": (lambda t, c: t[f"{DOWN}.weight_scale"][0].fill_(float("nan")), "holds what is no number"),
    "odd": (lambda t, c: t.update({n: t[n][:60] for n in (f"{OUT}.weight", f"{OUT}.weight_scale")}),
            "is 60 x 64; kernels for 'float-quantized' want multiples of 16 and 16"),
    "scales": (lambda t, c: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"][:, :1].clone()}),
               r"\[64, 2\] of bfloat16"),
    "codes": (lambda t, c: t.pop(f"{DOWN}.weight_packed"), "is missing; 'pack-quantized' wants two dimensions of int32"),
    "twice": (lambda t, c: t.update({f"{DOWN}.weight": torch.zeros(64, 128)}), "is the same matrix"),
    "alone": (lambda t, c: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.weight_") or n == f"{Q}.input_global_scale"]
              + [t.update({f"{Q}.weight": torch.zeros(64, 64)})], "is packed and .* is not; vLLM joins them"),
    "cache": (lambda t, c: t.pop(f"{AT}.self_attn.v_scale"), "v_scale': is missing; vLLM takes 1"),
    "cache zero": (lambda t, c: t[f"{AT}.self_attn.k_scale"].zero_(), "k_scale': is 0; a scale of a cache is a number above 0"),
    "cache unsaid": (lambda t, c: c.pop("kv_cache_scheme"), "the config has no kv_cache_scheme"),
    "cache int8": (lambda t, c: c["kv_cache_scheme"].update(type="int"), "vLLM takes symmetric floats of 8 bits only"),
    "key": (lambda t, c: c["config_groups"]["group_0"]["weights"].update(blocks=3), "has 'blocks', a key"),
    "target": (lambda t, c: c["config_groups"]["group_0"].update(targets=["Linear"]), "and 2 groups of the config name it"),
    "format": (lambda t, c: c.update(format="nvfp4-pack-quantized"), "groups of 3 layouts"),
    "layout": (lambda t, c: c["config_groups"]["group_0"].update(format="marlin-24"), "a layout that vLLM does not dispatch"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_has_its_fault(folder: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors, config = load_file(broken / "model.safetensors"), json.loads((broken / "config.json").read_text())
    change, says = BREAKS[name]
    change(tensors, config["quantization_config"])
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text(json.dumps(config))
    assert list(faults(folder)) == []
    found = list(faults(broken))
    assert any(re.search(says, line) for line in found), found
    assert all("\n" not in line for line in found)


def test_inspect_prints_what_engines_would_not_take(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "cache: fp8, all layers, scales of 1 attentions" in out
    assert "for vLLM" not in out
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    BREAKS["global"][0](tensors, {})
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "compress.json").unlink()  # as another tool would have written it
    assert main(["inspect", str(broken)]) == 0
    assert f"note: for vLLM: '{Q}': 'weight_global_scale' differs" in capsys.readouterr().out


def test_our_runtime_says_that_it_keeps_no_rounded_cache(folder: Path) -> None:
    with pytest.raises(ModelError, match="asks for a quantized cache, which this runtime does not keep"):
        load(folder)


def test_a_folder_whose_scales_are_gone_is_not_read(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "compress.json").unlink()
    tensors = load_file(broken / "model.safetensors")
    scale = tensors.pop(f"{AT}.self_attn.k_scale")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="k_scale' is missing, fp8 needs bfloat16"):
        read(broken)
    save_file({**tensors, f"{AT}.self_attn.k_scale": -scale}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="has a scale of its cache that is not above 0"):
        read(broken)
