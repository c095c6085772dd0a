from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import FormatError
from compress.formats import Dense, Int, Packed, parse
from tests.laws import check_format, check_refuses, decode, encode

TABLE = [
    *(f"int{b}:{g}{a}" for b in range(2, 9) for g in ("g64", "channel") for a in ("", ":asym")),
    *("int4:g16", "int3:g96:asym", "int5:g256", "bf16", "fp16", "fp32"),
]
FORMATS = st.builds(Int, st.integers(2, 8), st.one_of(st.none(), st.integers(2, 32).map(lambda i: 8 * i)), st.booleans())


@pytest.mark.parametrize("text", TABLE)
def test_laws(text: str) -> None:
    assert str(parse(text)) == text
    check_format(parse(text), 768 if "96" in text else 256)


@given(FORMATS)
def test_text_round_trips(fmt: Int) -> None:
    assert parse(str(fmt)) == fmt


@given(FORMATS, st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
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
        assert off <= 0.51 * step + fmt.levels * 2.0**-11 * step + 1e-7


def test_extreme_lies_on_the_longer_side() -> None:
    """The largest weight is exact at the code with one level more, whatever its sign."""
    for sign in (1, -1):
        W = sign * torch.tensor([[-1.0, *[0.1] * 15]])
        codes, grid = encode(Int(2, 16), W)
        assert int(codes[0, 0]) == 0
        assert float(grid.scale.float() * sign) == 0.5
        assert decode(Int(2, 16), codes, grid)[0, 0] == W[0, 0]


@given(FORMATS, st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(deadline=None, max_examples=60)
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
    [("int4-g128", "int4:g128"), ("int4:128", "int4:g128"), ("int3:g64:asymm", "int3:g64:asym"), ("bf61", "bf16")],
)
def test_misspelt_text_names_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(FormatError, match=f"did you mean '{hint}'.*allowed: int<2..8>"):
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
