"""What stands in the place of a block while the rest of a model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Stop(Exception):  # noqa: N818  a signal, not an error
    """Ends a forward pass at a probe once it has noted what it wants."""


class Probe(nn.Module):
    """Stands where a block stood: notes the call, then passes the hidden states on (or what it is told to)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.output: Tensor | None = None
        self.stop = False
        self.tuple_out = 0  # of how many, where blocks return tuples
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):  # what a model's forward may ask a layer
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        self.call = (args[1:], rest)
        self.hidden = hidden
        if self.stop:
            raise Stop
        out = hidden if self.output is None else self.output
        return (out, *[None] * (self.tuple_out - 1)) if self.tuple_out else out
