"""The mean of what tokens look at, by distance. Mathematics on tensors.

Of one layer and one window, for a query i and a key j <= i,

    s_ij = max over query heads of q_i . k_j / sqrt(D)

not softmaxed, which is what merging ranks tokens by where i is a chunk's last. The bias at distance d is the mean of s_ij over
all pairs with i - j = d, of all windows. Tokens are ranked by s - bias, so by what they say beyond being where they are.

Letters: T tokens of a window, C distances that are asked for, D the width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.model.attention import Attended

BLOCK = 256  # queries whose logits are there at once


def sums(a: Attended, distances: int) -> tuple[Tensor, Tensor]:
    """Of all rows, the sum of s and the number of pairs at each distance, fp64 [C]."""
    found = torch.zeros(distances, dtype=torch.float64)
    total = a.q.shape[2]
    for row in range(len(a.q)):
        q_hgtd, k_htd = a.q[row].float().unflatten(0, (a.k.shape[1], -1)), a.k[row].float()
        for start in range(0, total, BLOCK):
            stop, first = min(start + BLOCK, total), max(0, start - distances + 1)
            k_hdn = k_htd[:, None, first:stop].mT
            s_qn = ((q_hgtd[:, :, start:stop] @ k_hdn) * a.scale).amax((0, 1))
            apart = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            seen = (apart >= 0) & (apart < distances)
            found.index_add_(0, apart[seen], s_qn.cpu()[seen].double())
    at = torch.arange(distances)
    return found, len(a.q) * (total - at).clamp(min=0).double()
