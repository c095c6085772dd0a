"""FastGen (Ge et al., arXiv 2310.01801): each KV head takes its rule itself, from a ladder, once it has read a prompt.

The idea. What a head looks at shows in its own attention on the very prompt that is about to be answered. The rungs, each of
which keeps what those before it keep, and more:

    special                       special tokens
    special+punct                 and punctuation
    special+punct+frequent        and, of the others, r_f n with most attention per query that could see them
    special+punct+frequent+local  and the latest r_l n
    full                          everything

of n tokens; the first 4 tokens are among all of them, and r_f = r_l = .3, as published. Of a rung that keeps the entries K of all
N that are there,

    recovered = Σ_{j∈K} a_j / Σ_{j∈N} a_j,    a_j = attention given to entry j, summed over the queries of the prompt

and a head takes the first rung that recovers T or more. While a model decodes, heads keep their rung: the latest move on, the
frequent compete with new tokens by attention per query, what is special or punctuation stays.

What the paper leaves open. A prompt of a few tokens tells nothing: its first 4 recover all of it, and a head that keeps no
others would drop whatever comes. So heads take `full` of a text of fewer than `STEP` tokens. Query heads that share a KV head
share its entries: their attention is added up. In a layer with a sliding window, attention to entries that have left it is in
neither sum, and n is what the window holds; otherwise every such head would have to take `full`, which could not give back what
is gone either. That a head keeps the latest is no law here: on the first rungs a new token goes as soon as it is ranked, unless
it is special.

Alternative not taken: eviction at every token; rules.py says why, and all rules are served alike.

Limits. How much stays hangs on the text, so there is no bound but everything; what was measured on prompts is told, and no more.
Attention mass is a worse guide than the error of outputs, and does not compare between layers: at equal bytes the choice by
damage (passes/kv_policy_core.py) loses less. docs/cache.md has both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.cache.rules import PUNCTUATION, RUNGS, SINKS, SPECIAL, STEP

RECOVERY = 0.85  # T where none is asked for: that of cold-compress' hybrid cache; the paper has tables up to .99
SHARE = 300  # r_f and r_l, in thousandths
ROUNDING = 1e-5  # by how much two computations of the same attention may differ in what a rung recovers


@dataclass(frozen=True)
class Ladder:
    """T, and what the rungs are made of: special, the ids of special tokens; r_f and r_l in thousandths of the tokens seen.

    prompts: least, mean and most bytes that were measured, of a cache with a prompt of `Policy.context` tokens, one row.
    """

    recovery: float
    special: tuple[int, ...]
    prompts: tuple[int, int, int]
    frequent: int = SHARE
    local: int = SHARE

    def chosen(
        self, place_n: Tensor, seen: int, first: int, there: int, score_n: Tensor, kind_n: Tensor, told: str | None = None
    ) -> tuple[str, Tensor]:
        """The rung that a prompt is given, and the indices of the N entries that it keeps; for the arguments see `kept`.

        told: the rung that another computation of the same attention took; it stands where only rounding speaks against it.
        """
        if seen - first < STEP:
            return RUNGS[-1], torch.arange(len(place_n), device=place_n.device)
        for rung, kept_k, recovered in self.climbed(place_n, seen, first, there, score_n, kind_n):
            slack = 0 if told is None else -ROUNDING if rung == told else ROUNDING
            if recovered >= min(self.recovery + slack, 1.0):
                return rung, kept_k
        raise AssertionError("the last rung recovers everything")

    def climbed(
        self, place_n: Tensor, seen: int, first: int, there: int, score_n: Tensor, kind_n: Tensor
    ) -> Iterator[tuple[str, Tensor, float]]:
        """Every rung in order, with the indices that it keeps and the share of attention that these recover."""
        whole = float(score_n.double().sum())
        for rung in RUNGS:
            kept_k = self.kept(rung, place_n, seen, first, there, score_n, kind_n)
            every = len(kept_k) == len(place_n)
            yield rung, kept_k, 1.0 if every else float(score_n[kept_k].double().sum()) / max(whole, 1e-30)

    def kept(
        self, rung: str, place_n: Tensor, seen: int, first: int, there: int, score_n: Tensor | None, kind_n: Tensor
    ) -> Tensor:
        """Which of N entries a rung keeps: their indices, ascending.

        place [N]: of each entry among all tokens, ascending; the row's text starts at `first`, and `seen` is where the next token
        will be. there: n, the tokens that shares are of. score [N]: attention given to each, where the rung asks for it; kind
        [N]: of its token, see `PUNCTUATION`.
        """
        n, step = len(place_n), RUNGS.index(rung)
        if rung == RUNGS[-1]:
            return torch.arange(n, device=place_n.device)
        kept_n = (place_n - first < SINKS) | (kind_n >= (SPECIAL if step == 0 else PUNCTUATION))
        if step >= 2:
            assert score_n is not None, f"{rung} goes by attention"
            each_n = (score_n / (seen - place_n)).masked_fill(kept_n, -torch.inf)
            many = min(_part(self.frequent, there), n - int(kept_n.sum()))
            kept_n[each_n.sort(descending=True, stable=True).indices[:many]] = True
        if step >= 3:
            kept_n[max(0, n - _part(self.local, there)) :] = True
        return kept_n.nonzero()[:, 0]


def _part(thousandths: int, there: int) -> int:
    """So much of so many tokens, rounded up."""
    return -(-thousandths * there // 1000)
