"""A GGUF file that `gguf` wrote, seen as a checkpoint of our own tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.errors import FormatError, ModelError
from compress.export.artifact.files import check_marks, contained
from compress.export.artifact.tensors import Placed, state_of
from compress.export.artifact.view import Seen, View, Viewed
from compress.export.gguf import blocks
from compress.export.gguf.file import BLOCK, FILE, Found, Tensor, read_file
from compress.export.gguf.metadata import (
    DTYPES,
    FACTORS,
    FAMILIES,
    NOTE,
    VERSION,
    order,
    tensor_name,
    vector,
    vector_back,
)
from compress.formats import Ggml, Int, parse
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.checkpoint import Spec
from compress.state.graph import Site

NAMES = {kind: dtype for dtype, kind in DTYPES.items()}
FLOATS = {str(dtype)[6:]: dtype for dtype in DTYPES}
READER = "our reader of GGUF, streamed"


@dataclass(frozen=True)
class Note:
    """What `compress.formats` says; see gguf.py. dtypes: by names in the file."""

    dtype: torch.dtype
    formats: Mapping[str, Int | Ggml]
    dtypes: Mapping[str, torch.dtype]


def note_of(found: Found) -> Note:
    """ModelError where a file has no note of ours, or a broken or newer one."""
    text = found.metadata.get(NOTE)
    if not isinstance(text, str):
        raise ModelError(f"{found.path}: was not written by compress, and only such files are read")
    try:
        said: dict[str, Any] = json.loads(text)
        if said["version"] != VERSION:
            raise ModelError(f"{found.path}: {NOTE} is of version {said['version']!r}, and {VERSION} is the newest that is read; "
                             "upgrade compress-pipeline")  # fmt: skip
        formats = {name: parse(text) for name, text in said["formats"].items()}
        dtypes = {name: FLOATS[dtype] for name, dtype in said["dtypes"].items()}
        held = {name: fmt for name, fmt in formats.items() if isinstance(fmt, Int | Ggml)}
        note = Note(FLOATS[said["dtype"]], held, dtypes)
    except ModelError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ModelError(f"{found.path}: {NOTE} is broken ({type(e).__name__})") from None
    if len(note.formats) < len(formats):
        raise ModelError(f"{found.path}: {NOTE} names formats that no blocks hold")
    return note


def view_of(model: Model, found: Found, note: Note) -> View:
    """The file's tensors as ours; ModelError for one that is missing, too many, or of another shape or kind."""
    family = FAMILIES[model.config.model_type]
    unused = set(found.tensors) - {FACTORS}
    seen: list[Seen] = []
    for site in model.graph:
        if not site.tied:
            tensor = tensor_of(found, str(tensor_name(site.weight, family)), site.shape)
            fmt = note.formats.get(site.name)
            seen += sites(model, found, tensor, site, fmt, note) if fmt else [dense(model, found, tensor, site.weight, note)]
            unused.discard(tensor.name)
    for name, shape in model.graph.parameters.items():
        tensor = tensor_of(found, str(tensor_name(name, family)), shape)
        seen.append(dense(model, found, tensor, name, note))
        unused.discard(tensor.name)
    if unused:
        raise ModelError(
            f"{found.path}: holds '{min(unused)}', which the model does not; config and weights do not belong together"
        )
    return View(found.path.parent, seen, sum(tensor.nbytes for tensor, _ in found.tensors.values()))


