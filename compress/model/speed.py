"""What a machine computes in. Weights are stored, quantized and served in a model's own dtype whatever this says.

A CPU without units for bf16 multiplies it at a sixth of the speed of fp32. Names of processors and flags tell little (a unit may
be there and be slow, or be emulated), so a product of each kind is timed, a tenth of a second each, once in a process.
"""

from __future__ import annotations

import time
from functools import cache

import torch

SIDE = 768  # of the matrices that are multiplied
MARGIN = 1.5  # fp32 has to be faster by this, lest noise decides


def computing(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """What blocks of a model in `dtype` compute in: fp32 instead of bf16 on a CPU that is faster at it. fp16 stays: what
    overflows in it overflows in the engine that is to serve the model."""
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu":
        return dtype
    return torch.float32 if matrix_speed(torch.float32) > MARGIN * matrix_speed(dtype) else dtype


@cache
def matrix_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product in `dtype` on the CPU, measured once in a process."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    a @ a
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        a @ a
        n += 1
    return 2 * SIDE**3 * n / (time.perf_counter() - start)
