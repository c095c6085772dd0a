"""The dense tensors of a state: the source's checkpoint, overlaid by what steps have made, renamed, or taken away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.errors import ModelError
from compress.state.checkpoint import Checkpoint, Rows, Spec, read_tensor


class Bare(Checkpoint):
    """What a checkpoint of a config alone would hold: names, dtypes and shapes. Nothing can be read from it."""

    def __init__(self, folder: Path, specs: Iterable[Spec]):
        self.folder, self.files, self.specs = folder, {}, {spec.name: spec for spec in specs}

    def read(self, name: str) -> torch.Tensor:
        raise ModelError(f"{self.folder}: holds no weights to read '{name}' from")


@dataclass(frozen=True)
class Written:
    """A dense tensor that a step has made: its spec, under the name that it has in the checkpoint, and where it lies."""

    spec: Spec
    path: Path
    key: str

    def load(self) -> torch.Tensor:
        return read_tensor(self.path, self.key)


class Overlay(Checkpoint):
    """The source's checkpoint, overlaid by what steps have done: tensors that they wrote, renamed, or took away.

    names: every tensor that is still the source's, and its name there. Two overlays are equal where all their tensors lie at the
    same places.
    """

    def __init__(self, base: Checkpoint, names: Mapping[str, str] | None = None, written: Mapping[str, Written] | None = None):
        self.base, self.folder, self.written = base, base.folder, dict(written or {})
        self.names = {n: n for n in base.specs} if names is None else {n: s for n, s in names.items() if n not in self.written}
        kept = {n: Spec(n, base.specs[s].dtype, base.specs[s].shape) for n, s in self.names.items()}
        self.specs = kept | {n: w.spec for n, w in self.written.items()}
        self.files = {n: base.files[s] for n, s in self.names.items() if s in base.files}
        self.files |= {n: w.path for n, w in self.written.items()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Overlay):
            return NotImplemented
        return self.base is other.base and (self.names, self.written) == (other.names, other.written)

    __hash__ = None  # type: ignore[assignment]

    def read(self, name: str) -> torch.Tensor:
        if name in self.written:
            return self.written[name].load()
        return self.base.read(self.names[name])

    def read_rows(self, name: str, index: Rows) -> torch.Tensor:
        if name in self.written:
            return self._finite(name, read_tensor(self.written[name].path, self.written[name].key, index))
        return self.base.read_rows(self.names[name], index)

    @property
    def fingerprint(self) -> str:
        return self.base.fingerprint

    def with_written(self, written: Mapping[str, Written]) -> Overlay:
        """With tensors that a step has made in place of those of the same names, or beside them."""
        return Overlay(self.base, self.names, {**self.written, **written})

    def moved(self, places: Mapping[str, str]) -> Overlay:
        """Exactly the tensors that `places` names, each lying where the one of its second name lies now; no byte is touched."""
        written = {n: replace(w, spec=replace(w.spec, name=n)) for n, s in places.items() if (w := self.written.get(s))}
        return Overlay(self.base, {n: self.names[s] for n, s in places.items() if s in self.names}, written)
