"""The kernels of trellis codes, of rotations and of decoded entropy codes: their own source, run on this CPU (tests/emulator.py).

What is claimed: weights are those of the format, to the bit; products are those of float64 but for sums in fp32, for activations
that are rounded once when they are turned, and for the rounding of the result; a token's result has the same bits in any batch
and with blocks in any order; nothing outside of the arguments is touched, and every element of the result is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.cuda import rings, tiles, turning
from compress.export.runtime.linear import PackedLinear
from compress.export.runtime.loading import load
from compress.formats import Ecq, Format, Rotated, Tcq, entropy, numbers_of, parse
from compress.formats.grid import plain
from compress.formats.rotated import BLOCKS, INPUTS, OUTPUTS, rotation, signs
from compress.formats.trellis import HALVES, SIZES
from tests import emulator
from tests.conftest import rare
from tests.cooking import bake
from tests.emulator import Emulator

BF16, FP16 = torch.bfloat16, torch.float16
RATES = [Tcq(h, size) for h in HALVES for size in SIZES if size >= h]
QUICK = [  # text, outputs, inputs, dtype: a rate as it is, one rotated, on both sides, and codes that are decoded first
    ("tcq2", 272, 70, BF16), ("tcq4:l8:ri32", 8, 96, BF16), ("tcq3:l10:r256", 544, 256, BF16), ("ecq3", 37, 96, FP16),
    ("ecq4:r32", 70, 160, FP16),
]  # fmt: skip
MORE = [
    ("tcq2.5:r16", 320, 176, FP16), ("int4:g32:r64", 51, 192, BF16), ("lut3:g64:ri64", 34, 128, FP16),
    *((f"{fmt}{turn}", n, k, dtype) for fmt in RATES for turn, n, k, dtype in (("", 832, 33, FP16), (":r128", 320, 384, BF16))),
    *((f"{text}:r{i}{b}", 3 * n, 3 * b, dtype) for text in ("int8:channel", "lut4:g32", "nf3:g32", "ecq2.5", "tcq1")
      for i, b, n, dtype in (("", 32, 32, BF16), ("i", 64, 64, FP16), ("", 256, 64, FP16))),
    ("int2:g64:asym:r64", 44, 192, FP16), ("ecq5", 130, 2080, BF16),
]  # fmt: skip
CASES = [*QUICK, *(rare(*case) for case in MORE)]
TOKENS = (1, 11, 18)
needs_compiler = pytest.mark.skipif(
    emulator.missing() is not None, reason=f"{emulator.missing()}, to run the kernels' source here"
)


class Matrix:
    """A random matrix in a format, in parts. exactly: steps of inputs are powers of two, and levels of tables of 16 bits."""

    def __init__(self, text: str, shape: tuple[int, int], dtype: torch.dtype, exactly: bool = False):
        self.fmt, self.shape, self.dtype = parse(text), shape, dtype
        self.random = torch.Generator().manual_seed(0)
        assert cuda.obstacle(self.fmt, shape, dtype) is None
        self.tensors = random_tensors(self.fmt, shape, self.random)
        if exactly and "weight_step" in self.tensors:
            self.tensors["weight_step"] &= 240
        self.parts = cuda.repack(self.fmt, shape, self.tensors, dtype)
        self.bias = torch.randn(shape[0], generator=self.random).to(dtype)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix inside a rotation, by the format's own definition."""
        base = self.fmt.base if isinstance(self.fmt, Rotated) else self.fmt
        if isinstance(base, Ecq):
            return entropy.restored(
                self.tensors["weight_codes"], entropy.steps(self.tensors), self.tensors["weight_scale"], dtype
            )
        return base.dequantize(self.tensors, dtype)

    def whole(self) -> Tensor:
        """The matrix that is multiplied by, in float64."""
        C = self.weights().double()
        return self.fmt.turn_back(C) if isinstance(self.fmt, Rotated) else C

    def x(self, rows: int) -> Tensor:
        """Activations; those of one row are much larger than those of another."""
        x = torch.randn(rows, self.shape[1], generator=self.random)
        return (x * torch.logspace(-2, 2, rows)[:, None]).to(self.dtype)

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return cuda.linear(x, self.parts, bias, self.fmt, self.shape)


