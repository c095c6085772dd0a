"""A skeleton: an architecture built from its config with every parameter on the meta device.

Buffers are real (rotary frequencies and the like are computed, not stored).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import guard_torch_init_functions
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError, first_line

_PATCH = threading.Lock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep real buffers and put every parameter on the meta device, where transformers draws no weights."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        held = None if param is None else nn.Parameter(param.to("meta"), requires_grad=False)
        if held is not None:
            held._is_hf_initialized = True  # type: ignore[attr-defined]
        register(module, name, held)

    with _PATCH:
        nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(config: Any) -> Any:
    """The class that the config names, or the causal-LM class of its family."""
    for name in getattr(config, "architectures", None) or []:
        if isinstance(name, str) and hasattr(transformers, name) and not name.endswith("Model"):
            return getattr(transformers, name)
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise ModelError(f"found architecture '{config.model_type}', which is no language model: transformers has no class "
                         "for it that predicts tokens")  # fmt: skip
    return known[type(config)]


def skeleton(config: Any) -> nn.Module:
    """The architecture in eval mode, parameters on meta; ModelError if transformers cannot build it."""
    cls = model_class(config)
    try:
        with parameters_on_meta(), guard_torch_init_functions():
            model: nn.Module = cls._from_config(deepcopy(config), dtype=torch.float32)
        model.tie_weights()  # type: ignore[operator]
    except Exception as e:
        raise ModelError(f"transformers cannot build {cls.__name__} from this config ({first_line(e)})") from e
    return model.eval().requires_grad_(False)


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_experts(module: nn.Module) -> bool:
    """A module that keeps the matrices of all experts in two parameters [experts, out, in], gate above up, and nothing else."""
    held = dict(module.named_parameters())
    if set(held) != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return False
    joined, down = (tuple(held[name].shape) for name in ("gate_up_proj", "down_proj"))
    return len(down) == 3 and joined == (down[0], 2 * down[2], down[1]) and getattr(module, "is_concatenated", True)
