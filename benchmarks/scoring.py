"""The one judge of every tool's result: plain transformers in fp32, the tool's weights put in place of the original's.

A tool hands in the dense weights of the linear layers that it quantized. Everything else (embeddings, norms, head) stays as in
the original, so that no tool gains or loses by how it stores what it did not quantize.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Score:
    """Held-out quality: perplexity, KL(original || quantized) in nats a token, share of equal top-1 tokens."""

    perplexity: float
    kl: float
    top1: float


class UnfairWeightsError(ValueError):
    """A tool's weights are not what it was asked for: a layer is missing, or a group has too many values."""


class Judge:
    """Scores weights on held-out windows against one original; log-probabilities of the original are kept."""

    def __init__(self, model: Path, windows_nt: torch.Tensor):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.linears = {name: module for name, module in self.model.named_modules() if is_block_linear(name, module)}
        self.original = {name: module.weight.detach().clone() for name, module in self.linears.items()}
        self.batches = windows_nt.split(8)
        self.reference = [self._log_probabilities(batch) for batch in self.batches]

    def original_score(self) -> Score:
        """The original against itself: its perplexity, KL 0, top-1 1."""
        return self._score()

    def score(self, weights_file: Path, bits: int, group: int) -> Score:
        """Score of the original with the file's weights put in, after checking that they are `bits` wide in groups."""
        weights = load_file(weights_file)
        check(weights, self.linears, bits, group)
        try:
            self._put({name: weights[f"{name}.weight"].float() for name in self.linears})
            return self._score()
        finally:
            self._put(self.original)

    def whole(self, model: Any) -> Score:
        """Score of another model of the same tokens."""
        own, self.model = self.model, model.eval()
        try:
            return self._score()
        finally:
            self.model = own

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, module in self.linears.items():
            module.weight.copy_(weights[name])

    @torch.inference_mode()
    def _log_probabilities(self, batch_nt: torch.Tensor) -> torch.Tensor:
        return self.model(batch_nt, use_cache=False).logits[:, :-1].log_softmax(-1)

    def _score(self) -> Score:
        nll = kl = same = count = 0.0
        for batch, reference in zip(self.batches, self.reference, strict=True):
            got = self._log_probabilities(batch)
            nll -= got.gather(-1, batch[:, 1:, None]).sum().item()
            kl += (reference.exp() * (reference - got)).sum().item()
            same += (reference.argmax(-1) == got.argmax(-1)).sum().item()
            count += batch[:, 1:].numel()
        return Score(math.exp(nll / count), kl / count, same / count)


class StreamedJudge:
    """A judge for large vocabularies, by `compress.evaluate`: weights are written as a plain model in fp32, and both models are
    streamed, their logits in parts."""

    def __init__(self, model: Path, windows_nt: torch.Tensor, work: Path):
        from compress.model.data import Tokens
        from compress.model.model import open_model

        self.source, self.work, self.tokens = open_model(str(model)), work, Tokens(windows_nt, "held-out text")
        self.linears = [site.weight.removesuffix(".weight") for site in self.source.state.graph.linear]
        self.original = self._state({}, "original")

    def original_score(self) -> Score:
        """The original's perplexity, KL 0, top-1 1."""
        from compress.evaluate import compare

        return Score(compare(None, self.original, self.tokens)[1].perplexity or math.nan, 0.0, 1.0)

    def score(self, weights_file: Path, bits: int, group: int) -> Score:
        """As that of `Judge`."""
        from compress.evaluate import compare

        weights = load_file(weights_file)
        check(weights, self.linears, bits, group)
        _, found = compare(self.original, self._state(weights, "judged"), self.tokens)
        none = math.nan  # only where nothing was predicted or compared
        return Score(found.perplexity or none, none if found.kl is None else found.kl, found.agreement or 0.0)

    def _state(self, weights: dict[str, torch.Tensor], name: str) -> Any:
        """The original in fp32, with these weights in place of its own linear layers'."""
        from compress.model.model import open_model

        folder, checkpoint = self.work / f"judge-{name}", self.source.checkpoint
        folder.mkdir(exist_ok=True)
        config = json.loads((self.source.folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
        mine = {f"{linear}.weight" for linear in self.linears} & weights.keys()
        tensors = {n: (weights[n] if n in mine else checkpoint.read(n)).float().contiguous() for n in checkpoint.specs}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return open_model(str(folder)).state


def check(weights: Mapping[str, torch.Tensor], linears: Collection[str], bits: int, group: int) -> None:
    """UnfairWeightsError where a layer's weights are missing, or are not `bits` wide in groups."""
    missing = [name for name in linears if f"{name}.weight" not in weights]
    if missing:
        raise UnfairWeightsError(f"{len(missing)} layers were not quantized, first {missing[0]}")
    for name in linears:
        most = most_values(weights[f"{name}.weight"], group)
        if most > 1 << bits:
            raise UnfairWeightsError(f"{name}: a group holds {most} values, {bits} bits allow {1 << bits}")


def is_block_linear(name: str, module: torch.nn.Module) -> bool:
    """True for the linear layers inside the blocks: what every tool quantizes."""
    return isinstance(module, torch.nn.Linear) and ".layers." in name


def most_values(W_oi: torch.Tensor, group: int) -> int:
    """The largest number of distinct values in any group of `group` neighbours in a row."""
    sorted_values = W_oi.reshape(-1, group).sort(-1).values
    return int((sorted_values.diff(dim=-1) != 0).sum(-1).max()) + 1
