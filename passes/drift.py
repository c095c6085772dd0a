"""How far the outputs of a stage are from what they should be, because of what was changed before it.

Summed over the tokens of a calibration, for `gptq_core.retarget`, which moves the weights to where they make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from compress.model.lockstep import Clean
from compress.state import State
from compress.state.graph import Site


class Drift:
    """What the error in the inputs of a stage does to its outputs: E = (Y - X̃Wᵀ)ᵀX̃ [N, K], summed over tokens (see
    `gptq_core.retarget`).

    With X the inputs in the unquantized model and M = (X - X̃)ᵀX̃ it is W M. Where the matrices W that read these inputs have few
    outputs, E is summed itself: half the work, and less to hold.

    Where the outputs are `added` to a residual stream, what is wanted is the sum of the unquantized model: Y = XWᵀ + R - R̃. So o
    and down make up for what came before them in the stream, too, and not only for their inputs. E is summed itself then.
    """

    def __init__(self, sites: Sequence[Site], state: State, inputs: int, device: str, added: bool = False):
        self.rows: dict[str, slice] = {}  # of each matrix in E; none where M is summed
        self._W_nk: Tensor | None = None
        self._sum: Tensor | None = None
        self.tokens = 0
        ends = list(accumulate(s.shape[0] for s in sites))
        if added or 2 * ends[-1] < inputs:
            self.rows = {s.name: slice(end - s.shape[0], end) for s, end in zip(sites, ends, strict=True)}
            self._W_nk = torch.cat([state.reference(s) for s in sites]).to(device)

    @classmethod
    def of_stage(cls, sites: Sequence[Site], state: State, clean: Clean, device: str) -> Drift:
        return cls(sites, state, clean.inputs[None].shape[1], device, clean.ahead is not None)

    def see(self, X_tk: Tensor, clean: Clean) -> None:
        """Add the same tokens in both models."""
        wide = torch.float32 if X_tk.dtype == torch.float16 else X_tk.dtype  # a sum over tokens may exceed what fp16 holds
        X_tk = X_tk.to(wide)
        off = clean.inputs[None].to(wide) - X_tk
        if self._W_nk is not None:
            off = off @ self._W_nk.T.to(wide)
        if clean.ahead is not None:
            off = off + clean.ahead
        part = (off.T @ X_tk).float()
        self._sum = part if self._sum is None else self._sum.add_(part)
        self.tokens += len(X_tk)

    def of(self, sites: Sequence[Site], W_nk: Tensor) -> Tensor:
        """E of some of the sites, whose matrices are W."""
        assert self._sum is not None
        if not self.rows:
            return W_nk @ self._sum
        parts = [self._sum[self.rows[s.name]] for s in sites]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
