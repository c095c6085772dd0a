"""What every exporter is asked: the contract, and what it works on.

An exporter is a frozen pydantic model like a pass. It says beforehand what it cannot hold (`check`), what the user should
know (`remarks`) and the exact files (`layout`); it writes into a folder beside its final name and proves the artifact (place.py).
How tensors get into the files and back out is in tensors.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from compress.errors import ExportError
from compress.formats import Coded, Dense, Ecq, Factored, Format, Ggml, Rotated, numbers_of
from compress.model.model import Model
from compress.model.skeleton import free
from compress.state import State
from compress.state.graph import Graph, total
from compress.state.plan import size

Way = TypeVar("Way")
INPUTS = "inputs"  # what `State.serving` says of the inputs of sites, under their names
PASSES = 18  # of a proof: two for windows, and a token each
SECONDS_PER_WEIGHT = 1.7e-9  # that a pass of few tokens takes: read, unpacked, multiplied, on one core of a server CPU


@dataclass(frozen=True)
class Proof:
    """How an artifact was checked: the engine that loaded it, the largest difference of a logit from the run's own, and how many
    tokens of a greedy continuation are the run's; 0 where none was generated."""

    engine: str
    difference: float
    remark: str = ""
    greedy: int = 0


@dataclass(frozen=True)
class Job:
    """What an exporter works on: the source, the state to write, tokens to prove it with, and the text of the model card."""

    model: Model
    state: State
    tokens: torch.Tensor | None
    key: str
    card: Callable[[Mapping[str, Any]], str]
    device: str = "cpu"


def way_for(ways: Mapping[type, Way], exporter: str, site: str, fmt: Format) -> Way:
    """What an exporter of integers does with the kind of a site's format; ExportError where it has no entry for that."""
    if isinstance(fmt, Factored) and Factored not in ways:
        raise ExportError(f"{exporter}: '{site}' has {fmt}, two factors in place of a matrix, and engines of this layout have no "
                          "such layer; export native or onnx instead, or leave 'factorize' out")  # fmt: skip
    refuse_ours(exporter, site, fmt)
    if type(fmt) not in ways:
        refuse_blocks(exporter, site, fmt)
        raise ExportError(f"{exporter} holds integers; '{site}' has {fmt}: export native instead, or use int formats only")
    return ways[type(fmt)]


def refuse_ours(exporter: str, site: str, fmt: Format) -> None:
    """ExportError for a site in a format that only our own runtime reads."""
    numbers = numbers_of(fmt)
    if isinstance(numbers, Coded):
        kind = "entropy-coded" if isinstance(numbers, Ecq) else "trellis-coded"
        raise ExportError(f"{exporter}: '{site}' has {fmt}, which is {kind}, and no engine of this layout reads that; "
                          "export native instead, or use int or lut formats")  # fmt: skip
    if isinstance(fmt, Rotated):
        raise ExportError(f"{exporter}: '{site}' has {fmt}, whose inputs and outputs are rotated, which no engine of this layout "
                          f"does; export native instead, or use {fmt.base}")  # fmt: skip


def refuse_blocks(exporter: str, site: str, fmt: Format) -> None:
    """ExportError for a site in blocks of llama.cpp's."""
    if isinstance(fmt, Ggml):
        raise ExportError(f"{exporter}: '{site}' has {fmt}, blocks of llama.cpp's, and no engine of this layout reads those; "
                          "export gguf or native instead, or use int formats")  # fmt: skip


def refuse_packed_table(exporter: str, state: State, name: str, fmt: Format) -> None:
    """ExportError for an embedding that is to be packed, which the engines of an exporter cannot look rows up in."""
    site = state.graph[name]
    if site.role != "embed" or isinstance(fmt, Dense):
        return
    todo = "leave it out of 'pins', or export native, onnx or gguf"
    if any(other.tied == name for other in state.graph):
        todo = (f"export native, onnx or gguf, or put 'edit: {{untie: true}}' in front and pin 'lm_head' alone: the dense table "
                f"then takes {size(site.numel * state.dtype.itemsize)} beside the head")  # fmt: skip
    raise ExportError(f"{exporter}: '{name}' has {fmt}, and engines of this layout look rows up in dense tables only; {todo}")


def refuse_sparse(exporter: str, state: State) -> None:
    """ExportError where tokens are to leave neurons out, which no engine but our runtime does."""
    if state.sparsity:
        raise ExportError(f"{exporter}: tokens leave out a part of '{next(iter(state.sparsity))}', and engines of this layout "
                          "read all of it; export native, or leave 'sparsify' out")  # fmt: skip


def refuse_free_shapes(exporter: str, state: State) -> None:
    """ExportError for layers that differ in shape, where stock engines are to load what is written."""
    if free(state.config):
        raise ExportError(f"{exporter}: layers differ in shape, and no stock engine loads such a '{state.graph.family}'; let all "
                          "layers keep the same number, or export native or onnx")  # fmt: skip


def state_bytes(state: State, width: int) -> int:
    """Bytes of all weights of a model in numbers of `width` bytes."""
    return width * (total(state.graph) + sum(math.prod(shape) for shape in state.graph.parameters.values()))


def unpacked_bytes(state: State) -> int:
    """Memory of an engine that unpacks every matrix; what it unpacks, and what is dense already, is mapped from files."""
    return state.dtype.itemsize * sum(state.graph[name].numel for name in state.formats)


def headless(graph: Graph) -> bool:
    """Whether a model predicts no tokens: an embedder, or a classifier."""
    return not any(site.role == "head" for site in graph)


class Files(Protocol):
    """What an exporter will write: every weight file by name and bytes. `tensor_bytes` leaves headers out."""

    @property
    def files(self) -> Sequence[Any]: ...
    @property
    def tensor_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Exporter(BaseModel, ABC):
    """One kind of artifact. Subclasses are listed in table.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    tells: ClassVar[frozenset[str]] = frozenset()  # of `State.serving`, what it has a place for: INPUTS, or that of a name

    @abstractmethod
    def check(self, state: State) -> None:
        """ExportError where the foreseen state cannot be held by this kind of artifact."""

    @abstractmethod
    def remarks(self, state: State) -> list[str]:
        """What the user should know about engines before the run."""

    @abstractmethod
    def layout(self, model: Model, state: State) -> Files:
        """The weight files to be, to the byte."""

    def grown(self, fmt: Format) -> float:
        """Bits a weight that a matrix takes in this kind of artifact beyond its format's own."""
        return 0.0

    def proof_bytes(self, state: State, layout: Files) -> int:
        """Memory of the engine that proves an artifact: of one that keeps what is packed as it is, mapped from its file, and
        unpacks one matrix at a time."""
        return state.dtype.itemsize * max((s.numel for s in state.graph.linear), default=0)

    def proof_seconds(self, state: State) -> float:
        """Seconds of the engine that proves an artifact: passes for windows and for each token of a text."""
        heads = sum(s.numel for s in state.graph if s.role == "head")
        return 0.5 + PASSES * SECONDS_PER_WEIGHT * (total(state.graph.linear) + heads)

    @abstractmethod
    def write(self, job: Job, folder: Path) -> None:
        """Write everything into an empty folder."""

    @abstractmethod
    def prove(self, job: Job, folder: Path) -> Proof:
        """Load what was written and compare; ExportError on a mismatch."""
