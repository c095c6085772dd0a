"""Gradients of the log-likelihood at every matrix, block by block, for diagonal Fisher information.

The model runs forward and back with one block in memory (model/backward.py). Targets are drawn from the model's own
predictions, so the squares estimate the Fisher information itself, the second derivative of the KL to the model, not the
"empirical" one of the text's own next tokens. One window is one sample, as in LQ-LoRA (arXiv 2311.12023, section 3.3).

    output   g_n = mean over tokens of (∂ℓ/∂y_tn)², ℓ the log-likelihood of a window, y the outputs of the matrix
    weight   F_nk = mean over windows of (∂ℓ/∂W_nk)², where ∂ℓ/∂W = Σ_t ∂ℓ/∂y_t x_tᵀ

An expert's g is over all tokens too: those that the router does not send to it add nothing. A part of it (`POOLED`) is the mean
of all experts of its block and role, so that an expert that this sample hardly reached is not taken for one that does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compress.manager import Context, Store
from compress.model.backward import backward, behind, forward
from compress.model.data import Tokens
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site

POOLED = 0.1


def output_gradients(state: State, ctx: Context, tokens: Tokens) -> dict[str, Tensor]:
    """Site -> g [N], measured on these tokens."""
    known = {n: t[0] for n, t in _known(state, replace(ctx, calibration=tokens), "gradients", _squared_outputs)}
    experts: dict[tuple[int | None, str], list[str]] = {}
    for site in state.graph.linear:
        if site.expert is not None:
            experts.setdefault((site.block, site.role), []).append(site.name)
    for names in experts.values():
        mean = torch.stack([known[n] for n in names]).mean()
        known |= {n: torch.lerp(known[n], mean, POOLED) for n in names}
    return known


def fisher(state: State, ctx: Context, site: Site) -> Tensor:
    """F [N, K] of one site; all are measured and kept the first time that one is asked for."""
    return next(t for n, t in _known(state, ctx, "fisher", _squared_weights, site) if n == site.name)


Squares = Callable[[Tensor, Tensor, int], Tensor]


def _squared_outputs(X_tk: Tensor, G_tn: Tensor, window: int) -> Tensor:
    return G_tn.square().sum(0, keepdim=True) / window


def _squared_weights(X_tk: Tensor, G_tn: Tensor, window: int) -> Tensor:
    return (G_tn.T @ X_tk).square()


def _known(state: State, ctx: Context, name: str, squares: Squares, only: Site | None = None) -> Iterator[tuple[str, Tensor]]:
    assert ctx.calibration is not None, "`check` asks for calibration data"
    store = ctx.store.analysis(name, {"tokens": ctx.calibration.hash})
    blocks = [b.index for b in state.graph.blocks] if only is None else [only.block]
    if store.committed(f"block-{state.graph.blocks[0].index:04}") is None:  # blocks are measured from the last to the first
        _measure(state, ctx, store, squares)
    for index in blocks:
        part = store.committed(f"block-{index:04}")
        for site, written in part.dense.items() if part else ():
            if only is None or site == only.name:
                yield site, written.load()


def _measure(state: State, ctx: Context, store: Store, squares: Squares) -> None:
    assert ctx.calibration is not None
    stream = Stream(state, ctx.device)
    batches = stream.start(state, list(state.ids(ctx.calibration.ids).split(1)))
    inputs = forward(stream, state, batches, ctx.progress)
    generator = torch.Generator().manual_seed(ctx.seed)
    above = behind(stream, state, batches, lambda logits: drawn(logits, generator))
    window, sums = ctx.calibration.ids.shape[1], dict[str, Tensor]()

    def add(site: str, x: Tensor, g: Tensor) -> None:
        square = squares(x.flatten(0, -2).float(), g.flatten(0, -2).float(), window)
        sums[site] = sums[site].add_(square) if site in sums else square

    for index in backward(stream, state, batches, inputs, above, add, ctx.progress):
        store.commit(f"block-{index:04}", dense={name: (total / len(batches)).cpu() for name, total in sums.items()})
        sums.clear()


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, at the logits [b, t, vocabulary], of the log-likelihood of a token at each place, drawn from the model's own
    predictions: 1 at that token, less the probabilities."""
    p = logits.float().softmax(-1)
    below = p.cumsum(-1)
    at = torch.rand(*p.shape[:-1], 1, generator=generator).to(p.device) * below[..., -1:]
    token = torch.searchsorted(below, at).clamp_(max=p.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, token, torch.ones_like(at))
