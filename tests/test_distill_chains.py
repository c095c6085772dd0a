"""`distill` among other passes: what it was judged by is what the artifact is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.evaluate import compare
from compress.formats import parse
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.passes.distill import Distill
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.training.windows import halves
from tests.conftest import Project, rare
from tests.pass_laws import TEXT, attempt
from tests.test_distill import trained

INT3 = Quantize(format=parse("int3:g32"), method="rtn")  # type: ignore[arg-type]
HALF = Prune(mlp=0.5, method="magnitude", compensate=False)
WAYS: list[Any] = [
    (HALF, {"train": "all", "rate": 0.03}),
    rare(HALF, {"train": "lora", "rank": 4, "rate": 0.03}),
    rare(INT3, {"train": "all", "rate": 0.03}),
    rare(INT3, {"train": "scales"}),
    rare(INT3, {"train": ["lora", "norms"], "rank": 4}),
]


@pytest.mark.parametrize(("before", "options"), WAYS)
def test_what_was_judged_is_what_was_written(family: Any, tmp_path: Path, before: Any, options: dict[str, Any]) -> None:
    source = open_model(str(family("llama")))
    state = attempt(before, source, tmp_path / "before")
    records: list[Any] = []
    after = trained(Distill(top_k=1000, batch=4, checks=3, **options), source, state, tmp_path / "after", records)
    held = Tokens(TEXT.ids[halves(*TEXT.ids.shape)[1]], "held out")
    measured = compare(source.state, after, held)[1].kl
    curve = records[0]["curve"]
    assert measured == pytest.approx(min(point[3] for point in curve), rel=0.03)  # a teacher in fp16, activations in bf16
    assert len({point[3] for point in curve}) > 1, "something was learnt"


@pytest.mark.slow
def test_a_chain_ends_in_an_artifact(project: Project) -> None:
    """Pruned, trained, quantized, its scales trained: the artifact is proven, and a second run does nothing."""
    project.edit("passes:\n", "passes:\n  - prune: {mlp: 0.5}\n  - distill: {batch: 2}\n")
    project.edit("export:", "  - distill: {train: scales, batch: 2}\nexport:")
    result = project.run()
    assert result.code == 0, result.err
    text = (project.out / "report.md").read_text()
    assert text.count("held out, kl") == 2
    assert "class=learning" in (project.out / "report.html").read_text()
    again = project.run()
    assert again.code == 0
    assert "distill" in again.out + again.err
