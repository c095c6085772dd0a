"""The pass `importance`: how large each input of a matrix is on the calibration text, for whoever quantizes elsewhere.

The mean square of every input is the diagonal of the Hessian that GPTQ goes by, and what llama.cpp calls an importance matrix.
The `gguf` exporter writes it beside the model, for llama-quantize and its kin. It is measured on the model as it stands in front
of this pass, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from compress.errors import RecipeError
from compress.manager import Context, Cost, Pass
from compress.model.lockstep import Clean, Inputs
from compress.model.speed import precision
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.state import Aspect, Fact, State
from compress.state.graph import Site


class Importance(Pass):
    """Measure the mean square of every input of every matrix, for the importance matrix of a GGUF file."""

    name: ClassVar[str] = "importance"
    needs: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.SERVING

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'importance' needs data.calibration, whose activations it measures")
        if later := next((p for p in following if changes(p)), None):
            raise RecipeError(f"'importance' measures the model as it stands here, and '{later.name}' behind it changes that; "
                              f"move it behind '{later.name}'")  # fmt: skip

    def foresee(self, state: State) -> State:
        return replace(state, serving={**state.serving, **{s.name: {} for s in measured(state)}})

    def cost(self, state: State, tokens: int) -> Cost:
        work = per_token(state)
        peak = waiting_bytes(state, tokens) + block_bytes(state)
        return Cost(2.0 * tokens * work.weights, tokens * work.squares, 0, peak, numbers=tokens * work.numbers)

    def run(self, state: State, ctx: Context) -> State:
        assert ctx.calibration is not None, "`check` asks for calibration data"
        (windows, length), before = ctx.calibration.ids.shape, state
        with precision("bf16"):
            stream, batches = ctx.stream(before)
            for block in before.graph.blocks:
                ctx.progress(block.index, len(before.graph.blocks), block.module)
                part, sites = f"block-{block.index:04}", [s for s in measured(before) if s.block == block.index]
                done = ctx.store.committed(part)
                if done is None:
                    sums: dict[str, Tensor] = {}

                    def observe(stage: str, inputs: Inputs, _: Clean | None, sums: dict[str, Tensor] = sums) -> None:
                        squares = inputs[None].double().square().sum(0).cpu()
                        sums[stage] = sums[stage] + squares if stage in sums else squares

                    stream.calibrate(before, block.index, batches, sites, observe, lambda _: {})
                    found = {s.name: {"squares": (sums[s.stage] / (windows * length)).float().tolist(), "windows": windows,
                                      "length": length} for s in sites}  # fmt: skip
                    done = ctx.store.commit(part, serving=found)
                else:
                    stream.advance(before, block.index, batches)
                state = state.with_part(done)
        return state


def changes(p: Pass) -> bool:
    """Whether a pass makes another model, rather than other codes for the same one."""
    writes = p.writes
    return p.trains or Aspect.STRUCTURE in writes or (Aspect.WEIGHTS in writes and Aspect.ENCODING not in writes)


def measured(state: State) -> list[Site]:
    """The matrices in the blocks that every token passes; experts see some, and no GGUF file of ours has any."""
    return [s for s in state.graph.linear if s.expert is None]
