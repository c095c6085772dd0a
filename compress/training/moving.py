"""An optimizer over all that learns: a rule for every tensor, rates, which blocks learn, and how it is kept on disk."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from compress.training import options as said
from compress.training.choice import Learnt
from compress.training.eight_bits import AdamW8bit
from compress.training.galore import Galore
from compress.training.optimizers import AdamW, Descent, Factored, Kinds, Remembered, Rule, begun
from compress.training.selection import Selection

WHOLE = "selection"  # in place of a tensor's name, for what is remembered of no tensor


def rule_of(by: said.Way, what: Learnt) -> Rule:
    """The rule of one tensor under an optimizer."""
    match by:
        case said.AdamW() | said.Block():
            return AdamW()
        case said.AdamW8bit():
            return AdamW8bit()
        case said.Adafactor():
            return Factored(by.momentum)
        case said.AdaLomo():
            return Factored()
        case said.Galore():
            inside = AdamW8bit() if isinstance(by, said.Galore8bit) else AdamW()
            return Galore(inside, by.rank, by.gap) if what.matrix else inside
        case said.Lomo():
            return Descent()
    raise AssertionError(f"an optimizer without a rule: {by}")


def remembered(by: said.Way, what: Learnt) -> Kinds:
    """What an optimizer keeps of one tensor while that learns."""
    return rule_of(by, what).remembers(what.shape)


class Optimizer:
    """learns: tensors by name, with what is known of each. rates: of each, its share times its size; a step's share of that is
    given by the schedule. state: what is remembered, by tensor and name."""

    def __init__(self, by: said.Way, learns: Mapping[str, nn.Parameter], known: Sequence[Learnt], rates: Sequence[float],
                 seed: int = 0, damage: Mapping[int, float] | None = None):  # fmt: skip
        self.by, self.learns = by, dict(learns)
        self.known = {what.name: what for what in known}
        self.rates = dict(zip(self.learns, rates, strict=True))
        self.rules = {name: rule_of(by, self.known[name]) for name in self.learns}
        self.state: dict[str, Remembered] = {}
        self.selection = None
        if isinstance(by, said.Block):
            blocks = sorted({b for n in self.learns if (b := self.known[n].block) is not None})
            self.selection = Selection(by, blocks, seed, damage)
            self.wake(())

    @property
    def clip(self) -> float | None:
        """The norm that all gradients together are limited to."""
        return self.by.clip if isinstance(self.by, said.Lomo) else None

    def limited(self, norm: float) -> float:
        """What a gradient is multiplied by, whole gradients having this norm: √N min(1, c/‖G‖) / c."""
        assert self.clip is not None
        return math.sqrt(sum(p.numel() for p in self.learns.values())) * min(1.0, self.clip / (norm + 1e-6)) / self.clip

    def move(self, name: str, g: Tensor, share: float) -> None:
        """Move one tensor by its gradient, which is used up."""
        if name not in self.state:
            self.state[name] = begun(self.rules[name], self.learns[name])
        self.rules[name].move(self.learns[name].data, g, self.state[name], self.rates[name] * share)

    # --- which blocks learn ---

    @property
    def awake(self) -> list[str]:
        """Names of what learns now."""
        if self.selection is None:
            return list(self.learns)
        chosen = self.selection.chosen
        return [n for n in self.learns if self.known[n].block in chosen]

    def choose(self, step: int, norms: Mapping[int, float]) -> None:
        """Let other blocks learn, and forget what was remembered of those that no longer do."""
        assert self.selection is not None
        self.selection.choose(step, norms)
        self.wake(self.awake)
        self.state = {name: kept for name, kept in self.state.items() if name in self.awake}

    def wake(self, names: Collection[str]) -> None:
        """Let gradients be made of these tensors, and of no others."""
        for name, p in self.learns.items():
            p.requires_grad_(name in names)

    def forget(self) -> None:
        """Drop what is remembered of gradients."""
        self.state.clear()

    # --- on disk ---

    def tensors(self) -> dict[str, Tensor]:
        """All that is remembered, by "what/of which tensor"."""
        found = {f"{key}/{name}": t for name, kept in self.state.items() for key, t in kept.items()}
        return found | ({} if self.selection is None else {f"{n}/{WHOLE}": t for n, t in self.selection.tensors().items()})

    def take(self, key: str, of: str, tensor: Tensor) -> None:
        """One of these, from disk."""
        if of == WHOLE:
            assert self.selection is not None
            setattr(self.selection, key, tensor.clone())
            self.wake(self.awake)
            return
        self.state.setdefault(of, {})[key] = tensor.clone().to(self.learns[of].device)
