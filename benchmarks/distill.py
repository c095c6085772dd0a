"""How much of what pruning or few bits cost a training wins back: KL by what learns, with memory and time, in one run.

python benchmarks/distill.py --model MODEL --calibration TEXT --evaluation TEXT --training WINDOWS [--only DAMAGE] [--save DIR]

All learn from the same windows of the text to calibrate on, whose first ones calibrate, and are judged on the other text. "Won
back" is the share of the KL that the damage had. Peaks are those of the training alone, beside what `plan` says.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from report import line
from variants import outcome, parser, publish

DAMAGES: dict[str, list[dict[str, Any]]] = {
    "3/4 of the neurons": [{"prune": {"mlp": 0.75}}],
    "1/2 of the neurons": [{"prune": {"mlp": 0.5}}],
    "int3:g64": [{"quantize": {"format": "int3:g64"}}],
    "int2:g64": [{"quantize": {"format": "int2:g64"}}],
}
DENSE: dict[str, dict[str, Any]] = {"all": {}, "lora, rank 16": {"train": "lora", "rank": 16}, "norms": {"train": "norms"}}
PACKED: dict[str, dict[str, Any]] = {
    "scales": {"train": "scales"},
    "scales and norms": {"train": ["scales", "norms"]},
    "all, straight through": {},
    "lora, rank 16 (0.5 bits more or so)": {"train": "lora", "rank": 16},
}


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each damage and each way to learn."""
    found = [line(["damage", "learns", "KL", "won back", "s", "peak, MiB"]), line(["---"] * 6)]
    asked = {name: value for name in ("tokens", "rate", "batch") if (value := getattr(options, name)) is not None}
    with tempfile.TemporaryDirectory() as place:
        for name in options.only or DAMAGES:
            steps = DAMAGES[name]
            before = outcome(options, steps, Path(place)).scores["compressed"]["kl"]
            add(found, [name, "", f"{before:.4f}", "", "", ""])
            for how, choice in (DENSE if "prune" in steps[0] else PACKED).items():
                made = outcome(options, [*steps, {"distill": {**choice, **asked}}], Path(place))
                kl, step = made.scores["compressed"]["kl"], made.report.steps[-1]
                add(
                    found,
                    ["", how, f"{kl:.4f}", f"{1 - kl / before:.0%}", f"{step['seconds']:.0f}", f"{step['peak_bytes'] >> 20:,}"],
                )
    return found


def add(found: list[str], cells: list[str]) -> None:
    found.append(line(cells))
    print(found[-1], flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--training", type=int, default=512, help="windows to learn from, a twentieth of them held out")
    options.add_argument("--tokens", help="how many to learn from; default: every window once")
    options.add_argument("--rate", type=float)
    options.add_argument("--batch", type=int)
    options.add_argument("--only", nargs="+", choices=DAMAGES, help="some of the damages")
    publish("distill", "What training wins back", options.parse_args(), rows)


if __name__ == "__main__":
    main()
