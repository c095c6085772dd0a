"""A compressed-tensors folder read back as the state that it was made from."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ModelError
from compress.export.artifact.config import declared
from compress.export.artifact.files import check_marks, contained
from compress.export.artifact.schemes import Scheme, scheme_of
from compress.export.artifact.schemes import schemes as schemes_in
from compress.export.artifact.tensors import Placed, state_of
from compress.export.compressed_tensors import adapter, cache
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.graph import Site

READER = "our reader of compressed-tensors, streamed"


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a compressed-tensors checkpoint."""
    return declared(folder).get("quant_method") == "compressed-tensors"


def read(folder: Path) -> State:
    """The state that a folder holds; ModelError where its config and tensors disagree."""
    check_marks(folder)
    model = open_artifact(folder)
    try:
        schemes = schemes_in(declared(folder), folder / "config.json")
        stored = {site.name: stored_at(site, schemes, model) for site in model.graph
                  if f"{site.stem}.weight_scale" in model.checkpoint}  # fmt: skip
    except (LookupError, TypeError, AttributeError) as e:
        raise ModelError(f"{folder / 'config.json'}: its quantization_config is broken ({type(e).__name__}: {e})") from None
    state = cache.read(folder, state_of(model, stored))
    return adapter.read(folder, state) if adapter.present(folder) else state


def stored_at(site: Site, schemes: list[tuple[list[str], Scheme]], model: Model) -> Placed:
    """Where a packed site lies, in the format that a target names; ModelError if its tensors are not of that format."""
    fmt = scheme_of((site.module, site.stem), schemes, model.folder)
    return Placed.of(site, fmt, model.checkpoint, {s: f"{site.stem}.{s}" for s in fmt.tensors(site.shape)})


def open_artifact(folder: Path) -> Model:
    contained(folder)
    model = open_model(str(folder), leave=None)
    del model.config.quantization_config
    return model
