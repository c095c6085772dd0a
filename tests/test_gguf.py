"""The GGUF file: the `gguf` package and transformers read from it the run's weights, and damaged files end in one line.

Needs the `gguf` package, which the product itself does not.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compress import pipeline
from compress.cli import main
from compress.errors import ExportError
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK
from compress.export.artifact.proof import logits
from compress.export.gguf import blocks as gguf_blocks
from compress.export.gguf import exporter as gguf
from compress.export.gguf.file import FILE, read_file
from compress.export.gguf.metadata import NOTE, rope_factors
from compress.formats import Int, Packed, parse
from compress.formats.grid import plain
from compress.model.model import open_model
from compress.state import State
from compress.state.plan import BitPlan
from tests import stock
from tests.conftest import FAMILIES, covered, make_model
from tests.cooking import bake, steps
from tests.test_native import same_state

oracle = pytest.importorskip("gguf", reason="needs the gguf package (pip install gguf)")

NAMES = ("llama", "mistral", "qwen2", "qwen3")
PINS = {"layers.0.mlp.*": "int8:g32", "layers.1.attn.*": "int5:g64", "layers.1.mlp.down": "int3:channel", "lm_head": "int6:g32",
        "layers.1.mlp.gate": "bf16", "layers.1.mlp.up": "fp16"}  # fmt: skip
ASYMMETRIC = {"layers.0.mlp.*": "int3:g32:asym", "layers.1.attn.*": "int5:g64:asym", "layers.1.mlp.down": "int7:channel:asym"}
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def rounded(form: str, pins: dict[str, str] | None = None) -> dict[str, Any]:
    return {"quantize": {"method": "rtn", "clip": "minmax", "format": form, "pins": pins or {}}}


def pins_of(name: str) -> dict[str, str]:
    return {k: v for k, v in PINS.items() if k != "lm_head" or name != "qwen2"}  # whose head is tied


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["gguf"][0]


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pipeline.Outcome]:
    """made(family) -> what a run with mixed formats made of it, once."""
    done: dict[str, pipeline.Outcome] = {}

    def get(name: str) -> pipeline.Outcome:
        if name not in done:
            done[name] = bake(tmp_path_factory.mktemp(name), family(name), text, "gguf", rounded("int4:g64", pins_of(name)))
        return done[name]

    return get


@pytest.fixture
def copy(made: Any, tmp_path: Path) -> Path:
    """A llama's artifact, to damage."""
    return Path(shutil.copytree(artifact_of(made("llama")), tmp_path / "artifact"))


# --- what other tools read --------------------------------------------------------------------------------------------


def halves(heads: int, rows: Tensor) -> Tensor:
    """Rows as llama.cpp's rotary embedding wants them: those that turn together are neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


OURS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm"}  # fmt: skip
OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}  # fmt: skip


def wanted_tensor(name: str, state: State, config: Any) -> Tensor:
    """What the file is to hold under llama.cpp's name, fp32."""
    module, ending = OUTSIDE.get(name, name), ""
    if name.startswith("blk."):
        _, block, part, ending = name.split(".")
        module = f"model.layers.{block}.{OURS[part]}.{ending}"
    sites = {s.weight: s for s in state.graph}
    changed = state.codes.get(sites[module].name) if module in sites else None
    held = changed.load().dequantize(torch.float32) if changed else state.dense.read(module).float()
    turned = config.model_type in ("llama", "mistral")
    for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
        held = halves(heads, held) if turned and name.split(".")[2:3] == [part] else held
    return held


