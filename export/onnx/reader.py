"""An ONNX folder read back: as the state that it was made from, bit for bit.

To the rest of compress the folder is a checkpoint with the tensors of docs/formats.md, which are computed from the graph's
tensors when they are asked for.

The folder may come from anybody. The graph is parsed without its data; every tensor that lies outside of it must be one of its
initializers and lie in `model.onnx.data`, exactly where `datafile.places` puts it. So no path from the file is ever opened, here
or by onnxruntime, and nothing overlaps or reaches beyond the end. Names, types and shapes must be those of config.json's formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto

from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.checks import Kind, require
from compress.export.artifact.config import declared, formats
from compress.export.artifact.engines import Engine
from compress.export.artifact.files import check_marks, contained
from compress.export.artifact.tensors import Placed, state_of
from compress.export.artifact.view import Seen, View, Viewed
from compress.export.native import reader as native_reader
from compress.export.onnx.datafile import DATA, GRAPH, METHOD, DataFile, places
from compress.export.onnx.encode import DTYPES, WIDTHS, Slot, decode, slots
from compress.export.onnx.nodes import code_of
from compress.formats import Dense, Format
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.checkpoint import Spec

READER = "our reader of ONNX artifacts, streamed"


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is an ONNX artifact of ours."""
    return declared(folder).get("quant_method") == METHOD


def open_artifact(folder: Path) -> Model:
    """The model of an ONNX artifact; ModelError for a version that we do not know."""
    contained(folder)
    view = seen(Data.of(folder), formats(folder), shapes(folder))
    model = open_model(str(folder), leave=None)
    del model.config.quantization_config
    return Viewed(model.folder, model.config, model.name, model.revision, leave=None, view=view)


def read(folder: Path) -> State:
    """The state that an ONNX artifact holds; ModelError where its files do not belong together."""
    model = open_artifact(folder)
    check_marks(folder)
    by_stem = {s.stem: s for s in model.graph if not s.tied}
    stored: dict[str, Placed] = {}
    for module, fmt in formats(folder).items():
        if module not in by_stem:
            what = one_line(module)
            raise ModelError(f"{folder / 'config.json'}: gives a format to '{what}', which is no matrix of this model")
        stored[by_stem[module].name] = native_reader.placed(by_stem[module], fmt, model, folder)
    native_reader.check_names(folder, model, stored, {})
    return state_of(model, stored)


def engine(folder: Path, state: State, device: str) -> Engine:
    """onnxruntime with the artifact loaded. ModelError for a damaged folder; EngineError where it does not run."""
    from compress.export.onnx.session import Session

    Data.of(folder)
    return Session(folder, state, device)


# --- what the folder says --------------------------------------------------------------------------------------------


def shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Module -> [outputs, inputs] of every matrix that has a format, as config.json says."""
    found = declared(folder).get("shapes")
    if not isinstance(found, dict) or found.keys() != formats(folder).keys() or not all(map(is_shape, found.values())):
        raise ModelError(f"{folder / 'config.json'}: its quantization_config is broken: 'shapes' is to give the sides of every "
                         "module in 'formats'")  # fmt: skip
    return {module: (side[0], side[1]) for module, side in found.items()}


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 32 for n in value)


def parsed(path: Path) -> ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as e:
        raise ModelError(f"{path}: is no ONNX graph ({type(e).__name__}); it is damaged, copy it again") from None


def tensors_of(message: Any) -> Iterator[TensorProto]:
    """Every tensor in a protobuf message, however deep: in nodes, subgraphs and functions as well."""
    for kind, value in message.ListFields():
        if kind.type == kind.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                if isinstance(part, TensorProto):
                    yield part
                yield from tensors_of(part)


def slot_of(tensor: TensorProto, path: Path) -> Slot:
    """ModelError for a type that we do not write."""
    kinds = {code_of(kind): kind for kind in WIDTHS}
    if tensor.data_type not in kinds or any(n < 1 for n in tensor.dims):
        raise ModelError(f"{path}: '{one_line(tensor.name)}' has a type or shape that we do not write; that is no graph of ours")
    return Slot(tensor.name, kinds[tensor.data_type], tuple(tensor.dims))


# --- its tensors -----------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The data file of a folder: type, shape and offset of every tensor in it, by name."""

    folder: Path
    places: Mapping[str, tuple[Slot, int]] = field(repr=False)
    last: tuple[str, dict[str, torch.Tensor]] = field(default=("", {}), repr=False)  # a matrix is asked for tensor by tensor

    @classmethod
    def of(cls, folder: Path) -> Data:
        """ModelError unless the graph's tensors fill the file as we write it."""
        path, data = folder / GRAPH, folder / DATA
        for file in (path, data):
            if not file.is_file():
                raise ModelError(f"{file}: no such file; the artifact is not whole")
        held = outside(parsed(path), path)
        found = list(places([slot_of(t, path) for t in held]))
        for tensor, (slot, start) in zip(held, found, strict=True):
            said = {e.key: e.value for e in tensor.external_data}
            if (said.get("offset"), said.get("length")) != (str(start), str(slot.nbytes)):
                raise ModelError(f"{path}: '{one_line(slot.name)}' is not where it must be in {DATA}; the file is damaged")
        wanted, size = DataFile(DATA, tuple(s for s, _ in found)).nbytes, data.stat().st_size
        if size != wanted or len({s.name for s, _ in found}) != len(found):
            raise ModelError(
                f"{data}: holds {size:,} bytes, the graph says {wanted:,}; it is truncated or damaged, copy it again"
            )
        return cls(folder, {slot.name: (slot, start) for slot, start in found})

    def kind_of(self, name: str) -> Kind | None:
        """ONNX's word for the type of a tensor, and its shape; None where there is no such tensor."""
        if name not in self.places:
            return None
        slot, _ = self.places[name]
        return slot.kind, slot.shape

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the file; numbers of 4 bits as bytes."""
        slot, start = self.places[name]
        with (self.folder / DATA).open("rb") as file:
            file.seek(start)
            data = bytearray(file.read(slot.nbytes))
        if len(data) != slot.nbytes:
            raise ModelError(f"{self.folder / DATA}: '{name}' cannot be read; the file is truncated")
        flat = torch.frombuffer(data, dtype=DTYPES.get(slot.kind, torch.uint8))
        return flat if slot.kind == "UINT4" else flat.view(slot.shape)


def outside(model: ModelProto, path: Path) -> list[TensorProto]:
    """The initializers that lie in the data file; ModelError for any other tensor that lies outside of the graph."""
    everything = [t for t in tensors_of(model) if t.data_location == TensorProto.EXTERNAL or t.external_data]
    held = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    for tensor in everything:
        said = sorted((e.key, e.value) for e in tensor.external_data)
        if [key for key, _ in said] != ["length", "location", "offset"] or said[1][1] != DATA:
            where = one_line(", ".join(value for key, value in said if key == "location"))
            raise ModelError(f"{path}: '{one_line(tensor.name)}' lies in '{where}', not in {DATA}; nothing else is read")
    if len(everything) != len(held):
        raise ModelError(f"{path}: refers to {DATA} from within a node; that is no graph of ours")
    return held


def seen(data: Data, formats: Mapping[str, Format], shapes: Mapping[str, tuple[int, int]]) -> View:
    """The tensors under the names, and in the form, that a native artifact has them in."""
    coded: dict[str, Seen] = {}
    used: set[str] = set()
    for module, fmt in formats.items():
        if not isinstance(fmt, Dense):
            matrix = CodedMatrix(data, module, fmt, shapes[module])
            used |= {slot.name for slot in matrix.slots}
            for suffix, (dtype, shape) in fmt.tensors(matrix.shape, matrix.scale_dtype).items():
                spec = Spec(f"{module}.{suffix}", dtype, shape)
                coded[spec.name] = Seen(spec, data.folder / DATA, partial(matrix.tensor, suffix))
    plain = {}
    for slot, _ in data.places.values():
        if slot.name not in used:
            if slot.kind not in DTYPES:
                raise ModelError(f"{data.folder / GRAPH}: holds '{one_line(slot.name)}', which config.json does not account for")
            spec = Spec(slot.name, DTYPES[slot.kind], slot.shape)
            plain[slot.name] = Seen(spec, data.folder / DATA, partial(data.read, slot.name))
    return View(data.folder, [*plain.values(), *coded.values()], sum(slot.nbytes for slot, _ in data.places.values()))


class CodedMatrix:
    """One quantized matrix in the data file; ModelError unless its tensors are those of its format."""

    def __init__(self, data: Data, module: str, fmt: Format, shape: tuple[int, int]):
        self.data, self.module, self.format, self.shape = data, module, fmt, shape
        scales = {s.kind for n, (s, _) in data.places.items() if n.startswith(f"{module}.") and n.endswith("weight_scale")}
        self.scale_dtype = torch.float16 if scales == {"FLOAT16"} else torch.bfloat16
        try:
            self.slots = slots(fmt, shape, self.scale_dtype, f"{module}.")
        except FormatError as e:
            raise ModelError(f"{data.folder / 'config.json'}: '{one_line(module)}': {e}") from None
        wanted: dict[str, Kind] = {slot.name: (slot.kind, slot.shape) for slot in self.slots}
        require(data.folder / GRAPH, fmt, wanted, data.kind_of)

    def tensor(self, suffix: str) -> torch.Tensor:
        """One tensor of the format. All are made at once, and kept until another matrix is read."""
        if self.data.last[0] != self.module:
            raw = {slot.name.removeprefix(f"{self.module}."): self.data.read(slot.name) for slot in self.slots}
            try:
                self.data.last = self.module, decode(self.format, self.shape, raw)
            except FormatError as e:
                raise ModelError(f"{self.data.folder / DATA}: '{self.module}': {e}; the file is damaged") from None
        return self.data.last[1][suffix]
