"""What users and recipes rely on is frozen here: a change of it is a decision, made in this file as well.

Verbs, flags, option names and defaults, the names of the package; and the style that keeps the code small.
"""

from __future__ import annotations

import argparse
import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import compress
from compress.cli import parser
from compress.export.table import EXPORTERS
from compress.model.data import Calibration, Data, Generate, Lesson, Lessons, Prompts, Text, Windows
from compress.passes import PASSES
from compress.recipe import Document
from tests.conftest import ROOT

VERBS = {
    "plan": {"recipe": None, "--out": None, "--set": [], "--device": "cpu", "--no-measure": False},
    "run": {"recipe": None, "--out": None, "--set": [], "--until": None, "--device": "cpu"},
    "eval": {"what": None, "--text": None, "--sequences": 32, "--length": 512, "--against": None, "--device": "cpu",
             "--json": False, "--tasks": None},
    "bench": {"what": None, "--against": None, "--prompt": 128, "--new": 32, "--repeats": 5, "--table": None,
              "--batch": None, "--device": "cpu", "--json": False},
    "inspect": {"what": None, "site": None, "--errors": False, "--json": False},
    "passes": {"name": None, "--schema": False},
}  # fmt: skip

QUANTIZE = {"method": "gptq", "format": "int4:g128", "pins": {}, "damp": None, "order": "activation", "clip": "mse", "drift": 0.5,
            "steps": 150}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "allocate": {"budget": "4.0 bits", "formats": ["int2:g64", "int3:g64", "int4:g64", "int8:g64"], "ranks": [0],
                 "factors": "bf16", "pins": {}, "also": [], "beside": 0, "grown": {}, "limits": {}, "engine": None,
                 "together": "engine", "structure": None, "shapes": "uniform", "constraints": {}, "latency": None,
                 "metric": "kl", "probe": 4096, "trials": 0,
                 "time_limit": 60.0, "plan": None},
    "prune": {"mlp": 1.0, "kv_groups": 1.0, "experts": 1.0, "method": "obs", "compensate": True, "multiple": None, "damp": None,
              "drift": 0.5},
    "depth": {"drop": 1, "unit": "layer", "metric": "kl", "windows": 8, "keep_zeros": False},
    "edit": {"drop_layers": [], "untie": False, "vocab": None},
    "distill": {"loss": {"kl": 1.0}, "teacher": "cached", "top_k": 64, "train": "all", "scope": "model", "rank": None,
                "tokens": None, "batch": 8, "rate": 0.001, "warmup": 0.05, "checks": 10,
                "memory": {"optimizer": None, "gradients": None, "activations": None, "weights": "kept", "limit": None}},
    "importance": {},
    "kv_policy": {"budget": None, "context": 2048, "rules": ["stream", "snap", "h2o", "heavy", "punct", "frequent", "full"],
                  "dtype": [], "method": "ilp", "continuation": 64, "recovery": None},
    "kv_cache": {"format": "fp8", "layers": "all"},
    "context_merge": {"window": None, "warmup": None, "prefix": 4, "suffix": 32},
    "sparsify": {"keep": 0.5, "kind": "cats", "allocate": True, "rank": None, "windows": 8},
    "rotate": {"kind": "hadamard", "stream": True, "heads": True},
    "smooth": {"strength": "search", "pairs": "all"},
    "factorize": {"rank": 0.5, "pins": {}, "multiple": 64, "spread": "uniform", "method": "whitened", "damp": None, "drift": 0.5},
    "quantize": QUANTIZE,
    "lqlora": {**QUANTIZE, "rank": 16, "factors": "bf16", "init": "closed_form", "rounds": 2, "fisher": False},
    "compressed_tensors": {"shard_bytes": 5_000_000_000, "engine": None},
    "gptq": {"shard_bytes": 5_000_000_000},
    "gguf": {},
    "native": {"shard_bytes": 5_000_000_000},
    "onnx": {"kv_cache": True, "dtype": "fp32", "accuracy_level": 4},
}  # fmt: skip

