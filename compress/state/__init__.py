"""What flows through the passes: structure, tensors by reference, the plan, and the files that they lie in."""

from __future__ import annotations

from compress.state.state import Aspect, Fact, State, Stored

__all__ = ["Aspect", "Fact", "State", "Stored"]
