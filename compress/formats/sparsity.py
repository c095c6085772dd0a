"""Activation sparsity: which neurons, or which inputs, of a matrix a token asks for, and so which of its bytes are read.

The weights stay as they are; what is left out is found anew for every token. Three ways to find it:

    teal             |x_k| < t: input k of the matrix is taken for zero, and its column is not read (TEAL, arXiv 2408.14690)
    cats:ACT         |ACT(y_j)| < t_j, with y what the matrix puts out: neuron j is silent, so row j of `up` and column j of
                     `down` are not read; this matrix itself is read whole (CATS, arXiv 2404.08763)
    predictor:rR     (B A x)_j < t_j with A [R, K] and B [m, R]: neuron j is silent, and its row of this matrix is not read either
                     (Deja Vu, arXiv 2310.17157, whose predictor has this form)

A silent neuron's y_j is put to zero. Every activation here maps zero to zero, so the input of `down` is zero there as well, and
whoever multiplies by `down` sees that by itself. `:joined` says that the matrix holds gate above up, of which the gate is meant.

As a format does, a value here has a text, lists its tensors, and knows what is read of a matrix in bytes. Engines leave out rows
of a matrix whose codes lie in rows (`Can.SKIP_ROWS`), and columns of one that can be turned over (`Can.SKIP_COLUMNS`); of others
all is read, for what a neuron takes there is not to be had alone: trellis and entropy codes, factors and rotations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compress.errors import FormatError, ModelError
from compress.formats import bitpack
from compress.formats.codebooks import NF, Lut
from compress.formats.formats import Format
from compress.formats.grid import Can, Listing, Shape, listed_bytes
from compress.formats.ints import Dense, Int

THRESHOLD, DOWN, UP = "sparsity_threshold", "sparsity_A", "sparsity_B"  # suffixes of tensors
SUFFIXES = (THRESHOLD, DOWN, UP)
KINDS = ("cats", "teal", "predictor")
WHOLE = 0.6  # share of the neurons of a batch above which a matrix is read whole: to gather costs more than it spares then
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
IN_CONFIGS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
              "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}  # fmt: skip
assert set(IN_CONFIGS.values()) == set(ACTIVATIONS)
_TEXT = re.compile(r"(teal)|cats:(\w+?)(:joined)?|predictor:r(\d+)(:joined)?")


@dataclass(frozen=True)
class Sparsity:
    """How it is found what a token needs of one matrix. act: of `cats`, a key of `ACTIVATIONS`; rank: of `predictor`."""

    kind: str
    act: str = ""
    rank: int = 0
    joined: bool = False

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """The value that has this text; FormatError where none has."""
        found = _TEXT.fullmatch(text)
        if found is None or (found[2] and found[2] not in ACTIVATIONS) or (found[4] and not 0 < int(found[4]) < 1 << 20):
            raise FormatError(f"unknown sparsity '{text[:40]}'; there are teal, cats:ACT with {', '.join(ACTIVATIONS)}, and "
                              "predictor:rR")  # fmt: skip
        if found[1]:
            return cls("teal")
        if found[2]:
            return cls("cats", found[2], joined=bool(found[3]))
        return cls("predictor", rank=int(found[4]), joined=bool(found[5]))

    def __str__(self) -> str:
        how = {"teal": "teal", "cats": f"cats:{self.act}", "predictor": f"predictor:r{self.rank}"}[self.kind]
        return how + ":joined" * self.joined

    def neurons(self, shape: Shape) -> int:
        """How many neurons a matrix [N, K] has that are chosen from; of `teal` its inputs."""
        return shape[1] if self.kind == "teal" else shape[0] // (1 + self.joined)

    def tensors(self, shape: Shape) -> Listing:
        """Suffix -> (dtype, shape) of what is written beside a matrix [N, K]: thresholds, and the predictor's factors."""
        if self.kind == "teal":
            return {THRESHOLD: (torch.float32, (1,))}
        m = self.neurons(shape)
        listing: Listing = {THRESHOLD: (torch.float32, (m,))}
        if self.kind == "predictor":
            listing |= {DOWN: (torch.bfloat16, (self.rank, shape[1])), UP: (torch.bfloat16, (m, self.rank))}
        return listing

    def nbytes(self, shape: Shape) -> int:
        """Bytes that are read for a token to find what it needs."""
        return listed_bytes(self.tensors(shape))

    def require(self, tensors: Mapping[str, Tensor], stem: str) -> None:
        """ModelError where a tensor of the matrix at `stem` holds what nothing can be compared with: NaN or infinite values, or,
        where it is magnitudes that are compared, negative ones."""
        least = -math.inf if self.kind == "predictor" else 0.0
        for suffix, t in tensors.items():
            if not bool((t.isfinite() & (t >= least)).all()):
                kinds = "NaN, infinite or negative" if suffix == THRESHOLD and not least else "NaN or infinite"
                raise ModelError(f"'{stem}.{suffix}' holds {kinds} values; the artifact is damaged, export it again")

    def inputs(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of `teal`: the inputs [..., K] with zeros for those that are left out."""
        return torch.where(x.abs() >= tensors[THRESHOLD].to(x.dtype), x, torch.zeros((), dtype=x.dtype, device=x.device))

    def active(self, x: Tensor, y: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of the others: which neurons speak, bool [..., m], given what the matrix reads, x, and puts out, y; a predictor asks
        for no y."""
        if self.kind == "predictor":
            logits = (x.float() @ tensors[DOWN].float().T) @ tensors[UP].float().T
            return logits >= tensors[THRESHOLD]
        assert y is not None
        gate = y[..., : y.shape[-1] // 2] if self.joined else y
        return ACTIVATIONS[self.act](gate).abs().float() >= tensors[THRESHOLD]

    def outputs(self, y: Tensor, active: Tensor) -> Tensor:
        """What the matrix puts out, with zeros for silent neurons; of joined matrices `up` is left as it is."""
        if not self.joined:
            return torch.where(active, y, torch.zeros((), dtype=y.dtype, device=y.device))
        return torch.cat([torch.where(active, y[..., : active.shape[-1]], 0), y[..., active.shape[-1] :]], -1)


def activation_of(config: Any) -> str:
    """What stands behind the first matrix of an MLP by a config of transformers', as the config calls it; "" where it does not
    say."""
    config = config.get_text_config()
    names = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return next((str(act) for name in names if (act := getattr(config, name, None))), "")


# --- bytes that are read ----------------------------------------------------------------------------------------------


def whole_bytes(fmt: Format, shape: Shape) -> int:
    """Bytes of a matrix that is read whole."""
    return listed_bytes({suffix: held for suffix, held in fmt.tensors(shape).items() if not suffix.endswith("weight_shape")})


def row_bytes(fmt: Format, shape: Shape, rows: float) -> float:
    """Bytes of so many rows of a matrix [N, K]; of the whole where rows are not to be had alone."""
    return whole_bytes(fmt, shape) * (rows / shape[0] if Can.SKIP_ROWS in fmt.can else 1.0)


def column_bytes(fmt: Format, shape: Shape, columns: float) -> float:
    """Bytes of so many columns of a matrix [N, K] that is turned over: codes of these alone, and the scales of all groups, which
    columns share."""
    if Can.SKIP_COLUMNS not in fmt.can:
        return whole_bytes(fmt, shape)
    n, k = shape
    if isinstance(fmt, Dense):
        return n * fmt.dtype.itemsize * columns
    assert isinstance(fmt, Int | NF | Lut)
    return 4 * bitpack.words(n, fmt.bits) * columns + n * fmt.groups(k) * (2 + (not fmt.symmetric))
