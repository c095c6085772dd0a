"""Packed matrices turned over: what one input, or neuron, meets lies together, so that its column can be read alone.

The tensors of the layout "neurons" of a matrix [N, K], in a format of integers or of a table:

    neuron_packed  int32 [K, words of N]   the codes of each column, packed as those of rows are
    neuron_scale   [G, N]                  the scales of a group of inputs, for all outputs
    neuron_zero    uint8 [G, N]            of asymmetric integers
    weight_table                           of formats with a table of their own

Bit for bit the weights are those of the canonical layout. Groups still lie along the inputs, so columns share scales: a few
columns cost the scales of all groups that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compress.export.runtime.decode import Rows, Shape
from compress.formats import Format, Int, bitpack
from compress.formats.codebooks import NF, Lut

BLOCK = 1 << 20  # bytes of columns in hand at once: as many as stay in cache


def turned(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the layout "neurons" of a matrix in the canonical one."""
    assert isinstance(fmt, Int | NF | Lut)
    codes = bitpack.unpack(tensors["weight_packed"], fmt.bits, shape[1])
    found = {"neuron_packed": bitpack.pack(codes.T.contiguous(), fmt.bits),
             "neuron_scale": tensors["weight_scale"].T.contiguous()}  # fmt: skip
    if not fmt.symmetric:
        found["neuron_zero"] = bitpack.unpack(tensors["weight_zero_point"].T, fmt.bits, shape[0]).contiguous()
    return found | ({"weight_table": tensors["weight_table"]} if "weight_table" in tensors else {})


class Neurons(Rows):
    """The weights of any columns of a matrix [N, K] that is turned over."""

    def __init__(self, fmt: Format, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype):
        assert isinstance(fmt, Int | NF | Lut)
        self.fmt, self.shape, self.dtype = fmt, (shape[1], shape[0]), dtype
        self.packed, self.scale, self.zero = tensors["neuron_packed"], tensors["neuron_scale"], tensors.get("neuron_zero")
        self.inner = dtype if isinstance(fmt, Int) and self.scale.dtype == dtype else torch.float32
        self.group = torch.arange(shape[1], device=self.packed.device) // fmt.width(shape[1])
        self.table = self._table(tensors)

    def at(self, rows: slice | Tensor) -> Tensor:
        """The weights [columns, N], turned over, in the dtype."""
        levels = self._levels(self.packed[rows])[:, : self.shape[1]]
        group = self.group[rows] if len(self.scale) > 1 else slice(None)
        if self.zero is not None:
            levels -= self.zero[group].to(self.inner)
        levels *= self.scale[group].to(self.inner)
        return levels.to(self.dtype)

    def product(self, x: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [m, K] times the transpose of the matrix, of which some columns are read and all others met by zeros: [m, N] in the
        dtype of x, summed in fp32."""
        return summed(x, columns, self.at, self.shape[1], bias)

    def nbytes(self, columns: Tensor) -> int:
        """Bytes of the codes of some columns, and of the scales of all groups that they are in."""
        groups = len(self.group[columns].unique())
        scales = self.scale[:1].nbytes + (0 if self.zero is None else self.zero[:1].nbytes)
        return len(columns) * self.packed[:1].nbytes + groups * scales


def summed(x: Tensor, columns: Tensor, at: Callable[[Tensor], Tensor], n: int, bias: Tensor | None) -> Tensor:
    """x [m, K] times some columns, a block of them at a time, which `at` gives turned over: [m, n] in the dtype of x."""
    total = torch.zeros(len(x), n, dtype=torch.float32, device=x.device)
    for some in columns.split(max(1, BLOCK // (n * x.dtype.itemsize))) if len(columns) else ():
        total += x[:, some] @ at(some)
    return (total if bias is None else total + bias.float()).to(x.dtype)
