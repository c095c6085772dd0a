"""Laws that hold for every member of a family, as batteries: `check_format` for formats."""

from __future__ import annotations

import torch

from compress.errors import FormatError
from compress.formats import Dense, Format, Grid, Packed, Quantized, parse

SCALE_DTYPES = (torch.bfloat16, torch.float16)


def check_format(fmt: Format, in_features: int = 256) -> None:
    """Every law of a format: text, bytes, packing, levels, and ranges of every size. Fails by assertion."""
    assert parse(str(fmt)) == fmt
    assert hash(parse(str(fmt))) == hash(fmt)
    for rows in (1, 37):
        _check_bytes(fmt, rows, in_features)
    if isinstance(fmt, Dense):
        return
    for dtype in SCALE_DTYPES:
        for weight in _weights(in_features).values():
            _check_codes(fmt, weight, dtype)
    _check_zero(fmt, in_features)


def encode(fmt: Quantized, W_nk: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, Grid]:
    """Codes [N, K] and grid [N, G] of W rounded to nearest over its whole range."""
    W_nGg = W_nk.unflatten(1, (fmt.groups(W_nk.shape[1]), -1))
    grid = fmt.fit(W_nGg.amin(-1), W_nGg.amax(-1), scale_dtype)
    return fmt.encode(W_nGg, grid.map(lambda t: t[..., None])).flatten(1), grid


def decode(fmt: Quantized, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weights [N, K] of codes [N, K] on a grid [N, G]."""
    grouped = codes.unflatten(1, (grid.scale.shape[1], -1))
    return fmt.decode(grouped, grid.map(lambda t: t[..., None])).flatten(1)


def _weights(k: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, k, generator=g)
    return {
        "normal": w,
        "positive": w.abs() + 0.1,
        "constant": torch.full((3, k), -0.3),
        "huge": w * 1e4,
        "small": w * 1e-3,
        "tiny": w * 1e-30,
        "zero": torch.zeros(3, k),
    }


def _check_bytes(fmt: Format, rows: int, k: int) -> None:
    """nbytes is the size of what is written, tensor by tensor, and dequantizing gives the shape back."""
    spec = fmt.tensors((rows, k))
    W = torch.randn(rows, k)
    tensors = {"weight": W.to(fmt.dtype)} if isinstance(fmt, Dense) else fmt.pack(*encode(fmt, W))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == spec
    packed = Packed(fmt, (rows, k), tensors)
    assert packed.nbytes == fmt.nbytes((rows, k)) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert packed.dequantize(torch.bfloat16).shape == (rows, k)


def _check_codes(fmt: Quantized, W: torch.Tensor, dtype: torch.dtype) -> None:
    codes, grid = encode(fmt, W, dtype)
    scale = grid.scale.float()
    assert grid.scale.dtype == dtype
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert int(codes.max()) < fmt.levels
    value = decode(fmt, codes, grid)
    wide = grid.map(lambda t: t[..., None])
    grouped = value.unflatten(1, (grid.scale.shape[1], -1))
    assert torch.equal(decode(fmt, fmt.encode(grouped, wide).flatten(1), grid), value)
    assert torch.equal(fmt.nearest(W.view_as(grouped), wide).flatten(1), value)
    again, grid2 = fmt.unpack(fmt.pack(codes, grid))
    assert torch.equal(again, codes)
    assert torch.equal(grid2.scale, grid.scale)
    assert (grid.zero is None) == (grid2.zero is None)
    assert grid.zero is None or grid2.zero is None or torch.equal(grid.zero, grid2.zero)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        packed = Packed(fmt, (len(W), W.shape[1]), fmt.pack(codes, grid))
        assert torch.equal(packed.dequantize(target), value.to(target))


def _check_zero(fmt: Quantized, k: int) -> None:
    """Zeros stay zeros whatever the rest of the group holds, so pruned weights survive."""
    W = torch.randn(4, k)
    W[:, ::2] = 0
    W[2:] = 0
    codes, grid = encode(fmt, W)
    assert (decode(fmt, codes, grid)[W == 0] == 0).all()


def check_refuses(fmt: Quantized, in_features: int) -> str:
    """The message with which `fmt` refuses a matrix of `in_features`."""
    try:
        fmt.check((8, in_features))
    except FormatError as error:
        return str(error)
    raise AssertionError(f"{fmt} took {in_features} inputs")
