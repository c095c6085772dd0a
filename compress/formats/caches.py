"""What keys and values are rounded to in an engine's cache, and what stands in front of a cache to do it.

    fp8        e4m3 numbers, a scale for the keys of a layer and one for its values
    fp8:head   the same, a scale for each head

The rule is that of compressed-tensors 0.20, which stock transformers runs: a scale is the largest magnitude over 448, the code
that of the quotient, found and multiplied out again in the dtype of the activations; keys are rounded behind their rotary
embedding. What is larger than on the text that scales were measured on becomes 448 scales. Because floating-point numbers are
about as precise anywhere in their range, a scale of 1 does as well where nothing is beyond 448; nobody knows that beforehand, so
they are measured.

`int8` is not among them: vLLM takes a scheme in a checkpoint for floats of 8 bits only. Its caches of `int8_per_token_head` and
others need no scales, and so nothing in a checkpoint: they are a flag of the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from compress.formats.activations import E4M3_MAX, rounded

CACHE = "kv_cache"  # where `State.serving` says what is rounded, and how
CacheName = Literal["fp8", "fp8:head"]
Turn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keys and values [b, heads, t, d] -> what a cache keeps of them


def scales(largest_h: Tensor, kind: str, dtype: torch.dtype) -> list[float]:
    """The scales by the largest magnitude of each head [heads]: one, or one for each; numbers that `dtype` holds."""
    most = largest_h if kind == "fp8:head" else largest_h.amax(0, keepdim=True)
    found = (most.float() / E4M3_MAX).to(dtype)
    return torch.where(found > 0, found, 1.0).tolist()  # nothing was there, or too little for the dtype


def shape_of(held: list[float], kind: str) -> tuple[int, ...]:
    """The shape of scales in a checkpoint, which fits keys and values."""
    return (len(held), 1, 1) if kind == "fp8:head" else (1,)


def kept(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values [b, heads, t, d] as a cache with these scales gives them back, in their own dtype."""
    scale = scale.to(x.device, x.dtype)
    return rounded(x / scale, "e4m3") * scale


class Fronted:
    """Stands in front of a cache of transformers, or of none: what is put in goes through `turn` first, whatever else is asked
    the cache answers."""

    def __init__(self, turn: Turn, cache: Any = None):
        self._turn, self._cache = turn, cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention is to go on with: all keys and values so far."""
        turned = self._turn(key_states, value_states)
        return turned if self._cache is None else self._cache.update(*turned, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
