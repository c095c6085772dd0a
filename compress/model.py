"""The adapter to transformers: open a model, and read its structure off a skeleton without weights.

A skeleton is the architecture built from its config with every parameter on the meta device and every buffer real (rotary
frequencies and the like are computed, not stored). The graph is found by walking it: the one list of equal modules that
holds the matrices is the list of blocks, and a table of path endings says what each matrix is. The alternative, a hand-written
description per architecture, ages with every new model; the table ages only when somebody invents a new name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.checkpoint import Checkpoint, Spec
from compress.errors import ModelError
from compress.graph import ATTENTION, Block, Graph, Site
from compress.state import State

# Path ending -> role. Longer endings come first where one ends with another.
ROLES = {
    "attention.output.dense": "o", "attention.dense": "o", "self_attention.dense": "o", "self_attn.dense": "o",
    "intermediate.dense": "up", "output.dense": "down", "attn.c_attn": "qkv", "attn.Wqkv": "qkv", "attn.c_proj": "o",
    "mlp.c_fc": "up", "mlp.c_proj": "down", "fc_in": "up", "fc_out": "down", "fc1": "up", "fc2": "down",
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o", "qkv_proj": "qkv",
    "query_key_value": "qkv", "self.query": "q", "self.key": "k", "self.value": "v",
    "gate_proj": "gate", "up_proj": "up", "gate_up_proj": "gate_up", "down_proj": "down",
    "dense_h_to_4h": "up", "dense_4h_to_h": "down",
}  # fmt: skip
ROUTERS = ("router", "shared_expert_gate")  # these choose experts, and stay as they are
ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
INPUTS = {"q": "attn.in", "k": "attn.in", "v": "attn.in", "qkv": "attn.in", "o": "attn.out",
          "gate": "mlp.in", "up": "mlp.in", "gate_up": "mlp.in", "down": "mlp.mid"}  # fmt: skip

# transformers renames these while loading: (ours in the module tree, theirs on disk), per model type.
RENAMES = {"mixtral": ((".mlp.", ".block_sparse_moe."),), "gpt_neox": (("lm_head.", "embed_out."),)}
EXPERT_NAMES = {"mixtral": ("w1", "w3", "w2")}
EXPERT_DEFAULT = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    """An opened model: its folder and config; weights stay on disk."""

    folder: Path
    config: Any
    name: str
    revision: str | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

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
        graph = discover(self.skeleton(), self.config)
        if self.has_weights:
            graph = anchor(graph, self.checkpoint)
            check_tensors(graph, self.checkpoint)
        return graph

    def skeleton(self) -> nn.Module:
        return skeleton(self.config)

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
            method = dict(quantized).get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
            raise ModelError(f"{self.folder}: is quantized already ({method}); name the original model")
        return State(self.graph, self.checkpoint, self.dtype, tuple(self.specs))

    def identity(self) -> dict[str, str]:
        """What makes two models the same, wherever they lie: config and weights by hash."""
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        return {"config": json.dumps(config, sort_keys=True, default=str), "weights": self.checkpoint.fingerprint}


def open_model(name: str, base: Path = Path()) -> Model:
    """A local folder (or its config.json), or a hub id, optionally ``id@revision``.

    A relative path is looked up from `base`. Raises ModelError when nothing is there or the config cannot be read.
    """
    folder = (base / name).expanduser()
    folder = folder.parent if folder.name == "config.json" else folder
    revision = None
    if not folder.is_dir():
        folder, revision = download(name, folder)
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder}: no config.json; is this the folder of a transformers model?")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers raises whatever the config's author's code raises
        raise ModelError(f"{path}: transformers cannot read it ({first_line(e)})") from e
    return Model(folder, config, name, revision)


def download(name: str, folder: Path) -> tuple[Path, str]:
    """Fetch a hub id into the hub's cache; the commit it resolved to is the revision."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        raise ModelError(f"model '{name}': no folder {folder}, and no hub id either (owner/name or owner/name@revision)")
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        path = Path(snapshot_download(repo, revision=revision or None,
                                      allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))  # fmt: skip
    except Exception as e:  # network, authorisation, absent: the hub's own words are the best we have
        raise ModelError(f"model '{name}': no folder {folder}, and the hub says: {first_line(e)}") from e
    return path, path.name


