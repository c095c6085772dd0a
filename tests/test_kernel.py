"""The kernels' own source, run on this CPU (tests/emulator.py) with the product's own packing and launches.

What is claimed: products are those of float64 but for the rounding of sums in fp32 and of the result; a token's result has the
same bits in any batch and with blocks in any order; nothing outside of the arguments is touched, and every element of the
result is written.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.cuda import tiles
from compress.formats import Factored, Format, LowRank, Rotated, base_of, parse
from compress.formats.codebooks import Lut
from compress.formats.grid import Grid, plain, restore
from tests import emulator
from tests.conftest import rare
from tests.emulator import Emulator

BF16, FP16 = torch.bfloat16, torch.float16
QUICK = [  # every kind of grid, table, dtype, and low rank; the first five of the rest complete the widths
    ("int3:g32:asym", FP16), ("int4:channel", FP16), ("nf4:g64:dq8x256", BF16), ("lut2:g32", FP16), ("int3:g64+r16", BF16),
]  # fmt: skip
CASES = [
    *QUICK, ("int2:g64:asym", BF16), ("int4:g128:asym", BF16), ("int8:channel:asym", BF16), ("nf3:g128", FP16),
    ("lut4:g64", FP16), ("int2:g128", FP16), ("int3:g128", BF16), ("int3:g256:asym", BF16),
    ("int4:g256", BF16), ("int4:channel:asym", BF16),
    ("int8:g64", FP16), ("int8:g32:asym", BF16), ("nf2:g64", BF16), ("lut3:g256", BF16), ("nf4:g64+r5:int8:channel", FP16),
]  # fmt: skip
FACTORED = [("lr64:int4:channel", FP16), ("lr128:int4:g128:asym", BF16), ("lr64:nf4:g64:dq8x256", BF16)]
ROTATED = [("int4:channel:r128", FP16), ("nf4:g64:dq8x256:r64", BF16)]
EMULATED = [*QUICK, *(rare(*case) for case in CASES[len(QUICK) :])]
BATCHED = [pytest.param(*case, marks=() if case in QUICK[1::2] else pytest.mark.slow) for case in CASES]
TOKENS = (1, 13, 27, 64)  # one for each number of token tiles
FITS = (BF16, FP16)
needs_compiler = pytest.mark.skipif(
    emulator.missing() is not None, reason=f"{emulator.missing()}, to run the kernels' source here"
)


class Matrix:
    """A random matrix in a format, in parts; `W` is what it stands for, in float64, with its levels and factors in `dtype`."""

    def __init__(self, text: str, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0):
        self.fmt: Format = parse(text)
        self.shape, self.dtype = shape, dtype
        random = torch.Generator().manual_seed(seed)
        base = base_of(self.fmt)
        assert isinstance(base, tiles.Base)
        self.tensors = base.pack(*plain(torch.randn(shape, generator=random), base))
        if isinstance(base, Lut) and not base.shared:
            self.tensors["weight_table"] = torch.randn(base.levels, generator=random).sort().values.half()
        codes, grid = base.unpack(self.tensors)
        table = grid.table if grid.table is None else grid.table.to(dtype).double()
        self.W = restore(codes, Grid(grid.scale.double(), grid.zero, table), base, torch.float64)
        if isinstance(self.fmt, LowRank):
            A, B = (
                torch.randn(self.fmt.rank, shape[1], generator=random) / 8,
                torch.randn(shape[0], self.fmt.rank, generator=random) / 8,
            )
            self.tensors = self.fmt.pack(self.tensors, A, B)
            A, B = self.fmt.factor_matrices(self.tensors)
            self.W = self.W + B.to(dtype).double() @ A.to(dtype).double()
        assert cuda.obstacle(self.fmt, shape, dtype) is None
        self.tensors = {name: t.to(device) for name, t in self.tensors.items()}
        self.parts = cuda.repack(self.fmt, shape, self.tensors, dtype)
        self.bias = torch.randn(shape[0], generator=random).to(device, dtype)
        self.x = torch.randn(64, shape[1], generator=random).to(device, dtype)

    def times(self, x: Tensor, bias: bool = True) -> Tensor:
        return cuda.linear(x, self.parts, self.bias if bias else None, self.fmt, self.shape)

    def check(self, y: Tensor, x: Tensor, bias: bool = True, rounded: float = 0.0) -> None:
        """`y` is x W^T + bias: off by half a place of the dtype, and by 2**-18 of the sum of magnitudes, as sums in fp32 may be.

        `rounded`: what of each weight may be lost besides.
        """
        exact, size = x.cpu().double() @ self.W.T, x.cpu().double().abs() @ self.W.abs().T
        if bias:
            exact, size = exact + self.bias.cpu().double(), size + self.bias.cpu().double().abs()
        allowed = exact.abs() * torch.finfo(self.dtype).eps / 2 + size * (2**-18 + rounded)
        assert bool(((y.cpu().double() - exact).abs() <= allowed).all())  # false for NaN
        assert not self.parts[2].any(), "counters are 0 after a launch"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Emulator]:
    """compiled(slow) -> the kernels of all cases, or of the quick ones; compiled once."""

    def needs(slow: bool) -> list[emulator.Need]:
        cases = [*CASES, *FACTORED, *ROTATED] if slow else [*QUICK, FACTORED[0], ROTATED[0]]
        return [(parse(text), (16, 256), dtype) for text, dtype in cases]

    return emulator.once(tmp_path_factory, needs, TOKENS)


def inputs(text: str, least: int, tail: int) -> int:
    """A number of inputs for a format, `tail` more than a multiple of 256 where its groups allow."""
    base = base_of(parse(text))
    assert isinstance(base, tiles.Base)
    return least + (tail if not text.startswith("int") or tail % (base.group or 1) == 0 else 0)


@needs_compiler
@pytest.mark.parametrize(("text", "dtype"), [FACTORED[0], *(rare(*case) for case in FACTORED[1:])])
def test_factors_are_two_products(text: str, dtype: torch.dtype, cpu: Emulator) -> None:
    """In a launch each, of few rows and of many; and the matrix that they make, where somebody reads it."""
    fmt, shape, random = parse(text), (144, 256), torch.Generator().manual_seed(0)
    assert isinstance(fmt, Factored)
    assert cuda.obstacle(fmt, shape, dtype) is None
    assert cuda.obstacle(parse("lr8:int4:channel"), shape, dtype) == "8 inputs, not a multiple of 32"
    factors = [torch.randn(side, generator=random) / 8 for side in fmt.factor_shapes(shape).values()]
    tensors = fmt.pack(*(fmt.factors.pack(*plain(F, fmt.factors)) for F in factors))  # type: ignore[union-attr, arg-type]
    parts, bias = cuda.repack(fmt, shape, tensors, dtype), torch.randn(shape[0], generator=random).to(dtype)
    A, B = (F.double() for F in fmt.factor_matrices(tensors))
    for rows in (13, 150):
        x = torch.randn(rows, shape[1], generator=random).to(dtype)
        exact = x.double() @ A.T @ B.T + bias.double()
        allowed = torch.finfo(dtype).eps * (x.double().abs() @ A.abs().T @ B.abs().T + bias.double().abs())
        assert bool(((cuda.linear(x, parts, bias, fmt, shape).double() - exact).abs() <= 2 * allowed).all())
    torch.testing.assert_close(cuda.dequantize(parts, fmt, shape, torch.float32).double(), B @ A, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(("text", "dtype"), [ROTATED[0], *(rare(*case) for case in ROTATED[1:])])
def test_a_rotated_matrix_is_a_product_between_two_rotations(text: str, dtype: torch.dtype, cpu: Emulator) -> None:
    """Of few rows and of many; and the matrix itself, where somebody reads it."""
    fmt, shape, random = parse(text), (144, 256), torch.Generator().manual_seed(0)
    assert isinstance(fmt, Rotated)
    assert cuda.obstacle(fmt, shape, dtype) is None
    assert cuda.obstacle(parse("int5:channel:r128"), shape, dtype) == "5-bit codes"
    W = torch.randn(shape, generator=random)
    tensors = fmt.base.pack(*plain(fmt.turn(W, shape[0]), fmt.base))
    parts, bias = cuda.repack(fmt, shape, tensors, dtype), torch.randn(shape[0], generator=random).to(dtype)
    W = fmt.dequantize(tensors, torch.float32)
    assert torch.equal(cuda.dequantize(parts, fmt, shape, torch.float32), W)
    for rows in (13, 150):
        x = torch.randn(rows, shape[1], generator=random).to(dtype)
        exact = x.double() @ W.double().T + bias.double()
        found = cuda.linear(x, parts, bias, fmt, shape)
        assert found.dtype == dtype
        assert float((found - exact).norm()) <= 2 * torch.finfo(dtype).eps * float(exact.norm())


SHAPES = [(70, 256, 32, 1), (23, 1280, 64, 2), (16, 5120, 96, 1)]  # rows, inputs, and a tail of these; blocks that share K
SHAPED = [
    pytest.param(*case, *shape, marks=() if case in QUICK and i % len(SHAPES) == j else pytest.mark.slow)
    for i, case in enumerate(CASES)
    for j, shape in enumerate(SHAPES)
]


@needs_compiler
@pytest.mark.parametrize(("text", "dtype", "rows", "least", "tail", "split"), SHAPED)
def test_products_are_those_of_float64(
    text: str, dtype: torch.dtype, rows: int, least: int, tail: int, split: int, cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few inputs, some warps idle; K over two blocks; many inputs, so that the ring of units in flight goes round."""
    monkeypatch.setattr(cuda, "slices", lambda shape: split)
    matrix = Matrix(text, (rows, inputs(text, least, tail)), dtype)
    for m in TOKENS:
        bias = m != 13
        matrix.check(matrix.times(matrix.x[:m], bias), matrix.x[:m], bias)


