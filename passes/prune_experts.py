"""Which experts of a mixture go: those that put the least into its outputs. What stays is not touched, and nothing makes up for
the rest.

The score of expert e is that of REAP (router-weighted expert activation pruning, arXiv 2510.13999): the mean of g ‖f(x)‖₂ over
the tokens x that were sent to it, with the gate's weight g and the expert's output f(x). One that no token was sent to has 0, and
goes first; of equal ones the lower number goes. By `magnitude` it is the norm of all its matrices.

The smaller mixture cannot be held against the larger one with zeros in it, as neurons and heads are: a token that went to an
expert that is gone now goes to another, and the gate's weight is shared out anew. Nor can lost experts be masked in any router
from outside: softmax, sigmoid and learnt corrections want that at different places. But whatever a router computes, it takes the
best. So an expert that stays and that a token was sent to is one that the token is still sent to, and the weights of such experts
keep their proportions. `alike` asks that of the first batch, on both sides as they really run; a row of the router, or of a
correction, that was cut for another shows there. Where a correction is added to a softmax, which is now taken over fewer, it
holds for most tokens only, and in 16 bits experts may be nearly equal; hence the limit. What the experts are given is compared as
it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.manager import Record
from compress.model.experts import Routing
from compress.model.mixtures import experts_of, left
from compress.passes import obs_core as core
from compress.state import State

APART = 0.05  # of the gate's weight, the mean over tokens: in 16 bits some choose otherwise where experts are nearly equal


@dataclass
class Mixture:
    """The mixture of one block, whose routing is seen before `count` of its experts are kept.

    cuts: as in model/mixtures.py. before, after: the routing of the first batch, by all experts and by those that were kept.
    """

    state: State
    block: int
    count: int
    cuts: Mapping[str, int]
    total: Tensor | None = None
    tokens: Tensor | None = None
    before: Routing | None = None
    after: Routing | None = None
    kept: list[int] = field(default_factory=list)

    def see(self, r: Routing) -> None:
        """Add the experts' outputs for one batch to the sums."""
        weighted = r.by_expert(r.weights.float().abs() * r.norms).sum(0, dtype=torch.float64)
        sent = r.by_expert(torch.ones_like(r.norms)).sum(0, dtype=torch.float64)
        self.total = weighted if self.total is None else self.total + weighted
        self.tokens = sent if self.tokens is None else self.tokens + sent
        self.before = self.before or r

    def see_after(self, r: Routing) -> None:
        self.after = self.after or r

    @property
    def routings(self) -> tuple[Routing, Routing]:
        assert self.before is not None
        assert self.after is not None
        return self.before, self.after

    def scores(self, by_weights: bool) -> Tensor:
        """One for each expert [experts], fp64; the lowest go."""
        if by_weights:
            experts = experts_of(self.state)[self.block]
            squares = [sum(float(self.state.reference(s).double().square().sum()) for s in mine) for mine in experts]
            return torch.tensor(squares, dtype=torch.float64).sqrt()
        assert self.total is not None
        assert self.tokens is not None
        return self.total / self.tokens.clamp(min=1)

    def cut(self, by_weights: bool) -> tuple[dict[str, Tensor], Record]:
        """The tensors of those that stay, by the names that they then have, and what there is to say."""
        start, scores = time.perf_counter(), self.scores(by_weights)
        gone = core.ranked(scores)[: len(scores) - self.count]
        self.kept = sorted(set(range(len(scores))) - set(gone.tolist()))
        record = {"site": f"layers.{self.block}.experts", "kind": "experts", "kept": self.count, "units": len(scores),
                  "experts": self.kept, "scores": scores.tolist(), "notes": self._notes(gone)}  # fmt: skip
        tensors = left(self.state, self.block, self.cuts, self.kept)
        return tensors, {**record, "seconds": time.perf_counter() - start}

    def _notes(self, gone: Tensor) -> list[str]:
        if self.total is None or self.tokens is None:
            return [f"{self.count} of {self.count + len(gone)} experts"]
        share, unseen = float(self.total[gone].sum() / self.total.sum().clamp(min=1e-30)), int((self.tokens == 0).sum())
        notes = [f"{self.count} of {len(self.total)} experts; the others gave {share:.1%} of what all put out"]
        return [*notes, f"{unseen} of them saw no token of the calibration text"] if unseen else notes


def alike(path: str, family: str, larger: Routing, smaller: Routing, kept: Sequence[int]) -> None:
    """ModelError where the smaller mixture sends tokens elsewhere than the larger one did among the experts that are left."""
    ours = larger.by_expert(larger.weights)[:, list(kept)]
    theirs = smaller.by_expert(smaller.weights) * (ours != 0)
    shares = [x / x.sum(1, keepdim=True).clamp(min=1e-30) for x in (ours, theirs)]
    reached = ours.sum(1) != 0
    off = float((shares[0] - shares[1])[reached].abs().sum(1).mean() / 2) if bool(reached.any()) else 0.0
    if not off <= APART:
        raise ModelError(f"{path}: without some of its experts it sends tokens elsewhere among the others, by {off:.2%}; "
                         f"'prune' does not know '{family}': leave out experts")  # fmt: skip
