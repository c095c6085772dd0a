"""llama.cpp's blocks: bytes against the package gguf, and the laws of grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import FormatError
from compress.formats import Packed, parse
from compress.formats.ggml import KINDS, LATTICES
from compress.formats.grid import encoded, plain, restore
from compress.formats.lattice import Lattice
from compress.formats.superblocks import Blocks
from compress.passes import gptq_core as core
from compress.passes import lattice_core
from tests.conftest import covered

gguf = pytest.importorskip("gguf", reason="the package gguf, which decodes blocks, is not installed")
EVERY = [*KINDS]


def drawn(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Weights of rows and groups of very different size, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    W = (
        torch.randn(n, k, generator=g)
        * torch.rand(n, 1, generator=g)
        * torch.rand(1, k // 16, generator=g).repeat_interleave(16, 1)
    )
    W[0], W[1, :64] = 0, 0
    return W


def theirs(kind: str, blocks: torch.Tensor) -> np.ndarray:
    """What gguf makes of a row's bytes."""
    found: np.ndarray = gguf.quants.dequantize(blocks.numpy(), getattr(gguf.GGMLQuantizationType, kind.upper()))
    return found


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_packed_is_what_gguf_reads(kind: str) -> None:
    fmt, W = Blocks(kind), drawn(12, 512)
    codes, grid = plain(W, fmt)
    packed = fmt.pack(codes, grid)
    assert sum(t.nbytes for t in packed.values()) == fmt.nbytes((12, 512))
    ours = fmt.dequantize(packed, torch.float32)
    assert np.array_equal(ours.numpy(), theirs(kind, packed["weight_blocks"]))
    assert torch.equal(ours, restore(codes, grid, fmt))


@pytest.mark.parametrize("kind", EVERY)
def test_any_bytes_are_read_as_gguf_reads_them(kind: str) -> None:
    fmt = Blocks(kind)
    g = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 256, (6, 512 // fmt.of.block, fmt.of.nbytes), generator=g, dtype=torch.uint8)
    at = 0
    for field in fmt.of.fields:  # units as sane numbers
        size = fmt.of.width(field) if isinstance(field, str) else field.nbytes(fmt.of.block)
        if field in ("d", "m"):
            unit = torch.randn(6, raw.shape[1], 1, generator=g).to(torch.float16)
            raw[..., at : at + 2] = unit.view(torch.uint8)
        at += size
    blocks = raw.flatten(1)
    assert np.array_equal(fmt.dequantize({"weight_blocks": blocks}, torch.float32).numpy(), theirs(kind, blocks))


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(EVERY), seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]))
def test_a_settled_grid_is_kept_by_packing(kind: str, seed: int, scale: float) -> None:
    fmt, W = Blocks(kind), drawn(4, 256, seed) * scale
    codes, grid = plain(W, fmt)
    again, found = fmt.unpack(fmt.pack(codes, grid))
    assert torch.equal(again, codes)
    assert torch.equal(found.scale, grid.scale.float())
    assert grid.low is None or (found.low is not None and torch.equal(found.low, grid.low.float()))
    assert torch.equal(encoded(restore(codes, grid, fmt), found, fmt), codes) or kind in ("q4_1", "q5_1")


@pytest.mark.parametrize("kind", EVERY)
def test_rounding_is_as_fine_as_the_bits_promise(kind: str) -> None:
    fmt, W = Blocks(kind), torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    off = (restore(*plain(W, fmt), fmt) - W).square().mean() / W.square().mean()
    most = {"q2_k": 0.15, "q3_k": 0.04, "q4_k": 0.008, "q5_k": 0.002, "q6_k": 0.0006, "iq4_xs": 0.01, "iq4_nl": 0.01,
            "q4_1": 0.008, "q5_1": 0.002}  # fmt: skip
    assert off < most[kind]


