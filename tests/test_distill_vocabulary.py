"""A student that knows fewer tokens than its teacher: it is asked for the probabilities of those, whichever way it is asked."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from compress import pipeline
from compress.model.data import Lessons, Windows, read
from compress.model.model import open_model
from compress.passes.distill import Distill, halves
from compress.training.choice import choose
from compress.training.loss import DIVERGENCES
from compress.training.student import Student
from compress.training.teacher import Live
from tests.conftest import covered, rare
from tests.cooking import recipe
from tests.test_distill import logits_of, trained
from tests.test_tokenizer import prose
from tests.test_vocabulary import listed, spoken

WINDOWS = {"sequences": 90, "length": 32}
RATE = 3e-3
TURNS = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a seat"}]


@pytest.fixture(scope="module", params=covered(["llama", "qwen2"], "llama"))
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, a recipe that takes most of its tokens and half of its neurons, and the state after that."""
    folder = tmp_path_factory.mktemp("cut")
    source = spoken(folder / "model", request.param)
    words = prose(11, 3_000)
    (folder / "text.txt").write_text(words, encoding="utf-8", newline="")
    keep = listed(folder, source, words[:300])
    content = yaml.safe_load(recipe(folder, source, folder / "text.txt").read_text())
    content["data"]["training"] = {"text": str(folder / "text.txt"), **WINDOWS}
    content["passes"] = [{"edit": {"vocab": str(keep)}}, {"prune": {"mlp": 0.5, "method": "magnitude", "compensate": False}}]
    content["export"] = [{"native": {}}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "passes": [*content["passes"], {"distill": {"rate": RATE}}]}))
    return open_model(str(source)), path, pipeline.run(path, until="prune").state


@pytest.mark.slow
def test_what_is_judged_is_the_divergence_over_the_tokens_that_are_left(cut: Any, tmp_path: Path) -> None:
    """Against transformers: the teacher's logits of the student's tokens, their softmax over these alone."""
    source, path, state = cut
    kept = list(state.vocabulary)
    assert 50 < len(kept) < 390
    tokens = read(Windows(text=str(path.parent / "text.txt"), **WINDOWS), source.folder, path.parent, 420, state.vocabulary)
    plain = transformers.AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, attn_implementation="eager")
    held = tokens.ids[halves(*tokens.ids.shape)[1]]
    with torch.no_grad():
        log_p = plain(input_ids=held, use_cache=False).logits[..., kept].double().log_softmax(-1)
    log_q = logits_of(Student(state, choose(state, ("norms",), None), 0), state.ids(held)).double().log_softmax(-1)
    expected = DIVERGENCES["kl"](log_p, log_q).mean()
    options: dict[str, dict[str, Any]] = {"live": {}, "streamed": {}, "cached": {"top_k": 420}}
    for teacher, more in options.items():
        records: list[Any] = []
        p = Distill(teacher=teacher, rate=RATE, batch=4, tokens=1024, **more)  # type: ignore[arg-type]
        trained(p, source, state, tmp_path / teacher, records, tokens)
        held_out = [point[3] for point in records[0]["curve"]]
        assert held_out[0] == pytest.approx(float(expected), rel=2e-3 if more else 1e-5), teacher
        assert min(held_out) < held_out[0], teacher


def test_no_more_logits_of_the_teacher_are_held_than_of_the_student(cut: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has more of them in a row."""
    source, path, state = cut
    tokens = read(Windows(text=str(path.parent / "text.txt"), **WINDOWS), source.folder, path.parent, 420, state.vocabulary)
    teacher, sizes, logits = Live(source.state, tokens, state.vocabulary, "cpu"), list[int](), Live.logits
    with teacher.look([0, 1]) as look:
        assert look.known is not None
        whole = look.known(slice(0, 64)).log_p
        monkeypatch.setattr("compress.training.teacher.NUMBERS", 10 * 420)
        monkeypatch.setattr(Live, "logits", lambda self, b: sizes.append(len(b.tokens)) or logits(self, b))
        for rows in (slice(3, 48), torch.arange(3, 48)):
            torch.testing.assert_close(look.known(rows).log_p, whole[3:48], rtol=1e-5, atol=1e-5)
    assert max(sizes) == 10


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{"kl": 1.0}, rare({"js": 1.0, "reverse_kl": 1.0}), rare({"ce": 1.0})])
def test_a_few_cached_tokens_bound_it_from_below(cut: Any, tmp_path: Path, loss: dict[str, float]) -> None:
    """The cached tokens are the student's, and the rest of those that it knows is one outcome more."""
    source, path, state = cut
    tokens = read(Windows(text=str(path.parent / "text.txt"), **WINDOWS), source.folder, path.parent, 420, state.vocabulary)
    starts = []
    for k in (2, 8, 420):
        records: list[Any] = []
        options = {} if loss.keys() == {"ce"} else {"top_k": k}
        p = Distill(loss=loss, batch=4, tokens=256, **options)  # type: ignore[arg-type]
        trained(p, source, state, tmp_path / str(k), records, tokens)
        starts.append(records[0]["curve"][0][3])
    assert all(0 < a <= b * 1.001 for a, b in pairwise(starts))


@pytest.mark.parametrize("teacher", covered(["cached", "live", "streamed"], "cached"))
def test_from_the_recipe_to_the_artifact(cut: Any, tmp_path: Path, teacher: str) -> None:
    _, path, _ = cut
    content = yaml.safe_load(path.read_text())
    content["passes"][-1] = {"distill": {"teacher": teacher, "rate": RATE, "batch": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**content, "out": str(tmp_path / "out")}))
    done = pipeline.run(tmp_path / "recipe.yaml")
    curve = next(r["curve"] for r in done.report.records if "curve" in r)
    assert min(point[3] for point in curve) < curve[0][3]
    assert len(done.state.vocabulary or ()) == done.state.graph["embed"].shape[0]
    assert (tmp_path / "out" / "native" / "tokenizer.source_ids.json").exists()


def test_answers_are_those_of_the_smaller_tokenizer(cut: Any, tmp_path: Path) -> None:
    source, _, state = cut
    template = "{% for m in messages %}<turn>{{ m['content'] }}<turn>{% endfor %}{% if add_generation_prompt %}<turn>{% endif %}"
    (source.folder / "chat_template.jinja").write_text(template)
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": TURNS})] * 40))
    found = []
    for vocabulary in (None, state.vocabulary):
        asked = Lessons(jsonl="chat.jsonl", answers=True, sequences=2, length=24)
        tokens = read(asked, source.folder, tmp_path, 420, vocabulary)
        assert tokens.learnt is not None
        assert 0.2 < tokens.learnt.float().mean() < 0.9
        texts = transformers.AutoTokenizer.from_pretrained(source.folder)
        found.append("".join(texts.decode([int(t)]) for t in tokens.ids[0][1:][tokens.learnt[0][:-1]]))
    assert all(text.startswith("sat on a seat") for text in found), found
