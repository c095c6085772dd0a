"""Bind a State to the parameters of a module tree: which tensor of the checkpoint or of the run belongs to each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.model.names import places
from compress.state import State
from compress.state.graph import Site


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


def get_matrix(module: nn.Module, site: Site) -> Tensor:
    """A copy of the matrix [out, in] that `put_matrix` would write."""
    return matrix_in(holding(module, site), site).detach().clone()


def holding(module: nn.Module, site: Site) -> nn.Parameter:
    """The parameter of a module that `put_matrix` would write to."""
    holder: Any = module
    found: nn.Parameter = (
        holder.weight if site.expert is None else holder.down_proj if site.role == "down" else holder.gate_up_proj
    )
    return found


def matrix_in(whole: Tensor, site: Site) -> Tensor:
    """The view [out, in] of a site's matrix in the parameter that holds it, or in a gradient of that."""
    if site.expert is None:
        return whole.T if site.transposed else whole
    return whole[site.expert] if site.role == "down" else whole[site.expert].chunk(2)[site.role == "up"]


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of the names of tensors that transformers keeps in fp32 where the model computes in 16 bits."""
    always, fp16 = (tuple(getattr(model, f"_keep_in_fp32_modules{s}", None) or ()) for s in ("_strict", ""))
    return {torch.bfloat16: always, torch.float16: always + fp16}.get(dtype, ())


class Binding:
    """Where each parameter of the module tree comes from: a site of the state, or a tensor of the checkpoint. dtype: to give them
    in, whatever they are stored in."""

    def __init__(self, state: State, model: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.precise = kept_in_fp32(model, state.dtype)
        self.places = places(model, state.dense.specs)
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
                module._parameters[name] = nn.Parameter(meta.new_empty(meta.shape, device=device, dtype=self.dtype), False)
                for site in sites:
                    put_matrix(module, site, state.weight(site).to(device, self.dtype))
            elif sites:
                put_matrix(module, sites[0], state.weight(sites[0]).to(device, self.dtype))
            else:
                tensor = self._read(state, *self._names_of(f"{path}.{name}"))
                if tensor is None:
                    raise ModelError(f"{state.dense.folder}: no tensor for '{path}.{name}'; config and weights do not "
                                     "belong together")  # fmt: skip
                module._parameters[name] = nn.Parameter(tensor.to(device), requires_grad=False)

    def load_rows(
        self, state: State, site: Site, module: nn.Module, rows: slice | list[int], matrix: Tensor | None, device: torch.device
    ) -> None:
        """Give a module, one whose parameters all have a row for each output, some of these rows; of `matrix`, where given."""
        for name in list(module._parameters):
            if f"{site.module}.{name}" not in self.meta:
                continue
            if name == "weight":
                found = state.rows(site, rows) if matrix is None else matrix[rows]
            else:
                whole = self._read(state, *self._names_of(f"{site.module}.{name}"))
                assert whole is not None, "what the head needs was found when the graph was made"
                found = whole[rows]
            module._parameters[name] = nn.Parameter(found.to(device, self.dtype), requires_grad=False)

    def _names_of(self, name: str) -> list[str]:
        """All names of a parameter of the module tree; a tied one has several."""
        return [n for n, p in self.meta.items() if p is self.meta[name]]

    def load_buffers(self, state: State, model: nn.Module, at: str = "") -> None:
        """Give a module tree, or the part of it `at` a path, the buffers that the checkpoint holds, such as a router's learnt
        correction of its scores."""
        for path, module in model.named_modules(prefix=at):
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                tensor = self._read(state, f"{path}.{name}")
                if tensor is not None:
                    module._buffers[name] = tensor

    def _read(self, state: State, *names: str) -> Tensor | None:
        """The tensor that the checkpoint holds under one of these names of the module tree, in the dtype to compute in."""
        found = [self.places[name] for name in names if self.places.get(name, "") in state.dense]
        if not found:
            return None
        tensor = state.dense.read_finite(found[0])
        precise = any(part in names[0] for part in self.precise)
        return tensor.to(torch.float32 if precise else self.dtype) if tensor.is_floating_point() else tensor

    def drop(self, path: str, module: nn.Module) -> None:
        for name in list(module._parameters):
            if f"{path}.{name}" in self.meta:
                module._parameters[name] = self.meta[f"{path}.{name}"]
