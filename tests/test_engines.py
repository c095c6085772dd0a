"""Engines and the proof that is written on them: what a proof must catch, and whom it blames; eval and bench through engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import commands, pipeline
from compress.bench import measure
from compress.cli import main
from compress.errors import ExportError
from compress.export.artifact.engines import EngineError, Transformers, dense, greedy
from compress.export.artifact.exporter import Job
from compress.export.artifact.proof import logits, prove
from compress.export.compressed_tensors import engines as compressed_tensors
from compress.export.table import KINDS
from compress.model.model import open_model
from tests import stock
from tests.conftest import FAMILIES, covered
from tests.cooking import cook

DECODERS = [name for name in FAMILIES if name != "roberta"]


def ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    return cook(tmp_path_factory.mktemp("made"), family("llama"), text, format="int4:g32")


def artifact_of(made: pipeline.Outcome) -> Path:
    return made.artifacts["compressed_tensors"][0]


def job_of(made: pipeline.Outcome, source: Path, tokens: Tensor | None = None) -> Job:
    return Job(open_model(str(source)), made.state, ids() if tokens is None else tokens, "key", lambda facts: "")


def engine_of(made: pipeline.Outcome) -> Transformers:
    found = compressed_tensors.engine(artifact_of(made), made.state, "cpu")
    assert isinstance(found, Transformers)
    found.prefill(ids())  # the first pass unpacks
    return found


@pytest.mark.parametrize("name", covered(DECODERS, "llama", "gpt2", "mixtral"))
def test_greedy_is_what_transformers_generates(family: Any, name: str) -> None:
    source = family(name, torch.float32)  # in 16 bits there are ties
    model = stock.load(source)
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids(), do_sample=False, max_new_tokens=8, pad_token_id=258)
    assert torch.equal(greedy(dense(open_model(str(source)), "cpu"), ids(), 8), wanted[:, ids().shape[1] :])


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_the_cache_gives_what_whole_windows_give(family: Any, name: str) -> None:
    engine = dense(open_model(str(family(name, torch.float32))), "cpu")
    whole, _ = engine.prefill(ids())
    first, cache = engine.prefill(ids()[:, :10])
    rest = []
    for i in range(10, 24):
        one, cache = engine.step(ids()[:, i : i + 1], cache)
        rest.append(one)
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, atol=1e-3, rtol=1e-4)


def test_a_proof_says_how_far_it_looked(made: pipeline.Outcome, family: Any) -> None:
    proof = made.artifacts["compressed_tensors"][1]
    assert (proof.engine, proof.difference, proof.greedy) == ("transformers", 0.0, 16)
    assert "16 greedy tokens the same" in made.report.summary()
    assert prove(job_of(made, family("llama")), engine_of(made)).greedy == 16


def test_batches_of_different_length_stream_together(family: Any) -> None:
    model = open_model(str(family("llama")))
    one, two = logits(model.state, [ids(), ids(1, 7)], "cpu")
    assert torch.equal(one, logits(model.state, [ids()], "cpu")[0])
    assert torch.equal(two, logits(model.state, [ids(1, 7)], "cpu")[0])


@pytest.mark.parametrize("site", covered(["layers.0.attn.q", "layers.1.mlp.down", "lm_head"], "layers.1.mlp.down"))
def test_a_wrong_matrix_is_named(made: pipeline.Outcome, family: Any, site: str) -> None:
    """The artifact's tensors are right, and the engine reads one of them wrongly: so it is with an engine's bug."""
    engine = engine_of(made)
    with torch.no_grad():
        engine.model.get_submodule(made.state.graph[site].module).weight.mul_(1.5)
    with pytest.raises(ExportError, match=f"its logits differ from the run's by .*, first at '{site}', whose outputs are off"):
        prove(job_of(made, family("llama")), engine)


@pytest.mark.slow
def test_a_fault_outside_the_matrices_blames_none_of_them(made: pipeline.Outcome, family: Any) -> None:
    engine = engine_of(made)
    with torch.no_grad():
        engine.model.get_submodule("model.norm").weight.mul_(1.5)
    with pytest.raises(ExportError, match="though every matrix by itself gives what it should"):
        prove(job_of(made, family("llama")), engine)


class Forgetful(Transformers):
    """An engine whose cache is lost: windows are right, and text is not."""

    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return super().step(tokens, None)


def test_a_lost_cache_is_caught(made: pipeline.Outcome, family: Any) -> None:
    with pytest.raises(ExportError, match=r"token \d+ of its greedy text is not the run's, though whole windows agree"):
        prove(job_of(made, family("llama")), Forgetful(engine_of(made).model, "forgetful"))


class Broken(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nfor this")


def test_an_engine_that_fails_says_why_in_one_line() -> None:
    with pytest.raises(EngineError, match="it' Broken fails on it"):
        Transformers(Broken(2, 2), "it").prefill(ids())


# --- eval -------------------------------------------------------------------------------------------------------------


def evaluated(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["eval", *arguments, "--sequences", "2", "--length", "32", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_eval_measures_through_the_engine_and_says_so(made: pipeline.Outcome, text: Path, capsys: Any, monkeypatch: Any) -> None:
    through = evaluated(capsys, str(made.out), "--text", str(text))
    assert through["engine"] == "transformers"

    def refuse(*_: Any) -> Any:
        raise EngineError("no room")

    broken = tuple(replace(kind, engine=refuse) if kind.name == "compressed_tensors" else kind for kind in KINDS)
    monkeypatch.setattr(commands, "KINDS", broken)
    streamed = evaluated(capsys, str(made.out), "--text", str(text))
    assert streamed["engine"] == "our reader of compressed-tensors, streamed (no room)"
    assert streamed["perplexity"] == pytest.approx(through["perplexity"], rel=1e-5)
    assert streamed["kl"] == pytest.approx(through["kl"], abs=1e-5)


# --- bench ------------------------------------------------------------------------------------------------------------


def test_bench_prints_both_sides(made: pipeline.Outcome, capsys: Any) -> None:
    arguments = ["bench", str(made.out), "--prompt", "8", "--new", "3", "--repeats", "2"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("prefill, tokens/s", "decode, tokens/s", "weights read per token, decode", "of 2 turns", "prompt 8"):
        assert words in shown
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["original"]["engine"] == "transformers"
    assert all(side["decode_tokens_per_second"] > 0 for side in found.values())


def test_bench_takes_turns_and_counts_each_after_the_first(family: Any) -> None:
    engine, seen = dense(open_model(str(family("llama"))), "cpu"), []
    one, two = measure([engine, engine], ids(1, 8), 2, 3, seen.append)
    assert [len(s) for s in (one.prefill, one.decode, two.prefill, two.decode)] == [3] * 4
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_weight_bytes_are_all_but_the_rows_of_a_table(family: Any, name: str) -> None:
    model = open_model(str(family(name)))
    table = 0 if name == "qwen2" else model.graph["embed"].numel * 2  # that of qwen2 is its head too
    engine = dense(model, "cpu")
    held = sum(p.nbytes for p in engine.model.parameters()) + sum(b.nbytes for b in engine.model.buffers())  # type: ignore[attr-defined]
    assert engine.weight_bytes() == held - table


@pytest.mark.parametrize(("arguments", "says"), [
    (["{model}"], "its original is not known; name it with --against MODEL"),
    (["{model}", "--against", "{model}", "--prompt", "1000"], "has 256 positions; lower --prompt 1000 or --new 32"),
    (["{model}", "--prompt", "0"], "argument --prompt: needs a whole number from 1 on"),
    (["{model}/none"], "no such folder"),
])  # fmt: skip
def test_bad_input(family: Any, capsys: Any, arguments: list[str], says: str) -> None:
    try:
        code = main(["bench", *(a.format(model=family("llama")) for a in arguments)])
    except SystemExit as e:
        code = int(e.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err


def test_a_model_that_does_not_decode(family: Any, capsys: Any) -> None:
    assert main(["bench", str(family("roberta")), "--against", str(family("roberta"))]) == 2
    assert "does not predict the next token" in capsys.readouterr().err
