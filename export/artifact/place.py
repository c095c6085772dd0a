"""How an artifact gets into its place: written beside its final name, proven, and only then renamed; and what it copies from
the source.

`MARK` notes the size of every file, and the hashes of weight files and config. Sizes are compared whenever a run asks whether the
artifact is there; hashes are for whoever received a copy, and readers compare them where that takes no more than seconds.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

from compress.errors import ExportError
from compress.export.artifact.exporter import Exporter, Job, Proof
from compress.export.artifact.files import MARK, json_of, sha256
from compress.state.checkpoint import disk_error

WEIGHTS = {".safetensors", ".onnx", ".data", ".gguf"}
CARRIED = {".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"}


def place(exporter: Exporter, job: Job, out: Path) -> tuple[Path, Proof]:
    """Write, prove and rename one artifact to `out`; where it is there already under the same key, its proof is read.

    An artifact of another key is moved aside, and comes back when its key does; a folder that is no artifact of ours is an
    ExportError. What failed is removed.
    """
    if held(out) != job.key:
        refuse_foreign(out)
        before = aside(out, job.key)
        if held(before) == job.key:
            move_aside(out)
            before.rename(out)
    if held(out) == job.key:
        return out, Proof(**mark(out)["proof"])  # `held` has looked at it
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        exporter.write(job, partial)
        proof = exporter.prove(job, partial)
        hashed = (name for name in sizes(partial) if Path(name).suffix in WEIGHTS or name == "config.json")
        hashes = {name: sha256(partial / name) for name in hashed}
        note = {"schema": 1, "exporter": exporter.name, "key": job.key, "proof": asdict(proof), "sizes": sizes(partial),
                "sha256": hashes}  # fmt: skip
        (partial / MARK).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        move_aside(out)
        partial.rename(out)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            raise disk_error(e, out.parent) from None
        raise
    return out, proof


def sizes(folder: Path) -> dict[str, int]:
    """The size of every file in a folder and its subfolders, by its path within the folder."""
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def mark(folder: Path) -> dict[str, Any]:
    """What an artifact says of itself; empty where there is none or it cannot be read."""
    return json_of(folder / MARK)


def held(folder: Path) -> str | None:
    """The key of the artifact in a folder, or None where there is none, or a file of it is missing or cut short."""
    note = mark(folder)
    noted, proof = note.get("sizes"), note.get("proof")
    if not isinstance(noted, dict) or not isinstance(proof, dict) or proof.keys() != Proof.__dataclass_fields__.keys():
        return None
    files = sizes(folder)
    return note.get("key") if all(files.get(name) == size for name, size in noted.items()) else None


def refuse_foreign(out: Path) -> None:
    """ExportError where something stands at `out` that no exporter made."""
    if out.exists() and not (out / MARK).exists():
        raise ExportError(f"{out}: exists and is no artifact of this tool; move it away or choose another --out")


def aside(out: Path, key: str) -> Path:
    return out.with_name(f"{out.name}-{key[:6]}")


def move_aside(out: Path) -> None:
    """Give an older artifact another name, one that is free."""
    if not out.exists():
        return
    name = aside(out, str(mark(out).get("key", "old")))
    numbered = (name.with_name(f"{name.name}-{i}") for i in count(2))
    out.rename(next(p for p in chain([name], numbered) if not p.exists()))


def carry_over(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template and code files; never weights, config, or a card."""
    for path in sorted(source.iterdir()):
        keep = path.suffix in CARRIED and path.name not in ("config.json", MARK)
        if path.is_file() and keep and not path.name.endswith(".index.json") and not path.name.endswith("SOURCE.txt"):
            shutil.copyfile(path, folder / path.name)
