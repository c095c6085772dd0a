"""The experts of a model's mixtures, and the model with fewer of them.

What has an entry for each expert is not listed by family. The architecture is built with all experts and with fewer, and a tensor
whose shape differs in one dimension by just their numbers has one entry for each of them along it: their matrices, where a
checkpoint keeps them in one tensor, the rows of the router, its bias, a learnt correction of its scores. A checkpoint that has
experts one by one names them by number; those that stay close the gap.

What cannot be cut that way is refused: layers that differ in the number of their experts, tables that name experts, routers that
choose among groups of them, and numbers of the architecture that would become others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.model.couplings import validate
from compress.model.discover import discover, has_experts
from compress.model.names import COUNTS, PREDICTS, anchor, layers_beyond, passed_over, places
from compress.model.skeleton import glance
from compress.model.work import experts_used
from compress.state import State
from compress.state.graph import Site
from compress.state.overlay import Bare

NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
GROUPS = ("n_group", "num_expert_group")


@dataclass(frozen=True, eq=False)
class Fewer:
    """A model with fewer experts in every mixture, foreseen.

    state: that model; layers that predict further tokens, which have mixtures of their own, are gone from it whole. cuts: by
    block, name in the checkpoint -> the dimension along which a tensor has an entry for each expert.
    """

    state: State
    cuts: Mapping[int, Mapping[str, int]]


def experts_of(state: State) -> dict[int, list[list[Site]]]:
    """Of every block that has a mixture, the matrices of each expert."""
    found: dict[int, list[list[Site]]] = {}
    for site in state.graph.linear:
        if site.expert is not None:
            mine = found.setdefault(site.block or 0, [])
            mine += [[] for _ in range(site.expert + 1 - len(mine))]
            mine[site.expert].append(site)
    return found


def numbers(state: State) -> tuple[int, int]:
    """How many experts each mixture has, and the fewest that may stay; ModelError where none can go."""
    family, found, text = state.graph.family, experts_of(state), state.config.get_text_config()
    if not found:
        model = glance(state.config)
        if any(has_experts(model.get_submodule(path)) for path in state.graph.left):
            raise ModelError(f"experts of '{family}' cannot go: how it lays out their matrices is not read; leave 'experts' out")
        raise ModelError(f"'{family}' has no experts that 'prune' knows; leave 'experts' out")
    units = {len(mine) for mine in found.values()}
    if len(units) > 1:
        raise ModelError(f"layers of '{family}' differ in the number of their experts; leave 'experts' out")
    groups = [n for name in GROUPS if isinstance(n := getattr(text, name, None), int)]
    if any(n > 1 for n in groups):
        raise ModelError(f"experts of '{family}' cannot go: its router chooses among {max(groups)} groups of them first, which "
                         "would become unequal; leave 'experts' out")  # fmt: skip
    used = experts_used(state)
    if used == inf:
        raise ModelError(f"no value of the config of '{family}' says how many experts a token is sent to; leave 'experts' out")
    return units.pop(), max(int(used), 2 if groups else 1)  # a router that knows groups looks at two of each


def fewer(state: State, count: int) -> Fewer:
    """The state as it will be with `count` experts in every mixture; ModelError where the architecture has no such shape."""
    units, _ = numbers(state)
    config = _with_number(state, units, count)
    validate(config)
    before, after = glance(state.config), glance(config)
    dims = _cuts(before, after, units, count)
    _no_names(state, before)
    gone = _predicting(state, before)
    if gone:
        text = config.get_text_config()
        for name in (n for n in COUNTS if getattr(text, n, 0)):
            setattr(text, name, 0)
        after = glance(config)
    held = places(before, state.dense.specs)
    cuts = {
        b.index: {held[p]: d for p, d in dims.items() if p in held and p.startswith(f"{b.module}.")} for b in state.graph.blocks
    }
    lengths = {name: dim for mine in cuts.values() for name, dim in mine.items()}
    lost = {s.weight for mine in experts_of(state).values() for expert in mine[count:] for s in expert} | set(gone)
    specs = tuple(
        replace(s, shape=tuple(count if d == lengths[s.name] else n for d, n in enumerate(s.shape))) if s.name in lengths else s
        for s in state.specs
        if s.name not in lost
    )
    bare = Bare(state.dense.folder, specs)
    graph = anchor(discover(after, config, state.graph.leave), bare, after)
    dense = state.dense.moved({s.name: s.name for s in specs})
    return Fewer(replace(state, graph=graph, config=config, specs=specs, dense=dense), cuts)


def left(state: State, block: int, cuts: Mapping[str, int], kept: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a block that has these experts only, by their names then; those that stay where they are need no copy."""
    at = torch.tensor(kept)
    found = {name: state.dense.read_finite(name).index_select(dim, at).contiguous() for name, dim in cuts.items()}
    experts = experts_of(state)[block]
    for new, old in enumerate(kept):
        for there, here in zip(experts[new], experts[old], strict=True):
            if new != old and here.weight in state.dense:
                found[there.weight] = state.dense.read_finite(here.weight)
    return found


