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

from compress.state.state import Part

TOGETHER = 1 << 27  # bytes in a part


class Store(Protocol):
    """What of a run folder is used here."""

    @property
    def partial(self) -> Path: ...
    def committed(self, part: str) -> Part | None: ...
    def commit(self, part: str, *, dense: Mapping[str, Tensor] = ..., records: Any = ...) -> Part: ...
    def drop(self) -> None: ...


class Checkpoints:
    """Of one training: `notes` say how far it is, under "curve" as loop.py has it."""

    def __init__(self, store: Store):
        self.store = store

    def keep(self, notes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and remove those that nobody will ask for."""
        step = notes["curve"][-1][0]
        parts = list(_parts(tensors))
        for i, names in enumerate(parts):
            self.store.commit(_name(step, i), dense={n: tensors[n].cpu() for n in names})
        text = torch.frombuffer(bytearray(json.dumps({**notes, "parts": len(parts)}).encode()), dtype=torch.uint8)
        self.store.commit("latest", dense={"notes": text})
        wanted = {step, _best(notes)}
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
        return self._tensors(notes["curve"][-1][0], notes["parts"])

    def best(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the best."""
        notes = self.notes()
        assert notes is not None, "the start was kept"
        return self._tensors(_best(notes), notes["parts"])

    def drop(self) -> None:
        self.store.drop()

    def _tensors(self, step: int, parts: int) -> Iterator[tuple[str, Tensor]]:
        for i in range(parts):
            part = self.store.committed(_name(step, i))
            for name, written in part.dense.items() if part else ():  # the start has fewer parts: nothing is remembered of it
                yield name, written.load()


def _name(step: int, part: int) -> str:
    return f"step-{step:07}-{part:03}"


def _best(notes: Mapping[str, Any]) -> int:
    return int(min(notes["curve"], key=lambda p: (p[3], p[0]))[0])


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
