"""The pass `distill`: losses against their plain forms, what learns and what stays, memory, and runs that are stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import CompressError, RecipeError, RunError
from compress.evaluate import compare
from compress.formats import parse
from compress.manager import Context
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.model.stream import Stream
from compress.passes.depth import Depth
from compress.passes.distill import Distill
from compress.passes.factorize import Factorize
from compress.passes.lqlora import LqLora
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.run import Step, step_inputs
from compress.state import State
from compress.training import loss, matrices, memory
from compress.training.choice import choose, learnt
from compress.training.loop import Training
from compress.training.options import Checkpoint, Memory
from compress.training.student import Student
from compress.training.windows import halves
from tests.conftest import FAMILIES, Project, covered, rare
from tests.pass_laws import TEXT, TOKENS, attempt, killed_often
from tests.test_kinds_of_models import NAMED, WRAPPERS, made

V, D, N = 50, 8, 13


def softmaxes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g), torch.randn(V, D, generator=g), torch.randn(N, V, generator=g).mul(2).log_softmax(-1)


# --- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["kl", "reverse_kl", "js", "ce"])
@pytest.mark.parametrize("k", [None, 5, V])
def test_the_loss_in_parts_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, part: str, k: int | None) -> None:
    monkeypatch.setattr(loss, "NUMBERS", 3 * V)  # three rows at a time
    h, W, log_p = (t.double() for t in softmaxes(0))
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    targets[4] = -100
    known = loss.Known(log_p) if k is None else loss.Known(*log_p.topk(k, -1))
    one, two = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    found = loss.behind(lambda rows, _: rows @ one.T, h, known, targets, {part: 0.7}, V)
    leaf = h.clone().requires_grad_()
    plain = 0.7 * loss.losses((leaf @ two.T).float(), known, targets, {part: 1.0})[part]
    plain.backward()
    assert 0.7 * found.sums[part] == pytest.approx(float(plain.detach()), rel=1e-6)
    assert found.slope is not None
    torch.testing.assert_close(found.slope, leaf.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)


def test_divergences_are_those_of_the_formulas() -> None:
    h, W, log_p = softmaxes(2)
    z = h @ W.T
    p, q = log_p.exp(), z.softmax(-1)
    m = (p + q) / 2
    wanted = {"kl": (p * (p / q).log()).sum(), "reverse_kl": (q * (q / p).log()).sum(),
              "js": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2}  # fmt: skip
    for name, value in wanted.items():
        assert float(loss.losses(z, loss.Known(log_p), None, {name: 1.0})[name]) == pytest.approx(float(value), rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, V), st.sampled_from(sorted(loss.DIVERGENCES)))
def test_a_few_known_tokens_give_a_lower_bound(seed: int, k: int, name: str) -> None:
    """In fp64: fp32 does not know a rest of 1e-6 to three digits."""
    h, W, log_p = (t.double() for t in softmaxes(seed))
    z, log_p = h @ W.T, log_p.log_softmax(-1)

    def value(known: loss.Known) -> float:
        return float(loss.losses(z, known, None, {name: 1.0})[name])

    some, every = value(loss.Known(*log_p.topk(k, -1))), value(loss.Known(log_p))
    assert -1e-4 <= some <= every + 1e-4
    if k == V:
        assert some == pytest.approx(every, rel=1e-5, abs=1e-5)


# --- the student -------------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> State:
    return open_model(str(folder)).state


def logits_of(student: Student, ids: Tensor) -> Tensor:
    with torch.no_grad():
        batch = student.forward(ids)
        with student.behind(student.state), student.holding_head():
            return student.head(batch)


def streamed(state: State, ids: Tensor) -> Tensor:
    stream = Stream(state, dtype=torch.float32)
    batches = stream.start(state, [ids])
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    return next(stream.logits(state, batches))


STEPS: dict[str, list[tuple[Any, Sequence[str], int | None]]] = {
    "dense": [(None, ("all",), None), (None, ("norms",), None), (None, ("layers.0.*",), None), (None, ("lora",), 4)],
    "codes": [
        (Quantize(format=parse(f), method="rtn", pins={"lm_head": "int8:channel"}), words, rank)  # type: ignore[arg-type]
        for f in ("int3:g32", "int4:g32:asym", "lut3:g32")
        for words, rank in ((("scales",), None), (("all",), None), (("lora",), 4))
    ],
    "factors": [
        (LqLora(format=parse("int3:g32"), rank=4, rounds=0), words, None)
        for words in (("lora",), ("scales",), ("lora", "scales"))
    ]
    + [
        (LqLora(format=parse("int3:g32"), rank=4, rounds=0, factors=parse(f)), words, None)
        for f, words in (("int8:channel", ("scales",)), ("nf8:g64", ("norms",)))
    ],
}
OFTEN = {"dense": (0, 1, 2, 3), "codes": (0, 8), "factors": ()}  # each kind of choice once


def steps() -> Iterator[Any]:
    """Every case: those of OFTEN in every run, the others in the slow one."""
    for kind, cases in STEPS.items():
        for i, case in enumerate(cases):
            yield pytest.param(*case, marks=() if i in OFTEN[kind] else pytest.mark.slow)


@pytest.mark.parametrize(("step", "words", "rank"), steps())
def test_a_student_that_has_learnt_nothing_is_the_model(family: Any, tmp_path: Path, step: Any, words: Any, rank: Any) -> None:
    model = open_model(str(family("llama")))
    state = model.state if step is None else attempt(step, model, tmp_path)
    student = Student(state, choose(state, words, rank), 0)
    assert student.learns
    torch.testing.assert_close(logits_of(student, TOKENS.ids[:2]), streamed(state, TOKENS.ids[:2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", covered(sorted(FAMILIES), "llama", "gpt2"))
def test_gradients_are_those_of_the_architecture(family: Any, name: str) -> None:
    """Of every matrix and every other tensor, against transformers' own model, with blocks kept and run again."""
    folder = family(name, torch.float32)
    state = state_of(folder)
    if not state.graph.causal or not any(s.role == "head" for s in state.graph):
        with pytest.raises(CompressError, match="predicts no next token"):
            Distill().choice(state)
        return
    choice = choose(state, ("all",), None)
    grads = []
    for again in (False, True):
        student = Student(state, choice, 0, keeps=(Checkpoint(),) * again)
        batch = student.forward(TOKENS.ids[:2, :16])
        with student.behind(state), student.holding_head():
            student.head(batch).float().logsumexp(-1).sum().backward()
        grads.append({n: p.grad for n, p in student.learns.items()})
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    plain(input_ids=TOKENS.ids[:2, :16], use_cache=False).logits.logsumexp(-1).sum().backward()
    total = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    ours = sum(float(g.double().square().sum()) for g in grads[0].values() if g is not None)
    theirs = sum(float(g.double().square().sum()) for g in total.values())
    assert ours == pytest.approx(theirs, rel=1e-3)
    for key, g in grads[0].items():
        other = grads[1][key]
        assert (g is None) == (other is None), key
        if g is not None and other is not None:
            torch.testing.assert_close(g, other, rtol=1e-4, atol=1e-5)


