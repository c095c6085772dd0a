"""Our runtime as the engine of a native artifact."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import psutil

from compress.errors import ModelError, first_line
from compress.export.artifact.engines import EngineError, Transformers
from compress.export.artifact.place import sizes
from compress.state import State

ENGINE = "compress runtime"


class Runtime(Transformers):
    """A model whose sparse matrices tell what of them was read."""

    def unread(self) -> float:
        from compress.export.runtime import sparse

        return sparse.bytes_read(self.model)[1]


def engine(folder: Path, state: State, device: str) -> Transformers:
    """The artifact in our runtime, in the state's dtype; EngineError where that cannot load it."""
    from compress.export.runtime import load

    needed = sum(size for name, size in sizes(folder).items() if name.endswith(".safetensors"))
    if needed > psutil.virtual_memory().available:
        raise EngineError(f"the packed model needs {needed / 2**30:.1f} GiB of memory")
    try:
        with redirect_stderr(io.StringIO()):
            model = load(folder, device, state.dtype)
        if any(site.expert is not None for site in state.graph):  # grouped products round otherwise, which may route otherwise
            model.set_experts_implementation("eager")
        return Runtime(model, ENGINE)
    except ModelError as e:
        raise EngineError(first_line(e)) from e
