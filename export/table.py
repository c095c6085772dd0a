"""The exporters, and what reads their artifacts back: two explicit tables."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from compress.export import compressed_tensors, gguf, gptq, native
from compress.export.artifact import Exporter
from compress.export.compressed_tensors import CompressedTensors
from compress.export.engines import Engine
from compress.export.gguf import Gguf
from compress.export.gptq import Gptq
from compress.export.native import Native
from compress.export.onnx import reader as onnx
from compress.export.onnx.exporter import Onnx
from compress.model import Model
from compress.state import State

EXPORTERS: dict[str, type[Exporter]] = {e.name: e for e in (CompressedTensors, Gptq, Gguf, Native, Onnx)}


class Kind(Protocol):
    """A kind of artifact that can be read back; each is a module beside this one."""

    READER: str

    def is_artifact(self, folder: Path) -> bool: ...
    def open_artifact(self, folder: Path) -> Model: ...
    def read(self, folder: Path) -> State: ...
    def engine(self, folder: Path, state: State, device: str) -> Engine: ...


KINDS: tuple[Kind, ...] = (compressed_tensors, gptq, gguf, native, onnx)
