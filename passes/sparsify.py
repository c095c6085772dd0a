"""The pass `sparsify`: a token reads the neurons that it needs, and not all of an MLP.

Weights stay as they are. What is added is how to know, before a neuron's rows are read, that it will say little: a threshold on
the gate's activation (`cats`), on the inputs of every matrix (`teal`), or on a predictor's logits (`predictor`); what each leaves
unread stands in formats/sparsity.py. All are calibrated on the matrices as they are by then, so this pass stands behind
quantizers, and block by block on inputs that carry what the blocks before leave out.

Layers differ in how much they can be silent. With `allocate` each gets its own share: the KL of the model with one layer sparse
is measured for every layer and a few shares (perturbed.py), with straight lines of its logarithm in between, and the exact solver
of `allocate` spends the bytes that the share asked for would read. KLs of single layers are taken to add up, for they are only
compared.

Alternatives not taken. Top K instead of thresholds: a sort for every token, and the same K for all. TEAL's greedy search over the
matrices of a layer: each step measures every matrix anew; the program over layers has the same aim and a bound. A predictor for
gated models of SiLU or GELU: measured on a trained Llama of 7 M weights, at half of the neurons it costs ten times the KL of a
threshold on the gate, and its factors are read as well, so it is refused.

Limits. What is spared is spared at one row, and less at some: engines read the union of what rows of a batch need, and a prompt
reads all. Mixtures are refused. Shares are of neurons (of `teal`, of inputs), not of bytes: `cats` always reads the gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, StrictInt, field_validator
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.manager import Context, Cost, Pass, Record
from compress.model.lockstep import Batch
from compress.model.stream import Stream
from compress.model.work import block_bytes
from compress.passes import allocate_core
from compress.passes import sparsify_core as core
from compress.passes.perturbed import Change, Perturbed, spread, walking
from compress.passes.sparse_layers import SAMPLED, Layers, Rule, sampled, sparse_inside
from compress.state import Aspect, Fact, State
from compress.state.checkpoint import Spec

SHARES = (1.0, 0.75, 0.6, 0.5, 0.4, 0.3)  # that are measured
STEPS = 50  # of the shares that a layer may keep
Keeps = Mapping[int, float]  # block -> share of its neurons


class Sparsify(Pass):
    """Have a token read the part of an MLP, or of every matrix, that it needs: thresholds and predictors, by layer."""

    name: ClassVar[str] = "sparsify"
    breaks: ClassVar[Fact] = Fact.DENSE | Fact.ADAPTED
    writes: ClassVar[Aspect] = Aspect.STRUCTURE | Aspect.WEIGHTS

    keep: float = Field(0.5, gt=0, lt=1, description="share of the neurons that a token reads, such as 50 %; of teal, of inputs")
    kind: Literal["cats", "teal", "predictor"] = Field(
        "cats", description="by the gate's activation, by the inputs of every matrix, or by a predictor, which is for ReLU"
    )
    allocate: bool = Field(True, description="layers keep shares of their own, by KL, for the bytes that one share would read")
    rank: StrictInt | None = Field(
        None, ge=1, description="of a predictor's factors; an eighth of the model's width unless given"
    )
    windows: StrictInt = Field(8, ge=1, description="calibration windows that 'allocate' measures on; at most all")

    @field_validator("keep", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, str):
            found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value.strip())
            if not found:
                raise ValueError(f"is a share such as 50 % or 0.5, not '{value}'")
            return float(found[1]) / 100
        return value

    @property
    def decides(self) -> bool:  # type: ignore[override]  # of its options, not of the class
        """Whether it finds the share of each layer by measuring."""
        return self.allocate

    # --- before anything is measured ---

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'sparsify' needs data.calibration, whose activations its thresholds are of")
        if self.rank is not None and self.kind != "predictor":
            raise RecipeError(f"'{self.kind}' has no factors; leave 'rank' out, or use kind: predictor", ("rank",))
        changing = Aspect.STRUCTURE | Aspect.WEIGHTS | Aspect.ENCODING
        if later := next((p for p in following if p.writes & changing), None):
            raise RecipeError(f"'sparsify' measures the matrices as they stand here, and '{later.name}' behind it changes them; "
                              f"move it behind '{later.name}'")  # fmt: skip

    def foresee(self, state: State) -> State:
        """Every layer with the same share; with `allocate`, as a guess."""
        return self.sparse(state, self.uniform(Layers.of(state, self.kind, self.rank)))

    def decided(self, state: State, foreseen: State, records: Sequence[Record]) -> State:
        return self.sparse(state, {r["block"]: r["keep"] for r in records}) if self.decides else foreseen

    def uniform(self, layers: Layers) -> dict[int, float]:
        return dict.fromkeys(layers.units, self.keep)

    def sparse(self, state: State, keeps: Keeps) -> State:
        """The state as it is to be: sparsities of the layers that keep less than all, and the specs of what they take."""
        layers = Layers.of(state, self.kind, self.rank)
        found = {site.name: how for block, keep in keeps.items() if keep < 1 for site, how in layers.units[block]}
        specs = [Spec(f"{site.stem}.{suffix}", dtype, shape) for site in state.graph if site.name in found
                 for suffix, (dtype, shape) in found[site.name].tensors(site.shape).items()]  # fmt: skip
        return replace(state, sparsity={**state.sparsity, **found}, specs=(*state.specs, *specs))

    def reads(self, windows: int) -> int:
        return windows

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        layers = Layers.of(state, self.kind, self.rank)
        keeps = {block: 1.0 if units[0][0].name not in foreseen.sparsity else self.keep for block, units in layers.units.items()}
        before, after = layers.model_bytes({}), layers.model_bytes(keeps)
        yield (f"sparsify: a token reads {before:,.0f} bytes of matrices as they are, and about {after:,.0f} "
               f"({after / before:.0%}) at {self.keep:.0%} of the {layers.noun}")  # fmt: skip
        if self.allocate:
            yield "sparsify: which layer keeps how much is measured; in sum they read no more than at equal shares"

    def cost(self, state: State, tokens: int) -> Cost:
        """Two passes of every block, and with `allocate` those of the layers with every share."""
        if not tokens:
            return Cost()
        blocks = len(state.graph.blocks)
        widest = max((site.shape[0] for site in state.graph.linear), default=0)
        sample = Cost(peak_bytes=12 * min(tokens, SAMPLED) * widest + block_bytes(state))
        found = walking(state, tokens, max(1, tokens // 2048), 2.0 * blocks, 0, 1) + sample
        if self.allocate:
            count = (len(SHARES) - 1) * blocks
            found += walking(state, tokens, self.windows, 2 * blocks + count * (blocks + 1) / 2, count + 1, count)
        return found

    # --- measuring ---

    def run(self, state: State, ctx: Context) -> State:
        assert ctx.calibration is not None, "`check` asks for calibration data"
        layers = Layers.of(state, self.kind, self.rank)
        keeps = self._allocated(layers, ctx.part(0.0, 0.7)) if self.allocate else self.uniform(layers)
        made, whole = state, self.sparse(state, keeps)
        inner = ctx.part(0.7, 1.0) if self.allocate else ctx
        stream, batches = ctx.stream(state)
        for block in state.graph.blocks:
            inner.progress(block.index, len(state.graph.blocks), block.module)
            if block.index in layers.units:
                part = f"block-{block.index:04}"
                done = ctx.store.committed(part)
                if done is None:
                    rules = self._rules(layers, stream, made, block.index, batches, ctx)
                    dense, record = self._fitted(layers, block.index, rules, keeps[block.index])
                    done = ctx.store.commit(part, dense=dense, records=[record])
                    ctx.say(record)
                here = {s.name: whole.sparsity[s.name] for s, _ in layers.units[block.index] if s.name in whole.sparsity}
                made = replace(made.with_part(done), sparsity={**made.sparsity, **here})
            stream.advance(made, block.index, batches)
        return replace(whole, dense=made.dense)

    def _rules(
        self, layers: Layers, stream: Stream, state: State, block: int, batches: Sequence[Batch], ctx: Context
    ) -> list[Rule]:
        """What each site of a layer is chosen by, on what it reads and puts out now."""
        units, mlp = layers.units[block], layers.mlps.get(block)
        watched = {site.name: site for site, _ in units}
        if mlp and mlp.up and self.kind == "cats":
            watched[mlp.up.name] = mlp.up
        seen = sampled(stream, state, block, batches, list(watched.values()))
        rules = []
        for site, how in units:
            x, y = seen[site.name]
            rules.append(Rule(site, how, x, y))
            if how.kind == "cats":
                assert mlp is not None
                m = mlp.neurons
                up = seen[mlp.up.name][1] if mlp.up else y[:, m:] if mlp.joined else None
                rules[-1].weight = core.contribution(up, state.weight(mlp.down))
            elif how.kind == "predictor":
                bias = f"{site.stem}.bias"
                held = state.dense.read_finite(bias) if bias in state.dense else None
                rules[-1].train(state.weight(site), held, ctx.generator(site))
        return rules

    def _fitted(self, layers: Layers, block: int, rules: Sequence[Rule], keep: float) -> tuple[dict[str, Tensor], Record]:
        """The tensors of a layer that keeps a share, and what came of it on tokens that it was not made of."""
        read, whole = (round(layers.bytes(block, share)) for share in (keep, 1.0))
        record: Record = {"site": layers.name(block), "block": block, "keep": keep, "read": read, "whole": whole}
        if keep >= 1:
            return {}, record | {"kept": 1.0, "notes": ["reads all"]}
        found, kept, recalls, densities = dict[str, Tensor](), [], [], []
        for rule in rules:
            tensors = rule.tensors(keep)
            found |= {f"{rule.site.stem}.{suffix}": t for suffix, t in tensors.items()}
            active = rule.held(tensors)
            kept.append(float(active.float().mean()))
            if rule.how.kind == "predictor":
                recalls.append(core.recall(active, rule.y_held))
                densities.append(float((rule.y_held > 0).float().mean()))
        record["kept"] = sum(kept) / len(kept)
        said = f"keeps {keep:.0%} of its {layers.noun}, {record['kept']:.1%} on tokens held out"
        notes = [f"{said}, and reads {read / whole:.0%} of its bytes"]
        if recalls:
            record |= {"recall": recalls[0], "density": densities[0]}
            notes.append(f"{densities[0]:.1%} are positive, of which {recalls[0]:.1%} are read")
        return found, record | {"notes": notes}

    # --- a share for each layer ---

    def _allocated(self, layers: Layers, ctx: Context) -> dict[int, float]:
        """Block -> its share: the least KL in sum for the bytes that one share would read."""
        kl = self._measured(layers, ctx)
        shares = sorted(
            {1.0, self.keep, *(i / STEPS for i in range(1, STEPS) if min(self.shares) <= i / STEPS <= self.shares[1])}
        )
        items = []
        for block in layers.units:
            measured = {share: kl[f"{block}:{share:g}"] for share in self.shares if share < 1}
            damage = [core.between(measured, share) for share in shares]
            use = [[math.ceil(layers.bytes(block, share)) for share in shares]]
            items.append(allocate_core.Item(layers.name(block), damage, use))  # type: ignore[arg-type]
        most = sum(math.ceil(layers.bytes(block, self.keep)) for block in layers.units)
        solution = allocate_core.solve(allocate_core.Problem(items, [allocate_core.Limit("bytes", most)]))
        return {block: shares[choice] for block, choice in zip(layers.units, solution.choice, strict=True)}

    @property
    def shares(self) -> list[float]:
        """What a layer may keep: the usual shares, the one asked for, and one below it."""
        return sorted({*SHARES, self.keep, round(0.6 * self.keep, 4)}, reverse=True)

    def _measured(self, layers: Layers, ctx: Context) -> dict[str, float]:
        """KL (nats per token) of the model with one layer at one share, by "block:share"."""
        assert ctx.calibration is not None
        sample, state = spread(ctx.calibration, self.windows), layers.state
        of = {"version": self.version, "kind": self.kind, "rank": self.rank, "shares": self.shares, "windows": sample.hash}
        store = ctx.store.analysis("sparsity", of)
        if store.committed("kl") is None:
            stream, batches = ctx.stream(state)
            changes = []
            for block in state.graph.blocks:
                ctx.progress(block.index, 4 * len(state.graph.blocks), f"{block.module}, as it is")
                if block.index in layers.units:
                    rules = self._rules(layers, stream, state, block.index, batches, ctx)
                    changes += [Change(f"{block.index}:{share:g}", block.index, sparse_inside(rules, share))
                                for share in self.shares if share < 1]  # fmt: skip
                stream.advance(state, block.index, batches)
            del stream, batches
            found = Perturbed(state, ctx, sample).kl([], changes, ctx.part(0.25, 1.0))
            bad = next((name for name, kl in found.items() if kl is None), None)
            if bad is not None:
                raise ModelError(
                    f"with layer {bad.partition(':')[0]} sparse the model puts out what is not finite; use a larger keep"
                )
            store.commit("kl", records=[{"site": name, "kl": max(0.0, kl or 0.0)} for name, kl in found.items()])
        return {r["site"]: r["kl"] for r in store.records}
