"""The pass `depth`: the layers, or their attentions and MLPs, whose loss costs the least go, one after the other.

What it costs is measured, not scored: the KL between the model as it was and the model without the candidate, on windows of the
calibration text, and anew in every round, for with one layer gone others may go than before (SLEB, arXiv 2402.09025; BlockPruner,
arXiv 2406.10594, which loses 7 to 31 % of its average score without the rounds). `metric: angle` is the cheap score to compare
with: how far a layer turns what it is given, 1 - cos, from one forward pass (ShortGPT, arXiv 2403.03853).

A round over L layers takes about L²/2 passes of a block and L of the head; perturbed.py walks it.

Eight windows by default: of 2,048 tokens each they are 16,384 predictions, somewhat more than such methods are commonly run
on, and time goes with their number.

Rounds are kept as an analysis of the state: a run that was stopped goes on at the round where it was, and a larger `drop`
measures only what it adds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, StrictInt
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.manager import Context, Cost, Pass, Record
from compress.model.absent import PARTS, lacking
from compress.model.couplings import KV_GROUPS, MLP, couplings
from compress.model.layers import Kinds, Unit, fewer, sublayers
from compress.passes.perturbed import Change, Perturbed, silent, spread, walking
from compress.passes.prune_counts import differing
from compress.state import Aspect, Fact, State


class Depth(Pass):
    """Take layers away, or attentions and MLPs of layers: those whose loss costs the least, measured one by one."""

    name: ClassVar[str] = "depth"
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.PRUNED
    writes: ClassVar[Aspect] = Aspect.STRUCTURE | Aspect.WEIGHTS
    decides: ClassVar[bool] = True

    drop: StrictInt = Field(1, ge=1, description="how many units go")
    unit: Literal["layer", "sublayer"] = Field("layer", description="what goes: whole layers, or attentions and MLPs of layers")
    metric: Literal["kl", "angle"] = Field(
        "kl", description="what it costs: KL from the original, measured anew in every round; or how far a layer turns its input"
    )
    windows: StrictInt = Field(8, ge=1, description="calibration windows to measure on, spread over the text; at most all")
    keep_zeros: bool = Field(
        False, description="put zeros in place of a sublayer's output matrix: every engine loads it, and the file keeps its size"
    )

    # --- before anything is measured ---

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if self.unit == "layer" and self.keep_zeros:
            raise RecipeError("a layer is taken away whole; leave keep_zeros out, or use unit: sublayer", ("keep_zeros",))
        if self.unit == "sublayer" and self.metric == "angle":
            raise RecipeError("an angle is that of a whole layer; use metric: kl, or unit: layer", ("metric",))
        if not calibrated:
            raise RecipeError("to measure what it costs, 'depth' needs data.calibration; add it, or name layers in 'edit'")

    def foresee(self, state: State) -> State:
        """The last of the layers that may go, as a guess."""
        if state.plan is not None:
            raise RecipeError("an earlier step has planned formats for layers by their numbers; move 'depth' in front of it")
        choice, gone = Choice.of(self, state), list[Unit]()
        for _ in range(self.drop):
            gone.append(choice.left(gone)[-1])
        return choice.without(gone)

    def decided(self, state: State, foreseen: State, records: Sequence[Record]) -> State:
        choice = Choice.of(self, state)
        names = [r["site"] for r in records]
        return choice.without([unit for unit in choice.units if unit.name in names])

    def reads(self, windows: int) -> int:
        return min(windows, self.windows)

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        if self.keep_zeros:
            yield f"depth puts zeros in place of {self.drop} sublayers, so files and time stay what they are"
            return
        of = f"{len(state.graph.blocks)} layers" if self.unit == "layer" else f"{len(Choice.of(self, state).units)} sublayers"
        yield f"depth takes {self.drop} of {of} away; which ones is measured, and until then a guess: the last ones"
        if self.unit == "sublayer":
            yield f"{differing('depth')}: keep_zeros: true gives a model of the size it had that they load"

    def cost(self, state: State, tokens: int) -> Cost:
        """The original; in each round what stands in front of candidates, and every candidate from there to its logits."""
        if not tokens:
            return Cost()
        blocks = len(state.graph.blocks)
        passes, heads, most = float(blocks), 0, 0
        for done in range(self.drop if self.metric == "kl" else 0):
            layers = blocks + self.drop - done if self.unit == "layer" else blocks
            each = 1 if self.unit == "layer" else 2
            passes += layers + each * layers * (layers + (1 if each == 2 else -1)) / 2
            heads, most = heads + each * layers + 1, max(most, each * layers)
        return walking(state, tokens, self.windows, passes, heads, most)

    # --- measuring ---

    def run(self, state: State, ctx: Context) -> State:
        choice, gone, zeroed = Choice.of(self, state), list[Unit](), list[Any]()
        for unit, record in self._rounds(choice, ctx):
            part = f"round-{record['round']:04}"
            done = ctx.store.committed(part)
            if done is None:
                done = ctx.store.commit(part, dense=choice.written(unit), records=[record])
            ctx.say(record)
            gone.append(unit)
            zeroed.append(done)
        made = choice.without(gone)
        for done in zeroed:
            made = made.with_part(done)
        return made

    def _rounds(self, choice: Choice, ctx: Context) -> Iterator[tuple[Unit, Record]]:
        """What goes in each round, and what is to be told of it: measured, or found where it was before."""
        assert ctx.calibration is not None, "`check` asks for calibration data"
        sample = spread(ctx.calibration, self.windows)
        of = {"version": self.version, "unit": self.unit, "metric": self.metric, "windows": sample.hash}
        store, walk, gone = ctx.store.analysis("depth", of), Perturbed(choice.state, ctx, sample), list[Unit]()
        for number in range(1, self.drop + 1):
            part, left = f"round-{number:04}", choice.left(gone)
            if store.committed(part) is None:
                inner = ctx.part((number - 1) / self.drop, number / self.drop)
                found = walk.kl(changes(gone), changes(left), inner) if self.metric == "kl" else walk.angles(changes(left), inner)
                store.commit(part, records=[{"site": n, "round": number, "cost": cost} for n, cost in found.items()])
            costs = {r["site"]: r["cost"] for r in store.records if r["round"] == number}
            unit, others = choice.least(left, costs)
            gone.append(unit)
            yield unit, self._record(unit, number, costs, others)

    def _record(self, unit: Unit, number: int, costs: Mapping[str, float | None], others: Sequence[Unit]) -> Record:
        what = "KL" if self.metric == "kl" else "angle"
        note = f"{number} of {self.drop} to go, {what} {costs[unit.name]:.3g}"
        note += f"; next best {others[0].name}, {costs[others[0].name]:.3g}" if others else ""
        return {"site": unit.name, "round": number, "metric": self.metric, "cost": costs[unit.name], "candidates": dict(costs),
                "notes": [note, *(["zeros"] if self.keep_zeros else [])]}  # fmt: skip


# --- what may go ------------------------------------------------------------------------------------------------------


class Choice(ABC):
    """What may go of a model, in the order of its blocks."""

    def __init__(self, state: State, units: list[Unit]):
        self.state, self.units = state, units

    @staticmethod
    def of(options: Depth, state: State) -> Choice:
        if options.unit == "layer":
            choice: Choice = Layers(state)
        else:
            choice = Zeros(state, sublayers(state)) if options.keep_zeros else Sublayers(state)
        if options.drop > len(choice.units) - (options.unit == "layer"):
            raise RecipeError(f"there are {len(choice.units)} {options.unit}s to choose from, and {options.drop} are to go"
                              f"{'; keep one' if options.unit == 'layer' else ''}", ("drop",))  # fmt: skip
        return choice

    @abstractmethod
    def may_go(self, unit: Unit, gone: Sequence[Unit]) -> bool:
        """Whether a unit that is there may go next."""

    @abstractmethod
    def refused(self, gone: Sequence[Unit]) -> Exception:
        """Why none may."""

    @abstractmethod
    def without(self, gone: Sequence[Unit]) -> State:
        """The state without these units."""

    def written(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors of the checkpoint that a unit leaves behind."""
        return {}

    def idle(self, unit: Unit) -> bool:
        """Whether taking a unit would change nothing that there is to take."""
        return False

    def left(self, gone: Sequence[Unit]) -> list[Unit]:
        """The units that may go next, at least one."""
        found = [unit for unit in self.units if unit not in gone and self.may_go(unit, gone)]
        if not found:
            raise self.refused(gone)
        return found

    def least(self, units: Sequence[Unit], costs: Mapping[str, float | None]) -> tuple[Unit, list[Unit]]:
        """The unit that costs the least, and the others from there on; those that are gone before they go do not count."""
        finite = [(cost, unit) for unit in units if (cost := costs[unit.name]) is not None]
        ranked = [unit for _, unit in sorted(finite, key=lambda found: found[0])]
        while ranked and self.idle(ranked[0]):
            ranked.pop(0)
        if not ranked:
            raise ModelError(f"nothing is left to go: without any of {units[0].name} to {units[-1].name} the model puts out "
                             "what is not finite, or what it did before; lower 'drop'", ("drop",))  # fmt: skip
        return ranked[0], ranked[1:]