def test_no_made_matrix_is_kept_for_the_way_back(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed model that learns its scales every matrix is made once more on the way back, since nothing kept it; of a block
    that is run again it is kept while that lasts."""
    state = attempt(Quantize(format=parse("int4:g32"), method="rtn"), open_model(str(family("llama"))), tmp_path)
    made: list[int] = []
    real = matrices.Scaled.forward
    monkeypatch.setattr(matrices.Scaled, "forward", lambda self: made.append(1) or real(self))
    sites = len([s for s in state.formats if state.graph[s].block is not None])
    for again in (False, True):
        student = Student(state, choose(state, ("scales",), None), 0, keeps=(Checkpoint(),) * again)
        batch = student.forward(TOKENS.ids[:2])
        assert not student.remaking._lent
        before = len(made)
        batch.hidden.sum().backward()
        assert len(made) - before == sites
        assert all(p.grad is not None for n, p in student.learns.items() if n.startswith("layers"))


@pytest.mark.slow
def test_scales_alone_leave_every_code(family: Any, tmp_path: Path) -> None:
    source = open_model(str(family("llama")))
    state = attempt(Quantize(format=parse("int3:g32"), pins={"lm_head": "int8:channel"}), source, tmp_path / "q")
    p = Distill(train="scales", batch=4, rate=1e-2)
    after = trained(p, source, state, tmp_path / "d")
    assert after.formats == state.formats
    moved = 0
    for site in state.formats:
        one, two = (s.codes[site].load() for s in (state, after))
        assert torch.equal(one.tensors["weight_packed"], two.tensors["weight_packed"])
        moved += not torch.equal(one.tensors["weight_scale"], two.tensors["weight_scale"])
    assert moved


def trained(p: Distill, source: Any, state: State, folder: Path, notes: list[Any] | None = None, text: Tokens = TEXT) -> State:
    step = Step.of(folder, 1, step_inputs(p, "root", text.hash, 0, ()), lambda s: context(s))

    def context(s: Step) -> Context:
        return Context(
            0,
            None,
            "cpu",
            s,
            lambda r: notes.append(r) if notes is not None else None,
            lambda d, t, w: None,
            (),
            source.state,
            text,
        )

    return p.run(state, step.context())


# --- what comes of it --------------------------------------------------------------------------------------------------


def pruned(family: Any, folder: Path) -> tuple[Any, State]:
    """A model, and one of half its neurons."""
    source = open_model(str(family("llama")))
    return source, attempt(Prune(mlp=0.5, method="magnitude", compensate=False), source, folder)


@pytest.mark.parametrize("teacher", covered(["cached", "live", "streamed"], "cached"))
def test_a_pruned_model_comes_nearer_to_its_teacher(family: Any, tmp_path: Path, teacher: Any) -> None:
    source, state = pruned(family, tmp_path / "p")
    records: list[Any] = []
    p = Distill(
        loss={"kl": 1.0} if teacher == "cached" else {"kl": 1.0, "hidden_cosine": 0.5}, teacher=teacher, rate=3e-3, batch=4
    )
    trained(p, source, state, tmp_path / "d", records)
    (record,) = records
    start, best = record["curve"][0][3], min(point[3] for point in record["curve"])
    assert best < 0.9 * start
    assert f"{best:.5f}" in record["notes"][0]


@pytest.mark.slow
def test_teachers_agree(family: Any, tmp_path: Path) -> None:
    """With all of a small vocabulary cached, three ways to ask are one."""
    source, state = pruned(family, tmp_path / "p")
    curves = []
    for i, teacher in enumerate(("cached", "live", "streamed")):
        records: list[Any] = []
        options = {"top_k": 1000} if teacher == "cached" else {}
        trained(Distill(teacher=teacher, tokens=32 * 8, batch=4, **options), source, state, tmp_path / str(i), records)  # type: ignore[arg-type]
        curves.append([point[3] for point in records[0]["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)  # fp16, and activations in bf16
    assert curves[2] == pytest.approx(curves[1], rel=2e-2)


@pytest.mark.slow
def test_a_training_that_was_killed_comes_to_the_same_bytes(family: Any, tmp_path: Path) -> None:
    """Killed at ten places, of teacher, training and result, one after the other in one run."""
    source, state = pruned(family, tmp_path / "p")
    p = Distill(train=("layers.*.down", "norms"), rate=1e-3, batch=4, checks=5)
    whole = trained(p, source, state, tmp_path / "whole")
    assert killed_often(lambda: trained(p, source, state, tmp_path / "cut"), 10, 4)
    again = trained(p, source, state, tmp_path / "cut")
    for spec in whole.specs:
        assert torch.equal(whole.dense.read(spec.name), again.dense.read(spec.name)), spec.name


@pytest.mark.slow
def test_a_rate_that_is_too_high_is_lowered(family: Any, tmp_path: Path) -> None:
    """From where nothing was better than the start; killed on its way, it comes to the same bytes."""
    source, state = pruned(family, tmp_path / "p")
    p, notes = Distill(train="layers.*.down", rate=1.0, batch=2, checks=16, tokens=2048), list[Any]()
    whole = trained(p, source, state, tmp_path / "whole", notes)
    record = notes[-1]
    held = [point[3] for point in record["curve"]]
    assert held[1] > held[0] > min(held), "worse at first, better in the end"
    assert any("rate 1 was too high" in note for note in record["notes"])
    assert killed_often(lambda: trained(p, source, state, tmp_path / "cut"), 6, 4)
    again = trained(p, source, state, tmp_path / "cut")
    assert all(torch.equal(whole.dense.read(s.name), again.dense.read(s.name)) for s in whole.specs)


@pytest.mark.slow
def test_blocks_that_were_chosen_learn_on_from_the_start(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lowered rate takes the start's numbers, not its choice of blocks: nobody had chosen any then."""
    source, state = pruned(family, tmp_path / "p")
    block = {"block": {"active": 1, "interval": 8, "select": "cyclic"}}
    p, notes = Distill(rate=1.0, batch=2, checks=16, tokens=1024, memory={"optimizer": block}), list[Any]()  # type: ignore
    seen, real = list[set[int]](), Training.step

    def step(self: Training, number: int) -> float | None:
        loss = real(self, number)
        assert self.optimizer.selection is not None
        seen.append({b for name in self.optimizer.state if (b := self.optimizer.known[name].block) is not None})
        assert seen[-1] == self.optimizer.selection.chosen
        return loss

    monkeypatch.setattr(Training, "step", step)
    trained(p, source, state, tmp_path / "d", notes)
    assert any("was too high" in note for note in notes[-1]["notes"])
    assert seen == [{(-1 - number // 8) % 2} for number in range(len(seen))], "in turn, from the last block to the first"


@pytest.mark.slow
def test_a_cached_teacher_is_asked_once(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, state = pruned(family, tmp_path / "p")
    trained(Distill(tokens=64, batch=1), source, state, tmp_path / "run" / "steps")
    monkeypatch.setattr("compress.training.teacher.most_likely", None)
    trained(Distill(tokens=64, batch=2), source, state, tmp_path / "run" / "steps")


@pytest.mark.slow
def test_factors_that_a_quantized_matrix_is_given(family: Any, tmp_path: Path) -> None:
    source = open_model(str(family("llama")))
    state = attempt(Quantize(format=parse("int3:g32")), source, tmp_path / "q")
    p = Distill(train="lora", rank=4, batch=4)
    foreseen = p.foresee(state)
    after = trained(p, source, state, tmp_path / "d")
    assert foreseen.formats == after.formats
    assert str(after.formats["layers.0.mlp.down"]) == "int3:g32+r4"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", covered([torch.bfloat16, torch.float16, torch.float32], torch.bfloat16))
@pytest.mark.parametrize("words", covered(["norms", "lm_head", "all"], "lm_head"))
def test_what_is_judged_is_what_is_written(family: Any, tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    """Read back, the model comes to what its best check came to, however little was learnt: what its dtype cannot hold was not
    counted."""
    source = open_model(str(family("llama", dtype)))
    state = attempt(Prune(mlp=0.5, method="magnitude", compensate=False), source, tmp_path / "p")
    records: list[Any] = []
    p = Distill(train=words, top_k=1000, tokens=64, batch=1, checks=1, rate=3e-4)
    after = trained(p, source, state, tmp_path / "d", records)
    best = min(point[3] for point in records[0]["curve"])
    trained(Distill(train=words, top_k=1000, tokens=32, batch=1, rate=1e-9), source, after, tmp_path / "again", records)
    assert records[1]["curve"][0][3] == pytest.approx(best, abs=1e-6)
    changed = any(not torch.equal(state.dense.read(s.name), after.dense.read(s.name)) for s in state.specs)
    assert changed == (best < records[0]["curve"][0][3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_more_rows_than_a_model_has_positions(family: Any, tmp_path: Path, name: str) -> None:
    """The head is asked about many windows at once, which are no longer than the positions that were learnt."""
    source = open_model(str(family(name)))
    together = TEXT.ids.shape[0] * TEXT.ids.shape[1]
    assert together > source.state.config.max_position_embeddings
    for i, teacher in enumerate(("cached", "live", "streamed")):
        records: list[Any] = []
        trained(Distill(teacher=teacher, tokens=512, batch=16), source, source.state, tmp_path / str(i), records)  # type: ignore[arg-type]
        assert records[0]["curve"][0][3] < 0.01


@pytest.mark.parametrize("rate", covered([1e2, 1e6], 1e6))
@pytest.mark.parametrize(
    "options",
    [
        {"train": "all"},
        rare({"train": "norms"}),
        rare({"train": "lora", "rank": 4}),
        rare({"memory": {"activations": "wta_crs"}}),
    ],
    ids=str,
)
def test_a_loss_that_is_no_number_ends_it(family: Any, tmp_path: Path, rate: float, options: Any) -> None:
    """The start is what is left, and every figure of the record is one that JSON has."""
    source, state = pruned(family, tmp_path / "p")
    records: list[Any] = []
    after = trained(Distill(rate=rate, batch=4, **options), source, state, tmp_path / "d", records)
    text = json.dumps(records[0], allow_nan=False)
    for spec in state.specs:
        assert torch.equal(state.dense.read(spec.name), after.dense.read(spec.name)), spec.name
    assert "the state of that check is kept" in text


@pytest.mark.slow
def test_numbers_that_became_none(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no number is told, in a check as in a step, and nothing of it is written."""
    source, state = pruned(family, tmp_path / "p")
    step, judge = Training.step, Training.judge
    for i, (name, real) in enumerate((("step", step), ("judge", judge))):
        calls: list[int] = []

        def spoilt(self: Training, *args: Any, real: Any = real, calls: list[int] = calls) -> float:
            calls.append(1)
            return float(real(self, *args)) if len(calls) < 3 else float("nan")

        records: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(Training, name, spoilt)
            after = trained(Distill(batch=4, rate=1e-3), source, state, tmp_path / str(i), records)
        assert "no number any more" in json.dumps(records[0], allow_nan=False)
        assert all(bool(after.dense.read(spec.name).isfinite().all()) for spec in after.specs)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["step", "latest", "step-0000000"])
def test_a_removal_of_checkpoints_that_was_cut_short(family: Any, tmp_path: Path, kept: str) -> None:
    """Whichever of its files are left, the next run comes to the same bytes or says what is missing: never to the start."""
    source, state = pruned(family, tmp_path / "p")
    p = Distill(rate=3e-3, batch=4, tokens=256)
    whole = trained(p, source, state, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distill, "_written", None)
        with suppress(TypeError):
            trained(p, source, state, tmp_path / "cut")
    folder = next(tmp_path.rglob("training-*"))
    for file in folder.iterdir():
        if not file.name.startswith(kept):
            file.unlink()
    said = ""
    try:
        again = trained(p, source, state, tmp_path / "cut")
    except RunError as e:
        said = str(e)
    if said:
        assert "is missing; delete this folder" in said
        return
    assert any(not torch.equal(state.dense.read(s.name), again.dense.read(s.name)) for s in state.specs)
    for spec in whole.specs:
        assert torch.equal(whole.dense.read(spec.name), again.dense.read(spec.name)), spec.name


@pytest.mark.slow
def test_what_is_written_is_not_learnt_again(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped behind its last part, checkpoints gone, only reads it."""
    source, state = pruned(family, tmp_path / "p")
    p = Distill(batch=4, tokens=256)
    one = trained(p, source, state, tmp_path / "d")
    monkeypatch.setattr(Training, "step", None)
    other = trained(p, source, state, tmp_path / "d")
    assert all(torch.equal(one.dense.read(s.name), other.dense.read(s.name)) for s in one.specs)
    assert not list(tmp_path.rglob("training-*"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 4096))
def test_windows_are_held_out_of_every_source(counts: list[int], length: int) -> None:
    total = sum(counts)
    if total < 2:
        return
    learning, held = halves(total, length, [(str(i), n) for i, n in enumerate(counts)])
    assert sorted(learning + held) == list(range(total))
    assert len(learning) == len(halves(total, length)[0])
    start = 0
    for n in counts:
        of_source = [i for i in held if start <= i < start + n]
        assert of_source == list(range(start + n - len(of_source), start + n)), "the last of it"
        assert abs(len(of_source) - len(held) * n / total) < 1
        start += n


@pytest.mark.slow
def test_the_text_alone_is_judged_by_the_tokens_that_came(family: Any, tmp_path: Path) -> None:
    """Windows of two tokens have one prediction each."""
    source = open_model(str(family("llama")))
    two = Tokens(TEXT.ids.reshape(-1, 2), "pairs")
    held = halves(*two.ids.shape)[1]
    records: list[Any] = []
    trained(Distill(loss={"ce": 1.0}, tokens=16, rate=1e-9), source, source.state, tmp_path, records, two)
    found = compare(None, source.state, Tokens(two.ids[held], "held"))[1].perplexity
    assert found is not None
    assert records[0]["curve"][0][3] == pytest.approx(math.log(found), rel=1e-2)


@pytest.mark.slow
def test_towers_and_buffers_do_not_learn(tmp_path: Path) -> None:
    for name in ("llava", "gemma3"):
        kind, config = WRAPPERS[name]
        state = state_of(made(tmp_path / name, kind, config()))
        choice = choose(state, ("all",), None)
        student = Student(state, choice, 0)
        assert student.tensors.keys() == choice.tensors
        batch = student.forward(TOKENS.ids[:1, :8])
        with student.behind(state), student.holding_head():
            student.head(batch).float().logsumexp(-1).sum().backward()
        assert all(p.grad is not None for p in student.learns.values())
        with pytest.raises(CompressError, match="matches no matrix and no other tensor"):
            choose(state, ("*vision*",), None)
    kind, config = NAMED["deepseek v3"]
    with pytest.raises(CompressError, match="matches no matrix and no other tensor"):
        choose(state_of(made(tmp_path / "buffer", kind, config())), ("*e_score_correction_bias",), None)


# --- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remembered", "gradients", "total"),
    [rare(12, "kept", 102.20), (4, "kept", 51.99), (0, "fused", 14.58)],
    ids=["adamw", "sgd", "lomo"],
)
def test_the_split_that_lomo_publishes(tmp_path: Path, remembered: int, gradients: str, total: float) -> None:
    """LLaMA-7B, 16-bit parameters and gradients, 32-bit masters (and means for AdamW), blocks run again, 8 windows of 512 tokens
    (arXiv 2306.09782, table 1; GiB)."""
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    state = open_model(str(tmp_path)).bare
    setting = memory.Setting(Memory(gradients=gradients), "cached", 8, 512, memory.Numbers(2, remembered, torch.bfloat16))
    assert memory.split(state, choose(state, ("all",), None), setting).total / 2**30 == pytest.approx(total, rel=0.1)


def test_what_a_block_keeps_is_foretold(family: Any) -> None:
    """Against the storages that autograd really keeps."""
    state = state_of(family("llama", torch.float32))
    student = Student(state, choose(state, ("all",), None), 0)
    kept: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    student.remaking.kept_as_notes = nullcontext  # type: ignore[method-assign]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        student.forward(TOKENS.ids[:4])
    own = {p.untyped_storage().data_ptr() for p in student.learns.values()}
    found = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert sum(memory.saved_by_block(state, 4, 32, torch.float32)) == pytest.approx(found, rel=0.1)


def test_a_step_takes_no_window_twice() -> None:
    p = Distill(batch=1000)
    assert (p.schedule(3, 16).batch, p.schedule(3, 16).steps, p.setting(16, 3).batch, p.setting(16, 3).together) == (2, 1, 2, 2)
    assert (p.schedule(4000, 16).batch, Distill(batch=4).schedule(41, 16).batch) == (1000, 4)


@pytest.mark.slow
def test_a_limit_is_kept_to_or_refused(project: Project) -> None:
    line = project.refused("{distill: {memory: {limit: 1 MiB, activations: kept}, teacher: live}}")
    assert "above the limit of 1 MiB" in line
    assert "no other setting would" in line
    project.edit("1 MiB", "1 GiB")
    assert "distill: 1 steps of 7 windows; training takes" in project.plan().out


def test_a_teacher_is_as_large_as_the_source(family: Any) -> None:
    """Not as its student, who may have lost most of it."""
    state = open_model(str(family("llama", blocks=4))).state
    whole = sum(spec.nbytes for spec in state.specs)
    small = Prune(mlp=0.5, method="magnitude", compensate=False).foresee(Depth(drop=2).foresee(state))
    setting = Distill(teacher="live").setting(32)
    assert sum(spec.nbytes for spec in small.specs) < 0.8 * whole
    assert memory.teacher(small, setting) == memory.teacher(state, setting) == whole


@pytest.mark.parametrize("name", covered(sorted(FAMILIES), "mixtral"))
def test_memory_of_every_family_is_foretold(family: Any, name: str) -> None:
    """Mixtures among them, of which torch does not know how a product of groups comes out in fp32."""
    state = state_of(family(name))
    if state.graph.causal and any(s.role == "head" for s in state.graph):
        assert "training takes" in Distill().trained(state, 20, 32)[1]


def test_what_is_left_does_not_learn(family: Any, tmp_path: Path) -> None:
    """Neither what a recipe leaves nor experts in a layout that is not read; routers and tables of positions are no norms."""
    state = open_model(str(family("llama")), leave=("*.up_proj",)).state
    for words in (("all",), ("norms",)):
        assert not any("up_proj" in what.name for what in learnt(state, choose(state, words, None)))
    with pytest.raises(CompressError, match=r"up_proj.weight' is left as it is"):
        choose(state, ("*.up_proj.*",), None)
    assert not any("experts" in n for n in choose(open_model(str(made(tmp_path, *gpt_oss()))).state, ("all",), None).tensors)
    for name in ("gpt2", "mixtral"):
        state = open_model(str(family(name))).state
        norms, everything = (choose(state, (word,), None).tensors for word in ("norms", "all"))
        assert all("wpe" in n or "gate" in n for n in everything - norms)
        assert everything > norms


def gpt_oss() -> tuple[Any, Any]:
    kind, config = NAMED["gpt-oss"]
    return kind, config()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"rate": 1e30}, "less than or equal to 1000000"),
        ({"tokens": "9" * 400}, "is no number of tokens"),
        ({"memory": {"limit": "9" * 400 + " GiB"}}, "is no amount of memory"),
        ({"train": "lora", "rank": 1000}, "of 64 x 64 has; ask for 64 or less"),
        ({"train": "scales"}, "no matrix has scales"),
        ({"train": "lora"}, "needs the rank"),
        ({"train": "nothing.*"}, "matches no matrix"),
        ({"tokens": 1500.5}, "'tokens' needs text or a whole number, not '1500.5'"),
        ({"train": 5}, "'train' needs text or a list, not '5'"),
        ({"rank": 4}, "is about train: lora"),
        ({"loss": {"hidden_cosine": 1.0}}, "have no part in it"),
        ({"loss": {"mse": 1.0}}, "is none of kl"),
        ({"loss": {"kl": 1.0, "hidden_cosine": 1.0}}, "is not cached"),
        ({"loss": {"ce": 1.0}, "teacher": "live"}, "no teacher is asked"),
        ({"tokens": "many"}, "is no number of tokens"),
        ({"memory": {"limit": "much"}}, "is no amount of memory"),
    ],
)
def test_what_makes_no_sense_is_refused(project: Project, step: dict[str, Any], says: str) -> None:
    assert says in project.refused(json.dumps({"distill": step}))


def test_why_nothing_learns(family: Any) -> None:
    """Of a table that two share one name is to be used; what is in a format that does not learn, whichever step made it so."""
    tied, plain = (open_model(str(family(name))).state for name in ("qwen2", "llama"))
    step = Quantize(format=parse("int3:g32"))
    for state, words, says in (
        (tied, "lm_head", "'lm_head' shares the matrix of 'embed'.*write 'embed'"),
        (plain.promising({"lm_head": parse("fp16")}), "all", "'lm_head' is in fp16.*in front of 'quantize'"),
        (Quantize(format=parse("fp16")).foresee(plain), "lora", "could train: 'layers.0.attn.q' is in fp16; train norms"),
        (Factorize(rank=8).foresee(plain), "scales", "is in lr8; train norms"),
        (step.foresee(plain), "lm_hed", "did you mean 'lm_head'"),
    ):
        with pytest.raises(CompressError, match=says):
            choose(state, (words,), 2)
    corrected = LqLora(format=parse("int3:g32"), rank=4).foresee(plain)
    assert not Distill(train="lora").choice(corrected).formats
    with pytest.raises(RecipeError, match="has factors already"):
        Distill(train="lora", rank=100).choice(corrected)


@pytest.mark.slow
def test_quantized_factors_stay_as_they_are(family: Any, tmp_path: Path) -> None:
    """Beside scales that learn, to the byte; asked to learn themselves, they are refused in a line."""
    source = open_model(str(family("llama")))
    step = LqLora(format=parse("int3:g32"), rank=4, rounds=0, factors=parse("int8:channel"))
    state = attempt(step, source, tmp_path / "q")
    after = trained(Distill(train="scales", batch=4, rate=1e-2), source, state, tmp_path / "d")
    one, two = (s.codes["layers.0.mlp.down"].load().tensors for s in (state, after))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one if n.startswith("lora_"))
    assert any(not torch.equal(s.tensors["weight_scale"], t.tensors["weight_scale"]) for s, t in
               ((state.codes[n].load(), after.codes[n].load()) for n in state.formats))  # fmt: skip
    with pytest.raises(RecipeError, match="which are not trained"):
        Distill().foresee(state)
