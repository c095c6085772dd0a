"""The pass `context_merge`: what our runtime needs to read prompts longer than the model's window by merging them (HOMER, arXiv
2404.10308).

Nothing of the model changes. A long prompt is cut into chunks that are merged in pairs, layer by layer, and on each level the
tokens that are looked at least are dropped; compress/cache/merging.py says how. What is looked at falls with distance whatever
stands there, so the mean by distance is measured here, block by block on the calibration windows, and goes along as
`context_merge.safetensors`; context_merge_core.py has the formula.

Means are of every distance within a chunk, so calibration windows are at least as long as one. They are kept under the state
and the windows: other affixes or another warm-up measure nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.cache.merging import MERGED, Merging, check_affixes, chunk_of, tree
from compress.cache.policy import SERVED
from compress.errors import ModelError, RecipeError
from compress.formats.caches import CACHE
from compress.manager import Context, Cost, Pass, Record
from compress.model.attention import Attended, Heads, heads
from compress.model.speed import precision
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.passes.attended import seen_by_layer
from compress.passes.context_merge_core import BLOCK, sums
from compress.passes.importance import changes
from compress.state import Aspect, State

USUAL = 4096  # tokens of a window where a model has more positions, and none is given
WARMUP = 3 / 8  # of the layers, as the paper has for 32 of them


class ContextMerge(Pass):
    """Measure the biases by which our runtime merges prompts that are longer than the model's window."""

    name: ClassVar[str] = "context_merge"
    writes: ClassVar[Aspect] = Aspect.SERVING

    window: int | None = Field(
        None,
        ge=16,
        le=2**20,
        description="tokens that the model reads at once, chunks are half of it; its positions, at most 4096, where not given",
    )
    warmup: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="layers that chunks go through before the first are merged; three eighths where not given",
    )
    prefix: int = Field(
        4, ge=0, le=2**20, description="first tokens of a prompt that every chunk begins with, unless a call says so"
    )
    suffix: int = Field(
        32, ge=1, le=2**20, description="last tokens of a prompt that every chunk ends with, unless a call says so"
    )

    @model_validator(mode="after")
    def _room(self) -> ContextMerge:
        if self.window is not None:
            try:
                check_affixes(chunk_of(self.window), self.prefix, self.suffix)
            except ModelError as e:
                raise ValueError(str(e)) from None
        return self

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'context_merge' needs data.calibration, on which it measures what is looked at by distance")
        later = next((p for p in following if changes(p) or p.name == self.name), None)
        if later:
            raise RecipeError(f"'context_merge' measures the model as it stands here, and '{later.name}' behind it changes that; "
                              f"move it behind '{later.name}', or leave one out")  # fmt: skip

    def check_windows(self, length: int, state: State) -> None:
        chunk = chunk_of(self._window(state))
        if length < chunk:
            raise RecipeError(f"'context_merge' measures all distances within a chunk of {chunk} tokens, and windows have "
                              f"{length}; ask for {chunk} or more, or for a smaller 'window'", ("window",))  # fmt: skip

    def foresee(self, state: State) -> State:
        for name, other in ((SERVED, "kv_policy"), (CACHE, "kv_cache")):
            if name in state.serving:
                raise RecipeError(f"'context_merge' leaves a cache of its own, and an earlier '{other}' decides on another; "
                                  "leave one of them out")  # fmt: skip
        found, window, warmup = mergeable(state), self._window(state), self._warmup(state)
        positions = _positions(state)
        if positions and window > positions:
            raise RecipeError(f"'context_merge': a window of {window} is more than the {positions} positions that the model "
                              f"knows; ask for {positions} or less", ("window",))  # fmt: skip
        sliding = min((each.sliding for each in found if each.sliding), default=None)
        if sliding and chunk_of(window) > sliding:
            raise RecipeError(f"'context_merge': some layers see {sliding} tokens, and chunks have {chunk_of(window)}; ask for a "
                              f"window of {2 * sliding} or less", ("window",))  # fmt: skip
        if len(found) - warmup < 2:
            raise RecipeError(f"'context_merge': behind a warm-up of {warmup} of {len(found)} layers nothing can be merged; "
                              "lower 'warmup'", ("warmup",))  # fmt: skip
        try:
            check_affixes(chunk_of(window), self.prefix, self.suffix)
        except ModelError as e:
            raise RecipeError(f"'context_merge': {e}") from None
        return replace(state, serving={**state.serving, MERGED: {}})

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        window, layers, warmup = self._window(state), len(heads(state)), self._warmup(state)
        chunk, most = chunk_of(window), layers - warmup - 1
        limit = (chunk - self.prefix - self.suffix) << most
        eight = tree(min(8 * window, limit), chunk, layers, warmup, self.prefix, self.suffix)
        yield (f"context_merge: prompts beyond {window:,} tokens are read in chunks of {chunk:,} and leave a cache of {chunk:,}; "
               f"{sum(eight.leaves):,} have at most {eight.live:,} at once, {limit:,} are the most")  # fmt: skip

    def cost(self, state: State, tokens: int) -> Cost:
        work, chunk, found = per_token(state), chunk_of(self._window(state)), heads(state)
        logits = tokens * (chunk + BLOCK) * sum(each.reader.shape[1] for each in found)
        widest = max(each.reader.shape[1] // each.width for each in found)
        rows = min(tokens, BLOCK) * min(tokens, chunk + BLOCK)
        peak = waiting_bytes(state, tokens) + block_bytes(state) + rows * (2 * 4 * widest + 32)
        return Cost(2.0 * tokens * work.weights, 2.0 * logits, 0, peak, numbers=tokens * work.numbers)

    def run(self, state: State, ctx: Context) -> State:
        found, window = mergeable(state), self._window(state)
        store = ctx.store.analysis("merging", {"version": 1, "distances": chunk_of(window)})
        by_layer = seen_by_layer(state, ctx, store, found, lambda *_: _Meter(chunk_of(window)))
        bias = tuple(tuple(by_layer[each.layer]["bias"]) for each in found)
        told = [_told(each, row) for each, row in zip(found, bias, strict=True)]
        for record in told:
            ctx.say(record)
        merging = Merging(window, self._warmup(state), self.prefix, self.suffix, bias)
        return state.with_part(ctx.store.commit("merging", serving={MERGED: merging.told()}, records=told))

    def _window(self, state: State) -> int:
        return self.window or min(USUAL, _positions(state) or USUAL)

    def _warmup(self, state: State) -> int:
        return round(WARMUP * len(state.graph.blocks)) if self.warmup is None else self.warmup


class _Meter:
    """Sees the attention of one block: sums by distance over all windows."""

    def __init__(self, distances: int):
        self.found = torch.zeros(distances, dtype=torch.float64)
        self.pairs = torch.zeros(distances, dtype=torch.float64)

    def __call__(self, a: Attended, out: Tensor) -> Tensor:
        with precision("ieee"):
            found, pairs = sums(a, len(self.found))
        self.found, self.pairs = self.found + found, self.pairs + pairs
        return out

    def record(self) -> Record:
        """Means, in fp32, as they are stored."""
        return {"bias": (self.found / self.pairs).float().tolist()}


def mergeable(state: State) -> list[Heads]:
    """The heads of every layer; ModelError where contexts of such a model cannot be merged."""
    found, family, text = heads(state), state.graph.family, state.config.get_text_config()
    if len(found) != len(state.graph.blocks):
        raise ModelError(f"'{family}' has layers without attention here, and merging drops tokens by what they look at in each")
    if text is not state.config:
        raise ModelError(f"'{family}' is a language model inside of another, whose positions are not those of its text alone; "
                         "contexts are merged in models of text")  # fmt: skip
    if not getattr(text, "rope_parameters", None) or getattr(text, "alibi", False):
        raise ModelError(f"'{family}' has no rotary positions (RoPE), and contexts are merged in models that have")
    return found


def _positions(state: State) -> int | None:
    held: int | None = getattr(state.config.get_text_config(), "max_position_embeddings", None)
    return held


def _told(each: Heads, bias: Sequence[float]) -> Record:
    """What is said of a layer: its bias near and far."""
    near, far = bias[min(1, len(bias) - 1)], bias[-1]
    return {
        "site": f"layers.{each.layer}.attn",
        "notes": [f"looks at the token before by {near:.2f}, {len(bias) - 1} before by {far:.2f}"],
    }
