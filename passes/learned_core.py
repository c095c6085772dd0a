"""Learned rounding and clipping: the levels that the weights of a block go to, and their scales, by descent on what the block
puts out. Pure functions on tensors; learned.py runs the block.

The problem. GPTQ rounds one matrix after another, each for its own outputs. What counts is what the block puts out behind all of
them: behind the softmax, the gate and the norms, where errors of one matrix undo those of another or do nothing at all. With
Y_td what the unquantized model's block puts out and f the block with quantized weights Q, on the inputs of the quantized model,

    loss = mean over tokens t of |f(X̃; Q)_t - Y_t|² / |Y_t|²

The way. Each weight has a latent z, in the units of the weight, and each group a factor c on its scale s. The block is run with
q = the level nearest to z on the grid of scale c s, and gradients go through the rounding as if it were not there
(straight-through, Bengio et al., arXiv 1308.3432):

    ∂loss/∂z = ∂loss/∂q,    ∂loss/∂c = Σ over the group of ∂loss/∂q · q / c

since every level of every format is a multiple of its scale. So weights are moved to a neighbouring level, and groups are clipped
or widened. It is the idea of AutoRound (SignRound, arXiv 2309.05516, equations 3 to 5), with other choices, each by the
divergence from the unquantized model on held-out text:

- The start is GPTQ's solution, codes and scales, not rounding. z starts from the code toward the weight that GPTQ aimed at, no
  farther than half-way to where the next code begins (`INSIDE`): what was nearly undecided moves first, but not by noise.
- Steps are Adam's (arXiv 1412.6980) with one second moment for a group (as Adam-mini's, arXiv 2406.16793), where AutoRound takes
  the sign alone: a weight that hardly matters then hardly moves. The first moment begins at nothing and is not corrected for it:
  the first gradients are mostly noise, and what a rounding of GPTQ's balances is lost when many codes move by noise at once.
- Weights of inputs that are louder than the mean move in proportion less, for the same reason.
- Rates fall linearly to zero. A weight goes about `REACH` levels of its grid on the whole, a scale `STRETCH` of itself.
- Which iterate stays is judged on windows that no gradient saw (GPTQ's Hessians did): the start, where none is better.

The alternative that was not taken: a soft rounding that hardens as it goes (AdaRound, arXiv 2004.10568, equations 21 to 24). It
needs a regularizer and a schedule for it, many times the steps, and cannot move a weight by more than one level.

Limits. Codes are moved one by one, each by its own slope: where the inputs of a matrix nearly depend on each other (the first
block of some models) that spoils GPTQ's balance faster than it gains, and the start stays. What layers behind the block make of
its error is not known here. What is learned from few windows is theirs alone, and the judgement then throws it away. Tables of
levels stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.grid import Grid, Quantized, in_groups, restore

REACH = 1.0  # levels that a weight can be moved by, on the whole
STRETCH = 0.05  # of a scale
INSIDE = 0.25  # of the distance between two levels: as far as a latent starts from its code
FORGET, FORGET_SQUARES = 0.9, 0.95  # of the moments at each step


def share(step: int, steps: int) -> float:
    """The share of the whole way that one step may go: falling linearly, 1 in sum."""
    return 2 * (steps - step) / (steps * (steps + 1))


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """The loss of what a block puts out [..., t, d]: the squared error of a token over its squared length, the mean of them."""
    wanted = wanted.float()
    square = wanted.square().sum(-1).clamp(min=1e-20)
    return ((found.float() - wanted).square().sum(-1) / square).mean()


class Moments:
    """Adam's running means of gradients and of their squares, the latter averaged over the last dimension or not."""

    def __init__(self, like: Tensor, shared: bool):
        self.shared, self.count = shared, 0
        self.first = torch.zeros_like(like)
        self.second = torch.zeros_like(like[..., :1] if shared else like)

    def direction(self, slope: Tensor) -> Tensor:
        """Where to go against, after this gradient too: about 1 long where gradients agree."""
        self.count += 1
        square = slope.square()
        self.first.lerp_(slope, 1 - FORGET)
        self.second.lerp_(square.mean(-1, keepdim=True) if self.shared else square, 1 - FORGET_SQUARES)
        size = (self.second / (1 - FORGET_SQUARES**self.count)).sqrt_().add_(1e-30)
        return self.first / size


