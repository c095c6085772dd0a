"""Formats: what a weight can be stored as. Values that know codes, bytes and dequantization, and nothing of calibration."""

from __future__ import annotations

from compress.formats.formats import Dense, Format, Int, LowRank, Packed, base_of, integers, parse

__all__ = ["Dense", "Format", "Int", "LowRank", "Packed", "base_of", "integers", "parse"]
