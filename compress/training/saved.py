"""What autograd keeps for the way back, kept smaller: a byte for each number, or on the next memory down.

Both stand on autograd's own hooks (`saved_tensors_hooks`): forward passes, and so losses, are what they were, to the bit.

`int8` (Mesa, arXiv 2111.11124): groups of numbers on 256 levels between their least and largest, rounded up or down with
probabilities that make the mean exact (section 3.2). The range is that of the group itself; Mesa's running estimates save a pass
over it and can clip. Groups are numbers of one head: attention's tensors [b, heads, t, d] are cut along t, so that a head with
small numbers does not share its range with one of large ones (section 3.3); others, [b, t, d], are cut by tokens.

`offload` keeps tensors as they are, on the machine where a model trains on a GPU, and in a file where it trains on a CPU.

A hook is called for each tensor that is saved and not once for each storage: the same inputs are kept by three projections,
queries by the rotation and by the attention. What was kept once is found again by storage, place and version. A storage's
address is known to no other while a weak reference to it lives, so what was kept holds one.

Left as they are: parameters and what is made of them (matrices.py keeps notes of those), whole numbers, masks, and what has few
numbers for each token: statistics of norms and of fused attention, from which probabilities are computed anew.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from compress.state.checkpoint import disk_error
from compress.training.options import Int8, Offload, Way

GROUP, SMALL, FEW = 256, 1024, 16  # numbers that share a range, at least; of a tensor that is worth it; for each token
WIDEST = 1e30  # a range that is a mask's


class Held(Protocol):
    """A run of numbers that was kept, [n]. storage: where it lay."""

    storage: StorageWeakRef | None

    def numbers(self) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """How numbers that lie in memory as [outer, tokens, heads, d] are cut into groups of `tokens` x d."""

    outer: int
    tokens: int
    heads: int
    d: int

    @classmethod
    def of(cls, t: Tensor) -> Layout:
        """Of a dense tensor: the last two axes of one of four are of a head."""
        d, count = t.shape[-1], t.numel()
        heads, among = 1, count // d
        if t.dim() == 4:
            among = t.shape[2]
            heads = t.shape[1] if t.stride(1) < t.stride(2) else 1
        tokens = next((c for c in range(min(among, -(-GROUP // d)), among + 1) if among % c == 0), among)
        return cls(count // (tokens * heads * d), tokens, heads, d)

    def groups(self, flat: Tensor) -> Tensor:
        """Numbers [n] as [groups, numbers of one]."""
        cut = flat.view(self.outer, self.tokens, self.heads, self.d)
        return cut.transpose(1, 2).reshape(-1, self.tokens * self.d)

    def flat(self, groups: Tensor) -> Tensor:
        return groups.view(self.outer, self.heads, self.tokens, self.d).transpose(1, 2).reshape(-1)


@dataclass(eq=False)
class Bytes:
    """codes [g, c] uint8; low and step [g, 1], of each group."""

    codes: Tensor
    low: Tensor
    step: Tensor
    layout: Layout
    dtype: torch.dtype
    storage: StorageWeakRef | None = None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes

    def numbers(self) -> Tensor:
        return self.layout.flat(torch.addcmul(self.low, self.codes, self.step)).to(self.dtype)


def in_bytes(flat: Tensor, layout: Layout, generator: torch.Generator | None) -> Bytes | None:
    """Numbers [n] in a byte each, rounded at random, to the nearest without a generator; None where they are a mask's."""
    x = layout.groups(flat).float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if not float((high - low).max()) < WIDEST:
        return None
    step = ((high - low) / 255).clamp_(min=torch.finfo(torch.float32).tiny)
    raised = 0.5 if generator is None else torch.rand(x.shape, generator=generator, device=x.device)
    codes = x.sub(low).div_(step).add_(raised).floor_().clamp_(0, 255).to(torch.uint8)
    return Bytes(codes, low, step, layout, flat.dtype)


@dataclass(eq=False)
class OnHost:
    """Numbers of a GPU, in the machine's memory."""

    there: Tensor
    device: torch.device
    storage: StorageWeakRef | None = None

    def numbers(self) -> Tensor:
        return self.there.to(self.device)


class File:
    """A nameless file in a folder, written from its start anew for every pass."""

    def __init__(self, folder: Path | None):
        self.place = Path(tempfile.gettempdir()) if folder is None else folder
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            self.number, name = tempfile.mkstemp(dir=self.place)
        except OSError as e:
            raise disk_error(e, self.place) from None
        os.unlink(name)
        weakref.finalize(self, os.close, self.number)
        self.end = 0

    def write(self, flat: Tensor) -> InFile:
        place, data = self.end, memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            while self.end - place < len(data):
                self.end += os.pwrite(self.number, data[self.end - place :], self.end)
        except OSError as e:
            raise disk_error(e, self.place) from None
        return InFile(self, place, flat.numel(), flat.dtype)


@dataclass(eq=False)
class InFile:
    """Numbers in a file, from a place on."""

    file: File
    place: int
    count: int
    dtype: torch.dtype
    storage: StorageWeakRef | None = None

    def numbers(self) -> Tensor:
        found = torch.empty(self.count, dtype=self.dtype)
        into: Any = memoryview(found.view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(into):
            done += os.preadv(self.file.number, [into[done:]], self.place + done)
        return found


@dataclass(frozen=True)
class View:
    """A tensor on numbers that were kept."""

    of: Any
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        return torch.as_strided(self.of.numbers(), self.size, self.stride)


class Saver:
    """Keeps what is saved in a forward pass by `keep`: numbers [n] and how they lie; None from it leaves a tensor as it is."""

    def __init__(self, keep: Callable[[Tensor, Layout], Held | None], heads: bool = True):
        """heads: whether attention's tensors [b, heads, t, d] are kept so too."""
        self.keep, self.heads, self.tokens = keep, heads, 0
        self.known: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    def pack(self, t: Tensor) -> Tensor | View:
        if not worth(t, self.tokens) or (t.dim() == 4 and not self.heads):
            return t
        order = sorted(range(t.dim()), key=t.stride, reverse=True)
        dense = t.permute(order).is_contiguous()
        lies = t if dense else t.contiguous()
        storage = StorageWeakRef(t.untyped_storage())
        key = (storage.cdata, t._version, t.storage_offset(), t.numel(), None if dense else (t.shape, t.stride()))
        held = self.known.get(key)
        if held is None:
            held = self.keep(lies.permute(order).reshape(-1) if dense else lies.view(-1), Layout.of(lies))
            if held is None:
                return t
            held.storage = storage  # no other is taken for it while this lives
            self.known[key] = held
        return View(held, t.shape, lies.stride())

    def unpack(self, kept: Tensor | View) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor()


def worth(t: Tensor, tokens: int) -> bool:
    """Whether a tensor that is saved in a pass of so many tokens is one to keep smaller."""
    return (
        t.is_floating_point()
        and not isinstance(t, nn.Parameter)
        and t.numel() >= max(SMALL, FEW * tokens)
        and 0 not in t.stride()
    )


def anew(config: object) -> bool:
    """Whether a model's attention computes its probabilities anew on the way back."""
    return getattr(config, "_attn_implementation", None) != "eager"


def smaller(nbytes: int, numel: int, way: type[Way]) -> int:
    """What a tensor that is worth it takes on the device in the end."""
    return {Int8: numel + 8 * -(-numel // GROUP), Offload: 0}.get(way, nbytes)
