"""Tokens that read a part of a matrix: the modules of a loaded model that leave out rows of silent neurons, and columns of zeros.

A module stays what it is, a Linear with its matrix packed or dense; what is replaced is its `forward`. There are three:

    Chooser   knows which neurons speak: a gate with thresholds, or what a predictor stands in front of. It puts zeros in the
              place of the others, so whatever comes behind may read all, and is right.
    Reader    has a row for each neuron, and is given what the chooser was given: it reads the rows that speak. It asks whether
              its input is the very tensor; where a model's code gives it another, it reads all.
    Skipper   is given a zero for each silent neuron, and reads the columns of the others. It finds them by looking.

What is chosen for several rows is the union of what each needs: of a share ρ of the neurons, 1 - (1 - ρ)^rows were they
independent. Where that is more than `WHOLE`, and for more rows than `FEW`, the matrix is read whole, as it is on other devices
than CPUs: kernels of tiles multiply all they have. Matrices whose columns are skipped are turned over once (neurons.py; a dense
one in place, by its strides). Rows of formats that have none apart (`Can.SKIP_ROWS`), and columns (`Can.SKIP_COLUMNS`), are not
skipped either, nor those of a module that is no Linear, such as GPT-2's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.export.artifact import checks, skipped
from compress.export.artifact.skipped import Skipped
from compress.export.runtime.decode import format_of, named, rows_of
from compress.export.runtime.linear import PackedLinear
from compress.export.runtime.neurons import BLOCK, Neurons, summed
from compress.export.runtime.reading import Artifact
from compress.formats import Can, Dense, Format
from compress.formats.sparsity import (
    IN_CONFIGS,
    WHOLE,
    Sparsity,
    activation_of,
    row_bytes,
    whole_bytes,
)

FEW = 32  # rows of a batch, beyond which nothing is looked for: together they need all


def shape_of(module: Any) -> tuple[int, int]:
    """[out, in] of the matrix of a module, which is a Linear or keeps it the other way round."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape
    return columns, rows


