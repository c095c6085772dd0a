"""`answers: true`: of conversations only the answers are learnt from and judged on; a loss over them is the plain masked one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from compress.errors import DataError
from compress.model.data import Lessons, Tokens, read
from compress.model.model import open_model
from compress.model.tokenizer import open_tokenizer
from compress.passes.distill import Distill
from compress.passes.prune import Prune
from compress.training import loop
from compress.training.choice import choose
from compress.training.choice import learnt as tensors_of
from compress.training.gradients import Kept, Pass
from compress.training.loop import Schedule, Training
from compress.training.loss import DIVERGENCES
from compress.training.moving import Optimizer
from compress.training.options import AdamW
from compress.training.student import Student
from compress.training.teacher import Live
from tests.conftest import Project, covered, rare
from tests.pass_laws import TEXT, attempt, killed_often
from tests.test_distill import pruned, trained

END = 257
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CLOSED = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")  # an end of text behind every conversation
THINKS = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}{{ m.content }}")
PROMPTS_THOUGHT = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
NEEDS_ONE = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML
CALLS = CHATML.replace("{{ m.content }}", "{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}")


def said(*contents: str, **last: Any) -> list[dict[str, Any]]:
    """A conversation that a user begins; `last` goes into its last message."""
    turns: list[dict[str, Any]] = [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]
    turns[-1] |= last
    return turns


@pytest.fixture
def talker(family: Any, tmp_path: Path) -> Callable[..., Path]:
    """talker(template) -> a model whose tokenizer has it."""

    def get(template: str = CHATML) -> Path:
        folder = tmp_path / "talker"
        if not folder.exists():
            shutil.copytree(family("llama"), folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return get


def put(folder: Path, *conversations: Any, name: str = "a.jsonl") -> str:
    lines = [json.dumps(c if isinstance(c, dict) else {"messages": c}) for c in conversations]
    (folder / name).write_text("\n".join(lines) + "\n")
    return name


def lessons(model: Path, folder: Path, **options: Any) -> Tokens:
    return read(Lessons(**{"answers": True, "sequences": 1, **options}), model, folder, 272)


def whole(model: Path, turns: list[dict[str, Any]]) -> int:
    """How many tokens a conversation has."""
    tokenizer = open_tokenizer(model)
    return len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"])


def words(model: Path, tokens: Tokens) -> str:
    """What is learnt from, with what lies between the stretches as one '.': a byte is a token, and predicts the one behind it."""
    assert tokens.learnt is not None
    ids, learnt = tokens.ids.flatten().tolist(), tokens.learnt.flatten().tolist()
    tokenizer = open_tokenizer(model)
    return "".join(tokenizer.decode([b]) if said else "." for (_, b), said in zip(pairwise(ids), learnt, strict=False))


# --- which tokens are answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "turns", "learnt"),
    [
        (CHATML, said("hello", "hi", "so", "well"), ["hi<end>\n", "well<end>\n"]),
        (CLOSED, said("hello", "hi", "so", "well"), ["hi<end>\n", "well<end>\n</s>"]),
        (MARKED, said("hello", "hi", "so", "well"), ["hi<end>", "well<end>"]),
        rare(NEEDS_ONE, said("hello", "hi", "so", "well"), ["hi<end>\n", "well<end>\n"]),
        (THINKS, said("hello", "hi"), ["<think>hi<end>\n"]),
        (CHATML, said("hello", "hi", "so", ""), ["hi<end>\n", "<end>\n"]),
        rare(CHATML, said("hello", "hi", "so"), ["hi<end>\n"]),
        (CHATML, said("hello", "hi<end>\nhi", "so"), ["hi<end>\nhi<end>\n"]),
        rare(CHATML, [{"role": "system", "content": "be"}, *said("a", "b")], ["b<end>\n"]),
        rare(CHATML, said("", "hi", "so", "well")[1:], ["hi<end>\n", "well<end>\n"]),
        rare(CHATML, [*said("a", "b"), {"role": "assistant", "content": "c"}], ["b<end>\n", "c<end>\n"]),
        rare(CALLS, [*said("a", ""), {"role": "tool", "content": "7"}, *said("", "c")[1:]], ["<end>\n", "c<end>\n"]),
        (CALLS, [*said("a", "", tool_calls=[{"name": "f"}]), {"role": "tool", "content": "7"}], ["f<end>\n"]),
    ],
)
def test_what_is_learnt_is_what_the_assistant_says(
    talker: Any, tmp_path: Path, template: str, turns: list[dict[str, Any]], learnt: list[str]
) -> None:
    model = talker(template)
    count = whole(model, turns)
    tokens = lessons(model, tmp_path, jsonl=put(tmp_path, turns), length=count)
    found = words(model, tokens)
    assert [part for part in found.split(".") if part] == learnt
    plain = lessons(model, tmp_path, jsonl="a.jsonl", length=count, answers=False)
    assert torch.equal(plain.ids, tokens.ids)
    assert plain.learnt is None


@pytest.mark.parametrize("left_out", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 1}])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_the_data_leaves_out_is_not_learnt(talker: Any, tmp_path: Path, template: str, left_out: Any) -> None:
    model = talker(template)
    turns = [*said("a", "no", **left_out), *said("b", "yes", train=True, weight=1), *said("c", "too", train=None, weight=None)]
    found = words(model, lessons(model, tmp_path, jsonl=put(tmp_path, turns), length=whole(model, turns)))
    assert "no" not in found
    assert [w.rstrip("\n") for w in found.split(".") if w] == ["yes<end>", "too<end>"]


def test_an_answer_that_counts_may_be_the_only_one_that_can_be_told(talker: Any, tmp_path: Path) -> None:
    turns = [*said("a", "no", train=False), *said("b", "yes")]
    model = talker(THINKS)
    found = words(model, lessons(model, tmp_path, jsonl=put(tmp_path, turns), length=whole(model, turns)))
    assert [w for w in found.split(".") if w] == ["<think>yes<end>\n"]


def test_names_that_others_have(talker: Any, tmp_path: Path) -> None:
    turns = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "gpt", "value": "c", "weight": 0},
        ]
    }
    found = words(talker(), lessons(talker(), tmp_path, jsonl=put(tmp_path, turns), length=40))
    assert [w for w in found.split(".") if w] == ["b<end>\n"]


@pytest.mark.parametrize("contents", [("hello", "hi"), ("é", "日本 \U0001f600 é", "x", "y"), ("a", "", "b", "c")])
def test_marks_of_a_template_are_what_transformers_makes_of_them(talker: Any, tmp_path: Path, contents: tuple[str, ...]) -> None:
    model = talker(MARKED)
    turns = said(*contents)
    theirs = open_tokenizer(model).apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    count = len(theirs["input_ids"])
    tokens = lessons(model, tmp_path, jsonl=put(tmp_path, turns), length=count)
    assert tokens.ids[0].tolist() == theirs["input_ids"]
    assert tokens.learnt is not None
    assert [0, *tokens.learnt[0, :-1].int().tolist()] == theirs["assistant_masks"]


def test_a_last_character_of_several_tokens_is_learnt_whole(talker: Any, tmp_path: Path) -> None:
    model = talker(MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>"))
    tokens = lessons(model, tmp_path, jsonl=put(tmp_path, said("a", "b\U0001f600")), length=37)
    assert tokens.learnt is not None
    assert int(tokens.learnt.sum()) == 5


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", covered([7, 13, 20], 20))
def test_windows_are_cut_from_the_stream_and_learn_alike(talker: Any, tmp_path: Path, bos: bool, length: int) -> None:
    """Whatever the window, a token that is not the window's first is learnt or not as in the whole."""
    model = talker()
    name = put(tmp_path, said("hello", "hi", "so", "well"), said("more", "that"), said("x", "z"))
    whole = lessons(model, tmp_path, jsonl=name, length=150)
    count = 150 // length
    cut = lessons(model, tmp_path, jsonl=name, length=length + bos, sequences=count, bos=bos)
    plain = lessons(model, tmp_path, jsonl=name, length=length + bos, sequences=count, bos=bos, answers=False)
    assert torch.equal(cut.ids, plain.ids)
    assert whole.learnt is not None
    assert cut.learnt is not None
    wanted = whole.learnt[0].tolist()
    for i, row in enumerate(cut.learnt.tolist()):
        assert row[bos:] == wanted[i * length : (i + 1) * length]
        if bos and i:
            assert row[0] == wanted[i * length - 1], "what the begin-of-text token predicts"
    ends = (whole.ids[0] == END).nonzero()[:, 0].tolist()
    assert len(ends) == 2
    assert not any(wanted[end - 1] for end in ends), "the token that joins conversations is nobody's answer"


