"""A folder held against what vLLM's loader asks for, where there is no kernel at hand to try it.

Stock transformers on a CPU computes every scheme that we write, so the numbers are proven; but it asks less of a folder than vLLM
does, which joins matrices, has kernels for some shapes only, and fills what it does not find with nothing at all. What it asks
is written down here from its sources (0.32: `create_weights` and `process_weights_after_loading` of each scheme), and read off
the folder alone: config.json, the headers of the weight files, and the scales. Our writer has no say, so it is a second opinion
about it, and takes folders of other tools. `compress inspect FOLDER` prints it.

It says nothing of kernels, which only a GPU can: see `formats/engines.py` for what is expected of those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from compress.errors import ModelError, one_line
from compress.export.artifact import files
from compress.export.artifact.patterns import matches
from compress.state.checkpoint import Spec, read_tensor

FLOATING = (torch.bfloat16, torch.float16, torch.float32)
E4M3, BYTES = torch.float8_e4m3fn, torch.uint8
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM makes one matrix of
CACHED = ("k_scale", "v_scale")
ARGS = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "observer",
        "observer_kwargs", "scale_dtype", "zp_dtype"}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What a layout asks of a matrix [N, K]. weight, dtype, each: the name of its codes, their type, and inputs in one number of
    it. scale: the types that scales may have. group: inputs under one scale, where the layout says so. shared: further scales,
    of which joined matrices have one. multiple: of N, and of K, that kernels want."""

    weight: str
    dtype: torch.dtype
    each: int
    scale: tuple[torch.dtype, ...]
    group: int | None = None
    shared: tuple[str, ...] = ()
    multiple: tuple[int, int] = (1, 1)


LAYOUTS: Mapping[str, Wanted] = {
    "int-quantized": Wanted("weight", torch.int8, 1, FLOATING),
    "float-quantized": Wanted("weight", E4M3, 1, FLOATING, multiple=(16, 16)),
    "nvfp4-pack-quantized": Wanted("weight_packed", BYTES, 2, (E4M3,), 16, ("weight_global_scale",), (16, 16)),
    "mxfp4-pack-quantized": Wanted("weight_packed", BYTES, 2, (BYTES,), 32, (), (16, 32)),
    "mxfp8-quantized": Wanted("weight", E4M3, 1, (BYTES,), 32, (), (16, 32)),
}  # integers that are packed are read by the number of their bits: see `packed`


@dataclass(frozen=True)
class Folder:
    """What is looked at: the config, and every tensor by its name."""

    config: dict[str, Any]
    specs: Mapping[str, Spec]
    paths: Mapping[str, Path]

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.paths[name], name)

    def modules(self) -> list[str]:
        """The modules that have a scale of their weights."""
        return [name.removesuffix(".weight_scale") for name in self.specs if name.endswith(".weight_scale")]


def faults(place: Path, paths: Mapping[str, str] = MappingProxyType({})) -> Iterator[str]:
    """What vLLM would refuse in a compressed-tensors folder, or get wrong in silence; a line each. paths: what a model calls the
    modules that its checkpoint calls otherwise. ModelError where its files cannot be read."""
    config = files.document(place / "config.json").get("quantization_config")
    if not isinstance(config, dict):
        raise ModelError(f"{place / 'config.json'}: has no quantization_config")
    folder = Folder(config, *files.headers(files.plain_files(place)))
    groups = config.get("config_groups")
    groups = groups if isinstance(groups, dict) else {}
    yield from spelling(config, groups)
    found, targets = dict[str, dict[str, Any]](), [(group, Targets.of(group)) for group in groups.values()]
    for module in folder.modules():
        mine = [group for group, named in targets if named.hold(module) or named.hold(paths.get(module, module))]
        if len(mine) != 1:
            yield f"'{module}' is packed, and {len(mine)} groups of the config name it; vLLM takes the first, others another"
        else:
            found[module] = mine[0]
            yield from matrix(folder, module, mine[0])
    yield from joined(folder, found)
    yield from caches(folder)


