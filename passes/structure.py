"""What each attention and MLP of a model would be with fewer units, and what that would cost: KL from the model as it is.

`allocate` chooses shapes as it chooses formats, from a table of damages that are added up. A format's damage comes from gradients
(error_table.py): its error is small, and second order says what it does. A quarter of an MLP is no small error, so here it is
measured: one sublayer at a time is replaced by what OBS makes of it at a level (obs_core.py; one sweep gives all of them), on the
inputs of the model as it is, and the KL of the whole model is taken (perturbed.py). In a trial on a small Llama the KL of shape
and bits together was their sum within a few per cent, so L sublayers at S levels are L·S measurements and not L·S·F.

The matrices are kept while they are measured, level by level of a block, and dropped: what is chosen is pruned anew, on the
inputs of the blocks that were pruned before it. Losses of outputs are no substitute: they rank sublayers no better than chance
spends the budget.

Levels are shares, rounded as `prune` rounds them, and what an architecture cannot be is left out as `prune` would refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from compress.errors import CompressError, ModelError
from compress.manager import Context, Store
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings
from compress.model.data import Tokens
from compress.model.speed import precision
from compress.passes import obs_core as core
from compress.passes.perturbed import Change, Walk, replaced, spread
from compress.passes.prune import Prune, units
from compress.passes.prune_block import Aim, Block
from compress.state import State
from compress.state.state import Part

SHAPED = 512  # tokens that levels are measured on
Share = Annotated[float, Field(gt=0, le=1)]
Where = tuple[str, int]  # kind of a coupling, block
Level = tuple[str, int, int]  # kind, block, units that stay
Damages = Mapping[Level, float]  # nats per token; 0 for what stays whole


class Structure(BaseModel):
    """What may become smaller, and by how much; 1 is always among the levels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mlp: tuple[Share, ...] = Field((1.0,), description="shares of an MLP's neurons to choose from")
    kv_groups: Literal["all"] | tuple[Share, ...] = Field(
        (1.0,), description="shares of the groups of heads to choose from; all: every number"
    )

    @field_validator("mlp", "kv_groups")
    @classmethod
    def _levels(cls, shares: Literal["all"] | tuple[float, ...]) -> Literal["all"] | tuple[float, ...]:
        return shares if shares == "all" else tuple(sorted({1.0, *shares}, reverse=True))

    def shares(self, state: State) -> dict[str, list[float]]:
        """Kind -> the shares below 1 that this model can have, each another number of units, falling."""
        groups = tuple(n / most(state) for n in range(most(state), 0, -1)) if self.kv_groups == "all" else self.kv_groups
        return {MLP: distinct(state, MLP, self.mlp), KV_GROUPS: distinct(state, KV_GROUPS, groups, self.kv_groups == "all")}


def most(state: State) -> int:
    """The number of groups of heads."""
    return next((c.units for c in couplings(state) if c.kind == KV_GROUPS), 1)


def distinct(state: State, kind: str, shares: Sequence[float], lenient: bool = False) -> list[float]:
    """Shares that come out as different numbers of units, all of them less than there are; what an architecture cannot be is
    an error, or, where any number will do, left out."""
    found: dict[int, float] = {}
    for share in (s for s in shares if s < 1):
        try:
            count = units_of(state, kind, share)
        except CompressError as e:
            if lenient:
                continue
            raise type(e)(str(e), ("structure", kind)) from None
        found.setdefault(count, share)
    return [found[count] for count in sorted(found, reverse=True)]


def units_of(state: State, kind: str, share: float) -> int:
    """How many units of a kind stay in a layer."""
    smaller = narrower({kind: share}).foresee(state)
    return next(count for (k, _), count in units(smaller).items() if k == kind)


def narrower(shares: Mapping[str, float]) -> Prune:
    """The pass that makes a model so."""
    return Prune(mlp=shares.get(MLP, 1.0), kv_groups=shares.get(KV_GROUPS, 1.0))


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Levels(Block):
    """One block, of which every level of every coupling is kept, and which is passed as it was."""

    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def cut(self, c: Coupling, H_kk: Tensor | None) -> Tensor:
        W_nk = self.state.reference(c.reader)
        problem, _ = self._problem(c, W_nk.to(self.ctx.device, torch.float32), H_kk)
        order = self._order(c, problem)
        for count in self.counts[c.kind]:
            kept = problem.kept(order[: c.units - count])
            name = f"{c.kind}:{count}"
            self.tensors[name] = core.compensate(problem, kept).to(W_nk.dtype).cpu().contiguous()
            self.tensors[f"{name}:columns"] = c.columns[kept].flatten().contiguous()
        return W_nk


def measured(state: State, ctx: Context, structure: Structure, held: Tokens) -> Damages:
    """KL of every level of every sublayer on some of the tokens that were `held` back.

    ModelError where one puts out what is not finite.
    """
    counts = {kind: [units_of(state, kind, share) for share in shares] for kind, shares in structure.shares(state).items()}
    sample = spread(held, max(1, SHAPED // held.ids.shape[1]))
    of = {"counts": {k: list(v) for k, v in counts.items()}, "tokens": sample.hash, "version": Prune.version}
    store = ctx.store.analysis("structure", of)
    if store.committed("kl") is None:
        library = ctx.store.analysis("levels", of)
        found = [c for c in couplings(state) if counts.get(c.kind)]
        parts = _levels(state, ctx.part(0.0, 0.5), counts, found, library)
        changes = [Change(f"{c.kind} {c.block} {count}", c.block, replaced(c.reader, partial(_matrix, parts[c.block], c, count)))
                   for c in found for count in counts[c.kind]]  # fmt: skip
        kl = Walk(state, ctx, sample).kl([], changes, ctx.part(0.5, 1.0))
        store.commit("kl", records=[{"site": name, "kl": x} for name, x in kl.items()])
        library.drop()
    damages: dict[Level, float] = {}
    for record in store.records:
        kind, block, count = record["site"].split()
        if record["kl"] is None:
            raise ModelError(f"with {count} units of its {kind}, layer {block} puts out what is not finite; leave that level out",
                             ("structure", kind))  # fmt: skip
        damages[kind, int(block), int(count)] = max(0.0, record["kl"])
    return damages


def _levels(
    state: State, ctx: Context, counts: Mapping[str, Sequence[int]], found: Sequence[Coupling], store: Store
) -> dict[int, Part]:
    """Block -> the matrices of its readers at each level, from one pass of the calibration text."""
    least = {(c.kind, c.block): min(counts[c.kind]) for c in found}
    options = Prune(drift=0.0)
    aim, parts = Aim(state, found, least, {}, options.norms(state)), dict[int, Part]()
    stream, batches = ctx.stream(state)
    with precision("bf16"):
        for block in state.graph.blocks[: 1 + max(c.block for c in found)]:
            ctx.progress(block.index, len(state.graph.blocks), f"levels of {block.module}")
            done, mine = store.committed(f"block-{block.index:04}"), [c for c in found if c.block == block.index]
            if done is not None or not mine:
                stream.advance(state, block.index, batches)
            else:
                work = Levels(options, state, ctx, aim, block.index, mine, None, counts=counts)
                work.see(stream, batches, None)
                done = store.commit(f"block-{block.index:04}", dense=work.tensors)
            if done is not None:
                parts[block.index] = done
    return parts


def _matrix(part: Part, c: Coupling, count: int) -> Tensor:
    """A reader's matrix [out, in] at a level, with zeros for what goes."""
    small, columns = (part.dense[f"{c.kind}:{count}{of}"].load() for of in ("", ":columns"))
    return small.new_zeros(c.reader.shape).index_copy_(1, columns, small)
