"""Shape and bits from one budget beside bits alone: KL on held-out text at equal bytes, in one run.

python benchmarks/joint.py --model MODEL --calibration TEXT --evaluation TEXT [--bits 2.75 3.0 3.25] [--bos] [--save DIR]

Bits are per weight that the original's blocks have. What is measured of the model is shared by all rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from report import line
from variants import outcome, parser, publish

LEVELS = [0.875, 0.75, 0.625, 0.5, 0.375, 0.25]
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bits alone", {}),
    ("shape and bits, uniform", {"structure": {"mlp": LEVELS, "kv_groups": "all"}}),
    ("shape and bits, free", {"structure": {"mlp": LEVELS, "kv_groups": "all", "skip_attention": True}, "shapes": "free"}),
)


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each budget and case."""
    found = [line(["bits", "what is chosen", "left in a layer", "expected KL", "KL", "beside bits alone"]), line(["---"] * 6)]
    with tempfile.TemporaryDirectory() as work:
        for bits in options.bits:
            alone = 0.0
            for name, choice in CASES:
                done = outcome(options, [{"allocate": {"budget": f"{bits} bits", **choice}}, {"quantize": {}}], Path(work))
                kl, forecast = done.scores["compressed"]["kl"], done.state.plan.forecast
                alone = alone or kl
                figures = [f"{forecast.total:.4f}", f"{kl:.4f}", f"{kl / alone:.2f}"]
                found.append(line([str(bits), name, shape(done.state), *figures]))
                print(found[-1], flush=True)
    return found


def shape(state: Any) -> str:
    """How many neurons and groups of heads are left, from where to where."""
    from compress.model.couplings import couplings

    counts: dict[str, set[int]] = {}
    for c in couplings(state):
        counts.setdefault(c.kind, set()).add(c.units)
    return "; ".join(f"{kind} {min(n)}" + (f" to {max(n)}" if len(n) > 1 else "") for kind, n in counts.items())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=float, nargs="+", default=[2.75, 3.0, 3.25], help="budgets")
    publish("joint", "Shape and bits from one budget", options.parse_args(), rows)


if __name__ == "__main__":
    main()
