"""A compressed-tensors folder of integers read back as the state that it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.export.artifact.config import declared
from compress.export.artifact.files import check_marks, contained
from compress.export.artifact.tensors import Placed
from compress.export.compressed_tensors import adapter
from compress.formats import Int
from compress.model.model import Model, open_model
from compress.state import Fact, State
from compress.state.graph import Site

READER = "our reader of compressed-tensors, streamed"


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a compressed-tensors checkpoint."""
    return declared(folder).get("quant_method") == "compressed-tensors"


def read(folder: Path) -> State:
    """The state that a pack-quantized folder holds; ModelError where its config and tensors disagree."""
    model = open_artifact(folder)
    check_marks(folder)
    try:
        groups = list(declared(folder)["config_groups"].values())
        schemes = [(list(group["targets"]), int_of(group["weights"], folder)) for group in groups]
        stored = {site.name: stored_at(site, schemes, model) for site in model.graph
                  if f"{site.stem}.weight_packed" in model.checkpoint}  # fmt: skip
    except (LookupError, TypeError, AttributeError, re.error) as e:
        raise ModelError(f"{folder / 'config.json'}: its quantization_config is broken ({type(e).__name__}: {e})") from None
    state = State(model.graph, model.checkpoint, model.dtype, facts=Fact.QUANTIZED).with_sites(stored)
    return adapter.read(folder, state) if adapter.present(folder) else state


def stored_at(site: Site, schemes: list[tuple[list[str], Int]], model: Model) -> Placed:
    """Where a packed site lies, in the format that a target names; ModelError if its tensors are not of that format."""
    fmt = next((f for names, f in schemes if any(hits(site, t) for t in names)), None)
    if fmt is None:
        raise ModelError(f"{model.folder}: '{site.stem}' is packed, but no target of config.json names it")
    return Placed.of(site, fmt, model.checkpoint, {s: f"{site.stem}.{s}" for s in fmt.tensors(site.shape)})


def open_artifact(folder: Path) -> Model:
    contained(folder)
    model = open_model(str(folder))
    del model.config.quantization_config
    return model


def int_of(weights: dict[str, Any], folder: Path) -> Int:
    if weights.get("type") != "int":
        raise ModelError(f"{folder}: holds weights of type '{weights.get('type')}'; only int can be read")
    return Int(weights["num_bits"], weights.get("group_size"), weights["symmetric"])


def hits(site: Site, target: str) -> bool:
    names = (site.module, site.stem)
    if target.startswith("re:"):
        return any(re.match(target[3:], n) for n in names)
    return target in names
