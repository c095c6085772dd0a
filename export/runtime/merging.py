"""Prompts longer than a window, merged: a walk over a tree of chunks that leaves a cache of one chunk (HOMER, arXiv 2404.10308).

compress/cache/merging.py says how a text is cut. The walk is depth first, left first, so that at most one chunk waits on every
level: O(log n) chunks are there at once, and no text makes attention longer than a chunk. At a node:

1. A leaf is prefix, a piece of the context, suffix, with positions 0 .. P + |piece| - 1, and the suffix at the same place in all
   leaves. An inner node is its two children joined: their contexts one behind the other, each token at its old position, their
   prefixes and suffixes averaged, hidden states and the keys and values of all layers so far.
2. It goes through the layers of its level, causal in the order of its tokens; keys and values stay.
3. But for the root, tokens of the context are dropped until two siblings make one chunk: those with the least s_j - bias[layer,
   p_last - p_j], s_j = max over query heads of q_last . k_j / sqrt(D) in the last of these layers, not softmaxed.
4. They are dropped from keys and values of all lower layers too (propagative refinement), so all layers hold the same tokens.

The paper drops between attention and MLP of that last layer. An MLP sees one token at a time, so dropping behind the layer gives
the same numbers, and asks nothing of how an architecture writes its layers; it costs the MLP of the dropped tokens in one layer
of each level.

How layers are run. The model's own forward makes rotary tables and whatever else blocks are given. For a node it is called with
the node's hidden states and positions; the forward of every layer is replaced for that time by one that lets those below pass,
puts in what was kept, and stops behind the node's last. A loop over layers of our own would be a copy of each architecture's.

What comes of it is a `MergedCache`. To transformers it is a cache that has seen the whole prompt: masks count so, and `generate`
cuts a prompt so. Positions go on behind the chunk; a hook before the model's forward says them. Attention is transformers' own,
since all layers hold the same number of entries. In a layer with a sliding window of W a token sees what is less than W
positions before it.

Limits. One row, without padding. Within one pass of several tokens behind a merged prompt the sliding window is that of the
first. The walk is one chunk at a time, which leaves a large GPU idle for small chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.cache.merging import FILE, Merging, Tree, check_belongs
from compress.errors import ModelError

NAME = "compress_merge"
HERE = f"a context is merged in this model ({FILE})"
Entries = tuple[Tensor, Tensor]  # keys and values [1, KV heads, n, D] of one layer, positions in them


@dataclass(frozen=True)
class Merged:
    """What `merge_context` gives. logits [1, 1, vocabulary]: of the token behind the prompt. past_key_values: for `generate` and
    for calls of the model. levels: of merging, 0 where the prompt was one chunk. tokens, nbytes: the most, of all chunks
    together, that were held between two levels: tokens, and bytes of their hidden states, keys and values."""

    logits: Tensor
    past_key_values: MergedCache
    levels: int
    tokens: int
    nbytes: int


@torch.no_grad()
def merge_context(model: Any, input_ids: Tensor, prefix: int | None = None, suffix: int | None = None) -> Merged:
    """Read a prompt [1, t] of any length by merging. The first `prefix` and the last `suffix` of its tokens are part of every
    chunk and never dropped: instructions, and the question; the artifact's numbers where they are not given.

    A prompt of at most a chunk is read as ever, and gives what the model gives. ModelError for more than one row, for affixes
    that leave no room, for more levels than there are layers, for a model without biases.
    """
    merging: Merging | None = getattr(model, "context_merge", None)
    if merging is None:
        raise ModelError("this model has no biases to merge a context by, or context_merge was set to None; export with the pass "
                         "'context_merge', import compress.export.runtime before it is loaded")  # fmt: skip
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ModelError(f"{HERE}, one row at a time, and was given {list(input_ids.shape)}; give rows [1, t] one by one, "
                         "or set model.context_merge = None")  # fmt: skip
    how = merging.tree(input_ids.shape[1], prefix, suffix)
    with _Walk(model, how, merging.bias).ready() as walk:
        root = walk.node(how.levels, 0, 1 << how.levels, input_ids)
    kinds = DynamicCache(config=model.config).layers
    layers = [MergedLayer(k, v, root.place, input_ids.shape[1], how.after, getattr(kind, "sliding_window", None))
              for (k, v), kind in zip(root.entries, kinds, strict=True)]  # fmt: skip
    return Merged(walk.logits, MergedCache(layers, input_ids.shape[1] - how.after), how.levels, walk.tokens, walk.nbytes)


# --- chunks -----------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """A node on its way. place [n]: positions. hidden [1, n, d], behind the layers so far, whose keys and values `entries` has;
    score [n]: what is looked at, bias taken off, where a layer was asked for it."""

    place: Tensor
    hidden: Tensor
    entries: list[Entries] = field(default_factory=list)
    score: Tensor | None = None

    def __len__(self) -> int:
        return len(self.place)

    @property
    def nbytes(self) -> int:
        return self.hidden.nbytes + sum(k.nbytes + v.nbytes for k, v in self.entries)

    def keep(self, many: int, prefix: int, suffix: int) -> None:
        """Drop all of the context but the `many` tokens with the highest score; of equal ones the earlier stays."""
        assert self.score is not None
        end = len(self) - suffix
        best = self.score[prefix:end].sort(descending=True, stable=True).indices[:many].sort().values + prefix
        ends = torch.arange(len(self), device=best.device)
        at = torch.cat([ends[:prefix], best, ends[end:]])
        self.place, self.hidden, self.score = self.place[at], self.hidden[:, at.to(self.hidden.device)], None
        self.entries = [(k[:, :, at.to(k.device)], v[:, :, at.to(v.device)]) for k, v in self.entries]


def joined(left: Chunk, right: Chunk, prefix: int, suffix: int) -> Chunk:
    """Two siblings as one chunk; theirs are emptied on the way, so that no layer is held twice."""

    def join(a: Tensor, b: Tensor, dim: int) -> Tensor:
        (a_first, a_text, a_last), (b_first, b_text, b_last) = (
            x.split([prefix, x.shape[dim] - prefix - suffix, suffix], dim) for x in (a, b)
        )
        return torch.cat([(a_first + b_first) / 2, a_text, b_text, (a_last + b_last) / 2], dim)

    n, m = len(left) - suffix, len(right)
    place = torch.cat([left.place[:n], right.place[prefix:m]])
    made = Chunk(place, join(left.hidden, right.hidden, 1))
    while left.entries:
        (k, v), (k2, v2) = left.entries.pop(), right.entries.pop()
        made.entries.append((join(k, k2, 2), join(v, v2, 2)))
    made.entries.reverse()
    return made


class _StopError(Exception):
    """The layers of a node are done, and the rest of a forward is not wanted."""


class _Walk:
    """One prompt on its way through a model."""

    def __init__(self, model: Any, how: Tree, bias: tuple[tuple[float, ...], ...]):
        self.model, self.how, self.bias = model, how, bias
        self.base = model.get_decoder()
        self.layers = layers_of(self.base)
        self.waiting: list[Chunk] = []
        self.tokens = self.nbytes = 0
        self.tuples = False  # whether layers return tuples; the first one that runs tells
        self.first = self.last = 0
        self.scored = False
        self.chunk = Chunk(torch.empty(0), torch.empty(0))
        self.logits = torch.empty(0)

    @contextmanager
    def ready(self) -> Iterator[_Walk]:
        """Inside, layers and attention of the model are the walk's."""
        text = self.model.config.get_text_config()
        before, token = text._attn_implementation_internal, _WALK.set(self)
        own: list[Any] = [vars(layer).get("forward") for layer in self.layers]
        text._attn_implementation_internal = NAME
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._through, index, layer.forward)
        try:
            yield self
        finally:
            text._attn_implementation_internal = before
            _WALK.reset(token)
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:  # of accelerate, say
                    layer.forward = forward

    def node(self, level: int, start: int, stop: int, ids: Tensor) -> Chunk:
        """The chunk that leaves `start` .. `stop` make, through the layers of its level; not yet dropped from."""
        if level == 0:
            return self._leaf(start, ids)
        middle = (start + stop) // 2
        sizes = self._context(level - 1, start, middle), self._context(level - 1, middle, stop)
        kept, affixes = self.how.kept(*sizes), (self.how.prefix, self.how.suffix)
        left = self.node(level - 1, start, middle, ids)
        left.keep(kept[0], *affixes)
        self.waiting.append(left)
        right = self.node(level - 1, middle, stop, ids)
        right.keep(kept[1], *affixes)
        self.waiting.pop()
        chunk = joined(left, right, *affixes)
        del left, right
        return self._run(chunk, level, {"inputs_embeds": chunk.hidden})

    def _context(self, level: int, start: int, stop: int) -> int:
        """Tokens of the context in a node, before any are dropped for its parent."""
        whole = sum(self.how.leaves[start:stop])
        return min(whole, self.how.holds) if level else whole

    def _leaf(self, number: int, ids: Tensor) -> Chunk:
        how, many = self.how, self.how.leaves[number]
        begin, device = how.prefix + sum(how.leaves[:number]), ids.device
        mine = torch.cat([ids[:, : how.prefix], ids[:, begin : begin + many], ids[:, ids.shape[1] - how.suffix :]], 1)
        text = torch.arange(how.prefix + many, device=device)
        place = torch.cat([text, torch.arange(how.after - how.suffix, how.after, device=device)])
        return self._run(Chunk(place, torch.empty(0)), 0, {"input_ids": mine})

    def _run(self, chunk: Chunk, level: int, inputs: dict[str, Tensor]) -> Chunk:
        """Pass a chunk through the layers of a level; logits are made at the root."""
        how, self.chunk = self.how, chunk
        self.first, self.last = how.begins(level), how.ends[level] - 1
        root = level == how.levels
        self.scored = not root
        options: dict[str, Any] = {"position_ids": chunk.place[None], "use_cache": False, "return_dict": True, **inputs}
        if root:
            self.logits = self.model(**options, logits_to_keep=1).logits
        else:
            with suppress(_StopError):
                self.base(**options)
        self.tokens = max(self.tokens, sum(map(len, (*self.waiting, chunk))))
        self.nbytes = max(self.nbytes, sum(each.nbytes for each in (*self.waiting, chunk)))
        return chunk

    def _through(self, index: int, own: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward of a layer."""
        if index < self.first:
            return (hidden,) if self.tuples else hidden
        if index == self.first and index:
            hidden = self.chunk.hidden
        out = own(hidden, *args, **kwargs)
        self.tuples = isinstance(out, tuple)
        if index == self.last:
            self.chunk.hidden = out[0] if isinstance(out, tuple) else out
            if len(self.chunk.entries) != index + 1:
                raise ModelError(f"{HERE}, and the attention of layer {index} does not go through transformers' interface")
            if self.scored:
                raise _StopError
        return out

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Keep what attention was given; and, in the last layer of a level, what its last token looks at."""
        self.chunk.entries.append((key, value))
        if layer != self.last or not self.scored:
            return
        q_hgd = query[0, :, -1].float().unflatten(0, (key.shape[1], -1))
        s_n = ((q_hgd @ key[0].float().mT) * scale).amax((0, 1))
        place = self.chunk.place.to(s_n.device)
        bias = torch.tensor(self.bias[layer], device=s_n.device)
        self.chunk.score = (s_n - bias[place[-1] - place]).to(self.chunk.place.device)


_WALK: ContextVar[_Walk] = ContextVar("walk")


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """Causal attention within a chunk, in the order of its tokens, whatever their positions, which overlap."""
    scale = options.get("scaling")
    _WALK.get().see(module.layer_idx, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})


