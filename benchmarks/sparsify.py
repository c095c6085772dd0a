"""What a token need not read: KL on held-out text by what is left out, for one share in all layers and for shares of their own;
and the time of one row through an MLP of 4096 x 11008, beside the same that reads all.

python benchmarks/sparsify.py --model MODEL --calibration TEXT --evaluation TEXT [--dropped 0.25 0.5 0.7] [--bos] [--save DIR]

Kept is measured on calibration text held out; bytes are those of the layers' matrices of this kind (of the MLPs; of all, with
teal).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import line
from torch import Tensor, nn
from variants import outcome, parser, publish

from compress.export.artifact.skipped import Skipped
from compress.export.runtime import sparse
from compress.export.runtime.decode import format_of
from compress.export.runtime.linear import PackedLinear
from compress.formats.sparsity import THRESHOLD, Sparsity

WIDTH, NEURONS = 4096, 11008  # of a Llama of 7 B
FORMATS = ("fp32", "int8:channel", "int4:g128")
TURNS = 15


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each kind, share and way to give shares to layers; then one of times."""
    found = [line(["left out", "kind", "shares", "KL", "beside one", "kept", "bytes", "s of the pass"]), line(["---"] * 8)]
    with tempfile.TemporaryDirectory() as place:
        for kind in options.kinds:
            for dropped in options.dropped:
                first = 0.0
                for allocate in (False, True):
                    step = {"sparsify": {"keep": round(1 - dropped, 4), "kind": kind, "allocate": allocate}}
                    made = outcome(options, [step], Path(place))
                    kl, records = made.scores["compressed"]["kl"], made.report.records
                    first = first or kl
                    kept = sum(r["kept"] for r in records) / len(records)
                    read = sum(r["read"] for r in records) / sum(r["whole"] for r in records)
                    shares, seconds = "by layer" if allocate else "one", made.report.steps[-1]["seconds"]
                    cells = [f"{dropped:.0%}", kind, shares, f"{kl:.5f}", f"{kl / first:.2f}", f"{kept:.1%}", f"{read:.0%}"]
                    found.append(line([*cells, f"{seconds:.0f}"]))
                    print(found[-1], flush=True)
    return [*found, "", *times()] if options.times else found


# --- one row through an MLP -------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """A gated MLP of SiLU with random weights in a format."""

    def __init__(self, fmt: str):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(fmt, NEURONS, WIDTH) for _ in range(2))
        self.down_proj = linear(fmt, WIDTH, NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


def linear(fmt: str, n: int, k: int) -> nn.Linear:
    if fmt == "fp32":
        return nn.Linear(k, n, bias=False)
    module = PackedLinear(fmt, (n, k), torch.float32, device="cpu")
    for name, (dtype, size) in format_of(fmt).tensors((n, k)).items():
        if name == "weight_scale":
            held = torch.rand(size).to(dtype) * 0.002
        elif name == "weight_shape":
            held = torch.tensor([n, k])
        else:
            held = torch.randint(-(2**31), 2**31 - 1, size).to(dtype)
        getattr(module, name).copy_(held)
    return module


@torch.no_grad()
def times() -> list[str]:
    """A Markdown table: milliseconds of one row that reads all, and of one that leaves neurons out."""
    found = [line(["format", "left out", "ms, all read", "ms", "beside", "bytes"]), line(["---"] * 6)]
    for fmt in FORMATS:
        for dropped in (0.5, 0.7, 0.9):
            torch.manual_seed(0)
            plain, mlp, x = Mlp(fmt), Mlp(fmt), torch.randn(1, WIDTH)
            mlp.load_state_dict(plain.state_dict())
            t = nn.functional.silu(plain.gate_proj(x)).abs().quantile(dropped).expand(NEURONS)
            names = Skipped(Sparsity("cats", "silu"), ("up_proj",), ("down_proj",))
            _, plan = sparse.hold(mlp, {"gate_proj": names}, str)
            mlp.gate_proj._buffers[THRESHOLD] = t.contiguous()
            sparse.arrange(mlp, plan)
            all_read, some = alternately(partial(plain, x), partial(mlp, x))
            sparse.bytes_read(mlp)
            mlp(x)
            read = sparse.bytes_read(mlp)[0] / sum(t.nbytes for t in (*plain.parameters(), *plain.buffers()))
            ms = [f"{1e3 * seconds:.1f}" for seconds in (all_read, some)]
            found.append(line([fmt, f"{dropped:.0%}", *ms, f"{some / all_read:.2f}", f"{read:.0%}"]))
            print(found[-1], flush=True)
    return found


def alternately(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of two, by turns."""
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS + 2):
        for held, run in zip(took, (one, other), strict=True):
            start = time.perf_counter()
            run()
            held.append(time.perf_counter() - start)
    return median(took[0][2:]), median(took[1][2:])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dropped", type=float, nargs="+", default=[0.25, 0.5, 0.7], help="shares left out")
    options.add_argument("--kinds", nargs="+", default=["cats", "teal"])
    options.add_argument("--times", action="store_true", help="also time one row through an MLP of a 7 B model")
    publish("sparsify", "What a token need not read", options.parse_args(), rows)


if __name__ == "__main__":
    main()
