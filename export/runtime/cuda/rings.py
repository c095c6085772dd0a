"""A trellis code as the CUDA kernels read it, and their launches: products of few rows of x, and the weights.

The layout is drawn at the head of kernels/trellis.cuh; here it is made from the format's own tensors and taken apart again. The
parts of a matrix [N, K], of which `steps` and `scales` are the format's but for a power of two, by which no step exceeds 1:

    words      int32 [rings, units, 128 * halves]    rings of 256 outputs, units of 32 inputs
    steps      fp32 [K]
    scales     fp32 [N]
    counters   int32 [rings], zero between launches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.export.runtime.cuda import nvrtc, turning
from compress.formats import Format, Rotated, Tcq, numbers_of
from compress.formats.entropy import STEPS, stepped
from compress.formats.trellis import BASE, RING, values

Shape = tuple[int, int]
TOKENS = 16  # rows of x in a launch
UNIT, _RUN, _EACH = 32, 32, 8  # inputs of a unit; outputs of a lane, and its inputs of a unit
_WARPS = nvrtc.THREADS // 32
_BLOCKS = 256  # wanted at least: two for each SM of a large GPU
_LEAST_SHARE = 16  # units that a block takes at least: two a warp, so that it has one in flight
_OUT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True, eq=False)
class Rings:
    """The parts of a trellis-coded matrix of `shape` [N, K]."""

    numbers: Tcq
    shape: Shape
    words: Tensor
    steps: Tensor
    scales: Tensor
    counters: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor], fmt: Format, shape: Shape) -> Rings:
        numbers = numbers_of(fmt)
        assert isinstance(numbers, Tcq)
        return cls(numbers, shape, *parts)


def pack(numbers: Tcq, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The parts, of the tensors that `numbers.tensors(shape)` lists, on their device."""
    words, exponent = pack_words(tensors["weight_trellis"], numbers.halves), tensors["weight_step"]
    shift = 2.0 ** -(-int(exponent.max()) // STEPS)
    scales = tensors["weight_scale"].float() * (BASE * shift)
    counters = torch.zeros(len(words), dtype=torch.int32, device=words.device)
    return [words, stepped(1 / shift, exponent), scales, counters]


def pack_words(trellis: Tensor, halves: int) -> Tensor:
    """Rows of codes [K, words] as words for the kernels; a last ring that is shorter goes on with its first word again."""
    each = 4 * halves
    short = trellis.shape[1] % each
    if short:
        again = trellis[:, -short, None]
        trellis = torch.cat([trellis, pad(again, (0, each - short - 1))], 1)
    trellis = pad(trellis, (0, 0, 0, -len(trellis) % UNIT)).contiguous()
    # unit, t, pair of inputs, which of them | ring, g, half of a word
    split = trellis.view(torch.int16).view(-1, 4, _EACH // 2, 2, trellis.shape[1] // each, 8, halves)
    lanes = split.permute(4, 0, 5, 1, 2, 3, 6).flatten(5)[..., _order(halves)]
    words: Tensor = lanes.reshape(*lanes.shape[:2], 32, -1).view(torch.int32).unflatten(3, (halves, 4))
    return words.transpose(2, 3).flatten(2)


def unpack_words(words: Tensor, numbers: Tcq, shape: Shape) -> Tensor:
    """Rows of codes [K, words] of a matrix of `shape` [N, K], which `pack_words` took."""
    (rings, units, _), halves, (n, k) = words.shape, numbers.halves, shape
    lanes = words.view(rings, units, halves, 32, 4).transpose(2, 3).reshape(rings, units, 32, 4 * halves)
    inside = torch.tensor(_order(halves), device=words.device).argsort()
    split = lanes.view(torch.int16).view(rings, units, 8, 4, _EACH // 2, 2 * halves)[..., inside]
    halfwords: Tensor = split.unflatten(5, (2, halves)).permute(1, 3, 4, 5, 0, 2, 6).reshape(units * UNIT, -1)
    return halfwords.contiguous().view(torch.int32)[:k, : n * halves // 64].contiguous()


def _order(halves: int) -> list[int]:
    """Where the half words of two streams lie: one after the other; where they are odd, the last ones of both side by side."""
    if halves % 2 == 0:
        return list(range(2 * halves))
    return [*range(halves), 2 * halves - 1, *range(halves, 2 * halves - 1)]


def slices(shape: Shape) -> int:
    """Over how many blocks K is split. By the shape alone, so that a token's sum has one order on any GPU and in any batch."""
    rings, units = -(-shape[0] // RING), -(-shape[1] // UNIT)
    wanted = max(1, min(-(-_BLOCKS // rings), units // _LEAST_SHARE))
    return -(-units // -(-units // wanted))  # none is left without a unit


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, fmt: Format, shape: Shape) -> Tensor:
    """x W^T + bias [M, N] in the dtype of x, bf16 or fp16; a row has the same bits whatever the others are."""
    matrix, y = Rings.of(parts, fmt, shape), x.new_empty(len(x), shape[0])
    if not len(x):
        return y
    turned, scale = turning.turn_and_scale(x, matrix.steps, turning.block_of(fmt))
    for i in range(0, len(x), TOKENS):
        rows = slice(i, i + TOKENS)
        _product(turned[rows], scale[rows], matrix, fmt.outputs(shape[0]) if isinstance(fmt, Rotated) else 0, bias, y[rows])
    return y


def _product(x: Tensor, scale: Tensor, matrix: Rings, block: int, bias: Tensor | None, y: Tensor) -> None:
    """At most 16 rows, one launch. block: of outputs, that are turned; 0: they are not."""
    (m, k), n, rings, share = x.shape, matrix.shape[0], len(matrix.words), slices(matrix.shape)
    partial = x.new_empty(share, m, RING * rings, dtype=torch.float32) if share > 1 else None
    defines = variant(matrix.numbers, y.dtype, m)
    shared = 4 * RING * 8 * dict(defines)["V_TILES"]
    args = [matrix.words, matrix.scales, x, scale, y, bias, partial, matrix.counters, m, n, k, block]
    nvrtc.launch("trellis_linear", defines, (rings, share), shared, args, x.device)


def rows_of(matrix: Rings, rows: slice, dtype: torch.dtype, by_kernel: bool, out: Tensor) -> Tensor:
    """Some outputs of C in `dtype`, to the bits of the format, put into `out`; they begin at a ring."""
    (n, k), of = out.shape, slice(rows.start // RING, -(-rows.stop // RING))
    words, scales, numbers = matrix.words[of], matrix.scales[rows], matrix.numbers
    if by_kernel:
        grid, defines = (-(-words.shape[1] // _WARPS), len(words)), dequantizer(numbers, dtype)
        nvrtc.launch("trellis_dequantize", defines, grid, 0, [words, matrix.steps, scales, out, n, k], words.device)
        return out
    states_kn = numbers.windows(unpack_words(words, numbers, (n, k)), 0, n, range(numbers.whole), numbers.size)
    return out.copy_(values(numbers.size, words.device)[states_kn].mul_(matrix.steps[:, None]).mul_(scales).T)


def variant(numbers: Tcq, dtype: torch.dtype, rows: int) -> nvrtc.Defines:
    """The macros of trellis_linear.cu for results in `dtype` and at most 16 rows of x."""
    bf16 = dtype == torch.bfloat16
    return nvrtc.defines(halves=numbers.halves, size=numbers.size, bf16=bf16, tiles=1 if rows <= 8 else 2)


def dequantizer(numbers: Tcq, dtype: torch.dtype) -> nvrtc.Defines:
    """The macros of trellis_dequantize.cu for weights in `dtype`."""
    return nvrtc.defines(halves=numbers.halves, size=numbers.size, out=_OUT[dtype])
