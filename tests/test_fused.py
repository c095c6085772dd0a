"""Products on a CPU by compiled loops: the same numbers as by the decoded matrix, for every width, batch, dtype and thread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.export.runtime import fused, ops
from compress.formats import Int, entropy, parse
from compress.formats.entropy import Ecq
from compress.formats.grid import plain
from tests.conftest import covered

pytest.importorskip("numba")
assert ops.LAYOUTS
FORMS = ("int2:g16", "int3:g64:asym", "int4:g32", "int4:g64:asym", "int5:g32", "int6:channel", "int7:g64", "int8:g128",
         "int8:channel:asym")  # fmt: skip
# Each is compiled for itself, in two seconds: in every run a width that fills words and one that does not.
OFTEN = covered(FORMS, "int4:g32", "int3:g64:asym")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the largest output


def made(form: str, n: int = 160, k: int = 512) -> tuple[Int, dict[str, Tensor]]:
    fmt = parse(form)
    assert isinstance(fmt, Int)
    return fmt, dict(fmt.pack(*plain(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), fmt)))


@pytest.mark.parametrize("form", OFTEN)
def test_products_are_those_of_the_matrix(form: str) -> None:
    (n, k), (fmt, tensors) = (160, 512), made(form)
    W, bias = fmt.dequantize(tensors, torch.float32), torch.randn(n)
    for dtype, rounding in ROUNDING.items():
        for rows in (1, fused.FEW, fused.FEW + 3):
            x = (torch.randn(rows, k) + 2).to(dtype)  # not balanced: what the zero point takes away is large
            found = fused.linear(x, tensors, bias.to(dtype), fmt, (n, k))
            assert found is not None
            assert found.dtype == dtype
            wanted = x.double() @ W.double().T + bias.to(dtype).double()
            assert float((found - wanted).abs().max()) <= rounding * float(wanted.abs().max())


@pytest.mark.parametrize("form", OFTEN)
def test_blocks_hold_the_matrix_to_the_bit(form: str) -> None:
    """Multiplied by the identity in fp32, which rounds nothing."""
    (n, k), (fmt, tensors) = (160, 512), made(form)
    found = fused.linear(torch.eye(k), tensors, None, fmt, (n, k))
    assert found is not None
    assert torch.equal(found.T, fmt.dequantize(tensors, torch.float32))


def test_threads_and_other_rows_change_nothing() -> None:
    fmt, tensors = made("int4:g64", 1024, 1024)
    x, threads = torch.randn(3, 1024), torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found += [fused.linear(x, tensors, None, fmt, (1024, 1024)), fused.linear(x[1:2], tensors, None, fmt, (1024, 1024))]
    torch.set_num_threads(threads)
    a, b, c, d = (y for y in found if y is not None)
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert torch.equal(a[1:2], b)


def test_bytes_of_an_entropy_coded_matrix() -> None:
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-128, 128, (200, 512), generator=g, dtype=torch.int8)
    tensors = {"weight_codes": codes, "weight_base": torch.tensor([0.01]),
               "weight_step": torch.randint(0, 40, (512,), generator=g, dtype=torch.uint8),
               "weight_scale": torch.rand(200, generator=g).bfloat16()}  # fmt: skip
    W = entropy.restored(tensors["weight_codes"], entropy.steps(tensors), tensors["weight_scale"])
    x = torch.randn(2, 512)
    found = fused.linear(x, tensors, None, Ecq(300), (200, 512))
    assert found is not None
    wanted = x.double() @ W.double().T
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


@pytest.mark.parametrize(("form", "shape", "dtype"), [
    ("int3:g16", (160, 512), torch.float32),  # a group is half a period
    ("int4:channel", (160, 509), torch.float32),  # the last period is not whole
    ("int4:g16", (16, 64), torch.float32),  # small
    ("int4:g16", (160, 512), torch.float64),
])  # fmt: skip
def test_all_else_is_left_to_torch(form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    fmt, tensors = made(form, *shape)
    assert fused.linear(torch.randn(2, shape[1], dtype=dtype), tensors, None, fmt, shape) is None
    parts = [t for name, t in tensors.items() if name != "weight_shape"]
    y = torch.ops.compress.linear(torch.randn(2, shape[1], dtype=dtype), parts, None, form, *shape, "canonical")
    assert y.shape == (2, shape[0])