@pytest.mark.parametrize("name", covered(NAMES, "llama"))
def test_the_gguf_package_reads_the_runs_weights(made: Any, family: Any, name: str) -> None:
    done, config = made(name), open_model(str(family(name))).config
    reader = oracle.GGUFReader(artifact_of(done) / FILE)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    for tensor in reader.tensors:
        found = oracle.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        assert np.array_equal(found, wanted_tensor(tensor.name, done.state, config).numpy()), tensor.name
    assert {kinds[f"blk.{i}.{n}.weight"] for i, n in ((0, "attn_q"), (1, "ffn_down"))} == {"Q4_0"}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.1.attn_k.weight"], kinds["blk.1.ffn_up.weight"]) == ("Q8_0", "Q5_0", "F16")
    assert (kinds["token_embd.weight"], kinds["output_norm.weight"], kinds["blk.1.ffn_gate.weight"]) == ("BF16", "F32", "BF16")
    assert ("output.weight" in kinds) == (name != "qwen2")
    assert len(kinds) == len(reader.tensors) == len(open_model(str(family(name))).checkpoint.specs)


@pytest.mark.parametrize("name", covered(NAMES, "llama"))
def test_the_gguf_package_reads_the_keys(made: Any, family: Any, name: str) -> None:
    reader, config = oracle.GGUFReader(artifact_of(made(name)) / FILE), open_model(str(family(name))).config
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    arch = {"mistral": "llama"}.get(name, name)
    assert keys["general.architecture"] == arch
    own = {k.removeprefix(f"{arch}."): v for k, v in keys.items() if k.startswith(f"{arch}.")}
    assert own == {
        "context_length": 16 if name == "mistral" else 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps), "rope.dimension_count": 16,
        "rope.freq_base": 10000.0, "vocab_size": 272,
    }  # fmt: skip
    tokens = keys["tokenizer.ggml.tokens"]
    assert (tokens[:2], tokens[256:260], len(tokens)) == (["!", '"'], ["<s>", "</s>", "<pad>", "[PAD259]"], 272)
    assert keys["tokenizer.ggml.token_type"] == [1] * 256 + [3] * 3 + [5] * 13
    assert [t.name for t in reader.fields["tokenizer.ggml.token_type"].types] == ["ARRAY", "INT32"]  # as llama.cpp insists
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    ids = {k: keys[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "padding")}
    assert ids == {"bos": 256, "eos": 257, "padding": 258}
    assert json.loads(keys[NOTE])["formats"]["layers.1.attn.q"] == "int5:g64"


