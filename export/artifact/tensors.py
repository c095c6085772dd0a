"""From a state to the tensors of an artifact, back again, and the comparison of the two: what all exporters have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.errors import ExportError, ModelError
from compress.formats import Dense, Format, LowRank, Packed
from compress.model.model import Model
from compress.state import State, Stored
from compress.state.checkpoint import Checkpoint, tensor_bytes
from compress.state.graph import Site

# --- what is written -------------------------------------------------------------------------------------------------


def formats_of(state: State) -> dict[str, Format]:
    return dict(state.plan.formats) if state.plan else {}


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `entries`, one at a time."""
    held: tuple[str, dict[str, torch.Tensor]] = ("", {})
    for spec, site, suffix in state.entries():
        if site is None:
            yield spec.name, state.checkpoint.read(spec.name)
            continue
        if held[0] != site.name:
            stored = state.changed.get(site.name)
            held = site.name, dict(stored.load().tensors) if stored else {"weight": state.original(site)}
        tensor = held[1][suffix]
        yield spec.name, tensor.T.contiguous() if site.transposed and suffix == "weight" else tensor


def write_config(model: Model, folder: Path, quantization: dict[str, Any]) -> None:
    """The source's config.json with a `quantization_config`; and the dtype, lest it be guessed from what are now scales."""
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = str(model.dtype)[6:]
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- reading it back -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed(Stored):
    """A site in an artifact: its tensors under names of their own, in whatever files the checkpoint has them."""

    checkpoint: Checkpoint = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    flipped: bool = False

    @classmethod
    def of(
        cls, site: Site, fmt: Format, checkpoint: Checkpoint, names: Mapping[str, str], scale_dtype: torch.dtype | None = None
    ) -> Placed:
        """The tensors `names`, by suffix. ModelError where one is missing or has another shape than the format says, or, where
        a `scale_dtype` is given, another dtype."""
        flipped = site.transposed and isinstance(fmt, Dense)
        for suffix, (dtype, shape) in fmt.tensors(site.shape, scale_dtype or torch.bfloat16).items():
            spec, shape = checkpoint.specs.get(names[suffix]), shape[::-1] if flipped else shape
            if spec is None or spec.shape != shape or (scale_dtype is not None and spec.dtype != dtype):
                found = "missing" if spec is None else text_of(spec.dtype, spec.shape)
                raise ModelError(f"{checkpoint.folder}: '{names[suffix]}' is {found}, {fmt} needs {text_of(dtype, shape)}; "
                                 "config and weights do not belong together")  # fmt: skip
        path = checkpoint.files[next(iter(names.values()))]
        return cls(path, f"{site.stem}.", fmt, site.shape, checkpoint, names, flipped)

    def load(self) -> Packed:
        found = {suffix: self.checkpoint.read(name) for suffix, name in self.names.items()}
        for suffix, shape in self._sides().items():
            if suffix in found and tuple(found[suffix].tolist()) != shape:
                raise ModelError(f"{self.path}: '{self.names[suffix]}' says {found[suffix].tolist()}, the config {list(shape)}; "
                                 "the file is damaged")  # fmt: skip
        if self.flipped:
            found["weight"] = found["weight"].T.contiguous()
        return Packed(self.format, self.shape, found)

    def _sides(self) -> dict[str, tuple[int, int]]:
        sides = {"weight_shape": self.shape}
        if isinstance(self.format, LowRank):
            rank, (n, k) = self.format.rank, self.shape
            sides |= {"lora_A.weight_shape": (rank, k), "lora_B.weight_shape": (rank, n)}
        return sides


def text_of(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype)[6:]} {list(shape)}"


# --- proving it ------------------------------------------------------------------------------------------------------


def same_tensors(wanted: State, written: State) -> None:
    """ExportError naming the first site whose codes, or other tensor whose bytes, are not on disk as they should be."""
    for name, stored in wanted.changed.items():
        same_site(name, stored, written)
    before, after = wanted.checkpoint, written.checkpoint
    formats = formats_of(wanted)
    sites = [wanted.graph[n] for n in formats]
    replaced = {s.weight for s in sites} | {s.joined for s in sites if s.expert is not None}
    for name in before.specs:
        if name not in replaced and (name not in after or tensor_bytes(before.read(name)) != tensor_bytes(after.read(name))):
            raise ExportError(f"'{name}' on disk differs from the source's; please report this")
    for site in wanted.graph:  # an expert that stays as it is, beside others, is written apart from them
        alone = site.expert is not None and site.name not in formats and site.joined in replaced & before.specs.keys()
        if alone and not torch.equal(wanted.original(site), written.original(written.graph[site.name])):
            raise ExportError(f"'{site.weight}' on disk differs from the source's; please report this")


def same_site(name: str, stored: Stored, written: State) -> None:
    """ExportError unless a site's tensors, and what they stand for, are on disk."""
    ours, theirs = stored.load().tensors, {}
    if isinstance(stored.format, Dense):
        theirs = {"weight": written.original(written.graph[name])}
    elif name in written.changed:
        theirs = dict(written.changed[name].load().tensors)
    for suffix, tensor in ours.items():
        if suffix not in theirs or not torch.equal(tensor, theirs[suffix]):
            raise ExportError(f"'{name}': {suffix} on disk differs from the run's; please report this")
    found = written.format(written.graph[name])
    if found != stored.format and not isinstance(stored.format, Dense):
        raise ExportError(f"'{name}' is {stored.format}, what is on disk says {found}; please report this")
