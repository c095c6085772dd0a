"""Gemma 2 and 3 in a GGUF file: names, norms, keys and vocabulary as llama.cpp has them, read back and in transformers the same.

Needs the `gguf` package, which the product itself does not.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export.artifact.proof import logits
from compress.export.gguf import exporter as gguf
from compress.export.gguf.file import FILE, File, read_file
from compress.export.gguf.gemma import gemma_keys
from compress.export.gguf.metadata import FAMILIES as WRITTEN
from compress.export.gguf.metadata import vector, vector_back
from compress.export.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, vocabulary
from compress.formats import parse
from compress.model.model import open_model
from compress.state.plan import BitPlan
from tests.conftest import covered, rare
from tests.cooking import bake, steps
from tests.gemma import LINES, LOCAL, MODELS, OTHER, SIZE, SPACES, TEXTS, WIDE, gemma, gemma_tokenizer
from tests.test_gguf_tokenizer import as_transformers_reads, joined_by_score
from tests.test_kinds_of_models import WRAPPERS
from tests.test_kinds_of_models import made as wrapped

oracle = pytest.importorskip("gguf", reason="needs the gguf package (pip install gguf)")

PINS = {"layers.0.mlp.*": "int8:g32", "layers.1.mlp.down": "bf16"}


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(name, the table's format) -> the outcome of a run of one of MODELS, once."""
    done: dict[tuple[str, str], Any] = {}

    def get(name: str, table: str = "bf16") -> Any:
        if (name, table) not in done:
            folder = tmp_path_factory.mktemp("gemma")
            source = gemma(folder / "model", MODELS[name][0], **MODELS[name][1])
            pins = PINS | ({"embed": table} if table != "bf16" else {})
            done[name, table] = bake(folder, source, text, "gguf", steps("int4:g32", pins=pins))
        return done[name, table]

    return get


def artifact_of(outcome: Any) -> Path:
    return Path(outcome.artifacts["gguf"][0])


BLOCK = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
         "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}  # fmt: skip
HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}  # of a Gemma 3 only
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def tables(*forms: str) -> list[Any]:
    """Every model with every format of its table: in every run a Gemma 3 with the first."""
    return [(name, form) if (name, form) == ("gemma3", forms[0]) else rare(name, form) for name in MODELS for form in forms]


@pytest.mark.parametrize(("name", "table"), tables("bf16", "int8:g32", "int3:channel"))
def test_the_gguf_package_reads_the_runs_weights(made: Any, name: str, table: str) -> None:
    done = made(name, table)
    state, blocks = done.state, open_model(str(artifact_of(done))).config.num_hidden_layers
    inside = BLOCK | (HEADS if name != "gemma2" else {})
    names = OUTSIDE | {f"blk.{i}.{n}": f"model.layers.{i}.{m}" for i in range(blocks) for n, m in inside.items()}
    names |= {"output": "lm_head"} if name == "a head of its own" else {}
    tensors = {t.name: t for t in oracle.GGUFReader(artifact_of(done) / FILE).tensors}
    assert set(tensors) == {f"{n}.weight" for n in names}
    sites = {s.weight: s for s in state.graph if not s.tied}
    for theirs, ours in names.items():
        tensor = tensors[f"{theirs}.weight"]
        found = oracle.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if site := sites.get(f"{ours}.weight"):
            wanted = (
                state.codes[site.name].load().dequantize(torch.float32) if site.name in state.codes else state.reference(site)
            )
        else:
            wanted = 1.0 + state.dense.read(f"{ours}.weight").float()  # what a Gemma multiplies by
            assert tensor.tensor_type.name == "F32"
        assert np.array_equal(found, wanted.float().numpy()), theirs
    kinds = {n: t.tensor_type.name for n, t in tensors.items()}
    assert kinds["token_embd.weight"] == {"bf16": "BF16", "int8:g32": "Q8_0", "int3:channel": "Q4_0"}[table]


def keys_of(done: Any) -> dict[str, Any]:
    reader = oracle.GGUFReader(artifact_of(done) / FILE)
    return {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}


SHARED = {"context_length": 256, "embedding_length": 64, "feed_forward_length": 128, "attention.head_count": 4,
          "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16,
          "vocab_size": SIZE, "attention.layer_norm_rms_epsilon": pytest.approx(1e-6)}  # fmt: skip


