"""What `smooth` is worth in front of rounding and of GPTQ: KL on held-out text with and without it, in one run.

python benchmarks/smooth.py --model MODEL --calibration TEXT --evaluation TEXT [--bits 4 3] [--bos] [--save DIR]
"""

from __future__ import annotations

import argparse

from report import line
from variants import measured, parser, publish

METHODS = ("rtn", "gptq")


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each width and method."""
    found = [line(["bits", "method", "plain", "smooth", "smooth / plain"]), line(["---"] * 5)]
    for bits in options.bits:
        for method in METHODS:
            quantize = {"quantize": {"method": method, "format": f"int{bits}:g{options.group}"}}
            plain, smooth = measured(options, [quantize]), measured(options, [{"smooth": {}}, quantize])
            found.append(line([str(bits), method, f"{plain:.4f}", f"{smooth:.4f}", f"{smooth / plain:.2f}"]))
            print(found[-1], flush=True)
    return found


def main() -> None:
    options = parser(__doc__, judged=16)
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    options.add_argument("--group", type=int, default=64)
    given = options.parse_args()
    publish("smooth", f"smooth in front of a quantizer, int:g{given.group}", given, rows)


if __name__ == "__main__":
    main()
