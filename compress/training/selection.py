"""Which blocks learn, where few do at a time: block coordinate descent.

Every `interval` steps `active` blocks are chosen anew; the optimizer knows those alone, and what it remembered of the others is
gone (LISA, arXiv 2403.17919, algorithm 1; BAdam, 2404.02827, algorithm 1). What lies outside the blocks stays as it is (BlockLLM,
2406.17296, section 3). Four ways to choose:

    cyclic      in turn, from the last block to the first
    random      drawn, each set as likely
    gradnorm    where the gradient is largest for how often it was looked at: ‖G_b‖ / f_b is largest (BlockLLM, equation 1)
    damage      the same with what the allocator found that a block has lost, so that effort goes where compression was hardest

The last two deal visits by highest averages: with f_b = visits + 1 a block is visited, in the long run, in proportion to its
score. For norms a step is needed whose gradients are all looked at, each dropped as soon as it is known (`Fused.norms`): one
more way forward and back in `interval` steps. (BlockLLM's code looks at one tensor more a step, and chooses anew when the loss
rises; its trigger compares the wrong means, and a rule that hangs on a noisy loss is none to resume from.)

Limits. A block that learns needs the way back to it: activations of the blocks behind it are kept, so memory is that of the worst
choice. The gradient of a step says where it is steep, not where anything is to be won.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compress.model.seeds import seeded
from compress.training.options import Block


class Selection:
    """scores: of each block, for `damage`. State: `visits` [blocks] and `active` [count], int64."""

    def __init__(self, options: Block, blocks: Sequence[int], seed: int, scores: Mapping[int, float] | None = None):
        self.options, self.blocks, self.seed, self.scores = options, list(blocks), seed, scores
        self.visits = torch.zeros(len(blocks), dtype=torch.int64)
        self.active = torch.zeros(min(options.active, len(blocks)), dtype=torch.int64)

    def due(self, step: int) -> bool:
        return step % self.options.interval == 0

    @property
    def chosen(self) -> set[int]:
        """The blocks that learn."""
        return {self.blocks[i] for i in self.active.tolist()}

    def choose(self, step: int, norms: Mapping[int, float]) -> None:
        """Choose for the steps from this one on; `norms` of gradients are asked for by `gradnorm` alone."""
        count, turn = len(self.blocks), step // self.options.interval
        match self.options.select:
            case "cyclic":
                found = [(-1 - turn * len(self.active) - i) % count for i in range(len(self.active))]
            case "random":
                found = torch.randperm(count, generator=seeded(self.seed, f"blocks {turn}"))[: len(self.active)].tolist()
            case _:
                scores = norms if self.options.select == "gradnorm" else self.scores or {}
                found = self._highest([scores.get(b, 0.0) for b in self.blocks])
        self.active = torch.tensor(sorted(found))
        self.visits[self.active] += 1

    def _highest(self, scores: Sequence[float]) -> list[int]:
        averages = [s / (1 + int(v)) for s, v in zip(scores, self.visits, strict=True)]
        return sorted(range(len(averages)), key=lambda i: (-averages[i], i))[: len(self.active)]

    def tensors(self) -> dict[str, Tensor]:
        return {"visits": self.visits, "active": self.active}
