"""A GPTQ checkpoint read back as the state that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from compress.errors import FormatError, ModelError
from compress.export.artifact import checks
from compress.export.artifact.config import declared
from compress.export.artifact.files import check_marks, contained
from compress.export.artifact.tensors import Placed, state_of
from compress.export.artifact.view import Seen, View, Viewed
from compress.export.gptq.config import Scheme
from compress.export.gptq.layout import SUFFIXES, group_index, middle, shapes
from compress.formats import Int, bitpack
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.checkpoint import Checkpoint, Spec
from compress.state.graph import Site

READER = "our reader of GPTQ checkpoints, streamed"


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a GPTQ checkpoint."""
    return declared(folder).get("quant_method") == "gptq"


def open_artifact(folder: Path) -> Model:
    """The model of a GPTQ checkpoint, its tensors seen as ours; ModelError where config and tensors disagree."""
    contained(folder)
    model = open_model(str(folder), leave=None)
    checkpoint, scheme = model.checkpoint, Scheme.of(declared(folder), str(folder / "config.json"))
    del model.config.quantization_config
    modules = [name.removesuffix(".qweight") for name in checkpoint.specs if name.endswith(".qweight")]
    seen: dict[str, Seen] = {}
    for module in modules:
        seen |= {found.spec.name: found for found in seen_of(module, scheme, checkpoint, model.dtype)}
    theirs = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES}
    seen |= {name: Seen(spec, checkpoint.files[name], partial(checkpoint.read, name))
             for name, spec in checkpoint.specs.items() if name not in theirs}  # fmt: skip
    return Viewed(model.folder, model.config, model.name, leave=None, view=View(folder, seen.values(), checkpoint.nbytes))


def read(folder: Path) -> State:
    """The state that a GPTQ checkpoint holds; ModelError where its config and tensors disagree."""
    check_marks(folder)
    model, scheme = open_artifact(folder), Scheme.of(declared(folder), str(folder / "config.json"))
    stored = {}
    for site in model.graph:
        fmt = scheme.format(site.stem)
        if fmt and f"{site.stem}.weight_packed" in model.checkpoint:
            names = {suffix: f"{site.stem}.{suffix}" for suffix in fmt.tensors(site.shape)}
            stored[site.name] = Placed.of(site, fmt, model.checkpoint, names)
    return state_of(model, stored)


def seen_of(module: str, scheme: Scheme, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Seen]:
    """Our tensors of a module; ModelError unless those on disk are of the format that the config says."""
    fmt, rows, index = scheme.format(module), checkpoint.specs[f"{module}.qweight"].shape, checkpoint.specs.get(f"{module}.g_idx")
    path = checkpoint.files[f"{module}.qweight"]
    if fmt is None:
        raise ModelError(f"{path}: holds '{module}.qweight', but 'dynamic' leaves it as it is; config and weights do not belong "
                         "together")  # fmt: skip
    if len(rows) != 2 or index is None or len(index.shape) != 1:
        raise ModelError(f"{path}: '{module}' has a broken qweight or g_idx; the file is damaged")
    site = Site(module, "", (rows[1], index.shape[0]), None, "", module, f"{module}.weight")
    try:
        kinds, ours = shapes(site, fmt), fmt.tensors(site.shape, torch.float16 if dtype == torch.float16 else torch.bfloat16)
    except FormatError as e:
        raise ModelError(f"{path}: '{module}': {e}") from None
    wanted = {f"{module}.{suffix}": kind for suffix, kind in kinds.items()}
    checks.require(path, fmt, wanted, checks.in_specs(checkpoint.specs))
    for suffix, (kept, shape) in ours.items():
        make = partial(back, site, fmt, scheme.v1, checkpoint, suffix, kept)
        yield Seen(Spec(f"{module}.{suffix}", kept, shape), path, make)


def back(site: Site, fmt: Int, v1: bool, checkpoint: Checkpoint, suffix: str, dtype: torch.dtype) -> torch.Tensor:
    """One of our tensors, scales in `dtype` where that is exact; ModelError where zero points or g_idx are not those of `fmt`."""
    if suffix == "weight_shape":
        return torch.tensor(site.shape)
    if suffix == "weight_scale":
        scales = checkpoint.read(f"{site.stem}.scales").T.contiguous()
        return scales.to(dtype) if torch.equal(scales.to(dtype).float(), scales.float()) else scales
    zeros = checkpoint.read(f"{site.stem}.qzeros")
    if suffix == "weight_zero_point":
        codes = bitpack.unpack(zeros, fmt.bits, site.shape[0]).add(v1).bitwise_and(fmt.levels - 1)
        return bitpack.pack(codes, fmt.bits).T.contiguous()
    file = checkpoint.files[f"{site.stem}.qweight"]
    if fmt.symmetric and not torch.equal(zeros, middle(site, fmt, v1)):
        raise ModelError(f"{file}: '{site.stem}.qzeros' is not that of {fmt}; config and weights do not belong together")
    if not torch.equal(checkpoint.read(f"{site.stem}.g_idx"), group_index(site, fmt)):
        raise ModelError(f"{file}: '{site.stem}.g_idx' is not in the order of inputs; only such groups are read")
    return checkpoint.read(f"{site.stem}.qweight").T.contiguous()