def first_line(e: BaseException) -> str:
    """The first non-empty line of an exception's text."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # a heading, with what matters below it
        return " ".join(lines[:2])
    return lines[0] if lines else type(e).__name__


# --- skeleton --------------------------------------------------------------------------------------------------------

_PATCH = threading.Lock()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep real buffers and put every parameter on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    with _PATCH:
        nn.Module.register_parameter = on_meta  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(config: Any) -> Any:
    """The class that the config names, or the causal-LM class of its family."""
    for name in getattr(config, "architectures", None) or []:
        if isinstance(name, str) and hasattr(transformers, name) and not name.endswith("Model"):
            return getattr(transformers, name)
    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise ModelError(f"found architecture '{config.model_type}', which is no language model: transformers has no class "
                         "for it that predicts tokens")  # fmt: skip
    return known[type(config)]


def skeleton(config: Any) -> nn.Module:
    """The architecture in eval mode, parameters on meta; ModelError if transformers cannot build it."""
    cls = model_class(config)
    try:
        with parameters_on_meta():
            model: nn.Module = cls._from_config(deepcopy(config), dtype=torch.float32)
        model.tie_weights()  # type: ignore[operator]
    except Exception as e:
        raise ModelError(f"transformers cannot build {cls.__name__} from this config ({first_line(e)})") from e
    return model.eval().requires_grad_(False)


# --- discovery -------------------------------------------------------------------------------------------------------


def is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_experts(module: nn.Module) -> bool:
    """A module that keeps the matrices of all experts in two parameters [experts, out, in], gate above up, and nothing else."""
    held = dict(module.named_parameters())
    if set(held) != {"gate_up_proj", "down_proj"} or not hasattr(module, "_apply_gate"):
        return False
    joined, down = (tuple(held[name].shape) for name in ("gate_up_proj", "down_proj"))
    return len(down) == 3 and joined == (down[0], 2 * down[2], down[1]) and getattr(module, "is_concatenated", True)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of repeated layers: the outermost ModuleList that holds most of the matrices."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    counted = [(sum(is_matrix(x) or is_experts(x) for x in m.modules()), path, m) for path, m in lists]
    if not counted or max(counted, key=lambda c: c[0])[0] == 0:
        raise ModelError(f"{type(model).__name__}: found no list of layers with Linear or Conv1D modules; "
                         "this architecture cannot be read")  # fmt: skip
    _, path, blocks = max(counted, key=lambda c: (c[0], -len(c[1])))
    return path, blocks


def discover(model: nn.Module, config: Any) -> Graph:
    """Every site of a skeleton, with names as transformers' own `save_pretrained` would write them."""
    path, blocks = find_blocks(model)
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__}: found an encoder and a decoder; only models that are one of the two can be read"
        )
    sites: dict[str, Site] = {}
    owners: dict[int | str, str] = {}
    unknown: list[str] = []
    table: list[Block] = []
    for i, block in enumerate(blocks):
        found = list(block_sites(f"{path}.{i}", block, i, family, unknown))
        found.sort(key=lambda s: (s.expert is not None, INPUT_RANK[s.role], s.expert or 0, ORDER.index(s.role)))
        unknown += [s.module for s in found if not claim(s, model, owners, sites)]
        table.append(Block(i, f"{path}.{i}", tuple(s.name for s in found if s.name in sites)))
    if unknown:
        raise ModelError(f"{type(model).__name__}: found {len(sites)} known matrices but cannot tell what these compute: "
                         f"{', '.join(sorted(set(unknown))[:5])}")  # fmt: skip
    ends = outer_sites(model, path, family)
    sites = {**{s.name: s for s in ends if s.role == "embed"}, **sites, **{s.name: s for s in ends if s.role == "head"}}
    graph = Graph(family, tuple(table), sites, causal=is_causal(model, config))
    return replace(graph, parameters=other_parameters(model, graph, family))


INPUT_RANK = {"q": 0, "k": 0, "v": 0, "qkv": 0, "o": 1, "gate": 2, "up": 2, "gate_up": 2, "down": 3}


def is_causal(model: nn.Module, config: Any) -> bool:
    return "MaskedLM" not in type(model).__name__ and (
        "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ or bool(getattr(config, "is_decoder", 0))
    )


def role_of(path: str) -> str | None:
    return next((role for ending, role in ROLES.items() if ("." + path).endswith("." + ending)), None)


