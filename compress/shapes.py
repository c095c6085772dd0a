"""Models whose layers differ in shape: what a config says of each layer, and how transformers comes to build such a model.

A config holds the shapes under `per_layer_config`, layer -> name -> value, as transformers (5.14 and later) writes and reads it.
But few of its architectures build their layers by it; with all others, asking such a config for a value that its layers differ in
is an error. That is what keeps a stock transformers from building layers of one size and filling them at random: it stops
while it builds, and with `llama` and its like as soon as it reads the config. (With `skip`, transformers' word for a sublayer
that is not there, it would not stop; so that is never written.)

`install` teaches it to transformers, once in a process: while a model is built its config answers with the values that hold for
all layers, and just before the model's own code finishes it, its layers are built again, each by its own class, from a config
with the layer's values. No family is listed. One whose layers are made from something else than a config and a number is a
ModelError. The skeletons of a run and the runtime that loads artifacts both go this way, so they cannot disagree.

Nothing here needs more than torch and transformers, so that artifacts can be loaded without the compressor.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.heterogeneity import HeterogeneousConfigMixin

from compress.errors import ModelError

KEY = "per_layer_config"
OPEN = "allow_global_per_layer_attribute_access"
NUMBERS = ("layer_idx", "layer_id", "layer_number", "idx")  # what classes of layers call their number
ROPE = "validate_rope"
ABSENT = "absent_modules"  # of a layer: path within it -> one of these
ATTENTION, MLP, NORM = "attention", "mlp", "norm"
Values = Mapping[int, Mapping[str, Any]]

# --- what a config says ----------------------------------------------------------------------------------------------


def text_of(config: Any) -> Any:
    """The part of a config that says what the layers of its language model are."""
    return config.get_text_config()


def differ(config: Any) -> bool:
    """Whether the layers of a config's language model have shapes of their own."""
    return bool(values_of(config))


def said_to_differ(config: Mapping[str, Any]) -> bool:
    """The same of a config.json, which nobody has looked at yet."""
    return KEY in config or any(isinstance(part, dict) and KEY in part for part in config.values())


