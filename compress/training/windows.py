"""Which windows of a training text are learned from, and which are held out to judge on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from compress.errors import RecipeError
from compress.model.data import shares

MICRO = 2048  # tokens that pass the student at once, or one window
ASKED = 1 << 14  # tokens that a teacher is asked about at once: a block's weights are read once for them
LOOKED = 512  # of these, tokens whose logits are there at once: asking is to take less than the training behind it
HELD = 8192  # tokens to judge on, at most, and a twentieth of the windows: judging costs as much as a third of learning


def halves(count: int, length: int, sources: Sequence[tuple[str, int]] = ()) -> tuple[list[int], list[int]]:
    """Numbers of the windows to learn from, and of those to judge on: the last twentieth, `HELD` tokens at most. Where they come
    from several sources, the last of each."""
    if count < 2:
        raise RecipeError("one window is too few: some are learnt from and others judged on; give more text")
    counts = [n for _, n in sources] or [count]
    ends = list(itertools.accumulate(counts))
    kept = shares(max(1, min(count // 20, HELD // length)), [float(n) for n in counts])
    held = [i for end, n in zip(ends, kept, strict=True) for i in range(end - n, end)]
    return sorted(set(range(count)) - set(held)), held
