"""What a student does with what is kept for its way back, by what a recipe says of activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.training.options import Int8, Offload, Way
from compress.training.saved import File, Held, Layout, OnHost, Saver, in_bytes
from compress.training.sketches import OneDirection, SomeTokens, sketch_of

SKETCH = "sketch"  # in place of the name of what an optimizer remembers, for what a sketch does


class Saving:
    """keeps: the ways of a recipe. folder: where tensors go that do not stay in memory, None for the system's. heads: whether
    attention's tensors can be rounded."""

    def __init__(self, keeps: Sequence[Way], device: torch.device, folder: Path | None, heads: bool = True):
        self.device = device
        self.sketch = next((s for way in keeps if (s := sketch_of(way)) is not None), None)
        self.generator = torch.Generator(device)
        self.file: File | None = None
        self.saver: Saver | None = None
        if any(isinstance(way, Int8) for way in keeps):
            self.saver = Saver(lambda flat, layout: in_bytes(flat, layout, self.generator), heads)
        elif any(isinstance(way, Offload) for way in keeps):
            self.file = File(folder) if device.type == "cpu" else None
            self.saver = Saver(self._elsewhere)

    def _elsewhere(self, flat: Tensor, layout: Layout) -> Held:
        return OnHost(flat.cpu(), flat.device) if self.file is None else self.file.write(flat)

    def begin(self, seed: int) -> None:
        """Of a pass: what it draws follows from the seed alone, and nothing is left of the last."""
        self.generator.manual_seed(seed)
        if isinstance(self.sketch, SomeTokens):
            self.sketch.generator = torch.Generator().manual_seed(seed)
        if self.file is not None:
            self.file.end = 0

    def over(self, tokens: Tensor) -> Saver | None:
        """What keeps tensors in a pass of these tokens."""
        if self.saver is not None:
            self.saver.tokens = tokens.numel()
        return self.saver

    # --- on disk ---

    def tensors(self) -> dict[str, Tensor]:
        """What must be known to go on with the same numbers."""
        known = self.sketch.directions if isinstance(self.sketch, OneDirection) else {}
        return {f"{SKETCH}/{name}": v for name, v in known.items()}

    def take(self, of: str, tensor: Tensor) -> None:
        assert isinstance(self.sketch, OneDirection)
        self.sketch.directions[of] = tensor.clone().to(self.device)
