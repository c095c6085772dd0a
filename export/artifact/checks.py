"""What a format asks of a matrix's tensors, compared with what a file holds: one comparison and one message for all readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from compress.errors import ModelError, one_line
from compress.formats import Factored, Format, LowRank
from compress.formats.sparsity import Sparsity
from compress.state.checkpoint import Spec

Kind = tuple[torch.dtype | str, tuple[int, ...]]  # a type, as the file's own kind names it, and a shape
SCALES = (torch.bfloat16, torch.float16, torch.float32)


def require(place: Path, fmt: Format | Sparsity | str, wanted: Mapping[str, Kind], held: Callable[[str], Kind | None]) -> None:
    """ModelError unless every tensor of a matrix is there with the type and shape that its format asks for."""
    for name, kind in wanted.items():
        found = held(name)
        if found != kind:
            said = "missing" if found is None else text_of(found)
            raise ModelError(f"{place}: '{one_line(name)}' is {said}, {fmt} needs {text_of(kind)}; config and weights do not "
                             "belong together")  # fmt: skip


def in_specs(specs: Mapping[str, Spec]) -> Callable[[str], Kind | None]:
    """What safetensors files hold, for `require`."""
    return lambda name: (specs[name].dtype, specs[name].shape) if name in specs else None


def text_of(kind: Kind) -> str:
    dtype, shape = kind
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def scale_dtype(specs: Mapping[str, Spec], *names: str) -> torch.dtype:
    """What scales are stored in, by the first of the tensors `names` that is there: bf16 where that is none of floats, which
    `require` then says."""
    found = next((specs[name].dtype for name in names if name in specs), torch.bfloat16)
    return found if found in SCALES else torch.bfloat16


def sides(fmt: Format, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """What the tensors `weight_shape` of a matrix [N, K], and of its quantized factors, are to say, by suffix."""
    found = {"weight_shape": shape}
    if isinstance(fmt, LowRank | Factored):
        found |= {f"{name}.weight_shape": side for name, side in fmt.factor_shapes(shape).items()}
    return {suffix: side for suffix, side in found.items() if suffix in fmt.tensors(shape)}


def require_sides(place: Path, name: str, said: Sequence[int], wanted: tuple[int, int]) -> None:
    """ModelError where a `weight_shape` says something else than the matrix has."""
    if tuple(said) != wanted:
        raise ModelError(f"{place}: '{one_line(name)}' says {list(said)}, the config {list(wanted)}; the file is damaged")
