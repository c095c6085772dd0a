"""Low-rank factors that lie beside a compressed-tensors folder as a PEFT adapter, put into the packed matrices they correct.

`load` does this, so that such a folder is one model, as native artifacts with factors are. `from_pretrained` does not: PEFT's
users load the adapter themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from compress.errors import CompressError, ModelError, one_line
from compress.export.artifact import files
from compress.export.artifact.config import matched
from compress.export.runtime.decode import format_of
from compress.export.runtime.linear import PackedLinear
from compress.formats import Dense, LowRank
from compress.state.checkpoint import Spec

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
SUFFIXES = ("lora_A.weight", "lora_B.weight")
_PREFIX = "base_model.model."
_BEYOND = ("use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "alora_invocation_tokens",
           "layer_replication", "target_parameters", "trainable_token_indices", "exclude_modules", "layers_to_transform",
           "layers_pattern")  # fmt: skip


def correct(model: nn.Module, folder: Path) -> None:
    """Add the factors of the folder's adapter, if it has one; ModelError where they do not belong to the model."""
    if not (folder / FOLDER).exists():
        return
    config = files.document(files.within(folder, folder / FOLDER / CONFIG))
    path = files.within(folder, folder / FOLDER / WEIGHTS)
    specs, _ = files.headers([path])
    try:
        ranks = ranks_of(config)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ModelError(f"{folder / FOLDER / CONFIG}: {one_line(str(e))}; this is no adapter of ours") from None
    extra = specs.keys() - {f"{_PREFIX}{module}.{suffix}" for module in ranks for suffix in SUFFIXES}
    if extra:
        raise ModelError(f"{path}: holds '{one_line(min(extra))}', which {CONFIG} does not name")
    modules = dict(model.named_modules())
    with safe_open(path, framework="pt") as file:
        for name, rank in ranks.items():
            module = modules.get(name)
            if not isinstance(module, PackedLinear):
                raise ModelError(f"{path}: '{one_line(name)}' is no packed matrix of this model; it is another's adapter")
            fmt = corrected(module, name, rank, specs, path)
            module.correct(str(fmt), {suffix: file.get_tensor(f"{_PREFIX}{name}.{suffix}") for suffix in SUFFIXES})


def ranks_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Module -> rank; ValueError for more than Q + B A."""
    other = next((key for key in _BEYOND if config.get(key)), None)
    if config["peft_type"] != "LORA" or other or config.get("bias", "none") != "none":
        raise ValueError(f"more than plain LoRA ({other or config['peft_type']})")
    found = {}
    for module in list(config["target_modules"]):
        rank = matched(config.get("rank_pattern") or {}, module, config["r"])
        if matched(config.get("alpha_pattern") or {}, module, config["lora_alpha"]) != rank:
            raise ValueError(f"scales '{module}' by another number than 1")
        found[module] = int(rank)
    return found


def corrected(module: PackedLinear, name: str, rank: int, specs: Mapping[str, Spec], path: Path) -> LowRank:
    """The format of a matrix with its factors; ModelError unless they are there as it says."""
    held = [specs.get(f"{_PREFIX}{name}.{suffix}") for suffix in SUFFIXES]
    try:
        # anything that is no quantized format, or no float, LowRank and Dense themselves refuse
        fmt = LowRank(format_of(module.format), rank, Dense(held[0].dtype if held[0] else None))  # type: ignore[arg-type]
        wanted = fmt.tensors(module.shape)
    except CompressError as e:
        raise ModelError(f"{path}: '{one_line(name)}': {e}") from None
    if [s and (s.dtype, s.shape) for s in held] != [wanted[suffix] for suffix in SUFFIXES]:
        raise ModelError(f"{path}: the factors of '{one_line(name)}' are not those of {fmt}; they do not belong together")
    return fmt
