"""An artifact's folder, read before a byte is allocated: what config.json says, compared with the headers of the weight files.

Two kinds are read: native artifacts (export/native/), and compressed-tensors folders. The checks
are those of every reader (artifact/files.py, config.py, checks.py): versions, formats, names, dtypes and shapes of tensors, the
hashes of compress.json. What is wrong is a ModelError of one line. No path comes from a file, and a link is followed only
within the folder, or into the store of a hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from compress.errors import CompressError, ModelError, one_line
from compress.export.artifact import checks
from compress.export.artifact.config import declared, formats
from compress.export.artifact.files import check_index, check_marks, contained, headers, plain_files, shards
from compress.export.artifact.schemes import scheme_of
from compress.export.artifact.schemes import schemes as schemes_in
from compress.export.artifact.skipped import Skipped, of_weights
from compress.formats import Dense, Float, Format, Served, numbers_of, weight_of
from compress.state.checkpoint import Spec

CHILDREN = ("", "lora_A.", "lora_B.", "factor_A.", "factor_B.")  # what a matrix may have beside tensors of its own
SCALES = ("weight_scale", "factor_A.weight_scale")


@dataclass(frozen=True)
class Matrix:
    """One packed matrix [N, K]: its format, the dtype of its scales, and what its tensors are called, by suffix."""

    format: Format
    shape: tuple[int, int]
    scale_dtype: torch.dtype
    names: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Artifact:
    """A folder whose config and headers agree.

    specs and files: every tensor, and where it is. matrices: those that are packed, by the name of their module on disk. others:
    tensors that belong to no module, such as buffers of older versions. skipped: what tokens leave out, by modules on disk.
    """

    folder: Path
    paths: tuple[Path, ...]
    specs: Mapping[str, Spec] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)
    matrices: Mapping[str, Matrix] = field(repr=False)
    others: frozenset[str] = frozenset()
    skipped: Mapping[str, Skipped] = field(default_factory=dict, repr=False)


def open_native(folder: Path) -> Artifact:
    """A native artifact, its hashes compared up to `HASHED_BYTES`."""
    contained(folder)
    texts, paths = formats(folder), shards(folder)
    check_marks(folder)
    specs, files = headers(paths)
    check_index(folder, files)
    packed = {stem: fmt for stem, fmt in texts.items() if not isinstance(fmt, Dense)}
    for stem, fmt in texts.items():
        if isinstance(fmt, Dense) and specs.get(f"{stem}.weight", Spec("", fmt.dtype, ())).dtype != fmt.dtype:
            raise ModelError(f"{folder}: '{stem}.weight' is not {fmt}, as config.json says; they do not belong together")
    others = declared(folder).get("others", [])
    known = frozenset(o for o in others if isinstance(o, str)) if isinstance(others, list) else frozenset[str]()
    return Artifact(folder, paths, specs, files, matrices(folder, packed, specs, files), known, of_weights(folder, specs))


def open_packed(folder: Path, module_of: Callable[[str], str] = str) -> Artifact:
    """A compressed-tensors folder; `module_of` gives the path in the module tree for a name on disk."""
    contained(folder)
    schemes, paths = schemes_in(declared(folder), folder / "config.json"), plain_files(folder)
    check_marks(folder)
    specs, files = headers(paths)
    found: dict[str, Format] = {}
    for name in specs:
        stem = name.removesuffix(".weight_scale")
        if stem != name:
            found[stem] = scheme_of((module_of(stem), stem), schemes, folder)
    return Artifact(folder, paths, specs, files, matrices(folder, found, specs, files))


def matrices(
    folder: Path, packed: Mapping[str, Format], specs: Mapping[str, Spec], files: Mapping[str, Path]
) -> dict[str, Matrix]:
    """The packed matrices; ModelError for a tensor that is missing or not what its format asks for."""
    shapes = read_shapes(packed, specs, files, folder)
    found = {}
    for stem, fmt in packed.items():
        found[stem] = matrix(folder, stem, fmt, shapes, checks.scale_dtype(specs, *(f"{stem}.{s}" for s in SCALES)), specs)
    return found


def matrix(
    folder: Path, stem: str, fmt: Format, shapes: Mapping[str, tuple[int, int]], scale: torch.dtype, specs: Mapping[str, Spec]
) -> Matrix:
    """One matrix whose tensors are all there as its format says."""
    shape = shapes[f"{stem}.weight_shape"]
    try:
        wanted = fmt.tensors(shape, scale)
    except CompressError as e:
        raise ModelError(f"{folder / 'config.json'}: '{one_line(stem)}': {e}") from None
    checks.require(folder, fmt, {f"{stem}.{suffix}": kind for suffix, kind in wanted.items()}, checks.in_specs(specs))
    for suffix, side in checks.sides(fmt, shape).items():
        checks.require_sides(folder, f"{stem}.{suffix}", shapes[f"{stem}.{suffix}"], side)
    return Matrix(fmt, shape, scale, {suffix: f"{stem}.{suffix}" for suffix in wanted})


def plain_shape(stem: str, fmt: Format, specs: Mapping[str, Spec]) -> tuple[int, int] | None:
    """The shape of a matrix without a `weight_shape`; None where there is one, or the matrix is missing."""
    halves = isinstance(weight_of(fmt), Float) and numbers_of(fmt).bits == 4  # type: ignore[union-attr]
    if not halves and not isinstance(weight_of(fmt), Float) and not (isinstance(fmt, Served) and fmt.bytes_of_codes):
        return None
    name = f"{stem}.weight_packed" if halves else f"{stem}.weight"
    shape = specs[name].shape if name in specs else ()
    return (shape[0], shape[1] * (1 + halves)) if len(shape) == 2 else (1, 32)  # what is missing is told with the others


def read_shapes(
    packed: Mapping[str, Format], specs: Mapping[str, Spec], files: Mapping[str, Path], folder: Path
) -> dict[str, tuple[int, int]]:
    """What the `weight_shape` tensors say, of matrices and of quantized factors; where codes lie side by side, what they show."""
    found: dict[str, tuple[int, int]] = {}
    wanted: dict[Path, list[str]] = {}
    for stem, fmt in packed.items():
        if (plain := plain_shape(stem, fmt, specs)) is not None:
            found[f"{stem}.weight_shape"] = plain
            continue
        if f"{stem}.weight_shape" not in specs:
            raise ModelError(f"{folder}: '{one_line(stem)}.weight_shape' is missing, though config.json gives '{one_line(stem)}' "
                             "a format; config and weights do not belong together")  # fmt: skip
        for name in (f"{stem}.{child}weight_shape" for child in CHILDREN):
            if name in specs:
                wanted.setdefault(files[name], []).append(name)
    for path, names in wanted.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                held = file.get_tensor(name).tolist() if specs[name].shape == (2,) else []
                if len(held) != 2 or not all(isinstance(x, int) and 0 < x < 1 << 31 for x in held):
                    raise ModelError(f"{path}: '{name}' says {held}, which is no shape of a matrix; the file is damaged")
                found[name] = (held[0], held[1])
    return found