def _with_number(state: State, units: int, count: int) -> Any:
    """A config with another number of experts, by whatever names it says that."""
    config = deepcopy(state.config)
    text, said = config.get_text_config(), False
    for name in NUMBERS:
        value = getattr(text, name, None)
        if value == units or (isinstance(value, list | tuple) and set(value) == {units}):
            setattr(text, name, count if value == units else [count] * len(value))
            said = True
    if not said:
        raise ModelError(
            f"'{state.graph.family}' has no shape with {count} experts: no value of its config says how many there are"
        )
    return config


def _cuts(before: nn.Module, after: nn.Module, units: int, count: int) -> dict[str, int]:
    """Path of a tensor -> the dimension along which it has an entry for each expert; ModelError where something else changes."""
    ours, theirs, found = before.state_dict(), after.state_dict(), dict[str, int]()
    for path in sorted(ours.keys() ^ theirs.keys()):
        raise ModelError(f"with {count} experts instead of {units}, '{path}' would be in one model only; leave 'experts' out")
    for path, tensor in ours.items():
        odd = [d for d, (a, b) in enumerate(zip(tensor.shape, theirs[path].shape, strict=True)) if a != b]
        if odd and (len(odd) > 1 or (tensor.shape[odd[0]], theirs[path].shape[odd[0]]) != (units, count)):
            raise ModelError(f"with {count} experts instead of {units}, '{path}' would be {list(theirs[path].shape)}, not "
                             f"{list(tensor.shape)}; leave 'experts' out")  # fmt: skip
        if odd:
            found[path] = odd[0]
    others = dict(after.named_modules())
    for path, module in before.named_modules():
        for name, value in vars(module).items():
            other = vars(others[path]).get(name)
            if isinstance(value, int | float) and value != other and (value, other) != (units, count):
                raise ModelError(f"with {count} experts instead of {units}, '{path}' would have {name} {other}, not {value}; "
                                 "leave 'experts' out")  # fmt: skip
    return found


def _no_names(state: State, model: nn.Module) -> None:
    """ModelError where a table beside the experts names them by number, as where a token's own number chooses its experts."""
    around = {f"{mine[0][0].module.rpartition('.')[0]}." for mine in experts_of(state).values()}
    for path, tensor in model.state_dict().items():
        if not tensor.is_floating_point() and any(path.startswith(place) for place in around):
            raise ModelError(f"experts of '{state.graph.family}' cannot go: '{path}' names them by number; leave 'experts' out")


def _predicting(state: State, model: nn.Module) -> tuple[str, ...]:
    """The tensors of layers that predict further tokens, where these have experts. No text reaches them here, so nobody could say
    which of their experts to keep."""
    names = [spec.name for spec in state.specs]
    beyond = {name for found in layers_beyond(state.graph, names, model).values() for name in found}
    extra = passed_over(names, model)
    gone = tuple(n for n in extra if n in beyond or PREDICTS.search(f".{n}"))
    odd = next((n for n in extra if "expert" in n and n not in gone), None)
    if odd is not None:
        raise ModelError(f"'{odd}', which transformers does not load, is of experts as well; leave 'experts' out")
    return gone if any("expert" in n for n in gone) else ()
