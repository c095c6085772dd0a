"""What damping is worth in GPTQ: KL on held-out text with fixed shares of the mean diagonal, and with that which goes by tokens.

python benchmarks/damping.py --model MODEL --calibration TEXT --evaluation TEXT [--bits 4 3] [--damp 0.01 0.1] [--save DIR]
"""

from __future__ import annotations

import argparse

from report import line
from variants import measured, parser, publish


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each width: by tokens, then every fixed share."""
    found = [line(["bits", "by tokens", *map(str, options.damp)]), line(["---"] * (2 + len(options.damp)))]
    for bits in options.bits:
        quantize = {"format": f"int{bits}:g{options.group}"}
        each = [measured(options, [{"quantize": {**quantize, "damp": damp}}]) for damp in (None, *options.damp)]
        found.append(line([str(bits), *(f"{kl:.4f}" for kl in each)]))
        print(found[-1], flush=True)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    options.add_argument("--group", type=int, default=64)
    options.add_argument("--damp", type=float, nargs="+", default=[0.01, 0.1])
    publish("damping", "Damping", options.parse_args(), rows)


if __name__ == "__main__":
    main()
