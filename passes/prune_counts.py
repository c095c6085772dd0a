"""How many units stay in each layer: what the options `mlp` and `kv_groups` of `prune` ask for, and what a family allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator
from pydantic_core import PydanticKnownError

from compress.errors import MatchError, ModelError, RecipeError
from compress.model.absent import lacking
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, named, without
from compress.state import State

WIDE = 1024  # neurons from which engines want multiples of 128
Counts = dict[str, dict[int, int]]  # kind -> block -> how many of its units stay; blocks that keep all are not named


def amount(value: Any) -> Any:
    """A share, or shares and numbers by pattern, as a recipe may have them; what is none of these is an error of pydantic's."""
    if isinstance(value, dict):
        for pattern, one in value.items():
            share = type(one) is float and 0 < one <= 1
            if not share and not (type(one) is int and one >= 0):
                raise ValueError(f"'{pattern}' is {one!r}; a share is more than 0 and at most 1.0, a whole number is so many")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticKnownError("float_type")
    if not value > 0:
        raise PydanticKnownError("greater_than", {"gt": 0})
    if value > 1:
        raise PydanticKnownError("less_than_equal", {"le": 1})
    return float(value)


Stays = Annotated[float | dict[str, int | float], BeforeValidator(amount)]


def cuts(stays: float | Mapping[str, int | float]) -> bool:
    """Whether an option may take something away."""
    if isinstance(stays, Mapping):
        return any(type(one) is int or one < 1 for one in stays.values())
    return stays < 1


def as_before(state: State, kind: str, stays: float | Mapping[str, int | float]) -> Iterator[tuple[int, int]]:
    """The shapes [outputs, inputs] that the readers of a kind had before they came to what a foreseen state says. For estimates:
    where layers go by patterns it is not known, and taken for the widest that is left."""
    readers = [c.reader for c in couplings(state) if c.kind == kind]
    widest = max((reader.shape[1] for reader in readers), default=0)
    for reader in readers:
        yield reader.shape[0], widest if isinstance(stays, Mapping) else round(reader.shape[1] / stays)


def differing(name: str) -> str:
    """What a step says of a model whose layers differ in shape."""
    return (f"{name}: layers differ in shape; native (where compress-pipeline is installed) and onnx load that, and stock "
            "transformers, vLLM and llama.cpp do not")  # fmt: skip


def natural(units: int) -> int:
    """What the number of neurons is rounded up to: what formats and engines divide them by."""
    most = 128 if units >= WIDE else 32
    step = 1
    while step < most and units % (2 * step) == 0:
        step *= 2
    return step


def wanted(state: State, kind: str, stays: float | Mapping[str, int | float], multiple: int | None) -> dict[int, int]:
    """Block -> how many units of a kind stay, of all blocks that lose some; RecipeError or ModelError where none can."""
    mine = [c for c in couplings(state) if c.kind == kind]
    if not mine:
        raise ModelError(f"'{state.graph.family}' has no {named(kind)} that 'prune' knows; leave '{kind}' out", (kind,))
    asked = list(by_pattern(state, kind, stays, mine)) if isinstance(stays, Mapping) else [(c, stays) for c in mine]
    odd = next((c for c, _ in asked if c.obstacle), None)
    if odd is not None:
        raise ModelError(f"{named(kind)} of '{state.graph.family}' cannot go: {odd.obstacle}; leave '{kind}' out", (kind,))
    steps = {c.block: 1 if kind == KV_GROUPS else multiple or natural(c.units) for c, _ in asked}
    left = {c.block: rounded(c, one, steps[c.block]) for c, one in asked}
    found = {c.block: left[c.block] for c, _ in asked if left[c.block] < c.units}
    if not found:
        if isinstance(stays, Mapping):
            raise RecipeError(
                f"every layer keeps all {named(kind)}, with shares rounded up; leave '{kind}' out, or cut more", (kind,)
            )
        had, step = asked[0][0].units, steps[asked[0][0].block]
        raise RecipeError(f"{stays:g} of {had} {named(kind)}, rounded up to {step}s, are all of them", (kind,))
    return found


def by_pattern(
    state: State, kind: str, stays: Mapping[str, int | float], mine: Sequence[Coupling]
) -> Iterator[tuple[Coupling, int | float]]:
    """The couplings that patterns of sites name, and what the last one that names it says of each."""
    said: dict[int, int | float] = {}
    for pattern, one in stays.items():
        try:
            sites = {site.weight for site in state.graph.match(pattern)}
        except MatchError as e:
            raise MatchError(str(e), (kind, pattern)) from None
        blocks = [c.block for c in mine if sites & {c.reader.weight, *c.cuts}]
        if not blocks:
            raise MatchError(f"pattern '{pattern}' names no {named(kind)}", (kind, pattern))
        said |= dict.fromkeys(blocks, one)
    yield from ((c, said[c.block]) for c in mine if c.block in said)


def rounded(c: Coupling, stays: int | float, step: int) -> int:
    """How many units of a coupling stay: a share rounded up to steps, a number as it is."""
    if type(stays) is not int:
        return min(c.units, max(1, -int(-c.units * stays // step)) * step)
    if stays > c.units:
        raise RecipeError(f"layer {c.block} has {c.units} {named(c.kind)}, not {stays}", (c.kind,))
    return stays


def fitted(state: State, counts: Counts, fixed: bool) -> State:
    """The state with so many units left, and without sublayers of which none is to be left. Where an architecture does not allow
    a number of groups of heads that a share came to, and none of them is `fixed`, the next larger one that it allows is taken;
    ModelError where there is none."""
    gone = {kind: [block for block, count in held.items() if count == 0] for kind, held in counts.items()}
    if any(gone.values()):
        left = {kind: {block: count for block, count in held.items() if count} for kind, held in counts.items()}
        counts = {kind: held for kind, held in left.items() if held}
        return lacking(fitted(state, counts, fixed) if counts else state, gone)
    found = losing(state, counts)
    try:
        return without(state, found, counts)
    except ModelError as e:
        if fixed or KV_GROUPS not in counts:
            raise ModelError(str(e), (next(iter(counts)) if len(counts) == 1 else MLP,)) from None
    groups = {c.block: c.units for c in found if c.kind == KV_GROUPS}
    allowed = dict[int, int]()
    for had, count in {(groups[block], count) for block, count in counts[KV_GROUPS].items()}:
        blocks = [block for block, n in counts[KV_GROUPS].items() if (groups[block], n) == (had, count)]
        allowed |= dict.fromkeys(blocks, next_allowed(state, found, blocks, range(count, had)))
    return without(state, found, {**counts, KV_GROUPS: allowed})


def next_allowed(state: State, found: Sequence[Coupling], blocks: Sequence[int], numbers: range) -> int:
    """The first of some numbers of groups of heads that an architecture allows in some blocks."""
    mine, refused = [c for c in found if c.kind == KV_GROUPS and c.block in blocks], list[str]()
    for count in numbers:
        try:
            without(state, mine, {KV_GROUPS: dict.fromkeys(blocks, count)})
            return count
        except ModelError as e:
            refused.append(str(e))
    raise ModelError(refused[0], (KV_GROUPS,))


def losing(state: State, counts: Counts) -> list[Coupling]:
    """The couplings that lose units."""
    return [c for c in couplings(state) if c.block in counts.get(c.kind, {})]
