from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import FormatError
from compress.formats import Packed, parse
from compress.formats.codebooks import NF, DoubleQuant, Lut, lut_table, nf_table, paper_grid
from compress.formats.grid import Quantized
from compress.passes import clip_core
from tests.conftest import covered, rare
from tests.laws import check_format, decode, encode

DOUBLES = st.builds(
    DoubleQuant, st.sampled_from(NF.WIDTHS), st.integers(16, 300), st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
)
GROUPS = st.integers(2, 32).map(lambda i: 8 * i)
CODEBOOKS = st.one_of(
    st.builds(NF, st.sampled_from(NF.WIDTHS), GROUPS, st.one_of(st.none(), DOUBLES)),
    st.builds(Lut, st.sampled_from(Lut.WIDTHS), GROUPS, st.booleans()),
)

TABLE = [
    *(f"nf{b}:{g}{d}" for b in NF.WIDTHS for g in ("g64", "g96") for d in ("", ":dq8x256", ":dq3x16:fp32", ":dq2x64:fp16")),
    *(f"lut{b}:{g}{s}" for b in Lut.WIDTHS for g in ("g64", "g96") for s in ("", ":shared")),
    *("nf4:g16:dq4x16", "lut3:g256"),
]


def codebook(text: str) -> NF | Lut:
    fmt = parse(text)
    assert isinstance(fmt, NF | Lut)
    return fmt


def normal(n: int = 512, k: int = 1024) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def error(W: Tensor, fmt: Quantized, clip: str) -> float:
    """The squared error of rounding W on the grid that is found for it, over the square of W."""
    grid = clip_core.fit(W, fmt, clip, torch.bfloat16, torch.ones(W.shape[1]))
    wide = grid.map(lambda t: t.repeat_interleave(fmt.width(W.shape[1]), 1)[:, : W.shape[1]])
    return float((fmt.nearest(W, wide) - W).square().sum() / W.square().sum())


@pytest.mark.parametrize("text", [pytest.param(t, marks=() if i % 3 == 1 else pytest.mark.slow) for i, t in enumerate(TABLE)])
def test_laws(text: str) -> None:
    assert str(parse(text)) == text
    check_format(parse(text), 256)


@given(CODEBOOKS)
def test_text_round_trips(fmt: NF | Lut) -> None:
    assert parse(str(fmt)) == fmt


@given(CODEBOOKS, st.integers(1, 9), st.integers(1, 700), st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_odd_shapes(fmt: NF | Lut, rows: int, inputs: int, seed: int) -> None:
    """Whatever the shape, also where the last group is shorter, what is packed is what was meant."""
    W = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
    codes, grid = encode(fmt, W)
    packed = Packed(fmt, (rows, inputs), fmt.pack(codes, grid))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in packed.tensors.items()} == fmt.tensors((rows, inputs))
    assert packed.nbytes == fmt.nbytes((rows, inputs))
    assert torch.equal(packed.dequantize(torch.float32), decode(fmt, codes, grid))
    assert torch.equal(fmt.unpack(packed.tensors)[0], codes)


@pytest.mark.parametrize(
    ("bits", "published"),
    [
        (2, [-1, 0, 0.33792, 1]),
        (3, [-1, -0.47863, -0.21714, 0, 0.16093, 0.33792, 0.56262, 1]),
        (4, [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0, 0.07958, 0.16093, 0.24611, 0.33792, 0.44071,
             0.56262, 0.72296, 1]),
    ],
)  # fmt: skip
def test_normal_float_levels_are_the_published(bits: int, published: list[float]) -> None:
    assert nf_table(bits).tolist() == pytest.approx(published, abs=6e-6)


def test_the_256_levels_of_nf8() -> None:
    table = nf_table(8)
    assert (table[0], table[127], table[-1]) == (-1, 0, 1)
    steps = table.diff()
    assert (steps > 0).all()
    assert float(steps[127]) == pytest.approx(0.005, abs=5e-4)
    assert float(steps[-1]) == pytest.approx(0.025, abs=5e-3)


