"""What each way to train in little memory takes and brings: share of the lost KL won back, bytes foretold and taken, CPU seconds.

python benchmarks/memory_methods.py --model MODEL --calibration TEXT --evaluation TEXT [--steps 40] [--rates 3e-3] [--only NAME]
    [--save DIR]

Half of every MLP's neurons go, by magnitude and without compensation. Every student starts at those weights and learns from the
same windows in the same steps, from a cached teacher, in a process of its own; of several rates the best is told. Bytes are those
of anonymous memory while it trains, beyond what there was before the student. Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from meter import Meter, anonymous
from report import line
from variants import parser, publish, recipe_of

import compress.pipeline
from compress.passes.distill import Distill
from compress.training.settings import said, settled

DAMAGE = {"prune": {"mlp": 0.5, "method": "magnitude", "compensate": False}}
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adalomo, fused": {"optimizer": "adalomo", "gradients": "fused"},
    "adamw8bit, fused": {"optimizer": "adamw8bit", "gradients": "fused"},
    "galore, fused": {"optimizer": "galore", "gradients": "fused"},
    "lomo, fused": {"optimizer": "lomo", "gradients": "fused"},
    "limit, half of adamw's peak": {},
    "activations int8": {"activations": "int8"},
    "checkpoint and int8": {"activations": ["checkpoint", "int8"]},
    "block, gradnorm": {"optimizer": {"block": {"active": 2, "interval": 5}}, "gradients": "fused"},
    "galore8bit, fused": {"optimizer": "galore8bit", "gradients": "fused"},
    "adafactor, fused": {"optimizer": "adafactor", "gradients": "fused"},
    "activations velora": {"activations": "velora"},
    "activations wta_crs": {"activations": "wta_crs"},
    "activations kept": {"activations": "kept"},
    "lozo": {"gradients": "zeroth_order"},
    "activations offload": {"activations": "offload"},
    "block, cyclic": {"optimizer": {"block": {"select": "cyclic", "active": 2, "interval": 5}}, "gradients": "fused"},
    "mezo": {"gradients": {"zeroth_order": {"kind": "mezo"}}},
    "checkpoint and offload": {"activations": ["checkpoint", "offload"]},
    "adamw, fused": {"gradients": "fused"},
}


def child(recipe: Path, said_to: Any) -> None:
    """Run a recipe whose last step trains; what that took, what was expected of it and what came of it."""
    found: dict[str, Any] = {}
    real = Distill._trained
    give_back_at_once()

    def trained(self: Distill, state: Any, choice: Any, ctx: Any, tokens: Any, kept: Any) -> Any:
        setting, expected = settled(state, choice, self.setting(tokens.ids.shape[1], len(tokens.ids)))
        before, meter, begun = anonymous(), Meter(), time.thread_time()
        after = real(self, state, choice, ctx, tokens, kept)
        took = meter.said()
        found.update(peak=took["peak"] + meter.first - before, seconds=time.thread_time() - begun, expected=expected.total,
                     optimizer=expected.optimizer, said=said(setting.memory))  # fmt: skip
        return after

    Distill._trained = trained  # type: ignore[method-assign]
    found["kl"] = compress.run_recipe(recipe).scores["compressed"]["kl"]
    said_to.send(found)


def give_back_at_once() -> None:
    """What is freed goes back to the system: else glibc keeps up to 64 MiB of it, which is much beside a small model."""
    library = ctypes.CDLL(None)
    for parameter, value in ((-1, 1 << 17), (-3, 1 << 20)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        assert library.mallopt(parameter, value)


def measured(options: argparse.Namespace, memory: dict[str, Any] | None, rate: float, folder: Path, steps: int) -> dict[str, Any]:
    """What a child says; without a memory only the damage is done."""
    tokens = steps * options.batch * options.length
    step = {"distill": {"batch": options.batch, "tokens": tokens, "rate": rate, "checks": 2, "memory": memory}}
    content = recipe_of(options, [DAMAGE] if memory is None else [DAMAGE, step], folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    processes = multiprocessing.get_context("fork")  # what was imported is imported
    here, there = processes.Pipe()
    process = processes.Process(target=child, args=(recipe, there))
    process.start()
    there.close()
    found: dict[str, Any] = here.recv()
    process.join()
    return found


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each method."""
    head = [
        "way",
        "rate",
        "KL",
        "won back",
        "of AdamW's",
        "optimizer, of AdamW's",
        "foretold, MiB",
        "measured, MiB",
        "ratio",
        "s",
    ]
    found = [line(head), line(["---"] * len(head))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        before = measured(options, None, 0.0, folder, 0)["kl"]
        add(found, ["damage alone", "", f"{before:.5f}", *[""] * 7])
        measured(options, {}, 1e-9, folder, 1)  # asks the teacher, which the others find
        usual: dict[str, Any] = {}
        for name, memory in METHODS.items():
            if options.only and name not in options.only:
                continue
            if name.startswith("limit"):
                memory = {"limit": str(usual["peak"] // 2)}
            tried = [(measured(options, memory, rate, folder, options.steps), rate) for rate in rates(options, name)]
            best, rate = min(tried, key=lambda t: t[0]["kl"])
            usual = usual or best
            won, theirs = (1 - r["kl"] / before for r in (best, usual))
            share = best["optimizer"] / max(1, usual["optimizer"])
            expected, peak = (best[what] / 2**20 for what in ("expected", "peak"))
            add(found, [name if not name.startswith("limit") else f"{name}: {best['said']}", f"{rate:g}", f"{best['kl']:.5f}",
                        f"{won:.1%}", f"{won / theirs:.1%}", f"{share:.3f}", f"{expected:,.0f}", f"{peak:,.0f}",
                        f"{peak / expected:.2f}", f"{best['seconds']:.0f}"])  # fmt: skip
    return found


def rates(options: argparse.Namespace, name: str) -> list[float]:
    """Those that a method is tried with: steps along directions have to be small."""
    return [rate / 30 for rate in options.rates] if name in ("lozo", "mezo") else list(options.rates)


def add(found: list[str], cells: list[str]) -> None:
    found.append(line(cells))
    print(found[-1], flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--training", type=int, default=400, help="windows to learn from, a twentieth of them held out")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    options.add_argument("--only", nargs="+", choices=METHODS)
    publish("memory-methods", "Training in little memory", options.parse_args(), rows)


if __name__ == "__main__":
    main()
