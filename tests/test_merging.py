"""Merged contexts: the tree, the walk against one written down layer by layer, and what decoding goes on from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress.cache.merging import Merging, tree
from compress.errors import ModelError
from compress.export.runtime import merge_context
from compress.export.runtime.merging import Chunk, MergedCache, merge_long
from tests.conftest import GROUPED, IDS, SLIDING, SMALL, covered, rare

LAYERS, WINDOW, CHUNK = 6, 32, 16
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": LAYERS}, **GROUPED, **IDS),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": LAYERS}, **GROUPED, **IDS, **SLIDING, query_pre_attn_scalar=16
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{**SMALL, "num_hidden_layers": LAYERS}, **IDS),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def model_of(name: str = "llama", warmup: int = 2, prefix: int = 2, suffix: int = 3) -> Any:
    """A random model with biases drawn at random."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(3)  # so that tokens differ in what they look at
    bias = tuple(tuple(row) for row in drawn(LAYERS, CHUNK, seed=2).tolist())
    merge_long(model, Merging(WINDOW, warmup, prefix, suffix, bias))
    return model


# --- the tree ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(8, 64), st.integers(4, 40), st.integers(0, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_tree_holds_the_whole_text_in_equal_chunks(text: int, chunk: int, layers: int, warmup: int, affix: int) -> None:
    prefix, suffix, holds = affix - 1, affix, chunk - 2 * affix + 1
    if chunk < 4 * affix:
        return
    try:
        how = tree(text, chunk, layers, warmup, prefix, suffix)
    except ModelError:
        assert text > holds << max(0, layers - warmup - 1) or layers - warmup < 1
        return
    assert sum(how.leaves) == text
    assert len(how.leaves) == 1 << how.levels
    assert max(how.leaves) - min(how.leaves) <= 1
    assert max(how.leaves) <= holds
    assert how.levels == 0 or text > holds << (how.levels - 1), "no level more than it takes"
    assert how.after <= chunk, "no position beyond a chunk"
    assert how.ends[-1] == layers
    sizes = [b - a for a, b in zip((0, *how.ends), how.ends, strict=False)]
    assert len(set(sizes[1:])) <= 1
    assert all(size >= 1 for size in sizes)
    assert how.levels == 0 or sizes[0] >= warmup + sizes[1]
    for left, right in ((holds, holds), (max(how.leaves), min(how.leaves)), (1, holds), (holds, 1)):
        kept = how.kept(left, right)
        assert sum(kept) == min(holds, left + right)
        assert kept[0] <= left
        assert kept[1] <= right
    assert how.live <= chunk * (1 + how.levels / 2) + how.levels * affix * 2, "(1 + log2(n) / 2) chunks, affixes besides"


def test_a_tree_that_is_written_down() -> None:
    """HOMER's own: Llama 2 with 32 layers, chunks of 2048, 12 to warm up; 16,000 tokens."""
    how = tree(16_000, 2048, 32, 12, 0, 64)
    assert (how.levels, how.leaves[0], how.ends) == (4, 1000, (16, 20, 24, 28, 32))
    assert tree(7_000, 2048, 32, 12, 0, 64).ends == (20, 26, 32), "what is left of 20 layers goes to the leaves"


# --- the walk, against one that is written down layer by layer ------------------------------------------------------------

Node = tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]  # hidden [n, d], positions, keys and values [KV heads, n, D] by layer


