"""The exporters, and what reads their artifacts back: two explicit tables."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from compress.export import compressed_tensors, native
from compress.export.artifact import Exporter
from compress.export.compressed_tensors import CompressedTensors
from compress.export.engines import Engine
from compress.export.native import Native
from compress.model import Model
from compress.state import State

EXPORTERS: dict[str, type[Exporter]] = {e.name: e for e in (CompressedTensors, Native)}


class Kind(Protocol):
    """A kind of artifact that can be read back; each is a module beside this one."""

    READER: str

    @staticmethod
    def is_artifact(folder: Path) -> bool: ...
    @staticmethod
    def open_artifact(folder: Path) -> Model: ...
    @staticmethod
    def read(folder: Path) -> State: ...
    @staticmethod
    def engine(folder: Path, state: State, device: str) -> Engine: ...


KINDS: tuple[Kind, ...] = (compressed_tensors, native)
