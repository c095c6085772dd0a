"""What trainings in little memory are foretold to take, against what they do; which is chosen, and what is refused."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import RecipeError
from compress.formats import parse
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.passes.distill import Distill
from compress.passes.quantize import Quantize
from compress.state import State
from compress.training import loss, memory, settings
from compress.training.choice import choose, learnt
from compress.training.loop import Schedule, Training
from compress.training.options import ACTIVATIONS, OPTIMIZERS, Memory
from compress.training.student import Student
from compress.training.teacher import Look, Streamed, most_likely
from tests.conftest import GROUPED, IDS, SMALL, Project, covered, make_model
from tests.pass_laws import attempt
from tests.test_distill import trained
from tests.test_memory_ways import CASES, state_of, training

LAYERS = 2


@pytest.mark.parametrize("case", covered(CASES, "weights"))
def test_what_learns_is_known_before(family: Any, tmp_path: Path, case: str) -> None:
    """Names, shapes and blocks, and so the bytes that optimizers hold of it."""
    step, words, rank = CASES[case]
    source = open_model(str(family("llama", torch.float32)))
    state = source.state if step is None else attempt(step, source, tmp_path)
    choice = choose(state, words, rank)
    student = Student(state, choice, 0)
    what = learnt(state, choice)
    assert {one.name: one.shape for one in what} == {n: tuple(p.shape) for n, p in student.learns.items()}
    assert all((one.block is not None) == ("layers." in one.name) for one in what)
    for by in ("adamw", "adamw8bit", "adafactor", "adalomo", *(["galore"] if case in ("weights", "codes") else [])):
        one = training(state, Memory(optimizer=by), words, rank)
        one.step(0)
        held = sum(t.nbytes for kept in one.optimizer.state.values() for t in kept.values())
        assert memory.optimizer(what, memory.Setting(Memory(optimizer=by), "cached", 4, 32)) == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("part", ["cached", *sorted(loss.DIVERGENCES), "ce"])
@pytest.mark.parametrize("forward", [False, True])
def test_what_a_loss_holds_of_logits_is_foretold(part: str, forward: bool) -> None:
    """By the allocator's own count, all rows at once."""
    n, size = 16, 8192
    h, W = torch.randn(n, 4), torch.nn.Parameter(torch.randn(size, 4))
    log_p = torch.randn(n, size).log_softmax(-1)
    known = loss.Known(*log_p.topk(8, -1)) if part == "cached" else loss.Known(log_p)
    name = "kl" if part == "cached" else part
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        loss.behind(lambda rows, _: rows @ W.T, h, known, torch.zeros(n, dtype=torch.int64), {name: 1.0}, size, not forward)
    whole = 0 if part in ("cached", "ce") else 1  # the teacher's, which were there before
    way = memory.Setting(Memory(gradients="zeroth_order" if forward else "kept"), "cached" if part == "cached" else "live", 1, n,
                         loss=(name,))  # fmt: skip
    assert most(seen) / (4 * n * size) + whole <= 1.02 * memory.wide(way)
    if not forward:
        assert most(seen) / (4 * n * size) + whole >= 0.9 * memory.wide(way)


class Numbers:
    """A teacher that finds the same tokens likeliest, whatever it sees."""

    @contextmanager
    def look(self, numbers: Sequence[int]) -> Iterator[Look]:
        def known(rows: slice) -> loss.Known:
            n = rows.stop - rows.start
            return loss.Known(torch.full((n, 16), -5.0), torch.arange(16)[None].repeat(n, 1))

        yield Look(known)  # type: ignore[arg-type]


PRICED: list[dict[str, Any]] = [
    {}, {"activations": "kept"}, {"optimizer": "adalomo", "gradients": "fused"}, {"optimizer": "galore", "activations": "velora"},
    {"optimizer": "adamw8bit", "gradients": "fused", "activations": "int8"}, {"optimizer": "lomo"}, {"gradients": "zeroth_order"},
    {"optimizer": {"block": {"select": "cyclic"}}, "gradients": "fused"}, {"activations": ["checkpoint", "int8"]},
    {"optimizer": "adafactor", "activations": "offload"}, {"activations": "wta_crs"},
]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A model large enough that what is of a fixed size is little beside it; in fp32, whose parameters are the file's pages."""
    sizes = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2048}
    folder = make_model(tmp_path_factory.mktemp("wide") / "m", transformers.LlamaConfig(**sizes, **GROUPED, **IDS), torch.float32)
    return open_model(str(folder)).state


