"""Trellis codes: GPTQ's feedback with a search where it rounds, one ring of outputs at a time.

The loss of a matrix is Σ D_i η_i² over its inputs (gptq_core.py), and what η_i leaves is what the quantizer of N numbers leaves:
at 2 bits .119 of their variance where each goes to the nearest level, .073 where a path through a trellis of 4096 states does.
A ring lies in the outputs of one input, so nothing else of GPTQ changes: an input's targets are coded, and the inputs behind it
make up for that.

A trellis knows one distribution, so what it codes must have that. The rows are divided by their root mean square. What size the
targets of an input have then is seen when its turn comes, and makes the step of that input: feedback widens them, and inputs
differ. No scale is searched for. Where inputs are rotated this takes 1 % off the error (ref-7m at 2 bits, against the best scale
for the whole matrix); where they are not, 6 % at 2 bits and 9 at 3, a quarter in down. The path being frozen, the scale of each
output is fitted in closed form.

The alternatives not taken: one scale for a matrix, by a search over some rings; a sweep of coordinate descent behind (it takes
half a per cent off the error for twice the time); weighing the outputs of a ring by their scales. Limits: no output is
compared with what rounding would have made of it, since that is a search too. Layer errors do not tell what a rotation is worth,
see docs/formats.md; nothing is chosen by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.formats import trellis, viterbi
from compress.formats.entropy import STEPS
from compress.formats.grid import Grid, refuse_nan, round_scale
from compress.formats.trellis import RING, Tcq
from compress.formats.viterbi import SEEN, Trellis
from compress.passes import gptq_core as core
from compress.passes import scales_core
from compress.passes.rows import Matrix, parts, wholes_at_once
from compress.passes.scales_core import Fitted

BLOCK = 32
# By bits of a state, and by half bits a weight: what is left of a normal source, as a share of its variance, at the best scale.
DISTORTION = {
    12: dict(enumerate((0.2831, 0.1445, 0.0726, 0.0369, 0.0189, 0.00969, 0.00497, 0.00262, 0.00136), 2)),
    10: dict(enumerate((0.2884, 0.1498, 0.0774, 0.0402, 0.0204, 0.01057, 0.00544, 0.00299, 0.00166), 2)),
    8: dict(enumerate((0.3072, 0.1623, 0.0840, 0.0444, 0.0232, 0.01261, 0.00691), 2)),
}


@dataclass(frozen=True)
class Coded:
    """Packed tensors, and what each output lost, as `gptq_core.Solved` has it; off_n: the squared change of its weights."""

    tensors: dict[str, Tensor]
    loss_n: Tensor
    energy_n: Tensor
    off_n: Tensor


@torch.no_grad()
def solve(W_nk: Matrix, f: core.Factor, fmt: Tcq, scale_dtype: torch.dtype) -> Coded:
    """W [N, K] in the format, under the Hessian that was factored; of a large one no more is held at once than some outputs and
    what they became. FormatError where W is not finite."""
    fmt.check(tuple(W_nk.shape))
    search = _Search(fmt, W_nk.shape[1], W_nk.device, torch.get_num_threads())
    made = [_part(W_nk[at], search, f, scale_dtype) for at in parts(W_nk, wholes_at_once(W_nk.shape[1]))]
    tensors, fitted = [packed for packed, _ in made], [one for _, one in made]
    whole = {
        "weight_trellis": torch.cat([packed["weight_trellis"] for packed in tensors], 1),
        "weight_step": tensors[0]["weight_step"],
        "weight_scale": torch.cat([packed["weight_scale"] for packed in tensors]),
        "weight_shape": torch.tensor(tuple(W_nk.shape), dtype=torch.int64),
    }
    return Coded(whole, *(torch.cat(x) for x in zip(*((one.loss_n, one.energy_n, one.off_n) for one in fitted), strict=True)))


def _part(W_nk: Tensor, search: _Search, f: core.Factor, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], Fitted]:
    """Some outputs, packed, with what was lost."""
    refuse_nan(W_nk)
    scale_n = round_scale(W_nk.square().mean(1).sqrt().clamp_(min=torch.finfo(torch.float32).tiny), scale_dtype)
    states_kn = search.through(W_nk, scale_n, f)
    step_k = torch.empty_like(search.step_k).index_copy_(0, f.order_k.cpu(), search.step_k)
    a_k = trellis.steps(step_k).to(W_nk.device)

    def ones(rows: slice) -> Tensor:
        return (search.code[states_kn[:, rows].long()] * a_k[:, None]).T

    fitted = scales_core.refitted(W_nk, ones, scale_n, f, len(W_nk))
    return search.fmt.pack(states_kn, step_k, fitted.scale_n), fitted


def takes(shape: tuple[int, int], fmt: Tcq) -> tuple[float, int]:
    """Seconds of searching a matrix [N, K], and bytes that are held from then on, for estimates: every ring once around, and on
    both sides of its seam; those of one input at the same time."""
    n, k = shape
    threads = min(torch.get_num_threads(), -(-n // RING))
    return viterbi.takes(n * k * (1 + 2 * SEEN / RING), 1 << fmt.size, threads)


def searching(shapes: Sequence[tuple[int, int]], formats: Iterable[object]) -> float:
    """Seconds of searching all these matrices in those of the formats that are trellis codes."""
    codes = [fmt for fmt in formats if isinstance(fmt, Tcq)]
    return sum(takes(shape, fmt)[0] for fmt in codes for shape in shapes)


def gain(fmt: Tcq) -> float:
    """How much larger than its targets' root mean square a code is best: measured on a normal source (docs/formats.md)."""
    return 0.92 + 0.03 * fmt.halves


