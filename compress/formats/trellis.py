"""Trellis-coded numbers: `tcq2` takes 2 bits a weight, in the file and in memory, and errs as scalars of 2.4 bits do.

The b bits of a weight are the newest of a shift register of L = 12 bits, and the register's content, not they alone, says which
number it is. So a weight has its choice among values that depend on its neighbours': 2**L of them in all. A path through them is
chosen by a search (viterbi.py), and read back weight by weight, in any order (QTIP, arXiv 2406.11235). The numbers are none that
are stored: with x = 0x83DCD12D * s mod 2**32, a state s stands for the sum of the four bytes of x, less 510, over 128 (the
generator of exllamav3). The sum of four bytes is nearly normal, of standard deviation 1.15, and so is what is coded: the weights
of a rotated matrix, or the targets of GPTQ.

A ring is 256 outputs of one input; what N leaves over is one shorter ring. Bits lie in the order of outputs, lowest first. The
state of an output is the L bits that begin where its own do, and at the end of a ring they go on at its beginning: nothing
is stored to begin with. At half bits, outputs of even and odd number have b - 1/2 and b + 1/2. The tensors of a weight [N, K]:

    weight_trellis  int32 [K, N * b / 32]   row i: the rings of input i
    weight_step     uint8 [K]               e_i: a_i = 2**(e_i / 16 - 8), what the values of an input are multiplied by
    weight_scale    16-bit [N]              t_n
    weight_shape    int64 [2]               N, K

The weight of output n and input i is value(s) * a_i * t_n. A ring of one input, where QTIP and exllamav3 take 16 inputs by 16
outputs, lets GPTQ make up for every input's error in those behind it, and needs no order of its own; a kernel reads a ring of 64
bytes (at 2 bits) whole. What is not offered: L = 16, which is worth another 6 % of the error and takes sixteen times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import bitpack
from compress.formats.entropy import stepped
from compress.formats.grid import Can, Listing, Shape, listed_bytes

RING = 256  # outputs
SIZES = (12, 10, 8)  # bits of a state
HALVES = range(2, 11)  # half bits a weight
BASE = 2.0**-8  # the least step
_MULTIPLIER, _WORD = 0x83DCD12D, (1 << 32) - 1
_CHUNK = 1 << 20  # weights decoded at a time


@dataclass(frozen=True)
class Tcq:
    """A trellis code of `halves` half bits a weight, with states of `size` bits."""

    halves: int
    size: int = SIZES[0]
    can: ClassVar[Can] = Can.GIVE_ROWS
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.halves not in HALVES:
            raise FormatError(f"tcq has {HALVES[0] / 2:g} to {HALVES[-1] / 2:g} bits a weight in steps of 0.5, not {self.rate:g}")
        if self.size not in SIZES or self.size < self.halves:
            allowed = ", ".join(f"l{size}" for size in SIZES if size >= self.halves)
            raise FormatError(f"tcq{self.rate:g} has states of {allowed}, not l{self.size}")

    @property
    def rate(self) -> float:
        """Bits a weight, without scales and steps."""
        return self.halves / 2

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of an output of even and of odd number."""
        return self.halves // 2, self.halves - self.halves // 2

    @property
    def whole(self) -> int:
        """The least outputs that fill whole words."""
        return 64 // gcd(64, self.halves)

    def __str__(self) -> str:
        return f"tcq{self.rate:g}" + (f":l{self.size}" if self.size != SIZES[0] else "")

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        if shape[0] % self.whole:
            raise FormatError(f"{self}: {shape[0]} outputs do not fill whole words; it needs a multiple of {self.whole}")

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, k = shape
        return {"weight_trellis": (torch.int32, (k, n * self.halves // 64)), "weight_step": (torch.uint8, (k,)),
                "weight_scale": (scale_dtype, (n,)), "weight_shape": (torch.int64, (2,))}  # fmt: skip

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors, scales of 16 bits."""
        return listed_bytes(self.tensors(shape))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`: products in fp32, rounded once."""
        n, k = (int(x) for x in tensors["weight_shape"])
        out = torch.empty(n, k, dtype=dtype, device=tensors["weight_trellis"].device)
        step = max(1, _CHUNK // k // self.whole) * self.whole
        for start in range(0, n, step):
            out[start : start + step] = self.rows(tensors, start, min(n, start + step), dtype)
        return out

    def rows(self, tensors: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The weights [stop - start, K] of some outputs, in `dtype`: those of two outputs by one look into a table."""
        trellis, first = tensors["weight_trellis"], start // self.whole * self.whole
        last = -(-stop // self.whole) * self.whole
        pairs = self.windows(trellis, first, last, range(0, self.whole, 2), self.size + self.bits[0])
        table = values_of_pairs(self.size, self.bits[0], trellis.device)
        values_kn = table.index_select(0, pairs.view(-1)).view(torch.float32).view(len(trellis), -1)
        values_kn = values_kn[:, start - first : stop - first].mul_(steps(tensors["weight_step"])[:, None])
        return values_kn.mul_(tensors["weight_scale"][start:stop].float()).T.to(dtype)

    def picked(self, tensors: Mapping[str, Tensor], outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights [m, K] of any outputs [m], int64, in `dtype`: a window of every input's ring each."""
        trellis, ring = tensors["weight_trellis"], RING * self.halves // 64
        step, scale = steps(tensors["weight_step"])[:, None], tensors["weight_scale"]
        found = torch.empty(len(outputs), len(trellis), dtype=dtype, device=trellis.device)
        for part, out in zip(
            *(x.split(max(1, _CHUNK // len(trellis))) for x in (outputs.to(trellis.device), found)), strict=True
        ):
            at = part // 2 * self.halves + part % 2 * self.bits[0]
            word = at // 32
            begin = word // ring * ring
            following = torch.where(word + 1 < (begin + ring).clamp(max=trellis.shape[1]), word + 1, begin)
            wide = (trellis[:, word].long() & _WORD) | trellis[:, following].long() << 32
            states = (wide >> at % 32) & ((1 << self.size) - 1)
            out.copy_((values(self.size, trellis.device)[states] * step * scale[part].float()).T)
        return found

    def windows(self, trellis: Tensor, first: int, last: int, outputs: Iterable[int], bits: int) -> Tensor:
        """The `bits` bits from where those of an output begin, int32 [K, ...]: of certain outputs of every `whole` from `first`
        to `last`, which are multiples of that."""
        count, ring = trellis.shape[1], RING * self.halves // 64
        word = torch.arange(first * self.halves // 64, last * self.halves // 64, device=trellis.device)
        begin = word // ring * ring
        following = torch.where(word + 1 < (begin + ring).clamp(max=count), word + 1, begin)
        periods = len(trellis), -1, self.whole * self.halves // 64
        words, behind = trellis[:, word].view(periods), trellis[:, following].view(periods)
        return bitpack.windows(words, behind, [self.at(output) for output in outputs], bits).flatten(1)

    def at(self, output: int) -> int:
        """Where in a row of bits those of an output begin."""
        return output // 2 * self.halves + output % 2 * self.bits[0]

    def pack(self, states_kn: Tensor, step_k: Tensor, scale_n: Tensor) -> dict[str, Tensor]:
        """The tensors, of the states of paths that are rings."""
        k, n = states_kn.shape
        own = ((1 << torch.tensor(self.bits)) - 1).repeat(n // 2)
        at, words = torch.tensor([self.at(output) for output in range(n)]), n * self.halves // 64
        parts = states_kn.cpu().split(max(1, _CHUNK // n))
        return {"weight_trellis": torch.cat([bitpack.place(part.long() & own, at, words) for part in parts]),
                "weight_step": step_k.cpu(), "weight_scale": scale_n.cpu().contiguous(),
                "weight_shape": torch.tensor((n, k), dtype=torch.int64)}  # fmt: skip


def steps(step_k: Tensor) -> Tensor:
    """a [K], fp32."""
    return stepped(BASE, step_k)


@lru_cache(maxsize=64)
def values(size: int, device: torch.device | str = "cpu") -> Tensor:
    """What every state of `size` bits stands for, fp32 [2**size], exactly."""
    x = torch.arange(1 << size, device="cpu") * _MULTIPLIER & _WORD
    total = sum((x >> shift & 255 for shift in (8, 16, 24)), start=x & 255)
    return ((total - 510).float() / 128).to(device)


@lru_cache(maxsize=64)
def values_of_pairs(size: int, bits: int, device: torch.device | str) -> Tensor:
    """What the states of two outputs stand for, the first of which has so many bits: two fp32 numbers as one int64, by the
    `size` + `bits` bits that both are in."""
    both = torch.arange(1 << size + bits, device=device)
    states = torch.stack([both & ((1 << size) - 1), both >> bits], 1)
    return values(size, device)[states].view(torch.int64).view(-1)
