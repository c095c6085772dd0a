"""transformers as the engine of a GGUF file, which it makes dense."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import transformers

from compress.errors import first_line
from compress.export.artifact.engines import Engine, EngineError, Transformers
from compress.export.gguf.file import FILE
from compress.export.gguf.metadata import (
    family_of,
)
from compress.model.skeleton import model_class
from compress.state import State


def engine(folder: Path, state: State, device: str) -> Engine:
    """transformers, which makes dense matrices of the file; EngineError where it lacks a package, or its own code fails."""
    needed = sum(site.numel for site in state.graph) * state.dtype.itemsize * 1.5
    if needed > psutil.virtual_memory().available:
        raise EngineError(f"the dense model needs {needed / 2**30:.1f} GiB of memory")
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise EngineError(f"transformers needs {' and '.join(missing)} for it (pip install {' '.join(missing)})")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type != family_of(config.model_type).dense:
        raise EngineError(f"transformers does not know '{config.model_type}' in GGUF, where it goes by another name")
    options: dict[str, Any] = {"gguf_file": FILE, "config": config, "dtype": state.dtype, "local_files_only": True,
                               "trust_remote_code": False}  # fmt: skip
    if hasattr(transformers, "GgufConfig"):  # newer versions would fetch a kernel from the hub, which rounds otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            model = model_class(config).from_pretrained(folder, **options).to(device)
    except Exception as e:
        raise EngineError(f"transformers' {model_class(config).__name__} fails on it ({first_line(e)})") from e
    return Transformers(model, "transformers, dequantized from GGUF")
