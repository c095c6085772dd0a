"""A model with fewer layers, or with layers of which a sublayer puts out zeros.

What is kept lies where it lay, under the name that it has in the smaller model. The result is a model of the same architecture,
or it is refused: the new config is built into a skeleton, and every kept layer must there be what it was.

Whether a sublayer is gone where it puts out zeros is not listed by family: every block of the skeleton is given random hidden
states, with zeros in place of what its output matrices make, and must give them back as they are. A norm over the sum (BERT), a
bias behind a sublayer, or a scale of the whole show there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError, first_line
from compress.model.discover import discover, has_experts
from compress.model.names import anchor, layers_beyond
from compress.model.skeleton import glance, is_experts, is_matrix, skeleton
from compress.shapes import values_of, with_values
from compress.state import State
from compress.state.graph import Site
from compress.state.overlay import Bare

BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")  # config values with an entry for each layer


# --- fewer layers ----------------------------------------------------------------------------------------------------


def fewer(state: State, kept: Sequence[int]) -> State:
    """The state with only the `kept` layers, in their order; no byte is copied.

    ModelError where one of them would be another than it was.
    """
    odd = Kinds(state).odd(kept)
    if odd is not None:
        old, new = odd
        raise ModelError(f"layer {old} of '{state.graph.family}' would be another as layer {new}: this architecture decides "
                         "by the number what a layer is; drop others, so that the kinds keep their places")  # fmt: skip
    config = shortened(state, kept)
    names = [spec.name for spec in state.specs]
    beyond = layers_beyond(state.graph, names, glance(state.config))  # they predict further tokens, and stay the last
    renamed = renumbered(names, stack_of(state), [*kept, *sorted(beyond)])
    specs = tuple(replace(s, name=renamed[s.name]) for s in state.specs if s.name in renamed)
    model = glance(config)
    graph = anchor(discover(model, config, state.graph.leave), Bare(state.dense.folder, specs), model)
    dense = state.dense.moved({new: old for old, new in renamed.items()})
    return replace(state, graph=graph, config=config, specs=specs, dense=dense)


def shortened(state: State, kept: Sequence[int]) -> Any:
    """The config of a model of fewer layers: their number, and the lists that are known to have an entry for each layer."""
    config, count = deepcopy(state.config), len(state.graph.blocks)
    text = config.get_text_config()
    for name in BY_LAYER:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, [value[i] for i in kept])
    own = values_of(config)
    text.num_hidden_layers = len(kept)
    return with_values(config, {new: own[old] for new, old in enumerate(kept) if old in own}) if own else config


def stack_of(state: State) -> str:
    """What the names of all tensors in blocks begin with in the checkpoint, up to the number."""
    site = next(s for s in state.graph.linear if s.block == 0)
    return site.weight.partition(".0.")[0]


def in_layer(name: str, stack: str) -> re.Match[str] | None:
    """Whether a tensor lies in a layer of a stack; the first group is the layer's number."""
    return re.match(rf"{re.escape(stack)}\.(\d+)\.", name)


def renumbered(names: Sequence[str], stack: str, kept: Sequence[int]) -> dict[str, str]:
    """Name of a tensor -> its name once only the `kept` layers of a stack are there; those of its other layers are left out."""
    found = {}
    for name in names:
        match = in_layer(name, stack)
        if match is None:
            found[name] = name
        elif int(match[1]) in kept:
            start, end = match.span(1)
            found[name] = f"{name[:start]}{kept.index(int(match[1]))}{name[end:]}"
    return found


class Kinds:
    """What the layers of a model are, and would be as others: skeletons are built once for configs that say the same."""

    def __init__(self, state: State):
        self.state = state
        self.known: dict[str, list[dict[str, Any]]] = {}
        self.before = self._of(state.config)

    def odd(self, kept: Sequence[int]) -> tuple[int, int] | None:
        """The first of the `kept` layers that would be another than it was, and its new number; None where none would."""
        after = self._of(shortened(self.state, kept))
        return next(((old, new) for new, old in enumerate(kept) if self.before[old] != after[new]), None)

    def _of(self, config: Any) -> list[dict[str, Any]]:
        key = json.dumps(config.to_dict(), sort_keys=True, default=str)
        if key not in self.known:
            model, stack = glance(config), self.state.graph.blocks[0].module.rpartition(".")[0]
            self.known[key] = [traits(block) for block in model.get_submodule(stack).children()]
        return self.known[key]


