"""A native artifact served by vLLM through our plug-in, on the CPU: the log-probabilities are those of the run's own model,
and so is a text through the cache.

COMPRESS_VLLM_PYTHON names the python of an environment with vLLM, as for test_vllm.py. The package is given to it by PYTHONPATH,
with the entry point that an installed one has.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.export.artifact.files import MARK
from compress.export.artifact.proof import logits
from tests.conftest import ROOT, make_model
from tests.cooking import bake, steps
from tests.test_vllm import CHILD, IDS, VOCABULARY, vllm_python

assert vllm_python  # the fixture
pytestmark = pytest.mark.slow

MIXED = {"*.q": "int4:g32", "*.k": "int3:g64:asym+r4", "*.v": "bf16", "*.o": "nf4:g64:dq8x16:r64", "*.gate": "lut3:g64",
         "*.up": "int4:g32:r128",
         "*.down": "nf3:g64+r8:int8:channel", "lm_head": "int8:channel"}  # fmt: skip
KINDS = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, bos_token_id=256, eos_token_id=257),
    "qwen2": lambda: transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY,
        max_position_embeddings=256, word_embed_proj_dim=128, bos_token_id=256, eos_token_id=257),
}  # fmt: skip
FOUR: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
SLIDING: dict[str, Any] = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
OF_FOUR = {
    "llama": lambda: transformers.LlamaConfig(**FOUR),
    "qwen3": lambda: transformers.Qwen3Config(**FOUR, head_dim=32),
    "gemma3": lambda: transformers.Gemma3TextConfig(**FOUR, **SLIDING, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3 of 3": lambda: transformers.Gemma3TextConfig(
        **FOUR | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
        **SLIDING,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma2": lambda: transformers.Gemma2Config(**FOUR, **SLIDING),
    "phi3": lambda: transformers.Phi3Config(**FOUR),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=128, n_layer=4, n_head=4, n_positions=256, vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**FOUR),  # this and gpt_neox by transformers' classes
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in FOUR.items() if k != "num_key_value_heads"}),
}
WIDTHS = {"layers.*": 0.75, "layers.0.*": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "widths": {"mlp": WIDTHS},
    "groups": {"mlp": WIDTHS, "kv_groups": {"layers.1.*": 2, "layers.2.*": 1}},
    "uneven": {"kv_groups": {"layers.1.*": 2}},  # of 3: pages of a cache that do not divide each other
    "no mlp": {"mlp": {"layers.0.*": 0}},
    "no attention": {"kv_groups": {"layers.0.*": 0, "layers.2.*": 0}},
    "all": {"mlp": WIDTHS | {"layers.3.*": 0}, "kv_groups": {"layers.1.*": 2, "layers.2.*": 0}},
}
APART = {'"VLLM_ENABLE_V1_MULTIPROCESSING": "0", ': "", "enforce_eager=True": "enforce_eager=False",
         "llm = LLM": "if __name__ == '__main__': llm = LLM"}  # fmt: skip
TOKENS = 12
GENERATE = {"max_tokens=1,": f"max_tokens={TOKENS}, ignore_eos=True,",
            "json.dump(rows,": "json.dump([rows, list(answer.outputs[0].token_ids)],"}  # fmt: skip


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the package is installed beside vLLM."""
    info = tmp_path_factory.mktemp("site") / "compress_pipeline-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compress-pipeline\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncompress = compress.export.runtime.vllm:register\n")
    return {**os.environ, "PYTHONPATH": f"{info.parent}{os.pathsep}{ROOT}"}


def served(python: str, environment: dict[str, str], artifact: Path, out: Path, **changes: str) -> Any:
    code = CHILD
    for old, new in changes.items():
        code = code.replace(old, new)
    command = [python, "-c", code, str(artifact), json.dumps(IDS.tolist()), str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=out.parent)


def log_probabilities(out: Path) -> torch.Tensor:
    return as_tensor(json.loads(out.read_text()))


def as_tensor(rows: list[list[list[Any]]]) -> torch.Tensor:
    got = torch.full((len(IDS) - 1, VOCABULARY), float("nan"))
    for t, row in enumerate(rows):
        for token, value in row:
            got[t, token] = value
    assert not got.isnan().any()
    return got


