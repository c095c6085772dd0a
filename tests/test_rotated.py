"""Rotated formats: the rotation is one, weights come back, and what is solved, multiplied and measured in it is what W gives."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from compress import pipeline
from compress.errors import FormatError, ModelError
from compress.export.native import reader
from compress.export.runtime import load
from compress.export.table import EXPORTERS
from compress.formats import Rotated, parse
from compress.formats.grid import plain
from compress.formats.rotated import BLOCKS, INPUTS, OUTPUTS, rotation, signs
from compress.model.model import open_model
from compress.passes import error_table, gptq_core, rotated, solver
from compress.passes.quantize import Quantize
from compress.passes.solver import Case
from tests.cooking import bake, multiplies_as_its_matrices_do, recipe, refused
from tests.pass_laws import attempt, step_of
from tests.support import refusal

BASES = ["int2:g32", "int3:g64:asym", "int4:channel", "nf3:g64", "nf4:g64:dq8x16", "lut2:g64", "lut3:g40:shared"]
FORMATS = st.builds(Rotated, st.sampled_from(BASES).map(parse), st.sampled_from(BLOCKS), st.booleans())  # type: ignore[arg-type]


def fmt_of(text: str) -> Rotated:
    fmt = parse(text)
    assert isinstance(fmt, Rotated)
    return fmt


def matrix(side: int, block: int, count: int) -> Tensor:
    """S H of so many numbers, fp64, by the definitions: entries of H are (-1)**(ones that i and j have in common)."""

    def sign(i: int) -> int:
        x = i + 1
        for _ in range(2):
            x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return -1 if ((x >> 16) ^ x) >> side & 1 else 1

    H = torch.tensor([[sign(i) * (-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)], dtype=torch.float64)
    return torch.block_diag(*[H / block**0.5] * (count // block))


# --- the rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [INPUTS, OUTPUTS])
@pytest.mark.parametrize("block", [1, 2, *BLOCKS])
def test_a_rotation_is_what_is_written_and_its_transpose_undoes_it(side: int, block: int) -> None:
    R = rotation(side, block).double()
    torch.testing.assert_close(R, matrix(side, block, block), rtol=0, atol=1e-7)
    torch.testing.assert_close(R @ R.T, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_rotation_is_made_whatever_device_and_dtype_are_the_default() -> None:
    """As they are not what they seem while transformers builds a model."""
    rotation.cache_clear()
    signs.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            R = rotation(INPUTS, 32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (R.dtype, signs(INPUTS, 32).dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(R.double(), matrix(INPUTS, 32, 32), rtol=0, atol=1e-7)


def test_signs_are_balanced_and_those_of_the_two_sides_differ() -> None:
    for block in BLOCKS[1:]:
        for side in (INPUTS, OUTPUTS):
            assert abs(float(signs(side, block).mean())) < 0.4
        assert 0.2 < float((signs(INPUTS, block) == signs(OUTPUTS, block)).float().mean()) < 0.8


@given(FORMATS)
def test_text_round_trips(fmt: Rotated) -> None:
    assert parse(str(fmt)) == fmt
    assert str(fmt) == f"{fmt.base}:r{'i' if fmt.inputs_only else ''}{fmt.block}"


@given(FORMATS, st.integers(1, 300), st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_weights_are_turned_as_written_and_come_back(fmt: Rotated, n: int, blocks: int) -> None:
    W, side = torch.randn(n, blocks * fmt.block), fmt.outputs(n)
    if fmt.inputs_only:
        assert side == 1
        torch.testing.assert_close(fmt.turn_back(fmt.turn(W, n)[: n // 2 + 1]), W[: n // 2 + 1], rtol=0, atol=3e-6)
    else:
        assert (n % side, fmt.block % side, n % (2 * side) == 0 and 2 * side <= fmt.block) == (0, 0, False)
    Ro, Ri = matrix(OUTPUTS, side, n), matrix(INPUTS, fmt.block, W.shape[1])
    C = fmt.turn(W, n)
    torch.testing.assert_close(C.double(), Ro.T @ W.double() @ Ri, rtol=0, atol=3e-6)
    torch.testing.assert_close(fmt.turn_back(C), W, rtol=0, atol=3e-6)


@pytest.mark.parametrize("text", ["int3:g64:asym:r128", "lut2:g64:r128", "nf4:g64:dq8x16:r64", "int4:channel:r16"])
def test_bytes_are_those_of_the_format_inside_and_weights_those_of_the_formula(text: str) -> None:
    fmt, n, k = fmt_of(text), 96, 640
    tensors = fmt.base.pack(*plain(torch.randn(n, k), fmt.base))
    assert fmt.tensors((n, k)) == fmt.base.tensors((n, k))
    assert fmt.nbytes((n, k)) == sum(t.nbytes for t in tensors.values())
    C = fmt.base.dequantize(tensors, torch.float32).double()
    wanted = matrix(OUTPUTS, fmt.outputs(n), n) @ C @ matrix(INPUTS, fmt.block, k).T
    assert float((fmt.dequantize(tensors, torch.float32) - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    x = torch.randn(5, k)
    y, through = x.double() @ wanted.T, fmt.out_of(fmt.into(x) @ C.float().T)
    assert float((through - y).abs().max()) <= 1e-6 * float(y.abs().max())


def test_weights_are_turned_to_the_same_bits_in_any_parts_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, W = fmt_of("int4:g64:r128"), torch.randn(512, 384)
    whole = fmt.turn(W, 512)
    monkeypatch.setattr("compress.formats.rotated._CHUNK", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert torch.equal(fmt.turn(W, 512), whole)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("text", "shape", "says"), [
    ("int2:g32:r128", (64, 96), r"int2:g32:r128: blocks of 128 do not divide 96 inputs; blocks that do: r16, r32"),
    ("int4:channel:r64", (64, 40), "blocks of 64 do not divide 40 inputs; none does, use int4:channel"),
    ("int4:g64:r32", (64, 96), "groups of 64 do not divide 96 inputs"),
    ("int4:g64:r48", None, "a rotation has blocks of 16, 32, 64, 128, 256 inputs, not 48"),
    ("int4:g64:r512", None, "a rotation has blocks of 16"),
    ("bf16:r128", None, "a rotation goes with a quantized matrix, as in int4:g64:r128, not with bf16"),
    ("int4:g64:r64:r64", None, "a rotation goes with a quantized matrix"),
    ("int2:g64:r128+r16", None, "low-rank factors do not go with rotated matrices, such as int2:g64:r128"),
    ("int2:g64+r16:int4:g64:r64", None, "low-rank factors are dense or quantized, .* not int4:g64:r64"),
    ("lr16:int4:g64:r64", None, "factors are dense or quantized, .* not int4:g64:r64"),
    ("int4:g64:128", None, r"did you mean 'int4:g64:r128'"),
])  # fmt: skip
def test_what_cannot_be_is_a_line(text: str, shape: tuple[int, int] | None, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        parse(text).check(shape or (64, 64))
    assert "\n" not in str(caught.value)


# --- solving ----------------------------------------------------------------------------------------------------------


def hessian(k: int, dead: int = 0, seed: int = 0) -> Tensor:
    """Of tokens whose inputs differ in size and go together; the first `dead` were never seen."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * k, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    X *= torch.rand(k, generator=generator) * 2 + 0.1
    X[:, :dead] = 0
    return X.T @ X / len(X)


