"""An allocation and what it is worth: its forecast, the frontier around it, and what comes of trying it and its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from compress.formats import Dense, Format, LowRank
from compress.manager import Context
from compress.model.data import Tokens
from compress.model.head import Streamed, both
from compress.passes import allocate_core as core
from compress.passes import gptq_core
from compress.passes.choices import Resource, Space
from compress.passes.latency import Timed
from compress.passes.lqlora import LqLora
from compress.passes.quantize import Quantize
from compress.passes.solver import Case
from compress.state import Fact, State
from compress.state.graph import Site
from compress.state.plan import BitPlan, Forecast, Latency, Point, Spent, Trial

Damage = Callable[[Site, Format], float]
STEPS = 24  # points of the frontier


@dataclass(frozen=True)
class Chain:
    """The passes that will quantize, seen as one: the first takes plain formats, `lqlora` those with a correction."""

    passes: tuple[Quantize, ...]

    @property
    def damp(self) -> float | None:
        return self.passes[0].damp

    @property
    def order(self) -> str:
        return self.passes[0].order

    @property
    def drift(self) -> float:
        return 0.0

    def target(self, fmt: Format) -> Format:
        """A table is made of what is planned."""
        return fmt

    def solve(self, *args: Any) -> Any:
        """Not asked: a table is made of trials."""
        raise NotImplementedError

    def tries(
        self, W_nk: Tensor, factor: gptq_core.Factor | None, formats: Sequence[Format], case: Case
    ) -> Iterator[tuple[Format, Tensor]]:
        """What each format would make of W [N, K], fp32, as it is deployed."""
        plain = [f for f in formats if not isinstance(f, LowRank)]
        yield from self.passes[0].tries(W_nk, factor, plain, case)
        ranked = [f for f in formats if isinstance(f, LowRank)]
        if ranked:
            last = next(p for p in self.passes if isinstance(p, LqLora))
            yield from last.tries(W_nk, factor, ranked, case)


@dataclass(frozen=True)
class Solved:
    """An allocation, with all that is needed to say what it is worth and to try another."""

    metric: str
    state: State
    space: Space
    limits: list[Resource]
    damage: Damage
    problem: core.Problem
    solution: core.Solution
    table: str = ""
    results: tuple[Trial, ...] = ()
    weights: int = 0  # that bits are averaged over, where the model had more of them than it has
    timed: Timed | None = None  # what it is expected to take in time; one of the limits, where that is limited

    def formats(self, choice: Sequence[int]) -> dict[str, Format]:
        return self.space.plan(choice, Dense(self.state.dtype))

    def plan(self, measured: bool = True) -> BitPlan:
        """The plan with its forecast."""
        formats, s = self.formats(self.solution.choice), self.solution
        chosen = {site.name: f for g, i in zip(self.space.groups, s.choice, strict=True)
                  for site, f in zip(g.sites, g.options[i], strict=True)}  # fmt: skip
        damages = {name: self.damage(self.state.graph[name], f) for name, f in chosen.items()}
        spent = (Spent(r.name, used + r.fixed, r.allowed + r.fixed, price)
                 for r, used, price in zip(self.limits, s.used, s.price, strict=True) if r is not self.timed)  # fmt: skip
        forecast = Forecast(
            metric=self.metric if measured else "guess", spent=tuple(spent), damage=damages, total=sum(damages.values()),
            bound=s.bound, gap=s.gap, method=s.method, frontier=self.frontier() if measured else (), trials=self.results,
            measured=measured, notes=self.space.notes, table=self.table, latency=self.latency(chosen),
        )  # fmt: skip
        ordered = {site.name: formats[site.name] for site in self.state.graph if site.name in formats}
        return BitPlan(ordered, forecast)

    def latency(self, formats: Mapping[str, Format]) -> Latency | None:
        """What these formats are expected to take in time, where a table of it is known."""
        if self.timed is None:
            return None
        price = sum(p for r, p in zip(self.limits, self.solution.price, strict=True) if r is self.timed)
        pairs = [(self.state.graph[name], fmt) for name, fmt in formats.items()]
        return self.timed.expected(pairs, any(r is self.timed for r in self.limits), price)

    def frontier(self) -> tuple[Point, ...]:
        """The damage to expect at other budgets, from the least that is possible to the most that can be used."""
        return tuple({p.bytes: p for p in self.at(steps(*self.reach()))}.values())

    def reach(self) -> tuple[int, int]:
        """The least and the most bytes of the main budget that a choice uses."""
        uses, fixed = [item.use[0] for item in self.problem.items], self.limits[0].fixed
        return sum(int(u.min()) for u in uses) + fixed, sum(int(u.max()) for u in uses) + fixed

    def at(self, budgets: Sequence[int]) -> Iterator[Point]:
        """What to expect at those of these budgets, in bytes, that can be kept."""
        fixed = self.limits[0].fixed
        for p in core.frontier(self.problem, [budget - fixed for budget in budgets]):
            yield Point(self.bits(p.choice), p.used + fixed, p.damage)

    def bits(self, choice: Sequence[int]) -> float:
        """Average stored bits of the matrices inside blocks."""
        linear = self.state.graph.linear
        found = BitPlan(self.formats(choice)).bits(linear, self.state.dtype.itemsize)
        return found * sum(s.numel for s in linear) / self.weights if self.weights else found

    # --- trying for real ---

    def tried(self, trials: int, others: Sequence[core.Choice], chain: Chain, ctx: Context, sample: Sequence[Tensor]) -> Solved:
        """The same with the best of `trials` allocations in place of the optimum: each is quantized and its KL measured.

        The optimum comes first, then the `others`, then neighbours of the best so far. A difference within its own standard error
        changes nothing.
        """
        parts = iter(ctx.part(i / trials, (i + 1) / trials) for i in range(trials))
        best, least = self.solution, self._measured(self.solution, chain, next(parts), sample)
        seen = {best.choice: least}
        while len(seen) < trials:
            near = core.neighbours(self.problem, best, len(seen) + 1)
            fresh = [c for c in (*others, *near) if c not in seen]
            if not fresh:
                break
            other = replace(self.solution, choice=fresh[0], **self._totals(fresh[0]))
            seen[other.choice] = self._measured(other, chain, next(parts), sample)
            if surely_less(seen[other.choice], least):
                best, least = other, seen[other.choice]
        results = tuple(Trial(self._totals(c)["damage"], fmean(kl), self._differs(c), c == best.choice) for c, kl in seen.items())
        return replace(self, solution=best, results=results)

    def _totals(self, choice: core.Choice) -> dict[str, Any]:
        pairs = list(zip(self.problem.items, choice, strict=True))
        used = tuple(sum(int(item.use[c][i]) for item, i in pairs) for c in range(len(self.limits)))
        return {"damage": sum(float(item.damage[i]) for item, i in pairs), "used": used}

    def _differs(self, choice: core.Choice) -> int:
        ours, theirs = self.formats(self.solution.choice), self.formats(choice)
        return sum(ours.get(n) != theirs.get(n) for n in {**ours, **theirs})

    def _measured(self, solution: core.Solution, chain: Chain, ctx: Context, sample: Sequence[Tensor]) -> list[float]:
        formats = self.formats(solution.choice)
        texts = {n: str(f) for n, f in formats.items()}
        store = ctx.store.analysis("trial", [texts, [(p.version, p.text()) for p in chain.passes], windows(sample)])
        if store.committed("kl") is not None:
            return list(store.records[-1]["kl"])
        ctx.progress(0, 1, "trying an allocation")
        planned = replace(self.state, plan=BitPlan(formats), facts=self.state.facts | Fact.PLANNED)
        work = [store.analysis(p.name, i) for i, p in enumerate(chain.passes)]
        for p, kept in zip(chain.passes, work, strict=True):
            planned = p.run(planned, replace(ctx, store=kept, say=lambda record: None))
        kl = divergence(self.state, planned, ctx, sample)
        store.commit("kl", records=[{"site": "", "kl": kl}])
        for kept in work:
            kept.drop()
        return kl


def steps(least: int, most: int) -> list[int]:
    """Budgets from the one to the other."""
    return [least + (most - least) * i // STEPS for i in range(STEPS + 1)]


def divergence(original: State, changed: State, ctx: Context, sample: Sequence[Tensor]) -> list[float]:
    """KL (nats per token) of a changed model's predictions from the original's, window by window, both streamed."""
    p, q = (Streamed.of(state, sample, ctx.device, causal=False) for state in (original, changed))
    with torch.no_grad():
        found = both(p, q)
    kl, windows = torch.cat([compared.kl for compared in found]), sum(len(batch) for batch in sample)
    means: list[float] = kl.view(windows, -1).mean(-1).tolist()
    return means


def windows(sample: Sequence[Tensor]) -> int:
    """How many windows there are in batches of them."""
    return sum(len(batch) for batch in sample)


def surely_less(these: Sequence[float], those: Sequence[float]) -> bool:
    """Whether one allocation's KL lies below another's by more than the standard error of the difference, window by window."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return fmean(differences) < -error


def split(calibration: Tokens | None, probe: int) -> tuple[Tokens | None, Tokens | None]:
    """(windows to measure gradients and KL on, the rest to calibrate on): about `probe` tokens, at most a quarter of the
    windows; a single window is both."""
    if calibration is None:
        return None, None
    n, length = calibration.ids.shape
    held = max(1, min(n // 4, probe // length))
    rest = calibration.ids[: n - held] if n > 1 else calibration.ids
    return replace(calibration, ids=calibration.ids[n - held :]), replace(calibration, ids=rest)
