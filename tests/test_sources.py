"""Figures of each source, where an evaluation has several: in evaluation.json, on the terminal, in report and model card."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from compress import evaluate
from compress.model import head
from compress.model.data import Tokens, Windows, read
from compress.model.model import open_model
from tests.conftest import Project, covered

TWO = "data.evaluation={sources: [{text: words.txt, weight: 3}, {text: other.txt}], sequences: 4, length: 32}"


@pytest.fixture
def two(project: Project) -> Project:
    """A project with a second text beside the first."""
    (project.folder / "other.txt").write_text("".join(chr(33 + i * i % 90) for i in range(2000)))
    return project


@pytest.mark.parametrize("piece", covered([7, 256], 256))
def test_the_figures_of_a_source_are_those_of_its_windows_alone(family: Any, monkeypatch: pytest.MonkeyPatch, piece: int):
    monkeypatch.setattr(head, "PIECE", piece)
    model, other = (open_model(str(family(name, torch.float32))) for name in ("llama", "qwen3"))
    ids = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(2))
    tokens = Tokens(ids, "a, b", (("a", 2), ("b", 3)))
    before, after = evaluate.compare(model.state, other.state, tokens)
    assert before is not None
    for i, part in enumerate((ids[:2], ids[2:])):
        alone = evaluate.compare(model.state, other.state, Tokens(part, ""))
        for whole, single in zip((before, after), alone, strict=True):
            assert single is not None
            own = whole.sources[i]
            assert (own.source, own.tokens, own.length, own.sources) == ("ab"[i], single.tokens, 24, ())
            assert own.perplexity == pytest.approx(single.perplexity, rel=1e-5)
            if whole is before:
                assert own.kl is own.agreement is None
            else:
                assert (own.kl, own.agreement) == pytest.approx((single.kl, single.agreement), rel=1e-5)
    assert after.kl == pytest.approx(sum(s.kl * s.tokens for s in after.sources) / after.tokens)  # type: ignore[operator, misc]
    assert after.tokens == sum(s.tokens for s in after.sources)


@pytest.mark.slow
def test_one_source_has_no_rows_of_its_own(two: Project):
    sources: Any = ({"text": "words.txt", "weight": 1e9}, {"text": "other.txt", "weight": 1e-3})
    got = read(Windows(sources=sources, sequences=4, length=32), two.model, two.folder, 272)
    assert got.sources == ()
    assert two.run().code == 0
    assert "sources" not in (two.out / "evaluation.json").read_text()


def test_a_run_names_the_figures_of_each_source(two: Project):
    done = two.run(TWO)
    assert done.code == 0, done.err
    noted = json.loads((two.out / "evaluation.json").read_text())
    for scores in (noted["original"], noted["compressed"]):
        assert [(s["source"], s["tokens"]) for s in scores["sources"]] == [("words.txt", 93), ("other.txt", 31)]
    texts = [
        done.out,
        *(path.read_text() for path in (two.out / "report.md", two.out / "report.html", two.artifact / "README.md")),
    ]
    for text in texts:
        for score in noted["compressed"]["sources"]:
            assert score["source"] in text
            assert f"{score['kl']:.5f}" in text
            assert f"{score['perplexity']:.4f}" in text
    before = (two.out / "evaluation.json").stat().st_mtime_ns
    assert two.run(TWO).code == 0
    assert (two.out / "evaluation.json").stat().st_mtime_ns == before, "measured once"


@pytest.mark.slow
def test_the_same_windows_of_other_sources_are_measured_anew(two: Project):
    (two.folder / "other.txt").write_text(two.text.read_text()[96:])
    one = "data.evaluation={text: words.txt, sequences: 4, length: 32}"
    assert two.run(one).code == 0
    assert two.run(TWO).code == 0
    assert len(json.loads((two.out / "evaluation.json").read_text())["compressed"]["sources"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda s: s["compressed"].pop("sources"), lambda s: s["original"]["sources"].reverse(),
                                    lambda s: s["compressed"]["sources"][0].pop("kl")])  # fmt: skip
def test_damaged_figures_of_a_source_are_measured_again(two: Project, damage: Any):
    assert two.run(TWO).code == 0
    file = two.out / "evaluation.json"
    noted = json.loads(file.read_text())
    broken = json.loads(file.read_text())
    damage(broken)
    file.write_text(json.dumps(broken))
    assert two.run(TWO).code == 0
    assert json.loads(file.read_text()) == noted


@pytest.mark.slow
def test_eval_names_them_too(two: Project):
    assert two.run(TWO).code == 0
    noted = json.loads((two.out / "evaluation.json").read_text())["compressed"]["sources"]
    said = json.loads(two("eval", two.out, "--json").out)["sources"]
    assert [s["source"] for s in said] == [str(two.text), str(two.folder / "other.txt")]
    assert [s["kl"] for s in said] == pytest.approx([s["kl"] for s in noted], rel=1e-5)
    shown = two("eval", two.out).out
    assert all(f"{s['kl']:.4f}"[:-1] in shown and s["source"] in shown for s in said)
    assert "original's perplexity" not in shown
