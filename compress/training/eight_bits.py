"""AdamW whose means are kept in a byte each (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).

A mean is cut into blocks of 256 numbers; of a block the largest absolute value is kept in fp32, and of each number x the index
of the level nearest to x / largest (section 2.1, block-wise; equations 4 and 5). Levels are those of dynamic tree quantization
(section 1.3): with e leading zeros a byte stands for numbers near 10^-e, and the bits that are left divide that decade evenly;
so of M, which has a sign, seven decades are known, and of V, which has none, with twice the levels. A step decodes some blocks,
does AdamW on them, and encodes them again: no more than `NUMBERS` numbers are ever there in fp32. State: 2 + 8/256 bytes a
number, 0.254 of AdamW's.

Tensors of fewer than 4,096 numbers are kept as they are, as in the paper's library: norms and scales are few and matter.
Ours and not bitsandbytes', which does the same on CPU and GPU: GaLore needs the direction and not the step, and fused gradients a
tensor at a time; a test compares the two where it is installed.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from compress.training.optimizers import BETAS, EPS, NUMBERS, STEP, AdamW, Kinds, Remembered, Shape

BLOCK, SMALL, DECADES = 256, 4096, 7


@cache
def levels(signed: bool) -> Tensor:
    """The 256 levels, ascending, in [-1, 1] or [0, 1]."""
    found = [0.0, 1.0]
    for e in range(DECADES):
        few = 2 ** (DECADES - 1 - e) * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, few + 1, dtype=torch.float64)
        found += (10.0**-e * (edges[:-1] + edges[1:]) / 2).tolist()
        found += (-(10.0**-e) * (edges[:-1] + edges[1:]) / 2).tolist() if signed else []
    return torch.tensor(sorted(found), dtype=torch.float32)


def encode(x: Tensor, codes: Tensor, largest: Tensor, signed: bool) -> None:
    """Write numbers [b, 256] as codes [b, 256], uint8, and the largest [b] of each block."""
    of = levels(signed).to(x.device)
    largest.copy_(x.abs().amax(1))
    x = x / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes.copy_(torch.bucketize(x, (of[1:] + of[:-1]) / 2, out_int32=True))


def decode(codes: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """The numbers again."""
    return levels(signed).to(codes.device)[codes.int()] * largest[:, None]


class AdamW8bit:
    """AdamW with M and V in bytes; small tensors as `AdamW` has them."""

    def remembers(self, shape: Shape) -> Kinds:
        count = math.prod(shape)
        if count < SMALL:
            return AdamW().remembers(shape)
        blocks = -(-count // BLOCK)
        codes, largest = ((blocks, BLOCK), torch.uint8), ((blocks,), torch.float32)
        return {**STEP, "m": codes, "m_largest": largest, "v": codes, "v_largest": largest}

    def move(self, p: Tensor, g: Tensor, kept: Remembered, rate: float) -> None:
        if "m" not in kept:
            return AdamW().move(p, g, kept, rate)
        if not int(kept["step"]):
            kept["m"].fill_(int(torch.searchsorted(levels(True), 0.0)))  # codes of nothing
            kept["v"].fill_(int(torch.searchsorted(levels(False), 0.0)))
        kept["step"] += 1
        t = float(kept["step"])
        step, few = rate / (1 - BETAS[0] ** t), NUMBERS // BLOCK
        flat, slopes = p.reshape(-1), g.reshape(-1)
        for start in range(0, len(kept["m"]), few):
            blocks, numbers = slice(start, start + few), slice(start * BLOCK, (start + few) * BLOCK)
            m, v = self._means(slopes[numbers], kept, blocks)
            flat[numbers] -= step * (m / (v / (1 - BETAS[1] ** t)).sqrt_().add_(EPS)).reshape(-1)[: slopes[numbers].numel()]
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat.view(p.shape))

    def _means(self, g: Tensor, kept: Remembered, blocks: slice) -> tuple[Tensor, Tensor]:
        """Both means of some blocks with the gradient in them, which are kept again as far as a byte knows them."""
        x = torch.nn.functional.pad(g, (0, -len(g) % BLOCK)).view(-1, BLOCK)
        m = decode(kept["m"][blocks], kept["m_largest"][blocks], True).lerp_(x, 1 - BETAS[0])
        v = decode(kept["v"][blocks], kept["v_largest"][blocks], False).lerp_(x.square(), 1 - BETAS[1])
        encode(m, kept["m"][blocks], kept["m_largest"][blocks], True)
        encode(v, kept["v"][blocks], kept["v_largest"][blocks], False)
        return m, v
