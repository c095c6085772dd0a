"""Hierarchical context merging (HOMER, arXiv 2404.10308): what an artifact says of it, and how a text is cut and merged.

The idea. A model reads no more tokens at once than it was trained on. A long text is therefore cut into equal chunks that each
begin and end with the same tokens, prefix and suffix (the affixes), and have positions from 0 on. Each chunk goes through the
lower layers alone. Then in every chunk the tokens of the context that its last token looks at least are dropped, neighbours are
joined in pairs, their affixes averaged, and the joined chunks go through the next few layers; and so on, up a binary tree,
until one chunk is left for the topmost layers. No position ever exceeds a chunk, so nothing is extrapolated, and what is kept
of all layers is a cache of one chunk that decoding goes on from.

Letters: C tokens of a chunk, half a window, so that the other half is left for what is generated; P and Q tokens of prefix and
suffix; E = C - P - Q of the context; L layers; h levels above the leaves, 2^h leaves.

    h        the least with E 2^h >= the tokens of the context; leaves differ by one token at most
    stages   t = floor((L - warmup) / (h + 1)) layers on each level; leaves have the warm-up layers and the remainder besides
    children of a pair keep E tokens of the context between them, half each; a shorter one keeps all that it has

What is looked at, by s_j = max over heads of q_last . k_j / sqrt(D), is the nearer the more, whatever it says, as attention is.
The mean of s by distance on ordinary text is measured beforehand, layer by layer, and subtracted: the bias [L, C].

As files of an artifact: `context_merge.json` has `version` (1; a reader refuses a newer one), `window`, `warmup`, `prefix` and
`suffix`; `context_merge.safetensors` has `bias`, fp32 [L, C].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compress.errors import ModelError

FILE, BIAS, VERSION = "context_merge.json", "context_merge.safetensors", 1
MERGED = "context_merge"  # where `State.serving` has it, and what a config's `quantization_config` then says is true
NUMBERS = {"window": 4, "warmup": 0, "prefix": 0, "suffix": 1}  # what the file says, and the least of each


@dataclass(frozen=True)
class Tree:
    """How one context is merged. leaves: tokens of the context in each. ends: of every level, from the leaves up, the number of
    the layer behind its last one. holds: E."""

    leaves: tuple[int, ...]
    ends: tuple[int, ...]
    prefix: int
    suffix: int
    holds: int

    @property
    def levels(self) -> int:
        """Levels above the leaves."""
        return len(self.ends) - 1

    def kept(self, left: int, right: int) -> tuple[int, int]:
        """How many tokens of the context two siblings keep that have so many."""
        second = min(right, max(self.holds // 2, self.holds - left))
        return min(left, self.holds - second), second

    def begins(self, level: int) -> int:
        """The first layer of a level."""
        return self.ends[level - 1] if level else 0

    @property
    def after(self) -> int:
        """The position of the first token behind the merged ones."""
        return self.prefix + max(self.leaves) + self.suffix

    @property
    def live(self) -> int:
        """The most tokens, of all chunks, that are there at once: a chunk in hand and, on each level, at most one that waits."""
        affixes = self.prefix + self.suffix
        waiting = most = 0
        for level in range(self.levels, -1, -1):  # down the right edge of the tree, where a sibling waits on every level
            inside = min(self.holds, sum(self.leaves[: 1 << level])) if level else max(self.leaves)
            most = max(most, waiting + inside + affixes)
            half = self.holds - self.holds // 2  # what a left one keeps at most
            waiting += half + affixes
        return most


@dataclass(frozen=True)
class Merging:
    """What an artifact says of merging. bias: [L][C]."""

    window: int
    warmup: int
    prefix: int
    suffix: int
    bias: tuple[tuple[float, ...], ...]

    @property
    def chunk(self) -> int:
        return chunk_of(self.window)

    @property
    def layers(self) -> int:
        return len(self.bias)

    def tree(self, tokens: int, prefix: int | None = None, suffix: int | None = None) -> Tree:
        """How a prompt of so many tokens, affixes counted, is merged; ModelError where it is too long for so few layers."""
        affixes = self.prefix if prefix is None else prefix, self.suffix if suffix is None else suffix
        check_affixes(self.chunk, *affixes)
        return tree(tokens - sum(affixes), self.chunk, self.layers, self.warmup, *affixes)

    def json(self) -> dict[str, Any]:
        """As `context_merge.json` says it."""
        return {"version": VERSION, **{name: getattr(self, name) for name in NUMBERS}}

    def told(self) -> dict[str, Any]:
        """As `State.serving` has it, with the bias."""
        return {**self.json(), "bias": [list(row) for row in self.bias]}

    def save(self, folder: Path) -> None:
        """The tensor, beside a file that holds `json`."""
        (folder / BIAS).write_bytes(save({"bias": torch.tensor(self.bias, dtype=torch.float32)}))


def chunk_of(window: int) -> int:
    return window // 2


def check_affixes(chunk: int, prefix: int, suffix: int) -> None:
    """ModelError where affixes leave less than half a chunk to the context, or there is no last token to look from."""
    if prefix < 0 or suffix < 1 or prefix + suffix > chunk // 2:
        raise ModelError(f"prefix and suffix of {prefix} and {suffix} tokens stand in every chunk of {chunk}; they may take half "
                         "of it, and the suffix is at least one token: give others, or a larger window")  # fmt: skip


def tree(context: int, chunk: int, layers: int, warmup: int, prefix: int, suffix: int) -> Tree:
    """How a context of so many tokens is merged in a model of so many layers."""
    holds = chunk - prefix - suffix
    levels = max(0, (-(-context // holds) - 1).bit_length())
    if context < 1:
        raise ModelError(f"between a prefix of {prefix} and a suffix of {suffix} tokens there is no context; give a longer text")
    if layers - warmup < levels + 1:
        most = holds << max(0, layers - warmup - 1)
        raise ModelError(f"{context:,} tokens of context are {levels} levels of merging, for which {layers - warmup} layers "
                         f"behind the warm-up are too few: at most {most:,} tokens; give fewer, or a larger window")  # fmt: skip
    each, count = (layers - warmup) // (levels + 1), 1 << levels
    cuts = [context * i // count for i in range(count + 1)]
    leaves = tuple(b - a for a, b in pairwise(cuts))
    return Tree(leaves, tuple(layers - each * (levels - level) for level in range(levels + 1)), prefix, suffix, holds)


def read(document: Mapping[str, Any], bias: Sequence[Sequence[float]], where: str) -> Merging:
    """What a document and a bias say; ModelError where they say nothing of merging, or something newer."""
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"{where}: version is {version!r}, and {VERSION} is the newest that is read here; "
                         "upgrade compress-pipeline")  # fmt: skip
    said: dict[str, Any] = {name: document.get(name) for name in NUMBERS}
    if not all(type(n) is int and NUMBERS[name] <= n <= 1 << 30 for name, n in said.items()):
        raise ModelError(f"{where}: says nothing of how a context is merged; it is damaged, copy or export it again")
    found = Merging(**said, bias=tuple(tuple(row) for row in bias))
    if found.layers <= found.warmup or any(len(row) != found.chunk for row in found.bias):
        raise ModelError(f"{where}: its window and warm-up are not those of {BIAS}; they do not belong together, copy or export "
                         "the folder again")  # fmt: skip
    try:
        check_affixes(found.chunk, found.prefix, found.suffix)
    except ModelError as e:
        raise ModelError(f"{where}: {e}") from None
    return found


def told(held: Mapping[str, Any]) -> Merging:
    """What `State.serving` has."""
    return read(held, held["bias"], MERGED)


def load_bias(path: Path) -> list[list[float]]:
    """The bias of an artifact; ModelError where the file is damaged, or holds something else."""
    try:
        with safe_open(path, framework="pt") as file:
            bias: Tensor | None = file.get_tensor("bias") if file.keys() == ["bias"] else None
    except (SafetensorError, OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read ({e}); it is damaged, copy or export the folder again") from None
    if bias is None or bias.dtype != torch.float32 or bias.ndim != 2 or not bool(bias.isfinite().all()):
        raise ModelError(f"{path}: holds no finite 'bias' of layers and distances in fp32; copy or export the folder again")
    rows: list[list[float]] = bias.tolist()
    return rows


def check_belongs(merging: Merging, layers: int, positions: int | None, where: str) -> None:
    """ModelError where it is of a model with other layers, or fewer positions."""
    if merging.layers != layers or (positions and merging.window > positions):
        raise ModelError(f"{where}: is of {merging.layers} layers and a window of {merging.window}, and the model has {layers} "
                         f"and {positions} positions; they do not belong together, copy or export the folder again")  # fmt: skip
