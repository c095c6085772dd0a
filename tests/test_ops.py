"""The operators on packed matrices: what enters a product is what the formats say, in every format, shape and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import FormatError
from compress.export.runtime import ops
from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.decode import blocks, named, part_names
from compress.formats import Dense, Factored, LowRank, Rotated, base_of, numbers_of, parse
from compress.formats.grid import plain
from tests.conftest import covered, rare

INTEGERS = [f"int{b}:{group}{asym}" for b in range(2, 9) for group in ("g16", "channel") for asym in ("", ":asym")]
TABLES = [f"nf{b}:g40{double}" for b in (2, 3, 4, 8) for double in ("", ":dq8x16", ":dq3x24:fp32")]
TABLES += [f"lut{b}:g40{shared}" for b in (2, 3, 4) for shared in ("", ":shared")]
RANKED = ["int3:g16+r3", "nf3:g40+r3:int8:channel", "lut3:g40+r2:nf4:g16", "int4:g16:asym+r2:fp32"]
FACTORED = [
    "lr3",
    "lr16:fp32",
    "lr17:int8:channel",
    "lr16:int4:g16",
    "lr7:nf3:g40",
    "lr9:lut4:g40",
    "lr16:int3:g16:asym",
    "lr5:fp16",
]
RANKED += ["int2:g16+r1:int4:channel:asym"]
ROTATED = ["int2:g16:r16", "int3:channel:asym:r16", "nf3:g40:r16", "lut3:g40:r16", "nf4:g40:dq8x16:r16"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}  # of the largest output
linear, dequantize = torch.ops.compress.linear, torch.ops.compress.dequantize


def made(text: str, n: int, k: int, scale: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A random matrix in a format: its tensors, and its parts."""
    fmt = parse(text)
    if isinstance(fmt, Factored):
        factors = torch.randn(fmt.rank, k) * 0.1, torch.randn(n, fmt.rank)
        tensors = fmt.pack(*(stored(fmt.factors, F, scale) for F in factors))
        return tensors, [tensors[name] for name in part_names(text, n, k)]
    base: Any = numbers_of(fmt)
    tensors = base.pack(*plain(torch.randn(n, k), base, scale))
    if isinstance(fmt, LowRank):
        tensors = fmt.pack(tensors, torch.randn(fmt.rank, k) * 0.1, torch.randn(n, fmt.rank), scale)
    return tensors, [tensors[name] for name in part_names(text, n, k)]


def stored(fmt: Any, W: Tensor, scale: torch.dtype) -> dict[str, Tensor]:
    """A matrix in a format that has no factors, rounded to nearest."""
    return {"weight": W.to(fmt.dtype)} if isinstance(fmt, Dense) else fmt.pack(*plain(W, fmt, scale))


def check(text: str, n: int, k: int, dtype: torch.dtype, scale: torch.dtype = torch.bfloat16) -> None:
    fmt = parse(text)
    tensors, parts = made(text, n, k, scale)
    if not isinstance(fmt, Factored | Rotated):
        decoded = torch.cat([W for _, _, W in blocks(fmt, (n, k), named(text, (n, k), parts), dtype)])
        assert torch.equal(decoded, base_of(fmt).dequantize(tensors, dtype))
    whole = dequantize(parts, text, n, k, "canonical", dtype)
    assert torch.equal(whole, fmt.dequantize(tensors, dtype))
    x, bias = torch.randn(2, 5, k).to(dtype), torch.randn(n).to(dtype)
    for given_bias in (bias, None):
        wanted = x.double() @ whole.double().T + (0 if given_bias is None else given_bias.double())
        found = linear(x, parts, given_bias, text, n, k, "canonical")
        assert (found.dtype, found.shape) == (dtype, (2, 5, n))
        assert float((found - wanted).abs().max()) <= ROUNDING[dtype] * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", covered(FLOATS, torch.bfloat16), ids=str)
