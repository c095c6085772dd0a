"""Entropy-coded integers: what is coded comes back, takes the bytes that were said, and is solved, multiplied and exported."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import pipeline
from compress.errors import FormatError
from compress.export.runtime import load
from compress.export.runtime.linear import PackedLinear
from compress.export.table import EXPORTERS
from compress.formats import Ecq, Packed, entropy, lanes, parse
from compress.model.model import open_model
from compress.passes import entropy_core, gptq_core, rates, rows
from compress.passes.quantize import Quantize
from compress.passes.solver import Case
from tests.conftest import covered, rare
from tests.cooking import bake, multiplies_as_its_matrices_do, recipe, refused, table_is_served
from tests.support import refusal


def fmt_of(text: str) -> Ecq:
    fmt = parse(text)
    assert isinstance(fmt, Ecq)
    return fmt


def problem(n: int = 256, k: int = 192, tokens: int = 4096) -> tuple[Tensor, gptq_core.Factor]:
    """A matrix and the factored Hessian of inputs that depend on each other and differ in size."""
    g = torch.Generator().manual_seed(3)
    X = torch.randn(tokens, k, generator=g) @ (torch.randn(k, k, generator=g) * torch.logspace(0, -1.5, k))
    return torch.randn(n, k, generator=g) * 0.02, gptq_core.factor(X.T @ X / tokens)


# --- the coder --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 90), st.floats(0.01, 60), st.integers(0, 999))
def test_codes_come_back_whatever_the_shape(n: int, k: int, size: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = (torch.randn(n, k, generator=g) * size * torch.rand(k, generator=g)).round().clamp(-127, 127).to(torch.int8)
    spread, bits = entropy.spreads(codes)
    coded = entropy.encode(codes, spread)
    assert torch.equal(entropy.decode(coded, spread, n, k), codes)
    assert 32 * len(coded) <= bits * (1 + 1e-3) + entropy.overhead(n, k)
    any_table = torch.randint(0, entropy.SPREADS, (k,), generator=g, dtype=torch.uint8)  # a dear one, and right all the same
    assert torch.equal(entropy.decode(entropy.encode(codes, any_table), any_table, n, k), codes)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 20), st.integers(0, 999))
def test_both_loops_make_the_same_words(steps: int, count: int, tables: int, seed: int) -> None:
    """The one that is compiled runs as Python here, and compiled where numba is installed."""
    g = np.random.default_rng(seed)
    symbols = g.integers(0, 255, (steps, count)).astype(np.uint8)
    spread = g.integers(0, entropy.SPREADS, tables).astype(np.uint8)
    state, words = lanes.encode(symbols, spread, *entropy.tables())
    for ours in (lanes.encode_one_by_one, lanes.fastest()[0]):
        again, same = ours(symbols, spread, *entropy.tables())
        assert np.array_equal(state, again)
        assert np.array_equal(words, same)
    for theirs in (lanes.decode, lanes.decode_one_by_one, lanes.fastest()[1]):
        found, ended, read = theirs(state, words, spread, *entropy.tables(), entropy.places(), steps)
        assert np.array_equal(found, symbols)
        assert (ended == entropy.ONE).all()
        assert read == len(words)


def test_words_that_end_too_early_are_told() -> None:
    codes = torch.randint(-100, 100, (16, 64), dtype=torch.int8)
    spread, _ = entropy.spreads(codes)
    coded = entropy.encode(codes, spread)
    for short in (coded[: len(coded) // 2], coded[:0]):
        with pytest.raises(FormatError, match="do not end as they should"):
            entropy.decode(short, spread, 16, 64)


@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
def test_codes_take_their_entropy_and_little_more(size: float) -> None:
    codes = (torch.randn(640, 512, generator=torch.Generator().manual_seed(1)) * size).round().clamp(-127, 127).to(torch.int8)
    share = codes.unique(return_counts=True)[1].double() / codes.numel()
    wanted = float(-(share * share.log2()).sum())
    coded = entropy.encode(codes, entropy.spreads(codes)[0])
    assert wanted - 1e-9 <= 32 * len(coded) / codes.numel() <= wanted + 0.02


def test_the_largest_codes_and_words_behind_the_end_do_no_harm() -> None:
    codes = torch.tensor([[127, -127] * 30, [0, 1] * 30], dtype=torch.int8)
    spread = torch.zeros(60, dtype=torch.uint8)
    coded = torch.cat([entropy.encode(codes, spread), torch.zeros(9, dtype=torch.int32)])
    assert torch.equal(entropy.decode(coded, spread, 2, 60), codes)


def test_a_machine_that_computes_other_tables_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy.tables.cache_clear()
    monkeypatch.setattr(entropy, "TABLES", "another")
    with pytest.raises(FormatError, match="computes other tables for 'ecq' than others do"):
        entropy.tables()
    entropy.tables.cache_clear()


# --- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ecq2", "ecq2.05", "ecq2.5", "ecq3", "ecq4.25", "ecq2.5:r64"])
@pytest.mark.parametrize("scale_dtype", covered([torch.bfloat16, torch.float16], torch.bfloat16))
def test_bytes_are_exactly_the_rate_and_weights_those_of_the_formula(text: str, scale_dtype: torch.dtype) -> None:
    fmt, (W, f) = fmt_of(text.removesuffix(":r64")), problem()
    assert str(parse(text)) == text
    shape = tuple(W.shape)
    tensors = entropy_core.solve(W, f, fmt, scale_dtype).tensors
    listing = fmt.tensors(shape, scale_dtype)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == listing
    packed = Packed(parse(text), shape, tensors)
    assert packed.nbytes == fmt.nbytes(shape) == parse(text).nbytes(shape)
    assert 0 <= fmt.rate * W.numel() / 8 - packed.nbytes < 4
    step = tensors["weight_base"].double() * 2 ** (tensors["weight_step"].double() / 16)
    plain = fmt.codes(tensors).double() * step * tensors["weight_scale"].double()[:, None]
    torch.testing.assert_close(fmt.dequantize(tensors, torch.float32).double(), plain, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("text", "shape", "says"), [
    ("ecq0.5", None, "ecq has 1 to 6 bits a weight, not 0.5"),
    ("ecq9", None, "ecq has 1 to 6 bits a weight, not 9"),
    ("ecq", None, "unknown format 'ecq'; did you mean 'ecq4'"),
    ("ecq3:g64", None, "unknown format"),
    ("ecq3+r16", None, "low-rank factors go with a quantized matrix"),
    ("lr8:ecq3", None, "low-rank factors are dense or quantized|factors"),
    ("ecq2", (8, 16), "scales and steps of a matrix 8 x 16 alone take .* use a higher rate"),
])  # fmt: skip
def test_what_cannot_be_is_a_line(text: str, shape: tuple[int, int] | None, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse(text).check(shape or (64, 64))


# --- the solver -------------------------------------------------------------------------------------------------------


def test_a_bit_less_is_as_good_as_the_best_integers() -> None:
    W, f = problem()
    for text, integers in (("ecq2.25", "int3:g64"), ("ecq3.25", "int4:g64")):
        ours = entropy_core.solve(W, f, fmt_of(text), torch.bfloat16)
        theirs = gptq_core.quantize(W, f, parse(integers))  # type: ignore[arg-type]
        assert float(ours.loss_n.sum()) < 1.3 * float(theirs.loss_n.sum())


@pytest.mark.parametrize(("rate", "most"), [(2, 0.0888), (3, 0.0222), (4, 0.00556)])
def test_a_normal_source_is_coded_as_theory_says(rate: int, most: float) -> None:
    """At the rate of the whole file; the bound is that of uniform steps with an ideal coder."""
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
    fmt = Ecq(100 * rate)
    tensors = entropy_core.solve(W, gptq_core.nothing_seen(W), fmt, torch.bfloat16).tensors
    off = float((fmt.dequantize(tensors, torch.float32) - W).square().mean())
    beside = 8 * (fmt.nbytes((1024, 1024)) - 4 * fmt.words((1024, 1024))) / W.numel()
    assert most * 0.98 < off < most * 4 ** (0.02 + beside)


def test_losses_are_those_of_the_weights_and_the_rate_is_filled() -> None:
    W, f = problem()
    fmt = fmt_of("ecq2.5")
    found = entropy_core.solve(W, f, fmt, torch.bfloat16)
    off = fmt.dequantize(found.tensors, torch.float32) - W
    torch.testing.assert_close(found.loss_n, gptq_core.loss(off, f))
    spread, bits = entropy.spreads(fmt.codes(found.tensors))
    assert torch.equal(spread, found.tensors["weight_spread"])
    left = fmt.rate - bits / W.numel() - 8 * (fmt.nbytes(tuple(W.shape)) - 4 * fmt.words(tuple(W.shape))) / W.numel()
    assert 0 <= left < 0.03


@pytest.mark.parametrize("W", [torch.zeros(64, 64), torch.eye(64) * 1e-30, torch.randn(64, 64) * 1e4, torch.randn(64, 64).abs()],
                         ids=["zeros", "tiny", "large", "positive"])  # fmt: skip
def test_odd_matrices_are_coded_too(W: Tensor) -> None:
    fmt = fmt_of("ecq3")
    for f in (problem(64, 64)[1], gptq_core.nothing_seen(W)):
        tensors = entropy_core.solve(W, f, fmt, torch.float32).tensors
        Q = fmt.dequantize(tensors, torch.float32)
        assert bool(Q.isfinite().all())
        assert float(gptq_core.loss(Q - W, f).sum()) <= 0.2 * float(gptq_core.loss(W, f).sum()) + 1e-30


def test_what_is_not_finite_is_refused() -> None:
    W, f = problem(64, 64)
    W[3, 3] = torch.nan
    with pytest.raises(FormatError, match="holds NaN or infinite"):
        entropy_core.solve(W, f, fmt_of("ecq3"), torch.bfloat16)


# --- multiplied -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ecq3", "ecq3:r64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_multiplies_by_the_matrix_coded_or_decoded(text: str, dtype: torch.dtype) -> None:
    W, f = problem(128, 64)
    fmt = parse(text)
    tensors = entropy_core.solve(W, f, fmt_of("ecq3"), torch.bfloat16).tensors
    whole = fmt.dequantize(tensors, torch.float32)
    module = PackedLinear(text, (128, 64), dtype, device="cpu")
    for name, buffer in module.named_buffers():
        buffer.copy_(tensors[name])
    x = torch.randn(5, 64, dtype=dtype).requires_grad_()
    before = module(x)
    module.prepare()
    assert module.layout == "codes"
    assert sum(b.nbytes for b in module.buffers()) < 1.2 * W.numel()
    after = module(x)
    assert torch.equal(before, after)
    wanted = x.detach().float() @ whole.T
    torch.testing.assert_close(
        after.float(), wanted, rtol=0, atol=(1e-5 if dtype == torch.float32 else 2e-2) * float(wanted.abs().max())
    )
    assert torch.equal(module.weight, fmt.dequantize(tensors, dtype))
    (slope,) = torch.autograd.grad(after.float().sum(), x)
    torch.testing.assert_close(slope.float(), whole.sum(0).expand(5, -1), rtol=0, atol=2e-2 * float(whole.sum(0).abs().max()))
    assert module.to(torch.float16)(x.half()).dtype == torch.float16


# --- runs, artifacts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    pins = {"*.down": "ecq3.5:r64", "*.k": "int3:g32", "lm_head": "int4:g32"}
    return bake(tmp_path_factory.mktemp("coded"), family("llama"), text, "native", {"quantize": {"format": "ecq3", "pins": pins}})


def test_an_artifact_proves_itself_and_multiplies_as_its_matrices_do(made: pipeline.Outcome) -> None:
    folder, _ = made.artifacts["native"]
    multiplies_as_its_matrices_do(folder, 2e-6)
    assert "ecq3.5:r64" in (made.out / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_experts_and_transposed_matrices_are_coded(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    done = bake(tmp_path, family(name), text, "native", {"quantize": {"format": "ecq4", "pins": {}}})
    assert done.artifacts["native"][1].greedy > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", covered(["ecq4", "ecq4:ri32"], "ecq4"))
def test_a_tied_table_is_decoded_once_for_both(family: Any, text: Path, tmp_path: Path, form: str) -> None:
    done = bake(tmp_path, family("qwen2"), text, "native", {"quantize": {"format": "int4:g32", "pins": {"embed": form}}})
    folder = done.artifacts["native"][0]
    first, model = table_is_served(folder, done), load(folder)
    assert any(note.startswith("rows looked up are off by ") for note in first["notes"])
    assert model.get_input_embeddings().layout == model.get_output_embeddings().layout == "codes"
    assert sum(b.nbytes for b in model.get_input_embeddings().buffers()) < 1.1 * done.state.graph["embed"].numel
    layout = pipeline.plan(done.out.parent / "recipe.yaml").layouts["native"]
    assert {f.name: f.nbytes for f in layout.files} == {f.name: (folder / f.name).stat().st_size for f in layout.files}


def test_a_table_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, f = problem(1024, 64)
    whole = entropy_core.solve(W, f, fmt_of("ecq3"), torch.bfloat16).tensors
    monkeypatch.setattr("compress.passes.rows.CHUNK", 256 * 64)
    read = rows.Rows((1024, 64), lambda at: W[at].clone(), W.device)
    tensors = entropy_core.solve(read, f, fmt_of("ecq3"), torch.bfloat16).tensors
    one, two = (fmt_of("ecq3").dequantize(t, torch.float32) for t in (whole, tensors))
    assert float((one - two).norm()) < 0.05 * float((one - W).norm())


@pytest.mark.parametrize("exporter", [name for name in EXPORTERS if name != "native"])
@pytest.mark.parametrize("form", ["ecq3", "ecq3:r32"])
def test_other_exporters_name_native(family: Any, exporter: str, form: str) -> None:
    said = refusal(exporter, family("llama"), form)
    assert said is not None
    assert re.search(rf"{exporter}: 'layers.0.attn.q' has {form}, which is entropy-coded, .* export native instead", said)
    assert refusal("native", family("llama"), form) is None


# --- allocation -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("formats", [["ecq2.5", "ecq3:r64", "int4:g32"], rare(["ecq", "ecq:r64"])])
def test_an_allocation_chooses_among_rates(family: Any, text: Path, tmp_path: Path, formats: list[str]) -> None:
    path = recipe(tmp_path, family("llama"), text, exports=False)
    passes = [{"allocate": {"budget": "3.25 bits", "formats": formats, "trials": 1}}, {"quantize": {}}]
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": passes}))
    done = pipeline.run(path)
    chosen = {str(f) for f in done.state.formats.values()}
    assert len(chosen) > 1
    assert chosen <= set(rates.expanded(formats))
    sites = done.state.graph.linear
    assert sum(done.state.formats[s.name].nbytes(s.shape) for s in sites) * 8 <= 3.25 * sum(s.numel for s in sites)


@pytest.mark.slow
def test_an_allocation_takes_tables_too(family: Any, text: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, family("qwen2"), text, exports=False)
    formats = ["tcq4:l8", "ecq:ri32", "ecq4:r32"]
    allocate = {"budget": "4.2 bits", "formats": formats, "also": ["embed"], "trials": 1}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": [{"allocate": allocate}, {"quantize": {}}]}))
    done = pipeline.run(path)
    sites = [*done.state.graph.linear, done.state.graph["embed"]]
    assert str(done.state.formats["embed"]).startswith(("tcq4", "ecq"))
    assert sum(done.state.formats[s.name].nbytes(s.shape) for s in sites) * 8 <= 4.2 * sum(s.numel for s in sites)


@pytest.mark.slow
def test_rates_between_two_are_on_their_line(family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tenth of what is measured, at the rates that are."""
    formats = [parse(f"ecq{r:g}{t}") for t in ("", ":r64") for r in (2.5, 2.9, 3.4, 4)]
    assert [str(f) for f in rates.ends(formats)] == ["ecq2.5", "ecq4", "ecq2.5:r64", "ecq4:r64"]
    assert rates.ends([parse("ecq3"), parse("int4:g32")]) == [parse("ecq3"), parse("int4:g32")]
    W, f = problem(256, 256, 8192)
    site = replace(open_model(str(family("llama"))).state.graph["layers.0.attn.q"], shape=(256, 256))
    case = Case(site, None, None, ())  # type: ignore[arg-type]
    made = {str(fmt): float(gptq_core.loss(Q - W, f).sum()) for fmt, Q in Quantize().tries(W, f, formats, case)}
    records = [
        {"site": "s", "format": str(fmt), "output": made[str(fmt)], "weight": 0.0, "kl": None} for fmt in rates.ends(formats)
    ]
    for record in rates.between(formats, records):
        assert record["output"] == pytest.approx(made[record["format"]], rel=0.1)
        assert (record["weight"], record["kl"]) == (0.0, None)


