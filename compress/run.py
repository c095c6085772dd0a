"""The run folder: what a run has finished, under keys, so that a kill loses at most one block.

    runs/NAME/
      recipe.resolved.yaml     every default written out
      run.json                 versions, seed, model, data hashes
      steps/01-quantize-9f31c0/          finished: record.json and one safetensors file per block
      steps/02-….partial/                in hand: the blocks finished so far
      analyses/errors-51c0…/             what was measured, by content: shared by all steps that ask for the same
      compressed_tensors/                the artifact, one folder for each exporter
      report.md  report.html  evaluation.json

A step's key hashes its parent's key, the pass's text and version, the data and the seed. A file is written under another name,
flushed to the disk, and renamed: it is there whole or not at all. A finished step is its folder renamed.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel

from compress.documents import json_mapping
from compress.errors import ContractError, RunError
from compress.formats import Packed
from compress.manager import Context, Pass, Record
from compress.parts import SUFFIX, part_bytes, read_part
from compress.state import State
from compress.state.checkpoint import disk_error, write_all
from compress.state.plan import BitPlan
from compress.state.state import Part

SCHEMA = 2
LOCK, RECORD, ANALYSES = ".lock", "run.json", "analyses"
SHORT = 12  # digits of a key in the name of a folder of parts
MARK = "made by compress"  # in the head of both: by that a folder is a run's, and by nothing else
_LOCKED = f"{MARK}: held while a run uses this folder\n".encode()


def digest(*parts: object) -> str:
    """sha256 over the JSON of the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside, flush, rename into place; RunError on a full disk."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        try:
            if beside.is_symlink():  # what it leads to is not ours
                beside.unlink()
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.rename(path)
            sync_folder(path.parent)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Inside, what the operating system refuses becomes a RunError that says what it means."""
    try:
        yield
    except OSError as e:
        raise disk_error(e, place) from None


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: the lock, which is the first file in it, says so; so does the record, lest that is lost in a
    copy."""
    return any(MARK.encode() in head(path / name) for name in (LOCK, RECORD))


