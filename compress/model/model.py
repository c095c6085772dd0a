"""The adapter to transformers: open a model, and read its structure off a skeleton without weights.

A skeleton is the architecture built from its config with every parameter on the meta device and every buffer real (rotary
frequencies and the like are computed, not stored). The graph is found by walking it: the one list of equal modules that
holds the matrices is the list of blocks, and a table of path endings says what each matrix is. The alternative, a hand-written
description per architecture, ages with every new model; the table ages only when somebody invents a new name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from compress.documents import local_path, one_line
from compress.errors import MatchError, ModelError, first_line, nearest
from compress.model.config import believed, checked_config, rehearse
from compress.model.custom import code_passed_over, refuse_code
from compress.model.discover import discover
from compress.model.gguf_source import Say, Source, silent, source_of
from compress.model.names import anchor, check_tensors, held, passed_over, places
from compress.model.skeleton import glance, is_matrix
from compress.state import State
from compress.state.checkpoint import INDEX, SINGLE, Checkpoint, Spec, within
from compress.state.graph import Graph
from compress.state.overlay import Bare, Overlay

HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Model:
    """An opened model: its folder and config; weights stay on disk. declared: the config's values as config.json has them, where
    `config` has others because the weights say so. source_remarks: what to know of where the weights come from. leave: patterns
    of modules whose matrices are no sites, see `discover`."""

    folder: Path
    config: Any
    name: str
    revision: str | None = None
    declared: dict[str, Any] = field(default_factory=dict, compare=False)
    source_remarks: tuple[str, ...] = field(default=(), compare=False)
    leave: tuple[str, ...] | None = ()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @property
    def scale_dtype(self) -> torch.dtype:
        """What scales are stored in: fp16 in an fp16 model, else bf16."""
        return torch.float16 if self.dtype == torch.float16 else torch.bfloat16

    @property
    def has_weights(self) -> bool:
        return any(self.folder.glob("*.safetensors"))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in: the config's, or that of the first matrix on disk."""
        declared = getattr(self.config, "dtype", None)
        if isinstance(declared, torch.dtype):
            return declared
        if self.has_weights:
            floating = (s.dtype for s in self.checkpoint.specs.values() if s.dtype.is_floating_point)
            return next(floating, torch.float32)
        return torch.bfloat16

    @cached_property
    def graph(self) -> Graph:
        model, graph = structure(self.config, self.folder, self.leave)
        check_leave(self.leave or (), graph, model)
        if self.has_weights:
            graph = anchor(graph, self.checkpoint, model)
            check_tensors(graph, self.checkpoint, self.leave is None)
        return graph

    @cached_property
    def remarks(self) -> list[str]:
        """What to know of the model: what of it is not compressed, or not even loaded."""
        found = [*self.source_remarks, *code_passed_over(self.folder)]
        odd = [path for path in self.graph.left if not any(fnmatchcase(path, pattern) for pattern in self.leave or ())]
        if odd:
            found.append(f"{self.folder}: {len(odd)} modules of experts, the first '{odd[0]}', keep them in a layout that is not "
                         "compressed (transposed, or with biases); they stay as they are")  # fmt: skip
        source = self.has_weights and self.leave is not None  # an artifact has names of its own
        extra = passed_over(self.checkpoint.specs, glance(self.config)) if source else []
        if extra:
            found.append(f"{self.folder}: {len(extra)} tensors, the first '{extra[0]}', are none that transformers loads, such "
                         "as those of a layer that predicts further tokens; they go along unchanged into artifacts of "
                         "safetensors, and not into gguf and onnx")  # fmt: skip
        return found

    @cached_property
    def specs(self) -> list[Spec]:
        """Every tensor of the checkpoint in its own order; without weights, what transformers would write for the config."""
        if self.has_weights:
            return list(self.checkpoint.specs.values())
        graph = self.graph
        sites = [Spec(s.weight, self.dtype, s.shape[::-1] if s.transposed else s.shape) for s in graph if not s.tied]
        others = [Spec(n, self.dtype, shape) for n, shape in graph.parameters.items()]
        return [*sites[:1], *others, *sites[1:]]  # the embedding comes first

    @property
    def state(self) -> State:
        """The state before any pass; ModelError where the model is quantized already."""
        quantized = getattr(self.config, "quantization_config", None)
        if quantized:
            known = quantized if isinstance(quantized, dict) else vars(quantized)
            method = one_line(str(known.get("quant_method", "?")), 60)
            raise ModelError(f"{self.folder}: is quantized already ({method}); name the original model")
        return State(self.graph, self.config, self.dtype, tuple(self.specs), Overlay(self.checkpoint))

    @property
    def bare(self) -> State:
        """The same of a config alone, for what is foreseen: there are names and shapes, and nothing can be read."""
        return State(self.graph, self.config, self.dtype, tuple(self.specs), Overlay(Bare(self.folder, self.specs)))

    def identity(self) -> dict[str, str]:
        """What makes two models the same, wherever they lie: config and weights by hash."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        found = {"config": json.dumps(config, sort_keys=True, default=str), "weights": self.checkpoint.fingerprint}
        return found | ({"leave": json.dumps(self.leave)} if self.leave else {})


def open_model(name: str, base: Path = Path(), say: Say = silent, leave: Sequence[str] | None = ()) -> Model:
    """A local folder (or its config.json), a GGUF file, or a hub id, optionally ``id@revision``.

    A relative path is looked up from `base`; `say` is told what takes long. `leave`: see `discover`; None where nothing is to be
    compressed. Raises ModelError when nothing is there or the config cannot be read.
    """
    source = source_of(name, base, say) or Source(*folder_of(name, base))
    folder = source.folder
    path = folder / "config.json"
    if not path.exists():
        files = sorted(folder.glob("*.gguf"))
        todo = f"name the GGUF file, {files[0]}" if files else "is this the folder of a transformers model?"
        raise ModelError(f"{folder}: no config.json; {todo}")
    within(folder, path)
    refuse_code(path)
    checked_config(path)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises whatever the config's author's code raises
        raise ModelError(f"{path}: transformers cannot read it ({first_line(e)})") from e
    rehearse(lambda: glance(config), path)
    leave = None if leave is None else tuple(leave)
    return Model(folder, as_stored(config, folder), name, source.revision, config.to_dict(), source.remarks, leave)


def structure(config: Any, folder: Path, leave: Sequence[str] | None) -> tuple[nn.Module, Graph]:
    """The skeleton and the graph of a config's architecture; a ModelError that names the config where it gives none."""
    with believed(folder / "config.json", "no model can be made of it"):
        model = glance(config)
        return model, discover(model, config, leave)


