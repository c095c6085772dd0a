"""Passes and the loop that runs them.

A pass is a frozen pydantic model: its fields are its options, so the class is the schema, the documentation and the check.
It declares what it needs, gives and breaks, and what it writes. The loop is `run`: for each pass, take the step from the run
folder if it is there under the same key, else run it; then compare what it promised with what it did.
"""

from __future__ import annotations

import ctypes
import json
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from compress.errors import ContractError, OrderError
from compress.formats import Format, Packed
from compress.model.data import Tokens
from compress.model.lockstep import Batch
from compress.model.seeds import seeded
from compress.model.stream import Stream
from compress.state import Aspect, Fact, State
from compress.state.graph import Site
from compress.state.plan import BitPlan
from compress.state.state import Part, broken_promises, changed

LARGE = 1 << 26  # bytes of a model whose memory is worth the time that giving it back takes
Record = dict[str, Any]  # what a pass tells about one site: JSON values


class Store(Protocol):
    """Where a running pass keeps finished parts and what it noted of them; the run folder implements it.

    `commit`: codes by site, dense tensors by their names in the checkpoint, what an engine must know besides; on disk whole or
    not at all. A part that is committed again is replaced. `committed`: a finished part, or None.
    `analysis`: the store of an analysis, named and keyed by all that it depends on besides the state, the calibration tokens
    and the seed: every step that asks for the same finds what was measured before. `of_source`: the same of the model before any
    pass, of which steps behind different ones ask the same.
    """

    @property
    def records(self) -> list[Record]: ...
    def committed(self, part: str) -> Part | None: ...
    def commit(
        self,
        part: str,
        codes: Mapping[str, Packed] = ...,
        dense: Mapping[str, torch.Tensor] = ...,
        records: Sequence[Record] = ...,
        serving: Mapping[str, Any] = ...,
    ) -> Part: ...
    def analysis(self, name: str, of: object) -> Store: ...
    def of_source(self, name: str, of: object) -> Store: ...
    @property
    def partial(self) -> Path: ...
    def drop(self) -> None: ...


@dataclass(frozen=True)
class Context:
    """All that a pass may use besides the state and its options.

    calibration: the recipe's calibration tokens, or None; in the source's ids, see `State.ids`. device: where the block in hand
    lies. store: finished parts of this step. say: a site's record, shown to the user. progress: called with (done, total, what)
    as work proceeds. following: the passes that come after this one. source: the model before any pass. training: what a pass
    that `trains` learns from.
    """

    seed: int
    calibration: Tokens | None
    device: str
    store: Store
    say: Callable[[Record], None]
    progress: Callable[[float, float, str], None]
    following: tuple[Pass, ...] = ()
    source: State | None = None
    training: Tokens | None = None

    def generator(self, site: Site) -> torch.Generator:
        """Randomness for one site: the same for the same seed and name, whatever ran before."""
        return seeded(self.seed, site.name)

    def part(self, start: float, end: float) -> Context:
        """The same for a part of the work, which takes the whole from one share to another; progress is told in per cent."""

        def progress(done: float, total: float, what: str) -> None:
            self.progress(100 * (start + (end - start) * done / total), 100, what)

        return replace(self, progress=progress)

    def stream(self, state: State) -> tuple[Stream, list[Batch]]:
        """The model and the calibration batches, embedded and in front of the first block."""
        assert self.calibration is not None, "a pass that streams checks for calibration data in `check`"
        stream = Stream(state, self.device)
        return stream, stream.start(state, [state.ids(batch) for batch in self.calibration.batches()])


@dataclass(frozen=True)
class Cost:
    """What a pass is expected to take.

    model_flops: operations of matrix products in the model's dtype. exact_flops: the same in fp32. numbers: what matrices read
    and write in a forward pass, with which all else in it goes. weights: matrix entries that are searched and rounded. steps:
    inputs of a matrix that are rounded one after the other. logits: numbers that softmaxes are taken of. bytes: of files that are
    written and compared. seconds: of what depends on none of these. peak_bytes: of memory, beyond an idle process.
    """

    model_flops: float = 0.0
    exact_flops: float = 0.0
    weights: int = 0
    peak_bytes: int = 0
    logits: float = 0.0
    bytes: int = 0
    numbers: float = 0.0
    seconds: float = 0.0
    steps: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """The one after the other."""
        found = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**found | {"peak_bytes": max(self.peak_bytes, other.peak_bytes)})


