"""Products with packed matrices on an NVIDIA GPU: which matrices the kernels take, and how a product becomes launches.

Up to `MOST` rows of x the packed kernel reads codes; above, the weights are dequantized in chunks that stay in the L2 cache, and
cuBLAS multiplies. A matrix in a packed form is a list of tensors, its *parts*:

    words, scales     as tiles.py makes them
    counters          int32 [row tiles], zero between launches: how many blocks have delivered a part of a sum
    levels            fp32 [2**bits]           only of tables
    A [r, K], B [N, r]                         only of low-rank formats: in the activations' dtype, r padded with zeros to 8

A product of two quantized factors (`lr64:int4:g64`) is the parts of A and then those of B, and two products, one after the other.
A rotated matrix is the parts of the one inside; activations are turned in front of its product and behind it, by torch, in fp32.

Nothing here waits for the GPU or allocates outside torch's allocator, so all of it can be captured in a CUDA graph, after
`prepare` has compiled what is needed. A matrix must not be multiplied on two streams at once, because of its counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.export.runtime.cuda import nvrtc, tiles
from compress.export.runtime.cuda.nvrtc import Defines
from compress.export.runtime.cuda.tiles import ROWS, Base, Layout
from compress.formats import (
    Coded,
    Dense,
    Ecq,
    Factored,
    Float,
    Format,
    Ggml,
    LowRank,
    Rotated,
    Served,
    Tcq,
    base_of,
    numbers_of,
)
from compress.formats.grid import restore

Shape = tuple[int, int]
MOST = 128  # rows of x up to which the packed kernel runs; an estimate, no GPU has been asked yet
_WIDTHS = {False: (2, 3, 4, 8), True: (2, 3, 4)}  # bits, of integers and of tables
_GROUPS = (None, 32, 64, 128, 256)
_TOKENS = 64  # rows of x in a launch
_LOW_RANK_TOKENS = 4  # rows of x in a block of low_rank.cu
_WARPS = nvrtc.THREADS // 32
_BLOCKS = 256  # wanted at least: two for each SM of a large GPU
_SHARE, _LEAST_SHARE = 8192, 1024  # inputs that a block takes at most (about), and at least
_CHUNK = 16 << 20  # bytes of dequantized weights at a time, a third of an L2 cache
_OUT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The parts of a matrix of `shape` [N, K] by their names; `factors` are A and B."""

    base: Base
    shape: Shape
    layout: Layout
    words: Tensor
    scales: Tensor
    counters: Tensor
    levels: Tensor | None
    factors: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, parts: Sequence[Tensor], fmt: Format, shape: Shape) -> _Matrix:
        base = _base(fmt)
        layout = Layout.of(base)
        words, scales, counters, *rest = parts
        levels, factors = (rest[0] if layout.table else None), rest[layout.table :]
        return cls(base, shape, layout, words, scales, counters, levels, (factors[0], factors[1]) if factors else None)


