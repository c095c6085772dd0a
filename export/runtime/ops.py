"""The torch operators through which everything goes that uses a packed matrix: `compress::linear` and its `gradient`,
`embedding`, `dequantize`.

A matrix is a list of tensors, the text of its format, its shape (n outputs, k inputs) and a layout:

    canonical   the tensors of `format.tensors((n, k))` in that order, without the `weight_shape` entries; any device
    codes       of entropy-coded matrices: the codes themselves, a byte each, and what they are multiplied by; any device
    neurons     turned over, so that columns lie together (neurons.py); any device
    tiles       what `cuda.repack` made of them; CUDA

They are plain registrations in a library: the decorator `torch.library.custom_op` costs four times as much a call. They can be
compiled in full graphs, exported, and traced with fake tensors, and pass gradients to the input and the bias. Weights are
decoded a block at a time, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import FormatError
from compress.export.runtime import fused
from compress.export.runtime.decode import Shape, blocks, format_of, named, rows_of, with_shapes
from compress.export.runtime.neurons import Neurons
from compress.formats import Dense, Factored, Format, LowRank, Rotated, Served, base_of

LAYOUTS = ("canonical", "codes", "neurons", "tiles")
_LIBRARY = torch.library.Library("compress", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor[] parts, Tensor? bias, str format, int n, int k, str layout) -> Tensor")
_LIBRARY.define("gradient(Tensor grad, Tensor[] parts, str format, int n, int k, str layout) -> Tensor")
_LIBRARY.define("embedding(Tensor ids, Tensor[] parts, str format, int n, int k, str layout, ScalarType dtype) -> Tensor")
_LIBRARY.define("dequantize(Tensor[] parts, str format, int n, int k, str layout, ScalarType dtype) -> Tensor")


def linear(x: Tensor, parts: list[Tensor], bias: Tensor | None, format: str, n: int, k: int, layout: str) -> Tensor:
    """x [..., k] times the transpose of the matrix, plus the bias [n]: [..., n] in the dtype of x."""
    fmt, flat = checked(format, layout), x.reshape(-1, k)
    if layout == "tiles":
        from compress.export.runtime.cuda import launch as cuda

        out = cuda.linear(flat.contiguous(), parts, bias, fmt, (n, k))
    elif layout == "neurons":
        held = Neurons(fmt, (n, k), named(format, (n, k), parts, layout), x.dtype)
        out = held.product(flat, torch.arange(k, device=x.device), bias)
    else:
        out = by_blocks(flat, named(format, (n, k), parts, layout), bias, fmt, (n, k))
    return out.view(*x.shape[:-1], n)


def by_blocks(x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, fmt: Format, shape: Shape) -> Tensor:
    """x [m, k] times the matrix. The product with low-rank factors is taken in fp32, and the bias added to the sum; and all that
    is done in rotated coordinates is."""
    if isinstance(fmt, Factored):
        return by_factors(x, tensors, bias, fmt, shape)
    if isinstance(fmt, Rotated):
        y = fmt.out_of(by_blocks(fmt.into(x), tensors, None, fmt.base, shape))
        return (y if bias is None else y + bias.float()).to(x.dtype)
    if isinstance(fmt, Served):
        x = fmt.inputs(tensors)(x)
    factors = factors_of(fmt, shape, tensors)
    inner = None if factors else bias
    out = fused.linear(x, tensors, inner, base_of(fmt), shape)
    if out is None:
        out = x.new_empty(len(x), shape[0])
        for start, stop, W_rk in blocks(fmt, shape, tensors, x.dtype):
            out[:, start:stop] = torch.nn.functional.linear(x, W_rk, None if inner is None else inner[start:stop])
    if factors is None:
        return out
    A_rk, B_nr = factors
    total = torch.addmm(out.float(), x.float() @ A_rk.T, B_nr.T)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def by_factors(x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, fmt: Factored, shape: Shape) -> Tensor:
    """x [m, k] times one factor, and that times the other, in the dtype of x: their product is never made."""
    biases = (None, bias)
    for (name, side), b in zip(fmt.factor_shapes(shape).items(), biases, strict=True):
        held = fmt.factor(tensors, name)
        if isinstance(fmt.factors, Dense):
            x = torch.nn.functional.linear(x, held["weight"].to(x.dtype), b)
        else:
            x = by_blocks(x, held, b, fmt.factors, side)
    return x


def embedding(ids: Tensor, parts: list[Tensor], format: str, n: int, k: int, layout: str, dtype: torch.dtype) -> Tensor:
    """The rows `ids` [...] of a matrix that is not in tiles: [..., k] in `dtype`. No other row is decoded."""
    fmt, tensors, flat = checked(format, layout), named(format, (n, k), parts, layout), ids.reshape(-1)
    if not len(flat):
        return parts[0].new_empty(*ids.shape, k, dtype=dtype)
    if isinstance(fmt, Rotated):
        if not fmt.inputs_only:
            raise FormatError(f"rows of a matrix in {fmt} are not looked up: a rotation of outputs mixes them")
        turned = rows_of(fmt.base, (n, k), tensors, torch.float32).at(flat)
        return fmt.turn_back(turned, dtype).view(*ids.shape, k)
    factors = factors_of(fmt, (n, k), tensors)
    if factors is None:
        return rows_of(fmt, (n, k), tensors, dtype).at(flat).view(*ids.shape, k)
    A_rk, B_nr = factors
    if isinstance(fmt, Factored):
        return (B_nr[flat] @ A_rk).to(dtype).view(*ids.shape, k)
    W_mk = rows_of(base_of(fmt), (n, k), tensors, torch.float32).at(flat) + B_nr[flat] @ A_rk
    return W_mk.to(dtype).view(*ids.shape, k)


def dequantize(parts: list[Tensor], format: str, n: int, k: int, layout: str, dtype: torch.dtype) -> Tensor:
    """The matrix [n, k] in `dtype`, whole."""
    fmt = checked(format, layout)
    if layout == "tiles":
        from compress.export.runtime.cuda import launch as cuda

        return cuda.dequantize(parts, fmt, (n, k), dtype)
    if layout == "neurons":
        return Neurons(fmt, (n, k), named(format, (n, k), parts, layout), dtype).at(slice(None)).T.contiguous()
    if layout == "codes":
        return whole(fmt, (n, k), named(format, (n, k), parts, layout), dtype)
    return fmt.dequantize(with_shapes(fmt, (n, k), named(format, (n, k), parts)), dtype)


def whole(fmt: Format, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A matrix of which the codes are in hand."""
    if isinstance(fmt, Rotated):
        return fmt.turn_back(whole(fmt.base, shape, tensors, torch.float32), dtype)
    return rows_of(fmt, shape, tensors, dtype).at(slice(None))


