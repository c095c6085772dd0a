"""The graph of a model, read off its skeleton.

The one list of equal modules that holds the matrices is the list of blocks, and a table of path endings says what each matrix
is. The alternative, a hand-written description per architecture, ages with every new model; the table ages only when somebody
invents a new name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import MatchError, ModelError
from compress.model.names import Names
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
    "q_a_proj": "q_a", "q_b_proj": "q_b", "kv_a_proj_with_mqa": "kv_a", "kv_b_proj": "kv_b",
    "attn.Wo": "o", "mlp.Wi": "gate_up", "mlp.Wo": "down",
    "linear_attn.in_proj_qkvz": "qkv", "linear_attn.in_proj_qkv": "qkv", "linear_attn.in_proj_z": "z",
    "q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o", "ffn.lin1": "up", "ffn.lin2": "down",
    "self.query_proj": "q", "self.key_proj": "k", "self.value_proj": "v",
}  # fmt: skip
# These choose experts, or set the gates and the pace of a linear attention: a few rows that much hangs on. They stay as they are.
STEERING = ("router", "shared_expert_gate", "in_proj_ba", "in_proj_a", "in_proj_b")
ORDER = ("q", "k", "v", "qkv", "z", "q_a", "kv_a", "q_b", "kv_b", "o", "gate", "up", "gate_up", "down")
INPUTS = {"q": "attn.in", "k": "attn.in", "v": "attn.in", "qkv": "attn.in", "o": "attn.out",
          "z": "attn.in", "q_a": "attn.in", "kv_a": "attn.in", "q_b": "attn.q", "kv_b": "attn.kv",
          "gate": "mlp.in", "up": "mlp.in", "gate_up": "mlp.in", "down": "mlp.mid"}  # fmt: skip


STAGES = ("attn.in", "attn.q", "attn.kv", "attn.out", "mlp.in", "mlp.mid")  # in the order in which a block comes to them


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of repeated layers: the outermost ModuleList that holds most of the matrices."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    counted = [(sum(is_matrix(x) or is_experts(x) for x in m.modules()), path, m) for path, m in lists]
    if not counted or max(counted, key=lambda c: c[0])[0] == 0:
        raise ModelError(f"{type(model).__name__}: found no list of layers with Linear or Conv1D modules; "
                         "this architecture cannot be read")  # fmt: skip
    _, path, blocks = max(counted, key=lambda c: (c[0], -len(c[1])))
    return path, blocks


def language_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The same of the language model within: the innermost model that looks tokens up. A vision tower may have more layers."""
    try:
        embed = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embed = None
    whole = [(p, m) for p, m in model.named_modules() if isinstance(m, PreTrainedModel) and any(x is embed for x in m.modules())]
    for path, inner in sorted(whole, key=lambda found: -found[0].count(".") if found[0] else 1):
        if any(isinstance(m, nn.ModuleList) and any(map(is_matrix, m.modules())) for m in inner.modules()):
            below, blocks = find_blocks(inner)
            return f"{path}.{below}" if path else below, blocks
    return find_blocks(model)


def discover(model: nn.Module, config: Any, leave: Sequence[str] | None = ()) -> Graph:
    """Every site of a skeleton, with names as transformers' own `save_pretrained` would write them.

    leave: patterns of module paths whose matrices are to be no sites. A matrix in a block that cannot be told is an error; with
    None, as where nothing is to be compressed, it is left as well.
    """
    path, blocks = language_blocks(model)
    check_stack(model, config, blocks)
    names, found = Names(model), Found(leave)
    sites: dict[str, Site] = {}
    owners: dict[int | str, str] = {}
    table: list[Block] = []
    for i, block in enumerate(blocks):
        here = list(block_sites(f"{path}.{i}", block, i, names, found))
        here.sort(key=lambda s: (s.expert is not None, STAGE[s.role], s.expert or 0, ORDER.index(s.role)))
        found.unknown += [s.module for s in here if not claim(s, model, owners, sites)]
        table.append(Block(i, f"{path}.{i}", tuple(s.name for s in here if s.name in sites)))
    if found.unknown and leave is not None:
        raise ModelError(unnamed(model, path, found.unknown, len(sites)))
    ends = outer_sites(model, path, names)
    sites = {**{s.name: s for s in ends if s.role == "embed"}, **sites, **{s.name: s for s in ends if s.role == "head"}}
    left = tuple(dict.fromkeys([*found.left, *found.unknown]))
    graph = Graph(config.model_type, tuple(table), sites, causal=is_causal(model, config), left=left,
                  leave=None if leave is None else tuple(leave))  # fmt: skip
    return replace(graph, parameters=other_parameters(model, graph, names))


STAGE = {role: STAGES.index(key) for role, key in INPUTS.items()}


@dataclass
class Found:
    """Module paths of matrices that are no sites: `left` by a pattern or since their layout is not read, and `unknown`."""

    leave: Sequence[str] | None
    left: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def leaves(self, path: str) -> bool:
        """Whether a pattern names a module, which is then noted."""
        named = any(fnmatch.fnmatchcase(path, pattern) for pattern in self.leave or ())
        self.left += [path] if named else []
        return named


