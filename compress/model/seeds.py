"""Randomness that depends on a seed and a name alone, whatever was drawn before."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, what: str) -> torch.Generator:
    """Random numbers for one purpose: the same for the same seed and name."""
    digest = hashlib.sha256(f"{seed}:{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
