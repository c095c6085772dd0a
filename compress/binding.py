"""Bind a State to the parameters of a module tree: which tensor of the checkpoint or of the run belongs to each of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.graph import Site
from compress.model import candidates
from compress.state import State


def within(site: Site, block: str) -> list[str]:
    """The module paths inside a block that hold the site's matrix."""
    return [p for p in (site.module, *site.aliases) if p.startswith(f"{block}.")]


def put_matrix(module: nn.Module, site: Site, matrix: Tensor) -> None:
    """Write a matrix [out, in] where a module keeps it: as it is, transposed, or as rows of a 3-D tensor."""
    if site.expert is None:
        module.weight = nn.Parameter(matrix.T.contiguous() if site.transposed else matrix, requires_grad=False)
    elif site.role == "down":
        module.down_proj.data[site.expert] = matrix  # type: ignore[operator]
    else:
        rows = matrix.shape[0]
        start = rows * (site.role == "up")
        module.gate_up_proj.data[site.expert, start : start + rows] = matrix  # type: ignore[operator]


class Binding:
    """Where each parameter of the module tree comes from: a site of the state, or a tensor of the checkpoint."""

    def __init__(self, state: State, model: nn.Module):
        self.meta = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
        self.sites: dict[str, list[Site]] = {}
        for site in state.graph:
            for path in (site.module, *site.aliases):
                names = ("gate_up_proj", "down_proj") if site.expert is not None else ("weight",)
                for name in names:
                    if site.expert is None or (name == "down_proj") == (site.role == "down"):
                        self.sites.setdefault(f"{path}.{name}", []).append(site)

    def load(self, state: State, path: str, module: nn.Module, device: torch.device) -> None:
        """Give one module (not its children) its parameters."""
        for name in list(module._parameters):
            meta = self.meta.get(f"{path}.{name}")
            if meta is None:
                continue
            sites = self.sites.get(f"{path}.{name}")
            if sites and sites[0].expert is not None:
                module._parameters[name] = nn.Parameter(meta.new_empty(meta.shape, device=device, dtype=state.dtype), False)
                for site in sites:
                    put_matrix(module, site, state.weight(site).to(device))
            elif sites:
                put_matrix(module, sites[0], state.weight(sites[0]).to(device))
            else:
                tensor = self._other(state, f"{path}.{name}", meta)
                module._parameters[name] = nn.Parameter(tensor.to(device, state.dtype), requires_grad=False)

    def _other(self, state: State, name: str, meta: Tensor) -> Tensor:
        twins = [name, *(n for n, p in self.meta.items() if p is meta and n != name)]  # a tied parameter has several names
        for twin in twins:
            for held in candidates(twin, state.graph.family):
                if held in state.checkpoint:
                    return state.checkpoint.read_finite(held)
        raise ModelError(f"{state.checkpoint.folder}: no tensor for '{name}'; config and weights do not belong together")

    def drop(self, path: str, module: nn.Module) -> None:
        for name in list(module._parameters):
            if f"{path}.{name}" in self.meta:
                module._parameters[name] = self.meta[f"{path}.{name}"]
