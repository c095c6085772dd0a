"""How far a student's predictions are from its teacher's, and the way back to its last hidden states, a few tokens at a time.

Logits of a whole batch are never held: V of them a token are more than all else. Some rows go through the head, their loss and
its gradient are taken, and the rows are gone; gradients of what the head itself learns add up in their places.

With p the teacher's probabilities, q the student's, m = (p + q) / 2:

    kl          Σ p log p/q                         forward, as in Hinton et al. (arXiv 1503.02531) at temperature 1
    reverse_kl  Σ q log q/p
    js          ½ Σ p log p/m + ½ Σ q log q/m
    ce          - log q of the token that came

Of a teacher whose k largest probabilities are known, the rest of the vocabulary is one outcome more: its probability is 1 - Σ p.
That makes both sides distributions over k + 1 outcomes, so every one of these stays a divergence. It is at most that over
the whole vocabulary, since joining outcomes never raises an f-divergence, and equal at k = V. (Leaving the rest out is none: it
can be negative, and falls when a student takes weight off the outcomes that are known.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 1 << 24  # logits in hand at once
Rows = slice | Tensor  # of a batch's tokens: a stretch of them, or their numbers
LEAST = 1e-7  # of a rest: fp32 knows a sum of probabilities no better


@dataclass(frozen=True)
class Known:
    """A teacher's predictions of n tokens. log_p [n, k]: log-probabilities of the tokens `which` [n, k]; of all where that is
    None."""

    log_p: Tensor
    which: Tensor | None = None

    def rows(self, rows: Rows) -> Known:
        return Known(self.log_p[rows], None if self.which is None else self.which[rows])


def rest(log_nk: Tensor) -> Tensor:
    """log(1 - Σ exp) [n, 1] of log-probabilities [n, k]."""
    return (1 - log_nk.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()


def outcomes(z_nv: Tensor, teacher: Known) -> tuple[Tensor, Tensor]:
    """log p and log q over the same outcomes, from a student's logits."""
    log_q = z_nv.log_softmax(-1)
    if teacher.which is None:
        return teacher.log_p, log_q
    log_q = log_q.gather(-1, teacher.which)
    if teacher.which.shape[1] == z_nv.shape[1]:
        return teacher.log_p.log_softmax(-1), log_q  # rounded as they are kept, they do not sum to 1
    return torch.cat([teacher.log_p, rest(teacher.log_p)], -1), torch.cat([log_q, rest(log_q)], -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n]; outcomes that p rules out count nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence [n]."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "js": js,
}


@dataclass(frozen=True)
class Behind:
    """What a loss came to. sums: of each part over the tokens, unweighted. slope: of the whole at the hidden states [n, d]."""

    sums: Mapping[str, float]
    slope: Tensor | None


def behind(
    head: Callable[[Tensor, slice], Tensor],
    h_nd: Tensor,
    teacher: Known | Callable[[Rows], Known] | None,
    targets: Tensor | None,
    weights: Mapping[str, float],
    size: int,
    backward: bool = True,
    scale: float = 1.0,
) -> Behind:
    """Sum over n tokens of the loss, `weights` of its parts times `scale`, and its gradient at their hidden states [n, d].

    head: the logits [m, V] of some rows of hidden states; what it learns collects gradients. teacher: its predictions, or a way
    to ask for those of some rows. targets: int64 [n], the tokens that came. size: V.
    """
    step = max(1, NUMBERS // size)
    sums = dict.fromkeys(weights, 0.0)
    slopes = []
    for start in range(0, len(h_nd), step):
        rows = slice(start, min(start + step, len(h_nd)))
        leaf = h_nd[rows].detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            parts = losses(head(leaf, rows).float(), teacher(rows) if callable(teacher) else teacher and teacher.rows(rows),
                           None if targets is None else targets[rows], weights)  # fmt: skip
            total = sum((weights[name] * scale * part for name, part in parts.items()), torch.zeros(()))
        for name, part in parts.items():
            sums[name] += float(part.detach().double())
        if backward:
            total.backward()
            assert leaf.grad is not None
            slopes.append(leaf.grad)
    return Behind(sums, torch.cat(slopes) if backward else None)


def losses(z_nv: Tensor, teacher: Known | None, targets: Tensor | None, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Each part of the loss, summed over some tokens."""
    found = {}
    pair = None
    for name in weights:
        if name == "ce":
            assert targets is not None
            found[name] = torch.nn.functional.cross_entropy(z_nv, targets, reduction="sum")
        else:
            assert teacher is not None
            pair = pair or outcomes(z_nv, teacher)
            found[name] = DIVERGENCES[name](*pair).sum()
    return found