def block_sites(path: str, block: nn.Module, i: int, family: str, unknown: list[str]) -> Iterator[Site]:
    for inner, module in block.named_modules():
        if is_experts(module):
            yield from expert_sites(f"{path}.{inner}", module, i, family)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)):
            unknown.append(f"{path}.{inner}")
        elif is_matrix(module) and not inner.endswith(ROUTERS):
            role = role_of(inner)
            if role is None:
                unknown.append(f"{path}.{inner}")
                continue
            part = "attn" if role in ATTENTION else "mlp"
            yield matrix_site(f"layers.{i}.{part}.{role}", role, module, f"{path}.{inner}", i, family)


def matrix_site(name: str, role: str, module: nn.Module, path: str, block: int | None, family: str) -> Site:
    rows, columns = module.weight.shape  # type: ignore[misc]
    flipped = isinstance(module, Conv1D)
    shape = (columns, rows) if flipped else (rows, columns)
    key = INPUTS.get(role, name)
    return Site(name, role, shape, block, key, path, on_disk(f"{path}.weight", family), transposed=flipped)


def expert_sites(path: str, module: nn.Module, i: int, family: str) -> Iterator[Site]:
    names = EXPERT_NAMES.get(family, EXPERT_DEFAULT)
    count, twice, width = module.gate_up_proj.shape  # type: ignore[misc]
    for e in range(count):
        for role, theirs in zip(("gate", "up", "down"), names, strict=True):
            shape = (width, twice // 2) if role == "down" else (twice // 2, width)
            key = f"experts.{e}.{'mid' if role == 'down' else 'in'}"
            weight = on_disk(f"{path}.{e}.{theirs}.weight", family)
            yield Site(f"layers.{i}.experts.{e}.{role}", role, shape, i, key, path, weight, expert=e)


def claim(site: Site, model: nn.Module, owners: dict[int | str, str], sites: dict[str, Site]) -> bool:
    """Add a site, or an alias to the site that holds the same parameter; False where another matrix has its name."""
    key = site.weight if site.expert is not None else id(model.get_submodule(site.module).weight)
    if key in owners:
        owner = sites[owners[key]]
        sites[owner.name] = replace(owner, aliases=(*owner.aliases, site.module))
    elif site.name in sites:
        return False
    else:
        owners[key], sites[site.name] = site.name, site
    return True


def outer_sites(model: nn.Module, blocks: str, family: str) -> list[Site]:
    """The token embedding and the output head; the head is tied where both are one parameter."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embed, nn.Embedding):
        raise ModelError(f"{type(model).__name__}: found layers but no token embedding; this is no language model")
    paths = {id(m): p for p, m in model.named_modules()}
    found = [matrix_site("embed", "embed", embed, paths[id(embed)], None, family)]
    if head is not None:
        site = matrix_site("lm_head", "head", head, paths[id(head)], None, family)
        found.append(replace(site, tied="embed") if head.weight is embed.weight else site)
    return found


def other_parameters(model: nn.Module, graph: Graph, family: str) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every parameter that is no site's weight; tied ones once."""
    skip = {s.module + ".weight" for s in graph if s.expert is None}
    skip |= {f"{s.module}.{p}" for s in graph if s.expert is not None for p in ("gate_up_proj", "down_proj")}
    named = model.named_parameters()  # removes duplicates: a tied parameter appears under its first name
    return {on_disk(n, family): tuple(p.shape) for n, p in named if n not in skip}


# --- names on disk ---------------------------------------------------------------------------------------------------


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


def anchor(graph: Graph, checkpoint: Checkpoint) -> Graph:
    """The graph with every name as this checkpoint writes it; a site or tensor that is not there is a ModelError."""
    sites: dict[str, Site] = {}
    missing: list[str] = []
    for site in graph:
        names = (n for held in (site.weight, *(f"{a}.weight" for a in site.aliases)) for n in candidates(held, graph.family))
        held = next((n for n in names if n in checkpoint or f"{n}_packed" in checkpoint), None)
        if held is None and not site.tied and not (site.expert is not None and site.joined in checkpoint):
            missing.append(site.weight)
        sites[site.name] = replace(site, weight=held or site.weight)
    parameters: dict[str, tuple[int, ...]] = {}
    for name, shape in graph.parameters.items():
        held = next((n for n in candidates(name, graph.family) if n in checkpoint), None)
        if held is None:
            missing.append(name)
        parameters[held or name] = shape
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