def check_leave(leave: Sequence[str], graph: Graph, model: nn.Module) -> None:
    """MatchError for a pattern that leaves nothing."""
    for pattern in leave:
        if not any(fnmatchcase(path, pattern) for path in graph.left):
            stacks = tuple(f"{block.module}." for block in graph.blocks[:1])
            known = [p for p, m in model.named_modules() if p.startswith(stacks) and is_matrix(m)]
            near = nearest(pattern, known) or next(iter(known), "")
            raise MatchError(f"leave: pattern '{pattern}' matched no matrix in a layer.  Nearest: '{near}'")


def as_stored(config: Any, folder: Path) -> Any:
    """The config, untied where it says that embedding and head are one matrix and the weights hold another head.

    transformers goes by the weights then, other engines by the config, so from here on the config says it.
    """
    text = config.get_text_config()
    if not getattr(text, "tie_word_embeddings", False) or not any((folder / name).exists() for name in (INDEX, SINGLE)):
        return config
    (model, graph), checkpoint = structure(config, folder, None), Checkpoint(folder)
    if "lm_head" not in graph.sites or not graph["lm_head"].tied:
        return config
    there = places(model, checkpoint.specs)
    embed, head = (held(graph[name], there) for name in ("embed", "lm_head"))
    if embed is None or head is None or embed == head or same_bytes(checkpoint, embed, head):
        return config
    config = deepcopy(config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same."""
    a, b = checkpoint.read(one), checkpoint.read(other)
    return a.dtype == b.dtype and torch.equal(a, b)


def folder_of(name: str, base: Path) -> tuple[Path, str | None]:
    """The folder that a model's name stands for, and the revision where it came from the hub."""
    try:
        folder = base / local_path(name)
        folder = folder.parent if folder.name == "config.json" else folder
        return (folder, None) if folder.is_dir() else download(name, folder)
    except OSError as e:
        raise ModelError(f"model '{name}': {e.strerror}") from None
    except ValueError as e:
        raise e if isinstance(e, ModelError) else ModelError(f"model {e}") from None


def download(name: str, folder: Path) -> tuple[Path, str]:
    """Fetch a hub id into the hub's cache; the commit it resolved to is the revision."""
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"model '{name}': no folder {folder}, and no hub id either (owner/name or owner/name@revision)")
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        path = Path(snapshot_download(repo, revision=revision or None,
                                      allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken",
                                                      "LICENSE*", "NOTICE*", "USE_POLICY*"]))  # fmt: skip
    except Exception as e:  # network, authorisation, absent: the hub's own words are the best we have
        raise ModelError(f"model '{name}': no folder {folder}, and the hub says: {first_line(e)}") from e
    return path, path.name