def values_of(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> name -> value, of every layer that has values of its own."""
    text = text_of(config)
    if not getattr(text, "is_heterogeneous", False):
        return {}
    return {int(layer): values for layer, values in text.to_dict().get(KEY, {}).items()}


def layers_without(config: Any, what: str) -> list[int]:
    """The layers in which something is not there that others have."""
    return [layer for layer, values in values_of(config).items() if what in values.get(ABSENT, {}).values()]


def of_layer(config: Any, layer: int) -> Any:
    """The config as one layer has it: a value that layers differ in can be asked of it, and of no other."""
    text = text_of(config)
    return text.per_layer_config[layer] if getattr(text, "is_heterogeneous", False) else text


def with_values(config: Any, values: Values) -> Any:
    """A copy of a config in which layers have these values, and no others of their own; under the names that the config itself
    has for them, as it is strict about those alone."""
    changed = copy.deepcopy(config)
    text = text_of(changed)
    text.per_layer_config = None
    known = getattr(text, "attribute_map", {})
    held = {layer: {known.get(n, n): v for n, v in found.items()} for layer, found in values.items() if found}
    if held:
        text.per_layer_config = held
    return changed


# --- how it is built -------------------------------------------------------------------------------------------------


class Layer:
    """What the config of one layer has of the whole model's: how attention and experts are computed may be set there later."""

    whole: Any

    def __reduce__(self) -> Any:
        """To be pickled with a model: this class has no name of its own."""
        return for_layer, (type(self).__mro__[2], vars(self))

    @property
    def _attn_implementation_internal(self) -> Any:
        return self.__dict__["whole"]._attn_implementation_internal

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        self.__dict__["whole"]._attn_implementation_internal = value

    @property
    def _experts_implementation_internal(self) -> Any:
        return self.__dict__["whole"]._experts_implementation_internal

    @_experts_implementation_internal.setter
    def _experts_implementation_internal(self, value: Any) -> None:
        self.__dict__["whole"]._experts_implementation_internal = value


def follower(config: Any, layer: int) -> Any:
    """The config of a layer that is built from it."""
    found = config.per_layer_config[layer]
    own = {name: value for name, value in vars(found).items() if name not in (OPEN, "_attn_implementation_internal",
                                                                             "_experts_implementation_internal")}  # fmt: skip
    return for_layer(type(config), own | {"whole": config})


def for_layer(kind: type, values: Mapping[str, Any]) -> Any:
    """A config of a class, as one layer's."""
    known = layer_class(kind)
    found = known.__new__(known)
    vars(found).update(values)
    return found


@functools.cache
def layer_class(kind: type) -> Any:
    """The class of one layer's configs. transformers makes a dataclass of it, which takes as long as building the layer."""
    return type(kind.__name__, (Layer, kind), {"__module__": kind.__module__})


def stack(model: nn.Module, count: int) -> nn.ModuleList | None:
    """The outermost list of as many modules, all of which are made from a config and a number."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and all(number_of(type(m)) for m in module):
            return module
    return None


def number_of(kind: Any) -> str | None:
    """What a class of layers calls its number; None where it is not made from a config and a number alone."""
    known = inspect.signature(kind).parameters
    number = next((name for name in NUMBERS if name in known), None)
    needed = {p.name for p in known.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return number if "config" in known and needed <= {"config", number} else None


@functools.cache
def native(module: str) -> bool:
    """Whether the code of an architecture goes by the shapes of each layer itself; it is left alone."""
    try:
        return KEY in inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # a class that somebody has written at a prompt
        return False


def reshape(model: Any) -> None:
    """Build all layers of a model anew, each from its own config, unless that is done already."""
    blocks = stack(model, model.config.num_hidden_layers) if values_of(model.config) else None
    if blocks is None or hasattr(blocks, "reshaped"):
        return
    for layer, block in enumerate(blocks):
        config = follower(model.config, layer)
        blocks[layer] = type(block)(config=config, **{str(number_of(type(block))): layer})
        for path, what in (getattr(config, ABSENT, None) or {}).items():
            blocks[layer].set_submodule(path, absent(blocks[layer].get_submodule(path), what, config))
    vars(blocks)["reshaped"] = True


class NoAttention(nn.Module):
    """Stands where a layer has no attention: puts out zeros. A cache counts positions by what its layers hold, so it is given one
    number for each, the least that it takes; a static one has its own width."""

    def __init__(self, stood: nn.Module, config: Any):
        super().__init__()
        vars(self).update({name: value for name, value in vars(stood).items() if not name.startswith("_") and name != "training"})
        self.config = config

    def forward(self, hidden_states: Tensor, *_: Any, past_key_values: Any = None, **__: Any) -> tuple[Tensor, None]:
        if past_key_values is not None:
            number: Any = self.layer_idx
            known: Any = [layer for layer in past_key_values.layers[number : number + 1] if layer.is_initialized]
            width = known[0].keys.shape[-1] if known else 1
            held = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], width)
            past_key_values.update(held, held, number)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where a layer has no MLP: puts out zeros."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def absent(stood: nn.Module, what: str, config: Any) -> nn.Module:
    """What stands in the place of a module that is not there."""
    if what == ATTENTION:
        return NoAttention(stood, config)
    if what in (MLP, NORM):
        return NoMLP() if what == MLP else nn.Identity()
    raise ModelError(f"'{what}' is nothing that a layer can lack; use a newer compress-pipeline")


def begin(stock: Callable[..., None], model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.__init__`, with which every model begins: from here on the config answers for all layers."""
    if getattr(config, "is_heterogeneous", False) and OPEN not in vars(config) and not native(type(model).__module__):
        setattr(config, OPEN, True)
        vars(model)["opened"] = config
        MUTED.addFilter(unremarkable)
    stock(model, config, *args, **kwargs)


def finish(stock: Callable[..., None], model: Any) -> None:
    """`post_init`, with which every model ends: the layers take their shapes, then the config is strict again."""
    if getattr(model.config, "is_heterogeneous", False) and not native(type(model).__module__):
        reshape(model)
    stock(model)
    config = vars(model).pop("opened", None)
    if config is not None:
        vars(config).pop(OPEN, None)
        MUTED.removeFilter(unremarkable)
        if values_of(config) and not any(hasattr(m, "reshaped") for m in model.modules()):
            raise ModelError(f"layers of '{config.model_type}' are not made from a config and their number, so they cannot have "
                             "shapes of their own")  # fmt: skip


MUTED = logging.getLogger(HeterogeneousConfigMixin.__module__)  # it warns of what is meant here


def unremarkable(_: logging.LogRecord) -> bool:
    return False


def by_layer(validator: Callable[..., None]) -> Callable[..., None]:
    """A check of a config; where layers differ, each layer's is checked in its place."""

    @functools.wraps(validator)
    def check(config: Any, *args: Any, **kwargs: Any) -> None:
        for one in list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else (config,):
            validator(one, *args, **kwargs)

    check.by_layer = True  # type: ignore[attr-defined]
    return check


def heed_layers(kind: type) -> None:
    """Have the checks of a class of configs look at each layer; those of some families forget to."""
    for base in kind.__mro__:
        checks = vars(base).get("__class_validators__", [])
        checks[:] = [check if hasattr(check, "by_layer") else by_layer(check) for check in checks]
        if ROPE in vars(base) and not hasattr(vars(base)[ROPE], "by_layer"):  # which vLLM calls by itself
            setattr(base, ROPE, by_layer(vars(base)[ROPE]))


def install() -> None:
    """Teach transformers models whose layers differ; once in a process."""
    if hasattr(PreTrainedModel, "builds_layers_apart"):
        return
    PreTrainedModel.builds_layers_apart = True  # type: ignore[attr-defined]
    for name, hook in (("__init__", begin), ("post_init", finish)):
        setattr(PreTrainedModel, name, wrapped(getattr(PreTrainedModel, name), hook))
    stock: Any = HeterogeneousConfigMixin.per_layer_config

    def assign(config: Any, values: Any) -> None:
        heed_layers(type(config))
        stock.fset(config, values)

    HeterogeneousConfigMixin.per_layer_config = stock.setter(assign)  # type: ignore[method-assign]


def wrapped(stock: Callable[..., None], hook: Callable[..., None]) -> Callable[..., None]:
    """A method that goes through a hook, which calls it."""

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        hook(stock, self, *args, **kwargs)

    return method