@pytest.mark.parametrize(("name", "own"), [
    ("gemma3", {"block_count": 2, "attention.sliding_window": 16, "rope.freq_base": 1e6}),
    rare("no windows", {"block_count": 2, "rope.freq_base": 1e6}),
    rare("other windows", {"block_count": 3, "attention.sliding_window": 16,
                       "attention.sliding_window_pattern": [False, True, False],
                       "rope.freq_base": 1e6, "rope.freq_base_swa": 500.0, "rope.scaling.type": "linear",
                       "rope.scaling.factor": 8.0, "final_logit_softcapping": 5.0}),
    rare("gemma2", {"block_count": 2, "attention.sliding_window": 16, "rope.freq_base": 1e4, "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0}),
])  # fmt: skip
def test_the_gguf_package_reads_the_keys(made: Any, name: str, own: dict[str, Any]) -> None:
    keys, arch = keys_of(made(name)), MODELS[name][0]
    assert keys["general.architecture"] == arch
    assert {k.removeprefix(f"{arch}."): v for k, v in keys.items() if k.startswith(f"{arch}.")} == SHARED | own


@pytest.mark.parametrize(("name", "table"), tables("bf16", "int8:g32"))
def test_it_is_proven_in_transformers_and_read_back(made: Any, name: str, table: str) -> None:
    done = made(name, table)
    proof = done.artifacts["gguf"][1]
    assert (proof.engine, proof.difference, proof.greedy) == ("transformers, dequantized from GGUF", 0.0, 16)
    again = gguf.read(artifact_of(done))
    family = WRITTEN[done.state.config.model_type]
    for site, stored in done.state.codes.items():
        held = again.codes[site].load() if site in again.codes else None
        ours = stored.load().dequantize(torch.float32)
        assert torch.equal(ours, held.dequantize(torch.float32) if held else again.reference(again.graph[site]).float()), site
    for norm in done.state.graph.parameters:  # as precise as the sum that it is in
        ours, theirs = (s.dense.read(norm) for s in (done.state, again))
        assert ours.dtype == theirs.dtype
        assert torch.equal(vector(ours, "norm.weight", family), vector(theirs, "norm.weight", family))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), [("bf16", torch.bfloat16), rare("fp16", torch.float16), rare("fp32", torch.float32)])
def test_a_dense_model(tmp_path: Path, text: Path, form: str, dtype: torch.dtype) -> None:
    done = bake(tmp_path / "run", gemma(tmp_path / "model", dtype=dtype), text, "gguf", steps(form))
    assert done.artifacts["gguf"][1].difference == 0
    again = gguf.read(artifact_of(done))
    assert not again.codes
    assert all(torch.equal(again.reference(again.graph[s.name]), done.state.weight(s)) for s in done.state.graph if not s.tied)


