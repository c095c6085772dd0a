"""Matrices that learn, or are needed by what learns: each is made anew whenever its module is called.

A matrix of a model in training is a function of a few parameters, and modules of all kinds ask for nothing but the matrix: so
linear layers, transposed ones, embeddings and experts are trained by one mechanism. There are five kinds:

    Free        W, a parameter
    Packed      a format's tensors, which stay as they are
    Read        the same, or a dense matrix that stays, read from disk each time
    Scaled      s ⊙ Q: the codes stay, the scale of each group learns; s = s₀ (1 + t), rounded as it will be stored
    Rounded     the level nearest to W of each weight on a grid that stays; the gradient passes to W as if it were W
                (straight through, arXiv 1308.3432)

and any of these may have a product of low rank added, Q + B A, whose factors learn. Scales and factors are rounded to the dtype
that they are stored in whenever they are used, and matrices to that of the model, so a forward pass is that of the artifact.

Autograd would keep every made matrix until its layer's backward pass: more than the dense model takes. `Remaking` keeps a note of
where a matrix came from instead, and it is made once more. (A Function for each kind of layer would do the same, for those kinds
of layer that one thought of.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats import Dense, Factored, LowRank
from compress.formats import Packed as Stored
from compress.formats.grid import Grid, Quantized, encoded, in_groups, restore, round_scale
from compress.training.saved import Saver


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def through(value: Tensor, round_: Callable[[Tensor], Tensor]) -> Tensor:
    """`round_(value)` to the bit, with the gradient of `value`."""
    made: Tensor = _Through.apply(value, round_(value.detach()).to(value.dtype))  # type: ignore[no-untyped-call]
    return made


class Matrix(nn.Module):
    """A matrix W [out, in] in fp32, made by calling it. `stored`: what it is to be written as; None where it is dense."""

    def stored(self) -> Stored | None:
        return None


def moved(packed: Stored, device: torch.device) -> Stored:
    """The same with its tensors on a device."""
    return replace(packed, tensors={n: t.to(device) for n, t in packed.tensors.items()})


class Free(Matrix):
    """A dense matrix; it learns in fp32, or stays in what it is stored in."""

    def __init__(self, W_nk: Tensor, learns: bool):
        super().__init__()
        self.W_nk = nn.Parameter(W_nk.float() if learns else W_nk, requires_grad=learns)

    def forward(self) -> Tensor:
        return self.W_nk.float()


class Read(Matrix):
    """A matrix that does not learn and is read whenever it is asked for: `dense`, or `codes` in a format."""

    def __init__(self, device: torch.device, dense: Callable[[], Tensor] | None, codes: Callable[[], Stored] | None = None):
        super().__init__()
        self.device, self.dense, self.codes = device, dense, codes

    def forward(self) -> Tensor:
        if self.codes is not None:
            return moved(self.codes(), self.device).dequantize(torch.float32)
        assert self.dense is not None
        return self.dense().to(self.device).float()

    def stored(self) -> Stored | None:
        return None if self.codes is None else self.codes()


class Packed(Matrix):
    """A matrix in a format, none of which learns."""

    def __init__(self, packed: Stored, device: torch.device):
        super().__init__()
        self.packed = moved(packed, device)

    def forward(self) -> Tensor:
        return self.packed.dequantize(torch.float32)

    def stored(self) -> Stored:
        return self.packed


class _Scale(torch.autograd.Function):
    """Codes on a grid whose scales are s [N, G]: what a weight is has s as a factor, so ∂W/∂s is the matrix at s = 1. It is made
    again for the backward pass, and the codes are kept packed."""

    @staticmethod
    def forward(ctx: Any, s_ng: Tensor, packed: Stored) -> Tensor:
        ctx.packed = packed
        return _on(packed, s_ng)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (G_nk,) = gradients
        fmt = ctx.packed.format
        unit_nk = _on(ctx.packed, None)
        return in_groups(unit_nk.mul_(G_nk), fmt.width(G_nk.shape[1]), 1).sum(-1), None


def _on(packed: Stored, s_ng: Tensor | None) -> Tensor:
    """The matrix that codes stand for on other scales; on 1 where there are none."""
    fmt = packed.format
    assert isinstance(fmt, Quantized)
    codes, grid = fmt.unpack(packed.tensors)
    s_ng = torch.ones_like(grid.scale, dtype=torch.float32) if s_ng is None else s_ng
    return restore(codes, Grid(s_ng, grid.zero, grid.table), fmt)


class Scaled(Matrix):
    """A matrix in a format with a grid, of which the scales learn: t [N, G], by how much each differs from what it was."""

    def __init__(self, packed: Stored, device: torch.device):
        super().__init__()
        self.packed = moved(packed, device)
        assert isinstance(packed.format, Quantized)
        self.start = packed.format.unpack(self.packed.tensors)[1].scale
        self.t_ng = nn.Parameter(torch.zeros(self.start.shape, device=device))

    @property
    def scales(self) -> Tensor:
        s_ng = self.start.float() * (1 + self.t_ng)
        return through(s_ng, lambda s: round_scale(s, self.start.dtype))

    def forward(self) -> Tensor:
        made: Tensor = _Scale.apply(self.scales, self.packed)  # type: ignore[no-untyped-call]
        return made

    def stored(self) -> Stored:
        fmt = self.packed.format
        assert isinstance(fmt, Quantized)
        codes, grid = fmt.unpack(self.packed.tensors)
        return Stored(
            fmt, self.packed.shape, fmt.pack(codes, Grid(self.scales.detach().to(grid.scale.dtype), grid.zero, grid.table))
        )


class Rounded(Matrix):
    """A matrix in a format with a grid, whose weights learn and are rounded to their nearest levels whenever they are used."""

    def __init__(self, packed: Stored, device: torch.device):
        super().__init__()
        assert isinstance(packed.format, Quantized)
        self.format: Quantized = packed.format
        self.packed_as, self.shape = packed.format, packed.shape
        codes, self.grid = self.format.unpack(moved(packed, device).tensors)
        self.W_nk = nn.Parameter(restore(codes, self.grid, self.format))

    def codes(self) -> Tensor:
        return encoded(self.W_nk.detach(), self.grid, self.format)

    def forward(self) -> Tensor:
        return through(self.W_nk, lambda _: restore(self.codes(), self.grid, self.format))

    def stored(self) -> Stored:
        return Stored(self.packed_as, self.shape, self.format.pack(self.codes(), self.grid))


class Corrected(Matrix):
    """A matrix plus a product of factors, W + B A; `fmt` is what both are stored as together, None for a dense one, which the
    product is added to in the end. kept: the stored tensors of factors that do not learn, None where they do."""

    def __init__(self, base: Matrix, A_rk: Tensor, B_nr: Tensor, fmt: LowRank | None, kept: Mapping[str, Tensor] | None = None):
        super().__init__()
        self.base, self.format, self.kept = base, fmt, kept
        self.A_rk, self.B_nr = (nn.Parameter(f.float(), requires_grad=kept is None) for f in (A_rk, B_nr))

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.format is None or self.kept is not None:
            return self.A_rk, self.B_nr
        assert isinstance(self.format.factors, Dense)
        dtype = self.format.factors.dtype
        return through(self.A_rk, lambda A: A.to(dtype)), through(self.B_nr, lambda B: B.to(dtype))

    def forward(self) -> Tensor:
        A_rk, B_nr = self.factors()
        return torch.addmm(self.base(), B_nr, A_rk)

    def stored(self) -> Stored | None:
        base = self.base.stored()
        if self.format is None or base is None:
            return None
        tensors = {n: t.cpu() for n, t in base.tensors.items()}
        if self.kept is not None:
            return Stored(self.format, base.shape, {**tensors, **self.kept})
        A_rk, B_nr = (f.detach().cpu() for f in self.factors())
        return Stored(self.format, base.shape, self.format.pack(tensors, A_rk, B_nr))


# --- made when they are needed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Note:
    """A view of a made matrix: what makes it, and how the view lies in it."""

    make: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Remaking:
    """Inside `kept_as_notes`, autograd keeps notes in place of the matrices that are `lent` to modules."""

    def __init__(self) -> None:
        self._lent: dict[int, Callable[[], Tensor]] = {}

    def lend(self, matrix: Tensor, make: Callable[[], Tensor]) -> None:
        self._lent[matrix.untyped_storage().data_ptr()] = make

    def take_back(self, matrix: Tensor) -> None:
        self._lent.pop(matrix.untyped_storage().data_ptr(), None)

    @contextmanager
    def kept_as_notes(self, saver: Saver | None = None) -> Iterator[None]:
        """saver: what keeps all else, see saved.py."""

        def pack(t: Tensor) -> Any:
            make = self._lent.get(t.untyped_storage().data_ptr())
            if make is None:
                return t if saver is None else saver.pack(t)
            return _Note(make, t.size(), t.stride(), int(t.storage_offset()))

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, _Note):
                with torch.no_grad():
                    return kept.make().as_strided(kept.size, kept.stride, kept.offset)
            return kept if saver is None else saver.unpack(kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def learnt_scale(fmt: object) -> bool:
    """Whether a format has scales that can be moved each by itself."""
    return isinstance(fmt, Quantized) and fmt.rescalable and not isinstance(fmt, LowRank | Factored)