@pytest.mark.slow
@pytest.mark.parametrize("number", covered(range(len(PRICED)), 0), ids=lambda n: str(PRICED[n]))
def test_the_peak_of_a_training_is_foretold(wide: State, number: int) -> None:
    """Within a tenth of what torch's allocator counts."""
    p, choice = Distill(batch=4, memory=PRICED[number]), choose(wide, ("all",), None)
    ids = torch.randint(0, 2048, (4, 64))
    setting_, split = settings.settled(wide, choice, p.setting(64))
    gc.collect()  # what earlier tests left and goes meanwhile would be taken off
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        student = Student(wide, choice, 0, keeps=setting_.memory.keeps)
        one = Training(student, Numbers(), Tokens(ids, "numbers"), range(4), [0], {"kl": 1.0}, Schedule(2, 4, 1.0, 0, 1),
                       *p.moving(wide, student, setting_.memory, 0), 0, lambda *_: None)  # fmt: skip
        for step in range(2):
            one.step(step)
    assert split.parameters + most(seen) == pytest.approx(split.total - split.checkpoint, rel=0.1)


@pytest.mark.slow
def test_a_teacher_that_is_asked_before_is_foretold(wide: State) -> None:
    """It does not keep what each block put out; where the student is small, it is the peak, and within the limit. What a
    block takes inside is taken for more than it is here."""
    ids = torch.randint(0, 2048, (64, 64))
    setting_, choice = Distill().setting(64, len(ids)), choose(wide, ("norms",), None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        most_likely(Streamed(wide, Tokens(ids, "numbers"), None, "cpu"), range(len(ids)), 8)
    assert 0.6 * memory.asking(wide, setting_) < most(seen) < 1.02 * memory.asking(wide, setting_)
    few = replace(setting_, together=1, batch=1)
    assert memory.split(wide, choice, few).total == memory.asking(wide, few)
    assert memory.split(wide, choice, replace(few, loss=("ce",))).asking == 0


def most(seen: Any) -> int:
    """The most bytes that were there at once, of those that were allocated in a profile."""
    now = highest = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            highest = max(highest, now)
    return highest


def setting(memory_: Memory) -> memory.Setting:
    """A few short windows, so that what is remembered counts."""
    return Distill(memory=memory_, batch=2).setting(8)


@pytest.mark.slow
def test_the_best_that_fits_is_taken(family: Any) -> None:
    """By the order of optimizers, then by time; what a recipe says stays as it says."""
    state = state_of(family)
    choice = choose(state, ("all",), None)

    def taken(**given: Any) -> tuple[str, int]:
        found, split = settings.settled(state, choice, setting(Memory(**given)))
        return settings.said(found.memory), split.total

    everything = taken(limit="1 GiB")
    assert everything[0] == "optimizer: adamw, gradients: kept, activations: kept"
    before = everything[1]
    orders = list(settings.ORDER)
    seen = []
    for share in (0.9, 0.7, 0.6, 0.55, 0.5, 0.45):
        words, total = taken(limit=str(round(share * before)))
        assert total <= share * before
        seen.append(words.split(",")[0].removeprefix("optimizer: "))
    with pytest.raises(RecipeError, match="no other setting would fit"):
        taken(limit=str(round(0.01 * before)))
    assert sorted(seen, key=orders.index) == seen
    assert len(set(seen)) > 1
    assert taken(limit="1 GiB", optimizer="adalomo", activations="checkpoint")[0].startswith("optimizer: adalomo")
    with pytest.raises(RecipeError, match=r"above the limit of .*; .* would fit"):
        taken(limit=str(round(0.6 * before)), optimizer="adamw", gradients="kept", activations="kept")


@pytest.mark.slow
def test_what_would_fit_is_found(family: Any) -> None:
    """Fewer windows at once, and matrices that are read, where no optimizer is small enough; no teacher that the loss cannot do
    with. What is named fits indeed."""
    state = state_of(family)
    long = replace(setting(Memory()), length=512, together=4, batch=4)
    for words, part, says in (("all", "kl", r"; batch: 1; optimizer: adalomo.* would fit"), ("norms", "kl", "weights: streamed"),
                              ("all", "hidden_cosine", "no other setting")):  # fmt: skip
        choice, teacher = choose(state, (words,), None), "cached" if part == "kl" else "live"
        start = replace(long, teacher=teacher, loss=("kl", part))
        least = min(memory.split(state, choice, other).total for _, other in settings.others(start)
                    if settings.refusal(state, choice, other) is None)  # fmt: skip
        limit = Memory(limit=str(least - (part != "kl")))
        with pytest.raises(RecipeError, match=says):
            settings.settled(state, choice, replace(start, memory=limit))


@pytest.mark.slow
def test_streamed_matrices_are_not_held(family: Any, tmp_path: Path) -> None:
    source = open_model(str(family("llama")))
    state = attempt(Quantize(format=parse("int4:g32"), method="rtn"), source, tmp_path / "q")
    found = []
    for weights in ("kept", "streamed"):
        p = Distill(train="lora", rank=2, loss={"ce": 1.0}, batch=2, tokens=128, memory={"weights": weights})
        found.append(trained(p, source, state, tmp_path / weights))
    one, two = (s.codes["layers.0.mlp.down"].load().tensors for s in found)
    assert all(torch.equal(one[n], two[n]) for n in one)
    choice = choose(state, ("lora",), 2)
    assert memory.held(state, choice, 4, True) < 0.6 * memory.held(state, choice, 4)
    with pytest.raises(RecipeError, match="every matrix learns"):
        settings.settled(state, choose(state, ("all",), None), setting(Memory(weights="streamed")))


@pytest.mark.slow
def test_the_plan_prices_every_setting(project: Project) -> None:
    project.edit("passes:\n", "passes:\n  - distill: {memory: {limit: 1 GiB}}\n")
    out = project.plan().out
    assert "with optimizer: adamw, gradients: kept, activations: kept" in out
    for by in OPTIMIZERS:
        assert f"{by}, kept" in out
        assert f"{by}, fused" in out
    assert all(name in out for name in ACTIVATIONS)
    assert "lomo, zeroth_order" in out
    assert "GiB*" not in out.partition("forward passes")[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": {"optimizer": "sgd"}}, "is none of adamw, adamw8bit"),
        (
            {"memory": {"optimizer": {"galore": {"rang": 3}}}},
            "'galore' has no option 'rang'; did you mean 'rank'?   options: rank, gap",
        ),
        ({"memory": {"optimizer": {"adamw": {"rank": 3}}}}, "'adamw' has no option 'rank'   it has none; write adamw alone"),
        ({"memory": {"optimizer": {"galore": 5}}}, "the options of 'galore' are a mapping, not '5'"),
        ({"memory": {"optimizer": {"lomo": {"clip": 0}}}}, "'clip' of 'lomo' must be greater than 0, not '0'"),
        ({"memory": {"optimizer": {"galore": {"rank": 1000}}}}, "rank 1000 is more than any matrix has; ask for 64 or less"),
        ({"memory": {"gradients": {"zeroth_order": {"kind": "mezo", "rank": 2}}}}, "'rank' is about kind: lozo"),
        ({"memory": {"gradients": "zeroth_order", "optimizer": "adamw"}}, "adamw would bend it"),
        ({"memory": {"gradients": "zeroth_order", "activations": "int8"}}, "nothing is kept for it"),
        ({"memory": {"activations": ["checkpoint", "velora"]}}, "in a block that is run again others save nothing"),
        ({"memory": {"activations": ["int8", "offload"]}}, "two ways are"),
        ({"memory": {"gradients": "fused"}, "batch": 99}, "adds up the gradients of parts"),
        ({"memory": {"optimizer": "galore"}, "train": "norms"}, "no matrix of a block learns its weights"),
        ({"memory": {"optimizer": "block"}, "train": "lm_head"}, "nothing in a block learns"),
        ({"memory": {"optimizer": {"block": {"active": 9}}}}, "use active: 2 or fewer"),
        ({"memory": {"optimizer": {"block": {"select": "damage"}}}}, "no step before this one allocates"),
        ({"memory": {"activations": "velora"}, "train": "norms"}, "none keeps its input"),
        ({"memory": {"weights": "streamed"}}, "every matrix learns"),
    ],
)
def test_what_cannot_go_together_is_refused(project: Project, given: dict[str, Any], says: str) -> None:
    project.edit("calibration: {text: words.txt, sequences: 8, length", "calibration: {text: words.txt, sequences: 120, length")
    assert says in project.refused(json.dumps({"distill": given}))