def factors_of(fmt: Format, shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A [r, k] and B [n, r], fp32, of a low-rank correction or of a product in place of a matrix; None where there are none."""
    return fmt.factor_matrices(with_shapes(fmt, shape, tensors)) if isinstance(fmt, LowRank | Factored) else None


def checked(format: str, layout: str) -> Format:
    """The format; FormatError for one that is not packed, or an unknown layout."""
    fmt = format_of(format)
    if isinstance(fmt, Dense) or layout not in LAYOUTS:
        raise FormatError(f"compress::linear takes packed formats in the layouts {', '.join(LAYOUTS)}, not {fmt} in '{layout}'")
    return fmt


def gradient(grad: Tensor, parts: list[Tensor], format: str, n: int, k: int, layout: str) -> Tensor:
    """grad [m, n] times the matrix: [m, k], summed in fp32 over the blocks."""
    fmt = format_of(format)
    if layout in ("tiles", "neurons"):
        return grad @ dequantize(parts, format, n, k, layout, grad.dtype)
    tensors = named(format, (n, k), parts, layout)
    if isinstance(fmt, Factored):
        A_rk, B_nr = fmt.factor_matrices(with_shapes(fmt, (n, k), tensors))
        return ((grad.float() @ B_nr) @ A_rk).to(grad.dtype)
    if isinstance(fmt, Rotated):
        return fmt.out_of_gradient(gradient(fmt.into_gradient(grad), parts, str(fmt.base), n, k, layout)).to(grad.dtype)
    total = torch.zeros(len(grad), k, dtype=torch.float32, device=grad.device)
    for start, stop, W_rk in blocks(fmt, (n, k), tensors, grad.dtype):
        total += grad[:, start:stop] @ W_rk
    if factors := factors_of(fmt, (n, k), tensors):
        A_rk, B_nr = factors
        total += (grad.float() @ B_nr) @ A_rk
    return total.to(grad.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, _, *ctx.matrix = inputs
    ctx.shape, ctx.count = x.shape, len(parts)
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    to_x, _, to_bias = ctx.needs_input_grad[:3]
    flat, parts = grad.reshape(-1, grad.shape[-1]), list(ctx.saved_tensors)
    x = torch.ops.compress.gradient(flat, parts, *ctx.matrix).view(ctx.shape) if to_x else None
    return x, [None] * ctx.count, flat.sum(0) if to_bias else None, None, None, None, None


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", linear, _device)
    _LIBRARY.impl("dequantize", dequantize, _device)
    _LIBRARY.impl("embedding", embedding, _device)
    _LIBRARY.impl("gradient", gradient, _device)
torch.library.register_fake(
    "compress::linear", lambda x, parts, bias, format, n, k, layout: x.new_empty(*x.shape[:-1], n), lib=_LIBRARY
)
torch.library.register_fake(
    "compress::embedding",
    lambda ids, parts, format, n, k, layout, dtype: ids.new_empty(*ids.shape, k, dtype=dtype),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "compress::dequantize", lambda parts, format, n, k, layout, dtype: parts[0].new_empty(n, k, dtype=dtype), lib=_LIBRARY
)
torch.library.register_fake(
    "compress::gradient", lambda grad, parts, format, n, k, layout: grad.new_empty(len(grad), k), lib=_LIBRARY
)
torch.library.register_autograd("compress::linear", _backward, setup_context=_keep, lib=_LIBRARY)
