"""What a run will take, stage by stage: its passes, its figures, and every artifact with its proof.

Operations are counted from shapes and multiplied by rates that are measured on the machine (model/speed.py); memory is what each
stage holds at its worst moment. The largest stage is what a machine must have room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import psutil
import torch

from compress import calibration
from compress.export.artifact.exporter import Exporter, Files
from compress.formats import Dense, Int
from compress.manager import Cost
from compress.model import speed
from compress.model.data import BATCH, Windows
from compress.model.head import PIECE, ROWS
from compress.model.speed import computing
from compress.model.work import block_bytes, per_token
from compress.prepare import Prepared, proof_tokens
from compress.state import State
from compress.state.plan import size

BASELINE_BYTES = 450 * 2**20  # Python, torch and transformers, imported
SECONDS_PER_WEIGHT = 1.5e-7  # of the search for ranges and the column loop, on one core of a server CPU
SECONDS_PER_BYTE = 3e-8  # of an artifact: written, hashed, read again and compared
SECONDS_PER_NUMBER = 2.5e-9  # that a matrix reads or writes: attention, norms, activations, on one core of a server CPU
COPIES = 6  # of a part of the logits, while two models are compared
PROVEN = 6  # of all logits of a proof: the run's, the engine's in its dtype and in fp32, and what is made of them


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its name, and what it takes."""

    name: str
    cost: Cost

    @property
    def peak_bytes(self) -> int:
        return BASELINE_BYTES + self.cost.peak_bytes

    def seconds(self, dtype: torch.dtype) -> float:
        """On this machine, for a model in `dtype`."""
        c, fast, exact = self.cost, speed.matrix_speed(computing(dtype)), speed.matrix_speed(torch.float32)
        logits = c.logits / speed.softmax_speed() if c.logits else 0.0
        products = c.model_flops / fast + c.exact_flops / exact
        others = c.numbers * SECONDS_PER_NUMBER + c.weights * SECONDS_PER_WEIGHT + c.bytes * SECONDS_PER_BYTE + c.seconds
        return products + logits + others


def stages(ready: Prepared, layouts: Mapping[str, Files]) -> list[Stage]:
    """All stages of a run, in order."""
    data = ready.recipe.document.data
    windows = data.calibration
    tokens = windows.sequences * windows.length if windows else 0
    found = [Stage(name, cost) for name, cost in calibration.costs(windows, ready.start).items()]
    found += [Stage(p.name, p.cost(ready.foreseen, tokens)) for p in ready.recipe.passes]
    if data.evaluation:
        found.append(Stage("evaluation", evaluation(ready.foreseen, data.evaluation)))
    return found + [Stage(e.name, proof(e, ready.foreseen, layouts[e.name])) for e in ready.exports]


def evaluation(state: State, windows: Windows) -> Cost:
    """Two models, streamed, and their logits compared in parts."""
    graph, tokens = state.graph, windows.sequences * windows.length
    vocabulary, width = graph["embed"].shape
    work = per_token(state)
    number = computing(state.dtype).itemsize
    hidden = 2 * tokens * width * number
    batch = max(BATCH, windows.length) * 4 * max(s.shape[0] for s in graph.linear) * number
    parts = COPIES * PIECE * min(ROWS, vocabulary) * 4
    return Cost(2 * 2.0 * tokens * (work.weights + vocabulary * width), logits=2.0 * tokens * vocabulary,
                numbers=2 * tokens * work.numbers,
                peak_bytes=hidden + max(2 * block_bytes(state) + batch, parts + unpacked_bytes(state)))  # fmt: skip


def proof(exporter: Exporter, state: State, layout: Files) -> Cost:
    """An artifact is written tensor by tensor; its proof has an engine in memory, and some logits."""
    vocabulary = state.graph["embed"].shape[0]
    logits = PROVEN * prod(proof_tokens(vocabulary)) * vocabulary * 4
    largest = max(spec.nbytes for spec in state.specs)  # compared with its original
    return Cost(bytes=layout.nbytes, seconds=exporter.proof_seconds(state),
                peak_bytes=max(2 * largest, exporter.proof_bytes(state, layout) + logits))  # fmt: skip


def unpacked_bytes(state: State) -> int:
    """The head's matrix where it has to be unpacked; one that is dense, or of integers, is read by its rows."""
    heads = [state.graph.owner(s) for s in state.graph if s.role == "head"]
    return sum(s.numel * (state.dtype.itemsize + 1) for s in heads if not isinstance(state.format(s), Int | Dense | None))


def largest(found: Sequence[Stage]) -> Stage:
    """The stage that takes the most memory; one of nothing where there are none."""
    return max(found, key=lambda stage: stage.peak_bytes, default=Stage("run", Cost()))


def too_large(stage: Stage) -> str | None:
    """What to know where the machine has less memory than a stage takes."""
    has = psutil.virtual_memory().available
    if stage.peak_bytes <= has:
        return None
    return f"'{stage.name}' takes about {size(stage.peak_bytes)} of memory, and {size(has)} are free on this machine"
