"""Gradients of the log-likelihood at every matrix, block by block, for diagonal Fisher information.

The model runs forward and back with one block in memory (model/backward.py). Targets are drawn from the model's own
predictions, so the squares estimate the Fisher information itself, the second derivative of the KL to the model, not the
"empirical" one of the text's own next tokens. One window is one sample, as in LQ-LoRA (arXiv 2311.12023, section 3.3).

    output   g_n = mean over tokens of (∂ℓ/∂y_tn)², ℓ the log-likelihood of a window, y the outputs of the matrix;
             w_t = the same, summed over outputs: how much a token counts
    weight   F_nk = mean over windows of (∂ℓ/∂W_nk)², where ∂ℓ/∂W = Σ_t ∂ℓ/∂y_t x_tᵀ

For what lies outside the blocks (`TableSquares`): of a head g at its logits; of an embedding that at the rows looked up, a mean
over tokens for each of their numbers.

Tokens count by w_t because some inputs are a thousand times larger than all others, and what comes of them does nothing: in a
trained model the first token of a text draws attention and has no other use. On Gemma 3 270M an average over tokens says that
int3:g64 in one `down` costs 0.3 nats, where 0.013 are measured.

An expert's g is over all tokens too: those that the router does not send to it add nothing. Beside it stands the mean of all
experts of its block and role, so that an expert that this sample hardly reached is not taken for one that does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.manager import Context, Store
from compress.model.backward import backward, behind, forward
from compress.model.data import Tokens
from compress.model.stream import Stream
from compress.state import State
from compress.state.graph import Site

TOKENS = ":tokens"  # behind the name of a site: w_t
TABLES = "tables"  # the part that is committed last


@dataclass(frozen=True)
class TableSquares:
    """head_v: mean squared gradient at each logit [V]. embed_d: the same at each number of a row that was looked up [d]. tokens:
    those that were, int64, by the state's ids."""

    head_v: Tensor
    embed_d: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Response:
    """squares: how much the outputs of a matrix count [N], or its weights [N, K]. tokens: how much the tokens do that come to it
    [T]. mean: of an expert's output, in the mean over all experts."""

    squares: Tensor
    tokens: Tensor | None = None
    mean: float | None = None


def output_gradients(state: State, ctx: Context, tokens: Tokens) -> dict[str, Response]:
    """Site -> g [N] and w [T], measured on these tokens."""
    known = dict(_known(state, replace(ctx, calibration=tokens), "gradients", _squared_outputs))
    experts: dict[tuple[int | None, str], list[str]] = {}
    for site in state.graph.linear:
        if site.expert is not None:
            experts.setdefault((site.block, site.role), []).append(site.name)
    mean = {n: float(torch.stack([known[m][0] for m in names]).mean()) for names in experts.values() for n in names}
    return {n: Response(g[0], known[n + TOKENS][0], mean.get(n)) for n, g in known.items() if not n.endswith(TOKENS)}


def table_gradients(state: State, ctx: Context, tokens: Tokens) -> TableSquares:
    """The same of embedding and head."""
    ctx = replace(ctx, calibration=tokens)
    store = _measured(state, ctx, "gradients", _squared_outputs)
    part = store.committed(TABLES)
    assert part is not None, "it was committed last"
    if "embed" not in part.dense:
        raise ModelError(f"'{state.graph.family}' projects the rows that it looks up; what a change of them does is not measured "
                         "there: use metric: output, or pin 'embed'", ("also",))  # fmt: skip
    return TableSquares(part.dense["lm_head"].load(), part.dense["embed"].load(), state.ids(tokens.ids).flatten())


def fisher(state: State, ctx: Context, site: Site) -> Tensor:
    """F [N, K] of one site; all are measured and kept the first time that one is asked for."""
    return next(t for n, t in _known(state, ctx, "fisher", _squared_weights, site) if n == site.name)


Squares = Callable[[Tensor, Tensor, int], Tensor]