def traits(block: nn.Module) -> dict[str, Any]:
    """What a layer is, besides its weights: classes, shapes, and every plain number or word in its modules but its own number."""
    found: dict[str, Any] = {}
    for path, module in block.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"}
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        found[path] = type(module).__name__, plain, shapes
    return found


# --- sublayers that put out zeros ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What may go: a layer, or, with the `sites` whose outputs are all that it adds, an attention or an MLP of one."""

    name: str
    block: int
    sites: tuple[Site, ...] = ()


def sublayers(state: State) -> list[Unit]:
    """The attentions and MLPs that are gone where their output matrices are zero; ModelError where this architecture has none."""
    fit = list[Unit]()
    for part in ("attn", "mlp"):
        through = let_through(state, silent_without(state, part))
        for block in state.graph.blocks:
            sites = ends(state, block.index, part)
            if sites and through[block.index] and not any(site.aliases for site in sites):
                fit.append(Unit(f"layers.{block.index}.{part}", block.index, sites))
    if not fit:
        raise ModelError(f"a layer of '{state.graph.family}' does more than add what its attention and MLP put out (a norm over "
                         "the sum, a bias, a scale), so zeros do not take them away; use unit: layer")  # fmt: skip
    return sorted(fit, key=lambda unit: unit.block)


def ends(state: State, block: int, part: str) -> tuple[Site, ...]:
    """The matrices that put out what the attention, or the MLP with all its experts, of a block adds."""
    roles = {"attn": "o", "mlp": "down"}
    return tuple(s for s in state.graph.of_block(block) if s.role == roles[part])


def silent_without(state: State, part: str) -> set[str]:
    """Paths of the modules that put out zeros while it is seen whether zeros take this part away: what ends either part, and of
    what is no site whatever makes the other one, such as experts of another layout."""
    found, model = set[str](), glance(state.config)
    for block in state.graph.blocks:
        sites = {each: ends(state, block.index, each) for each in ("attn", "mlp")}
        found |= {site.module for each in sites.values() for site in each}
        other = sites["mlp" if part == "attn" else "attn"]
        left = [path for path in state.graph.left if path.startswith(f"{block.module}.")]
        found |= {p for p in left if not other or (part == "attn" and has_experts(model.get_submodule(p)))}
    return found


def let_through(state: State, silent: set[str]) -> list[bool]:
    """Of every block, whether it gives what it is given where the modules `silent` put out zeros."""
    model, same = skeleton(state.config), dict[int, bool]()
    plain = {path for site in state.graph for path in (site.module, *site.aliases)} | silent
    for path, module in model.named_modules():
        _without_weights(module, path in plain, 0.0 if path in silent else 0.5)
    for block in state.graph.blocks:
        _watch(model.get_submodule(block.module), block.index, same, len(state.graph.blocks))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.int64), use_cache=False)
    except _Seen:
        return [same[block.index] for block in state.graph.blocks]
    except Exception as e:  # whatever an architecture's code makes of numbers that mean nothing
        raise ModelError(f"{type(model).__name__}: what its layers do without sublayers cannot be seen ({first_line(e)}); "
                         "use unit: layer") from e  # fmt: skip
    raise AssertionError("the last block ends the forward pass")


class _Seen(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass behind the last block."""


def _without_weights(module: nn.Module, plain: bool, value: float) -> None:
    """Give a module of a skeleton numbers that take no memory; one that does nothing but multiply puts out `value` instead."""
    if is_matrix(module) and plain:
        width = module.weight.shape[int(type(module).__name__ == "Conv1D")]  # type: ignore[index]
        module.forward = lambda x: x.new_full((*x.shape[:-1], width), value)
    elif is_experts(module) or has_experts(module):  # of whatever layout
        module.forward = lambda x, *_, **__: torch.full_like(x, value)
    for name, p in module.named_parameters(recurse=False):
        held = torch.rand(p.shape) + 0.5 if p.ndim == 1 else torch.full((), 0.5).expand(p.shape)
        module._parameters[name] = nn.Parameter(held, requires_grad=False)


def _watch(block: nn.Module, index: int, same: dict[int, bool], count: int) -> None:
    """Give a block hidden states drawn at random, and note whether it gives them back."""
    drawn: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        drawn.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(index)))
        return ((drawn[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": drawn[0]})

    def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found = out[0] if isinstance(out, tuple) else out
        same[index] = torch.equal(found, drawn[0])
        if index == count - 1:
            raise _Seen

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)
