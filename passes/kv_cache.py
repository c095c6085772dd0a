"""The pass `kv_cache`: scales for a cache of 8 bits, and everything behind it measured with such a cache.

Half the bytes of a cache is twice the context, or twice the requests at once; long prompts are bound by it. Engines that keep
keys and values in e4m3 take a scale for each layer from the checkpoint; where there is none they take 1. The scales are measured
on the calibration text, on the model as it stands in front of this pass, with keys behind their rotary embedding, as they
lie in a cache.

It is a pass, and no option of the exporter that writes the scales, because a cache changes what the model predicts: what is
evaluated, exported and proven behind it is the model that is served, and the divergence of the run has the cache's share in it.

Layers with a sliding window gain little from a smaller cache, which is short anyway, and vLLM can leave theirs alone
(`--kv-cache-dtype-skip-layers sliding_window`). `layers: full` measures that; scales are written for all layers in any case,
since engines would make something up for a layer that has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from compress.cache.merging import MERGED
from compress.cache.policy import SERVED
from compress.errors import ModelError, RecipeError
from compress.formats.caches import CACHE, CacheName, scales
from compress.manager import Context, Cost, Pass
from compress.model.caching import Largest, attentions, fronted, heads_of, scales_of, slides, with_cache
from compress.model.speed import precision
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.state import Aspect, State
from compress.state.plan import size


class KvCache(Pass):
    """Measure the scales of a cache in 8 bits, and round keys and values by them from here on."""

    name: ClassVar[str] = "kv_cache"
    writes: ClassVar[Aspect] = Aspect.SERVING

    format: CacheName = Field(
        "fp8", description="fp8: a scale for the keys of a layer and one for its values; fp8:head: for each head"
    )
    layers: Literal["all", "full"] = Field(
        "all", description="whose cache is rounded; full: not that of layers with a sliding window"
    )

    @field_validator("format", mode="before")
    @classmethod
    def _integers(cls, format: Any) -> Any:
        if isinstance(format, str) and format.startswith("int"):
            raise ValueError(f"{format}: vLLM takes caches of fp8 alone from a checkpoint; its own int8_per_token_head "
                             "and others are flags of its, and need no scales")  # fmt: skip
        return format

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'kv_cache' needs data.calibration, whose keys and values it measures")
        if later := next((p for p in following if p.writes & ~(Aspect.SERVING | Aspect.PLAN)), None):
            raise RecipeError(f"'kv_cache' measures the model as it stands here, and '{later.name}' behind it changes that; "
                              f"move it behind '{later.name}'")  # fmt: skip

    def foresee(self, state: State) -> State:
        if not state.graph.causal:
            raise ModelError(f"'{state.graph.family}' keeps no keys and values: it does not generate; leave 'kv_cache' out")
        if CACHE in state.serving:
            raise RecipeError("an earlier step has measured the cache already; keep one 'kv_cache'")
        if SERVED in state.serving:
            raise RecipeError("an earlier 'kv_policy' decides what entries are stored in, for our runtime, and 'kv_cache' rounds "
                              "them for another engine; leave one of them out")  # fmt: skip
        if MERGED in state.serving:
            raise RecipeError("an earlier 'context_merge' is for our runtime, which rounds no cache, and 'kv_cache' rounds one "
                              "for another engine; leave one of them out")  # fmt: skip
        heads = heads_of(state)
        if self.layers == "full" and all(slides(state, path) for path in heads):
            raise RecipeError("every layer has a sliding window, so this would round nothing; use layers: all", ("layers",))
        count = {path: n if self.format == "fp8:head" else 1 for path, n in heads.items()}
        return with_cache(state, self.format, self.layers, {path: {"k": [1.0] * n, "v": [1.0] * n} for path, n in count.items()})

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        held = scales_of(foreseen)
        left = sum(not each["rounded"] for each in held.values())
        before, after = (cache_bytes(s) for s in (state, foreseen))
        few = f"; {left} layers with a sliding window stay in {8 * state.dtype.itemsize} bits" if left else ""
        yield f"kv_cache: a token takes {size(after)} of cache, {size(before)} without{few}"

    def cost(self, state: State, tokens: int) -> Cost:
        work = per_token(state)
        peak = waiting_bytes(state, tokens) + block_bytes(state)
        return Cost(2.0 * tokens * work.weights, tokens * work.squares, 0, peak, numbers=tokens * work.numbers)

    def run(self, state: State, ctx: Context) -> State:
        found: dict[str, dict[str, list[float]]] = {}
        with precision("bf16"):
            stream, batches = ctx.stream(state)
            for block in state.graph.blocks:
                ctx.progress(block.index, len(state.graph.blocks), block.module)
                seen = {path: Largest() for path in attentions(stream.blocks[block.index])}
                with fronted(stream.blocks[block.index], lambda path, seen=seen: seen[path].see):  # type: ignore[misc]
                    stream.advance(state, block.index, batches)
                for path, largest in seen.items():
                    name = f"{block.module}.{path}"
                    k_h, v_h = largest.by_head(name)
                    found[name] = {n: scales(x_h, self.format, state.scale_dtype) for n, x_h in (("k", k_h), ("v", v_h))}
                    note = f"cache: keys up to {float(k_h.amax()):.3g}, values up to {float(v_h.amax()):.3g}"
                    ctx.say({"site": state.graph.blocks[block.index].sites[0], "notes": [note]})
        made = with_cache(state, self.format, self.layers, found)
        assert found.keys() == heads_of(state).keys()
        return state.with_part(ctx.store.commit(CACHE, serving={CACHE: made.serving[CACHE]}))


def cache_bytes(state: State) -> int:
    """Bytes that a token takes in the cache of all layers."""
    text: Any = state.config.get_text_config()
    wide = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    scales = scales_of(state)
    return sum(2 * n * wide * (1 if scales.get(path, {}).get("rounded") else state.dtype.itemsize)
               for path, n in heads_of(state).items())  # fmt: skip
