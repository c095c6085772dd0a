"""The scales of a cache in 8 bits, in a compressed-tensors folder: tensors, config, and how they are read back.

Each attention has two more tensors beside its matrices, `k_scale` and `v_scale`: [1] where a layer has one of each, [heads, 1, 1]
where every head has, in the 16 bits that other scales have. The config says `kv_cache_scheme`, once for all layers; that vLLM
leaves some alone is a flag of its own, which stands in serve.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import ExportError, ModelError
from compress.export.artifact import checks
from compress.export.artifact.checks import in_specs
from compress.export.artifact.config import declared
from compress.export.artifact.files import json_of
from compress.export.artifact.schemes import cache_args, cache_in
from compress.formats.caches import CACHE, shape_of
from compress.model.caching import heads_of, scales_of, with_cache
from compress.state import State
from compress.state.checkpoint import Spec

SERVE = "serve.json"
SUFFIXES = {"k": "k_scale", "v": "v_scale"}
SKIP = "--kv-cache-dtype-skip-layers"


def scheme(state: State) -> dict[str, Any]:
    """The `kv_cache_scheme` of a config."""
    return cache_args(state.serving[CACHE]["format"])


def specs(state: State) -> list[Spec]:
    """The tensors of the scales."""
    return [Spec(f"{stem(state, path)}.{SUFFIXES[name]}", state.scale_dtype, shape_of(each[name], state.serving[CACHE]["format"]))
            for path, each in scales_of(state).items() for name in SUFFIXES]  # fmt: skip


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The same with what is in them, in their order."""
    held = [each[name] for each in scales_of(state).values() for name in SUFFIXES]
    for spec, values in zip(specs(state), held, strict=True):
        yield spec.name, torch.tensor(values, dtype=spec.dtype).reshape(spec.shape)


def stem(state: State, path: str) -> str:
    """What a checkpoint calls a module of the tree that holds matrices."""
    site = next(s for s in state.graph if s.module.startswith(f"{path}."))
    return site.stem[: len(site.stem) - len(site.module.removeprefix(path))]


def read(folder: Path, state: State) -> State:
    """The state with the scales that a folder holds, which are no weights; ModelError where they are not as its config says."""
    kind = cache_in(declared(folder), folder / "config.json")
    if kind is None:
        return state
    layers = "full" if SKIP in json_of(folder / SERVE).get("vllm", {}).get("flags", []) else "all"
    names = {path: {name: f"{stem(state, path)}.{suffix}" for name, suffix in SUFFIXES.items()} for path in heads_of(state)}
    scales: dict[str, dict[str, list[float]]] = {}
    there = {spec.name: spec for spec in state.specs}
    for path, n in heads_of(state).items():
        shape = shape_of([1.0] * (n if kind == "fp8:head" else 1), kind)
        checks.require(folder, kind, {name: (state.scale_dtype, shape) for name in names[path].values()}, in_specs(there))
        scales[path] = {name: state.dense.read_finite(held).flatten().tolist() for name, held in names[path].items()}
        if min(x for held in scales[path].values() for x in held) <= 0:
            raise ModelError(f"{folder}: '{path}' has a scale of its cache that is not above 0; the file is damaged")
    own = {name for held in names.values() for name in held.values()}
    specs = tuple(spec for spec in state.specs if spec.name not in own)
    return with_cache(replace(state, specs=specs, dense=state.dense.moved({s.name: s.name for s in specs})), kind, layers, scales)


def same(wanted: State, written: State) -> None:
    """ExportError where a folder holds other scales than were measured."""
    if wanted.serving.get(CACHE) != written.serving.get(CACHE):
        raise ExportError("the scales of the cache on disk are not those that were measured; please report this")


def leave_alone(model: nn.Module, state: State) -> None:
    """Have compressed-tensors' own code leave the caches of some layers alone, as vLLM does by a flag."""
    for path, each in scales_of(state).items():
        if not each["rounded"]:
            model.get_submodule(path).quantization_enabled = False  # type: ignore[assignment]
