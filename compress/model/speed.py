"""What a machine computes in. Weights are stored, quantized and served in a model's own dtype whatever this says.

A CPU without units for bf16 multiplies it at a sixth of the speed of fp32, one that has them may still do so at half of it. Names
of processors and flags tell little, so products of each kind are timed, once in a process: the quickest of a few of them, since
machines are busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

SIDE, TRIES = 768, 12  # of the matrices that are multiplied; how often
# By so much fp32 has to be faster. It is by 6 without units for bf16 and by 1.9 with those of AVX-512 alone; with AMX it is
# slower by several times. So no CPU is near the margin, and what else it does meanwhile decides nothing.
MARGIN = 1.4


def computing(dtype: torch.dtype, device: str = "cpu") -> torch.dtype:
    """What blocks of a model in `dtype` compute in: fp32 instead of bf16 on a CPU that is faster at it. fp16 stays: what
    overflows in it overflows in the engine that is to serve the model."""
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu":
        return dtype
    return torch.float32 if matrix_speed(torch.float32) > MARGIN * matrix_speed(dtype) else dtype


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Inside, fp32 matrix products on CPU round their factors to bf16 and sum in fp32, or are exact (``ieee``).

    Activations of an fp32 model are then as precise as those of a bf16 model, at several times the speed; where bf16 is not the
    faster one, they are exact in either case. A Hessian stays the exact product of (rounded) activations, so it stays positive.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = kind if computing(torch.bfloat16) == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


@cache
def matrix_speed(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product in `dtype` on the CPU, measured once in a process."""
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / quickest(lambda: a @ a)


@cache
def softmax_speed() -> float:
    """Logits a second of which the softmax is taken, measured once in a process."""
    z = torch.ones(256, 8192)
    return z.numel() / quickest(lambda: (z - z.amax(-1)[:, None]).exp_().sum(-1))


def quickest(do: Callable[[], object]) -> float:
    """The least seconds that something takes among a few times: what it takes where nothing else runs. They are those of this
    thread, which does its share and then waits for the others: while another program has the processor they stand still."""
    do()
    found = []
    for _ in range(TRIES):
        start = time.thread_time()
        do()
        found.append(time.thread_time() - start)
    return min(found)
