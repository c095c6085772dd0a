"""Native artifacts whose layers differ in shape, in vLLM.

vLLM 0.32 keeps a config of each layer where it counts heads (`ModelArchitectureConfig`), and its caches take layers with
different numbers of KV heads. Only its classes of models build every layer from the one config. Where vLLM has code of its own
for a family, `make_layers` calls a function for each layer; so that is replaced, by one that lets the config answer for a layer
while that layer is built. What is not there (`shapes.ABSENT`) is taken out afterwards, with the cache that it had asked for.
No family is listed and no class is copied, so kernels, loading and compiling are those of a model whose layers are alike.

The other way, vLLM's backend that builds models with transformers' classes, takes shapes by layer too, by `shapes.install` alone.
It serves the families that vLLM has no code for, and those only: it has no place for a layer without an attention, which is
refused there (`check`), and it finds attentions by tracing code, which is more to rely on than one function.

Nothing can go wrong in silence: a config whose layers differ answers for no layer outside of this, here as in transformers, and a
packed matrix is compared with the shape that was built for it (`vllm_method.same_shape`).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.models import utils

from compress import shapes
from compress.errors import ModelError
from compress.export.artifact.config import METHOD

MAKE = "make_layers"


def install() -> None:
    """Teach this process's transformers and vLLM models whose layers differ; once in a process."""
    shapes.install()
    stock = utils.make_layers
    if hasattr(stock, "builds_layers_apart"):
        return

    @functools.wraps(stock)
    def make_layers(num_hidden_layers: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        return stock(num_hidden_layers, apart(layer_fn), prefix)

    make_layers.builds_layers_apart = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):  # models that are imported later take it from `utils`
        if name.startswith("vllm.") and vars(module).get(MAKE) is stock:
            setattr(module, MAKE, make_layers)


def building() -> Any:
    """vLLM's config of the native artifact that is being built; None where something else is: other models may have layers that
    differ too, and code of vLLM's that knows them."""
    whole = get_current_vllm_config_or_none()
    return whole if whole and whole.quant_config and whole.quant_config.get_name() == METHOD else None


def check() -> None:
    """ModelError for the model that is being built where it has layers without an attention, and not by code of vLLM's own."""
    whole = building()
    if whole is None or not whole.model_config.using_transformers_backend():
        return
    config = whole.model_config.hf_config
    for layer in shapes.layers_without(config, shapes.ATTENTION):
        raise ModelError(f"layer {layer} has no attention, and vLLM builds '{config.model_type}' from transformers' classes, "
                         "where it needs one in every layer; use transformers")  # fmt: skip


def apart(layer_fn: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """What makes a layer from its path, so that each is built from its own config; as it is where layers are alike."""
    whole = building()
    config = whole and whole.model_config.hf_config  # of a model with towers: that of the part that is being built
    if not getattr(config, "is_heterogeneous", False):
        return layer_fn

    def build(prefix: str) -> nn.Module:
        own = shapes.of_layer(config, int(prefix.rpartition(".")[2]))
        with answering(config, own):
            layer = layer_fn(prefix=prefix)
        for module in layer.modules():
            vars(module).update({name: own for name, value in vars(module).items() if value is config})
        for path, what in (getattr(own, shapes.ABSENT, None) or {}).items():
            take_out(layer, path, what, prefix, whole.compilation_config.static_forward_context)
        return layer

    return build


@contextmanager
def answering(config: Any, own: Any) -> Iterator[None]:
    """A config that answers as another one. It is changed in place, since classes get at it in ways of their own."""
    held = dict(vars(config))
    try:
        vars(config).clear()
        vars(config).update(vars(own))
        yield
    finally:
        vars(config).clear()
        vars(config).update(held)


def take_out(layer: nn.Module, path: str, what: str, prefix: str, caches: dict[str, Any]) -> None:
    """Put what does nothing in the place of a module, and forget the caches that it asked for."""
    try:
        stood = layer.get_submodule(path)
    except AttributeError:
        raise ModelError(
            f"'{prefix}' should lack its '{path}', and vLLM's {type(layer).__name__} has none; use transformers"
        ) from None
    layer.set_submodule(path, absent(stood, what, f"{prefix}.{path}"))
    for name in [name for name in caches if name.startswith(f"{prefix}.{path}.")]:
        del caches[name]


def absent(stood: nn.Module, what: str, name: str) -> nn.Module:
    """What stands in the place of a module that is not there."""
    if what not in (shapes.ATTENTION, shapes.MLP, shapes.NORM):
        raise ModelError(f"'{what}' is nothing that a layer can lack; use a newer compress-pipeline")
    if what != shapes.NORM and "output" in inspect.signature(stood.forward).parameters:
        raise ModelError(
            f"'{name}' is not there, and vLLM's {type(stood).__name__} puts its outputs where it is told; use transformers"
        )
    return NoNorm() if what == shapes.NORM else Nothing()


class Nothing(nn.Module):
    """Stands where a layer has no attention, or no MLP: puts out zeros."""

    def forward(self, *args: Tensor, **others: Any) -> Tensor:
        """Zeros like the hidden states, whether they come first or, by name or not, behind the positions."""
        return torch.zeros_like(next(x for x in (*args, *others.values()) if torch.is_tensor(x) and x.is_floating_point()))


class NoNorm(nn.Module):
    """Stands where a layer has no norm. vLLM's norms add their input to what goes around them, if they are given that."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x
        return x + residual, x + residual