def tensor_of(found: Found, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = found.tensors[name][0] if name in found.tensors else None
    if tensor is None or tensor.shape != tuple(shape):
        what = "missing" if tensor is None else str(list(tensor.shape))
        raise ModelError(
            f"{found.path}: '{name}' is {what}, the config says {list(shape)}; config and weights do not belong together"
        )
    return tensor


def rows_of(model: Model, found: Found, tensor: Tensor) -> torch.Tensor:
    """A tensor's bytes [rows, bytes of a row] with its rows in our order."""
    data = found.read(tensor.name).view(tensor.shape[0], -1)
    rows = order(tensor.name, FAMILIES[model.config.model_type], model.config, tensor.shape[0])
    return data if rows is None else data[rows.argsort()]


def dense(model: Model, found: Found, tensor: Tensor, name: str, note: Note) -> Seen:
    """A tensor that is not quantized; vectors are in fp32 in the file."""
    if tensor.kind.name not in NAMES:
        raise ModelError(f"{found.path}: '{tensor.name}' is quantized, but {NOTE} names no format for it")
    held = NAMES[tensor.kind.name]
    dtype = held if len(tensor.shape) > 1 else note.dtypes.get(tensor.name, note.dtype)
    family = FAMILIES[model.config.model_type]

    def make() -> torch.Tensor:
        data = rows_of(model, found, tensor).contiguous().view(held).view(tensor.shape)
        if len(tensor.shape) > 1:
            return data
        made = vector_back(data.float(), tensor.name, family, dtype)
        if not torch.equal(vector(made, tensor.name, family), data.float()):
            raise ModelError(f"{found.path}: '{tensor.name}' is not {str(dtype)[6:]}, as {NOTE} says; the file is damaged")
        return made

    return Seen(Spec(name, dtype, tensor.shape), found.path, make)


def sites(model: Model, found: Found, tensor: Tensor, site: Site, fmt: Int | Ggml, note: Note) -> Iterator[Seen]:
    """Our tensors of a quantized matrix."""
    scale = torch.float16 if note.dtype == torch.float16 else torch.bfloat16
    try:
        specs = fmt.tensors(site.shape, scale)
    except FormatError as e:
        raise ModelError(f"{found.path}: '{site.name}': {e}") from None
    whole = isinstance(fmt, Ggml) or fmt.width(site.shape[1]) % BLOCK == 0
    if tensor.kind != blocks.kind_of(fmt) or not whole:
        raise ModelError(f"{found.path}: '{tensor.name}' is {tensor.kind.name}, and {NOTE} says {fmt}; the file is damaged")

    def make(suffix: str) -> torch.Tensor:
        if suffix == "weight_shape":
            return torch.tensor(site.shape)
        if isinstance(fmt, Ggml):
            return rows_of(model, found, tensor).contiguous()
        try:
            q, scales = blocks.unpack(rows_of(model, found, tensor), tensor.kind, site.shape)
            return blocks.restore(fmt, q, scales, scale)[suffix]
        except ModelError as e:
            raise ModelError(f"{found.path}: '{tensor.name}' {e}") from None

    for suffix, kind in specs.items():
        yield Seen(Spec(f"{site.stem}.{suffix}", *kind), found.path, partial(make, suffix))


# --- the artifact ----------------------------------------------------------------------------------------------------


def is_artifact(folder: Path) -> bool:
    """Whether a GGUF file of the name that we give lies in a folder, and nothing else that holds weights."""
    return (folder / FILE).is_file() and not any(folder.glob("*.safetensors"))


def open_artifact(folder: Path) -> Model:
    """The model of a GGUF file that we wrote, its tensors seen as ours; ModelError where it is damaged or somebody else's."""
    return opened(folder)[0]


def read(folder: Path) -> State:
    """The state that a GGUF file of ours holds; ModelError where its parts do not belong together."""
    model, note = opened(folder)
    stored = {}
    for site in model.graph:
        if fmt := note.formats.get(site.name):
            names = {suffix: f"{site.stem}.{suffix}" for suffix in fmt.tensors(site.shape)}
            stored[site.name] = Placed.of(site, fmt, model.checkpoint, names)
    return replace(state_of(model, stored), dtype=note.dtype)


def opened(folder: Path) -> tuple[Viewed, Note]:
    contained(folder)
    model, path = open_model(str(folder), leave=None), folder / FILE
    check_marks(folder)
    found = read_file(path)
    note = note_of(found)
    if model.config.model_type not in FAMILIES:
        raise ModelError(f"{folder / 'config.json'}: is of '{model.config.model_type}', which is not written to GGUF; config and "
                         "weights do not belong together")  # fmt: skip
    missing = sorted(note.formats.keys() - model.graph.sites.keys())
    if missing:
        raise ModelError(f"{path}: {NOTE} gives a format to '{missing[0]}', which is no matrix of this model")
    return Viewed(model.folder, model.config, model.name, leave=None, view=view_of(model, found, note)), note