def test_every_configuration_of_the_paper_costs_what_it_says() -> None:
    grid = paper_grid()
    assert len(grid) == len(set(grid)) == 432
    n, k = 256, 4096
    for fmt in grid:
        assert parse(str(fmt)) == fmt
        assert fmt.double is not None
        bits = fmt.bits + fmt.double.bits / fmt.group + 8 * fmt.double.dtype.itemsize / (fmt.group * fmt.double.block)
        assert 8 * (fmt.nbytes((n, k)) - 20) == bits * n * k
    best = codebook("nf4:g64:dq8x256:fp32")
    assert round(8 * best.nbytes((4096, 4096)) / 4096**2, 3) == 4.127
    assert len({f.nbytes((n, k)) for f in grid}) == 184


def test_scales_are_quantized_as_published() -> None:
    fmt = NF(4, 16, DoubleQuant(3, 16, torch.float32))
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    codes, grid = encode(fmt, W)
    s = W.view(-1, 16).abs().amax(1)
    top = (s - s.min()).view(2, 16).amax(1)
    want = (((s - s.min()).view(2, 16) / top[:, None]) * 7).round()
    assert grid.double is not None
    assert torch.equal(grid.double.codes.view(2, 16).float(), want)
    assert torch.equal(grid.double.top, top)
    torch.testing.assert_close(grid.scale.view(2, 16), s.min() + want * top[:, None] / 7)
    x = W.view(-1, 16) / grid.scale.view(-1, 1)
    assert torch.equal(codes.view(-1, 16).long(), (x[..., None] - nf_table(4)).abs().argmin(-1))


@pytest.mark.parametrize("double", ["", ":dq8x256", ":dq2x16:fp32", ":dq4x64:fp16"])
def test_scales_that_are_alike_or_zero(double: str) -> None:
    """Super-blocks without spread, pruned rows and empty matrices: the ends that the published code trips over."""
    fmt = codebook(f"nf4:g16{double}")
    for W in (torch.zeros(8, 64), torch.ones(8, 64), torch.cat([torch.zeros(8, 64), torch.randn(8, 64)])):
        codes, grid = encode(fmt, W)
        value = decode(fmt, codes, grid)
        assert value.isfinite().all()
        assert (value[W == 0] == 0).all()
        assert torch.equal(value[W == 1], W[W == 1])
    assert (grid.scale[:8] == 0).all()


def test_double_quantization_belongs_to_a_whole_matrix() -> None:
    fmt = codebook("nf4:g16:dq4x16")
    codes, grid = encode(fmt, normal(8, 64))
    assert fmt.joint
    assert not fmt.rescalable
    assert fmt.rescale(grid, torch.full((8, 4), 1.5)) is grid
    with pytest.raises(FormatError, match="settle"):
        fmt.pack(codes[:2], grid.map(lambda t: t[:2]))


@pytest.mark.parametrize("text", ["nf4:g16", "lut4:g16", "lut2:g16:shared"])
def test_halfway_goes_to_the_lower_code(text: str) -> None:
    fmt = codebook(text)
    grid = fmt.fit(torch.tensor(-0.5), torch.tensor(1.0), torch.bfloat16)
    assert grid.table is not None
    codes = fmt.encode(grid.middles.clone(), grid)
    assert codes.tolist() == list(range(fmt.levels - 1))
    assert torch.equal(fmt.nearest(grid.middles.clone(), grid), grid.table[:-1])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signed_scale_takes_the_extreme_to_one(sign: int) -> None:
    grid = Lut(3, 16).fit(torch.tensor(-0.5), torch.tensor(1.0), torch.bfloat16).scale
    assert float(grid) == 1
    lo, hi = sorted((sign * -0.25, sign * 2.0))
    assert float(Lut(3, 16).fit(torch.tensor(lo), torch.tensor(hi), torch.float16).scale) == 2 * sign


