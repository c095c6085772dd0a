"""The pass `distill`: the model in hand learns to predict what the model before any step predicts.

The loss and the loop are in compress/training; here a recipe's words become what learns (choice.py), what it costs (memory.py),
and what is written. Shapes and formats stay as they are, with one exception: factors that a quantized matrix is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.formats import LowRank, Packed
from compress.manager import Context, Cost, Pass, Record
from compress.model.data import MOST, Tokens
from compress.model.speed import precision
from compress.model.work import per_token
from compress.passes import blockwise
from compress.state import Aspect, State
from compress.state.plan import BitPlan
from compress.training import memory as needs
from compress.training import options
from compress.training.checkpoints import Checkpoints
from compress.training.choice import Choice, Kind, choose, learnt
from compress.training.gradients import Fused, Kept, Slopes
from compress.training.loop import EVEN_WORSE, SLOWER, Point, Schedule, Training, best_of, check_learnt
from compress.training.loss import DIVERGENCES
from compress.training.moving import Optimizer
from compress.training.options import Memory, ZerothOrder
from compress.training.settings import damage, products, said, settled, table
from compress.training.student import Student
from compress.training.teacher import Cached, Live, Nobody, Streamed
from compress.training.windows import MICRO, halves
from compress.training.zeroth import Directions

PARTS = (*DIVERGENCES, "ce", "hidden_cosine")
SMALLEST = 1e-3  # size of a tensor, for its rate: zeros learn too
OTHERS = "others"  # the part that is committed last: what learns and is no matrix, and the record
COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)")


class Distill(Pass):
    """Let the model learn from the one that the run began with."""

    name: ClassVar[str] = "distill"
    version: ClassVar[int] = 2
    writes: ClassVar[Aspect] = Aspect.WEIGHTS | Aspect.ENCODING | Aspect.PLAN
    trains: ClassVar[bool] = True

    loss: dict[str, float] = Field(
        {"kl": 1.0}, description="weights of kl, reverse_kl, js, ce (the text's own tokens), hidden_cosine (what blocks put out)"
    )
    teacher: Literal["cached", "live", "streamed"] = Field(
        "cached", description="asked once, its likeliest tokens kept on disk; in memory; or read block by block for every step"
    )
    top_k: int = Field(64, ge=1, description="cached: how many of a prediction's likeliest tokens are kept")
    train: str | tuple[str, ...] = Field(
        "all", description="what learns: all, lora, scales, norms, patterns of names, or a list of these"
    )
    scope: Literal["model", "block"] = Field(
        "model",
        description="the whole model learns at once; or the scales of each block, from what the source's puts out",
    )
    rank: int | None = Field(None, ge=1, description="lora: rank of the factors that matrices without any are given")
    tokens: str | int | None = Field(None, description="how many tokens to learn from, such as 2M; default: every window once")
    batch: int = Field(8, ge=1, description="windows in a step; all, where fewer are learnt from")
    rate: float = Field(
        1e-3, gt=0, le=1e6, description="learning rate: what share of its size (root mean square) a tensor moves by in a step"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps in which the rate rises")
    checks: int = Field(10, ge=1, description="how often the held-out windows are judged; the best state is kept")
    memory: Memory = Field(
        Memory(),
        description="optimizer, gradients, activations, weights, and a limit that `plan` keeps to; see docs/distillation.md",
    )

    @field_validator("loss")
    @classmethod
    def _parts(cls, loss: dict[str, float]) -> dict[str, float]:
        for name, weight in loss.items():
            if name not in PARTS:
                raise ValueError(f"'{name}' is none of {', '.join(PARTS)}")
            if not 0 < weight < 1e6:
                raise ValueError(f"'{name}' has the weight {weight}; give a number above 0, or leave it out")
        if not loss.keys() & {*DIVERGENCES, "ce"}:
            raise ValueError("the predictions themselves have no part in it; add kl")
        return loss

    @field_validator("tokens")
    @classmethod
    def _count(cls, tokens: str | int | None) -> str | int | None:
        if tokens is not None:
            counted(tokens)
        return tokens

    @field_validator("train")
    @classmethod
    def _some(cls, train: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not train:
            raise ValueError("say what learns: all, lora, scales, norms, or patterns of names")
        return train

    @model_validator(mode="after")
    def _nothing_idle(self) -> Distill:
        if self.loss.keys() == {"ce"} and self.chosen().keys() & {"teacher", "top_k"}:
            raise ValueError("'ce' learns from the text alone, and no teacher is asked; add kl, or leave the teacher out")
        if "top_k" in self.chosen() and self.teacher != "cached":
            raise ValueError(f"'top_k' is about teacher: cached; a {self.teacher} one gives all probabilities")
        if "hidden_cosine" in self.loss and self.teacher == "cached":
            raise ValueError("what blocks put out is not cached; use teacher: live or streamed, or leave hidden_cosine out")
        if self.rank is not None and "lora" not in self.words:
            raise ValueError("'rank' is about train: lora; leave it out")
        if self.scope == "block":
            if self.words != ("scales",):
                raise ValueError("block by block scales learn; use train: scales, or scope: model")
            if idle := sorted(self.chosen().keys() & {"loss", "teacher", "top_k", "memory"}):
                raise ValueError(f"'{idle[0]}' is about the whole model, and blocks learn by what they put out; leave it out")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        return (self.train,) if isinstance(self.train, str) else self.train

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated:
            raise RecipeError("'distill' learns from text; add data.training or data.calibration")

    # --- what it will be ---

    def choice(self, state: State) -> Choice:
        if not state.graph.causal or not any(site.role == "head" for site in state.graph):
            raise ModelError(f"'{state.graph.family}' predicts no next token, which is what a student learns")
        found = choose(state, self.words, self.rank)
        if self.scope == "block":
            blockwise.check(state, found)
        factors = [state.graph[n] for n, kind in found.sites.items() if Kind.FACTORS in kind]
        given = [site for site in factors if not isinstance(state.format(site), LowRank)]
        small = next((site for site in given if (self.rank or 0) > min(site.shape)), None)
        if small is not None:
            (n, k), most = small.shape, min(small.shape)
            raise RecipeError(f"rank {self.rank} is more than '{small.name}' of {n} x {k} has; ask for {most} or less", ("rank",))
        if given and self.rank is None:
            raise RecipeError("'lora' needs the rank of the factors that matrices are to be given; add rank: 16", ("rank",))
        if self.rank is not None and not given:
            raise RecipeError("every matrix that 'lora' trains has factors already, which keep their rank; leave 'rank' out",
                              ("rank",))  # fmt: skip
        return found

    def check_text(self, tokens: Tokens) -> None:
        if self.scope == "block" and tokens.learnt is not None:
            raise RecipeError(
                "blocks learn from every token, and data.training asks for answers alone; use scope: model", ("scope",)
            )
        check_learnt(tokens, *halves(len(tokens.ids), tokens.ids.shape[1], tokens.sources))

    def foresee(self, state: State) -> State:
        choice = self.choice(state)
        return planned(state.promising(choice.formats), choice)

    def setting(self, length: int, windows: int = 0) -> needs.Setting:
        """How it is trained on windows of this length, as far as the recipe says; a cached teacher is asked about `windows`."""
        batch = self.in_step(windows, length) if windows else self.batch
        together = min(batch, max(1, MICRO // length))
        return needs.Setting(self.memory, self.teacher, together, length, batch=batch, loss=tuple(self.loss), windows=windows)

    # --- running it ---

    def run(self, state: State, ctx: Context) -> State:
        assert ctx.training is not None, "`check` asks for it"
        assert ctx.source is not None, "a run begins with a model"
        choice, tokens = self.choice(state), ctx.training
        if self.scope == "block":
            return blockwise.run(self, state, choice, ctx)
        kept = Checkpoints(ctx.store.analysis("training", [self.version, self.text()]))
        written = self._committed(state, choice, ctx)
        if written is None:
            written = self._trained(state, choice, ctx, tokens, kept)
        kept.drop()
        return written

    def _trained(self, state: State, choice: Choice, ctx: Context, tokens: Tokens, kept: Checkpoints) -> State:
        learning, held = halves(len(tokens.ids), tokens.ids.shape[1], tokens.sources)
        schedule = self.schedule(*tokens.ids.shape)
        teacher = self._teacher(state, ctx, tokens)
        memory = settled(state, choice, self.setting(tokens.ids.shape[1], len(tokens.ids)))[0].memory
        student = Student(
            state, choice, ctx.seed, ctx.device, memory.keeps, memory.weights == "streamed", ctx.store.partial.parent
        )
        optimizer, slopes = self.moving(state, student, memory, ctx.seed)
        training = Training(
            student, teacher, tokens, learning, held, self.loss, schedule, optimizer, slopes, ctx.seed, ctx.progress
        )
        with precision("bf16" if state.dtype == torch.bfloat16 else "ieee"):  # as precise as the model's own activations
            training.run(kept)
            return self._written(state, student, ctx, training)

    def moving(self, state: State, student: Student, memory: Memory, seed: int) -> tuple[Optimizer, Slopes]:
        """What moves a student, and by what gradients."""
        optimizer = Optimizer(memory.by, student.learns, learnt(state, student.choice), self.rates(student), seed, damage(state))
        if isinstance(memory.slopes, ZerothOrder):
            return optimizer, Directions(optimizer, memory.slopes, self.rate, seed)
        return optimizer, (Fused if isinstance(memory.slopes, options.Fused) else Kept)(optimizer)

    def in_step(self, windows: int, length: int) -> int:
        """How many windows a step takes: no more than there are to learn from, since none has more to say when taken twice."""
        return min(self.batch, len(halves(windows, length)[0]))

    def schedule(self, windows: int, length: int) -> Schedule:
        wanted = len(halves(windows, length)[0]) * length if self.tokens is None else counted(self.tokens)
        batch = self.in_step(windows, length)
        steps = max(1, round(wanted / (batch * length)))
        return Schedule(steps, batch, 1.0, round(self.warmup * steps), min(self.checks, steps))

    def rates(self, student: Student) -> list[float]:
        """The rate of everything that learns, in its order: `rate` is a share of a tensor's size, its root mean square (relative
        steps, as in arXiv 1804.04235, section 8). Scales are shares of themselves already. A second factor moves so that its
        product with the first moves by that share of the matrix."""
        found = []
        for name, p in student.learns.items():
            site, _, last = name.rpartition(":")
            if last.endswith("t_ng"):
                found.append(self.rate)
            elif last.endswith("B_nr"):
                matrix = student.matrices[site]
                A_rk = dict(matrix.named_parameters())[last.replace("B_nr", "A_rk")]
                with torch.no_grad():
                    found.append(self.rate * size_of(matrix()) / (size_of(A_rk) * len(A_rk) ** 0.5))
            else:
                found.append(self.rate * size_of(p))
        return found

    def _teacher(self, state: State, ctx: Context, tokens: Tokens) -> Any:
        assert ctx.source is not None
        if self.loss.keys() == {"ce"}:
            return Nobody()
        if self.teacher != "cached":
            kind = Live if self.teacher == "live" else Streamed
            return kind(ctx.source, tokens, state.vocabulary, ctx.device, "hidden_cosine" in self.loss)
        read = replace(tokens, learnt=None)  # what is learnt from makes no difference to what it says
        store = ctx.store.of_source("teacher", {"tokens": read.hash, "k": self.top_k, "vocabulary": state.vocabulary})

        def keep(part: str, tensors: dict[str, Tensor] | None) -> Any:
            return store.committed(part) if tensors is None else store.commit(part, dense=tensors)

        return Cached(ctx.source, tokens, state.vocabulary, ctx.device, self.top_k, keep, ctx.progress)

    def _committed(self, state: State, choice: Choice, ctx: Context) -> State | None:
        """The state with what an earlier run has learnt, where it was stopped when all of that had been written."""
        for part in (*parts(state, choice), OTHERS):
            found = ctx.store.committed(part)
            if found is None:
                return None
            state = state.with_part(found)
        return planned(state, choice)

    def _written(self, state: State, student: Student, ctx: Context, training: Training) -> State:
        """The state with what was learnt, committed block by block."""
        for part, names in parts(state, student.choice).items():
            codes: dict[str, Packed] = {}
            dense: dict[str, Tensor] = {}
            for name in names:
                packed = student.matrices[name].stored()
                if packed is None:
                    dense[name] = student.matrices[name]().detach().cpu()
                else:
                    codes[name] = Packed(packed.format, packed.shape, {n: t.cpu() for n, t in packed.tensors.items()})
            state = state.with_part(ctx.store.commit(part, codes=codes, dense=state.stored(dense)))
        windows, length = training.tokens.ids.shape
        chosen, expected = settled(student.state, student.choice, self.setting(length, windows))
        notes = [
            *told(training.curve, training.judged_by, training.lost),
            *slowed(training, self.rate),
            *ended(training),
            *learnt_from(training.tokens),
            f"expected to take {needs.told(expected)}, with {said(chosen.memory)}",
        ]
        record: Record = {
            "site": self.name,
            "curve": [[p.step, p.tokens, p.loss, p.held] for p in training.curve],
            "notes": notes,
            "judged_by": training.judged_by,
        }
        others = {n: p.detach().to(state.dense.specs[n].dtype).cpu() for n, p in student.tensors.items()}
        state = state.with_part(ctx.store.commit(OTHERS, dense=others, records=[record]))
        ctx.say(record)
        return planned(state, student.choice)

    def trained(self, state: State, windows: int, length: int) -> tuple[Cost, str]:
        """Every token goes through the student and back, as often as the setting says (`products`). The teacher is asked about
        every window, or for every step."""
        choice = self.choice(state)
        if self.scope == "block":
            return blockwise.cost(self, state, choice, windows, length)
        setting, found = settled(state, choice, self.setting(length, windows))
        schedule = self.schedule(windows, length)
        taught = schedule.steps * schedule.batch * length
        judged = (schedule.checks + 1) * len(halves(windows, length)[1]) * length
        asked = 0 if self.loss.keys() == {"ce"} else windows * length if self.teacher == "cached" else taught + judged
        vocabulary, width = state.graph["embed"].shape
        work = per_token(state)
        passes, heads = round(taught * products(setting)) + judged, taught * (2 if setting.forward else 3) + judged + asked
        cost = Cost(2.0 * (work.weights * (passes + asked) + vocabulary * width * heads), numbers=work.numbers * (passes + asked),
                    logits=vocabulary * (4.0 * taught + judged + 2 * asked), peak_bytes=found.total)  # fmt: skip
        text = f"distill: {schedule.steps:,} steps of {schedule.batch} windows; training takes {needs.told(found)}"
        if self.memory.limit is None:
            return cost, text
        return cost, f"{text}; with {said(setting.memory)}\n{table(state, choice, setting)}"


def parts(state: State, choice: Choice) -> dict[str, list[str]]:
    """What is committed at once, by the name of the part: matrices outside the blocks, then those of each block."""
    blocks: dict[int | None, list[str]] = {}
    for name in choice.sites:
        blocks.setdefault(state.graph[name].block, []).append(name)
    ordered = sorted(blocks, key=lambda b: -1 if b is None else b)
    return {"outside" if b is None else f"block-{b:04}": blocks[b] for b in ordered}


def planned(state: State, choice: Choice) -> State:
    """The same, its plan with the formats that matrices were given."""
    if not choice.formats or state.plan is None:
        return state
    return replace(state, plan=BitPlan({**state.plan.formats, **choice.formats}))


def counted(tokens: str | int) -> int:
    """A number of tokens; ValueError where it is none."""
    match = COUNT.fullmatch(str(tokens).strip())
    count = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0
    if not 0.5 <= count <= MOST:
        raise ValueError(f"'{str(tokens)[:40]}' is no number of tokens; write 2M, 500k or 2000000")
    return round(count) or 1


def size_of(t: Tensor) -> float:
    """The root mean square of a tensor, `SMALLEST` at least."""
    return max(SMALLEST, float(t.detach().float().square().mean().sqrt()))


def learnt_from(tokens: Tokens) -> list[str]:
    """What share of the text is learnt from, where not all of it is."""
    return [] if tokens.learnt is None else [f"learnt from the answers, {tokens.learnt.float().mean():.1%} of the tokens"]


def slowed(training: Training, rate: float) -> list[str]:
    """That the rate was too high, where it was lowered."""
    if not training.slowed:
        return []
    now = f"{rate * SLOWER**training.slowed:.2g}"
    return [f"rate {rate:g} was too high: no check was better than the start, from which training went on at {now}"]


def ended(training: Training) -> list[str]:
    """That steps were left out, where nothing better came any more."""
    last, steps = training.curve[-1].step, training.schedule.steps
    if training.lost is not None or last == steps:
        return []
    return [f"{EVEN_WORSE} checks in a row were no better, and training ended after {last:,} of {steps:,} steps"]


def told(curve: Sequence[Point], by: str, lost: int | None = None) -> list[str]:
    """What came of it, in words; `lost`: the step after which the loss was no number."""
    best = best_of(curve)
    text = f"held-out {by} {curve[0].held:.5f} -> {best.held:.5f} after {best.tokens:,} tokens"
    won = f", {1 - best.held / curve[0].held:.0%} of it won back" if by == "kl" and curve[0].held > 0 else ""
    found = [text + won]
    if lost is not None:
        found.append(f"after step {lost:,} the loss was no number any more, and training ended; a lower rate may help")
    if curve[-1].step > best.step or lost is not None:
        found.append("the state of that check is kept; later ones were worse")
    return found