AttentionInterface.register(NAME, _attend)  # and no mask, which transformers then does not make


def layers_of(base: Any) -> list[nn.Module]:
    """The decoder layers of a model without its head."""
    count = base.config.get_text_config().num_hidden_layers
    found = [m for m in base.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise ModelError(f"{HERE}, and which of {type(base).__name__}'s modules are its layers is not known")
    return list(found[0])


# --- what decoding goes on from ---------------------------------------------------------------------------------------


class MergedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Entries of one layer, and what comes behind them. gone: tokens that were seen and are not here."""

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor, seen: int, after: int, sliding: int | None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.gone = keys, values, seen - keys.shape[2]
        self.sliding, self.after = sliding, after
        self.is_sliding = sliding is not None
        self.place = place.to(keys.device)
        self._slide()

    def get_seq_length(self) -> int:
        return self.gone + self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, self.gone

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if len(key_states) != len(self.keys):
            raise ModelError(f"{HERE}, whose cache has {len(self.keys)} rows, and was given {len(key_states)}; use num_beams=1, "
                             "or call its batch_repeat_interleave before")  # fmt: skip
        found = super().update(key_states, value_states)
        new = torch.arange(self.after, self.after + key_states.shape[2], device=self.place.device)
        self.after += len(new)
        self.place = torch.cat([self.place, new])
        self._slide()
        return found

    def _slide(self) -> None:
        """Where the layer has a window, leave what the next token does not see, by position, and what is more than a window."""
        if self.sliding is None:
            return
        near = (self.place > self.after - self.sliding).nonzero()[:, 0][1 - self.sliding :]
        self.gone += len(self.place) - len(near)
        self.keys, self.values, self.place = self.keys[:, :, near], self.values[:, :, near], self.place[near]

    def crop(self, tokens_to_remove: int) -> None:
        raise ModelError(f"{HERE}, and its cache is not cropped: assisted decoding is not supported")

    def activate_past_recording(self) -> None:
        self.crop(0)

    def reset(self) -> None:
        raise ModelError(f"{HERE}, and its cache is not used again for another prompt: leave past_key_values out")


class MergedCache(Cache):
    """The cache of a merged prompt, which has as many tokens as it has `seen`, by `get_seq_length`. skipped: how many positions
    fewer than tokens there are."""

    def __init__(self, layers: list[MergedLayer], skipped: int):
        super().__init__([*layers])
        self.skipped, self.held = skipped, layers

    def positions(self, tokens: int) -> Tensor:
        """The positions [1, tokens] of the next tokens."""
        start = int(self.get_seq_length()) - self.skipped
        return torch.arange(start, start + tokens)[None]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.held)


# --- on a model -------------------------------------------------------------------------------------------------------


def merge_long(model: Any, merging: Merging) -> None:
    """Have a model merge prompts that are longer than its window, in `generate`; and `merge_context` any.

    `model.context_merge = None` has it read them as ever, until it is put back.
    """
    text = model.config.get_text_config()
    check_belongs(merging, text.num_hidden_layers, getattr(text, "max_position_embeddings", None), FILE)
    sliding = [w for layer in DynamicCache(config=model.config).layers if (w := getattr(layer, "sliding_window", None))]
    if sliding and min(sliding) < merging.chunk:
        raise ModelError(f"{FILE}: chunks of {merging.chunk} do not fit the sliding window of {min(sliding)}; they do not belong "
                         "together, copy or export the folder again")  # fmt: skip
    model.context_merge = merging
    if hasattr(model, "_prefill"):  # a model without a head does not generate
        model.plain_prefill = model._prefill
        model._prefill = MethodType(_prefill, model)
    model.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)


def _prefill(model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any) -> Any:
    """Stands for transformers' own, which reads the prompt that `generate` was given."""
    cache = model_kwargs.get("past_key_values")
    begun = cache is not None and cache.get_seq_length() > 0
    off = model.context_merge is None or model_kwargs.get("use_cache") is False
    if off or begun or input_ids.shape[1] <= model.context_merge.window or model_kwargs.get("inputs_embeds") is not None:
        return model.plain_prefill(input_ids, generation_config, model_kwargs, *_, **__)
    mask = model_kwargs.get("attention_mask")
    if len(input_ids) > 1 or (mask is not None and not bool(mask.all())):
        raise ModelError(f"{HERE}, longer than its window of {model.context_merge.window:,}, one row at a time and without "
                         "padding; give rows one by one, num_beams=1, or set model.context_merge = None")  # fmt: skip
    merged = merge_context(model, input_ids)
    return CausalLMOutputWithPast(logits=merged.logits, past_key_values=merged.past_key_values)


def _before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward pass behind a merged prompt: the positions of its tokens."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, MergedCache):
        return args, kwargs
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs["inputs_embeds"] if given is None else given
    return args, {**kwargs, "position_ids": cache.positions(given.shape[1]).to(given.device)}
