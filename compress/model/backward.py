"""A walk backward over the blocks of a model, with one block's weights in memory.

The model runs forward once, keeping what went into each block; then each block is loaded again, from the last to the first, run
again with gradients on, and handed the gradient of what it put out. Memory is the inputs of all blocks, the activations of one
block and one batch, and whatever is made of the gradients. The head is asked for few tokens at a time (`LOGITS`): its vocabulary
may be wider than all the rest.
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
Seen = list[tuple[tuple[str, ...], Tensor, Tensor]]  # sites whose outputs lie side by side, their inputs and these outputs
LOGITS = 1 << 24  # in hand at once


def forward(stream: Stream, state: State, batches: Sequence[Batch], progress: Progress) -> list[list[Tensor]]:
    """Pass every batch through all blocks; what went into each block, by block and batch."""
    inputs: list[list[Tensor]] = []
    for block in state.graph.blocks:
        progress(block.index, 3 * len(state.graph.blocks), f"forward, {block.module}")
        inputs.append([batch.hidden for batch in batches])
        stream.advance(state, block.index, batches)
    return inputs


def behind(stream: Stream, state: State, batches: Sequence[Batch], slope: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The gradient at what the last block puts out, by batch, from that at the logits: `slope` is asked for it with the logits
    [b, t, vocabulary] of some tokens at a time, in their order. The batches have passed all blocks."""
    found = []
    with stream.behind(state), torch.enable_grad():
        for batch in batches:
            step = max(1, LOGITS // (len(batch.tokens) * state.graph["embed"].shape[0]))
            parts = zip(batch.tokens.split(step, 1), batch.hidden.detach().split(step, 1), strict=True)
            found.append(torch.cat([_at_head(stream, replace(batch, tokens=t, hidden=h), slope) for t, h in parts], 1))
    return found


def _at_head(stream: Stream, batch: Batch, slope: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = batch.hidden.requires_grad_()
    logits = stream.head(batch)
    return torch.autograd.grad(logits, hidden, slope(logits.detach()).to(logits.dtype))[0]


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
    batch by batch; the index of a block is given once all its batches were. Then the embedding, with what it gave and the
    gradient there. `inputs` are used up."""
    count, first = len(state.graph.blocks), inputs[0]
    for block in reversed(state.graph.blocks):
        progress(3 * count - 2 * block.index - 2, 3 * count, f"backward, {block.module}")
        with stream.block(state, block.index) as module, torch.enable_grad():
            mine = zip(batches, inputs.pop(), above, strict=True)
            above = [_through(stream, state, block.index, module, *each, observe) for each in mine]
        yield block.index
    for hidden, gradient in zip(first, above, strict=True):
        observe(state.graph["embed"].name, hidden, gradient)


def _through(
    stream: Stream, state: State, index: int, block: nn.Module, batch: Batch, hidden: Tensor, gradient: Tensor, observe: Observe
) -> Tensor:
    """One batch through one block and back: the gradient at what went into it."""
    leaf = hidden.detach().requires_grad_()
    with _watched(stream, block, index, state.graph.of_block(index)) as seen:
        out = stream.call(block, replace(batch, hidden=leaf), index)
    found = torch.autograd.grad(out, [leaf, *(y for _, _, y in seen)], gradient, allow_unused=True)
    for (names, x, _), g in zip(seen, found[1:], strict=True):
        for name, part in zip(names, g.chunk(len(names), -1) if g is not None else (), strict=False):
            observe(name, x.detach(), part)
    return found[0]


@contextmanager
def _watched(stream: Stream, block: nn.Module, index: int, sites: Sequence[Site]) -> Iterator[Seen]:
    """Inside, a forward pass of the block notes the inputs and outputs of its sites' modules; of experts, one by one."""
    seen: Seen = []
    path = stream.graph.blocks[index].module
    experts: dict[int, Any] = {}
    routed = {(s.expert, s.role): s.name for s in sites if s.expert is not None}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args, out: seen.append(((name,), args[0], out))

    def watch_expert(expert: int, roles: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        seen.append((tuple(routed[expert, role] for role in roles), x, y))

    hooks = [stream.model_module(path, block, s.module).register_forward_hook(watch(s.name)) for s in sites if s.expert is None]
    for s in sites:
        if s.expert is not None:
            module: Any = stream.model_module(path, block, s.module)
            experts[id(module)], module.watch = module, watch_expert
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for module in experts.values():
            del module.watch
