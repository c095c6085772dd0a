"""One block's worth of solving: where Hessians come from and where codes go.

A stage is the set of sites that read the same activations (q, k, v; then o; then gate, up; then down): they share one Hessian,
and those that also share a format are solved as one matrix, since rows are independent. What is done to a matrix is the pass's
own `solve`.

Experts see only the tokens that the router sends them. An expert that saw fewer than two tokens for each input gets the
mean Hessian of all experts of its block mixed in, as if it had seen the missing tokens there; the inputs of `down` are the
expert's own neurons, so there the mean keeps only its trace. Both are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import naming
from compress.formats import Coded, Dense, Format, Ggml, Int, Packed, Rotated, Served, numbers_of
from compress.formats.codebooks import NF, Lut
from compress.formats.grid import Quantized, Storage
from compress.formats.served import Rounding
from compress.manager import Context, Record
from compress.model.lockstep import Clean, Inputs
from compress.model.speed import precision
from compress.passes import gptq_core as core
from compress.passes.drift import Drift
from compress.passes.rows import Rows
from compress.state import State
from compress.state.graph import Site

# Rows of a shared table are looked up too, where all their numbers count alike: so much of the identity, in mean diagonals of the
# head's Hessian, is added to that. Without it the head takes what the look-up pays: on Gemma 3 270M, the table alone in
# int4:g64, KL is 0.198 with the Hessian, 0.161 with rounding, 0.108 with both.
LOOKED_UP = 1.0
TABLE = 1 << 24  # weights of a table that are solved at a time
ROWS = 256  # of a table in hand, a multiple: codes of zero points fill words, and outputs are turned in blocks
ByRows = Int | NF | Lut | Ggml | Rotated  # formats that some rows of a matrix can be solved in
TOKENS_PER_INPUT = 2  # below this, an expert's own Hessian is too poor to stand alone
# Below so many tokens an input, matrices of 8 bits whose inputs are rounded are not moved for drift. That is the rounding itself,
# which no weight makes up for, and a regression on few tokens follows it: Gemma 3 270M, 4,096 tokens for 640 to 2,048 inputs,
# W8A8 behind `smooth`, has KL 0.047 with it and 0.021 without; ref-7m, 8,192 for 256 to 768, 0.00055 and 0.00077.
TRUSTED = 10


class Solves(Protocol):
    """A pass that turns matrices into formats one by one, seen from the solver. The fields are its options."""

    @property
    def damp(self) -> float | None: ...
    @property
    def order(self) -> str: ...
    @property
    def drift(self) -> float: ...
    def target(self, fmt: Format) -> Format: ...
    def solve(self, W_nk: Tensor, factor: core.Factor | None, fmt: Format, case: Case) -> Answer: ...


@dataclass(frozen=True)
class Case:
    """What else is known of a matrix in hand: its site (the first of several solved as one), the state, the context.

    outputs: of the matrices below each other that are in hand, or of the one that some rows are of; none: of one that is whole.
    largest: magnitude of the inputs; 0: nothing was seen.
    """

    site: Site
    state: State
    ctx: Context
    outputs: tuple[int, ...] = ()
    largest: float = 0.0

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.state.scale_dtype

    @property
    def generator(self) -> torch.Generator:
        """The site's own, from its start."""
        return self.ctx.generator(self.site)

    @property
    def given(self) -> Packed | None:
        """The site as an earlier step left it, where one changed it."""
        stored = self.state.codes.get(self.site.name)
        return stored.load() if stored else None


@dataclass(frozen=True)
class Answer:
    """What became of a matrix: its packed tensors, by rows, and what each output lost (see `gptq_core.Solved`). off_n: the
    squared change of its weights, where they are coded."""

    pack: Callable[[slice], dict[str, Tensor]]
    loss_n: Tensor
    rounding_loss_n: Tensor | None  # None where rounding is nothing to compare with
    energy_n: Tensor
    notes: tuple[str, ...]
    off_n: Tensor | None = None

    @classmethod
    def of(cls, solved: core.Solved, fmt: Quantized) -> Answer:
        def pack(rows: slice) -> dict[str, Tensor]:
            if fmt.joint:
                return fmt.pack(solved.codes.cpu(), solved.grid)
            return fmt.pack(solved.codes[rows].cpu(), solved.grid.map(lambda t: t[rows].cpu()))

        return cls(pack, solved.loss_n, solved.rounding_loss_n, solved.energy_n, solved.notes)


