"""The GPTQ layout: decoded by hand from its definition, read back to the bit, and refused where it lies."""

from __future__ import annotations

import doctest
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.cli import main
from compress.errors import CompressError, ExportError, ModelError
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK
from compress.export.gptq import exporter as gptq
from compress.export.gptq import layout as gptq_layout
from compress.export.gptq import reader as gptq_reader
from compress.export.gptq.config import Scheme, config_of
from compress.export.gptq.engines import GENAI, GPTQMODEL, TRANSFORMERS, VLLM, engines
from compress.formats import Dense, Int, parse
from compress.model.model import open_model
from compress.state import State
from compress.state.plan import BitPlan
from tests.conftest import ROOT, SMALL, covered, make_model, rare
from tests.cooking import bake
from tests.test_native import same_state

SYMMETRIC = {
    "layers.0.attn.[qkv]": "int8:g32",
    "layers.0.attn.o": "int2:g16",
    "layers.0.mlp.*": "int3:channel",
    "lm_head": "int8:g16",
}
ASYMMETRIC = {"layers.0.attn.[qkv]": "int8:g32:asym", "layers.0.attn.o": "int2:g16:asym", "layers.0.mlp.*": "int3:g32:asym"}
Q = "model.layers.1.self_attn.q_proj"


def rounded(form: str, pins: dict[str, str] | None = None) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "clip": "minmax", "format": form, "pins": pins or {}}}


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["gptq"][0]


def foreseen(folder: Path, form: str, pins: dict[str, str]) -> State:
    """The state that a plan of `form` and `pins` foresees."""
    state = open_model(str(folder)).state
    return state.promising(BitPlan.of(state.graph, parse(form), pins, state.dtype).formats)


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pipeline.Outcome]:
    """made("sym") or made("asym") -> a llama in several formats, some matrices left alone."""
    done: dict[str, pipeline.Outcome] = {}

    def get(kind: str) -> pipeline.Outcome:
        if kind not in done:
            pins = (SYMMETRIC if kind == "sym" else ASYMMETRIC) | {"layers.1.*.o": "bf16", "layers.1.*.down": "fp16"}
            done[kind] = bake(tmp_path_factory.mktemp(kind), family("llama"), text, "gptq", rounded("int4:g64", pins))
        return done[kind]

    return get


@pytest.fixture
def copy(made: Any, tmp_path: Path) -> Path:
    """The asymmetric artifact, to damage; without the hashes, which would notice first."""
    folder = Path(shutil.copytree(artifact_of(made("asym")), tmp_path / "artifact"))
    (folder / MARK).unlink()
    return folder


# --- the layout, from its definition ----------------------------------------------------------------------------------


