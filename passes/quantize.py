"""The pass `quantize`: each matrix to its format, by GPTQ or by rounding, block by block; or learned from there on.

The mathematics is in gptq_core.py, the walk over the model in walk.py, one block's Hessians and codes are solver.py's business,
and what becomes of them where blocks are learned is learned.py's.
The inputs of every stage carry the error of what was quantized before it. The weights are then aimed at the outputs of the
unquantized model on its own inputs, not at their own outputs on the drifted ones (`drift`): a twin of the model runs beside,
unquantized. It costs a second forward pass and takes a fifth to a third off the divergence at 4 to 2 bits.

Where `factorize` has put two factors in place of a matrix, both are quantized, each as a matrix of its own (factored.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator
from torch import Tensor

from compress.errors import FormatError, RecipeError
from compress.formats import (
    Can,
    Ecq,
    Factored,
    Float,
    Format,
    Lattice,
    LowRank,
    Rotated,
    Served,
    Tcq,
    base_of,
    lanes,
    numbers_of,
    parse,
    weight_of,
)
from compress.formats.lattice import Chosen
from compress.manager import Context, Cost, Pass
from compress.model.speed import computing
from compress.model.work import advancing_bytes, block_bytes, per_token, waiting_bytes
from compress.passes import costs, entropy_core, factored, lattice_core, learned, rotated, trellis_core
from compress.passes import gptq_core as core
from compress.passes.rows import Matrix
from compress.passes.solver import TABLE, Answer, Case
from compress.passes.walk import Walk
from compress.state import Aspect, Fact, State
from compress.state.graph import Graph, Site, total
from compress.state.plan import BitPlan, check_fits

FormatText = Annotated[
    Format,
    PlainValidator(lambda v: v if isinstance(v, Format) else parse(str(v))),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["int4:g128", "int3:g64:asym", "int8:channel"]}),
]


class Quantize(Pass):
    """Quantize weights to integers: GPTQ (error feedback from calibration data), rounding to nearest, or GPTQ and learning."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 3
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.QUANTIZED
    instead: ClassVar[Fact] = Fact.FACTORED
    breaks: ClassVar[Fact] = Fact.DENSE | Fact.FACTORED
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.ENCODING | Aspect.PLAN

    method: Literal["gptq", "rtn", "learned"] = Field(
        "gptq", description="gptq: error feedback; rtn: rounding to nearest; learned: gptq, then whole blocks by descent"
    )
    format: FormatText = Field("int4:g128", description="format of every matrix inside the blocks")  # type: ignore[assignment]
    pins: dict[str, str] = Field({}, description="pattern of sites -> format; later ones win; bf16 leaves a site as it is")
    damp: float | None = Field(
        None,
        gt=0,
        le=1,
        description="damping, as a share of the Hessian's mean diagonal; default: 0.01, more for few tokens",
    )
    order: Literal["activation", "natural"] = Field("activation", description="inputs by falling activation, or as they lie")
    clip: Literal["minmax", "mse", "hessian"] = Field("mse", description="how each group's range is chosen")
    drift: float = Field(
        0.5, ge=0, le=1, description="share of the error in a matrix's inputs that it makes up for; 0 saves a forward pass"
    )
    steps: int = Field(150, ge=0, description="learned: steps of the descent for each block; 0 is gptq")

    @model_validator(mode="after")
    def _steps_are_learned(self) -> Quantize:
        if "steps" in self.chosen() and self.method != "learned":
            raise ValueError("'steps' is an option of method: learned; leave it out")
        return self

    @property
    def by_inputs(self) -> bool:
        """Whether matrices are solved under what they are given."""
        return self.method != "rtn"

    @property
    def corrects(self) -> bool:
        """Whether an unquantized twin runs beside, to correct the drift of inputs."""
        return self.by_inputs and self.drift > 0

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if self.by_inputs and not calibrated:
            raise RecipeError(f"'{self.method}' needs data.calibration; add it, or use method: rtn", ("method",))
        for at, fmt in self.named():
            if isinstance(fmt, Served) and fmt.input.measured and not calibrated:
                raise RecipeError(f"'{fmt}' has a scale that is measured on activations; add data.calibration", at)
        solvers = [self, *(p for p in following if isinstance(p, Quantize))]
        for at, fmt in self.named():
            if all(p.target(fmt) != fmt for p in solvers):
                raise RecipeError(f"'{fmt}' has a low-rank correction, which '{self.name}' leaves to a later step; put "
                                  "'lqlora' behind it, or in its place", at)  # fmt: skip

    def named(self) -> Iterator[tuple[tuple[str, ...], Format]]:
        """The formats that its options name, and where; misspelt ones are told of where they are matched."""
        yield ("format",), self.default
        for pattern, text in self.pins.items():
            with suppress(FormatError):
                yield ("pins", pattern), parse(text)

    def foresee(self, state: State) -> State:
        state = self.planned(state)
        assert state.plan is not None
        return state.promising({name: self.target(fmt) for name, fmt in state.plan.formats.items()})

    def planned(self, state: State) -> State:
        """The state with what each site is to become, and nothing promised yet."""
        if Fact.PLANNED in state.facts:
            self.refuse("format", "pins")
            return replace(state, plan=self._with_factors(state, state.plan) if state.plan else None)
        return replace(state, plan=self._with_factors(state, BitPlan.of(state.graph, self.default, self.pins, state.dtype)))

    def _with_factors(self, state: State, plan: BitPlan) -> BitPlan:
        """The plan in which what is said of a matrix is said of both its factors, where an earlier step has made two of it."""
        formats = dict(plan.formats)
        for name, fmt in plan.formats.items():
            held, at = state.format(state.graph[name]), self._said_of(state.graph, name)
            if isinstance(held, Factored) and self.method == "learned":
                raise RecipeError(f"'{name}' is {held} by an earlier step, and of factors nothing is learned; use method: gptq",
                                  ("method",))  # fmt: skip
            if Can.LEARN not in fmt.can and self.method == "learned":
                raise RecipeError(
                    f"'{name}' is to be {fmt}, which is not learned; use method: gptq, or a format such as int3:g64", at
                )
            if (isinstance(fmt, LowRank | Factored) or Can.LEARN not in fmt.can) and isinstance(held, Factored):
                raise FormatError(f"'{name}' is {held} by an earlier step: give its factors a format with a grid and without a "
                                  f"rank, such as int4:g64, not {fmt}", at)  # fmt: skip
            if isinstance(fmt, Factored):
                raise FormatError(f"'{name}' cannot become {fmt} here: factors are made by 'factorize'; put it in front", at)
            if isinstance(held, Factored):
                formats[name] = Factored(held.rank, fmt)  # type: ignore[arg-type]  # Factored itself refuses others
                check_fits(state.graph[name], formats[name], at)
        return replace(plan, formats=formats)

    def _said_of(self, graph: Graph, name: str) -> tuple[str, ...]:
        """The option that names the format of a site."""
        found = [p for p in self.pins if any(graph.owner(s).name == name for s in graph.match(p))]
        return ("pins", found[-1]) if found else ("format",) if "format" in self.chosen() else ()

    @property
    def default(self) -> Format:
        """What every matrix inside the blocks becomes where nothing else is said."""
        return self.format

    def refuse(self, *options: str) -> None:
        """RecipeError where an earlier step has planned every format and this one names some as well, by one of these options."""
        for option in options:
            if option in self.chosen():
                todo = f"leave '{option}' out of '{self.name}' and say it there"
                raise RecipeError(f"an earlier step plans the formats; {todo}", (option,))

    def target(self, fmt: Format) -> Format:
        """What this pass makes of a site whose planned format is `fmt`: a low-rank correction is left to a later pass."""
        return base_of(fmt)

    def solve(self, W_nk: Tensor, factor: core.Factor | None, fmt: Format, case: Case) -> Answer:
        """W in a quantized format, by this pass's method, under the Hessian that was factored (None: nothing was seen)."""
        encode: Encoder = ENCODERS.get(type(fmt), on_grid)
        return encode(self, W_nk, factor, fmt, case)

    def sees_inputs(self, state: State) -> bool:
        """Whether inputs are looked at: to round to a grid nothing is asked of them, and no text streams for the report alone."""
        formats = [self.target(f) for f in state.plan.formats.values()] if state.plan else []
        asked = any(self.asks_all(f) or (isinstance(f, Served) and f.input.measured) for f in formats)
        return asked or self.by_inputs or self.clip == "hessian"

    def asks_all(self, fmt: Format) -> bool:
        """Whether more of a Hessian is asked than its diagonal, to make a format of a matrix by this pass's method."""
        return self.by_inputs or type(weight_of(fmt)) in ENCODERS

    def tries(
        self, W_nk: Tensor, factor: core.Factor | None, formats: Sequence[Format], case: Case
    ) -> Iterator[tuple[Format, Tensor]]:
        """What each format would make of W [N, K], fp32, exactly as it would be deployed; what is entropy-coded at the rate that
        the codes of the whole matrix have, of which these may be some rows."""
        for fmt in formats:
            if isinstance(numbers_of(fmt), Ecq):
                yield fmt, tried(self, W_nk, factor, fmt, case)
                continue
            asked = W_nk[torch.arange(whole_words(len(W_nk), fmt)) % len(W_nk)] if isinstance(numbers_of(fmt), Tcq) else W_nk
            answer = self.solve(asked, factor, fmt, case)
            made = fmt.dequantize(answer.pack(slice(0, len(asked))), torch.float32)
            yield fmt, made[: len(W_nk)].to(W_nk.device)

    def cost(self, state: State, tokens: int) -> Cost:
        sites = state.plan.quantized(state.graph) if state.plan else []
        if not sites:
            return Cost()
        tokens *= self.sees_inputs(state)
        matrices, tables = ([s for s in sites if (s.block is None) == outside] for outside in (False, True))
        watched = [s for s in tables if tokens and self._watches(state, s)]
        work, factored = per_token(state), {(s.block, s.input_key): s.shape[1] for s in [*matrices, *watched] if tokens}
        again = sum(s.role != "head" for s in watched)  # passes to what a head is given, before anything else changes
        passes = (1 + self.corrects + again) * tokens
        forward = 2.0 * passes * work.weights + (2 * tokens * work.squares if self.corrects else 0)
        solved = self.solving(state, [*matrices, *watched] if tokens else [])
        moved = costs.RETARGETING * self.corrects * sum(1.0 * s.numel * s.shape[1] for s in matrices)
        hessians = [*factored.values(), *self._turned(state, [*matrices, *watched] if tokens and self.by_inputs else []).values()]
        factoring = sum(costs.FACTORING * k**3 for k in hessians)
        entries = self._loads(state, tokens) * total(state.graph.linear) + costs.ORDERING * sum(k * k for k in hessians)
        peaks = [self._block_memory(state, tokens, matrices), *(self._table_memory(state, tokens, s) for s in tables)]
        seconds, held = self._coding(state, sites)
        return self._learning(state, tokens, matrices) + Cost(
            forward, tokens * work.squares + solved.flops + moved + factoring, sum(s.numel for s in sites), max(peaks) + held,
            numbers=passes * work.numbers + entries, steps=solved.steps, seconds=seconds,
        )  # fmt: skip

    def _coding(self, state: State, matrices: Sequence[Site]) -> tuple[float, int]:
        """Seconds of coding what is entropy-coded, and of decoding it where it is read again, and of searching trellises; and the
        memory that both hold."""
        formats = state.plan.formats if state.plan else {}
        numbers = [(s, numbers_of(formats[s.name])) for s in matrices]
        found = [trellis_core.takes(s.shape, fmt) for s, fmt in numbers if isinstance(fmt, Tcq)]
        found.append(lanes.takes(entropy_core.CODINGS * sum(s.numel for s, fmt in numbers if isinstance(fmt, Ecq))))
        return sum(seconds for seconds, _ in found), max(held for _, held in found)

    def _learning(self, state: State, tokens: int, matrices: Sequence[Site]) -> Cost:
        """What comes on top where blocks are learned."""
        if self.method != "learned" or not self.steps or not tokens or not matrices:
            return Cost()
        return learned.cost(state, tokens, self.steps, matrices, self.corrects)

    def solving(self, state: State, sites: Sequence[Site]) -> costs.Solving:
        """Solving some sites: of one input as one, of factors each by itself, twice."""
        formats = state.plan.formats if state.plan else {}
        held = {s: f for s in sites if isinstance(f := formats.get(s.name), Factored)}
        alone = [side for site, fmt in held.items() for side in fmt.factor_shapes(site.shape).values()]
        shapes = costs.joined([s for s in sites if s not in held]) + 2 * alone
        return costs.solving(shapes) if self.by_inputs else costs.rounding(shapes)

    def _turned(self, state: State, sites: Sequence[Site]) -> dict[tuple[int | None, str, int], int]:
        """The Hessians that are factored a second time, in rotated coordinates."""
        formats = state.plan.formats if state.plan else {}
        return costs.turned((s, formats.get(s.name)) for s in sites)

    def _watches(self, state: State, table: Site) -> bool:
        """Whether what the head is given is seen before a table is solved."""
        return table.role == "head" or (self.by_inputs and any(s.tied == table.name for s in state.graph))

    def _loads(self, state: State, tokens: int) -> int:
        """How often a block's weights are read: once, and those of a twin again behind each of its stages."""
        stages = {s.stage for s in state.graph.of_block(0)} if state.graph.blocks else set()
        return bool(tokens) * (1 + (1 + len(stages)) * self.corrects)

    def _block_memory(self, state: State, tokens: int, matrices: Sequence[Site]) -> int:
        """Codes of a block; activations, weights, and the most that a stage adds: while it is seen, or, without the twin's
        weights, solved. Where nothing streams, matrices come one by one."""
        stages, packed = dict[tuple[int | None, str], list[Site]](), Counter[int | None]()
        formats = state.plan.formats if state.plan else {}
        for s in matrices:
            stages.setdefault((s.block, s.stage), []).append(s)
            packed[s.block] += formats[s.name].nbytes(s.shape)
        codes = max(packed.values(), default=0)
        if not tokens:
            return codes + max((costs.matrix_bytes(s.numel, costs.ROUNDED) for s in matrices), default=0)
        models, block = 1 + self.corrects, block_bytes(state)
        seen = max((costs.seen_bytes(members, self.corrects) for members in stages.values()), default=0)
        solved = max((costs.stage_bytes(members, self.corrects, bool(self._turned(state, members)))
                      for members in stages.values()), default=0)  # fmt: skip
        return codes + waiting_bytes(state, tokens, models) + max(models * block + seen, block + solved)

    def _table_memory(self, state: State, tokens: int, table: Site) -> int:
        """Some rows of a table as they are solved, and all that they become, in parts and whole. What the head is given is seen
        before that: then its matrix is there, as it computes, and its Hessian."""
        formats = state.plan.formats if state.plan else {}
        solved = costs.matrix_bytes(min(table.numel, TABLE)) + 2 * formats[table.name].nbytes(table.shape)
        if isinstance(numbers_of(formats[table.name]), Ecq):
            solved += entropy_core.HELD * table.numel
        if not tokens or not self._watches(state, table):
            return solved
        number, hessian = computing(state.dtype).itemsize, 4 * table.shape[1] ** 2
        models = 1 + self.corrects * (table.role == "head")  # the twin's activations wait beside
        held = models * tokens * state.graph["embed"].shape[1] * number
        passing = advancing_bytes(state, tokens) + block_bytes(state)
        return held + max(solved + 2 * hessian, number * table.numel + hessian, passing)

    def run(self, state: State, ctx: Context) -> State:
        return Walk(self, ctx, self.steps if self.method == "learned" else 0).run(self.planned(state))


