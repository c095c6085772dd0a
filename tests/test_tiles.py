"""The kernels' layout: what goes in comes out, for any shape, and the head of tile.cuh says where everything lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.export.runtime.cuda import tiles
from compress.formats import Int, parse
from compress.formats.grid import Grid, plain

FORMATS = [
    *(f"int{b}:{g}{z}" for b in (2, 3, 4, 8) for g in ("g32", "g64", "g128", "g256", "channel") for z in ("", ":asym")),
    *(f"{t}{b}:g{g}" for t in ("nf", "lut") for b in (2, 3, 4) for g in (32, 64, 128, 256)),
    "nf4:g64:dq8x256", "nf3:g64:dq8x256:fp32", "lut4:g64:shared",
]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from((torch.bfloat16, torch.float16)),
    st.integers(0, 99),
)
def test_what_goes_in_comes_out(text: str, n: int, k: int, scale_dtype: torch.dtype, seed: int) -> None:
    fmt = parse(text)
    assert isinstance(fmt, tiles.Base)
    k *= fmt.group if isinstance(fmt, Int) and fmt.group else 32
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    tensors = fmt.pack(*plain(W, fmt, scale_dtype))
    codes, grid = fmt.unpack(tensors)
    back, grid_back = tiles.unpack(tiles.pack(fmt, tensors), fmt, (n, k))
    assert torch.equal(back, codes)
    assert torch.equal(grid_back.scale, grid.scale.float())
    assert grid.zero is None or (grid_back.zero is not None and torch.equal(grid_back.zero, grid.zero))


def test_sixteen_bit_scales_are_kept_to_the_bit_with_a_zero_point_beside_them() -> None:
    """Every fp16 and bf16 number, the least and the largest included, with zero points of 8 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        scale = every[every.isfinite()].view(-1, 1)
        zero = (torch.arange(len(scale)) % 256).to(torch.uint8).view(-1, 1)
        layout = tiles.Layout(bits=8, group=0, zeros=True, table=False)
        back = tiles.unpack_scales(tiles.pack_scales(Grid(scale, zero), layout, 64), layout, (len(scale), 1))
        assert back.zero is not None
        assert torch.equal(back.scale.view(torch.int32), scale.float().view(torch.int32))
        assert torch.equal(back.zero, zero)


@pytest.mark.parametrize(("bits", "table"), [(2, False), (3, False), (4, False), (8, False), (2, True), (3, True), (4, True)])
def test_a_code_lies_where_the_head_of_the_kernel_says(bits: int, table: bool) -> None:
    """One code in a matrix of zeros: its lane, its pair, and no bit elsewhere."""
    layout = tiles.Layout(bits=bits, group=64, zeros=False, table=table)
    for row, k in ((0, 0), (9, 13), (21, 128 + 64 + 32 + 8 + 7), (5, 63)):
        codes = torch.zeros(32, 256, dtype=torch.uint8)
        codes[row, k] = (1 << bits) - 1
        words = tiles.pack_codes(codes, layout)
        assert words.shape == (2, 2, 64 * bits)
        assert sum(bin(w & 0xFFFFFFFF).count("1") for w in words.flatten().tolist()) == bits
        lanes = tiles._from_vectors(words, 2 * bits)
        row_tile, unit, lane, word = (int(i[0]) for i in lanes.nonzero(as_tuple=True))
        assert (row_tile, unit, word // bits) == (row // 16, k // 128, k % 128 // 64)
        assert lane == row % 8 * 4 + k % 32 // 8
        if bits != 3:
            m, r = 2 * (k % 64 // 32) + k % 8 // 4, row % 16 // 8 + 2 * (k % 4 // 2)
            assert word % bits == (4 * m + r) * bits // 16


def test_outputs_and_inputs_are_padded_with_zeros() -> None:
    fmt = parse("int4:g32:asym")
    assert isinstance(fmt, Int)
    words, scales = tiles.pack(fmt, fmt.pack(*plain(torch.randn(5, 96), fmt)))
    assert words.shape == (1, 1, 256)
    assert scales.shape == (1, 1, 8, 8)
    assert not tiles.unpack_codes(words, tiles.Layout.of(fmt), (16, 128))[5:].any()
    assert not scales[:, :, 5:].any()


def test_matrices_are_taken_apart_where_they_lie() -> None:
    """No step goes by way of the CPU: the meta device, which has no data, would not survive it."""
    layout = tiles.Layout(bits=3, group=64, zeros=True, table=False)
    words = tiles.pack_codes(torch.empty(40, 192, dtype=torch.uint8, device="meta"), layout)
    assert words.shape == (3, 2, 192)
    assert words.device.type == "meta"
    assert tiles.unpack_codes(words, layout, (40, 192)).shape == (40, 192)