def test_some_rows_are_tried_at_the_rate_of_the_whole() -> None:
    """Their own scales and steps would take a share of it that those of the whole matrix do not."""
    W, f = problem(512, 192)
    fmt = fmt_of("ecq2.5")
    whole = fmt.dequantize(entropy_core.solve(W, f, fmt, torch.float32).tensors, torch.float32) - W
    some = entropy_core.tried(W[:64], f, fmt, (512, 192)) - W[:64]
    wanted = float(gptq_core.loss(whole, f)[:64].sum())
    assert float(gptq_core.loss(some, f).sum()) == pytest.approx(wanted, rel=0.08)


FIRST = {"quantize": {"format": "ecq3"}}


@pytest.mark.parametrize(("passes", "says"), [
    ([{"quantize": {"format": "int4:g32", "pins": {"embed": "ecq3:r32"}}}], "outputs mixes rows: pin it to ecq3:ri32"),
    ([{"quantize": {"method": "learned", "format": "ecq3"}}], "is to be ecq3, which is not learned"),
    ([FIRST, {"lqlora": {"rank": 4}}], "low-rank factors go with a quantized matrix"),
    ([{"factorize": {"rank": 0.5}}, FIRST], "give its factors a format with a grid"),
    *(([FIRST, {"distill": {"loss": {"ce": 1.0}} | train}], "is in ecq3, which is not trained")
      for train in ({"train": "scales"}, {"train": "all"}, {"train": "lora", "rank": 4})),
])  # fmt: skip
def test_what_does_not_go_with_it_is_said_in_a_line(
    family: Any, text: Path, tmp_path: Path, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, family("llama"), text, passes, says)


