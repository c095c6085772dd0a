"""The exporters: one explicit table."""

from __future__ import annotations

from compress.export.artifact import Exporter
from compress.export.compressed_tensors import CompressedTensors

EXPORTERS: dict[str, type[Exporter]] = {e.name: e for e in (CompressedTensors,)}
