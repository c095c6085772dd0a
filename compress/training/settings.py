"""Which settings of `memory:` a training can have, what each takes, and the one that is taken where a recipe leaves that open.

The order in which settings are tried: first by optimizer (`ORDER`): AdamW, AdamW in bytes, which wins back as much of a lost KL
on the same data and steps, and AdaLomo, which won back no less and remembers next to nothing (docs/distillation.md has the
table). All others remember more than the one or win back less than the other. Of each optimizer the quickest way that fits and
changes no gradient (`QUICK`), gradients kept before fused. A byte for each number kept costs about what running a block again
does, and rounds; sketches, and directions in place of gradients, are never taken by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from compress.errors import RecipeError
from compress.state import State
from compress.state.plan import size
from compress.training import memory
from compress.training.choice import Choice, Learnt, learnt
from compress.training.limits import parsed
from compress.training.memory import Setting, Split
from compress.training.options import Block, Fused, Galore, Lomo, Memory, Named, Velora, WtaCrs, ZerothOrder, named

ORDER = ("adamw", "adamw8bit", "adalomo")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "galore", "galore8bit", "block", "adalomo", "lomo")
SLOPES = ("kept", "fused")
QUICK: tuple[str | tuple[str, ...], ...] = ("kept", "checkpoint", ("checkpoint", "offload"))
ACTIVATIONS: tuple[str | tuple[str, ...], ...] = (
    "kept", "int8", "velora", "wta_crs", "offload", "checkpoint", ("checkpoint", "int8"), ("checkpoint", "offload"),
)  # fmt: skip


def refusal(state: State, choice: Choice, setting: Setting) -> tuple[str, str] | None:
    """Why a setting is none for what is trained, and which option says so; None where it is one."""
    what, chosen = learnt(state, choice), setting.memory
    layers = [s for s in state.graph if s.block is not None and s.expert is None and not s.transposed and choice.kind(s)]
    if isinstance(chosen.slopes, Fused) and setting.batch > setting.together:
        return (f"a step of {setting.batch} windows of {setting.length} tokens adds up the gradients of parts, and fused ones "
                f"are used up at once; use batch: {setting.together}, or gradients: kept", "gradients")  # fmt: skip
    if isinstance(chosen.by, Galore) and (why := _of_subspaces(what, chosen.by)):
        return why, "optimizer"
    if isinstance(chosen.by, Block):
        return _of_blocks(state, choice, chosen.by)
    if any(isinstance(way, Velora | WtaCrs) for way in chosen.keeps) and not layers:
        return "no matrix of a linear layer learns, so none keeps its input; use activations: checkpoint", "activations"
    if chosen.weights == "streamed" and all(not memory.reads(state, choice, s) for s in state.graph):
        return "every matrix learns, and those stay in memory; leave weights: streamed out", "weights"
    return None


def _of_subspaces(what: Sequence[Learnt], by: Galore) -> str | None:
    most = max((min(one.shape) for one in what if one.matrix), default=None)
    if most is None:
        return ("'galore' projects the gradients of whole matrices, and no matrix of a block learns its weights; use optimizer: "
                "adamw8bit")  # fmt: skip
    if by.rank is not None and by.rank > most:
        return f"'galore': rank {by.rank} is more than any matrix has; ask for {most} or less"
    return None


def _of_blocks(state: State, choice: Choice, by: Block) -> tuple[str, str] | None:
    count = len({one.block for one in learnt(state, choice) if one.block is not None})
    if not count:
        return "'block' trains some blocks at a time, and nothing in a block learns; use optimizer: adamw", "optimizer"
    if by.active > count:
        return f"'block' is to train {by.active} blocks at a time, and {count} learn; use active: {count} or fewer", "optimizer"
    if by.select == "damage" and damage(state) is None:
        return (
            "'select: damage' goes by what 'allocate' found, and no step before this one allocates; use select: gradnorm",
            "optimizer",
        )
    return None


def damage(state: State) -> dict[int, float] | None:
    """What an allocation is expected to cost in each block; None where there was none."""
    if state.plan is None or state.plan.forecast is None:
        return None
    blocks = {site.name: site.block for site in state.graph}
    found: dict[int, float] = {}
    for name, cost in state.plan.forecast.damage.items():
        block = blocks.get(name)
        if block is not None:
            found[block] = found.get(block, 0.0) + max(0.0, cost)
    return found


# --- the choice -------------------------------------------------------------------------------------------------------


def settled(state: State, choice: Choice, setting: Setting) -> tuple[Setting, Split]:
    """The setting with nothing left open, and what it takes. RecipeError where it is none, or is above the limit."""
    chosen = setting.memory
    why = refusal(state, choice, setting)
    if chosen.limit is None or (why is not None and why[1] in chosen.model_dump(exclude_none=True)):
        if why is not None:
            raise RecipeError(why[0], ("memory", why[1]))
        return setting, memory.split(state, choice, setting)
    most = parsed(chosen.limit)
    for other in candidates(setting):
        if refusal(state, choice, other) is None and (found := memory.split(state, choice, other)).total <= most:
            return other, found
    raise too_much(state, choice, setting, most)


def candidates(setting: Setting) -> Iterator[Setting]:
    """Settings that say what a recipe leaves open, the best first."""
    given = setting.memory
    if isinstance(given.slopes, ZerothOrder):
        yield setting
        return
    optimizers = ORDER if given.optimizer is None else (given.optimizer,)
    for by in optimizers:
        for keeps in QUICK if given.activations is None else (given.activations,):
            for slopes in SLOPES if given.gradients is None else (given.gradients,):
                yield replace(
                    setting,
                    memory=Memory(optimizer=by, gradients=slopes, activations=keeps, weights=given.weights, limit=given.limit),
                )


def too_much(state: State, choice: Choice, setting: Setting, most: int) -> RecipeError:
    """That nothing that a recipe allows fits its limit, and what else would."""

    def fits(other: Setting) -> bool:
        return refusal(state, choice, other) is None and memory.split(state, choice, other).total <= most

    found = memory.split(state, choice, setting)
    todo = next((f"{'; '.join(words)} would fit" for words, other in others(setting) if fits(other)),
                "no other setting would fit; train less (lora, scales, norms, patterns), or from shorter windows")  # fmt: skip
    return RecipeError(
        f"training takes {memory.told(found)}, above the limit of {setting.memory.limit}; {todo}", ("memory", "limit")
    )


def others(setting: Setting) -> Iterator[tuple[list[str], Setting]]:
    """Settings that a recipe could have instead, those that change least first, and what it would say."""
    given, batches = setting.memory, [setting.batch]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    teachers = (setting.teacher,) if "hidden_cosine" in setting.loss else tuple(dict.fromkeys((setting.teacher, "cached")))
    for weights, batch, teacher in itertools.product(dict.fromkeys((given.weights, "streamed")), batches, teachers):
        free = Memory(weights=weights, limit=given.limit)
        start = replace(
            setting, memory=free, teacher=teacher, batch=batch, together=min(setting.together, batch or setting.together)
        )
        words = [f"teacher: {teacher}"] * (teacher != setting.teacher) + [f"batch: {batch}"] * (batch != setting.batch)
        words += [f"weights: {weights}"] * (weights != given.weights)
        for other in candidates(start):
            differs = said(other.memory, given)
            yield [*words, *([differs] if differs else [])], other


def said(chosen: Memory, instead: Memory | None = None) -> str:
    """A setting in a recipe's words; beside another one only what differs."""

    def words(of: Memory) -> dict[str, str]:
        forward = isinstance(of.slopes, ZerothOrder)
        usual = {
            "optimizer": "lomo" if forward else "adamw",
            "gradients": "kept",
            "activations": "kept" if forward else "checkpoint",
        }
        return {name: short(getattr(of, name)) or usual[name] for name in usual}

    found, other = words(chosen), words(instead) if instead else {}
    return ", ".join(f"{name}: {text}" for name, text in found.items() if text != other.get(name))


