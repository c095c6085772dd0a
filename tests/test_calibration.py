"""Calibration windows that are chosen by activations or sampled from the model: which they are, and that they stay the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import calibration, pipeline, sampling
from compress.export.artifact.engines import dense
from compress.model import data, selection
from compress.model.data import Generate, Tokens
from compress.model.model import open_model
from compress.prepare import Prepared, prepare
from compress.report.console import Console
from compress.run import Parts, RunFolder
from tests.conftest import Project, covered, rare

SELECT = ("data.calibration.select=activations", "data.calibration.pool=4")
SAMPLE = "data.calibration={generate: {}, sequences: 20, length: 16}"
QUIET = Console(quiet=True)


def settled(project: Project, *sets: str, out: Path | None = None) -> Prepared:
    with RunFolder(out or project.out).held() as folder:
        return calibration.settled(prepare(project.recipe, sets), folder.path, "cpu", QUIET)


def windows(ready: Prepared) -> Tensor:
    assert ready.calibration is not None
    return ready.calibration.ids


def rows(ids: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in ids.tolist()]


# --- which windows ----------------------------------------------------------------------------------------------------


def test_the_chosen_windows_are_some_of_the_pool_in_its_order(project: Project):
    ready = settled(project, *SELECT)
    assert ready.pool is not None
    pool, got = rows(ready.pool.ids), rows(windows(ready))
    assert (len(pool), len(got)) == (32, 8)
    places = [pool.index(row) for row in got]
    assert places == sorted(set(places))
    assert places != list(range(8))


def test_the_choice_is_the_same_every_time_and_however_the_pool_is_batched(project: Project, monkeypatch: pytest.MonkeyPatch):
    one = windows(settled(project, *SELECT))
    again = windows(settled(project, *SELECT, out=project.folder / "again"))
    split = Tokens.batches
    monkeypatch.setattr(Tokens, "batches", lambda self, tokens=100: split(self, tokens))
    assert len(Tokens(one, "").batches()) > 1
    batched = windows(settled(project, *SELECT, out=project.folder / "batched"))
    assert torch.equal(one, again)
    assert torch.equal(one, batched)


def test_a_pool_of_one_is_the_first_windows_and_asks_the_model_for_nothing(project: Project):
    first = prepare(project.recipe)
    one = prepare(project.recipe, ["data.calibration.select=activations", "data.calibration.pool=1"])
    assert one.settled
    assert torch.equal(windows(one), windows(first))


@pytest.mark.parametrize("count", [1, 3, 8, 12])
def test_as_many_windows_as_asked_even_of_equal_ones(count: int):
    """Where fewer differ than are asked for, equal ones fill up, the first of them first."""
    found = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).repeat(3, 1)
    got = selection.chosen(found, count, 0)
    assert got == sorted(set(got))
    assert len(got) == count
    assert count > 4 or max(got) < 4, "of equal ones the first"


def test_a_kind_that_is_rare_in_the_pool_is_among_the_chosen():
    """Nine windows of one kind to one of another; and of many kinds, each gives one."""
    noise = torch.randn(80, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rare = noise + 50.0 * (torch.arange(80) % 10 == 9)[:, None]
    for seed in range(5):
        assert any(i % 10 == 9 for i in selection.chosen(rare, 10, seed))
    kinds = noise * 0.01 + 10.0 * torch.eye(8, dtype=torch.float64).repeat(10, 1)
    assert sorted(i % 8 for i in selection.chosen(kinds, 8, 0)) == list(range(8))


def test_no_block_is_run_that_is_not_looked_at(family: Any, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    advance = selection.Stream.advance
    monkeypatch.setattr(
        selection.Stream, "advance", lambda self, s, index, b: (seen.append(index), advance(self, s, index, b))[1]
    )
    state = open_model(str(family("llama", blocks=8))).state
    found = selection.statistics(state, torch.arange(64).view(4, 16), "cpu", 0)
    assert seen == list(range(6))
    assert found.shape == (4, 3 * 2 * selection.NUMBERS)


def test_each_source_is_told_how_many_it_gave():
    pool = Tokens(torch.arange(20).view(10, 2), "a, b, c", (("a", 5), ("b", 3), ("c", 2)))
    got = calibration.picked(pool, [0, 4, 5, 9])
    assert got.sources == (("a", 2), ("b", 1), ("c", 1))
    assert got.ids.tolist() == [[0, 1], [8, 9], [10, 11], [18, 19]]


# --- sampled windows --------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(family: Any) -> Callable[..., Tensor]:
    """sampled(prompts, first, **options) -> windows of 12 tokens of a tiny llama."""
    model = open_model(str(family("llama", torch.float32)))
    engine = dense(model, "cpu")

    def get(prompts: Tensor, first: int = 0, seed: int = 0, vocabulary: tuple[int, ...] | None = None, **options: Any) -> Tensor:
        return sampling.Sampler(Generate(**options), 12, seed, vocabulary).window(engine, prompts, first, lambda at: None)

    return get


def test_a_window_is_its_own_whatever_is_sampled_beside_it(sampled: Callable[..., Tensor]):
    prompts = torch.tensor([[256], [256], [7]])
    together = sampled(prompts)
    assert torch.equal(together[1:], sampled(prompts[1:], first=1))
    assert len({tuple(row) for row in together.tolist()}) == 3
    assert not torch.equal(together, sampled(prompts, seed=1))


def test_windows_begin_with_their_prompts(sampled: Callable[..., Tensor]):
    prompts = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    got = sampled(prompts)
    assert torch.equal(got[:, :4], prompts)
    assert got.shape == (2, 12)


def test_without_temperature_a_window_is_the_greedy_text(sampled: Callable[..., Tensor], family: Any):
    """Nearly none, so that what is drawn is the likeliest: it is what whole windows say, through no cache."""
    got = sampled(torch.tensor([[5, 6], [8, 9]]), temperature=(1e-4, 1e-4))
    logits, _ = dense(open_model(str(family("llama", torch.float32))), "cpu").prefill(got)
    assert torch.equal(got[:, 2:], logits[:, 1:-1].argmax(-1))


def test_tokens_are_drawn_as_often_as_the_model_says():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    shares = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sampling.Sampler(Generate(), 2, 0).drawn(logits, 99, shares).bincount(minlength=3) / 20_000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.015)


def test_the_temperature_falls_over_the_first_tokens_and_then_stays():
    sampler = sampling.Sampler(Generate(temperature=(2.0, 1.0), first=4), 9, 0)
    assert [sampler.temperature(i) for i in range(6)] == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]


def test_only_tokens_that_are_left_are_drawn(sampled: Callable[..., Tensor]):
    got = sampled(torch.tensor([[256]] * 4), vocabulary=(3, 5, 256), temperature=(50.0, 50.0))
    assert set(got[:, 1:].flatten().tolist()) == {3, 5, 256}


@pytest.mark.parametrize("bos", covered([False, True], True))
def test_sampled_windows_have_their_length_and_begin_as_windows_of_a_text_do(project: Project, bos: bool):
    got = windows(settled(project, SAMPLE, f"data.calibration.bos={str(bos).lower()}"))
    assert got.shape == (20, 16)
    assert bool((got[:, 0] == 256).all()) == bos
    assert len(set(rows(got))) > 15


@pytest.mark.slow
def test_prompts_are_pieces_of_the_text(project: Project, family: Any):
    sets = [SAMPLE, "data.calibration.generate={prompts: {text: words.txt, tokens: 5}}", "data.calibration.bos=true"]
    got = windows(settled(project, *sets))
    said = data.read(data.Windows(text="words.txt", sequences=20, length=5), project.model, project.folder, 272)
    assert torch.equal(got[:, 1:6], said.ids)
    assert (got[:, 0] == 256).all()


@pytest.mark.slow
@pytest.mark.parametrize("sets", [SELECT, (SAMPLE,)], ids=["select", "generate"])
def test_windows_of_a_cut_vocabulary_are_made_of_its_tokens(project: Project, sets: tuple[str, ...]):
    kept = sorted({*project.text.read_bytes(), *range(100)})
    (project.folder / "keep.txt").write_text("\n".join(map(str, kept)))
    steps = f"passes=[{{edit: {{vocab: {project.folder}/keep.txt}}}}, {{quantize: {{format: 'int4:g32'}}}}]"
    ready = settled(project, *sets, steps)
    assert ready.foreseen.vocabulary is not None
    assert len(ready.foreseen.vocabulary) < 272
    assert set(windows(ready).flatten().tolist()) <= set(ready.foreseen.vocabulary)
    assert project.run(*sets, steps).code == 0


@pytest.mark.parametrize("name", covered(["gpt2", "opt", "gemma3", "mixtral"], "opt"))
def test_every_family_can_be_sampled_from(project: Project, family: Any, name: str):
    shutil.rmtree(project.model)
    shutil.copytree(family(name), project.model)
    assert windows(settled(project, SAMPLE, "data.calibration.sequences=2", "export=[]")).shape == (2, 16)


# --- kept in the run folder, and in keys ------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of models meanwhile: sweeps over a pool, and models loaded whole."""
    found: list[str] = []
    sweep, load = selection.statistics, sampling.dense
    monkeypatch.setattr(selection, "statistics", lambda *a: (found.append("sweep"), sweep(*a))[1])
    monkeypatch.setattr(sampling, "dense", lambda *a: (found.append("load"), load(*a))[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sets", [SELECT, (SAMPLE,)], ids=["select", "generate"])
def test_a_second_run_and_another_budget_ask_the_model_nothing(project: Project, asked: list[str], sets: tuple[str, ...]):
    assert project.run(*sets).code == 0
    assert asked
    hashes = json.loads((project.out / "run.json").read_text())["data"]
    asked.clear()
    again = project.run(*sets)
    assert "finished before" in again.out
    assert project.run(*sets, "quantize.format=int3:g32").code == 0
    assert "cached" in project.plan(*sets, "quantize.format=int3:g32").out
    assert asked == []
    assert json.loads((project.out / "run.json").read_text())["data"] == hashes


@pytest.mark.parametrize("sets", [SELECT, rare((SAMPLE,))], ids=["select", "generate"])
def test_a_run_that_was_stopped_goes_on_where_it_was(
    project: Project, asked: list[str], sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """Stopped behind each part in turn: what is finished is not asked for again, and the windows are those of a run in one go."""
    whole = windows(settled(project, *sets, out=project.folder / "whole"))
    parts, commit = len(list(project.folder.glob("whole/analyses/*/*"))), Parts.commit

    def stopping(self: Parts, *a: Any, **k: Any) -> Any:
        commit(self, *a, **k)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "commit", stopping)
    for done in range(1, parts):
        with pytest.raises(KeyboardInterrupt):
            settled(project, *sets)
        assert len(list(project.out.glob("analyses/*/*"))) == done
    monkeypatch.setattr(Parts, "commit", commit)
    asked.clear()
    assert torch.equal(windows(settled(project, *sets)), whole)
    assert len(asked) <= 1


def key(project: Project, *sets: str) -> str:
    ready = settled(project, *sets)
    step = pipeline.make_steps(ready, project.out, "cpu")[0]
    assert step is not None
    return step.key


@pytest.mark.slow
def test_the_key_of_a_step_tells_how_its_windows_were_found(project: Project):
    keys = [key(project), key(project, *SELECT), key(project, SELECT[0], "data.calibration.pool=5"), key(project, SAMPLE),
            key(project, SAMPLE, "seed=1"), key(project, SAMPLE, "data.calibration.generate={temperature: [2, 1]}")]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_windows_that_belong_to_other_weights_are_not_taken(project: Project, family: Any, asked: list[str]):
    settled(project, *SELECT)
    shutil.rmtree(project.model)
    shutil.copytree(family("qwen3"), project.model)
    asked.clear()
    settled(project, *SELECT)
    assert asked


@pytest.mark.slow
def test_a_damaged_part_is_one_line(project: Project):
    assert project.run(*SELECT).code == 0
    (file,) = project.out.glob("analyses/windows-*/chosen.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert project.run(*SELECT).line.startswith(f"{file}: is damaged")


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sets", "stage"), [(SELECT, "select"), ((SAMPLE,), "generate")])
def test_plan_counts_them_and_asks_the_model_nothing(project: Project, asked: list[str], sets: tuple[str, ...], stage: str):
    costs = calibration.costs(prepare(project.recipe, sets).recipe.document.data.calibration, prepare(project.recipe).start)
    assert list(costs) == [stage]
    assert costs[stage].model_flops > 0
    assert costs[stage].peak_bytes > 0
    plan = project.plan(*sets)
    assert re.search(r"quantize .* to do", plan.out)
    assert asked == []
    assert not project.out.exists()
    assert pipeline.plan(project.recipe, sets).seconds > pipeline.plan(project.recipe).seconds


def test_a_larger_pool_takes_longer_and_no_more_memory(project: Project):
    def of(pool: int) -> Any:
        ready = prepare(project.recipe, [SELECT[0], f"data.calibration.pool={pool}"])
        return calibration.costs(ready.recipe.document.data.calibration, ready.start)["select"]

    assert of(20).model_flops == pytest.approx(10 * of(2).model_flops)
    assert of(20).peak_bytes == of(2).peak_bytes


@pytest.mark.parametrize("sets", [SELECT, (SAMPLE,)], ids=["select", "generate"])
def test_plan_of_a_config_alone(project: Project, sets: tuple[str, ...]):
    for file in project.model.glob("*.safetensors"):
        file.unlink()
    plan = project.plan(*sets)
    assert plan.code == 0, plan.err
    assert "holds no weights" in plan.out


@pytest.mark.slow
def test_plan_finds_the_windows_that_an_allocation_measures_on(project: Project, asked: list[str]):
    sets = [*SELECT, "passes=[{allocate: {budget: 4.0 bits, formats: ['int3:g32', 'int8:g32']}}, {quantize: {}}]"]
    assert "to do" in project("plan", project.recipe, "--no-measure", *(x for s in sets for x in ("--set", s))).out
    assert asked == []
    assert "cached" in project.plan(*sets).out
    assert asked
    asked.clear()
    assert project.run(*sets, "allocate.budget=5.0 bits").code == 0
    assert asked == []


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ([SELECT[0], "data.calibration.pool=0"], "'pool' must be greater than or equal to 1, not '0'"),
        (["data.calibration.pool=4"], "pool is for select: activations"),
        (["data.calibration.select=nearest"], "'select' is 'first' or 'activations', not 'nearest'"),
        (["data.calibration.generate={}"], "generate samples text from the model; leave out text"),
        ([SAMPLE, "data.calibration.select=activations"], "select chooses among windows of a text"),
        ([SAMPLE, "data.calibration.generate={temperature: [0, 1]}"], "must be greater than 0, not '0'"),
        ([SAMPLE, "data.calibration.generate={temperature: 1}"], "'temperature' needs a list, not '1'"),
        ([SAMPLE, "data.calibration.generate={first: 0}"], "'first' must be greater than 0, not '0'"),
        ([SAMPLE, "data.calibration.generate={prompts: {}}"], "prompts need text, jsonl or dataset"),
        ([SAMPLE, "data.calibration.generate={prompts: {text: words.txt, tokens: 16}}"], "prompts of 16 tokens fill"),
        ([SAMPLE, "data.calibration.generate={prompts: {text: none.txt}}"], "No such file or directory"),
        (["data.evaluation.select=activations"], "'evaluation' has no option 'select'"),
        (["data.calibration.select=activations", "data.calibration.pool=9999"], "windows of 32 need 2,559,744; give more text"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_line(project: Project, sets: list[str], expected: str):
    for result in (project.plan(*sets), project.run(*sets)):
        assert expected in result.line
    assert not project.out.exists()


def test_a_model_that_predicts_no_next_token_is_not_sampled_from(project: Project, family: Any):
    shutil.rmtree(project.model)
    shutil.copytree(family("roberta"), project.model)
    assert "generate: the model does not predict the next token" in project.plan(SAMPLE, "export=[]").line


@pytest.mark.slow
def test_a_tokenizer_without_a_beginning_needs_prompts(project: Project):
    file = project.model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}))
    assert "has no begin-of-text token to begin with; name a text under prompts" in project.plan(SAMPLE).line
    assert project.plan(SAMPLE, "data.calibration.generate={prompts: {text: words.txt}}").code == 0


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(project: Project, monkeypatch: pytest.MonkeyPatch, asked: list[str]):
    has = sampling.psutil.virtual_memory()
    monkeypatch.setattr(sampling.psutil, "virtual_memory", lambda: has._replace(available=1000))
    line = project.run(SAMPLE).line
    assert "generate: holds the whole model in memory" in line
    assert "; give a text" in line
    assert asked == []


def test_the_resolved_recipe_says_the_same(project: Project):
    for sets in (SELECT, (SAMPLE,)):
        ready = prepare(project.recipe, sets)
        again = project.folder / "again.yaml"
        again.write_text(ready.recipe.resolved(project.folder))
        one, other = (r.recipe.document.data.calibration for r in (ready, prepare(again)))
        assert one is not None
        assert other == one.model_copy(update={"text": str(project.folder / one.text)} if one.text else {})
