"""Imports point down, as DESIGN section 1 draws them; the links hold; what is installed is one package."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the top. A room or a module may import from its own line, without cycles, and from lines below; nobody from above.
LAYERS = (
    ("cli", "commands", "planning", "pipeline", "stages", "prepare", "bench", "timing", "calibration", "sampling", "terminal",
     "__main__"),
    ("recipe", "run", "parts", "report", "evaluate", "cached"),
    ("passes", "export"),
    ("manager", "training"),
    ("model",),
    ("shapes",),
    ("state",),
    ("formats", "cache"),
    ("nodes",),
    ("documents",),
    ("errors",),
)  # fmt: skip
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
# Of exporters those parts that load what was written in the engine that will serve it, and the runtime, which is one.
TRANSFORMERS = {
    "model",
    "shapes",
    "export.compressed_tensors.engines",
    "export.gguf",
    "export.gptq.engines",
    "export.onnx",
    "export.runtime",
}
# All that an artifact needs of the rest to be run.
RUNTIME = ("formats", "cache", "errors", "state.checkpoint", "export.artifact.files", "export.artifact.config",
           "export.artifact.schemes", "export.artifact.checks", "export.artifact.skipped", "shapes")  # fmt: skip
FOLDERS = {"compress": ROOT / "compress", "passes": ROOT / "passes", "export": ROOT / "export"}


@functools.cache
def sources() -> dict[str, Path]:
    """Module name without the leading 'compress.' -> file, for everything that is installed."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if name != "compress" or parts[0] not in ("passes", "export", "__init__"):
                found[".".join(parts if name == "compress" else (name, *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The folder that a module lies in, with dots; the module itself where it lies in none."""
    return module if sources()[module].stem == "__init__" else module.rpartition(".")[0] or module


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its head or inside a function, with dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


@functools.cache
def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports, without 'compress.'."""
    known = sources()
    found = set()
    for name in imported(path):
        if name.startswith("compress."):
            parts = name.split(".")[1:]
            whole = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), parts[0])
            found.add(whole)
    return found


def level(module: str) -> int:
    return LEVEL[module.partition(".")[0]]


def test_every_module_has_a_layer() -> None:
    assert {m.partition(".")[0] for m in sources()} <= LEVEL.keys()


def test_imports_point_down() -> None:
    above = [
        f"{module} imports {other}" for module, path in sources().items() for other in ours(path) if level(other) < level(module)
    ]
    assert not above, "from above"


def test_no_module_imports_itself_by_a_detour() -> None:
    edges = {m: ours(p) - {m} for m, p in sources().items()}
    while leaves := [m for m, targets in edges.items() if not targets & edges.keys()]:
        for leaf in leaves:
            del edges[leaf]
    assert not edges, f"these import each other: {sorted(edges)}"


def test_passes_and_exporters_know_nothing_of_each_other_and_only_the_top_knows_them() -> None:
    for module, path in sources().items():
        for other in ours(path):
            kinds = module.partition(".")[0], other.partition(".")[0]
            assert kinds not in {("passes", "export"), ("export", "passes")}, (module, other)
            if kinds[1] in ("passes", "export") and kinds[0] != kinds[1]:
                assert level(module) == 0, f"{module} imports {other}"


def test_the_core_names_no_algorithm() -> None:
    """A pass is known by the table alone: no other file of the core says its name, or that of its mathematics."""
    names = {p.stem for p in FOLDERS["passes"].glob("*.py")} - {"__init__"}
    for module, path in sources().items():
        if module.partition(".")[0] not in ("passes", "export"):
            assert not {i.rpartition(".")[2] for i in imported(path)} & names, module


def test_transformers_is_imported_by_the_adapter_alone() -> None:
    for module, path in sources().items():
        if any(name.split(".")[0] == "transformers" for name in imported(path)):
            assert any(module == known or module.startswith(f"{known}.") for known in TRANSFORMERS), module


def test_the_runtime_needs_the_formats_alone() -> None:
    for module, path in sources().items():
        if module.startswith("export.runtime"):
            others = {other for other in ours(path) if not other.startswith("export.runtime")}
            assert all(any(o == known or o.startswith(f"{known}.") for known in RUNTIME) for o in others), (module, others)


def test_no_two_rooms_import_each_other_by_a_detour() -> None:
    edges: dict[str, set[str]] = {}
    for module, path in sources().items():
        edges.setdefault(room(module), set()).update(room(other) for other in ours(path) if room(other) != room(module))
    while leaves := [r for r, targets in edges.items() if not targets & edges.keys()]:
        for leaf in leaves:
            del edges[leaf]
    assert not edges, f"these import each other: {edges}"


def test_the_parts_are_imported_as_compress_passes_and_compress_export() -> None:
    """Bare `passes` and `export` would be other packages than the installed ones."""
    everything = [*sources().values(), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("recipes/*.py")]
    for path in everything:
        assert not {n.split(".")[0] for n in imported(path)} & {"passes", "export"}, path


@pytest.mark.parametrize("name", ["passes", "export"])
def test_the_links_resolve(name: str) -> None:
    link = ROOT / "compress" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == (ROOT / name).resolve()


def test_the_wheel_is_one_package_with_everything_in_it(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("compress", "passes", "export"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, clone)
    (clone / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
               "-w", str(tmp_path), str(clone)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"compress"}
    wanted = {f"compress/{m.replace('.', '/')}.py" for m, p in sources().items() if p.stem != "__init__"}
    wanted |= {f"compress/{m.replace('.', '/')}/__init__.py" for m, p in sources().items() if p.stem == "__init__"}
    wanted |= {f"compress/export/runtime/cuda/kernels/{p.name}" for p in (ROOT / "export/runtime/cuda/kernels").iterdir()}
    assert wanted | {"compress/py.typed"} <= set(names)
    check = "from importlib.util import find_spec as f; print(*(f(f'compress.{n}').origin for n in ('passes', 'export.table')))"
    found = subprocess.run(
        [sys.executable, "-c", check], env={"PYTHONPATH": str(wheel)}, cwd=tmp_path, check=True, capture_output=True
    )
    assert found.stdout.decode().split() == [f"{wheel}/compress/{n}.py" for n in ("passes/__init__", "export/table")]
