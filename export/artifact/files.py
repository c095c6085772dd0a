"""The files of an artifact's folder, before anything in them is believed: links, JSON, headers, hashes.

What is wrong is a ModelError of one line. No path comes from a file, and a link is followed only within the folder, or into the
store of a hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress.errors import ModelError, one_line
from compress.state import checkpoint
from compress.state.checkpoint import HASHED_BYTES, INDEX, OWN, OWN_INDEX, SINGLE, Spec, read_header

MARK = "compress.json"  # in every artifact: which run and settings it comes from
WEIGHTS = {".safetensors", ".onnx", ".data", ".gguf"}
_MOST_JSON = 100_000_000  # bytes
_NOTED = {"schema": (int,), "exporter": (str,), "key": (str,), "proof": (dict,), "sizes": (dict,), "sha256": (dict,)}
_PROOF = {"engine": (str,), "difference": (int, float), "remark": (str,), "greedy": (int,)}


def shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of a native artifact; ModelError where one is missing, or others lie beside them."""
    stray = next((name for name in (INDEX, SINGLE) if (folder / name).exists()), None)
    if stray:
        raise ModelError(f"{folder}: holds {stray} beside {OWN}-00001.safetensors; they do not belong together")
    paths = tuple(sorted(folder.glob(f"{OWN}-[0-9]*.safetensors")))
    wanted = [f"{OWN}-{i:05}.safetensors" for i in range(1, len(paths) + 1)] or [f"{OWN}-00001.safetensors"]
    if [p.name for p in paths] != wanted:
        names = ", ".join(p.name for p in paths[:3]) or "no weights"
        raise ModelError(f"{folder}: holds {names}, not {wanted[0]} and on; a weight file is missing")
    return tuple(within(folder, p) for p in paths)


def plain_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a stock checkpoint: one, or those that its index names."""
    index = folder / INDEX
    if not index.exists():
        return (within(folder, folder / SINGLE),)
    table = document(index).get("weight_map")
    names = sorted({n for n in table.values() if isinstance(n, str)}) if isinstance(table, dict) else []
    bad = next((n for n in names if Path(n).name != n or not n.endswith(".safetensors")), None)
    if bad or not names:
        raise ModelError(f"{index}: names '{one_line(bad or '')}', which is no weight file of this folder")
    return tuple(within(folder, folder / n) for n in names)


def contained(folder: Path) -> None:
    """ModelError where something in an artifact is a link that leads out of it: nothing there may have another file read."""
    for path in folder.rglob("*"):
        within(folder, path)


def within(folder: Path, path: Path) -> Path:
    """The path; ModelError where it is a link that leads out of the folder."""
    return checkpoint.within(folder, path, "artifact")


def headers(paths: Iterable[Path]) -> tuple[dict[str, Spec], dict[str, Path]]:
    """Every tensor and its file; ModelError for a damaged file, or a tensor that is there twice."""
    specs: dict[str, Spec] = {}
    files: dict[str, Path] = {}
    for path in paths:
        found = read_header(path)
        if specs.keys() & found.keys():
            raise ModelError(f"{path}: two weight files hold the same tensor; they do not belong together")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: broken safetensors header ({one_line(str(e))}); download it again") from None
        specs |= found
        files |= dict.fromkeys(found, path)
    return specs, files


def check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """ModelError where the index of a native artifact, by which transformers goes, names other files than those read here."""
    path = folder / OWN_INDEX
    if path.exists() and document(within(folder, path)).get("weight_map") != {name: file.name for name, file in files.items()}:
        raise ModelError(f"{path}: says something else than the weight files themselves; export it again")


def check_marks(folder: Path) -> None:
    """ModelError where weights, config or tokenizer are not those that were written, by size and by hash: of weights, where that
    takes seconds. Other files are their owner's to change. A folder without a note, such as other tools write, is not compared.
    """
    note = note_of(folder)
    if note is None:
        return
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    small = sum(path.stat().st_size for path in paths.values()) <= HASHED_BYTES
    for name in sorted(name for name in paths.keys() & note["sizes"].keys() if is_compared(name)):
        hashed = small or paths[name].suffix not in WEIGHTS
        if paths[name].stat().st_size != note["sizes"][name] or (hashed and sha256(paths[name]) != note["sha256"][name]):
            raise ModelError(f"{paths[name]}: is not the file that was written (see {MARK}); it is damaged, copy it again")


def is_compared(name: str) -> bool:
    return name in ("config.json", "kv_policy.json") or name.startswith("tokenizer") or Path(name).suffix in WEIGHTS


def note_of(folder: Path) -> dict[str, Any] | None:
    """What `MARK` says of an artifact; None where there is none. ModelError where it cannot be read or is not whole."""
    path = folder / MARK
    if not path.exists() and not path.is_symlink():
        return None
    note = document(within(folder, path))
    wrong = next((key for key, kind in _NOTED.items() if not of_kind(note.get(key), kind)), None)
    if wrong is None:
        proof, kept, hashes = note["proof"], note["sizes"], note["sha256"]
        whole = proof.keys() == _PROOF.keys() and all(of_kind(proof[key], kind) for key, kind in _PROOF.items())
        alike = kept.keys() == hashes.keys() and all(type(n) is int for n in kept.values())
        texts = all(isinstance(text, str) for text in hashes.values())
        wrong = None if whole and alike and texts else "sizes and sha256" if whole else "proof"
    if wrong is not None:
        raise ModelError(f"{path}: is damaged: '{wrong}' is not what is written there; copy it again, or export again")
    return note


def of_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds  # a bool is no number


def json_of(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where the file is absent, damaged, or holds something else: for what can do without it."""
    try:
        return document(path)
    except ModelError:
        return {}


def optional(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where the file is absent, ModelError where it is damaged, or holds something else."""
    return document(path) if path.exists() else {}


def document(path: Path) -> dict[str, Any]:
    """A JSON mapping; ModelError where the file is absent, damaged, or holds something else."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: is no JSON ({one_line(str(e))})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is no JSON mapping")
    return found


def sha256(file: Path) -> str:
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()
