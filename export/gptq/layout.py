"""The tensors of one matrix in the layout of GPTQ checkpoints (exporter.py has the table)."""

from __future__ import annotations

import torch

from compress.errors import ExportError
from compress.formats import Int, bitpack
from compress.state.graph import Site

BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def shapes(site: Site, fmt: Int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors of a matrix."""
    (n, k), groups = site.shape, fmt.groups(site.shape[1])
    return {
        "qweight": (torch.int32, (bitpack.words(k, fmt.bits), n)),
        "qzeros": (torch.int32, (groups, bitpack.words(n, fmt.bits))),
        "scales": (torch.float16, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def turned(site: Site, fmt: Int, held: dict[str, torch.Tensor], v1: bool) -> dict[str, torch.Tensor]:
    """The tensors of this layout of a matrix in ours; ExportError where a scale is no fp16 number."""
    scales = held["weight_scale"].to(torch.float16)
    lost = (scales.float() != held["weight_scale"].float()).nonzero()
    if len(lost):
        value = float(held["weight_scale"][tuple(lost[0])])
        raise ExportError(f"gptq: '{site.name}' has a scale of {value:.4g}, which fp16 cannot hold exactly; export "
                          "compressed_tensors instead, or pin the matrix to bf16")  # fmt: skip
    zeros = held["weight_zero_point"].T if "weight_zero_point" in held else middle(site, fmt, v1)
    return {"qweight": held["weight_packed"].T.contiguous(), "qzeros": zeros.contiguous(), "scales": scales.T.contiguous(),
            "g_idx": group_index(site, fmt)}  # fmt: skip


def middle(site: Site, fmt: Int, v1: bool) -> torch.Tensor:
    """The zero points [G, N*b/32] of a symmetric matrix."""
    (n, k), value = site.shape, fmt.levels // 2 - v1
    return bitpack.pack(torch.full((fmt.groups(k), n), value, dtype=torch.uint8), fmt.bits)


def group_index(site: Site, fmt: Int) -> torch.Tensor:
    """The group of each input, int32 [K]."""
    k = site.shape[1]
    return torch.arange(k, dtype=torch.int32) // fmt.width(k)
