"""The pass `depth`: what goes is what costs least, by KL against full forward passes, and the result is a plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.export.artifact.proof import logits
from compress.manager import settle
from compress.model.layers import fewer, sublayers
from compress.model.model import open_model
from compress.passes import perturbed as module
from compress.passes.depth import Depth
from compress.passes.perturbed import spread
from compress.passes.prune import Prune
from compress.passes.trials import divergence
from compress.run import Parts, Step
from compress.state import State
from tests.conftest import FAMILIES, Project, contents, covered, make_model, rare, saved
from tests.cooking import bake
from tests.pass_laws import TOKENS, step_of, tensors_of
from tests.test_edit import deep, without

LAYERS = 2  # of a project's model

ALL = Depth(windows=100)
ZEROS = {"unit": "sublayer", "keep_zeros": True, "windows": 100}


def ran(p: Depth, folder: Path, place: Path) -> tuple[State, list[dict[str, Any]], Step]:
    """What the pass leaves, what it told, and its step."""
    model = open_model(str(folder))
    step = step_of(p, model, place / "steps")
    made = settle(p, model.state, p.run(model.state, step.context()))
    return made, step.records, step


def kl(state: State, changed: State, folder: Path) -> float:
    """By two whole forward passes."""
    context = step_of(ALL, open_model(str(folder)), folder).context()
    return fmean(divergence(state, changed, context, TOKENS.batches()))


# --- what goes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(["llama", "gemma3", "gpt2", "opt", "phi3", "mixtral", "gpt_neox"], "llama"))
def test_every_candidate_costs_what_whole_passes_say_and_the_cheapest_goes(tmp_path: Path, name: str) -> None:
    folder = deep(tmp_path / "model", name)
    state = open_model(str(folder)).state
    made, (told,), _ = ran(ALL, folder, tmp_path)
    wanted = {f"layers.{i}": kl(state, fewer(state, [j for j in range(4) if j != i]), folder) for i in range(4)}
    assert told["candidates"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert told["site"] == min(wanted, key=lambda n: wanted[n])
    assert told["cost"] == pytest.approx(kl(state, made, folder), rel=1e-3)
    kept = [i for i in range(4) if f"layers.{i}" != told["site"]]
    with torch.no_grad():
        theirs = without(folder, kept)(input_ids=TOKENS.ids[:2], use_cache=False).logits
    torch.testing.assert_close(logits(made, [TOKENS.ids[:2]], "cpu")[0], theirs, atol=1e-4, rtol=1e-4)


def test_an_encoder_loses_layers_as_well(family: Any, tmp_path: Path) -> None:
    folder = family("roberta", torch.float32)
    state = open_model(str(folder)).state
    _, (told,), _ = ran(ALL, folder, tmp_path)
    assert told["candidates"] == pytest.approx(
        {f"layers.{i}": kl(state, fewer(state, [1 - i]), folder) for i in (0, 1)}, rel=1e-3
    )


@pytest.mark.slow
def test_the_second_round_is_measured_without_what_went_in_the_first(tmp_path: Path) -> None:
    folder = deep(tmp_path / "model", "llama")
    state = open_model(str(folder)).state
    made, (first, second), _ = ran(Depth(drop=2, windows=100), folder, tmp_path)
    gone = int(first["site"].removeprefix("layers."))
    rest = [i for i in range(4) if i != gone]
    wanted = {f"layers.{i}": kl(state, fewer(state, [j for j in rest if j != i]), folder) for i in rest}
    assert second["candidates"] == pytest.approx(wanted, rel=1e-3)
    assert second["site"] == min(wanted, key=lambda n: wanted[n])
    assert second["cost"] == pytest.approx(kl(state, made, folder), rel=1e-3)


@pytest.mark.slow
def test_how_many_are_on_their_way_at_once_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = deep(tmp_path / "model", "llama")
    for number, options in enumerate(({"drop": 2, "windows": 100}, {"drop": 3, **ZEROS})):
        found = []
        for size in (1, 3, 100):
            monkeypatch.setattr(module, "room", lambda hidden, size=size: size)
            found.append(ran(Depth.model_validate(options), folder, tmp_path / f"{number}-{size}")[1])
        assert found[0] == found[1] == found[2]


def test_each_block_is_loaded_once_in_a_round_where_all_candidates_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, block = [], module.Stream.block
    monkeypatch.setattr(module.Stream, "block", lambda *args: loaded.append(args[2]) or block(*args))
    ran(ALL, deep(tmp_path / "model", "llama"), tmp_path)
    assert loaded == [0, *range(4), *range(4)]  # asked what kind of output it has; the original; the round


def silenced(folder: Path, place: Path, layer: int, *parts: str) -> Path:
    """A copy of a llama in which matrices of a layer are zero."""
    shutil.copytree(folder, place)
    tensors = load_file(place / "model.safetensors")
    for part in parts:
        tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("metric", ["kl", "angle"])
@pytest.mark.parametrize("layer", covered([0, 2], 2))
def test_a_layer_that_does_nothing_is_found_first(tmp_path: Path, metric: str, layer: int) -> None:
    folder = silenced(deep(tmp_path / "model", "llama"), tmp_path / "idle", layer, "self_attn.o_proj", "mlp.down_proj")
    made, told, _ = ran(Depth.model_validate({"drop": 2, "metric": metric}), folder, tmp_path)
    assert told[0]["site"] == f"layers.{layer}"
    assert told[0]["cost"] == pytest.approx(0, abs=1e-6)
    assert metric == "angle" or told[0]["cost"] == 0
    assert len(made.graph.blocks) == 2


def test_angles_are_those_of_the_hidden_states_of_transformers(tmp_path: Path) -> None:
    folder = deep(tmp_path / "model", "llama")
    _, told, _ = ran(Depth(drop=2, metric="angle", windows=100), folder, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    raw = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: raw.append((args[0], out)))
    with torch.no_grad():
        model(input_ids=TOKENS.ids, use_cache=False)
    wanted = {f"layers.{i}": 1 - float(torch.cosine_similarity(x, y, -1).mean()) for i, (x, y) in enumerate(raw)}
    assert told[0]["candidates"] == pytest.approx(wanted, rel=1e-4)
    assert [t["site"] for t in told] == sorted(wanted, key=lambda n: wanted[n])[:2]


@pytest.mark.slow
def test_lists_with_an_entry_for_each_layer_are_cut_with_it(tmp_path: Path, text: Path) -> None:
    folder = deep(tmp_path / "model", "gemma3")
    done = bake(tmp_path, folder, text, "compressed_tensors", {"depth": {"drop": 1}})
    said = json.loads((done.artifacts["compressed_tensors"][0] / "config.json").read_text())
    (record,) = [r for r in done.report.records if "candidates" in r]
    kinds = open_model(str(folder)).config.layer_types
    gone = int(record["site"].removeprefix("layers."))
    assert said["layer_types"] == [k for i, k in enumerate(kinds) if i != gone]
    assert said["num_hidden_layers"] == 3


def test_only_layers_whose_loss_leaves_the_others_what_they_are_are_candidates(tmp_path: Path) -> None:
    """Qwen3-MoE says by number which layers are dense: only behind them may one go."""
    config = FAMILIES["qwen3_moe"]()
    config.num_hidden_layers, config.mlp_only_layers = 3, [1]
    folder = make_model(tmp_path / "model", config, torch.float32)
    _, told, _ = ran(Depth(drop=2, windows=100), folder, tmp_path)
    assert [set(t["candidates"]) for t in told] == [{"layers.2"}, {"layers.1"}]


# --- zeros ------------------------------------------------------------------------------------------------------------


def zeroed(state: State, unit: Any) -> State:
    """The same with zeros in place of what holds a unit's outputs, in memory."""
    names = {s.weight for s in unit.sites} | {s.joined for s in unit.sites if s.expert is not None}
    names |= {f"{s.stem}.bias" for s in unit.sites}
    read = state.dense.read

    class Silent(type(state.dense)):  # type: ignore[misc]
        def read(self, name: str) -> torch.Tensor:
            return torch.zeros_like(read(name)) if name in names else read(name)

        def read_rows(self, name: str, index: Any) -> torch.Tensor:
            return self.read(name)[index]

    made = object.__new__(type(state))
    for key, value in vars(state).items():
        object.__setattr__(made, key, value)
    object.__setattr__(made, "dense", Silent(state.dense.base, state.dense.names, state.dense.written))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    covered(["llama", "gemma3", "gpt2", "opt", "mixtral", "gpt_neox", "phi3", "qwen3_moe"], "phi3"),
)
def test_zeros_stand_in_the_matrices_of_what_costs_least_and_nowhere_else(family: Any, tmp_path: Path, name: str) -> None:
    folder = family(name, torch.float32)
    state = open_model(str(folder)).state
    units = {u.name: u for u in sublayers(state)}
    assert set(units) == {f"layers.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")}
    made, (told,), _ = ran(Depth.model_validate(ZEROS), folder, tmp_path)
    wanted = {n: kl(state, zeroed(state, u), folder) for n, u in units.items()}
    assert told["candidates"] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert told["site"] == min(wanted, key=lambda n: wanted[n])
    assert kl(state, made, folder) == pytest.approx(told["cost"], rel=1e-3)
    changed = {s.name for s in made.specs if not torch.equal(made.dense.read(s.name), state.dense.read(s.name))}
    sites = units[told["site"]].sites
    assert changed <= {s.weight for s in sites} | {s.joined for s in sites} | {f"{s.stem}.bias" for s in sites}
    assert all(not made.reference(s).any() for s in sites)
    assert all(not made.dense.read(n).any() for n in changed)
    assert made.specs == state.specs
    assert made.graph == state.graph