def head(file: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read, or is no plain file."""
    if not file.is_file():
        return b""
    try:
        with file.open("rb") as held:
            return held.read(200)
    except OSError:
        return b""


def begun(path: Path) -> bool:
    """Whether a file is the lock of a run that was stopped while it wrote into it."""
    return path.name == LOCK and path.is_file() and _LOCKED.startswith(head(path))


def brought(path: Path) -> bool:
    """Whether a folder is what another run measured, copied to where a run is to begin."""
    if path.name != ANALYSES or path.is_symlink() or not path.is_dir():
        return False
    return all(p.is_dir() and re.fullmatch(rf"[a-z-]+-[0-9a-f]{{{SHORT}}}", p.name) for p in path.iterdir())


class RunFolder:
    """One run's folder, held by a lock that the system releases however the process ends."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def held(self) -> Iterator[RunFolder]:
        """Inside, nobody else runs here; RunError when somebody does, or when this is no run folder."""
        with writing(self.path):
            self.refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / LOCK).is_symlink():
                raise RunError(f"{self.path / LOCK}: is a link, and is to be the run's own file; remove it")
            lock = (self.path / LOCK).open("ab", buffering=0)
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(f"{self.path}: another run is using it; wait, or choose another folder with --out") from None
            except OSError as e:  # such as a network disk that knows no locks
                raise RunError(f"{self.path}: cannot be locked ({e.strerror}); choose a local folder with --out") from None
            with writing(self.path):
                if head(self.path / LOCK) != _LOCKED:
                    lock.truncate(0)
                    write_all(lock.fileno(), _LOCKED, self.path)
                (self.path / "steps").mkdir(exist_ok=True)
            yield self

    def refuse_foreign(self) -> None:
        """Refuse a folder that holds something else than a run."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file, not a folder; choose another with --out")
        if self.path.is_dir() and not is_run(self.path) and not all(begun(path) or brought(path) for path in self.path.iterdir()):
            raise RunError(f"{self.path}: holds files that no run made; choose another folder with --out")


@dataclass
class Parts:
    """Finished parts of long work, in a folder: each is one safetensors file, there whole or not at all, with records."""

    root: Path
    name: str
    key: str
    noted: dict[str, list[Record]] = field(default_factory=dict)  # by part

    @property
    def records(self) -> list[Record]:
        """What was noted of the parts that were committed or found, in that order."""
        return [record for records in self.noted.values() for record in records]

    @property
    def partial(self) -> Path:
        """Where parts are written."""
        return self.root / f"{self.name}-{self.key[:SHORT]}"

    def committed(self, part: str) -> Part | None:
        path = self.partial / f"{part}{SUFFIX}"
        if not path.exists():
            return None
        found, self.noted[part] = read_part(path)
        return found

    def commit(
        self,
        part: str,
        codes: Mapping[str, Packed] = MappingProxyType({}),
        dense: Mapping[str, torch.Tensor] = MappingProxyType({}),
        records: Sequence[Record] = (),
        serving: Mapping[str, Any] = MappingProxyType({}),
    ) -> Part:
        if any(not isinstance(record.get("site"), str) for record in records):
            raise ContractError(f"pass author: a record of part '{part}' does not say under 'site' what it is about")
        with writing(self.root):
            self.partial.mkdir(parents=True, exist_ok=True)
        path = self.partial / f"{part}{SUFFIX}"
        write_atomic(path, part_bytes(codes, dense, records, serving))
        self.noted[part] = list(records)
        return read_part(path)[0]

    def analysis(self, name: str, of: object) -> Parts:
        """The parts of an analysis within this one; they go when it is dropped."""
        return Parts(self.partial, name, digest(self.key, of))

    def of_source(self, name: str, of: object) -> Parts:
        return self.analysis(name, of)

    def drop(self) -> None:
        """Remove what was kept; nobody will ask for it again."""
        shutil.rmtree(self.partial, ignore_errors=True)


@dataclass
class Step(Parts):
    """One step of a run: restored if its key is known, else filled block by block."""

    number: int = 0
    made_of: Mapping[str, Any] = field(default_factory=dict)
    context_of: Callable[[Step], Context] | None = None
    source: str = ""  # the key of the model before any step

    @classmethod
    def of(
        cls, root: Path, number: int, made_of: Mapping[str, Any], context_of: Callable[[Step], Context], source: str = ""
    ) -> Step:
        return cls(root, made_of["name"], digest(SCHEMA, made_of), {}, number, made_of, context_of, source)

    @property
    def folder(self) -> Path:
        return self.root / f"{self.number:02}-{self.name}-{self.key[:6]}"

    @property
    def partial(self) -> Path:
        return self.folder.with_name(self.folder.name + ".partial")

    @property
    def finished(self) -> bool:
        return (self.folder / "record.json").exists()

    def context(self) -> Context:
        assert self.context_of is not None
        return self.context_of(self)

    def analysis(self, name: str, of: object) -> Parts:
        """The parts of an analysis of the state that this step starts from, shared by all steps that ask for the same."""
        source = [self.made_of[n] for n in ("parent", "data", "seed", "computes")]
        return Parts(self.root.with_name(ANALYSES), name, digest(SCHEMA, source, of))

    def of_source(self, name: str, of: object) -> Parts:
        """The parts of an analysis of the model before any step."""
        return Parts(self.root.with_name(ANALYSES), name, digest(SCHEMA, self.source, self.made_of["computes"], of))

    def restore(self, known: Callable[[Sequence[Record]], State]) -> State | None:
        """The state after this step from its finished folder, or None; its records and its plan come back too. `known` makes of
        the records what the state was known to become.

        RunError where the folder was damaged after it was finished.
        """
        if not self.finished:
            return None
        record = read_record(self.folder)
        if record is None or any(not (self.folder / f"{name}{SUFFIX}").exists() for name in record["parts"]):
            raise RunError(f"{self.folder}: its files are damaged or missing; delete this folder and run again")
        parts, self.noted = [], {}
        for name in record["parts"]:
            part, self.noted[name] = read_part(self.folder / f"{name}{SUFFIX}")  # its hash holds the records too
            parts.append(part)
        state = known(self.records)
        for part in parts:
            state = state.with_part(part)
        plan = None if record["plan"] is None else BitPlan.of_json(record["plan"])
        return replace(state, plan=plan)

    def finish(self, seconds: float, peak_bytes: int, plan: BitPlan | None) -> None:
        """Write the record and rename the folder into place; from then on the step is a cache hit."""
        record = {"key": self.key, "made_of": self.made_of, "seconds": seconds, "peak_bytes": peak_bytes,
                  "plan": None if plan is None else plan.json(), "parts": list(self.noted), "sites": self.records}  # fmt: skip
        with writing(self.root):
            self.partial.mkdir(parents=True, exist_ok=True)
            write_atomic(self.partial / "record.json", json.dumps(record, indent=1).encode())
            for stray in self.partial.glob("*.tmp"):
                stray.unlink()
            if self.folder.exists():  # a folder without a record: not ours to trust
                shutil.rmtree(self.folder)
            self.partial.rename(self.folder)
            sync_folder(self.root)

    def difference(self) -> str | None:
        """How the last finished step of this number differs, in one line; None where there is none or it is the same."""
        if self.finished or self.partial.exists():
            return None
        others = sorted(self.root.glob(f"{self.number:02}-*/record.json"), key=lambda p: p.stat().st_mtime)
        for folder in [other.parent for other in reversed(others)]:
            record = read_record(folder)
            change = self._change(record["made_of"]) if record else None
            if change:
                return f"step {self.number} differs from {folder.name}: {change}; running it anew, the old step stays"
        return None

    def _change(self, theirs: Mapping[str, Any]) -> str | None:
        """The first difference, a hash of ours said in words."""
        if theirs.get("parent") != self.made_of["parent"]:
            return "the model's weights or config changed" if self.number == 1 else f"step {self.number - 1} changed"
        if theirs.get("data") != self.made_of["data"]:
            return "the calibration text, how it is cut into windows, or the vocabulary changed"
        return first_difference(dict(theirs), dict(self.made_of))


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, as ``path: old → new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    if old == new:
        return None
    return f"{path} {shorten(old)} → {shorten(new)}"


def shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"


class Noted(BaseModel):
    """What the record of a step must say of a site, so that a report can be made of it."""

    site: str
    format: str | None = None
    bytes: int | None = None
    error: float | None = None
    rounding: float | None = None
    notes: list[str] = []


class Finished(BaseModel):
    """What the record of a finished step must say."""

    made_of: dict[str, Any]
    seconds: float
    peak_bytes: float
    parts: list[str]
    sites: list[Noted]


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `finish` noted about a step; None where it is damaged."""
    try:
        record = json_mapping(folder / "record.json", RunError)
        if any(Path(part).name != part for part in Finished.model_validate(record).parts):
            return None  # a name that leads out of the folder
        if record["plan"] is not None:
            BitPlan.of_json(record["plan"])
        return record
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def step_inputs(
    p: Pass, parent: str, data: str | None, seed: int, following: Sequence[Pass] = (), computes: str = ""
) -> dict[str, Any]:
    """Everything that a step's result depends on, as JSON; `computes`: what blocks compute in, and the products of fp32."""
    made_of = {"parent": parent, "name": p.name, "version": p.version, "options": p.model_dump(mode="json"),
               "data": data, "seed": seed, "computes": computes}  # fmt: skip
    return made_of | {"following": [(q.version, q.text()) for q in following]} if p.looks_ahead else made_of


@functools.cache
def versions() -> Mapping[str, str]:
    """The versions that a run's figures depend on. Asked once in a process: to read them takes longer than a small export."""
    known = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in ("compress-pipeline", "transformers", "safetensors", "compressed-tensors"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    return MappingProxyType(known)
