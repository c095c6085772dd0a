"""Gradients of the log-likelihood at every matrix, block by block, for diagonal Fisher information.

The model runs forward and back with one block in memory (model/backward.py). Targets are drawn from the model's own
predictions, so the squares estimate the Fisher information itself, the second derivative of the KL to the model, not the
"empirical" one of the text's own next tokens. One window is one sample, as in LQ-LoRA (arXiv 2311.12023, section 3.3).

    output   g_n = mean over tokens of (∂ℓ/∂y_tn)², ℓ the log-likelihood of a window, y the outputs of the matrix
    weight   F_nk = mean over windows of (∂ℓ/∂W_nk)², where ∂ℓ/∂W = Σ_t ∂ℓ/∂y_t x_tᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compress.manager import Context, Store
from compress.model.backward import backward, behind, forward
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site


def output_gradients(state: State, ctx: Context) -> dict[str, Tensor]:
    """Site -> g [N]."""
    return {n: t[0] for n, t in _known(state, ctx, "gradients", _squared_outputs)}


def fisher(state: State, ctx: Context, site: Site) -> Tensor:
    """F [N, K] of one site; all are measured and kept the first time that one is asked for."""
    return next(t for n, t in _known(state, ctx, "fisher", _squared_weights, site) if n == site.name)


Squares = Callable[[Tensor, Tensor], Tensor]


def _squared_outputs(X_tk: Tensor, G_tn: Tensor) -> Tensor:
    return G_tn.square().mean(0, keepdim=True)


def _squared_weights(X_tk: Tensor, G_tn: Tensor) -> Tensor:
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
    above = behind(stream, state, batches, lambda _, logits: drawn_likelihood(logits, generator))
    sums: dict[str, Tensor] = {}

    def add(site: str, x: Tensor, g: Tensor) -> None:
        square = squares(x.flatten(0, -2).float(), g.flatten(0, -2).float())
        sums[site] = sums[site].add_(square) if site in sums else square

    for index in backward(stream, state, batches, inputs, above, add, ctx.progress):
        store.commit(f"block-{index:04}", dense={name: (total / len(batches)).cpu() for name, total in sums.items()})
        sums.clear()


def drawn_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood of one token at each place of a window [1, t, vocabulary], drawn from the model's own predictions."""
    log_p = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_p.detach()[0].exp().cpu(), 1, generator=generator).to(log_p.device)
    return log_p[0].gather(-1, drawn).sum()
