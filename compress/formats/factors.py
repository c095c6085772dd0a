"""Formats of two factors: beside a quantized matrix, W = Q + B A, or in its place, W = B A.

Shapes: W [N = outputs, K = inputs], A [r, K], B [N, r]. A factor is dense, or quantized in any of the formats of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats.codebooks import NF, Lut
from compress.formats.grid import Can, Listing, Shape, listed_bytes, plain
from compress.formats.ints import BF16, Dense, Int
from compress.formats.rotated import Rotated

_CHUNK = 1 << 22  # weights to which a product of factors is added, or that one makes, at a time


@dataclass(frozen=True)
class LowRank:
    """A quantized matrix Q plus a product of rank `rank`: W = Q + B A, with A [r, K] and B [N, r], stored in `factors`.

    Quantized factors are A [r, K] and the transpose of B, [r, N], so that groups run along the long side. Dense ones are
    `lora_A.weight` [r, K] and `lora_B.weight` [N, r], as PEFT names and shapes them.
    """

    base: Int | NF | Lut
    rank: int
    factors: Int | NF | Lut | Dense = BF16
    can: ClassVar[Can] = Can.LEARN

    def __post_init__(self) -> None:
        if isinstance(self.base, Rotated):
            raise FormatError(f"low-rank factors do not go with rotated matrices, such as {self.base}")
        if not isinstance(self.base, Int | NF | Lut):
            raise FormatError(f"low-rank factors go with a quantized matrix, as in int4:g64+r16, not with {self.base}")
        if not isinstance(self.factors, Int | NF | Lut | Dense):
            raise FormatError(f"low-rank factors are dense or quantized, as in int4:g64+r16:int8:g64, not {self.factors}")
        if self.rank < 1:
            raise FormatError(f"a rank is 1 or more, not {self.rank}; without factors it is {self.base}")

    def __str__(self) -> str:
        return f"{self.base}+r{self.rank}" + ("" if self.factors == BF16 else f":{self.factors}")

    @property
    def joint(self) -> bool:
        """The factors belong to one matrix."""
        return True

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        self.base.check(shape)
        if self.rank > min(shape):
            raise FormatError(f"{self}: the rank is above {min(shape)}, the smaller side of the matrix {list(shape)}; lower it")
        for side in shape:
            self.factors.check((self.rank, side))

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]: Q's, then `lora_A.*`, `lora_B.*`."""
        self.check(shape)
        listing = self.base.tensors(shape, scale_dtype)
        for name, side in self.factor_shapes(shape).items():
            listing |= {f"{name}.{suffix}": entry for suffix, entry in self.factors.tensors(side, scale_dtype).items()}
        return listing

    def factor_shapes(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """The factors' names, and their shapes as they are stored beside a matrix of `shape` [N, K]."""
        n, k = shape
        return {"lora_A": (self.rank, k), "lora_B": (n, self.rank) if isinstance(self.factors, Dense) else (self.rank, n)}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`, factors included."""
        return listed_bytes(self.tensors(shape))

    def pack(
        self, base: Mapping[str, Tensor], A_rk: Tensor, B_nr: Tensor, scale_dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Tensor]:
        """The packed tensors of Q and the factors, fp32, as the tensors that `tensors` lists; the factors are rounded to nearest.

        FormatError where the factors are not of this rank, or do not go with the matrix.
        """
        shape = tuple(int(x) for x in base["weight_shape"])
        if (B_nr.shape[0], A_rk.shape[1]) != shape or {A_rk.shape[0], B_nr.shape[1]} != {self.rank}:
            raise FormatError(f"{self}: factors {list(B_nr.shape)} and {list(A_rk.shape)} do not go with a matrix {list(shape)}; "
                              "give B [outputs, rank] and A [rank, inputs]")  # fmt: skip
        self.check(shape)
        out = dict(base)
        for name, factor in (("lora_A", A_rk), ("lora_B", B_nr.T)):
            out |= {f"{name}.{suffix}": t for suffix, t in self._pack_factor(factor, name == "lora_B", scale_dtype).items()}
        return out

    def factor_matrices(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r], fp32, as they are stored."""
        a, b = ({s.removeprefix(p): t for s, t in tensors.items() if s.startswith(p)} for p in ("lora_A.", "lora_B."))
        B = self.factors.dequantize(b, torch.float32)
        return self.factors.dequantize(a, torch.float32), B if isinstance(self.factors, Dense) else B.T

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Q + B A [N, K], summed in fp32 and rounded once, to `dtype`."""
        W_nk = self.base.dequantize(tensors, torch.float32)
        for rows, part in products(*self.factor_matrices(tensors)):
            W_nk[rows] += part
        return W_nk.to(dtype)

    def _pack_factor(self, F_rx: Tensor, transposed: bool, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(self.factors, Dense):
            return {"weight": (F_rx.T if transposed else F_rx).to(self.factors.dtype).contiguous()}
        return self.factors.pack(*plain(F_rx.float().contiguous(), self.factors, scale_dtype))


@dataclass(frozen=True)
class Factored:
    """A product of two matrices in place of one: W = B A, of rank `rank`; either is stored in `factors`.

    Both lie as matrices of their own, outputs by inputs: A [r, K] is what an engine multiplies by first, B [N, r] after it. So
    whatever holds for a matrix in `factors` holds for either: its tensors, its kernels, its solvers.
    """

    rank: int
    factors: Int | NF | Lut | Dense = BF16
    can: ClassVar[Can] = Can.LEARN
    joint: ClassVar[bool] = True  # the factors belong to one matrix

    def __post_init__(self) -> None:
        if not isinstance(self.factors, Int | NF | Lut | Dense):
            raise FormatError(f"factors are dense or quantized, as in lr64:int8:channel, not {self.factors}")
        if self.rank < 1:
            raise FormatError(f"a rank is 1 or more, not {self.rank}")

    def __str__(self) -> str:
        return f"lr{self.rank}" + ("" if self.factors == BF16 else f":{self.factors}")

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        if self.rank > min(shape):
            raise FormatError(f"{self}: the rank is above {min(shape)}, the smaller side of the matrix {list(shape)}; lower it")
        A, B = self.factor_shapes(shape).values()
        self.factors.check(A)
        try:
            self.factors.check(B)
        except FormatError as e:
            raise FormatError(f"the second factor's inputs are the rank, and {e}, or a rank that groups divide") from None

    def factor_shapes(self, shape: Shape) -> dict[str, tuple[int, int]]:
        """The factors' names and shapes, in the order in which they are multiplied by."""
        n, k = shape
        return {"factor_A": (self.rank, k), "factor_B": (n, self.rank)}

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]: the factors' and its shape."""
        self.check(shape)
        listing: Listing = {}
        for name, side in self.factor_shapes(shape).items():
            listing |= {f"{name}.{suffix}": entry for suffix, entry in self.factors.tensors(side, scale_dtype).items()}
        return listing | {"weight_shape": (torch.int64, (2,))}

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors written for a weight of `shape`."""
        return listed_bytes(self.tensors(shape))

    def pack(self, A_rk: Mapping[str, Tensor], B_nr: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of both factors, each in `factors`, as the tensors that `tensors` lists."""
        sides = [int(t["weight"].shape[i] if isinstance(self.factors, Dense) else t["weight_shape"][i])
                 for i, t in enumerate((B_nr, A_rk))]  # fmt: skip
        out = {f"{name}.{suffix}": t for name, held in (("factor_A", A_rk), ("factor_B", B_nr)) for suffix, t in held.items()}
        return out | {"weight_shape": torch.tensor(sides, dtype=torch.int64)}

    def dense(self, A_rk: Tensor, B_nr: Tensor) -> dict[str, Tensor]:
        """The same of factors that stay numbers, rounded to the dtype of `factors`."""
        assert isinstance(self.factors, Dense)
        return self.pack(*({"weight": F.to(self.factors.dtype).contiguous()} for F in (A_rk, B_nr)))

    def factor(self, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The tensors of one factor, `factor_A` or `factor_B`, by their suffixes in `factors`."""
        return {s.removeprefix(f"{name}."): t for s, t in tensors.items() if s.startswith(f"{name}.")}

    def factor_matrices(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r], fp32, as they are stored."""
        A, B = (self.factors.dequantize(self.factor(tensors, name), torch.float32) for name in ("factor_A", "factor_B"))
        return A, B

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """B A [N, K], rounded to fp32 and then to `dtype`. Engines do not make it, they multiply twice."""
        A_rk, B_nr = self.factor_matrices(tensors)
        W_nk = torch.empty(len(B_nr), A_rk.shape[1], dtype=dtype, device=A_rk.device)
        for rows, part in products(A_rk, B_nr):
            W_nk[rows] = part.to(dtype)
        return W_nk


def products(A_rk: Tensor, B_nr: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of B A after the other, fp32: taken in fp64 and rounded, for how an fp32 product is summed depends on threads and
    settings."""
    A_rk, step = A_rk.double(), max(1, _CHUNK // A_rk.shape[1])
    for i in range(0, len(B_nr), step):
        rows = slice(i, min(i + step, len(B_nr)))
        yield rows, (B_nr[rows].double() @ A_rk).float()
