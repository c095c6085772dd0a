"""The names of tensors in a checkpoint, and a graph held against what a checkpoint really has.

A checkpoint may name its tensors otherwise than the module tree does: as an older version wrote them, with the name of the model
without a head in front or not, with experts one by one. transformers has a table of all that, by which it loads and saves; it is
asked here, so that what we read is what it would read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from compress.errors import ModelError
from compress.state.checkpoint import Checkpoint
from compress.state.graph import Graph, Site

PACKED = re.compile(r"\.weight_(packed|shape)$")  # what a packed matrix has in place of its weight
JOINS = (MergeModulelist, Concatenate)  # what makes one tensor of the matrices of experts
EXPERTS = ("gate_proj", "up_proj", "down_proj")
# What a layer that predicts further tokens has, and no other: it joins a hidden state with the next token's embedding.
PREDICTS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|mtp|mtp_\w+)\.")
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


class Names:
    """How transformers names the tensors of a checkpoint in a module tree, and how it would write them."""

    def __init__(self, model: nn.Module):
        loading, saving = ([], []) if not isinstance(model, PreTrainedModel) else (
            get_model_conversion_mapping(model), get_model_conversion_mapping(model, add_legacy=False))  # fmt: skip
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        self.tree = model.state_dict()
        self.renamings = [step for step in loading if isinstance(step, WeightRenaming)]
        self.converters = [step for step in loading if isinstance(step, WeightConverter)]
        self.makers = {source: step for step in self.converters for source in step.source_patterns}
        self.reversed: list[Any] = [step.reverse_transform() for step in reversed(saving)
                         if isinstance(step, WeightRenaming) and not isinstance(step, PrefixChange)]  # fmt: skip

    def on_disk(self, name: str) -> str:
        """The name that `save_pretrained` gives to a tensor of the tree, or to the matrix of one expert."""
        return str(apply_renamings(name, self.reversed))

    def in_tree(self, name: str) -> str | None:
        """The name in the tree of a tensor on disk; None where transformers remakes it, as one that it cuts in three.

        The matrix of one expert has the name that it would have if the tree held it by itself.
        """
        target, source = self._renamed(name, self.renamings, self.converters)
        if target not in self.tree and name in self.tree:
            target, source = self._renamed(name, [], [])
        if source is None:
            return target
        if not all(isinstance(operation, JOINS) for operation in self.makers[source].operations):
            return None
        plain = str(apply_renamings(name, self.renamings))
        joined, _ = rename_source_key(plain, [], self.converters)
        if target == f"{self.prefix}.{joined}":
            return f"{self.prefix}.{plain}"
        return plain.removeprefix(f"{self.prefix}.") if joined == f"{self.prefix}.{target}" else plain

    def _renamed(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, self.prefix, self.tree)
        return found

    @cached_property
    def experts(self) -> tuple[str, str, str]:
        """What checkpoints call gate, up and down of one expert."""
        found: dict[str, list[str]] = {}
        for step in self.converters:
            if all(isinstance(operation, JOINS) for operation in step.operations):
                apart = [source.split(".")[-2] for source in step.source_patterns if source.endswith(".weight")]
                found[step.target_patterns[0].rpartition(".")[2]] = apart
        two, one = found.get("gate_up_proj", []), found.get("down_proj", [])
        return (two[0], two[1], one[0]) if (len(two), len(one)) == (2, 1) else EXPERTS

    def loads(self, name: str) -> bool:
        """Whether transformers makes anything of a tensor on disk."""
        return name in self.tree or self._renamed(name, self.renamings, self.converters)[0] in self.tree

    def remade(self, held: Iterable[str]) -> set[str]:
        """The tensors of the tree that transformers makes out of others on disk, unless it only joins those of experts."""
        found = set()
        for name in held:
            if self.in_tree(name) is None:
                target, source = self._renamed(name, self.renamings, self.converters)
                ends = self.makers[str(source)].target_patterns
                found |= {target.replace(ends[0], end) for end in ends}
        return found

    def places(self, held: Iterable[str]) -> dict[str, str]:
        """Name in the tree -> name on disk, of the tensors `held` on disk; a packed matrix under the names that it has dense."""
        plain = sorted({PACKED.sub(".weight", name) for name in held}, key=dot_natural_key)  # the order in which they are loaded
        found = {self.in_tree(name): name for name in plain}
        return {path: name for path, name in found.items() if path is not None}


def places(model: nn.Module, held: Iterable[str]) -> dict[str, str]:
    """Name in a module tree -> name on disk, of the tensors `held` on disk."""
    return Names(model).places(held)


def held(site: Site, found: Mapping[str, str]) -> str | None:
    """The name under which a checkpoint holds a site's matrix, dense or packed; None where it is in no tensor of its own."""
    paths = [f"{path}.weight" for path in (site.module, *site.aliases)]
    if site.expert is not None:
        paths = [f"{site.module}.{site.expert}.{site.stem.rpartition('.')[2]}.weight"]
    return next((found[path] for path in paths if path in found), None)