@pytest.mark.parametrize("order", ["as it is", "an outlier"])
def test_a_higher_rate_is_never_worse(order: str) -> None:
    """Also where the steps that would fill it are so fine that a byte has no room for the codes."""
    W, f = problem(128, 128)
    if order == "an outlier":
        W[3, 5] = 40 * W.std()
    losses = []
    for rate in (250, 300, 400, 500, 600):
        found = entropy_core.solve(W, f, Ecq(rate), torch.bfloat16)
        losses.append(float(found.loss_n.sum()))
    assert all(late <= early * 1.05 for early, late in itertools.pairwise(losses)), losses


def test_a_flipped_bit_is_told_wherever_it_is() -> None:
    codes = (torch.randn(64, 96, generator=torch.Generator().manual_seed(5)) * 2).round().to(torch.int8)
    spread, _ = entropy.spreads(codes)
    coded = torch.cat([entropy.encode(codes, spread), torch.zeros(4, dtype=torch.int32)])
    for word in (0, 1, len(coded) // 2, len(coded) - 5, len(coded) - 1):
        for bit in (0, 13, 30):
            damaged = coded.clone()
            damaged[word] ^= 1 << bit
            with pytest.raises(FormatError, match="do not end as they should"):
                entropy.decode(damaged, spread, 64, 96)
