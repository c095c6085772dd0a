"""The proof of an artifact: what its engine computes, against the run's own model.

Two things are compared. The logits of whole windows; and a greedy continuation, which goes through the engine's cache. For the
latter the run's model is not asked to generate, which would stream all its blocks once for every token: it reads the engine's
continuation in one pass, and at each place the engine's token must be the one that it would have taken itself. Where
two tokens are closer than the tolerance either will do.

Where no engine at hand can load the artifact, our reader gives its matrices to the same stream as the run's, and the proof says
why.

On a mismatch, the first matrix whose output is not what the run's weights give is named, if the engine lets us look inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.errors import ExportError
from compress.export.artifact.engines import Engine, EngineError, greedy
from compress.export.artifact.exporter import Job, Proof
from compress.formats import Served
from compress.formats.caches import CACHE
from compress.formats.served import Rounding
from compress.model.attention import See
from compress.model.head import Streamed, parts
from compress.state import State

OURS = "our own reader"
TOLERANCE = 2e-2  # of the largest logit: kernels of different shape round differently in 16-bit models
FP32_TOLERANCE = 1e-3  # the same in fp32, where only the order of sums differs
MOVED = (
    0.1  # the same of a text through a cache, where inputs are rounded: a sum's last bit may move a code, and so all behind it
)
PROMPT, NEW = 16, 16  # tokens of the greedy check: given, and generated


def proven(job: Job, written: State, run: Callable[[], Proof], tolerance: float = TOLERANCE) -> Proof:
    """The proof that `run` gives in an engine; where it raises EngineError, that of our reader, which has read `written`.

    Without text in the recipe there are no logits, and the tensors, which have been compared, are the proof.
    """
    if job.tokens is None:
        return Proof(OURS, 0.0, "every tensor compared; no text in the recipe to compare logits on")
    try:
        return run()
    except EngineError as e:
        ours, theirs = (logits(s, [job.tokens], job.device)[0] for s in (job.state, written))
        difference, allowed = float((ours - theirs).abs().max()), tolerance * float(ours.abs().max())
        if not math.isfinite(difference) or difference > allowed:
            raise mismatch(OURS, difference, ours) from e
        return Proof(OURS, difference, f"not proven in an engine: {e}")


def mismatch(engine: str, difference: float, ours: Tensor, where: str = "") -> ExportError:
    return ExportError(f"{engine} loads the artifact, but its logits differ from the run's by {difference:.3g} (largest logit "
                       f"{float(ours.abs().max()):.3g}){where}; the artifact is not kept")  # fmt: skip


def prove(job: Job, engine: Engine, tolerance: float = TOLERANCE, remark: str = "", state: State | None = None) -> Proof:
    """The proof that `engine`, which has loaded the artifact, computes what the run's state does; ExportError otherwise.

    `tolerance` is a share of the largest logit. `state` stands for the run's own, such as the same in another dtype.
    """
    assert job.tokens is not None
    state = state or job.state
    prompt = job.tokens[:1, :PROMPT]
    said = greedy(engine, prompt, NEW) if state.graph.causal else prompt[:, :0]
    ours, path = logits(state, [job.tokens, torch.cat([prompt, said], 1)], job.device)
    theirs, _ = engine.prefill(job.tokens)
    allowed = tolerance * float(ours.abs().max())
    difference = float((ours - theirs).abs_().max())
    if not math.isfinite(difference) or difference > allowed:
        raise mismatch(engine.name, difference, ours, where(engine, state, job.tokens))
    steps = path[0, prompt.shape[1] - 1 : -1]
    rounded = CACHE in state.serving or any(isinstance(fmt, Served) for fmt in state.formats.values())
    allowed = max(allowed, MOVED * float(ours.abs().max())) if rounded else allowed
    wrong = (steps.amax(-1) - steps.gather(-1, said.T)[:, 0] > allowed).nonzero()
    if len(wrong):
        raise ExportError(f"{engine.name} loads the artifact, but token {int(wrong[0])} of its greedy text is not the run's, "
                          "though whole windows agree: its cache may be at fault; the artifact is not kept")  # fmt: skip
    return Proof(engine.name, difference, remark, int((steps.argmax(-1) == said[0]).sum()))


def logits(state: State, batches: list[Tensor], device: str, see: See | None = None) -> list[Tensor]:
    """The logits of a state, streamed, fp32 [b, t, vocabulary] on CPU, for each of the batches [b, t]; `see`: see
    `Streamed.of`."""
    found = Streamed.of(state, batches, device, causal=False, exact=True, see=see)
    made: list[list[Tensor]] = [[] for _ in found.pieces]
    with torch.no_grad():
        for rows in parts(found.head.size):
            with found.part(rows) as ask:
                for i, held in enumerate(made):
                    held.append(ask(i).cpu())
    whole = torch.cat([torch.cat(held, -1) for held in made])
    split = whole.split([batch.numel() for batch in batches])
    return [part.view(*batch.shape, -1) for part, batch in zip(split, batches, strict=True)]


def where(engine: Engine, state: State, tokens: Tensor) -> str:
    """Which matrix is the first to compute something else, for a message; empty where the engine does not show or none does, or
    where matrices leave out a part of what they compute."""
    model = getattr(engine, "model", None)
    if not isinstance(model, nn.Module) or state.sparsity:
        return ""
    modules = dict(model.named_modules())
    for site in state.graph:
        module = modules.get(site.module)
        if site.expert is None and site.role != "embed" and isinstance(module, nn.Linear):
            off = difference_at(model, module, tokens, state.weight(site), state.inputs(site))
            if off > TOLERANCE:
                return f", first at '{site.name}', whose outputs are off by {off:.0%} of their largest"
    return ", though every matrix by itself gives what it should"


@torch.no_grad()
def difference_at(model: nn.Module, module: nn.Module, tokens: Tensor, weight: Tensor, rounding: Rounding | None = None) -> float:
    """How far one module's outputs are from those of the weight it should hold, its inputs rounded, as a share of the largest."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.float())))
    try:
        model(input_ids=tokens[:1].to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    x, y = seen[0]
    x = (x if rounding is None else rounding(x)).float()
    bias = getattr(module, "bias", None)
    wanted = nn.functional.linear(x, weight.float().to(x.device), None if bias is None else bias.float())
    return float((y - wanted).abs().max() / wanted.abs().max().clamp(min=1e-20))
