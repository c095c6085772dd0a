"""The layers of a model that can be sparse: which sites leave something out, what that reads, and by what they choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.formats.sparsity import ACTIVATIONS, DOWN, THRESHOLD, UP, Sparsity
from compress.model.lockstep import Batch
from compress.model.skips import Mlp, activation, input_bytes, masked, mlp_bytes, mlps
from compress.model.stream import Stream
from compress.passes import sparsify_core as core
from compress.passes.perturbed import Inside, Modules
from compress.state import State
from compress.state.graph import Site

SAMPLED = 8192  # tokens that thresholds and predictors are made of
HELD = 4  # the last of so many parts of them is kept to measure on
STEPS = 400  # of a predictor's training
RELU = ("relu", "relu2")


@dataclass(frozen=True)
class Layers:
    """The layers of a model that can be sparse. units: block -> its sites that leave something out, and how."""

    state: State
    kind: str
    units: Mapping[int, list[tuple[Site, Sparsity]]]
    mlps: Mapping[int, Mlp]

    @classmethod
    def of(cls, state: State, kind: str, rank: int | None = None) -> Layers:
        found = {mlp.block: mlp for mlp in mlps(state)}
        if kind == "teal":
            sites = {b.index: [s for s in state.graph.of_block(b.index)] for b in state.graph.blocks}
            return cls(state, "teal", {b: [(s, Sparsity("teal")) for s in held] for b, held in sites.items() if held}, {})
        act = activation(state)
        if kind == "predictor" and act not in RELU:
            raise ModelError(f"'{state.graph.family}' has {act}, which silences no neuron, so there is nothing to foretell; use "
                             "kind: cats, whose thresholds cost no factors", ("kind",))  # fmt: skip
        units: dict[int, list[tuple[Site, Sparsity]]] = {}
        for block, mlp in found.items():
            how = Sparsity("cats", act, joined=mlp.joined)
            if kind == "predictor":
                how = Sparsity("predictor", rank=rank_of(mlp, rank), joined=mlp.joined)
            units[block] = [(mlp.first, how)]
        return cls(state, kind, units, found)

    @property
    def noun(self) -> str:
        return "inputs" if self.kind == "teal" else "neurons"

    def name(self, block: int) -> str:
        return f"layers.{block}" if self.kind == "teal" else self.mlps[block].name

    def bytes(self, block: int, share: float) -> float:
        """Bytes of a layer's matrices that a token reads at a share; thresholds and predictors among them."""
        if self.kind == "teal":
            how = None if share >= 1 else self.units[block][0][1]
            return input_bytes(self.state, [site for site, _ in self.units[block]], how, share)
        return mlp_bytes(self.state, self.mlps[block], None if share >= 1 else self.units[block][0][1], share)

    def model_bytes(self, keeps: Mapping[int, float]) -> float:
        """Bytes of all matrices that a token passes, the head's among them."""
        graph = self.state.graph
        sites = [s for s in graph.linear] + [graph.owner(s) for s in graph if s.role == "head"]
        whole = input_bytes(self.state, sites, None, 1.0)
        return whole + sum(self.bytes(b, keeps.get(b, 1.0)) - self.bytes(b, 1.0) for b in self.units)


