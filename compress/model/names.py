"""The names of tensors in a checkpoint, and a graph held against what a checkpoint really has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from compress.errors import ModelError
from compress.state.checkpoint import Checkpoint
from compress.state.graph import Graph, Site

# transformers renames these while loading: (ours in the module tree, theirs on disk), per model type.
RENAMES = {"mixtral": ((".mlp.", ".block_sparse_moe."),), "gpt_neox": (("lm_head.", "embed_out."),)}


def on_disk(name: str, family: str) -> str:
    for ours, theirs in RENAMES.get(family, ()):
        name = name.replace(ours, theirs)
    return name


def candidates(name: str, family: str) -> Iterator[str]:
    """The names under which a checkpoint may hold a parameter: new and old naming, with and without the base prefix."""
    ours = name
    for mine, theirs in RENAMES.get(family, ()):
        ours = ours.replace(theirs, mine)
    for form in dict.fromkeys((name, on_disk(name, family), ours)):
        yield form
        yield form.partition(".")[2]
        yield from (f"{prefix}.{form}" for prefix in ("model", "transformer"))


def held(site: Site, family: str, checkpoint: Checkpoint) -> str | None:
    """The name under which a checkpoint holds a site's matrix, dense or packed; None where it is in no tensor of its own."""
    names = (n for own in (site.weight, *(f"{a}.weight" for a in site.aliases)) for n in candidates(own, family))
    return next((n for n in names if n in checkpoint or f"{n}_packed" in checkpoint), None)


def anchor(graph: Graph, checkpoint: Checkpoint) -> Graph:
    """The graph with every name as this checkpoint writes it; a site or tensor that is not there is a ModelError."""
    sites: dict[str, Site] = {}
    missing: list[str] = []
    for site in graph:
        found = held(site, graph.family, checkpoint)
        if found is None and not site.tied and not (site.expert is not None and site.joined in checkpoint):
            missing.append(site.weight)
        sites[site.name] = replace(site, weight=found or site.weight)
    parameters: dict[str, tuple[int, ...]] = {}
    for name, shape in graph.parameters.items():
        found = next((n for n in candidates(name, graph.family) if n in checkpoint), None)
        if found is None:
            missing.append(name)
        parameters[found or name] = shape
    next_layer = f"{graph.blocks[-1].module.rpartition('.')[0]}.{len(graph.blocks)}."
    beyond = next((n for n in checkpoint.specs if n.startswith(next_layer)), None)
    if beyond:
        raise ModelError(f"{checkpoint.folder}: the weights hold '{beyond}', the config has only {len(graph.blocks)} layers; "
                         "config and weights do not belong together")  # fmt: skip
    if missing:
        raise ModelError(f"{checkpoint.folder}: the config asks for '{missing[0]}', which the weights do not hold "
                         f"({len(missing)} tensors missing); config and weights do not belong together")  # fmt: skip
    return replace(graph, sites=sites, parameters=parameters)


def check_tensors(graph: Graph, checkpoint: Checkpoint) -> None:
    """ModelError where a tensor's shape contradicts the config, or its dtype is none that we can compress."""
    wanted = {s.weight: (s.shape[::-1] if s.transposed else s.shape) for s in graph if s.weight in checkpoint}
    for name, shape in (wanted | {n: s for n, s in graph.parameters.items() if n in checkpoint}).items():
        spec = checkpoint.specs[name]
        if spec.shape != tuple(shape):
            raise ModelError(f"{checkpoint.files[name]}: '{name}' is {list(spec.shape)}, the config says {list(shape)}; "
                             "config and weights do not belong together")  # fmt: skip
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ModelError(f"{checkpoint.files[name]}: '{name}' is {str(spec.dtype)[6:]}; needs bf16, fp16 or fp32 weights "
                             "(is this model quantized already?)")  # fmt: skip
