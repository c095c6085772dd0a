"""compress: name a model and a budget, get the best checkpoint that fits it.

>>> import compress
>>> outcome = compress.run("recipes/quickstart.yaml")          # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

__all__ = ["CompressError", "plan", "run"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `compress --help` answers before torch is loaded."""
    if name == "CompressError":
        from compress.errors import CompressError

        return CompressError
    if name in ("plan", "run"):
        from compress import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'compress' has no attribute '{name}'")