def random_tensors(fmt: Format, shape: tuple[int, int], random: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a format, of random numbers; those of an entropy-coded one as they are once it is decoded."""
    (n, k), numbers = shape, numbers_of(fmt)
    scale = (torch.rand(n, generator=random) + 0.5).bfloat16()
    if isinstance(numbers, Tcq):
        words = torch.randint(-(1 << 31), 1 << 31, (k, n * numbers.halves // 64), generator=random).int()
        step = torch.randint(80, 140, (k,), generator=random).to(torch.uint8)
        return {"weight_trellis": words, "weight_step": step, "weight_scale": scale, "weight_shape": torch.tensor(shape)}
    W = torch.randn(shape, generator=random)
    if isinstance(numbers, Ecq):
        codes, step = (W * 40).round().clamp(-127, 127).to(torch.int8), torch.randint(0, 40, (k,), generator=random)
        return {"weight_codes": codes, "weight_step": step.to(torch.uint8), "weight_scale": scale,
                "weight_base": torch.tensor([2.0**-14])}  # fmt: skip
    assert isinstance(numbers, tiles.Base)
    return numbers.pack(*plain(W, numbers))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Emulator]:
    """compiled(slow) -> the kernels of all cases, or of the quick ones; compiled once."""

    def needs(slow: bool) -> list[emulator.Need]:
        return [(parse(text), (n, k), dtype) for text, n, k, dtype in [*QUICK, *(MORE if slow else [])]]

    return emulator.once(tmp_path_factory, needs, TOKENS)


@needs_compiler
@pytest.mark.parametrize(("text", "n", "k", "dtype"), CASES)
def test_weights_are_dequantized_to_the_bits_of_the_format(text: str, n: int, k: int, dtype: torch.dtype, cpu: Emulator) -> None:
    """In the dtype that many rows of activations are multiplied in, and turned back, where somebody reads the matrix."""
    matrix = Matrix(text, (n, k), dtype)
    inside = matrix.fmt.base if isinstance(matrix.fmt, Rotated) else matrix.fmt
    assert torch.equal(cuda.dequantize(matrix.parts, inside, (n, k), dtype), matrix.weights(dtype))
    if isinstance(matrix.fmt, Rotated):
        whole = matrix.fmt.turn_back(matrix.weights(), dtype)
        assert torch.equal(cuda.dequantize(matrix.parts, matrix.fmt, (n, k), dtype), whole)


@needs_compiler
def test_every_state_of_a_trellis_is_the_number_that_the_format_says(cpu: Emulator) -> None:
    matrix = Matrix("tcq2", (272, 288), BF16, exactly=True)
    fmt = parse("tcq2")
    assert isinstance(fmt, Tcq)
    seen = fmt.windows(matrix.tensors["weight_trellis"], 0, 272, range(16), 12)
    assert len(seen.unique()) == 1 << 12
    assert torch.equal(cuda.dequantize(matrix.parts, fmt, (272, 288), BF16), matrix.weights(BF16))


def exact(matrix: Matrix) -> Tensor:
    """A row of activations [1, K] that turning rounds nowhere: turned they are whole numbers, where blocks have a whole root."""
    q = torch.randint(-1, 2, (1, matrix.shape[1]), generator=matrix.random).double()
    if isinstance(matrix.fmt, Rotated):
        q = q @ torch.block_diag(*[rotation(INPUTS, matrix.fmt.block).double().T] * (matrix.shape[1] // matrix.fmt.block))
    x = q.to(matrix.dtype)
    assert torch.allclose(x.double(), q, rtol=0, atol=1e-6 * float(q.abs().max()))
    return x


ROOTS = [case for case in QUICK if not (isinstance(parse(case[0]), Rotated) and parse(case[0]).block not in (16, 64, 256))]  # type: ignore[union-attr]


@needs_compiler
@pytest.mark.parametrize(("text", "n", "k", "dtype"), ROOTS)
def test_products_are_those_of_float64(text: str, n: int, k: int, dtype: torch.dtype, cpu: Emulator) -> None:
    """What a result in 16 bits lacks is seen by a second product, from which the first is taken away as its bias."""
    matrix = Matrix(text, (n, k), dtype, exactly=True)
    x = exact(matrix)
    first = matrix.times(x, None)
    rest = matrix.times(x, -first[0])
    expected = x.double() @ matrix.whole().T
    off = float((first.double() + rest.double() - expected).norm() / expected.norm())
    assert off < (1e-6 if dtype == FP16 else torch.finfo(BF16).eps ** 2)


@needs_compiler
@pytest.mark.parametrize(("text", "n", "k", "dtype"), CASES)
def test_products_of_any_rows_are_rounded_when_they_are_turned_and_at_the_end(
    text: str, n: int, k: int, dtype: torch.dtype, cpu: Emulator
) -> None:
    """Of few rows, of two launches, and of so many that weights are made dense."""
    matrix = Matrix(text, (n, k), dtype)
    W, eps = matrix.whole(), torch.finfo(dtype).eps
    for rows in (1, 11, 18, 130):
        x = matrix.x(rows)
        expected = x.double() @ W.T + matrix.bias.double()
        found = matrix.times(x, matrix.bias)
        assert found.dtype == dtype
        assert float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) < eps  # false for NaN


@needs_compiler
@pytest.mark.parametrize(("text", "n", "k", "dtype"), QUICK)
def test_a_token_has_the_same_bits_in_any_batch_and_order_of_blocks(
    text: str, n: int, k: int, dtype: torch.dtype, cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, count in ((cuda, 1), (rings, 3 if k > 64 else 2)):
        monkeypatch.setattr(place, "slices", lambda shape, count=count: count)
    matrix = Matrix(text, (n, k), dtype)
    x = matrix.x(19)
    whole = matrix.times(x, matrix.bias)
    for seed, (i, m) in enumerate(((0, 1), (18, 1), (3, 9))):
        cpu.seed = seed
        assert torch.equal(matrix.times(x[i : i + m].clone(), matrix.bias), whole[i : i + m])
        assert not any(part.any() for part in matrix.parts if part.dtype == torch.int32 and part.ndim == 1), (
            "counters are 0 again"
        )


@needs_compiler
def test_the_scale_of_a_row_holds_the_largest_and_the_smallest_activations(cpu: Emulator) -> None:
    """bf16 holds what fp16 does not; what a rotation puts in one place, a row of zeros, and what is not finite."""
    matrix = Matrix("tcq3:l10:r256", (544, 256), BF16)
    W, x = matrix.whole(), matrix.x(6)
    x[0] = signs(INPUTS, 256)
    for i, power in enumerate((100, 20, -20, -100)):
        x[i] *= 2.0**power / x[i].abs().max()
    x[4], x[5] = 0.0, torch.inf
    found, expected = matrix.times(x, None), x[:5].double() @ W.T
    off = (found[:4].double() - expected[:4]).norm(dim=1) / expected[:4].norm(dim=1)
    assert float(off.max()) < torch.finfo(BF16).eps
    assert not found[4].any()
    assert not found[5].isfinite().any()


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_activations_are_turned_as_the_format_says(dtype: torch.dtype, cpu: Emulator) -> None:
    """Every block of inputs, and of outputs, which are smaller where their number is odd or nearly so."""
    random = torch.Generator().manual_seed(1)
    for block in (*BLOCKS, 1):
        x, a = torch.randn(3, 2304, generator=random).to(dtype), torch.rand(2304, generator=random)
        inputs = x.double()
        if block > 1:
            inputs = (inputs.view(-1, block) @ rotation(INPUTS, block).double()).view(x.shape)
        found = turning.turn_inputs(x, a, block).double()
        assert torch.allclose(found, inputs * a.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    for n, block in ((37, 1), (70, 2), (12, 4), (40, 8), (544, 16), (544, 32), (768, 256)):
        y, bias = torch.randn(3, n, generator=random), torch.randn(n, generator=random).to(dtype)
        for wide in (y, y.to(dtype)):
            outputs = (wide.double().view(-1, block) @ rotation(OUTPUTS, block).double().T).view(y.shape)
            found = turning.turn_outputs(wide, bias, block, dtype).double()
            assert torch.allclose(found, outputs + bias.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert torch.equal(turning.turn_outputs(wide[1:2].clone(), bias, block, dtype).double(), found[1:2])


@needs_compiler
@pytest.mark.parametrize("text", ["tcq3:l10:r256", "ecq4:r32", "ecq3"])
def test_gradients_pass_to_what_is_trained_in_front_of_a_packed_matrix(text: str, cpu: Emulator) -> None:
    """Through the operator, as an adapter's are."""
    case = next(case for case in QUICK if case[0] == text)
    _, n, k, dtype = case
    matrix = Matrix(text, (n, k), dtype)
    x = matrix.x(3).requires_grad_()
    torch.ops.compress.linear(x, matrix.parts, matrix.bias, text, n, k, "tiles").sum().backward()
    assert x.grad is not None
    expected = matrix.whole().sum(0)
    assert float((x.grad.double() - expected).norm(dim=1).max()) < 4 * torch.finfo(dtype).eps * float(matrix.whole().norm())


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(RATES), st.integers(1, 20), st.integers(1, 70), st.integers(0, 99))
def test_what_goes_into_the_layout_of_rings_comes_out(fmt: Tcq, n: int, k: int, seed: int) -> None:
    shape, random = (n * fmt.whole, k), torch.Generator().manual_seed(seed)
    tensors = random_tensors(fmt, shape, random)
    parts = rings.pack(fmt, tensors)
    assert torch.equal(rings.unpack_words(parts[0], fmt, shape), tensors["weight_trellis"])
    assert float(parts[1].max()) <= 1.0
    assert torch.equal(cuda.dequantize(parts, fmt, shape, torch.float32), fmt.dequantize(tensors, torch.float32))