class ByHand:
    """The paper's algorithm for a Llama, with masks, and tokens dropped where the paper drops them: in front of the MLP."""

    def __init__(self, model: Any, prefix: int, suffix: int):
        self.model, self.llama, self.merging = model, model.model, model.context_merge
        self.prefix, self.suffix = prefix, suffix
        self.holds = self.merging.chunk - prefix - suffix

    def layer(self, index: int, node: Node, many: int | None = None) -> Node:
        """A layer; tokens of the context are dropped in it until `many` are left."""
        h, place, past = node
        layer = self.llama.layers[index]
        x, n, width = layer.input_layernorm(h), len(h), layer.self_attn.head_dim
        q, k, v = (getattr(layer.self_attn, f"{c}_proj")(x).view(n, -1, width).transpose(0, 1) for c in "qkv")
        cos, sin = self.llama.rotary_emb(x[None], place[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        q, k = q[0], k[0]
        group = len(q) // len(k)
        logits = q @ k.repeat_interleave(group, 0).mT * width**-0.5
        seen = torch.ones(n, n).tril().bool()
        out = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 0)
        h = h + layer.self_attn.o_proj(out.transpose(0, 1).reshape(n, -1))
        past = [*past, (k, v)]
        if many is not None:
            bias = torch.tensor(self.merging.bias[index])
            s = logits[:, -1].amax(0) - bias[place[-1] - place]
            text = range(self.prefix, n - self.suffix)
            best = sorted(sorted(text, key=lambda j: -float(s[j]))[:many])
            at = [*range(self.prefix), *best, *range(n - self.suffix, n)]
            h, place, past = h[at], place[at], [(k[:, at], v[:, at]) for k, v in past]
        return h + layer.mlp(layer.post_attention_layernorm(h)), place, past

    def joined(self, a: Node, b: Node) -> Node:
        def join(x: Tensor, y: Tensor) -> Tensor:  # [.., n, d]
            P, Q = self.prefix, self.suffix
            ends = [(x[..., :P, :] + y[..., :P, :]) / 2, (x[..., -Q:, :] + y[..., -Q:, :]) / 2]
            return torch.cat([ends[0], x[..., P:-Q, :], y[..., P:-Q, :], ends[1]], -2)

        place = torch.cat([a[1][: -self.suffix], b[1][self.prefix :]])
        return join(a[0], b[0]), place, [(join(k, k2), join(v, v2)) for (k, v), (k2, v2) in zip(a[2], b[2], strict=True)]

    def __call__(self, ids: Tensor) -> tuple[Tensor, Node]:
        """Logits of the next token, and the root."""
        P, Q = self.prefix, self.suffix
        context = len(ids) - P - Q
        levels = 0
        while self.holds << levels < context:
            levels += 1
        each = (LAYERS - self.merging.warmup) // (levels + 1)
        count = 2**levels
        cuts = [context * i // count for i in range(count + 1)]
        longest = max(b - a for a, b in pairwise(cuts))
        nodes = []
        for a, b in pairwise(cuts):
            mine = torch.cat([ids[:P], ids[P + a : P + b], ids[len(ids) - Q :]])
            place = torch.tensor([*range(P + b - a), *range(P + longest, P + longest + Q)])
            nodes.append((self.llama.embed_tokens(mine), place, list[Any]()))
        begin = 0
        for level in range(levels + 1):
            end = LAYERS - each * (levels - level)
            many = self._many([len(node[0]) - P - Q for node in nodes])
            for index in range(begin, end):
                last = index == end - 1 and level < levels
                nodes = [self.layer(index, node, m if last else None) for node, m in zip(nodes, many, strict=True)]
            begin = end
            if level < levels:
                nodes = [self.joined(a, b) for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
        return self.model.lm_head(self.llama.norm(nodes[0][0][-1])), nodes[0]

    def _many(self, sizes: list[int]) -> list[int]:
        """How many tokens of the context each keeps: half, but all of one that has less, and its sibling the rest."""
        found = []
        for a, b in zip(sizes[::2], sizes[1::2], strict=False):
            second = self.holds // 2 if a >= self.holds - self.holds // 2 else self.holds - a
            second = min(b, second)
            found += [min(a, self.holds - second), second]
        return found or sizes


@pytest.mark.parametrize(
    ("length", "prefix", "suffix", "warmup"), [(33, 2, 3, 2), (71, 0, 1, 0), rare(87, 2, 3, 2), rare(150, 1, 4, 1)]
)
@torch.no_grad()
def test_the_walk_is_the_papers_layer_by_layer(length: int, prefix: int, suffix: int, warmup: int) -> None:
    model, ids = model_of(warmup=warmup), text_of(length)
    merged = merge_context(model, ids, prefix, suffix)
    logits, (_, place, entries) = ByHand(model, prefix, suffix)(ids[0])
    assert float((merged.logits[0, 0] - logits).abs().max()) < 1e-5 * float(logits.abs().max())
    for layer, (k, v) in zip(merged.past_key_values.layers, entries, strict=True):
        assert torch.equal(layer.place, place)
        torch.testing.assert_close(layer.keys[0], k, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.values[0], v, rtol=1e-5, atol=1e-5)
    assert merged.levels >= 1
    assert len(place) == CHUNK, "one chunk is left, in all layers"
    assert merged.tokens == model.context_merge.tree(length, prefix, suffix).live


@pytest.mark.parametrize("name", covered(CONFIGS, "llama"))
@torch.no_grad()
def test_a_prompt_of_one_chunk_is_read_as_ever(name: str) -> None:
    model, ids, more = model_of(name), text_of(CHUNK), text_of(20, 1)
    merged, plain = merge_context(model, ids), model(ids)
    assert merged.levels == 0
    torch.testing.assert_close(merged.logits, plain.logits[:, -1:], rtol=1e-5, atol=1e-5)
    for i in range(20):
        behind, wanted = (model(more[:, i : i + 1], past_key_values=x.past_key_values).logits for x in (merged, plain))
        torch.testing.assert_close(behind, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("length", "prefix", "suffix"), [(17, 4, 4), (22, 0, 1), (35, 1, 3), rare(64, 4, 4), rare(93, 2, 3)])
def test_no_more_tokens_are_held_than_the_tree_says(length: int, prefix: int, suffix: int) -> None:
    model = model_of()
    how = model.context_merge.tree(length, prefix, suffix)
    merged = merge_context(model, text_of(length), prefix, suffix)
    assert merged.tokens == how.live
    sizes = {layer.keys.shape[2] for layer in merged.past_key_values.layers}
    assert sizes == {min(length, CHUNK)}, "all layers hold the same tokens"
    assert merged.past_key_values.get_seq_length() == length
    assert merged.past_key_values.positions(2).tolist() == [[how.after, how.after + 1]]
    assert merged.nbytes >= merged.past_key_values.nbytes


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_the_tokens_that_are_looked_at_stay_and_affixes_do(prefix: int, suffix: int, text: int, seed: int) -> None:
    n = prefix + text + suffix
    planted, many = seed % text, 1 + seed % text
    score = drawn(n, seed=seed)
    score[prefix + planted] = 9.0
    chunk = Chunk(
        torch.arange(n), drawn(1, n, 4), [(drawn(1, 2, n, 3, seed=i), drawn(1, 2, n, 3, seed=-i)) for i in (1, 2)], score
    )
    hidden, entries = chunk.hidden, chunk.entries
    chunk.keep(many, prefix, suffix)
    at = chunk.place.tolist()
    assert at == sorted(at)
    assert [*range(prefix), *range(n - suffix, n)] == [j for j in at if j < prefix or j >= n - suffix]
    assert prefix + planted in at
    kept = [j for j in at if prefix <= j < n - suffix]
    assert len(kept) == many
    assert min(float(score[j]) for j in kept) >= max(
        (float(score[j]) for j in set(range(prefix, n - suffix)) - set(kept)), default=-9
    )
    assert torch.equal(chunk.hidden, hidden[:, at])
    assert all(torch.equal(new[0], old[0][:, :, at]) for new, old in zip(chunk.entries, entries, strict=True))


# --- what decoding goes on from -------------------------------------------------------------------------------------------

_HELD: list[tuple[Tensor, Tensor, Tensor, int | None]] = []  # of every layer: keys, values, positions, its window


def oracle(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """New tokens, all at once, attending to entries of a merged prompt and to each other, by positions."""
    k, v, place, sliding = _HELD[module.layer_idx]
    new = torch.arange(_HELD[0][2][-1] + 1, _HELD[0][2][-1] + 1 + key.shape[2])
    places, total = torch.cat([place, new]), len(place) + len(new)
    seen, kept = torch.zeros(len(new), total, dtype=torch.bool), list(range(len(place)))
    for row, position in enumerate(new.tolist()):
        if sliding:  # what is near enough, the latest of it; what has gone stays away
            kept = [j for j in kept if places[j] > position - sliding][1 - sliding :]
        kept.append(len(place) + row)
        seen[row, kept] = True
    group = query.shape[1] // key.shape[1]
    keys, values = (torch.cat([a, b], 2).repeat_interleave(group, 1) for a, b in ((k, key), (v, value)))
    logits = query @ keys.mT * options["scaling"]
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(1, 2), None


AttentionInterface.register("merging_oracle", oracle)


@pytest.mark.parametrize("name", covered(["llama", "gemma3"], "gemma3"))
@torch.no_grad()
def test_what_comes_behind_sees_entries_by_their_positions(name: str) -> None:
    """Token by token, and over more tokens than a sliding window has."""
    model, ids, more = model_of(name), text_of(90), text_of(24, 1)
    first = merge_context(model, ids)
    again = merge_context(model, ids).past_key_values
    _HELD[:] = [(layer.keys, layer.values, layer.place, layer.sliding) for layer in first.past_key_values.layers]
    if name == "gemma3":
        assert {bool(held[3]) for held in _HELD} == {True, False}
    position = first.past_key_values.positions(24)
    found = torch.cat([model(more[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(24)], 1)
    model.set_attn_implementation("merging_oracle")
    wanted = model(more, position_ids=position, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    together = model(more[:, :5], past_key_values=again).logits
    if name == "llama":  # elsewhere a window is that of the first token
        torch.testing.assert_close(together, wanted[:, :5], rtol=1e-4, atol=1e-5)
    assert again.get_seq_length() == 95


def greedy(model: Any, merged: Any, count: int) -> list[int]:
    """The likeliest tokens, one after the other, by hand."""
    found = [int(merged.logits.argmax())]
    while len(found) < count:
        out = model(torch.tensor([[found[-1]]]), past_key_values=merged.past_key_values)
        found.append(int(out.logits[0, -1].argmax()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(CONFIGS, "llama"))
def test_generate_goes_on_as_a_loop_by_hand_does(name: str) -> None:
    model, ids, options = model_of(name), text_of(90), {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        wanted = greedy(model, merge_context(model, ids), 12)
    merged = merge_context(model, ids)
    first = merged.logits[:, -1:].argmax(-1)
    made = model.generate(torch.cat([ids, first], 1), past_key_values=merged.past_key_values, **{**options, "max_new_tokens": 11})
    assert made[0, 90:].tolist() == wanted
    alone = model.generate(ids, return_dict_in_generate=True, **options)
    assert alone.sequences[0, 90:].tolist() == wanted, "a prompt beyond the window is merged by itself"
    assert isinstance(alone.past_key_values, MergedCache)


def test_prompts_within_the_window_and_models_told_so_read_as_ever() -> None:
    model, options = model_of(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    plain.load_state_dict(model.state_dict())
    short, long = text_of(WINDOW), text_of(WINDOW + 1)
    assert torch.equal(model.generate(short, **options), plain.generate(short, **options))
    held, model.context_merge = model.context_merge, None
    assert torch.equal(model.generate(long, **options), plain.generate(long, **options))
    rows = text_of(10).view(2, 5)
    model.context_merge = held
    assert torch.equal(model(rows).logits, plain(rows).logits), "and whoever calls the model is given what it gives"
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_what_is_not_merged_is_refused() -> None:
    model, ids = model_of(), text_of(90)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = merge_context(model, ids).past_key_values
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: merge_context(model, ids.repeat(2, 1)), r"one row at a time, and was given \[2, 90\]"),
        (lambda: merge_context(model, ids[0]), "one row at a time"),
        (lambda: merge_context(model, ids, 5, 4), "may take half of it"),
        (lambda: merge_context(model, ids, 2, 0), "the suffix is at least one token"),
        (lambda: merge_context(model, text_of(2), 1, 1), "there is no context"),
        (lambda: merge_context(model, text_of(500)), "too few: at most 88 tokens"),
        (lambda: model.generate(ids.repeat(2, 1), max_new_tokens=2), "give rows one by one"),
        (lambda: model.generate(ids, num_beams=2, max_new_tokens=2), "num_beams=1"),
        (lambda: model.generate(ids, attention_mask=mask, max_new_tokens=2), "without padding"),
        (lambda: cache.crop(-1), "assisted decoding"),
        (cache.reset, "not used again"),
        (lambda: model(ids[:, :1].repeat(2, 1), past_key_values=cache), "has 1 rows, and was given 2"),
    ]
    for call, says in cases:
        with pytest.raises(ModelError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    model.context_merge = None
    with pytest.raises(ModelError, match="has no biases to merge a context by"):
        merge_context(model, ids)
    assert all("forward" not in vars(layer) for layer in model.model.layers), "a walk that fails leaves nothing behind"