def anchor(graph: Graph, checkpoint: Checkpoint, model: nn.Module) -> Graph:
    """The graph of a skeleton with every name as this checkpoint writes it; what is not there is a ModelError."""
    names = Names(model)
    found, remade = names.places(checkpoint.specs), names.remade(checkpoint.specs)
    check_layers(graph, checkpoint, model)
    sites = {site.name: replace(site, weight=held(site, found) or site.weight) for site in graph}
    missing = {p: s.weight for s in graph for p in [absent(s, found, remade)] if p is not None}
    parameters: dict[str, tuple[int, ...]] = {}
    for paths in same_parameters(model):
        name = next((name for name in map(names.on_disk, paths) if name in graph.parameters), None)
        there = next((found[path] for path in paths if path in found and found[path] in checkpoint), None)
        if name is not None and there is not None:
            parameters[there] = graph.parameters[name]
        elif name is not None and remade.isdisjoint(paths):  # what is remade is none of ours, and lies there as something else
            missing[paths[0]] = name
    for path in sorted(missing.keys() & remade):
        raise ModelError(f"{checkpoint.folder}: transformers makes '{path}' of tensors of another layout while it loads them, "
                         "and this layout is not read here")  # fmt: skip
    if missing:
        raise ModelError(f"{checkpoint.folder}: the config asks for '{next(iter(missing.values()))}', which the weights do not "
                         f"hold ({len(missing)} tensors missing); config and weights do not belong together")  # fmt: skip
    return replace(graph, sites=sites, parameters=parameters)


def absent(site: Site, found: Mapping[str, str], remade: set[str]) -> str | None:
    """The path in the tree of a matrix that a checkpoint holds nowhere, or has to be remade; None where it is there."""
    if held(site, found) is not None or site.tied:
        return None
    if site.expert is None:
        return f"{site.module}.weight"
    if site.joined in remade:
        return site.joined
    return None if found.get(site.joined) == site.joined else f"{site.module}.{site.expert}.{site.role}"


def same_parameters(model: nn.Module) -> list[list[str]]:
    """The paths of every parameter; one that is tied has several."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    return list(paths.values())


# --- what transformers does not load ----------------------------------------------------------------------------------


def check_layers(graph: Graph, checkpoint: Checkpoint, model: nn.Module) -> None:
    """ModelError where the weights hold a layer more than the config says, unless it is one that predicts further tokens."""
    count, beyond = len(graph.blocks), layers_beyond(graph, checkpoint.specs, model)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = sum(n for n in (getattr(text, key, 0) for key in COUNTS) if type(n) is int)
    for number, names in beyond.items():
        if number >= count + told and not any(PREDICTS.search(f".{name}") or passed_by(name, model) for name in names):
            raise ModelError(f"{checkpoint.folder}: the weights hold '{names[0]}', the config has only {count} layers; config "
                             "and weights do not belong together")  # fmt: skip


def layers_beyond(graph: Graph, held: Iterable[str], model: nn.Module) -> dict[int, list[str]]:
    """Number -> names on disk of the layers that lie behind the last."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    stacks = {block.module.rpartition(".")[0].removeprefix(f"{prefix}.") for block in graph.blocks}
    stacks |= {site.weight.partition(f".{site.block}.")[0].removeprefix(f"{prefix}.") for site in graph.linear}
    pattern = re.compile(rf"(?:{re.escape(prefix)}\.)?(?:{'|'.join(map(re.escape, sorted(stacks)))})\.(\d+)\.", re.ASCII)
    found: dict[int, list[str]] = {}
    for name in held:
        match = pattern.match(name)
        if match and int(match[1]) >= len(graph.blocks):
            found.setdefault(int(match[1]), []).append(name)
    return found


def passed_by(name: str, model: nn.Module) -> bool:
    """Whether a model's class says of a tensor that it is to be passed over when the model is loaded."""
    return any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def passed_over(held: Iterable[str], model: nn.Module) -> list[str]:
    """The tensors on disk that transformers does not load, such as those of layers that predict further tokens."""
    names, buffers = Names(model), {path for path, _ in model.named_buffers()}
    return [name for name in held if not names.loads(name) and names.in_tree(name) not in buffers]


# --- shapes -----------------------------------------------------------------------------------------------------------


def check_tensors(graph: Graph, checkpoint: Checkpoint, artifact: bool = False) -> None:
    """ModelError where a tensor's shape contradicts the config, or its dtype is none that we can compress. Codes of an artifact,
    which scales lie beside, are its reader's business."""
    wanted: dict[str, tuple[int, ...]] = {
        s.weight: (s.shape[::-1] if s.transposed else s.shape)
        for s in graph
        if s.weight in checkpoint and not (artifact and f"{s.stem}.weight_scale" in checkpoint)
    }
    wanted |= {s.joined: joined_shape(s, graph) for s in graph if s.expert == 0 and s.joined in checkpoint}
    for name, shape in (wanted | {n: s for n, s in graph.parameters.items() if n in checkpoint}).items():
        spec = checkpoint.specs[name]
        if spec.shape != tuple(shape):
            raise ModelError(f"{checkpoint.files[name]}: '{name}' is {list(spec.shape)}, the config says {list(shape)}; "
                             "config and weights do not belong together")  # fmt: skip
        if spec.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ModelError(f"{checkpoint.files[name]}: '{name}' is {str(spec.dtype)[6:]}; needs bf16, fp16 or fp32 weights "
                             "(is this model quantized already?)")  # fmt: skip


def joined_shape(site: Site, graph: Graph) -> tuple[int, int, int]:
    """The shape of the tensor that holds the matrices of all experts, one of which is given."""
    rows, columns = site.shape
    count = sum(other.role == site.role and other.module == site.module for other in graph)
    return count, rows if site.role == "down" else 2 * rows, columns
