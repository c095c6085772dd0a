from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import FormatError
from compress.formats import bitpack

WIDTHS = st.integers(1, 8)
LEADS = st.lists(st.integers(0, 3), max_size=2)


def codes_of(lead: list[int], n: int, bits: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (*lead, n), generator=g, dtype=torch.uint8)


def bits_of(row: list[int], bits: int) -> list[int]:
    """The definition of the layout, in words: one integer holds the row, code i shifted by i * bits."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    return [(stream >> (32 * j)) & 0xFFFFFFFF for j in range(bitpack.words(len(row), bits))]


@given(lead=LEADS, n=st.integers(1, 140), bits=WIDTHS, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_unpack_undoes_pack(lead: list[int], n: int, bits: int, seed: int) -> None:
    codes = codes_of(lead, n, bits, seed)
    packed = bitpack.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*lead, bitpack.words(n, bits))
    assert torch.equal(bitpack.unpack(packed, bits, n), codes)


@given(n=st.integers(1, 100), bits=WIDTHS, seed=st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_layout_is_one_bit_stream(n: int, bits: int, seed: int) -> None:
    codes = codes_of([], n, bits, seed)
    assert [x & 0xFFFFFFFF for x in bitpack.pack(codes, bits).tolist()] == bits_of(codes.tolist(), bits)


@given(rows=st.integers(1, 4), n=st.integers(1, 100), bits=WIDTHS)
@settings(deadline=None, max_examples=25)
def test_same_bits_as_compressed_tensors(rows: int, n: int, bits: int) -> None:
    peer = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of([rows], n, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(bitpack.pack(codes, bits), peer.pack_to_int32(signed, bits))
    packed = bitpack.pack(codes.T, bits).T.contiguous()
    assert torch.equal(packed, peer.pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    codes = codes_of([3], 50, 3)
    assert torch.equal(bitpack.pack(codes.to(dtype), 3), bitpack.pack(codes, 3))


def test_refusals() -> None:
    codes = codes_of([2], 32, 4)
    with pytest.raises(FormatError, match="1 to 8 bits"):
        bitpack.pack(codes, 9)
    with pytest.raises(FormatError, match="integers"):
        bitpack.pack(codes.float(), 4)
    with pytest.raises(FormatError, match="0 to 3"):
        bitpack.pack(codes, 2)
    with pytest.raises(FormatError, match="int32"):
        bitpack.unpack(codes, 4, 32)
    with pytest.raises(FormatError, match="take 4 words"):
        bitpack.unpack(bitpack.pack(codes[:, :8], 4), 4, 32)
