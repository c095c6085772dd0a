"""What of a state's model learns: a table of its matrices and other tensors, from a recipe's words, before a weight is read."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from compress.errors import MatchError, RecipeError, did_you_mean
from compress.formats import Can, Dense, Factored, LowRank, Served
from compress.formats.formats import Format
from compress.formats.grid import Quantized
from compress.model.names import places, same_parameters
from compress.model.skeleton import skeleton
from compress.state import State
from compress.state.graph import Site
from compress.training.matrices import learnt_scale

WORDS = ("all", "lora", "scales", "norms")


class Kind(enum.Flag):
    """What of a matrix learns."""

    NOTHING = 0
    WEIGHTS = enum.auto()
    SCALES = enum.auto()
    FACTORS = enum.auto()


@dataclass(frozen=True)
class Choice:
    """sites: site -> what of it learns. tensors: names, in the checkpoint, of those tensors that are no site's and learn.
    formats: site -> format, of sites that are given factors, of `rank`."""

    sites: Mapping[str, Kind]
    tensors: frozenset[str]
    formats: Mapping[str, LowRank]
    rank: int

    def kind(self, site: Site) -> Kind:
        return self.sites.get(site.tied or site.name, Kind.NOTHING)

    def format(self, state: State, site: Site) -> Format | None:
        """What a site is stored as in the end."""
        return self.formats.get(site.name) or state.format(site)


@dataclass(frozen=True)
class Learnt:
    """One tensor that learns. name: as a student has it. block: whose it is, None outside of them, or of several. matrix: whether
    it is a matrix of weights in a block, whose gradient can be projected. first: the first block that it is used in."""

    name: str
    shape: tuple[int, ...]
    block: int | None
    matrix: bool = False
    first: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def learnt(state: State, choice: Choice) -> list[Learnt]:
    """Every tensor that learns."""
    found = []
    for site in (s for s in state.graph if not s.tied):
        used = blocks_of(state, site)
        block, first = used[0] if len(used) == 1 else None, min((b for b in used if b is not None), default=None)
        found += [Learnt(f"{site.name}:{name}", shape, block, name == "W_nk" and block is not None, first)
                  for name, shape in numbers(state, choice, site).items()]  # fmt: skip
    users = users_of_others(state) if choice.tensors else {}
    for spec in (spec for spec in state.specs if spec.name in choice.tensors):
        within = users[spec.name]
        first = min((b for b in within if b is not None), default=None)
        found.append(Learnt(spec.name, tuple(spec.shape), next(iter(within)) if len(within) == 1 else None, first=first))
    return found


def users_of_others(state: State) -> dict[str, set[int | None]]:
    """The same of every tensor that is no site's, by its name in the checkpoint: a norm may serve several blocks, too."""
    model = skeleton(state.config)
    names, found = places(model, state.dense.specs), dict[str, set[int | None]]()
    for paths in same_parameters(model):
        name = next((names[path] for path in paths if path in names), None)
        if name is not None:
            found[name] = {state.graph.block_of(path) for path in paths}
    return found


def blocks_of(state: State, site: Site) -> list[int | None]:
    """The blocks whose modules use a site's matrix, None for what lies outside of them."""
    users = [site, *(s for s in state.graph if s.tied == site.name)]
    found = {state.graph.block_of(path) for user in users for path in user.aliases} | {user.block for user in users}
    return sorted(found, key=lambda b: -1 if b is None else b)


def numbers(state: State, choice: Choice, site: Site) -> dict[str, tuple[int, ...]]:
    """What of a site learns, by its name in a student's matrix (matrices.py), and its shape."""
    kind, (n, k) = choice.kind(site), site.shape
    fmt = choice.format(state, site)
    found: dict[str, tuple[int, ...]] = {"W_nk": (n, k)} if Kind.WEIGHTS in kind else {}
    if Kind.SCALES in kind:
        base = getattr(fmt, "base", fmt)
        assert isinstance(base, Quantized)
        found["base.t_ng" if isinstance(fmt, LowRank) or Kind.FACTORS in kind else "t_ng"] = (n, base.groups(k))
    if Kind.FACTORS in kind:
        rank = getattr(fmt, "rank", choice.rank)
        found |= {"A_rk": (rank, k), "B_nr": (n, rank)}
    return found


def choose(state: State, train: Sequence[str], rank: int | None) -> Choice:
    """What the words `all`, `lora`, `scales`, `norms` and patterns of names mean for a state. RecipeError, MatchError where one
    means nothing."""
    served = next((name for name, fmt in state.formats.items() if isinstance(fmt, Served)), None)
    if served:
        raise RecipeError(f"'{served}' is in {state.formats[served]}, and nothing is trained while inputs are rounded; put this "
                          "step in front of 'quantize'", ("train",))  # fmt: skip
    sites: dict[str, Kind] = {}
    tensors, formats = set[str](), dict[str, LowRank]()
    others = other_tensors(state)
    for word in train:
        matched = 0
        for site in (s for s in state.graph if not s.tied):
            kind = learning(state, site, word)
            if kind & Kind.FACTORS and state.format(site) is not None and not isinstance(state.format(site), LowRank):
                formats[site.name] = LowRank(state.format(site), rank or 0)  # type: ignore[arg-type]  # checked by `learning`
            sites[site.name] = sites.get(site.name, Kind.NOTHING) | kind
            matched += bool(kind)
        named = [n for n in others if word == "all" or (is_norm(state, n) if word == "norms" else fnmatchcase(n, word))]
        tensors |= set(named)
        if not matched and not named:
            raise nothing(state, word)
    both = next((n for n, k in sites.items() if Kind.WEIGHTS in k and k != Kind.WEIGHTS), None)
    if both:
        raise RecipeError(f"'{both}' cannot learn its weights and its scales or factors at once; leave one of {', '.join(train)} "
                          "out", ("train",))  # fmt: skip
    return Choice({n: k for n, k in sites.items() if k}, frozenset(tensors), formats, rank or 0)


