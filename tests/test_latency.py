"""Limits of time: the table that a machine makes, what choices come to by it, and whether it is read as it should be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml

from compress.errors import RecipeError
from compress.formats import parse
from compress.model.model import open_model
from compress.passes.allocate import Allocate
from compress.passes.latency import read_table, visits
from compress.timing import ALIGNED, Store, Timer, measure
from tests.conftest import Project, covered
from tests.test_joint import FORMATS, Drawn, Every, best_of, drawn, drawn_table, takes

MIXED = ["int2:g32", "int3:g32", "int4:g32", "int8:g32"]
SHAPED = {"mlp": [0.75, 0.5], "kv_groups": [0.5]}


def write(project: Project, allocate: dict[str, Any]) -> None:
    """The recipe, with this allocation, its table in table.json."""
    held = yaml.safe_load(project.recipe.read_text())
    steps = [{"allocate": {"budget": "4 bits", "formats": FORMATS, "probe": 64, **allocate}}, {"quantize": {}}]
    project.recipe.write_text(yaml.safe_dump(held | {"passes": steps, "export": [{"native": {}}]}, sort_keys=False))


def tabled(project: Project, **options: Any) -> dict[str, Any]:
    """A recipe's drawn table, written beside it: what it holds."""
    allocate = Allocate.model_validate({"formats": FORMATS, "structure": SHAPED})
    table = drawn_table(allocate, open_model(str(project.model)).state, **options).model_dump(mode="json")
    (project.folder / "table.json").write_text(json.dumps(table))
    return table


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", covered(["<= 80 %", "60 %", "<= 50 %", "12 ms", "9.5"], "60 %", "12 ms"))
@pytest.mark.parametrize("metric", ["kl", "output"])
def test_bits_alone_within_a_limit_of_time_are_the_best_of_all(family: Any, limit: str, metric: str) -> None:
    state = open_model(str(family("llama"))).state
    table = drawn_table(Allocate.model_validate({"formats": MIXED}), state)
    every = Every.of(state, Allocate.model_validate({"formats": FORMATS}))
    allocate = Allocate.model_validate({"formats": FORMATS, "budget": "3 bits", "constraints": {"latency": limit},
                                        "latency": table, "metric": metric})  # fmt: skip
    head = takes(state.graph["lm_head"].shape, "bf16")
    original = head + sum(takes(s.shape, "bf16") for s in state.graph.linear)
    room = (float(limit.strip("<=% ")) / 100 * original if "%" in limit else float(limit.strip("ms ")) * 1e6) - head
    able = (every.use["bytes"] <= 3 * sum(s.numel for s in state.graph.linear) / 8) & (every.use["latency"] <= room)
    for seed in range(5):
        if not able.any():
            with pytest.raises(RecipeError, match="no allocation keeps to latency"):
                best_of(allocate, False)(state, drawn(seed), Drawn(seed))
            continue
        best = best_of(allocate, False)(state, drawn(seed), Drawn(seed))
        assert best.damage == pytest.approx(every.damage(seed)[able].min(), rel=1e-6)


