"""The method `learned` of `quantize`: never worse than GPTQ where it did not look, the same bytes each time, all formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline
from compress.errors import RecipeError
from compress.formats import parse
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.model.seeds import seeded
from compress.model.stream import Stream
from compress.passes import learned
from compress.passes import learned_core as core
from compress.passes.quantize import Quantize
from compress.state import State
from tests import pass_laws
from tests.conftest import contents, covered, rare
from tests.cooking import bake, cook, recipe, several
from tests.pass_laws import attempt, check_pass, tensors_of
from tests.test_quantize import records

QUICK = {"method": "learned", "steps": 12}
MUCH = 64  # windows of 32 tokens: of fewer, nothing is learned that is of use elsewhere


@pytest.fixture
def much(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """More text for the laws of passes."""
    draw = torch.Generator().manual_seed(5)
    tokens = Tokens(torch.randint(0, 256, (MUCH, 32), generator=draw), "random bytes")
    monkeypatch.setattr(pass_laws, "TOKENS", tokens)
    return tokens


@pytest.mark.parametrize(("count", "length"), [(1, 32), (2, 32), (7, 2048), (8, 256), (64, 256), (65, 7)])
def test_some_windows_are_held_out_and_the_others_are_learned_from(count: int, length: int) -> None:
    held, some = learned.windows(count, length, seeded(0, "x"))
    flat = [i for chunk in (*held, *some) for i in chunk]
    assert sorted(flat) == list(range(count))
    assert sum(map(len, held)) == max(1, count // learned.HELD)
    assert all(len(chunk) * length <= max(learned.TOKENS, length) for chunk in (*held, *some))


def error(source: State, state: State, windows: torch.Tensor) -> float:
    """The loss of the first block on some windows: in front of it nothing was changed."""
    found = []
    for s in (source, state):
        stream = Stream(s)
        (batch,) = stream.start(s, [windows])
        with stream.block(s, 0) as block:
            found.append(stream.call(block, batch, 0))
    return float(core.relative(found[1], found[0]))


@pytest.mark.parametrize(("name", "text"), [
    ("llama", "int2:g32"), rare("gpt2", "nf2:g32"), rare("llama", "lut2:g64"),
    *(rare(*case) for case in (("mixtral", "int2:g32:asym"), ("gemma2", "int3:channel"))),
])  # fmt: skip
def test_a_block_is_better_than_gptq_leaves_it_on_windows_that_were_held_out(
    family: Any, much: Tokens, tmp_path: Path, name: str, text: str
) -> None:
    model = open_model(str(family(name, torch.float32, blocks=1)))
    gptq, better = (attempt(Quantize(format=parse(text), **options), model, tmp_path / str(i))
                    for i, options in enumerate(({}, QUICK)))  # fmt: skip
    held = torch.cat([much.ids[numbers] for numbers in learned.windows(MUCH, 32, seeded(0, "x"))[0]])
    before, after = (error(model.state, state, held) for state in (gptq, better))
    assert after < before


@pytest.mark.slow
def test_where_no_step_is_better_the_start_stays(
    family: Any, much: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are far too long."""
    monkeypatch.setattr(core, "REACH", 1e4)
    model, form = open_model(str(family("llama"))), parse("int4:g32")
    gptq, same = (attempt(Quantize(format=form, **options), model, tmp_path / str(i)) for i, options in enumerate(({}, QUICK)))
    ours, theirs = tensors_of(same), tensors_of(gptq)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.slow
def test_no_steps_are_gptq_to_the_byte(family: Any, text: Path, tmp_path: Path) -> None:
    made = [cook(tmp_path / str(i), family("llama"), text, format="int3:g32", pins={"lm_head": "int8:g32"}, **options)
            for i, options in enumerate(({}, {"method": "learned", "steps": 0}))]  # fmt: skip
    ours, theirs = (tensors_of(m.state) for m in made)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.slow
def test_one_window_leaves_none_to_judge_by(family: Any, text: Path, tmp_path: Path) -> None:
    paths = [recipe(tmp_path / str(i), family("llama", blocks=1), text, exports=False, format="int3:g32", **options)
             for i, options in enumerate(({}, QUICK))]  # fmt: skip
    gptq, same = (pipeline.run(path, ["data.calibration.sequences=1"]) for path in paths)
    ours, theirs = tensors_of(same.state), tensors_of(gptq.state)
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    assert all(r["notes"][-1] == learned.NOTHING_HELD for r in records(same).values())


