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

from compress import shapes
from compress.errors import ModelError, first_line
from compress.model.known import kept_under, key_of, known

_PATCH = threading.Lock()
shapes.install()


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
    """The class that the config names, with a head or without one, or the causal-LM class of its family."""
    for name in getattr(config, "architectures", None) or []:
        if isinstance(name, str) and hasattr(transformers, name):
            found = getattr(transformers, name)
            if not name.endswith("Model") or found is base_class(config):
                return found
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise ModelError(f"found architecture '{config.model_type}', which is no language model: transformers has no class "
                         "for it that predicts tokens")  # fmt: skip
    return known[type(config)]


def free(config: Any) -> bool:
    """Whether layers differ in shape, and the architecture's own code does not build them so: only ours does."""
    return shapes.differ(config) and not shapes.native(model_class(config).__module__)


def base_class(config: Any) -> Any:
    """What `AutoModel` makes of a config: the model without a head; None where it knows none."""
    known = transformers.AutoModel._model_mapping
    return known.get(type(config), None)  # its `get` wants a default


def auto_class(config: Any) -> str:
    """What of transformers loads the class that a config names, as a user would write it."""
    found = model_class(config)
    if found is base_class(config):
        return "AutoModel"
    if found.__name__.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    towers = transformers.AutoModelForImageTextToText._model_mapping
    if type(config) in towers and towers[type(config)] is found:
        return "AutoModelForImageTextToText"
    auto = f"AutoModelFor{found.__name__.rpartition('For')[2]}"
    return auto if hasattr(transformers, auto) else found.__name__


def base_prefix(config: Any) -> str:
    """The name under which a model with a head holds the model without one, which their names differ by."""
    return str(getattr(model_class(config), "base_model_prefix", ""))


def with_logits(model: nn.Module) -> nn.Module:
    """The model; one that predicts no tokens, such as an embedder or a classifier, then gives what stands for logits.

    These are its last hidden states times the rows of its embedding, as a tied head would have them: what is compared with the
    original, in figures and proofs, is thus every hidden state. A classifier's own head is not run; it stays as it is.
    """
    whole: Any = model
    if not isinstance(model, transformers.PreTrainedModel) or whole.get_output_embeddings() is not None:
        return model
    base = whole.base_model
    inner = model.forward if base is model else base

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        out = inner(input_ids=input_ids, **options)
        rows = base.get_input_embeddings()
        table = rows.weight if hasattr(rows, "weight") else rows(torch.arange(rows.num_embeddings, device=input_ids.device))
        hidden = out.last_hidden_state
        out["logits"] = hidden @ table.T.to(hidden.dtype) if hidden.shape[-1] == table.shape[-1] else hidden
        return out

    model.forward = forward
    return model


def skeleton(config: Any) -> nn.Module:
    """The architecture in eval mode, parameters on meta, for the caller alone; ModelError if transformers cannot build it."""
    cls, own = model_class(config), architecture(config)
    return with_logits(known(key_of(cls, own), lambda: built(cls, own)))


def glance(config: Any) -> nn.Module:
    """The same for who only looks at modules, names and shapes and changes nothing: others may have it as well."""
    kept = kept_under(key_of(model_class(config), architecture(config)))
    return skeleton(config) if kept is None else kept.model


def architecture(config: Any) -> Any:
    """A config without what makes no other architecture: where it lies, and how its weights are stored."""
    own = deepcopy(config)
    own._name_or_path = ""
    if hasattr(own, "quantization_config"):
        del own.quantization_config
    return own


def built(cls: Any, config: Any) -> nn.Module:
    try:
        with parameters_on_meta(), guard_torch_init_functions():
            model: nn.Module = cls._from_config(config, dtype=torch.float32)
        model.tie_weights()  # type: ignore[operator]
    except Exception as e:
        raise ModelError(f"transformers cannot build {cls.__name__} from this config ({first_line(e)})") from e
    return model.eval().requires_grad_(False)


def stand_on(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put a skeleton with towers on a device: it asks its first parameter, which is a tower's and stays on meta."""
    config: Any = model.config
    for module in model.modules() if config.get_text_config() is not config else ():
        if isinstance(module, transformers.PreTrainedModel):
            held: dict[str, Any] = {"_stand": nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)}
            module._parameters = {**held, **module._parameters}


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_experts(module: nn.Module) -> bool:
    """A module that keeps the matrices of all experts in two parameters [experts, out, in], gate above up, and nothing else."""
    held = dict(module.named_parameters())
    if set(held) != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return False
    joined, down = (tuple(held[name].shape) for name in ("gate_up_proj", "down_proj"))
    return len(down) == 3 and joined == (down[0], 2 * down[2], down[1]) and getattr(module, "is_concatenated", True)
