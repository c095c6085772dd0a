"""The pass `factorize` in a run: factors in place of matrices, quantized or not, in every artifact that can hold them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.errors import CompressError, ExportError, ModelError, OrderError
from compress.export import runtime
from compress.export.artifact.proof import logits
from compress.export.native import reader
from compress.export.runtime.linear import PackedLinear
from compress.export.table import EXPORTERS
from compress.formats import Factored
from compress.manager import check_order, foresee
from compress.model.model import open_model
from compress.passes import PASSES
from compress.passes.factorize import Factorize
from compress.passes.factorize_core import even_rank
from compress.passes.quantize import Quantize
from compress.state import State
from tests import stock
from tests.conftest import Project, covered
from tests.cooking import bake, factored
from tests.pass_laws import attempt, step_of

INT8 = {"quantize": {"format": "int8:channel"}}


def passes(*steps: dict[str, Any]) -> list[Any]:
    return [PASSES[name].model_validate(options) for step in steps for name, options in step.items()]


def error(before: State, after: State) -> float:
    """How far logits are from what they were."""
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
    (ours,), (theirs,) = (logits(state, [ids], "cpu") for state in (after, before))
    return float((ours.log_softmax(-1).exp() * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1).mean())


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_ranks_are_those_asked_for(family: Any) -> None:
    """A share of each matrix's own, a number, none: the later pin wins, and what is left stays as it is."""
    state = open_model(str(family("llama"))).state
    pins = {"layers.0.*": "full", "*.down": 24, "layers.1.attn.q": 0.25}
    made = foresee([Factorize.model_validate({"rank": 0.5, "pins": pins})], state)
    found = {name: str(fmt) for name, fmt in made.formats.items()}
    assert found.pop("layers.0.mlp.down") == found.pop("layers.1.mlp.down") == "lr24"
    assert found.pop("layers.1.attn.q") == "lr8"
    assert not any(name.startswith("layers.0") for name in found)
    assert found == {n: f"lr{int(0.5 * even_rank(state.graph[n].shape))}" for n in found}
    assert made.graph == state.graph
    assert str(foresee(passes(*factored(8)), replace(state, dtype=torch.float32)).formats["layers.0.attn.q"]) == "lr8:fp32"


def test_a_head_is_factored_where_a_pin_names_it(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama")))
    made = attempt(Factorize.model_validate({"rank": "full", "pins": {"lm_head": 16}}), model, tmp_path / "steps")
    assert {n: str(f) for n, f in made.formats.items()} == {"lm_head": "lr16"}


@pytest.mark.parametrize(("options", "says"), [
    ({"rank": 65}, r"'layers.0.attn.q': lr65: the rank is above 64"),
    ({"rank": 40}, r"'layers.0.attn.k': lr40: the rank is above 32"),
    ({"pins": {"embed": 8}}, "'embed' is a token embedding, whose rows are looked up"),
    ({"pins": {"*.upp": 8}}, r"pattern '\*.upp' matched no site"),
    ({"rank": "full"}, "every matrix stays as it is"),
])  # fmt: skip
def test_ranks_that_cannot_be(family: Any, options: dict[str, Any], says: str) -> None:
    state = open_model(str(family("llama"))).state
    with pytest.raises(CompressError, match=says) as caught:
        foresee([Factorize.model_validate(options)], state)
    assert caught.value.at


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, "half", "64", True, None])
def test_what_is_no_rank(rank: Any) -> None:
    for options in ({"rank": rank}, {"pins": {"*": rank}}):
        with pytest.raises(ValueError, match=r"rank|pins"):
            Factorize.model_validate(options)


# --- order, and who refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [{"prune": {}}, {"edit": {"drop_layers": [0]}}, {"depth": {}}, {"smooth": {}}, {"allocate": {}},
                                   {"factorize": {}}])  # fmt: skip
def test_passes_that_need_dense_weights_stand_in_front(after: dict[str, Any]) -> None:
    with pytest.raises(OrderError, match=r"step 2 '.*' needs DENSE weights; step 1 'factorize' removed them"):
        check_order(passes({"factorize": {}}, after))
    with pytest.raises(OrderError, match="needs DENSE weights; step 2 'quantize' removed them"):
        check_order(passes({"factorize": {}}, {"quantize": {}}, {"quantize": {}}))
    check_order(passes({"prune": {}}, {"smooth": {}}, {"factorize": {}}, {"quantize": {}}))