class Layers(Choice):
    """Whole layers, which leave those behind them what they were."""

    def __init__(self, state: State):
        super().__init__(state, [Unit(f"layers.{i}", i) for i in range(len(state.graph.blocks))])
        self.kinds = Kinds(state)

    def may_go(self, unit: Unit, gone: Sequence[Unit]) -> bool:
        return self.kinds.odd([u.block for u in self.units if u != unit and u not in gone]) is None

    def refused(self, gone: Sequence[Unit]) -> Exception:
        return ModelError(f"'{self.state.graph.family}' decides by the number what a layer is: with {len(gone)} gone, no "
                          "other can go without changing what the rest are", ("drop",))  # fmt: skip

    def without(self, gone: Sequence[Unit]) -> State:
        lost = {unit.block for unit in gone}
        return fewer(self.state, [unit.block for unit in self.units if unit.block not in lost])


class Sublayers(Choice):
    """Attentions and MLPs; one of each stays, for the config to speak of."""

    def __init__(self, state: State):
        self.kinds = [c.kind for c in couplings(state)]
        super().__init__(state, separable(state, sublayers(state)))

    def may_go(self, unit: Unit, gone: Sequence[Unit]) -> bool:
        return self.kinds.count(kind_of(unit)) - sum(kind_of(u) == kind_of(unit) for u in gone) > 1

    def refused(self, gone: Sequence[Unit]) -> Exception:
        return RecipeError(f"with {len(gone)} sublayers gone there is one attention and one MLP left, and these stay", ("drop",))

    def without(self, gone: Sequence[Unit]) -> State:
        found = {kind: [unit.block for unit in gone if kind_of(unit) == kind] for kind in (KV_GROUPS, MLP)}
        return lacking(self.state, found) if gone else self.state


