"""The pass `lqlora`: each matrix as a quantized one plus a product of low rank, W ≈ Q + B A.

The mathematics is in lqlora_core.py. The walk over the model, its Hessians and its twin are those of `quantize`, of which this
is a kind: a site whose planned format has no rank is quantized as there, one with a rank gets both parts. Where an earlier step
has quantized a site already, its codes are kept and only the correction is added, unless `rounds` asks to fit the two to each
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.errors import RecipeError
from compress.formats import Coded, Dense, Factored, Format, Lattice, LowRank, Packed, Rotated, Served
from compress.formats.grid import Quantized, plain, restore
from compress.manager import Context, Cost, Pass
from compress.passes import costs, gptq_core
from compress.passes import lqlora_core as core
from compress.passes.gradients import fisher
from compress.passes.quantize import FormatText, Quantize
from compress.passes.solver import Answer, Case
from compress.state import Aspect, Fact, State
from compress.state.plan import BitPlan, check_fits

FITTED = 10.0  # operations for each weight and input of a correction: products with H and with itself, the loss


class LqLora(Quantize):
    """Quantize weights and correct them by a product of low rank, fitted to each other."""

    name: ClassVar[str] = "lqlora"
    needs: ClassVar[Fact] = Fact.NONE
    gives: ClassVar[Fact] = Fact.QUANTIZED | Fact.ADAPTED
    breaks: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.ENCODING | Aspect.PLAN

    rank: int = Field(16, ge=1, description="rank of the correction of every matrix inside the blocks")
    factors: FormatText = Field(  # type: ignore[assignment]  # validated into a Format
        "bf16", description="format of the correction's factors: bf16, int8:channel, nf8:g64, ..."
    )
    init: Literal["closed_form", "paper"] = Field(
        "closed_form", description="closed_form: least error of outputs; paper: LQ-LoRA's alternation, least error of weights"
    )
    rounds: int = Field(2, ge=0, description="closed_form: times that both parts are refitted to each other")
    fisher: bool = Field(False, description="paper: weigh the weights by their Fisher information, from calibration data")

    @model_validator(mode="after")
    def _one_method(self) -> LqLora:
        if self.fisher and self.init != "paper":
            raise ValueError("'fisher' is an option of init: paper; the closed form weighs by the inputs")
        if "rounds" in self.chosen() and self.init != "closed_form":
            raise ValueError("'rounds' is an option of init: closed_form; the paper's alternation ends by itself")
        return self

    @property
    def corrects(self) -> bool:
        return super().corrects and self.init == "closed_form"

    def sees_inputs(self, state: State) -> bool:
        return True  # losses of a correction are those of outputs, whatever it was fitted to

    @property
    def default(self) -> Format:
        return LowRank(self.format, self.rank, self.factors)  # type: ignore[arg-type]  # LowRank itself refuses others

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if self.init == "closed_form" and not calibrated:
            raise RecipeError("'closed_form' needs data.calibration; add it, or use init: paper and method: rtn", ("init",))
        if self.fisher and not calibrated:
            raise RecipeError("'fisher' needs data.calibration; add it, or leave it out", ("fisher",))
        super().check(calibrated, following)

    def target(self, fmt: Format) -> Format:
        return fmt

    def planned(self, state: State) -> State:
        if self.fisher and any(s.expert is not None for s in state.graph.linear):
            raise RecipeError("gradients of experts are not measured; leave 'fisher' out", ("fisher",))
        if any(isinstance(fmt, Factored) for fmt in state.formats.values()):
            raise RecipeError("an earlier step has put two factors in place of matrices, of which no corrections are fitted; use "
                              "'quantize' alone behind 'factorize'")  # fmt: skip
        if Fact.PLANNED in state.facts:
            self.refuse("format", "pins", "rank", "factors")
            return state
        if state.plan is not None:  # quantized by an earlier step: every matrix in the blocks is corrected
            self.refuse("format", "pins")
            return replace(state, plan=BitPlan({n: self._corrected(state, n, f) for n, f in state.plan.formats.items()}))
        return super().planned(state)

    def _corrected(self, state: State, name: str, fmt: Format) -> Format:
        site = state.graph[name]
        if site.block is None or not isinstance(fmt, Quantized | Rotated | Coded | Served):
            return fmt
        corrected = LowRank(fmt, self.rank, self.factors)  # type: ignore[arg-type]  # LowRank itself refuses others
        check_fits(site, corrected, ("rank",))
        return corrected

    def cost(self, state: State, tokens: int) -> Cost:
        """Each round from each end is a quantization and an eigenproblem of the smaller side."""
        once = super().cost(state, tokens)
        formats = state.plan.formats if state.plan else {}
        sites = [state.graph[n] for n, f in formats.items() if isinstance(f, LowRank)]
        if self.init == "paper" or not sites:
            return once
        share, times = sum(s.numel for s in sites) / max(1, once.weights), 2 * (self.rounds + 1)
        spectra = costs.EIGEN_SECONDS * sum(min(s.shape) ** 3 for s in sites)
        fitted = (times + 1) * FITTED * sum(1.0 * s.numel * s.shape[1] for s in sites)
        alone = costs.solving(s.shape for s in sites)  # a correction belongs to one matrix
        solved = costs.solving(costs.joined(sites))
        return replace(
            once, exact_flops=once.exact_flops + times * alone.flops - solved.flops + fitted,
            weights=round(once.weights * (1 + share * (times - 1))), steps=once.steps + times * alone.steps - solved.steps,
            seconds=once.seconds + (times + 1) * spectra,
        )  # fmt: skip

    def run(self, state: State, ctx: Context) -> State:
        if self.fisher:
            fisher(state, ctx, state.graph.linear[0])  # all are measured before anything changes
        return super().run(state, ctx)

    def solve(self, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: Format, case: Case) -> Answer:
        if not isinstance(fmt, LowRank):
            return super().solve(W_nk, factor, fmt, case)
        scale_dtype, given = case.scale_dtype, case.given
        stored = partial(rounded, fmt=fmt.factors, scale_dtype=scale_dtype)
        if self.init == "paper":
            F_nk = fisher(case.state, case.ctx, case.site).to(W_nk.device) if self.fisher else None
            split = core.alternate(W_nk, fmt.base, fmt.rank, generator=case.generator, weight_nk=F_nk, clip=self.clip,
                                   scale_dtype=scale_dtype, factors=stored)  # fmt: skip
            split = measured(split, W_nk, factor, fmt)
        else:
            assert factor is not None, "`check` asks for calibration data"
            start = None if given is None else solved(W_nk, factor, given, fmt)
            split = core.closed_form(W_nk, factor, fmt.base, fmt.rank, clip=self.clip, scale_dtype=scale_dtype,
                                     rounds=self.rounds, factors=stored, start=start)  # fmt: skip

        def pack(rows: slice) -> dict[str, Tensor]:
            base = fmt.base.pack(split.codes.cpu(), split.grid.to("cpu"))
            return fmt.pack(base, split.A_rk.cpu(), split.B_nr.cpu(), scale_dtype)

        return Answer(pack, split.loss_n, split.rounding_loss_n, split.energy_n, split.notes)

    def tries(
        self, W_nk: Tensor, factor: gptq_core.Factor | None, formats: Sequence[Format], case: Case
    ) -> Iterator[tuple[Format, Tensor]]:
        """What each format would make of W; for the closed form, without rounds: one solution of a base and one eigenproblem
        serve all its ranks, since the leading directions are those of every lower rank."""
        ranks: dict[Format, int] = {}
        for fmt in formats:
            if isinstance(fmt, LowRank) and self.init == "closed_form":
                ranks[fmt.base] = max(ranks.get(fmt.base, 0), fmt.rank)
            else:
                yield from super().tries(W_nk, factor, [fmt], case)
        for base, most in ranks.items():
            assert factor is not None, "`check` asks for calibration data"
            assert isinstance(base, Quantized)
            found = gptq_core.quantize(W_nk, factor, base, clip=self.clip, scale_dtype=case.scale_dtype)
            Q_nk = restore(found.codes, found.grid, base)
            A_rk, B_nr = core.correction(W_nk - Q_nk, factor, most)
            for fmt in formats:
                if isinstance(fmt, LowRank) and fmt.base == base:
                    stored = partial(rounded, fmt=fmt.factors, scale_dtype=case.scale_dtype)
                    yield fmt, torch.addmm(Q_nk, stored(B_nr[:, : fmt.rank].T).T, stored(A_rk[: fmt.rank]))


def rounded(F_rx: Tensor, fmt: Format, scale_dtype: torch.dtype) -> Tensor:
    """A factor as the format that stores it gives it back."""
    if isinstance(fmt, Dense):
        return F_rx.to(fmt.dtype).to(F_rx.dtype)
    assert not isinstance(fmt, LowRank | Factored | Rotated | Coded | Lattice | Served)
    return restore(*plain(F_rx.float().contiguous(), fmt, scale_dtype), fmt).to(F_rx.dtype)


def solved(W_nk: Tensor, factor: gptq_core.Factor, given: Packed, fmt: LowRank) -> gptq_core.Solved | None:
    """A site that an earlier step has quantized, in the form in which the solver hands out its own; None if in another format."""
    if given.format != fmt.base:
        return None
    codes, grid = fmt.base.unpack(given.tensors)
    codes, grid = codes.to(W_nk.device), grid.to(W_nk.device)
    loss_n = gptq_core.loss(W_nk - restore(codes, grid, fmt.base), factor)
    return gptq_core.Solved(codes, grid, loss_n, loss_n, gptq_core.loss(W_nk, factor))


def measured(split: core.Split, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: LowRank) -> core.Split:
    """The same with losses under the Hessian in place of those of the weights, so that reports compare."""
    if factor is None:
        return split
    loss_n = gptq_core.loss(W_nk - split.weights(fmt.base), factor)
    return replace(split, loss_n=loss_n, rounding_loss_n=loss_n, energy_n=gptq_core.loss(W_nk, factor))
