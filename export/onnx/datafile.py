"""The file of weights beside the graph: `model.onnx.data`, known to the byte before it exists.

Tensors lie one behind the other in the source's order. Large ones begin at multiples of a page, so that onnxruntime maps them
instead of reading them; small ones at multiples of 64 bytes.

Only what the graph uses is written: tensors that belong to no parameter, such as an old checkpoint's rotary frequencies, are left
out, since onnxruntime would warn of each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.export.onnx.encode import KINDS, Slot, encode, slots
from compress.state import State
from compress.state.checkpoint import tensor_bytes, write_all
from compress.state.graph import Site

GRAPH, DATA = "model.onnx", "model.onnx.data"
METHOD, VERSION = "compress-onnx", 1  # what config.json calls the folder
PAGE, LINE, LARGE = 4096, 64, 1 << 20


def aligned(at: int, nbytes: int) -> int:
    """Where a tensor of `nbytes` begins that cannot begin before `at`."""
    step = PAGE if nbytes >= LARGE else LINE
    return -(-at // step) * step


def places(found: Iterable[Slot]) -> Iterator[tuple[Slot, int]]:
    """Each tensor with the offset at which it begins."""
    at = 0
    for slot in found:
        start = aligned(at, slot.nbytes)
        yield slot, start
        at = start + slot.nbytes


@dataclass(frozen=True)
class DataFile:
    """The data file as it will be: its tensors in order."""

    name: str
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        return max((start + slot.nbytes for slot, start in places(self.slots)), default=0)


@dataclass(frozen=True)
class DataLayout:
    """The one file whose size is known beforehand; how large the graph is, only its export tells."""

    file: DataFile

    @property
    def files(self) -> tuple[DataFile, ...]:
        return (self.file,)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def tensor_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.file.slots)


def layout(state: State) -> DataLayout:
    """What the data file of a state, as it is planned, will hold."""
    return DataLayout(DataFile(DATA, tuple(slot for _, found in parts(state) for slot in found)))


def parts(state: State) -> Iterator[tuple[Site | str, list[Slot]]]:
    """Every matrix and every other parameter, in the source's order, with its tensors."""
    formats = state.formats
    sites = {site.weight: site for site in state.graph if not site.tied}
    for spec in state.specs:
        site = sites.get(spec.name)
        if site is not None and site.name in formats:
            yield site, site_slots(state, site)
        elif site is not None or spec.name in state.graph.parameters:
            yield spec.name, [Slot(spec.name, KINDS[spec.dtype], spec.shape)]


def site_slots(state: State, site: Site) -> list[Slot]:
    """The tensors of a matrix in a format; a dense one lies as the source's does, [in, out] where that is so."""
    fmt = state.formats[site.name]
    found = slots(fmt, site.shape, state.scale_dtype, f"{site.stem}.")
    flip = site.transposed and len(found) == 1
    return [Slot(s.name, s.kind, s.shape[::-1]) for s in found] if flip else found


def tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `parts`, one matrix in memory at a time."""
    for part, found in parts(state):
        if isinstance(part, str):
            yield part, state.dense.read_finite(part)
            continue
        stored = state.codes[part.name]
        coded = encode(stored.format, stored.shape, stored.load().tensors)
        for slot in found:
            tensor = coded[slot.name.removeprefix(f"{part.stem}.")]
            yield slot.name, tensor.T.contiguous() if part.transposed and len(found) == 1 else tensor


def write(folder: Path, file: DataFile, stream: Iterator[tuple[str, Tensor]]) -> None:
    """Write the data file from a stream in its own order."""
    at = 0
    with (folder / file.name).open("wb") as out:
        for slot, start in places(file.slots):
            name, tensor = next(stream)
            data = tensor_bytes(tensor)
            assert (name, data.nbytes) == (slot.name, slot.nbytes), f"expected {slot}, got {name} of {data.nbytes} bytes"
            write_all(out.fileno(), bytes(start - at), folder)
            write_all(out.fileno(), data, folder)
            at = start + slot.nbytes
        os.fsync(out.fileno())
    assert next(stream, None) is None, "more tensors than the file has room for"
