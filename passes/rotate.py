"""The pass `rotate`: turn what flows through a model, and everything that reads and writes it, so that matrices quantize better.

Two orthogonal matrices that change nothing a model computes (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406):

    R1, of the residual stream: E R1 for the embedding, W R1 for whatever reads the stream behind a norm, R1ᵀ W for whatever
        writes into it. A norm divides by a length, which R1 does not change, but its weight does not commute with R1: first it
        goes into its readers, W diag(offset + weight), and is 1 from then on.
    R2, of the values of each group of heads: R2ᵀ W_v for the rows of a head, W_o R2 for the inputs that come of it. Attention
        mixes tokens, never the numbers of a head.

Outliers in inputs are spread over many, and the weights of a matrix become alike, so one scale serves more of them. Nothing is
left to do when the model runs, unlike in formats that rotate (`int4:g64:r128`), which do more: also the inputs of o and down,
both sides of each matrix by itself, and where this cannot go.

That is wherever something acts on the stream number by number: norms on what is added to it (Gemma 2 and 3), a head that shares
the embedding's matrix (which has no norm in front), norms that subtract a mean, positions that are added from a table of their
own, streams that are not behind a norm. It is read off the architecture (model/feeds.py), and at the end the logits of both
models are compared. Turned weights are computed in fp64 and stored once in the checkpoint's dtype, so a model in bf16 changes by
that rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.formats.rotated import hadamard, signs
from compress.manager import Context, Cost, Pass
from compress.model.feeds import feeds, norms, norms_behind, rows
from compress.model.stream import Stream
from compress.shapes import of_layer
from compress.state import Aspect, Fact, State
from compress.state.graph import Feed, Site, total

WRITERS = ("o", "down")
SAME = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}  # of the largest logit
COMPARED = (2, 16)  # windows and tokens of each


class Rotate(Pass):
    """Turn the residual stream and the values of heads by orthogonal matrices, merged into the weights."""

    name: ClassVar[str] = "rotate"
    needs: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.WEIGHTS

    kind: Literal["hadamard", "random"] = Field(
        "hadamard", description="hadamard: with signs, in blocks of the largest power of two; random: any orthogonal matrix"
    )
    stream: bool = Field(True, description="turn the residual stream (R1)")
    heads: bool = Field(True, description="turn the values of each group of heads (R2)")

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not self.stream and not self.heads:
            raise RecipeError("'rotate' is to turn nothing; let stream or heads be true, or leave it out")

    def foresee(self, state: State) -> State:
        if state.plan is not None:
            raise RecipeError("an earlier step has planned formats for the weights as they are; move 'rotate' in front of it")
        if self.stream and (why := obstacle(state)):
            todo = "use formats that rotate, such as int4:g64:r128"
            todo = f"set stream: false to turn heads alone, or {todo}" if self.heads else todo
            raise ModelError(f"the residual stream of '{state.graph.family}' cannot be turned: {why}; {todo}", ("stream",))
        if self.heads and not any(why == "" for _, why in attentions(state)):
            why = next((why for _, why in attentions(state)), "there is none")
            raise ModelError(
                f"no attention of '{state.graph.family}' can have its values turned: {why}; set heads: false", ("heads",)
            )
        return state

    def remarks(self, state: State, foreseen: State) -> Iterator[str]:
        odd = [(site, why) for site, why in attentions(state) if why] if self.heads else []
        if odd:
            yield f"rotate leaves the values behind {len(odd)} matrices as they are, such as '{odd[0][0].name}': {odd[0][1]}"

    def cost(self, state: State, tokens: int) -> Cost:
        sites = [*state.graph]
        widest = max(s.numel for s in sites)
        flops = sum(2.0 * s.numel * self._side(s.shape[1]) for s in sites)
        block = max((total(state.graph.of_block(b.index)) for b in state.graph.blocks), default=0)
        return Cost(exact_flops=2 * flops, peak_bytes=8 * block + 24 * widest, weights=total(sites))

    def _side(self, n: int) -> int:
        return n if self.kind == "random" else n & -n

    def run(self, state: State, ctx: Context) -> State:
        before, work = state, Turning(self, state, ctx)
        parts = {"tables": None} | {f"block-{b.index:04}": b.index for b in state.graph.blocks}
        for i, (part, index) in enumerate(parts.items()):
            ctx.progress(i, len(parts), part)
            done = ctx.store.committed(part)
            if done is None:
                done = ctx.store.commit(part, dense=work.tables() if index is None else work.block(index))
            state = state.with_part(done)
        off = apart(before, state, ctx.device)
        record = {"site": "layers", "notes": [f"logits off by {off:.1e} of the largest"]}
        ctx.say(record)
        if not off <= SAME[before.dtype]:
            raise ModelError(
                f"turned weights change what '{state.graph.family}' computes, by {off:.1%} of its largest logit: "
                "something acts on its stream or its values that is not known here; set stream or heads to false"
            )
        ctx.store.commit("compared", records=[record])
        return state


# --- what can be turned ----------------------------------------------------------------------------------------------------


def obstacle(state: State) -> str:
    """Why the residual stream cannot be turned; empty where it can."""
    graph, width = state.graph, state.graph["embed"].shape[1]
    if any(site.tied for site in graph):
        return (
            "its head shares the embedding's matrix, and only one of them has a norm in front; put 'edit: {untie: true}' before"
        )
    fed, every, within = feeds(state), norms(state), inner(state)
    known = {feed.weight: feed for feed in fed.values()}
    for path, norm in every.items():
        if norm.weight in within:
            continue
        if norm.centred:
            return f"'{path}' subtracts a mean"
        if norm.weight not in known:
            return f"'{path}' acts on what is added to it"
        if why := known[norm.weight].obstacle:
            return why
    unfed = next((s for s in graph if s.role not in (*WRITERS, "embed") and (s.block, s.input_key) not in fed), None)
    if unfed is not None:
        return f"'{unfed.name}' reads it behind no norm"
    turned = {*known, *(name for feed in fed.values() for name in feed.others), *(f"{s.stem}.bias" for s in graph)}
    odd = next((n for n, shape in graph.parameters.items() if n not in turned and shape[-1:] == (width,)), None)
    return f"'{odd}' is added to it or acts on it" if odd else ""


def inner(state: State) -> set[str]:
    """The weights of norms that lie within a block, and not on the stream: those of heads, and of what a matrix puts out that
    does not write into it, as in attentions by latents."""
    width = state.graph["embed"].shape[1]
    behind = {norm.weight for site, norm in norms_behind(state).items() if state.graph[site].role not in (*WRITERS, "embed")}
    return behind | {n.weight for n in norms(state).values() if state.dense.specs[n.weight].shape != (width,)}


def attentions(state: State) -> list[tuple[Site, str]]:
    """The matrices behind attentions, each with why the values in front of it cannot be turned; empty where they can."""
    found, behind = [], norms_behind(state)
    values = rows(state)
    for site in state.graph.linear:
        if site.role == "o":
            source = values[site.block, site.input_key]
            normed = source.site in behind
            why = f"a norm acts on what '{source.site}' puts out" if normed else source.obstacle
            found.append((site, why or gate(state, site)))
    return found


def gate(state: State, o: Site) -> str:
    """What tells of a gate on the inputs of o, number by number; empty where nothing does."""
    config, q = of_layer(state.config.get_text_config(), int(o.block or 0)), f"{o.name.rpartition('.')[0]}.q"
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or o.shape[1] // heads
    gated = q in state.graph.sites and state.graph[q].shape[0] == 2 * heads * width
    return f"half of '{q}' is a gate on them" if gated else ""


# --- turning ---------------------------------------------------------------------------------------------------------------


class Turning:
    """Turned tensors of a model, a block at a time, by their names in the checkpoint."""

    def __init__(self, options: Rotate, state: State, ctx: Context):
        self.options, self.state, self.ctx = options, state, ctx
        width = state.graph["embed"].shape[1]
        self.R1 = self._matrix(width, state.graph["embed"]) if options.stream else None
        within = inner(state) if options.stream else set()
        self.feeds = {key: feed for key, feed in feeds(state).items() if feed.weight not in within} if options.stream else {}
        self.values = {site.name: values for site, why in attentions(state) if not why and options.heads
                       if (values := rows(state)[site.block, site.input_key])}  # fmt: skip

    def _matrix(self, n: int, site: Site) -> Tensor:
        """An orthogonal matrix, fp64: [n, n], or of the blocks of n."""
        if self.options.kind == "hadamard":
            side = n & -n
            return signs(0, side).double()[:, None] * hadamard(torch.eye(side, dtype=torch.float64), side)
        drawn = torch.randn(n, n, generator=self.ctx.generator(site), dtype=torch.float64)
        Q, R = torch.linalg.qr(drawn)
        turn: Tensor = Q * R.diagonal().sign()
        return turn

    def tables(self) -> dict[str, Tensor]:
        """Embedding, head, and the norm in front of the head."""
        if self.R1 is None:
            return {}
        outside = [s for s in self.state.graph if s.block is None]
        matrices = {s.name: self._read(s) for s in outside if s.role != "embed"}
        embed = next(s for s in outside if s.role == "embed")
        matrices[embed.name] = right(self.state.reference(embed).double(), self.R1)
        return self.state.stored(matrices) | self._unit({f.weight: f for key, f in self.feeds.items() if key[0] is None})

    def block(self, index: int) -> dict[str, Tensor]:
        """All that changes in a block."""
        sites, others, dense = self.state.graph.of_block(index), dict[str, Tensor](), self.state.dense
        matrices = {s.name: self._read(s) if s.role not in WRITERS else self.state.reference(s).double() for s in sites}
        for site in sites:
            if site.name in self.values:
                self._turn_values(site, matrices, others)
        for site in sites:
            if self.R1 is not None and site.role in WRITERS:
                matrices[site.name] = right(matrices[site.name].T, self.R1).T
                if (bias := f"{site.stem}.bias") in dense:
                    others[bias] = right(dense.read_finite(bias).double()[None], self.R1)[0]
        mine = {f.weight: f for key, f in self.feeds.items() if key[0] == index}
        stored = {name: t.to(dense.specs[name].dtype) for name, t in others.items()}
        return self.state.stored(matrices) | stored | self._unit(mine)

    def _read(self, site: Site) -> Tensor:
        """A matrix that reads the stream, with the norm in front of it folded in, turned; any other as it is."""
        W_nk = self.state.reference(site).double()
        if self.R1 is None or (site.block, site.input_key) not in self.feeds:
            return W_nk
        return right(W_nk * self._weight(self.feeds[site.block, site.input_key]), self.R1)

    def _weight(self, feed: Feed) -> Tensor:
        assert feed.offset is not None, "else there is an obstacle"
        return feed.offset + self.state.dense.read_finite(feed.weight).double()

    def _unit(self, found: dict[str, Feed]) -> dict[str, Tensor]:
        """Norms that only divide from now on, and what else reads them, such as routers."""
        dense, out = self.state.dense, dict[str, Tensor]()
        for name, feed in found.items():
            assert feed.offset is not None, "else there is an obstacle"
            assert self.R1 is not None
            out[name] = torch.full_like(dense.read(name), 1 - feed.offset)
            for other in feed.others:
                turned = right(dense.read_finite(other).double() * self._weight(feed), self.R1)
                out[other] = turned.to(dense.specs[other].dtype)
        return out

    def _turn_values(self, site: Site, matrices: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """The rows of v that become the inputs of o, head by head, and those inputs."""
        source, config = self.values[site.name], self.state.config.get_text_config()
        heads = of_layer(config, int(site.block or 0)).num_attention_heads
        width = site.shape[1] // heads
        R2 = self._matrix(width, site)
        matrices[site.name] = right(matrices[site.name], R2)
        W_v, bias = matrices[source.site], f"{self.state.graph[source.site].stem}.bias"
        held = self.state.dense.read_finite(bias).double() if bias in self.state.dense else None
        for at in source.rows.view(heads, width).unique(dim=0):
            W_v[at] = right(W_v[at].T, R2).T
            if held is not None:
                held[at] = right(held[at][None], R2)[0]
        if held is not None:
            others[bias] = held


def right(X_nk: Tensor, R_bb: Tensor) -> Tensor:
    """X R by blocks of the inputs."""
    found: Tensor = (X_nk.unflatten(-1, (-1, len(R_bb))) @ R_bb).flatten(-2)
    return found


def apart(before: State, after: State, device: str) -> float:
    """How far the logits of some tokens are apart in two models, of the largest; in fp32."""
    ids = torch.randint(before.graph["embed"].shape[0], COMPARED, generator=torch.Generator().manual_seed(0))
    found = []
    for state in (before, after):
        stream = Stream(state, device, dtype=torch.float32)
        batches = stream.start(state, [ids])
        for block in state.graph.blocks:
            stream.advance(state, block.index, batches)
        found.append(torch.cat([z.float().cpu() for z in stream.logits(state, batches)]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())