@pytest.mark.parametrize("name", covered(["llama", "qwen2", "qwen3"], "llama"))
def test_transformers_computes_what_our_weights_give(made: Any, family: Any, name: str) -> None:
    """As anybody loads it; the config is the file's own, but for the size of qwen3's heads, which transformers does not read."""
    folder, state = artifact_of(made(name)), made(name).state
    given = {"config": transformers.AutoConfig.from_pretrained(folder)} if name == "qwen3" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, **given).eval()
    state = replace(state, dtype=torch.float32)
    ours = logits(state, [IDS], "cpu")[0]
    assert float((stock.logits(model, [IDS])[0] - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
    peer = stock.load(family(name), dtype=torch.float32)
    stock.substitute(peer, state.graph, {n: state.weight(state.graph[n]) for n in state.codes})
    said, wanted = (m.generate(IDS[:1], max_new_tokens=12, do_sample=False) for m in (model, peer))
    assert torch.equal(said, wanted)


@pytest.mark.slow
def test_mistral_is_a_llama_without_a_window(text: Path, tmp_path: Path) -> None:
    config = FAMILIES["mistral"]()
    config.sliding_window = None
    done = bake(tmp_path / "run", make_model(tmp_path / "model", config), text, "gguf", rounded("int4:g32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(artifact_of(done), gguf_file=FILE, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    ours = logits(replace(done.state, dtype=torch.float32), [IDS], "cpu")[0]
    assert float((stock.logits(model, [IDS])[0] - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
    assert "does not know 'mistral'" in done.artifacts["gguf"][1].remark


@pytest.mark.slow
@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
])  # fmt: skip
def test_other_rotary_embeddings(text: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = rope
    source = make_model(tmp_path / "model", config)
    done = bake(tmp_path / "run", source, text, "gguf", rounded("int4:g32"))
    assert done.artifacts["gguf"][1].difference == 0
    same_state(done.state, gguf.read(artifact_of(done)))
    reader = oracle.GGUFReader(artifact_of(done) / FILE)
    extra = [t for t in reader.tensors if t.name == "rope_freqs.weight"]
    if rope["rope_type"] == "linear":
        assert not extra
        assert reader.fields["llama.rope.scaling.factor"].contents() == 4
        return
    assert np.array_equal(extra[0].data, rope_factors(open_model(str(source)).config).numpy())  # type: ignore[union-attr]
    (artifact_of(done) / MARK).unlink()  # which has the file's hash
    found = read_file(artifact_of(done) / FILE)
    data = bytearray((artifact_of(done) / FILE).read_bytes())
    data[found.tensors["rope_freqs.weight"][1]] ^= 1
    (artifact_of(done) / FILE).write_bytes(data)
    job = Job(open_model(str(source)), done.state, None, "key", lambda facts: "")
    with pytest.raises(ExportError, match=r"'rope_freqs\.weight' on disk is not what was to be written"):
        gguf.Gguf().prove(job, artifact_of(done))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_artifact_proves_itself_in_transformers(made: Any, name: str) -> None:
    proof = made(name).artifacts["gguf"][1]
    assert (proof.engine, proof.difference, proof.greedy) == ("transformers, dequantized from GGUF", 0.0, 16)


# --- our own reader ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(NAMES, "llama"))
def test_what_is_written_is_read_back(made: Any, name: str) -> None:
    done, again = made(name), gguf.read(artifact_of(made(name)))
    same_state(replace(done.state, codes={n: s for n, s in done.state.codes.items() if isinstance(s.format, Int)}), again)
    for site, stored in done.state.codes.items():
        if isinstance(stored.format, Int):
            theirs = again.codes[site].load().tensors
            assert all(torch.equal(t, theirs[s]) for s, t in stored.load().tensors.items()), site
        else:
            assert torch.equal(again.reference(again.graph[site]), stored.load().tensors["weight"])
    layout = pipeline.plan(done.out.parent / "recipe.yaml").layouts["gguf"]
    assert [(f.name, f.nbytes) for f in layout.files] == [(FILE, (artifact_of(done) / FILE).stat().st_size)]
    assert again.dense.base.nbytes == layout.tensor_bytes < layout.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_precisions(family: Any, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    done = bake(tmp_path, family("llama", dtype), text, "gguf", rounded("int4:g32"))
    same_state(done.state, gguf.read(artifact_of(done)))
    assert done.artifacts["gguf"][1].difference == 0


@pytest.mark.slow
def test_vectors_of_another_precision_than_the_model(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.float() + 2.0**-20 if "norm" in n else t for n, t in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # which the model does not use
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    done = bake(tmp_path / "run", source, text, "gguf", rounded("int4:g32"))
    same_state(done.state, gguf.read(artifact_of(done)))


@pytest.mark.slow
def test_asymmetric_weights_are_kept_though_zero_points_are_not(family: Any, text: Path, tmp_path: Path) -> None:
    done = bake(tmp_path, family("llama"), text, "gguf", rounded("int4:g64:asym", ASYMMETRIC))
    assert done.artifacts["gguf"][1].difference == 0
    again = gguf.read(artifact_of(done))
    for site in done.state.graph.linear:
        assert again.format(again.graph[site.name]) == done.state.format(site)
        ours, theirs = (s.codes[site.name].load().dequantize(torch.float32) for s in (done.state, again))
        assert torch.equal(ours, theirs)
    kinds = {t.name: t.tensor_type.name for t in oracle.GGUFReader(artifact_of(done) / FILE).tensors}
    found = [kinds[f"blk.{n}.weight"] for n in ("0.ffn_up", "0.attn_q", "1.attn_q", "1.ffn_down")]
    assert found == ["Q4_0", "Q5_0", "Q8_0", "Q8_0"]


def test_eval_and_inspect_read_it(made: Any, text: Path, capsys: Any) -> None:
    done = made("llama")
    assert main(["inspect", str(artifact_of(done)), "--json"]) == 0
    shown = {s["site"]: s["format"] for s in json.loads(capsys.readouterr().out)["sites"]}
    assert shown["layers.1.mlp.down"] == "int3:channel"
    assert main(["eval", str(artifact_of(done)), "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0


# --- blocks -----------------------------------------------------------------------------------------------------------

HELD = [f"int{b}:{g}{a}" for b in range(2, 9) for g in ("g32", "g64", "channel") for a in ("", ":asym") if (b, a) != (8, ":asym")]


@settings(max_examples=25, deadline=None)
@given(text=st.sampled_from(HELD), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1.0, 0.01]))
def test_blocks_hold_what_the_format_means(text: str, seed: int, spread: float) -> None:
    fmt = parse(text)
    assert isinstance(fmt, Int)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(5, 192, generator=generator) * spread + spread * float(torch.randn(1, generator=generator))
    packed = Packed(fmt, (5, 192), fmt.pack(*plain(weights, fmt)))
    kind = gguf_blocks.container(fmt)
    assert kind
    blocks = gguf_blocks.pack(packed, kind, "w")
    theirs = oracle.dequantize(blocks.numpy(), oracle.GGMLQuantizationType[kind.name])
    assert np.array_equal(theirs, packed.dequantize(torch.float32).numpy())
    again = gguf_blocks.restore(fmt, *gguf_blocks.unpack(blocks.flatten(), kind, (5, 192)), torch.bfloat16)
    assert torch.equal(Packed(fmt, (5, 192), again).dequantize(torch.float32), packed.dequantize(torch.float32))
    if fmt.symmetric:
        assert all(torch.equal(again[s], t) for s, t in packed.tensors.items())


def test_the_container_of_every_format() -> None:
    assert {t: k.name for t in HELD if ":g32" in t and (k := gguf_blocks.container(parse(t)))} == {  # type: ignore[arg-type]
        "int2:g32": "Q4_0", "int3:g32": "Q4_0", "int4:g32": "Q4_0", "int5:g32": "Q5_0", "int6:g32": "Q8_0", "int7:g32": "Q8_0",
        "int8:g32": "Q8_0", "int2:g32:asym": "Q4_0", "int3:g32:asym": "Q4_0", "int4:g32:asym": "Q5_0", "int5:g32:asym": "Q8_0",
        "int6:g32:asym": "Q8_0", "int7:g32:asym": "Q8_0"}  # fmt: skip


# --- what is refused beforehand ---------------------------------------------------------------------------------------


def foreseen(folder: Path, form: str, pins: dict[str, str]) -> State:
    """The state that a plan of `form` and `pins` foresees."""
    state = open_model(str(folder)).state
    return state.promising(BitPlan.of(state.graph, parse(form), pins, state.dtype).formats)


@pytest.mark.parametrize(("name", "form", "says"), [
    ("gpt2", "int4:g32", "models of 'gpt2' are not written, only llama, mistral, qwen2, qwen3"),
    ("mixtral", "int4:g32", "models of 'mixtral' are not written"),
    ("llama", "int8:g32:asym", "'layers.0.attn.q' has int8:g32:asym, whose differences take 9 bits; pin it to int8:g32"),
    ("llama", "int4:g16", "'layers.0.attn.q' has int4:g16, and GGUF has blocks of 32 inputs; pin it to groups of 32"),
    ("llama", "nf4:g64", "gguf holds integers; 'layers.0.attn.q' has nf4:g64: export native instead"),
    ("llama", "int4:g32+r4", r"gguf holds integers; 'layers.0.attn.q' has int4:g32\+r4"),
])  # fmt: skip
def test_refused_beforehand(family: Any, name: str, form: str, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        gguf.Gguf().check(foreseen(family(name), form, {}))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("change", "says"), [
    ({"hidden_act": "gelu"}, "computes 'llama' with silu, and this model has gelu"),
    ({"rope_parameters": {**YARN, "attention_factor": 1.0}}, "YaRN has attention_factor 1, and llama.cpp computes with 1.06931"),
    ({"rope_parameters": {**YARN, "beta_fast": 16}}, "YaRN has beta_fast 16, and llama.cpp computes with 32"),
    ({"rope_parameters": {**YARN, "truncate": False}}, "YaRN has truncate 0"),
    ({"rope_parameters": {**YARN, "rope_type": "dynamic"}}, "rotary embeddings of the type 'dynamic' are not written"),
])  # fmt: skip
def test_configs_that_llama_cpp_has_no_keys_for(family: Any, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = Path(shutil.copytree(family("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ExportError, match=says):
        gguf.Gguf().check(foreseen(folder, "int4:g32", {}))


def test_biases_where_llama_cpp_has_none(tmp_path: Path) -> None:
    config = FAMILIES["qwen3"]()
    config.attention_bias = True
    with pytest.raises(ExportError, match=r"'model.layers.0.self_attn.q_proj.bias' has no place in llama.cpp's 'qwen3'"):
        gguf.Gguf().check(foreseen(make_model(tmp_path, config), "int4:g32", {}))


def test_a_scale_that_fp16_cannot_hold(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("llama"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][5] *= 1e-6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"'layers.1.attn.q' has a scale of -?\d\.\d+e-0\d, which fp16 cannot hold exactly"):
        bake(tmp_path / "run", source, text, "gguf", rounded("int4:g32"))


def test_what_plan_says(family: Any) -> None:
    said = gguf.Gguf().remarks(foreseen(family("mistral"), "int3:g64", {"*.down": "int8:g32"}))
    assert said == [
        "gguf is for llama.cpp, whose blocks hold int3:g64 as Q4_0, 4.5 bits per weight; int8:g32 as Q8_0, 8.5 bits per weight",
        "gguf: llama.cpp has no sliding window of 16 tokens for 'mistral', so the file gives the model a context of 16",
    ]
    assert gguf.Gguf().remarks(foreseen(family("llama"), "bf16", {})) == []


@pytest.mark.parametrize("name", covered(["llama", "qwen2", "qwen3"], "qwen3"))
@pytest.mark.parametrize("more", [{}, {"mscale": 1.0, "mscale_all_dim": 0}, {"attention_factor": 1.0693147}])
def test_yarn_is_written_as_llama_cpp_computes_it(
    family: Any, text: Path, tmp_path: Path, name: str, more: dict[str, Any]
) -> None:
    """From the three keys that the file holds, by llama.cpp's formulas, come the frequencies and the factor of transformers."""
    folder = Path(shutil.copytree(family(name), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": {**YARN, **more}}))
    artifact = artifact_of(bake(tmp_path, folder, None, "gguf", steps("int4:g32")))
    keys, opened = read_file(artifact / FILE).metadata, open_model(str(folder)).config
    arch = {"llama": "llama"}.get(name, name)
    assert keys[f"{arch}.rope.scaling.type"] == "yarn"
    factor, original = keys[f"{arch}.rope.scaling.factor"], keys[f"{arch}.rope.scaling.original_context_length"]
    wanted, scale = ROPE_INIT_FUNCTIONS["yarn"](opened, torch.device("cpu"))
    size, base = 16, keys[f"{arch}.rope.freq_base"]
    low, high = (size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
    low, high = max(0, math.floor(low)), min(size - 1, math.ceil(high))
    mix = 1 - ((torch.arange(size // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    plain = base ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(plain / factor * (1 - mix) + plain * mix, wanted, rtol=1e-4, atol=1e-7)
    assert scale == pytest.approx(1 + 0.1 * math.log(factor))


def test_llama3_is_refused_where_llama_cpp_has_no_factors(family: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family("qwen2"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(ExportError, match="no rotary embeddings of the type 'llama3' for 'qwen2'"):
        gguf.Gguf().check(foreseen(folder, "int4:g32", {}))
