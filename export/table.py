"""The exporters, and what reads their artifacts back: two explicit tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.export.artifact.engines import Engine
from compress.export.artifact.exporter import Exporter
from compress.export.compressed_tensors import engines as compressed_engines
from compress.export.compressed_tensors import reader as compressed_tensors
from compress.export.compressed_tensors.exporter import CompressedTensors
from compress.export.gguf import engine as gguf_engine
from compress.export.gguf import reader as gguf
from compress.export.gguf.exporter import Gguf
from compress.export.gptq import engines as gptq_engines
from compress.export.gptq import reader as gptq
from compress.export.gptq.exporter import Gptq
from compress.export.native import engine as native_engine
from compress.export.native import reader as native
from compress.export.native.exporter import Native
from compress.export.onnx import reader as onnx
from compress.export.onnx.exporter import Onnx
from compress.model.model import Model
from compress.state import State

EXPORTERS: dict[str, type[Exporter]] = {e.name: e for e in (CompressedTensors, Gptq, Gguf, Native, Onnx)}


@dataclass(frozen=True)
class Kind:
    """A kind of artifact that can be read back. reader: what a user reads of our own reader of it."""

    name: str
    reader: str
    is_artifact: Callable[[Path], bool]
    open_artifact: Callable[[Path], Model]
    read: Callable[[Path], State]
    engine: Callable[[Path, State, str], Engine]


KINDS: tuple[Kind, ...] = tuple(
    Kind(name, module.READER, module.is_artifact, module.open_artifact, module.read, engine)
    for name, module, engine in (
        (CompressedTensors.name, compressed_tensors, compressed_engines.engine),
        (Gptq.name, gptq, gptq_engines.engine),
        (Gguf.name, gguf, gguf_engine.engine),
        (Native.name, native, native_engine.engine),
        (Onnx.name, onnx, onnx.engine),
    )
)
