"""The KV cache of an artifact with a policy: entries that a policy drops are freed, and `generate` is called as ever.

The idea. A plain cache is a dense tensor [rows, heads, tokens, width] a layer, so that heads which keep different tokens would
all take the room of the largest. Here every KV head of every row has tensors of its own length, its `Entries`. A prompt is
attended to in full, by torch's own attention; then, layer by layer, what the policy of each head does not keep goes, before the
next layer has made its keys. New tokens wait in a dense tail; when there are `STEP` of them the rules rank old and new entries
together.

transformers sees a `Cache` that says how many tokens it has *seen*, so positions and masks are those of the whole text. Its masks
are one for all layers of a kind, over all tokens; each head takes from it the columns of the tokens that it has kept. That is how
padding and sliding windows come along without code of their own.

Two seams of transformers are used: `AttentionInterface`, for a function that is given queries and may ask the layer that made the
keys (they carry it); and the model's way to make a cache, in `generate` and in a plain forward pass. What would need entries that
are gone, or another order of rows (beam search, assisted decoding, crop), is a `ModelError`.

Alternatives not taken. Masks over a dense cache free nothing. One flat tensor a layer with offsets is the layout that kernels for
sequences of different lengths want; on a CPU it gains nothing over a list, and every eviction would copy all of it.

Limits. Heads are computed one after the other: that leaves most of a GPU idle. Prompts are not
compressed while they are read, so the peak of a long prompt is one layer's full cache beyond what stays.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.cache.policy import FILE, Layer, Policy, Unit, check_belongs
from compress.cache.rules import DTYPES, MARKS, STEP, SUMMED, codes, mask_of, scores
from compress.errors import ModelError
from compress.shapes import ATTENTION, layers_without

NAME = "compress_cache"
HERE = "the cache of this model follows kv_policy.json"


class Entries:
    """What one KV head of one row holds: `held`, tensors by name, all with the entries first.

    k, v [N, D], with k_scale and v_scale [N, 1] where they are codes; place [N] of each token in the text; score [N], attention
    that was given to it, and kind [N] of its token, where the unit's rule asks for them. With a ladder rows have rules of their
    own.
    """

    def __init__(self, unit: Unit, held: dict[str, Tensor]):
        self.unit, self.held = unit, held

    @classmethod
    def of(cls, unit: Unit, k: Tensor, v: Tensor, place: Tensor, score: Tensor | None, kind: Tensor | None) -> Entries:
        held = {"place": place.int()}
        for name, x in (("k", k), ("v", v)):
            if unit.dtype == "int8":
                held[name], held[f"{name}_scale"] = codes(x)
            else:
                held[name] = x.to(DTYPES[unit.dtype], copy=True)
        if unit.rule in SUMMED:
            held["score"] = torch.zeros(len(k), device=k.device) if score is None or unit.rule == "snap" else score.clone()
        if unit.rule in MARKS:
            assert kind is not None, "a cache whose rules ask for kinds of tokens has seen token ids"
            held["kind"] = kind.clone()
        return cls(unit, held)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Keys or values [N, D]."""
        x = self.held[name]
        return (x.float() * self.held[f"{name}_scale"].float()).to(dtype) if x.dtype == torch.int8 else x.to(dtype)

    def chosen(self, indices: Tensor) -> Entries:
        return Entries(self.unit, {name: tensor[indices] for name, tensor in self.held.items()})

    def with_more(self, other: Entries) -> Entries:
        return Entries(self.unit, {name: torch.cat([tensor, other.held[name]]) for name, tensor in self.held.items()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.held.values())

    def __len__(self) -> int:
        return len(self.held["place"])


class PolicyLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The cache of one layer; see the head of this file.

    seen: tokens, padding counted. entries [row][head]: None until a prompt has been read. tail: keys and values [rows, heads, m,
    D] of tokens that came since they were last ranked; per row, first: where its text starts, and tokens: how many it has.
    """

    is_compileable, is_croppable, supports_early_init = False, False, False

    def __init__(self, policy: Layer, cache: PolicyCache):
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy, self.cache = policy, cache
        self._clear()

    @property
    def is_sliding(self) -> bool:
        return self.policy.sliding is not None

    def _clear(self) -> None:
        self.seen, self.waiting = 0, False
        self.entries: list[list[Entries]] | None = None
        self.first: list[int] = []
        self.tokens: list[int] = []
        self.tail: dict[str, Tensor] = {}

    # --- what transformers asks ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [rows, heads, t, D] in; the attention function that is given what this returns does the
        rest."""
        if self.waiting:
            raise ModelError(f"{HERE}, and the attention of this architecture does not go through transformers' interface")
        if key_states.shape[1] != len(self.policy.units) or key_states.shape[-1] != self.policy.width:
            raise ModelError(f"kv_policy.json has {len(self.policy.units)} heads of {self.policy.width} in layer "
                             f"{self.policy.index}, and the model {key_states.shape[1]} of {key_states.shape[-1]}; "
                             "they do not belong together")  # fmt: skip
        if self.entries is not None and len(self.entries) != len(key_states):
            raise ModelError(f"{HERE}, which has {len(self.entries)} rows, and was given {len(key_states)}")
        self.is_initialized = self.waiting = True
        self.seen += key_states.shape[2]
        if self.entries is not None:
            new = {"k": key_states, "v": value_states}
            if self.tail:
                new = {name: torch.cat([self.tail[name], x], 2) for name, x in new.items()}
            self.tail = {**self.tail, **new}
            key_states, value_states = new["k"], new["v"]
        marked: Any = key_states.view_as(key_states)  # a tensor of its own, to carry the layer to the attention function
        marked.compress_layer = self
        return marked, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ModelError(f"{HERE}, and rows are not reordered: beam search is not supported; use num_beams=1")

    def crop(self, tokens_to_remove: int) -> None:
        raise ModelError(f"{HERE}, and what was dropped does not come back: crop and assisted decoding are not supported")

    def activate_past_recording(self) -> None:
        self.crop(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ModelError(f"{HERE}, and rows are not repeated: give generate the rows themselves")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ModelError(f"{HERE}, and rows are not selected: start again with those that are wanted")

    def offload(self) -> None:
        raise ModelError(f"{HERE}, and is not offloaded; leave cache_implementation out")

    def prefetch(self) -> None:
        self.offload()

    # --- attention ---

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, None]:
        """What heads [rows, t, query heads, D] make of queries [rows, query heads, t, D], once a prompt has been read."""
        self.waiting = False
        assert self.entries is not None, "`read_prompt` comes first"
        out, places = torch.empty_like(query), torch.arange(self.seen, device=query.device)
        now = places[self.seen - query.shape[2] :]
        tail_places = places[self.seen - self.tail["k"].shape[2] :]
        self._note(mask, now, self.cache.kinds)
        group = query.shape[1] // len(self.policy.units)
        for row, heads in enumerate(self.entries):
            allowed = mask_of(mask, row)
            for head, entries in enumerate(heads):
                mine = slice(head * group, (head + 1) * group)
                where = torch.cat([entries.held["place"].long(), tail_places])
                k_nd, v_nd = (torch.cat([entries.read(n, query.dtype), self.tail[n][row, head]]).float() for n in ("k", "v"))
                logits = (query[row, mine].float() * scale) @ k_nd.T
                seen = where <= now[:, None] if allowed is None else allowed[:, where]
                p_gtn = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num_(0.0)
                out[row, mine] = (p_gtn @ v_nd).to(out.dtype)
                if entries.unit.rule in SUMMED:
                    given = p_gtn.sum((0, 1))
                    entries.held["score"] += given[: len(entries)]
                    self.tail["score"][row, head] += given[len(entries) :]
        if self.tail["k"].shape[2] >= STEP:
            self._evict()
        return out.transpose(1, 2).contiguous(), None

    def _note(self, mask: Tensor | None, now: Tensor, kinds: Tensor | None) -> None:
        """Extend what is known of the tail: attention given to it, which of it is text and not padding, kinds of tokens."""
        rows, heads, whole = self.tail["k"].shape[:3]
        new = len(now)
        valid = torch.ones(rows, new, dtype=torch.bool, device=now.device)
        if mask is not None:
            valid &= mask[:, 0][:, torch.arange(new, device=now.device), now]
        added = {"valid": valid, "score": torch.zeros(rows, heads, new, device=now.device)}
        if kinds is not None:
            added["kind"] = kinds.to(now.device)
        for name, x in added.items():
            self.tail[name] = x if whole == new else torch.cat([self.tail[name], x], -1)

    def read_prompt(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
        """Keep of a prompt's keys and values [rows, heads, t, D] what the policy does."""
        self.waiting = False
        group, total = query.shape[1] // len(self.policy.units), key.shape[2]
        places, kinds = torch.arange(total, device=key.device), self.cache.kinds
        self.entries = []
        for row in range(len(key)):
            allowed = mask_of(mask, row)
            text = places if allowed is None else places[allowed.diagonal()]
            self.tokens.append(len(text))
            self.first.append(int(text[0]) if len(text) else total)
            there = text if self.policy.sliding is None else text[text > total - self.policy.sliding]
            kind = None if kinds is None else kinds[row].to(key.device)
            made = []
            for head, asked in enumerate(self.policy.units):
                q_gtd = query[row, head * group : (head + 1) * group]
                found = scores({asked.rule}, q_gtd, key[row, head], scale, allowed)
                unit, at = self.cache.policy.after_prompt(
                    self.policy, asked, self.tokens[row], there, total, self.first[row], found, kind
                )
                score = found[SUMMED[unit.rule]][at] if unit.rule in SUMMED else None
                made.append(Entries.of(unit, key[row, head][at], value[row, head][at], at, score,
                                       None if kind is None else kind[at]))  # fmt: skip
            self.entries.append(made)

    def _evict(self) -> None:
        """Rank the entries and the tail together, and keep what the policy does of the tokens seen by now."""
        assert self.entries is not None
        tail, self.tail = self.tail, {}
        places = torch.arange(self.seen - tail["k"].shape[2], self.seen, device=tail["k"].device)
        for row, heads in enumerate(self.entries):
            valid = tail["valid"][row]
            self.tokens[row] += int(valid.sum())
            if self.first[row] >= int(places[0]) and bool(valid.any()):
                self.first[row] = int(places[valid][0])
            kind = tail["kind"][row][valid] if "kind" in tail else None
            for head, entries in enumerate(heads):
                k, v, score = (tail[name][row, head][valid] for name in ("k", "v", "score"))
                new = Entries.of(entries.unit, k, v, places[valid], None, kind)
                if entries.unit.rule in SUMMED:
                    new.held["score"] = score
                heads[head] = self._ranked(entries.with_more(new), row)

    def _ranked(self, entries: Entries, row: int) -> Entries:
        unit, sliding = entries.unit, self.policy.sliding
        if sliding is not None:
            entries = entries.chosen((entries.held["place"] > self.seen - sliding).nonzero()[:, 0])
        held = entries.held
        found = entries.chosen(self.cache.policy.still(
            self.policy, unit, self.tokens[row], held["place"], self.seen, self.first[row], held.get("score"), held.get("kind")
        ))  # fmt: skip
        if unit.rule == "snap":
            found.held["score"].zero_()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, without the tail."""
        return sum(entries.nbytes for heads in self.entries or () for entries in heads)


class PolicyCache(Cache):
    """A cache that follows a policy, for one model and one use. kinds [rows, t]: of the tokens of the pass under way, which are
    special and which punctuation."""

    def __init__(self, policy: Policy):
        self.policy, self.kinds = policy, None
        by_index = {layer.index: layer for layer in policy.layers}
        super().__init__([PolicyLayer(by_index[i], self) if i in by_index else DummyLayer() for i in range(max(by_index) + 1)])  # type: ignore[no-untyped-call]

    kinds: Tensor | None

    def see(self, ids: Tensor | None) -> None:
        """The token ids [rows, t] of the pass to come; ModelError where a rule asks for them and they are not told."""
        if not self.policy.marks:
            return
        if ids is None:
            raise ModelError(f"{HERE}, whose rules go by token ids: give input_ids, not inputs_embeds")
        self.kinds = self.policy.kinds(ids)

    @property
    def rules(self) -> dict[tuple[int, int, int], str]:
        """(layer, row, head) -> the rule that is followed there, once a prompt has been read."""
        return {(layer.policy.index, row, head): entries.unit.rule for layer in self.layers if isinstance(layer, PolicyLayer)
                for row, heads in enumerate(layer.entries or ()) for head, entries in enumerate(heads)}  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, without the tokens that came since they were last ranked."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PolicyLayer))


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """Attention by the layer that made the keys; torch's own where they come from no cache with a policy."""
    layer: PolicyLayer | None = getattr(key, "compress_layer", None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if torch.compiler.is_compiling():
        raise ModelError(f"{HERE}, which torch.compile cannot take; call the model as it is")
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if layer.entries is not None:
        return layer.attend(query, attention_mask, scale)
    out = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    layer.read_prompt(query, key, value, attention_mask, scale)
    return out


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


# --- on a model -------------------------------------------------------------------------------------------------------


def follow(model: Any, policy: Policy) -> None:
    """Have a model make caches that follow a policy, in `generate` and wherever it is called without one.

    `model.kv_policy = None` gives it plain ones again, until the policy is put back.
    """
    way = model.config.get_text_config()._attn_implementation
    if way not in ("sdpa", NAME):
        raise ModelError(
            f"{HERE}, which replaces attn_implementation='sdpa'; this model has '{way}': load it without that option"
        )
    check_belongs(policy, windows(model.config), FILE)
    model.set_attn_implementation(NAME)
    model.kv_policy = policy
    if hasattr(model, "_prepare_cache_for_generation"):  # a model without a head does not generate
        model.plain_cache = model._prepare_cache_for_generation
        model._prepare_cache_for_generation = MethodType(_for_generation, model)
    model.register_forward_pre_hook(_before, with_kwargs=True, prepend=True)


def windows(config: Any) -> dict[int, tuple[int | None]]:
    """The sliding window of every layer that has a cache, or None."""
    layers = DynamicCache(config=config).layers
    absent = layers_without(config, ATTENTION)
    return {i: (getattr(layer, "sliding_window", None),) for i, layer in enumerate(layers) if i not in absent}


def _for_generation(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *_: Any, **__: Any
) -> None:
    """Stands for transformers' own: the cache that `generate` goes by."""
    if model.kv_policy is None:
        model.plain_cache(generation_config, model_kwargs, generation_mode, *_, **__)
        return
    if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or generation_config.is_assistant:
        raise ModelError(f"{HERE}, with which only greedy search and sampling work; use num_beams=1 and no assistant")
    if generation_config.cache_implementation is not None:
        raise ModelError(f"{HERE}; leave cache_implementation out")
    if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
        model_kwargs["past_key_values"] = PolicyCache(model.kv_policy)


def _before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward pass: a cache where none is given, and the token ids told to it."""
    if model.kv_policy is None:
        return args, kwargs
    if (way := model.config.get_text_config()._attn_implementation) != NAME:
        raise ModelError(f"{HERE}, and '{way}' was put in the place of its attention after loading; put '{NAME}' back, or set "
                         "model.kv_policy = None")  # fmt: skip
    cache, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
    use = model.config.get_text_config().use_cache if use is None else use
    if cache is None and use and not model.training:
        cache = PolicyCache(model.kv_policy)
        kwargs = {**kwargs, "past_key_values": cache}
    if cache is None:
        return args, kwargs
    if not isinstance(cache, PolicyCache):
        raise ModelError(f"{HERE}, not a {type(cache).__name__}; leave past_key_values out, or give what the model returned")
    cache.see(args[0] if args else kwargs.get("input_ids"))
    return args, kwargs
