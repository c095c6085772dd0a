"""Products with packed matrices on a CPU: milliseconds of processor time beside torch's product with the dense matrix.

    python benchmarks/runtime_cpu.py [--shape 4096x4096] [--rows 1 4 64] [--save DIR]

One thread; each figure is the median of `--repeats` calls by turns, dense and packed, after one that does not count, and behind
it the share of the dense product's. What a CPU saves by packing is memory; this says what it pays, or gains.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch
from report import line, machine, publish

from compress.export.runtime import ops
from compress.formats import numbers_of, parse
from compress.formats.grid import plain

FORMATS = ("int2:g64", "int3:g128", "int4:g128", "int6:g128", "int8:g128", "int4:g64:asym", "int4:g128:r128", "nf4:g64")


def main() -> None:
    """Measures, prints the table."""
    args = arguments()
    torch.set_num_threads(1)
    n, k = map(int, args.shape.split("x"))
    setting = f"{machine()}; one thread, a matrix of {args.shape}, milliseconds of processor time."
    page = [f"# Packed products on a CPU, {date.today()}", "", setting, "",
            line(["", "dense", *FORMATS]), line(["---"] * (len(FORMATS) + 2))]  # fmt: skip
    W_nk = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    packed = {form: parts_of(W_nk, form) for form in FORMATS}
    for dtype in (torch.float32, torch.bfloat16):
        dense = W_nk.to(dtype)
        for rows in args.rows:
            x = torch.randn(rows, k).to(dtype)
            runs = {"dense": lambda x=x, dense=dense: torch.nn.functional.linear(x, dense)}
            runs |= {form: lambda x=x, form=form: product(x, packed[form], form, n, k) for form in FORMATS}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(args.repeats + 1):
                for name, run in runs.items():
                    start = time.process_time()
                    run()
                    times[name] += [time.process_time() - start] if turn else []
            taken = {name: median(t) for name, t in times.items()}
            cells = [f"{1000 * t:.1f}" + f" ({t / taken['dense']:.2f})" * (name != "dense") for name, t in taken.items()]
            page.append(line([f"{str(dtype)[6:]}, M = {rows}", *cells]))
    publish("\n".join(page), args.save, "runtime-cpu")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 64])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-runtime-cpu.md")
    return parser.parse_args()


def parts_of(W_nk: torch.Tensor, form: str) -> list[torch.Tensor]:
    """The tensors of W in a format, as the operators take them."""
    fmt = numbers_of(parse(form))
    tensors = fmt.pack(*plain(W_nk, fmt))  # type: ignore[union-attr, arg-type]
    return [t for name, t in tensors.items() if name != "weight_shape"]


def product(x: torch.Tensor, parts: list[torch.Tensor], form: str, n: int, k: int) -> torch.Tensor:
    out: torch.Tensor = torch.ops.compress.linear(x, parts, None, form, n, k, ops.LAYOUTS[0])
    return out


if __name__ == "__main__":
    main()