def whole_words(rows: int, fmt: Format) -> int:
    """The least number of outputs, `rows` or more, that fill whole words of a trellis code."""
    numbers = numbers_of(fmt)
    assert isinstance(numbers, Tcq)
    return -(-rows // numbers.whole) * numbers.whole


# --- encoders: what makes of a matrix one that is in a format --------------------------------------------------------


def on_grid(options: Quantize, W_nk: Tensor, factor: core.Factor | None, fmt: Any, case: Case) -> Answer:
    """By GPTQ, or rounded to nearest where nothing was seen or asked for."""
    fmt = fmt.bound(W_nk) if isinstance(fmt, Float) else fmt
    if options.by_inputs and factor is not None:
        solved = core.quantize(W_nk, factor, fmt, clip=options.clip, scale_dtype=case.scale_dtype)
    else:
        solved = core.round_to_nearest(W_nk, factor, fmt, clip=options.clip, scale_dtype=case.scale_dtype)
    return Answer.of(solved, fmt)


def coded(options: Quantize, W_nk: Matrix, factor: core.Factor | None, fmt: Any, case: Case) -> Answer:
    """Entropy-coded, by GPTQ on steps of each input; on one step for all where nothing was seen or asked for."""
    known = factor if options.by_inputs else None
    found = entropy_core.solve(W_nk, known or core.nothing_seen(W_nk), fmt, case.scale_dtype)
    return Answer(lambda _: found.tensors, found.loss_n, None, found.energy_n, found.notes, found.off_n)


def in_words(options: Quantize, W_nk: Tensor, factor: core.Factor | None, fmt: Any, case: Case) -> Answer:
    """In a vector code, by GPTQ on eight inputs at a time, or to the nearest words."""
    found = lattice_core.solve(W_nk, factor or core.nothing_seen(W_nk), fmt, options.by_inputs and factor is not None)

    def pack(rows: slice) -> dict[str, Tensor]:
        one = found.chosen
        return fmt.pack(Chosen(*(x[rows].cpu() for x in (one.points, one.negative, one.odd, one.d))))  # type: ignore[no-any-return]

    return Answer(pack, found.loss_n, found.rounding_loss_n, found.energy_n, found.notes)


def searched(options: Quantize, W_nk: Matrix, factor: core.Factor | None, fmt: Any, case: Case) -> Answer:
    """Trellis-coded, under GPTQ's feedback; without it where nothing was seen or asked for."""
    known = factor if options.by_inputs else None
    found = trellis_core.solve(W_nk, known or core.nothing_seen(W_nk), fmt, case.scale_dtype)
    return Answer(lambda _: found.tensors, found.loss_n, None, found.energy_n, (), found.off_n)


def tried(options: Quantize, W_nk: Tensor, factor: core.Factor | None, fmt: Any, case: Case) -> Tensor:
    """What would come of W, without coding it."""
    if isinstance(fmt, Rotated):
        turned = factor and rotated.turned_factor(factor, fmt, options.order)
        return fmt.turn_back(tried(options, rotated.turned_rows(W_nk, fmt, case.outputs), turned, fmt.base, case))
    known = factor if options.by_inputs else None
    return entropy_core.tried(W_nk, known or core.nothing_seen(W_nk), fmt, case.site.shape)


def served(options: Quantize, W_nk: Tensor, factor: core.Factor | None, fmt: Any, case: Case) -> Answer:
    """The stored half by the way of its own format; beside it what was measured of the inputs."""
    found = options.solve(W_nk, factor, fmt.weight, case)
    return replace(found, pack=lambda rows: fmt.held(found.pack(rows), case.largest))


Encoder = Callable[[Any, Any, core.Factor | None, Any, Case], Answer]
ENCODERS: Mapping[type, Encoder] = {
    Factored: factored.solve,
    Rotated: rotated.solve,
    Ecq: coded,
    Lattice: in_words,
    Tcq: searched,
    Served: served,
}  # by the kind of the format; all others have a grid