def obstacle(fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
    """None where the kernels run a matrix of `shape` [N, K] in `fmt` for activations of `dtype`; else why not."""
    if isinstance(fmt, Dense):
        return f"{fmt} is not quantized"
    if isinstance(fmt, Factored):
        return next(filter(None, (obstacle(fmt.factors, side, dtype) for side in fmt.factor_shapes(shape).values())), None)
    if isinstance(numbers_of(fmt), Ecq):
        return "codes of a byte with a step for each input"
    if isinstance(fmt, Ggml):
        return "blocks of llama.cpp's"
    if isinstance(numbers_of(fmt), Tcq):
        return "trellis codes"
    if isinstance(fmt, Served) or isinstance(numbers_of(fmt), Float):
        return "floating-point codes" if isinstance(fmt, Float) else "inputs that are rounded"
    base = _base(_inside(fmt))
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations in {str(dtype).removeprefix('torch.')}"
    table = Layout.of(base).table
    if base.bits not in _WIDTHS[table]:
        return f"{base.bits}-bit codes{' into a table' if table else ''}"
    if base.group not in _GROUPS:
        return f"groups of {base.group}"
    if shape[1] % 32:
        return f"{shape[1]} inputs, not a multiple of 32"
    return None


def repack(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The parts of a matrix of `shape` [N, K], from the tensors that `fmt.tensors(shape)` lists; on their device.

    `dtype` is that of the activations. For matrices without an `obstacle`.
    """
    if isinstance(fmt, Factored):
        return [part for name, side in fmt.factor_shapes(shape).items()
                for part in repack(fmt.factors, side, fmt.factor(tensors, name), dtype)]  # fmt: skip
    if isinstance(fmt, Rotated):
        fmt.warm(shape, next(iter(tensors.values())).device)
        return repack(fmt.base, shape, tensors, dtype)
    base = _base(fmt)
    words, scales, *levels = tiles.pack(base, tensors)
    parts = [words, scales, torch.zeros(len(words), dtype=torch.int32, device=words.device), *levels]
    if isinstance(fmt, LowRank):
        A_rk, B_nr = fmt.factor_matrices(tensors)
        short = -fmt.rank % 8
        parts += [pad(A_rk, (0, 0, 0, short)).to(dtype).contiguous(), pad(B_nr, (0, short)).to(dtype).contiguous()]
    return parts


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, fmt: Format, shape: Shape) -> Tensor:
    """x W^T + bias, [M, N] in the dtype of x; x [M, K], contiguous, bf16 or fp16, on a GPU, and bias [N] in its dtype.

    Up to MOST rows, a row of the result has the same bits whatever the other rows are, and in every run.
    """
    if isinstance(fmt, Factored):
        (A, first), (B, second) = _halves(parts, fmt, shape)
        return linear(linear(x, A, None, fmt.factors, first), B, bias, fmt.factors, second)
    if isinstance(fmt, Rotated):
        y = fmt.out_of(linear(fmt.into(x).to(x.dtype), parts, None, fmt.base, shape))
        return (y if bias is None else y + bias.float()).to(x.dtype)
    matrix, y = _Matrix.of(parts, fmt, shape), x.new_empty(len(x), shape[0])
    if x.data_ptr() % 16:
        x = x.clone()  # a view into the middle of something: the kernels load 16 bytes at a time
    if len(x) > MOST:
        return _by_chunks(x, matrix, bias, y)
    for i in range(0, len(x), _TOKENS):
        _packed(x[i : i + _TOKENS], matrix, bias, y[i : i + _TOKENS])
    return y


def dequantize(parts: Sequence[Tensor], fmt: Format, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] in `dtype` (bf16, fp16 or fp32): on a GPU by a kernel, elsewhere by torch.

    To the bits of `fmt.dequantize`, but for a low-rank term: its factors are in the activations' dtype, and its product is
    taken in fp32.
    """
    if isinstance(fmt, Factored):
        A, B = (dequantize(half, fmt.factors, side, torch.float32) for half, side in _halves(parts, fmt, shape))
        return (B @ A).to(dtype)
    if isinstance(fmt, Rotated):
        return fmt.turn_back(dequantize(parts, fmt.base, shape, torch.float32), dtype)
    matrix, out = _Matrix.of(parts, fmt, shape), torch.empty(shape, dtype=dtype, device=parts[0].device)
    for rows in _chunks(shape):
        if matrix.factors:
            A, B = matrix.factors
            W = _base_rows(matrix, rows, torch.float32)
            out[rows] = W.addmm_(B[rows].float(), A.float())
        else:
            _base_rows(matrix, rows, dtype, out[rows])
    return out


def prepare(
    needs: Iterable[tuple[Format, Shape, torch.dtype]], device: torch.device | str, tokens: Sequence[int] = (1, 8, 16, 32, 64)
) -> None:
    """Compile and load on `device` what products with such matrices and numbers of rows of x take, before a graph is captured.

    A variant is compiled in half a second, once per machine, and serves all shapes and numbers of rows up to 8, 16, 32 or 64.
    """
    device, wanted = torch.device(device), set[tuple[str, Defines]]()
    for fmt, _, dtype in needs:
        layout = Layout.of(_base(_inside(fmt)))
        for count in (t for m in tokens for t in ((min(m, _TOKENS), m % _TOKENS) if m <= MOST else ()) if t):
            wanted.add(("packed_linear", variant(layout, dtype, count)))
        wanted.add(("dequantize", _dequantizer(layout, dtype)))
        if isinstance(fmt, Factored | Rotated):
            wanted.add(("dequantize", _dequantizer(layout, torch.float32)))
        if isinstance(fmt, LowRank):
            wanted |= {("low_rank", _low_rank_variant(dtype)), ("dequantize", _dequantizer(layout, torch.float32))}
    for name, defines in sorted(wanted):
        nvrtc.load(name, defines, device)


def _halves(parts: Sequence[Tensor], fmt: Factored, shape: Shape) -> list[tuple[Sequence[Tensor], Shape]]:
    """The parts of either factor, which are as many, and its shape."""
    half = len(parts) // 2
    return list(zip((parts[:half], parts[half:]), fmt.factor_shapes(shape).values(), strict=True))


def slices(shape: Shape) -> int:
    """Over how many blocks K is split. By the shape alone, so that a token's sum has one order on any GPU and in any batch."""
    n, k = shape
    return max(1, min(max(-(-_BLOCKS // -(-n // ROWS)), -(-k // _SHARE)), k // _LEAST_SHARE))


def _packed(x: Tensor, matrix: _Matrix, bias: Tensor | None, y: Tensor) -> None:
    """At most 64 rows, one launch, or two with a low-rank term."""
    (m, k), n, layout, words = x.shape, matrix.shape[0], matrix.layout, matrix.words
    A, B = matrix.factors or (None, None)
    t = None if A is None else _low_rank(x, A)
    share, defines = slices(matrix.shape), variant(layout, x.dtype, m)
    partial = x.new_empty(share, m, n, dtype=torch.float32) if share > 1 else None
    token_tiles = dict(defines)["V_TILES"]
    row_tiles = 1 if token_tiles == 1 else _WARPS // 2  # of a block; Variant::ROWS
    table = 4 * 32 << 2 * layout.bits if layout.table else 0
    shared = 4 * 4 * token_tiles * nvrtc.THREADS + table
    grid, rank = (-(-len(words) // row_tiles), share), 0 if A is None else len(A)
    args = [words, matrix.scales, matrix.levels, x, y, bias, B, t, partial, matrix.counters, m, n, k, rank]
    nvrtc.launch("packed_linear", defines, grid, shared, args, x.device)


def _low_rank(x: Tensor, A: Tensor) -> Tensor:
    """x A^T [M, r] in fp32."""
    (m, k), r = x.shape, len(A)
    t = x.new_empty(m, r, dtype=torch.float32)
    shared = 4 * _WARPS * _LOW_RANK_TOKENS
    nvrtc.launch("low_rank", _low_rank_variant(x.dtype), (r, -(-m // _LOW_RANK_TOKENS)), shared, [A, x, t, m, k], x.device)
    return t


def _by_chunks(x: Tensor, matrix: _Matrix, bias: Tensor | None, y: Tensor) -> Tensor:
    """Many rows: the weights of some outputs at a time, in the dtype of x, and a dense product."""
    for rows in _chunks(matrix.shape):
        W = _base_rows(matrix, rows, x.dtype)
        if bias is None:
            torch.mm(x, W.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, W.T, out=y[:, rows])
    if matrix.factors:
        A, B = matrix.factors
        y.addmm_(x @ A.T, B.T)
    return y


def _base_rows(matrix: _Matrix, rows: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The outputs `rows` of a matrix without its low-rank term, in `dtype`; they begin at a multiple of 16."""
    (n, k), layout, levels = (rows.stop - rows.start, matrix.shape[1]), matrix.layout, matrix.levels
    of = slice(rows.start // ROWS, -(-rows.stop // ROWS))
    words, scales = matrix.words[of], matrix.scales[of]
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=words.device)
    if _has_kernels(words):
        grid = -(-words.shape[1] // _WARPS), len(words)
        args = [words, scales, levels, out, n, k, layout.group, int(layout.zeros)]
        nvrtc.launch("dequantize", _dequantizer(layout, dtype), grid, 0, args, words.device)
    else:
        codes, grid_ = tiles.unpack([words, scales, *([] if levels is None else [levels])], matrix.base, (n, k))
        out.copy_(restore(codes, grid_, matrix.base, dtype))
    return out


def _has_kernels(t: Tensor) -> bool:
    return t.is_cuda


def _chunks(shape: Shape) -> Iterator[slice]:
    rows = max(1, _CHUNK // (2 * shape[1] * ROWS)) * ROWS
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))


def variant(layout: Layout, dtype: torch.dtype, rows: int) -> Defines:
    """The macros of packed_linear.cu for a layout, activations of `dtype`, and at most 64 `rows` of them."""
    token_tiles = next(t for t in (1, 2, 4, 8) if 8 * t >= rows)
    bf16 = dtype == torch.bfloat16
    return nvrtc.defines(
        bits=layout.bits, bf16=bf16, group=layout.group, zero=layout.zeros, table=layout.table, tiles=token_tiles
    )


def _low_rank_variant(dtype: torch.dtype) -> Defines:
    return nvrtc.defines(bf16=dtype == torch.bfloat16)


def _dequantizer(layout: Layout, dtype: torch.dtype) -> Defines:
    return nvrtc.defines(bits=layout.bits, table=layout.table, out=_OUT[dtype])


def _inside(fmt: Format) -> Format:
    """What the matrices are in that the kernels multiply by."""
    return fmt.factors if isinstance(fmt, Factored) else fmt.base if isinstance(fmt, Rotated) else fmt


def _base(fmt: Format) -> Base:
    base = base_of(fmt)
    assert not isinstance(base, Ggml | Dense | Coded | Factored | Rotated | Float | Served)
    return base