class Held:
    """One matrix whose codes [N, K] stay, and of whose grid [N, G] the scales are learned."""

    def __init__(self, codes_nk: Tensor, grid: Grid, fmt: Quantized):
        self.fmt, self._codes, self._start = fmt, codes_nk, grid
        self._factor = torch.ones_like(grid.scale, dtype=torch.float32)
        self._moments = Moments(self._factor, shared=False)

    @property
    def grid(self) -> Grid:
        """As it will be stored."""
        return self.fmt.rescale(self._start, self._factor)

    def rounded(self) -> Tensor:
        """The weights [N, K] as they are now, fp32."""
        return restore(self._codes, self.grid, self.fmt)

    def codes(self) -> Tensor:
        return self._codes

    def step(self, slope_nk: Tensor, share: float) -> None:
        """Move each scale by about `share` of itself against the gradient of the loss at `rounded`."""
        width = self.fmt.width(slope_nk.shape[1])
        turn = self._moments.direction(in_groups(slope_nk.float() * self.rounded(), width, 1).sum(-1))
        self._factor.add_(turn, alpha=-share)


class Latent:
    """One matrix while it is learned, W [N, K] on a grid [N, G] of a format."""

    def __init__(self, codes_nk: Tensor, grid: Grid, aim_nk: Tensor, fmt: Quantized, energy_k: Tensor | None = None):
        """`codes_nk` and `grid` are the start; `aim_nk` are the weights that it stands for; `energy_k` is how much the inputs
        count, their mean squares."""
        self.fmt, self.inputs, self._start = fmt, codes_nk.shape[1], grid
        Q_nGg = self._grouped(restore(codes_nk, grid, fmt))
        table = grid.table
        span = 1.0 if table is None else float(table[-1] - table[0]) / (fmt.levels - 1)
        self._gap = grid.scale.float().abs()[..., None] * span
        off = (self._grouped(aim_nk.float()) - Q_nGg) / self._gap.clamp(min=1e-30)
        Z_nGg = Q_nGg + off.clamp_(-INSIDE, INSIDE) * self._gap
        wide = grid.map(lambda t: t[..., None])
        same = fmt.encode(Z_nGg, wide) == self._grouped(codes_nk)
        self._latent = torch.where(same, Z_nGg, Q_nGg)
        self._factor = torch.ones_like(self._gap[..., 0])
        self._pace = self._gap * REACH
        if energy_k is not None:
            self._pace = self._pace * self._grouped((energy_k.mean() / energy_k.clamp(min=1e-30)).clamp(max=1.0)[None])
        self._moments = Moments(self._latent, shared=True), Moments(self._factor, shared=False)

    def _grouped(self, x_nk: Tensor) -> Tensor:
        return in_groups(x_nk, self.fmt.width(self.inputs), 1)

    @property
    def grid(self) -> Grid:
        """The grid [N, G] as it is now, as it will be stored."""
        return self.fmt.rescale(self._start, self._factor) if self.fmt.rescalable else self._start

    def rounded(self) -> Tensor:
        """The weights [N, K] as they are now, fp32."""
        return self._levels().flatten(1)[:, : self.inputs]

    def _levels(self) -> Tensor:
        return self.fmt.nearest(self._latent, self.grid.map(lambda t: t[..., None]))

    def codes(self) -> Tensor:
        """The codes [N, K] of `rounded`, on `grid`."""
        found = self.fmt.encode(self._latent, self.grid.map(lambda t: t[..., None]))
        return found.flatten(1)[:, : self.inputs].contiguous()

    def step(self, slope_nk: Tensor, share: float) -> None:
        """Go `share` of the whole way against the gradient of the loss at `rounded`."""
        slope = self._grouped(slope_nk.float())
        by_weight, by_scale = self._moments
        if self.fmt.rescalable:
            turn = by_scale.direction((slope * self._levels()).sum(-1))
            self._factor.add_(turn, alpha=-STRETCH * share)
        self._latent.addcmul_(by_weight.direction(slope), self._pace, value=-share)
