"""The pass `quantize`: each matrix to its format, by GPTQ or by rounding, block by block.

The mathematics is in gptq_core.py; here is where Hessians come from and where codes go. A stage is the set of sites that
read the same activations (q, k, v; then o; then gate, up; then down): they share one Hessian, and those that also share
a format are solved as one matrix, since rows are independent. The inputs of every stage carry the error of what was
quantized before it, because the stream has the quantized weights in place by then. The weights are then aimed at the outputs of
the unquantized model on its own inputs, not at their own outputs on the drifted ones (`drift`): a twin of the model runs beside,
unquantized. It costs a second forward pass and takes a fifth to a third off the divergence at 4 to 2 bits.

Experts see only the tokens that the router sends them. An expert that saw fewer than two tokens for each input gets the
mean Hessian of all experts of its block mixed in, as if it had seen the missing tokens there; the inputs of `down` are the
expert's own neurons, so there the mean keeps only its trace. Both are reported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor

from compress.errors import RecipeError
from compress.formats import Dense, Format, Packed, parse
from compress.graph import Site
from compress.manager import Context, Cost, Pass, Record
from compress.passes import gptq_core as core
from compress.plan import BitPlan
from compress.state import Aspect, Fact, State
from compress.stream import Batch, Inputs, Stream, Twin

FormatText = Annotated[
    Format,
    PlainValidator(lambda v: v if isinstance(v, Format) else parse(str(v))),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["int4:g128", "int3:g64:asym", "int8:channel"]}),
]
HEAD = "head"
FLOPS_PER_WEIGHT_AND_INPUT = 8  # of the matrix products in the solver: feedback, refit, sweep, three losses
TOKENS_PER_INPUT = 2  # below this, an expert's own Hessian is too poor to stand alone


class Quantize(Pass):
    """Quantize weights to integers: GPTQ (error feedback from calibration data) or rounding to nearest."""

    name: ClassVar[str] = "quantize"
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.QUANTIZED
    breaks: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.ENCODING | Aspect.PLAN

    method: Literal["gptq", "rtn"] = Field("gptq", description="gptq: error feedback; rtn: rounding to nearest")
    format: FormatText = Field(parse("int4:g128"), description="format of every matrix inside the blocks")
    pins: dict[str, str] = Field({}, description="pattern of sites -> format; later ones win; bf16 leaves a site as it is")
    damp: float = Field(0.01, gt=0, le=1, description="damping, as a share of the Hessian's mean diagonal")
    order: Literal["activation", "natural"] = Field("activation", description="inputs by falling activation, or as they lie")
    clip: Literal["minmax", "mse", "hessian"] = Field("mse", description="how each group's range is chosen")
    drift: float = Field(
        0.5, ge=0, le=1, description="share of the error in a matrix's inputs that it makes up for; 0 saves a forward pass"
    )

    @property
    def corrects(self) -> bool:
        """Whether an unquantized twin runs beside, to correct the drift of inputs."""
        return self.method == "gptq" and self.drift > 0

    def check(self, calibrated: bool) -> None:
        if self.method == "gptq" and not calibrated:
            raise RecipeError("'gptq' needs data.calibration; add it, or use method: rtn", ("method",))

    def foresee(self, state: State) -> State:
        plan = BitPlan.of(state.graph, self.format, self.pins, state.dtype)
        return replace(state, plan=plan)

    def cost(self, state: State, tokens: int) -> Cost:
        sites = state.plan.quantized(state.graph) if state.plan else []
        if not sites:
            return Cost()
        numel = sum(s.numel for s in sites)
        inputs = {(s.block, s.input_key): s.shape[1] for s in sites}
        stages: dict[tuple[int | None, str], list[Site]] = {}
        for s in sites:
            stages.setdefault((s.block, s.stage), []).append(s)
        models = 2 if self.corrects else 1
        products = tokens * sum(1.0 * k * k for k in inputs.values())  # of a Hessian; half of a full product, by symmetry
        forward = models * 2.0 * tokens * sum(s.numel for s in state.graph.linear) + (2 * products if self.corrects else 0)
        solving = FLOPS_PER_WEIGHT_AND_INPUT * sum(1.0 * s.numel * s.shape[1] for s in sites)
        width = state.graph["embed"].shape[1]
        held = tokens * state.dtype.itemsize * (max(s.shape[1] for s in sites) + 2 * width)
        block = max(sum(s.numel for s in state.graph.of_block(b.index)) for b in state.graph.blocks) * state.dtype.itemsize
        held, block = models * held, models * block
        peak = block + held + max(stage_bytes(members) for members in stages.values())
        return Cost(forward, products + solving, numel, max(peak, state.graph["embed"].numel * state.dtype.itemsize + held))

    def run(self, state: State, ctx: Context) -> State:
        state = self.foresee(state)
        if ctx.calibration is None:
            return self._without_data(state, ctx)
        with precision("bf16"):
            return self._calibrated(state, ctx)

    def _calibrated(self, state: State, ctx: Context) -> State:
        stream, batches = ctx.stream(state)
        twin = self._twin(state, ctx)
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), block.module)
            done = ctx.store.committed(f"block-{block.index:04}")
            if done is None:
                solver = Solver(self, state, ctx)
                stream.calibrate(state, block.index, batches, solver.sites(block.sites), solver.observe, solver.solve, twin)
                state = state.with_sites(ctx.store.commit(f"block-{block.index:04}", solver.packed, solver.records))
            else:
                state = state.with_sites(done)
                stream.advance(state, block.index, batches)
                if twin:
                    twin.stream.advance(twin.state, block.index, twin.batches)
        return self._head(state, ctx, stream, batches)

    def _twin(self, state: State, ctx: Context) -> Twin | None:
        if not self.corrects:
            return None
        stream, batches = ctx.stream(state)
        return Twin(stream, state, batches)

    def _head(self, state: State, ctx: Context, stream: Stream, batches: Sequence[Batch]) -> State:
        solver = Solver(self, state, ctx)
        heads = solver.sites([s.name for s in state.graph if s.role == "head"])
        if not heads:
            return state
        done = ctx.store.committed(HEAD)
        if done is None:
            stream.watch_head(state, batches, heads[0], solver.observe)
            solver.solve(heads[0].input_key)
            done = ctx.store.commit(HEAD, solver.packed, solver.records)
        return state.with_sites(done)

    def _without_data(self, state: State, ctx: Context) -> State:
        """Rounding where the recipe has no calibration data: nothing streams, errors are those of the weights."""
        parts = {f"block-{b.index:04}": b.sites for b in state.graph.blocks}
        parts[HEAD] = tuple(s.name for s in state.graph if s.role == "head")
        for i, (part, names) in enumerate(parts.items()):
            ctx.progress(i, len(parts), part)
            done = ctx.store.committed(part)
            if done is None:
                solver = Solver(self, state, ctx)
                for site in solver.sites(names):
                    solver.solve_together([site], None, None)
                done = ctx.store.commit(part, solver.packed, solver.records)
            state = state.with_sites(done)
        return state


class Solver:
    """One block's worth of solving: Hessians as they are observed, packed sites and records as they are solved."""

    def __init__(self, options: Quantize, state: State, ctx: Context):
        self.options, self.state, self.ctx = options, state, ctx
        self.formats: Mapping[str, Format] = state.plan.formats if state.plan else {}
        self.packed: dict[str, Packed] = {}
        self.records: list[Record] = []
        self._hessians: dict[int | None, Tensor] = {}
        self._drift: Tensor | None = None
        self._tokens: dict[int | None, int] = {}
        self._active: dict[str, list[Site]] = {}

    def sites(self, names: Sequence[str]) -> list[Site]:
        """Those of the named sites that are to change, noted by the stage at which they are solved."""
        found = [self.state.graph[n] for n in names if n in self.formats]
        for site in found:
            self._active.setdefault(site.stage, []).append(site)
        return found

    def observe(self, stage: str, inputs: Inputs, clean: Inputs | None) -> None:
        """Add one batch's activations, by expert, to the stage's Hessians; and how far they are from the clean ones.

        Experts are left out of the latter: what the router sends to one of them differs between the two models.
        """
        for expert, X_tk in inputs.items():
            if expert not in self._hessians:
                k = X_tk.shape[-1]
                self._hessians[expert] = torch.zeros(k, k, dtype=torch.float32, device=X_tk.device)
                self._tokens[expert] = 0
            core.accumulate(self._hessians[expert], X_tk)
            self._tokens[expert] += X_tk.shape[0]
        if clean is not None and None in clean:
            M_kk = ((clean[None] - inputs[None]).T @ inputs[None]).float()
            self._drift = M_kk if self._drift is None else self._drift.add_(M_kk)

    def solve(self, stage: str) -> dict[str, Tensor]:
        """Solve every site of a stage; their new matrices [out, in] by name."""
        with precision("ieee"):
            return self._solve(stage)

    def _solve(self, stage: str) -> dict[str, Tensor]:
        sites = self._active[stage]
        pooled = self._pool(stage) if len(self._hessians) > 1 else None
        for expert in sorted(self._hessians, key=lambda e: -1 if e is None else e):
            start = time.perf_counter()
            H_kk, notes = self._mean(expert, pooled)
            factor = core.factor(H_kk, damp=self.options.damp, order=self.options.order)
            shared = time.perf_counter() - start
            mine = [s for s in sites if s.expert == expert]
            for fmt in dict.fromkeys(self.formats[s.name] for s in mine):
                same = [s for s in mine if self.formats[s.name] == fmt]
                self.solve_together(same, factor, self._tokens[expert], notes, shared * len(same) / len(mine))
        self._hessians.clear()
        self._tokens.clear()
        self._drift = None
        return {s.name: self.packed[s.name].dequantize(self.state.dtype) for s in sites}

    def _pool(self, stage: str) -> Tensor:
        total = sum(self._tokens.values())
        P_kk = sum(self._hessians.values(), start=torch.zeros(())) / max(1, total)
        core.finish(P_kk)
        if stage.endswith("mid"):
            P_kk = torch.eye(len(P_kk), device=P_kk.device) * P_kk.diagonal().mean()
        return P_kk

    def _mean(self, expert: int | None, pooled: Tensor | None) -> tuple[Tensor, tuple[str, ...]]:
        """The mean Hessian of what was seen, the pooled one mixed in for tokens that are missing."""
        H_kk, seen = core.finish(self._hessians.pop(expert)), self._tokens[expert]
        wanted = TOKENS_PER_INPUT * len(H_kk)
        if pooled is None or seen >= wanted:
            return H_kk.div_(max(1, seen)), ()
        note = f"expert saw {seen} tokens, pooled Hessian for {wanted - seen} more"
        return (H_kk + (wanted - seen) * pooled) / wanted, (note,)

    def solve_together(
        self,
        sites: Sequence[Site],
        factor: core.Factor | None,
        tokens: int | None,
        notes: tuple[str, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        """Solve sites of one Hessian and one format as one matrix, and keep the parts."""
        start = time.perf_counter()
        fmt = self.formats[sites[0].name]
        weights = [self.state.original(s) for s in sites]
        if isinstance(fmt, Dense):
            for site, weight in zip(sites, weights, strict=True):
                self._keep(site, Packed(fmt, site.shape, {"weight": weight.to(fmt.dtype)}), {})
            return
        W_nk = torch.cat([w.to(self.ctx.device, torch.float32) for w in weights])
        scale_dtype = torch.float16 if self.state.dtype == torch.float16 else torch.bfloat16
        if self.options.method == "gptq" and factor is not None:
            if self._drift is not None and tokens and factor.lam > 0:
                W_nk = core.retarget(W_nk, (W_nk @ self._drift).div_(tokens), factor, self.options.drift)
            solved = core.quantize(W_nk, factor, fmt, clip=self.options.clip, scale_dtype=scale_dtype)
        else:
            solved = core.round_to_nearest(W_nk, factor, fmt, clip=self.options.clip, scale_dtype=scale_dtype)
        seconds = (seconds + time.perf_counter() - start) / len(sites)
        row = 0
        for site in sites:
            rows = slice(row, row + site.shape[0])
            row = rows.stop
            packed = fmt.pack(solved.codes[rows].cpu(), solved.grid.map(lambda t, r=rows: t[r].cpu()))  # type: ignore[misc]
            energy = float(solved.energy_n[rows].sum()) or 1.0
            self._keep(site, Packed(fmt, site.shape, packed), {
                "error": float(solved.loss_n[rows].sum()) / energy,
                "rounding": float(solved.rounding_loss_n[rows].sum()) / energy,
                "damping": damping(factor), "tokens": tokens, "seconds": seconds,
                "notes": [*notes, *solved.notes],
            })  # fmt: skip

    def _keep(self, site: Site, packed: Packed, measured: Record) -> None:
        self.packed[site.name] = packed
        record = {"site": site.name, "format": str(packed.format), "bytes": packed.nbytes, **measured}
        self.records.append(record)
        self.ctx.say(record)


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Inside, fp32 matrix products on CPU round their factors to bf16 and sum in fp32, or are exact (``ieee``).

    Activations of an fp32 model are then as precise as those of a bf16 model, on CPUs with bf16 units at several times the
    speed. A Hessian stays the exact product of (rounded) activations, so it stays positive. Other CPUs ignore it.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = kind
    try:
        yield
    finally:
        setting.fp32_precision = before


def stage_bytes(sites: Sequence[Site]) -> int:
    """Memory for solving one stage: every Hessian in fp32, one of them factored in fp64, the weights as they are and in fp32,
    and what the solver holds for the outputs that it has in hand."""
    inputs = {s.input_key: s.shape[1] for s in sites}
    together = max(sum(s.numel for s in sites if s.input_key == key) for key in inputs)
    return 4 * sum(k * k for k in inputs.values()) + 24 * max(inputs.values()) ** 2 + 7 * together + 40 * min(together, 1 << 22)


def damping(factor: core.Factor | None) -> float | None:
    """The damping that was used, as a share of the mean diagonal of the inputs that were seen."""
    if factor is None or factor.lam == 0:
        return None
    return factor.lam / float(factor.diag_k[factor.diag_k > 0].mean())
