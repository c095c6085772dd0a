"""The pass `lqlora` in a run: what it stores is what it solved, with and without an allocation, and it is worth its bytes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.formats import LowRank, parse
from compress.formats.grid import restore
from compress.manager import Pass
from compress.model.model import open_model
from compress.passes import gptq_core, lqlora_core
from compress.passes.factorize import Factorize
from compress.passes.lqlora import LqLora
from compress.passes.quantize import Quantize
from compress.passes.solver import Case
from compress.passes.walk import Walk
from compress.state import State
from tests.conftest import Project
from tests.cooking import stories
from tests.pass_laws import attempt, step_of

EVERY_RANK = {"pins": {"*.down": "int3:g32+r8:int8:channel", "*.up": "lut2:g64+r4", "*.o": "nf3:g32:dq8x16+r4:nf8:g64"}}


def error(before: State, after: State) -> float:
    """The squared error of all matrices."""
    return sum(float((before.reference(s).float() - after.weight(s).float()).square().sum()) for s in before.graph.linear)


@pytest.mark.slow
def test_every_combination_of_formats_is_stored_as_it_was_solved(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama")))
    after = attempt(
        LqLora.model_validate({"format": "int4:g32", "rank": 4, "rounds": 1, **EVERY_RANK}), model, tmp_path / "steps"
    )
    for site in model.graph.linear:
        fmt = after.codes[site.name].format
        assert isinstance(fmt, LowRank)
        packed = after.codes[site.name].load()
        A, B = fmt.factor_matrices(packed.tensors)
        assert A.shape == (fmt.rank, site.shape[1])
        assert B.shape == (site.shape[0], fmt.rank)
        base = fmt.base.dequantize(packed.tensors, torch.float32)
        torch.testing.assert_close(after.weight(site).float(), (base + B @ A), rtol=1e-2, atol=1e-2)
        assert packed.nbytes == fmt.nbytes(site.shape)


@pytest.mark.slow
def test_a_correction_lowers_the_error_that_is_reported(family: Any, tmp_path: Path) -> None:
    """The recorded error of every matrix falls with the rank, and is that of the stored weights."""
    model = open_model(str(family("llama")))
    errors = {}
    for rank in (8, 24):
        state = attempt(
            LqLora.model_validate({"format": "int2:g32", "rank": rank, "drift": 0}), model, tmp_path / str(rank) / "steps"
        )
        errors[rank] = error(model.state, state)
    plain = attempt(Quantize.model_validate({"format": "int2:g32", "drift": 0}), model, tmp_path / "plain" / "steps")
    assert errors[24] < errors[8] < error(model.state, plain)


@pytest.mark.slow
def test_init_paper_is_seeded_and_needs_no_data(project: Project) -> None:
    text = project.recipe.read_text()
    start, end = text.index("  - quantize:"), text.index("export:")
    lq = '  - lqlora: {init: paper, method: rtn, clip: minmax, format: "int3:g32", rank: 4, pins: {"*.down": bf16}}\n'
    project.recipe.write_text(text[:start] + lq + "export: []\n")
    project.edit("  calibration: {text: words.txt, sequences: 8, length: 32}\n", "")
    assert project.run().code == 0
    again = project.run(out=project.folder / "again")
    assert again.code == 0
    first, second = (sorted(p.rglob("steps/*/block-*.safetensors")) for p in (project.out, project.folder / "again"))
    for one, other in zip(first, second, strict=True):
        ours, theirs = load_file(one), load_file(other)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert project.run("lqlora.fisher=true").line.endswith("'fisher' needs data.calibration; add it, or leave it out")
    closed = project.run("lqlora.init=closed_form")
    assert closed.line.endswith("'closed_form' needs data.calibration; add it, or use init: paper and method: rtn")
    assert "'fisher' is an option of init: paper" in project.run("lqlora.init=closed_form", "lqlora.fisher=true").line
    assert end > start


@pytest.mark.slow
def test_zero_blocks_and_pruned_rows_are_handled(family: Any, tmp_path: Path) -> None:
    """A matrix with pruned rows and blocks of zeros goes through both ways, and zero rows stay near zero."""
    source = tmp_path / "model"
    shutil.copytree(family("llama"), source)
    tensors = load_file(source / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        tensors[name][:16] = 0
        tensors[name][:, 32:64] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = open_model(str(source))
    for i, options in enumerate(({"init": "paper", "clip": "minmax", "fisher": True}, {"init": "closed_form"})):
        p = LqLora.model_validate({"format": "nf3:g32:dq8x16", "rank": 4, **options})
        after = attempt(p, model, tmp_path / str(i) / "steps")
        up = after.weight(model.graph["layers.0.mlp.up"])
        assert up.isfinite().all()
        assert up[:16].abs().max() < 0.2 * up[16:].abs().max()
        assert after.weight(model.graph["layers.0.attn.v"]).abs().max() < 1e-6


BOUGHT = """\
  - allocate:
      budget: 4.6 bits
      formats: ["int2:g32", "int4:g64"]
      ranks: [0, 8]
      factors: "int8:channel"
      trials: 1
      probe: 64
