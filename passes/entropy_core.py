"""Entropy-coded integers: steps by input, GPTQ's feedback without clipping, and the step at which the codes fill their rate.

With H + λI = Lᵀ D L (see gptq_core.py) the loss of an output is Σ D_i η_i², and rounding input i to multiples of a step a_i
leaves η_i² = a_i² / 12 whatever the others do. A code costs log2(σ_i / a_i) bits and a constant. So at a given number of bits the
loss is least where every D_i a_i² is the same (reverse water-filling, as WaterSIC, arXiv 2603.04956, has it): a_i = c / √D_i.
There is no range to search and no level to run out of. One number is left, c, and bits fall by one a weight with each octave of
it: a few Newton steps on some of the rows, then on all, find the smallest c under which everything fits. At last each output's
scale is refitted to its codes in closed form, t = wᵀHq / qᵀHq, which no code notices.

The alternative not taken: to code residuals, or to let a code cost what it costs while it is chosen (rate-distortion
optimization). A table of tokens is never whole in fp32 (rows.py): its codes are, a byte each. Limits: with few tokens D is
overfitted, and steps with it; damping (see `gptq_core.damp_for`) is what there is against that. Inputs that were never seen get
the widest steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import entropy
from compress.formats.entropy import Ecq
from compress.formats.grid import Grid
from compress.passes import gptq_core as core
from compress.passes import scales_core
from compress.passes.rows import Matrix, every, parts, wholes_at_once
from compress.passes.scales_core import Fitted, sizes

SAMPLED, SHARE = 128, 64  # rows on which the step is looked for, or so small a part of a table
LOOKS = 4  # times that it is looked for there
TRIES = 8  # times that all rows are coded until they fit
ROOM = 0.002  # bits a weight that a step is aimed below the rate
BLOCK = 32
FULL = "codes of a byte cannot use the whole rate; a lower one, or int8, is as good"
HELD = 4  # bytes of a weight of a table: its codes, the best ones before, and both as they are put in lanes
CODINGS = 4  # times that a matrix is coded or decoded in a run: once each as it is solved, two more as the result is judged


@dataclass(frozen=True)
class Coded:
    """Packed tensors, and what each output lost, as `gptq_core.Solved` has it; off_n: the squared change of its weights."""

    tensors: dict[str, Tensor]
    loss_n: Tensor
    energy_n: Tensor
    off_n: Tensor
    notes: tuple[str, ...] = ()


class _Rounds:
    """What `gptq_core` rounds with: the nearest multiple of the grid's scale, as far as codes go."""

    @staticmethod
    def nearest(w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        return torch.div(w, grid.scale, out=out).round_().clamp_(-entropy.LARGEST, entropy.LARGEST).mul_(grid.scale)


@dataclass(frozen=True)
class Found:
    """Codes int8 [N, K] on steps of `base`, by the tables `spread_k`, and the bits that they take."""

    codes: Tensor
    base: float
    step_k: Tensor
    spread_k: Tensor
    bits: float

    @property
    def a_k(self) -> Tensor:
        """The steps [K]."""
        return entropy.stepped(self.base, self.step_k)


@torch.no_grad()
def solve(W_nk: Matrix, f: core.Factor, fmt: Ecq, scale_dtype: torch.dtype) -> Coded:
    """W [N, K] at the rate of the format, under the Hessian that was factored. FormatError where W is not finite."""
    fmt.check(tuple(W_nk.shape))
    scale_n, step_k = sizes(W_nk, scale_dtype, wholes_at_once(W_nk.shape[1])), relative_steps(f)
    room = room_for(fmt, tuple(W_nk.shape))
    base = looked_for(W_nk, scale_n, f, step_k, room / math.prod(W_nk.shape))
    found, words = fitting(W_nk, scale_n, f, step_k, base, room, fmt.words(tuple(W_nk.shape)))
    kept, fitted = best_fit(W_nk, found, scale_n, f)
    if full := kept is not found:
        words = entropy.encode(kept.codes, kept.spread_k)
    tensors = fmt.pack(words, kept.step_k, kept.spread_k, kept.base, fitted.scale_n)
    return Coded(tensors, fitted.loss_n, fitted.energy_n, fitted.off_n, (FULL,) if full else ())


@torch.no_grad()
def tried(W_nk: Tensor, f: core.Factor, fmt: Ecq, whole: tuple[int, int]) -> Tensor:
    """What would come of some rows of a matrix of shape `whole`, fp32, nothing coded."""
    scale_n, step_k = sizes(W_nk, torch.float32, wholes_at_once(W_nk.shape[1])), relative_steps(f)
    bits = room_for(fmt, whole) / (whole[0] * whole[1])
    found = rounded(W_nk, scale_n, f, step_k, looked_for(W_nk, scale_n, f, step_k, bits))
    kept, fitted = best_fit(W_nk, found, scale_n, f)
    return entropy.restored(kept.codes, kept.a_k, fitted.scale_n)


def best_fit(W_nk: Matrix, found: Found, scale_n: Tensor, f: core.Factor) -> tuple[Found, Fitted]:
    """The codes with refitted scales; where some would have had to be larger than a byte has room for, those on wider steps, as
    long as these lose less."""
    best = found, refitted(W_nk, found, scale_n, f)
    while bool((found.codes.abs() == entropy.LARGEST).any()):
        found = rounded(W_nk, scale_n, f, found.step_k, found.base * math.sqrt(2))
        wider = refitted(W_nk, found, scale_n, f)
        if not float(wider.loss_n.sum()) < float(best[1].loss_n.sum()):
            break
        best = found, wider
    return best


def room_for(fmt: Ecq, shape: tuple[int, ...]) -> float:
    """Bits that the codes of a matrix may take."""
    return 32 * fmt.words(shape) - entropy.overhead(*shape)


def looked_for(W_nk: Matrix, scale_n: Tensor, f: core.Factor, step_k: Tensor, bits: float) -> float:
    """The base of the steps at which a code takes so many bits, by some of the rows."""
    step = max(1, min(len(W_nk) // SAMPLED, SHARE))
    some = every(W_nk, step, wholes_at_once(W_nk.shape[1])), scale_n[::step]
    base = first_base(*some, step_k, bits)
    for _ in range(LOOKS):
        found = rounded(*some, f, step_k, base)
        base *= 2.0 ** (found.bits / found.codes.numel() - bits + ROOM)
    return base


def fitting(
    W_nk: Matrix, scale_n: Tensor, f: core.Factor, step_k: Tensor, base: float, room: float, words: int
) -> tuple[Found, Tensor]:
    """Codes that take nearly `room` bits, and them coded, into `words` words at most. FormatError where no step does that."""
    best: tuple[Found, Tensor] | None = None
    numel = math.prod(W_nk.shape)
    for _ in range(TRIES):
        found = rounded(W_nk, scale_n, f, step_k, base)
        over = (found.bits - room) / numel
        if over <= 0 and (best is None or found.base < best[0].base):
            coded = entropy.encode(found.codes, found.spread_k)
            if len(coded) <= words:
                best = found, coded
            over = max(over, 32 * (len(coded) - words) / numel)
        if best is not None and over >= -4 * ROOM:
            break
        base *= 2.0 ** (over + ROOM)
    if best is None:
        raise FormatError("no step was found under which the codes of a matrix fit its rate; use a higher rate")
    return best


def relative_steps(f: core.Factor) -> Tensor:
    """Steps [K] as they are stored, of 1 / √D where the least is 1, in the order of the inputs."""
    octaves = -0.5 * torch.log2(f.D_k.double())
    octaves -= octaves.min()
    stored = (octaves * entropy.STEPS).round().clamp_(0, 255).to(torch.uint8)
    return torch.empty_like(stored).index_copy_(0, f.order_k, stored)


def first_base(W_nk: Tensor, scale_n: Tensor, step_k: Tensor, wanted: float) -> float:
    """The step at which normal weights of these sizes would take so many bits: log2(σ √(2πe)) - log2(a) each."""
    size_k = (W_nk / scale_n.float()[:, None]).square().mean(0).sqrt().clamp(min=1e-12)
    bits = torch.log2(size_k * math.sqrt(2 * math.pi * math.e)) - step_k.float() / entropy.STEPS
    return float(2.0 ** (bits.mean() - wanted))


def rounded(W_nk: Matrix, scale_n: Tensor, f: core.Factor, step_k: Tensor, base: float) -> Found:
    """GPTQ's feedback on steps of some base."""
    a_k = entropy.stepped(base, step_k)
    codes = torch.empty(tuple(W_nk.shape), dtype=torch.int8, device=W_nk.device)
    for at in parts(W_nk, wholes_at_once(W_nk.shape[1])):
        codes[at] = _codes(W_nk[at], scale_n[at], f, a_k)
    spread_k, bits = entropy.spreads(codes)
    return Found(codes, base, step_k, spread_k, bits)


def _codes(W_nk: Tensor, scale_n: Tensor, f: core.Factor, a_k: Tensor) -> Tensor:
    """Of some outputs, int8 [n, K]."""
    P_kn, a_k = W_nk.T.to(f.L_kk.dtype).index_select(0, f.order_k), a_k[f.order_k]
    Q_kn, D_kn, t_n = torch.empty_like(P_kn), torch.zeros_like(P_kn), scale_n.to(P_kn.dtype)
    if f.lam == 0:  # the identity: nothing makes up for anything
        Q_kn = _Rounds.nearest(P_kn, Grid(a_k[:, None] * t_n))
    else:
        core.feedback(P_kn.clone(), P_kn, f, _Rounds(), [Grid(t_n * a) for a in a_k.tolist()], Q_kn, D_kn, BLOCK)
    codes_kn = (Q_kn / a_k[:, None] / t_n).round_().to(torch.int8)
    return torch.empty_like(codes_kn).index_copy_(0, f.order_k, codes_kn).T


def refitted(W_nk: Matrix, found: Found, scale_n: Tensor, f: core.Factor) -> Fitted:
    """The best scales of outputs."""

    def ones(rows: slice) -> Tensor:
        return entropy.restored(found.codes[rows], found.a_k, torch.ones_like(scale_n[rows]))

    return scales_core.refitted(W_nk, ones, scale_n, f, wholes_at_once(W_nk.shape[1]))
