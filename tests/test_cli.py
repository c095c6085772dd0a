"""The command line: its verbs, its exit codes, and what a person sees while a run works."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from compress.cli import main
from compress.export.table import EXPORTERS
from compress.passes import PASSES
from compress.report.console import Console
from tests.conftest import ROOT, Project, Result
from tests.nursery import COMMAND, Nursery

LAYERS = 2  # of a project


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line without a project."""

    def call(*arguments: str) -> Result:
        try:
            code = main(arguments)
        except SystemExit as e:
            code = int(e.code or 0)
        return Result(code, *capsys.readouterr())

    return call


VERBS = ("plan", "run", "eval", "bench", "inspect", "passes")

# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: VERB   (see compress --help)"),
        (["rnu"], "argument VERB: invalid choice: 'rnu' (choose from plan, run, eval, bench, inspect, passes)   "
         "(see compress --help)"),
        (["run"], "the following arguments are required: recipe   (see compress run --help)"),
        (["run", "a.yaml", "--sett", "x"], "unrecognized arguments: --sett x   (see compress --help)"),
        (["eval", "a", "--length", "2.5"], "argument --length: needs a whole number from 2 on, not '2.5'   "
         "(see compress eval --help)"),
        (["run", "none.yaml"], "none.yaml: No such file or directory"),
        (["passes", "quantise"], "no pass 'quantise'; did you mean 'quantize'?   known: edit, depth, prune, "
         "rotate, smooth, allocate, factorize, quantize, lqlora, distill, sparsify, importance, kv_cache, kv_policy, "
         "context_merge, compressed_tensors, gptq, gguf, native, onnx"),
        (["inspect", "none"], "none: no such folder"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_arguments_is_one_line(cli: Any, arguments: list[str], expected: str):
    quoted = ", ".join(map(repr, VERBS))  # as Python 3.11 writes them
    assert cli(*arguments).line.replace(quoted, ", ".join(VERBS)) == expected


def test_help_names_every_verb(cli: Any):
    result = cli("--help")
    assert result.code == 0
    for verb in VERBS:
        assert re.search(rf"^    {verb} ", result.out, re.M)
        assert cli(verb, "--help").code == 0


def test_help_does_not_wait_for_torch():
    code = "import sys; from compress.cli import parser; parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "compress", "--help"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout[:15]) == (0, b"usage: compress")


def test_a_reader_may_go_away(nursery: Nursery):
    """`compress passes --schema | head -c 1`: no traceback, no complaint."""
    (reading, out), (err, writing) = os.pipe(), os.pipe()
    os.close(reading)
    pid = nursery.start(COMMAND, "passes", "--schema", files=(0, out, writing), cwd=ROOT)
    os.close(out)
    os.close(writing)
    with open(err) as said:
        assert said.read() == ""
    assert nursery.wait(pid)[0] == 0


def test_a_terminal_that_knows_no_blocks_and_arrows(project: Project, monkeypatch: pytest.MonkeyPatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", str(project.model), "layers.0.mlp.up"]) == 0
    assert b"???" in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_only_a_run_promises_to_go_on(project: Project, monkeypatch: pytest.MonkeyPatch):
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.prepare", pressed)
    assert project.plan() == Result(130, "", "\ncompress: interrupted\n")
    assert project.run().err.endswith("compress: interrupted; the same command goes on from the last finished block\n")


def test_a_disk_error_that_nobody_expected_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error", "/some/file")

    monkeypatch.setattr("compress.commands.opened", broken)
    assert project("inspect", project.model).line == "/some/file: Input/output error"


def test_a_message_is_one_line_whatever_it_quotes(project: Project):
    assert "\n" not in project.plan('quantize.format="int4\\n:g32"').line


# --- passes -----------------------------------------------------------------------------------------------------------


def test_passes_lists_every_pass_and_exporter(cli: Any):
    lines = cli("passes").out.splitlines()
    assert [line.split()[:2] for line in lines] == [[n, "pass"] for n in PASSES] + [[n, "exporter"] for n in EXPORTERS]
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", [*PASSES, *EXPORTERS])
def test_passes_tells_the_options_of_one(cli: Any, name: str):
    text = cli("passes", name).out
    for option, field in {**PASSES, **EXPORTERS}[name].model_fields.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{option} ")]
        assert field.description in line
    assert "Optional" not in text
    assert "Annotated" not in text


def test_the_types_of_options_are_in_words(cli: Any):
    text = cli("passes", "quantize").out
    assert re.search(r"^method +gptq \| rtn ", text, re.M)
    assert re.search(r"^format +format +int4:g128 ", text, re.M)
    assert re.search(r"^drift +number +0.5 ", text, re.M)
    assert re.search(r"^pins +mapping ", text, re.M)


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(project: Project) -> Project:
    assert project.run("quantize.method=rtn").code == 0
    return project


def test_inspect_of_a_run_an_artifact_and_a_model(ran: Project):
    of_run = json.loads(ran("inspect", ran.out, "--json").out)
    assert of_run == json.loads(ran("inspect", ran.artifact, "--json").out)
    of_model = json.loads(ran("inspect", ran.model, "--json").out)
    assert [s["site"] for s in of_run["sites"]] == [s["site"] for s in of_model["sites"]]
    formats = {s["site"]: s["format"] for s in of_run["sites"]}
    assert formats["embed"] == "as it is"
    assert formats["lm_head"] == "int8:g32"
    assert formats["layers.1.mlp.down"] == "int4:g32"
    assert {s["format"] for s in of_model["sites"]} == {"as it is"}
    others = sum(64 * 2 for _ in range(5))  # norms
    assert sum(s["bytes"] for s in of_run["sites"]) + others == of_run["tensor_bytes"]


def test_inspect_counts_a_tied_matrix_once(project: Project, family: Any):
    table = json.loads(project("inspect", family("qwen2"), "--json").out)
    others = table["tensor_bytes"] - sum(s["bytes"] for s in table["sites"])
    assert next(s["bytes"] for s in table["sites"] if s["site"] == "lm_head") == 0
    assert 0 < others < 2000


def test_inspect_of_one_site_draws_its_weights(project: Project):
    text = project("inspect", project.model, "layers.0.mlp.up").out
    assert "layers.0.mlp.up: mean " in text
    bars = [line for line in text.splitlines() if re.match(r"[+-]0\.\d{4}  ", line)]
    assert len(bars) == 21
    assert sum(int(b.split()[-1].replace(",", "")) for b in bars) == 128 * 64
    assert "█" * 50 in text


def test_inspect_of_a_pattern_shows_what_it_matches(project: Project):
    text = project("inspect", project.model, "layers.*.attn.[qk]").out
    assert len(re.findall(r"^layers\.\d\.attn\.[qk] ", text, re.M)) == 4
    assert "mean" not in text
    assert "model.layers.0.self_attn" not in text
    assert "layers.1.attn.q" in project("inspect", project.model, "model.layers.1.self_attn.q_proj").out
    line = project("inspect", project.model, "layers.*.attn.qq").line
    assert line.startswith("pattern 'layers.*.attn.qq' matched no site.  Nearest: 'layers.*.attn.q' (2 sites)")


def test_inspect_of_a_long_model_is_one_screen(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("compress.commands.SHOWN_SITES", 5)
    text = project("inspect", project.model).out
    assert "… 11 more; name a site or a pattern to see it" in text
    assert text.rstrip().endswith("llama, 2 blocks, 16 sites, 212.62 KiB of tensors")


def test_inspect_of_what_holds_no_weights(project: Project):
    (project.model / "model.safetensors").unlink()
    assert "needs model.safetensors" in project("inspect", project.model).line
    assert project("inspect", project.folder).line.startswith(f"{project.folder}: no config.json")


# --- run --------------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_one_screen(ran: Project):
    text = ran.run("quantize.method=rtn").out
    assert "bits per weight, linear layers" in text
    assert text.rstrip().endswith(f"report: {ran.out / 'report.html'}")
    assert (ran.out / "report.html").exists()


# --- the console ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as they stand after carriage returns and erasures."""
        lines = [""]
        for part in re.split(r"(\n|\r\x1b\[K)", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part.startswith("\r"):
                lines[-1] = ""
            else:
                lines[-1] += part
        return lines


RECORD = {"site": "layers.0.attn.q", "format": "int4:g64", "error": 1e-3, "rounding": 4e-3, "damping": 0.01, "seconds": 0.5,
          "notes": ["seen"]}  # fmt: skip


def test_a_terminal_shows_progress_in_its_last_line(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 0.0, 10.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    terminal = Terminal()
    console = Console(stream=terminal)
    console.step(1, 2, "quantize", False, None)
    console.progress(2, 6, "block")
    assert terminal.screen() == ["step 1 of 2: quantize", "  block: 2 of 6"]
    console.progress(3, 6, "block")  # 10 s for one, three are left; what was there before does not count
    assert terminal.screen()[-1] == "  block: 3 of 6, about 30 s left"
    console.say(RECORD)
    assert terminal.screen()[-2].startswith("layers.0.attn.q          int4:g64       error 1.00e-03  rounding 4.00e-03 ( 25%)")
    assert terminal.screen()[-2].endswith("0.50 s  [seen]")
    assert terminal.screen()[-1] == "  block: 3 of 6, about 30 s left"
    console.close()
    assert terminal.screen()[-1] == ""


def test_a_pipe_gets_plain_lines():
    pipe = io.StringIO()
    console = Console(stream=pipe)
    console.step(1, 1, "quantize", True, "step 1 differs")
    console.progress(1, 2, "block")
    console.close()
    assert pipe.getvalue() == "step 1 differs\nstep 1 of 1: quantize  (finished before)\n"


def test_a_quiet_console_says_nothing():
    terminal = Terminal()
    console = Console(quiet=True, stream=terminal)
    console.step(1, 1, "quantize", True, "step 1 differs")
    console.say(RECORD)
    console.progress(1, 2, "block")
    console.close()
    assert terminal.getvalue() == ""
