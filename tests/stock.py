"""transformers itself, as the other side of a comparison: load a folder, put other weights in, look at what its modules see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compress.state.graph import Graph

EAGER = {"experts_implementation": "eager"}  # the loop over experts; the default groups them, and rounds differently in 16 bits


def load(folder: Path, **options: Any) -> Any:
    """The model as AutoModel loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    masked = "ForMaskedLM" in config.architectures[0]
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any, tokens: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids, use_cache=False).logits for ids in tokens]


@torch.no_grad()
def substitute(model: nn.Module, graph: Graph, matrices: Mapping[str, Tensor]) -> None:
    """Put matrices [out, in], by site name, where the architecture keeps them."""
    for name, matrix in matrices.items():
        site = graph[name]
        for path in (site.module, *site.aliases):
            module: Any = model.get_submodule(path)
            if site.expert is None:
                module.weight.copy_(matrix.T if site.transposed else matrix)
            elif site.role == "down":
                module.down_proj[site.expert] = matrix
            else:
                gate, up = module.gate_up_proj[site.expert].chunk(2)
                (up if site.role == "up" else gate).copy_(matrix)


@torch.no_grad()
def inputs(model: nn.Module, graph: Graph, block: int, ids: Tensor) -> dict[str, dict[int | None, Tensor]]:
    """What the matrices of one block are given, by stage and expert, as hooks on the modules see it."""
    seen: dict[str, dict[int | None, Tensor]] = {}
    hooks = []
    for site in graph.of_block(block):
        hook = hook_of_experts(seen) if site.expert is not None else hook_of(seen, site.stage)
        hooks.append(model.get_submodule(site.module).register_forward_pre_hook(hook))
    model(input_ids=ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    return seen


def hook_of(seen: dict[str, Any], stage: str) -> Any:
    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[stage] = {None: args[0].reshape(-1, args[0].shape[-1]).clone()}

    return note


def hook_of_experts(seen: dict[str, Any]) -> Any:
    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _ = args
        rows = {e: torch.where(chosen == e)[0] for e in range(len(module.down_proj))}
        seen["experts.in"] = {e: hidden[r] for e, r in rows.items()}
        seen["experts.mid"] = {}
        for e, x in seen["experts.in"].items():
            gate, up = (nn.functional.linear(x, w) for w in module.gate_up_proj[e].chunk(2))
            seen["experts.mid"][e] = module.act_fn(gate) * up

    return note