def test_sources_have_it_each_for_itself(talker: Any, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("x" * 200)
    put(tmp_path, *[said("hello", "hi")] * 9)
    sources = [{"jsonl": "a.jsonl", "answers": True}, {"text": "b.txt"}, {"jsonl": "a.jsonl"}]
    tokens = lessons(talker(), tmp_path, sources=sources, answers=False, sequences=6, length=20, bos=True)
    assert tokens.learnt is not None
    assert tokens.learnt[2:].all()
    assert 0 < tokens.learnt[:2].float().mean() < 1
    light = [{"jsonl": "a.jsonl", "answers": True, "weight": 1e-6}, {"text": "b.txt"}]
    all_of_it = lessons(talker(), tmp_path, sources=light, answers=False, sequences=2, length=20)
    assert all_of_it.learnt is None or bool(all_of_it.learnt.all())


@pytest.mark.slow
def test_long_conversations_are_read_as_far_as_windows_reach(talker: Any, tmp_path: Path) -> None:
    turns = said(*["question " * 40, "answer " * 40] * 200)
    name = put(tmp_path, turns)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "no JSON\n")
    few = lessons(talker(), tmp_path, jsonl=name, sequences=3, length=500)
    many = lessons(talker(), tmp_path, jsonl=name, sequences=150, length=500)
    assert few.learnt is not None
    assert many.learnt is not None
    assert torch.equal(few.learnt, many.learnt[:3])
    assert torch.equal(few.ids, many.ids[:3])


