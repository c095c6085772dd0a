"""One block's learning: run with the weights in hand on a few windows at a time, compared with what the unquantized one put out.

The mathematics is in learned_core.py. A block is a unit: it starts at what the solver found for all its matrices, and what comes
of it takes the place of that in the solver, before anything is committed. Every eighth window is held out, to judge by. Matrices
outside the blocks have no block to be judged by, and stay what the solver made of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.formats import LowRank, Packed
from compress.formats.grid import Quantized
from compress.manager import Context, Cost
from compress.model.learnable import Learnable
from compress.model.lockstep import Batch
from compress.model.seeds import seeded
from compress.model.speed import computing
from compress.model.stream import Stream, Twin
from compress.model.work import per_token
from compress.passes import learned_core as core
from compress.passes.solver import Aim, Solver
from compress.state import State
from compress.state.graph import Graph, Site

TOKENS = 768  # in a step, or one window
HELD = 8  # one window of so many is held out
BACKWARD = 6  # passes forward that one forward and back is like, in all that is not a product
SECONDS_PER_WEIGHT, STEPS_PER_MATRIX = 6e-9, 8  # of a step, beside products: of a weight; of a matrix, as inputs that are rounded
LATENT_BYTES, TAPE = 36, 3  # held of a weight; times that numbers of a token are held for the way back
JUDGED = 10  # times that iterates are judged
NOTHING_HELD = "nothing was learned: one window of calibration text leaves none to judge by"


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some windows, by their numbers, and how they are called through blocks."""

    numbers: list[int]
    batch: Batch

    def of(self, hidden: Sequence[Tensor]) -> Tensor:
        """The same windows of what lies in batches [b, t, d] of all windows."""
        size = len(hidden[0])
        return torch.stack([hidden[i // size][i % size] for i in self.numbers])


@dataclass(frozen=True)
class Course:
    """What the learning of every block has in common. held, some: the windows to judge by and those to learn from; share: how far
    a step goes; judged: whether the block is judged behind it; seed: of the order of the windows."""

    stream: Stream
    held: Sequence[Chunk]
    some: Sequence[Chunk]
    steps: int
    share: Callable[[int], float]
    judged: Callable[[int], bool]
    seed: int


def chunks(stream: Stream, state: State, ids: Tensor, *some: Sequence[Sequence[int]]) -> list[list[Chunk]]:
    """Windows [sequences, length], by their numbers, several times some at a time."""
    batches = iter(stream.start(state, [ids[list(numbers)] for each in some for numbers in each]))
    return [[Chunk([*n], replace(next(batches), hidden=torch.empty(0, device=stream.device))) for n in each] for each in some]


class Matrix:
    """One matrix of the block while it is learned: its latents, and what stands beside them in a format with a correction.
    Without an `aim` its codes stay."""

    def __init__(self, site: Site, packed: Packed, aim: Aim | None, device: torch.device):
        self.site, self.packed = site, packed
        base = packed.format.base if isinstance(packed.format, LowRank) else packed.format
        assert isinstance(base, Quantized)
        codes, grid = base.unpack(packed.tensors)
        self.beside: Tensor | None = None
        if isinstance(packed.format, LowRank):
            A_rk, B_nr = packed.format.factor_matrices(packed.tensors)
            self.beside = (B_nr @ A_rk).to(device)
        codes, grid = codes.to(device), grid.to(device)
        if aim is None:
            self.latent: core.Latent | core.Held = core.Held(codes, grid, base)
            return
        aim_nk = aim.W_nk if self.beside is None else aim.W_nk - self.beside
        self.latent = core.Latent(codes, grid, aim_nk, base, aim.factor.diag_k if aim.factor else None)

    def weights(self) -> Tensor:
        """[N, K], fp32."""
        found = self.latent.rounded()
        return found if self.beside is None else found + self.beside

    def keep(self) -> None:
        """Take the codes as they are now for the answer."""
        base = self.latent.fmt.pack(self.latent.codes().cpu(), self.latent.grid.to("cpu"))
        self.packed = replace(self.packed, tensors={**self.packed.tensors, **base})


class Learner:
    """Learns the blocks of one model, in turn."""

    def __init__(self, steps: int, state: State, ctx: Context, stream: Stream):
        assert ctx.calibration is not None, "`check` asks for calibration data"
        self.ctx, self.stream, every = ctx, stream, max(1, steps // JUDGED)
        ids = state.ids(ctx.calibration.ids)
        numbers = windows(len(ids), ids.shape[1], seeded(ctx.seed, "windows to learn from"))
        held, some = chunks(stream, state, ids, *numbers)
        self.course = Course(stream, held, some, steps, lambda step: core.share(step, steps),
                             lambda step: (steps - 1 - step) % every == 0, ctx.seed)  # fmt: skip

    def learn(self, solver: Solver, state: State, index: int, batches: Sequence[Batch], twin: Twin | None) -> None:
        """Better codes for the block than the solver's, in their place, and what is noted of them. batches: in front of the
        block; those of the twin are behind it."""
        assert solver.aims is not None
        aims = {n: aim for n, aim in solver.aims.items() if isinstance(solver.formats[n], Quantized | LowRank)}
        start, note = time.perf_counter(), NOTHING_HELD
        if aims and self.course.some:
            given, wanted = [batch.hidden for batch in batches], self._wanted(state, index, batches, twin)
            with self.stream.block(state, index) as block:
                matrices = [Matrix(state.graph[n], solver.packed[n], aim, self.stream.device) for n, aim in aims.items()]
                descent = Descent(self.course, block, index, matrices, given, wanted, state.dtype)
                note = f"learned: {descent.run(self._progress(state.graph, index))}"
            solver.packed |= {m.site.name: m.packed for m in matrices}
        seconds = (time.perf_counter() - start) / max(1, len(aims))
        for name, aim in aims.items():
            found = aim.error(solver.packed[name].dequantize(torch.float32).to(aim.W_nk.device))
            notes, before = [*aim.record["notes"], note], aim.record["seconds"]
            aim.record.update({"error": found, "seconds": before + seconds, "notes": notes})
        for record in solver.records:
            self.ctx.say(record)

    def _progress(self, graph: Graph, index: int) -> Callable[[float], None]:
        what = f"learning {graph.blocks[index].module}"
        return lambda done: self.ctx.progress(index + done, len(graph.blocks), what)

    def _wanted(self, state: State, index: int, batches: Sequence[Batch], twin: Twin | None) -> list[Tensor]:
        """What is to come out of the block: what the twin's has put out; without one, what the block would, not quantized."""
        if twin:
            return [batch.hidden for batch in twin.batches]
        with self.stream.block(state, index) as block:
            return [self.stream.call(block, batch, index) for batch in batches]


class Descent:
    """The learning of one block, which the stream has in hand."""

    def __init__(
        self, course: Course, block: nn.Module, index: int, matrices: Sequence[Matrix], given: Sequence[Tensor],
        wanted: Sequence[Tensor], dtype: torch.dtype,
    ):  # fmt: skip
        self.course, self.block, self.index, self.matrices = course, block, index, matrices
        self.given, self.wanted, self.dtype = given, wanted, dtype
        self.places = Learnable(course.stream, [m.site for m in matrices])

    def run(self, progress: Callable[[float], None]) -> str:
        """Go all steps; matrices keep the best of what was judged. What is noted of it."""
        course, order = self.course, list[int]()
        draw = seeded(course.seed, f"steps of block {self.index}")
        self._put()
        first = best = self._judged()
        for step in range(course.steps):
            order = order or torch.randperm(len(course.some), generator=draw).tolist()
            self._step(course.some[order.pop()], course.share(step))
            if course.judged(step):
                progress((step + 1) / course.steps)
                found = self._judged()
                if found < best:
                    best = found
                    for m in self.matrices:
                        m.keep()
        return f"error of the block on held-out windows {first:.3g} -> {best:.3g}"

    def _put(self) -> None:
        for m in self.matrices:
            self.places.put(m.site.name, m.weights().to(self.dtype))

    def _loss(self, chunk: Chunk) -> Tensor:
        batch = replace(chunk.batch, hidden=chunk.of(self.given))
        return core.relative(self.course.stream.call(self.block, batch, self.index), chunk.of(self.wanted))

    def _judged(self) -> float:
        """The loss on the windows that were held out."""
        losses = [float(self._loss(chunk)) * len(chunk.numbers) for chunk in self.course.held]
        return sum(losses) / sum(len(chunk.numbers) for chunk in self.course.held)

    def _step(self, chunk: Chunk, share: float) -> None:
        self.places.forget()
        with torch.enable_grad():
            loss = self._loss(chunk)
            (loss * chunk.batch.tokens.numel()).backward()  # else gradients at single tokens would be too small for fp16
        for m in self.matrices:
            slope = self.places.slope(m.site.name)
            if slope is not None:
                m.latent.step(slope, share)
        self._put()


def cost(state: State, tokens: int, steps: int, sites: Sequence[Site], corrects: bool) -> Cost:
    """What learning takes on top of solving: steps forward and back, judgements, and one more pass, or two without a twin."""
    return descent_cost(state, tokens, JUDGED * tokens / HELD + tokens * (2 - corrects), steps, TOKENS, sites)


def descent_cost(state: State, tokens: int, forward: float, steps: int, once: int, sites: Sequence[Site]) -> Cost:
    """Of `steps` forward and back on `once` of the `tokens`, and of `forward` more tokens that pass the same blocks."""
    work, once = per_token(state), min(once, tokens)
    blocks, rounds = len({s.block for s in sites}), 1.0 * steps * sum(s.numel for s in sites)
    share = blocks / max(1, len(state.graph.blocks))
    return Cost(
        2.0 * (forward + 3.0 * once * steps) * work.weights * share,
        numbers=(forward + BACKWARD * once * steps) * work.numbers * share,
        seconds=SECONDS_PER_WEIGHT * rounds, steps=1.0 * STEPS_PER_MATRIX * steps * len(sites),
        peak_bytes=_peak_bytes(state, tokens, once, sites),
    )  # fmt: skip


def _peak_bytes(state: State, tokens: int, once: int, sites: Sequence[Site]) -> int:
    """Of the largest block what is held of each of its weights, the Hessians, and what a step's tokens leave in it for the way
    back; beside that what all tokens are in front of it and behind it."""
    work, number, width = per_token(state), computing(state.dtype).itemsize, state.graph["embed"].shape[1]
    held = Counter[int | None]()
    for s in sites:
        held[s.block] += (LATENT_BYTES + 2 * number) * s.numel
    for (block, _), k in {(s.block, s.input_key): s.shape[1] for s in sites}.items():
        held[block] += 8 * k * k
    tape = TAPE * once * work.numbers / max(1, len(state.graph.blocks))
    return int(max(held.values(), default=0) + number * (tape + 3 * tokens * width))


def windows(count: int, length: int, draw: torch.Generator) -> tuple[list[list[int]], list[list[int]]]:
    """Which of so many windows are held out, and which are learned from, some at a time; a single one is held out."""
    held = list(range(HELD - 1, count, HELD)) or [count - 1]
    rest = [i for i in torch.randperm(count, generator=draw).tolist() if i not in held]
    size = max(1, TOKENS // length)
    return parts(held, size), parts(rest, size)


def parts(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]
