"""Shape and bits from one budget: the best of all that is possible, within every limit, and the model that it says."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import sparse

from compress.errors import CompressError, RecipeError
from compress.export.runtime import load
from compress.formats import Dense
from compress.model.model import open_model
from compress.passes import joint
from compress.passes.allocate import Allocate
from compress.passes.latency import KIND, LatencyTable, cpu_name
from compress.passes.prune import units
from compress.passes.structure import Level
from compress.passes.trials import Solved
from compress.state import State
from compress.state.graph import Site
from tests.conftest import FAMILIES, Project, make_model, rare
from tests.cooking import bake, stories
from tests.test_prune import redundant

LAYERS = 2  # of a project's model

FORMATS = ["int2:g32", "int4:g32"]
SHAPES = {"mlp": [0.75, 0.5], "kv_groups": "all"}


def allocating(**options: Any) -> Allocate:
    return Allocate.model_validate({"formats": FORMATS, "structure": SHAPES, **options})


# --- against every choice there is --------------------------------------------------------------------------------------


def figure(seed: int, *of: object) -> float:
    """A number that a name always has."""
    return zlib.crc32(repr((seed, *of)).encode()) / 2**32


class Drawn(dict[Level, float]):
    """Damages of levels, drawn by name."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def __missing__(self, level: Level) -> float:
        return 3 * figure(self.seed, *level)


def takes(shape: tuple[int, int], fmt: str) -> int:
    """Nanoseconds, drawn by name."""
    return round(1e6 * (0.2 + (2 if fmt == "bf16" else 1) * figure(3, shape, fmt)))


def drawn_table(allocate: Allocate, state: State, **options: Any) -> LatencyTable:
    """A table of all that may be chosen for a state."""
    entries = [{"shape": shape, "format": str(fmt), **dict.fromkeys(("seconds", "least", "most"), takes(shape, str(fmt)) / 1e9)}
               for shape, fmt in allocate.timed(state)]  # fmt: skip
    here = {"kind": KIND, "compress": "1", "cpu": cpu_name(), "threads": torch.get_num_threads(), "batch": 1, "turns": 1}
    return LatencyTable.model_validate({**here, "dtype": str(Dense(state.dtype)), "entries": entries, **options})


def best_of(allocate: Allocate, free: bool) -> Callable[..., joint.Best]:
    def find(state: State, damage: Any, damages: Any) -> joint.Best:
        counts = allocate._counts(state)
        return allocate._free(state, counts, damage, damages, 10.0) if free else allocate._best(state, counts, damage, damages)

    return find


def drawn(seed: int) -> Callable[[Site, Any], float]:
    return lambda site, fmt: figure(seed, site.name, str(fmt))


@dataclass(frozen=True)
class Every:
    """Every choice of shapes and formats, and what it uses, counted on the state that it makes.

    alike [C]: whether all layers have one shape. use: by limit [C]. keys: what damages hang on; has [C, keys]: which of them.
    """

    state: State
    alike: np.ndarray[Any, Any]
    use: dict[str, np.ndarray[Any, Any]]
    keys: list[tuple[Any, ...]]
    has: sparse.csr_array

    def damage(self, seed: int) -> np.ndarray[Any, Any]:
        of, levels = drawn(seed), Drawn(seed)
        found: np.ndarray[Any, Any] = self.has @ np.array([levels[k] if len(k) == 3 else of(*k) for k in self.keys])
        return found

    @classmethod
    def of(cls, state: State, allocate: Allocate) -> Every:
        numbers: dict[tuple[Any, ...], int] = {}
        rows: list[tuple[bool, dict[str, int], list[int]]] = []
        for levels, alike, made in shapes(state, allocate):
            shape = {"parameters": sum(math.prod(spec.shape) for spec in made.specs),
                     "kv_cache": sum(2 * s.shape[0] for s in made.graph if s.role in ("k", "v"))}  # fmt: skip
            groups = allocate._space(made, state)[0].groups
            for formats in itertools.product(*(g.options for g in groups)):
                pairs = [(s, f) for g, o in zip(groups, formats, strict=True) for s, f in zip(g.sites, o, strict=True)]
                held = [*levels, *((Named(s.name), f) for s, f in pairs)]
                used = {
                    "bytes": sum(f.nbytes(s.shape) for s, f in pairs),
                    "latency": sum(takes(s.shape, str(f)) for s, f in pairs),
                }
                rows.append((alike, {**used, **shape},
                             [numbers.setdefault(key, len(numbers)) for key in held]))  # fmt: skip
        at = [(i, k) for i, (_, _, keys) in enumerate(rows) for k in keys]
        has = sparse.csr_array((np.ones(len(at)), tuple(np.array(at).T)), shape=(len(rows), len(numbers)))
        use = {name: np.array([use[name] for _, use, _ in rows]) for name in rows[0][1]}
        return cls(state, np.array([alike for alike, _, _ in rows]), use, list(numbers), has)


