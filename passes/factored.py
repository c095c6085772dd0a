"""Both factors of a matrix W = B A, quantized: each is a matrix with inputs of its own.

A is given what W was given, and is solved under that Hessian. B is given what the quantized A puts out, so its Hessian is A H Aᵀ;
and it is fitted anew to what W puts out, which makes up for what the rounding of A has done. As `factorize` leaves them, the rows
of A cost independently of each other (factorize_core.py), so nothing of B need be known while A is solved.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compress.formats import Dense, Factored
from compress.formats.grid import Quantized
from compress.passes import factorize_core, gptq_core
from compress.passes.solver import Answer, Case


class Rounds(Protocol):
    """A pass that quantizes, seen from here. by_inputs: whether by feedback, or each weight to the nearest."""

    @property
    def by_inputs(self) -> bool: ...
    @property
    def clip(self) -> str: ...
    @property
    def order(self) -> str: ...


def solve(options: Rounds, W_nk: Tensor, factor: gptq_core.Factor | None, fmt: Factored, case: Case) -> Answer:
    """The factors at hand in another format; with feedback, aimed at W."""
    given = case.given
    assert given is not None, "`planned` has seen that the site is factored"
    assert isinstance(given.format, Factored)
    A_rk, B_nr = (F.to(W_nk.device) for F in given.format.factor_matrices(given.tensors))
    tried = [_rounded(options, A_rk, B_nr, factor, fmt, case.scale_dtype)]
    if options.by_inputs and factor is not None and factor.lam > 0 and not isinstance(fmt.factors, Dense):
        tried.append(_fed_back(options, W_nk, (A_rk, B_nr), factor, fmt, case.scale_dtype))
    losses = [gptq_core.loss(W_nk - fmt.dequantize(t, torch.float32).to(W_nk.device), factor) for t in tried]
    best = min(range(len(tried)), key=lambda i: float(losses[i].sum(dtype=torch.float64)))
    energy_n = gptq_core.loss(W_nk, factor)
    return Answer(lambda rows: tried[best], losses[best], losses[0], energy_n, factor.notes if factor else ())


def _rounded(
    options: Rounds, A_rk: Tensor, B_nr: Tensor, factor: gptq_core.Factor | None, fmt: Factored, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Either factor by itself, to the nearest."""
    if isinstance(fmt.factors, Dense):
        return fmt.dense(A_rk.cpu(), B_nr.cpu())
    solved = (gptq_core.round_to_nearest(F, f, fmt.factors, clip=options.clip, scale_dtype=scale_dtype)
              for F, f in ((A_rk, factor), (B_nr, None)))  # fmt: skip
    return fmt.pack(*(packed(s, fmt.factors) for s in solved))


def _fed_back(
    options: Rounds,
    W_nk: Tensor,
    given: tuple[Tensor, Tensor],
    factor: gptq_core.Factor,
    fmt: Factored,
    scale_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A by GPTQ under H; then B, fitted to W beside it, by GPTQ under what it is given."""
    H_kk, form = factorize_core.hessian(factor), fmt.factors
    assert H_kk is not None
    assert not isinstance(form, Dense)
    A = gptq_core.quantize(given[0], factor, form, clip=options.clip, scale_dtype=scale_dtype)
    A_rk = form.dequantize(packed(A, form), torch.float32).to(W_nk.device)
    B_nr, G_rr = factorize_core.refit(W_nk, A_rk, given[1], H_kk)
    inner = gptq_core.factor(G_rr, damp=gptq_core.LEAST_DAMP, order=options.order, overwrite=True)
    B = gptq_core.quantize(B_nr, inner, form, clip=options.clip, scale_dtype=scale_dtype)
    return fmt.pack(packed(A, form), packed(B, form))


def packed(solved: gptq_core.Solved, fmt: Quantized) -> dict[str, Tensor]:
    """The tensors of a whole matrix."""
    return fmt.pack(solved.codes.cpu(), solved.grid.to("cpu"))