@pytest.mark.slow
def test_a_sublayer_that_is_gone_already_is_not_taken_again(tmp_path: Path) -> None:
    folder = silenced(deep(tmp_path / "model", "llama"), tmp_path / "idle", 1, "self_attn.o_proj")
    _, told, _ = ran(Depth.model_validate({"drop": 2, **ZEROS}), folder, tmp_path)
    assert told[0]["candidates"]["layers.1.attn"] == 0
    assert "layers.1.attn" not in [t["site"] for t in told]


def test_models_with_norms_over_the_sum_are_refused(family: Any, tmp_path: Path) -> None:
    """With zeros in its sublayers such a layer does something all the same."""
    post = FAMILIES["opt"]()
    post.do_layer_norm_before = False
    for number, folder in enumerate((family("roberta"), make_model(tmp_path / "post", post))):
        with pytest.raises(ModelError, match="does more than add what its attention and MLP put out"):
            Depth.model_validate(ZEROS).foresee(open_model(str(folder)).state)
        assert len(Depth().foresee(open_model(str(folder)).state).graph.blocks) == 1, number


@pytest.mark.slow
def test_an_attention_can_go_where_nobody_knows_the_experts(tmp_path: Path) -> None:
    """Those of gpt-oss are no sites, and add a bias of their own."""
    config = transformers.GptOssConfig(
        vocab_size=272, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.fill_(0.5)
    folder = saved(tmp_path / "model", model)
    state = open_model(str(folder)).state
    assert [u.name for u in sublayers(state)] == ["layers.0.attn", "layers.1.attn"]
    made, (told,), _ = ran(Depth.model_validate(ZEROS), folder, tmp_path)
    assert kl(state, made, folder) == pytest.approx(told["cost"], rel=1e-3)
    assert not made.dense.read(f"model.{told['site'].replace('attn', 'self_attn')}.o_proj.bias").any()


def test_attentions_of_several_kinds_can_go(tmp_path: Path) -> None:
    """Qwen3-Next: a linear attention in some layers, a gated one in others; both are gone where o is zero."""
    config = transformers.Qwen3NextConfig(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    folder = saved(tmp_path, transformers.AutoModelForCausalLM.from_config(config))
    assert {u.name for u in sublayers(open_model(str(folder)).state)} >= {"layers.0.attn", "layers.1.attn"}


# --- sublayers that are not there --------------------------------------------------------------------------------------

GONE = {"unit": "sublayer", "windows": 100}


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["llama", "gemma3", "phi3", "qwen3"], "gemma3"))
def test_sublayers_that_go_are_those_whose_zeros_cost_least(tmp_path: Path, name: str) -> None:
    """In three rounds, of a model whose tensors and config are without them afterwards."""
    folder = deep(tmp_path / "model", name)
    state = open_model(str(folder)).state
    made, told, _ = ran(Depth.model_validate({"drop": 3, **GONE}), folder, tmp_path / "gone")
    _, zeros, _ = ran(Depth.model_validate({"drop": 3, **ZEROS}), folder, tmp_path / "zeros")
    assert [(t["site"], t["candidates"]) for t in told] == [(t["site"], t["candidates"]) for t in zeros]
    assert kl(state, made, folder) == pytest.approx(told[-1]["cost"], rel=1e-3)
    gone = [u for u in sublayers(state) if u.name in {t["site"] for t in told}]
    assert not {site.weight for unit in gone for site in unit.sites} & {spec.name for spec in made.specs}
    assert {u.name for u in sublayers(made)} == {u.name for u in sublayers(state)} - {u.name for u in gone}