def other_tensors(state: State) -> list[str]:
    """The floating-point parameters of a state's language model that belong to no site: norms, biases and the like. What is a
    buffer there does not learn, nor does a tower beside it, which text does not pass, nor what is left as it is."""
    taken = {s.weight for s in state.graph} | {s.joined for s in state.graph if s.expert is not None} | left(state)
    beside = {s.weight.rpartition(".")[0] for s in state.graph}  # where the bias of a head lies
    root = language_model(state)
    return [spec.name for spec in state.specs
            if spec.name not in taken and spec.dtype.is_floating_point and spec.name in state.graph.parameters
            and (spec.name.startswith(root) or spec.name.rpartition(".")[0] in beside)]  # fmt: skip


def left(state: State) -> set[str]:
    """The tensors of modules that are no sites: a recipe leaves them, or they are in a layout that is not read."""
    if not state.graph.left:
        return set()
    modules = tuple(f"{path}." for path in state.graph.left)
    return {name for path, name in places(skeleton(state.config), state.dense.specs).items() if path.startswith(modules)}


def is_norm(state: State, name: str) -> bool:
    """Whether a tensor that belongs to no site is a norm or a bias, and not a router's matrix or a table of positions."""
    return len(state.dense.specs[name].shape) < 2 or "norm" in name.rpartition(".")[0].rpartition(".")[2]


def language_model(state: State) -> str:
    """What the names of its tensors begin with in the checkpoint: what stands in front of the number of a block."""
    layer = ".".join(state.graph.blocks[0].module.split(".")[-2:])  # such as layers.0
    inside = next((s.weight for s in state.graph.of_block(0) if f"{layer}." in s.weight), "")
    return inside.partition(f"{layer}.")[0]


def learning(state: State, site: Site, word: str) -> Kind:
    """What of a site learns by one word."""
    fmt = state.format(site)
    if word == "norms":
        return Kind.NOTHING
    if (
        fmt is not None
        and Can.LEARN not in fmt.can
        and (site.block is not None or word != "lora")
        and (word in WORDS or fnmatchcase(site.name, word))
    ):
        raise RecipeError(f"'{site.name}' is in {fmt}, which is not trained; name other matrices, train norms, or quantize to a "
                          "format such as int4:g64", ("train",))  # fmt: skip
    if word == "scales":
        base = fmt.base if isinstance(fmt, LowRank) else fmt
        if base is None or isinstance(base, Dense | Factored):
            return Kind.NOTHING
        if not learnt_scale(base):
            raise RecipeError(f"'{site.name}' is in {fmt}, whose scales are stored together and cannot be moved one by one; name "
                              "what is to learn by patterns", ("train",))  # fmt: skip
        return Kind.SCALES
    if word == "lora":
        return Kind.FACTORS if site.block is not None and takes_factors(fmt) else Kind.NOTHING
    if word != "all" and not fnmatchcase(site.name, word):
        return Kind.NOTHING
    if isinstance(fmt, LowRank):
        if not takes_factors(fmt):
            raise RecipeError(f"'{site.name}' has factors in {fmt.factors}, which are not trained; give 'lqlora' factors: bf16, "
                              "or train scales or norms", ("train",))  # fmt: skip
        return Kind.FACTORS
    if fmt is None or isinstance(fmt, Quantized):
        return Kind.WEIGHTS
    step = "factorize" if isinstance(fmt, Factored) else "quantize"
    raise RecipeError(f"'{site.name}' is in {fmt}, which is not trained; put this step in front of '{step}', or name other "
                      "matrices", ("train",))  # fmt: skip


def takes_factors(fmt: Format | None) -> bool:
    """Whether a matrix in this format can learn by factors: those that it has, or new ones."""
    if isinstance(fmt, LowRank):
        return isinstance(fmt.factors, Dense)
    return fmt is None or (isinstance(fmt, Quantized) and Can.LEARN in fmt.can)


def nothing(state: State, word: str) -> Exception:
    """That a word means nothing here, and why."""
    made = next(((s.name, fmt) for s in state.graph if (fmt := state.format(s)) is not None and s.block is not None), None)
    if word == "scales" and made is None:
        return RecipeError("no matrix has scales that could learn; put 'quantize' before it, or train: all", ("train",))
    if word in WORDS and made is not None:
        why = f"'{made[0]}' is in {made[1]}"
        return RecipeError(f"there is nothing that '{word}' could train: {why}; train norms, or put this step in front of the "
                           "one that made it so", ("train",))  # fmt: skip
    if word in WORDS:
        return RecipeError(f"there is nothing that '{word}' could train", ("train",))
    shared = next((s for s in state.graph if s.tied and fnmatchcase(s.name, word)), None)
    if shared is not None:
        return MatchError(f"'{shared.name}' shares the matrix of '{shared.tied}', and both learn by that name; write "
                          f"'{shared.tied}'", ("train",))  # fmt: skip
    kept = next((n for n in sorted(left(state)) if fnmatchcase(n, word)), None)
    if kept is not None:
        return MatchError(f"'{kept}' is left as it is, and does not learn; name others", ("train",))
    names = [s.name for s in state.graph if not s.tied] + other_tensors(state)
    return MatchError(f"'{word}' matches no matrix and no other tensor{did_you_mean(word, names)}", ("train",))
