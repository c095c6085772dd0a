"""Activations rounded where an engine will round them: in front of the matrices of a block that are in formats `W/A`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from compress.formats import Served
from compress.formats.served import Rounding
from compress.state import State
from compress.state.graph import Site


class Rounds:
    """What rounds the inputs of the block in hand. known: by site; of one that is not solved yet, nothing does."""

    def __init__(self) -> None:
        self.known: dict[str, Rounding | None] = {}

    @contextmanager
    def within(self, state: State, index: int, holders: Callable[[Site], Iterable[nn.Module]]) -> Iterator[None]:
        """Inside, inputs are rounded: of matrices that the state has in such a format, and, as they become `known`, of those that
        its plan wishes there."""
        wished = state.plan.formats if state.plan else {}
        sites = [site for site in state.graph.of_block(index)
                 if isinstance(state.format(site), Served) or isinstance(wished.get(site.name), Served)]  # fmt: skip
        self.known = {site.name: state.inputs(site) for site in sites}
        hooks = [m.register_forward_pre_hook(self._hook(s.name), with_kwargs=True) for s in sites for m in holders(s)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.known = {}

    def _hook(self, name: str) -> Callable[..., Any]:
        def rounded(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            rounding = self.known.get(name)
            if rounding is None:
                return None
            x = args[0] if args else kwargs["input"]
            y = rounding(x.detach())
            y = x + (y - x).detach() if x.requires_grad else y  # a gradient passes as if nothing were rounded
            return ((y, *args[1:]), kwargs) if args else (args, kwargs | {"input": y})

        return rounded