def rank_of(mlp: Mlp, rank: int | None) -> int:
    """The rank of a layer's predictor: the one asked for, or an eighth of the model's width."""
    found = rank or max(1, mlp.first.shape[1] // 8)
    if found > min(mlp.first.shape):
        raise RecipeError(
            f"'{mlp.first.name}' is {mlp.first.shape[0]} x {mlp.first.shape[1]}, and has no rank of {found}", ("rank",)
        )
    return found


# --- by what a site chooses -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Rule:
    """What one site's neurons, or inputs, are chosen by. x, y [tokens, ..]: what it reads and puts out on some tokens, the
    last of which are held out; weight [m]: what a unit of a neuron adds, of `cats`."""

    site: Site
    how: Sparsity
    x: Tensor
    y: Tensor
    weight: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None

    @property
    def made_of(self) -> int:
        """How many of the tokens are not held out; one at least is, of the two or more that windows have."""
        return len(self.x) - max(1, len(self.x) // HELD)

    @property
    def y_held(self) -> Tensor:
        """The gate's pre-activations of the tokens held out."""
        return self.y[self.made_of :, : self.how.neurons(self.site.shape)]

    def train(self, weight_mk: Tensor, bias_m: Tensor | None, generator: torch.Generator) -> None:
        """Make the factors of a predictor of the rows [m, k] of a site's matrix."""
        m, n = self.how.neurons(self.site.shape), self.made_of
        start = torch.zeros(m) if bias_m is None else bias_m[:m].float()
        held = self.x[:n], self.y[:n, :m], weight_mk[:m].to(self.x.device), start.to(self.x.device)
        A_rk, B_mr, b_m = core.predictor(*held, self.how.rank, STEPS, generator)
        self.factors, self.bias = {DOWN: A_rk.bfloat16().cpu(), UP: B_mr.bfloat16().cpu()}, b_m.cpu()

    def scores(self) -> Tensor:
        """How much each neuron, or input, of the tokens that are not held out has to say, [t, m]."""
        x, y = self.x[: self.made_of], self.y[: self.made_of]
        if self.how.kind == "teal":
            return x.abs().float()
        if self.how.kind == "cats":
            assert self.weight is not None
            gate = y[:, : self.how.neurons(self.site.shape)]
            return ACTIVATIONS[self.how.act](gate).abs().float() * self.weight.to(y.device)
        assert self.bias is not None
        A_rk, B_mr = (self.factors[name].float().to(x.device) for name in (DOWN, UP))
        return (x.float() @ A_rk.T) @ B_mr.T + self.bias.to(x.device)

    def tensors(self, keep: float) -> dict[str, Tensor]:
        """What is stored of a site that keeps a share."""
        t = core.level(self.scores(), keep)
        if self.how.kind == "teal":
            return {THRESHOLD: torch.tensor([t])}
        if self.how.kind == "cats":
            assert self.weight is not None
            return {THRESHOLD: t / self.weight.cpu().float()}
        assert self.bias is not None
        return {THRESHOLD: t - self.bias, **self.factors}

    def held(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which neurons, or inputs, of the tokens held out are kept."""
        x, y = self.x[self.made_of :], self.y[self.made_of :]
        held = {name: t.to(x.device) for name, t in tensors.items()}
        return self.how.inputs(x, held) != 0 if self.how.kind == "teal" else self.how.active(x, y, held)


def sampled(
    stream: Stream, state: State, index: int, batches: Sequence[Batch], sites: Sequence[Site]
) -> dict[str, tuple[Tensor, Tensor]]:
    """What sites of a block read and put out, [tokens, ..], on up to `SAMPLED` evenly spread tokens. The batches stay in front of
    the block."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}
    stride = -(-sum(batch.tokens.numel() for batch in batches) // SAMPLED)

    def watch(name: str) -> Any:
        def note(_: Any, args: tuple[Any, ...], out: Tensor) -> None:
            found[name].append(tuple(t.reshape(-1, t.shape[-1])[::stride].clone() for t in (args[0], out)))  # type: ignore[arg-type]

        return note

    with stream.block(state, index) as block:
        hooks = [next(stream.holders(site)).register_forward_hook(watch(site.name)) for site in sites]
        try:
            for batch in batches:
                stream.call(block, batch, index)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: (torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])) for name, held in found.items()}


def sparse_inside(rules: Sequence[Rule], keep: float) -> Inside:
    """The modules of these sites leave out what they do at a share."""
    made = [(rule.site, rule.how, rule.tensors(keep)) for rule in rules]

    @contextmanager
    def inside(modules: Modules) -> Iterator[None]:
        with ExitStack() as stack:
            for site, how, tensors in made:
                stack.enter_context(masked(modules(site), how, tensors))
            yield

    return inside