def spelling(config: dict[str, Any], groups: Mapping[str, Any]) -> Iterator[str]:
    """The config itself: keys, formats, and a cache's scheme."""
    layouts = set()
    for name, group in groups.items():
        layouts.add(group.get("format") or config.get("format"))
        for half in ("weights", "input_activations", "output_activations"):
            unknown = sorted(set(group.get(half) or {}) - ARGS)
            if unknown:
                yield f"{name}: {half} has '{one_line(unknown[0])}', a key that compressed-tensors refuses"
        if not group.get("format"):
            yield f"{name}: has no format of its own; what the library infers for integers with inputs is a byte for each code"
    if len(layouts) > 1 and config.get("format") != "mixed-precision":
        yield f"groups of {len(layouts)} layouts, and the format of all is '{config.get('format')}', not 'mixed-precision'"
    said = config.get("kv_cache_scheme")
    if said and (said.get("type"), said.get("num_bits"), said.get("symmetric")) != ("float", 8, True):
        yield f"kv_cache_scheme: {json.dumps(said)}; vLLM takes symmetric floats of 8 bits only"
    if said and (said.get("dynamic") or said.get("strategy") not in ("tensor", "attn_head")):
        yield "kv_cache_scheme: vLLM takes scales of a tensor or of heads, which are stored"


@dataclass(frozen=True)
class Targets:
    """What a group of the config is for: modules by name, of which models of experts have tens of thousands, and patterns."""

    names: frozenset[str]
    patterns: tuple[str, ...]

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Targets:
        targets = group.get("targets") or []
        return cls(frozenset(targets), tuple(t.removeprefix("re:") for t in targets if t.startswith("re:")))

    def hold(self, module: str) -> bool:
        """Whether a target is a module's name, or a pattern for it, as it stands or under `model`."""
        names = (module, f"model.{module}", module.removeprefix("model."))
        known = "Linear" in self.names or not self.names.isdisjoint(names)
        return known or any(matches(p, n) for p in self.patterns for n in names)