@dataclass(frozen=True)
class Named:
    """A site, of which only the name is asked."""

    name: str


def shapes(state: State, allocate: Allocate) -> Iterator[tuple[tuple[Level, ...], bool, State]]:
    """What each choice of levels takes away, whether layers are alike, and the state."""
    options = {kind: [None, *counts] for kind, counts in allocate._counts(state).items()}
    keys = [(kind, b.index) for kind in options for b in state.graph.blocks]
    for chosen in itertools.product(*(options[kind] for kind, _ in keys)):
        stays: dict[str, dict[str, int]] = {}
        for (kind, block), count in zip(keys, chosen, strict=True):
            if count is not None:
                stays.setdefault(kind, {})[f"layers.{block}.*"] = count
        made = joint.shaped(state, stays).state
        levels = tuple((kind, b, n) for (kind, b), n in units(made).items() if n < units(state)[kind, b])
        alike = all(len({c for (k, _), c in zip(keys, chosen, strict=True) if k == kind}) == 1 for kind in options)
        yield levels, alike, made


@pytest.fixture(scope="module")
def choices(family: Any) -> Every:
    return Every.of(open_model(str(family("llama"))).state, allocating())


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), bits=st.sampled_from([1.2, 1.6, 2.0, 2.6, 3.3]), parameters=st.sampled_from([100, 85, 75]),
       cache=st.sampled_from([100, 75, 50]), latency=st.sampled_from(["<= 150 %", "70 %", "<= 55%", "40 %", "<= 11.5 ms", "9"]),
       free=st.booleans())  # fmt: skip
