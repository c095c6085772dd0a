"""`distill` with `scope: block`: the scales of each block learn by what the source's same block puts out, before the next's do.

The first phase of EfficientQAT (arXiv 2407.11062), with the codes as they are: there weights learn as well, which here is
`quantize: {method: learned}`. No loss of the whole model is needed, nor its memory: one block is held, and what all windows are
in front of it, in the model in hand and in the source. The inputs of a block are those of the blocks that have learned; the loss
is that of learned_core.py, the error of a token over its length; what stays is the best of what held-out windows say, the start
among it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from compress.errors import RecipeError
from compress.formats import Packed
from compress.manager import Context, Cost, Record
from compress.model.data import Tokens
from compress.model.layers import in_layer, stack_of
from compress.model.lockstep import Batch
from compress.model.speed import precision
from compress.model.stream import Stream, Twin
from compress.passes import learned
from compress.state import State
from compress.state.graph import Block, Site
from compress.training.choice import Choice, Kind
from compress.training.loop import Schedule
from compress.training.windows import halves


class Asks(Protocol):
    """The options of `distill` that are asked here."""

    @property
    def rate(self) -> float: ...
    def schedule(self, windows: int, length: int) -> Schedule: ...


def scaled(state: State, choice: Choice, index: int) -> list[Site]:
    """The matrices of a block whose scales learn."""
    return [site for site in state.graph.of_block(index) if not site.tied and Kind.SCALES in choice.kind(site)]


def run(options: Asks, state: State, choice: Choice, ctx: Context) -> State:
    """The state with scales that have learned, each block committed."""
    tokens, source = ctx.training, ctx.source
    assert tokens is not None, "`check` asks for it"
    assert source is not None, "a run begins with a model"
    with precision("bf16"):
        stream, theirs, ids = Stream(state, ctx.device), Stream(source, ctx.device), tokens.batches()
        batches = stream.start(state, [state.ids(batch) for batch in ids])
        twin = Twin(theirs, source, theirs.start(source, ids))
        course = course_of(options, state, stream, tokens, ctx.seed)
        for block in state.graph.blocks:
            ctx.progress(block.index, len(state.graph.blocks), f"learning {block.module}")
            part = f"block-{block.index:04}"
            done = ctx.store.committed(part)
            theirs.advance(source, block.index, twin.batches)
            if done is None:
                codes, record = learn(course, state, scaled(state, choice, block.index), block, batches, twin)
                ctx.say(record)
                done = ctx.store.commit(part, codes, records=[record])
            state = state.with_part(done)
            stream.advance(state, block.index, batches)
    return state


def course_of(options: Asks, state: State, stream: Stream, tokens: Tokens, seed: int) -> learned.Course:
    """How every block learns: as many windows a step, and as many steps, as the whole model would."""
    schedule = options.schedule(*tokens.ids.shape)
    learning, judging = halves(len(tokens.ids), tokens.ids.shape[1], tokens.sources)
    held, some = learned.chunks(
        stream, state, state.ids(tokens.ids), learned.parts(judging, schedule.batch), learned.parts(learning, schedule.batch)
    )
    return learned.Course(stream, held, some, schedule.steps, lambda step: options.rate * schedule.at(step),
                          lambda step: schedule.judged(step + 1), seed)  # fmt: skip


def learn(
    course: learned.Course, state: State, sites: Sequence[Site], block: Block, batches: Sequence[Batch], twin: Twin
) -> tuple[dict[str, Packed], Record]:
    """Matrices of a block with the scales that are best for what it puts out, and what is told of it."""
    given, wanted = [batch.hidden for batch in batches], [batch.hidden for batch in twin.batches]
    with course.stream.block(state, block.index) as module:
        matrices = [learned.Matrix(site, state.codes[site.name].load(), None, course.stream.device) for site in sites]
        note = "nothing has scales here"
        if matrices:
            note = learned.Descent(course, module, block.index, matrices, given, wanted, state.dtype).run(lambda _: None)
    return {m.site.name: m.packed for m in matrices}, {"site": block.module, "notes": [note]}


def check(state: State, choice: Choice) -> None:
    """RecipeError where blocks have nothing to learn, or are not those of the source."""
    if not any(scaled(state, choice, block.index) for block in state.graph.blocks):
        raise RecipeError("no matrix of a block has scales that could learn; put 'quantize' before it", ("scope",))
    stack = stack_of(state)
    held = [{m[1] for name in c.specs if (m := in_layer(name, stack))} for c in (state.dense, state.dense.base)]
    if held[0] != held[1]:
        raise RecipeError(f"layers have gone since the source's {len(held[1])}, and a block learns from the source's same one; "
                          "use scope: model", ("scope",))  # fmt: skip


def cost(options: Asks, state: State, choice: Choice, windows: int, length: int) -> tuple[Cost, str]:
    """Every token once through each of the two models, and what the steps take in one block after the other."""
    schedule, tokens = options.schedule(windows, length), windows * length
    sites = [site for block in state.graph.blocks for site in scaled(state, choice, block.index)]
    judged = (schedule.checks + 1) * len(halves(windows, length)[1]) * length
    found = learned.descent_cost(state, tokens, 2.0 * tokens + judged, schedule.steps, schedule.batch * length, sites)
    return found, f"distill: {schedule.steps:,} steps of {schedule.batch} windows in each block"
