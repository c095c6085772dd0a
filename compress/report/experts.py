"""What to know of a mixture of experts: which of them the calibration text has hardly reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.model.data import Windows
from compress.state.graph import Graph


def starved(graph: Graph, records: Sequence[Mapping[str, Any]], windows: Windows | None) -> list[str]:
    """One line where experts saw fewer tokens than a matrix of theirs has inputs: a Hessian of so few says nothing of some."""
    seen: dict[tuple[int | None, int], int] = {}
    inputs: dict[tuple[int | None, int], int] = {}
    for record in records:
        site = graph.sites.get(record["site"]) if record.get("tokens") is not None else None
        if site is not None and site.expert is not None:
            expert = site.block, site.expert
            seen[expert] = record["tokens"]
            inputs[expert] = max(site.shape[1], inputs.get(expert, 0))
    few = [expert for expert, tokens in seen.items() if tokens < inputs[expert]]
    if not few or windows is None:
        return []
    least, none = max(inputs[expert] for expert in few), sum(not seen[expert] for expert in few)
    return [f"{len(few):,} of {len(seen):,} experts saw fewer than {least:,} tokens of the calibration text, as many as they "
            f"have inputs{f', {none:,} of them none at all' if none else ''}: what they need was taken from the mean of the "
            f"others. Ask for more sequences than {windows.sequences:,}, or give text that is more like what the model will "
            "read"]  # fmt: skip
