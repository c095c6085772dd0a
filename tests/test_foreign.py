"""Text that somebody else wrote: JSON, YAML, names, configs, run folders, locales, terminals. One line, whatever comes."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.cli import main
from compress.documents import json_mapping, local_path, one_line, parse_json, read_text
from compress.errors import FormatError, ModelError, RecipeError
from compress.nodes import MOST_NODES, load_yaml
from compress.run import read_part
from compress.state.plan import Budget
from tests.conftest import ROOT, Project, rare
from tests.nursery import COMMAND, Nursery
from tests.test_surface import SOURCES

# --- JSON and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"{", "is no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); mend it"),
        (b"[" * 200_000, "is no JSON (nested without end); mend it"),
        (b'{"a": ' * 200_000, "is no JSON (nested without end); mend it"),
        (b"\xff{}", "is no UTF-8 text (invalid start byte at byte 0)"),
        (b"[]", "holds a list where a mapping is needed; mend it"),
        (b"3", "holds a number where a mapping is needed; mend it"),
        (b"1" * 5000, "is no JSON (Exceeds the limit"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "has more than 1,000 bytes; that is no file of its kind"),
    ],
)
def test_a_file_that_is_no_json_mapping(tmp_path: Path, data: bytes, expected: str):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    most = 1000 if b"xxx" in data else 10_000_000
    with pytest.raises(ModelError) as caught:
        json_mapping(path, ModelError, "mend it", most)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "is no regular file"), (".", "Is a directory"), ("none", "No such file or directory")):
        with pytest.raises(RecipeError) as caught:
            read_text(tmp_path / name, 10, RecipeError)
        assert str(caught.value) == f"{tmp_path / name}: {said}"


def test_one_line_is_one_line():
    assert one_line("a\nb\x1b[31m\u2028c\x85d\0") == "a b [31m c d "
    assert len(one_line("x" * 900)) == 200
    assert parse_json(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize("name", ["a\0b", "~nosuchuser/x", "\ud800", "x" * 300, "x/" * 3000])
def test_what_cannot_be_the_name_of_a_file(name: str):
    with pytest.raises(ValueError, match=r"."):
        local_path(name)


def test_names_of_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert local_path("~/é x") == Path("/home/somebody/é x")


# --- YAML -------------------------------------------------------------------------------------------------------------

VALUES = [
    "!!bool foo", "!!int ''", "!!float ''", "!!int x", "!!float x", "!!timestamp foo", "!!timestamp ''", "!!binary AGE=",
    "!!binary ***", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!map [a]", "!!seq {a: 1}", "!!str [a]",
    "!!python/object/apply:os.system [ls]", "!local x", "!<x> y", "1" + ":00" * 300, "1" + ":00" * 300 + ".5",
    "0x" + "f" * 5000, "9" * 5000, "2001-99-99", "2001-12-14T25:00:00Z", '"\\ud800"', '"\\U00FFFFFF"', '"a\\0b"', "*unknown",
    "&a [*a]", "&a {b: *a}", "[" * 100, "{a: " * 100, "? [a]", "<<: {a: 1}", "{a: 1, a: 2}", "'", '"', "@", "`", "a: b", "\t- a",
    "%TAG", "\x01", "\ud800", "|9\n  x",
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_a_value_of_yaml_that_cannot_be_is_one_located_line(tmp_path: Path, value: str):
    path = tmp_path / "a.yaml"
    path.write_bytes(f"a: 1\nb: {value}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}:"), caught.value
    assert str(caught.value).removeprefix(f"{path}:")[0] in "23"  # the line
    assert "\n" not in str(caught.value)


def test_a_value_of_yaml_that_can_be(tmp_path: Path):
    path = tmp_path / "a.yaml"
    text = '\ufeffa: [1, 0x10, 1.5, .inf, true, ~, x, 2001-02-03]\nb: &t {c: d}\ne: [*t, *t]\nf: "\\ud83d\\ude00"\n'
    path.write_text(text, encoding="utf-8")
    found = load_yaml(path)
    assert found["a"][:7] == [1, 16, 1.5, float("inf"), True, None, "x"]
    assert found["e"] == [{"c": "d"}] * 2
    assert found["f"] == "😀"


def bomb(levels: int, wide: int) -> str:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * wide)}]" for i in range(1, levels)]
    return "\n".join(lines)


def test_aliases_of_aliases_are_counted_before_anything_is_built(tmp_path: Path):
    path = tmp_path / "a.yaml"
    began = time.process_time()
    for levels, wide in ((12, 9), (40, 2), (3, 1000)):
        path.write_text(bomb(levels, wide))
        with pytest.raises(RecipeError, match=f"holds more than {MOST_NODES:,} values, aliases expanded"):
            load_yaml(path)
    path.write_text(bomb(4, 9))
    assert load_yaml(path)
    assert time.process_time() - began < 30


def test_a_yaml_without_end_is_refused_by_its_size(tmp_path: Path):
    for name in (tmp_path / "a.yaml", Path("/dev/zero")):
        if name.parent == tmp_path:
            with name.open("wb") as file:
                file.truncate(1 << 40)
        with pytest.raises(RecipeError, match=r"has more than 4,000,000 bytes|is no regular file"):
            load_yaml(name)


@pytest.mark.parametrize(
    "text", ["9" * 400 + " bits", "99999999999999 GiB", "9" * 400 + " B", "1e9 bits", "٣ bits", "9" * 99 + " %"]
)
def test_a_budget_beyond_all_models(text: str):
    with pytest.raises(FormatError) as caught:
        Budget.parse(text)
    assert len(str(caught.value)) < 600


def test_flags_and_overrides(project: Project, capsys: pytest.CaptureFixture[str]):
    wrong = [["run", project.recipe, "--until", "²"], ["run", project.recipe, "--until", "9" * 5000],
             ["run", project.recipe, "--device", "hpu"], ["plan", project.recipe, "--set", "data" + ".x" * 9000 + "=1"],
             ["plan", project.recipe, "--set", "seed=!!bool x"], ["plan", project.recipe, "--set", "out=\udcff"],
             ["plan", project.recipe, "--out", "\udcff"], ["plan", project.folder / "\udcff"], ["plan", "x" * 5000],
             ["eval", project.model, "--text", project.folder, "--length", "8"], ["eval", project.model, "--length", "0"],
             ["eval", project.model, "--text", project.text, "--length", "9" * 12],
             ["eval", project.model, "--length", "9" * 5000],
             ["eval", project.model, "--length", "٣٣", "--text", "/dev/zero"], ["inspect", project.model, "[" * 500],
             ["eval", project.model, "--text", project.text, "--against", "~nosuchuser/x"], ["inspect", "x" * 5000],
             ["bench", project.model, "--against", "a\x1b[2J"]]  # fmt: skip
    for words in wrong:
        line = project(*words).line
        assert len(line) < 2200, words
        assert line.isprintable(), words


# --- run folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, family: Any, text: Path) -> Path:
    """A folder in which the test recipe has been run, by rounding."""
    folder = tmp_path_factory.mktemp("foreign") / "project"
    folder.mkdir()
    recipe = Project.make(folder, family("llama", blocks=1), text)
    recipe.write_text(recipe.read_text().replace("- quantize:", "- quantize:\n      method: rtn"))
    assert main(["run", str(recipe)]) == 0
    return folder


@pytest.fixture
def finished(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Project:
    shutil.copytree(kept, tmp_path / "project")
    project = Project(tmp_path / "project", capsys)
    project.recipe.write_text(project.recipe.read_text().replace(str(kept), str(project.folder)))
    return project


Damage = Callable[[Any], Any]
DAMAGES: list[Damage] = [
    lambda d: "{",
    lambda d: [],
    lambda d: None,
    lambda d: {},
    lambda d: "[" * 100_000,
    lambda d: d | {"x": {}},
]


def written(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


EVALUATION = [*DAMAGES[:-1], lambda d: {k: v for k, v in d.items() if k != "original"}, lambda d: d | {"compressed": {"kl": "x"}},
              *(lambda d, n=n: d | {"compressed": d["compressed"] | {n: None}} for n in ("kl", "agreement", "perplexity")),
              lambda d: d | {"original": 3}, lambda d: d | {"text": None}]  # fmt: skip


@pytest.mark.slow
def test_damaged_figures_are_measured_again(finished: Project):
    path = finished.out / "evaluation.json"
    good = json.loads(path.read_text())
    for damage in EVALUATION:
        written(path, damage(good))
        assert finished.run().code == 0
        assert json.loads(path.read_text()) == good


RECORD = [*DAMAGES[:-1], lambda d: d | {"seconds": "x"}, lambda d: d | {"peak_bytes": None}, lambda d: d | {"plan": {}},
          lambda d: d | {"plan": {"formats": {"a": "int99"}}}, lambda d: d | {"plan": {"formats": {}, "forecast": {"metric": 3}}},
          lambda d: d | {"sites": [{"site": s["site"], "format": 3} for s in d["sites"]]}, lambda d: d | {"sites": {}},
          lambda d: d | {"sites": [s | {"error": "x"} for s in d["sites"]]}, lambda d: d | {"made_of": 3}]  # fmt: skip


@pytest.mark.slow
def test_a_damaged_record_names_the_folder_to_delete(finished: Project):
    (path,) = finished.out.glob("steps/01-*/record.json")
    good = json.loads(path.read_text())
    for damage in RECORD:
        written(path, damage(good))
        line = finished.run().line
        assert line == f"{path.parent}: its files are damaged or missing; delete this folder and run again"


@pytest.mark.parametrize("data", ["{", "[]", "3", "model: [", "a: &a [*a]", rare("[" * 9000), "\0"])
def test_a_damaged_resolved_recipe_names_itself(finished: Project, data: str):
    path = finished.out / "recipe.resolved.yaml"
    path.write_text(data)
    line = finished("eval", finished.out).line
    assert line.startswith(str(path))
    assert line.endswith("the run folder is damaged, run its recipe again, which writes this file anew")


@pytest.mark.parametrize("table", ["'**'", "'*'", "'[a-'", "'../../x'", "3", "[a]", "''", "~", "a/b"])
def test_a_table_is_a_name_and_no_pattern(finished: Project, table: str):
    (finished.out / "plan.yaml").write_text(f"table: {table}\n")
    assert finished("inspect", finished.out, "--errors").line.startswith(f"{finished.out}: holds no error table")


@pytest.mark.parametrize("data", ["table: [", "- a", "\xff", rare("[" * 9000)])
def test_a_damaged_plan_is_one_line(finished: Project, data: str):
    (finished.out / "plan.yaml").write_text(data)
    assert str(finished.out) in finished("inspect", finished.out, "--errors").line


def test_a_table_of_another_shape_is_named(finished: Project):
    (part,) = finished.out.glob("steps/01-*/block-0000.safetensors")
    (finished.out / "analyses" / "tables-x").mkdir(parents=True)
    shutil.copyfile(part, finished.out / "analyses" / "tables-x" / "t.safetensors")
    (finished.out / "plan.yaml").write_text("table: t\n")
    line = finished("inspect", finished.out, "--errors").line
    assert line.endswith("t.safetensors: is no error table; delete this file and run again")
    assert read_part(part)[1]


# --- configs and indexes ----------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


BEYOND: list[dict[str, Any]] = [
    *({key: 10**7} for key in ("num_hidden_layers", "num_labels", "num_local_experts", "n_layer")), {"hidden_size": 10**7},
    {"head_dim": 10**10}, {"intermediate_size": 10**18}, {"extra": deep(300)}, {"rms_norm_eps": float("nan")},
    {"text_config": {"num_hidden_layers": 10**6}}, {"architectures": "x"}, {"architectures": 5}, {"architectures": {"a": 1}},
    {"architectures": [3]}, {"architectures": ["__version__"]}, {"architectures": ["pipeline"]}, {"architectures": ["Trainer"]},
    {"model_type": ["llama"]}, {"model_type": None}, {"rope_parameters": [1]}, {"quantization_config": "x"},
    {"quantization_config": {"quant_method": ["x"]}}, {"num_attention_heads": 0}, {"hidden_size": -64}, {"hidden_act": 5},
]  # fmt: skip


@pytest.mark.slow
def test_whatever_a_config_says_is_one_line_that_names_it(project: Project):
    path = project.model / "config.json"
    good = json.loads(path.read_text())
    for change in BEYOND:
        path.write_text(json.dumps(good | change))
        for words in (["plan", project.recipe], ["inspect", project.model]):
            result = project(*words)
            assert result.code == 2, change
            assert str(project.model) in result.line, (change, result.line)
            assert result.line.isprintable(), change
    for text in ("[" * 200_000, '{"a":' * 200_000, "", "3", '{"a": ' + "9" * 5000 + "}"):
        path.write_text(text)
        assert str(path) in project.plan().line


def test_tables_of_positions_take_no_memory_before_they_are_counted(project: Project, family: Any):
    shutil.rmtree(project.model)
    shutil.copytree(family("roberta"), project.model)
    path = project.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 10**11}))
    line = project("inspect", project.model).line
    assert "asks for tables of" in line
    assert str(path) in line


INDEXES = [
    "[" * 200_000,
    "[]",
    "3",
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": []}',
    '{"weight_map": {"a": [1]}}',
    "\0",
    '{"weight_map": {"a": "../b"}}',
    '{"weight_map": {"a": "pipe"}}',
    '{"weight_map": {"a": "' + 5000 * "x" + '"}}',
]


def test_whatever_an_index_says_is_one_line_that_names_it(project: Project):
    os.mkfifo(project.model / "pipe")
    for text in INDEXES:
        (project.model / "model.safetensors.index.json").write_text(text)
        line = project.plan().line
        assert str(project.model) in line, text[:40]
        assert len(line) < 2200


# --- locales and terminals --------------------------------------------------------------------------------------------


def encodings(path: Path) -> Iterator[str]:
    """Where a file is opened as text without saying that it is UTF-8."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        values = (*node.args, *(k.value for k in node.keywords))
        said = {a.value for a in values if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        opens = node.func.attr == "open" and ast.unparse(node.func.value) not in ("os", "self") and not {"rb", "wb", "ab"} & said
        if (opens or node.func.attr in ("read_text", "write_text")) and "utf-8" not in said:
            yield f"{path.name}:{node.lineno}"


@pytest.mark.slow
def test_every_text_file_is_utf_8_whatever_the_locale_is():
    assert [place for path in SOURCES for place in encodings(path)] == []


def compress(shell: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own, and what a shell does to it."""
    command = f'"{sys.executable}" -m compress {" ".join(map(str, words))} {shell}'
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["sh", "-c", command], cwd=ROOT, env=variables, capture_output=True, check=False)


@pytest.fixture
def latin(tmp_path: Path) -> dict[str, str]:
    """The environment of a locale that is not UTF-8, where one can be made."""
    making = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US.ISO-8859-1")]
    known = shutil.which("localedef") and subprocess.run(making, check=False, capture_output=True).returncode == 0
    return {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1"} if known else {}


@pytest.fixture
def undone(finished: Project) -> Iterator[Path]:
    """The recipe of a run that is to be made again; afterwards it is whole, its card with all its characters."""
    for made in (finished.artifact, finished.out / "steps"):
        shutil.rmtree(made)
    (finished.out / "report.html").unlink()
    yield finished.recipe
    assert "Δ" in (finished.artifact / "README.md").read_text("utf-8")
    assert (finished.out / "report.html").exists()


@pytest.mark.slow
def test_a_locale_that_is_not_utf_8_from_the_start_of_the_process(undone: Path, latin: dict[str, str]):
    done = compress("| head -c 1", "run", undone, PYTHONUTF8="0", **latin)
    assert done.stderr == b""


@pytest.mark.slow
def test_a_locale_that_is_not_utf_8_and_a_reader_that_goes_away(undone: Path, latin: dict[str, str], nursery: Nursery):
    """A run to its end, whose standard output knows no other characters; and nobody listens from its first line on."""
    as_there = "import locale, sys\nlocale.setlocale(locale.LC_ALL, '')\nsys.stdout.reconfigure(encoding='iso-8859-1')\n"
    (reading, out), (err, writing) = os.pipe(), os.pipe()
    os.close(reading)
    pid = nursery.start(as_there + COMMAND, "run", undone, files=(0, out, writing), cwd=ROOT, **latin)
    os.close(out)
    os.close(writing)
    with open(err) as said:
        assert said.read() == ""
    assert nursery.wait(pid)[0] == 0


@pytest.mark.slow
def test_closed_streams_are_no_mistake(nursery: Nursery):
    for closing, words in ((">&-", ["--help"]), ("2>&-", ["run", "--help"])):
        done = compress(closing, *words)
        assert done.returncode == 0
        assert done.stderr == b""
    closed = "import os, sys\nfor n in range(3): os.close(n)\nsys.stdin = sys.stdout = sys.stderr = None\n"  # as Python has it
    assert nursery.run(closed + COMMAND, "passes", cwd=ROOT).code == 0


class Broken(io.StringIO):
    """A stream that cannot be written to."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_output_that_cannot_be_written_is_told_when_the_work_is_done(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    assert main(["run", str(project.recipe), "--set", "quantize.method=rtn"]) == 2
    assert capsys.readouterr().err == "compress: standard output: No space left on device\n"
    assert (project.out / "report.html").exists()
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError()))
    assert main(["run", str(project.recipe), "--set", "quantize.method=rtn"]) == 0
    assert capsys.readouterr().err == ""
