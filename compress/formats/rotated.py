"""A matrix stored in rotated coordinates: W = S_o H_o C H_i S_i, with C [N, K] in a quantized format.

H are block Hadamard matrices over the square root of their side, S are signs; each is its own inverse. So C = H_o S_o W S_i H_i,
and y = W x is S_o H_o (C (H_i S_i x)): an engine turns what goes in, multiplies as it would by C, and turns what comes out. A
rotation spreads what is large over its block, so that no weight and no input stands out.

Inputs are turned in blocks of `block`, which divide K; outputs in blocks of the largest power of two, up to `block`, that divides
N. Signs are a function of the place in the block (see `signs`), so nothing is stored for them, and bytes are those of C.

A matrix whose rows are looked up, an embedding, has its inputs turned alone (`:ri128`): outputs are in blocks of 1, as where N is
odd, so a row is turned back by itself. All outputs then have the sign of the first place of a block.

Where weights are turned, sums are taken by butterflies in one order, so the bits are the same on any device and in any number of
threads; activations are multiplied by a small matrix, which is faster where they are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.codebooks import NF, Lut
from compress.formats.entropy import Ecq
from compress.formats.grid import Can, Listing, Shape
from compress.formats.ints import Int
from compress.formats.trellis import Tcq

BLOCKS = (16, 32, 64, 128, 256)
INPUTS, OUTPUTS = 0, 1  # sides of a matrix, and the bit of the hash that is their sign
_CHUNK = 1 << 17  # weights turned at a time, so that the temporaries stay in cache
_MIX, _WORD = 0x45D9F3B, (1 << 32) - 1


@dataclass(frozen=True)
class Rotated:
    """A format whose matrix is stored in rotated coordinates, inputs in blocks of `block`. It has no grid of its own: who solves
    it turns the weights and what they are weighed by (`turn`), and solves `base`. inputs_only: outputs are not mixed."""

    base: Int | NF | Lut | Ecq | Tcq
    block: int
    inputs_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.base, Int | NF | Lut | Ecq | Tcq):
            raise FormatError(f"a rotation goes with a quantized matrix, as in int4:g64:r128, not with {self.base}")
        if self.block not in BLOCKS:
            raise FormatError(f"a rotation has blocks of {', '.join(map(str, BLOCKS))} inputs, not {self.block}")

    def __str__(self) -> str:
        return f"{self.base}:r{'i' * self.inputs_only}{self.block}"

    @property
    def can(self) -> Can:
        """Rows are what those of `base` are, unless outputs are mixed."""
        return self.base.can & Can.GIVE_ROWS if self.inputs_only else Can.NOTHING

    @property
    def joint(self) -> bool:
        """Whether parameters belong to the whole matrix; a rotation is known from its shape."""
        return self.base.joint

    def outputs(self, n: int) -> int:
        """The side of the blocks in which `n` outputs are turned; 1: they are not."""
        return 1 if self.inputs_only else min(self.block, n & -n)

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        self.base.check(shape)
        if shape[1] % self.block:
            fitting = [f"r{'i' * self.inputs_only}{b}" for b in BLOCKS if shape[1] % b == 0]
            hint = f"blocks that do: {', '.join(fitting)}" if fitting else f"none does, use {self.base}"
            raise FormatError(f"{self}: blocks of {self.block} do not divide {shape[1]} inputs; {hint}")

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]: those of `base`."""
        self.check(shape)
        return self.base.tensors(shape, scale_dtype)

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`."""
        self.check(shape)
        return self.base.nbytes(shape)

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] as it was before it was turned, in `dtype`; turned back in fp32 and rounded once."""
        return self.turn_back(self.base.dequantize(tensors, torch.float32), dtype)

    def turn(self, W_nk: Tensor, outputs: int) -> Tensor:
        """C = H_o S_o W S_i H_i, in the dtype of W, of rows of a matrix with so many outputs: all of them, or whole blocks."""
        side = self.outputs(outputs)
        return _by_parts(W_nk, side, lambda W: turned(turned(W, OUTPUTS, side).T, INPUTS, self.block).T)

    def turn_inputs(self, W_nk: Tensor) -> Tensor:
        """W S_i H_i: the inputs alone, of any rows."""
        return _by_parts(W_nk, 1, lambda W: turned(W.T, INPUTS, self.block).T)

    def turn_back(self, C_nk: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """W of a whole matrix C, or, where inputs alone are turned, of any rows: the inverse of `turn`, rounded to `dtype`."""
        side = self.outputs(len(C_nk))
        return _by_parts(C_nk, side, lambda C: turned_back(turned_back(C, OUTPUTS, side).T, INPUTS, self.block).T, dtype)

    def into(self, x_mk: Tensor) -> Tensor:
        """Activations as the matrix C takes them: H_i S_i x, in fp32 or better."""
        return _times(x_mk, rotation(INPUTS, self.block, x_mk.device))

    def out_of(self, y_mn: Tensor) -> Tensor:
        """What the matrix W puts out, of what C does: S_o H_o y."""
        return _times(y_mn, rotation(OUTPUTS, self.outputs(y_mn.shape[1]), y_mn.device).T)

    def into_gradient(self, g_mn: Tensor) -> Tensor:
        """A gradient at the outputs of W as one at those of C."""
        return _times(g_mn, rotation(OUTPUTS, self.outputs(g_mn.shape[1]), g_mn.device))

    def out_of_gradient(self, g_mk: Tensor) -> Tensor:
        """A gradient at the inputs of C as one at those of W."""
        return _times(g_mk, rotation(INPUTS, self.block, g_mk.device).T)


@lru_cache(maxsize=64)
def signs(side: int, block: int) -> Tensor:
    """The signs, fp32 [block], of the places in a block: -1 where bit `side` of a hash of the place, counted from 1, is set."""
    x = torch.arange(1, block + 1, device="cpu")  # whatever device and dtype are the default while a model is built
    for _ in range(2):
        x = ((x >> 16) ^ x) * _MIX & _WORD
    return torch.where((((x >> 16) ^ x) >> side) & 1 == 1, -1.0, 1.0).float()


@lru_cache(maxsize=64)
def rotation(side: int, block: int, device: torch.device | str = "cpu") -> Tensor:
    """S H [block, block], fp32: what a row of activations is multiplied by."""
    s_b = signs(side, block)
    return (s_b[:, None] * hadamard(torch.eye(block, device="cpu", dtype=torch.float32), block)).to(device)


def hadamard(X_nm: Tensor, block: int) -> Tensor:
    """H X / sqrt(block) for each `block` rows of X, a power of two, by butterflies."""
    (n, m), half = X_nm.shape, 1
    X_nm, spare = X_nm.clone(memory_format=torch.contiguous_format), X_nm.new_empty(n, m)
    while half < block:
        pairs, mixed = X_nm.view(-1, 2, half, m), spare.view(-1, 2, half, m)
        torch.add(pairs[:, 0], pairs[:, 1], out=mixed[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=mixed[:, 1])
        X_nm, spare, half = spare, X_nm, 2 * half
    return X_nm.mul_(1 / math.sqrt(block))


def turned(X_nm: Tensor, side: int, block: int) -> Tensor:
    """H S X by rows: each row has its sign, then each block of rows is mixed."""
    return hadamard(X_nm * _column(X_nm, side, block), block)


def turned_back(X_nm: Tensor, side: int, block: int) -> Tensor:
    """S H X by rows."""
    return hadamard(X_nm, block).mul_(_column(X_nm, side, block))


def _column(X_nm: Tensor, side: int, block: int) -> Tensor:
    return signs(side, block).to(X_nm).repeat(len(X_nm) // block)[:, None]


def _times(x_mn: Tensor, R_bb: Tensor) -> Tensor:
    """x R by blocks, in fp32 or in fp64."""
    wide = torch.promote_types(x_mn.dtype, torch.float32)
    return (x_mn.to(wide).reshape(-1, len(R_bb)) @ R_bb.to(wide)).view(x_mn.shape)


def _by_parts(X_nk: Tensor, block: int, f: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """`f` of some blocks of rows after the other, in `dtype` or that of X."""
    out, step = X_nk.new_empty(X_nk.shape, dtype=dtype), max(1, _CHUNK // (X_nk.shape[1] * block)) * block
    for i in range(0, len(X_nk), step):
        out[i : i + step] = f(X_nk[i : i + step])
    return out
