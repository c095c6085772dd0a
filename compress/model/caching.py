"""Keys and values of a streamed model, which has no cache: they are seen, or rounded, where they would go into one.

An attention of transformers hands its keys, behind their rotary embedding, and its values to a cache if it is given one, and goes
on with what that gives back. So it is given one that keeps nothing. What an architecture does otherwise is refused: attentions
without keys and values of their own (latents, states), and such that compressed-tensors finds no cache in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.formats.caches import CACHE, Fronted, Turn, kept
from compress.model.skeleton import glance
from compress.state import State

ARGUMENT = "past_key_values"
PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")  # by one of which compressed-tensors knows an attention with a cache


def attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The attentions of a block that have a cache, by their paths in it."""
    found = {}
    for path, module in block.named_modules():
        named = type(module).__name__.endswith("Attention") and any(hasattr(module, name) for name in PROJECTIONS)
        if named and ARGUMENT in inspect.signature(module.forward).parameters:
            found[path] = module
    return found


@contextmanager
def fronted(block: nn.Module, turn: Callable[[str], Turn | None]) -> Iterator[None]:
    """Inside, keys and values of each attention in a block go through `turn(its path)`; where that is None, straight on."""
    hooks = []
    for path, module in attentions(block).items():
        if (found := turn(path)) is not None:
            hooks.append(module.register_forward_pre_hook(partial(_front, found), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _front(turn: Turn, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {ARGUMENT: Fronted(turn, kwargs.get(ARGUMENT))}


@contextmanager
def rounding(state: State, index: int, block: nn.Module) -> Iterator[None]:
    """Inside, the block in hand gets keys and values as the state's cache keeps them."""
    scales, path = scales_of(state), state.graph.blocks[index].module
    if not scales:
        yield
        return

    def turn(name: str) -> Turn | None:
        scale = scales.get(f"{path}.{name}")
        return turn_of(scale) if scale and scale["rounded"] else None

    with fronted(block, turn):
        yield


def turn_of(scale: dict[str, Any]) -> Turn:
    """What rounds keys and values by their scales, one of each or one for each head."""
    k, v = (torch.tensor(scale[name]).reshape(-1, 1, 1) for name in ("k", "v"))
    return lambda keys, values: (kept(keys, k), kept(values, v))


class Largest:
    """The largest magnitudes of keys and values by head, over everything that was seen of one attention."""

    def __init__(self) -> None:
        self.k = self.v = torch.zeros(())

    def see(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note them, and hand them on as they are."""
        self.k, self.v = (torch.maximum(known.to(x.device), x.detach().abs().amax((0, 2, 3)).float())
                          for known, x in ((self.k, keys), (self.v, values)))  # fmt: skip
        return keys, values

    def by_head(self, path: str) -> tuple[Tensor, Tensor]:
        """[heads] of keys, and of values. ModelError where nothing was seen."""
        if not self.k.ndim:
            raise ModelError(f"{path}: its attention keeps keys and values in a way of its own, which 'kv_cache' does not know")
        return self.k.cpu(), self.v.cpu()


# --- which attentions, and what is said of them ----------------------------------------------------------------------


def heads_of(state: State) -> dict[str, int]:
    """The path of every attention that has a cache -> heads of its keys. ModelError where a block has none."""
    model, found, text = glance(state.config), dict[str, int](), state.config.get_text_config()
    for block in state.graph.blocks:
        mine = attentions(model.get_submodule(block.module))
        if len(mine) != 1:
            raise ModelError(f"{block.module}: has {len(mine)} attentions with k_proj and v_proj, by which engines know whose "
                             "keys and values are kept; 'kv_cache' is for models that have one in every layer")  # fmt: skip
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        found |= {f"{block.module}.{path}": int(heads) for path in mine}
    return found


def slides(state: State, path: str) -> bool:
    """Whether the attention at a path sees a window of the last tokens only."""
    index, text = state.graph.block_of(path), state.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return bool(kinds[index] == "sliding_attention")
    return getattr(text, "sliding_window", None) is not None and bool(getattr(text, "use_sliding_window", True))


def scales_of(state: State) -> Mapping[str, dict[str, Any]]:
    """Path of an attention -> the scales of its keys (`k`) and values (`v`), and whether they are `rounded` by them; empty where
    the cache stays as it is."""
    said: Any = state.serving.get(CACHE, {"scales": {}})
    found: Mapping[str, dict[str, Any]] = said["scales"]
    return found


def with_cache(state: State, kind: str, layers: str, scales: Mapping[str, Mapping[str, list[float]]]) -> State:
    """The state with a cache of a kind, of all layers or of those that see everything (`full`), and with these scales of keys
    (`k`) and values (`v`) by path."""
    told = {path: {**each, "rounded": layers == "all" or not slides(state, path)} for path, each in scales.items()}
    return replace(state, serving={**state.serving, CACHE: {"format": kind, "layers": layers, "scales": told}})
