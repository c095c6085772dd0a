"""GGUF files in llama.cpp: its tokens are the tokenizer's, its logits those of the run's weights.

It rounds what is multiplied with packed matrices to 8 bits, so logits are compared with what quantization itself changed. Its
build lives in an environment of its own:

    python -m venv VENV && VENV/bin/pip install llama-cpp-python==0.3.36            # COMPRESS_LLAMACPP_PYTHON=VENV/bin/python
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
from compress.export.gguf.file import FILE
from compress.formats.ggml import TYPES
from compress.model.model import open_model
from tests.conftest import ROOT
from tests.cooking import bake
from tests.gemma import MODELS, gemma

pytestmark = pytest.mark.slow

TEXT = "The cat sat on the mat. 3 + 4 = 7 and seven, eight; it's 12:30."
# One token at a time: with some builds, several in a row end in a crash, for files of llama.cpp's own making too.
CHILD = """
import json, sys, numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=128, logits_all=True, verbose=False)
tokens = model.tokenize(sys.argv[2].encode(), add_bos=False, special=False)
for token in tokens:
    model.eval([token])
np.save(sys.argv[3], np.array(model.scores[: len(tokens)]))
print(json.dumps(tokens))
"""


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("COMPRESS_LLAMACPP_PYTHON")
    if not found:
        pytest.skip("needs llama.cpp: set COMPRESS_LLAMACPP_PYTHON")
    return found


@pytest.mark.parametrize(("form", "pins"), [
    ("int4:g32", {}), ("int3:g64", {}), ("int5:g32", {}), ("int8:g32", {}), ("int4:g64:asym", {}),
    ("int4:g32", {"embed": "int8:g32"}), ("int5:g32", {"embed": "int4:g64", "lm_head": "int8:g32"}),
])  # fmt: skip
def test_it_computes_what_the_weights_give(python: str, tmp_path: Path, form: str, pins: dict[str, str]) -> None:
    source = ROOT / "recipes" / "quickstart-model"
    done = bake(tmp_path, source, None, "gguf", {"quantize": {"method": "rtn", "format": form, "pins": pins}})
    # 8 bits change less than the rounding
    compare(python, tmp_path, source, done, TEXT, 0.5 if form != "int8:g32" else None)


@pytest.mark.parametrize("table", ["bf16", "int8:g32", "int4:g32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gemma(python: str, tmp_path: Path, name: str, table: str) -> None:
    """With windows shorter than the text, norms that are more by one, and one table for tokens and head."""
    source = gemma(tmp_path / "model", MODELS[name][0], **MODELS[name][1])
    pins = {"embed": table} if table != "bf16" else {}
    done = bake(tmp_path, source, None, "gguf", {"quantize": {"method": "rtn", "format": "int4:g32", "pins": pins}})
    compare(python, tmp_path, source, done, f"{TEXT}\n\n\tover   the<table>hills  and far", 0.5)


@pytest.mark.parametrize("kind", TYPES)
def test_its_own_types(python: str, tmp_path: Path, kind: str) -> None:
    """Each on every matrix, the table too, of a model wide enough for its blocks."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    source = gemma(tmp_path / "model", "gemma3", **wide)
    pins = {"embed": kind}
    done = bake(tmp_path, source, None, "gguf", {"quantize": {"method": "rtn", "format": kind, "pins": pins}})
    close = kind in ("q5_k", "q6_k", "q5_1")  # to the model: its own rounding of activations is no smaller
    compare(python, tmp_path, source, done, TEXT, None if close else 0.5)


def compare(python: str, folder: Path, source: Path, done: Any, text: str, share: float | None) -> None:
    """llama.cpp's tokens of a text are the tokenizer's, its logits nearly the run's: off by `share` of what it changed."""
    import numpy as np

    saved = folder / "logits.npy"
    command = [python, "-c", CHILD, str(done.artifacts["gguf"][0] / FILE), text, str(saved)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    tokens = json.loads(out.splitlines()[-1])
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
    assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]

    theirs, ids, model = torch.from_numpy(np.load(saved)), torch.tensor([tokens]), open_model(str(source))
    ours, original = (logits(s, [ids], "cpu")[0][0] for s in (done.state, model.state))
    noise = float((theirs - ours).abs().mean())
    assert noise < 0.02 * float(ours.abs().max())
    assert share is None or noise < share * float((theirs - original).abs().mean())