@pytest.mark.parametrize(("kind", "dtype"), [
    ("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "float32"), ("opt", "float32"),
])  # fmt: skip
def test_vllm_computes_with_our_matrices(
    vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    pins = {name: form for name, form in MIXED.items() if not (kind == "qwen2" and name == "lm_head")}
    pins = {name: form for name, form in pins.items() if not (kind == "opt" and name in ("lm_head", "*.gate"))}
    source = make_model(tmp_path / "model", KINDS[kind](), getattr(torch, dtype))
    done = bake(tmp_path / "run", source, text, "native", steps("int5:g32+r4", pins=pins))
    artifact = done.artifacts["native"][0]
    (ours,) = logits(done.state, [IDS[None]], "cpu")
    wanted = ours[0, :-1].log_softmax(-1)
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json", bfloat16=dtype)
    assert ran.returncode == 0, f"vLLM failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    off = (log_probabilities(tmp_path / "out.json") - wanted).abs()
    assert float(off.mean()) < (0.08 if dtype == "bfloat16" else 1e-3)
    assert float(off.max()) < (1.0 if dtype == "bfloat16" else 1e-2)


def test_compiled_and_in_processes_of_their_own(vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", KINDS["llama"](), torch.float32)
    done = bake(tmp_path / "run", source, text, "native", steps("int4:g32", pins={"*.k": "int3:g32"}))
    artifact = done.artifacts["native"][0]
    (ours,) = logits(done.state, [IDS[None]], "cpu")
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json", bfloat16="float32", **APART)
    assert ran.returncode == 0, f"vLLM failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    off = (log_probabilities(tmp_path / "out.json") - ours[0, :-1].log_softmax(-1)).abs()
    assert float(off.max()) < 1e-2


def shaped(folder: Path, kind: str, shapes: str, text: Path, form: str | None = "int4:g32", dtype: Any = torch.float32) -> Any:
    """A run that leaves layers of these shapes, quantized unless there is no format."""
    source = make_model(folder / "model", OF_FOUR[kind](), dtype)
    return bake(folder / "run", source, text, "native", {"prune": SHAPES[shapes]}, *([steps(form)] if form else []))


def told(done: Any) -> tuple[torch.Tensor, list[int]]:
    """What the run's own model thinks of each next token, and the text that it goes on with."""
    ids, first = IDS, None
    for _ in range(TOKENS):
        (ours,) = logits(done.state, [ids[None]], "cpu")
        first = ours if first is None else first
        ids = torch.cat([ids, ours[0, -1:].argmax(-1)])
    return first[0, :-1].log_softmax(-1), ids[len(IDS) :].tolist()


@pytest.mark.parametrize(("kind", "shapes", "form"), [
    *((kind, shapes, "int4:g32") for kind in ("llama", "qwen3", "gemma3") for shapes in ("groups", "no mlp", "no attention")),
    ("llama", "widths", "int8:channel"), ("llama", "all", "int3:g32:asym+r4"), ("llama", "all", None), ("gemma3", "all", None),
    ("gemma3 of 3", "uneven", "int4:g32"), ("gemma2", "all", "nf4:g64"), ("phi3", "all", "int4:g32"),
    ("gpt2", "widths", "int4:g32"), ("smollm3", "groups", "int4:g32"), ("smollm3", "no mlp", None),
    ("gpt_neox", "widths", "int4:g32"),
])  # fmt: skip
def test_layers_that_differ_in_shape(
    vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path, kind: str, shapes: str, form: str | None
) -> None:
    done = shaped(tmp_path, kind, shapes, text, form)
    ran = served(vllm_python, plugged, done.artifacts["native"][0], tmp_path / "out.json", bfloat16="float32", **GENERATE)
    assert ran.returncode == 0, f"vLLM failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    rows, tokens = json.loads((tmp_path / "out.json").read_text())
    wanted, follows = told(done)
    assert float((as_tensor(rows) - wanted).abs().max()) < 1e-2
    assert tokens == follows


def test_layers_that_differ_compiled_and_in_processes_of_their_own(
    vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path
) -> None:
    done = shaped(tmp_path, "llama", "all", text)
    ran = served(
        vllm_python, plugged, done.artifacts["native"][0], tmp_path / "out.json", bfloat16="float32", **GENERATE, **APART
    )
    assert ran.returncode == 0, f"vLLM failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    rows, tokens = json.loads((tmp_path / "out.json").read_text())
    wanted, follows = told(done)
    assert float((as_tensor(rows) - wanted).abs().max()) < 1e-2
    assert tokens == follows


@pytest.mark.parametrize("form", ["int4:g32", None])
def test_without_the_plugin_vllm_does_not_take_it_for_something_else(
    vllm_python: str, text: Path, tmp_path: Path, form: str | None
) -> None:
    artifact = shaped(tmp_path, "llama", "groups", text, form).artifacts["native"][0]
    ran = served(vllm_python, dict(os.environ), artifact, tmp_path / "out.json")
    assert ran.returncode
    assert not (tmp_path / "out.json").exists()


def test_no_attention_is_refused_where_transformers_builds(
    vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path
) -> None:
    artifact = shaped(tmp_path, "smollm3", "no attention", text).artifacts["native"][0]
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json")
    assert ran.returncode
    assert "layer 0 has no attention, and vLLM builds 'smollm3' from transformers' classes" in ran.stdout + ran.stderr


@pytest.mark.parametrize("shapes", ["widths", "groups"])
def test_a_config_of_other_shapes_than_the_weights_is_refused(
    vllm_python: str, plugged: dict[str, str], text: Path, tmp_path: Path, shapes: str
) -> None:
    artifact = shaped(tmp_path, "llama", shapes, text).artifacts["native"][0]
    config = json.loads((artifact / "config.json").read_text())
    key = {"widths": "intermediate_size", "groups": "num_key_value_heads"}[shapes]
    config["per_layer_config"]["1"][key] = {"widths": 160, "groups": 1}[shapes]
    (artifact / "config.json").write_text(json.dumps(config))
    (artifact / MARK).unlink()  # whose hashes would tell
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json")
    assert ran.returncode
    assert "config and weights do not belong together" in ran.stdout + ran.stderr


@pytest.mark.parametrize(("change", "says"), [
    ({"format_version": 2}, "format_version is 2, and 1 is the newest"),
    ({"formats": {"model.norm": "int4:g9"}}, "a group has 16 to 256"),
])  # fmt: skip
def test_what_it_does_not_know_it_refuses(
    vllm_python: str, plugged: dict[str, str], family: Any, text: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    artifact = bake(tmp_path, family("llama"), text, "native", steps("int4:g32")).artifacts["native"][0]
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"] |= change
    (artifact / "config.json").write_text(json.dumps(config))
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json")
    assert ran.returncode
    assert says in ran.stdout + ran.stderr


def test_packed_experts_are_refused(vllm_python: str, plugged: dict[str, str], family: Any, text: Path, tmp_path: Path) -> None:
    artifact = bake(tmp_path, family("mixtral"), text, "native", steps("int4:g32")).artifacts["native"][0]
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json")
    assert ran.returncode
    assert "has packed experts, which the vLLM plug-in does not serve" in ran.stdout + ran.stderr
