"""The pass `quantize`: error feedback beats rounding where it counts, every expert is accounted for, two runs give one result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.errors import FormatError, MatchError, RecipeError
from compress.formats import parse
from compress.manager import Cost
from compress.model.lockstep import Clean
from compress.model.model import open_model
from compress.model.work import per_token
from compress.passes import gptq_core as core
from compress.passes.drift import Drift
from compress.passes.quantize import Quantize
from tests import stock
from tests.conftest import GROUPED, IDS, SMALL, contents, make_model, rare
from tests.cooking import bake, cook, recipe
from tests.pass_laws import tensors_of


def records(outcome: pipeline.Outcome) -> dict[str, dict[str, Any]]:
    found = [r for step in sorted((outcome.out / "steps").iterdir()) for r in load_records(step)]
    return {r["site"]: r for r in found}


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["compressed_tensors"][0]


def load_records(step: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = yaml.safe_load((step / "record.json").read_text())["sites"]
    return listed


def test_drift_is_the_same_summed_at_inputs_and_at_outputs(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    sites = [s for s in state.graph.of_block(0) if s.input_key == state.graph["layers.0.attn.q"].input_key]
    X, clean = torch.randn(2, 40, sites[0].shape[1])
    wide, narrow = (Drift(sites, state, inputs, "cpu") for inputs in (0, 1 << 20))
    for half in (slice(0, 25), slice(25, 40)):
        wide.see(X[half], Clean({None: clean[half]}))
        narrow.see(X[half], Clean({None: clean[half]}))
    assert (wide.tokens, bool(wide.rows), bool(narrow.rows)) == (40, False, True)
    for some in (sites, sites[1:], sites[:1]):
        W = torch.cat([state.reference(s) for s in some]).float()
        torch.testing.assert_close(narrow.of(some, W), wide.of(some, W), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_a_sum_over_tokens_may_exceed_what_fp16_holds(family: Any, size: float) -> None:
    """A residual stream of some hundreds is usual, and so many tokens times it are more than 65504."""
    state = open_model(str(family("llama", torch.float16))).state
    site, draw = state.graph["layers.0.attn.o"], torch.Generator().manual_seed(0)
    X, R = ((torch.randn(2, 1024, 64, generator=draw) + 1).half() for _ in range(2))
    drift = Drift([site], state, 64, "cpu", added=True)
    drift.see(X[1], Clean({None: X[0]}, size * (R[0] - R[1] + X[1])))
    W = state.reference(site).double()
    wanted = ((X[0].double() - X[1].double()) @ W.T + size * (R[0] - R[1] + X[1]).double()).T @ X[1].double()
    assert float((drift.of([site], W.float()) - wanted).norm()) < 2e-3 * float(wanted.norm())


def test_weights_moved_for_drift_bring_the_sum_of_the_residual_stream_nearest_to_what_it_was(family: Any) -> None:
    """The least squares of R̃ + X̃Wᵀ against R + XWᵀ, found by torch."""
    state = open_model(str(family("llama"))).state
    site = state.graph["layers.0.attn.o"]
    n, k = site.shape
    X, residual = torch.randn(2, 400, k), torch.randn(2, 400, n)
    drift = Drift.of_stage([site], state, Clean({None: X[0]}, residual[0]), "cpu")
    for half in (slice(0, 150), slice(150, 400)):
        drift.see(X[1, half], Clean({None: X[0, half]}, residual[0, half] - residual[1, half]))
    W = state.reference(site).float()
    factor = core.factor(X[1].T @ X[1] / 400, damp=1e-7)
    moved = core.retarget(W, drift.of([site], W), factor, 1 / drift.tokens)
    wanted = torch.linalg.lstsq(X[1], residual[0] + X[0] @ W.T - residual[1]).solution.T
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_a_token_passes_the_experts_that_it_is_sent_to(family: Any, name: str) -> None:
    state = open_model(str(family(name))).state
    config, work = state.config, per_token(state)
    share = config.num_experts_per_tok / config.num_local_experts if name == "mixtral" else None
    weights = [s.numel if s.expert is None else share * s.numel for s in state.graph.linear]
    assert work.weights == pytest.approx(sum(weights))
    assert (work.weights < sum(s.numel for s in state.graph.linear)) == (name == "mixtral")


# --- quality ----------------------------------------------------------------------------------------------------------


def divergence(
    folder: Path, model: Path, calibration: Path, evaluation: Path, sequences: int, length: int = 256, **options: Any
) -> float:
    """KL to the original, in nats, on text that was not calibrated on."""
    path = recipe(folder, model, calibration, **options)
    content = yaml.safe_load(path.read_text())
    content["data"]["calibration"] |= {"sequences": sequences, "length": length}
    content["data"]["evaluation"] = {"text": str(evaluation), "sequences": sequences // 2, "length": length}
    content["export"] = []
    path.write_text(yaml.safe_dump(content))
    kl: float = pipeline.run(path).scores["compressed"]["kl"]
    return kl


@pytest.mark.slow
@pytest.mark.parametrize("bits", [*(rare(bits) for bits in (4, 3)), 2])
def test_error_feedback_beats_rounding_on_held_out_text(assets: Path, tmp_path: Path, bits: int) -> None:
    texts = assets / "texts" / "stories-split"
    model = assets / "models" / "stories260K-mlp192"
    kl = {m: divergence(tmp_path / m, model, texts / "calibration.txt", texts / "evaluation.txt", 24,
                        64, method=m, format=f"int{bits}:g64") for m in ("gptq", "rtn")}  # fmt: skip
    assert kl["gptq"] < 0.8 * kl["rtn"], kl


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_error_feedback_beats_rounding_on_a_larger_model(assets: Path, tmp_path: Path, bits: int) -> None:
    texts = assets / "texts"
    kl = {m: divergence(tmp_path / m, assets / "models" / "ref-7m", texts / "c4" / "c4.utf8",
                        texts / "wikitext2-raw" / "wiki.test.raw", 64, method=m, format=f"int{bits}:g64")
          for m in ("gptq", "rtn")}  # fmt: skip
    assert kl["gptq"] < 0.8 * kl["rtn"], kl


def test_error_feedback_loses_on_the_weights_and_wins_on_the_outputs(family: Any, text: Path, tmp_path: Path) -> None:
    made = {
        m: cook(tmp_path / m, family("llama"), text, exports=False, method=m, format="int3:g32", drift=0) for m in ("gptq", "rtn")
    }
    source = open_model(str(family("llama"))).state
    name = "layers.0.attn.q"
    far = {
        m: float((o.state.weight(o.state.graph[name]) - source.weight(source.graph[name])).float().norm())
        for m, o in made.items()
    }
    error = {m: records(o)[name]["error"] for m, o in made.items()}
    assert far["gptq"] > far["rtn"]
    assert error["gptq"] < error["rtn"]


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), [
    ("llama", "rtn"), ("gpt2", "gptq"), rare("mixtral", "gptq"), rare("llama", "gptq"),
    rare("gpt2", "rtn"), rare("mixtral", "rtn"),
])  # fmt: skip
def test_every_changed_site_has_one_record_in_the_order_of_the_blocks(
    family: Any, text: Path, tmp_path: Path, name: str, method: str
) -> None:
    head = {} if name == "gpt2" else {"lm_head": "int8:g32"}
    clip = "hessian" if method == "rtn" else "mse"  # rounding that goes by inputs, and so sees them
    made = cook(tmp_path, family(name), text, exports=False, method=method, clip=clip, format="int4:g32", pins=head)
    listed = load_records(next((made.out / "steps").iterdir()))
    names = [r["site"] for r in listed]
    assert sorted(names) == sorted(made.state.codes)
    blocks = [made.state.graph[n].block for n in names]
    assert blocks == sorted(blocks, key=lambda b: 99 if b is None else b), "the head comes last"
    for record in listed:
        site, fmt = made.state.graph[record["site"]], parse(record["format"])
        assert fmt == made.state.format(site)
        assert record["bytes"] == fmt.nbytes(site.shape)
        assert record["tokens"] is not None
        assert 0 <= record["error"] < 1
        assert 0 < record["rounding"] < 1
        if method == "rtn":
            assert record["error"] == record["rounding"]
    dense = [r for r in listed if made.state.graph[r["site"]].expert is None]
    assert all(r["tokens"] == 6 * 32 for r in dense)


def test_rounding_that_asks_nothing_of_inputs_streams_no_text(family: Any, text: Path, tmp_path: Path) -> None:
    made = [
        cook(tmp_path / str(bool(t)), family("llama", blocks=1), t, exports=False, method="rtn", format="int4:g32")
        for t in (text, None)
    ]
    with_text, without = (tensors_of(m.state) for m in made)
    assert all(torch.equal(t, without[name]) for name, t in with_text.items())
    assert all(r["tokens"] is None for r in load_records(next((made[0].out / "steps").iterdir())))


@pytest.mark.slow
def test_a_rank_that_no_step_fits_is_refused(family: Any, text: Path, tmp_path: Path) -> None:
    ranked = {"pins": {"*.q": "int3:g32+r4"}}
    with pytest.raises(RecipeError, match=r":\d+:\d+  'int3:g32\+r4' has a low-rank correction, which 'quantize' leaves"):
        cook(tmp_path, family("llama"), text, format="int4:g32", **ranked)
    passes = {"quantize": {"format": "int4:g32", **ranked}}, {"lqlora": {"rank": 2, "rounds": 0, "drift": 0}}
    done = bake(tmp_path, family("llama"), text, "native", *passes)
    assert done.artifacts["native"][1].greedy == 16


def test_rounding_needs_no_text(family: Any, tmp_path: Path) -> None:
    made = cook(tmp_path, family("llama"), exports=False, method="rtn", format="int4:g32", pins={"lm_head": "int8:g32"})
    assert set(made.state.codes) == {s.name for s in made.state.graph if s.role != "embed"}
    assert all(r["tokens"] is None and 0 < r["error"] < 1 for r in records(made).values())
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+:\d+  'gptq' needs data.calibration; add it, or use method: rtn"):
        pipeline.plan(recipe(tmp_path / "gptq", family("llama"), format="int4:g32"))


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose router never chooses the last of five experts: two of (a, -a, b, -b) are always above zero."""
    folder = tmp_path_factory.mktemp("idle")
    make_model(folder, transformers.MixtralConfig(**SMALL, **GROUPED, **IDS, num_local_experts=5, num_experts_per_tok=2))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("gate.weight")]:
        a, b = tensors[name][0].clone(), tensors[name][1].clone()
        tensors[name] = torch.stack([a, -a, b, -b, torch.zeros_like(a)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def solved(idle: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """That model by GPTQ."""
    return cook(tmp_path_factory.mktemp("solved"), idle, text, format="int4:g32")


@pytest.mark.slow
def test_tokens_are_counted_for_each_expert(solved: pipeline.Outcome) -> None:
    """Each token goes to two experts; what an expert lacks is taken from the others, and said."""
    made = solved
    found = records(made)
    for block in range(2):
        for role in ("gate", "up", "down"):
            counts = [found[f"layers.{block}.experts.{e}.{role}"]["tokens"] for e in range(5)]
            assert sum(counts) == 2 * 6 * 32
            assert counts[4] == 0
            assert min(counts[:4]) > 0
    for name, record in found.items():
        site = made.state.graph[name]
        if site.expert is None:
            continue
        lacking = 2 * site.shape[1] - record["tokens"]
        note = f"expert saw {record['tokens']} tokens, pooled Hessian for {lacking} more"
        assert (note in record["notes"]) == (lacking > 0)


@pytest.mark.slow
def test_an_expert_without_tokens_is_quantized_no_worse_than_by_rounding_alone(
    idle: Path, solved: pipeline.Outcome, text: Path, tmp_path: Path
) -> None:
    made = {"gptq": solved, "rtn": cook(tmp_path, idle, text, exports=False, method="rtn", format="int4:g32")}
    source = open_model(str(idle)).state
    for role in ("gate", "up", "down"):
        site = source.graph[f"layers.1.experts.4.{role}"]
        far = {m: float((o.state.weight(site) - source.weight(site)).float().norm()) for m, o in made.items()}
        assert far["gptq"] < 1.5 * far["rtn"], role
    assert made["gptq"].artifacts["compressed_tensors"][1].engine == "transformers"  # type: ignore[union-attr]


@pytest.mark.slow
def test_experts_that_saw_too_little_are_a_warning(solved: pipeline.Outcome, idle: Path, text: Path, tmp_path: Path) -> None:
    """On the last screen and in both reports; of all experts of all blocks, by the inputs of the widest of their matrices."""
    found = records(solved)
    seen = [found[f"layers.{block}.experts.{e}.down"]["tokens"] for block in range(2) for e in range(5)]
    few = sum(tokens < 128 for tokens in seen)
    said = (f"{few} of 10 experts saw fewer than 128 tokens of the calibration text, as many as they have inputs, 2 of them "
            "none at all: what they need was taken from the mean of the others. Ask for more sequences than 6")  # fmt: skip
    shown = [solved.report.summary(), *((solved.out / f"report.{kind}").read_text() for kind in ("md", "html"))]
    assert [text.count(said) for text in shown] == [1, 1, 1]
    assert f"\nwarning: {said}" in shown[0]
    enough = recipe(tmp_path, idle, text, exports=False, method="rtn", clip="hessian", format="int4:g32")
    outcome = pipeline.run(enough, ["data.calibration.sequences=40"])
    (line,) = outcome.report.warnings
    assert line.startswith(
        "2 of 10 experts saw fewer than 128 tokens of the calibration text, as many as they have inputs, 2 of "
    )


def test_no_warning_of_experts_without_experts_or_data(family: Any, idle: Path, text: Path, tmp_path: Path) -> None:
    for folder, model, given in (("a", idle, None), ("b", family("llama", blocks=1), text)):
        made = cook(tmp_path / folder, model, given, exports=False, method="rtn", format="int4:g32")
        assert made.report.warnings == []
        assert "experts saw" not in (made.out / "report.md").read_text()


# --- one result -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [rare("llama"), "mixtral"])
def test_two_runs_give_the_same_bytes(family: Any, text: Path, tmp_path: Path, name: str) -> None:
    a, b = (cook(tmp_path / run, family(name, blocks=1), text, format="int4:g32") for run in ("a", "b"))
    assert contents(artifact_of(a)) == contents(artifact_of(b))


def test_the_inputs_of_later_blocks_carry_the_error_of_earlier_ones(family: Any, text: Path, tmp_path: Path) -> None:
    """Block 1 is solved differently when block 0 was quantized before it than when block 0 stayed as it is."""
    pins = ({}, {"layers.0.*": "bf16"})
    made = [
        cook(tmp_path / str(i), family("llama"), text, exports=False, format="int3:g32", pins=p, drift=0)
        for i, p in enumerate(pins)
    ]
    errors = [records(m)["layers.1.attn.q"]["rounding"] for m in made]
    assert errors[0] != errors[1]


def test_each_option_has_an_effect(family: Any, text: Path, tmp_path: Path) -> None:
    """Settings that differ give other codes; none is read and forgotten."""
    settings: list[dict[str, Any]] = [{}, {"damp": 0.3}, {"order": "natural"}, {"clip": "minmax"}, {"clip": "hessian"},
                                      {"drift": 0}, {"drift": 1}, {"method": "rtn"}, {"pins": {"*.o": "int4:g64"}}]  # fmt: skip
    codes = []
    for i, options in enumerate(settings):
        made = cook(tmp_path / str(i), family("llama", blocks=1), text, exports=False, **{"format": "int3:g32", **options})
        packed = [made.state.codes[n].load().tensors for n in made.state.codes]
        codes.append(b"".join(p["weight_packed"].numpy().tobytes() + p["weight_scale"].float().numpy().tobytes() for p in packed))
    assert len(set(codes)) == len(settings)


# --- plan -------------------------------------------------------------------------------------------------------------


def test_a_format_that_does_not_fit_names_its_site_and_where_it_was_written(family: Any, text: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"recipe\.yaml:\d+:\d+  'layers.0.attn.q': int4:g128: groups of 128 do not divide 64"):
        pipeline.plan(recipe(tmp_path, family("llama"), text))
    with pytest.raises(MatchError, match=r"recipe\.yaml:\d+:\d+  pattern '\*.upp' matched no site.*Nearest: '\*\.up'"):
        pipeline.plan(recipe(tmp_path, family("llama"), text, format="int4:g32", pins={"*.upp": "int8:g32"}))
    pins = {"embed": "int8:g32", "lm_head": "int4:g32"}
    with pytest.raises(FormatError, match=r"recipe\.yaml:\d+:\d+  'embed' and 'lm_head' are one matrix, and the pins give it"):
        pipeline.plan(recipe(tmp_path, family("qwen2"), text, format="int4:g32", pins=pins))


def test_later_pins_win(family: Any, text: Path, tmp_path: Path) -> None:
    pins = {"*.down": "int8:g32", "layers.1.mlp.down": "bf16", "layers.1.*": "int3:g32"}
    formats = pipeline.plan(recipe(tmp_path, family("llama"), text, format="int4:g32", pins=pins)).prepared.foreseen.plan
    assert formats is not None
    assert {n: str(f) for n, f in formats.formats.items() if n.endswith("down")} == {
        "layers.0.mlp.down": "int8:g32", "layers.1.mlp.down": "int3:g32"}  # fmt: skip


def test_cost_grows_with_the_model_the_tokens_and_the_twin(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    cost = lambda tokens, **o: Quantize(format=parse("int4:g32"), **o).cost(  # noqa: E731
        Quantize(format=parse("int4:g32"), **o).foresee(state), tokens)  # fmt: skip
    assert cost(1000).model_flops > cost(1000, drift=0).model_flops > 0
    assert cost(4000).peak_bytes > cost(1000).peak_bytes
    assert cost(4000).model_flops == pytest.approx(4 * cost(1000).model_flops)
    assert cost(1000).weights == sum(s.numel for s in state.graph.linear)
    assert cost(1000, pins={"layers.*": "bf16"}) == Cost()


@pytest.mark.slow
def test_the_source_may_lie_in_a_read_only_folder(family: Any, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(family("llama"), tmp_path / "model")
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    made = cook(tmp_path / "run", source, text, format="int4:g32")
    assert stock.load(artifact_of(made))
