"""The pass `kv_policy`: which entries of the KV cache each head keeps, so that a model's text changes least within the bytes.

Weights stay as they are; what is decided goes along as `kv_policy.json`, which our runtime follows. compress/cache/rules.py has
the rules, kv_policy_core.py how their damage is measured and the budget spent.

1. One pass over the calibration windows, block by block: of each window the last `continuation` tokens are what is read through
   the cache, the rest is the prompt. Every option of every KV head is measured on what attention is given there.
2. The budget: bytes of all entries after `context` tokens, exact. `method: ilp` chooses rule, share and storage of every head;
   `method: uniform` gives all heads the one rule that is named, at the largest share that fits: StreamingLLM, SnapKV or H2O.

`method: fastgen` fixes no rules: heads take theirs from a ladder when they have read a prompt (compress/cache/ladder.py). What is
measured is how much that keeps of calibration prompts, and where there is a budget, T is found so that they meet it in the mean
(kv_policy_fastgen.py).

Shares are shares of the tokens seen, so what was measured on windows of one length is used at others. What is measured is kept
under the state and the windows: another budget or context measures nothing. Calibrate on the kind of text that will be served:
which heads retrieve shows only where there is something to retrieve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from compress.cache.ladder import RECOVERY, SHARE, Ladder
from compress.cache.merging import MERGED
from compress.cache.policy import SERVED, Layer, Policy, Unit
from compress.cache.rules import DTYPES, FASTGEN, MARKS, STEP
from compress.errors import FormatError, RecipeError
from compress.formats.caches import CACHE
from compress.manager import Context, Cost, Pass, Record
from compress.model.attention import Attended, Heads, heads, plain
from compress.model.marks import Marks, marked
from compress.model.speed import precision
from compress.model.work import block_bytes, per_token, waiting_bytes
from compress.passes import kv_policy_core as core
from compress.passes.allocate_core import Infeasible
from compress.passes.attended import seen_by_layer
from compress.passes.kv_policy_fastgen import STEPS, Climb, Climbed
from compress.state import Aspect, State
from compress.state.plan import Budget, size

SHARED = "50 %"  # the budget where none is asked for
CHANGES = ~(Aspect.SERVING | Aspect.PLAN)  # what of a state makes attention give something else
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Options that a method has no use for, and why.
IDLE = {"ilp": {"recovery"}, "uniform": {"recovery", "continuation"}, "fastgen": {"rules", "context", "continuation"}}
WHY = {
    "ilp": "which goes by the error of outputs",
    "uniform": "which measures nothing",
    "fastgen": "which has rules of its own and counts whole calibration windows as prompts",
}
Rule = Literal["stream", "snap", "h2o", "heavy", "punct", "frequent", "full"]


class KvPolicy(Pass):
    """Choose which entries of the KV cache each head keeps, within a budget of bytes."""

    name: ClassVar[str] = "kv_policy"
    writes: ClassVar[Aspect] = Aspect.SERVING

    budget: str | None = Field(
        None, description="of the cache at `context` tokens: a share of what it takes now (50 % unless given), or bytes (40 MiB)"
    )
    context: int = Field(2048, ge=16, le=2**31, description="tokens at which the budget counts; shares are of the tokens seen")
    rules: tuple[Rule, ...] = Field(
        ("stream", "snap", "h2o", "heavy", "punct", "frequent", "full"),
        description="what a head may keep, of these the best is chosen",
    )
    dtype: tuple[Literal["bf16", "fp16", "fp32", "int8"], ...] = Field(
        (),
        description="what entries may be stored in: numbers as they are, or int8 with a scale each; the model's own where empty",
    )
    method: Literal["ilp", "uniform", "fastgen"] = Field(
        "ilp", description="rule and share of every head, one rule at one share for all, or rules that heads take by the prompt"
    )
    continuation: int = Field(64, ge=4, le=4096, description="tokens of each window that are read through the cache, to measure")
    recovery: float | None = Field(
        None, gt=0, le=1, description="of fastgen: the share of attention that a rule has to recover; .85 unless budget is given"
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, text: Any) -> Any:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{text} is no budget; write '50 %' or '40 MiB'")
        try:
            if text and Budget.parse(text).average:
                raise ValueError(f"'{text}' counts bits a weight, and a cache has none; write '50 %' or '40 MiB'")
        except FormatError as e:
            raise ValueError(str(e)) from None
        return text

    @model_validator(mode="after")
    def _of_use(self) -> KvPolicy:
        if not self.rules or len(set(self.rules)) < len(self.rules) or len(set(self.dtype)) < len(self.dtype):
            raise ValueError("rules and dtype are lists without repetition, and at least one rule is needed")
        if self.method == "uniform" and (len(self.rules) != 1 or len(self.dtype) > 1 or self.rules == ("full",)):
            raise ValueError("method: uniform gives all heads one rule other than 'full', and one dtype; name one of each")
        idle = sorted(IDLE[self.method] & self.chosen().keys())
        if idle:
            raise ValueError(f"'{idle[0]}' is of no use to method: {self.method}, {WHY[self.method]}; leave it out")
        if self.method == "fastgen" and len(self.dtype) > 1:
            raise ValueError("method: fastgen stores all entries alike; name one dtype")
        if self.recovery is not None and self.budget is not None:
            raise ValueError("recovery says how much stays, and budget finds it; give one of them")
        return self

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not calibrated and self.method != "uniform":
            raise RecipeError("'kv_policy' needs data.calibration, on which it measures heads; add it, or use method: uniform")
        later = next((p for p in following if p.writes & CHANGES or p.name == self.name), None)
        if later:
            raise RecipeError(f"'kv_policy' decides for the model as it stands here, and '{later.name}' behind it changes that; "
                              f"move it behind '{later.name}', or leave one out")  # fmt: skip

    def check_windows(self, length: int, state: State) -> None:
        if self.method == "ilp" and length < 2 * self.continuation:
            raise RecipeError(f"'kv_policy' reads the last {self.continuation} tokens of each window through the cache, and "
                              f"windows have {length}; ask for {2 * self.continuation} or more, or lower 'continuation'",
                              ("continuation",))  # fmt: skip
        if self.method == "fastgen" and length < STEP:
            raise RecipeError(f"'kv_policy': FastGen keeps everything of prompts of fewer than {STEP} tokens, and windows have "
                              f"{length}; ask for longer ones")  # fmt: skip

    def foresee(self, state: State) -> State:
        if CACHE in state.serving:
            raise RecipeError("'kv_policy' stores entries by its own 'dtype', and an earlier 'kv_cache' rounds them for another "
                              "engine; leave one of them out")  # fmt: skip
        if MERGED in state.serving:
            raise RecipeError("'kv_policy' decides on a cache, and an earlier 'context_merge' leaves one of its own; leave one "
                              "of them out")  # fmt: skip
        found = heads(state)
        if self.method == "fastgen":
            return replace(state, serving={**state.serving, SERVED: {}})
        budget = self._bytes(state, found)
        least = int(self._bytes_of(found, core.options_of(self.rules, self._dtypes(state))).min(1).sum())
        if self.method == "ilp" and least > budget:
            raise RecipeError(f"'kv_policy': no choice of these rules fits {size(budget)}; the smallest takes {size(least)} at "
                              f"{self.context:,} tokens: raise the budget, or allow rules of small shares, or int8")  # fmt: skip
        if self.method == "uniform":
            self._share(found, self._dtypes(state)[0], budget)
        return replace(state, serving={**state.serving, SERVED: {}})

    def remarks(self, state: State, foreseen: State) -> Iterable[str]:
        found = heads(state)
        whole = plain(found, self.context, state.dtype.itemsize)
        more = size(plain(found, STEP, state.dtype.itemsize))
        if self.method == "fastgen":
            most = sum(layer.nbytes(self.context) for layer in self._by_prompt(found, self._dtypes(state)[0]))
            yield (f"kv_policy: what stays of the cache hangs on the prompt; at {self.context:,} tokens it takes {size(most)} a "
                   f"row where everything stays, without a policy {size(whole)}; {more} more wait while it decodes")  # fmt: skip
            return
        most = self._bytes(state, found)
        yield (f"kv_policy: at {self.context:,} tokens the cache takes at most {size(most)} a row, without it {size(whole)}; "
               f"{more} more wait while it decodes")  # fmt: skip

    def cost(self, state: State, tokens: int) -> Cost:
        if self.method == "uniform":
            return Cost()
        work, options = per_token(state), len(core.options_of(self.rules, self._dtypes(state)))
        layers = heads(state)
        inputs = sum(each.reader.shape[1] for each in layers)
        # By fastgen, every token's attention is added up: that of windows of the usual length, here.
        exact = 2.0 * tokens * inputs * (self.context if self.method == "fastgen" else self.continuation * options)
        peak = waiting_bytes(state, tokens) + block_bytes(state) + 8 * max(each.reader.numel for each in layers)
        return Cost(2.0 * tokens * work.weights, exact, 0, peak, numbers=tokens * work.numbers)

    @property
    def decides(self) -> bool:  # type: ignore[override]  # of its options, not of the class
        """Whether how much it keeps is only known by measuring."""
        return self.method == "fastgen"

    def run(self, state: State, ctx: Context) -> State:
        found, dtypes = heads(state), self._dtypes(state)
        asks = self.method == "fastgen" or set(self.rules) & set(MARKS)
        marks = marked(state.dense.folder, state.vocabulary) if asks else Marks((), ())
        records: list[Record] = []
        if self.method == "fastgen":
            policy, records = self._fastgen(state, ctx, found, marks)
        else:
            budget, whole = self._bytes(state, found), plain(found, self.context, state.dtype.itemsize)
            if self.method == "uniform":
                layers = self._uniform(found, dtypes[0], budget)
            else:
                options = core.options_of(self.rules, dtypes)
                layers, records = self._chosen(found, options, self._measured(state, ctx, found, options, marks), budget)
            policy = Policy(tuple(layers), marks.every, self.context, whole)
            policy = policy if policy.marks else replace(policy, marked=())
        told: list[Record] = [*records, _summary(policy)]
        for record in told:
            ctx.say(record)
        done = ctx.store.commit("policy", serving={SERVED: policy.json()}, records=told)
        return state.with_part(done)

    # --- the budget ---

    def _dtypes(self, state: State) -> tuple[str, ...]:
        return self.dtype or (NAMES[state.dtype],)

    def _bytes(self, state: State, found: Sequence[Heads]) -> int:
        return Budget.parse(self.budget or SHARED).bytes(1, plain(list(found), self.context, state.dtype.itemsize))

    def _bytes_of(self, found: Sequence[Heads], options: Sequence[Unit]) -> np.ndarray:
        """Bytes [units, options] at `context` tokens, of all units in order."""
        rows = [[o.nbytes(self.context, each.width, each.sliding) for o in options] for each in found for _ in range(each.units)]
        return np.array(rows, dtype=np.int64)

    def _uniform(self, found: Sequence[Heads], dtype: str, budget: int) -> list[Layer]:
        """All heads with one rule and the largest share that fits."""
        unit = Unit(self.rules[0], self._share(found, dtype, budget), dtype)
        return [_layer(each, [unit] * each.units) for each in found]

    def _share(self, found: Sequence[Heads], dtype: str, budget: int) -> int:
        """The largest share of the one rule that fits, in thousandths; RecipeError where none does."""
        low, high = 0, 1000
        while low < high:
            middle = (low + high + 1) // 2
            fits = int(self._bytes_of(found, [Unit(self.rules[0], middle, dtype)]).sum()) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        if not low:
            least = int(self._bytes_of(found, [Unit(self.rules[0], 1, dtype)]).sum())
            raise RecipeError(f"'kv_policy': no share of '{self.rules[0]}' fits {size(budget)} at {self.context:,} tokens; the "
                              f"smallest takes {size(least)}: raise the budget", ("budget",))  # fmt: skip
        return low

    # --- what is measured, and chosen ---

    def _measured(
        self, state: State, ctx: Context, found: Sequence[Heads], options: Sequence[Unit], marks: Marks
    ) -> list[np.ndarray]:
        """Damage [units, options] of every layer in order."""
        texts = [[o.rule, o.share, o.dtype] for o in options]
        store = ctx.store.analysis("cache", {"version": 1, "continuation": self.continuation, "options": texts})
        every = torch.tensor(marks.every, dtype=torch.int64)
        by_layer = seen_by_layer(state, ctx, store, found, lambda layer, tokens: _Meter(
            layer, state.weight(layer.reader), options, self.continuation, every, tokens))  # fmt: skip
        return [np.array(by_layer[each.layer]["damage"]) for each in found]

    def _by_prompt(self, found: Sequence[Heads], dtype: str) -> list[Layer]:
        """Layers whose heads all take their rule by the prompt."""
        return [_layer(each, [Unit(FASTGEN, 1000, dtype)] * each.units) for each in found]

    def _fastgen(self, state: State, ctx: Context, found: Sequence[Heads], marks: Marks) -> tuple[Policy, list[Record]]:
        """FastGen at the T asked for, or at the one that keeps calibration prompts within the budget in the mean."""
        assert ctx.calibration is not None, "`check` asks for calibration data"
        dtype, length = self._dtypes(state)[0], ctx.calibration.ids.shape[1]
        ladder, whole = Ladder(1.0, marks.special, (0, 0, 0)), plain(list(found), length, state.dtype.itemsize)
        policy = Policy(tuple(self._by_prompt(found, dtype)), marks.every, length, whole, ladder)
        store = ctx.store.analysis("ladder", {"version": 1, "frequent": SHARE, "local": SHARE})
        by_layer = seen_by_layer(state, ctx, store, found, lambda layer, tokens: Climb(layer, policy, ladder, tokens))
        climbed = Climbed.of(found, by_layer, dtype)
        recovery = self.recovery or (
            RECOVERY if self.budget is None else climbed.within(Budget.parse(self.budget).bytes(1, whole))
        )
        if recovery is None:
            least = climbed.prompts(1 / STEPS).mean()
            raise RecipeError(f"'kv_policy': FastGen keeps {least / whole:.1%} at least of a prompt of {length:,} tokens, in the "
                              f"mean over the calibration windows, and the budget is less: raise it", ("budget",))  # fmt: skip
        prompts, records, at = climbed.prompts(recovery), list[Record](), 0
        for each in found:
            told = climbed.told(recovery, slice(at, at + each.units))
            records.append({"site": f"layers.{each.layer}.attn", "notes": [told]})
            at += each.units
        measured = int(prompts.min()), round(prompts.mean()), int(prompts.max())
        return replace(policy, ladder=replace(ladder, recovery=recovery, prompts=measured)), records

    def _chosen(
        self, found: Sequence[Heads], options: Sequence[Unit], measured: Sequence[np.ndarray], budget: int
    ) -> tuple[list[Layer], list[Record]]:
        """The layers as the integer program has them, and what is to be said of each."""
        names = [f"layer {each.layer} head {u}" for each in found for u in range(each.units)]
        damage, nbytes = np.concatenate(measured), self._bytes_of(found, options)
        try:
            solution = core.choose(names, damage, nbytes, budget)
        except Infeasible as e:
            raise RecipeError(f"'kv_policy': {e}; raise the budget") from None
        layers, records, at = list[Layer](), list[Record](), 0
        for each in found:
            mine = solution.choice[at : at + each.units]
            units, cost = [options[i] for i in mine], float(sum(damage[at + u, i] for u, i in enumerate(mine)))
            layers.append(_layer(each, units))
            records.append({"site": f"layers.{each.layer}.attn", "damage": cost, "notes": [f"{_told(units)}; damage {cost:.2g}"]})
            at += each.units
        return layers, records


class _Meter:
    """Sees the attention of one block: damages summed over all windows."""

    def __init__(
        self, layer: Heads, weight: Tensor, options: Sequence[Unit], behind: int, marks: Tensor, tokens: Sequence[Tensor]
    ):
        self.layer, self.weight, self.options, self.behind = layer, weight, options, behind
        self.marked, self.whole = iter([torch.isin(ids, marks) for ids in tokens]), 0.0
        self.found = torch.zeros(layer.units, len(options), dtype=torch.float64)

    def __call__(self, a: Attended, out: Tensor) -> Tensor:
        assert a.layer == self.layer.layer, "attention counts layers as the graph does"
        with precision("ieee"):
            split = a.q.shape[2] - self.behind
            found, whole = core.damages(a, self.layer, self.weight, split, self.options, next(self.marked))
        self.found, self.whole = self.found + found, self.whole + whole
        return out

    def record(self) -> Record:
        return {"damage": (self.found / max(self.whole, 1e-30)).tolist()}


def _layer(each: Heads, units: Sequence[Unit]) -> Layer:
    return Layer(each.layer, each.width, each.sliding, tuple(units))


def _told(units: Sequence[Unit]) -> str:
    return ", ".join(u.rule + (f" {u.share / 10:g} %" if u.rule != "full" else "") + (" int8" if u.dtype == "int8" else "")
                     for u in units)  # fmt: skip


def _summary(policy: Policy) -> Record:
    took, by = policy.bytes, policy.ladder
    if by is None:
        told = f"{size(took)} at {policy.context:,} tokens, {took / policy.full:.1%} of {size(policy.full)}"
    else:
        least, _, most = (f"{n / policy.full:.1%}" for n in by.prompts)
        told = (f"{size(took)} in the mean over the calibration windows, prompts of {policy.context:,} tokens, "
                f"{took / policy.full:.1%} ({least} to {most}) of {size(policy.full)}; T {by.recovery:g}")  # fmt: skip
    return {"site": "cache", "bytes": took, "full": policy.full, "notes": [told]}