@pytest.mark.parametrize("text", [*INTEGERS, *TABLES, *RANKED, *FACTORED, *ROTATED])
def test_every_format(text: str, dtype: torch.dtype) -> None:
    for scale in (torch.bfloat16, torch.float16):
        check(text, 24, 208 if "g40" not in text else 112 if ":r" in text else 100, dtype, scale)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([*TABLES, "int3:channel", "int5:channel:asym", "nf3:g16+r1"]), st.integers(1, 40), st.integers(1, 300),
       st.sampled_from(FLOATS))  # fmt: skip
def test_any_shape(text: str, n: int, k: int, dtype: torch.dtype) -> None:
    check(text, n, k, dtype)


@pytest.mark.parametrize("text", ["int4:g16", "int3:g64:asym", "nf4:g40+r2"])
def test_many_blocks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.export.runtime.decode._BLOCK", 7 * 320 * 4)
    check(text, 50, 320, torch.float32)


@pytest.mark.parametrize("text", [
    "int4:g16:asym", "nf3:g40+r3:int8:channel", "lut2:g40", "lr6", "lr16:int4:g16", "int4:g16:asym:r16", "lut2:g40:r16",
])  # fmt: skip
def test_gradients_are_those_of_the_dense_matrix(text: str) -> None:
    n, k = 24, 80
    _, parts = made(text, n, k)
    W = dequantize(parts, text, n, k, "canonical", torch.float32)
    x, bias = torch.randn(3, 4, k), torch.randn(n)
    ours, theirs = ([t.clone().requires_grad_() for t in (x, bias)] for _ in range(2))
    linear(ours[0], parts, ours[1], text, n, k, "canonical").square().sum().backward()
    torch.nn.functional.linear(theirs[0], W, theirs[1]).square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert float((mine.grad - other.grad).abs().max()) <= 1e-5 * float(other.grad.abs().max())
    only = bias.clone().requires_grad_()  # the bias alone may ask for one
    linear(x, parts, only, text, n, k, "canonical").sum().backward()
    assert torch.equal(only.grad, torch.full((n,), 12.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    covered(
        ["int4:g16", "int3:g16:asym+r2", "int5:channel:asym", "nf3:g40:dq8x16", "lut3:g40+r3:int8:channel", "lr6:int8:channel"],
        "int4:g16",
        "lut3:g40+r3:int8:channel",
    ),
)
def test_rows_of_an_embedding(text: str) -> None:
    n, k = 30, 80
    tensors, parts = made(text, n, k)
    for ids in (torch.randint(0, n, (2, 7)), torch.tensor(3), torch.zeros(0, 2, dtype=torch.int64)):
        for dtype in FLOATS:
            found = torch.ops.compress.embedding(ids, parts, text, n, k, "canonical", dtype)
            wanted = parse(text).dequantize(tensors, dtype)[ids]
            assert (
                torch.equal(found, wanted)
                if "+r" not in text and "lr" not in text
                else torch.allclose(found, wanted, atol=ROUNDING[dtype])
            )
    torch.library.opcheck(
        torch.ops.compress.embedding.default, (torch.randint(0, n, (2, 7)), parts, text, n, k, "canonical", torch.bfloat16)
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", [
    *(rare(form) for form in ("int4:g16", "int3:g16:asym+r2", "nf3:g40:dq8x16")),
    "lut3:g40+r3:int8:channel", rare("int3:g16:asym:r16"),
])  # fmt: skip
def test_torch_finds_nothing_to_object_to(text: str) -> None:
    n, k = 16, 80
    _, parts = made(text, n, k)
    x, bias = torch.randn(3, k, requires_grad=True), torch.randn(n, requires_grad=True)
    torch.library.opcheck(linear.default, (x, parts, bias, text, n, k, "canonical"))
    torch.library.opcheck(linear.default, (x.detach(), parts, None, text, n, k, "canonical"))
    torch.library.opcheck(dequantize.default, (parts, text, n, k, "canonical", torch.bfloat16))
    torch.library.opcheck(torch.ops.compress.gradient.default, (torch.randn(3, n), parts, text, n, k, "canonical"))