@pytest.mark.parametrize("kind", EVERY)
def test_gptq_solves_into_blocks_and_scales_follow(kind: str) -> None:
    """Feedback and refit: less than rounding, and what is packed is what was solved."""
    g = torch.Generator().manual_seed(5)
    X = torch.randn(1024, 256, generator=g) @ torch.randn(256, 256, generator=g) / 16
    W, fmt = torch.randn(24, 256, generator=g), Blocks(kind)
    f = core.factor(X.T @ X / 1024)
    solved, rounded = core.quantize(W, f, fmt), core.round_to_nearest(W, f, fmt)
    assert solved.loss_n.sum() < 0.7 * rounded.loss_n.sum()
    found = Packed(fmt, (24, 256), fmt.pack(solved.codes, solved.grid)).dequantize(torch.float32)
    off = found - W
    torch.testing.assert_close(torch.einsum("nk,kl,nl->n", off, X.T @ X / 1024, off), solved.loss_n, rtol=2e-3, atol=1e-4)


def test_rows_are_read_alone() -> None:
    fmt, W = Blocks("q4_k"), drawn(8, 256)
    packed = Packed(fmt, (8, 256), fmt.pack(*plain(W, fmt)))
    assert torch.equal(packed.rows([5, 2], torch.float32), packed.dequantize(torch.float32)[[5, 2]])


@pytest.mark.parametrize("text", EVERY)
def test_text_is_the_name(text: str) -> None:
    assert str(parse(text)) == text


def test_what_blocks_do_not_divide_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="blocks of 256 do not divide 640 inputs; those of 32 do: iq4_nl, q4_1, q5_1"):
        Blocks("q4_k").check((8, 640))


# --- vector codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LATTICES)
def test_any_vector_codes_are_read_as_gguf_reads_them(kind: str) -> None:
    fmt, g = Lattice(kind), torch.Generator().manual_seed(2)
    raw = torch.randint(0, 256, (5, 2, fmt.of.nbytes), generator=g, dtype=torch.uint8)
    raw[..., :2] = torch.randn(5, 2, 1, generator=g).to(torch.float16).view(torch.uint8)
    blocks = raw.flatten(1)
    ours = fmt.dequantize({"weight_blocks": blocks}, torch.float32)
    assert np.array_equal(ours.numpy(), theirs(kind, blocks))
    assert torch.equal(fmt.pack(fmt.unpack(blocks))["weight_blocks"], blocks)


@pytest.mark.parametrize("kind", covered(LATTICES, "iq2_s", "iq3_s"))
def test_gptq_solves_into_vector_codes(kind: str) -> None:
    g = torch.Generator().manual_seed(5)
    X = torch.randn(1024, 512, generator=g) @ torch.randn(512, 512, generator=g) / 22
    W, fmt = torch.randn(24, 512, generator=g), Lattice(kind)
    W[0] = 0
    H = X.T @ X / 1024
    found = lattice_core.solve(W, core.factor(H.clone()), fmt)
    off = fmt.dequantize(fmt.pack(found.chosen), torch.float32) - W
    torch.testing.assert_close(torch.einsum("nk,kl,nl->n", off, H, off), found.loss_n, rtol=2e-3, atol=1e-4)
    assert (found.loss_n <= found.rounding_loss_n).all()
    assert found.loss_n.sum() < 0.7 * found.rounding_loss_n.sum()


@pytest.mark.parametrize(
    ("kind", "most"), [("iq2_xxs", 0.14), ("iq2_xs", 0.11), ("iq2_s", 0.09), ("iq3_xxs", 0.04), ("iq3_s", 0.03)]
)
def test_words_are_as_near_as_the_bits_promise(kind: str, most: float) -> None:
    W, fmt = torch.randn(32, 512, generator=torch.Generator().manual_seed(3)), Lattice(kind)
    found = lattice_core.solve(W, core.nothing_seen(W), fmt, feedback=False)
    off = fmt.dequantize(fmt.pack(found.chosen), torch.float32) - W
    assert off.square().mean() < most
