"""The loop: steps of an optimizer on a student's distance to its teacher, judged on held-out windows, from where it stopped.

A step takes `batch` windows, a few at a time (`MICRO` tokens), adds up their gradients, and moves what learns; what becomes of
gradients, and whether there are any, is said elsewhere (gradients.py, zeroth.py). At every check the held-out windows are
judged and everything that the next step depends on is kept on disk: what learns, what is remembered of it, and the curve so
far. The order of windows is drawn from the seed and the epoch alone. So a run that was killed comes to the same bytes as one
that was not. A rate that was too high is known by its first checks: as long as none is better than the start, the student goes
back there, forgets what was remembered of its gradients, and goes on with a third of the rate. Small damage wants a small
rate, and nobody knows beforehand how small. Where only some tokens are learnt from (`Tokens.learnt`), a sum over a step's
predictions is divided by how many of them are of such tokens, all micro-batches together, and windows without any change
nothing. In the end the student is what it was at its best check; the start counts as one, so training never makes a model
worse on what was held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import DataError, ModelError
from compress.model.data import Tokens
from compress.model.lockstep import Batch
from compress.model.seeds import seeded
from compress.training.gradients import Slopes
from compress.training.loss import DIVERGENCES, Known, Rows, behind
from compress.training.moving import WHOLE, Optimizer
from compress.training.student import Student
from compress.training.teacher import Look
from compress.training.windows import MICRO

LEARNS = "learns/"  # before the name of what learns, in a checkpoint
EVEN_WORSE = 5  # checks in a row without a better one end the training
SLOWER = 1 / 3  # of the rate, behind a check that was worse than the start


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` windows; the rate, relative to its base, rises over `warmup` steps to `rate` and falls to a tenth of it
    along a cosine. checks: how often the held-out windows are judged."""

    steps: int
    batch: int
    rate: float
    warmup: int
    checks: int

    def at(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)

    def judged(self, step: int) -> bool:
        """Whether the student is judged when so many steps are done."""
        return step == self.steps or step * self.checks // self.steps > (step - 1) * self.checks // self.steps


@dataclass(frozen=True)
class Counted:
    """How many predictions a loss is the mean of. known: those among them of a token that the window itself holds."""

    all: int
    known: int

    def share(self, part: str) -> float:
        """By what a sum over all falls short of one over those that a part counts: nothing came behind the last token."""
        return self.all / max(1, self.known) if part == "ce" else 1.0

    def of(self, part: str) -> int:
        return self.known if part == "ce" else self.all


def counted(tokens: Tokens, numbers: Sequence[int]) -> Counted:
    """Of some windows."""
    windows, length = len(numbers), tokens.ids.shape[1]
    if tokens.learnt is None:
        return Counted(windows * length, windows * (length - 1))
    learnt = tokens.learnt[list(numbers)]
    return Counted(int(learnt.sum()), int(learnt[:, :-1].sum()))


