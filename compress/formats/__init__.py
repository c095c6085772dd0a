"""Formats: what a weight can be stored as. Values that know codes, bytes and dequantization, and nothing of calibration."""

from __future__ import annotations

from compress.formats.entropy import Ecq
from compress.formats.factors import Factored, LowRank
from compress.formats.floats import Float
from compress.formats.formats import Coded, Format, Ggml, Packed, base_of, integers, numbers_of, parse, weight_of
from compress.formats.grid import Can
from compress.formats.ints import Dense, Int
from compress.formats.lattice import Lattice
from compress.formats.rotated import Rotated
from compress.formats.served import Served
from compress.formats.superblocks import Blocks
from compress.formats.trellis import Tcq

__all__ = [
    "Blocks",
    "Can",
    "Coded",
    "Dense",
    "Ecq",
    "Factored",
    "Float",
    "Format",
    "Ggml",
    "Int",
    "Lattice",
    "LowRank",
    "Packed",
    "Rotated",
    "Served",
    "Tcq",
    "base_of",
    "integers",
    "numbers_of",
    "parse",
    "weight_of",
]
