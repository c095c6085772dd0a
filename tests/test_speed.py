"""A machine that is slow at bf16 computes blocks in fp32; what is stored and served stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import evaluate
from compress.model import speed
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.model.stream import Stream
from tests.conftest import rare
from tests.cooking import bake

SLOW = {torch.float32: 6e10, torch.bfloat16: 1e10, torch.float16: 1e10}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU without units for bf16 is."""
    monkeypatch.setattr(speed, "matrix_speed", SLOW.__getitem__)


def test_what_is_chosen(slow: None) -> None:
    assert speed.computing(torch.bfloat16) == torch.float32
    assert speed.computing(torch.float16) == torch.float16  # what overflows is to be seen
    assert speed.computing(torch.float32) == torch.float32
    assert speed.computing(torch.bfloat16, "cuda") == torch.bfloat16


def test_a_measured_speed_is_one() -> None:
    whole = speed.matrix_speed.__wrapped__ if hasattr(speed.matrix_speed, "__wrapped__") else None
    assert whole is None or whole(torch.float32) > 1e8


@pytest.mark.parametrize("name", ["llama", *(rare(name) for name in ("mixtral", "gemma3", "gpt2", "opt"))])
def test_blocks_compute_in_fp32_and_the_artifact_is_a_bf16_model(
    family: Any, text: Path, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert Stream(open_model(str(family(name))).state).dtype == torch.float32
    done = bake(tmp_path, family(name), text, "native", {"quantize": {"format": "int4:g32"}})
    proof = done.artifacts["native"][1]
    assert done.state.dtype == torch.bfloat16
    assert (proof.engine, proof.difference) == ("compress runtime", 0)  # proven in what it is served in
    assert done.state.weight(done.state.graph.linear[0]).dtype == torch.bfloat16
    (record,) = (tmp_path / "out" / "steps").glob("*/record.json")
    assert json.loads(record.read_text())["made_of"]["computes"] == "float32 float32"
    monkeypatch.undo()
    bake(tmp_path, family(name), text, "native", {"quantize": {"format": "int4:g32"}})
    assert len(list((tmp_path / "out" / "steps").iterdir())) == 2  # another machine's is another step


def test_figures_are_about_the_same(family: Any, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3)), "random")
    state = open_model(str(family("llama"))).state
    _, precise = evaluate.compare(None, state, tokens)
    monkeypatch.undo()
    _, own = evaluate.compare(None, state, tokens)
    assert own.perplexity == pytest.approx(precise.perplexity, rel=2e-2)
