"""What stays of a model when neurons of its MLPs go: KL on held-out text by method, with and without compensation, in one run.

python benchmarks/pruning.py --model MODEL --calibration TEXT --evaluation TEXT [--shares 0.75 0.5] [--bos] [--save DIR]
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path
from typing import Any

from report import line, machine
from smooth import measured

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
    """A Markdown table, a row for each share and method."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5], help="of the neurons of every MLP, that stay")
    parser.add_argument("--sequences", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judged", type=int, default=32, help="windows to judge on")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bos", action="store_true", help="a begin-of-text token in front of every window, as Gemma wants it")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    what = (f"{options.model.resolve().name}, {options.sequences} windows of {options.length} tokens calibrated on, "
            f"{options.judged} judged; KL in nats per token; CPU seconds of the whole run, evaluation included")  # fmt: skip
    page = "\n".join([f"# Fewer neurons, {date.today()}", "", what, "", machine(), "", *rows(options), ""])
    print(page)
    if options.save:
        (options.save / f"{date.today()}-pruning-{options.model.resolve().name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
