"""A native artifact served by vLLM through our plug-in, on the CPU: the log-probabilities are those of the run's own model.

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

from compress.export.artifact.proof import logits
from tests.conftest import ROOT, make_model
from tests.cooking import bake, steps
from tests.test_vllm import CHILD, IDS, VOCABULARY, vllm_python

assert vllm_python  # the fixture
pytestmark = pytest.mark.slow

MIXED = {"*.q": "int4:g32", "*.k": "int3:g64:asym+r4", "*.v": "bf16", "*.o": "nf4:g64:dq8x16", "*.gate": "lut3:g64",
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
    got = torch.full((len(IDS) - 1, VOCABULARY), float("nan"))
    for t, row in enumerate(json.loads(out.read_text())):
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
    ran = served(vllm_python, plugged, artifact, tmp_path / "out.json", bfloat16="float32", **{
        '"VLLM_ENABLE_V1_MULTIPROCESSING": "0", ': "", "enforce_eager=True": "enforce_eager=False",
        "llm = LLM": "if __name__ == '__main__': llm = LLM"})  # fmt: skip
    assert ran.returncode == 0, f"vLLM failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    off = (log_probabilities(tmp_path / "out.json") - ours[0, :-1].log_softmax(-1)).abs()
    assert float(off.max()) < 1e-2


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
