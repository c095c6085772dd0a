"""Thresholds of activation sparsity, and Deja Vu's predictor. Pure mathematics on tensors.

Letters in names: t tokens, k inputs of a matrix, m neurons, r the predictor's rank.

`level` is the score that a share of all scores reaches: one number for a layer, so that a token with much to say speaks with more
neurons than another. Thresholds of single neurons are made of it, for scores are not alike:

    CATS       |a_j| E|u_j| ‖w_j‖  with a_j the activation, E|u_j| the root mean square of what `up` puts out for neuron j, and
               w_j its column of down: what the neuron adds to the block's output, as far as is known before `up` is read. The
               paper takes |a_j| alone, which counts a neuron that nothing reads like any other.
    predictor  (B A x)_j + b_j, the logits of "neuron j is positive"

`predictor`. The paper draws A and B at random and trains them. Here they start as what they are to foretell: of the
pre-activations Z = X W' the best approximation of rank r in the mean over these inputs, W_r = U U' W with U the first r left
singular vectors of W C and C C' = E[x x']. From there a few hundred steps of AdamW on the cross-entropy, positives weighted as in
Deja Vu's code: with density ρ a positive weighs 1 and a negative ρ, for a neuron that is missed costs more than one that is read
in vain.

Alternative not taken. The top K of every token: K costs a sort, and is the same for easy tokens and hard ones; a threshold on
logits is calibrated.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

EXTRA = 0.005  # of a negative's weight, as Deja Vu's code has it
LEAST = 1e-9  # nats: KL below that is rounding
RATE, DECAY = 3e-3, 0.01  # AdamW
DRAWN = 256  # tokens of a step
HELD = 8  # the last of so many parts of the tokens is kept to choose by


def level(score_tm: Tensor, keep: float) -> float:
    """The score that a share `keep` of all scores reaches, and one of them at least."""
    flat = score_tm.flatten().float()
    kept = max(1, round(keep * len(flat)))
    return float(flat.kthvalue(len(flat) - kept + 1).values)


def contribution(up_tm: Tensor | None, W_nm: Tensor) -> Tensor:
    """What a unit of a neuron's activation adds to the output, [m], over its mean; W [n, m] is down. Never zero."""
    found = W_nm.float().norm(dim=0)
    if up_tm is not None:
        found = found * up_tm.float().square().mean(0).sqrt()
    found = found / found.mean().clamp(min=1e-30)
    return torch.clamp(found, min=1e-6)


def between(measured: Mapping[float, float], share: float) -> float:
    """The damage at a share, from those at some shares: straight lines of its logarithm. Zero where all is kept."""
    if share >= 1:
        return 0.0
    known = sorted(measured)
    high = min(max(bisect_left(known, share), 1), len(known) - 1)
    low, top = known[high - 1], known[high]
    logs = [math.log(max(measured[s], LEAST)) for s in (low, top)]
    return math.exp(logs[0] + (logs[1] - logs[0]) * (share - low) / (top - low))


def low_rank(X_tk: Tensor, W_mk: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, k] and B [m, r] whose product is nearest to W on these inputs, in the mean square of what it puts out."""
    X_tk, W_mk = X_tk.double(), W_mk.double()
    H_kk = X_tk.T @ X_tk / len(X_tk)
    H_kk.diagonal().add_(1e-6 * H_kk.diagonal().mean() + 1e-12)
    U_mr = torch.linalg.svd(W_mk @ torch.linalg.cholesky(H_kk), full_matrices=False).U[:, :rank]
    return (U_mr.T @ W_mk).float(), U_mr.float()


Way = tuple[Tensor, Tensor, Tensor]  # A, B and b of a predictor


def predictor(X_tk: Tensor, Y_tm: Tensor, W_mk: Tensor, bias_m: Tensor, rank: int, steps: int, generator: torch.Generator) -> Way:
    """A [r, k], B [m, r] and b [m], fp32, that foretell which of the pre-activations Y are positive: trained ones, or, where
    these catch no more on the last tokens, those that training began with."""
    X_tk, count = X_tk.float(), max(1, len(X_tk) - len(X_tk) // HELD)
    A_rk, B_mr = low_rank(X_tk, W_mk, rank)
    unit = Y_tm.float().std().clamp(min=1e-6) / 2  # logits of a size that the loss can tell apart
    start = A_rk, B_mr / unit, bias_m.float() / unit
    ways = [start, trained(start, X_tk[:count], (Y_tm[:count] > 0).float(), steps, generator)]
    return max(reversed(ways), key=lambda way: caught(way, X_tk[-(len(X_tk) // HELD) :], Y_tm[-(len(X_tk) // HELD) :]))


def trained(start: Way, X_tk: Tensor, labels_tm: Tensor, steps: int, generator: torch.Generator) -> Way:
    """A, B and b after some steps of AdamW on the weighted cross-entropy of the labels."""
    A_rk, B_mr, b_m = (p.clone().requires_grad_() for p in start)
    optimizer = torch.optim.AdamW([A_rk, B_mr, b_m], RATE, weight_decay=DECAY)
    weak = float(labels_tm.mean()) + EXTRA
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            drawn = torch.randint(len(X_tk), (DRAWN,), generator=generator).to(X_tk.device)
            y, logits = labels_tm[drawn], X_tk[drawn] @ A_rk.T @ B_mr.T + b_m
            loss = functional.binary_cross_entropy_with_logits(logits, y, y * (1 - weak) + weak)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return A_rk.detach(), B_mr.detach(), b_m.detach()


def caught(way: Way, X_tk: Tensor, Y_tm: Tensor) -> float:
    """The recall of a predictor that reads as many neurons as are positive."""
    A_rk, B_mr, b_m = way
    logits = X_tk @ A_rk.T @ B_mr.T + b_m
    return recall(logits >= level(logits, float((Y_tm > 0).float().mean())), Y_tm)


def recall(active_tm: Tensor, Y_tm: Tensor) -> float:
    """The share of the positive neurons that are read."""
    positive = Y_tm > 0
    return float((active_tm & positive).sum() / positive.sum().clamp(min=1))
