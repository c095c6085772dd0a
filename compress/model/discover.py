"""The graph of a model, read off its skeleton.

The one list of equal modules that holds the matrices is the list of blocks, and a table of path endings says what each matrix
is. The alternative, a hand-written description per architecture, ages with every new model; the table ages only when somebody
invents a new name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError
from compress.model.names import on_disk
from compress.model.skeleton import is_experts, is_matrix
from compress.state.graph import ATTENTION, Block, Graph, Site

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
EXPERT_NAMES = {"mixtral": ("w1", "w3", "w2")}
EXPERT_DEFAULT = ("gate_proj", "up_proj", "down_proj")


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