def _squared_outputs(X_tk: Tensor, G_tn: Tensor, window: int) -> Tensor:
    return G_tn.square().sum(0, keepdim=True) / window


def _squared_weights(X_tk: Tensor, G_tn: Tensor, window: int) -> Tensor:
    return (G_tn.T @ X_tk).square()


def _known(state: State, ctx: Context, name: str, squares: Squares, only: Site | None = None) -> Iterator[tuple[str, Tensor]]:
    store = _measured(state, ctx, name, squares)
    blocks = [b.index for b in state.graph.blocks] if only is None else [only.block]
    for index in blocks:
        part = store.committed(f"block-{index:04}")
        for site, written in part.dense.items() if part else ():
            if only is None or site == only.name:
                yield site, written.load()


def _measured(state: State, ctx: Context, name: str, squares: Squares) -> Store:
    """Where all of them are kept; they are measured the first time."""
    assert ctx.calibration is not None, "`check` asks for calibration data"
    store = ctx.store.analysis(name, {"tokens": ctx.calibration.hash, "version": 2})
    if store.committed(TABLES) is None:
        _measure(state, ctx, store, squares)
    return store


def _measure(state: State, ctx: Context, store: Store, squares: Squares) -> None:
    assert ctx.calibration is not None
    stream, ids = Stream(state, ctx.device), state.ids(ctx.calibration.ids)
    batches = stream.start(state, list(ids.split(1)))
    inputs = forward(stream, state, batches, ctx.progress)
    scale = looked_up_scale(state, ids, inputs[0])
    generator = torch.Generator().manual_seed(ctx.seed)
    count, sums, weights = ids.numel(), dict[str, Tensor](), dict[str, list[Tensor]]()
    head_v = torch.zeros(0)

    def slope(logits: Tensor) -> Tensor:
        nonlocal head_v
        found = drawn(logits, generator)
        square = found.flatten(0, -2).square().sum(0).cpu() / count
        head_v = square if not len(head_v) else head_v.add_(square)
        return found

    def add(site: str, x: Tensor, g: Tensor) -> None:
        if site == "embed":
            if scale is None:
                return
            square = (scale * g.flatten(0, -2).float()).square().sum(0) * len(batches) / count
        else:
            x_tk, g_tn = x.flatten(0, -2).float(), g.flatten(0, -2).float()
            square = squares(x_tk, g_tn, ids.shape[1])
            weights.setdefault(site + TOKENS, []).append(g_tn.square().sum(1))
        sums[site] = sums[site].add_(square) if site in sums else square

    above = behind(stream, state, batches, slope)
    for index in backward(stream, state, batches, inputs, above, add, ctx.progress):
        means = {name: (total / len(batches)).cpu() for name, total in sums.items()}
        store.commit(f"block-{index:04}", dense=means | {name: torch.cat(w)[None].cpu() for name, w in weights.items()})
        sums.clear()
        weights.clear()
    store.commit(TABLES, dense={n: (total / len(batches)).cpu() for n, total in sums.items()} | {"lm_head": head_v})


def looked_up_scale(state: State, ids: Tensor, hidden: list[Tensor]) -> float | None:
    """What an architecture multiplies the rows by that it looks up, by least squares: mostly 1, in Gemma √width; None where it
    projects them to another width."""
    rows = state.rows(state.graph["embed"], ids[0].tolist()).float()
    if rows.shape != hidden[0][0].shape:
        return None
    return float((rows * hidden[0][0].float().cpu()).sum() / rows.square().sum().clamp(min=1e-20))


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient, at the logits [b, t, vocabulary], of the log-likelihood of a token at each place, drawn from the model's own
    predictions: 1 at that token, less the probabilities."""
    p = logits.float().softmax(-1)
    below = p.cumsum(-1)
    at = torch.rand(*p.shape[:-1], 1, generator=generator).to(p.device) * below[..., -1:]
    token = torch.searchsorted(below, at).clamp_(max=p.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, token, torch.ones_like(at))
