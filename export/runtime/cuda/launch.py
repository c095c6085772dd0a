"""Products with packed matrices on an NVIDIA GPU: which matrices the kernels take, and how a product becomes launches.

Up to `MOST` rows of x the packed kernel reads codes; above, the weights are dequantized in chunks that stay in the L2 cache, and
cuBLAS multiplies. A matrix in a packed form is a list of tensors, its *parts*:

    words, scales     as tiles.py makes them
    counters          int32 [row tiles], zero between launches: how many blocks have delivered a part of a sum
    levels            fp32 [2**bits]           only of tables
    A [r, K], B [N, r]                         only of low-rank formats: in the activations' dtype, r padded with zeros to 8
    steps [K]                                  only of entropy-coded ones: fp32, 1 at most

A product of two quantized factors (`lr64:int4:g64`) is the parts of A and then those of B, and two products, one after the other.
A rotated matrix is the parts of the one inside; activations are turned in front of its product and behind it (turning.py). What
was entropy-coded is integers of 8 bits with a scale for each output, whose activations are multiplied by the steps as they are
turned. Trellis codes have a layout and a product of their own (rings.py).

Nothing here waits for the GPU or allocates outside torch's allocator, so all of it can be captured in a CUDA graph, after
`prepare` has compiled what is needed. A matrix must not be multiplied on two streams at once, because of its counters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.export.runtime.cuda import nvrtc, rings, tiles, turning
from compress.export.runtime.cuda.nvrtc import Defines
from compress.export.runtime.cuda.rings import Rings
from compress.export.runtime.cuda.tiles import ROWS, Base, Layout
from compress.formats import (
    Coded,
    Dense,
    Ecq,
    Factored,
    Float,
    Format,
    Ggml,
    Int,
    LowRank,
    Rotated,
    Served,
    Tcq,
    base_of,
    numbers_of,
)
from compress.formats.entropy import STEPS, stepped
from compress.formats.grid import Grid, restore
from compress.formats.trellis import RING

Shape = tuple[int, int]
MOST = 128  # rows of x up to which the packed kernel runs; an estimate, no GPU has been asked yet
MOST_CODED = 64  # and that of trellis codes, which reads them again for every 16
_WIDTHS = {False: (2, 3, 4, 8), True: (2, 3, 4)}  # bits, of integers and of tables
_GROUPS = (None, 32, 64, 128, 256)
_TOKENS = 64  # rows of x in a launch
_LOW_RANK_TOKENS = 4  # rows of x in a block of low_rank.cu
_WARPS = nvrtc.THREADS // 32
_BLOCKS = 256  # wanted at least: two for each SM of a large GPU
_SHARE, _LEAST_SHARE = 8192, 1024  # inputs that a block takes at most (about), and at least
_CHUNK = 16 << 20  # bytes of dequantized weights at a time, a third of an L2 cache
_BYTES = Int(8, None)  # what entropy-coded integers are once they are decoded, but for their steps
_OUT = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True, eq=False)
class _Matrix:
    """The parts of a matrix of `shape` [N, K] by their names, of a rotated one of the one inside; `factors` are A and B."""

    base: Base
    shape: Shape
    layout: Layout
    words: Tensor
    scales: Tensor
    counters: Tensor
    levels: Tensor | None
    factors: tuple[Tensor, Tensor] | None
    steps: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[Tensor], fmt: Format, shape: Shape) -> _Matrix:
        base = _base(_inside(fmt))
        layout = Layout.of(base)
        words, scales, counters, *rest = parts
        levels = rest.pop(0) if layout.table else None
        steps = rest.pop(0) if isinstance(numbers_of(fmt), Ecq) else None
        return cls(base, shape, layout, words, scales, counters, levels, (rest[0], rest[1]) if rest else None, steps)


def obstacle(fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
    """None where the kernels run a matrix of `shape` [N, K] in `fmt` for activations of `dtype`; else why not."""
    if isinstance(fmt, Dense):
        return f"{fmt} is not quantized"
    if isinstance(fmt, Factored):
        return next(filter(None, (obstacle(fmt.factors, side, dtype) for side in fmt.factor_shapes(shape).values())), None)
    if isinstance(fmt, Ggml):
        return "blocks of llama.cpp's"
    if isinstance(fmt, Served) or isinstance(numbers_of(fmt), Float):
        return "floating-point codes" if isinstance(fmt, Float) else "inputs that are rounded"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations in {str(dtype).removeprefix('torch.')}"
    if isinstance(numbers_of(fmt), Tcq):
        return None
    base = _base(_inside(fmt))
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
        return repack(fmt.base, shape, tensors, dtype)
    if isinstance(fmt, Tcq):
        return rings.pack(fmt, tensors)
    if isinstance(fmt, Ecq):
        return _repack_bytes(fmt, tensors)
    base = _base(fmt)
    words, scales, *levels = tiles.pack(base, tensors)
    parts = [words, scales, torch.zeros(len(words), dtype=torch.int32, device=words.device), *levels]
    if isinstance(fmt, LowRank):
        A_rk, B_nr = fmt.factor_matrices(tensors)
        short = -fmt.rank % 8
        parts += [pad(A_rk, (0, 0, 0, short)).to(dtype).contiguous(), pad(B_nr, (0, short)).to(dtype).contiguous()]
    return parts


def _repack_bytes(fmt: Ecq, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Of an entropy-coded matrix, decoded or not yet. Steps and scales are the format's but for a power of two, by which no step
    exceeds 1: fp16 has room for what activations are then."""
    codes = tensors["weight_codes"] if "weight_codes" in tensors else fmt.codes(tensors)
    exponent, base = tensors["weight_step"], tensors["weight_base"].float()
    shift = -(-exponent.max().int() // STEPS)
    shift = shift + torch.frexp(base).exponent.to(shift.device)  # base < 2**exponent
    scale, layout = torch.ldexp(tensors["weight_scale"].float(), shift), Layout.of(_BYTES)
    words = tiles.pack_codes(codes.view(torch.uint8) + (_BYTES.levels // 2), layout)  # counted from the middle
    counters = torch.zeros(len(words), dtype=torch.int32, device=words.device)
    steps = stepped(torch.ldexp(base, -shift), exponent)
    return [words, tiles.pack_scales(Grid(scale[:, None]), layout, codes.shape[1]), counters, steps]


def linear(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, fmt: Format, shape: Shape) -> Tensor:
    """x W^T + bias, [M, N] in the dtype of x; x [M, K], contiguous, bf16 or fp16, on a GPU, and bias [N] in its dtype.

    Up to MOST rows, a row of the result has the same bits whatever the other rows are, and in every run.
    """
    if isinstance(fmt, Factored):
        (A, first), (B, second) = _halves(parts, fmt, shape)
        return linear(linear(x, A, None, fmt.factors, first), B, bias, fmt.factors, second)
    if x.data_ptr() % 16:
        x = x.clone()  # a view into the middle of something: the kernels load 16 bytes at a time
    if isinstance(numbers_of(fmt), Tcq) and len(x) <= MOST_CODED:
        return rings.linear(x, parts, bias, fmt, shape)
    steps = parts[-1] if isinstance(numbers_of(fmt), Ecq) and len(x) <= MOST else None  # dense weights have them inside
    if isinstance(fmt, Rotated) or steps is not None:
        x = turning.turn_inputs(x, steps, turning.block_of(fmt))
    if not isinstance(fmt, Rotated):
        return _product(x, parts, bias, fmt, shape, x.dtype)
    y = _product(x, parts, None, fmt, shape, torch.float32)
    return turning.turn_outputs(y, bias, fmt.outputs(shape[0]), x.dtype)


def _product(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, fmt: Format, shape: Shape, dtype: torch.dtype) -> Tensor:
    """x times the matrix inside, plus the bias: [M, N] in `dtype`, by torch's products in that of x."""
    if isinstance(numbers_of(fmt), Tcq):
        return _by_chunks(x, Rings.of(parts, fmt, shape), bias)
    matrix = _Matrix.of(parts, fmt, shape)
    if len(x) > MOST:
        return _by_chunks(x, matrix, bias)
    y = x.new_empty(len(x), shape[0], dtype=dtype)
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
    matrix = Rings.of(parts, fmt, shape) if isinstance(fmt, Tcq) else _Matrix.of(parts, fmt, shape)
    out = torch.empty(shape, dtype=dtype, device=parts[0].device)
    for rows in _chunks(matrix):
        if isinstance(matrix, Rings):
            rings.rows_of(matrix, rows, dtype, _has_kernels(matrix.words), out[rows])
        elif matrix.factors:
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
        wanted |= _variants(fmt, dtype, tokens)
    for name, defines in sorted(wanted):
        nvrtc.load(name, defines, device)


def _variants(fmt: Format, dtype: torch.dtype, tokens: Sequence[int]) -> set[tuple[str, Defines]]:
    """Kernels, and their macros, of products with matrices in a format, and of their gradients."""
    found, numbers = set[tuple[str, Defines]](), numbers_of(fmt)
    most, each = (MOST_CODED, rings.TOKENS) if isinstance(numbers, Tcq) else (MOST, _TOKENS)
    counts = {t for m in tokens for t in ((min(m, each), m % each) if m <= most else ()) if t}
    kinds = {dtype, *((torch.float32,) if isinstance(fmt, Factored | Rotated | LowRank) else ())}
    if isinstance(numbers, Tcq):
        found |= {("trellis_linear", rings.variant(numbers, dtype, count)) for count in counts}
        found |= {("trellis_dequantize", rings.dequantizer(numbers, kind)) for kind in kinds}
        found.add(("turn_inputs", turning.inputs_variant(dtype, True)))
    else:
        layout = Layout.of(_base(_inside(fmt)))
        found |= {("packed_linear", variant(layout, dtype, count)) for count in counts}
        found |= {("dequantize", _dequantizer(layout, kind)) for kind in kinds}
    if isinstance(fmt, Rotated) or isinstance(numbers, Ecq):
        found.add(("turn_inputs", turning.inputs_variant(dtype, False)))
    if isinstance(fmt, Rotated):
        found |= {("turn_outputs", turning.outputs_variant(dtype, wide)) for wide in (False, True)}
    if isinstance(fmt, LowRank):
        found.add(("low_rank", _low_rank_variant(dtype)))
    return found


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
    shared, wide = 4 * 4 * token_tiles * nvrtc.THREADS + table, int(y.dtype == torch.float32)
    grid, rank = (-(-len(words) // row_tiles), share), 0 if A is None else len(A)
    args = [words, matrix.scales, matrix.levels, x, y, bias, B, t, partial, matrix.counters, m, n, k, rank, wide]
    nvrtc.launch("packed_linear", defines, grid, shared, args, x.device)


def _low_rank(x: Tensor, A: Tensor) -> Tensor:
    """x A^T [M, r] in fp32."""
    (m, k), r = x.shape, len(A)
    t = x.new_empty(m, r, dtype=torch.float32)
    shared = 4 * _WARPS * _LOW_RANK_TOKENS
    nvrtc.launch("low_rank", _low_rank_variant(x.dtype), (r, -(-m // _LOW_RANK_TOKENS)), shared, [A, x, t, m, k], x.device)
    return t


def _by_chunks(x: Tensor, matrix: _Matrix | Rings, bias: Tensor | None) -> Tensor:
    """Many rows: the weights of some outputs at a time, in the dtype of x, and a dense product."""
    y = x.new_empty(len(x), matrix.shape[0])
    for rows in _chunks(matrix):
        W = _rows(matrix, rows, x.dtype)
        if bias is None:
            torch.mm(x, W.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, W.T, out=y[:, rows])
    if isinstance(matrix, _Matrix) and matrix.factors:
        A, B = matrix.factors
        y.addmm_(x @ A.T, B.T)
    return y


def _rows(matrix: _Matrix | Rings, rows: slice, dtype: torch.dtype) -> Tensor:
    """The outputs `rows` of a matrix, without its low-rank term, in `dtype`."""
    if isinstance(matrix, Rings):
        out = torch.empty(rows.stop - rows.start, matrix.shape[1], dtype=dtype, device=matrix.words.device)
        return rings.rows_of(matrix, rows, dtype, _has_kernels(matrix.words), out)
    return _base_rows(matrix, rows, dtype)


def _base_rows(matrix: _Matrix, rows: slice, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The outputs `rows` of a matrix without its low-rank term, in `dtype`; they begin at a multiple of 16."""
    (n, k), layout, levels = (rows.stop - rows.start, matrix.shape[1]), matrix.layout, matrix.levels
    of = slice(rows.start // ROWS, -(-rows.stop // ROWS))
    words, scales = matrix.words[of], matrix.scales[of]
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=words.device)
    if _has_kernels(words):
        grid = -(-words.shape[1] // _WARPS), len(words)
        args = [words, scales, levels, matrix.steps, out, n, k, layout.group, int(layout.zeros)]
        nvrtc.launch("dequantize", _dequantizer(layout, dtype), grid, 0, args, words.device)
    else:
        codes, grid_ = tiles.unpack([words, scales, *([] if levels is None else [levels])], matrix.base, (n, k))
        if matrix.steps is None:
            out.copy_(restore(codes, grid_, matrix.base, dtype))
        else:
            out.copy_((codes.float() - _BYTES.levels // 2).mul_(matrix.steps).mul_(grid_.scale))
    return out


def _has_kernels(t: Tensor) -> bool:
    return t.is_cuda


def _chunks(matrix: _Matrix | Rings) -> Iterator[slice]:
    (n, k), tile = matrix.shape, RING if isinstance(matrix, Rings) else ROWS
    rows = max(1, _CHUNK // (2 * k * tile)) * tile
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


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
    """What the matrices are in that packed_linear.cu multiplies by."""
    inside = fmt.factors if isinstance(fmt, Factored) else fmt.base if isinstance(fmt, Rotated) else fmt
    return _BYTES if isinstance(inside, Ecq) else inside


def _base(fmt: Format) -> Base:
    base = base_of(fmt)
    assert not isinstance(base, Ggml | Dense | Coded | Factored | Rotated | Float | Served)
    return base
