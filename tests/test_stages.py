"""What stages are foretold to take: each of it for a reason that a recipe and a config tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress import pipeline, stages
from compress.formats import parse
from compress.manager import Cost
from compress.model import speed
from compress.model.lockstep import Clean, Inputs
from compress.model.model import open_model
from compress.model.stream import Stream
from compress.model.work import per_token
from compress.passes import costs
from compress.passes.lqlora import LqLora
from compress.passes.quantize import Quantize
from compress.state.state import State
from tests.conftest import Project

TOKENS = 2 * 24


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speeds do not vary, and which computes in fp32."""
    monkeypatch.setattr(speed, "matrix_speed", {torch.float32: 1e11, torch.bfloat16: 1e10}.__getitem__)
    monkeypatch.setattr(speed, "softmax_speed", lambda: 1e9)


def cost(state: State, tokens: int, **options: Any) -> Cost:
    step = Quantize(format=parse("int4:g32"), **options)
    return step.cost(step.foresee(state), tokens)


def held(family: Any, name: str) -> list[int]:
    """Numbers that tensors hold at each pause of the first block, for each token; views of one tensor count once."""
    state = open_model(str(family(name))).state
    stream = Stream(state)
    ids = torch.arange(TOKENS).view(2, 24) % 200
    batches, found = stream.start(state, [ids]), list[int]()

    def observe(_: str, inputs: Inputs, __: Clean | None) -> None:
        found.append(sum(x.numel() for x in inputs.values()) // TOKENS)

    stream.calibrate(state, 0, batches, state.graph.of_block(0), observe, lambda _: {})
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_what_waits_has_room_for_the_inputs_of_all_stages(family: Any, name: str) -> None:
    """And for what the block was given and its residual; an expert's inputs count as often as tokens are sent to it."""
    state = open_model(str(family(name))).state
    inputs = sum(held(family, name))
    work, width = per_token(state), state.graph["embed"].shape[1]
    between = work.waiting - inputs - 2 * width
    attention = [s.shape[0] for s in state.graph.of_block(0) if s.role in ("q", "k", "v")]
    assert between == sum(attention)


def test_rounding_without_text_holds_a_matrix_and_multiplies_nothing(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    plain, solved = cost(state, 0, method="rtn"), cost(state, 1000, drift=0)
    seen = cost(state, 1000, method="rtn", clip="hessian")
    assert cost(state, 1000, method="rtn") == plain, "nothing is asked of inputs, so no text is read"
    assert plain.model_flops == plain.exact_flops == plain.numbers == plain.steps == 0
    assert plain.weights == solved.weights
    largest = max(s.numel for s in state.graph.linear)
    assert plain.peak_bytes < costs.matrix_bytes(largest) + sum(s.numel for s in state.graph.of_block(0))
    assert 0 < seen.exact_flops < solved.exact_flops
    assert seen.steps == 0 < solved.steps


def test_steps_are_inputs_not_weights(family: Any) -> None:
    """What rounds one input after the other takes as long for few outputs as for some more; a correction is a matrix's own."""
    state = open_model(str(family("llama"))).state
    together, few, many = (costs.solving([(n, 512)]) for n in (1, 8, 64))
    assert together.steps == few.steps == many.steps == 2 * 512
    assert costs.solving([(1 << 20, 512)]).steps > many.steps  # some outputs at a time
    assert many.flops == 64 * together.flops
    step = LqLora(format=parse("int4:g32"), rank=2, rounds=0)
    assert step.cost(step.foresee(state), 1000).steps > 2 * cost(state, 1000).steps  # from two ends, and q apart from k


def test_a_proof_without_text_runs_no_engine(project: Project) -> None:
    ready = pipeline.prepare(project.recipe)
    (exporter,) = ready.exports
    layout = exporter.layout(ready.model, ready.foreseen)
    run, compared = (stages.proof(exporter, ready.foreseen, layout, text) for text in (True, False))
    assert compared.seconds == 0 < run.seconds
    assert compared.peak_bytes < run.peak_bytes
    assert compared.bytes == run.bytes == layout.nbytes


def test_the_time_of_a_run_has_its_start(project: Project, tmp_path: Path) -> None:
    """A process that does nothing but import takes some seconds, of which a small model's run mostly is."""
    planned = pipeline.plan(project.recipe)
    layouts = {e.name: e.layout(planned.prepared.model, planned.prepared.foreseen) for e in planned.prepared.exports}
    alone = sum(s.seconds(planned.prepared.start.dtype) for s in stages.stages(planned.prepared, layouts))
    assert planned.seconds == pytest.approx(stages.SECONDS_AT_START + alone)


def test_a_shared_table_brings_a_pass_to_the_head_and_the_head_itself(family: Any) -> None:
    """A head of its own is at the end of the pass that was made anyway."""
    shared, apart = (open_model(str(family(name))).state for name in ("qwen2", "llama"))
    more = cost(shared, 1000, pins={"embed": "int4:g32"})
    assert more.model_flops > 1.3 * cost(shared, 1000).model_flops
    assert cost(apart, 1000, pins={"lm_head": "int4:g32"}).model_flops == cost(apart, 1000).model_flops
    assert cost(apart, 1000, pins={"lm_head": "int4:g32"}).exact_flops > cost(apart, 1000).exact_flops
