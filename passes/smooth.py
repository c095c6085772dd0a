"""The pass `smooth`: scale the inputs of matrices so that quantizing them hurts less, without changing what the model computes.

The mathematics is in smooth_core.py; which norm or rows make an input is read off the architecture (model/feeds.py). A factor
goes out of a norm into every matrix that reads it, a router's too; out of rows of v into o; out of rows of up into down. Where
something stands in between (an activation that is not linear, a residual stream that reads a norm as well), that pair is left
alone and the record says why; a model in which no pair is left is refused.

How strongly is searched for each pair, with "not at all" among the answers, by the error that the quantizer behind this pass
leaves on some rows of each reader, under the Hessian of the calibration text; where inputs are to be rounded as well, what that
adds counts too (rounding_core.py). All Hessians and the walk are those of the model as it was: what a block computes stays the
same, which is compared on the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.formats import Dense, Factored, Format, Served
from compress.manager import Context, Cost, Pass, Record, foresee
from compress.model.feeds import Key, Rows, feeds, rows
from compress.model.lockstep import Batch, Clean, Inputs, apart
from compress.model.speed import precision
from compress.model.stream import Stream
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.passes import costs, gptq_core
from compress.passes import smooth_core as core
from compress.passes.quantize import Quantize
from compress.passes.rounding_core import Sample
from compress.passes.solver import Case
from compress.state import Aspect, Fact, State
from compress.state.graph import Feed, Site, total

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRIED_ROWS = 128  # of each reader, evenly spread: the search compares strengths, it does not report errors
TRIED_READERS = 8  # of a norm that many experts read
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the block's largest output


@dataclass(frozen=True)
class Pair:
    """What makes an input, and who reads it. key: of the first reader; the others of a norm may have keys of their own."""

    key: Key
    source: Feed | Rows
    readers: tuple[Site, ...]

    @property
    def name(self) -> str:
        return self.source.weight if isinstance(self.source, Feed) else self.source.site


class Smooth(Pass):
    """Scale inputs by their activations, folded into norms and rows, so that weights quantize better."""

    name: ClassVar[str] = "smooth"
    needs: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS
    looks_ahead: ClassVar[bool] = True

    strength: Annotated[float, Field(ge=0, le=1, strict=True)] | Literal["search"] = Field(
        "search", description="exponent of the activations; search: the best of 0 to 1 for each input, by the quantizer behind"
    )
    pairs: Literal["all", "norms"] = Field("all", description="all: norms, v and up give factors away; norms: only they do")

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'smooth' needs data.calibration, whose activations it scales by")
        if self.strength == "search" and not any(isinstance(p, Quantize) for p in following):
            raise RecipeError("'search' asks the quantizer behind it what each strength would do; put 'quantize' behind "
                              "'smooth', or name a strength", ("strength",))  # fmt: skip

    def foresee(self, state: State) -> State:
        found = list(self._pairs(state))
        if not any(pair.source.obstacle == "" for pair in found):
            why = next((pair.source.obstacle for pair in found), "no norm or row feeds a matrix")
            raise ModelError(f"'smooth' finds nothing in '{state.graph.family}' to fold factors into: {why}; leave it out")
        return state

    def cost(self, state: State, tokens: int) -> Cost:
        """A forward pass, the Hessians of a stage, and for every strength that is tried a factor and a quantization of some
        rows. What was scaled is held in fp64 until its block is done."""
        inputs = {(s.block, s.input_key): s.shape[1] for s in state.graph.linear}
        work, times = per_token(state), len(STRENGTHS) * (self.strength == "search")
        tried = [(min(TRIED_ROWS, s.shape[0]), s.shape[1]) for s in state.graph.linear]
        solved = costs.solving(tried)
        exact = times * (solved.flops + sum(costs.FACTORING * k**3 for k in inputs.values()))
        entries = (1 + times) * total(state.graph.linear) + 2 * times * costs.ORDERING * sum(k * k for k in inputs.values())
        blocks = [state.graph.of_block(b.index) for b in state.graph.blocks]
        held = waiting_bytes(state, tokens) + block_bytes(state)
        peak = held + max(
            (8 * total(b) + costs.seen_bytes(b) + 14 * max(s.shape[1] for s in b) ** 2 for b in blocks if b), default=0
        )
        return Cost(
            2.0 * tokens * work.weights, tokens * work.squares + exact, times * sum(rows * k for rows, k in tried), peak,
            numbers=tokens * work.numbers + entries, steps=times * solved.steps,
        )  # fmt: skip

    def _pairs(self, state: State) -> Iterator[Pair]:
        """Every pair inside the blocks, in the order of blocks."""
        seen: set[str] = set()
        by_norm = feeds(state)
        for site in state.graph.linear:
            feed = by_norm.get((site.block, site.input_key))
            if feed and feed.weight not in seen:
                seen.add(feed.weight)
                yield Pair((site.block, site.input_key), feed, tuple(state.graph[n] for n in feed.readers))
        for key, source in rows(state).items() if self.pairs == "all" else ():
            yield Pair(key, source, tuple(s for s in state.graph.of_block(key[0] or 0) if s.input_key == key[1]))

    def run(self, state: State, ctx: Context) -> State:
        before, pairs, chosen = state, list(self._pairs(state)), self._formats(state, ctx)
        with precision("bf16"):
            return self._walk(before, pairs, chosen, ctx)

    def _walk(self, before: State, pairs: list[Pair], chosen: Mapping[str, Format], ctx: Context) -> State:
        state = before
        stream, batches = ctx.stream(before)
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), block.module)
            part = f"block-{block.index:04}"
            done = ctx.store.committed(part)
            if done is None:
                hidden = [batch.hidden for batch in batches]
                mine = [p for p in pairs if p.key[0] == block.index]
                work = _Block(self, before, ctx, chosen, mine)
                work.see(stream, block.index, batches)
                done = ctx.store.commit(part, dense=work.tensors(), records=work.records)
                state = state.with_part(done)
                dtypes = {state.dtype, *(written.spec.dtype for written in done.dense.values())}
                allowed = max(SAME[dtype] for dtype in dtypes)
                same(stream, state, block.index, replace(batches[0], hidden=hidden[0]), batches[0].hidden, allowed)
            else:
                state = state.with_part(done)
                stream.advance(before, block.index, batches)
        return state

    def _formats(self, state: State, ctx: Context) -> Mapping[str, Format]:
        """What the quantizer behind makes of each site, as foreseen now; nothing where none is asked."""
        last = next((i for i, p in enumerate(ctx.following) if isinstance(p, Quantize)), None)
        if self.strength != "search" or last is None:
            return {}
        return foresee(ctx.following[: last + 1], state).formats


@dataclass
class _Block:
    """One block's worth of smoothing: Hessians as they are seen, then scales, then tensors."""

    options: Smooth
    state: State
    ctx: Context
    formats: Mapping[str, Format]
    pairs: list[Pair]
    matrices: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    hessians: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)

    def see(self, stream: Stream, index: int, batches: Sequence[Batch]) -> None:
        """Pass the batches through the block, and smooth each pair once its inputs have been seen."""
        sites = [site for pair in self.pairs if not pair.source.obstacle for site in pair.readers]
        self.records += [self._record(pair, None) for pair in self.pairs if pair.source.obstacle]
        if sites:
            stream.calibrate(self.state, index, batches, sites, self._observe, self._solve)
        else:
            stream.advance(self.state, index, batches)

    def _observe(self, stage: str, inputs: Inputs, _: Clean | None) -> None:
        for expert, X_tk in inputs.items():
            key = stage if expert is None else f"experts.{expert}.{stage.rpartition('.')[2]}"
            if key not in self.hessians:
                self.hessians[key] = torch.zeros(X_tk.shape[-1], X_tk.shape[-1], device=X_tk.device)
            gptq_core.accumulate(self.hessians[key], X_tk)
            self.samples.setdefault(key, Sample()).see(X_tk)

    def _solve(self, stage: str) -> dict[str, Tensor]:
        with precision("ieee"):
            for pair in self.pairs:
                if not pair.source.obstacle and pair.readers[0].stage == stage:
                    self._smooth(pair)
        self.hessians.clear()
        self.samples.clear()
        return {}

    def _smooth(self, pair: Pair) -> None:
        keys = dict.fromkeys(site.input_key for site in pair.readers)
        H_kk = sum((self.hessians[k] for k in keys if k in self.hessians), start=torch.zeros(()))
        if H_kk.ndim == 0:  # an expert that saw no token
            return
        gptq_core.finish(H_kk)
        rows_k = pair.source.rows.to(H_kk.device) if isinstance(pair.source, Rows) else None
        alpha, s_k = self._chosen(pair, H_kk, rows_k)
        self.records.append(self._record(pair, alpha))
        if bool((s_k == 1).all()):
            return
        for site in pair.readers:
            self.matrices[site.name] = self._matrix(site).double() * s_k.double().cpu()
        if isinstance(pair.source, Feed):
            self._fold_into_norm(pair.source, s_k.cpu())
        else:
            self._fold_into_rows(pair.source, s_k.cpu())

    def _chosen(self, pair: Pair, H_kk: Tensor, rows_k: Tensor | None) -> tuple[float, Tensor]:
        """The strength, and its scales: the best of those tried, the smaller where two are equal."""
        diag_k = H_kk.diagonal()
        if self.options.strength != "search":
            return self.options.strength, core.scales(diag_k, self.options.strength, rows_k)
        tried = {alpha: self._scales(pair, diag_k, alpha, rows_k) for alpha in STRENGTHS}
        errors = {alpha: self._error(pair, H_kk, s_k) for alpha, s_k in tried.items()}
        best = min(STRENGTHS, key=lambda alpha: (errors[alpha], alpha))
        return best, tried[best]

    def _scales(self, pair: Pair, diag_k: Tensor, alpha: float, rows_k: Tensor | None) -> Tensor:
        """Scales for the search: by both sides where inputs are to be rounded, else by the inputs alone."""
        if not any(isinstance(self.formats.get(site.name), Served) for site in pair.readers):
            return core.scales(diag_k, alpha, rows_k)
        largest_k = torch.stack([self.samples[site.input_key].largest_k for site in pair.readers]).amax(0)
        weight_k = torch.stack([self._matrix(site).abs().amax(0).float() for site in pair.readers]).amax(0)
        return core.balanced(largest_k, weight_k.to(largest_k.device), alpha, rows_k)

    def _error(self, pair: Pair, H_kk: Tensor, s_k: Tensor) -> float:
        """What the quantizer behind leaves on some rows of the readers, their inputs scaled."""
        solver = next(p for p in self.ctx.following if isinstance(p, Quantize))
        H_kk = core.scaled(H_kk, s_k)
        tried = pair.readers[:: -(-len(pair.readers) // TRIED_READERS)]
        known = {site: fmt for site in tried if not isinstance(fmt := self.formats.get(site.name), Dense | Factored | None)}
        factor, total = replace(gptq_core.nothing_seen(H_kk), diag_k=H_kk.diagonal()), 0.0  # of which no more may be asked
        if any(map(solver.asks_all, known.values())):
            tokens = self.ctx.calibration.ids.numel() if self.ctx.calibration else 0
            damp = solver.damp or gptq_core.damp_for(len(H_kk), tokens)
            factor = gptq_core.factor(H_kk, damp=damp, order=solver.order)
        for site, fmt in known.items():
            W_nk = self._matrix(site).to(H_kk.device, torch.float32)
            W_nk = W_nk[:: -(-len(W_nk) // TRIED_ROWS)] * s_k
            for _, made in solver.tries(W_nk, factor, [fmt], Case(site, self.state, self.ctx)):
                found = core.error(made, W_nk, H_kk)
                if isinstance(fmt, Served):
                    found += float(self.samples[site.input_key].loss_n(made, fmt, s_k).sum())
                total += found * site.shape[0] / len(W_nk)
        return total

    def _matrix(self, site: Site) -> Tensor:
        """The site's matrix as it is by now: its rows may have been divided before its inputs are multiplied."""
        return self.matrices[site.name] if site.name in self.matrices else self.state.reference(site)

    def _fold_into_norm(self, feed: Feed, s_k: Tensor) -> None:
        assert feed.offset is not None, "else there is an obstacle"
        dense = self.state.dense
        self.others[feed.weight] = core.divided_norm(dense.read_finite(feed.weight), s_k, feed.offset)
        if feed.bias:
            self.others[feed.bias] = core.divided_norm(dense.read_finite(feed.bias), s_k, 0.0)
        for name in feed.others:
            self.others[name] = dense.read_finite(name).double() * s_k.double()

    def _fold_into_rows(self, source: Rows, s_k: Tensor) -> None:
        site = self.state.graph[source.site]
        self.matrices[site.name] = core.divided_rows(self._matrix(site), source.rows, s_k)
        bias = f"{site.stem}.bias"
        if bias in self.state.dense:
            held = self.others.get(bias, self.state.dense.read_finite(bias))
            self.others[bias] = core.divided_rows(held, source.rows, s_k)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint that changes, by its name there."""
        dense = self.state.dense
        return {**self.state.stored(self.matrices), **{n: t.to(dense.specs[n].dtype) for n, t in self.others.items()}}

    def _record(self, pair: Pair, alpha: float | None) -> Record:
        what = f"strength {alpha:g}" if alpha is not None else f"left as it is: {pair.source.obstacle}"
        record = {"site": pair.readers[0].name, "source": pair.name, "strength": alpha, "notes": [f"input, {what}"]}
        self.ctx.say(record)
        return record


def same(stream: Stream, state: State, index: int, batch: Batch, wanted: Tensor, allowed: float) -> None:
    """ModelError where a block no longer computes what it did: then something stands between a feed and its readers."""
    with stream.block(state, index) as block:
        found = stream.call(block, batch, index)
    off = apart(found, wanted)
    if not off <= allowed:
        raise ModelError(f"{state.graph.blocks[index].module}: factors folded into norms and rows change what it computes, by "
                         f"{off:.2%}; 'smooth' does not know '{state.graph.family}': use pairs: norms or no smooth")  # fmt: skip
