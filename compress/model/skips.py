"""Neurons and inputs left out where an engine will leave them out: in the block in hand, as a state's sparsity says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.errors import ModelError
from compress.formats import Dense
from compress.formats.sparsity import IN_CONFIGS, Sparsity, activation_of, column_bytes, row_bytes, whole_bytes
from compress.state import State
from compress.state.graph import Site


@contextmanager
def skipping(state: State, index: int, holders: Callable[[Site], Iterable[nn.Module]]) -> Iterator[None]:
    """Inside, the matrices of the block in hand that have a sparsity leave out what they would."""
    with ExitStack() as stack:
        for site in state.graph.of_block(index):
            if site.name in state.sparsity:
                for module in holders(site):
                    stack.enter_context(masked(module, state.sparsity[site.name], state.skips(site)))
        yield


@contextmanager
def masked(module: nn.Module, how: Sparsity, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, one module leaves out inputs, or neurons that it puts out."""

    def inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        y = how.inputs(x, {name: t.to(x.device) for name, t in tensors.items()})
        return ((y, *args[1:]), kwargs) if args else (args, kwargs | {"input": y})

    def outputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        return how.outputs(y, how.active(x, y, {name: t.to(x.device) for name, t in tensors.items()}))

    if how.kind == "teal":
        hook = module.register_forward_pre_hook(inputs, with_kwargs=True)
    else:
        hook = module.register_forward_hook(outputs, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


# --- where neurons are ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mlp:
    """The matrices of one block's MLP. first: what its neurons are chosen by, the gate, or `up` where there is none, or both in
    one (`joined`); up: the other matrix that has a row for each neuron, where there is one; down: the one that has a column."""

    block: int
    first: Site
    up: Site | None
    down: Site
    joined: bool

    @property
    def name(self) -> str:
        return self.down.name.rpartition(".")[0]

    @property
    def neurons(self) -> int:
        return self.down.shape[1]


def mlps(state: State) -> list[Mlp]:
    """The MLP of every block that has one; ModelError for mixtures, of which a token sees few neurons already."""
    found = []
    for block in state.graph.blocks:
        sites = state.graph.of_block(block.index)
        if any(site.expert is not None for site in sites):
            raise ModelError(f"'{state.graph.family}' is a mixture of experts, which sends a token to few neurons already; leave "
                             "'sparsify' out")  # fmt: skip
        mates = {site.role: site for site in sites}
        first = mates.get("gate") or mates.get("gate_up") or mates.get("up")
        if first is None or "down" not in mates:
            continue
        joined = first.role == "gate_up"
        if first.shape[0] != mates["down"].shape[1] * (1 + joined):
            raise ModelError(f"'{first.name}' has {first.shape[0]} rows for {mates['down'].shape[1]} neurons")
        found.append(Mlp(block.index, first, mates["up"] if first.role == "gate" else None, mates["down"], joined))
    if not found:
        raise ModelError(f"'{state.graph.family}' has no MLP of matrices that are known here")
    return found


def activation(state: State) -> str:
    """What stands behind the first matrix of an MLP, as a key of `ACTIVATIONS`; ModelError for what is not known here."""
    said = activation_of(state.config)
    if said not in IN_CONFIGS:
        known = ", ".join(IN_CONFIGS)
        raise ModelError(f"'{state.graph.family}' has the activation '{said}', which is not known here; known: {known}")
    return IN_CONFIGS[said]


# --- what is read for a token -----------------------------------------------------------------------------------------


def own_format(state: State, site: Site) -> Any:
    """The format of a site, whether it is encoded or dense."""
    return state.format(site) or Dense(state.dtype)


def mlp_bytes(state: State, mlp: Mlp, how: Sparsity | None, share: float) -> float:
    """Bytes of an MLP that are read for a token of which a share of the neurons is asked for; with no sparsity, of all."""
    sites = [site for site in (mlp.first, mlp.up, mlp.down) if site is not None]
    if how is None:
        return sum(whole_bytes(own_format(state, site), site.shape) for site in sites)
    rows = share * mlp.neurons
    first = mlp.neurons if how.kind == "cats" else rows
    read = [(mlp.first, first + rows * mlp.joined), (mlp.up, rows)]
    found = sum(some_bytes(state, site, count, row_bytes) for site, count in read if site is not None)
    return found + some_bytes(state, mlp.down, rows, column_bytes) + how.nbytes(mlp.first.shape)


def input_bytes(state: State, sites: Iterable[Site], how: Sparsity | None, share: float) -> float:
    """Bytes of matrices that are read for a token of which a share of the inputs is kept."""
    if how is None:
        return sum(whole_bytes(own_format(state, site), site.shape) for site in sites)
    return sum(some_bytes(state, s, share * s.shape[1], column_bytes) + how.nbytes(s.shape) for s in sites)


def some_bytes(state: State, site: Site, count: float, of: Callable[[Any, tuple[int, int], float], float]) -> float:
    """Bytes of some rows or columns of a site; of all where its module keeps a dense matrix the other way round."""
    fmt = own_format(state, site)
    return whole_bytes(fmt, site.shape) if site.transposed and isinstance(fmt, Dense) else of(fmt, site.shape, count)