def short(given: Named | tuple[str, ...] | None) -> str:
    return "" if given is None else f"[{', '.join(given)}]" if isinstance(given, tuple) else named(given)


# --- the table --------------------------------------------------------------------------------------------------------


def products(setting: Setting) -> float:
    """How often a token goes through the blocks in a step, a forward pass being 1 and the way back 2."""
    chosen = setting.memory
    if setting.forward:
        return 2
    once = 4 if setting.again else 3
    if isinstance(chosen.by, Block) and chosen.by.select == "gradnorm":
        return once * (1 + 1 / chosen.by.interval)
    return once * (2 if isinstance(chosen.by, Lomo) and isinstance(chosen.slopes, Fused) else 1)


def table(state: State, choice: Choice, setting: Setting) -> str:
    """What every combination takes, a line for each optimizer and kind of gradients, a column for what is kept of activations,
    those within the limit marked. Time is in forward passes; that of the optimizer's own numbers comes on top."""
    limit = parsed(setting.memory.limit or "0")
    rows = [["", "gradients", "optimizer", *map(short, ACTIVATIONS)]]
    ways = [(by, slopes) for by in OPTIMIZERS for slopes in SLOPES] + [("lomo", "zeroth_order")]
    for by, slopes in ways:
        found: dict[str, str] = {}
        for keeps in ACTIVATIONS if slopes != "zeroth_order" else ("kept",):
            other = replace(
                setting, memory=Memory(optimizer=by, gradients=slopes, activations=keeps, weights=setting.memory.weights)
            )
            if refusal(state, choice, other) is None:
                split = memory.split(state, choice, other)
                found[short(keeps)] = f"{size(split.total)} x{products(other):.3g}{'*' if split.total <= limit else ' '}"
        if found:
            rows.append(
                [f"{by}, {slopes}", size(split.gradients), size(split.optimizer), *(found.get(c, "") for c in rows[0][3:])]
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([f"what other settings take, and forward passes of a step (* fits {setting.memory.limit}):", *lines])
