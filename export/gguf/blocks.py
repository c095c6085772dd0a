"""Integer formats in the blocks of GGUF, both ways, without loss.

A weight of ours is (u - z) * s. In a block it is a signed number q = u - z times the same s, so any integer format goes into any
kind of blocks that has room for its q:

    bits   symmetric   asymmetric   kind   q
    2, 3   yes         yes          Q4_0   -8 ...  7
    4      yes                      Q4_0   -8 ...  7
    4                  yes          Q5_0  -16 ... 15
    5      yes                      Q5_0  -16 ... 15
    5                  yes          Q8_0 -128 ... 127
    6, 7   yes         yes          Q8_0 -128 ... 127
    8      yes                      Q8_0 -128 ... 127

A scale of a larger group is repeated. Zero points are not kept, since the weights do not depend on them: what is read back has
for each group the zero point nearest to the middle of those that its codes allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import ExportError, ModelError
from compress.export.gguf.file import BLOCK, KINDS, Kind
from compress.formats import Ggml, Int, Packed, bitpack
from compress.formats.grid import Grid

ROOM = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # a kind of blocks holds -room ... room - 1


def container(fmt: Int) -> Kind | None:
    """The smallest kind of blocks that holds a format; None where none does."""
    reach = fmt.levels - 1 if not fmt.symmetric else fmt.levels // 2 - 1
    return next((KINDS[name] for name, room in ROOM.items() if reach < room), None)


def kind_of(fmt: Int | Ggml) -> Kind | None:
    """The kind of blocks that a format is, or that holds it."""
    return KINDS[fmt.kind.upper()] if isinstance(fmt, Ggml) else container(fmt)


def bits(kind: Kind) -> float:
    """Bits per weight, scales included."""
    return 8 * kind.nbytes / BLOCK


def pack(packed: Packed, kind: Kind, name: str) -> Tensor:
    """The blocks, uint8 [N, K/32 * bytes], of a matrix; ExportError, naming it, where a scale is no fp16 number."""
    fmt = packed.format
    assert isinstance(fmt, Int)
    codes, grid = fmt.unpack(packed.tensors)
    (n, k), width = codes.shape, fmt.width(codes.shape[1])
    zero = fmt.levels // 2 if grid.zero is None else grid.zero.to(torch.int16).repeat_interleave(width, 1)
    q = (codes.to(torch.int16) - zero).view(n, k // BLOCK, BLOCK)
    parts = [half(grid.scale, name).repeat_interleave(width // BLOCK, 1)[..., None].view(torch.uint8)]
    if kind.name == "Q8_0":
        parts.append(q.to(torch.int8).view(torch.uint8))
    else:
        u = (q + ROOM[kind.name]).to(torch.uint8)
        if kind.name == "Q5_0":
            parts.append(bitpack.pack(u // 16, 1).view(torch.uint8))
        halves = (u % 16).unflatten(-1, (2, BLOCK // 2)).transpose(-1, -2).flatten(-2)
        parts.append(bitpack.pack(halves, 4).view(torch.uint8))
    return torch.cat(parts, -1).view(n, -1)


def half(scale: Tensor, name: str) -> Tensor:
    """Scales as fp16, contiguous; ExportError where that is not exact."""
    found = scale.to(torch.float16)
    lost = (found.float() != scale.float()).nonzero()
    if len(lost):
        value = float(scale[tuple(lost[0])])
        raise ExportError(f"gguf: '{name}' has a scale of {value:.4g}, which fp16 cannot hold exactly; export compressed_tensors "
                          "instead, or pin the matrix to bf16")  # fmt: skip
    return found.contiguous()


def unpack(data: Tensor, kind: Kind, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What blocks hold: q, int16 [N, K], and the scales, fp16 [N, K/32]."""
    n, k = shape
    blocks = data.view(n, k // BLOCK, kind.nbytes)
    scales, body = blocks[..., :2].contiguous().view(torch.float16)[..., 0], blocks[..., 2:].contiguous()
    if kind.name == "Q8_0":
        return body.view(torch.int8).to(torch.int16).view(n, k), scales
    halves = bitpack.unpack(body[..., -16:].contiguous().view(torch.int32), 4, BLOCK)
    u = halves.unflatten(-1, (BLOCK // 2, 2)).transpose(-1, -2).flatten(-2).to(torch.int16)
    if kind.name == "Q5_0":
        u += 16 * bitpack.unpack(body[..., :4].contiguous().view(torch.int32), 1, BLOCK)
    return (u - ROOM[kind.name]).reshape(n, k), scales


def restore(fmt: Int, q: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our tensors, scales in `dtype`; ModelError where the blocks hold what `fmt` cannot."""
    (n, k), width = q.shape, fmt.width(q.shape[1])
    groups, rows = q.view(n, k // width, width), scales.view(n, k // width, width // BLOCK)
    scale = rows[..., 0].to(dtype)
    low, high = groups.amin(-1), groups.amax(-1)
    if fmt.symmetric:
        zero = torch.full_like(low, fmt.levels // 2)
    else:
        zero = torch.maximum(torch.minimum(torch.full_like(low, fmt.levels // 2), fmt.levels - 1 - high), -low)
    fits = bool(((low + zero >= 0) & (high + zero < fmt.levels) & (zero >= 0) & (zero < fmt.levels)).all())
    if not fits or not torch.equal(scale.float()[..., None].expand_as(rows), rows.float()):
        raise ModelError(f"holds codes or scales that are not those of {fmt}; the file is damaged")
    codes = (groups + zero[..., None]).to(torch.uint8).view(n, k)
    return fmt.pack(codes, Grid(scale, None if fmt.symmetric else zero.to(torch.uint8)))
