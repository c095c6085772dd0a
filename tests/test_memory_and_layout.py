"""Memory does not grow with depth, files are known to the byte before they are written, and a broken file is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.checkpoint import CODES, INDEX, SINGLE, Checkpoint, File, Layout, Spec, read_header
from compress.errors import ModelError, RunError
from tests.conftest import GROUPED, IDS, ROOT, SMALL, make_tokenizer
from tests.cooking import recipe

# --- memory -----------------------------------------------------------------------------------------------------------

WIDTH, BLOCK_MB = 384, 3.4  # one block of the models below, in bf16
MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from compress import pipeline
from compress.model import open_model
from compress.stream import Stream

def own():  # memory that belongs to this process alone, in MB; pages of mapped files do not
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def peak(work):
    work(2)  # warm up: threads, kernels, caches
    base, found, done = own(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            found.append(own() - base)
    thread = threading.Thread(target=watch)
    thread.start()
    work(20)
    done.set()
    thread.join()
    return max(found)

def run(blocks):
    pipeline.run(Path(f"run{blocks}") / "recipe.yaml")

def forward(blocks):
    model = open_model(str(blocks))
    stream = Stream(model.state, model.config)
    batches = stream.start(model.state, [torch.ones(2, 64, dtype=torch.int64)])
    for block in model.graph.blocks:
        stream.advance(model.state, block.index, batches)
    next(stream.logits(model.state, batches))

print(peak(run), peak(forward))
"""


def deep_model(folder: Path, blocks: int) -> Path:
    """A llama of many wide blocks, written file by file without ever being whole in memory."""
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": blocks},
                                      **GROUPED, **IDS, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(folder)
    make_tokenizer(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    layout = Layout.of([Spec(n, torch.bfloat16, tuple(s)) for n, s in shapes.items()], 100_000_000)
    layout.write(folder, ((n, torch.randn(s, dtype=torch.bfloat16) * s[-1] ** -0.5) for n, s in shapes.items()))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Quantizing, writing and checking 20 blocks takes the memory of a few, and so does a forward pass; not of the model."""
    for blocks in (2, 20):
        source = deep_model(tmp_path / str(blocks), blocks)
        recipe(tmp_path / f"run{blocks}", source, method="rtn", clip="minmax", format="int4:g32")
    whole = sum(p.stat().st_size for p in (tmp_path / "20").glob("*.safetensors")) / 2**20
    assert whole > 20 * BLOCK_MB
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    run, forward = (float(x) for x in done.stdout.split())
    print(run, forward, whole)
    assert run < 7 * BLOCK_MB, (run, forward, whole)
    assert forward < 3 * BLOCK_MB, (run, forward, whole)
