"""What each attention and MLP of a model would be with fewer units, and what that would cost: KL from the model as it is.

`allocate` chooses shapes as it chooses formats, from a table of damages that are added up. A format's damage comes from gradients
(error_table.py): its error is small, and second order says what it does. A quarter of an MLP is no small error, so here it is
measured: one sublayer at a time is replaced by what OBS makes of it at a level (obs_core.py; one sweep gives all of them), on the
inputs of the model as it is, and the KL of the whole model is taken (perturbed.py). In a trial on a small Llama the KL of shape
and bits together was their sum within a few per cent, so L sublayers at S levels are L·S measurements and not L·S·F.

The matrices are kept while they are measured, level by level of a block, and dropped: what is chosen is pruned anew, on the
inputs of the blocks that were pruned before it. Losses of outputs are no substitute: choosing by them was no better than one
share for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from compress.documents import one_line
from compress.errors import CompressError, ModelError, RecipeError
from compress.formats import Format
from compress.manager import Context, Cost, Store
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, named
from compress.model.data import BATCH, Tokens
from compress.model.speed import precision
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.passes import obs_core as core
from compress.passes.choices import fits
from compress.passes.perturbed import Change, Perturbed, replaced, silent, spread, walking
from compress.passes.prune import SOLVED, SWEEP, Prune, units
from compress.passes.prune_block import Aim, Block
from compress.passes.prune_counts import natural
from compress.state import State
from compress.state.state import Part

SHAPED = 512  # tokens that levels are measured on
Share = Annotated[float, Field(gt=0, le=1)]
Level = tuple[str, int, int]  # kind of a coupling, block, units that stay
Damages = Mapping[Level, float]  # nats per token
Counts = Mapping[str, Sequence[int]]  # kind -> units that may stay, fewer than there are, falling
EVERY = "layers.*"


def shares_or_all(value: Any) -> Any:
    """Shares, or `all`, as a recipe may have them; in words that know of both."""
    if value == "all":
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"a list of shares, such as [0.75, 0.5], or all, not {one_line(str(value), 60)}")
    odd = next((x for x in value if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x <= 1), None)
    if odd is not None or None in value:
        raise ValueError(f"a share is a number above 0 and at most 1, not {one_line(str(odd), 60)}")
    return value


class Structure(BaseModel):
    """What may become smaller, and by how much; that all stays is always a choice too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mlp: tuple[Share, ...] = Field((), description="shares of an MLP's neurons to choose from")
    kv_groups: Annotated[Literal["all"] | tuple[Share, ...], BeforeValidator(shares_or_all)] = Field(
        (), description="shares of the groups of heads to choose from; all: every number"
    )
    skip_attention: bool = Field(False, description="with shapes: free, whether a layer may be left without attention")

    @model_validator(mode="after")
    def _something(self) -> Structure:
        if not self.mlp and not self.kv_groups and not self.skip_attention:
            raise ValueError("name what may become smaller: mlp: [0.75, 0.5], kv_groups: all")
        return self

    def counts(self, state: State, formats: Sequence[Format], free: bool) -> dict[str, list[int]]:
        """The numbers of units that layers of this model may have; `free`: not all of them the same."""
        found, shares = dict[str, list[int]](), {MLP: self.mlp, KV_GROUPS: self.kv_groups}
        for kind, wanted in shares.items():
            if wanted:
                try:
                    found[kind] = sorted(set(levels(state, kind, wanted, formats, free)), reverse=True)
                except CompressError as e:
                    raise type(e)(str(e), ("structure", kind)) from None
        if self.skip_attention:
            found.setdefault(KV_GROUPS, []).append(self._skipped(state, free))
        if not any(found.values()):
            raise RecipeError(f"with these shares '{state.graph.family}' has nothing that may become smaller; name smaller ones, "
                              "or leave 'structure' out", ("structure",))  # fmt: skip
        return found

    def numbers(self, state: State) -> dict[str, int]:
        """At most how many levels there are of each kind, for estimates; also of a state that is smaller by now."""
        groups = max((c.units for c in couplings(state) if c.kind == KV_GROUPS), default=1)
        found = {MLP: len([s for s in self.mlp if s < 1]),
                 KV_GROUPS: groups - 1 if self.kv_groups == "all" else len([s for s in self.kv_groups if s < 1])}  # fmt: skip
        found[KV_GROUPS] += self.skip_attention
        return {kind: n for kind, n in found.items() if n}

    def _skipped(self, state: State, free: bool) -> int:
        """No group of heads at all, where that can be."""
        at = ("structure", "skip_attention")
        if not free:
            raise RecipeError("layers without attention differ from the others; use shapes: free, "
                              "or leave skip_attention out", at)  # fmt: skip
        try:
            first = next((c.block for c in couplings(state) if c.kind == KV_GROUPS), 0)
            made_of({KV_GROUPS: {f"layers.{first}.*": 0}}).foresee(state)
        except CompressError as e:
            raise type(e)(str(e), at) from None
        return 0


def levels(
    state: State, kind: str, shares: Literal["all"] | Sequence[float], formats: Sequence[Format], free: bool
) -> Iterator[int]:
    """The numbers that shares come to, rounded as `prune` rounds them and to what the formats divide; ModelError where an
    architecture has none. Of all numbers, those that it has."""
    mine = [c for c in couplings(state) if c.kind == kind]
    had = {c.units for c in mine}
    if len(had) > 1:
        raise ModelError(f"layers of '{state.graph.family}' differ in their {named(kind)}; leave '{kind}' out")
    if shares == "all":
        yield from allowed(state, kind, f"layers.{mine[0].block}.*" if free and mine else EVERY, max(had, default=1))
        return
    smaller_ones, all_of_them = False, None
    for share in (s for s in shares if s < 1):
        try:
            smaller = made_of({kind: share}, multiple(state, formats) if kind == MLP else None).foresee(state)
        except RecipeError as e:  # rounded up it takes nothing away, which is a choice in any case
            all_of_them = e
            continue
        smaller_ones = True
        yield next(count for (k, _), count in units(smaller).items() if k == kind)
    if all_of_them is not None and not smaller_ones:
        raise all_of_them


