"""FastGen: each head takes the first rung that recovers its attention, by the prompt; what that keeps, frees and takes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import pipeline
from compress.cache import rules
from compress.cache.ladder import Ladder
from compress.cache.policy import FILE, SERVED, Layer, Policy, Unit, read
from compress.cache.rules import RUNGS
from compress.cli import main
from compress.errors import ModelError, RecipeError
from compress.export.native import reader
from compress.export.runtime import cache as runtime
from compress.export.runtime import load
from compress.model import attention, data
from compress.model.marks import marked
from compress.model.model import open_model
from compress.passes.kv_policy_fastgen import Climb
from tests.conftest import rare
from tests.cooking import recipe, refused
from tests.masked import NEW, PROMPT, both_caches, by_hand, causal, looking, model_of, places, text_of

SPECIAL, PUNCTUATION = (256, 257, 258), tuple(range(40))  # so that a text has enough of them
EVERY = tuple(sorted({*SPECIAL, *PUNCTUATION}))


def policy_of(folder: Path, recovery: float, dtype: str = "fp32") -> Policy:
    layers = [Layer(each.layer, each.width, each.sliding, (Unit("fastgen", 1000, dtype),) * each.units)
              for each in attention.heads(open_model(str(folder)).state)]  # fmt: skip
    return Policy(tuple(layers), EVERY, 100, 1, Ladder(recovery, SPECIAL, (0, 0, 0)))


# --- the ladder, against the whole matrix of attention ------------------------------------------------------------------


def oracle(A_htt: Tensor, kinds: list[int], start: int) -> list[tuple[list[int], float]]:
    """What every rung keeps and recovers, token by token, of attention [heads, T, T]; entries before `start` are gone."""
    total = A_htt.shape[1]
    there = range(start, total)
    column = [float(A_htt[:, :, j].double().sum()) for j in range(total)]
    mean = [column[j] / (total - j) for j in range(total)]
    special = {j for j in there if j < 4 or kinds[j] == 2}
    punct = special | {j for j in there if kinds[j] == 1}
    some = int(np.ceil(0.3 * len(there) - 1e-9))
    others = sorted((j for j in there if j not in punct), key=lambda j: -mean[j])
    frequent = punct | set(others[:some])
    local = frequent | set(there[len(there) - some :])
    sets = [sorted(kept) for kept in (special, punct, frequent, local, set(there))]
    return [(kept, sum(column[j] for j in kept) / sum(column[j] for j in there)) for kept in sets]


@given(st.integers(1, 60), st.sampled_from([None, 9, 30]), st.floats(0.01, 1.0), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_head_takes_the_first_rung_that_recovers_enough(total: int, sliding: int | None, recovery: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(2, total, 8, generator=draw) for _ in range(2))
    ids = torch.randint(0, 80, (total,), generator=draw)
    ids[torch.rand(total, generator=draw) > 0.9] = 257
    allowed = causal(total, sliding)
    A = (q @ k[0].T * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1)
    layer, unit = Layer(0, 8, sliding, (Unit("fastgen", 1000, "fp32"),)), Unit("fastgen", 1000, "fp32")
    policy = Policy((layer,), EVERY, 100, 1, Ladder(recovery, SPECIAL, (0, 0, 0)))
    kinds = policy.kinds(ids)
    assert kinds.tolist() == [2 if i > 255 else int(i < 40) for i in ids.tolist()]
    found, start = rules.scores({"fastgen"}, q, k[0], 0.3, allowed), total - rules.resident(total, sliding)
    made, at = policy.after_prompt(layer, unit, total, torch.arange(start, total), total, 0, found, kinds)
    wanted = oracle(A, kinds.tolist(), start)
    rung = RUNGS.index(made.rule)
    assert at.tolist() == wanted[rung][0], "what it keeps"
    if total < rules.STEP:
        assert made.rule == "full", "so few tokens tell nothing"
        return
    assert wanted[rung][1] >= recovery - 1e-6, "recovers T, or is everything"
    assert all(recovered < recovery + 1e-6 for _, recovered in wanted[:rung]), "and no rung before it does"
    assert all(set(a[0]) <= set(b[0]) for a, b in pairwise(wanted))
    climbed = [*policy.ladder.climbed(torch.arange(start, total), total, 0, total - start, found["all"][start:], kinds[start:])]  # type: ignore[union-attr]
    assert np.allclose([r for _, _, r in climbed], [r for _, r in wanted], atol=1e-6)


def test_a_rung_that_another_took_stands_where_only_rounding_speaks_against_it() -> None:
    score, kinds = torch.tensor([4.0, 3.0, 2.0, 1.0, 6.0, 1.0, 2.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).byte()
    score = torch.cat([score, torch.zeros(32)])
    kinds = torch.cat([kinds, torch.zeros(32, dtype=torch.uint8)])
    arguments = torch.arange(40), 40, 0, 8, score, kinds
    for off, first in ((1e-7, "special+punct+frequent"), (-1e-7, "special+punct")):
        ladder = Ladder(0.8 + off, (), (0, 0, 0))  # special+punct recovers 16 of 20
        assert ladder.chosen(*arguments)[0] == first
        for told in ("special+punct", "special+punct+frequent"):
            assert ladder.chosen(*arguments, told)[0] == told
        assert ladder.chosen(*arguments, "special")[0] == "special+punct+frequent", "no matter of rounding"
    assert Ladder(1.0, (), (0, 0, 0)).chosen(*arguments, "special")[0] == "special+punct+frequent", (
        "which recovers all of it here"
    )


# --- the cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "recovery"), [rare("llama", 0.02), rare("llama", 0.3), ("llama", 0.55), rare("gemma3", 0.6)])
def test_the_cache_computes_what_masks_would(family: Any, name: str, recovery: float) -> None:
    """And `generate` writes this text; after the eviction on its way each head has what its rung is made of."""
    model, ids = model_of(family(name), policy_of(family(name), recovery)), text_of(1, PROMPT)
    with torch.no_grad():
        made, logits, seen, cache = by_hand(model, ids, [1] * NEW)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None), made)
        plain = model_of(family(name))
        plain.set_attn_implementation("compress_oracle")
        with looking(seen):
            wanted = plain(made, use_cache=False).logits[:, PROMPT - 1 : -1]
    assert float((logits - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert any(not torch.equal(mask, causal(len(mask), None)) for mask in seen.values())
    ranked, kinds = PROMPT + rules.STEP, model.kv_policy.kinds(made[0]).tolist()
    for (layer, head), held in places(cache).items():
        sliding, rung = model.kv_policy.layers[layer].sliding, RUNGS.index(cache.layers[layer].entries[0][head].unit.rule)
        there = range(ranked - rules.resident(ranked, sliding), ranked)
        part = -(-3 * len(there) // 10)
        certain = {j for j in there if j < 4 or kinds[j] >= (2 if rung == 0 else 1)}
        certain |= set(there[-part:]) if rung == 3 else set(there) if rung == 4 else set()
        left = set(held) - set(range(ranked, PROMPT + NEW))
        assert certain <= left <= set(there)
        assert len(left - certain) <= (part if rung in (2, 3) else 0)


@pytest.mark.slow
def test_every_rung_is_taken_by_some_row_and_each_row_takes_its_own(family: Any) -> None:
    """Rows of one batch: of punctuation alone, of none, and padded."""
    model, ids = model_of(family("llama"), policy_of(family("llama"), 0.75)), text_of(3, PROMPT)
    ids[0] %= 40
    ids[1] = ids[1] % 200 + 40
    mask = torch.ones_like(ids)
    ids[2, :17], mask[2, :17] = 258, 0
    both = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258)
    cache = model(ids, attention_mask=mask).past_key_values
    taken = [{entries.unit.rule for layer in cache.layers for entries in layer.entries[row]} for row in range(3)]
    assert taken[0] == {"special+punct"}
    assert taken[1] <= set(RUNGS[3:])
    for row in range(3):
        mine = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(mine, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258)
        assert torch.equal(alone[0, mine.shape[1] :], both[row, PROMPT:])
        held = [
            [len(e) for layer in c.layers for e in layer.entries[r]] for c, r in ((model(mine).past_key_values, 0), (cache, row))
        ]
        assert held[0] == held[1]


def test_after_a_prompt_of_few_tokens_nothing_is_lost(family: Any) -> None:
    """All of it are the first tokens that every rung keeps: by it alone heads would drop whatever comes. Each row by its text."""
    model, plain, ids = model_of(family("llama"), policy_of(family("llama"), 0.85)), model_of(family("llama")), text_of(3, PROMPT)
    mask = torch.ones_like(ids)
    for row, text in enumerate((3, rules.STEP - 1)):
        ids[row, :-text], mask[row, :-text] = 258, 0
    made, wanted = (m.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258)
                    for m in (model, plain))  # fmt: skip
    assert torch.equal(made[:2], wanted[:2])
    assert not torch.equal(made[2], wanted[2])


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_it_holds_the_bytes_of_what_was_taken_and_no_more(family: Any, dtype: str) -> None:
    policy = policy_of(family("llama"), 0.55, dtype)
    model, ids = model_of(family("llama"), policy), text_of(1, PROMPT)
    cache = model(ids).past_key_values
    each = sum(len(e) * rules.entry_bytes(dtype, e.unit.rule, 16) for layer in cache.layers for e in layer.entries[0])
    assert cache.nbytes == each < policy.nbytes(PROMPT)
    assert sum(tensor.nbytes for layer in cache.layers for e in layer.entries[0] for tensor in e.held.values()) == each


# --- from recipe to artifact ------------------------------------------------------------------------------------------------


def step(**options: Any) -> dict[str, Any]:
    return {"kv_policy": {"method": "fastgen", **options}}


def written(folder: Path, model: Path, text: Path, **options: Any) -> Path:
    path = recipe(folder, model, text)
    content = yaml.safe_load(path.read_text()) | {"passes": [step(**options)], "export": [{"native": {}}]}
    content["data"]["calibration"]["length"] = 64
    content["data"]["evaluation"] = {"text": str(text), "sequences": 4, "length": 64}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    return pipeline.run(written(tmp_path_factory.mktemp("fastgen"), family("llama"), text, recovery=0.5))


def test_the_artifact_brings_its_ladder(made: pipeline.Outcome, family: Any, capsys: Any) -> None:
    artifact, proof = made.artifacts["native"]
    assert proof.remark == "compared in fp32"
    policy = read(held := json.loads((artifact / FILE).read_text()), "file")
    assert held["version"] == 2
    assert policy.json() == held == reader.read(artifact).serving[SERVED] == made.state.serving[SERVED]
    marks, ladder = marked(family("llama")), policy.ladder
    assert ladder is not None
    assert (ladder.recovery, ladder.special, policy.marked, policy.context) == (0.5, marks.special, marks.every, 64)
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32), text_of(1, 40)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, runtime.PolicyCache)
    assert {e.unit.rule for layer in out.past_key_values.layers for e in layer.entries[0]} <= set(RUNGS)
    assert main(["inspect", str(artifact)]) == 0
    assert "by the prompt, which at T 0.5 had this in the mean" in capsys.readouterr().out


def test_what_was_measured_is_what_the_cache_takes_of_these_prompts(made: pipeline.Outcome, family: Any, text: Path) -> None:
    """Least, mean and most bytes, from caches that read the calibration windows."""
    policy = read(made.state.serving[SERVED], "state")
    model = load(made.artifacts["native"][0], dtype=torch.float32)
    tokens = data.read(data.Windows(text=str(text), sequences=6, length=64), family("llama"), Path(), 272)
    took = [model(window[None]).past_key_values.nbytes for window in tokens.ids]
    assert policy.ladder is not None
    assert policy.ladder.prompts == (min(took), round(sum(took) / len(took)), max(took))


def test_evaluation_tells_how_far_sizes_lie_apart(made: pipeline.Outcome) -> None:
    told = made.scores["cache"]
    assert told["least"] < told["bytes"] < told["most"] < told["full"]
    assert f"{told['least'] / told['full']:.1%}".replace("%", " %") in made.report.summary()


def test_our_engine_and_our_stream_agree_on_the_cache(made: pipeline.Outcome) -> None:
    ours, theirs = both_caches(made)
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)
    assert (ours.bytes, ours.least, ours.most) == (theirs.bytes, theirs.least, theirs.most)


@pytest.mark.slow
def test_a_budget_is_met_in_the_mean_and_measures_nothing_anew(
    made: pipeline.Outcome, family: Any, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """T by a budget; `plan` says what it found."""
    monkeypatch.setattr(Climb, "__call__", lambda *_: pytest.fail("is measured again"))
    path, found = made.out.parent / "recipe.yaml", []
    for budget in ("70 %", "95 %"):
        other = path.with_name(f"{budget[:2]}.yaml")
        other.write_text(path.read_text().replace("recovery: 0.5", f"budget: {budget}"))
        held = pipeline.run(other, until="kv_policy").state.serving[SERVED]
        assert held["bytes"] == held["ladder"]["prompts"][1] <= int(budget[:2]) / 100 * held["full"]
        found.append((held["ladder"]["recovery"], held["bytes"]))
    assert found[0] < found[1]
    assert main(["plan", str(path.with_name("70.yaml"))]) == 0
    said = capsys.readouterr().out
    assert f"T {found[0][0]:g}" in said
    assert "in the mean over the calibration windows, prompts of 64 tokens" in said


def test_what_makes_no_sense_is_refused_by_name(family: Any, text: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (step(rules=["snap"]), "'rules' is of no use to method: fastgen, which has rules of its own"),
        (step(context=64), "'context' is of no use to method: fastgen"),
        (step(continuation=8), "'continuation' is of no use to method: fastgen"),
        (step(budget="50 %", recovery=0.8), "give one of them"),
        (step(dtype=["bf16", "int8"]), "name one dtype"),
        (step(recovery=1.5), "recovery"),
        ({"kv_policy": {"recovery": 0.8}}, "'recovery' is of no use to method: ilp"),
        ({"kv_policy": {"method": "uniform", "rules": ["snap"], "recovery": 0.8}}, "'recovery' is of no use to method: uniform"),
        ({"kv_policy": {"method": "uniform", "rules": ["snap"], "continuation": 8}}, "'continuation' is of no use"),
    ]
    for i, (one, says) in enumerate(cases):
        refused(tmp_path / str(i), family("llama"), text, [one], says)
    path = recipe(tmp_path / "short", family("llama"), text)
    short = yaml.safe_load(path.read_text()) | {"passes": [step()], "export": []}
    short["data"]["calibration"]["length"] = 31
    path.write_text(yaml.safe_dump(short))
    with pytest.raises(RecipeError, match="keeps everything of prompts of fewer than 32 tokens, and windows have 31"):
        pipeline.plan(path)
    refused(tmp_path / "low", family("llama"), text, [step(budget="5 %")], "FastGen keeps .* at least of a prompt of 32 tokens")
    path = recipe(tmp_path / "bare", family("llama"), None)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": [step()], "export": []}))
    with pytest.raises(ValueError, match=r"needs data\.calibration"):
        pipeline.plan(path)


def test_a_damaged_ladder_is_refused(made: pipeline.Outcome) -> None:
    held = json.loads((made.artifacts["native"][0] / FILE).read_text())
    units = [{**each, "units": [["snap", 0.5, "bf16"]] * 2} for each in held["layers"]]
    changes: list[dict[str, Any]] = [
        {"version": 1},
        {"layers": units},
        {"ladder": None},
        *({"ladder": {**held["ladder"], **one}} for one in (
            {"recovery": 0}, {"recovery": True}, {"frequent": 1.2}, {"local": "a"}, {"special": [-1]}, {"prompts": [1, 2]})),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(ModelError, match="is damaged"):
            read({**held, **change}, "here")