class _Search:
    """What `gptq_core` rounds with: targets of one input after the other, whose states and steps it keeps.

    step_k: of the inputs in the order in which they come, as they are stored. The first outputs that go through choose them.
    """

    def __init__(self, fmt: Tcq, inputs: int, device: torch.device, threads: int):
        self.fmt, self.code = fmt, trellis.values(fmt.size, device)
        self.trellis = Trellis(self.code, fmt.bits[::-1], threads)  # the last output of a ring, which is odd, comes first
        self.size = gain(fmt) / float(self.code.std())  # of a step for targets of size 1
        self.steps = trellis.steps(torch.arange(256, dtype=torch.uint8)).tolist()
        self.step_k = torch.empty(inputs, dtype=torch.uint8)
        self.chosen = False

    def through(self, W_nk: Tensor, scale_n: Tensor, f: core.Factor) -> Tensor:
        """The states [K, n], int16, of some outputs, inputs as they lie."""
        P_kn = W_nk.T.to(f.L_kk.dtype).index_select(0, f.order_k)
        self.states_kn, self.turn = P_kn.new_empty(P_kn.shape, dtype=torch.int16), 0
        grid, Q_kn = Grid(scale_n.to(P_kn.dtype)), torch.empty_like(P_kn)
        if f.lam == 0:  # the identity: nothing makes up for anything
            for P_n, Q_n in zip(P_kn, Q_kn, strict=True):
                self.nearest(P_n, grid, Q_n)
        else:
            core.feedback(P_kn.clone(), P_kn, f, self, [grid] * len(P_kn), Q_kn, torch.zeros_like(P_kn), BLOCK)
        self.chosen = True
        return torch.empty_like(self.states_kn).index_copy_(0, f.order_k, self.states_kn)

    def nearest(self, w: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
        x_n = w / grid.scale
        if not self.chosen:
            self.step_k[self.turn] = self._step(x_n)
        a = self.steps[int(self.step_k[self.turn])]
        states = self._states(x_n.div_(a))
        self.states_kn[self.turn] = states
        self.turn += 1
        return torch.mul(self.code[states.long()].mul_(a), grid.scale, out=out)

    def _step(self, x_n: Tensor) -> int:
        """The step, as it is stored, at which the code has the size of these targets."""
        wanted = max(self.size * math.sqrt(float(x_n.square().mean())), trellis.BASE)
        return min(255, round(STEPS * math.log2(wanted / trellis.BASE)))

    def _states(self, x_n: Tensor) -> Tensor:
        """The states, int32, of the outputs of one input. A path goes from the last output of a ring to the first, so that the
        state of an output begins with its own bits."""
        whole = len(x_n) // RING * RING
        rings = [part for part in (x_n[:whole].view(-1, RING), x_n[whole:][None]) if part.numel()]
        return torch.cat([self.trellis.search(r.flip(1)).flip(1).view(-1) for r in rings])