@dataclass(frozen=True)
class Shared:
    """What the sites of one Hessian share: the Hessian, factored, the tokens it is of, what is noted of it, the seconds that each
    site's share of it took, and the largest magnitude of the inputs. Where there is none, at most a note."""

    factor: core.Factor | None = None
    tokens: int | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    largest: float = 0.0


@dataclass(frozen=True, eq=False)
class Aim:
    """What a matrix was solved for: weights [N, K], the Hessian they are weighed by, and what is noted of the site."""

    W_nk: Tensor
    factor: core.Factor | None
    record: Record

    def error(self, found_nk: Tensor) -> float:
        """The relative error of other weights."""
        energy = float(core.loss(self.W_nk, self.factor).sum()) or 1.0
        return float(core.loss(self.W_nk - found_nk, self.factor).sum()) / energy


class Solver:
    """One block's worth of solving: Hessians as they are observed, packed sites and records as they are solved. With `aims`, what
    each matrix was solved for is kept, for one that goes on from there and tells of it."""

    def __init__(self, options: Solves, state: State, ctx: Context, aims: bool = False):
        self.options, self.state, self.ctx = options, state, ctx
        self.aims: dict[str, Aim] | None = {} if aims else None
        planned = state.plan.formats if state.plan else {}
        self.formats: Mapping[str, Format] = {n: options.target(f) for n, f in planned.items()}
        self.packed: dict[str, Packed] = {}
        self.records: list[Record] = []
        self._hessians: dict[int | None, Tensor] = {}
        self._drift: Drift | None = None
        self._tokens: dict[int | None, int] = {}
        self._largest: dict[int | None, float] = {}
        self._active: dict[str, list[Site]] = {}
        self.looked_up = 0.0  # of a table whose rows are looked up as well: see `LOOKED_UP`

    def sites(self, names: Sequence[str]) -> list[Site]:
        """Those of the named sites that are still to change, noted by the stage at which they are solved."""
        graph = self.state.graph
        found = [graph[n] for n in names if n in self.formats and self.state.format(graph[n]) != self.formats[n]]
        for site in found:
            self._active.setdefault(site.stage, []).append(site)
        return found

    def observe(self, stage: str, inputs: Inputs, clean: Clean | None) -> None:
        """Add one batch's activations, by expert, to the stage's Hessians; and how far they are from the clean ones.

        Experts are left out of the latter: what the router sends to one of them differs between the two models.
        """
        for expert, X_tk in inputs.items():
            if expert not in self._hessians:
                k = X_tk.shape[-1]
                self._hessians[expert] = torch.zeros(k, k, dtype=torch.float32, device=X_tk.device)
                self._tokens[expert], self._largest[expert] = 0, 0.0
            core.accumulate(self._hessians[expert], X_tk)
            self._largest[expert] = max(self._largest[expert], float(X_tk.abs().amax()) if len(X_tk) else 0.0)
            self._tokens[expert] += X_tk.shape[0]
        if clean is not None and None in clean.inputs:
            if self._drift is None:
                self._drift = Drift.of_stage(self._active[stage], self.state, clean, self.ctx.device)
            self._drift.see(inputs[None], clean)

    def solve(self, stage: str) -> dict[str, Tensor]:
        """Solve every site of a stage; the new matrices [out, in] by name."""
        self.solve_stage(stage)
        return {s.name: self.packed[s.name].dequantize(self.state.dtype) for s in self._active[stage] if s.name in self.packed}

    def rounding(self, name: str) -> Rounding | None:
        """What the inputs of a site that was solved are rounded by."""
        return self.packed[name].inputs

    def solve_stage(self, stage: str) -> None:
        """Solve every site of a stage, and leave it at that."""
        with precision("ieee"):
            self._solve(stage)

    def _solve(self, stage: str) -> None:
        sites = self._active[stage]
        pooled = self._pool(stage) if len(self._hessians) > 1 else None
        for expert in sorted(self._hessians, key=lambda e: -1 if e is None else e):
            start = time.perf_counter()
            H_kk, notes = self._mean(expert, pooled)
            seen = self._tokens[expert] if pooled is None else max(self._tokens[expert], TOKENS_PER_INPUT * len(H_kk))
            damp = self.options.damp or core.damp_for(len(H_kk), seen)
            factor = core.factor(self._looking_up(H_kk), damp=damp, order=self.options.order, overwrite=True)
            mine = [s for s in sites if s.expert == expert]
            each = (time.perf_counter() - start) / max(1, len(mine))
            shared = Shared(factor, self._tokens[expert], notes, each, self._largest[expert])
            for same in self._together(mine):
                self.solve_together(same, shared)
        self._hessians.clear()
        self._tokens.clear()
        self._drift = None

    def _together(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        """Sites of one Hessian that can be solved as one matrix: of one format, unless its parameters are a whole matrix's."""
        for fmt in dict.fromkeys(self.formats[s.name] for s in sites):
            same = [s for s in sites if self.formats[s.name] == fmt]
            yield from ([s] for s in same) if fmt.joint else [same]

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

    def _looking_up(self, H_kk: Tensor) -> Tensor:
        """The Hessian, with so much of the identity as the look-up of a shared table needs."""
        if not self.looked_up:
            return H_kk
        H_kk.diagonal().add_(self.looked_up * H_kk.diagonal().mean())
        return H_kk

    def see_head(self, head: Site, stage: str) -> None:
        """Observe, as `stage`, what the output head is given by the model as it is."""
        stream, batches = self.ctx.stream(self.state)
        for block in self.state.graph.blocks:
            self.ctx.progress(block.index, len(self.state.graph.blocks), f"{block.module}, for {head.module}")
            stream.advance(self.state, block.index, batches)
        stream.watch_head(self.state, batches, head, lambda _, inputs, clean: self.observe(stage, inputs, clean))

    def solve_together(self, sites: Sequence[Site], shared: Shared) -> None:
        """Solve sites of one Hessian and one format as one matrix, and keep the parts."""
        start, factor = time.perf_counter(), shared.factor
        fmt = self.formats[sites[0].name]
        if len(sites) == 1 and is_table(sites[0]) and isinstance(fmt, ByRows) and not fmt.joint:
            self._solve_table(sites[0], fmt, shared)
            return
        if len(sites) == 1 and is_table(sites[0]) and isinstance(numbers_of(fmt), Coded):
            self._solve_coded_table(sites[0], fmt, shared)
            return
        weights = [self.state.reference(s) for s in sites]
        if isinstance(fmt, Dense):
            for site, weight in zip(sites, weights, strict=True):
                self._keep(site, Packed(fmt, site.shape, {"weight": weight.to(fmt.dtype)}), {})
            return
        W_nk = torch.cat([w.to(self.ctx.device, torch.float32) for w in weights])
        W_nk, notes = self._moved(sites, W_nk, factor, fmt)
        outputs = tuple(s.shape[0] for s in sites)
        case = Case(sites[0], self.state, self.ctx, outputs, shared.largest)
        with naming(case.site.name):
            answer = self.options.solve(W_nk, factor, fmt, case)
        seconds, rounding_n = shared.seconds + (time.perf_counter() - start) / len(sites), answer.rounding_loss_n
        row = 0
        for site in sites:
            rows = slice(row, row + site.shape[0])
            row = rows.stop
            energy = float(answer.energy_n[rows].sum()) or 1.0
            self._keep(site, Packed(fmt, site.shape, answer.pack(rows)), {
                "error": float(answer.loss_n[rows].sum()) / energy,
                "rounding": None if rounding_n is None else float(rounding_n[rows].sum()) / energy,
                "damping": damping(factor), "tokens": shared.tokens, "seconds": seconds,
                "notes": [*shared.notes, *notes, *answer.notes],
            })  # fmt: skip
            if self.aims is not None:
                self.aims[site.name] = Aim(W_nk[rows], factor, self.records[-1])

    def _moved(
        self, sites: Sequence[Site], W_nk: Tensor, factor: core.Factor | None, fmt: Format
    ) -> tuple[Tensor, tuple[str, ...]]:
        """W, or where it makes up for drift; and what is to be noted."""
        if self._drift is None or factor is None or factor.lam == 0:
            return W_nk, ()
        tokens = self._drift.tokens
        if isinstance(fmt, Served) and fmt.weight.bits >= 8 and tokens < TRUSTED * W_nk.shape[1]:
            return W_nk, (f"{tokens} tokens are few for inputs that are rounded: no drift",)
        return core.retarget(W_nk, self._drift.of(sites, W_nk), factor, self.options.drift / tokens), ()

    def _solve_table(self, site: Site, fmt: ByRows, shared: Shared) -> None:
        """A matrix with a row for every token, some rows at a time: they are independent, and all of them at once would be the
        largest thing in the run."""
        start, case, parts = time.perf_counter(), Case(site, self.state, self.ctx, (site.shape[0],)), []
        W_nk, sums, notes = self.state.reference(site), torch.zeros(5, dtype=torch.float64), shared.notes
        both = shared.factor is not None and site.role == "embed"
        step = max(1, TABLE // site.shape[1] // ROWS) * ROWS
        for row in range(0, len(W_nk), step):
            self.ctx.progress(row, len(W_nk), site.module)
            part = W_nk[row : row + step].to(self.ctx.device, torch.float32)
            with naming(case.site.name):
                answer = self.options.solve(part, shared.factor, fmt, case)
            parts.append(answer.pack(slice(0, len(part))))
            off = fmt.dequantize(parts[-1], torch.float32).sub_(part.cpu()) if both else part.new_zeros(1, 1)
            assert answer.rounding_loss_n is not None, "tables become plain formats"
            losses = (answer.loss_n, answer.rounding_loss_n, answer.energy_n, off.square().sum(-1), part.square().sum(-1))
            sums += torch.stack([t.sum(dtype=torch.float64).cpu() for t in losses])
            notes = tuple(dict.fromkeys((*notes, *answer.notes)))
        looked_up = (f"rows looked up are off by {float(sums[3] / sums[4]):.2e}",) if both else ()
        energy = float(sums[2]) or 1.0
        self._keep(site, Packed(fmt, site.shape, joined(fmt, site, parts, self.state.scale_dtype)), {
            "error": float(sums[0]) / energy, "rounding": float(sums[1]) / energy, "damping": damping(shared.factor),
            "tokens": shared.tokens, "seconds": shared.seconds + time.perf_counter() - start, "notes": [*notes, *looked_up],
        })  # fmt: skip

    def _solve_coded_table(self, site: Site, fmt: Format, shared: Shared) -> None:
        """The same in a format whose steps belong to the whole matrix: it is solved as one, and read some rows at a time."""
        start, case, W_nk = time.perf_counter(), Case(site, self.state, self.ctx, (site.shape[0],)), self.state.reference(site)

        def read(rows: slice) -> Tensor:
            self.ctx.progress(rows.start, len(W_nk), site.module)
            return W_nk[rows].to(self.ctx.device, torch.float32)

        rows: Any = Rows(site.shape, read, torch.device(self.ctx.device))  # which coded formats take in place of a tensor
        with naming(case.site.name):
            answer = self.options.solve(rows, shared.factor, fmt, case)
        notes = (*shared.notes, *answer.notes)
        if shared.factor is not None and site.role == "embed":
            assert answer.off_n is not None
            square = sum(float(part.float().square().sum(dtype=torch.float64)) for part in W_nk.split(ROWS * ROWS))
            notes += (f"rows looked up are off by {float(answer.off_n.sum(dtype=torch.float64)) / square:.2e}",)
        energy = float(answer.energy_n.sum()) or 1.0
        self._keep(site, Packed(fmt, site.shape, answer.pack(slice(0, len(W_nk)))), {
            "error": float(answer.loss_n.sum()) / energy, "rounding": None, "damping": damping(shared.factor),
            "tokens": shared.tokens, "seconds": shared.seconds + time.perf_counter() - start, "notes": [*notes],
        })  # fmt: skip

    def _keep(self, site: Site, packed: Packed, measured: Record) -> None:
        self.packed[site.name] = packed
        record = {"site": site.name, "format": str(packed.format), "bytes": packed.nbytes, **measured}
        self.records.append(record)
        if self.aims is None:
            self.ctx.say(record)


def is_table(site: Site) -> bool:
    """Whether a matrix has a row for every token: an embedding, a head."""
    return site.block is None and site.expert is None and not site.transposed


def joined(fmt: Storage, site: Site, parts: Sequence[dict[str, Tensor]], scale: torch.dtype) -> dict[str, Tensor]:
    """The packed tensors of a matrix from those of its rows; what is no row's stands in each part alike."""
    found = {}
    for suffix, (dtype, shape) in fmt.tensors(site.shape, scale).items():
        if suffix == "weight_shape":
            found[suffix] = torch.tensor(site.shape, dtype=dtype)
        else:
            same = parts[0][suffix].shape == shape
            found[suffix] = parts[0][suffix] if same else torch.cat([part[suffix] for part in parts])
    return found


def damping(factor: core.Factor | None) -> float | None:
    """The damping that was used, as a share of the mean diagonal of the inputs that were seen."""
    if factor is None or factor.lam == 0:
        return None
    return factor.lam / float(factor.diag_k[factor.diag_k > 0].mean())
