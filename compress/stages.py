"""What a run will take, stage by stage: its passes, its figures, and every artifact with its proof.

Operations are counted from shapes and multiplied by rates that are measured on the machine (model/speed.py); memory is what each
stage holds at its worst moment. The largest stage is what a machine must have room for.

Memory is what a process allocates itself. Weights that are read as they lie in a file are mapped, not copied: the kernel may drop
them at any moment, so they are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import psutil
import torch

from compress import calibration
from compress.cache.policy import SERVED
from compress.export.artifact.exporter import Exporter, Files
from compress.formats import Can, Dense
from compress.manager import Cost
from compress.model import speed
from compress.model.data import BATCH, Windows
from compress.model.head import PIECE, ROWS
from compress.model.speed import computing
from compress.model.work import advancing_bytes, block_bytes, per_token
from compress.prepare import Prepared, proof_tokens
from compress.state import State
from compress.state.graph import total
from compress.state.plan import size

# Measured on one core of a server CPU, as all seconds here are that no product takes.
BASELINE_BYTES = 300 * 2**20  # Python, torch, transformers and the rest, imported, and a model without weights
SECONDS_AT_START = 5.0  # until all that is imported
SECONDS_PER_WEIGHT = 5e-8  # of the search for ranges, and of rounding
SECONDS_PER_STEP = 2.3e-5  # of rounding one input of some outputs, whose numbers are few
SECONDS_PER_BYTE = 6e-9  # of an artifact: written, hashed, read again and compared
SECONDS_PER_NUMBER = 2.5e-9  # that a matrix reads or writes: attention, norms, activations
COMPARED = 6  # times that a logit is read or written, while two models are compared
COPIES = 6  # of a part of the logits, meanwhile
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
        others = c.numbers * SECONDS_PER_NUMBER + c.weights * SECONDS_PER_WEIGHT + c.steps * SECONDS_PER_STEP
        return products + logits + others + c.bytes * SECONDS_PER_BYTE + c.seconds


def seconds(found: Sequence[Stage], dtype: torch.dtype) -> float:
    """Of a whole run, from its start."""
    return SECONDS_AT_START + sum(stage.seconds(dtype) for stage in found)


def stages(ready: Prepared, layouts: Mapping[str, Files]) -> list[Stage]:
    """All stages of a run, in order."""
    data = ready.recipe.document.data
    windows = data.calibration
    count, length = (windows.sequences, windows.length) if windows else (0, 0)
    found = [Stage(name, cost) for name, cost in calibration.costs(windows, ready.start).items()]
    costs = [ready.trained[i][0] if i in ready.trained else p.cost(ready.foreseen, p.reads(count) * length)
             for i, p in enumerate(ready.recipe.passes)]  # fmt: skip
    found += [Stage(p.name, cost) for p, cost in zip(ready.recipe.passes, costs, strict=True)]
    if data.evaluation:
        found.append(Stage("evaluation", evaluation(ready.foreseen, data.evaluation)))
        if SERVED in ready.foreseen.serving:
            found.append(Stage("evaluation of the cache", evaluation(ready.foreseen, data.evaluation)))
    run = windows is not None or data.evaluation is not None  # without text, tensors are compared and no logits
    return found + [Stage(e.name, proof(e, ready.foreseen, layouts[e.name], run)) for e in ready.exports]


def evaluation(state: State, windows: Windows) -> Cost:
    """Two models, streamed, and their logits compared in parts."""
    graph, tokens = state.graph, windows.sequences * windows.length
    vocabulary, width = graph["embed"].shape
    work = per_token(state)
    hidden = tokens * width * computing(state.dtype).itemsize  # of the other model
    parts = COPIES * PIECE * min(ROWS, vocabulary) * 4
    return Cost(2 * 2.0 * tokens * (work.weights + vocabulary * width), logits=COMPARED * 2.0 * tokens * vocabulary,
                numbers=2 * (tokens * work.numbers + total(graph.linear)),
                peak_bytes=hidden + max(block_bytes(state) + advancing_bytes(state, tokens, max(BATCH, windows.length)),
                                        hidden + parts + unpacked_bytes(state)))  # fmt: skip


def proof(exporter: Exporter, state: State, layout: Files, run: bool) -> Cost:
    """An artifact is written tensor by tensor, and compared with what was to be written; where it is run, its proof has an engine
    in memory, and some logits."""
    vocabulary = state.graph["embed"].shape[0]
    largest = max((fmt.nbytes(state.graph[name].shape) for name, fmt in state.formats.items()), default=0)
    written = Cost(bytes=layout.nbytes, peak_bytes=2 * largest)
    if not run:
        return written
    logits = PROVEN * prod(proof_tokens(vocabulary)) * vocabulary * 4
    peak = max(written.peak_bytes, exporter.proof_bytes(state, layout) + logits)
    return replace(written, seconds=exporter.proof_seconds(state), peak_bytes=peak)


def unpacked_bytes(state: State) -> int:
    """The head's matrix where it has to be unpacked; one that is dense, or whose format stands by rows, is read by them."""
    heads = [state.graph.owner(s) for s in state.graph if s.role == "head"]
    held = [s for s in heads if not isinstance(fmt := state.format(s), Dense | None) and Can.GIVE_ROWS not in fmt.can]
    return sum(s.numel * (state.dtype.itemsize + 1) for s in held)


def largest(found: Sequence[Stage]) -> Stage:
    """The stage that takes the most memory; one of nothing where there are none."""
    return max(found, key=lambda stage: stage.peak_bytes, default=Stage("run", Cost()))


def too_large(stage: Stage) -> str | None:
    """What to know where the machine has less memory than a stage takes."""
    has = psutil.virtual_memory().available
    if stage.peak_bytes <= has:
        return None
    return f"'{stage.name}' takes about {size(stage.peak_bytes)} of memory, and {size(has)} are free on this machine"