def allowed(state: State, kind: str, where: str, had: int) -> Iterator[int]:
    """The numbers of units, below those that there are, that an architecture has in some layers."""
    for count in range(1, had):
        with suppress(ModelError):
            made_of({kind: {where: count}}).foresee(state)
            yield count


def made_of(stays: Mapping[str, Any], multiple: int | None = None) -> Prune:
    """The pass that leaves so much of each kind."""
    return Prune(mlp=stays.get(MLP, 1.0), kv_groups=stays.get(KV_GROUPS, 1.0), multiple=multiple)


def multiple(state: State, formats: Sequence[Format]) -> int:
    """What numbers of neurons are rounded up to: what engines want, and what every format divides that fits the whole matrix."""
    reader = next((c.reader for c in couplings(state) if c.kind == MLP), None)
    if reader is None:
        return 1
    out, width = reader.shape
    wanted = [f for f in formats if fits(f, (out, width))]
    step = natural(width)
    return next((n for n in range(step, width, step) if all(fits(f, (out, n)) for f in wanted)), step)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Levels(Block):
    """One block, of which every level of every coupling is kept, and which is passed as it was."""

    counts: Counts = field(default_factory=dict)

    def cut(self, c: Coupling, H_kk: Tensor | None) -> Tensor:
        W_nk = self.state.reference(c.reader)
        problem, _ = self._problem(c, W_nk.to(self.ctx.device, torch.float32), H_kk)
        order = self._order(c, problem)
        for count in some(self.counts[c.kind]):
            kept = problem.kept(order[: c.units - count])
            name = f"{c.kind}:{count}"
            self.tensors[name] = core.compensate(problem, kept).to(W_nk.dtype).cpu().contiguous()
            self.tensors[f"{name}:columns"] = c.columns[kept].flatten().contiguous()
        return W_nk


def measured(state: State, ctx: Context, counts: Counts, held: Tokens) -> Damages:
    """KL of every level of every sublayer on some of the tokens that were `held` back.

    ModelError where one puts out what is not finite.
    """
    sample = spread(held, max(1, SHAPED // held.ids.shape[1]))
    of = {"counts": {k: list(v) for k, v in counts.items()}, "tokens": sample.hash, "version": Prune.version}
    store = ctx.store.analysis("structure", of)
    if store.committed("kl") is None:
        library = ctx.store.analysis("levels", of)
        found = [c for c in couplings(state) if counts.get(c.kind)]
        parts = _levels(state, ctx.part(0.0, 0.5), counts, found, library)
        changes = [Change(f"{c.kind} {c.block} {count}", c.block,
                          replaced(c.reader, partial(_matrix, parts[c.block], c, count)) if count else silent([c.reader]))
                   for c in found for count in counts[c.kind]]  # fmt: skip
        kl = Perturbed(state, ctx, sample).kl([], changes, ctx.part(0.5, 1.0))
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


def cost(state: State, numbers: Mapping[str, int], tokens: int) -> Cost:
    """What `measured` takes on so many calibration tokens: a forward pass, a sweep and a solution of every level for each reader,
    and the walk over all changes."""
    found = [c for c in couplings(state) if c.kind in numbers]
    if not found or not tokens:
        return Cost()
    blocks, sample = len(state.graph.blocks), min(SHAPED, tokens)
    passes = blocks + sum(numbers[c.kind] * (blocks - c.block) for c in found)
    changes = sum(numbers[c.kind] for c in found)
    walk = walking(state, sample, max(1, sample // BATCH), passes, changes + 1, changes)
    work, shapes = per_token(state), [(*c.reader.shape, numbers[c.kind]) for c in found]
    exact = sum(1.0 * tokens * k * k + SWEEP * k**3 + s * (k**3 / 3 + 2.0 * n * k * k) for n, k, s in shapes)
    solved = max(SOLVED * k * k + (8 + 2 * s) * n * k for n, k, s in shapes)
    peak = waiting_bytes(state, tokens, 1) + block_bytes(state) + solved
    return replace(walk, model_flops=walk.model_flops + 2.0 * tokens * work.weights, exact_flops=exact,
                   numbers=walk.numbers + tokens * work.numbers, peak_bytes=max(walk.peak_bytes, peak))  # fmt: skip


def _levels(state: State, ctx: Context, counts: Counts, found: Sequence[Coupling], store: Store) -> dict[int, Part]:
    """Block -> the matrices of its readers at each level, from one pass of the calibration text."""
    found = [c for c in found if some(counts[c.kind])]
    if not found:
        return {}
    least = {(c.kind, c.block): min(some(counts[c.kind])) for c in found}
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


def some(counts: Sequence[int]) -> list[int]:
    """Those that leave something: without any unit nothing is solved."""
    return [count for count in counts if count]


def _matrix(part: Part, c: Coupling, count: int) -> Tensor:
    """A reader's matrix [out, in] at a level, with zeros for what goes."""
    small, columns = (part.dense[f"{c.kind}:{count}{of}"].load() for of in ("", ":columns"))
    return small.new_zeros(c.reader.shape).index_copy_(1, columns, small)
