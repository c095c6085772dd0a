"""Trellis-coded numbers: what is packed comes back, takes the bytes that were said, and is solved, multiplied and exported."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import pipeline
from compress.errors import FormatError
from compress.export.runtime.linear import PackedLinear
from compress.export.table import EXPORTERS
from compress.formats import Packed, Tcq, bitpack, parse, trellis
from compress.model.model import open_model
from compress.passes import gptq_core, rates, trellis_core
from compress.passes.quantize import Quantize
from compress.passes.solver import Case
from tests.conftest import covered, rare
from tests.cooking import bake, multiplies_as_its_matrices_do, recipe, refused, table_is_served
from tests.support import refusal

FEW = ("tcq1", "tcq2", "tcq2.5", "tcq3:l8", "tcq4.5:l10", "tcq5")


def fmt_of(text: str) -> Tcq:
    fmt = parse(text)
    assert isinstance(fmt, Tcq)
    return fmt


def problem(n: int = 64, k: int = 48, tokens: int = 2048) -> tuple[Tensor, gptq_core.Factor]:
    """A matrix and the factored Hessian of inputs that depend on each other and differ in size."""
    g = torch.Generator().manual_seed(3)
    X = torch.randn(tokens, k, generator=g) @ (torch.randn(k, k, generator=g) * torch.logspace(0, -1.5, k))
    return torch.randn(n, k, generator=g) * 0.02, gptq_core.factor(X.T @ X / tokens)


# --- the format -------------------------------------------------------------------------------------------------------


def by_definition(fmt: Tcq, tensors: dict[str, Tensor]) -> Tensor:
    """The weights [N, K], fp64, bit by bit from the words."""
    n, k = (int(x) for x in tensors["weight_shape"])
    out = torch.empty(n, k, dtype=torch.float64)
    low, high = fmt.halves // 2, fmt.halves - fmt.halves // 2
    for i in range(k):
        stream = sum((int(w) & 0xFFFFFFFF) << (32 * j) for j, w in enumerate(tensors["weight_trellis"][i]))
        begin = 0
        for first in range(0, n, 256):
            outputs = min(256, n - first)
            total = outputs // 2 * (low + high)
            ring = [(stream >> (begin + j)) & 1 for j in range(total)]
            at = 0
            for t in range(outputs):
                state = sum(ring[(at + j) % total] << j for j in range(fmt.size))
                x = 0x83DCD12D * state % 2**32
                value = (x % 256 + x // 2**8 % 256 + x // 2**16 % 256 + x // 2**24 - 510) / 128
                out[first + t, i] = value * 2.0 ** (int(tensors["weight_step"][i]) / 16 - 8)
                at += high if t % 2 else low
            begin += total
    return out * tensors["weight_scale"].double()[:, None]


@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("n", [64, 320])
def test_any_words_are_weights_by_the_definition(text: str, n: int) -> None:
    fmt, g, k = fmt_of(text), torch.Generator().manual_seed(1), 3
    tensors = {"weight_trellis": torch.randint(-(2**31), 2**31, (k, n * fmt.halves // 64), generator=g, dtype=torch.int64).int(),
               "weight_step": torch.tensor([0, 128, 255], dtype=torch.uint8),
               "weight_scale": torch.randn(n, generator=g).bfloat16(), "weight_shape": torch.tensor([n, k])}  # fmt: skip
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == fmt.tensors((n, k))
    wanted = by_definition(fmt, tensors)
    torch.testing.assert_close(fmt.dequantize(tensors, torch.float32).double(), wanted, rtol=3e-7, atol=0)
    whole = fmt.dequantize(tensors, torch.float32)
    for start, stop in ((0, n), (5, 6), (n - 61, n - 1)):
        assert torch.equal(fmt.rows(tensors, start, stop, torch.float32), whole[start:stop])
    some = torch.tensor([n - 1, 0, 7, 7, n // 2 - 1])
    assert torch.equal(fmt.picked(tensors, some, torch.float32), whole[some])
    assert torch.equal(Packed(fmt, (n, k), tensors).rows(slice(3, 20), torch.bfloat16), whole[3:20].bfloat16())


@pytest.mark.parametrize("size", trellis.SIZES)
def test_every_state_is_an_exact_number(size: int) -> None:
    """Rings of one word each, whose first output is in every state by turns."""
    fmt, count = Tcq(4, size), 1 << size
    tensors = {"weight_trellis": torch.arange(count, dtype=torch.int32)[:, None], "weight_shape": torch.tensor([16, count]),
               "weight_step": torch.full((count,), 128, dtype=torch.uint8), "weight_scale": torch.ones(16)}  # fmt: skip
    wanted = [(sum((0x83DCD12D * s % 2**32).to_bytes(4, "little")) - 510) / 128 for s in range(count)]
    assert fmt.dequantize(tensors, torch.float32)[0].tolist() == wanted
    assert trellis.values(size).tolist() == wanted


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(FEW), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_states_come_back(text: str, blocks: int, k: int, seed: int) -> None:
    """Of any ring: the states that any words say, packed again, are the same words."""
    fmt, n, g = fmt_of(text), 64 * blocks, torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (k, n * fmt.halves // 64), generator=g, dtype=torch.int64).int()
    states = fmt.windows(words, 0, n, range(fmt.whole), fmt.size)
    tensors = fmt.pack(states, torch.zeros(k, dtype=torch.uint8), torch.ones(n))
    assert torch.equal(tensors["weight_trellis"], words)


def test_codes_of_any_width_are_placed_as_the_stream_has_them() -> None:
    codes = torch.tensor([[1, 7, 2, 500, 1]])
    packed = bitpack.place(codes, torch.tensor([0, 1, 30, 33, 63]), 2)
    stream = 1 | 7 << 1 | 2 << 30 | 500 << 33 | 1 << 63
    assert [int(w) & 0xFFFFFFFF for w in packed[0]] == [stream & 0xFFFFFFFF, stream >> 32]
    assert bitpack.windows(packed[:, None], packed[:, None].flip(2), [33, 60, 0], 9).tolist() == [
        [[500, 8 | (stream & 31) << 4, 15]]
    ]


@pytest.mark.parametrize("text", [*FEW, "tcq2:r16"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_bytes_are_as_said(text: str, scale_dtype: torch.dtype) -> None:
    fmt, (W, f) = fmt_of(text.removesuffix(":r16")), problem()
    assert str(parse(text)) == text
    tensors = trellis_core.solve(W, f, fmt, scale_dtype).tensors
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == fmt.tensors((64, 48), scale_dtype)
    assert Packed(parse(text), (64, 48), tensors).nbytes == parse(text).nbytes((64, 48))
    assert fmt.nbytes((64, 48)) == 64 * 48 * fmt.halves / 16 + 48 + 2 * 64 + 16


@pytest.mark.parametrize(("text", "shape", "says"), [
    ("tcq0.5", None, "tcq has 1 to 5 bits a weight in steps of 0.5, not 0.5"),
    ("tcq6", None, "tcq has 1 to 5 bits a weight"),
    ("tcq2.25", None, "unknown format 'tcq2.25'; did you mean 'tcq2"),
    ("tcq", None, "unknown format 'tcq'"),
    ("tcq2:l16", None, "tcq2 has states of l12, l10, l8, not l16"),
    ("tcq5:l8", None, "tcq5 has states of l12, l10, not l8"),
    ("tcq2:g64", None, "unknown format"),
    ("tcq2+r16", None, "low-rank factors go with a quantized matrix"),
    ("lr8:tcq2", None, "factors"),
    ("tcq2.5", (48, 64), "tcq2.5: 48 outputs do not fill whole words; it needs a multiple of 64"),
])  # fmt: skip
def test_what_cannot_be_is_a_line(text: str, shape: tuple[int, int] | None, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse(text).check(shape or (64, 64))


# --- the solver -------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_weights_and_beat_integers_of_more_bits() -> None:
    W, f = problem(128, 64)
    for text, integers in (("tcq2", "int2:g32"), ("tcq3", "int3:g32")):
        found = trellis_core.solve(W, f, fmt_of(text), torch.bfloat16)
        off = fmt_of(text).dequantize(found.tensors, torch.float32) - W
        torch.testing.assert_close(found.loss_n, gptq_core.loss(off, f))
        theirs = gptq_core.quantize(W, f, parse(integers))  # type: ignore[arg-type]
        assert float(found.loss_n.sum()) < 0.75 * float(theirs.loss_n.sum())


def test_feedback_and_steps_by_input_are_worth_something() -> None:
    W, f = problem(64, 64)
    W *= torch.logspace(0, 1.5, 64)  # inputs whose weights differ in size
    fmt = fmt_of("tcq2")
    loss = float(trellis_core.solve(W, f, fmt, torch.bfloat16).loss_n.sum())
    blind = trellis_core.solve(W, gptq_core.nothing_seen(W), fmt, torch.bfloat16)
    off = fmt.dequantize(blind.tensors, torch.float32) - W
    assert loss < 0.8 * float(gptq_core.loss(off, f).sum())
    assert float(blind.loss_n.sum()) == pytest.approx(trellis_core.DISTORTION[12][4] * float(blind.energy_n.sum()), rel=0.1)


def test_outputs_in_parts_take_the_steps_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(4)
    W, f = torch.randn(512, 16, generator=g), problem(64, 16)[1]
    whole = trellis_core.solve(W, f, fmt_of("tcq2"), torch.bfloat16)
    monkeypatch.setattr("compress.passes.rows.CHUNK", 256 * 16)
    parts = trellis_core.solve(W, f, fmt_of("tcq2"), torch.bfloat16)
    alone = trellis_core.solve(W[:256], f, fmt_of("tcq2"), torch.bfloat16)
    assert torch.equal(parts.tensors["weight_step"], alone.tensors["weight_step"])
    assert float(parts.loss_n.sum()) == pytest.approx(float(whole.loss_n.sum()), rel=0.03)


ODD = {"zeros": torch.zeros(64, 32), "tiny": torch.eye(64)[:, :32] * 1e-30, "large": torch.randn(64, 32) * 1e4,
       "positive": torch.randn(64, 32).abs(), "some inputs zero": torch.randn(64, 32) * (torch.arange(32) > 9)}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_matrices_are_coded_too(kind: str) -> None:
    fmt, W = fmt_of("tcq3"), ODD[kind]
    for f in (problem(64, 32)[1], gptq_core.nothing_seen(W)):
        tensors = trellis_core.solve(W, f, fmt, torch.float32).tensors
        Q = fmt.dequantize(tensors, torch.float32)
        assert bool(Q.isfinite().all())
        assert float(gptq_core.loss(Q - W, f).sum()) <= 0.2 * float(gptq_core.loss(W, f).sum()) + 1e-30


def test_what_is_not_finite_is_refused() -> None:
    W, f = problem()
    W[3, 3] = torch.nan
    with pytest.raises(FormatError, match="holds NaN or infinite"):
        trellis_core.solve(W, f, fmt_of("tcq3"), torch.bfloat16)


# --- multiplied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["tcq2.5", "tcq3:l10:r16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_multiplies_by_the_matrix(text: str, dtype: torch.dtype) -> None:
    W, f = problem(320, 48)
    fmt = parse(text)
    tensors = trellis_core.solve(W, f, fmt_of(text.removesuffix(":r16")), torch.bfloat16).tensors
    whole = fmt.dequantize(tensors, torch.float32)
    module = PackedLinear(text, (320, 48), dtype, device="cpu")
    for name, buffer in module.named_buffers():
        buffer.copy_(tensors[name])
    module.prepare()
    assert module.layout == "canonical"
    assert sum(b.nbytes for b in module.buffers()) == fmt.nbytes((320, 48))
    x = torch.randn(5, 48, dtype=dtype).requires_grad_()
    y, wanted = module(x), x.detach().float() @ whole.T
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    assert torch.equal(module.weight, fmt.dequantize(tensors, dtype))
    (slope,) = torch.autograd.grad(y.float().sum(), x)
    torch.testing.assert_close(slope.float(), whole.sum(0).expand(5, -1), rtol=0, atol=2e-2 * float(whole.sum(0).abs().max()))
    assert module.to(torch.float16)(x.half()).dtype == torch.float16


# --- runs, artifacts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    pins = {"*.down": "tcq2.5:l8:r64", "*.k": "int3:g32", "lm_head": "int4:g32"}
    step = {"quantize": {"format": "tcq3:l8", "pins": pins}}
    return bake(tmp_path_factory.mktemp("trellis"), family("llama"), text, "native", step)


def test_an_artifact_proves_itself_and_multiplies_as_its_matrices_do(made: pipeline.Outcome) -> None:
    folder, _ = made.artifacts["native"]
    multiplies_as_its_matrices_do(folder, 2e-6)
    assert "tcq2.5:l8:r64" in (made.out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [rare("mixtral"), "gpt2"])
def test_experts_and_transposed_matrices_are_coded(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    done = bake(tmp_path, family(name), text, "native", {"quantize": {"format": "tcq4:l8", "pins": {}}})
    assert done.artifacts["native"][1].greedy > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", covered(["tcq4:l8", "tcq4:l8:ri32"], "tcq4:l8:ri32"))
def test_rows_of_a_tied_table_are_looked_up_one_by_one(family: Any, text: Path, tmp_path: Path, form: str) -> None:
    done = bake(tmp_path, family("qwen2"), text, "native", {"quantize": {"format": "int4:g32", "pins": {"embed": form}}})
    table_is_served(done.artifacts["native"][0], done)


@pytest.mark.parametrize("exporter", [name for name in EXPORTERS if name != "native"])
@pytest.mark.parametrize("form", ["tcq3", "tcq3:r32"])
def test_other_exporters_name_native(family: Any, exporter: str, form: str) -> None:
    said = refusal(exporter, family("llama"), form)
    assert said is not None
    assert re.search(rf"{exporter}: 'layers.0.attn.q' has {form}, which is trellis-coded, .* export native instead", said)
    assert refusal("native", family("llama"), form) is None


FIRST = {"quantize": {"format": "tcq3"}}


@pytest.mark.parametrize(("passes", "says"), [
    ([{"quantize": {"format": "int4:g32", "pins": {"embed": "tcq3:r32"}}}], "outputs mixes rows: pin it to tcq3:ri32"),
    ([{"quantize": {"format": "int4:g32", "pins": {"embed": "tcq2.5"}}}], "'embed': tcq2.5: .* outputs do not fill whole words"),
    ([{"quantize": {"method": "learned", "format": "tcq3"}}], "is to be tcq3, which is not learned"),
    ([FIRST, {"lqlora": {"rank": 4}}], "low-rank factors go with a quantized matrix"),
    ([{"factorize": {"rank": 0.5}}, FIRST], "give its factors a format with a grid"),
    ([FIRST, {"distill": {"loss": {"ce": 1.0}, "train": "scales"}}], "is in tcq3, which is not trained"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_said_in_a_line(
    family: Any, text: Path, tmp_path: Path, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, family("llama"), text, passes, says)


# --- allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_allocation_chooses_among_rates(family: Any, text: Path, tmp_path: Path) -> None:
    formats = ["tcq:l8", "int4:g32"]
    path = recipe(tmp_path, family("llama"), text, exports=False)
    passes = [{"allocate": {"budget": "4 bits", "formats": formats}}, {"quantize": {"drift": 0}}]
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": passes}))
    done = pipeline.run(path)
    chosen = {str(f) for f in done.state.formats.values()}
    assert len(chosen) > 1
    assert chosen <= set(rates.expanded(formats))
    sites = done.state.graph.linear
    assert sum(done.state.formats[s.name].nbytes(s.shape) for s in sites) * 8 <= 4 * sum(s.numel for s in sites)


def test_rates_between_two_are_on_their_line(family: Any) -> None:
    """Within seven per cent of what is measured, at the rates that are."""
    formats = [parse(f"tcq{r:g}:l10") for r in (1.5, 2, 3, 4)]
    assert rates.ends([*formats, parse("tcq2"), parse("int4:g32")]) == [formats[0], formats[-1], parse("tcq2"), parse("int4:g32")]
    W, f = problem(64, 128, 8192)
    site = replace(open_model(str(family("llama"))).state.graph["layers.0.attn.q"], shape=(64, 128))
    case = Case(site, open_model(str(family("llama"))).state, None, ())  # type: ignore[arg-type]
    made = {str(fmt): float(gptq_core.loss(Q - W, f).sum()) for fmt, Q in Quantize().tries(W, f, formats, case)}
    assert all(late < early for early, late in itertools.pairwise(made.values()))
    ends = [{"site": "s", "format": str(fmt), "output": made[str(fmt)], "weight": 0.0, "kl": None} for fmt in rates.ends(formats)]
    for record in rates.between(formats, ends):
        assert record["output"] == pytest.approx(made[record["format"]], rel=0.07)