def test_no_choice_within_the_limits_does_less_damage(
    choices: Every, seed: int, bits: float, parameters: int, cache: int, latency: str, free: bool
) -> None:
    state = choices.state
    constraints = {"parameters": f"<= {parameters} %", "kv_cache": f"{cache}%", "latency": latency}
    allocate = allocating(budget=f"{bits} bits", constraints=constraints, shapes="free" if free else "uniform",
                          latency=drawn_table(allocating(), state))  # fmt: skip
    whole, head = joint.amounts(state), takes(state.graph["lm_head"].shape, "bf16")
    original, (number, share) = head + sum(takes(s.shape, "bf16") for s in state.graph.linear), joint.parsed(latency, "ms")
    room = {"bytes": int(bits * sum(s.numel for s in state.graph.linear) / 8),
            "parameters": parameters * whole["parameters"] // 100, "kv_cache": cache * whole["kv_cache"] // 100,
            "latency": (number * original / 100 if share else number * 1e6) - head}  # fmt: skip
    able = np.logical_and.reduce([choices.use[n] <= room[n] for n in room]) & (choices.alike | free)
    find = best_of(allocate, free)
    if not able.any():
        with pytest.raises(RecipeError, match="the least"):
            find(state, drawn(seed), Drawn(seed))
        return
    best = find(state, drawn(seed), Drawn(seed))
    assert best.damage == pytest.approx(choices.damage(seed)[able].min(), rel=1e-6)
    plan = best.plan()
    assert plan.forecast is not None
    assert plan.forecast.bound <= best.damage * (1 + 1e-9)
    assert plan.forecast.total == pytest.approx(best.damage)
    used = joint.amounts(best.shape.state)
    assert all(used[name] <= room[name] for name in used)
    took = sum(takes(s.shape, str(plan.formats.get(s.name, "bf16"))) for s in best.shape.state.graph.linear)
    assert took <= room["latency"]
    assert plan.forecast.latency is not None
    assert plan.forecast.latency.expected == pytest.approx((took + head) / 1e9)
    assert plan.forecast.latency.original == pytest.approx(original / 1e9)
    assert len(plan.forecast.spent) == 1, "bytes alone"
    assert sum(f.nbytes(best.shape.state.graph[n].shape) for n, f in plan.formats.items()) <= room["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("free", [False, True])
def test_the_frontier_is_that_of_shape_and_bits(choices: Every, free: bool) -> None:
    allocate = allocating(budget="2.6 bits", shapes="free" if free else "uniform")
    forecast = best_of(allocate, free)(choices.state, drawn(1), Drawn(1)).plan().forecast
    assert forecast is not None
    assert [p.damage for p in forecast.frontier] == sorted((p.damage for p in forecast.frontier), reverse=True)
    assert len(forecast.frontier) > 2
    for p in forecast.frontier:
        able = (choices.use["bytes"] <= p.bytes) & (choices.alike | free)
        assert p.damage >= choices.damage(1)[able].min() - 1e-9


# --- the model that comes of it ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_does_nothing_goes_and_its_bits_are_spent_on_the_rest(tmp_path: Path, text: Path) -> None:
    folder = redundant(tmp_path / "model")
    found = {}
    for name, structure in (("bits", {}), ("both", {"structure": {"mlp": [0.5], "kv_groups": [0.5]}})):
        (tmp_path / name).mkdir()
        done = bake(tmp_path / name, folder, text, "native", {"allocate": {"budget": "3 bits", "formats": FORMATS, **structure}},
                    {"quantize": {}})  # fmt: skip
        found[name] = done.state
    assert units(found["both"])[("mlp", 0)] == units(found["bits"])[("mlp", 0)] // 2
    linear = found["both"].graph.linear
    assert all(str(found["both"].formats[s.name]) == "int4:g32" for s in linear)
    room = 3 * sum(s.numel for s in found["bits"].graph.linear) / 8
    assert sum(found["both"].formats[s.name].nbytes(s.shape) for s in linear) <= room
    forecast = found["both"].plan.forecast if found["both"].plan else None
    assert forecast is not None
    assert sum(forecast.structure.values()) < 1e-3
    assert "bits of a budget are per weight of the model as it was" in forecast.notes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shapes"), [("qwen2", "free"), rare("gemma3", "uniform")])
def test_a_budget_of_the_file_holds_for_the_smaller_model(tmp_path: Path, text: Path, name: str, shapes: str) -> None:
    folder = make_model(tmp_path / "model", FAMILIES[name](), torch.float32)
    whole = (folder / "model.safetensors").stat().st_size
    options = {"budget": f"{0.2 * whole:.0f} B", "formats": FORMATS, "also": ["embed"], "shapes": shapes, "structure": SHAPES,
               "constraints": {"parameters": "<= 95 %"}}  # fmt: skip
    done = bake(tmp_path, folder, text, "native", {"allocate": options}, {"quantize": {}})
    place = done.artifacts["native"][0]
    assert sum(p.stat().st_size for p in place.glob("*.safetensors")) <= 0.2 * whole
    assert joint.amounts(done.state)["parameters"] <= 0.95 * joint.amounts(open_model(str(folder)).state)["parameters"]
    model = load(place)
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 11)[None]).logits.isfinite().all()


def test_a_uniform_shape_alone_is_a_plain_model(tmp_path: Path, text: Path) -> None:
    folder = make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)
    options = {"budget": "100 %", "formats": ["int8:g32"], "pins": {"layers.*": "fp32"}, "structure": {"mlp": [0.5]},
               "constraints": {"parameters": "<= 90 %"}}  # fmt: skip
    done = bake(tmp_path, folder, text, "compressed_tensors", {"allocate": options}, {"quantize": {}})
    place = done.artifacts["compressed_tensors"][0]
    assert json.loads((place / "config.json").read_text())["intermediate_size"] == 64
    transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


def write(project: Project, allocate: dict[str, Any], *exports: str) -> None:
    """The recipe, with these steps in place of its own."""
    held = yaml.safe_load(project.recipe.read_text())
    held |= {"passes": [{"allocate": allocate}, {"quantize": {}}], "export": [{name: {}} for name in exports]}
    project.recipe.write_text(yaml.safe_dump(held, sort_keys=False))


