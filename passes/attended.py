"""What is seen of attention on the calibration windows, one block after the other, for passes that decide on caches.

What a layer has shown is kept under the state and the windows, so another choice from it measures nothing, and a run that was
killed goes on behind the last layer that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from compress.manager import Context, Record, Store
from compress.model.attention import Attended, Heads, attention_by
from compress.model.speed import precision
from compress.state import State


class Sees(Protocol):
    """Is asked at the attention of one block, and tells then what it has seen."""

    def __call__(self, a: Attended, out: Tensor) -> Tensor: ...
    def record(self) -> Record: ...


def seen_by_layer(
    state: State, ctx: Context, store: Store, found: Sequence[Heads], sees: Callable[[Heads, list[Tensor]], Sees]
) -> Mapping[int, Record]:
    """Layer -> what was seen of its attention on the calibration windows, found in the run's analyses or measured now."""
    by_layer, parts = {each.layer: each for each in found}, {each.layer: f"block-{each.layer:04}" for each in found}
    if any(store.committed(part) is None for part in parts.values()):
        with precision("bf16"):
            stream, batches = ctx.stream(state)
            for block in state.graph.blocks:
                ctx.progress(block.index, len(state.graph.blocks), block.module)
                layer = by_layer.get(block.index)
                if layer is None or store.committed(parts[layer.layer]) is not None:
                    stream.advance(state, block.index, batches)
                    continue
                see = sees(layer, [b.tokens for b in batches])
                with attention_by(stream, see):
                    stream.advance(state, block.index, batches)
                store.commit(parts[layer.layer], records=[{"site": layer.reader.name, "layer": layer.layer, **see.record()}])
    return {record["layer"]: record for record in store.records}
