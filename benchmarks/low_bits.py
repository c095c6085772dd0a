"""Two to four bits by every kind of code, uniform and allocated, over several draws of calibration text: KL, bits, CPU seconds.

python benchmarks/low_bits.py --model MODEL --calibration TEXT --evaluation TEXT [--draws 3] [--only NAME ...] [--save DIR]

A draw is the windows of one of `--draws` equal parts of the text to calibrate on; all are judged on the same windows. Bits are
those of the layers' tensors in the file. CPU seconds are of the whole run; what the first budget of a list measures for all of
them is in its row alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from report import line
from variants import outcome, parser, publish

from compress import evaluate

UNIFORM = ("int2:g64", "int2:g64:r128", "lut2:g64:r128", "ecq2.05:r128", "tcq2:r128",
           "int3:g64", "int3:g64:r128", "lut3:g64:r128", "ecq3.05:r128", "tcq3:r128")  # fmt: skip
BUDGETS = ("2.5", "3.0", "3.5", "4.0")
LISTS = {"rates": ["ecq:r128"], "trellises": ["tcq:r128"], "integers": ["int2:g64", "int3:g64", "int4:g64", "int8:channel"]}
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{fmt: ("uniform", [{"quantize": {"format": fmt}}]) for fmt in UNIFORM},
    **{f"{name} {bits}": (name, [{"allocate": {"budget": f"{bits} bits", "formats": formats}}, {"quantize": {}}])
       for name, formats in LISTS.items() for bits in BUDGETS},
}  # fmt: skip  # what a row is called -> whose measurements it shares, and its passes


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each case: KL of every draw, their mean and how far apart they are."""
    draws = list(range(options.draws))
    found = [line(["codes", "bits in the file", *(f"KL, draw {d + 1}" for d in draws), "mean", "largest / least", "CPU s"])]
    found.append(line(["---"] * (len(draws) + 5)))
    with tempfile.TemporaryDirectory() as place:
        parts = list(cut(options.calibration, options.draws, Path(place)))
        for name in options.only or CASES:
            group, passes = CASES[name]
            each = [measured(options, part, passes, Path(place) / f"{group}-{d}") for d, part in enumerate(parts)]
            kl = [k for k, _, _ in each]
            found.append(line([name, f"{each[0][1]:.3f}", *(f"{k:.4f}" for k in kl), f"{mean(kl):.4f}",
                               f"{max(kl) / min(kl):.2f}", f"{mean(s for _, _, s in each):.0f}"]))  # fmt: skip
            print(found[-1], flush=True)
    return [*found, "", *(f"{name}: {', '.join(formats)}" for name, formats in LISTS.items())]


def cut(text: Path, count: int, folder: Path) -> Iterator[Path]:
    """Files of equal parts of a text."""
    whole = text.read_text(encoding="utf-8")
    size = len(whole) // count
    for i in range(count):
        part = folder / f"part{i}.txt"
        part.write_text(whole[i * size : (i + 1) * size], encoding="utf-8")
        yield part


def measured(options: argparse.Namespace, part: Path, passes: list[dict[str, Any]], work: Path) -> tuple[float, float, float]:
    """KL, bits of the file and CPU seconds of one run."""
    work.mkdir(exist_ok=True)
    begun = time.process_time()
    done = outcome(argparse.Namespace(**{**vars(options), "calibration": part}), passes, work)
    spent = time.process_time() - begun
    return done.scores["compressed"]["kl"], evaluate.sizes(done.state, 0).linear_bits, spent


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--draws", type=int, default=3, help="parts of the text to calibrate on")
    options.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"some of: {', '.join(CASES)}")
    publish("low-bits", "Two to four bits", options.parse_args(), rows)


if __name__ == "__main__":
    main()
