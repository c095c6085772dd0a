"""What it costs a layer that a KV head keeps fewer entries, and the choice of all heads under a budget. Mathematics on tensors.

Letters: T tokens of a window, the first S a prompt, c = T - S behind it; G query heads share KV head u, D their width; W_u [out,
G D] the columns of the output matrix that read them.

Of one recorded pass (queries, keys, values of a whole window) every option of every head is measured, and no other pass is
needed:

    d_uo = Σ_c |W_u (a_c - a_c(o))|² / Σ_c |W a_c|²

with a_c what attention gives at token c with all entries and a_c(o) with those prompt entries that option o keeps, as they come
back from what they are stored in; entries of tokens behind the prompt are all there. The denominator is the whole
layer's, so that damages of different layers compare: the share of a layer's output that is wrong. Attention mass does not compare
so, and a head whose values W_u ignores may lose what it attends to most.

With e = exp(logit - largest), both a and a(o) are quotients of sums over entries, of e v and of e, so all options of a head are
one product: e times what each keeps, with v. |W_u x|² is xᵀ (W_uᵀ W_u) x.

The choice: one option for each head, least Σ d within the bytes, exactly, by the integer program of allocate_core.py. Its
assumption is that damages add up, over heads of a layer (whose errors may cancel) and over layers (whose errors pass on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compress.cache.policy import Unit
from compress.cache.rules import RULES, after_prompt, count, scores, stored
from compress.model.attention import Attended, Heads
from compress.passes.allocate_core import Item, Limit, Problem, Solution, solve

SHARES = (50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900)  # thousandths
AT_ONCE = 1 << 24  # numbers that options which are measured together take


def options_of(rules: Sequence[str], dtypes: Sequence[str]) -> list[Unit]:
    """Everything that a head may be given."""
    shares = {rule: (1000,) if rule == "full" else SHARES for rule in rules}
    return [Unit(rule, share, dtype) for rule in rules for share in shares[rule] for dtype in dtypes]


def damages(
    a: Attended, layer: Heads, W_oi: Tensor, split: int, options: Sequence[Unit], marked_bt: Tensor
) -> tuple[Tensor, float]:
    """Numerators of d [units, options], fp64, and their denominator, both summed over rows and the tokens behind `split`."""
    found_uo, whole = torch.zeros(layer.units, len(options), dtype=torch.float64), 0.0
    W_oi = W_oi.to(a.q.device, torch.float32)
    for row in range(len(a.q)):
        outputs_ci = torch.zeros(a.q.shape[2] - split, W_oi.shape[1], device=a.q.device)
        for unit in range(layer.units):
            W_ox = W_oi[:, layer.columns[unit].to(a.q.device)]
            seen = _Seen(a, layer, row, unit, split, marked_bt[row].to(a.q.device))
            a_cx, gram_xx = side_by_side(seen.all()), W_ox.T @ W_ox
            outputs_ci[:, layer.columns[unit].to(a.q.device)] = a_cx
            for some in seen.alike(options):
                off_ocx = side_by_side(seen.kept([options[i] for i in some])) - a_cx
                found_uo[unit, some] += ((off_ocx @ gram_xx) * off_ocx).sum((-1, -2)).clamp(min=0).double().cpu()
        whole += float((outputs_ci @ W_oi.T).square().sum())
    return found_uo, whole


class _Seen:
    """One unit in one window: what its queries behind the prompt attend to."""

    def __init__(self, a: Attended, layer: Heads, row: int, unit: int, split: int, marked_t: Tensor):
        mine = slice(unit * a.group, (unit + 1) * a.group)
        self.q_gtd, self.k_td, self.v_td = a.q[row, mine].float(), a.k[row, unit].float(), a.v[row, unit].float()
        self.layer, self.split, self.marked_t, self.scale = layer, split, marked_t, a.scale
        self.there, self.given_in = a.resident(split, layer.sliding), a.k.dtype
        self.allowed = a.allowed(row)
        places = torch.arange(len(self.k_td), device=self.k_td.device)
        self.seen_ct = places <= places[split:, None] if self.allowed is None else self.allowed[split:]

    def weights(self, k_td: Tensor) -> Tensor:
        """e [G, c, T]."""
        logits = ((self.q_gtd[:, self.split :] * self.scale) @ k_td.T).masked_fill(~self.seen_ct, -torch.inf)
        return (logits - logits.amax(-1, keepdim=True)).exp()

    def all(self) -> Tensor:
        """What attention gives with all entries [G, c, D]."""
        e_gct = self.weights(self.k_td)
        return (e_gct @ self.v_td) / e_gct.sum(-1, keepdim=True)

    def alike(self, options: Sequence[Unit]) -> Iterator[list[int]]:
        """The numbers of options that are stored alike, as many at once as memory is worth."""
        each = self.q_gtd.shape[0] * self.seen_ct.numel()
        for dtype in dict.fromkeys(o.dtype for o in options):
            mine = [i for i, o in enumerate(options) if o.dtype == dtype]
            many = max(1, AT_ONCE // each)
            yield from (mine[start : start + many] for start in range(0, len(mine), many))

    def kept(self, options: Sequence[Unit]) -> Tensor:
        """The same with the entries that each option keeps [options, G, c, D]; all are stored alike."""
        k_td, v_td = (self._stored(x, options[0].dtype) for x in (self.k_td, self.v_td))
        kept_ot = torch.zeros(len(options), len(k_td), device=k_td.device)
        kept_ot[:, self.split :] = 1
        for o, kept_t in zip(options, kept_ot, strict=True):
            many = count(o.share, self.split, self.layer.sliding)
            kept_t[after_prompt(o.rule, many, self.there, self.split, self._scores, self.marked_t)] = 1
        e_ogct = self.weights(k_td) * kept_ot[:, None, None]
        return (e_ogct @ v_td) / e_ogct.sum(-1, keepdim=True).clamp(min=1e-30)

    def _stored(self, x_td: Tensor, dtype: str) -> Tensor:
        held = stored(x_td[: self.split].to(self.given_in), dtype).float()
        return torch.cat([held, x_td[self.split :]])

    @cached_property
    def _scores(self) -> Mapping[str, Tensor]:
        prompt = None if self.allowed is None else self.allowed[: self.split, : self.split]
        return scores(set(RULES), self.q_gtd[:, : self.split], self.k_td[: self.split], self.scale, prompt)


def side_by_side(x_gcd: Tensor) -> Tensor:
    """Heads [.., G, c, D] as the output matrix reads them [.., c, G D]."""
    return x_gcd.transpose(-3, -2).flatten(-2)


def choose(names: Sequence[str], damage_uo: np.ndarray, bytes_uo: np.ndarray, budget: int) -> Solution:
    """One option for each unit: the least damage in sum within `budget` bytes; Infeasible where none fits."""
    items = [Item(name, d, b[None]) for name, d, b in zip(names, damage_uo, bytes_uo, strict=True)]
    return solve(Problem(items, (Limit("bytes", budget),)))
