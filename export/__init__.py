"""The exporters: one explicit table."""

from __future__ import annotations

from compress.export.artifact import Exporter
from compress.export.compressed_tensors import CompressedTensors
from compress.export.native import Native

EXPORTERS: dict[str, type[Exporter]] = {e.name: e for e in (CompressedTensors, Native)}
