"""How an artifact gets into its place: written beside its final name, proven, and only then renamed.

`MARK` notes the size and the hash of every file. They are compared whenever a run finds an artifact that an earlier one has left:
one that was damaged since is moved aside and written anew. Readers compare them too, where that takes no more than seconds.

What is being written has a mark of its own, `UNFINISHED`: a folder of that name without it is somebody else's, and stays.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

from compress.errors import ExportError, ModelError
from compress.export.artifact.carried import carry_over, copy_file
from compress.export.artifact.exporter import Exporter, Job, Proof
from compress.export.artifact.files import MARK, json_of, note_of, sha256
from compress.state.checkpoint import disk_error

UNFINISHED = ".compress-unfinished"


def place(exporter: Exporter, job: Job, out: Path, say: Callable[[str], None] = lambda _: None) -> tuple[Path, Proof]:
    """Write, prove and rename one artifact to `out`; where it is there already under the same key, its proof is read.

    An artifact of another key is moved aside, and comes back when its key does. One that was damaged is moved aside too, which
    `say` is told. A folder that is no artifact of ours is an ExportError. What failed is removed.
    """
    refuse_foreign(out)
    if spoilt := damage(out):
        say(f"{spoilt}; moved aside to {move_aside(out, 'damaged').name}, and written anew")
    before = aside(out, job.key)
    if key_of(out) != job.key and key_of(before) == job.key and not damage(before):
        move_aside(out, key_of(out))
        before.rename(out)
    if key_of(out) == job.key:
        return out, Proof(**mark(out)["proof"])  # `damage` has looked at it
    return out, written(exporter, job, out)


def written(exporter: Exporter, job: Job, out: Path) -> Proof:
    """A new artifact, in its place, and its proof."""
    partial = partial_of(out)
    discard(partial)  # `refuse_foreign` has looked at it
    try:
        partial.mkdir(parents=True)
        (partial / UNFINISHED).touch()
        exporter.write(job, partial)
        proof = exporter.prove(job, partial)
        held = sizes(partial)
        note = {"schema": 1, "exporter": exporter.name, "key": job.key, "proof": asdict(proof), "sizes": held,
                "sha256": {name: sha256(partial / name) for name in held}}  # fmt: skip
        (partial / MARK).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        (partial / UNFINISHED).unlink()  # from here on it is known by its note, in either place
        move_aside(out, key_of(out))
        partial.rename(out)
    except BaseException as e:
        discard(partial)
        if isinstance(e, OSError):
            raise disk_error(e, out.parent) from None
        raise
    return proof


def discard(partial: Path) -> None:
    """Remove what was being written, its mark last: if this is cut short, what is left is still known as ours."""
    if partial.is_dir():
        (partial / UNFINISHED).touch()
        for entry in partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != UNFINISHED:
                entry.unlink()
        shutil.rmtree(partial, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """The size of every file in a folder and its subfolders, by its path within the folder."""
    found = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: size for name, size in found.items() if name != UNFINISHED}


def mark(folder: Path) -> dict[str, Any]:
    """What an artifact says of itself; empty where there is none or it cannot be read."""
    return json_of(folder / MARK)


def key_of(folder: Path) -> str | None:
    key = mark(folder).get("key")
    return key if isinstance(key, str) else None


def held(folder: Path) -> str | None:
    """The key of the artifact in a folder, or None where there is none, or it is not as it was written."""
    return None if damage(folder) else key_of(folder)


def damage(folder: Path) -> str | None:
    """What of an artifact is not as it was written, to the last bit; None where nothing is, or there is none."""
    try:
        note = note_of(folder)
    except ModelError as e:
        return str(e)
    if note is None:
        return None
    files = sizes(folder)
    for name, size in note["sizes"].items():
        if name not in files:
            return f"{folder / name}: is missing from the artifact"
        if files[name] != size or sha256(folder / name) != note["sha256"][name]:
            return f"{folder / name}: is not the file that was written (see {MARK})"
    return None


def refuse_foreign(out: Path) -> None:
    """ExportError where something stands at `out`, or where it will be written first, that no exporter made."""
    if os.path.lexists(out) and not (out / MARK).is_file():
        raise ExportError(f"{out}: exists and is no artifact of this tool; move it away or choose another --out")
    partial = partial_of(out)
    marked = (partial / UNFINISHED).is_file() or key_of(partial) is not None
    ours = partial.is_dir() and not partial.is_symlink() and (marked or not any(partial.iterdir()))
    if os.path.lexists(partial) and not ours:
        raise ExportError(f"{partial}: exists, and an artifact is to be written there before it gets its name; move it away or "
                          "choose another --out")  # fmt: skip


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def aside(out: Path, key: str) -> Path:
    return out.with_name(f"{out.name}-{key[:6]}")


def move_aside(out: Path, key: str | None) -> Path:
    """Give an older artifact another name, one that is free."""
    if not out.exists():
        return out
    name = out.with_name(f"{out.name}-damaged") if key == "damaged" else aside(out, key or "old")
    numbered = (name.with_name(f"{name.name}-{i}") for i in count(2))
    free = next(p for p in chain([name], numbered) if not os.path.lexists(p))
    out.rename(free)
    return free


__all__ = ["carry_over", "copy_file", "held", "mark", "place", "refuse_foreign", "sizes"]
