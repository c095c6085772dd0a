from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.errors import FormatError
from compress.formats import Dense, Factored, Int, LowRank, Packed, parse
from compress.formats.codebooks import NF, DoubleQuant
from tests.conftest import covered
from tests.laws import check_format, check_refuses, decode, encode, packed_tensors

TABLE = [
    *(f"int{b}:{g}{a}" for b in range(2, 9) for g in ("g64", "channel") for a in ("", ":asym")),
    *("int4:g16", "int3:g96:asym", "int5:g256", "bf16", "fp16", "fp32"),
    *("int3:g64+r16", "int4:channel:asym+r1", "int3:g64+r16:int8:channel", "lut2:g64+r4:fp16", "nf4:g64+r2:lut4:g64"),
    "nf3:g64:dq8x256+r16:nf8:g64:dq8x256:fp32",
    *("fp8:channel", "nvfp4", "mxfp4", "mxfp8"),
    *("int8:channel/int8:token", "int8:g64/fp8:token", "int4:g128/int8:token", "int3:channel/int4:token", "fp8:channel/fp8:g128"),
    *("nvfp4/nvfp4", "mxfp4/mxfp4", "mxfp4/mxfp8", "mxfp8/mxfp8"),
    *("int2:g64:r128", "int3:channel:asym:r256", "lut3:g64:r16", "lut2:g96:shared:r64", "nf4:g64:dq8x256:fp32:r32"),
    *(
        "lr16",
        "lr1:fp32",
        "lr37:int8:channel",
        "lr32:int4:g32",
        "lr16:int3:g16:asym",
        "lr20:nf3:g64:dq8x256",
        "lr9:lut4:g64:shared",
    ),
]
FORMATS = st.builds(Int, st.integers(2, 8), st.one_of(st.none(), st.integers(2, 32).map(lambda i: 8 * i)), st.booleans())


@pytest.mark.parametrize("text", covered(TABLE, *TABLE[::2]))
def test_laws(text: str) -> None:
    assert str(parse(text)) == text
    check_format(parse(text), 768 if "96" in text else 256)


@given(FORMATS)
def test_text_round_trips(fmt: Int) -> None:
    assert parse(str(fmt)) == fmt


@given(FORMATS, st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_odd_shapes(fmt: Int, rows: int, groups: int) -> None:
    W = torch.randn(rows, groups * (fmt.group or 40))
    codes, grid = encode(fmt, W)
    packed = Packed(fmt, (rows, W.shape[1]), fmt.pack(codes, grid))
    assert packed.nbytes == fmt.nbytes((rows, W.shape[1]))
    assert torch.equal(packed.dequantize(torch.float32), decode(fmt, codes, grid))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_more_bits_never_worse(symmetric: bool, scale_dtype: torch.dtype) -> None:
    W = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in range(2, 9):
        fmt = Int(bits, 64, symmetric)
        errors.append(float((decode(fmt, *encode(fmt, W, scale_dtype)) - W).square().mean()))
    assert errors == sorted(errors, reverse=True)


@example(5, [0.0] * 15 + [2.3e-5])  # a scale among the subnormal numbers of fp16, which are 2**-24 apart
@given(st.integers(2, 8), st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16))
@settings(deadline=None)
def test_range_is_covered(bits: int, values: list[float]) -> None:
    """Over its whole range no weight is off by more than half a step, and what the rounding of the scale takes away."""
    W = torch.tensor([values])
    for symmetric in (True, False):
        fmt = Int(bits, 16, symmetric)
        codes, grid = encode(fmt, W, torch.float16)
        off = (decode(fmt, codes, grid) - W).abs().max()
        step = float(grid.scale.float().abs())
        assert off <= 0.51 * step + fmt.levels * max(2.0**-11 * step, 2.0**-25) + 1e-7


def test_extreme_lies_on_the_longer_side() -> None:
    """The largest weight is exact at the code with one level more, whatever its sign."""
    for sign in (1, -1):
        W = sign * torch.tensor([[-1.0, *[0.1] * 15]])
        codes, grid = encode(Int(2, 16), W)
        assert int(codes[0, 0]) == 0
        assert float(grid.scale.float() * sign) == 0.5
        assert decode(Int(2, 16), codes, grid)[0, 0] == W[0, 0]


