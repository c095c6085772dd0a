"""Formats: what a weight can be stored as. Values that know codes, bytes and dequantization, and nothing of calibration."""

from __future__ import annotations

from compress.formats.entropy import Ecq
from compress.formats.factors import Factored, LowRank
from compress.formats.floats import Float
from compress.formats.formats import Format, Packed, base_of, integers, numbers_of, parse, weight_of
from compress.formats.ints import Dense, Int
from compress.formats.rotated import Rotated
from compress.formats.served import Served

__all__ = [
    "Dense",
    "Ecq",
    "Factored",
    "Float",
    "Format",
    "Int",
    "LowRank",
    "Packed",
    "Rotated",
    "Served",
    "base_of",
    "integers",
    "numbers_of",
    "parse",
    "weight_of",
]
