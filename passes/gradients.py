"""Gradients of the log-likelihood at every matrix, block by block, for diagonal Fisher information.

The model runs forward once with one block in memory, keeping what went into each block; then backward: each block is loaded
again, run again with gradients on, and handed the gradient of what it put out. Targets are drawn from the model's own
predictions, so the squares estimate the Fisher information itself, the second derivative of the KL to the model, not the
"empirical" one of the text's own next tokens. One window is one sample, as in LQ-LoRA (arXiv 2311.12023, section 3.3).

    output   g_n = mean over tokens of (∂ℓ/∂y_tn)², ℓ the log-likelihood of a window, y the outputs of the matrix
    weight   F_nk = mean over windows of (∂ℓ/∂W_nk)², where ∂ℓ/∂W = Σ_t ∂ℓ/∂y_t x_tᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats import Dense, Packed
from compress.manager import Context, Store
from compress.model.lockstep import Batch
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site

FP32 = Dense(torch.float32)


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
        for site, stored in (store.committed(f"block-{index:04}") or {}).items():
            if only is None or site == only.name:
                yield site, stored.load().tensors["weight"]


def _measure(state: State, ctx: Context, store: Store, squares: Squares) -> None:
    assert ctx.calibration is not None
    stream = Stream(state, ctx.config, ctx.device)
    batches = stream.start(state, list(ctx.calibration.ids.split(1)))
    inputs: list[list[Tensor]] = []
    for block in state.graph.blocks:
        ctx.progress(block.index, 2 * len(state.graph.blocks), f"forward, {block.module}")
        inputs.append([batch.hidden for batch in batches])
        stream.advance(state, block.index, batches)
    above = _behind_the_blocks(stream, state, ctx, batches)
    for block in reversed(state.graph.blocks):
        ctx.progress(2 * len(state.graph.blocks) - block.index, 2 * len(state.graph.blocks), f"backward, {block.module}")
        with torch.enable_grad():
            sums, above = _backward(stream, state, block.index, batches, inputs.pop(), above, squares)
        packed = {n: Packed(FP32, tuple(t.shape), {"weight": (t / len(batches)).cpu()}) for n, t in sums.items()}
        store.commit(f"block-{block.index:04}", packed, [])


def _behind_the_blocks(stream: Stream, state: State, ctx: Context, batches: Sequence[Batch]) -> list[Tensor]:
    """The gradient of each window's log-likelihood at what the last block puts out."""
    found = []
    generator = torch.Generator().manual_seed(ctx.seed)
    with stream.outer(state), torch.enable_grad():
        for batch in batches:
            hidden = batch.hidden.detach().requires_grad_()
            log_p = stream.head(replace(batch, hidden=hidden)).float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach()[0].exp().cpu(), 1, generator=generator).to(log_p.device)
            found.append(torch.autograd.grad(log_p[0].gather(-1, drawn).sum(), hidden)[0])
    return found


def _backward(
    stream: Stream, state: State, index: int, batches: Sequence[Batch], inputs: Sequence[Tensor], above: Sequence[Tensor],
    squares: Squares,
) -> tuple[dict[str, Tensor], list[Tensor]]:  # fmt: skip
    """The sums of squares of one block's sites over all windows, and the gradients at what went into the block."""
    sums: dict[str, Tensor] = {}
    below = []
    sites = state.graph.of_block(index)
    with stream.block(state, index) as block, _watched(stream, block, index, sites) as seen, torch.enable_grad():
        for batch, hidden, gradient in zip(batches, inputs, above, strict=True):
            leaf = hidden.detach().requires_grad_()
            seen.clear()
            out = stream.call(block, replace(batch, hidden=leaf), index)
            ys = [y for _, y in seen.values()]
            grads = torch.autograd.grad(out, [leaf, *ys], gradient, allow_unused=True)
            below.append(grads[0])
            for (name, (x, _)), g in zip(seen.items(), grads[1:], strict=True):
                if g is not None:
                    square = squares(x.detach().flatten(0, -2).float(), g.flatten(0, -2).float())
                    sums[name] = sums[name].add_(square) if name in sums else square
    return sums, below


@contextmanager
def _watched(stream: Stream, block: nn.Module, index: int, sites: Sequence[Site]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, every forward pass of the block notes the inputs and outputs of its sites' modules, by site."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    path = stream.graph.blocks[index].module

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[name] = args[0], out

        return note

    hooks = [stream.model_module(path, block, s.module).register_forward_hook(watch(s.name)) for s in sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