@given(FORMATS, st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(deadline=None, max_examples=25)
def test_compressed_tensors_decodes_the_same_bits(fmt: Int, dtype: torch.dtype, size: float) -> None:
    peer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    strategy = "channel" if fmt.group is None else "group"
    args = quantization.QuantizationArgs(
        num_bits=fmt.bits, type="int", symmetric=fmt.symmetric, strategy=strategy, group_size=fmt.group
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    W = torch.randn(7, 2 * (fmt.group or 40)) * size
    tensors = fmt.pack(*encode(fmt, W, dtype))
    theirs = peer.PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    ours = Packed(fmt, (7, W.shape[1]), tensors).dequantize(dtype)
    assert theirs.dtype == dtype
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("int4-g128", "int4:g128"),
        ("int4:128", "int4:g128"),
        ("int3:g64:asymm", "int3:g64:asym"),
        ("bf61", "bf16"),
        ("nf4-g64", "nf4:g64"),
        ("nf4:g64:dq8:256", "nf4:g64:dq8x256"),
        ("lut3:g64:share", "lut3:g64:shared"),
        ("int3:g64+16", "int3:g64+r16"),
        ("lut2:g64-r128", "lut2:g64:r128"),
    ],
)
def test_misspelt_text_names_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(FormatError, match=f"did you mean '{re.escape(hint)}'.*allowed: int<2..8>"):
        parse(text)


@pytest.mark.parametrize("text", ["int1:g64", "int9:g64", "int4:g8", "int4:g20", "int4:g512"])
def test_out_of_range(text: str) -> None:
    with pytest.raises(FormatError, match=r"2 to 8 bits|16 to 256"):
        parse(text)


def test_group_that_does_not_divide() -> None:
    message = check_refuses(Int(4, 128), 1376)
    assert "128" in message
    assert "1376" in message
    assert "g16, g32" in message
    assert "only 'channel'" in check_refuses(Int(4, 64), 7)
    with pytest.raises(FormatError, match="matrix"):
        Int(4, None).check((3, 4, 5))


def test_dense_refuses_other_dtypes() -> None:
    with pytest.raises(FormatError, match="bf16, fp16, fp32"):
        Dense(torch.int8)


def problem(fmt: LowRank, n: int = 48, k: int = 96) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(fmt.rank, k, generator=g), torch.randn(n, fmt.rank, generator=g)
    return fmt.pack(packed_tensors(fmt.base, torch.randn(n, k, generator=g)), A, B), A, B


@pytest.mark.parametrize("factors", ["bf16", "fp32", "int8:channel", "nf8:g64:dq8x256:fp32", "lut4:g32"])
def test_low_rank_adds_the_product(factors: str) -> None:
    fmt = parse(f"int3:g32+r8:{factors}")
    assert isinstance(fmt, LowRank)
    tensors, A, B = problem(fmt)
    stored_A, stored_B = fmt.factor_matrices(tensors)
    bound = {"bf16": 1e-2, "fp32": 0.0, "int8:channel": 2e-2, "nf8:g64:dq8x256:fp32": 2e-2, "lut4:g32": 0.2}[factors]
    for stored, wanted in ((stored_A, A), (stored_B, B)):
        assert stored.shape == wanted.shape
        assert float((stored - wanted).square().mean() / wanted.square().mean()) <= bound**2
    want = fmt.base.dequantize(tensors, torch.float32).double() + stored_B.double() @ stored_A.double()
    torch.testing.assert_close(fmt.dequantize(tensors, torch.float32).double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(fmt.dequantize(tensors, torch.bfloat16), fmt.dequantize(tensors, torch.float32).bfloat16())


def test_dense_factors_lie_as_peft_has_them() -> None:
    fmt = parse("int3:g32+r8:fp32")
    assert isinstance(fmt, LowRank)
    tensors, A, B = problem(fmt)
    assert torch.equal(tensors["lora_A.weight"], A)
    assert torch.equal(tensors["lora_B.weight"], B)
    assert fmt.tensors((48, 96))["lora_B.weight"] == (torch.float32, (48, 8))
    quantized = parse("int3:g32+r8:int8:channel").tensors((48, 96))
    assert quantized["lora_B.weight_packed"][1] == (8, 12)


LLAMA_7B = [((4096, 4096), 4 * 32), ((11008, 4096), 2 * 32), ((4096, 11008), 32)]
LLAMA_70B = [((8192, 8192), 2 * 80), ((1024, 8192), 2 * 80), ((28672, 8192), 2 * 80), ((8192, 28672), 80)]


@pytest.mark.parametrize(("shapes", "extra"), [(LLAMA_7B, 0.2007), (LLAMA_70B, 0.0984)])
def test_what_adapters_of_rank_64_add(shapes: list[tuple[tuple[int, int], int]], extra: float) -> None:
    """LQ-LoRA's factors in NF8 with quantized scales: 8.127 bits a number, the adapters of its 2.95 and 2.85 effective bits."""
    fmt = LowRank(parse("nf3:g64:dq8x256"), 64, NF(8, 64, DoubleQuant(8, 256, torch.float32)))
    added = sum(times * 8 * (fmt.nbytes(shape) - fmt.base.nbytes(shape)) for shape, times in shapes)
    assert round(added / sum(times * n * k for (n, k), times in shapes), 4) == extra


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16+r16", "quantized matrix.*not with bf16"),
        ("int4:g64+r0", "a rank is 1 or more"),
        ("int4:64+r16", "unknown format 'int4:64'; did you mean 'int4:g64'"),
        ("int4:g64+r16+r8", "unknown format"),
        ("int4:g64+r16:int8", "unknown format 'int8'"),
    ],
)
def test_low_rank_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(text)