def test_what_is_named_as_the_least_can_be_kept_and_nothing_less(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    table = drawn_table(Allocate.model_validate({"formats": FORMATS, "structure": SHAPED}), state)
    for structure in (None, SHAPED):
        for shapes in ("uniform", "free") if structure else ("uniform",):
            options = {"formats": FORMATS, "budget": "8 bits", "latency": table, "structure": structure, "shapes": shapes}

            def find(limit: str, options: dict[str, Any] = options) -> Any:
                allocate = Allocate.model_validate({**options, "constraints": {"latency": limit}})
                return best_of(allocate, options["shapes"] == "free")(state, drawn(0), Drawn(0))

            with pytest.raises(RecipeError) as told:
                find("<= 1 %")
            least = float(str(told.value).partition("the least possible is ")[2].partition(" ms")[0])
            with pytest.raises(RecipeError, match="the least possible is"):
                find(f"{0.998 * least} ms")
            assert find(f"{1.002 * least} ms").plan().forecast.latency.expected <= 1.002 * least / 1e3


@pytest.mark.parametrize(("name", "also"), [("qwen2", ["embed"]), ("qwen2", []), ("llama", ["embed", "lm_head"]), ("gpt2", [])])
def test_a_look_up_is_free_and_a_head_is_not(family: Any, name: str, also: list[str]) -> None:
    state = open_model(str(family(name))).state
    allocate = Allocate.model_validate({"formats": FORMATS, "also": also})
    table = drawn_table(allocate, state)
    found = allocate.model_copy(update={"latency": table})
    best = best_of(found, False)(state, drawn(1), Drawn(1))
    forecast = best.plan().forecast
    assert forecast is not None
    assert forecast.latency is not None
    assert forecast.latency.allowed is None, "it is told, and limits nothing"
    formats = best.plan().formats
    owner = state.graph.owner(next(s for s in state.graph if s.role == "head"))
    wanted = takes(owner.shape, str(formats.get(owner.name, "bf16")))
    wanted += sum(takes(s.shape, str(formats.get(s.name, "bf16"))) for s in state.graph.linear)
    assert forecast.latency.expected == pytest.approx(wanted / 1e9)


def test_an_expert_counts_by_how_often_it_is_seen(family: Any) -> None:
    state = open_model(str(family("mixtral"))).state
    often = {batch: visits(state, batch) for batch in (1, 2)}
    experts = [s.name for s in state.graph if s.expert is not None]
    assert experts
    assert {often[1][name] for name in experts} == {0.5}, "two of four"
    assert {often[2][name] for name in experts} == {0.75}
    assert often[1]["embed"] == 0
    assert often[1]["lm_head"] == 1


@pytest.mark.parametrize("name", covered(["llama", "qwen2", "gemma3", "gpt2", "mixtral", "phi3"], "mixtral"))
@pytest.mark.parametrize("shapes", ["uniform", "free"])
def test_a_table_has_all_that_may_be_chosen(family: Any, name: str, shapes: str) -> None:
    """Every shape, of pins and with ranks too; with less an allocation would stop at what it lacks."""
    state = open_model(str(family(name))).state
    structure = {"structure": {"mlp": [0.5], **({} if name == "gpt2" else {"kv_groups": [0.5]})}, "shapes": shapes}
    more: dict[str, Any] = {} if name == "mixtral" else structure
    allocate = Allocate.model_validate({
        "formats": FORMATS, "ranks": [0, 4], "budget": "12 bits", "pins": {"lm_head": "int8:g32", "layers.0.*": "bf16"}, **more,
    })  # fmt: skip
    full = allocate.model_copy(update={"latency": drawn_table(allocate, state), "constraints": {"latency": "100 %"}})
    for outcome in full.outcomes(state):
        assert outcome.plan is not None


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_measures_what_the_recipe_may_choose(project: Project) -> None:
    """From the recipe that names the file which is not there yet, to a run that keeps to it."""
    write(project, {"structure": SHAPED, "constraints": {"latency": "<= 1000 %"}, "latency": "table.json"})
    file = project.folder / "table.json"
    assert "table.json" in project("plan", project.recipe).line
    done = project("bench", project.recipe, "--table", file, "--repeats", "3", "--batch", "2")
    assert done.code == 0, done.err
    table = read_table(file)
    assert (table.batch, table.turns, table.dtype, table.elsewhere()) == (2, 3, "bf16", "")
    assert all(e.least <= e.seconds <= e.most for e in table.entries)
    allocate = Allocate.model_validate({"formats": FORMATS, "structure": SHAPED})
    pairs = allocate.timed(open_model(str(project.model)).state)
    assert [(e.shape, parse(e.format)) for e in table.entries] == list(pairs)
    assert {shape for shape, _ in pairs} > {(128, 64), (96, 64), (64, 64), (272, 64)}, "as it is, and smaller"
    told = project("plan", project.recipe)
    assert "latency: " in told.out
    assert "ms a step of 2 tokens expected in matrices" in told.out
    assert project("run", project.recipe).code == 0
    assert "ms a step of 2 tokens expected in matrices" in (project.out / "plan.yaml").read_text()
    file.write_text("{")  # what is made anew is not read
    assert project("bench", project.recipe, "--table", file, "--repeats", "1", "--json").out == file.read_text()


@pytest.mark.slow
def test_the_table_decides_the_step_and_its_name_does_not(project: Project) -> None:
    table = tabled(project)
    write(project, {"structure": SHAPED, "constraints": {"latency": "<= 90 %"}, "latency": "table.json"})
    assert project("run", project.recipe).code == 0
    (project.folder / "table.json").rename(project.folder / "other.json")
    project.edit("latency: table.json", "latency: other.json")
    assert project("plan", project.recipe).out.count("cached") == 2
    table["entries"][0]["seconds"] *= 2
    (project.folder / "other.json").write_text(json.dumps(table))
    assert "cached" not in project("plan", project.recipe, "--no-measure").out
    assert project("bench", project.out, "--prompt", "4", "--new", "2", "--repeats", "1").code == 0, "without the file"


@pytest.mark.slow
def test_another_machine_is_a_note(project: Project) -> None:
    tabled(project, cpu="another processor")
    write(project, {"latency": "table.json"})
    assert "note: the latency table was measured on 'another processor'" in project("plan", project.recipe, "--no-measure").out
    assert "measured on 'another processor'" in project("run", project.recipe).out
    tabled(project, threads=torch.get_num_threads() + 1)
    assert "note: the latency table was measured with" in project("plan", project.recipe, "--no-measure").out
    tabled(project)
    assert "latency table was" not in project("plan", project.recipe, "--no-measure").out


def limited(project: Project, shapes: str) -> Any:
    """A recipe with a limit of time by a table; the table."""
    table = tabled(project)
    write(project, {"structure": SHAPED, "shapes": shapes, "constraints": {"latency": "100 %"}, "latency": "table.json"})
    return table


@pytest.mark.slow
@pytest.mark.parametrize("shapes", covered(["uniform", "free"], "uniform"))
def test_a_table_that_is_not_spoilt_will_do(project: Project, shapes: str) -> None:
    limited(project, shapes)
    assert project("plan", project.recipe, "--no-measure").code == 0


@pytest.mark.parametrize(("spoil", "line"), [
    (lambda t: "", "is no JSON"),
    (lambda t: "[]", "holds a list where a mapping is needed"),
    (lambda t: json.dumps({**t, "kind": "a table"}), "is no latency table (kind: "),
    (lambda t: json.dumps({**t, "entries": []}), "is no latency table (entries: "),
    (lambda t: json.dumps({**t, "batch": 0}), "is no latency table (batch: "),
    (lambda t: json.dumps({k: v for k, v in t.items() if k != "cpu"}), "is no latency table (cpu: "),
    (lambda t: json.dumps({**t, "entries": [*t["entries"], t["entries"][0]]}), "is there 2 times"),
    (lambda t: json.dumps(t).replace("int4:g32", "int4:g33"), "is no latency table (entries."),
    (lambda t: json.dumps({**t, "entries": [{**e, "seconds": float("nan")} for e in t["entries"]]}), "entries.0.seconds"),
    (lambda t: json.dumps({**t, "entries": [{**e, "seconds": -1} for e in t["entries"]]}), "entries.0.seconds"),
    (lambda t: json.dumps({**t, "entries": [{**e, "shape": [1, 2, 3]} for e in t["entries"]]}), "entries.0.shape"),
    (lambda t: json.dumps({**t, "entries": [e for e in t["entries"] if e["format"] != "int4:g32"]}), "has no int4:g32 of"),
    (lambda t: json.dumps({**t, "entries": [e for e in t["entries"] if e["shape"] != [96, 64]]}), "of 96 x 64"),
    (lambda t: json.dumps({**t, "entries": [e for e in t["entries"] if e["shape"] != [272, 64]]}), "as 'lm_head' may be"),
    (lambda t: json.dumps({**t, "dtype": "fp32"}), "is of a model in fp32, and this one is in bf16"),
])  # fmt: skip
@pytest.mark.parametrize("shapes", covered(["uniform", "free"], "free"))
def test_a_table_that_will_not_do_is_one_line(project: Project, spoil: Any, line: str, shapes: str) -> None:
    table = limited(project, shapes)
    (project.folder / "table.json").write_text(spoil(table))
    told = project("plan", project.recipe, "--no-measure").line
    assert line in told
    assert "compress bench RECIPE --table FILE" in told
    assert told.startswith(str(project.recipe)), "with its place"


@pytest.mark.parametrize(("allocate", "line"), [
    ({"constraints": {"latency": 90}}, "times are looked up in a table, and 'latency' names none"),
    ({"constraints": {"latency": "fast"}, "latency": "table.json"}, "'fast' is no limit; write '<= 80 %' of what the model has"),
    ({"constraints": {"latency": True}, "latency": "table.json"}, "'latency' needs text"),
    ({"constraints": {"latency": "<= 1 %"}, "latency": "table.json"}, "keeps to latency <= 1 %; the least possible is"),
    ({"constraints": {"latency": 0.01}, "latency": "table.json"}, "no allocation keeps to latency 0.01; the least possible is"),
    ({"constraints": {"latency": "80 %", "parameters": "80 %"}, "latency": "table.json"}, "'constraints' is about shapes"),
    ({"latency": "none.json"}, "none.json: No such file"),
    ({"latency": "."}, "Is a directory"),
    ({"latency": 5}, "'latency' needs a mapping, not '5'"),
    ({"latency": "table.json", "plan": {"layers.0.mlp.up": "int4:g32"}}, "a plan is taken as it is; leave out"),
])  # fmt: skip
def test_options_that_make_no_sense_are_one_line(project: Project, allocate: dict[str, Any], line: str) -> None:
    tabled(project)
    write(project, allocate)
    assert line in project("plan", project.recipe, "--no-measure").line


def test_a_step_of_several_tokens_is_called_one(project: Project) -> None:
    tabled(project, batch=4)
    write(project, {"latency": "table.json", "constraints": {"latency": "1 %"}})
    assert " ms a step of 4 tokens, " in project("plan", project.recipe, "--no-measure").line


@pytest.mark.parametrize(("arguments", "line"), [
    (["{recipe}", "--table", "{folder}"], "is a folder; name a file"),
    (["{recipe}", "--table", "{folder}/none/table.json"], "is in no folder that there is"),
    (["{model}", "--table", "{folder}/t.json"], "is no recipe; --table times what the 'allocate' of a recipe could choose"),
    (["{plain}", "--table", "{folder}/t.json"], "has no 'allocate'"),
    (["{recipe}", "--table", "{folder}/t.json", "--device", "cuda"], "--device is for engines"),
    (["{recipe}", "--table", "{folder}/t.json", "--new", "5"], "--new is for engines"),
    (["{recipe}", "--table", "{folder}/t.json", "--against", "{model}"], "--against is for engines"),
    (["{model}", "--against", "{model}", "--batch", "2"], "--batch is for --table"),
])  # fmt: skip
def test_what_bench_is_asked_wrongly_is_one_line(project: Project, arguments: list[str], line: str) -> None:
    plain = project.folder / "plain.yaml"
    plain.write_text(project.recipe.read_text())
    write(project, {})
    names = {"recipe": project.recipe, "folder": project.folder, "model": project.model, "plain": plain}
    assert line in project("bench", *(a.format(**names) for a in arguments)).line
    assert not (project.folder / "t.json").exists()


# --- how it is measured -----------------------------------------------------------------------------------------------


def test_no_weights_are_handed_out_again_before_all_the_others() -> None:
    store, seen = Store(1 << 16), list[int]()
    for _ in range(100):
        slice_ = store.take(torch.int32, (7, 33))
        assert slice_.shape == (7, 33)
        seen.append(slice_.data_ptr())
    period = seen.index(seen[0], 1)
    assert period * 7 * 33 * 4 > 0.9 * (1 << 16)
    assert all(not (place - seen[0]) % ALIGNED for place in seen)
    large = store.take(torch.bfloat16, (1 << 10, 1 << 8))
    assert large.float().min() > 0, "numbers that no processor is slow with, and more of them than the store was made for"


@pytest.mark.parametrize(
    "text", ["bf16", "int3:g32", "int4:g64:asym", "nf3:g64:dq8x16", "lut2:g64", "tcq3:l8:r32", "int3:g32+r4:int8:channel"]
)
def test_what_is_timed_is_the_module_that_serves_the_format(text: str) -> None:
    timer = Timer((96, 64), parse(text), torch.bfloat16, torch.bfloat16, torch.rand(2, 1, 64).bfloat16(), Store(1 << 16))
    with torch.no_grad():
        timer.warm()
        timer.turn()
        timer.fill()
        assert timer.module(timer.x).isfinite().all()
    if text != "bf16":
        assert timer.module.format == text


def test_what_is_more_work_takes_longer(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    done: list[int] = []
    pairs = [((4096, 1024), parse("int4:g32")), ((64, 64), parse("int4:g32"))]
    table = measure(pairs, state, 1, 3, done.append)
    assert table.entries[0].seconds > 3 * table.entries[1].seconds
    assert done == [1, 2, 3, 4]
