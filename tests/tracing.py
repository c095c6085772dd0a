"""Graphs for ONNX, traced once in a run of the tests and shared by its processes: a trace takes ten seconds of CPU time.

A trace is a function of the architecture, its sites, the tensors' shapes and the options; the formats of the matrices, which
tests vary, come in afterwards (`export/onnx/graph.py`). So the real tracer makes every graph, and the next who asks for the same
reads it from a folder; buffers come from the weights, whose hash is part of the key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from compress.state import State

SMALL = 1 << 22  # bytes of weights that are quicker hashed than traced


def key_of(state: State, kv_cache: bool, dtype: torch.dtype) -> str | None:
    """The key of a graph; None where a source is not one small file."""
    weights = state.dense.folder / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size > SMALL:
        return None
    specs = sorted((spec.name, str(spec.dtype), tuple(spec.shape)) for spec in state.specs)
    sites = [repr(site) for site in state.graph]
    said = [type(state.config).__name__, state.config.to_json_string(use_diff=False), state.graph.family, sites, specs,
            str(state.dtype), kv_cache, str(dtype), hashlib.sha256(weights.read_bytes()).hexdigest()]  # fmt: skip
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:24]


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Inside, graphs that were traced before lie in `folder`."""
    from compress.export.onnx import graph

    trace = graph.trace

    def remembered(state: State, kv_cache: bool, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
        key = key_of(state, kv_cache, dtype)
        if key is None:
            return trace(state, kv_cache, dtype)
        file, names = folder / f"{key}.onnx", folder / f"{key}.json"
        if not names.exists():
            made, said = trace(state, kv_cache, dtype)
            for path, data in ((file, ir.to_proto(made).SerializeToString()), (names, json.dumps(said).encode())):
                beside = path.with_suffix(f".{os.getpid()}")
                beside.write_bytes(data)
                beside.rename(path)  # the names last: a graph is there whole or not at all
        return ir.from_proto(onnx.load(file)), json.loads(names.read_text())

    graph.trace = remembered
    yield
    graph.trace = trace