def check_learnt(tokens: Tokens, learning: Sequence[int], held: Sequence[int]) -> None:
    """DataError where windows to learn from, or those to judge on, hold no token that is learnt from."""
    for numbers, what in ((learning, "to learn from"), (held, "held out to judge on")):
        if not counted(tokens, numbers).known:
            raise DataError(f"{tokens.place}: the {len(numbers)} windows {what} hold no token of an answer; give more or longer "
                            "windows")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What is known when `step` steps are done. loss: of training, the mean since the last point; None where nothing was learnt.
    held: what the student is judged by, on the held-out windows, nats a token."""

    step: int
    tokens: int
    loss: float | None
    held: float


def best_of(curve: Sequence[Point]) -> Point:
    """The point that is kept: of equals the first."""
    return min(curve, key=lambda p: (p.held, p.step))


class Asked(Protocol):
    """A teacher, see teacher.py."""

    def look(self, numbers: Sequence[int]) -> Any: ...


class Kept(Protocol):
    """Where checkpoints lie, see checkpoints.py."""

    def notes(self) -> dict[str, Any] | None: ...
    def keep(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None: ...
    def latest(self) -> Iterator[tuple[str, Tensor]]: ...
    def best(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass
class Training:
    """learning, held: numbers of windows of `tokens`, which the teacher knows by them."""

    student: Student
    teacher: Asked
    tokens: Tokens
    learning: Sequence[int]
    held: Sequence[int]
    weights: Mapping[str, float]
    schedule: Schedule
    optimizer: Optimizer
    slopes: Slopes
    seed: int
    progress: Callable[[float, float, str], None]
    curve: list[Point] = field(default_factory=list)
    lost: int | None = None  # the step after which the loss was no number any more, which ended the training
    slowed: int = 0  # how often the rate was lowered, since nothing was better than the start

    def run(self, kept: Kept) -> list[Point]:
        """Train; the student is then what it was at its best check."""
        start, losses = self._restore(kept), list[float]()
        if not self.curve and not self._note(kept, 0, None):
            raise ModelError(
                f"before anything is learnt the {self.judged_by} of held-out text is no number; the model is damaged"
            )
        for step in range(start, self.schedule.steps):
            if self.finished:
                break
            self.progress(step, self.schedule.steps, f"held out, {self.judged_by} {self.curve[-1].held:.4g}")
            loss = self.step(step)
            losses += [] if loss is None else [loss]
            if not all(map(math.isfinite, losses[-1:])) or (
                self.schedule.judged(step + 1) and not self._note(kept, step + 1, sum(losses) / len(losses) if losses else None)
            ):
                self.lost = step + 1
                break
            if self.schedule.judged(step + 1):
                losses.clear()
        self._take(kept.best(), remembered=False)
        return self.curve

    def _note(self, kept: Kept, step: int, loss: float | None) -> bool:
        """Judge, and keep it; False where what it comes to is no number, of which nothing is kept."""
        held = self.judge()
        if math.isfinite(held):
            self.curve.append(Point(step, step * self.per_step, loss, held))
            worse = not self.best.step and held > self.best.held  # one that is the same has hardly moved, and may yet
            if worse and not self.finished and step < self.schedule.steps:
                self._start_over(kept)
            kept.keep(self._notes(), self._tensors())
        return math.isfinite(held)

    def _start_over(self, kept: Kept) -> None:
        """Go on from the start, which is the best so far, at a lower rate. Which blocks learn is no matter of a rate, and the
        start had not chosen any."""
        self.slowed += 1
        self.optimizer.forget()
        self._take(((name, t) for name, t in kept.best() if not name.endswith(f"/{WHOLE}")), remembered=True)

    @property
    def per_step(self) -> int:
        return self.schedule.batch * self.tokens.ids.shape[1]

    @property
    def best(self) -> Point:
        return best_of(self.curve)

    @property
    def finished(self) -> bool:
        """Whether the last checks were all worse than one before them."""
        return len(self.curve) - 1 - self.curve.index(self.best) >= EVEN_WORSE

    # --- a step ---

    def step(self, number: int) -> float | None:
        """The loss of one step, a token that is learnt from; None where its windows hold none, and nothing moves."""
        windows = self._windows(number)
        whole, few = counted(self.tokens, windows), list(self._few(windows))
        if not few:
            return None

        def through(backward: bool) -> float:
            self.student.begin(number)
            return sum(self._learn(numbers, whole, backward) for numbers in few)

        return self.slopes.step(
            number, self.schedule.at(number) * SLOWER**self.slowed, partial(through, True), partial(through, False)
        )

    def _windows(self, number: int) -> list[int]:
        """The windows of a step: each epoch has an order of its own."""
        count, found, first = len(self.learning), list[int](), number * self.schedule.batch
        last = first + self.schedule.batch
        for epoch in range(first // count, (last - 1) // count + 1):
            order = torch.randperm(count, generator=seeded(self.seed, f"epoch {epoch}")).tolist()
            found += [self.learning[i] for i in order[max(0, first - epoch * count) : last - epoch * count]]
        return found

    def _few(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Micro-batches, no larger than a step, without those that no part of the loss counts a token of."""
        size = min(self.schedule.batch, max(1, MICRO // self.tokens.ids.shape[1]))
        for start in range(0, len(numbers), size):
            found = counted(self.tokens, numbers[start : start + size])
            if any(found.of(part) for part in self.weights):
                yield numbers[start : start + size]

    def _learn(self, numbers: Sequence[int], whole: Counted, backward: bool) -> float:
        """Some windows' share of the loss of a step, which counts so many tokens; `backward` adds its gradients."""
        ids, learnt, share = self._ids(numbers), self._learnt(numbers), 1 / whole.all
        weights = {n: w * whole.share(n) for n, w in self.weights.items() if n != "hidden_cosine"}
        outputs: list[Tensor] = []
        cosine = self.weights.get("hidden_cosine", 0.0)
        with self.teacher.look(numbers) as look, torch.set_grad_enabled(backward):  # a teacher that is streamed has turned it off
            batch = self.student.forward(ids, (lambda _, h: outputs.append(h)) if cosine else None)
            sums, slope = in_parts(self.student, batch.hidden, ids, look, weights, share, backward, learnt)
            self.slopes.behind()
            ends = [(batch.hidden, slope.reshape(batch.hidden.shape).to(batch.hidden.dtype) if slope is not None else None)]
            loss = sum(weights[n] * s * share for n, s in sums.items())
            if cosine:
                apart = cosine * share * apart_in_angle(outputs, look.hidden, learnt)
                ends.append((apart, None))
                loss += float(apart.detach())
            ends = [end for end in ends if end[0].requires_grad] if backward else []
            if ends:
                torch.autograd.backward([root for root, _ in ends], [slope for _, slope in ends])
        return float(loss)

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        return self.student.state.ids(self.tokens.ids[list(numbers)]).to(self.student.device)

    def _learnt(self, numbers: Sequence[int]) -> Tensor | None:
        return None if self.tokens.learnt is None else self.tokens.learnt[list(numbers)]

    @property
    def judged_by(self) -> str:
        """KL from the teacher; where nothing is learnt from one, the cross-entropy of the text."""
        return "kl" if self.weights.keys() & DIVERGENCES.keys() else "ce"

    def judge(self) -> float:
        """What the student comes to on the held-out windows, nats a token."""
        by, total, whole = self.judged_by, 0.0, counted(self.tokens, self.held)
        with torch.no_grad():
            for numbers in self._few(self.held):
                ids = self._ids(numbers)
                with self.teacher.look(numbers) as look:
                    batch = self.student.forward(ids)
                    sums, _ = in_parts(self.student, batch.hidden, ids, look, {by: 1.0}, 1.0, False, self._learnt(numbers))
                    total += sums[by]
        return total * whole.share(by) / whole.all

    # --- where it stopped ---

    def _notes(self) -> dict[str, Any]:
        curve = [[p.step, p.tokens, p.loss, p.held] for p in self.curve]
        return {"curve": curve, "best": self.best.step, "slowed": self.slowed}

    def _tensors(self) -> dict[str, Tensor]:
        """What learns, and what is remembered of it."""
        found = {f"{LEARNS}{name}": p.detach() for name, p in self.student.learns.items()}
        return found | self.optimizer.tensors() | self.slopes.tensors() | self.student.saving.tensors()

    def _restore(self, kept: Kept) -> int:
        """How many steps are done already."""
        notes = kept.notes()
        if notes is None:
            return 0
        self.curve, self.slowed = [Point(*p) for p in notes["curve"]], notes["slowed"]
        self._take(kept.latest(), remembered=True)
        return self.curve[-1].step

    def _take(self, found: Iterable[tuple[str, Tensor]], remembered: bool) -> None:
        """What learns, and all that is remembered where that is asked for, from a checkpoint."""
        for name, tensor in found:
            key, _, of = name.partition("/")
            if name.startswith(LEARNS):
                self.student.learns[of].data.copy_(tensor)
            elif remembered:
                match key:
                    case "sketch":
                        self.student.saving.take(of, tensor)
                    case "direction":
                        self.slopes.take(tensor)
                    case _:
                        self.optimizer.take(key, of, tensor)


def in_parts(
    student: Student, hidden: Tensor, ids: Tensor, look: Look, weights: Mapping[str, float], share: float, backward: bool,
    learnt: Tensor | None = None,
) -> tuple[Mapping[str, float], Tensor | None]:  # fmt: skip
    """The loss behind the last block [b, t, d], summed over tokens by its parts, and `share` of its slope there. learnt [b, t]:
    whose predictions count, None being all; no others go through the head."""
    flat, tokens = hidden.detach().reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100  # nothing came behind the last token; what torch leaves out
    targets, known, chosen = targets.reshape(-1), look.known, None
    if learnt is not None:
        chosen = learnt.reshape(-1).nonzero()[:, 0]
        tokens, targets = tokens[chosen], targets[chosen]
        known = chosen_of(look.known, chosen)
    with student.behind(student.state), student.holding_head():

        def head(h: Tensor, rows: slice) -> Tensor:  # windows of one token: of several windows no row has a position
            return student.head(Batch(tokens[rows, None], h[:, None], []))[:, 0]

        found = behind(head, flat if chosen is None else flat[chosen], known, targets, weights,
                       student.state.graph["embed"].shape[0], backward, share)  # fmt: skip
    if chosen is None or found.slope is None:
        return found.sums, found.slope
    slope = torch.zeros_like(flat, dtype=found.slope.dtype)
    slope[chosen] = found.slope
    return found.sums, slope


def chosen_of(known: Callable[[Rows], Known] | None, chosen: Tensor) -> Callable[[Rows], Known] | None:
    """What a teacher knows of some rows, as if there were no others."""
    return None if known is None else lambda rows: known(chosen[rows])


def apart_in_angle(outputs: Sequence[Tensor], theirs: Sequence[Tensor], learnt: Tensor | None = None) -> Tensor:
    """The sum over tokens, or those in `learnt` [b, t], and mean over blocks, of 1 - cos between what the blocks of two models
    put out [b, t, d]. Where one has fewer blocks, only what the last puts out is compared."""
    pairs = list(zip(outputs, theirs, strict=True)) if len(outputs) == len(theirs) else [(outputs[-1], theirs[-1])]
    apart = [1 - torch.cosine_similarity(ours.float(), other.float(), -1) for ours, other in pairs]
    return torch.stack([a.sum() if learnt is None else a[learnt.to(a.device)].sum() for a in apart]).mean()
