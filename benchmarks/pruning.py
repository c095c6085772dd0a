"""What stays of a model when neurons of its MLPs go: KL on held-out text by method, with and without compensation, in one run.

python benchmarks/pruning.py --model MODEL --calibration TEXT --evaluation TEXT [--shares 0.75 0.5] [--bos] [--save DIR]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from report import line
from variants import measured, parser, publish

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("obs", {}),
    ("obs, no twin", {"drift": 0}),
    ("wanda, compensated", {"method": "wanda"}),
    ("obs, deleted", {"compensate": False}),
    ("wanda, deleted", {"method": "wanda", "compensate": False}),
    ("flap, deleted", {"method": "flap", "compensate": False}),
    ("magnitude, deleted", {"method": "magnitude", "compensate": False}),
)


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each share and method; CPU seconds are of the whole run, evaluation included."""
    found = [line(["neurons left", "method", "KL", "beside obs", "CPU s"]), line(["---"] * 5)]
    for share in options.shares:
        first = 0.0
        for name, choice in CASES:
            start = time.process_time()
            kl = measured(options, [{"prune": {"mlp": share, **choice}}])
            first = first or kl
            spent = time.process_time() - start
            found.append(line([f"{share:.0%}", name, f"{kl:.4f}", f"{kl / first:.2f}", f"{spent:.0f}"]))
            print(found[-1], flush=True)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5], help="of the neurons of every MLP, that stay")
    publish("pruning", "Fewer neurons", options.parse_args(), rows)


if __name__ == "__main__":
    main()