def test_the_hash_covers_what_is_learnt() -> None:
    some = torch.zeros(TEXT.ids.shape, dtype=torch.bool)
    some[:, 3:9] = True
    hashes = [replace(TEXT, learnt=learnt).hash for learnt in (None, some, ~some, torch.ones_like(some))]
    assert len(set(hashes)) == 4
    assert hashes[0] == TEXT.hash == Tokens(TEXT.ids, "").hash


# --- what is refused ---------------------------------------------------------------------------------------------------

UNTOLD = "where its answers are cannot be told, "
ADVICE = "; give its chat template {% generation %} marks, or leave 'answers' out"


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        (CHATML, {"text": "abc", "dialog": said("a", "b")}, "has no chat messages in 'text', and answers stand in nothing else; "
         "name those in 'dialog', as field: dialog"),
        (CHATML, {"text": "abc"}, "has no chat messages in 'text', and answers stand in nothing else; leave 'answers' out"),
        (CHATML, {"messages": []}, "has no chat messages in 'messages', and answers stand in nothing else; leave 'answers' out"),
        (CHATML, {"messages": [{"role": "user"}]}, "item 1 of 'messages' is no chat message; needs role and content, or from and "
         "value"),
        (CHATML, {"messages": said("a", "b", train="no")}, "'train' of message 2 is 'no'; it is true or false"),
        (CHATML, {"messages": said("a", "b", weight=0.5)}, "'weight' of message 2 is '0.5'; it is 0 or 1"),
        (CHATML, {"messages": said("a", "b", weight="0")}, "'weight' of message 2 is '0'; it is 0 or 1"),
        (CHATML, {"messages": said("a", "b\ud83d")}, "holds half a character (\\ud83d); the text was cut inside an emoji, leave "
         "the line out"),
        (THINKS, {"messages": said("a", "b", "c", "d")}, UNTOLD + "the chat template writes message 2, "
         "or one before it, otherwise when others follow" + ADVICE),
        (PROMPTS_THOUGHT, {"messages": said("a", "b")}, UNTOLD + "the chat template does not go on from "
         "its generation prompt in message 2" + ADVICE),
        (NEEDS_ONE, {"messages": said("", "b")[1:]}, UNTOLD + "the chat template fails on what stands "
         "before message 1: list object has no element 0" + ADVICE),
        (MARKED.replace("{{ m.content }}<end>{% endgen", "{{ m.content }}{% endgeneration %}{% generation %}<end>{% endgen"),
         {"messages": said("a", "b", "c", "d", weight=0)}, UNTOLD + "some do not count, and the chat "
         "template marks 4 stretches of text for 2 answers" + ADVICE),
    ],
)  # fmt: skip
def test_a_record_whose_answers_cannot_be_told(talker: Any, tmp_path: Path, template: str, record: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        lessons(talker(template), tmp_path, jsonl=put(tmp_path, record), length=10)
    assert str(caught.value) == f"{tmp_path / 'a.jsonl'}:1: {expected}"


@pytest.mark.parametrize("turns", [said("only a question"), said("a", "b" * 40, train=False), [*said("a" * 90, "b")]])
def test_windows_without_an_answer(talker: Any, tmp_path: Path, turns: Any) -> None:
    with pytest.raises(DataError) as caught:
        lessons(talker(), tmp_path, jsonl=put(tmp_path, turns), length=20)
    assert str(caught.value) == "a.jsonl: 1 windows of 20 tokens hold no token of an answer; give more, or leave 'answers' out"


def test_without_a_template(family: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: holds chat messages, and the tokenizer in .* has no chat template"):
        lessons(family("llama"), tmp_path, jsonl=put(tmp_path, said("a", "b")), length=10)


LEARNS = "'answers' says what 'distill' learns from; put it under data.training, or leave it out"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"calibration": {"jsonl": "a.jsonl", "answers": True}}, LEARNS),
        ({"evaluation": {"jsonl": "a.jsonl", "answers": True}}, LEARNS),
        ({"evaluation": {"sources": [{"jsonl": "a.jsonl", "answers": True}]}}, LEARNS),
        ({"calibration": {"generate": {"prompts": {"jsonl": "a.jsonl", "answers": True}}}}, LEARNS),
        ({"training": {"text": "words.txt", "answers": True}}, "answers stand in conversations, and a plain text has none; name "
         "a jsonl or dataset of messages, or leave 'answers' out"),
        ({"training": {"sources": [{"text": "words.txt", "answers": True}]}}, "answers stand in conversations, and a plain text"),
        ({"training": {"sources": [{"jsonl": "a.jsonl"}], "answers": True}}, "'answers' belongs to each of several sources; put "
         "it beside their jsonl or dataset"),
        ({"training": {"jsonl": "a.jsonl", "answers": "perhaps"}}, "'answers' needs true or false, not 'perhaps'"),
    ],
)  # fmt: skip
def test_where_it_has_no_place(project: Project, data: dict[str, Any], expected: str) -> None:
    put(project.folder, said("a", "b"))
    project.edit("passes:\n", "passes:\n  - distill: {}\n")
    ((name, value),) = data.items()
    line = project.plan(f"data.{name}={json.dumps(value)}").line
    assert expected in line
    assert line.startswith(f"--set data.{name}")


