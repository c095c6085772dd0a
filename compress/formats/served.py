"""Formats with an activation half, `W/A`: what a matrix is stored in, and what its inputs are rounded to while it multiplies.

    int8:channel/int8:token   fp8:channel/fp8:token   int4:g128/int8:token   nvfp4/nvfp4   mxfp4/mxfp8

The stored matrix is what the first half says, and solvers see nothing else; who runs the model rounds the inputs (`inputs`). The
tensors are those of the first half, but for 8-bit integers, which engines that multiply integers read as they are, and what the
second half measures:

    weight              int8 [N, K], the code less 128   in place of weight_packed and weight_shape
    input_global_scale  fp32 [1]                         of nvfp4 activations: see activations.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import bitpack
from compress.formats.activations import Activation, divisor
from compress.formats.floats import CHUNK, Float
from compress.formats.grid import Can, Listing, Shape, listed_bytes
from compress.formats.ints import Int

Rounding = Callable[[Tensor], Tensor]  # activations [..., K] -> the same as the engine multiplies by them


@dataclass(frozen=True)
class Served:
    """A stored format and that of the activations it meets. It has no grid of its own: who solves it solves `weight`."""

    weight: Int | Float
    input: Activation
    can: ClassVar[Can] = Can.NOTHING

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Int | Float) or not self.weight.symmetric:
            raise FormatError(f"activations are rounded for int formats without ':asym' and for fp8, nvfp4, mxfp4 and mxfp8, not "
                              f"for {self.weight}")  # fmt: skip

    def __str__(self) -> str:
        return f"{self.weight}/{self.input}"

    @property
    def joint(self) -> bool:
        """Whether parameters belong to one matrix alone: what is measured of inputs is the same for all that read them."""
        return self.weight.joint

    @property
    def bytes_of_codes(self) -> bool:
        """Whether codes are stored as they are, a byte each, which `Int` itself would pack in words."""
        return isinstance(self.weight, Int) and self.weight.bits == 8

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        self.weight.check(shape)
        self.input.check(shape[1])

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        listing = self.weight.tensors(shape, scale_dtype)
        if self.bytes_of_codes:
            listing = {"weight": (torch.int8, tuple(shape)), "weight_scale": listing["weight_scale"]}
        return listing | ({Activation.GLOBAL: (torch.float32, (1,))} if self.input.measured else {})

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`; plain scales take 16 bits."""
        return listed_bytes(self.tensors(shape))

    def held(self, packed: Mapping[str, Tensor], most: float = 0.0) -> dict[str, Tensor]:
        """The tensors that `tensors` lists, from those of the weight's own format. most: the largest magnitude of its inputs."""
        found = dict(packed)
        if self.bytes_of_codes:
            codes = bitpack.unpack(found["weight_packed"], 8, int(found["weight_shape"][1]))
            found = {"weight": (codes.int() - 128).to(torch.int8), "weight_scale": found["weight_scale"]}
        return found | ({Activation.GLOBAL: torch.tensor([divisor(most)])} if self.input.measured else {})

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`; inputs are another matter."""
        if not self.bytes_of_codes:
            return self.weight.dequantize(tensors, dtype)
        codes, scale = tensors["weight"], tensors["weight_scale"]
        out, rows = torch.empty(codes.shape, dtype=dtype, device=codes.device), max(1, CHUNK // codes.shape[1])
        for i in range(0, len(codes), rows):
            part = codes[i : i + rows].float().unflatten(1, (scale.shape[1], -1))
            out[i : i + rows] = part.mul_(scale[i : i + rows, :, None].float()).flatten(1)
        return out

    def inputs(self, tensors: Mapping[str, Tensor]) -> Rounding:
        """What rounds the inputs of a matrix that is stored in these tensors."""
        divisor = tensors.get(Activation.GLOBAL)
        return lambda x: self.input.round(x, None if divisor is None else divisor.to(x.device))