DATA: dict[type, dict[str, Any]] = {
    Document: {"model": ..., "out": None, "seed": 0, "leave": [], "passes": [], "export": [],
               "data": {"calibration": None, "training": None, "evaluation": None}},
    Data: {"calibration": None, "training": None, "evaluation": None},
    Text: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "weight": 1.0},
    Windows: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "weight": 1.0, "sequences": 128,
              "length": 2048, "bos": False, "sources": []},
    Calibration: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "weight": 1.0,
                  "sequences": 128, "length": 2048, "bos": False, "sources": [], "select": "first", "pool": None,
                  "generate": None},
    Lesson: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "weight": 1.0, "answers": False},
    Lessons: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "weight": 1.0, "answers": False,
              "sequences": 128, "length": 2048, "bos": False, "sources": []},
    Generate: {"temperature": [1.0, 1.0], "first": 16, "prompts": None},
    Prompts: {"text": None, "jsonl": None, "dataset": None, "field": "text", "split": "train", "tokens": 8},
}  # fmt: skip

PARTS = ("passes", "export", "recipes", "benchmarks")
SOURCES = sorted({p.resolve() for name in ("compress", *PARTS) for p in (ROOT / name).rglob("*.py")})
LONGEST_FUNCTION, LONGEST_FILE, MEDIAN = 60, 400, 15


def flags(verb: argparse.ArgumentParser) -> dict[str, Any]:
    named = {a.option_strings[0] if a.option_strings else a.dest: a.default for a in verb._actions}
    return {name: default for name, default in named.items() if name not in ("-h", "-v")}


def verbs() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(choices)


def test_the_verbs_and_their_flags() -> None:
    assert {name: flags(p) for name, p in verbs().items()} == VERBS
    assert set(flags(parser())) == {"verb"}
    assert all("-v" in p._option_string_actions for p in (parser(), *verbs().values()))


def test_every_verb_and_flag_explains_itself() -> None:
    for name, verb in verbs().items():
        assert verb.description, name
        for action in verb._actions:
            plain = action.dest in ("recipe", "what", "name", "sequences", "length", "device")
            assert action.help or plain, f"{name} {action.dest}"


@pytest.mark.parametrize("name", [*PASSES, *EXPORTERS])
def test_the_options_of_passes_and_exporters_and_their_defaults(name: str) -> None:
    cls: Any = {**PASSES, **EXPORTERS}[name]
    assert cls().model_dump(mode="json") == OPTIONS[name]
    assert all(f.description for f in cls.model_fields.values())


@pytest.mark.parametrize("cls", DATA)
def test_the_keys_of_a_recipe_and_their_defaults(cls: Any) -> None:
    fields = cls.model_fields
    assert {n: ... if f.is_required() else plain(f.default) for n, f in fields.items()} == DATA[cls]


def plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else list(value) if isinstance(value, tuple) else value


def test_the_names_of_the_package() -> None:
    assert sorted(compress.__all__) == ["CompressError", "plan_recipe", "run_recipe"]
    with pytest.raises(AttributeError, match="module 'compress' has no attribute 'nothing'"):
        _ = compress.nothing


def test_the_names_of_the_package_stay_what_they_are() -> None:
    """Also once everything is imported, and when asked twice."""
    for _ in range(2):
        assert all(callable(getattr(compress, name)) for name in compress.__all__)


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"]])
def test_help_is_answered_before_torch_is_loaded(words: list[str]) -> None:
    code = f"""
import sys
from compress.cli import main
try:
    main({words})
finally:
    heavy = {{"torch", "transformers", "numpy", "pydantic", "yaml"}} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: compress" in done.stdout


# --- style ------------------------------------------------------------------------------------------------------------


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines from the signature's first to the body's last) of every function of a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_file_and_no_function_is_too_long() -> None:
    assert [str(path) for path in SOURCES if len(path.read_text().splitlines()) > LONGEST_FILE] == []
    assert [f"{name}: {n} lines" for path in SOURCES for name, n in functions(path) if n > LONGEST_FUNCTION] == []


def test_functions_are_short() -> None:
    assert median(lines for path in SOURCES for _, lines in functions(path)) <= MEDIAN


def test_every_file_and_every_public_class_says_what_it_is_for() -> None:
    assert [str(path) for path in SOURCES if not ast.get_docstring(tree_of(path))] == []
    classes = [(path, n) for path in SOURCES for n in tree_of(path).body if isinstance(n, ast.ClassDef)]
    assert [f"{path}: {n.name}" for path, n in classes if not n.name.startswith("_") and not ast.get_docstring(n)] == []
