"""compress: name a model and a budget, get the best checkpoint that fits it.

>>> import compress
>>> outcome = compress.run_recipe("recipes/quickstart.yaml")          # doctest: +SKIP
"""

from __future__ import annotations

import os
from typing import Any

# Between parallel regions OpenMP's threads spin, and a solver that alternates large products with small steps pays for that with
# up to four times the CPU time. Sleeping threads are told so before torch starts them; a user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__all__ = ["CompressError", "plan_recipe", "run_recipe"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `compress --help` answers before torch is loaded."""
    if name == "CompressError":
        from compress.errors import CompressError

        return CompressError
    if name in ("plan_recipe", "run_recipe"):  # not `plan` and `run`: modules have these names
        from compress import pipeline

        return getattr(pipeline, name.removesuffix("_recipe"))
    raise AttributeError(f"module 'compress' has no attribute '{name}'")
