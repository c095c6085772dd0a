"""onnxruntime as an engine: tokens in, logits out, keys and values in between."""

from __future__ import annotations

from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from compress.errors import first_line
from compress.export.artifact.engines import EngineError
from compress.export.onnx.datafile import GRAPH
from compress.export.onnx.encode import NBits
from compress.export.onnx.nodes import serialized
from compress.formats import Factored, Format, Int, LowRank, Served, base_of
from compress.state import State

onnxruntime: Any = import_module("onnxruntime")  # it says nothing of its types
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
BESIDE = "session.model_external_initializers_file_folder_path"  # where a graph that comes as bytes finds its data
PRECISE = "session.x64quantprecision"  # or x86 CPUs without VNNI add pairs of products of bytes in 16 bits, which overflow
ERRORS = 3  # onnxruntime's number for a log that tells of errors only


class Session:
    """An artifact in onnxruntime. A cache is the outputs `present` or, of a graph without one, the tokens so far.

    With a `level` every MatMulNBits computes at that accuracy_level instead of its own.
    """

    def __init__(self, folder: Path, state: State, device: str = "cpu", level: int | None = None):
        kind = torch.device(device).type
        provider = PROVIDERS.get(kind, kind)
        if provider not in onnxruntime.get_available_providers():
            raise EngineError(f"onnxruntime {onnxruntime.__version__} is installed without a provider for {kind}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), ERRORS
        options.add_session_config_entry(BESIDE, str(folder))
        if any(isinstance(fmt, Served) for fmt in state.formats.values()):
            options.add_session_config_entry(PRECISE, "1")
        graph = str(folder / GRAPH) if level is None else at_level(folder / GRAPH, level)
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, options, providers=[provider])
        except Exception as e:  # its exceptions share no base class of their own
            raise EngineError(f"onnxruntime {onnxruntime.__version__} does not load it ({first_line(e)})") from e
        self._state, at = state, "" if level is None else f" at accuracy level {level}"
        self.name = f"onnxruntime {onnxruntime.__version__} on {kind.upper()}{at}"
        self._inputs = {i.name: i for i in self._session.get_inputs()}
        self._past = [i for i in self._inputs.values() if i.name.startswith("past_key_values.")]
        self._outputs = [o.name for o in self._session.get_outputs()]
        ours = {"input_ids", "attention_mask", "position_ids", *(i.name for i in self._past)} >= self._inputs.keys()
        shaped = all(i.type in NUMPY and len(i.shape) == 4 and all(type(i.shape[n]) is int for n in (1, 3)) for i in self._past)
        if not ours or not shaped or len(self._outputs) != 1 + len(self._past):
            raise EngineError("its graph has inputs or outputs that are not those we write")

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Logits fp32 [b, t, vocabulary] of windows [b, t], and the cache behind them."""
        if not self._past:
            return self._run(tokens, {}, 0)[0], tokens
        empty = {i.name: self._value(np.zeros((len(tokens), i.shape[1], 0, i.shape[3]), NUMPY[i.type])) for i in self._past}
        return self._run(tokens, empty, 0)

    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits of tokens [b, t] that follow a cache, and the cache behind them."""
        if not self._past:
            logits, seen = self.prefill(torch.cat([cache, tokens], 1))
            return logits[:, -tokens.shape[1] :], seen
        return self._run(tokens, cache, next(iter(cache.values())).shape()[2])

    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads, as they lie in memory; a table of which it takes rows is not counted."""
        width = 2 if self._session.get_outputs()[0].type == "tensor(float16)" else 4
        return bytes_in_memory(self._state, width)

    def unread(self) -> float:
        return 0.0

    def _run(self, tokens: Tensor, past: dict[str, Any], before: int) -> tuple[Tensor, Any]:
        count, new = tokens.shape
        given = {"input_ids": tokens.numpy(), "attention_mask": np.ones((count, before + new), np.int64),
                 "position_ids": np.arange(before, before + new)[None].repeat(count, 0)}  # fmt: skip
        feeds = {name: self._value(array) for name, array in given.items() if name in self._inputs} | past
        try:
            logits, *present = self._session.run_with_ort_values(self._outputs, feeds)
        except Exception as e:  # as above
            raise EngineError(f"{self.name} fails on it ({first_line(e)})") from e
        cache = {i.name: value for i, value in zip(self._past, present, strict=True)}
        return torch.from_numpy(logits.numpy()).float(), cache

    @staticmethod
    def _value(array: Any) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def bytes_in_memory(state: State, width: int) -> int:
    """Codes of integers as they are; their scales and all else in numbers of `width` bytes, made at loading."""
    total = width * sum(map(prod, state.graph.parameters.values()))
    for site in state.graph:
        if site.role != "embed":
            held = state.graph.owner(site)
            total += matrix_bytes(state.format(held), held.shape, width)
    return total


def matrix_bytes(fmt: Format | None, shape: tuple[int, int], width: int) -> int:
    """The same of one matrix."""
    if isinstance(fmt, Factored):
        return sum(matrix_bytes(fmt.factors, side, width) for side in fmt.factor_shapes(shape).values())
    if isinstance(fmt, Served):
        return prod(shape) + 4 * shape[0]
    base, factors = base_of(fmt) if fmt else None, fmt.rank * sum(shape) if isinstance(fmt, LowRank) else 0
    if not isinstance(base, Int):
        return width * (prod(shape) + factors)
    form = NBits.of(base, shape[1])
    codes = shape[0] * form.blocks * form.block * form.bits // 8
    zeros = 0 if base.symmetric else shape[0] * -(-form.blocks * form.bits // 8)
    return codes + zeros + width * (shape[0] * form.blocks + factors)


def at_level(path: Path, level: int) -> bytes:
    """A graph with another accuracy_level in every MatMulNBits."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    return serialized(model)
