"""How a training went: its loss and what was held out, a line for each check, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.page import columns

WIDE, HIGH, EDGE = 560, 160, 40


@dataclass(frozen=True)
class Learning:
    """name: of the step. by: what is held out is judged by. points: (step, tokens, loss or None, held out) of every check."""

    name: str
    by: str
    points: Sequence[tuple[int, int, float | None, float]]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> list[Learning]:
        """Every training that records tell of."""
        return [cls(r["site"], r["judged_by"], [tuple(p) for p in r["curve"]]) for r in records if "curve" in r]

    @property
    def best(self) -> int:
        """The number of the point that is kept."""
        return min(range(len(self.points)), key=lambda i: (self.points[i][3], i))

    def text(self) -> str:
        rows = [[f"{step:,}", f"{tokens:,}", "" if loss is None else f"{loss:.5f}", f"{held:.5f}", "kept" * (i == self.best)]
                for i, (step, tokens, loss, held) in enumerate(self.points)]  # fmt: skip
        return columns(rows, ["step", "tokens", "loss", f"held out, {self.by}", ""], right=range(4))

    def svg(self) -> str:
        """Both curves over steps; the point that is kept is marked."""
        top = max(held for *_, held in self.points)
        top = max([top, *(loss for _, _, loss, _ in self.points if loss is not None)]) or 1.0
        last = max(1, self.points[-1][0])

        def at(step: int, value: float) -> tuple[float, float]:
            return EDGE + step / last * (WIDE - EDGE - 8), 8 + (1 - max(0.0, value) / top) * (HIGH - 30)

        held = [at(step, h) for step, _, _, h in self.points]
        loss = [at(step, v) for step, _, v, _ in self.points if v is not None]

        def line(name: str, points: Sequence[tuple[float, float]]) -> str:
            return f"<polyline class={name} points='{' '.join(f'{x:.1f},{y:.1f}' for x, y in points)}' />"

        x, y = held[self.best]
        marks = "".join(f"<circle class=check cx={a:.1f} cy={b:.1f} r=2.5><title>step {p[0]:,}: {p[3]:.5f}</title></circle>"
                        for (a, b), p in zip(held, self.points, strict=True))  # fmt: skip
        words = (f"<text x=0 y=14>{top:.3g}</text><text x=0 y={HIGH - 18}>0</text>"
                 f"<text x={EDGE} y={HIGH - 4}>held out, {self.by} (dots); training loss (thin)</text>")  # fmt: skip
        return (f"<svg class=learning viewBox='0 0 {WIDE} {HIGH}' role=img>{line('loss', loss)}{line('held', held)}{marks}"
                f"<circle class=kept cx={x:.1f} cy={y:.1f} r=5><title>kept</title></circle>{words}</svg>")  # fmt: skip