"""


def bought(project: Project, behind: str) -> dict[str, str]:
    """Run an allocation that may buy ranks, with the passes `behind` it; site -> stored format."""
    text = project.recipe.read_text()
    start = text.index("  - quantize:")
    project.recipe.write_text(text[:start] + BOUGHT + behind + "export: []\n")
    made = compress.run_recipe(project.recipe)
    assert {n: s.format for n, s in made.state.codes.items()} == dict(made.state.plan.formats)
    assert made.report.after.linear_bits <= 4.6
    return {n: str(f) for n, f in made.state.plan.formats.items()}


@pytest.mark.slow
@pytest.mark.parametrize("behind", ["  - lqlora: {}\n", "  - quantize: {}\n  - lqlora: {rounds: 1}\n"])
def test_ranks_are_bought_from_the_same_budget_and_used(project: Project, behind: str) -> None:
    formats = bought(project, behind)
    assert any(re.search(r"\+r8:int8:channel", f) for f in formats.values()), formats
    fused = [[formats[s.name].partition("+")[0] for s in g] for g in open_model(str(project.model)).graph.fused()]
    assert all(len(set(bases)) == 1 for bases in fused), "one base for what engines fuse; ranks may differ"
    resolved = project("run", project.out / "recipe.resolved.yaml", "--out", project.out)
    assert resolved.code == 0, "defaults written out are no choices of the user's"
    assert resolved.out.count("(finished before)") == 1 + behind.count("- ")


# --- on a real model --------------------------------------------------------------------------------------------------


def measured(assets: Path, folder: Path, passes: list[dict[str, Any]]) -> float:
    kl: float = stories(assets, folder, passes, 16, 24, 64).scores["compressed"]["kl"]
    return kl


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["nf2:g32:dq2x64", "nf3:g64:dq3x256"])
def test_the_paper_beats_plain_normal_floats_and_the_closed_form_beats_the_paper(assets: Path, tmp_path: Path, fmt: str) -> None:
    """At equal bits of the quantized part, as the paper counts."""
    plain = measured(assets, tmp_path, [{"quantize": {"format": fmt, "method": "rtn", "clip": "minmax"}}])
    paper = measured(assets, tmp_path, [{"lqlora": {"format": fmt, "rank": 2, "init": "paper", "clip": "minmax"}}])
    closed = measured(assets, tmp_path, [{"lqlora": {"format": fmt, "rank": 2}}])
    assert closed < paper < plain


def test_the_text_form_of_what_is_planned_round_trips() -> None:
    p = LqLora.model_validate({"format": "nf3:g64:dq8x256", "rank": 64, "factors": "nf8:g64:dq8x256:fp32"})
    assert str(p.default) == "nf3:g64:dq8x256+r64:nf8:g64:dq8x256:fp32"
    assert parse(str(p.default)) == p.default


def test_behind_quantize_every_quantized_matrix_is_corrected(project: Project) -> None:
    project.edit(
        "export:\n  - compressed_tensors: {}\n", '  - lqlora: {rank: 4, factors: "int8:channel", rounds: 0}\nexport: []\n'
    )
    made = compress.run_recipe(project.recipe)
    formats = {n: str(f) for n, f in made.state.plan.formats.items()}
    assert formats.pop("lm_head") == "int8:g32"
    assert set(formats.values()) == {"int4:g32+r4:int8:channel"}
    assert {n: s.format for n, s in made.state.codes.items()} == dict(made.state.plan.formats)
    assert "leave 'format' out of 'lqlora'" in project.run("lqlora.format=int3:g32").line
    assert "the rank is above 32" in project.run("lqlora.rank=40").line


def test_ranks_are_planned_or_given_not_both(project: Project) -> None:
    text = project.recipe.read_text()
    project.recipe.write_text(text[: text.index("  - quantize:")] + BOUGHT + "  - lqlora: {rank: 4}\nexport: []\n")
    assert "an earlier step plans the formats; leave 'rank' out of 'lqlora' and say it there" in project.plan().line


@pytest.mark.parametrize(("first", "then"), [
    (Quantize(format=parse("int2:g32")), LqLora(rank=4, rounds=0)), (Factorize(rank=16), Quantize(format=parse("int4:channel"))),
], ids=["lqlora", "quantize"])  # fmt: skip
def test_behind_a_pass_that_encodes_the_twin_is_the_original(
    project: Project, monkeypatch: pytest.MonkeyPatch, first: Pass, then: Pass
) -> None:
    """The drift that is corrected is that from the unquantized model, also where an earlier step has encoded it."""
    seen: list[State] = []
    twin_of = Walk.twin

    def watching(self: Walk, state: State) -> Any:
        found = twin_of(self, state)
        assert found is not None
        seen.append(found.state)
        return found

    model = open_model(str(project.model))
    encoded = attempt(first, model, project.folder / "a" / "steps")
    step = step_of(then, model, project.folder / "b" / "steps")
    monkeypatch.setattr(Walk, "twin", watching)
    then.run(encoded, step.context())
    assert not seen[0].codes
    assert encoded.codes


def test_one_eigenproblem_serves_all_ranks_of_a_trial(family: Any, tmp_path: Path) -> None:
    """What the allocator measures for each rank is the tail of one spectrum: the closed form of that rank, without rounds."""
    model = open_model(str(family("llama")))
    site = model.graph["layers.0.mlp.up"]
    W = model.state.reference(site).float()
    X = torch.randn(512, W.shape[1], generator=torch.Generator().manual_seed(0)) @ torch.randn(W.shape[1], W.shape[1])
    f = gptq_core.factor(X.T @ X / len(X))
    p = LqLora()
    case = Case(site, model.state, step_of(p, model, tmp_path).context())
    formats = [parse(f"int2:g32+r{rank}") for rank in (2, 16, 8)]
    found = {fmt: float(gptq_core.loss(made - W, f).sum()) for fmt, made in p.tries(W, f, [parse("int2:g32"), *formats], case)}
    base = gptq_core.quantize(W, f, parse("int2:g32"))  # type: ignore[arg-type]
    tails = lqlora_core.rank_losses(W - restore(base.codes, base.grid, parse("int2:g32")), f)  # type: ignore[arg-type]
    assert found[parse("int2:g32")] == pytest.approx(float(tails[0]), rel=1e-3)
    for fmt in formats:
        assert found[fmt] == pytest.approx(float(tails[fmt.rank]), rel=0.02)  # type: ignore[union-attr]  # factors in bf16
