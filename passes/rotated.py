"""A matrix in rotated coordinates: C = R_o W R_i is solved in the format inside, under R_iᵀ H R_i, by what knows no rotation.

Turning outputs and inputs changes no loss: tr(Δ H Δᵀ) is the same in both coordinates, and the identity that damps is the same
identity. So the problem is that of W, at the same damping, and matrices of one input share its Hessian, turned once. Outputs are
turned matrix by matrix, also where several are solved as one.

An input that was never seen has a zero row in H, and a rotation would mix it with those that were: a direction that costs
nothing, into which feedback would put all errors, to be found the first time that the input is seen. So before H is turned such
an input is given the mean of those that were seen, and costs as they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.formats import Rotated
from compress.passes import gptq_core
from compress.passes.rows import Rows
from compress.passes.solver import Answer, Case


class Solves(Protocol):
    """A pass that quantizes, seen from here."""

    @property
    def order(self) -> str: ...
    def solve(self, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: Rotated, case: Case) -> Answer: ...


def solve(options: Solves, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: Rotated, case: Case) -> Answer:
    """W in a rotated format: what the pass makes of the turned matrix in the format inside. Losses are by turned outputs."""
    turned = factor and turned_factor(factor, fmt, options.order)
    return options.solve(turned_rows(W_nk, fmt, case.outputs), turned, fmt.base, case)  # type: ignore[arg-type]


def turned_rows(W_nk: Any, fmt: Rotated, outputs: Sequence[int]) -> Any:
    """C of W: one matrix, as a tensor or by its rows, some whole blocks of these, or several matrices below each other, of
    so many `outputs`; none: as it is."""
    if isinstance(W_nk, Rows):
        return W_nk.through(lambda part: fmt.turn(part, len(W_nk)))
    if len(outputs) < 2:
        return fmt.turn(W_nk, outputs[0] if outputs else len(W_nk))
    return torch.cat([fmt.turn(part, len(part)) for part in W_nk.split(list(outputs))])


def turned_factor(f: gptq_core.Factor, fmt: Rotated, order: str) -> gptq_core.Factor:
    """The factor of the turned Hessian, at the same damping; made once for a Hessian and a block."""
    if f.lam == 0:
        return f  # the identity, which is itself in all coordinates
    if fmt.block not in f.turned:
        H_kk, mean = _hessian(f)
        H_kk = fmt.turn_inputs(fmt.turn_inputs(H_kk).T)
        found = gptq_core.factor(H_kk, damp=f.lam / mean, order=order, overwrite=True)
        f.turned[fmt.block] = replace(found, notes=(*f.notes, *found.notes))
    return f.turned[fmt.block]


def _hessian(f: gptq_core.Factor) -> tuple[Tensor, float]:
    """H as it was before it was damped, inputs as they lie, with the mean of the others for an input that was not seen; and the
    mean of its diagonal."""
    H_kk = torch.empty_like(f.A_kk)
    H_kk[f.order_k[:, None], f.order_k] = f.A_kk
    seen = f.diag_k > 0
    mean = float(f.diag_k[seen].mean(dtype=torch.float64))
    H_kk.diagonal().copy_(torch.where(seen, f.diag_k, mean))
    return H_kk, mean