def stream(words: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The codes of each row of 32-bit words, lowest bit first."""
    ones = np.unpackbits(words.astype("<u4").view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
    return (ones.reshape(len(words), -1, bits) << np.arange(bits)).sum(-1)


def by_hand(tensors: dict[str, Tensor], module: str, bits: int, v1: bool) -> np.ndarray[Any, Any]:
    """The weight [N, K] of a module, fp32."""
    words, zeros, scales, index = (tensors[f"{module}.{s}"].numpy() for s in ("qweight", "qzeros", "scales", "g_idx"))
    q = stream(np.ascontiguousarray(words.T), bits)
    z = (stream(zeros, bits) + v1) % 2**bits
    found: np.ndarray[Any, Any] = (q - z.T[:, index]).astype(np.float32) * scales.astype(np.float32).T[:, index]
    return found


@pytest.mark.parametrize("kind", covered(["sym", "asym"], "asym"))
def test_the_definition_gives_the_weights(made: Any, kind: str) -> None:
    done = made(kind)
    state, held = done.state, load_file(artifact_of(done) / "model.safetensors")
    quantized = {n: f for n, s in state.codes.items() if isinstance(f := s.format, Int)}
    assert len({f.bits for f in quantized.values()}) == 4
    for name, fmt in quantized.items():
        ours = state.codes[name].load().dequantize(torch.float32)
        assert np.array_equal(by_hand(held, state.graph[name].stem, fmt.bits, kind == "sym"), ours.numpy()), name
    assert {t.dtype for n, t in held.items() if n.endswith("scales")} == {torch.float16}
    assert held["model.layers.1.mlp.down_proj.weight"].dtype == torch.float16


@pytest.mark.parametrize("name", ["phi3", *(rare(name) for name in ("gpt2", "llama", "qwen2", "opt"))])
def test_what_is_written_is_read_back(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    pins = {"layers.1.*.o": "bf16", "layers.0.mlp.*": "int8:channel"}
    done = bake(tmp_path, family(name), text, "gptq", rounded("int3:g32:asym", pins))
    artifact, proof = done.artifacts["gptq"]
    assert (proof.engine, proof.difference) == ("our own reader", 0.0)
    again = gptq_reader.read(artifact)
    same_state(done.state, again)
    for name, stored in done.state.codes.items():
        theirs = again.codes[name].load().tensors
        assert all(torch.equal(t, theirs[s]) for s, t in stored.load().tensors.items()), name
    layout = pipeline.plan(tmp_path / "recipe.yaml").layouts["gptq"]
    assert {f.name: f.nbytes for f in layout.files} == {p.name: p.stat().st_size for p in artifact.glob("*.safetensors")}
    assert again.dense.base.nbytes == layout.tensor_bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_precisions(family: Any, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    done = bake(tmp_path, family("llama", dtype), text, "gptq", rounded("int4:g32"))
    same_state(done.state, gptq_reader.read(artifact_of(done)))


@pytest.mark.slow
def test_small_files(text: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=8000, bos_token_id=1,
        eos_token_id=2))  # fmt: skip
    done = bake(tmp_path / "run", source, text, "gptq", rounded("int4:g32"), shard_bytes=1_000_000)
    assert len(list(artifact_of(done).glob("*.safetensors"))) == 3
    same_state(done.state, gptq_reader.read(artifact_of(done)))


# --- the config -------------------------------------------------------------------------------------------------------


def test_what_the_config_says(made: Any, family: Any) -> None:
    config, was = (json.loads((f / "config.json").read_text()) for f in (artifact_of(made("sym")), family("llama")))
    said = config.pop("quantization_config")
    assert config == was
    dynamic = said.pop("dynamic")
    assert said.pop("meta")["quantizer"][0].startswith("compress:")
    assert said == {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64, "sym": True,
                    "desc_act": False, "lm_head": True, "pack_dtype": "int32"}  # fmt: skip
    assert dynamic == {
        r"-:^model\.layers\.(?:1)\.(?:self_attn\.o_proj|mlp\.down_proj)(?:\.|$)": {},
        r"+:^model\.layers\.(?:0)\.(?:self_attn\.q_proj|self_attn\.k_proj|self_attn\.v_proj|self_attn\.qkv_proj)(?:\.|$)":
            {"bits": 8, "group_size": 32, "sym": True},
        r"+:^model\.layers\.(?:0)\.(?:self_attn\.o_proj)(?:\.|$)": {"bits": 2, "group_size": 16, "sym": True},
        r"+:^model\.layers\.(?:0)\.(?:mlp\.gate_proj|mlp\.up_proj|mlp\.down_proj|mlp\.gate_up_proj)(?:\.|$)":
            {"bits": 3, "group_size": -1, "sym": True},
        r"+:^(?:lm_head)(?:\.|$)": {"bits": 8, "group_size": 16, "sym": True},
    }  # fmt: skip
    asymmetric = json.loads((artifact_of(made("asym")) / "config.json").read_text())["quantization_config"]
    assert (asymmetric["checkpoint_format"], asymmetric["lm_head"]) == ("gptq_v2", False)


def engine_says(config: dict[str, Any], name: str) -> tuple[int, int, bool] | None:
    """What an engine that runs the patterns, as all do, makes of a name."""
    for pattern, said in config.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            found = config | said
            return None if pattern.startswith("-:") else (found["bits"], found["group_size"], found["sym"])
    return config["bits"], config["group_size"], config["sym"]


CHOICES = ["int4:g32", "int8:g32", "int2:channel:asym", "bf16"]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.sampled_from(CHOICES), min_size=14, max_size=14), head=st.sampled_from(CHOICES))
def test_patterns_name_exactly_the_matrices_that_they_mean(family: Any, picks: list[str], head: str) -> None:
    state = open_model(str(family("llama"))).state
    chosen = dict(zip([s.name for s in state.graph.linear], picks, strict=True)) | {"lm_head": head}
    formats = {n: f for n, t in chosen.items() if isinstance(f := parse(t), Int)}
    if not formats:
        return
    config = config_of(state.graph, formats)
    scheme = Scheme.of(config, "config.json")
    for name, text in chosen.items():
        site, fmt = state.graph[name], formats.get(name)
        wanted = fmt and (fmt.bits, fmt.group or -1, fmt.symmetric)
        if name == "lm_head":
            assert config["lm_head"] == (fmt is not None)
        if name != "lm_head" or fmt:
            assert scheme.format(site.stem) == fmt, text
            for seen in (site.module, f"{site.module}.qweight", f"{site.module}.scales"):
                assert engine_says(config, seen) == wanted
    for group in state.graph.fused():
        kinds = {formats.get(s.name) for s in group}
        joined = f"{group[0].module.rpartition('.')[0]}.{'qkv_proj' if len(group) == 3 else 'gate_up_proj'}"
        if len(kinds) == 1:
            fmt = kinds.pop()
            assert engine_says(config, joined) == (fmt and (fmt.bits, fmt.group or -1, fmt.symmetric))


def test_blocks_beyond_nine_are_not_mistaken() -> None:
    config = {"bits": 4, "group_size": 64, "sym": True, "dynamic": {
        r"+:^model\.layers\.(?:1|11)\.(?:mlp\.up_proj)(?:\.|$)": {"bits": 8}}}  # fmt: skip
    scheme = Scheme.of(config, "")
    for block in range(30):
        wanted = 8 if block in (1, 11) else 4
        found = scheme.format(f"model.layers.{block}.mlp.up_proj")
        assert found
        assert found.bits == wanted == engine_says(config, f"model.layers.{block}.mlp.up_proj")[0]  # type: ignore[index]


# --- what is refused beforehand, and what is told ---------------------------------------------------------------------


@pytest.mark.parametrize(("form", "pins", "says"), [
    ("int5:g32", {}, r"'layers.0.attn.q' has int5:g32, and engines of this layout read 2, 3, 4, 8 bits; pin it to one of these"),
    ("nf4:g64", {}, "gptq holds integers; 'layers.0.attn.q' has nf4:g64: export native instead"),
    ("lut3:g64", {}, "gptq holds integers"),
    ("int4:g32+r4", {}, r"gptq holds integers; 'layers.0.attn.q' has int4:g32\+r4"),
    ("bf16", {}, "no matrix is to become integers"),
    ("bf16", {"lm_head": "int3:g32"}, "'lm_head' has 272 outputs, and their 3-bit codes do not fill words"),
])  # fmt: skip
def test_refused_beforehand(family: Any, form: str, pins: dict[str, str], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        gptq.Gptq().check(foreseen(family("llama"), form, pins))


@pytest.mark.parametrize(("rows", "bits", "way"), [(274, 8, "pin it to bf16, or"), (272, 3, "pin it to 8 bits or bf16, or")])
def test_a_head_that_does_not_fill_words_is_told_what_would(family: Any, tmp_path: Path, rows: int, bits: int, way: str) -> None:
    """8 bits are no way out for what has 8 bits."""
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": rows}, num_key_value_heads=2)
    model = make_model(tmp_path, config)
    with pytest.raises(ExportError, match=way):
        gptq.Gptq().check(foreseen(model, "int4:g32", {"lm_head": f"int{bits}:g32"}))


def test_experts_are_refused(family: Any) -> None:
    with pytest.raises(ExportError, match="'mixtral' has experts, which engines of this layout read each in its own way"):
        gptq.Gptq().check(foreseen(family("mixtral"), "int4:g32", {}))


def test_a_scale_that_fp16_cannot_hold(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{Q}.weight"][5] *= 1e-6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"'layers.1.attn.q' has a scale of -?\d\.\d+e-0\d, which fp16 cannot hold exactly"):
        bake(tmp_path / "run", source, text, "gptq", rounded("int4:g32"))
    assert not (tmp_path / "run" / "out" / "gptq").exists()


@pytest.mark.parametrize(("form", "pins", "refused"), [
    ("int4:g64", {}, {}),
    ("int8:g128", {}, {}),
    ("int4:g64", {"layers.0.attn.o": "int8:g64"}, {TRANSFORMERS: "one format for all matrices, and here are int4:g64, int8:g64"}),
    ("int4:g64", {"lm_head": "int8:g16"}, {TRANSFORMERS: "'lm_head' is quantized"}),
    ("int4:g64", {"layers.0.mlp.*": "bf16"}, {TRANSFORMERS: "one format", GENAI: "no matrix in a block as it is"}),
    ("int4:g64", {"*.attn.q": "int8:g64"}, {TRANSFORMERS: "one format", VLLM: "joins q,k,v of a block", GENAI: "joins q,k,v"}),
    ("int4:g64", {"*.mlp.up": "int8:g64"}, {TRANSFORMERS: "one format", VLLM: "joins gate,up of a block"}),
    ("int3:g64", {}, {VLLM: "symmetric formats of 4 and 8 bits, not int3:g64", GENAI: "2, 4 and 8 bits"}),
    ("int2:g64", {}, {VLLM: "4 and 8 bits"}),
    ("int4:g64:asym", {}, {VLLM: "symmetric", GENAI: "symmetric"}),
    ("int4:g24", {}, None),
    ("int4:channel", {}, {GENAI: "groups of 16"}),
])  # fmt: skip
def test_which_engines_take_it(
    text: Path, tmp_path: Path, form: str, pins: dict[str, str], refused: dict[str, str] | None
) -> None:
    make_model(tmp_path / "model", transformers.LlamaConfig(
        hidden_size=384, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, vocab_size=272))  # fmt: skip
    state = foreseen(tmp_path / "model", form, pins)
    known = engines(state)
    if refused is None:
        assert all(known[e] for e in (GPTQMODEL, TRANSFORMERS, GENAI))
        return
    assert {e for e, why in known.items() if why} == refused.keys()
    assert all(part in known[e] for e, part in refused.items())
    said = gptq.Gptq().remarks(state)
    assert len(said) == 1 + len(refused)
    assert not any("\n" in line for line in said)


# --- an artifact proves itself ----------------------------------------------------------------------------------------


def flip(name: str) -> Callable[[dict[str, Tensor]], None]:
    """Flip the lowest bit of the first number of a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[0] ^= 1

    return change


@pytest.mark.parametrize("kind", covered(["sym", "asym"], "asym"))
@pytest.mark.parametrize(
    "name", [f"{Q}.{s}" for s in gptq_layout.SUFFIXES] + ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_a_flipped_bit_is_caught(made: Any, family: Any, tmp_path: Path, kind: str, name: str) -> None:
    exporter, job = gptq.Gptq(), Job(open_model(str(family("llama"))), made(kind).state, None, "key", lambda facts: "")
    exporter.write(job, tmp_path)
    assert exporter.prove(job, tmp_path).difference == 0
    tensors = load_file(tmp_path / "model.safetensors")
    flip(name)(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError, match=r"on disk differs from the|is not that of int4:g64|is not in the order of inputs"):
        exporter.prove(job, tmp_path)


def test_eval_and_inspect_read_it(made: Any, text: Path, capsys: Any) -> None:
    done = made("asym")
    assert main(["inspect", str(artifact_of(done)), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {s["site"]: s["format"] for s in shown["sites"] if s["format"] not in ("as it is", "fp16")} == {
        n: str(s.format) for n, s in done.state.codes.items() if not isinstance(s.format, Dense)
    }
    assert main(["eval", str(artifact_of(done)), "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0


def test_the_card_names_ways_that_work(made: Any, family: Any, text: Path, tmp_path: Path) -> None:
    card = (artifact_of(made("asym")) / "README.md").read_text()
    assert "GPTQModel.load" in card
    assert "vllm" not in card
    assert "genai" not in card
    done = bake(tmp_path, family("llama"), text, "gptq", rounded("int4:g32"))
    card = (artifact_of(done) / "README.md").read_text()
    assert all(word in card for word in ("GPTQModel.load", "vllm serve", "onnxruntime_genai.models.builder"))


# --- hostile and damaged folders --------------------------------------------------------------------------------------


def unpacked(folder: Path) -> None:
    for stored in gptq_reader.read(folder).codes.values():
        stored.load()


def refused(folder: Path, says: str = ".") -> None:
    with pytest.raises(ModelError, match=says) as caught:
        unpacked(folder)
    assert "\n" not in str(caught.value)


def told(folder: Path, **changes: Any) -> None:
    """Change keys of the quantization_config; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {k: v for k, v in (config["quantization_config"] | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


ALL_DOWN = r"-:^model\.layers\.(?:0|1)\.(?:mlp\.down_proj|mlp\.up_proj)(?:\.|$)"


@pytest.mark.parametrize(("changes", "says"), [
    ({"checkpoint_format": "gptq_p"}, "checkpoint_format is 'gptq_p'; only gptq and gptq_v2 are read"),
    ({"desc_act": True}, "says desc_act: true"),
    ({"bits": 9}, "2 to 8 bits, not 9"), ({"bits": "4"}, "group_size, sym are"), ({"bits": True}, "group_size, sym are"),
    ({"group_size": 0}, "16 to 256 inputs"), ({"group_size": 10**30}, "16 to 256 inputs"), ({"sym": None}, "are 4, 64, None"),
    ({"bits": 2}, "qweight' is int32"), ({"group_size": 32}, "qzeros' is int32"),
    ({"dynamic": None}, "config and weights do not belong together"), ({"dynamic": [1]}, "'dynamic' is to map"),
    ({"dynamic": {"+:.*(a+)+$": {"bits": 8}}}, "is none that compress writes"), ({"dynamic": {"": {}}}, "is none that compress"),
    ({"dynamic": {"-:^(?:lm_head)(?:\\.|$)": 3}}, "is none that compress writes"),
    ({"dynamic": {ALL_DOWN: {}}}, "but 'dynamic' leaves it as it is"),
])  # fmt: skip
def test_configs_that_lie(copy: Path, changes: dict[str, Any], says: str) -> None:
    told(copy, **changes)
    refused(copy, says)


def test_zero_points_stored_less_one_where_they_are_not(copy: Path) -> None:
    told(copy, checkpoint_format="gptq")
    refused(copy, "qzeros' is not that of int4:g64")


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.pop(f"{Q}.scales"), "scales' is missing"),
    (lambda t: t.pop(f"{Q}.g_idx"), "broken qweight or g_idx"),
    (lambda t: t.pop(f"{Q}.qweight"), "asks for 'model.layers.1.self_attn.q_proj.weight'"),
    (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), "scales' is float32"),
    (lambda t: t.update({f"{Q}.g_idx": torch.zeros(0, dtype=torch.int32)}), "q_proj"),
    (lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"] + 1}), "is not in the order of inputs"),
    (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:1].clone()}), "qweight' is int32"),
    (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].flatten()}), "broken qweight"),
])  # fmt: skip
def test_tensors_that_do_not_belong(copy: Path, change: Any, says: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    refused(copy, says)


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_cut_short(copy: Path, length: int) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:length])
    refused(copy)


LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
JSON = st.recursive(LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3), max_leaves=6)


@settings(max_examples=25, deadline=None)
@given(said=st.fixed_dictionaries({}, optional={k: JSON for k in ("bits", "group_size", "sym", "dynamic", "checkpoint_format")}))
def test_any_config_ends_in_a_scheme_or_one_line(said: dict[str, Any]) -> None:
    try:
        Scheme.of({"bits": 4, "group_size": 64, "sym": True} | said, "config.json")
    except ModelError as e:
        if "\n" in str(e):
            raise


def test_the_examples_of_the_page_run() -> None:
    outcome = doctest.testfile(str(ROOT / "docs" / "gptq-and-gguf.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 15
    assert outcome.failed == 0
