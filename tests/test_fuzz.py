"""Whatever a user's files hold: a command ends well, or with one line and exit code 2. Files are spoilt by drawing.

Each kind of file is spoilt as bytes and as a structure: a value anywhere in it replaced by one of a list of nasty ones. A small
sample is drawn in every run of the tests, always the same one; `-m slow` draws for minutes, another sample each time.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.cli import main
from compress.model import speed
from tests.conftest import Project, covered

Draw = Callable[[Any], Any]
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-308, float("nan"),
    float("inf"), "", "x", "x" * 5000, "\ud800", "\x1b[31m\n", "a\0b", "~nosuchuser/x", "**", "[", "../..", "/dev/null",
    "/dev/zero", "é\u2028", "1e999", "0x10", "int4:g32", "int99999:g32", "bf16", [], {}, [None], [[]], ["x"], {"a": 1},
    {"": {}}, [0] * 500, {"x": [1, {"y": "z"}]},
]  # fmt: skip
SNIPPETS = [
    "!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!binary 'AGE='", "!!set {a, b}", "!!omap [a: 1]",
    "!!python/name:os.x y", "&a [*a]", "*a", "<<", "? [a]", "1:00:00", "0x" + "f" * 90, "1" * 120, "2001-99-99", ".inf", ".nan",
    "-.inf", "0o7", "~", "|\n  x", "%Y", '"\\ud83d"', '"\\U00FFFFFF"', "\t", "\0", "\ufeff", "\x85", "---", "...",
    "[" * 60, "{" * 60, "- " * 60, "'", '"', "#", "@", "`",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file: where it lies, how it is read and written as a structure, and the commands that read it."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    yaml: bool = False
    lost: tuple[str, ...] = ()  # what is removed first, so that the file is read again

    def load(self, data: bytes) -> Any:
        return yaml.safe_load(data) if self.yaml else json.loads(data)

    def dump(self, value: Any) -> bytes:
        text = yaml.safe_dump(value, sort_keys=False) if self.yaml else json.dumps(value)
        return text.encode("utf-8", "surrogatepass")


PLAN, RUN, EVAL = ("plan", "recipe.yaml"), ("run", "recipe.yaml"), ("eval", "out")
ERRORS, INSPECT = ("inspect", "out", "--errors"), ("inspect", "model")
KINDS = {
    "recipe": Kind("recipe.yaml", (PLAN,), yaml=True),
    "config": Kind("model/config.json", (PLAN, INSPECT, RUN), lost=("out",)),
    "tokenizer": Kind("model/tokenizer.json", (PLAN,), lost=("out",)),
    "tokenizer config": Kind("model/tokenizer_config.json", (PLAN,), lost=("out",)),
    "generation config": Kind("model/generation_config.json", (RUN,), lost=("out",)),
    "record": Kind("out/steps/01-*/record.json", (RUN,)),
    "record, to export": Kind("out/steps/01-*/record.json", (RUN,), lost=("out/native",)),
    "evaluation": Kind("out/evaluation.json", (RUN,)),
    "run.json": Kind("out/run.json", (RUN, EVAL)),
    "resolved": Kind("out/recipe.resolved.yaml", (EVAL, ("inspect", "out")), yaml=True),
    "plan.yaml": Kind("out/plan.yaml", (ERRORS, RUN), yaml=True),
}


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "matrix_speed", lambda dtype: 1e10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, family: Any, text: Path) -> Path:
    """A folder in which a recipe has been run; a copy of it lies in `kept` beside."""
    folder = tmp_path_factory.mktemp("fuzz") / "project"
    folder.mkdir()
    recipe = Project.make(folder, family("llama", blocks=1), text)
    said = recipe.read_text("utf-8").replace("compressed_tensors", "native").replace("int4:g32", "int4:g32\n      method: rtn", 1)
    recipe.write_text(said.replace('"int4:g32\n      method: rtn"', '"int4:g32"\n      method: rtn'), "utf-8")
    assert command(folder, RUN) == 0
    shutil.copytree(folder, folder.with_name("kept"), symlinks=True)
    return folder


def command(folder: Path, words: tuple[str, ...]) -> int:
    """Run a command in this process; it ends well, or with one line."""
    out, err = io.StringIO(), io.StringIO()
    files = ("recipe.yaml", "out", "model")
    arguments = [str(folder / w) if w in files else w for w in words]
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(arguments)
    said = err.getvalue()
    assert code in (0, 2), said
    if code == 2:
        lines = [line for line in said.splitlines() if line.startswith("compress: ")]
        assert len(lines) == 1, said
        assert said.endswith("\n"), said
        assert len(said) < 3000, said
    return code


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a structure."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from spots(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The structure with another value at a place; without it where that is `...`."""
    if not path:
        return None if new is ... else new
    copy = value.copy()
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def spoilt(kind: Kind, data: bytes, draw: Draw) -> bytes:
    """The file with something wrong in it."""
    how = draw(st.sampled_from(("structure", "structure", "structure", "bytes", "snippet")))
    if how == "structure":
        value = kind.load(data)
        path = draw(st.sampled_from(sorted(spots(value), key=lambda p: (len(p), str(p)))[:400]))
        return kind.dump(replaced(value, path, draw(st.sampled_from([*NASTY, ...]))))
    at = draw(st.integers(0, min(len(data), 4000)))
    if how == "bytes":
        return data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 8)) :]
    snippet = draw(st.sampled_from(SNIPPETS)).encode("utf-8", "surrogatepass")
    words = data.split(b" ")
    words[draw(st.integers(0, min(len(words), 400) - 1))] = snippet
    return b" ".join(words)


def restore(folder: Path) -> None:
    """The project as it was after its run."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder, symlinks=True)


def try_one(folder: Path, kind: Kind, draw: Draw) -> None:
    restore(folder)
    words = draw(st.sampled_from(kind.commands))
    (path,) = folder.glob(kind.name)
    path.write_bytes(spoilt(kind, path.read_bytes(), draw))
    for name in kind.lost:
        shutil.rmtree(folder / name)
    command(folder, words)


QUICK = settings(max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", covered(KINDS, "recipe", "config", "record", "plan.yaml"))
def test_a_few_spoilt_files(place: Path, name: str):
    QUICK(given(st.data())(lambda data: try_one(place, KINDS[name], data.draw)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_spoilt_files(place: Path, name: str):
    LONG(given(st.data())(lambda data: try_one(place, KINDS[name], data.draw)))()
