"""The pass `allocate`: one format and one rank for each matrix, so that the damage to the model is least within the budget.

What may be chosen is choices.py's business, what each choice would do is measured by gradients.py and error_table.py, and the
choice itself, exact and with its gap, is made by allocate_core.py. Here they meet:

1. the damage of every candidate, in the chosen metric: a pass over the model forward and back, and one forward;
2. the integer program, its optimum, bound, price, and the frontier over all budgets;
3. with `structure`, the same for every shape that the model may have, which is then pruned to the best (joint.py);
4. where `trials` asks for it, the optimum and a few others tried for real: quantized as the recipe will do it, their KL measured
   on calibration windows that the trial was not calibrated on. First the optima by the errors alone, which are worse guesses but
   never the same ones, then neighbours of whichever did best so far. Each is a whole quantization.

KL to second order, from gradients, takes the place of measuring: the logits' KL with one matrix replaced at a time ranks no
better, chooses no better (docs/allocation.md), and takes a time that grows with the square of the number of layers.

`foresee` can measure nothing. It solves the same program with a guess, so that whatever cannot fit is told before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from compress.errors import FormatError, RecipeError
from compress.formats import Dense, Format, Rotated, numbers_of
from compress.manager import Context, Cost, Pass, Record
from compress.model.backward import LOGITS
from compress.model.couplings import couplings, named
from compress.model.data import Tokens
from compress.model.speed import computing
from compress.model.work import per_token, waiting_bytes
from compress.passes import allocate_core as core
from compress.passes import choices, costs, joint, joint_free, structure
from compress.passes.allocate_options import Options
from compress.passes.choices import Bounds, Resource, Space
from compress.passes.error_table import CERTAIN, DRAWN, SOME, ErrorTable, Squares, keep, measure
from compress.passes.gradients import Response, fisher, output_gradients, table_gradients
from compress.passes.joint import Shape
from compress.passes.latency import LATENCY, Clock, Timed, pairs, visits
from compress.passes.lqlora import LqLora
from compress.passes.plan_file import given_plan
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.passes.rates import ends
from compress.passes.structure import EVERY, Counts, Damages, made_of, some
from compress.passes.trellis_core import searching
from compress.passes.trials import Chain, Damage, Solved, split
from compress.state import Aspect, Fact, State
from compress.state.plan import BitPlan, Budget

BACKWARD = 6  # passes forward that one forward and back is like, in all that is not a product: gradients, and their squares
DRAWING = 8  # times that a logit is read or written, for probabilities, their sums, a draw, and the gradient
OTHERS = ("weight", "output")  # metrics that any table has: their optima are tried too, for they err in other places


class Allocate(Options):
    """Choose each matrix's format and rank: the least damage within a budget, by an exact integer program."""

    name: ClassVar[str] = "allocate"
    version: ClassVar[int] = 3
    needs: ClassVar[Fact] = Fact.DENSE
    decides: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    # What it gives and writes hangs on whether it may choose a shape.

    @property
    def gives(self) -> Fact:  # type: ignore[override]
        return Fact.PLANNED | (Fact.NONE if self.structure is None else Fact.PRUNED)

    @property
    def writes(self) -> Aspect:  # type: ignore[override]
        return Aspect.PLAN | (Aspect.NONE if self.structure is None else Aspect.STRUCTURE | Aspect.WEIGHTS)

    # --- before anything is measured ---

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        self.chain(following)
        self.refuse_unserved()
        if not calibrated and self.plan is None and (self.metric != "weight" or self.trials):
            todo = "add it, or use metric: weight and trials: 0"
            raise RecipeError(f"to measure damage, 'allocate' needs data.calibration; {todo}", ("metric",))

    def beside_files(self, nbytes: Callable[[], int], grown: Callable[[Format], float]) -> Allocate:
        """Every artifact asked for is to keep a budget of the file."""
        budgets = (self.budget,) if isinstance(self.budget, str) else self.budget
        counts = self.plan is None and not all(Budget.parse(text).average for text in budgets)
        if not counts or self.beside or self.grown:
            return self
        more = {str(fmt): bits for fmt in self.formats if (bits := grown(fmt)) > 0}
        found = self.model_copy(update={"beside": nbytes(), "grown": more})
        found.model_fields_set.difference_update({"beside", "grown"} - self.model_fields_set)  # no table shows what nobody wrote
        return found

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
        if self.latency is not None:  # of smaller shapes too, which are looked up only once they are measured
            Clock.of(self.latency, state).check(self.timed(state))
        counts = self._counts(state)
        if self.shapes == "free":
            best = self._free(state, counts, choices.guess, joint_free.guess(state, counts), 2.0)
            return replace(best.shape.state, plan=best.plan(measured=False))
        found: list[tuple[Shape, Solved | joint.Tight | FormatError]] = []
        for shape in joint.uniform(state, counts, self.of_shape, None):
            found.append((shape, self._solved(state, shape, choices.guess, 2.0)))
            if isinstance(found[-1][1], Solved):
                break
        best = joint.Best.of(found)
        return replace(best.shape.state, plan=best.plan(measured=False))

    def decided(self, state: State, foreseen: State, records: Sequence[Record]) -> State:
        """With `structure`, the shape that was chosen; the formats are the plan's business."""
        stays = next((r["shape"] for r in records if "shape" in r), None)
        if stays is None:
            return foreseen
        shape = joint.shaped(state, stays)
        solved = self._solved(state, shape, choices.guess, 2.0)
        return replace(shape.state, plan=joint.Best.of([(shape, solved)]).plan(measured=False))

    def outcomes(self, state: State) -> Iterator[State]:
        """The guess, and for every format a plan in which each group has it that may."""
        guessed = self.foresee(state)
        yield guessed
        if self.plan is None and guessed.plan is not None:
            groups = [(g, frozenset(g.options)) for g in self._space(guessed, state)[0].groups]
            for fmt in dict.fromkeys(f for g, _ in groups for o in g.options for f in o):
                found = {s.name: fmt for g, options in groups if (fmt,) * len(g.sites) in options for s in g.sites}
                formats = {n: f for n, f in {**guessed.plan.formats, **found}.items() if f != Dense(state.dtype)}
                yield replace(guessed, plan=BitPlan(formats))
            yield from self._extremes(state)

    def _extremes(self, state: State) -> Iterator[State]:
        """The smallest model that may come of it, and one whose layers differ, where they may."""
        counts = {kind: numbers for kind, numbers in self._counts(state).items() if numbers}
        shapes = [{kind: {EVERY: min(some(numbers))} for kind, numbers in counts.items() if some(numbers)}]
        if self.shapes == "free":
            first = {c.kind: f"layers.{c.block}.*" for c in reversed([*couplings(state)])}
            shapes.append({kind: {first[kind]: min(numbers)} for kind, numbers in counts.items()})
        for stays in filter(None, shapes):
            shape = joint.shaped(state, stays)
            solved = self._solved(state, shape, choices.guess, 2.0)
            if isinstance(solved, Solved):
                yield replace(shape.state, plan=solved.plan(measured=False))

    def remarks(self, state: State, foreseen: State) -> Iterator[str]:
        """Of times, that they are another machine's; with `structure`, what may become smaller, or what did."""
        if self.latency is not None and (elsewhere := self.latency.elsewhere()):
            yield elsewhere
        if self.structure is None:
            return
        levels = (f"{' or '.join(map(str, counts))} {named(kind)}" for kind, counts in self._counts(state).items() if counts)
        where = "a layer" if self.shapes == "free" else "every layer"
        yield f"allocate may leave {'; '.join(levels)} in {where}"
        if foreseen.specs != state.specs:
            yield from Prune().remarks(state, foreseen)

    def cost(self, state: State, tokens: int) -> Cost:
        """For gradients a pass forward and two back on some tokens, the head included; for the table a pass forward with these
        too, all Hessians, one more for each matrix, and every format solved for some outputs; a quantization for every trial."""
        if self.plan is not None:
            return Cost()
        sites, solved_formats = state.graph.linear, ends(self.formats)
        n = len(solved_formats)
        once, again = Quantize(drift=0.0).cost(state, tokens), Quantize().cost(state, tokens)
        sides = {fmt.block for fmt in self.formats if isinstance(fmt, Rotated)}
        whole = max(self.ranks) > 0 or bool(sides)
        drawn = [(s.shape[0] if whole else min(s.shape[0], DRAWN), s.shape[1]) for s in sites]
        solved, work = costs.solving(drawn), per_token(state)
        factoring = (1 + len(sides)) * costs.FACTORING * sum(k**3 for _, k in costs.joined(sites)) if tokens else 0
        if self.also:  # a pass forward for the head's Hessian, and some rows of the table
            once = replace(once, model_flops=2 * once.model_flops, numbers=2 * once.numbers)
            drawn.append((CERTAIN + SOME + min(self.probe, tokens), state.graph["embed"].shape[1]))
        table, held = state.graph["embed"], min(self.probe, max(1, tokens // 4)) if self.metric == "kl" else 0
        back = 2.0 * held * (3 * work.weights + 2 * table.numel)
        # what went into each block; the head's matrix; logits, probabilities and their sums
        born = (held * table.shape[1] * len(state.graph.blocks) + table.numel) * computing(state.dtype).itemsize
        born += 16 * min(LOGITS, held * table.shape[0])
        weighing = 1.0 * sum(held * k * k + 2 * n * rows * k * k for rows, k in drawn[: len(sites)]) * (held > 0)
        weighed = (held > 0) * (waiting_bytes(state, held, 1) + 12 * max((s.shape[1] ** 2 for s in sites), default=0))
        levels = self.structure.numbers(state) if self.structure else {}
        shape = structure.cost(state, levels, tokens)
        if levels:
            shape += made_of({kind: {EVERY: 1} for kind in levels}).cost(state, tokens)
        return shape + Cost(
            once.model_flops + 2.0 * held * work.weights + back + self.trials * again.model_flops,
            tokens * work.squares + weighing + factoring + n * solved.flops + self.trials * again.exact_flops,
            n * sum(rows * k for rows, k in drawn) + self.trials * again.weights,
            max(once.peak_bytes + weighed, born * (held > 0), again.peak_bytes * (self.trials > 0)),
            logits=DRAWING * held * table.shape[0],
            numbers=once.numbers + (1 + BACKWARD) * held * work.numbers + self.trials * again.numbers,
            steps=n * solved.steps + self.trials * again.steps,
            seconds=searching(drawn[: len(sites)], map(numbers_of, solved_formats)),
        )

    # --- what may be chosen, and the best of it ---

    def _counts(self, state: State) -> Counts:
        """What there may be of the kinds that may become smaller."""
        return self.structure.counts(state, self.formats, self.shapes == "free") if self.structure else {}

    def _space(self, state: State, whole: State) -> tuple[Space, list[Resource], Timed | None]:
        """What may be chosen for a state, the limits, which count from the `whole` model that it was, and what tells the time of
        a choice: one of the limits, if there is one of that."""
        sp = choices.space(state, self.formats, self.ranks, self.factors, self.pins, self.together, self.also)
        sp = sp if state is whole else sp.measured(whole.graph)
        budgets = (self.budget,) if isinstance(self.budget, str) else self.budget
        limits, text = (
            choices.resources(state, sp, budgets, self.limits, whole, self.beside, self.grown),
            self.constraints.get(LATENCY),
        )
        if self.latency is None and text is not None:
            raise RecipeError("times are looked up in a table, and 'latency' names none; make one by 'compress bench RECIPE "
                              "--table FILE', and add latency: FILE", ("constraints", LATENCY))  # fmt: skip
        if self.latency is None:
            return sp, limits, None
        clock = Clock.of(self.latency, whole)
        timed = clock.limit(sp, state, whole, *(() if text is None else (text, *joint.parsed(text, "ms"))))
        return sp, limits if text is None else [*limits, timed], timed

    def timed(self, state: State) -> dict[tuple[tuple[int, int], Format], str]:
        """Every shape in every format that it may choose for a state, and a site of each: what a table of latency has to hold."""
        if self.plan is not None:
            raise RecipeError("a plan is taken as it is, and there is nothing to choose by time", ("plan",))
        sp = choices.space(state, self.formats, self.ranks, self.factors, self.pins, self.together, self.also)
        wanted, visited = {**sp.wanted(), **self._wanted(state, sp)}, visits(state, 1)
        sites = [*(s for s in state.graph if visited[s.name]), *joint_free.smaller(state, self._counts(state))]
        return pairs(sites, wanted, Dense(state.dtype))

    def _solved(self, state: State, shape: Shape, damage: Damage, seconds: float) -> Solved | joint.Tight | FormatError:
        """The best formats of a shape of a state's; or why it can have none."""
        try:
            sp, limits, timed = self._space(shape.state, state)
        except FormatError as e:
            if not shape.stays:
                raise
            return e
        problem = choices.problem(sp, limits, damage)
        try:
            solution = core.solve(problem, time_limit=seconds)
        except core.Infeasible as e:
            return joint.Tight(limits[e.limit_index], e.least)
        weights = sum(s.numel for s in state.graph.linear)
        return Solved(self.metric, shape.state, sp, limits, damage, problem, solution, weights=weights, timed=timed)

    # --- measuring ---

    def run(self, state: State, ctx: Context) -> State:
        if self.plan is not None:
            return self.foresee(state)
        chain = self.chain(ctx.following)
        if self.latency is not None and (elsewhere := self.latency.elsewhere()):
            ctx.say({"site": LATENCY, "notes": [elsewhere]})
        held, rest = split(ctx.calibration, self.probe)
        inner = replace(ctx, calibration=rest)
        table = self._table(state, inner, chain, held)
        damage = table.damage(self.metric)
        name = keep(table, damage, state, ctx)
        counts = self._counts(state)
        damages = structure.measured(state, inner, counts, held) if counts and held else None
        if damages is not None and self.shapes == "free":
            best = self._free(state, counts, damage, damages, self.time_limit)
        else:
            best = self._best(state, counts, damage, damages)
        best = replace(best, solved=replace(best.solved, table=name))
        if self.trials:
            assert held is not None, "`check` asks for calibration data"
            others = [self._best(state, counts, table.damage(m), None).solved.solution.choice for m in OTHERS]
            sample = [state.ids(batch) for batch in held.batches()]
            best = replace(best, solved=best.solved.tried(self.trials, others, chain, inner.part(self._measuring, 1.0), sample))
        return replace(self._shaped_as(best.shape, state, ctx), plan=best.plan())

    def _best(self, state: State, counts: Counts, damage: Damage, damages: Damages | None) -> joint.Best:
        """The best with all layers alike."""
        every = list(joint.uniform(state, counts, self.of_shape, damages))
        return joint.Best.of([(shape, self._solved(state, shape, damage, self.time_limit / len(every))) for shape in every])

    def _free(self, state: State, counts: Counts, damage: Damage, damages: Damages, seconds: float) -> joint.Best:
        """The best with every layer's shape its own."""
        sp, limits, _ = self._space(state, state)
        program = joint_free.Program.of(state, counts, sp, limits, self.of_shape, damage, damages)
        found = program.solved(seconds)
        shape = joint.shaped(state, found.stays, damages)
        best = joint.Best.of([(shape, self._solved(state, shape, damage, seconds))])
        return replace(best, points=found.frontier(), bound=found.solution.bound)

    def _shaped_as(self, shape: Shape, state: State, ctx: Context) -> State:
        """The state pruned to the shape that was chosen."""
        if self.structure is None:
            return state
        said = f"shape: {shape.text}" + (f", expected damage {shape.damage:.3g}" if shape.stays else "")
        stays = {kind: dict(of) for kind, of in shape.stays.items()}
        ctx.store.commit("shape", records=[{"site": "layers", "shape": stays, "notes": [said]}])
        return state if shape.prune is None else shape.prune.run(state, ctx)

    def _table(self, state: State, ctx: Context, chain: Chain, held: Tokens | None) -> ErrorTable:
        """What every candidate would do, in all metrics that need no more than the chosen one."""
        squares = self._squares(state, ctx.part(0.0, self._backward), chain, held) if self.metric == "kl" and held else None
        of = {"chain": [(p.version, p.text()) for p in chain.passes], "version": self.version,
              "held": held.hash if held else None, "gradients": squares is not None}  # fmt: skip
        walk = ctx.part(self._backward, self._measuring)
        wanted, kept = self._wanted(state, self._space(state, state)[0]), ctx.store.analysis("errors", of)
        tables = table_gradients(state, ctx, held) if self.also and self.metric == "kl" and held else None
        return measure(chain, state, walk, wanted, kept, squares, tables, None if weighs_weights(chain) else held)

    def _squares(self, state: State, ctx: Context, chain: Chain, held: Tokens) -> Squares:
        """Squared gradients at outputs; at weights where LQ-LoRA's own Fisher-weighted way follows."""
        if weighs_weights(chain):
            tokens = ctx.calibration.ids.shape[1] if ctx.calibration else 1  # F is of a window, damage of a token
            return lambda site: Response(fisher(state, ctx, site) / tokens)
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


def weighs_weights(chain: Chain) -> bool:
    """Whether LQ-LoRA's own Fisher information, that of the weights, is what the recipe goes by."""
    return any(isinstance(p, LqLora) and p.fisher for p in chain.passes)
