"""Laws that hold for every member of a family, as batteries: `check_format` for formats."""

from __future__ import annotations

import torch

from compress.errors import FormatError
from compress.formats import Dense, Factored, Float, Format, Int, LowRank, Packed, Rotated, Served, parse
from compress.formats.codebooks import Codebook
from compress.formats.grid import Grid, Quantized, plain

SCALE_DTYPES = (torch.bfloat16, torch.float16)


def check_format(fmt: Format, in_features: int = 256) -> None:
    """Every law of a format: text, bytes, packing, levels, and ranges of every size. Fails by assertion."""
    assert parse(str(fmt)) == fmt
    assert hash(parse(str(fmt))) == hash(fmt)
    for rows in (1, 37):
        if not isinstance(fmt, LowRank | Factored) or fmt.rank <= rows:
            _check_bytes(fmt, rows, in_features)
    if isinstance(fmt, Dense | LowRank | Factored | Rotated | Served):
        return
    for dtype in SCALE_DTYPES:
        for weight in _weights(in_features).values():
            _check_codes(fmt, weight, dtype)
    _check_zero(fmt, in_features)


def encode(fmt: Quantized, W_nk: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, Grid]:
    """Codes [N, K] and grid [N, G] of W rounded to nearest over its whole range."""
    return plain(W_nk, bound(fmt, W_nk), scale_dtype)


def bound(fmt: Quantized, W_nk: torch.Tensor) -> Quantized:
    """The format with the global scale of a matrix, where it has one."""
    return fmt.bound(W_nk) if isinstance(fmt, Float) else fmt


def spread(fmt: Quantized, grid: Grid, k: int) -> Grid:
    """A grid [N, G] with an entry for each weight, [N, K]."""
    return grid.map(lambda t: t.repeat_interleave(fmt.width(k), 1)[:, :k])


def decode(fmt: Quantized, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weights [N, K] of codes [N, K] on a grid [N, G]."""
    return fmt.decode(codes, spread(fmt, grid, codes.shape[1]))


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


def packed_tensors(fmt: Format, W: torch.Tensor) -> dict[str, torch.Tensor]:
    """W in any format, rounded to nearest; with random factors where the format has some."""
    if isinstance(fmt, Dense):
        return {"weight": W.to(fmt.dtype)}
    if isinstance(fmt, LowRank):
        A, B = torch.randn(fmt.rank, W.shape[1]), torch.randn(len(W), fmt.rank)
        return fmt.pack(fmt.base.pack(*encode(fmt.base, W)), A, B)
    if isinstance(fmt, Factored):
        A, B = torch.randn(fmt.rank, W.shape[1]), torch.randn(len(W), fmt.rank)
        return fmt.pack(packed_tensors(fmt.factors, A), packed_tensors(fmt.factors, B))
    if isinstance(fmt, Rotated):
        return packed_tensors(fmt.base, fmt.turn(W, len(W)))
    if isinstance(fmt, Served):
        return fmt.held(packed_tensors(fmt.weight, W), 3.0)
    return bound(fmt, W).pack(*encode(fmt, W))


def _check_bytes(fmt: Format, rows: int, k: int) -> None:
    """nbytes is the size of what is written, tensor by tensor, and dequantizing gives the shape back."""
    spec = fmt.tensors((rows, k))
    tensors = packed_tensors(fmt, torch.randn(rows, k))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == spec
    assert all(t.is_contiguous() for t in tensors.values())
    packed = Packed(fmt, (rows, k), tensors)
    assert packed.nbytes == fmt.nbytes((rows, k)) == sum(t.numel() * t.element_size() for t in tensors.values())
    assert packed.dequantize(torch.bfloat16).shape == (rows, k)


def _check_codes(fmt: Quantized, W: torch.Tensor, dtype: torch.dtype) -> None:
    fmt = bound(fmt, W)
    codes, grid = encode(fmt, W, dtype)
    scale = grid.scale.float()
    restricted = grid.double is not None or (isinstance(fmt, Float) and fmt.kind.scale != "own")
    assert grid.scale.dtype == (torch.float32 if restricted else dtype)
    assert scale.isfinite().all()
    assert int(codes.max()) < fmt.levels
    value, wide = decode(fmt, codes, grid), spread(fmt, grid, W.shape[1])
    assert torch.equal(decode(fmt, fmt.encode(value, wide), grid), value)
    assert torch.equal(fmt.nearest(W, wide), value)
    assert torch.equal(fmt.nearest(W, wide, out=torch.empty_like(W)), value)
    _check_zero_scales(fmt, W, dtype)
    again, grid2 = fmt.unpack(fmt.pack(codes, grid))
    assert torch.equal(again, codes)
    for name in ("scale", "zero", "table"):
        stored, kept = getattr(grid2, name), getattr(grid, name)
        assert (stored is None) == (kept is None)
        assert kept is None or torch.equal(stored, kept)
    for target in (torch.float32, torch.bfloat16, torch.float16):
        packed = Packed(fmt, (len(W), W.shape[1]), fmt.pack(codes, grid))
        assert torch.equal(packed.dequantize(target), value.to(target))


def _check_zero_scales(fmt: Quantized, W: torch.Tensor, dtype: torch.dtype) -> None:
    """Integers never have the scale 0; codebooks exactly where the whole range is 0."""
    scale = fmt.fit(W.amin(1), W.amax(1), dtype).scale
    assert torch.equal(scale == 0, (W == 0).all(1) & isinstance(fmt, Codebook))


def _check_zero(fmt: Quantized, k: int) -> None:
    """Groups of zeros stay zeros in every format; single zeros where there is a level 0, whatever the rest of the group holds."""
    W = torch.randn(4, k)
    W[:, ::2] = 0
    W[2:] = 0
    codes, grid = encode(fmt, W)
    value = decode(fmt, codes, grid)
    assert (value[2:] == 0).all()
    if isinstance(fmt, Int | Float) or (grid.table == 0).any():
        assert (value[W == 0] == 0).all()


def check_refuses(fmt: Quantized, in_features: int) -> str:
    """The message with which `fmt` refuses a matrix of `in_features`."""
    try:
        fmt.check((8, in_features))
    except FormatError as error:
        return str(error)
    raise AssertionError(f"{fmt} took {in_features} inputs")
