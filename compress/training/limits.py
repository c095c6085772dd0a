"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parsed(limit: str) -> int:
    """Bytes of a text such as 8 GiB; ValueError where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|)", limit.strip())
    if match is None or not 0 < float(match[1]) < 1e15:
        raise ValueError(f"'{limit[:40]}' is no amount of memory; write 8 GiB")
    return int(float(match[1]) * UNITS[match[2]])
