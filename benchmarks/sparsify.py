"""What a token need not read: KL on held-out text by what is left out, for one share in all layers and for shares of their own.

python benchmarks/sparsify.py --model MODEL --calibration TEXT --evaluation TEXT [--dropped 0.25 0.5 0.7] [--bos] [--save DIR]

Bytes are those of all matrices that a token passes, as `plan` counts them; kept is measured on calibration text held out.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from report import line
from variants import outcome, parser, publish


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each kind, share and way to give shares to layers."""
    found = [line(["left out", "kind", "shares", "KL", "kept", "bytes read", "s of the pass"]), line(["---"] * 7)]
    with tempfile.TemporaryDirectory() as place:
        for kind in options.kinds:
            for dropped in options.dropped:
                for allocate in (False, True):
                    step = {"sparsify": {"keep": 1 - dropped, "kind": kind, "allocate": allocate}}
                    made = outcome(options, [step], Path(place))
                    found.append(line([f"{dropped:.0%}", kind, "by layer" if allocate else "one", *told(made)]))
                    print(found[-1], flush=True)
    return found


def told(made: object) -> list[str]:
    """KL, share kept and bytes read of a run, and the seconds of its pass."""
    report = made.report  # type: ignore[attr-defined]
    records = report.steps[-1]["records"]
    kept = sum(r["kept"] for r in records) / len(records)
    read = re.search(r"\((\d+%)\)", "".join(report.remarks)) if hasattr(report, "remarks") else None
    kl = made.scores["compressed"]["kl"]  # type: ignore[attr-defined]
    return [f"{kl:.5f}", f"{kept:.1%}", read[1] if read else "", f"{report.steps[-1]['seconds']:.0f}"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dropped", type=float, nargs="+", default=[0.25, 0.5, 0.7], help="shares left out")
    options.add_argument("--kinds", nargs="+", default=["cats", "teal"])
    publish("sparsify", "What a token need not read", options.parse_args(), rows)


if __name__ == "__main__":
    main()