@needs_compiler
@pytest.mark.parametrize(("text", "dtype"), BATCHED)
def test_a_token_has_the_same_bits_in_any_batch_and_order_of_blocks(
    text: str, dtype: torch.dtype, cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "slices", lambda shape: 3)
    matrix = Matrix(text, (20, inputs(text, 3584, 32)), dtype)
    whole = matrix.times(matrix.x)
    for seed, (i, m) in enumerate(((12, 1), (63, 1), (40, 13), (8, 30))):
        cpu.seed = seed
        assert torch.equal(matrix.times(matrix.x[i : i + m].clone()), whole[i : i + m])


@pytest.mark.slow
@needs_compiler
def test_two_launches_take_more_than_64_rows_and_dense_products_more_than_that(
    cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_CHUNK", 2 * 320 * 32)  # three chunks of outputs
    for text, dtype in (("int3:g64+r16", BF16), ("int2:g64:asym", BF16), ("lut4:g64", FP16)):
        matrix = Matrix(text, (70, 320), dtype)
        many = torch.cat([matrix.x, matrix.x.flip(0), matrix.x[:2]])
        assert len(many) > cuda.MOST
        y = matrix.times(many[:77])
        assert torch.equal(y[:64], matrix.times(matrix.x))
        assert torch.equal(y[64:], matrix.times(many[64:77]))
        for bias in (True, False):  # weights, and the low-rank parts, are rounded to the dtype once or twice more
            matrix.check(matrix.times(many, bias), many, bias, rounded=2 * torch.finfo(dtype).eps)


@needs_compiler
@pytest.mark.parametrize(("text", "dtype"), EMULATED)
def test_weights_are_dequantized_to_the_bits_of_the_format(
    text: str, dtype: torch.dtype, cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_CHUNK", 2 * 320 * 32)
    matrix = Matrix(text, (70, inputs(text, 256, 64)), dtype)
    weights = cuda.dequantize(matrix.parts, matrix.fmt, matrix.shape, dtype)
    expected = matrix.fmt.dequantize(matrix.tensors, dtype)
    if isinstance(matrix.fmt, LowRank):  # its factors are kept in the activations' dtype
        assert float((weights.double() - matrix.W).abs().max()) < 0.02
    else:
        assert torch.equal(weights, expected)
    monkeypatch.setattr(cuda, "_has_kernels", lambda t: False)
    by_torch = cuda.dequantize(matrix.parts, matrix.fmt, matrix.shape, dtype)
    assert torch.equal(by_torch, weights) or isinstance(matrix.fmt, LowRank)


@needs_compiler
def test_a_view_that_is_not_aligned_is_copied(cpu: Emulator) -> None:
    matrix = Matrix("int4:channel", (16, 256), FP16)
    flat = torch.zeros(1 + 256, dtype=FP16)
    flat[1:] = matrix.x[0]
    assert torch.equal(matrix.times(flat[1:].view(1, 256)), matrix.times(matrix.x[:1]))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 32), (15, 32), (17, 96), (130, 160)])