def test_low_rank_that_does_not_fit() -> None:
    fmt = parse("int3:g32+r8")
    assert isinstance(fmt, LowRank)
    with pytest.raises(FormatError, match="rank is above 4"):
        fmt.check((4, 96))
    with pytest.raises(FormatError, match="do not divide 40"):
        parse("int3:g32+r8:int8:g64").check((40, 64))
    tensors, A, B = problem(fmt)
    with pytest.raises(FormatError, match=r"give B \[outputs, rank\]"):
        fmt.pack(tensors, B, A)
    with pytest.raises(FormatError, match="dense or quantized"):
        LowRank(Int(4, 64), 4, fmt)  # type: ignore[arg-type]


# --- two factors in place of a matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["bf16", "fp32", "int8:channel", "nf8:g64:dq8x256:fp32", "int4:g16:asym"])
def test_factors_stand_for_their_product(factors: str) -> None:
    fmt = parse(f"lr16:{factors}")
    assert isinstance(fmt, Factored)
    tensors = packed_tensors(fmt, torch.randn(48, 96))
    A, B = fmt.factor_matrices(tensors)
    assert (A.shape, B.shape) == ((16, 96), (48, 16))
    assert torch.equal(fmt.dequantize(tensors, torch.float32), (B.double() @ A.double()).float())
    assert tensors["weight_shape"].tolist() == [48, 96]
    each = fmt.factors.nbytes((16, 96)) + fmt.factors.nbytes((48, 16))
    assert fmt.nbytes((48, 96)) == each + 16, "the factors, and the shape"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr0", "a rank is 1 or more"),
        ("lr16:lr4", "unknown format"),
        ("lr16:lr16:lr4", "unknown format"),
        ("lr16:int4:g64+r8", "quantized matrix, as in .*, not with lr16:int4:g64"),
        ("lr16:int4", "unknown format 'int4'"),
        ("lr4+r8", "quantized matrix, as in int4:g64.r16, not with lr4"),
        ("int4:g64+r8:lr4", "dense or quantized"),
    ],
)
def test_factored_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(text)


def test_factors_that_do_not_fit() -> None:
    with pytest.raises(FormatError, match="rank is above 4"):
        parse("lr8").check((4, 96))
    with pytest.raises(FormatError, match="do not divide 40"):
        parse("lr32:int4:g32").check((64, 40))
    with pytest.raises(FormatError, match=r"second factor's inputs are the rank, and .* do not divide 40 inputs"):
        parse("lr40:int4:g32").check((64, 64))
    with pytest.raises(FormatError, match="dense or quantized"):
        Factored(4, Factored(2))  # type: ignore[arg-type]