@pytest.mark.slow
def test_one_attention_and_one_mlp_stay(tmp_path: Path) -> None:
    folder = deep(tmp_path / "model", "llama")
    made, told, _ = ran(Depth.model_validate({"drop": 6, **GONE}), folder, tmp_path)
    assert sorted(name.rpartition(".")[2] for name in {u.name for u in sublayers(made)}) == ["attn", "mlp"]
    assert len(told) == 6


@pytest.mark.slow
def test_what_cannot_go_whole_is_no_candidate(tmp_path: Path, family: Any) -> None:
    """The MLP of OPT is no module; GPT-2 says nothing of groups of heads; an MLP that is a mixture is not taken away."""
    mixture = Depth.model_validate(GONE).foresee(open_model(str(family("mixtral"))).state)
    assert {u.name for u in sublayers(mixture)} == {"layers.0.attn", "layers.0.mlp", "layers.1.mlp"}
    with pytest.raises(ModelError, match=r"keep at least 1, or use keep_zeros: true, or unit: layer"):
        Depth.model_validate(GONE).foresee(open_model(str(family("opt"))).state)


@pytest.mark.slow
def test_a_run_without_sublayers_is_smaller_as_planned(project: Project, tmp_path: Path) -> None:
    passes(project, "depth: {drop: 1, unit: sublayer, windows: 2}")
    project.edit("compressed_tensors", "native")
    planned = project.plan()
    assert planned.code == 0, planned.err
    assert "depth takes 1 of 4 sublayers away" in planned.out
    assert "depth: layers differ in shape; native (where compress-pipeline is installed) and onnx load that" in planned.out
    size = next(line for line in planned.out.splitlines() if line.startswith("native:"))
    assert project.run().code == 0
    assert f"{sum(f.stat().st_size for f in (project.out / 'native').glob('*.safetensors')):,} bytes" in size
    project.edit("native", "compressed_tensors")
    assert "layers differ in shape" in project.plan().line


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_layers_measure_only_the_rounds_that_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rounds, kls = deep(tmp_path / "model", "llama"), [], module.Perturbed.kl
    monkeypatch.setattr(module.Perturbed, "kl", lambda self, gone, *rest: rounds.append(len(gone)) or kls(self, gone, *rest))
    first = ran(Depth(drop=1), folder, tmp_path)[1]
    again = ran(Depth(drop=3), folder, tmp_path)[1]
    assert rounds == [0, 1, 2]
    assert again[0]["candidates"] == first[0]["candidates"]
    ran(Depth(drop=2), folder, tmp_path)
    assert rounds == [0, 1, 2]
    ran(Depth(drop=1, windows=2), folder, tmp_path)
    assert rounds == [0, 1, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"drop": 2}, *(rare({"drop": 2, **kind}) for kind in (ZEROS, GONE)),
], ids=["layers", "zeros", "gone"])  # fmt: skip
def test_a_run_that_was_stopped_at_any_commit_leaves_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    p, folder = Depth.model_validate(options), deep(tmp_path / "model", "llama")
    whole, told, _ = ran(p, folder, tmp_path / "whole")
    commit = Parts.commit
    for stop in range(4):  # a round and what goes in it, twice
        left = iter(range(stop))

        def killing(*args: Any, left: Any = left, **given: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return commit(*args, **given)

        monkeypatch.setattr(Parts, "commit", killing)
        with pytest.raises(KeyboardInterrupt):
            ran(p, folder, tmp_path / str(stop))
        monkeypatch.setattr(Parts, "commit", commit)
        again, records, _ = ran(p, folder, tmp_path / str(stop))
        assert records == told
        ours, theirs = tensors_of(again), tensors_of(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert contents(tmp_path / str(stop)).keys() == contents(tmp_path / "whole").keys()


def test_windows_are_spread_over_the_text() -> None:
    assert torch.equal(spread(TOKENS, 3).ids, TOKENS.ids[[0, 2, 4]])
    assert torch.equal(spread(TOKENS, 6).ids, TOKENS.ids)
    assert torch.equal(spread(TOKENS, 99).ids, TOKENS.ids)


def passes(project: Project, *lines: str) -> None:
    project.edit("passes:\n", "passes:\n" + "".join(f"  - {line}\n" for line in lines))


def deeper(project: Project, tmp_path: Path) -> None:
    """A model in which the first of four layers does nothing, so that the guess, the last, is wrong."""
    shutil.rmtree(project.model)
    silenced(deep(tmp_path / "four", "llama"), project.model, 0, "self_attn.o_proj", "mlp.down_proj")


@pytest.mark.slow
def test_plan_measures_and_says_what_goes_and_the_run_takes_it(project: Project, tmp_path: Path) -> None:
    deeper(project, tmp_path)
    passes(project, "depth: {drop: 1, windows: 2}")
    guess = project("plan", project.recipe, "--no-measure")
    assert guess.code == 0, guess.err
    assert "depth takes 1 of 4 layers away; which ones is measured, and until then a guess: the last ones" in guess.out
    assert "layers.0" not in guess.out
    planned = project.plan()
    assert "layers.0: 1 of 1 to go, KL 0; next best layers." in planned.out
    assert "layers.0: 1 of 1 to go, KL 0; next best layers." in project.plan().out
    size = next(line for line in planned.out.splitlines() if line.startswith("compressed_tensors:"))
    done = project.run()
    assert done.code == 0, done.err
    assert "finished before" in done.out
    assert f"{(project.artifact / 'model.safetensors').stat().st_size:,} bytes" in size
    ours = load_file(project.model / "model.safetensors")
    theirs = load_file(project.artifact / "model.safetensors")
    assert torch.equal(theirs["model.layers.0.input_layernorm.weight"], ours["model.layers.1.input_layernorm.weight"])
    assert (project.out / "report.md").read_text().count("layers.0: 1 of 1 to go, KL 0") == 1
    assert project.run().code == 0


@pytest.mark.slow
def test_what_follows_is_planned_on_the_layers_that_are_left(project: Project, tmp_path: Path) -> None:
    """An allocation behind it is measured too, on the smaller model."""
    deeper(project, tmp_path)
    passes(project, "depth: {drop: 2, windows: 2}", 'allocate: {budget: 4 bits, formats: ["int3:g32", "int4:g32"]}')
    project.edit('      format: "int4:g32"\n      pins: {"lm_head": "int8:g32"}\n', "      method: gptq\n")
    planned = project.plan()
    assert planned.code == 0, planned.err
    assert "gap" in planned.out
    assert project.run().code == 0
    assert json.loads((project.artifact / "config.json").read_text())["num_hidden_layers"] == 2


def test_a_bare_config_is_planned_by_a_guess(project: Project, tmp_path: Path) -> None:
    deeper(project, tmp_path)
    (project.model / "model.safetensors").unlink()
    passes(project, "depth: {drop: 2}")
    planned = project.plan()
    assert planned.code == 0, planned.err
    assert "until then a guess" in planned.out
    assert "peak memory" in planned.out


@pytest.mark.slow
def test_zeros_say_that_nothing_becomes_smaller(project: Project) -> None:
    passes(project, "depth: {drop: 1, unit: sublayer, keep_zeros: true, windows: 2}")
    planned = project.plan()
    assert "depth puts zeros in place of 1 sublayers, so files and time stay what they are" in planned.out
    assert project.run().code == 0


@pytest.mark.parametrize(("options", "says"), [
    rare("drop: 3, unit: sublayer", "with 2 sublayers gone there is one attention and one MLP left, and these stay"),
    ("keep_zeros: true", "a layer is taken away whole; leave keep_zeros out"),
    ("unit: sublayer, keep_zeros: true, metric: angle", "an angle is that of a whole layer"),
    ("drop: 2", "there are 2 layers to choose from, and 2 are to go; keep one"),
    ("drop: 5, unit: sublayer, keep_zeros: true", "there are 4 sublayers to choose from, and 5 are to go"),
    ("drop: 0", "'drop' must be greater than or equal to 1, not '0'"),
    ("drop: true", "'drop'"),
    ("unit: block", "'unit'"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(project: Project, options: str, says: str) -> None:
    passes(project, f"depth: {{{options}}}")
    line = project.plan().line
    assert says in line
    assert line.startswith(str(project.recipe))


def test_without_text_there_is_nothing_to_measure_on(project: Project) -> None:
    passes(project, "depth: {}")
    project.edit("  calibration: {text: words.txt, sequences: 8, length: 32}\n", "")
    project.edit('      format: "int4:g32"\n', '      format: "int4:g32"\n      method: rtn\n')
    assert "to measure what it costs, 'depth' needs data.calibration; add it, or name layers in 'edit'" in project.plan().line


def test_it_stands_behind_what_changes_shapes_and_in_front_of_what_plans_formats(project: Project) -> None:
    passes(project, 'allocate: {budget: 4 bits, formats: ["int3:g32", "int4:g32"]}', "depth: {}")
    project.edit('      format: "int4:g32"\n      pins: {"lm_head": "int8:g32"}\n', "      method: gptq\n")
    assert "an earlier step has planned formats for layers by their numbers; move 'depth' in front of it" in project.plan().line
    start = open_model(str(project.model)).state
    assert {s.shape for s in Depth().foresee(Prune(mlp=0.5).foresee(start)).graph.linear if s.role == "down"} == {(64, 64)}


def test_what_it_costs_is_foreseen_in_passes(family: Any) -> None:
    """Squares of the layers for the rounds, and nothing but the text's tokens once an angle is enough."""
    state = Depth().foresee(open_model(str(family("llama", blocks=4))).state)
    one, two, angle = (Depth.model_validate(o).cost(state, 1000) for o in ({}, {"drop": 2}, {"metric": "angle"}))
    assert one.model_flops < two.model_flops < 3 * one.model_flops
    assert angle.model_flops < one.model_flops / 3
    assert angle.logits == 0 < one.logits
    assert (Depth(windows=8).reads(100), Depth(windows=8).reads(5)) == (8, 5)
