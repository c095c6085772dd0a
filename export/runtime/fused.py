"""Products with packed integers on a CPU whose codes become numbers in registers: compiled, where numba is installed.

A product of one row with a matrix waits for memory: the dense matrix in fp32 is eight times as many bytes as its codes of 4 bits.
To gain by that, decoding has to be nearly free, and it is where it is part of the product. With c the codes, z the zero points
(where a format is symmetric there are none) and s the scales of groups g,

    y_n = sum over g of s_ng (sum over i in g of c_ni x_i  -  z_ng * sum over i in g of x_i)

so that a weight takes a shift, a mask, a conversion, a subtraction (c and z are counted from the middle code) and a
multiplication, and each group a few more. Codes are a stream without gaps (bitpack.py), in periods of the fewest that fill
whole words: 8 codes of 4 bits, 32 of 3. Codes in the same place of their periods are shifted alike, so places are the outer
loop and periods the inner one, which compilers turn into vectors; the activations are put in that order, [places, periods],
once for all outputs.

For more than `FEW` rows a block of the matrix is decoded in the same order and multiplied by torch. What is decoded is
`format.dequantize` in fp32 to the bit, rounded to the dtype of the activations where products are taken in that. They are taken
in fp32 where a processor has no instructions for 16 bits (`WIDE`). For few rows the codes themselves are multiplied in fp32,
whatever the activations are in: nothing is rounded to 16 bits but the result.

What entropy-coded matrices hold once they are decoded, a byte a weight, is multiplied alike, without shifts.

The alternative not taken: torch's own int4 products for CPUs (`_weight_int4pack_mm_for_cpu`). They are as fast for activations
in bf16, seven times slower than the dense product in fp32 (AVX2), have no other widths, and want the matrix in a layout of
their own, which differs between CPUs. Limits: without numba, of small matrices, or where groups are no whole periods, torch
decodes block by block as everywhere else (ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats import Ecq, Format, Int, bitpack, entropy

FEW = 4  # rows of x, each of which goes through the codes by itself
LEAST = 1 << 16  # weights of a matrix that loops are compiled for: what is smaller takes no time
SMALL = 1 << 19  # weights of a matrix that one thread multiplies by sooner than several are woken
WIDE = ("DEFAULT", "NO AVX", "AVX2")  # processors whose 16-bit products are several times slower than those in fp32
_BLOCK = 1 << 18  # weights decoded at a time: a megabyte
Shape = tuple[int, int]


def linear(x_mk: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None, fmt: Format, shape: Shape) -> Tensor | None:
    """x [m, K] times the matrix, plus the bias [N]: [m, N] in the dtype of x. None where there is no compiled way."""
    if x_mk.device.type != "cpu" or x_mk.dtype == torch.float64 or not len(x_mk) or shape[0] * shape[1] < LEAST:
        return None
    if isinstance(fmt, Ecq) and "weight_codes" in tensors and len(x_mk) <= FEW and (run := compiled(times_bytes)):
        y_mn = _by_bytes(run, x_mk.float(), tensors)
    elif isinstance(fmt, Int) and fits(fmt, shape[1]) and compiled(times_codes, fmt.bits):
        y_mn = _by_codes(x_mk, tensors, fmt, shape)
    else:
        return None
    return (y_mn if bias is None else y_mn.add_(bias)).to(x_mk.dtype)


def fits(fmt: Int, inputs: int) -> bool:
    """Whether every group is some whole periods of codes."""
    places, width = period(fmt.bits)[0], fmt.width(inputs)
    return inputs % width == 0 and width % places == 0


def period(bits: int) -> tuple[int, int]:
    """Codes and words of the least number of codes that fill whole words."""
    whole = lcm(bits, 32)
    return whole // bits, whole // 32


def _by_codes(x_mk: Tensor, tensors: Mapping[str, Tensor], fmt: Int, shape: Shape) -> Tensor:
    (n, k), (places, _) = shape, period(fmt.bits)
    words, scale = tensors["weight_packed"].numpy().view("uint32"), tensors["weight_scale"].float()
    zero, middle = torch.zeros_like(scale), fmt.levels // 2
    if not fmt.symmetric:
        zero = bitpack.unpack(tensors["weight_zero_point"].T, fmt.bits, n).T.float().sub_(middle).contiguous()
    if len(x_mk) > FEW:
        return _by_decoded(x_mk, words, scale, zero.add_(middle), fmt.bits, n)
    x_mip = x_mk.float().view(len(x_mk), k // places, places).transpose(1, 2).contiguous()
    sums_mg = x_mk.float().view(len(x_mk), scale.shape[1], -1).sum(2)
    y_mn, run = torch.empty(len(x_mk), n), compiled(times_codes, fmt.bits)
    assert run is not None
    for x_ip, sums_g, y_n in zip(x_mip, sums_mg, y_mn, strict=True):

        def part(rows: slice, x_ip: Tensor = x_ip, sums_g: Tensor = sums_g, y_n: Tensor = y_n) -> None:
            run(words[rows], scale[rows].numpy(), zero[rows].numpy(), x_ip.numpy(), sums_g.numpy(), y_n[rows].numpy())

        _in_parts(part, n, k)
    return y_mn


def _by_decoded(x_mk: Tensor, words: Any, scale: Tensor, zero: Tensor, bits: int, n: int) -> Tensor:
    """Of many rows: blocks of the matrix, inputs in the order of places, by torch's product."""
    (m, k), places, run = x_mk.shape, period(bits)[0], compiled(decodes, bits)
    assert run is not None
    wide = x_mk if x_mk.dtype == torch.float32 or torch.backends.cpu.get_cpu_capability() not in WIDE else x_mk.float()
    x_mk = wide.view(m, k // places, places).transpose(1, 2).reshape(m, k)
    y_mn, step = x_mk.new_empty(m, n), max(1, _BLOCK // k)
    block = torch.empty(step, places, k // places)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        W_rip = block[: rows.stop - i]
        run(words[rows], scale[rows].numpy(), zero[rows].numpy(), W_rip.numpy())
        y_mn[:, rows] = torch.nn.functional.linear(x_mk, W_rip.view(-1, k).to(x_mk.dtype))
    return y_mn


def _by_bytes(run: Callable[..., Any], x_mk: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    codes, x_mk = tensors["weight_codes"].numpy(), x_mk * entropy.steps(tensors)
    y_mn = torch.empty(len(x_mk), len(codes))
    for x_k, y_n in zip(x_mk, y_mn, strict=True):

        def part(rows: slice, x_k: Tensor = x_k, y_n: Tensor = y_n) -> None:
            run(codes[rows], x_k.numpy(), y_n[rows].numpy())

        _in_parts(part, *codes.shape)
    return y_mn.mul_(tensors["weight_scale"].float())


def _in_parts(part: Callable[[slice], None], n: int, k: int) -> None:
    """`part` of all outputs: at once, or of as many parts as torch has threads."""
    threads = torch.get_num_threads() if n * k > SMALL else 1
    if threads == 1:
        part(slice(0, n))
        return
    step = -(-n // threads)
    list(_pool(threads).map(part, [slice(i, min(i + step, n)) for i in range(0, n, step)]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# --- compiled --------------------------------------------------------------------------------------------------------


@cache
def compiled(loops: Callable[..., Callable[..., None]], *constants: int) -> Callable[..., Any] | None:
    """Loops for such constants, which a compiler can then unroll; None without one: the extra `fast`. Sums may be reordered, as
    vectors do; they are the same in every call."""
    try:
        import numba
    except ImportError:
        return None
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"} if loops is not decodes else False}
    try:
        return numba.njit(cache=True, **options)(loops(*constants))  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep what was compiled
        return numba.njit(**options)(loops(*constants))  # type: ignore[no-any-return]


def at_once(bits: int) -> int:
    """Codes that one window of 32 bits holds and that fill whole bytes."""
    return 8 if bits <= 4 else 4


def times_codes(bits: int) -> Callable[..., None]:
    """Fills y [N] from words uint32 [N, W], scales and zero points less the middle one [N, G], x [places, periods] and its sums
    [G]. Codes are counted from the middle: else sums would be much larger than what is left of them."""
    (places, words_each), few, mask, middle = period(bits), at_once(bits), (1 << bits) - 1, np.float32(1 << (bits - 1))

    def times(words: Any, scale: Any, zero: Any, x: Any, sums: Any, y: Any) -> None:
        (outputs, groups), periods = scale.shape, x.shape[1]
        t, each = np.empty(periods, np.float32), periods // groups
        for n in range(outputs):
            row = words[n]
            t[:] = 0.0
            for i in range(0, places, few):
                word, shift, x_i = i * bits // 32, i * bits % 32, x[i : i + few]
                if shift + few * bits <= 32:
                    for p in range(periods):
                        window, a = row[p * words_each + word] >> (shift & 31), t[p]
                        for j in range(few):
                            a += (np.float32(np.int32((window >> (j * bits)) & mask)) - middle) * x_i[j, p]
                        t[p] = a
                else:
                    for p in range(periods):
                        low, high = row[p * words_each + word], row[p * words_each + word + 1]
                        window, a = np.uint32(low >> (shift & 31)) | np.uint32(high << ((32 - shift) & 31)), t[p]
                        for j in range(few):
                            a += (np.float32(np.int32((window >> (j * bits)) & mask)) - middle) * x_i[j, p]
                        t[p] = a
            total = np.float32(0.0)
            for g in range(groups):
                inside = np.float32(0.0)
                for p in range(each):
                    inside += t[g * each + p]
                total += scale[n, g] * (inside - zero[n, g] * sums[g])
            y[n] = total

    return times


def decodes(bits: int) -> Callable[..., None]:
    """Fills W [N, places, periods] from words, scales and zero points: (code - zero) * scale, rounded once."""
    (places, words_each), few, mask = period(bits), at_once(bits), (1 << bits) - 1

    def decode(words: Any, scale: Any, zero: Any, W: Any) -> None:
        (outputs, groups), periods = scale.shape, W.shape[2]
        s, z, each = np.empty(periods, np.float32), np.empty(periods, np.float32), periods // groups
        for n in range(outputs):
            row = words[n]
            for g in range(groups):
                for p in range(each):
                    s[g * each + p], z[g * each + p] = scale[n, g], zero[n, g]
            for i in range(0, places, few):
                word, shift, out = i * bits // 32, i * bits % 32, W[n, i : i + few]
                for p in range(periods):
                    window = np.uint32(row[p * words_each + word] >> (shift & 31))
                    if shift + few * bits > 32:
                        window |= np.uint32(row[p * words_each + word + 1] << ((32 - shift) & 31))
                    for j in range(few):
                        out[j, p] = (np.float32(np.int32((window >> (j * bits)) & mask)) - z[p]) * s[p]

    return decode


def times_bytes() -> Callable[..., None]:
    """Fills y [N] from codes int8 [N, K] and x [K]."""

    def times(codes: Any, x: Any, y: Any) -> None:
        for n in range(len(codes)):
            total, row = np.float32(0.0), codes[n]
            for i in range(len(x)):
                total += np.float32(row[i]) * x[i]
            y[n] = total

    return times