def test_in_graphs() -> None:
    text, n, k = "int4:g16", 16, 80
    _, parts = made(text, n, k)

    class Twice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = linear(x.relu(), parts, None, text, n, k, "canonical") * 2
            return y

    x = torch.randn(3, k)
    wanted = Twice()(x)
    assert torch.equal(torch.compile(Twice(), fullgraph=True, backend="aot_eager")(x), wanted)
    assert torch.equal(torch.export.export(Twice(), (x,)).module()(x), wanted)
    mode = FakeTensorMode()
    with mode:
        held = [mode.from_tensor(p) for p in parts]
        fake = linear(torch.empty(2, 3, k, dtype=torch.bfloat16), held, None, text, n, k, "canonical")
    assert (fake.shape, fake.dtype) == ((2, 3, n), torch.bfloat16)


@pytest.mark.parametrize("shape", [(80,), (0, 80), (2, 0, 80)])
def test_odd_inputs(shape: tuple[int, ...]) -> None:
    _, parts = made("int4:g16", 16, 80)
    x = torch.randn(*shape)
    found = linear(x, parts, None, "int4:g16", 16, 80, "canonical")
    wanted = x @ dequantize(parts, "int4:g16", 16, 80, "canonical", torch.float32).T
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_view_with_gaps() -> None:
    _, parts = made("int4:g16", 16, 80)
    x = torch.randn(80, 6).T[::2]
    same = linear(x.contiguous(), parts, None, "int4:g16", 16, 80, "canonical")
    assert torch.allclose(linear(x, parts, None, "int4:g16", 16, 80, "canonical"), same, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, that any operation gave."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("text", ["int4:g64", rare("int3:g64:asym"), "nf3:g64+r8",
                                  rare("int6:g64"), "lut3:g64:r128"])  # fmt: skip
def test_the_weight_is_never_whole(text: str) -> None:
    n, k = 4096, 1024
    spec = parse(text).tensors((n, k))
    parts = [torch.zeros(spec[name][1], dtype=spec[name][0]) for name in part_names(text, n, k)]
    with Largest() as seen:
        ops.linear(torch.randn(4, k), parts, None, text, n, k, "canonical")
        ops.gradient(torch.randn(4, n), parts, text, n, k, "canonical")
    assert seen.nbytes <= max(2 << 20, *(p.nbytes for p in parts))
    assert seen.nbytes < n * k  # a byte a weight


@pytest.mark.parametrize(("text", "layout", "drop", "says"), [
    ("int4:g16", "canonical", 1, "has 2 parts, not 1: weight_packed, weight_scale"),
    ("int4:g16", "rows", 0, "not int4:g16 in 'rows'"), ("bf16", "canonical", 0, "takes packed formats"),
    ("int9:g16", "canonical", 0, "2 to 8 bits"), ("int4:g16:r32", "canonical", 0, "blocks of 32 do not divide 80 inputs"),
])  # fmt: skip
def test_what_is_refused(text: str, layout: str, drop: int, says: str) -> None:
    _, parts = made("int4:g16", 16, 80)
    with pytest.raises(FormatError, match=says):
        linear(torch.randn(1, 80), parts[drop:], None, text, 16, 80, layout)


@pytest.mark.parametrize("text", [
    "int4:g32", "int3:g64:asym", "nf4:g64:dq8x16", "lut3:g32", "int3:g64+r4", "int4:g32:r64", "lut3:g32:r128",
])  # fmt: skip
def test_tiles_are_the_same_matrix(text: str) -> None:
    n, k = 32, 128
    tensors, _ = made(text, n, k)
    tiles = cuda.repack(parse(text), (n, k), tensors, torch.bfloat16)
    wanted = parse(text).dequantize(tensors, torch.float32)
    found = dequantize(tiles, text, n, k, "tiles", torch.float32)
    assert float((found - wanted).abs().max()) <= (1e-2 if "+r" in text else 0) * float(wanted.abs().max())
    grad = torch.randn(3, n)
    assert torch.allclose(torch.ops.compress.gradient(grad, tiles, text, n, k, "tiles"), grad @ found, atol=1e-4)
