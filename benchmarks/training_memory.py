"""What `plan` says that training takes, and what two steps of it really do: anonymous memory beyond what the process began with.

python benchmarks/training_memory.py --model MODEL [--train all] [--memory '{optimizer: adalomo, gradients: fused}']
    [--length 256] [--windows 8]

The teacher is none but numbers, so that only the student is measured. Linux.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from meter import Meter, anonymous
from report import machine

from compress.model.data import Tokens
from compress.model.model import open_model
from compress.model.speed import precision
from compress.passes.distill import Distill
from compress.training import memory
from compress.training.loop import Schedule, Training
from compress.training.loss import Known
from compress.training.settings import said, settled
from compress.training.student import Student
from compress.training.teacher import Look

K = 64


class Numbers:
    """A teacher that finds the same tokens likeliest, whatever it sees."""

    @contextmanager
    def look(self, numbers: Sequence[int]) -> Iterator[Look]:
        def known(rows: slice) -> Known:
            n = rows.stop - rows.start
            return Known(torch.full((n, K), -5.0), torch.arange(K)[None].repeat(n, 1))

        yield Look(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", nargs="+", default=["all"])
    parser.add_argument("--memory", default="{}", help="what a recipe says under memory")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    p = Distill.model_validate({"train": options.train, "batch": options.windows, "memory": yaml.safe_load(options.memory)})
    state = open_model(str(options.model)).state
    choice, before = p.choice(state), anonymous()
    setting, expected = settled(state, choice, p.setting(options.length))
    print(machine(), f"{said(setting.memory)}: expected {memory.told(expected)}", sep="\n")
    chosen = setting.memory
    student = Student(state, choice, 0, keeps=chosen.keeps, streamed=chosen.weights == "streamed")
    ids = torch.randint(0, state.graph["embed"].shape[0], (options.windows, options.length))
    optimizer, slopes = p.moving(state, student, chosen, 0)
    training = Training(student, Numbers(), Tokens(ids, "numbers"), list(range(options.windows)), [0], {"kl": 1.0},
                        Schedule(2, options.windows, 1.0, 0, 1), optimizer, slopes, 0, lambda *_: None)  # fmt: skip
    meter = Meter()
    with precision("bf16" if state.dtype == torch.bfloat16 else "ieee"):
        for step in range(2):
            training.step(step)
    taken = meter.said()["peak"] + meter.first - before
    print(f"measured {taken / 2**20:,.0f} MiB, {taken / expected.total:.3f} of what was expected")


if __name__ == "__main__":
    main()