class Zeros(Choice):
    """Attentions and MLPs that keep their shape, with zeros in what puts out their outputs."""

    def may_go(self, unit: Unit, gone: Sequence[Unit]) -> bool:
        return True

    def refused(self, gone: Sequence[Unit]) -> Exception:
        raise AssertionError("there are as many as are to go")

    def without(self, gone: Sequence[Unit]) -> State:
        return self.state

    def written(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors that hold these matrices, and the biases behind them, at zero."""
        dense, matrices = self.state.dense, {site.name: torch.zeros(site.shape) for site in unit.sites}
        biases = [name for site in unit.sites if (name := f"{site.stem}.bias") in dense]
        return {**self.state.stored(matrices), **{name: torch.zeros_like(dense.read(name)) for name in biases}}

    def idle(self, unit: Unit) -> bool:
        return not any(self.state.reference(site).any() for site in unit.sites)


def kind_of(unit: Unit) -> str:
    """The kind of coupling that a sublayer is."""
    return next(kind for kind, (part, _) in PARTS.items() if unit.name.endswith(f".{part}"))


def separable(state: State, units: Sequence[Unit]) -> list[Unit]:
    """The sublayers that a config can be without; ModelError where there is none."""
    known, why = {(c.kind, c.block) for c in couplings(state)}, dict[str, str]()
    units = [unit for unit in units if (kind_of(unit), unit.block) in known]
    for kind, block in {kind_of(unit): unit.block for unit in units}.items():
        try:
            lacking(state, {kind: [block]})
        except ModelError as e:
            why[kind] = str(e)
    found = [unit for unit in units if kind_of(unit) not in why]
    if not found:
        what = next(iter(why.values()), f"what '{state.graph.family}' has for sublayers cannot go whole")
        raise ModelError(f"{what}, or use keep_zeros: true, or unit: layer", ("unit",))
    return found


def changes(units: Iterable[Unit]) -> list[Change]:
    """The model without each of these."""
    return [Change(unit.name, unit.block, silent(unit.sites) if unit.sites else None) for unit in units]
