"""A model as its config alone tells of it, so that a question about sizes downloads and makes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from compress.errors import ModelError, first_line
from compress.model.gguf_source import SUFFIX, gguf_file, made_before, read_types, remarks, write_config
from compress.model.model import HUB_ID, Model, open_model

CONFIG = "config.json"


def names_model(path: Path) -> bool:
    """Whether an argument names a model, and not a recipe: a folder, its config, a GGUF file, or what can only be a hub id."""
    if path.is_dir() or path.name == CONFIG or path.suffix.lower() == SUFFIX:
        return True
    return not path.exists() and path.suffix not in (".yaml", ".yml") and HUB_ID.fullmatch(str(path)) is not None


def bare_model(name: str, folder: Path) -> Model:
    """The model of that name, with no weights where they would have to be fetched or made; its config is then put in `folder`."""
    path = gguf_file(name, Path())
    known: tuple[str, ...] = ()
    if path and (source := made_before(path)):
        return replace(open_model(str(source.folder)), name=name, source_remarks=source.remarks)
    if path:
        known = remarks(path, read_types(path)[0])
        write_config(path, folder)
    elif not Path(name).exists() and HUB_ID.fullmatch(name):
        shutil.copyfile(fetched_config(name), folder / CONFIG)
    else:
        return open_model(name)
    try:
        model = open_model(str(folder))
    except ModelError as e:
        raise ModelError(str(e).replace(str(folder), name)) from None
    return replace(model, name=name, source_remarks=known)


def fetched_config(name: str) -> Path:
    """The config of a hub id, from the hub or its cache; ModelError in the hub's words where there is none."""
    from huggingface_hub import hf_hub_download

    repo, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repo, CONFIG, revision=revision or None))
    except Exception as e:  # network, authorisation, absent: the hub's own words are the best we have
        raise ModelError(f"model '{name}': no folder of this name, and the hub says: {first_line(e)}") from e
