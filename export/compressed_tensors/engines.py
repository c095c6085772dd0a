"""What loads a compressed-tensors artifact here: stock transformers, or our runtime where that cannot.

The known limits of stock transformers are as of compressed-tensors 0.20 and transformers 5.23. Others are found by trying: an
engine is only given away after a first forward pass.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from compress.errors import CompressError, first_line
from compress.export.artifact.engines import LOCAL, EngineError, Transformers
from compress.export.compressed_tensors import adapter, cache
from compress.export.compressed_tensors.serving import schemes
from compress.formats import Int
from compress.model.skeleton import base_class, model_class, with_logits
from compress.state import State

VLLM = "vLLM >= 0.31 (2 to 8 bits; 0.25 to 0.30: symmetric)"
STOCK = "transformers (with compressed-tensors >= 0.18)"
RUNTIME, STOCK_NAME = "compress runtime", "transformers"


def stock_obstacles(state: State) -> list[str]:
    """Why stock transformers cannot load the artifact; empty when it can."""
    formats = schemes(adapter.base_of(state).formats)
    found = []
    if any(isinstance(f, Int) and not f.symmetric for f in formats.values()):
        found.append("asymmetric formats (compressed-tensors 0.18 to 0.20 does not load their zero points)")
    if any(state.graph[n].transposed for n in formats):
        found.append(f"'{state.graph.family}' keeps its matrices in Conv1D modules, which compressed-tensors passes over: what "
                     "loads has random weights in their place")  # fmt: skip
    experts = {str(formats.get(s.name)) for s in state.graph if s.expert is not None}
    if len(experts) > 1:
        found.append("experts of different formats (it reads all experts with one)")
    return found


def lacking(state: State) -> list[str]:
    """Why the artifact cannot be compared in stock transformers here, though that loads it."""
    adapted = bool(adapter.corrected(state))
    needed = sum(s.numel for s in state.graph) * (4 if adapted else state.dtype.itemsize) * 1.5
    if needed > psutil.virtual_memory().available:
        return [f"the dense model needs {needed / 2**30:.1f} GiB of memory"]
    if adapted and not adapter.installed():
        return ["the adapter needs PEFT, which is not installed (pip install peft)"]
    if adapted and any(state.graph[n].expert is not None for n in state.formats):
        return ["adapters are compared in fp32, and it unpacks experts in 16 bits"]
    return []


def engine(folder: Path, state: State, device: str) -> Transformers:
    """Stock transformers, with PEFT where there is an adapter; our runtime, which says why in its remark, where those cannot.

    EngineError, with both reasons, where neither can.
    """
    reason = "; ".join(stock_obstacles(state) or lacking(state))
    try:
        if not reason:
            return stock_engine(folder, state, device)
    except EngineError as e:
        reason = str(e)
    try:
        return packed_engine(folder, state, device, f"not in stock transformers: {reason}")
    except EngineError as e:
        raise EngineError(f"{reason}; {e}") from e


def stock_engine(folder: Path, state: State, device: str) -> Transformers:
    """Stock transformers in the state's dtype, after a first pass, in which it unpacks the matrices."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    sites = len(adapter.corrected(state))
    # Experts run in the plain loop: the grouped product that transformers prefers rounds differently, which may send a token
    # elsewhere.
    options: dict[str, Any] = {"experts_implementation": "eager"} if any(s.expert is not None for s in state.graph) else {}
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            model = model_class(config).from_pretrained(folder, dtype=state.dtype, **LOCAL, **options)
            cache.leave_alone(model, state)
            model = with_logits(model)
            model = adapter.apply(model.to(device), folder, sites) if sites else model.to(device)
    except EngineError:
        raise
    except Exception as e:  # some architectures read a module's `weight`, which a packed module lacks
        raise EngineError(f"transformers' {model_class(config).__name__} fails on it ({first_line(e)})") from e
    found = Transformers(model, "transformers with PEFT" if sites else STOCK_NAME)
    found.prefill(torch.zeros(1, 1, dtype=torch.int64))
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers logs errors only."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def lost_without_head(folder: Path, state: State) -> list[str]:
    """The matrices that `AutoModel`, which embedders are loaded by, finds nowhere in the folder, and would fill at random."""
    if base_class(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)) is None:
        return []
    options: dict[str, Any] = {"experts_implementation": "eager"} if any(s.expert is not None for s in state.graph) else {}
    with redirect_stderr(io.StringIO()), quiet():  # it tells of the head, which it leaves out
        _, said = transformers.AutoModel.from_pretrained(folder, dtype=state.dtype, output_loading_info=True, **LOCAL, **options)
    quantized = {state.graph[name].module for name in state.formats if state.graph[name].block is not None}
    held = quantized | {module.partition(".")[2] for module in quantized}
    return sorted(name for name in said["missing_keys"] if name.rpartition(".")[0] in held)


def packed_engine(folder: Path, state: State, device: str, remark: str) -> Transformers:
    """Our runtime, which keeps the matrices packed and applies factors itself."""
    from compress.export import runtime  # registers itself with transformers, which is for those who ask for it

    try:
        with redirect_stderr(io.StringIO()):
            return Transformers(runtime.load(folder, device, state.dtype), RUNTIME, remark)
    except CompressError as e:
        raise EngineError(f"the runtime does not take it ({first_line(e)})") from e