@pytest.mark.parametrize(("steps", "says"), [
    (["factorize: {rank: 16}", "lqlora: {format: 'int4:g32', rank: 4}"], "two factors in place of matrices, of which no"),
    (["factorize: {rank: 16}", "quantize: {format: 'int8:channel'}", "lqlora: {rank: 4}"], "two factors in place of matrices"),
    (["allocate: {formats: ['int4:g32'], budget: 9 bits}", "factorize: {}", "quantize: {}"], "an earlier step plans formats of"),
    (["factorize: {rank: 16}", "quantize: {format: 'int4:g32'}"], "second factor's inputs are the rank, and int4:g32: g"),
    (["factorize: {rank: 16}", "quantize: {format: 'int8:channel', pins: {'*.q': 'int4:g16+r4'}}"], "a low-rank correction"),
    (["factorize: {rank: 16}", "quantize: {format: 'int8:channel', pins: {'*.q': 'lr8'}}"], "such as int4:g64, not lr8"),
    (["quantize: {format: 'lr16'}"], "cannot become lr16 here: factors are made by 'factorize'"),
    (["allocate: {formats: ['int4:g32', 'lr8'], budget: '9 bits'}", "quantize: {}"], "lr8 is made by 'factorize'"),
    (["allocate: {formats: ['int4:g32'], budget: 9 bits, pins: {'*.o': 'lr8'}}", "quantize: {}"], "are made by 'factorize'"),
    (["lqlora: {format: 'lr8', rank: 4}"], "low-rank factors go with a quantized matrix"),
    (["factorize: {spread: spectrum, pins: {'layers.*': 4}}"], "pins name every matrix, which leaves 'spectrum' none"),
    (["factorize: {rank: 0}"], "'rank': a rank is a whole number from 1 on, a share up to 1.0, or full, not 0"),
    (["factorize: {pins: {'*.q': bf16}}"], "'*.q': a rank is a whole number from 1 on, a share up to 1.0, or full, not bf16"),
    (["factorize: {rank: 64, spread: spectrum}"], "give rank as one, such as 0.5"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(project: Project, steps: list[str], says: str) -> None:
    text = project.recipe.read_text()
    project.recipe.write_text(text[: text.index("  - quantize:")] + "".join(f"  - {step}\n" for step in steps) + "export: []\n")
    assert says in project.plan().line
    assert "recipe.yaml" in project.plan().line


def test_without_data(project: Project) -> None:
    text = project.recipe.read_text()
    start = text.index("  - quantize:")
    project.recipe.write_text(text[:start] + "  - factorize: {rank: 0.5}\nexport: []\n")
    project.edit("  calibration: {text: words.txt, sequences: 8, length: 32}\n", "")
    assert project.plan().line.endswith("'whitened' needs data.calibration; add it, or use method: svd")
    assert "method: svd does not see" in project.plan("factorize.method=svd", "factorize.spread=spectrum").line
    assert project.run("factorize.method=svd").code == 0


@pytest.mark.parametrize("exporter", ["compressed_tensors", "gptq", "gguf"])
@pytest.mark.parametrize("stored", [None, "int4:g32"])
def test_stock_layouts_refuse_in_one_line(family: Any, exporter: str, stored: str | None) -> None:
    state = foresee(passes(*factored(32, stored)), open_model(str(family("llama"))).state)
    with pytest.raises(ExportError, match=r"has lr32.*, two factors .* no such layer; export native or onnx instead"):
        EXPORTERS[exporter]().check(state)


# --- what it does to a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pipeline.Outcome]:
    """A llama with factors, as they are and in integers of 8 and 4 bits."""
    return {name: bake(tmp_path_factory.mktemp(name), family("llama"), text, "native", *steps)
            for name, steps in FACTORED.items()}  # fmt: skip


FIRST = {"factorize": {"rank": 32, "pins": {"*.v": "full"}}}
FACTORED: dict[str, list[dict[str, Any]]] = {
    "dense": [FIRST],
    "int8": [FIRST, INT8],
    "int4": [FIRST, {"quantize": {"format": "int4:g32", "pins": {"*.q": "bf16", "lm_head": "int8:g32"}}}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORED)
def test_an_onnx_artifact_of_factors_is_proven(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    assert bake(tmp_path, family("llama"), text, "onnx", *FACTORED[name]).artifacts["onnx"][1].greedy > 0


def test_artifacts_are_proven_and_hold_what_was_planned(made: dict[str, pipeline.Outcome]) -> None:
    for done in made.values():
        assert all(proof.greedy > 0 for _, proof in done.artifacts.values())
        layouts = pipeline.plan(done.out.parent / "recipe.yaml").layouts
        native = done.artifacts["native"][0]
        assert layouts["native"].nbytes == sum(p.stat().st_size for p in native.glob("*.safetensors"))
        read = reader.read(native)
        for name, fmt in done.state.formats.items():
            assert read.formats[name] == fmt
            assert torch.equal(read.weight(read.graph[name]), done.state.weight(done.state.graph[name]))


def test_the_formats_of_factors(made: dict[str, pipeline.Outcome]) -> None:
    """`quantize` gives both factors what is said of the matrix; a pin to the model's dtype leaves them as they are."""
    found = {run: {n: str(f) for n, f in done.state.formats.items() if n.startswith("layers.1.attn") or n == "lm_head"}
             for run, done in made.items()}  # fmt: skip
    q, k, v, o = (f"layers.1.attn.{role}" for role in "qkvo")
    assert found["dense"] == {q: "lr32", k: "lr32", o: "lr32"}
    assert found["int8"] == {q: "lr32:int8:channel", k: "lr32:int8:channel", v: "int8:channel", o: "lr32:int8:channel"}
    assert found["int4"] == {q: "lr32", k: "lr32:int4:g32", v: "int4:g32", o: "lr32:int4:g32", "lm_head": "int8:g32"}


def test_the_runtime_multiplies_twice_and_never_makes_the_matrix(
    made: dict[str, pipeline.Outcome], family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(7))
    for done in made.values():
        state = replace(done.state, dtype=torch.float32)
        peer = stock.load(family("llama"), dtype=torch.float32)
        stock.substitute(peer, state.graph, {n: state.weight(state.graph[n]) for n in state.codes})
        (wanted,) = stock.logits(peer, [ids])
        with monkeypatch.context() as patch:
            patch.setattr(Factored, "dequantize", None)
            model = runtime.load(done.artifacts["native"][0], dtype=torch.float32)
            with torch.no_grad():
                found = model(input_ids=ids).logits
        assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        held = {m.format for m in model.modules() if isinstance(m, PackedLinear)}
        assert held >= {str(f) for f in done.state.formats.values() if isinstance(f, Factored)}


@pytest.mark.slow
def test_factors_are_quantized_by_what_each_is_given(family: Any, tmp_path: Path) -> None:
    """By feedback both come nearer to the model than rounded, and to the model as it was, not to its factors."""
    model = open_model(str(family("llama")))
    (first,) = passes({"factorize": {"rank": 24}})
    start = attempt(first, model, tmp_path / "first" / "steps")
    lost = {}
    for method in ("gptq", "rtn"):
        step = Quantize.model_validate({"format": "int2:channel", "method": method, "drift": 0})
        found = attempt(step, Started(model, start), tmp_path / method / "steps")  # type: ignore[arg-type]
        assert {str(f) for n, f in found.formats.items() if n.startswith("layers")} == {"lr24:int2:channel"}
        done = step_of(step, model, tmp_path / method / "steps")
        done.restore(lambda records: start)
        lost[method] = {r["site"]: (r["error"], r["rounding"]) for r in done.records}
    assert all(error < 0.9 * rounding for error, rounding in lost["gptq"].values())
    assert all(error == rounding for error, rounding in lost["rtn"].values())
    first_stage = "layers.0.attn.q"  # whose inputs are the same in both
    assert lost["gptq"][first_stage][1] == pytest.approx(lost["rtn"][first_stage][1])


class Started:
    """A model that steps start from in a state of its own."""

    def __init__(self, model: Any, state: State):
        self.folder, self.state = model.folder, state


@pytest.mark.slow
def test_whitened_comes_nearer_than_svd(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama")))
    ways: dict[str, Any] = {"svd": {"method": "svd"}, "whitened": {"drift": 0}, "more": {"drift": 0, "rank": 28}}
    steps = {name: Factorize.model_validate({"rank": 16, **options}) for name, options in ways.items()}
    found = {name: error(model.state, attempt(step, model, tmp_path / name / "steps")) for name, step in steps.items()}
    assert found["more"] < found["whitened"] < found["svd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["gpt2", "opt", "mixtral", "gemma3", "roberta"], "gpt2"))
def test_every_kind_of_family(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    """Matrices that lie turned, biases, experts, shared tables, masked models."""
    done = bake(tmp_path, family(name, blocks=1), text, "native", {"factorize": {"rank": 16}}, INT8)
    assert {str(f) for f in done.state.formats.values()} == {"lr16:int8:channel"}
    assert done.artifacts["native"][1].difference < 1e-3


def test_full_rank_is_the_model(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama", torch.float32)))
    pins = {"*.k": 32, "*.v": 32}
    made = attempt(Factorize.model_validate({"rank": 64, "pins": pins, "drift": 0}), model, tmp_path / "steps")
    for site in model.graph.linear:
        torch.testing.assert_close(made.weight(site), model.state.weight(site), rtol=1e-4, atol=1e-5)


# --- ranks by what they lose ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spectra_choose_ranks_within_the_same_weights(project: Project) -> None:
    """`plan` measures and tells the exact bytes; `run` makes them; another run finds what was measured."""
    text = project.recipe.read_text()
    step = "  - factorize: {rank: 0.6, spread: spectrum, pins: {'*.o': full}}\nexport: [native: {}]\n"
    project.recipe.write_text(text[: text.index("  - quantize:")] + step)
    told = project.plan().out
    assert "of what matrices put out is lost in the mean" in told
    (nbytes,) = (int(row.split()[1].replace(",", "")) for row in told.splitlines() if row.startswith("native: "))
    assert project.run().code == 0
    files = (project.out / "native").glob("*.safetensors")
    assert sum(p.stat().st_size for p in files) == nbytes
    state = pipeline.run(project.recipe).state
    uniform = foresee([Factorize.model_validate({"rank": 0.6, "pins": {"*.o": "full"}})], open_model(str(project.model)).state)
    counts = []
    for found in (state, uniform):
        ranks = {n: f.rank for n, f in found.formats.items() if isinstance(f, Factored)}
        assert not any(n.endswith(".o") for n in ranks)
        free = [s for s in state.graph.linear if not s.name.endswith(".o")]
        counts.append(sum(ranks[s.name] * sum(s.shape) if s.name in ranks else s.numel for s in free))
    assert counts[0] <= counts[1]
    assert state.formats != uniform.formats


def test_plan_tells_what_it_buys(project: Project) -> None:
    text = project.recipe.read_text()
    project.recipe.write_text(text[: text.index("  - quantize:")] + "  - factorize: {rank: 0.5}\nexport: [native: {}]\n")
    told = project.plan().out
    assert "multiplications a token: 0.49 of the original's linear layers, 7 of them as two factors" in told
    assert "low rank buys operations, not size" in told
    idle = project.plan("factorize.rank=32").out
    assert "layers.0.attn.q and 3 more: factors with as many weights as the matrix, or more, save nothing" in idle


@pytest.mark.slow
def test_inspect_and_eval_know_the_artifact(made: dict[str, pipeline.Outcome], project: Project) -> None:
    artifact = made["int8"].artifacts["native"][0]
    assert "lr32:int8:channel" in project("inspect", artifact).out
    assert "lr32:int8:channel" in project("inspect", artifact, "layers.0.attn.q").out
    assert project("eval", artifact, "--text", project.text, "--sequences", "2", "--length", "32").code == 0


def test_recipes_are_resolved_as_they_were_said(made: dict[str, pipeline.Outcome]) -> None:
    said = yaml.safe_load((made["dense"].out / "recipe.resolved.yaml").read_text())["passes"][0]["factorize"]
    assert (said["rank"], said["pins"]) == (32, {"*.v": "full"})


# --- what was tampered with -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), [
    ({"text": "lr16:int8:channel"}, "factor_A.weight_packed' is int32"),
    ({"text": "lr64"}, "factor_A.weight' is missing"),
    ({"text": "lr99:int8:channel"}, "the rank is above"),
    ({"text": "lr0"}, "a rank is 1 or more"),
    ({"text": "int8:channel"}, "weight_packed' is missing"),
    ({"tensor": "factor_B.weight_shape"}, "factor_B.weight_shape' says"),
    ({"lost": "factor_B.weight_scale"}, "factor_B.weight_scale' is missing"),
])  # fmt: skip
def test_an_artifact_that_was_damaged_is_refused(
    made: dict[str, pipeline.Outcome], tmp_path: Path, change: dict[str, str], says: str
) -> None:
    """By the reader, and by the runtime, in one line."""
    folder = Path(shutil.copytree(made["int8"].artifacts["native"][0], tmp_path / "artifact"))
    (folder / "compress.json").unlink()
    stem = "model.layers.0.self_attn.q_proj"
    if "text" in change:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["formats"][stem] = change["text"]
        (folder / "config.json").write_text(json.dumps(config))
    else:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        if "lost" in change:
            del tensors[f"{stem}.{change['lost']}"]
        else:
            tensors[f"{stem}.{change['tensor']}"] += 1
        save_file(tensors, file)
    for read in (lambda: reader.read(folder).weight(made["int8"].state.graph["layers.0.attn.q"]), lambda: runtime.load(folder)):
        with pytest.raises(ModelError, match=re.escape(says)) as caught:
            read()
        assert "\n" not in str(caught.value)
