"""Loading by one call, and what is registered with transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress import shapes
from compress.errors import CompressError, ModelError, one_line
from compress.export.artifact import config as artifact_config
from compress.export.artifact import files, schemes
from compress.export.runtime.correction import correct
from compress.export.runtime.linear import prepare
from compress.export.runtime.quantizer import DeclaredConfig, IntegerQuantizer, NativeQuantizer

CONFIGS, QUANTIZERS = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
INTEGERS = "compressed-tensors"
STOCK: tuple[Any, Any] = CONFIGS[INTEGERS], QUANTIZERS[INTEGERS]

CONFIGS.setdefault(artifact_config.METHOD, DeclaredConfig)
QUANTIZERS.setdefault(artifact_config.METHOD, NativeQuantizer)
shapes.install()


class ChosenConfig:
    """Stands for the config class of compressed-tensors: ours where a folder holds packed integers, else the stock one."""

    @staticmethod
    def from_dict(declared: Mapping[str, Any], **options: Any) -> QuantizationConfigMixin:
        artifact_config.check_patterns(declared)
        try:
            refuse_cache(declared)
            schemes.schemes(declared)
        except ModelError:
            found: QuantizationConfigMixin = STOCK[0].from_dict(declared, **options)
            return found
        return DeclaredConfig(**declared)


def refuse_cache(declared: Mapping[str, Any], path: Path = Path("config.json")) -> None:
    """ModelError where a folder asks for a cache of fewer bits, which packed modules know nothing of."""
    if declared.get("kv_cache_scheme"):
        raise ModelError(
            f"{path}: asks for a quantized cache, which this runtime does not keep; load it with transformers or vLLM"
        )


def chosen_quantizer(config: Any, **options: Any) -> Any:
    """Stands for the quantizer of compressed-tensors, as `ChosenConfig` does for its config."""
    return (IntegerQuantizer if isinstance(config, DeclaredConfig) else STOCK[1])(config, **options)


def keep_packed(on: bool = True) -> ExitStack:
    """Have `from_pretrained` keep the integers of compressed-tensors folders packed, asymmetric and mixed ones too.

    Stock transformers makes them dense in the first forward pass. It lasts until `keep_packed(False)`, or, in a `with`
    statement, until its end. Folders of other kinds of weights are loaded as ever.
    """
    before = QUANTIZERS[INTEGERS] is chosen_quantizer

    def switch(on: bool) -> None:
        CONFIGS[INTEGERS], QUANTIZERS[INTEGERS] = (ChosenConfig, chosen_quantizer) if on else STOCK  # type: ignore[assignment]

    switch(on)
    undo = ExitStack()
    undo.callback(switch, before)
    return undo


def auto_class(named: Any) -> Any:
    """What of transformers loads the class that a config names: a language model, unless it has another head, or none."""
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name.endswith("Model") and not name.endswith("HeadModel"):
        return transformers.AutoModel
    if name.endswith("ForConditionalGeneration"):  # with towers beside the language model
        return transformers.AutoModelForImageTextToText
    return getattr(transformers, f"AutoModelFor{name.rpartition('For')[2]}", transformers.AutoModelForCausalLM)


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model of a native artifact or a compressed-tensors folder, packed, on a device; in `dtype`, or its own. A plain folder
    is taken where layers differ in shape, which needs what is registered here.

    Low-rank factors that lie beside it in `adapter/` are applied. ModelError where the folder is damaged or cannot be loaded
    so; it is one line.
    """
    folder = Path(folder)
    config = files.document(folder / "config.json")
    method = artifact_config.method(folder)
    if method not in (artifact_config.METHOD, INTEGERS) and (method or not shapes.said_to_differ(config)):
        raise ModelError(f"{folder}: holds no packed matrices; load it with transformers alone")
    kind = auto_class(config.get("architectures"))
    with keep_packed():
        if method == INTEGERS:
            declared = artifact_config.declared(folder)
            refuse_cache(declared, folder / "config.json")
            schemes.schemes(declared, folder / "config.json")
        try:
            model: Any = kind.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except CompressError:
            raise
        except Exception as e:  # a config that its architecture's code cannot take
            why = one_line(str(e) or type(e).__name__)
            if config.get("auto_map"):
                why = "its config.json asks for custom code (auto_map), which is not supported"
            raise ModelError(f"{folder}: transformers cannot load it ({why})") from e
    if method == INTEGERS:
        correct(model, folder)
    return model.to(device)


__all__ = ["keep_packed", "load", "prepare"]