def test_a_stream_lies_where_the_head_of_trellis_cuh_says() -> None:
    """One word of a row of codes, at 2 bits: the outputs 16..31 of lane 9's third input are a word of its first vector."""
    trellis = torch.zeros(64, 2 * 16, dtype=torch.int32)
    unit, ring, g, t, j, word = 1, 1, 2, 1, 2, 1
    trellis[32 * unit + 8 * t + j, 16 * ring + 2 * g + word] = 7
    words = rings.pack_words(trellis, 4)
    assert words.shape == (2, 2, 4 * 128)
    at = 2 * j + word  # of the lane's sixteen words
    assert words[ring, unit].nonzero().tolist() == [[at // 4 * 128 + 4 * (4 * g + t) + at % 4]]


def test_slices_of_a_trellis_code_depend_on_the_shape_alone_and_leave_no_block_idle() -> None:
    for n, k in ((64, 1), (4096, 4096), (640, 2048), (28672, 8192), (8192, 28672), (1024, 1000)):
        count, units = rings.slices((n, k)), -(-k // 32)
        assert (count - 1) * -(-units // count) < units
    assert rings.slices((4096, 4096)) == 8


@pytest.mark.slow
@needs_compiler
def test_entropy_coded_words_are_decoded_where_they_are_repacked(cpu: Emulator) -> None:
    """From the tensors of a file, to the same parts as from codes that were decoded before."""
    fmt = parse("ecq3")
    assert isinstance(fmt, Ecq)
    random = torch.Generator().manual_seed(3)
    held = random_tensors(fmt, (64, 160), random)
    codes = (torch.randn(64, 160, generator=random) * 1.2).round().to(torch.int8)
    spread, _ = entropy.spreads(codes)
    coded = entropy.encode(codes, spread)
    tensors = fmt.pack(coded, held["weight_step"], spread, float(held["weight_base"]), held["weight_scale"])
    parts = cuda.repack(fmt, (64, 160), tensors, FP16)
    again = cuda.repack(fmt, (64, 160), {**held, "weight_codes": codes}, FP16)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    assert torch.equal(cuda.dequantize(parts, fmt, (64, 160), FP16), fmt.dequantize(tensors, FP16))


@needs_compiler
@pytest.mark.parametrize(("text", "n", "k", "dtype"), [QUICK[2], QUICK[4]])
def test_a_module_holds_tiles_in_place_of_what_was_loaded(text: str, n: int, k: int, dtype: torch.dtype, cpu: Emulator) -> None:
    """On a GPU the module does by itself what is asked of it here; entropy codes are decoded first, as on a CPU."""
    matrix = Matrix(text, (n, k), dtype)
    module = PackedLinear(text, (n, k), dtype)
    if isinstance(numbers_of(matrix.fmt), Ecq):
        module.decode(numbers_of(matrix.fmt))  # type: ignore[arg-type]
        assert module.layout == "codes"
    for name, _ in list(module.named_buffers()):
        module.register_buffer(name, matrix.tensors[name])
    module.repack()
    assert (module.layout, len(module.parts), len(list(module.buffers()))) == ("tiles", 4, 4)
    x = matrix.x(2)
    assert torch.equal(module(x), matrix.times(x, None))
    assert torch.equal(module.weight, cuda.dequantize(matrix.parts, matrix.fmt, (n, k), dtype))


@needs_compiler
@pytest.mark.slow
def test_a_model_in_tiles_says_what_it_says_without(
    family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formats of each kind in one artifact, as a GPU would hold it; a prompt and the token behind it."""
    pins = {"*.down": "tcq2.5:l8:r64", "*.k": "int4:g32:r32", "*.up": "ecq4:r32", "*.o": "ecq4", "lm_head": "lut4:g32:ri32"}
    done = bake(tmp_path, family("llama"), text, "native", {"quantize": {"format": "tcq3:l8", "pins": pins}})
    model = load(done.artifacts["native"][0], dtype=BF16)
    ids = torch.tensor([[1, 5, 9, 7, 3, 2, 11, 4, 6]])
    with torch.no_grad():
        expected = model(ids).logits.float()
    held = [module for module in model.modules() if isinstance(module, PackedLinear)]
    needs = {(parse(module.format), module.shape, BF16) for module in held}
    Emulator(tmp_path, emulator.variants(needs, (9,))).install(monkeypatch)
    for module in held:
        module.repack()
        assert module.layout == "tiles"
    with torch.no_grad():
        found = model(ids).logits.float()
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("text", "n", "k", "dtype"), [*QUICK, *MORE])
def test_products_on_a_gpu(text: str, n: int, k: int, dtype: torch.dtype) -> None:
    """As above, and the same bits from a CUDA graph, for any batch, and at every replay."""
    matrix = Matrix(text, (n, k), dtype)
    W, fmt, bias = matrix.whole(), matrix.fmt, matrix.bias.cuda()
    parts = [part.cuda() for part in matrix.parts]
    cuda.prepare([(fmt, (n, k), dtype)], "cuda", (1, 11, 18, 130))
    assert torch.equal(cuda.dequantize(parts, fmt, (n, k), dtype).cpu(), cuda.dequantize(matrix.parts, fmt, (n, k), dtype))
    for rows in (1, 11, 18, 130):
        x = matrix.x(rows)
        held = x.cuda()
        y = cuda.linear(held, parts, bias, fmt, (n, k))
        expected = x.double() @ W.T + matrix.bias.double()
        assert float(((y.cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) < torch.finfo(dtype).eps
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cuda.linear(held, parts, bias, fmt, (n, k))
        for _ in range(3):
            captured.fill_(torch.nan)
            graph.replay()
            assert torch.equal(captured, y)
        if rows <= cuda.MOST_CODED:
            assert torch.equal(y[:1], cuda.linear(held[:1], parts, bias, fmt, (n, k)))