def check_stack(model: nn.Module, config: Any, blocks: nn.ModuleList) -> None:
    """ModelError for a model that does not pass through one stack of layers, once."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__}: found an encoder and a decoder; only models that are one of the two can be read"
        )
    groups, layers = (getattr(config, name, None) for name in ("num_hidden_groups", "num_hidden_layers"))
    if groups is not None and layers != groups:
        raise ModelError(f"{type(model).__name__}: passes {layers} times through {len(blocks)} set(s) of weights; models that "
                         "share the weights of layers are not read")  # fmt: skip


def unnamed(model: nn.Module, path: str, unknown: Sequence[str], count: int) -> str:
    """What to say of matrices that no table names, with the line of a recipe that leaves them as they are."""
    below = [module.removeprefix(f"{path}.").partition(".")[2] for module in unknown]
    patterns = dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", ending) for ending in below)
    line = ", ".join(f'"*.{pattern}"' for pattern in patterns)
    return (f"{type(model).__name__}: found {count} known matrices but cannot tell what these compute: "
            f"{', '.join(sorted(set(unknown))[:5])}; to keep them as they are, put into the recipe: leave: [{line}]")  # fmt: skip


def is_causal(model: nn.Module, config: Any) -> bool:
    name = type(model).__name__
    marks = ("CausalLM", "LMHead", "ForConditionalGeneration")
    return "MaskedLM" not in name and (any(mark in name for mark in marks) or bool(getattr(config, "is_decoder", 0)))


def role_of(path: str) -> str | None:
    return next((role for ending, role in ROLES.items() if ("." + path).endswith("." + ending)), None)


def block_sites(path: str, block: nn.Module, i: int, names: Names, found: Found) -> Iterator[Site]:
    for inner, module in block.named_modules():
        place = f"{path}.{inner}"
        if is_experts(module):
            if found.leaves(place):
                raise MatchError(f"leave: '{place}' holds experts, which are sites; leave the pattern out, and keep them as they "
                                 f'are by a pin: "layers.{i}.experts.*": bf16')  # fmt: skip
            yield from expert_sites(place, module, i, names)
        elif any(p.ndim == 3 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d):
            if not found.leaves(place):  # experts of another layout are known for what they are, and not touched
                (found.left if has_experts(module) else found.unknown).append(place)
        elif is_matrix(module) and not steers(inner, block):
            role = role_of(inner)
            if found.leaves(place):
                continue
            if role is None:
                found.unknown.append(place)
                continue
            part = "attn" if role in ATTENTION else "mlp"
            yield matrix_site(f"layers.{i}.{part}.{role}", role, module, place, i, names)


def steers(path: str, block: nn.Module) -> bool:
    """Whether a matrix is one of the small ones that are no sites, by its name or as the gate beside experts."""
    above, _, name = path.rpartition(".")
    return path.endswith(STEERING) or (name == "gate" and hasattr(block.get_submodule(above), "experts"))


def has_experts(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of experts in one tensor each, in whatever layout."""
    return {"gate_up_proj", "down_proj"} <= {name for name, _ in module.named_parameters(recurse=False)}


def matrix_site(name: str, role: str, module: nn.Module, path: str, block: int | None, names: Names) -> Site:
    rows, columns = module.weight.shape  # type: ignore[misc]
    flipped = isinstance(module, Conv1D)
    shape = (columns, rows) if flipped else (rows, columns)
    key = INPUTS.get(role, name)
    return Site(name, role, shape, block, key, path, names.on_disk(f"{path}.weight"), transposed=flipped)


def expert_sites(path: str, module: nn.Module, i: int, names: Names) -> Iterator[Site]:
    count, twice, width = module.gate_up_proj.shape  # type: ignore[misc]
    for e in range(count):
        for role, theirs in zip(("gate", "up", "down"), names.experts, strict=True):
            shape = (width, twice // 2) if role == "down" else (twice // 2, width)
            key = f"experts.{e}.{'mid' if role == 'down' else 'in'}"
            weight = names.on_disk(f"{path}.{e}.{theirs}.weight")
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


def outer_sites(model: nn.Module, blocks: str, names: Names) -> list[Site]:
    """The token embedding and the output head; the head is tied where both are one parameter."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embed, nn.Embedding):
        raise ModelError(f"{type(model).__name__}: found layers but no token embedding; this is no language model")
    paths = {id(m): p for p, m in model.named_modules()}
    found = [matrix_site("embed", "embed", embed, paths[id(embed)], None, names)]
    if head is not None:
        site = matrix_site("lm_head", "head", head, paths[id(head)], None, names)
        found.append(replace(site, tied="embed") if head.weight is embed.weight else site)
    return found


def other_parameters(model: nn.Module, graph: Graph, names: Names) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every parameter that is no site's weight; tied ones once."""
    skip = {s.module + ".weight" for s in graph if s.expert is None}
    skip |= {f"{s.module}.{p}" for s in graph if s.expert is not None for p in ("gate_up_proj", "down_proj")}
    named = model.named_parameters()  # removes duplicates: a tied parameter appears under its first name
    return {names.on_disk(n): tuple(p.shape) for n, p in named if n not in skip}
