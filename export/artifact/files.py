"""The files of an artifact's folder, before anything in them is believed: links, JSON, headers, hashes.

What is wrong is a ModelError of one line. No path comes from a file, and a link is followed only within the folder, or into the
store of a hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress.errors import ModelError
from compress.state.checkpoint import HASHED_BYTES, INDEX, OWN, OWN_INDEX, SINGLE, Spec, read_header

MARK = "compress.json"  # in every artifact: which run and settings it comes from
_MOST_JSON = 100_000_000  # bytes


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
    home, target = folder.resolve(), path.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in target.parents and target.parent != store:
        raise ModelError(f"{path}: is a link out of the artifact; copy the file itself")
    return path


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


def check_marks(folder: Path, paths: Iterable[Path]) -> None:
    """ModelError for a file that is not the one that was written, by its size and, where that takes seconds, its hash."""
    note, paths = json_of(folder / MARK), tuple(paths)
    hashes, noted = note.get("sha256"), note.get("sizes")
    small = sum(path.stat().st_size for path in paths) <= HASHED_BYTES
    for path in (*paths, folder / "config.json"):
        held = path.stat().st_size
        name = path.relative_to(folder).as_posix()
        size = noted.get(name, held) if isinstance(noted, dict) and path in paths else held
        whole = hashes.get(name) if isinstance(hashes, dict) and small else None
        if size != held or (whole is not None and whole != sha256(path)):
            raise ModelError(f"{path}: is not the file that was written (see {MARK}); it is damaged, copy it again")


def json_of(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where the file is absent, damaged, or holds something else."""
    try:
        return document(path)
    except ModelError:
        return {}


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


def one_line(text: str) -> str:
    """Text of a foreign file for a message: without control characters, at most 200 characters."""
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f]", " ", text)[:200]
