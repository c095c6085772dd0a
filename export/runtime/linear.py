"""Modules that keep a matrix packed: a Linear, and an embedding.

Their buffers have the artifact's own names, so a loader fills them like any other. The dtypes of these buffers are part of the
format: `.to(dtype)` and `.half()` change what is computed in, and leave them as they are. On CUDA the buffers are
repacked into tiles, which is final: an engine does not go back to a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import FormatError, ModelError
from compress.export.runtime import ops
from compress.export.runtime.decode import DECODED, Shape, decoded, format_of, named, part_names, with_shapes
from compress.export.runtime.neurons import turned
from compress.formats import Dense, Ecq, numbers_of

assert ops.LAYOUTS  # the operators are registered
LEAVES = {"weight": "weight_codes"}  # what a tensor of a format is called in a module, whose `weight` is the matrix itself


def leaf_of(suffix: str) -> str:
    """The name, within a packed module, of a tensor of its format."""
    return LEAVES.get(suffix, suffix)


class Made(Tensor):
    """A matrix that was made to be read. Merging an adapter sets its `data`, which would be lost without a word: an error."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise ModelError("a packed matrix cannot be written to, so nothing merges into it; keep the adapter beside it")


class Packed(nn.Module):
    """What packed modules share: the tensors of one matrix in a format, [out, in], and the dtype that it computes in.

    format: its text. layout: "canonical"; after `prepare` "tiles" on CUDA, else "codes" where they were entropy-coded. The module
    is made on `device` without content.
    """

    format: str
    shape: Shape
    layout: str
    dtype: torch.dtype

    def _hold(
        self, format: str, shape: Shape, dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> None:
        self.format, self.shape, self.layout, self.dtype = format, shape, "canonical", dtype
        spec = format_of(format).tensors(shape, scale_dtype)
        self._put({suffix: torch.empty(size, dtype=kind, device=device) for suffix, (kind, size) in spec.items()})
        self._is_hf_initialized = True  # transformers need not look for a weight to initialize

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold tensors of the format, by suffix, such as `weight_packed` or `lora_A.weight`."""
        for suffix, tensor in tensors.items():
            child, _, leaf = leaf_of(suffix).rpartition(".")
            if child and child not in self._modules:
                self.add_module(child, nn.Module())
            (self.get_submodule(child) if child else self).register_buffer(leaf, tensor)
        self._places = [tuple(leaf_of(name).rpartition(".")[::2]) for name in part_names(self.format, *self.shape)]

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that the operators take, in the module's layout."""
        found = []
        for child, leaf in self._places:
            holder = getattr(self, child) if child else self
            found.append(getattr(holder, leaf))
        return found

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in], dequantized to the module's dtype: a new tensor at every access, not to be written to."""
        whole: Tensor = torch.ops.compress.dequantize(self.parts, self.format, *self.shape, self.layout, self.dtype)
        return whole.as_subclass(Made)

    def prepare(self) -> None:
        """Decode what is entropy-coded, once; and repack where the matrix is on CUDA."""
        self.decode_once()
        plain = isinstance(numbers_of(format_of(self.format)), Dense)  # factors that torch multiplies by as they are
        if self.layout in ("canonical", "codes") and self.parts[0].device.type == "cuda" and not plain:
            self.repack()

    def decode_once(self) -> None:
        """Decode what is entropy-coded, where there is something to decode."""
        numbers = numbers_of(format_of(self.format))
        if isinstance(numbers, Ecq) and self.layout == "canonical" and self.parts[0].device.type != "meta":
            self.decode(numbers)

    def decode(self, numbers: Ecq) -> None:
        """Hold codes, a byte each, in place of the words that they were coded into; of a module without content, their places."""
        held = named(self.format, self.shape, self.parts)
        if self.parts[0].device.type == "meta":
            held["weight_codes"] = torch.empty(self.shape, dtype=torch.int8, device="meta")
            found = {name: held[name] for name in DECODED}
        else:
            found = decoded(numbers, self.shape, held)
        self._drop()
        for name, tensor in found.items():
            self.register_buffer(name, tensor, persistent=False)
        self._places, self.layout = [("", name) for name in found], "codes"

    def repack(self) -> None:
        """Repack for the kernel and drop the format's tensors; what the kernel does not take stays, with a warning."""
        from compress.export.runtime.cuda import launch as cuda

        fmt = format_of(self.format)
        why = cuda.obstacle(fmt, self.shape, self.dtype)
        if why:
            warnings.warn(f"compress: no kernel for {self.format}: {why}; torch decodes it at every use", stacklevel=2)
            return
        held = named(self.format, self.shape, self.parts, self.layout)
        tiles = cuda.repack(fmt, self.shape, with_shapes(fmt, self.shape, held), self.dtype)
        self._drop()
        for i, tile in enumerate(tiles):
            self.register_buffer(f"tile_{i}", tile, persistent=False)
        self._places, self.layout = [("", f"tile_{i}") for i in range(len(tiles))], "tiles"

    def turn(self) -> None:
        """Hold the matrix turned over, so that its columns are read alone."""
        found = turned(format_of(self.format), self.shape, named(self.format, self.shape, self.parts))
        self._drop()
        for name, tensor in found.items():
            self.register_buffer(name, tensor, persistent=False)
        self._places, self.layout = [("", name) for name in found], "neurons"

    def _drop(self) -> None:
        if self.layout == "codes":
            for _, leaf in self._places:
                del self._buffers[leaf]
            return
        for suffix in format_of(self.format).tensors(self.shape):
            child, _, leaf = leaf_of(suffix).rpartition(".")
            if child:
                self._modules.pop(child, None)
            else:
                del self._buffers[leaf]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As torch does, but what the format says of dtypes stays; on CUDA, repack."""
        held = {id(t) for t in self.buffers()}
        was = self.parts[0].device.type

        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = id(tensor) not in held or moved.dtype == tensor.dtype
            return moved if kept else tensor.to(moved.device)

        super()._apply(careful, recurse)  # type: ignore[no-untyped-call]
        now = self.parts[0].device.type
        if self.layout == "tiles" and (now != was or self._computing(fn) != self.dtype):
            raise ModelError("a model packed for CUDA stays there in its dtype; load it again for another device or dtype")
        self.dtype = self._computing(fn)
        self.prepare()
        return self

    def _computing(self, fn: Callable[[Tensor], Tensor]) -> torch.dtype:
        return fn(torch.empty(0, dtype=self.dtype, device=self.parts[0].device)).dtype


def prepare(model: nn.Module) -> None:
    """Compile what the packed modules on CUDA need, all at once, and repack them; before a graph is captured, for one."""
    held = [m for m in model.modules() if isinstance(m, PackedLinear) and m.parts[0].device.type == "cuda"]
    if held:
        from compress.export.runtime.cuda import launch as cuda

        for device in {m.parts[0].device for m in held}:
            needs = {(format_of(m.format), m.shape, m.dtype) for m in held if m.parts[0].device == device}
            cuda.prepare([need for need in needs if not cuda.obstacle(*need)], device)
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            try:
                module.prepare()
            except FormatError as e:
                raise ModelError(f"'{name}': {e}") from None


class PackedLinear(Packed, nn.Linear):  # type: ignore[override]
    """A Linear whose weight stays packed. It is a Linear to whoever asks, such as PEFT; `weight` is made when it is read."""

    def __init__(
        self,
        format: str,
        shape: Shape,
        dtype: torch.dtype,
        bias: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self._hold(format, shape, dtype, scale_dtype, device)
        held = nn.Parameter(torch.empty(shape[0], dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", held)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        n, k = self.shape
        out: Tensor
        if self.layout == "tiles" and x.dtype != self.dtype:
            out = torch.ops.compress.linear(x.to(self.dtype), self.parts, self.bias, self.format, n, k, self.layout)
            return out.to(x.dtype)
        out = torch.ops.compress.linear(x, self.parts, self.bias, self.format, n, k, self.layout)
        return out

    def correct(self, format: str, factors: Mapping[str, Tensor]) -> None:
        """Add low-rank factors, by suffix as in `lora_A.weight`; `format` is the present one with their rank."""
        device, self.format = self.parts[0].device, format
        self._put({suffix: tensor.to(device) for suffix, tensor in factors.items()})

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}, {self.layout}"


class PackedEmbedding(Packed, nn.Embedding):  # type: ignore[override]
    """An embedding whose table stays packed, on any device in the tensors of its format; rows are decoded when asked for."""

    def __init__(
        self,
        format: str,
        shape: Shape,
        dtype: torch.dtype,
        padding: int | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
        factor: float = 1.0,
    ):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.factor = padding, factor
        self._hold(format, shape, dtype, scale_dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., embedding_dim] in the module's dtype, times what the architecture scales rows by."""
        rows: Tensor = torch.ops.compress.embedding(ids, self.parts, self.format, *self.shape, self.layout, self.dtype)
        return rows if self.factor == 1 else rows * torch.tensor(self.factor).to(rows.dtype)

    def prepare(self) -> None:
        """What is entropy-coded is decoded, once; else nothing: the kernels multiply, and do not take rows."""
        self.decode_once()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


class PackedHead(PackedLinear):
    """An output head that shares the table of a packed embedding: its very tensors on a CPU, tiles made of them on CUDA."""

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self._tiles = False
        self._table = (table,)  # in a tuple, since it is a part of the model elsewhere
        self.out_features, self.in_features = self.shape = table.shape
        self.format, self.dtype = table.format, table.dtype
        self.register_parameter("bias", bias)  # the very one, which may be another module's too
        self._is_hf_initialized = True

    @property
    def parts(self) -> list[Tensor]:
        """The tensors that the operators take: the table's own, until there are tiles."""
        return super().parts if self._tiles else self._table[0].parts

    @property
    def layout(self) -> str:
        """The table's own, until there are tiles."""
        return "tiles" if self._tiles else self._table[0].layout

    @layout.setter
    def layout(self, layout: str) -> None:
        self._tiles = layout == "tiles"

    def decode(self, numbers: Ecq) -> None:
        """The table's codes, which are those of both."""
        self._table[0].prepare()

    def _drop(self) -> None:
        """Nothing: rows are still looked up in the tensors of the format."""
