"""`distill` with `scope: block`: scales learn by what blocks put out, codes stay, and a run that is stopped comes to the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import RecipeError
from compress.evaluate import compare
from compress.formats import LowRank, parse
from compress.manager import settle
from compress.model.model import open_model
from compress.passes.depth import Depth
from compress.passes.distill import Distill
from compress.passes.edit import Edit
from compress.passes.lqlora import LqLora
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.state import State
from tests.conftest import Project, covered, rare
from tests.pass_laws import TEXT, KilledError, attempt, killed_after, step_of
from tests.test_distill import trained

BLOCKS = Distill(train="scales", scope="block", batch=4, rate=3e-3, tokens=32 * 4 * 12)


def errors(records: list[Any]) -> list[tuple[float, float]]:
    """Of each block, before and after."""
    found = [re.search(r"held-out windows (\S+) -> (\S+)", r["notes"][0]) for r in records]
    return [(float(m[1]), float(m[2])) for m in found if m]


def quantized(family: Any, name: str, fmt: str, folder: Path) -> tuple[Any, State]:
    source = open_model(str(family(name)))
    format_ = parse(fmt)
    step: Any = Quantize(format=format_, method="rtn")
    if isinstance(format_, LowRank):
        step = LqLora(format=format_.base, rank=format_.rank, rounds=0)
    return source, attempt(step, source, folder)


@pytest.mark.parametrize(("name", "fmt"), [
    ("llama", "int3:g32"), rare("gemma3", "int2:g32:asym"), rare("mixtral", "int2:g32"),
    rare("gpt2", "lut3:g32"), rare("phi3", "int3:g32+r4"),
])  # fmt: skip
def test_blocks_put_out_what_the_sources_do(family: Any, tmp_path: Path, name: str, fmt: str) -> None:
    source, state = quantized(family, name, fmt, tmp_path / "q")
    records: list[Any] = []
    after = trained(BLOCKS, source, state, tmp_path / "d", records)
    found = errors(records)
    assert len(found) == len(state.graph.blocks)
    assert all(late <= early for early, late in found)
    assert any(late < early for early, late in found)
    assert after.formats == state.formats
    for site in state.formats:
        one, two = (s.codes[site].load().tensors for s in (state, after))
        scales = [n for n in one if "scale" in n]
        assert all(torch.equal(one[n], two[n]) for n in one if n not in scales)
    if name != "gemma3":  # whose toy predicts the same whatever its blocks do
        assert compare(source.state, after, TEXT)[1].kl < compare(source.state, state, TEXT)[1].kl  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["llama", "mixtral"], "llama"))
def test_a_run_that_was_killed_comes_to_the_same_bytes(family: Any, tmp_path: Path, name: str) -> None:
    source, state = quantized(family, name, "int2:g32", tmp_path / "q")
    whole = trained(BLOCKS, source, state, tmp_path / "whole")
    with killed_after(1), pytest.raises(KilledError):
        trained(BLOCKS, source, state, tmp_path / "cut")
    again = trained(BLOCKS, source, state, tmp_path / "cut")
    for site in whole.formats:
        one, two = (s.codes[site].load().tensors for s in (whole, again))
        assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.slow
def test_a_pruned_model_learns_from_the_whole_one(family: Any, tmp_path: Path) -> None:
    source = open_model(str(family("llama")))
    smaller = attempt(Prune(mlp=0.5, method="magnitude", compensate=False), source, tmp_path / "p")
    records: list[Any] = []
    p = Quantize(format=parse("int3:g32"), method="rtn")
    state = settle(p, smaller, p.run(smaller, step_of(p, source, tmp_path / "q").context()))
    trained(BLOCKS, source, state, tmp_path / "d", records)
    assert any(late < early for early, late in errors(records))


def test_layers_that_are_gone_have_none_to_learn_from(family: Any) -> None:
    source = open_model(str(family("llama", blocks=4))).state
    for p in (Depth(), Edit(drop_layers=(1,))):
        state = Quantize(format=parse("int3:g32")).foresee(p.foresee(source))
        with pytest.raises(
            RecipeError, match="layers have gone since the source's 4, and a block learns from the source's same one"
        ):
            BLOCKS.foresee(state)


@pytest.mark.parametrize(("step", "says"), [
    ({"train": "all", "scope": "block"}, "block by block scales learn; use train: scales"),
    ({"train": "scales", "scope": "block", "loss": {"js": 1.0}}, "'loss' is about the whole model"),
    ({"train": "scales", "scope": "block", "memory": {"limit": "1 GiB"}}, "'memory' is about the whole model"),
    ({"train": "scales", "scope": "block"}, "no matrix has scales that could learn"),
    ({"train": "scales", "scope": "layer"}, "'scope'"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(project: Project, step: dict[str, Any], says: str) -> None:
    assert says in project.refused(json.dumps({"distill": step}))


def test_a_run_from_a_recipe(project: Project) -> None:
    """Between `quantize` and the exporter, whose layout stays what it was."""
    before = project.plan()
    project.edit("export:", "  - distill: {train: scales, scope: block, batch: 2}\nexport:")
    planned = project.plan()
    assert planned.code == 0, planned.err
    assert "steps of 2 windows in each block" in planned.out
    size = [line for line in planned.out.splitlines() if line.startswith("compressed_tensors:")]
    assert size == [line for line in before.out.splitlines() if line.startswith("compressed_tensors:")]
    done = project.run()
    assert done.code == 0, done.err
    assert "error of the block on held-out windows" in (project.out / "report.md").read_text()
