"""Attention of a model in hand, seen from outside: which heads share a cache entry, what they are given, and what comes of a
cache with a policy.

transformers calls attention by a name in the config. While `attention_by` holds, that name is ours, and whoever asked sees the
queries, keys and values of every layer, positions already in them; it may put other outputs in place of torch's.

`Following` does so for a policy: the first part of each window is a prompt, which is attended to in full; for what comes behind
it, each head has only those entries of the prompt that its rule keeps, as they come back from what they are stored in. That is
what decoding through the cache computes, token by token, but in one streamed pass with one block in memory; only, nothing of what
comes behind the prompt is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, cycle
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.cache.policy import Layer, Policy, plain_bytes
from compress.cache.rules import entry_bytes, mask_of, scores, stored
from compress.errors import ModelError
from compress.model.couplings import KV_GROUPS, couplings
from compress.model.skeleton import glance
from compress.model.stream import Stream
from compress.shapes import of_layer
from compress.state import State
from compress.state.graph import Site

NAME = "compress_seen"


@dataclass(frozen=True)
class Heads:
    """The heads of one layer that has a cache: `units` KV heads, keys and values of `width` numbers each, `columns` [units, ...]
    the inputs of `reader` that each KV head's queries make. sliding: the layer's window, or None."""

    layer: int
    units: int
    width: int
    sliding: int | None
    reader: Site
    columns: Tensor


def heads(state: State) -> list[Heads]:
    """Those of every layer with attention; ModelError where a cache of this architecture is no keys and values by head."""
    family = state.graph.family
    if not state.graph.causal:
        raise ModelError(f"'{family}' does not predict the next token, and has no cache")
    model: Any = glance(state.config)
    text, layers = model.config.get_text_config(), DynamicCache(config=state.config).layers
    if getattr(text, "attention_chunk_size", None) or getattr(text, "attn_logit_softcapping", None):
        raise ModelError(
            f"the attention of '{family}' is chunked or soft-capped, which is not supported with a policy of the cache"
        )
    if text._attn_implementation != "sdpa":
        raise ModelError(f"'{family}' does not use torch's attention (sdpa), in whose place a cache with a policy stands")
    if any(type(kind) not in (DynamicLayer, DynamicSlidingWindowLayer) for kind in layers):
        raise ModelError(
            f"'{family}' has layers without keys and values by head, which a policy of the cache needs in all of them"
        )
    found = []
    for group in (c for c in couplings(state) if c.kind == KV_GROUPS):
        width = group.reader.shape[1] // of_layer(state.config, group.block).num_attention_heads
        k = next((s for s in state.graph.of_block(group.block) if s.role == "k"), None)
        if group.obstacle or (k and k.shape[0] != group.units * width):
            why = group.obstacle or "keys and values differ in width"
            raise ModelError(f"'{family}': {why}; a policy of the cache needs keys and values by head")
        sliding = getattr(layers[group.block], "sliding_window", None)
        found.append(Heads(group.block, group.units, width, sliding, group.reader, group.columns))
    return found


def plain(found: list[Heads], tokens: int, itemsize: int) -> int:
    """Bytes of a plain cache after so many tokens."""
    return sum(plain_bytes(tokens, each.units, each.width, each.sliding, itemsize) for each in found)


# --- what attention is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attended:
    """One call: queries [b, query heads, t, D], keys and values [b, KV heads, t, D], and of each row which keys a query may look
    at, [b or 1, 1, t, t]; None: those up to itself. layer: its number."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float

    def allowed(self, row: int) -> Tensor | None:
        """The mask of a row [t, t]."""
        return mask_of(self.mask, row)

    @property
    def group(self) -> int:
        """Query heads by KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def resident(self, split: int, sliding: int | None) -> Tensor:
        """The places of a prompt of `split` tokens that are still there when it has been read."""
        return torch.arange(0 if sliding is None else max(0, split - sliding + 1), split, device=self.q.device)


See = Callable[[Attended, Tensor], Tensor]  # given also the outputs [b, t, query heads, D]; returns those to go on with
_SEE: ContextVar[See] = ContextVar("see")


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _SEE.get()(Attended(module.layer_idx, query, key, value, attention_mask, scale), out), weights


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_by(stream: Stream, see: See) -> Iterator[None]:
    """Inside, `see` is asked at every attention of a streamed model."""
    model: Any = stream.model
    text = model.config.get_text_config()
    token, before = _SEE.set(see), text._attn_implementation_internal
    text._attn_implementation_internal = NAME
    try:
        yield
    finally:
        text._attn_implementation_internal = before
        _SEE.reset(token)


# --- what comes of a policy -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Following:
    """A `See` that goes by a policy behind the first `split` tokens of every window of batches [b, t], which every block is given
    in this order.

    told: (layer, window, head) -> the rule that an engine took there, where a ladder has them taken by the prompt; see
    `Ladder.chosen`. took: (layer, window) -> bytes of the entries that are kept, filled as it goes.
    """

    policy: Policy
    split: int
    batches: Sequence[Tensor]
    told: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    took: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def nbytes(self) -> list[int]:
        """Bytes of the cache of every window, once all blocks have been passed."""
        each = Counter[int]()
        for (_, window), nbytes in self.took.items():
            each[window] += nbytes
        return [each[window] for window in sorted(each)]

    @cached_property
    def _layers(self) -> Mapping[int, Layer]:
        return {layer.index: layer for layer in self.policy.layers}

    @cached_property
    def _next(self) -> Iterator[tuple[int, Tensor]]:
        """Number of the first window and kinds of tokens, batch by batch, over and over."""
        firsts = accumulate((len(ids) for ids in self.batches), initial=0)
        return cycle([*zip(firsts, map(self.policy.kinds, self.batches), strict=False)])

    def __call__(self, a: Attended, out: Tensor) -> Tensor:
        layer, split, (first, kinds) = self._layers[a.layer], self.split, next(self._next)
        out = out.clone()
        rows, later = a.resident(split, layer.sliding), torch.arange(split, a.q.shape[2], device=a.q.device)
        for row in range(len(a.q)):
            allowed = a.allowed(row)
            prompt, kind_t = None if allowed is None else allowed[:split, :split], kinds[row].to(rows.device)
            took = 0
            for head, asked in enumerate(layer.units):
                mine = slice(head * a.group, (head + 1) * a.group)
                k_td, v_td = a.k[row, head], a.v[row, head]
                found = scores({asked.rule}, a.q[row, mine, :split], k_td[:split], a.scale, prompt)
                told = self.told.get((a.layer, first + row, head))
                unit, at = self.policy.after_prompt(layer, asked, split, rows, split, 0, found, kind_t, told)
                took += len(at) * entry_bytes(unit.dtype, unit.rule, layer.width)
                places = torch.cat([at, later])
                k_nd, v_nd = (torch.cat([stored(x[at], unit.dtype), x[split:]]).float() for x in (k_td, v_td))
                seen = places <= later[:, None] if allowed is None else allowed[split:][:, places]
                logits = ((a.q[row, mine, split:].float() * a.scale) @ k_nd.T).masked_fill(~seen, -torch.inf)
                out[row, split:, mine] = (logits.softmax(-1) @ v_nd).transpose(0, 1).to(out.dtype)
            self.took[a.layer, first + row] = took
        return out
