"""Checkpoints of a training on disk, in parts of bounded size: the latest, and what learnt at the best.

The parts of a checkpoint come first and a note of it last, so one that was cut short is as if it had never been begun. Parts are
bounded because writing one takes a copy of it in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import RunError
from compress.state.state import Part

SUFFIX = ".safetensors"  # of a file of a store
TOGETHER = 1 << 24  # bytes in a part, unless one tensor has more
COPIES = 3  # of a part that is being written


class Store(Protocol):
    """What of a run folder is used here."""

    @property
    def partial(self) -> Path: ...
    def committed(self, part: str) -> Part | None: ...
    def commit(self, part: str, *, dense: Mapping[str, Tensor] = ..., records: Any = ...) -> Part: ...
    def drop(self) -> None: ...


class Checkpoints:
    """Of one training: `notes` say how far it is, under "curve" as loop.py has it, and at which step it was "best"."""

    def __init__(self, store: Store):
        self.store = store

    def keep(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and remove those that nobody will ask for."""
        step = notes["curve"][-1][0]
        parts = list(_parts(tensors))
        for i, names in enumerate(parts):
            self.store.commit(_name(step, i, len(parts)), dense={n: tensors[n].cpu() for n in names})
        text = torch.frombuffer(bytearray(json.dumps(notes).encode()), dtype=torch.uint8)
        self.store.commit("latest", dense={"notes": text})
        wanted = {step, notes["best"]}
        for path in self.store.partial.glob("step-*"):
            if int(path.name.split("-")[1]) not in wanted:
                path.unlink()

    def notes(self) -> dict[str, Any] | None:
        part = self.store.committed("latest")
        if part is None:
            return None
        found: dict[str, Any] = json.loads(bytes(part.dense["notes"].load().tolist()))
        return found

    def latest(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the last checkpoint, one in memory at a time."""
        notes = self.notes()
        assert notes is not None, "the start was kept"
        return self._tensors(notes["curve"][-1][0])

    def best(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the best."""
        notes = self.notes()
        assert notes is not None, "the start was kept"
        return self._tensors(notes["best"])

    def drop(self) -> None:
        """Remove all, the note first: should that be cut short, what is left is as if it had never been begun."""
        (self.store.partial / f"latest{SUFFIX}").unlink(missing_ok=True)
        self.store.drop()

    def _tensors(self, step: int) -> Iterator[tuple[str, Tensor]]:
        found = sorted(self.store.partial.glob(f"step-{step:07}-*"))
        count = int(found[0].name.removesuffix(SUFFIX).rpartition("-")[2]) if found else 0
        parts = [self.store.committed(_name(step, i, count)) for i in range(count)]
        if not parts or None in parts:
            raise RunError(f"{self.store.partial}: a part of step {step} is missing; delete this folder and run again")
        for part in parts:
            for name, written in part.dense.items() if part else ():
                yield name, written.load()


def _name(step: int, part: int, count: int) -> str:
    return f"step-{step:07}-{part:03}-of-{count:03}"


def _parts(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of tensors, in order, `TOGETHER` bytes of them at once."""
    found: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room or not found:
            found.append([])
            room = TOGETHER
        found[-1].append(name)
        room -= tensor.nbytes
    return found
