"""From a state to the tensors of an artifact, back again, and the comparison of the two: what all exporters have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.errors import ExportError
from compress.export.artifact import checks
from compress.export.artifact.exporter import Job
from compress.formats import Dense, Format, Packed
from compress.model.model import Model
from compress.state import Fact, State, Stored
from compress.state.checkpoint import Checkpoint, tensor_bytes
from compress.state.graph import Site
from compress.state.overlay import Overlay
from compress.state.state import Promised

# --- what is written -------------------------------------------------------------------------------------------------


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `entries`, one at a time."""
    held: tuple[str, dict[str, torch.Tensor]] = ("", {})
    for spec, site, suffix in state.entries():
        if site is None:
            yield spec.name, state.dense.read_finite(spec.name)
            continue
        if held[0] != site.name:
            stored = state.codes.get(site.name)
            held = site.name, dict(stored.load().tensors) if stored else {"weight": state.reference(site)}
        tensor = held[1][suffix]
        dense = isinstance(state.format(site), Dense | None)
        yield spec.name, tensor.T.contiguous() if site.transposed and dense else tensor


def write_config(job: Job, folder: Path, quantization: dict[str, Any] | None = None) -> None:
    """The config.json of the state: the source's, but for values that passes have changed; a `quantization_config` where there is
    one; and the dtype, lest it be guessed from what are now scales."""
    config = json.loads((job.model.folder / "config.json").read_text(encoding="utf-8"))
    before, after = job.model.declared, job.state.config.to_dict()
    config |= {key: value for key, value in after.items() if key not in before or before[key] != value}
    config = {key: value for key, value in config.items() if key in after or key not in before}
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = str(job.state.dtype)[6:]
    config.pop("auto_map", None)  # a request for code, which does not go along
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- reading it back -------------------------------------------------------------------------------------------------


def state_of(model: Model, codes: Mapping[str, Placed], checkpoint: Checkpoint | None = None) -> State:
    """The state of an artifact that was read: its encoded sites, and all its other tensors dense."""
    held = checkpoint or model.checkpoint
    packed = {name for stored in codes.values() if not isinstance(stored.format, Dense) for name in stored.names.values()}
    specs = tuple(spec for name, spec in held.specs.items() if name not in packed)
    dense = Overlay(held, {spec.name: spec.name for spec in specs})
    return State(model.graph, model.config, model.dtype, specs, dense, codes, facts=Fact.QUANTIZED)


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
        """The tensors `names`, by suffix. ModelError where one is missing or not what the format says. Where no `scale_dtype` is
        given, scales may be of any."""
        flipped = site.transposed and isinstance(fmt, Dense)
        scale = scale_dtype or checks.scale_dtype(checkpoint.specs, names.get("weight_scale", ""))
        wanted = {names[suffix]: (dtype, shape[::-1] if flipped else shape)
                  for suffix, (dtype, shape) in fmt.tensors(site.shape, scale).items()}  # fmt: skip
        checks.require(checkpoint.folder, fmt, wanted, checks.in_specs(checkpoint.specs))
        path = checkpoint.files[next(iter(names.values()))]
        return cls(fmt, site.shape, path, f"{site.stem}.", checkpoint, names, flipped)

    def load(self) -> Packed:
        found = {suffix: self.checkpoint.read(name) for suffix, name in self.names.items()}
        for suffix, side in checks.sides(self.format, self.shape).items():
            checks.require_sides(self.path, self.names[suffix], found[suffix].tolist(), side)
        if self.flipped:
            found["weight"] = found["weight"].T.contiguous()
        return Packed(self.format, self.shape, found)


def bytes_on_disk(model: Model, state: State) -> int:
    """Bytes of the tensors of a model or an artifact, also of those beside its checkpoint, such as an adapter's."""
    beside = {name: stored.checkpoint.specs[name].nbytes for stored in state.codes.values() if isinstance(stored, Placed)
              for name in stored.names.values() if name not in model.checkpoint}  # fmt: skip
    return model.checkpoint.nbytes + sum(beside.values())


# --- proving it ------------------------------------------------------------------------------------------------------


def same_tensors(wanted: State, written: State) -> None:
    """ExportError naming the first site whose codes, or other tensor whose bytes, are not on disk as they should be."""
    for name, stored in wanted.codes.items():
        same_site(name, stored, written)
    before, after = wanted.dense, written.dense
    sites = [wanted.graph[n] for n in wanted.codes]
    replaced = {s.weight for s in sites} | {s.joined for s in sites if s.expert is not None}
    for name in (spec.name for spec in wanted.specs if spec.name not in replaced):
        if name not in after or after.specs[name] != before.specs[name]:
            raise ExportError(f"'{name}' is not on disk with the dtype and shape that the run gave it; please report this")
        if tensor_bytes(before.read(name)) != tensor_bytes(after.read(name)):
            raise ExportError(f"'{name}' on disk differs from the run's; please report this")
    for site in wanted.graph:  # an expert that stays as it is, beside others, is written apart from them
        alone = site.expert is not None and site.name not in wanted.codes and site.joined in replaced & before.specs.keys()
        if alone and not torch.equal(wanted.reference(site), written.reference(written.graph[site.name])):
            raise ExportError(f"'{site.weight}' on disk differs from the source's; please report this")


def same_site(name: str, stored: Promised, written: State) -> None:
    """ExportError unless a site's tensors, and what they stand for, are on disk."""
    ours, theirs = stored.load().tensors, {}
    if isinstance(stored.format, Dense):
        theirs = {"weight": written.reference(written.graph[name])}
    elif name in written.codes:
        theirs = dict(written.codes[name].load().tensors)
    for suffix, tensor in ours.items():
        if suffix not in theirs or not torch.equal(tensor, theirs[suffix]):
            raise ExportError(f"'{name}': {suffix} on disk differs from the run's; please report this")
    found = written.format(written.graph[name])
    if found != stored.format and not isinstance(stored.format, Dense):
        raise ExportError(f"'{name}' is {stored.format}, what is on disk says {found}; please report this")
