"""GPTQ for vector codes: eight inputs at a time.

gptq_core's identity holds for blocks of inputs as well. With H + λI = Lᵀ D L, the inputs of a block B next to each other in the
order, and Δ the changes of those before it, the loss of the block is

    Σ_{i in B} D_i η_i² = (Δ_B - e_B)ᵀ M (Δ_B - e_B),    e_B = -L_BB⁻¹ L_B< Δ_<,    M = L_BBᵀ D_B L_BB

so the code word that is nearest to t_B = w_B + e_B in the metric M makes the term least, given the choices before it (the block
form of LDLQ: QuIP, arXiv 2307.13304; blocks of eight: QuIP#, arXiv 2402.04396). The search takes diag M for M: then signs are
those of t, magnitudes one product with all points, and only where the number of negative signs has to be even does the sign that
costs least flip. M itself comes in afterwards, in sweeps: each block in turn is offered the word that is nearest in diag A_BB to
where the loss would have it, given all other blocks, and takes it where the loss, exactly, falls.

Scales are found before the loop, as llama.cpp finds them: each group tries multiples of its extreme over the largest number of a
point, and of the units of a block those are taken whose odd multiples lose least. After the loop they are refitted to the words.

Blocks go by the largest diagonal of H in them, which costs a second factorization. Not taken: all words in M, 2^15 for eight
inputs, a hundred times the work; the sweeps take most of what it would bring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats.ggml import SUPER
from compress.formats.grid import refuse_nan, round_scale
from compress.formats.lattice import EIGHT, Chosen, Lattice
from compress.passes import gptq_core as core
from compress.passes.rows import at_once

SWEEPS = 2
_TRIES = (0.65, 0.75, 0.85, 0.95, 1.05)  # of a group's extreme over the largest number of a point
_UNITS = 12  # units tried for a block: where its largest scale lands among 1, 3 ... 31
_PANEL = 16  # blocks between two products with all that comes before


@dataclass(frozen=True)
class Found:
    """The words of a matrix, and what each output lost; see `gptq_core.Solved`."""

    chosen: Chosen
    loss_n: Tensor
    rounding_loss_n: Tensor
    energy_n: Tensor
    notes: tuple[str, ...]


@torch.no_grad()
def solve(W_nk: Tensor, f: core.Factor, fmt: Lattice, feedback: bool = True) -> Found:
    """W [N, K] in a vector format under the Hessian that was factored; no output loses more than by rounding."""
    fmt.check(tuple(W_nk.shape))
    refuse_nan(W_nk)
    order = Order.of(f) if feedback and f.lam else None
    rows = at_once(2 * W_nk.shape[1])
    parts = [_solve(W.float(), f, fmt, order) for W in W_nk.split(rows)]
    chosen = Chosen(*(torch.cat([getattr(p.chosen, n) for p in parts]) for n in ("points", "negative", "odd", "d")))
    loss_n, rounding_n, energy_n = (torch.cat([getattr(p, n) for p in parts]) for n in ("loss_n", "rounding_loss_n", "energy_n"))
    return Found(chosen, loss_n, rounding_n, energy_n, f.notes)


@dataclass(frozen=True)
class Order:
    """H + λI with inputs as they lie, and its factor with whole blocks of eight in an order: `blocks` of inputs, A, L, D."""

    blocks: Tensor  # the first inputs of blocks, in order
    A_kk: Tensor  # as inputs lie
    L_kk: Tensor
    D_k: Tensor

    @classmethod
    def of(cls, f: core.Factor) -> Order | None:
        """None where it cannot be factored in that order."""
        A_kk = torch.empty_like(f.A_kk)
        A_kk[f.order_k[:, None], f.order_k] = f.A_kk
        first = torch.argsort(f.diag_k.view(-1, EIGHT).amax(1), descending=True, stable=True) * EIGHT
        at = (first[:, None] + torch.arange(EIGHT, device=first.device)).flatten()
        found = core.ldl(A_kk[at[:, None], at])
        return None if found is None else cls(first, A_kk, *found)


def _solve(W_nk: Tensor, f: core.Factor, fmt: Lattice, order: Order | None) -> Found:
    weight_k = f.diag_k.to(W_nk.dtype) + f.lam
    scale_nG, odd, d = _scales(W_nk, fmt, weight_k)
    words = _Words(W_nk, fmt, scale_nG)
    for b in range(0, W_nk.shape[1], EIGHT):
        words.put(b, *words.nearest(b, W_nk[:, b : b + EIGHT], weight_k[b : b + EIGHT]))
    loss_n = rounding_n = core.loss(words.Q_nk - W_nk, f)
    best = words.chosen(odd, d)
    if order is not None:
        _feedback(words, order)
        odd = _refit(words, order.A_kk, odd, d)
        for _ in range(SWEEPS):
            _sweep(words, order)
        new_n = core.loss(words.Q_nk - W_nk, f)
        best, loss_n = _better(new_n < loss_n, words.chosen(odd, d), best), torch.minimum(new_n, loss_n)
    return Found(best, loss_n, rounding_n, core.loss(W_nk, f), ())


class _Words:
    """The words that the weights of some outputs have so far, and the weights Q [N, K] that they stand for."""

    def __init__(self, W_nk: Tensor, fmt: Lattice, scale_nG: Tensor):
        self.W_nk, self.fmt, self.scale_nG = W_nk, fmt, scale_nG
        self.table, self.dim = fmt.table.to(W_nk), fmt.of.dim
        self.squares = self.table.square()
        n, k = W_nk.shape
        self.points = torch.zeros(n, k // self.dim, dtype=torch.int16, device=W_nk.device)
        self.negative = torch.zeros(n, k, dtype=torch.bool, device=W_nk.device)
        self.Q_nk = torch.zeros_like(W_nk)

    def nearest(self, b: int, T_n8: Tensor, weight_8: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points, signs and weights of the words nearest to targets of the eight inputs from b on, each input weighed."""
        scale_n = self.scale_nG[:, b // self.fmt.of.group, None]
        X_n8 = T_n8 / scale_n
        negative = X_n8 < 0
        X_n8 = X_n8.abs()
        if self.fmt.of.even:
            cheapest = (X_n8 * weight_8).argmin(1, keepdim=True)
            flip = torch.zeros_like(negative).scatter_(1, cheapest, (negative.sum(1, keepdim=True) % 2).bool())
            negative, X_n8 = negative ^ flip, torch.where(flip, -X_n8, X_n8)
        found = []
        for i in range(0, EIGHT, self.dim):
            w = weight_8[i : i + self.dim]
            found.append(torch.addmm(self.squares @ w, X_n8[:, i : i + self.dim] * w, self.table.T, alpha=-2).argmin(1))
        points = torch.stack(found, 1)
        size = self.table[points].flatten(1) * scale_n
        return points, negative, torch.where(negative, -size, size)

    def put(self, b: int, points: Tensor, negative: Tensor, Q_n8: Tensor, where: Tensor | None = None) -> None:
        """Take words for the eight inputs from b on; of some outputs only."""
        at, eight = slice(b // self.dim, (b + EIGHT) // self.dim), slice(b, b + EIGHT)
        if where is not None:
            points = torch.where(where[:, None], points, self.points[:, at])
            negative = torch.where(where[:, None], negative, self.negative[:, eight])
            Q_n8 = torch.where(where[:, None], Q_n8, self.Q_nk[:, eight])
        self.points[:, at], self.negative[:, eight], self.Q_nk[:, eight] = points.to(torch.int16), negative, Q_n8

    def chosen(self, odd: Tensor, d: Tensor) -> Chosen:
        return Chosen(self.points.clone(), self.negative.clone(), odd, d)


def _feedback(words: _Words, o: Order) -> None:
    """Every block in its order to the word nearest to its target."""
    blocks, K = o.blocks.tolist(), len(o.D_k)
    D_nk = torch.zeros_like(words.W_nk)  # changes, in the order of the factor
    for p in range(0, len(blocks), _PANEL):
        start, end = p * EIGHT, min((p + _PANEL) * EIGHT, K)
        C_np = D_nk[:, :start] @ o.L_kk[start:end, :start].T
        for i, b in enumerate(blocks[p : p + _PANEL]):
            at = slice(start + i * EIGHT, start + (i + 1) * EIGHT)
            L = o.L_kk[at, at]
            c = C_np[:, i * EIGHT : (i + 1) * EIGHT] + D_nk[:, start : at.start] @ o.L_kk[at, start : at.start].T
            T_n8 = words.W_nk[:, b : b + EIGHT] - torch.linalg.solve_triangular(L, c.T, upper=False, unitriangular=True).T
            weight_8 = (L.square() * o.D_k[at, None]).sum(0)
            points, negative, Q_n8 = words.nearest(b, T_n8, weight_8)
            words.put(b, points, negative, Q_n8)
            D_nk[:, at] = Q_n8 - words.W_nk[:, b : b + EIGHT]


def _sweep(words: _Words, o: Order) -> None:
    """Each block in turn the word that the others would have it have, where the loss falls."""
    G_nk = (words.Q_nk - words.W_nk) @ o.A_kk
    for b in o.blocks.tolist():
        at = slice(b, b + EIGHT)
        A = o.A_kk[at, at]
        Q_n8 = words.Q_nk[:, at]
        T_n8 = Q_n8 - torch.linalg.solve(A, G_nk[:, at].T).T
        points, negative, new = words.nearest(b, T_n8, A.diagonal())
        step = new - Q_n8
        falls = ((step @ A) * step + 2 * step * G_nk[:, at]).sum(1) < 0
        words.put(b, points, negative, new, falls)
        G_nk += torch.where(falls[:, None], step, 0.0) @ o.A_kk[at]


def _refit(words: _Words, A_kk: Tensor, odd: Tensor, d: Tensor) -> Tensor:
    """The odd numbers at which the loss is least for the words as they are, one group after another; Q and scales follow."""
    fmt, odd = words.fmt, odd.clone()
    G_nk = (words.Q_nk - words.W_nk) @ A_kk
    for g in range(words.scale_nG.shape[1]):
        at = slice(g * fmt.of.group, (g + 1) * fmt.of.group)
        Q = words.Q_nk[:, at]
        slope, bend = (Q * G_nk[:, at]).sum(1), (Q @ A_kk[at, at] * Q).sum(1)
        by = torch.where(bend > 0, 1 - slope / bend, 1.0)
        unit = d[:, at.start // SUPER] * fmt.of.c
        new = _odd(words.scale_nG[:, g] * by / unit)
        step = Q * (new * unit / words.scale_nG[:, g] - 1)[:, None]
        words.Q_nk[:, at] += step
        words.scale_nG[:, g] = new * unit
        odd[:, g] = new.to(odd.dtype)
        G_nk += step @ A_kk[at]
    return odd


def _scales(W_nk: Tensor, fmt: Lattice, weight_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [N, G] that can be stored, with the odd numbers and the blocks' numbers d that they are made of."""
    group, far = fmt.of.group, float(fmt.table.max())
    start_nG = W_nk.unflatten(1, (-1, group)).abs().amax(-1).clamp_(min=1e-12) / far
    best, best_error = start_nG, torch.full_like(start_nG, float("inf"))
    for share in _TRIES:
        words = _Words(W_nk, fmt, start_nG * share)
        for b in range(0, W_nk.shape[1], EIGHT):
            words.put(b, *words.nearest(b, W_nk[:, b : b + EIGHT], weight_k[b : b + EIGHT]))
        # the best scale for these words, and what is then lost
        wq = (words.Q_nk * weight_k).unflatten(1, (-1, group))
        W, Q = W_nk.unflatten(1, (-1, group)), words.Q_nk.unflatten(1, (-1, group))
        energy = (wq * Q).sum(-1)
        by = torch.where(energy > 0, (wq * W).sum(-1) / energy, 1.0)
        error = ((Q * by[..., None] - W).square() * weight_k.unflatten(0, (-1, group))).sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, words.scale_nG * by, best), torch.minimum(error, best_error)
    return _stored(best, fmt)


def _stored(wanted_nG: Tensor, fmt: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """The scales nearest to wanted ones among odd multiples of a number of each block; they, the odd numbers, the numbers d."""
    wanted = wanted_nG.clamp(min=2.0**-24).unflatten(1, (-1, SUPER // fmt.of.group))
    tried = []
    for i in range(_UNITS):
        d = round_scale(wanted.amax(-1, keepdim=True) / (31 - 1.5 * i) / fmt.of.c, torch.float16).float()
        odd = _odd(wanted / (d * fmt.of.c))
        tried.append((d, odd, (d * fmt.of.c * odd - wanted).square_().sum(-1, keepdim=True)))
    least = torch.stack([error for *_, error in tried]).argmin(0, keepdim=True)
    d = torch.stack([d for d, *_ in tried]).gather(0, least)[0]
    odd = torch.stack([odd for _, odd, _ in tried]).gather(0, least.expand(-1, -1, -1, wanted.shape[-1]))[0]
    return (d * fmt.of.c * odd).flatten(1), odd.flatten(1).to(torch.int16), d[..., 0]


def _odd(x: Tensor) -> Tensor:
    """The nearest of 1, 3 ... 31."""
    return ((x - 1) / 2).round().clamp_(0, 15) * 2 + 1


def _better(mine: Tensor, one: Chosen, other: Chosen) -> Chosen:
    """The one where it is better, by outputs."""
    both = zip((one.points, one.negative, one.odd, one.d), (other.points, other.negative, other.odd, other.d), strict=True)
    return Chosen(*(torch.where(mine[:, None], a, b) for a, b in both))