def matrix(folder: Folder, module: str, group: Mapping[str, Any]) -> Iterator[str]:
    """One matrix: the tensors of its layout, their types and shapes, and the numbers in its scales."""
    weights, inputs = group["weights"], group.get("input_activations")
    layout = str(group.get("format") or folder.config.get("format"))
    wanted = packed(weights) if layout == "pack-quantized" else LAYOUTS.get(layout)
    if wanted is None:
        yield f"'{module}': is '{one_line(layout)}', a layout that vLLM does not dispatch"
        return
    codes = folder.specs.get(f"{module}.{wanted.weight}")
    if codes is None or codes.dtype != wanted.dtype or len(codes.shape) != 2:
        yield f"'{module}.{wanted.weight}': is {said(codes)}; '{layout}' wants two dimensions of {name_of(wanted.dtype)}"
        return
    other = f"{module}.{'weight_packed' if wanted.weight == 'weight' else 'weight'}"
    if other in folder.specs:
        yield f"'{other}': lies beside '{wanted.weight}', which is the same matrix; a loader may take either"
    n, k = codes.shape[0], inputs_of(folder, module, codes, wanted, weights)
    if n % wanted.multiple[0] or k % wanted.multiple[1]:
        yield f"'{module}': is {n} x {k}; kernels for '{layout}' want multiples of {wanted.multiple[0]} and {wanted.multiple[1]}"
    size = weights.get("group_size") or wanted.group
    width = k if weights.get("strategy") == "channel" or not size else int(size)
    yield from scale(folder, module, wanted, (n, -(-k // width)))
    measured = wanted.shared and inputs and inputs.get("dynamic") == "local"
    for suffix in (*wanted.shared, *(("input_global_scale",) if measured else ())):
        held = folder.specs.get(f"{module}.{suffix}")
        if held is None or held.dtype != torch.float32 or held.shape not in ((1,), ()):
            yield f"'{module}.{suffix}': is {said(held)}; vLLM wants one number of fp32"


def packed(weights: Mapping[str, Any]) -> Wanted | None:
    """Integers in a stream of bits; `each` is 0, for `weight_shape` says how many there are."""
    return Wanted("weight_packed", torch.int32, 0, FLOATING) if weights.get("type") == "int" else None


def inputs_of(folder: Folder, module: str, codes: Spec, wanted: Wanted, weights: Mapping[str, Any]) -> int:
    """The number of inputs of a matrix."""
    if wanted.each:
        return codes.shape[1] * wanted.each
    if f"{module}.weight_shape" in folder.specs:
        return int(folder.read(f"{module}.weight_shape")[1])
    return codes.shape[1] * 32 // int(weights["num_bits"])


def scale(folder: Folder, module: str, wanted: Wanted, shape: tuple[int, int]) -> Iterator[str]:
    """The scales of groups: type, shape, and that each is a number by which a kernel can multiply."""
    name = f"{module}.weight_scale"
    held = folder.specs[name]
    if held.dtype not in wanted.scale or held.shape != shape:
        types = " or ".join(name_of(dtype) for dtype in wanted.scale)
        yield f"'{name}': is {said(held)}; {list(shape)} of {types} are wanted"
        return
    if held.dtype == BYTES:
        return
    values = folder.read(name).float()
    if not bool(values.isfinite().all()):
        yield f"'{name}': holds what is no number"
    elif wanted.dtype in (E4M3, BYTES) and not bool((values > 0).all()):
        yield f"'{name}': holds a scale that is not above 0, by which some kernels divide"


def joined(folder: Folder, found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Matrices that vLLM joins: of one scheme, all packed or none, and with one global scale, since it takes the largest for
    all."""
    for first in JOINED:
        for module in [m for m in found if m.rpartition(".")[2] in first]:
            stem, _, leaf = module.rpartition(".")
            others = [f"{stem}.{name}" for name in first if name != leaf and known(folder, f"{stem}.{name}")]
            for other in others:
                if other not in found:
                    yield f"'{module}' is packed and '{other}' is not; vLLM joins them"
                elif found[other] is not found[module] and other > module:
                    yield f"'{module}' and '{other}' have different schemes; vLLM joins them"
            yield from unequal(folder, [module, *others]) if leaf == first[0] else ()


def known(folder: Folder, module: str) -> bool:
    return any(f"{module}.{name}" in folder.specs for name in ("weight", "weight_packed"))


def unequal(folder: Folder, modules: list[str]) -> Iterator[str]:
    """Global scales that differ among modules."""
    for suffix in ("weight_global_scale", "input_global_scale"):
        held = {m: float(folder.read(f"{m}.{suffix}").flatten()[0]) for m in modules if f"{m}.{suffix}" in folder.specs}
        if len(set(held.values())) > 1:
            told = ", ".join(f"{m.rpartition('.')[2]} {value:g}" for m, value in held.items())
            yield f"'{modules[0]}': '{suffix}' differs from those it is joined with ({told}); vLLM takes the largest for all"


def caches(folder: Folder) -> Iterator[str]:
    """The scales of a cache: for every attention both, or none where the config asks for none."""
    said_so = bool(folder.config.get("kv_cache_scheme"))
    held = sorted(name for name in folder.specs if name.rpartition(".")[2] in CACHED)
    if held and not said_so:
        yield f"'{held[0]}': the config has no kv_cache_scheme, so vLLM does not use it"
    attentions = sorted({m.group(1) for name in folder.specs if (m := re.match(r"(.+)\.(?:k|qkv)_proj\.weight", name))})
    for path in attentions if said_so else ():
        for suffix in CACHED:
            name = f"{path}.{suffix}"
            if name not in folder.specs:
                yield f"'{name}': is missing; vLLM takes 1, and transformers whatever lies in memory"
                continue
            values = folder.read(name).float()
            if not bool(((values > 0) & values.isfinite()).all()):
                yield f"'{name}': is {values.flatten()[0]:g}; a scale of a cache is a number above 0"


def said(spec: Spec | None) -> str:
    return "missing" if spec is None else f"{name_of(spec.dtype)} {list(spec.shape)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
