"""The pass `factorize`: each matrix as the product of two smaller ones, W ≈ B A, so that a token takes fewer multiplications.

The mathematics is in factorize_core.py, the walk over the model in walk.py; the inputs of every stage carry the error of what was
factored before it, and weights are aimed at what the model as it was puts out (`drift`), as in `quantize`. A factored site is an
encoded one, in a format of two factors (formats/factors.py): graph, shapes and names stay. `quantize` behind it quantizes both.

With `spread: spectrum` ranks are chosen by what each loses (spectra.py), and then the pass decides: `plan` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, StrictFloat, StrictInt
from torch import Tensor

from compress.documents import one_line
from compress.errors import CompressError, RecipeError
from compress.formats import Dense, Factored, Format
from compress.manager import Context, Cost, Pass, Record
from compress.model.work import per_token
from compress.passes import costs, gptq_core, spectra
from compress.passes import factorize_core as core
from compress.passes.allocate import Allocate
from compress.passes.quantize import Quantize
from compress.passes.solver import Answer, Case
from compress.passes.walk import Walk
from compress.state import Aspect, Fact, State
from compress.state.graph import Graph, total
from compress.state.plan import BitPlan, check_fits


def said(value: Any) -> Any:
    """A rank as a recipe may have it; in words that know of all its kinds."""
    if value == "full" or (type(value) is int and value >= 1) or (type(value) is float and 0 < value <= 1):
        return value
    raise ValueError(f"a rank is a whole number from 1 on, a share up to 1.0, or full, not {one_line(str(value), 60)}")


Rank = Annotated[
    Annotated[StrictFloat, Field(gt=0, le=1)] | Annotated[StrictInt, Field(ge=1)] | Literal["full"], BeforeValidator(said)
]
UNSEEN = "no input was seen: the least error of the weights"
FITTED = 14.0  # operations for each weight and input: products with H and with itself, the factors, losses
TABLE_COPIES = 6  # of a head in fp32, which is solved whole
SIZE = ("low rank buys operations, not size: Gemma 3 270M has a KL of 1.74 at 10.5 bits a weight so, and of 0.56 by GPTQ at 3.25 "
        "bits (docs/recipes.md)")  # fmt: skip


class Factorize(Pass):
    """Put the product of two smaller matrices in place of each: fewer multiplications a token."""

    name: ClassVar[str] = "factorize"
    version: ClassVar[int] = 2
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.FACTORED
    breaks: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.ENCODING | Aspect.PLAN

    rank: Rank = Field(
        0.5, description="rank of every matrix in the blocks: 64; or 0.5, a share of that at which nothing is saved; or full"
    )
    pins: dict[str, Rank] = Field({}, description="pattern of sites -> rank; later ones win; full leaves a site as it is")
    multiple: StrictInt = Field(
        64, ge=1, description="ranks of this and above that come of a share are multiples of it, so that groups divide them"
    )
    spread: Literal["uniform", "spectrum"] = Field(
        "uniform", description="uniform: the share everywhere; spectrum: as many weights in all, ranks by what each loses"
    )
    method: Literal["whitened", "svd"] = Field(
        "whitened", description="whitened: least error of outputs; svd: least error of weights, without data"
    )
    damp: float | None = Field(
        None, gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal; default: 0.01, more for few tokens"
    )
    drift: float = Field(
        0.5, ge=0, le=1, description="share of the error in a matrix's inputs that it makes up for; 0 saves a forward pass"
    )

    # --- what the walk asks ---

    @property
    def order(self) -> str:
        """Of inputs, which are not taken one by one here."""
        return "natural"

    @property
    def by_inputs(self) -> bool:
        return self.method == "whitened"

    @property
    def corrects(self) -> bool:
        return self.by_inputs and self.drift > 0

    def sees_inputs(self, state: State) -> bool:
        return True  # losses of factors are those of outputs, whatever they were fitted to

    @property
    def decides(self) -> bool:  # type: ignore[override]  # of its options, not of the class
        """Whether it finds ranks by measuring."""
        return self.spread == "spectrum"

    def target(self, fmt: Format) -> Format:
        return fmt

    def solve(self, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: Format, case: Case) -> Answer:
        """W as two factors, their loss with the numbers that are stored."""
        assert isinstance(fmt, Factored)
        A_rk, B_nr = core.factors(W_nk, core.hessian(factor) if self.by_inputs else None, fmt.rank)
        tensors = fmt.dense(A_rk.cpu(), B_nr.cpu())
        loss_n = gptq_core.loss(W_nk - fmt.dequantize(tensors, torch.float32).to(W_nk.device), factor)
        notes = factor.notes if factor and factor.lam else (UNSEEN,) if factor else ()
        return Answer(lambda rows: tensors, loss_n, None, gptq_core.loss(W_nk, factor), notes)

    # --- before anything is measured ---

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated and self.by_inputs:
            raise RecipeError("'whitened' needs data.calibration; add it, or use method: svd", ("method",))
        if self.decides and not self.by_inputs:
            raise RecipeError("'spectrum' weighs matrices by what they put out, which method: svd does not see; use method: "
                              "whitened, or spread: uniform", ("spread",))  # fmt: skip
        if self.decides and not isinstance(self.rank, float):
            raise RecipeError("'spectrum' spreads a share of the weights: give rank as one, such as 0.5, or use spread: uniform",
                              ("spread",))  # fmt: skip
        if any(isinstance(p, Allocate) for p in following):
            raise RecipeError("'allocate' chooses formats of whole matrices, and none for factors; leave it out, and give "
                              "'quantize' behind 'factorize' a format and pins")  # fmt: skip

    def foresee(self, state: State) -> State:
        """The ranks that are asked for; with `spectrum`, those of `uniform`, as a guess."""
        return self._with_ranks(state, self.ranks(state))

    def decided(self, state: State, foreseen: State, records: Sequence[Record]) -> State:
        return self._with_ranks(state, spectra.chosen(records)) if self.decides else foreseen

    def ranks(self, state: State) -> dict[str, int]:
        """Site -> rank, in the graph's order; a site that stays as it is has none. CompressError for what cannot be."""
        if Fact.PLANNED in state.facts:
            raise RecipeError("an earlier step plans formats of whole matrices; leave 'allocate' out, and give 'quantize' behind "
                              "'factorize' a format and pins")  # fmt: skip
        found = {}
        for name, (rank, at) in self._said(state.graph).items():
            shape = state.graph[name].shape
            if not isinstance(rank, str):
                found[name] = core.rank_of(rank, shape, self.multiple) if isinstance(rank, float) else rank
                check_fits(state.graph[name], Factored(found[name], Dense(state.dtype)), at)
        if self.decides and not self.free(state.graph):
            raise RecipeError("pins name every matrix, which leaves 'spectrum' none to spread weights over; leave a pin out, or "
                              "use spread: uniform", ("spread",))  # fmt: skip
        if not found:
            raise RecipeError("every matrix stays as it is; give a rank, or leave 'factorize' out", ("rank",))
        return {site.name: found[site.name] for site in state.graph if site.name in found}

    def _said(self, graph: Graph) -> dict[str, tuple[float | int | str, tuple[str, ...]]]:
        """Site -> rank as it is given, and by which option; of sites that share a matrix, the one that owns it."""
        found: dict[str, tuple[float | int | str, tuple[str, ...]]] = {s.name: (self.rank, ("rank",)) for s in graph.linear}
        for pattern, rank in self.pins.items():
            try:
                sites = graph.match(pattern)
            except CompressError as e:
                raise type(e)(str(e), ("pins", pattern)) from None
            found |= {graph.owner(site).name: (rank, ("pins", pattern)) for site in sites}
        return found

    def free(self, graph: Graph) -> list[str]:
        """The sites whose rank no pin gives."""
        return [name for name, (_, at) in self._said(graph).items() if at == ("rank",)]

    def _with_ranks(self, state: State, ranks: Mapping[str, int]) -> State:
        formats: dict[str, Format] = {name: Factored(rank, Dense(state.dtype)) for name, rank in ranks.items()}
        return replace(state, plan=BitPlan(formats)).promising(formats)

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        ranks = {n: f.rank for n, f in foreseen.formats.items() if isinstance(f, Factored)}
        linear, sites = total(state.graph.linear), [state.graph[n] for n in ranks]
        saved = sum(s.numel - ranks[s.name] * sum(s.shape) for s in sites if s.block is not None)
        ways = "ranks are measured, and until then a guess; " if self.decides else ""
        yield (f"factorize: {ways}multiplications a token: {(linear - saved) / linear:.2f} of the original's linear layers, "
               f"{len(sites)} of them as two factors")  # fmt: skip
        idle = [s.name for s in sites if ranks[s.name] * sum(s.shape) >= s.numel]
        if idle:
            yield (f"factorize: {idle[0]}{f' and {len(idle) - 1} more' if len(idle) > 1 else ''}: factors with as many "
                   "weights as the matrix, or more, save nothing; lower the rank, or pin to full")  # fmt: skip
        yield f"factorize: {SIZE}"

    def cost(self, state: State, tokens: int) -> Cost:
        """The walk as `quantize` takes it, without its solving; for each matrix an eigenproblem of the smaller side, twice where
        ranks are measured, which takes one more pass over the text."""
        formats = state.formats
        sites = [state.graph[n] for n, f in formats.items() if isinstance(f, Factored)]
        if not sites:
            return Cost()
        plan = BitPlan({s.name: formats[s.name] for s in sites})
        walk = Quantize(method="gptq" if self.by_inputs else "rtn", drift=self.drift)
        once = walk.cost(replace(state, plan=plan), tokens)
        solved = walk.solving(replace(state, plan=plan), sites if tokens else [])
        times, work = 1 + self.decides, per_token(state)
        least, tables = [min(s.shape) for s in sites], [TABLE_COPIES * 4 * s.numel for s in sites if s.block is None]
        return replace(
            once, model_flops=once.model_flops + (times - 1) * 2.0 * tokens * work.weights, weights=0,
            exact_flops=once.exact_flops - solved.flops + times * FITTED * sum(1.0 * s.numel * s.shape[1] for s in sites),
            numbers=once.numbers + (times - 1) * tokens * work.numbers, steps=once.steps - solved.steps,
            seconds=times * costs.EIGEN_SECONDS * sum(m**3 for m in least),
            peak_bytes=max([once.peak_bytes, *tables]) + 4 * 8 * max(least) ** 2,
        )  # fmt: skip

    # --- running ---

    def run(self, state: State, ctx: Context) -> State:
        ranks = self._measured(state, ctx) if self.decides else self.ranks(state)
        formats: dict[str, Format] = {name: Factored(rank, Dense(state.dtype)) for name, rank in ranks.items()}
        return Walk(self, ctx.part(0.3, 1.0) if self.decides else ctx).run(replace(state, plan=BitPlan(formats)))

    def _measured(self, state: State, ctx: Context) -> dict[str, int]:
        """The ranks by what each loses, as many weights in all as `uniform` would have; told of and committed once."""
        done = ctx.store.committed(spectra.PART)
        if done is None:
            uniform = self.ranks(state)
            ladders = {n: spectra.ladder(state.graph[n].shape, uniform[n], self.multiple) for n in self.free(state.graph)}
            lost = spectra.measured(self, state, ladders, ctx.part(0.0, 0.3))
            record = spectra.record(state.graph, uniform, ladders, lost)
            ctx.say(record)
            ctx.store.commit(spectra.PART, records=[record])
        return spectra.chosen(ctx.store.records)