class Matrix:
    """The matrix [N, K] of a module, of which rows or columns are read."""

    def __init__(self, module: Any):
        self.module, self.shape = module, shape_of(module)
        packed = isinstance(module, PackedLinear)
        self.format: Format = format_of(module.format) if packed else Dense(module.weight.dtype)
        self.has_rows = isinstance(module, nn.Linear) and Can.SKIP_ROWS in self.format.can
        self.has_columns = isinstance(module, nn.Linear) and Can.SKIP_COLUMNS in self.format.can
        self._held: tuple[torch.dtype, Any] | None = None

    @property
    def here(self) -> bool:
        """Whether the matrix lies where parts of it can be read."""
        return bool(self.device.type == "cpu") and not (isinstance(self.module, PackedLinear) and self.module.layout == "codes")

    @property
    def device(self) -> torch.device:
        module = self.module
        found: torch.device = module.parts[0].device if isinstance(module, PackedLinear) else module.weight.device
        return found

    def turn(self) -> None:
        """Have columns lie together; what has none is left as it is."""
        if not self.has_columns or not self.here:
            return
        self._held = None
        if isinstance(self.module, PackedLinear):
            self.module.turn()
        else:
            self.module.weight.data = self.module.weight.data.T.contiguous().T

    def _rows(self, dtype: torch.dtype) -> Any:
        """What gives rows, or columns, of a packed matrix in a dtype."""
        if self._held is None or self._held[0] != dtype:
            m = self.module
            tensors = named(m.format, m.shape, m.parts, m.layout)
            kind = Neurons if m.layout == "neurons" else rows_of
            self._held = dtype, kind(self.format, m.shape, tensors, dtype)
        return self._held[1]

    def some_rows(self, x: Tensor, index: Tensor) -> tuple[Tensor, float]:
        """x [m, K] times some rows, [m, rows], and the bytes that were read."""
        bias = self.module.bias
        if not isinstance(self.module, PackedLinear):
            at: Callable[[Tensor], Tensor] = lambda some: self.module.weight.index_select(0, some)  # noqa: E731
        else:
            at = self._rows(x.dtype).at
        size = max(1, BLOCK // (self.shape[1] * x.dtype.itemsize))
        pieces = index.split(size) if len(index) else ()
        found = [functional.linear(x, at(some), None if bias is None else bias[some]) for some in pieces]
        return torch.cat(found, -1) if found else x.new_zeros(len(x), 0), row_bytes(self.format, self.shape, len(index))

    def some_columns(self, x: Tensor, index: Tensor) -> tuple[Tensor, float]:
        """x [m, K], zero but in some columns, times these: [m, N], and the bytes that were read."""
        bias = self.module.bias
        if isinstance(self.module, PackedLinear):
            held = self._rows(x.dtype)
            return held.product(x, index, bias), float(held.nbytes(index))
        turned, n = self.module.weight.T, self.shape[0]
        found = summed(x, index, lambda some: turned.index_select(0, some), n, bias)
        return found, float(n * self.module.weight.itemsize * len(index))


@dataclass(eq=False)
class Choice:
    """What a chooser found for the input in hand: which neurons speak, or None where all are read."""

    of: Tensor | None = None
    index: Tensor | None = None


class Sparse(ABC):
    """What stands for the `forward` of a module. read: bytes of its matrix, and of what it chooses by, that were read so far;
    passes: how often it was asked; most: bytes that a pass may read."""

    def __init__(self, module: Any, how: Sparsity | None = None):
        self.module, self.matrix, self.read, self.passes, self.whole = module, Matrix(module), 0.0, 0, module.forward
        self.most = whole_bytes(self.matrix.format, self.matrix.shape) + (0 if how is None else how.nbytes(self.matrix.shape))

    def __call__(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.multiplied(x)

    @abstractmethod
    def multiplied(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N], of all that is not left out."""

    @property
    def unread(self) -> float:
        """Bytes that were left unread so far."""
        return self.passes * self.most - self.read

    def all(self, x: Tensor) -> Tensor:
        """The product with the whole matrix."""
        self.read += whole_bytes(self.matrix.format, self.matrix.shape)
        found: Tensor = self.whole(x)
        return found

    def few(self, x: Tensor, can: bool) -> bool:
        return can and self.matrix.here and x.numel() <= FEW * x.shape[-1]

    def spread(self, y: Tensor, index: Tensor, width: int, like: Tensor) -> Tensor:
        """y [m, rows] where it belongs, zeros elsewhere: [.., width]."""
        return y.new_zeros(len(y), width).index_copy_(1, index, y).view(*like.shape[:-1], width)


class Chooser(Sparse):
    """The matrix whose neurons are chosen."""

    def __init__(self, module: Any, how: Sparsity, choice: Choice):
        super().__init__(module, how)
        self.how, self.choice, self.can = how, choice, self.matrix.has_rows

    def multiplied(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N], zero where neurons are silent."""
        tensors = {name: getattr(self.module, name) for name in self.how.tensors(self.matrix.shape)}
        self.read += self.how.nbytes(self.matrix.shape)
        m = self.how.neurons(self.matrix.shape)
        if self.how.kind == "predictor":
            active = self.how.active(x, None, tensors)
            index = self._chosen(x, active)
            if index is None or not self.can:
                return self.how.outputs(self.all(x), active)
            wanted = torch.cat([index, m + index]) if self.how.joined else index
            y = self._read_rows(x, wanted, self.matrix.shape[0])
            return self.how.outputs(y, active)
        if not self.how.joined or not self.few(x, self.can):
            y = self.all(x)
            active = self.how.active(x, y, tensors)
            self._chosen(x, active)
            return self.how.outputs(y, active)
        gate = self._read_rows(x, torch.arange(m), self.matrix.shape[0])  # `up` waits until it is known what is asked of it
        active = self.how.active(x, gate, tensors)
        index = self._chosen(x, active)
        up = torch.arange(m) if index is None else index
        return self.how.outputs(gate + self._read_rows(x, m + up, self.matrix.shape[0]), active)

    def _read_rows(self, x: Tensor, index: Tensor, width: int) -> Tensor:
        y, read = self.matrix.some_rows(x.reshape(-1, x.shape[-1]), index)
        self.read += read
        return self.spread(y, index, width, x)

    def _chosen(self, x: Tensor, active: Tensor) -> Tensor | None:
        """The neurons that some row of the batch needs, for the readers too; None where all are to be read."""
        index = None
        if self.few(x, True):
            found = active.flatten(0, -2).any(0).nonzero()[:, 0]
            index = found if len(found) <= WHOLE * active.shape[-1] else None
        self.choice.of, self.choice.index = x, index
        return index


class Reader(Sparse):
    """A matrix with a row for each neuron."""

    def __init__(self, module: Any, choice: Choice):
        super().__init__(module)
        self.choice, self.can = choice, self.matrix.has_rows

    def multiplied(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N], zero where neurons are silent."""
        index = self.choice.index if self.choice.of is x else None
        self.choice.of = None
        if index is None or not self.few(x, self.can):
            return self.all(x)
        y, read = self.matrix.some_rows(x.reshape(-1, x.shape[-1]), index)
        self.read += read
        return self.spread(y, index, self.matrix.shape[0], x)


class Skipper(Sparse):
    """A matrix that is given zeros; with `how`, one that puts them where inputs are small."""

    def __init__(self, module: Any, how: Sparsity | None = None):
        super().__init__(module, how)
        self.matrix.turn()
        self.how, self.can = how, self.matrix.has_columns

    def multiplied(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        if self.how is not None:
            self.read += self.how.nbytes(self.matrix.shape)
            x = self.how.inputs(x, {name: getattr(self.module, name) for name in self.how.tensors(self.matrix.shape)})
        if self.few(x, self.can):
            flat = x.reshape(-1, x.shape[-1])
            index = (flat != 0).any(0).nonzero()[:, 0]
            if len(index) <= WHOLE * flat.shape[1]:
                y, read = self.matrix.some_columns(flat, index)
                self.read += read
                return y.view(*x.shape[:-1], -1)
        return self.all(x)


# --- in a model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What tokens leave out, by paths of modules in a model."""

    skipped: Mapping[str, Skipped] = field(default_factory=dict)


def check(model: Any, artifact: Artifact, path_of: Callable[[str], str]) -> None:
    """ModelError where config.json, weights and model do not agree on what is left out; `path_of` as for `hold`."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()

    def shaped(stem: str) -> tuple[int, int] | None:
        module = model.get_submodule(path_of(stem))
        known = isinstance(module, nn.Linear | Conv1D) and module not in ends
        return shape_of(module) if known else None

    activation = IN_CONFIGS.get(activation_of(model.config), "")
    skipped.check(artifact.skipped, shaped, activation, artifact.folder / "config.json")
    for stem, said in artifact.skipped.items():
        listing = said.how.tensors(shape_of(model.get_submodule(path_of(stem))))
        wanted = {f"{stem}.{suffix}": kind for suffix, kind in listing.items()}
        checks.require(artifact.folder, said.how, wanted, checks.in_specs(artifact.specs))


def hold(model: nn.Module, left_out: Mapping[str, Skipped], path_of: Callable[[str], str]) -> tuple[dict[str, str], Plan]:
    """Give modules places for thresholds and predictors; name on disk -> name in the model, and what is to be left out.
    `path_of`: the module of a stem on disk."""
    table, found = dict[str, str](), dict[str, Skipped]()
    for stem, said in left_out.items():
        path = path_of(stem)
        module = model.get_submodule(path)
        for suffix, (dtype, size) in said.how.tensors(shape_of(module)).items():
            module.register_buffer(suffix, torch.empty(size, dtype=dtype, device="meta"))
            table[f"{stem}.{suffix}"] = f"{path}.{suffix}"
        found[path] = Skipped(said.how, tuple(map(path_of, said.rows)), tuple(map(path_of, said.columns)))
    return table, Plan(found)


def arrange(model: nn.Module, plan: Plan) -> None:
    """Have the modules of a loaded model leave out what they are to; ModelError where thresholds are none."""
    for path, said in plan.skipped.items():
        module = model.get_submodule(path)
        said.how.require({suffix: getattr(module, suffix) for suffix in said.how.tensors(shape_of(module))}, path)
        if said.how.kind == "teal":
            put(model, path, lambda m, how=said.how: Skipper(m, how))  # type: ignore[misc]
            continue
        choice = Choice()
        put(model, path, lambda m, how=said.how, choice=choice: Chooser(m, how, choice))  # type: ignore[misc]
        for other in said.rows:
            if other != path:
                put(model, other, lambda m, choice=choice: Reader(m, choice))  # type: ignore[misc]
        for other in said.columns:
            put(model, other, Skipper)


def put(model: nn.Module, path: str, made: Callable[[Any], Sparse]) -> None:
    module: Any = model.get_submodule(path)
    module.forward = made(module)


def bytes_read(model: nn.Module) -> tuple[float, float]:
    """Bytes of matrices, thresholds and predictors that the sparse modules of a model have read since this was last asked, and
    those that they have left unread."""
    read = unread = 0.0
    for module in model.modules():
        held = vars(module).get("forward")
        if isinstance(held, Sparse):
            read, unread = read + held.read, unread + held.unread
            held.read, held.passes = 0.0, 0
    return read, unread