@pytest.fixture(scope="module")
def case(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = open_model(str(family("llama")))
    context = step_of(Quantize(), model, tmp_path_factory.mktemp("case")).context()
    return Case(model.state.graph["layers.0.attn.q"], model.state, context)


def solved(W: Tensor, H: Tensor, text: str, case: Case, **options: Any) -> tuple[Tensor, Tensor, gptq_core.Factor]:
    """The weights that `quantize` makes, the losses that it tells, and the factor of H."""
    factor, fmt = gptq_core.factor(H), parse(text)
    answer = Quantize(**options).solve(W, factor, fmt, case)
    return fmt.dequantize(answer.pack(slice(0, len(W))), torch.float32), answer.loss_n, factor


@pytest.mark.parametrize("text", ["int2:g32:r64", "lut3:g64:r128", "nf3:g64:dq8x16:r128"])
def test_a_loss_is_the_same_in_both_coordinates(case: Case, text: str) -> None:
    W, H = torch.randn(80, 128), hessian(128)
    found, loss_n, factor = solved(W, H, text, case)
    assert float(loss_n.sum()) == pytest.approx(float(gptq_core.loss(found - W, factor).sum()), rel=1e-3)
    assert float(loss_n.sum()) < 0.8 * float(gptq_core.loss(solved(W, H, text, case, method="rtn")[0] - W, factor).sum())


def test_damping_is_the_same_and_a_hessian_is_turned_once() -> None:
    f = gptq_core.factor(hessian(128), damp=0.07)
    fmt = fmt_of("int2:g32:r32")
    turned = rotated.turned_factor(f, fmt, "activation")
    assert turned.lam == pytest.approx(f.lam, rel=1e-5)
    assert rotated.turned_factor(f, fmt_of("int3:g64:r32"), "activation") is turned
    assert rotated.turned_factor(f, fmt_of("int2:g32:r64"), "activation") is not turned
    R = matrix(INPUTS, 32, 128).float()
    wanted = R.T @ hessian(128) @ R + f.lam * torch.eye(128)
    torch.testing.assert_close(turned.A_kk, wanted[turned.order_k][:, turned.order_k], rtol=0, atol=1e-4 * float(wanted.max()))


def test_a_hopeless_hessian_is_rounding_in_any_coordinates(case: Case) -> None:
    W, H = torch.randn(32, 64), torch.full((64, 64), torch.nan)
    found, _, factor = solved(W, H, "int4:g32:r64", case)
    assert factor.lam == 0
    nearest = solved(W, H, "int4:g32:r64", case, method="rtn")[0]
    assert 0.8 < float((found - W).square().sum() / (nearest - W).square().sum()) <= 1 + 1e-6


@pytest.mark.parametrize("text", ["int2:g32:r64", "lut2:g64:r128"])
def test_errors_are_not_put_where_nothing_was_seen(case: Case, text: str) -> None:
    """An input that calibration never saw is no worse than inputs are that were rounded."""
    W, dead = torch.randn(64, 128), 5
    found, _, _ = solved(W, hessian(128, dead), text, case)
    nearest, _, _ = solved(W, hessian(128, dead), text, case, method="rtn")
    off, rounding = ((Q - W)[:, :dead].square().mean() for Q in (found, nearest))
    assert float(off) < 2 * float(rounding)


@pytest.mark.parametrize("text", ["int2:g32:r64", "int3:g64:asym:r16", "nf3:g64:r128"])
def test_matrices_solved_as_one_are_those_solved_one_by_one(case: Case, text: str) -> None:
    sizes, fmt, factor = (64, 24, 31), fmt_of(text), gptq_core.factor(hessian(128))
    matrices = [torch.randn(n, 128) for n in sizes]
    together = Quantize().solve(torch.cat(matrices), factor, fmt, replace(case, outputs=sizes))
    row = 0
    for W in matrices:
        alone = Quantize().solve(W, factor, fmt, case)
        mine, its = (fmt.dequantize(a.pack(rows), torch.float32)
                     for a, rows in ((together, slice(row, row + len(W))), (alone, slice(0, len(W)))))  # fmt: skip
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
        row += len(W)


@pytest.mark.slow
def test_every_site_of_a_model_is_solved_as_it_is_alone(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, p = open_model(str(family("llama"))), Quantize(format=parse("int3:g32:r64"), drift=0.5)
    joined = attempt(p, model, tmp_path / "joined")
    monkeypatch.setattr(solver.Solver, "_together", lambda self, sites: ([s] for s in sites))
    alone = attempt(p, model, tmp_path / "alone")
    for site in model.state.graph.of_block(0):
        torch.testing.assert_close(joined.weight(site), alone.weight(site), rtol=0, atol=1e-5)


def test_a_head_in_parts_is_the_head(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """272 outputs are turned in blocks of 16, also where the first 256 of them are solved by themselves."""
    model, pins = open_model(str(family("llama"))), {"lm_head": "int4:g32:r64"}
    whole = attempt(Quantize(format=parse("bf16"), pins=pins), model, tmp_path / "whole")
    monkeypatch.setattr(solver, "TABLE", 1)
    parts = attempt(Quantize(format=parse("bf16"), pins=pins), model, tmp_path / "parts")
    site = model.state.graph["lm_head"]
    torch.testing.assert_close(parts.weight(site), whole.weight(site), rtol=0, atol=1e-5)
    off = (whole.weight(site).float() - model.state.reference(site).float()).square().mean().sqrt()
    assert 0 < float(off) < 0.2 * float(model.state.reference(site).float().std())


# --- allocation -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_rows_that_are_drawn_are_turned_in_blocks_like_all(outputs: int, rows: int) -> None:
    fmt, more = fmt_of("int4:g64:r256"), error_table.turned_alike(outputs, rows)
    assert 0 <= more < 512
    assert fmt.outputs(rows + more) == fmt.outputs(outputs)


def entries(family: Any, text: Path, folder: Path, **more: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """The error table of an allocation between a format and the same rotated."""
    formats = ["int2:g32", "int2:g32:r64"]
    path = recipe(folder, family("llama"), text, exports=False)
    allocate = {"budget": "2.6 bits", "formats": formats, "trials": 0, "also": ["lm_head"], **more}
    content = yaml.safe_load(path.read_text()) | {"passes": [{"allocate": allocate}, {"quantize": {}}]}
    path.write_text(yaml.safe_dump(content))
    pipeline.run(path)
    (table,) = (folder / "out" / "analyses").glob("tables-*/*.safetensors")
    with safe_open(table, "pt") as file:
        return {(r["site"], r["format"]): r for r in json.loads(file.metadata()["records"])}


@pytest.mark.slow
def test_the_table_of_errors_is_of_the_whole_matrix(
    family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = entries(family, text, tmp_path / "whole")
    assert {f for _, f in whole} == {"int2:g32", "int2:g32:r64"}
    assert {s for s, _ in whole} >= {"layers.0.attn.q", "layers.1.mlp.down", "lm_head"}
    monkeypatch.setattr(error_table, "DRAWN", 16)
    drawn = entries(family, text, tmp_path / "drawn")
    for key, entry in whole.items():
        for figure in ("output", "weight", "kl"):
            assert drawn[key][figure] == pytest.approx(entry[figure], rel=1e-4), key


# --- runs, artifacts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    pins = {"*.down": "lut3:g64:r128", "*.o": "nf3:g64:dq8x16:r32", "lm_head": "int4:g32:r16", "*.k": "int3:g32"}
    return bake(tmp_path_factory.mktemp("made"), family("llama"), text, "native", {"quantize": {"format": "int3:g32:r64",
                                                                                               "pins": pins}})  # fmt: skip


def test_an_artifact_proves_itself_and_multiplies_as_its_matrices_do(made: pipeline.Outcome) -> None:
    folder, proof = made.artifacts["native"]
    assert (proof.remark, proof.greedy > 0) == ("compared in fp32", True)
    multiplies_as_its_matrices_do(folder, 1e-6)


def test_a_plan_and_a_report_show_the_text(made: pipeline.Outcome) -> None:
    assert "int3:g32:r64" in (made.out / "report.md").read_text()
    assert {str(f) for f in made.state.formats.values()} >= {"int3:g32:r64", "lut3:g64:r128", "nf3:g64:dq8x16:r32"}


@pytest.mark.slow
def test_an_artifact_that_gives_an_embedding_one_is_refused(family: Any, text: Path, tmp_path: Path) -> None:
    step = {"quantize": {"format": "int4:g32", "method": "rtn", "pins": {"embed": "int4:g32"}}}
    folder = bake(tmp_path, family("llama"), text, "native", step).artifacts["native"][0]
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model.embed_tokens": "int4:g32"', '"model.embed_tokens": "int4:g32:r32"'))
    (folder / "compress.json").unlink()
    with pytest.raises(ModelError, match="looked up"):
        reader.read(folder)
    with pytest.raises(ModelError, match="looked up"):
        load(folder)


@pytest.mark.parametrize("exporter", [name for name in EXPORTERS if name != "native"])
@pytest.mark.parametrize("form", ["int4:g32:r32", "lut3:g64:r64"])
def test_other_exporters_name_native(family: Any, exporter: str, form: str) -> None:
    said = refusal(exporter, family("llama"), form)
    assert said is not None
    assert re.search(
        rf"{exporter}: 'layers.0.attn.q' has {form}, .* export native instead, or use {form[: form.rindex(':')]}", said
    )
    assert refusal("native", family("llama"), form) is None


FIRST = {"quantize": {"format": "int4:g32:r32"}}
LEARNING = {"allocate": {"budget": "3 bits", "formats": ["int2:g32:r32", "int4:g32"]}}, {"quantize": {"method": "learned"}}
RANKED = {"allocate": {"budget": "3 bits", "formats": ["int2:g32:r32"], "ranks": [0, 4]}}, {"lqlora": {}}
LOSS = {"loss": {"ce": 1.0}}


@pytest.mark.parametrize(("passes", "says"), [
    ([{"quantize": {"pins": {"embed": "int4:g32:r32"}}}], "'embed' is a token embedding, .* mixes rows: pin it to int4:g32"),
    ([{"quantize": {"format": "int4:g32:r128"}}], "blocks of 128 do not divide 64 inputs; blocks that do: r16, r32, r64"),
    ([{"quantize": {"method": "learned", "format": "int4:g32:r32"}}], "which is not learned"),
    (LEARNING, "which is not learned"),
    ([FIRST, {"lqlora": {"rank": 4}}], "low-rank factors do not go with rotated matrices, such as int4:g32:r32"),
    ([{"lqlora": {"format": "int4:g32:r32", "rank": 4}}], "low-rank factors do not go with rotated matrices"),
    (RANKED, "low-rank factors do not go with rotated matrices, such as int2:g32:r32"),
    ([{"factorize": {"rank": 0.5}}, FIRST], "give its factors a format with a grid"),
    *(([FIRST, {"distill": LOSS | train}], "int4:g32:r32, which is not trained")
      for train in ({"train": "scales"}, {"train": "all"}, {"train": "lora", "rank": 4}, {"train": "*.down"})),
])  # fmt: skip
def test_what_does_not_go_with_a_rotation_is_said_in_a_line(
    family: Any, text: Path, tmp_path: Path, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, family("llama"), text, passes, says)


@pytest.mark.slow
def test_scales_are_searched_for_a_rotated_quantizer(family: Any, text: Path, tmp_path: Path) -> None:
    done = bake(tmp_path, family("llama"), text, "native", {"smooth": {}}, {"quantize": {"format": "int3:g32:r64"}})
    assert "native" in done.artifacts


@pytest.mark.slow
def test_norms_learn_beside_rotated_matrices(family: Any, text: Path, tmp_path: Path) -> None:
    distill = {"distill": {"train": "norms", "loss": {"ce": 1.0}, "rate": 0.05, "batch": 2}}
    done = bake(tmp_path, family("llama"), text, "native", FIRST, distill)
    assert {str(f) for f in done.state.formats.values()} == {"int4:g32:r32"}
    assert "native" in done.artifacts