class Pass(BaseModel, ABC):
    """One compression step. Subclasses are listed in `passes.PASSES`; docs/writing-a-pass.md walks through one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the same options give other results
    needs: ClassVar[Fact] = Fact.NONE
    instead: ClassVar[Fact] = Fact.NONE  # where one of these holds, weights need not be DENSE
    gives: ClassVar[Fact] = Fact.NONE
    breaks: ClassVar[Fact] = Fact.NONE
    writes: ClassVar[Aspect] = Aspect.NONE
    decides: ClassVar[bool] = False  # `run` finds by measuring what `foresee` can only guess, so `plan` runs it too
    trains: ClassVar[bool] = False  # it reads data.training; data.calibration where there is none
    looks_ahead: ClassVar[bool] = False  # the result depends on the passes behind it, whose texts enter the step's key

    @abstractmethod
    def foresee(self, state: State) -> State:
        """The state as it will be, without touching a weight: graph, config, specs of dense tensors, promised formats, plan.

        Raises on options that do not fit. What `run` leaves otherwise than foreseen, or than `decided`, is a ContractError.
        """

    def outcomes(self, state: State) -> Iterable[State]:
        """States as `foresee` gives them that show everything that may come of this pass: exporters are asked about each, so that
        what none of them can hold is told before anything is measured."""
        yield self.foresee(state)

    def decided(self, state: State, foreseen: State, records: Sequence[Record]) -> State:
        """The state as it would have been foreseen from `state`, had it been known what `run` has found: `records` are those that
        it committed. `foreseen` is the guess. Only a pass that decides on more than a plan has something to say here."""
        return foreseen

    @abstractmethod
    def run(self, state: State, ctx: Context) -> State:
        """The state after this pass, everything that it changed committed through `ctx.store`."""

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        """Raise RecipeError where the recipe lacks something that this pass reads: calibration data, a later pass."""

    def check_windows(self, length: int, state: State) -> None:
        """RecipeError where calibration windows of so many tokens are too short for it, on the state that it will be given."""

    def beside_files(self, nbytes: Callable[[], int], grown: Callable[[Format], float]) -> Pass:
        """The pass as it is where the largest artifact asked for takes so many bytes beyond a checkpoint in our own form, and for
        matrices in a format so many bits a weight. To find the bytes takes time, so who does not count files asks for none."""
        return self

    def cost(self, state: State, tokens: int) -> Cost:
        """What running it on `tokens` calibration tokens will take; `state` is the foreseen one."""
        return Cost()

    def trained(self, state: State, windows: int, length: int) -> tuple[Cost, str]:
        """The same, of a pass that `trains`, on windows of training text, with what `plan` is to say of it; `state` is the one
        that it will be given. RecipeError where it takes more than it may."""
        return Cost(), ""

    def check_text(self, tokens: Tokens) -> None:
        """CompressError where a pass that `trains` cannot learn from this text."""

    def reads(self, windows: int) -> int:
        """How many of so many calibration windows it reads: what `cost` is asked for."""
        return windows

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        """What `plan` is to say of it, in a line each; `state` is the one that it will be given, `foreseen` what it foresees."""
        return ()

    def chosen(self) -> dict[str, Any]:
        """The options that are not at their defaults, as JSON values: the same for a recipe and for its resolved form."""
        usual = type(self).model_construct().model_dump(mode="json", warnings=False)
        return {n: v for n, v in self.model_dump(mode="json").items() if v != usual[n]}

    def text(self) -> str:
        """Name and options, byte-stable; part of the step's key. Patterns stay in their order, since later ones win."""
        return f"{self.name}{json.dumps(self.model_dump(mode='json'))}"


def check_order(passes: Sequence[Pass], facts: Fact = Fact.DENSE) -> None:
    """OrderError, naming both steps, where a pass needs what does not hold when its turn comes."""
    broken_by: dict[Fact, tuple[int, str]] = {}
    for number, p in enumerate(passes, 1):
        lacking = p.needs & ~facts
        for fact in lacking & ~Fact.DENSE if p.instead & facts else lacking:
            noun = f"{fact.name} weights" if fact is Fact.DENSE else f"{fact.name}"
            why, todo = "no earlier step gives it", "Add a step that does."
            if fact in broken_by:
                step, name = broken_by[fact]
                why = f"step {step} '{name}' removed them"
                todo = f"Move '{p.name}' before '{name}'." if name != p.name else "Leave one of them out."
            raise OrderError(f"step {number} '{p.name}' needs {noun}; {why}.  {todo}", ("step", str(number - 1)))
        for fact in p.breaks:
            broken_by[fact] = number, p.name
        facts = (facts & ~p.breaks) | p.gives


def settle(p: Pass, before: State, after: State) -> State:
    """The state with the pass noted in facts and history, after checking that it wrote only what it declared."""
    extra = changed(before, after) & ~p.writes
    if extra:
        raise ContractError(f"pass author: '{p.name}' declares writes={p.writes} but also changed {extra}")
    return replace(after, facts=(before.facts & ~p.breaks) | p.gives, history=(*before.history, p.text()))


def kept(p: Pass, foreseen: State, made: State) -> State:
    """The state that a pass made, after checking that it is the one that it foresaw."""
    broken = broken_promises(foreseen, made)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise ContractError(f"pass author: after '{p.name}' {broken[0]}{more}")
    return made


def foresee(passes: Sequence[Pass], state: State) -> State:
    """The state at the end of the passes, foreseen."""
    for p in passes:
        state = settle(p, state, p.foresee(state))
    return state


class Steps(Protocol):
    """The run folder, seen from the loop: one step at a time, finished or to be done."""

    @property
    def records(self) -> list[Record]: ...
    def restore(self, known: Callable[[Sequence[Record]], State]) -> State | None: ...
    def finish(self, seconds: float, peak_bytes: int, plan: BitPlan | None) -> None: ...
    def context(self) -> Context: ...


def fold(passes: Sequence[Pass], state: State, open_step: Callable[[int, Pass], Steps]) -> State:
    """Fold the passes over the state."""
    for number, p in enumerate(passes, 1):
        step = open_step(number, p)
        known = partial(p.decided, state, p.foresee(state))
        done = step.restore(known)
        if done is None:
            start = time.perf_counter()
            made = settle(p, state, p.run(state, step.context()))
            kept(p, known(step.records), made)
            step.finish(time.perf_counter() - start, peak_memory(), made.plan)
            give_back(made)
            done = step.restore(known)  # finished files lie elsewhere than the ones in hand did
            assert done is not None, "a step that was just finished can be restored"
        state = kept(p, known(step.records), settle(p, state, done))
    return state


def give_back(state: State) -> None:
    """Return to the system what has been freed, where a model is large: glibc keeps it, and the next stage would come on top."""
    if sum(spec.nbytes for spec in state.specs) < LARGE:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes, as the operating system counts it."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there counts what the parent held before this program started
        line = next(row for row in status.read_text(encoding="utf-8").splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