@pytest.mark.slow
def test_plan_and_report_say_what_is_left(project: Project) -> None:
    allocate = {"budget": "2.6 bits", "formats": FORMATS, "structure": SHAPES, "probe": 64}
    write(project, allocate)
    guessed = project("plan", project.recipe, "--no-measure")
    assert "note: allocate may leave 96 or 64 neurons of an MLP; 1 groups of heads in every layer" in guessed.out
    told = project("plan", project.recipe).out
    assert "note: layers: shape: " in told
    assert "layers.0.mlp.down:" not in told, "matrices are the report's"
    assert project("run", project.recipe).code == 0
    again = project("plan", project.recipe).out
    assert again.replace("cached", "to do").split() == told.replace("cached", "to do").split(), "nothing is decided anew"


@pytest.mark.slow
@pytest.mark.parametrize(("options", "constraint"), [
    rare({"structure": {"mlp": [0.25]}}, {"parameters": "70 %"}),  # a quarter: all
    rare({"structure": {"kv_groups": [0.5]}}, {"kv_cache": "50 %"}),
    ({"structure": SHAPES, "shapes": "free"}, {"parameters": "80 %"}),  # layers differ
    pytest.param({"structure": {"mlp": [0.75], "kv_groups": "all"}, "shapes": "free"}, {"kv_cache": "75 %"},
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_plan_estimates_from_the_model_that_was_decided_on(
    project: Project, options: dict[str, Any], constraint: dict[str, str]
) -> None:
    write(project, {"budget": "3 bits", "formats": FORMATS, "probe": 64, "constraints": constraint, **options}, "native")
    told = project("plan", project.recipe)
    assert told.code == 0, told.err
    size = next(line for line in told.out.splitlines() if line.startswith("native: "))
    assert project("run", project.recipe).code == 0
    written = sum(p.stat().st_size for p in (project.out / "native").glob("*.safetensors"))
    assert size.startswith(f"native: {written:,} bytes")
    assert size in project("plan", project.recipe).out


@pytest.mark.slow
def test_layers_that_lack_a_sublayer_may_be_the_first(project: Project) -> None:
    allocate = {"budget": "3 bits", "formats": FORMATS, "probe": 64, "structure": SHAPES, "shapes": "free"}
    write(project, allocate, "native")
    held = yaml.safe_load(project.recipe.read_text())
    held["passes"].insert(0, {"prune": {"mlp": {"layers.0.*": 0}, "kv_groups": {"layers.0.*": 0}}})
    held["model"] = str(project.model)
    project.recipe.write_text(yaml.safe_dump(held, sort_keys=False))
    assert project("plan", project.recipe).code == 0
    assert project("run", project.recipe).code == 0


@pytest.mark.parametrize(("options", "line"), [
    ({"structure": {}}, "name what may become smaller"),
    ({"structure": {"mlp": [1.5]}}, "less than or equal to 1"),
    ({"structure": {"mlp": [1.0]}}, "with these shares 'llama' has nothing that may become smaller"),
    ({"structure": {"mlp": [1], "kv_groups": [1.0]}, "shapes": "free"}, "with these shares 'llama' has nothing"),
    ({"structure": {"kv_groups": 0.5}}, "'kv_groups': a list of shares, such as [0.75, 0.5], or all, not 0.5"),
    ({"structure": {"kv_groups": "some"}}, "'kv_groups': a list of shares, such as [0.75, 0.5], or all, not some"),
    ({"structure": {"kv_groups": [0.5, 2]}}, "'kv_groups': a share is a number above 0 and at most 1, not 2"),
    ({"structure": {"kv_groups": [None]}}, "'kv_groups': a share is a number above 0 and at most 1, not None"),
    ({"shapes": "free"}, "'shapes' is about shapes, and 'structure' names no other"),
    ({"constraints": {"parameters": "80 %"}}, "'constraints' is about shapes"),
    ({"structure": SHAPES, "trials": 2}, "'trials' try formats of one shape"),
    ({"structure": SHAPES, "metric": "output"}, "use metric: kl"),
    ({"structure": SHAPES, "constraints": {"speed": "80 %"}}, "'speed' is none of parameters, kv_cache, latency"),
    ({"structure": SHAPES, "constraints": {"latency": "80 %"}}, "times are looked up in a table, and 'latency' names none"),
    ({"structure": SHAPES, "constraints": {"parameters": "80 ms"}}, "'80 ms' is no limit; write '<= 80 %'"),
    ({"structure": SHAPES, "shapes": "free", "constraints": {"parameters": "9" * 30}, "budget": "0.5 bits"}, "no allocation"),
    ({"structure": SHAPES, "constraints": {"parameters": "few"}}, "'few' is no limit; write '<= 80 %'"),
    ({"structure": {"mlp": [0.99]}}, "0.99 of 128 neurons of an MLP, rounded up to 32s, are all of them"),
    ({"structure": SHAPES, "constraints": {"parameters": "<= 20 %"}}, "the least that 'structure' allows is"),
    ({"structure": {"skip_attention": True}}, "layers without attention differ from the others; use shapes: free"),
    ({"structure": SHAPES, "budget": "0.5 bits"}, "no allocation keeps to 0.5 bits; the least possible is"),
])  # fmt: skip
def test_what_cannot_be_is_one_line_before_anything_is_measured(project: Project, options: dict[str, Any], line: str) -> None:
    write(project, {"formats": FORMATS, **options})
    failed = project("plan", project.recipe, "--no-measure")
    assert failed.code == 2
    assert line in failed.err
    assert len(failed.err.strip().splitlines()) == 1


def test_an_exporter_that_cannot_hold_layers_of_their_own_says_so_first(project: Project) -> None:
    write(project, {"formats": FORMATS, "structure": SHAPES, "shapes": "free"}, "compressed_tensors")
    failed = project("plan", project.recipe, "--no-measure")
    assert failed.code == 2
    assert "layers" in failed.err


def test_matrices_of_two_sublayers_that_go_together_have_no_shape_of_their_own(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    allocate = allocating(shapes="free", together=[["*.o", "*.gate"]])
    with pytest.raises(CompressError, match="goes together with matrices of another sublayer"):
        best_of(allocate, True)(state, drawn(0), Drawn(0))


def test_a_format_that_fits_only_what_is_left_is_not_taken_for_harmless(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    allocate = allocating(formats=["int4:g32", "int2:g96"], structure={"mlp": [0.75]})
    shape = joint.shaped(state, {"mlp": {"layers.*": 96}})
    found = allocate._solved(state, shape, drawn(0), 1.0)
    assert isinstance(found, Solved)
    assert "int2:g96" not in {str(f) for g in found.space.groups for o in g.options for f in o}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2.75, 3.0, 3.25])
def test_shape_and_bits_together_beat_bits_alone(assets: Path, tmp_path: Path, bits: float) -> None:
    kl = {}
    structure = {"structure": {"mlp": [0.875, 0.75, 0.625, 0.5], "kv_groups": "all"}}
    for name, more in (("bits", {}), ("uniform", structure), ("free", {**structure, "shapes": "free"})):
        (tmp_path / name).mkdir()
        done = stories(assets, tmp_path / name, [{"allocate": {"budget": f"{bits} bits", **more}}, {"quantize": {}}])
        kl[name] = done.scores["compressed"]["kl"]
    assert kl["uniform"] <= 1.02 * kl["bits"]
    assert kl["free"] <= 1.02 * kl["uniform"]


@pytest.mark.slow
def test_a_layer_may_be_left_without_attention(tmp_path: Path, text: Path) -> None:
    """Where the output matrix of an attention is zero it goes, at no cost, and its cache with it."""
    folder = make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"budget": "3 bits", "formats": FORMATS, "structure": {"skip_attention": True}, "shapes": "free",
               "constraints": {"kv_cache": "<= 50 %"}}  # fmt: skip
    done = bake(tmp_path, folder, text, "native", {"allocate": options}, {"quantize": {}})
    assert "layers.1.attn.q" not in done.state.graph.sites
    assert "layers.0.attn.q" in done.state.graph.sites
    forecast = done.state.plan.forecast if done.state.plan else None
    assert forecast is not None
    assert forecast.structure["layers.1.kv_groups"] < 1e-4
    assert load(done.artifacts["native"][0])(input_ids=torch.arange(3, 11)[None]).logits.isfinite().all()
