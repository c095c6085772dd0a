"""Matrices of the block in hand that are changed again and again, and the gradients at them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compress.model.binding import holding, matrix_in, put_matrix
from compress.model.stream import Stream
from compress.state.graph import Site


class Learnable:
    """The matrices of some sites of the block that a stream has in hand. Inside of modules they are tensors of their own from now
    on, so that nothing is written to what they were read from."""

    def __init__(self, stream: Stream, sites: Sequence[Site]):
        self.dtype = stream.dtype
        self._holders = {}
        for site in sites:
            modules = list(stream.holders(site))
            for module in modules:
                put_matrix(module, site, matrix_in(holding(module, site).detach(), site).clone())
            self._holders[site.name] = site, modules
        for site, modules in self._holders.values():
            for module in modules:
                holding(module, site).requires_grad_()

    def put(self, name: str, matrix: Tensor) -> None:
        """Give a site another matrix [out, in], in place."""
        site, modules = self._holders[name]
        for module in modules:
            matrix_in(holding(module, site).detach(), site).copy_(matrix)

    def slope(self, name: str) -> Tensor | None:
        """The gradient at a site's matrix [out, in], in fp32, of what was asked `backward` for since `forget`; None where nothing
        went through it."""
        site, modules = self._holders[name]
        found = [matrix_in(g, site).float() for m in modules if (g := holding(m, site).grad) is not None]
        return sum(found[1:], start=found[0]) if found else None

    def forget(self) -> None:
        """Begin anew with gradients."""
        for site, modules in self._holders.values():
            for module in modules:
                holding(module, site).grad = None
