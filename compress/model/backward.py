"""A walk backward over the blocks of a model, with one block's weights in memory.

The model runs forward once, keeping what went into each block; then each block is loaded again, from the last to the first, run
again with gradients on, and handed the gradient of what it put out. Memory is the inputs of all blocks, the activations of one
block and one batch, and whatever is made of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.lockstep import Batch
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site

Observe = Callable[[str, Tensor, Tensor], None]
Progress = Callable[[float, float, str], None]


def forward(stream: Stream, state: State, batches: Sequence[Batch], progress: Progress) -> list[list[Tensor]]:
    """Pass every batch through all blocks; what went into each block, by block and batch."""
    inputs: list[list[Tensor]] = []
    for block in state.graph.blocks:
        progress(block.index, 2 * len(state.graph.blocks), f"forward, {block.module}")
        inputs.append([batch.hidden for batch in batches])
        stream.advance(state, block.index, batches)
    return inputs


def behind(stream: Stream, state: State, batches: Sequence[Batch], loss: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """The gradient of each batch's `loss`, a number made of (its index, its logits [b, t, vocabulary]), at what the last block
    puts out; the batches have passed all blocks."""
    found = []
    with stream.outer(state), torch.enable_grad():
        for i, batch in enumerate(batches):
            hidden = batch.hidden.detach().requires_grad_()
            found.append(torch.autograd.grad(loss(i, stream.head(replace(batch, hidden=hidden))), hidden)[0])
    return found


def backward(
    stream: Stream,
    state: State,
    batches: Sequence[Batch],
    inputs: list[list[Tensor]],
    above: list[Tensor],
    observe: Observe,
    progress: Progress,
) -> Iterator[int]:
    """From the last block to the first: `observe(site, x, g)` with the inputs of each matrix and the gradient at its outputs,
    batch by batch; the index of a block is given once all its batches were. `inputs` are used up."""
    count = len(state.graph.blocks)
    for block in reversed(state.graph.blocks):
        progress(2 * count - block.index, 2 * count, f"backward, {block.module}")
        with stream.block(state, block.index) as module, torch.enable_grad():
            mine = zip(batches, inputs.pop(), above, strict=True)
            above = [_through(stream, state, block.index, module, *each, observe) for each in mine]
        yield block.index


def _through(
    stream: Stream, state: State, index: int, block: nn.Module, batch: Batch, hidden: Tensor, gradient: Tensor, observe: Observe
) -> Tensor:
    """One batch through one block and back: the gradient at what went into it."""
    leaf = hidden.detach().requires_grad_()
    with _watched(stream, block, index, state.graph.of_block(index)) as seen:
        out = stream.call(block, replace(batch, hidden=leaf), index)
    found = torch.autograd.grad(out, [leaf, *(y for _, y in seen.values())], gradient, allow_unused=True)
    for (name, (x, _)), g in zip(seen.items(), found[1:], strict=True):
        if g is not None:
            observe(name, x.detach(), g)
    return found[0]


@contextmanager
def _watched(stream: Stream, block: nn.Module, index: int, sites: Sequence[Site]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, a forward pass of the block notes the inputs and outputs of its sites' modules, by site."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    path = stream.graph.blocks[index].module

    def watch(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            seen[name] = args[0], out

        return note

    hooks = [stream.model_module(path, block, s.module).register_forward_hook(watch(s.name)) for s in sites if s.expert is None]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
