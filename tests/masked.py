"""A model whose cache follows a policy, and what it is held against: a mask for each head, and no cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from compress import cached, pipeline
from compress.cache.policy import Policy
from compress.export.artifact.engines import Transformers
from compress.export.runtime import cache as runtime
from compress.export.runtime import load
from compress.model.data import Tokens

PROMPT, NEW = 60, 40  # tokens; enough for one eviction while a model decodes


def model_of(folder: Path, policy: Policy | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if policy:
        runtime.follow(model, policy)
    return model.eval()


def text_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def both_caches(made: pipeline.Outcome) -> list[cached.CacheScores]:
    """What comes of an artifact's cache by our stream, and by our runtime."""
    state, tokens = replace(made.state, dtype=torch.float32), Tokens(text_of(3, 64), "drawn")
    engine = Transformers(load(made.artifacts["native"][0], dtype=torch.float32), "runtime")
    return [cached.through_cache(state, tokens, 1, "cpu", e) for e in (None, engine)]


def places(cache: runtime.PolicyCache) -> dict[tuple[int, int], list[int]]:
    """(layer, head) -> the places that it holds in row 0, those that wait beside included."""
    found = {}
    for i, layer in enumerate(cache.layers):
        waiting = layer.tail["k"].shape[2] if layer.tail else 0
        for h, entries in enumerate(layer.entries[0]):
            found[i, h] = [*entries.held["place"].tolist(), *range(layer.seen - waiting, layer.seen)]
    return found


_SEEN: dict[tuple[int, int], Tensor] = {}  # (layer, KV head) -> which places each place looks at


def masked_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """Attention over all keys, each head by a mask of its own."""
    group = query.shape[1] // key.shape[1]
    allowed = torch.stack([_SEEN[module.layer_idx, h // group] for h in range(query.shape[1])])
    scale = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    logits = query @ key.repeat_interleave(group, 1).mT * scale
    p = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (p @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("compress_oracle", masked_attention)
AttentionMaskInterface.register("compress_oracle", lambda **_: None)


@contextmanager
def looking(seen: dict[tuple[int, int], Tensor]) -> Iterator[None]:
    _SEEN.update(seen)
    yield
    _SEEN.clear()


def causal(total: int, sliding: int | None) -> Tensor:
    i, j = torch.arange(total)[:, None], torch.arange(total)
    return (j <= i) & (j > i - (sliding or total + 1))


def by_hand(model: Any, ids: Tensor, steps_of: list[int]) -> tuple[Tensor, Tensor, dict[tuple[int, int], Tensor], Any]:
    """Text and logits of a greedy continuation, in passes of so many tokens (more than one: the same tokens again), and what each
    place looked at."""
    total = ids.shape[1] + sum(steps_of)
    out = model(ids)
    cache, made, logits = out.past_key_values, ids, [out.logits[:, -1:]]
    layers = {i: layer.policy.sliding for i, layer in enumerate(cache.layers)}
    seen = {(i, h): causal(total, layers[i]) for i, h in places(cache)}
    for count in steps_of:
        new = logits[-1][:, -1:].argmax(-1).repeat(1, count)
        there, start = places(cache), made.shape[1]
        for unit, mask in seen.items():
            dropped = torch.ones(total, dtype=torch.bool)
            dropped[[*there[unit], *range(start, total)]] = False
            mask[start : start + count, dropped] = False
        made, out = torch.cat([made, new], 1), model(new, past_key_values=cache)
        logits.append(out.logits)
    return made, torch.cat(logits, 1)[:, :-1], seen, cache
