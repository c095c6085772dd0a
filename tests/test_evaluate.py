"""The figures of `evaluate`, which streams block by block, are those of a plain forward pass of transformers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress import evaluate
from compress.model import head
from compress.model.data import Tokens
from compress.model.model import open_model
from tests.conftest import IDS, SMALL, Project, covered, make_model, rare


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(3)
    return Tokens(torch.randint(0, 256, (3, 24), generator=generator), "random")


def disturbed(source: Path, folder: Path) -> Path:
    """A copy of a model with every matrix changed a little."""
    model = loaded(source)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.add_(torch.randn_like(p) * 0.3 * p.std())
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    kind = transformers.AutoModelForMaskedLM if "roberta" in str(folder) else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def logits(folder: Path, tokens: Tokens) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = loaded(folder)(input_ids=tokens.ids, use_cache=False).logits
    return out.double()


def plain(original: torch.Tensor, ours: torch.Tensor, ids: torch.Tensor) -> tuple[float, float, float]:
    """Perplexity, KL and agreement, written down again from their definitions."""
    p, q = (x[:, :-1].log_softmax(-1) for x in (original, ours))
    nll = torch.nn.functional.nll_loss(q.flatten(0, 1), ids[:, 1:].flatten())
    kl = torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")
    return math.exp(nll), float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("sizes", covered([None, (7, 50)], (7, 50)))
@pytest.mark.parametrize(
    "name",
    covered(["llama", "gemma2", "gpt2", "opt", "qwen3_moe", "qwen2", "granite"], "granite"),
)
def test_figures_are_those_of_a_plain_forward(
    family: Any, tokens: Tokens, tmp_path: Path, name: str, sizes: Any, monkeypatch: Any
):
    """However few predictions, and rows of the vocabulary, are looked at at once."""
    if sizes:
        monkeypatch.setattr(head, "PIECE", sizes[0])
        monkeypatch.setattr(head, "ROWS", sizes[1])
    source = family(name, torch.float32) if name != "granite" else make_model(
        tmp_path / "source", transformers.GraniteConfig(**SMALL, **IDS, logits_scaling=3.0), torch.float32
    )  # fmt: skip
    other = disturbed(source, tmp_path / name)
    one, two = open_model(str(source)), open_model(str(other))
    base, new = evaluate.compare(one.state, two.state, tokens)
    theirs, ours = logits(source, tokens), logits(other, tokens)
    perplexity, kl, agreement = plain(theirs, ours, tokens.ids)
    assert new.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert new.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert new.agreement == pytest.approx(agreement, abs=1e-9)
    assert kl > 0
    assert base is not None
    assert base.perplexity == pytest.approx(plain(theirs, theirs, tokens.ids)[0], rel=1e-4)
    assert (new.tokens, new.length) == (3 * 23, 24)


def test_a_model_is_no_distance_from_itself(family: Any, tokens: Tokens):
    model = open_model(str(family("llama")))
    base, new = evaluate.compare(model.state, model.state, tokens)
    assert base is not None
    assert new.perplexity == base.perplexity
    assert (new.kl, new.agreement) == (0.0, 1.0)


def test_without_an_original_there_is_no_distance(family: Any, tokens: Tokens):
    model = open_model(str(family("llama")))
    base, new = evaluate.compare(None, model.state, tokens)
    assert base is None
    assert (new.kl, new.agreement) == (None, None)
    assert new.perplexity is not None


def test_batches_do_not_change_the_figures(family: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch):
    model = open_model(str(family("llama", torch.float32)))
    _, whole = evaluate.compare(None, model.state, tokens)
    monkeypatch.setattr(Tokens, "batches", lambda self: list(self.ids.split(1)))
    _, single = evaluate.compare(None, model.state, tokens)
    assert single.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_an_encoder_has_distances_but_no_perplexity(family: Any, tokens: Tokens, tmp_path: Path):
    source = family("roberta", torch.float32)
    other = disturbed(source, tmp_path / "roberta")
    one, two = open_model(str(source)), open_model(str(other))
    base, new = evaluate.compare(one.state, two.state, tokens)
    assert base is not None
    assert base.perplexity is new.perplexity is None
    p, q = (logits(folder, tokens).log_softmax(-1) for folder in (source, other))
    assert new.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert new.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-9)
    assert new.tokens == 3 * 24


def test_a_perplexity_beyond_all_numbers_stays_a_number():
    """exp(700) is near the largest float; what is worse is cut there."""
    found = evaluate.Compared(2, torch.tensor([1, 1]))
    found.add(0, None, torch.tensor([[0.0, -2000.0]] * 2))
    assert evaluate.scores([found], 3) == evaluate.Scores(math.exp(700), None, None, 2, 3)


def test_sizes_count_scales_and_everything_else(family: Any):
    model = open_model(str(family("llama")))
    sizes = evaluate.sizes(model.state, model.checkpoint.nbytes)
    assert (sizes.tensor_bytes, sizes.linear_bits, sizes.file_bits) == (model.checkpoint.nbytes, 16.0, 16.0)


# --- compress eval ----------------------------------------------------------------------------------------------------


def figures(project: Project, *arguments: str | Path) -> dict[str, Any]:
    result = project("eval", *arguments, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_eval_of_a_run_an_artifact_and_a_model(project: Project):
    assert project.run().code == 0
    noted = json.loads((project.out / "evaluation.json").read_text())
    run = figures(project, project.out)
    assert run == figures(project, project.artifact)
    assert {k: run[k] for k in noted["compressed"]} == pytest.approx(noted["compressed"], rel=1e-6)
    model = figures(project, project.model, "--text", project.text, "--sequences", "4", "--length", "32")
    assert model["perplexity"] == pytest.approx(noted["original"]["perplexity"], rel=1e-6)
    assert model["kl"] is None
    windows = ["--text", project.text, "--sequences", "4", "--length", "32"]
    against = figures(project, project.artifact, *windows, "--against", project.model)
    assert against["kl"] == pytest.approx(run["kl"], rel=1e-6)
    layout = sum(p.stat().st_size for p in project.artifact.glob("*.safetensors"))
    assert 0 < layout - run["tensor_bytes"] < 8000  # all but the header
    assert run["linear_bits"] < 5 < run["file_bits"] < 16 == model["linear_bits"]


@pytest.mark.slow
def test_eval_says_what_it_measured_on(project: Project):
    result = project("eval", project.model, "--text", project.text, "--sequences", "2", "--length", "16")
    assert f"30 tokens of {project.text}, context 16; through transformers' modules, streamed" in result.out
    assert "perplexity" in result.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{model}"], "{model}: names no evaluation text; give one with --text FILE"),
        (["{base}/none"], "{base}/none: no such folder"),
        (["{base}/recipe.yaml"], "{base}/recipe.yaml: is a file, not a folder"),
        (["{model}", "--text", "{base}/none"], "{base}/none: No such file or directory"),
        (["{model}", "--text", "{text}", "--length", "1"], "argument --length: needs a whole number from 2 on, not '1'   "
         "(see compress eval --help)"),
        (["{model}", "--text", "{text}", "--sequences", "x"], "argument --sequences: needs a whole number from 1 on, not 'x'   "
         "(see compress eval --help)"),
        (["{model}", "--text", "{text}", "--length", "16", "--device", "cuda:9"], "--device cuda:9: "),
        (["{model}", "--text", "{text}", "--length", "16", "--against", "{base}/none"], "model '{base}/none': no folder "
         "{base}/none, and no hub id either (owner/name or owner/name@revision)"),
        (["{model}", "--tasks", "piqa"], "--tasks needs lm-eval:  pip install lm-eval"),
    ],
)  # fmt: skip
def test_eval_of_what_cannot_be_measured(project: Project, arguments: list[str], expected: str):
    names = {"model": project.model, "base": project.folder, "text": project.text}
    line = project("eval", *(a.format(**names) for a in arguments)).line
    assert line.startswith(expected.format(**names))


def test_eval_against_a_model_of_another_vocabulary(project: Project, tmp_path: Path):
    config = transformers.AutoConfig.from_pretrained(project.model)
    config.vocab_size = 300
    other = make_model(tmp_path / "other", config)
    line = project("eval", project.model, "--text", project.text, "--length", "16", "--against", other).line
    assert line == f"{other}: has another vocabulary than {project.model}; KL needs the model it was made from"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [rare('{"quantization_config": 3}'), '{"quantization_config": {"quant_method": "compressed-tensors"}}']
)
def test_eval_of_an_artifact_whose_config_is_damaged(project: Project, config: str):
    assert project.run("quantize.method=rtn").code == 0
    (project.artifact / "config.json").write_text(config)
    assert "config.json" in project("eval", project.out).line


@pytest.mark.slow
def test_eval_of_an_artifact_whose_config_tells_another_group(project: Project):
    assert project.run("quantize.method=rtn").code == 0
    path = project.artifact / "config.json"
    path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 64'))
    (project.artifact / "compress.json").unlink()  # whose hash would notice first
    assert re.search(
        r"weight_scale' is bfloat16 \[\d+, 2\], int4:g64 needs bfloat16 \[\d+, 1\]; config and weights",
        project("eval", project.out).line,
    )


@pytest.mark.slow
def test_eval_of_an_artifact_whose_scales_are_no_numbers(project: Project):
    assert project.run("quantize.method=rtn").code == 0
    path = project.artifact / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("down_proj.weight_scale"))
    tensors[name][0] = float("nan")
    save_file(tensors, path)
    (project.artifact / "compress.json").unlink()  # whose hash would notice first
    assert "not finite: a weight or a scale is NaN" in project("eval", project.out).line


def test_eval_of_a_run_without_artifact(project: Project):
    assert project.run("export=[]").code == 0
    assert project("eval", project.out).line == f"{project.out}: this run has no artifact yet; run its recipe to the end"


def test_tasks_are_handed_to_lm_eval(project: Project, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    class Done:
        """A process that ended."""

        returncode = 0

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("subprocess.run", lambda arguments, **_: asked.append(arguments) or Done)
    assert project("eval", project.model, "--tasks", "piqa,arc_easy").code == 0
    assert "compress.export.runtime" in asked[0][2]  # so that native artifacts load
    assert asked[0][3:] == ["--model", "hf", "--model_args", f"pretrained={project.model}",
                            "--tasks", "piqa,arc_easy", "--device", "cpu"]  # fmt: skip
    Done.returncode = 3
    assert project("eval", project.model, "--tasks", "piqa").line == "lm-eval ended with exit code 3"


# --- what is measured is what the run made -----------------------------------------------------------------------------


@pytest.mark.slow
def test_eval_of_a_run_measures_what_it_exported_last(project: Project) -> None:
    assert project.run("quantize.format=int2:g32").code == 0
    project.edit("  - compressed_tensors: {}", "  - native: {}")
    assert project.run("quantize.format=int8:g32").code == 0
    found = json.loads(project("eval", project.out, "--json").out)
    assert found["linear_bits"] > 8
    project.edit("passes:\n", "passes:\n  - smooth: {strength: 0.5}\n")
    assert project("run", project.recipe, "--until", "smooth").code == 0
    assert "this run has no artifact yet" in project("eval", project.out).line


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_model_in_the_place_of_the_original_is_noticed(project: Project, what: str) -> None:
    assert project.run().code == 0
    config, weights = project.model / "config.json", project.model / "model.safetensors"
    if what == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    else:
        data = bytearray(weights.read_bytes())
        data[-10] ^= 1
        weights.write_bytes(data)
    assert "is no longer the model that" in project("eval", project.artifact).line
    assert project("eval", project.artifact, "--against", project.model).code == 0


@pytest.mark.slow
def test_what_goes_along_is_renewed(project: Project) -> None:
    assert project.run().code == 0
    (project.model / "chat_template.jinja").write_text("{{ messages }}")
    assert project.run().code == 0
    assert (project.artifact / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_single_file_beside_shards_is_ambiguous(project: Project) -> None:
    index = {"weight_map": {"model.norm.weight": "other.safetensors"}}
    (project.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "engines differ in which they read" in project.plan().line
