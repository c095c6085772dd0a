"""The pass `allocate`: one format and one rank for each matrix, so that the damage to the model is least within the budget.

What may be chosen is choices.py's business, what each choice would do is measured by gradients.py and error_table.py, and the
choice itself, exact and with its gap, is made by allocate_core.py. Here they meet:

1. the damage of every candidate, in the chosen metric: a pass over the model forward and back, and one forward;
2. the integer program, its optimum, bound, price, and the frontier over all budgets;
3. where `trials` asks for it, the optimum and a few others tried for real: quantized as the recipe will do it, their KL measured
   on calibration windows that the trial was not calibrated on. First the optima by the errors alone, which are worse guesses but
   never the same ones, then neighbours of whichever did best so far. Each is a whole quantization.

KL to second order, from gradients, takes the place of measuring: the logits' KL with one matrix replaced at a time ranks no
better, chooses no better (docs/allocation.md), and takes a time that grows with the square of the number of layers.

`foresee` can measure nothing. It solves the same program with a guess, so that whatever cannot fit is told before anything runs.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress.documents import local_path
from compress.errors import CompressError, MatchError, RecipeError
from compress.formats import Dense, Factored, Format, LowRank
from compress.formats.codebooks import paper_grid
from compress.manager import Context, Cost, Pass
from compress.model.backward import LOGITS
from compress.model.data import Tokens
from compress.model.speed import computing
from compress.model.work import per_token
from compress.nodes import load_yaml
from compress.passes import allocate_core as core
from compress.passes import choices, costs
from compress.passes.choices import Bounds, Resource, Space
from compress.passes.error_table import CERTAIN, DRAWN, SOME, ErrorTable, Squares, measure
from compress.passes.gradients import fisher, output_gradients, table_gradients
from compress.passes.lqlora import LqLora
from compress.passes.quantize import FormatText, Quantize
from compress.passes.trials import Chain, Damage, Solved, split
from compress.state import Aspect, Fact, State
from compress.state.plan import BitPlan

BACKWARD = 6  # passes forward that one forward and back is like, in all that is not a product: gradients, and their squares
DRAWING = 8  # times that a logit is read or written, for probabilities, their sums, a draw, and the gradient
OTHERS = ("weight", "output")  # metrics that any table has: their optima are tried too, for they err in other places


class Allocate(Pass):
    """Choose each matrix's format and rank: the least damage within a budget, by an exact integer program."""

    name: ClassVar[str] = "allocate"
    version: ClassVar[int] = 2
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.PLANNED
    writes: ClassVar[Aspect] = Aspect.PLAN
    decides: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    budget: str | tuple[str, ...] = Field("4.0 bits", description="3.0 bits (a weight), 1.2 GiB or 45 % (the file); or several")
    formats: tuple[FormatText, ...] = Field(
        ("int2:g64", "int3:g64", "int4:g64", "int8:g64"),  # type: ignore[arg-type]  # validated into Formats
        description="candidates for every matrix in the blocks; lq-lora: the 432 of that paper",
    )
    ranks: tuple[int, ...] = Field((0,), description="ranks of a low-rank correction that may be bought; 0 is none")
    factors: FormatText = Field("bf16", description="format of the correction's factors")  # type: ignore[assignment]
    pins: dict[str, str | Bounds] = Field({}, description="pattern -> a format, or {min: FORMAT, max: FORMAT}; later ones win")
    also: tuple[str, ...] = Field((), description="patterns of matrices outside the blocks to choose formats for: embed, lm_head")
    limits: dict[str, str] = Field({}, description="pattern -> a budget of its own for these matrices")
    together: Literal["engine", "none"] | tuple[tuple[str, ...], ...] = Field(
        "engine", description="what gets one format: what engines join; nothing; or lists of patterns, block by block"
    )
    metric: Literal["kl", "output", "weight"] = Field("kl", description="what damage is: KL by gradients; or squared errors")
    probe: int = Field(4096, ge=1, description="tokens for gradients and trials, from the end of the calibration text")
    trials: int = Field(
        0, ge=0, description="allocations tried for real, a quantization each: the optimum and others; 0 trusts the prediction"
    )
    time_limit: float = Field(60.0, gt=0, description="seconds for the integer program; what gap is left is told")
    plan: dict[str, str] | None = Field(None, description="a plan.yaml to take as it is: its path, or site -> format")

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, budget: Any) -> Any:
        texts = [budget] if isinstance(budget, str) else budget
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{budget} is no budget; write '3.0 bits', '1.2 GiB' or '45 %', or a list of such texts")
        return budget

    @field_validator("formats", mode="before")
    @classmethod
    def _paper(cls, formats: Any) -> Any:
        return tuple(paper_grid()) if formats == "lq-lora" else formats

    @field_validator("formats")
    @classmethod
    def _plain(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        if not formats:
            raise ValueError("name at least one format")
        product = next((f for f in formats if isinstance(f, Factored)), None)
        if product:
            raise ValueError(f"{product} is made by 'factorize', and is no format to choose; leave it out")
        ranked = [str(f) for f in formats if isinstance(f, LowRank)]
        if ranked:
            raise ValueError(f"{ranked[0]} has a rank; give ranks by 'ranks', and their format by 'factors'")
        return tuple(dict.fromkeys(formats))

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks or min(ranks) < 0:
            raise ValueError("ranks are whole numbers from 0 on, at least one of them")
        return tuple(sorted(set(ranks)))

    @field_validator("pins", mode="before")
    @classmethod
    def _pins(cls, pins: Any) -> Any:
        for pattern, pin in pins.items() if isinstance(pins, dict) else ():
            bounds = isinstance(pin, dict) and pin and pin.keys() <= {"min", "max"}
            if not bounds and not isinstance(pin, str | Bounds):
                raise ValueError(f"'{pattern}' is pinned by a format, or by {{min: FORMAT, max: FORMAT}}, not by {pin}")
        return pins

    @field_validator("together", mode="before")
    @classmethod
    def _together(cls, together: Any) -> Any:
        if isinstance(together, str) and together not in ("engine", "none"):
            raise ValueError(f'\'{together}\' is neither engine nor none; else give lists of patterns, as in [["*.q", "*.k"]]')
        return together

    @field_validator("plan", mode="before")
    @classmethod
    def _read(cls, plan: Any, info: ValidationInfo) -> Any:
        return read_plan((info.context or {}).get("base", Path()) / local_path(plan)) if isinstance(plan, str) else plan

    @model_validator(mode="after")
    def _nothing_idle(self) -> Allocate:
        if self.plan is not None:
            idle = [n for n in self.chosen() if n != "plan"]
            if idle:
                raise ValueError(f"a plan is taken as it is; leave out {', '.join(idle)}")
        elif self.factors != Dense(torch.bfloat16) and max(self.ranks) == 0:
            raise ValueError("'factors' is the format of what 'ranks' may buy; name ranks, or leave it out")
        return self

    # --- before anything is measured ---

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        self.chain(following)
        if not calibrated and self.plan is None and (self.metric != "weight" or self.trials):
            todo = "add it, or use metric: weight and trials: 0"
            raise RecipeError(f"to measure damage, 'allocate' needs data.calibration; {todo}", ("metric",))

    def chain(self, following: Sequence[Pass]) -> Chain:
        """The later passes that quantize. RecipeError where there is none, or none that can use a rank."""
        found = tuple(p for p in following if isinstance(p, Quantize))
        if not found:
            raise RecipeError("nothing behind 'allocate' quantizes; add a step such as '- quantize: {}'")
        pins = (self.plan or self.pins).values()
        texts = [t for p in pins for t in ((p.min, p.max) if isinstance(p, Bounds) else (p,)) if t is not None]
        ranked = max(self.ranks) > 0 or any("+r" in t for t in texts)
        if ranked and not any(isinstance(p, LqLora) for p in found):
            raise RecipeError("ranks are bought, but no later step uses them; add '- lqlora: {}' behind 'allocate'", ("ranks",))
        return Chain(found)

    def foresee(self, state: State) -> State:
        if Fact.PLANNED in state.facts:
            raise RecipeError("an earlier step has planned every format already; keep one 'allocate'")
        if self.plan is not None:
            return replace(state, plan=given_plan(state, self.plan))
        sp, limits = self._space(state)
        return replace(state, plan=self._solved(state, sp, limits, choices.guess, 2.0).plan(measured=False))

    def outcomes(self, state: State) -> Iterator[State]:
        """The guess, and for every format a plan in which each group has it that may."""
        guessed = self.foresee(state)
        yield guessed
        if self.plan is None and guessed.plan is not None:
            groups = [(g, frozenset(g.options)) for g in self._space(state)[0].groups]
            for fmt in dict.fromkeys(f for g, _ in groups for o in g.options for f in o):
                found = {s.name: fmt for g, options in groups if (fmt,) * len(g.sites) in options for s in g.sites}
                formats = {n: f for n, f in {**guessed.plan.formats, **found}.items() if f != Dense(state.dtype)}
                yield replace(guessed, plan=BitPlan(formats))

    def cost(self, state: State, tokens: int) -> Cost:
        """For gradients a pass forward and two back on some tokens, the head included; for the table a pass forward, all
        Hessians, and every format solved for some outputs; a quantization for every trial."""
        if self.plan is not None:
            return Cost()
        sites, n = state.graph.linear, len(self.formats)
        once, again = Quantize(drift=0.0).cost(state, tokens), Quantize().cost(state, tokens)
        drawn = [(min(s.shape[0], DRAWN) if max(self.ranks) == 0 else s.shape[0], s.shape[1]) for s in sites]
        solved, work = costs.solving(drawn), per_token(state)
        factoring = costs.FACTORING * sum(k**3 for _, k in costs.joined(sites)) if tokens else 0
        if self.also:  # a pass forward for the head's Hessian, and some rows of the table
            once = replace(once, model_flops=2 * once.model_flops, numbers=2 * once.numbers)
            drawn.append((CERTAIN + SOME + min(self.probe, tokens), state.graph["embed"].shape[1]))
        table, held = state.graph["embed"], min(self.probe, max(1, tokens // 4)) if self.metric == "kl" else 0
        back = 2.0 * held * (3 * work.weights + 2 * table.numel)
        # what went into each block; the head's matrix; logits, probabilities and their sums
        born = (held * table.shape[1] * len(state.graph.blocks) + table.numel) * computing(state.dtype).itemsize
        born += 16 * min(LOGITS, held * table.shape[0])
        return Cost(
            once.model_flops + back + self.trials * again.model_flops,
            tokens * work.squares + factoring + n * solved.flops + self.trials * again.exact_flops,
            n * sum(rows * k for rows, k in drawn) + self.trials * again.weights,
            max(once.peak_bytes, born * (held > 0), again.peak_bytes * (self.trials > 0)),
            logits=DRAWING * held * table.shape[0],
            numbers=once.numbers + BACKWARD * held * work.numbers + self.trials * again.numbers,
            steps=n * solved.steps + self.trials * again.steps,
        )

    # --- what may be chosen, and the best of it ---

    def _space(self, state: State) -> tuple[Space, list[Resource]]:
        sp = choices.space(state, self.formats, self.ranks, self.factors, self.pins, self.together, self.also)
        budgets = (self.budget,) if isinstance(self.budget, str) else self.budget
        return sp, choices.resources(state, sp, budgets, self.limits)

    def _solved(self, state: State, sp: Space, limits: list[Resource], damage: Damage, seconds: float) -> Solved:
        problem = choices.problem(sp, limits, damage)
        try:
            with silence():
                solution = core.solve(problem, time_limit=seconds)
        except core.Infeasible as e:
            r = limits[e.limit_index]
            todo = "Raise it, allow smaller formats, or prune first"
            raise RecipeError(f"no allocation keeps to {r.name}; the least possible is {r.say(e.least)}.  {todo}", r.at) from None
        return Solved(self.metric, state, sp, limits, damage, problem, solution)

    # --- measuring ---

    def run(self, state: State, ctx: Context) -> State:
        if self.plan is not None:
            return self.foresee(state)
        chain = self.chain(ctx.following)
        sp, limits = self._space(state)
        held, rest = split(ctx.calibration, self.probe)
        inner = replace(ctx, calibration=rest)
        table = self._table(state, inner, chain, sp, held)
        damage = by_entry(table, self.metric)
        name = keep(table, damage, state, ctx)
        solved = replace(self._solved(state, sp, limits, damage, self.time_limit), table=name)
        if self.trials:
            assert held is not None, "`check` asks for calibration data"
            others = [self._solved(state, sp, limits, by_entry(table, m), self.time_limit).solution.choice for m in OTHERS]
            sample = [state.ids(batch) for batch in held.batches()]
            solved = solved.tried(self.trials, others, chain, inner.part(self._measuring, 1.0), sample)
        return replace(state, plan=solved.plan())

    def _table(self, state: State, ctx: Context, chain: Chain, sp: Space, held: Tokens | None) -> ErrorTable:
        """What every candidate would do, in all metrics that need no more than the chosen one."""
        squares = self._squares(state, ctx.part(0.0, self._backward), chain, held) if self.metric == "kl" and held else None
        of = {"chain": [(p.version, p.text()) for p in chain.passes], "version": self.version,
              "held": held.hash if held else None, "gradients": squares is not None}  # fmt: skip
        walk = ctx.part(self._backward, self._measuring)
        wanted, kept = self._wanted(state, sp), ctx.store.analysis("errors", of)
        tables = table_gradients(state, ctx, held) if self.also and self.metric == "kl" and held else None
        return measure(chain, state, walk, wanted, kept, squares, tables)

    def _squares(self, state: State, ctx: Context, chain: Chain, held: Tokens) -> Squares:
        """Squared gradients at outputs; at weights where LQ-LoRA's own Fisher-weighted way follows."""
        if any(isinstance(p, LqLora) and p.fisher for p in chain.passes):
            tokens = ctx.calibration.ids.shape[1] if ctx.calibration else 1  # F is of a window, damage of a token
            return lambda site: fisher(state, ctx, site) / tokens
        found = output_gradients(state, ctx, held)
        return lambda site: found[site.name]

    # Shares of the time, for the time that is left: gradients and the table, of which a format takes a fifth, are measured; a
    # trial takes about as long as both.

    @property
    def _measuring(self) -> float:
        return 1 / (1 + self.trials)

    @property
    def _backward(self) -> float:
        return self._measuring * (0.4 if self.metric == "kl" else 0.0) / (0.8 + 0.2 * len(self.formats))

    def _wanted(self, state: State, sp: Space) -> dict[str, list[Format]]:
        """All formats for every matrix in the blocks, whatever the pins, so that other pins find the table complete; and what
        pins add."""
        wanted = {s.name: choices.fitting(s, self.formats, self.ranks, self.factors, {}) for s in state.graph.linear}
        wanted |= {s.name: [] for s in sp.sites if s.name not in wanted}
        for name, formats in sp.wanted().items():
            if name in wanted:
                wanted[name] += [f for f in formats if f not in wanted[name]]
        return {n: [f for f in formats if not isinstance(f, Dense)] for n, formats in wanted.items()}


@contextmanager
def silence() -> Iterator[None]:
    """Inside, what native code prints to standard output is dropped: HiGHS has a line of its own now and then."""
    sys.stdout.flush()
    before, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)
        os.close(nowhere)


def keep(table: ErrorTable, damage: Damage, state: State, ctx: Context) -> str:
    """Keep the table where `inspect` finds it, every candidate's bytes, errors and damage; the name it is found by."""
    rows = [{"site": name, "format": str(fmt), "bytes": fmt.nbytes(state.graph[name].shape), **asdict(entry),
             "damage": damage(state.graph[name], fmt)} for (name, fmt), entry in table.entries.items()]  # fmt: skip
    name = f"table-{zlib.crc32(json.dumps(rows).encode()):08x}"
    store = ctx.store.analysis("tables", {})
    if store.committed(name) is None:
        store.commit(name, records=rows)
    return name


def by_entry(table: ErrorTable, metric: str) -> Damage:
    """Damage as the table has it."""
    return lambda site, fmt: float(getattr(table[site.name, fmt], metric)) if (site.name, fmt) in table.entries else 0.0


def read_plan(path: Path) -> dict[str, str]:
    """The `sites` of a plan.yaml; RecipeError in one line where it is none."""
    held = load_yaml(path)
    sites = held.get("sites") if isinstance(held, dict) else None
    if not isinstance(sites, dict) or not all(isinstance(v, str) for v in sites.values()):
        raise RecipeError(f"{path}: is no plan; it needs 'sites', a mapping from site to format")
    return {str(n): f for n, f in sites.items()}


def given_plan(state: State, sites: dict[str, str]) -> BitPlan:
    """A plan that a person wrote or edited; errors name the site."""
    for name in sites:
        if name not in state.graph.sites:
            try:
                state.graph.match(name)
            except MatchError as e:
                raise MatchError(str(e), ("plan",)) from None
    try:
        return BitPlan.of(state.graph, Dense(state.dtype), sites, state.dtype)
    except CompressError as e:
        raise type(e)(str(e), ("plan",)) from None
