"""Integers that are entropy-coded: `ecq2.25` takes exactly 2.25 bits a weight in the file, and 8 in memory.

A code q of output n and input i stands for q * t_n * a_i: a scale for each output and a step for each input. The grid is
unbounded in effect, so nothing is clipped, and an input that matters much has a fine step while others pay nothing for it. What
that costs is the entropy of the codes: within .254 bit of the rate-distortion bound at every rate, where a fixed number of bits
loses .45 to .64 (ECSQ; steps by input as WaterSIC, arXiv 2603.04956, has them).

The tensors of a weight [N, K]:

    weight_coded    int32 [words]   the codes, entropy-coded as below; padded with zeros to the size that the rate says
    weight_step     uint8 [K]       e_i: a_i = base * 2**(e_i / 16)
    weight_spread   uint8 [K]       the table by which the codes of an input are coded
    weight_scale    16-bit [N]      t_n
    weight_base     fp32 [1]
    weight_shape    int64 [2]

So `nbytes` is exact before anything is known of the weights: the solver finds the steps under which the codes fit (a wider step
of all inputs costs a bit less a weight for each doubling), and a rate may be any number. The coder is rANS (arXiv 1311.2540) in
lanes (lanes.py): 32-bit states, 16-bit words, one table a column; every lane holds some rows, and all of them go through an
input at once. A table is the law of a normal variable that is rounded, at one of `SPREADS` widths, eight an octave; which one an
input has is chosen by what its codes would cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compress.errors import FormatError
from compress.formats import lanes
from compress.formats.grid import Can, Listing, Shape, listed_bytes
from compress.formats.lanes import ONE

LEAST, MOST = 100, 600  # hundredths of a bit; above, codes of a byte are the limit, and int8 is as good
DAMAGED = "entropy-coded words do not end as they should; the file is damaged"
LARGEST = 127  # codes go from -LARGEST to LARGEST
STEPS = 16  # steps of an input in an octave
SPREADS, IN_OCTAVE, NARROWEST = 96, 8, 2.0**-4  # tables; how many to an octave; the first one's standard deviation
_CHUNK = 1 << 20  # codes counted at a time
LANE = 4096  # weights that a lane holds, or one row: its state takes 4 bytes
TABLES = "2b3435557c0fff6a"  # hash of the tables, which every machine must compute alike


@dataclass(frozen=True)
class Ecq:
    """Entropy-coded integers at `hundredths` of a bit a weight, everything counted."""

    hundredths: int
    can: ClassVar[Can] = Can.NOTHING
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not LEAST <= self.hundredths <= MOST:
            raise FormatError(f"ecq has {LEAST / 100:g} to {MOST / 100:g} bits a weight, not {self.rate:g}")

    @property
    def rate(self) -> float:
        """Bits a weight."""
        return self.hundredths / 100

    def __str__(self) -> str:
        return f"ecq{self.rate:g}"

    def check(self, shape: Shape) -> None:
        """Raise FormatError unless a weight of `shape` [N, K] can have this format."""
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self} needs a matrix [outputs, inputs], not the shape {list(shape)}")
        if self.words(shape) < 0.5 * shape[0] * shape[1] / 32:
            beside = 8 * self._beside(shape) / (shape[0] * shape[1])
            raise FormatError(f"{self}: scales and steps of a matrix {shape[0]} x {shape[1]} alone take {beside:.2f} bits a "
                              "weight; use a higher rate, or another format")  # fmt: skip

    def _beside(self, shape: Shape) -> int:
        """Bytes of everything but the codes."""
        n, k = shape
        return 2 * n + 2 * k + 4 + 16

    def words(self, shape: Shape) -> int:
        """32-bit words that the codes have."""
        n, k = shape
        return int(self.hundredths * n * k // 800 - self._beside(shape)) // 4

    def tensors(self, shape: Shape, scale_dtype: torch.dtype = torch.bfloat16) -> Listing:
        """Suffix -> (dtype, shape) of every tensor written for a weight of `shape` [N, K]."""
        self.check(shape)
        n, k = shape
        return {"weight_coded": (torch.int32, (self.words(shape),)), "weight_step": (torch.uint8, (k,)),
                "weight_spread": (torch.uint8, (k,)), "weight_scale": (scale_dtype, (n,)),
                "weight_base": (torch.float32, (1,)), "weight_shape": (torch.int64, (2,))}  # fmt: skip

    def nbytes(self, shape: Shape) -> int:
        """Bytes of all tensors, scales of 16 bits."""
        return listed_bytes(self.tensors(shape))

    def dequantize(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`: products in fp32, rounded once."""
        codes_nk, step_k, scale_n = self.codes(tensors), steps(tensors), tensors["weight_scale"]
        out = torch.empty(codes_nk.shape, dtype=dtype, device=codes_nk.device)
        rows = max(1, _CHUNK // codes_nk.shape[1])
        for codes, scale, part in zip(*(x.split(rows) for x in (codes_nk, scale_n, out)), strict=True):
            part.copy_(restored(codes, step_k, scale, dtype))
        return out

    def codes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The codes, int8 [N, K]."""
        n, k = (int(x) for x in tensors["weight_shape"])
        device = tensors["weight_coded"].device
        return decode(tensors["weight_coded"].cpu(), tensors["weight_spread"].cpu(), n, k).to(device)

    def pack(self, coded: Tensor, step_k: Tensor, spread_k: Tensor, base: float, scale_n: Tensor) -> dict[str, Tensor]:
        """The tensors, of codes that were coded into at most `words` words, int32."""
        shape = len(scale_n), len(step_k)
        padded = torch.zeros(self.words(shape), dtype=torch.int32)
        padded[: len(coded)] = coded
        return {"weight_coded": padded, "weight_step": step_k.cpu(), "weight_spread": spread_k.cpu(),
                "weight_scale": scale_n.cpu().contiguous(), "weight_base": torch.tensor([base]),
                "weight_shape": torch.tensor(shape, dtype=torch.int64)}  # fmt: skip


def steps(tensors: Mapping[str, Tensor]) -> Tensor:
    """a [K], fp32."""
    return stepped(tensors["weight_base"], tensors["weight_step"])


def stepped(base: float | Tensor, step_k: Tensor) -> Tensor:
    """base * 2**(e / STEPS), by a table of one octave and exact doublings, so that it is the same on every device."""
    octave, part = step_k.int() // STEPS, step_k.long() % STEPS
    table = torch.tensor([2.0 ** (i / STEPS) for i in range(STEPS)], device=step_k.device)
    return torch.ldexp(table[part], octave) * base


def restored(codes_nk: Tensor, step_k: Tensor, scale_n: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that codes stand for."""
    return (codes_nk.float() * step_k).mul_(scale_n.float()[:, None]).to(dtype)


# --- the law of codes ------------------------------------------------------------------------------------------------


@cache
def tables() -> tuple[lanes.Ints, lanes.Ints]:
    """Counts [SPREADS, codes] that sum to `ONE`, each at least 1, and what comes before each of them."""
    q = np.arange(2 * LARGEST + 1) - LARGEST
    inside = (np.arange(32) + 0.5) / 32 - 0.5
    found = []
    for s in range(SPREADS):
        sigma = NARROWEST * 2.0 ** (s / IN_OCTAVE)
        mass = np.exp(-0.5 * ((q[:, None] + inside) / sigma) ** 2).sum(1)
        counts = 1 + np.floor(mass / mass.sum() * (ONE - len(q))).astype(np.int64)
        counts[LARGEST] += ONE - counts.sum()
        found.append(counts)
    counts = np.stack(found)
    if hashlib.sha256(counts.astype("<u4").tobytes()).hexdigest()[:16] != TABLES:
        raise FormatError("this machine computes other tables for 'ecq' than others do, and would misread its files")
    return counts, counts.cumsum(1) - counts


@cache
def costs() -> Tensor:
    """Bits of each code by each table, fp32 [codes, SPREADS]."""
    return torch.from_numpy(-np.log2(tables()[0].T / ONE)).float()


@cache
def places() -> lanes.Bytes:
    """Which code each of `ONE` places of a table belongs to [SPREADS, ONE]."""
    return np.stack([np.repeat(np.arange(2 * LARGEST + 1, dtype=np.uint8), counts) for counts in tables()[0]])


def spreads(codes_nk: Tensor) -> tuple[Tensor, float]:
    """The cheapest table of each input, uint8 [K], and the bits that all codes then take."""
    k, count = codes_nk.shape[1], 2 * LARGEST + 1
    first_k, seen = LARGEST + count * torch.arange(k, device=codes_nk.device), torch.zeros(k * count, device=codes_nk.device)
    for part in codes_nk.split(max(1, _CHUNK // k)):
        seen += torch.bincount((part.long() + first_k).flatten(), minlength=k * count)
    bits, best = (seen.view(k, count) @ costs().to(seen.device)).min(1)
    return best.to(torch.uint8), float(bits.sum(dtype=torch.float64))


# --- the coder -------------------------------------------------------------------------------------------------------


def lanes_of(n: int, k: int) -> tuple[int, int]:
    """How many lanes there are, and the rows of each."""
    rows = min(n, -(-LANE // k))
    rows = next((r for r in range(rows, min(n, 2 * rows) + 1) if n % r == 0), rows)
    return -(-n // rows), rows


def overhead(n: int, k: int) -> int:
    """Bits that lanes take beside what their codes do, at most."""
    return 40 * lanes_of(n, k)[0] + 32


def _in_lanes(codes_nk: Tensor) -> lanes.Bytes:
    """Codes as tables count them [rows * K, lanes], short lanes filled with the middle one."""
    n, k = codes_nk.shape
    count, rows = lanes_of(n, k)
    filled = np.full((count * rows, k), LARGEST, np.uint8)
    np.add(codes_nk.cpu().contiguous().numpy().view(np.uint8), np.uint8(LARGEST), out=filled[:n])  # of a byte, around the end
    return np.ascontiguousarray(filled.reshape(count, rows * k).T)


def encode(codes_nk: Tensor, spread_k: Tensor) -> Tensor:
    """Codes, int8 [N, K], as 32-bit words [words]: the states of all lanes, then 16-bit words as decoding asks for them."""
    states, words = lanes.fastest()[0](_in_lanes(codes_nk), spread_k.cpu().numpy(), *tables())
    stream = np.concatenate([states.astype(np.uint32).view(np.uint16), words, np.zeros(len(words) % 2, np.uint16)])
    return torch.from_numpy(stream.view(np.int32).copy())


def decode(coded: Tensor, spread_k: Tensor, n: int, k: int) -> Tensor:
    """The codes, int8 [N, K]. FormatError where the words are none that `encode` made."""
    count, rows = lanes_of(n, k)
    stream = coded.contiguous().numpy()
    states, words = stream[:count].view(np.uint32).astype(np.int64), stream[count:].view(np.uint16)
    if len(states) < count or bool((spread_k >= SPREADS).any()):
        raise FormatError(DAMAGED)
    try:
        symbols, ended, read = lanes.fastest()[1](states, words, spread_k.numpy(), *tables(), places(), rows * k)
    except (IndexError, ValueError):
        raise FormatError(DAMAGED) from None
    if (ended != ONE).any() or words[read:].any():
        raise FormatError(DAMAGED)
    codes = symbols.T.reshape(count * rows, k)[:n]
    codes -= np.uint8(LARGEST)  # of a byte, around the end
    return torch.from_numpy(codes.view(np.int8))
