"""Activations around a product on an NVIDIA GPU: turned, times the steps of inputs, in front of it; turned back behind it.

The kernels are turn_inputs.cu and turn_outputs.cu. Blocks of 1 stand for no rotation of inputs, and for outputs that have a sign
alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.export.runtime.cuda import nvrtc
from compress.formats import Format, Rotated

_EACH = 8 * nvrtc.THREADS  # numbers of a block of threads
_UNIT = 32  # inputs that rows are padded to where they are scaled
_SHARED = 4 * nvrtc.THREADS // 32


def block_of(fmt: Format) -> int:
    """In what blocks inputs are turned."""
    return fmt.block if isinstance(fmt, Rotated) else 1


def turn_inputs(x: Tensor, step: Tensor | None, block: int) -> Tensor:
    """a H S x [M, K] in the dtype of x, bf16 or fp16; a [K] in fp32, 1 at most, or none."""
    (m, k), out = x.shape, torch.empty_like(x)
    if m:
        args: list[nvrtc.Argument] = [x, step, out, None, k, k, block]
        nvrtc.launch("turn_inputs", inputs_variant(x.dtype, False), (m, -(-k // _EACH)), 0, args, x.device)
    return out


def turn_and_scale(x: Tensor, step: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """a H S x [M, P] in fp16, each row divided by a power of two, and those powers, fp32 [M]; P is K in whole units of 32."""
    (m, k), padded = x.shape, -(-x.shape[1] // _UNIT) * _UNIT
    out, scale = x.new_empty(m, padded, dtype=torch.float16), x.new_empty(m, dtype=torch.float32)
    args: list[nvrtc.Argument] = [x, step, out, scale, k, padded, block]
    nvrtc.launch("turn_inputs", inputs_variant(x.dtype, True), (m, -(-padded // _EACH)), _SHARED, args, x.device)
    return out, scale


def turn_outputs(y: Tensor, bias: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
    """S H y (+ bias) [M, N] in `dtype`, bf16 or fp16; y in that or in fp32, bias [N] in that."""
    (m, n), out = y.shape, y.new_empty(y.shape, dtype=dtype)
    if m:
        defines = outputs_variant(dtype, y.dtype == torch.float32)
        nvrtc.launch("turn_outputs", defines, (-(-m * n // _EACH), 1), 0, [y, bias, out, m, n, block], y.device)
    return out


def inputs_variant(dtype: torch.dtype, scaled: bool) -> nvrtc.Defines:
    """The macros of turn_inputs.cu for activations of `dtype`."""
    return nvrtc.defines(bf16=dtype == torch.bfloat16, scaled=scaled)


def outputs_variant(dtype: torch.dtype, wide: bool) -> nvrtc.Defines:
    """The macros of turn_outputs.cu for results in `dtype`, of sums in that or in fp32."""
    return nvrtc.defines(bf16=dtype == torch.bfloat16, wide=wide)