# --- the loss -----------------------------------------------------------------------------------------------------------


def learnt_of(seed: int, shape: tuple[int, ...] = tuple(TEXT.ids.shape)) -> Tensor:
    """Stretches of windows, of other lengths in each; the second window and the fifth have none."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(shape, dtype=torch.bool)
    for row in found:
        start, end = sorted(torch.randint(0, shape[1] + 1, (2,), generator=generator).tolist())
        row[start:end] = True
    found[[1, 4]] = False
    return found


class Caught(Kept):
    """Moves nothing and keeps the gradients of its steps."""

    def step(self, number: int, share: float, learn: Pass, look: Pass) -> float:
        loss = learn()
        self.grads = [None if p.grad is None else p.grad.clone() for p in self.optimizer.learns.values()]
        for p in self.optimizer.learns.values():
            p.grad = None
        return loss


@pytest.fixture
def pair(family: Any, tmp_path: Path) -> Any:
    """A model in fp32, and one of half its neurons."""
    source = open_model(str(family("llama", torch.float32)))
    return source, attempt(Prune(mlp=0.5, method="magnitude", compensate=False), source, tmp_path / "p")


def training_of(state: Any, teacher: Any, tokens: Tokens, weights: dict[str, float], numbers: list[int]) -> Training:
    choice = choose(state, ("all",), None)
    student, known = Student(state, choice, 0), tensors_of(state, choice)
    optimizer = Optimizer(AdamW(), student.learns, known, [1.0] * len(known))
    schedule = Schedule(1, len(numbers), 1.0, 0, 1)
    return Training(
        student, teacher, tokens, numbers, numbers, weights, schedule, optimizer, Caught(optimizer), 0, lambda *_: None
    )


def plain_loss(
    student: Student, source: Path, tokens: Tokens, numbers: list[int], weights: dict[str, float]
) -> dict[str, Tensor]:
    """Each part of the loss, of all windows at once: means over what is learnt."""
    ids, learnt = tokens.ids[numbers], torch.ones_like(tokens.ids[numbers], dtype=torch.bool)
    learnt = learnt if tokens.learnt is None else tokens.learnt[numbers]
    outputs: list[Tensor] = []
    batch = student.forward(ids, lambda _, h: outputs.append(h))
    with student.behind(student.state), student.holding_head():
        log_q = student.head(batch).double().log_softmax(-1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    hidden: list[Tensor] = []
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda _, a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        log_p = plain(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    found: dict[str, Tensor] = {}
    for name in weights:
        if name == "ce":
            picked = -log_q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
            found[name] = (picked * learnt[:, :-1]).sum() / learnt[:, :-1].sum()
        elif name == "hidden_cosine":
            apart = [1 - torch.cosine_similarity(a, b, -1) for a, b in zip(outputs, hidden, strict=True)]
            found[name] = (torch.stack(apart).double().mean(0) * learnt).sum() / learnt.sum()
        else:
            found[name] = (DIVERGENCES[name](log_p, log_q) * learnt).sum() / learnt.sum()
    return found


@pytest.mark.parametrize("weights", [rare({"kl": 1.0}), {"ce": 1.0}, rare({"reverse_kl": 0.7, "js": 2.0}),
                                     rare({"kl": 1.0, "ce": 0.3}),
                                     {"kl": 0.5, "hidden_cosine": 3.0}])  # fmt: skip
@pytest.mark.parametrize("micro", covered([32, 96, 2048], 96))
def test_a_step_is_the_plain_loss_over_what_is_learnt(
    pair: Any, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], micro: int
) -> None:
    """In one, three or seven micro-batches, of unequal counts and none."""
    monkeypatch.setattr(loop, "MICRO", micro)
    source, state = pair
    numbers, tokens = list(range(7)), replace(TEXT, learnt=learnt_of(1))
    teacher = Live(source.state, tokens, None, "cpu", "hidden_cosine" in weights)
    training = training_of(state, teacher, tokens, weights, numbers)
    value = training.step(0)
    parts = plain_loss(training.student, source.folder, tokens, numbers, weights)
    expected = sum(weights[n] * part for n, part in parts.items())
    assert isinstance(expected, Tensor)
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=3e-6)
    theirs = [p.grad for p in training.student.learns.values()]
    size = torch.stack([g.norm() for g in theirs if g is not None]).norm()
    apart = [(a - b).norm() for a, b in zip(training.slopes.grads, theirs, strict=True) if a is not None and b is not None]
    assert torch.stack(apart).norm() < 3e-6 * size
    by = "kl" if weights.keys() & DIVERGENCES.keys() else "ce"
    with torch.no_grad():
        judged = plain_loss(training.student, source.folder, tokens, numbers, {by: 1.0})[by]
    assert training.judge() == pytest.approx(float(judged), rel=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        rare({"loss": {"ce": 1.0}}),
        {"loss": {"kl": 1.0, "ce": 0.5, "hidden_cosine": 0.5}, "teacher": "live"},
    ],
)
def test_all_of_a_text_learnt_is_the_text(family: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    source, state = pruned(family, tmp_path / "p")
    p, curves, states = Distill(rate=3e-3, batch=4, checks=3, **options), [], []
    for i, learnt in enumerate((None, torch.ones(TEXT.ids.shape, dtype=torch.bool))):
        records: list[Any] = []
        states.append(trained(p, source, state, tmp_path / str(i), records, replace(TEXT, learnt=learnt)))
        curves.append(records[0]["curve"])
    assert curves[0] == curves[1]
    for spec in states[0].specs:
        assert torch.equal(states[0].dense.read(spec.name), states[1].dense.read(spec.name)), spec.name


def test_a_step_without_an_answer_moves_nothing(pair: Any) -> None:
    source, state = pair
    learnt = torch.zeros(TEXT.ids.shape, dtype=torch.bool)
    learnt[4:, 5] = True
    tokens = replace(TEXT, learnt=learnt)
    teacher = Live(source.state, tokens, None, "cpu")
    training = training_of(state, teacher, tokens, {"kl": 1.0}, [0, 1])
    before = [p.detach().clone() for p in training.student.learns.values()]
    assert training.step(0) is None
    assert all(torch.equal(a, b) for a, b in zip(before, training.student.learns.values(), strict=True))
    assert not training.optimizer.state


def sparse() -> Tokens:
    """Windows of which one in three is learnt from, the held-out last two among them."""
    learnt = torch.zeros(TEXT.ids.shape, dtype=torch.bool)
    learnt[::3, 4:20] = True
    learnt[-2:, 8:] = True
    return replace(TEXT, learnt=learnt)


@pytest.mark.slow
def test_steps_of_windows_without_answers_are_told_of_as_such(family: Any, tmp_path: Path) -> None:
    source, state = pruned(family, tmp_path / "p")
    records: list[Any] = []
    trained(Distill(batch=1, rate=3e-3, checks=38), source, state, tmp_path / "d", records, sparse())
    losses = [point[2] for point in records[0]["curve"][1:]]
    assert any(loss is None for loss in losses)
    assert any(loss for loss in losses)
    assert "learnt from the answers, 20.3% of the tokens" in records[0]["notes"], records[0]["notes"]


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bytes(family: Any, tmp_path: Path) -> None:
    source, state = pruned(family, tmp_path / "p")
    p, text = Distill(train=("layers.*.down", "norms"), batch=2, checks=6), sparse()
    whole = trained(p, source, state, tmp_path / "whole", text=text)
    assert killed_often(lambda: trained(p, source, state, tmp_path / "cut", text=text), 8, 2)
    again = trained(p, source, state, tmp_path / "cut", text=text)
    for spec in whole.specs:
        assert torch.equal(whole.dense.read(spec.name), again.dense.read(spec.name)), spec.name


@pytest.mark.slow
def test_a_teacher_is_cached_for_the_text_whatever_is_learnt(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, state = pruned(family, tmp_path / "p")
    trained(Distill(tokens=64, batch=1), source, state, tmp_path / "run" / "steps")
    monkeypatch.setattr("compress.training.teacher.most_likely", None)
    trained(Distill(tokens=64, batch=1), source, state, tmp_path / "run" / "steps", text=sparse())


# --- from the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def lesson(project: Project) -> Project:
    """A project that learns from conversations."""
    (project.model / "chat_template.jinja").write_text(CHATML)
    generator = random.Random(0)
    talk = [said("ask " * generator.randrange(1, 9), "tell " * generator.randrange(1, 9)) for _ in range(80)]
    put(project.folder, *talk, name="chat.jsonl")
    project.edit("data:\n", "data:\n  training: {jsonl: chat.jsonl, answers: true, sequences: 60, length: 32}\n")
    project.edit("passes:\n", "passes:\n  - prune: {mlp: 0.5}\n  - distill: {batch: 4, rate: 0.003}\n")
    return project


@pytest.mark.slow
def test_a_run_learns_from_answers(lesson: Project) -> None:
    assert lesson.plan().code == 0
    result = lesson.run()
    assert result.code == 0, result.err
    assert "learnt from the answers, " in (lesson.out / "report.md").read_text()
    other = lesson.run("data.training.answers=false")
    assert other.code == 0
    assert "learnt from the answers" not in (lesson.out / "report.md").read_text(), "the step is another one"


@pytest.mark.slow
def test_held_out_windows_without_an_answer_are_told_before_anything_is_done(lesson: Project) -> None:
    put(lesson.folder, *[said("a", "tell " * 9)] * 22, said("b " * 2000), name="chat.jsonl")
    for result in (lesson.plan(), lesson.run()):
        assert (
            "chat.jsonl: the 3 windows held out to judge on hold no token of an answer; give more or longer windows"
            in result.line
        )
        assert result.line.startswith(f"{lesson.recipe}:")
    assert not lesson.out.exists()
