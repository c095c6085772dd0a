"""Weight files of another layout, seen as a checkpoint that holds our own tensors.

What reads an artifact asks a `Checkpoint` for tensors by name. A `View` answers with the names, dtypes and shapes that we know,
and makes each tensor out of the foreign file when it is asked for, so nothing else has to know of the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from compress.model.model import Model
from compress.state.checkpoint import Checkpoint, Rows, Spec


@dataclass(frozen=True)
class Seen:
    """One tensor of a view: what it is, the file that it comes from, and how it is made."""

    spec: Spec
    path: Path
    make: Callable[[], torch.Tensor]


class View(Checkpoint):
    """A checkpoint of tensors that are made when read; `nbytes` is what they take on disk, in the layout of the file."""

    def __init__(self, folder: Path, tensors: Iterable[Seen], nbytes: int):
        self.folder = folder
        self._seen = {seen.spec.name: seen for seen in tensors}
        self.specs = {name: seen.spec for name, seen in self._seen.items()}
        self.files = {name: seen.path for name, seen in self._seen.items()}
        self.nbytes = nbytes

    def read(self, name: str) -> torch.Tensor:
        return self._seen[name].make()

    def read_rows(self, name: str, index: Rows) -> torch.Tensor:
        return self._finite(name, self.read(name)[index])


@dataclass(frozen=True)
class Viewed(Model):
    """A model whose weights are seen through a view."""

    view: View = field(kw_only=True)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return self.view

    @property
    def has_weights(self) -> bool:
        return True