@pytest.mark.slow
def test_eval_reads_it(made: Any, text: Path, capsys: Any) -> None:
    folder = str(artifact_of(made("gemma3", "int8:g32")))
    assert main(["eval", folder, "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0


@pytest.mark.parametrize("name", covered(MODELS, "gemma3"))
def test_as_a_source_it_is_the_same_model(made: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its sizes are not those that transformers takes for granted, such as what queries are divided by."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = artifact_of(made(name, "int8:g32"))
    source, ids = open_model(str(folder / FILE)), torch.randint(7, SIZE, (2, 40), generator=torch.Generator().manual_seed(2))
    theirs, ours = (logits(state, [ids], "cpu")[0] for state in (source.state, gguf.read(folder)))
    assert torch.equal(theirs, ours)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(place) for place in (source.folder, folder)]
    for text in TEXTS:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text), text


def test_no_word_of_a_missing_window(made: Any) -> None:
    assert not any("window" in said for said in gguf.Gguf().remarks(made("gemma3").state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_any_size_give_the_same_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (12 * torch.rand(20_000, generator=generator) - 8)
    ours = torch.cat([torch.randn(20_000, generator=generator) * size.clamp(max=6e4), torch.tensor([0.0, -0.0, -1.0, -2.0, 1.0])])
    ours, family = ours.clamp(-6e4, 6e4).to(dtype), WRITTEN["gemma3_text"]
    held = vector(ours, "blk.0.attn_norm.weight", family)
    assert torch.equal(held, 1 + ours.float())
    assert torch.equal(vector(vector_back(held, "blk.0.attn_norm.weight", family, dtype), "blk.0.attn_norm.weight", family), held)


def test_a_norm_of_no_such_sum_is_damage(made: Any, tmp_path: Path) -> None:
    found = read_file(artifact_of(made("gemma3")) / FILE)
    tensors = [tensor for tensor, _ in found.tensors.values()]
    data = {t.name: found.read(t.name) for t in tensors}
    data["output_norm.weight"].view(torch.float32)[3] += 2**-13 + 2**-22
    for file in artifact_of(made("gemma3")).iterdir():
        if file.name not in (FILE, "compress.json") and file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    File({gguf.NOTE: found.metadata[gguf.NOTE]}, tuple(tensors)).write(tmp_path, [data[t.name] for t in tensors])
    with pytest.raises(ModelError, match=r"'output_norm.weight' is not bfloat16, as compress\.formats says"):
        gguf.read(tmp_path).dense.read("model.norm.weight")


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def tokens_of(text: str, keys: dict[str, Any]) -> list[int]:
    """How llama.cpp splits a text: first by the user's own tokens, the longest first, then what is between by scores."""
    tokens = keys["tokenizer.ggml.tokens"]
    own = {t: i for i, t in enumerate(tokens) if keys["tokenizer.ggml.token_type"][i] == USER}
    pattern = "|".join(re.escape(t) for t in sorted(own, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if own else [text]
    return [i for part in parts if part for i in ([own[part]] if part in own else joined_by_score(part, keys))]


@pytest.mark.parametrize("added", [True, False])
def test_the_vocabulary_of_a_gemma(tmp_path: Path, added: bool) -> None:
    keys = vocabulary(gemma_tokenizer(tmp_path, added), SIZE)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokens_of(text, keys) == ours.encode(text, add_special_tokens=False), text
    tokens, types, scores = (keys[f"tokenizer.ggml.{n}"] for n in ("tokens", "token_type", "scores"))
    kinds = {t: (kind, score) for t, kind, score in zip(tokens, types, scores, strict=True)}
    assert (kinds["<bos>"], kinds["<unk>"], kinds["<0x0A>"]) == ((CONTROL, -1000.0), (UNKNOWN, 0.0), (BYTE, 0.0))
    assert all(kinds[line] == (USER, -1000.0) for line in LINES)
    if added:
        assert all(kinds[" " * len(s)] == (USER, -1000.0) for s in SPACES)  # as in a text
    else:
        assert all(kinds[s][0] == NORMAL for s in SPACES)
    pieces = [i for i, kind in enumerate(types) if kind == NORMAL]
    assert [scores[i] for i in pieces] == [float(pieces[0] - i) for i in pieces]  # of their ids, as SentencePiece has them
    assert types[-1] == UNUSED
    assert {k.removeprefix("tokenizer.ggml."): v for k, v in keys.items() if not isinstance(v, list)} == {
        "model": "llama", "pre": "default", "add_space_prefix": False, "add_bos_token": True, "add_eos_token": False,
        "bos_token_id": 2, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 3}  # fmt: skip


@pytest.mark.parametrize("added", [True, False])
def test_transformers_makes_the_same_tokens_of_it(tmp_path: Path, added: bool) -> None:
    keys = vocabulary(gemma_tokenizer(tmp_path / "ours", added), SIZE)
    theirs = as_transformers_reads(tmp_path / "theirs", keys, SIZE, "gemma3")
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text), text


def test_merges_in_another_order_than_ids(tmp_path: Path) -> None:
    merges = json.loads((gemma_tokenizer(tmp_path) / "tokenizer.json").read_text())["model"]["merges"]
    runs = [m for m in merges if not (m[0] + m[1]).strip("\n\u2581")]
    other: list[Any] = [m for m in merges if m not in runs]
    turned = [m for made in dict.fromkeys(a + b for a, b in reversed(other)) for m in other if m[0] + m[1] == made]
    for merges in (runs + turned, other + runs, turned + runs, other[:9] + runs + other[9:]):
        keys = vocabulary(gemma_tokenizer(tmp_path, merges=merges), SIZE)
        ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert tokens_of(text, keys) == ours.encode(text, add_special_tokens=False), text


def test_characters_without_a_token_are_parts_too(tmp_path: Path) -> None:
    """llama.cpp would join them, where the tokenizer has only their bytes."""
    model = json.loads((gemma_tokenizer(tmp_path) / "tokenizer.json").read_text())["model"]
    vocab = model["vocab"] | {"北京": SIZE - 1}
    with pytest.raises(ExportError, match="has not every merge to '北京'"):
        vocabulary(gemma_tokenizer(tmp_path, vocab=vocab), SIZE)


def test_an_added_token_without_a_row_is_left_out(tmp_path: Path) -> None:
    """As small Gemmas have it, whose tokenizers know of the images of larger ones."""
    path = gemma_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({"id": SIZE, "content": "<image>", "special": True, "normalized": False,
                                    "single_word": False, "lstrip": False, "rstrip": False})  # fmt: skip
    path.write_text(json.dumps(content))
    assert "<image>" not in vocabulary(tmp_path, SIZE)["tokenizer.ggml.tokens"]
    assert vocabulary(tmp_path, SIZE + 1)["tokenizer.ggml.tokens"][SIZE] == "<image>"


def test_a_vocabulary_is_read_again_once_it_changed(tmp_path: Path) -> None:
    before = vocabulary(gemma_tokenizer(tmp_path), SIZE)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<table>", "<tabel>"))
    assert before["tokenizer.ggml.tokens"].index("<table>") == vocabulary(tmp_path, SIZE)["tokenizer.ggml.tokens"].index(
        "<tabel>"
    )


# --- what is refused beforehand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "change", "says"), [
    ("gemma3", {"query_pre_attn_scalar": 24}, "divides queries by the root of 24 .*, and llama.cpp by that of 16"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "has an attn_logit_softcapping of 50, and llama.cpp none for a Gemma 3"),
    ("gemma3", {"use_bidirectional_attention": True}, "the model looks ahead"),
    ("gemma3", {"hidden_activation": "silu"}, "computes 'gemma3_text' with gelu_pytorch_tanh, and this model has silu"),
    ("gemma3", {"attention_bias": True}, "q_proj.bias' has no place in llama.cpp's 'gemma3'"),
    ("gemma3", {"rope_parameters": OTHER["rope_parameters"] | {LOCAL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
     "no rotary embeddings of the type 'linear' in layers with a window"),
    ("gemma3", {"rope_parameters": OTHER["rope_parameters"] | {WIDE: {
        "rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}}},
     "no rotary embeddings of the type 'yarn' in layers without a window"),
    ("gemma2", {"final_logit_softcapping": None}, "caps the logits of a Gemma 2 .* no final_logit_softcapping"),
    ("gemma2", {"attn_logit_softcapping": None}, "no attn_logit_softcapping"),
    ("gemma2", {"tie_word_embeddings": False}, "'lm_head' .* has no place in llama.cpp's 'gemma2'"),
])  # fmt: skip
def test_configs_that_llama_cpp_has_no_keys_for(tmp_path: Path, name: str, change: dict[str, Any], says: str) -> None:
    state = open_model(str(gemma(tmp_path, name, **change))).state
    plan = BitPlan.of(state.graph, parse("int4:g32"), {}, state.dtype)
    with pytest.raises(ExportError, match=says):
        gguf.Gguf().check(state.promising(plan.formats))


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_language_model_within_another(tmp_path: Path, name: str) -> None:
    state = open_model(str(wrapped(tmp_path, WRAPPERS[name][0], WRAPPERS[name][1]()))).state
    with pytest.raises(
        ExportError, match=f"gguf: '{name}' is a language model within another, whose towers the file would leave"
    ):
        gguf.Gguf().check(state)


def test_the_largest_sizes_scale_queries_otherwise(tmp_path: Path) -> None:
    """llama.cpp tells them by their number of blocks."""
    for name, blocks in (("gemma2", 46), ("gemma3", 62)):
        config = open_model(str(gemma(tmp_path / name, name))).config
        config.num_hidden_layers, config.num_attention_heads = blocks, 8
        arch = WRITTEN[config.model_type]
        assert gguf_keys(config, arch, 8)
        with pytest.raises(ExportError, match=r"by the root of 16 .*, and llama.cpp by that of 8"):
            gguf_keys(config, arch, 16)


def gguf_keys(config: Any, family: Any, scalar: int) -> dict[str, Any]:
    config.query_pre_attn_scalar = scalar
    return gemma_keys(config, family.architecture)