@pytest.mark.parametrize("text", ["lut2:g64", "lut3:g64:shared", "lut4:g96"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_level_and_scale_are_exact(text: str, dtype: torch.dtype) -> None:
    fmt = codebook(text)
    codes, grid = encode(fmt, normal(8, 256), dtype)
    assert grid.table is not None
    assert torch.equal(grid.table.half().float(), grid.table)
    exact = decode(fmt, codes, grid.map(torch.Tensor.double))
    assert exact.dtype == torch.float64
    assert torch.equal(decode(fmt, codes, grid).double(), exact)


@pytest.mark.parametrize("bits", covered(Lut.WIDTHS, 2))
def test_the_shared_levels_are_lloyds(bits: int) -> None:
    """Lloyd's iteration on normal data in groups of 64, each divided by its extreme with the sign and weighed by its square."""
    X = torch.randn(1 << 12, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = X.gather(1, X.abs().argmax(1, keepdim=True))
    x, weight = (X / s).flatten(), s.square().expand_as(X).flatten()
    table = x.quantile((torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits))
    for _ in range(25 * bits):
        at = torch.bucketize(x, (table[1:] + table[:-1]) / 2)
        table = torch.bincount(at, weight * x, len(table)) / torch.bincount(at, weight, len(table))
    torch.testing.assert_close(table.float(), lut_table(bits), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("bits", "absmax"), [rare(2, 0.317), (3, 0.0406), rare(4, 0.0084)])
def test_error_on_normal_data(bits: int, absmax: float) -> None:
    """NF as published has the published error; its scales searched less; a table that may have any levels the least."""
    W = normal(256, 512)
    plain, searched = (error(W, NF(bits, 64), clip) for clip in ("minmax", "mse"))
    fixed, fitted = (error(W, Lut(bits, 64, shared), "mse") for shared in (True, False))
    assert plain == pytest.approx(absmax, rel=0.01)
    assert fitted < fixed < 0.95 * searched < 0.95 * plain
    if bits == 2:
        assert plain > 1.5 * error(W, Lut(2, 64), "minmax")
        assert searched > 1.25 * fitted


@pytest.mark.parametrize("clip", clip_core.CLIPS)
@pytest.mark.parametrize("seed", covered(range(3), 0))
def test_a_fitted_table_is_never_worse_than_the_shared(clip: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(40, 200, generator=g) * torch.randn(40, 1, generator=g).exp() + torch.rand(1, generator=g)
    weight_k = torch.rand(200, generator=g)
    monkeypatch.setattr(clip_core, "_SAMPLE", 1 << (13 if seed else 10))
    for bits in Lut.WIDTHS:
        errors = []
        for fmt in (Lut(bits, 48), Lut(bits, 48, shared=True)):
            grid = clip_core.fit(W, fmt, clip, torch.bfloat16, weight_k, rows=7)
            assert grid.table is not None
            assert (grid.table.diff() >= 0).all()
            errors.append(clip_core.Matrix(W, fmt, weight_k if clip == "hessian" else None, torch.float32, 40).error(grid))
        assert errors[0] <= errors[1]


def test_levels_that_nothing_goes_to_stay() -> None:
    W = torch.tensor([[1.0, -1.0] * 32])
    grid = clip_core.fit(W, Lut(4, 64), "mse", torch.bfloat16, torch.ones(64))
    assert grid.table is not None
    assert grid.table.isfinite().all()
    assert (grid.table.diff() > 0).all()
    assert error(W, Lut(4, 64), "mse") < 1e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf5:g64", "nf has 2, 3, 4, 8 bits, not 5"),
        ("lut8:g64", "lut has 2, 3, 4 bits, not 8"),
        ("nf4:g20", "16 to 256 inputs, a multiple of 8, not 20"),
        ("lut4:g512", "16 to 256 inputs"),
        ("nf4:g64:dq5x256", "doubly quantized scales have"),
        ("nf4:g64:dq8x8", "16 to 4096 groups, not 8"),
    ],
)
def test_out_of_range(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(text)


def test_refusals() -> None:
    with pytest.raises(FormatError, match="one of bf16, fp16, fp32"):
        DoubleQuant(8, 256, torch.int8)
    with pytest.raises(FormatError, match="needs a matrix"):
        NF(4, 64).check((3, 4, 5))
