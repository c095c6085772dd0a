"""What every exporter shares: what it is asked, and what it may copy from the source.

An exporter is a frozen pydantic model like a pass. It says beforehand what it cannot hold (`check`), what the user should
know (`remarks`) and the exact files (`layout`); it writes into a folder beside its final name, proves the artifact, and only then
renames it.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from compress.checkpoint import Layout, disk_error
from compress.errors import ExportError
from compress.model import Model
from compress.state import State

MARK = "compress.json"  # in every artifact: which run and settings it comes from
CARRIED = {".json", ".jinja", ".model", ".txt", ".py", ".tiktoken"}


@dataclass(frozen=True)
class Proof:
    """How an artifact was checked: the engine that loaded it, and the largest difference of a logit from the run's own."""

    engine: str
    difference: float
    remark: str = ""


@dataclass(frozen=True)
class Job:
    """What an exporter works on: the source, the state to write, tokens to prove it with, and the text of the model card."""

    model: Model
    state: State
    tokens: torch.Tensor | None
    key: str
    card: Callable[[Mapping[str, Any]], str]
    device: str = "cpu"
    facts: dict[str, Any] = field(default_factory=dict)


class Exporter(BaseModel, ABC):
    """One kind of artifact. Subclasses are listed in `export.EXPORTERS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]

    @abstractmethod
    def check(self, state: State) -> None:
        """ExportError where the foreseen state cannot be held by this kind of artifact."""

    @abstractmethod
    def remarks(self, state: State) -> list[str]:
        """What the user should know about engines before the run."""

    @abstractmethod
    def layout(self, model: Model, state: State) -> Layout:
        """The weight files to be, to the byte."""

    @abstractmethod
    def write(self, job: Job, folder: Path) -> None:
        """Write everything into an empty folder."""

    @abstractmethod
    def prove(self, job: Job, folder: Path) -> Proof:
        """Load what was written and compare; ExportError on a mismatch."""


def place(exporter: Exporter, job: Job, out: Path) -> tuple[Path, Proof | None]:
    """Write, prove and rename one artifact to `out`; None for the proof where it is there already under the same key.

    An artifact of another key is moved aside; a folder that is no artifact of ours is an ExportError.
    """
    if (out / MARK).exists():
        old = json.loads((out / MARK).read_text())["key"]
        if old == job.key:
            return out, None
    elif out.exists():
        raise ExportError(f"{out}: exists and is no artifact of this tool; move it away or choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        exporter.write(job, partial)
        (partial / MARK).write_text(json.dumps({"schema": 1, "exporter": exporter.name, "key": job.key}, indent=1) + "\n")
        proof = exporter.prove(job, partial)
        if out.exists():
            out.rename(out.with_name(f"{out.name}-{old[:6]}"))
        partial.rename(out)
    except OSError as e:
        raise disk_error(e, partial) from None
    return out, proof


def carry_over(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, chat template and code files; never weights, config, or a card."""
    for path in sorted(source.iterdir()):
        keep = path.suffix in CARRIED and path.name not in ("config.json", MARK)
        if path.is_file() and keep and not path.name.endswith(".index.json") and not path.name.endswith("SOURCE.txt"):
            shutil.copyfile(path, folder / path.name)