def test_small_and_odd_matrices(shape: tuple[int, int], cpu: Emulator) -> None:
    matrix = Matrix("lut2:g32", shape, FP16)
    for m in TOKENS:
        matrix.check(matrix.times(matrix.x[:m]), matrix.x[:m])


def test_the_split_of_k_depends_on_the_shape_alone_and_leaves_no_block_idle() -> None:
    for n, k in product((1, 64, 1024, 4096, 11008, 28672), (32, 896, 4096, 8192, 11008, 28672)):
        count, units = cuda.slices((n, k)), -(-k // 128)
        assert count == 1 or (count - 1) * -(-units // count) < units
    assert cuda.slices((4096, 4096)) == 1
    assert cuda.slices((1024, 4096)) == 4
    assert cuda.slices((8192, 28672)) == 4


@pytest.mark.parametrize(("text", "shape", "dtype", "why"), [
    ("bf16", (16, 64), BF16, "bf16 is not quantized"), ("int5:g64", (16, 64), BF16, "5-bit codes"),
    ("nf8:g64", (16, 64), BF16, "8-bit codes into a table"),
    ("int4:g48", (16, 96), BF16, "groups of 48"), ("int4:channel", (16, 100), BF16, "100 inputs, not a multiple of 32"),
    ("int4:g64", (16, 64), torch.float32, "activations in float32"), ("int7:g64+r2", (16, 64), FP16, "7-bit codes"),
    ("int4:g64", (16, 64), FP16, None), ("lut4:g32+r3:int8:channel", (3, 96), BF16, None),
])  # fmt: skip
def test_what_the_kernels_do_not_take(text: str, shape: tuple[int, int], dtype: torch.dtype, why: str | None) -> None:
    assert cuda.obstacle(parse(text), shape, dtype) == why


GRID = [f"int{b}:{g}{z}" for b in (2, 3, 4, 8) for g in ("g32", "g64", "g128", "g256", "channel") for z in ("", ":asym")]
GRID += [f"lut{b}:g{g}" for b in (2, 3, 4) for g in (32, 64, 128, 256)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("text", "dtype"), list(product(GRID, FITS)))
def test_every_variant(text: str, dtype: torch.dtype, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits, groups, zero points, tables, dtypes; and for each: token tiles, splits, low rank, bias."""
    low = f"{text}+r9"
    cpu = Emulator(tmp_path, emulator.variants([(parse(t), (16, 256), dtype) for t in (text, low)], TOKENS)).install(monkeypatch)  # type: ignore[arg-type]
    for split, t, bias in product((1, 3), (text, low), (False, True)):
        monkeypatch.setattr(cuda, "slices", lambda shape, split=split: split)
        cpu.seed = split
        matrix = Matrix(t, (50, inputs(text, 4096, 160)), dtype)
        for m in TOKENS:
            matrix.check(matrix.times(matrix.x[:m], bias), matrix.x[:m], bias)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("text", "dtype"), [*CASES, *product(GRID, FITS)])
def test_products_on_a_gpu(text: str, dtype: torch.dtype) -> None:
    """As above, and the same bits from a CUDA graph, for any batch, and at every replay."""
    matrix = Matrix(text, (1040, inputs(text, 4096, 160)), dtype, "cuda")
    cuda.prepare([(matrix.fmt, matrix.shape, dtype)], "cuda", (1, 13, 27, 64, 129))
    for m in TOKENS:
        x = matrix.x[:m].contiguous()
        y = matrix.times(x)
        matrix.check(y, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = matrix.times(x)
        for _ in range(3):
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, y)
        assert torch.equal(y[:1], matrix.times(x[:1]))
    many = torch.cat([matrix.x, matrix.x, matrix.x[:1]])
    matrix.check(matrix.times(many), many, rounded=2 * torch.finfo(dtype).eps)
    if not isinstance(matrix.fmt, LowRank):
        assert torch.equal(
            cuda.dequantize(matrix.parts, matrix.fmt, matrix.shape, dtype), matrix.fmt.dequantize(matrix.tensors, dtype)
        )