@pytest.mark.slow
def test_records_tell_what_became_of_the_block_and_of_each_matrix(family: Any, text: Path, tmp_path: Path) -> None:
    options = {"format": "int3:g32", "pins": {"layers.1.*": "bf16", "*.v": "bf16", "lm_head": "int8:g32"}}
    paths = [recipe(tmp_path / str(i), family("llama"), text, exports=False, **options, **o) for i, o in enumerate(({}, QUICK))]
    gptq, made = (records(pipeline.run(path, [f"data.calibration.sequences={MUCH}"])) for path in paths)
    assert made.keys() == gptq.keys()
    notes = {r["notes"][-1] for name, r in made.items() if name != "lm_head"}
    assert len(notes) == 1
    first, last = map(float, re.findall(r"([\d.e-]+) -> ([\d.e-]+)$", notes.pop())[0])
    assert last < first
    assert made["lm_head"]["notes"] == [], "outside of blocks nothing is learned"
    for name in set(made) - {"lm_head"}:
        assert 0 < made[name]["error"] < 3 * gptq[name]["error"]
        assert made[name]["error"] != gptq[name]["error"]
        assert made[name]["rounding"] == gptq[name]["rounding"]


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["mixtral", "gpt2", "qwen2", "gemma2"], "gpt2"))
def test_the_laws_of_passes_hold(family: Any, much: Tokens, tmp_path: Path, name: str) -> None:
    """Stopped and started again among them."""
    check_pass(Quantize(format=parse("int3:g32:asym"), **QUICK), family(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("drift", covered([0.0, 1.0], 1.0))
def test_two_runs_give_the_same_bytes_and_another_seed_others(family: Any, text: Path, tmp_path: Path, drift: float) -> None:
    made = []
    for i, seed in enumerate((0, 0, 1)):
        path = recipe(tmp_path / str(i), family("llama", blocks=1), text, format="int2:g32", drift=drift, **QUICK)
        made.append(
            contents(
                pipeline.run(path, [f"seed={seed}", f"data.calibration.sequences={MUCH}"]).artifacts["compressed_tensors"][0]
            )
        )
    weights = [m["model.safetensors"] for m in made]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "exporters"), [
    ("int4:g32", ("native", "compressed_tensors", "gptq", "gguf")), ("nf3:g32:dq8x16", ("native",)),
    rare("int4:g32", ("onnx",)),
    rare("lut3:g32", ("native", "onnx")),
])  # fmt: skip
def test_every_exporter_proves_what_was_learned(
    family: Any, text: Path, tmp_path: Path, form: str, exporters: tuple[str, ...]
) -> None:
    done = several(tmp_path, family("llama", blocks=1), text, *exporters, format=form, **QUICK)
    assert set(done.artifacts) == set(exporters)


def test_steps_are_an_option_of_this_method(family: Any, text: Path, tmp_path: Path) -> None:
    for method in ("gptq", "rtn"):
        with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  .*'steps' is an option of method: learned; leave it out"):
            cook(tmp_path, family("llama"), text, format="int4:g32", method=method, steps=5)


def test_it_needs_a_text(family: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  'learned' needs data.calibration; add it, or use method: rtn"):
        cook(tmp_path, family("llama"), format="int4:g32", method="learned")


def test_of_factors_nothing_is_learned(family: Any, text: Path, tmp_path: Path) -> None:
    passes = {"factorize": {"rank": 0.5}}, {"quantize": {"format": "int4:g32", **QUICK}}
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  'layers.0.attn.q' is lr\d+ by an earlier step, and of factors"):
        bake(tmp_path, family("llama"), text, "native", *passes)


@pytest.mark.slow
def test_it_realises_what_is_allocated_and_corrected(family: Any, text: Path, tmp_path: Path) -> None:
    allocate = {"budget": "4 bits", "formats": ["int2:g32", "int4:g32", "int8:g32"], "ranks": [0, 4], "probe": 64}
    done = bake(tmp_path, family("llama"), text, "native", {"allocate": allocate}, {"quantize": QUICK}, {"lqlora": QUICK})
    assert done.artifacts["native"][1] is not None
    assert any("learned: " in note for r in records(done).values() for note in r.get("notes", ()))
