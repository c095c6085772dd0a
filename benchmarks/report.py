"""The rows that quantize_vs_peers.py gathers and the markdown page it prints."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from scoring import Score


@dataclass(frozen=True)
class Row:
    """One tool's result at one width. `note` says why there is none; `low` and `high` are perplexities over the draws."""

    tool: str
    label: str
    bits: int
    symmetric: bool
    version: str = ""
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_mb: float | None = None
    imports_cpu_s: float | None = None
    score: Score | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """Tool and label, for a table's first column."""
        return f"{self.tool} {self.label}".strip()

    @property
    def whole_cpu_s(self) -> float | None:
        """CPU seconds of imports and quantization together."""
        return None if self.cpu_s is None or self.imports_cpu_s is None else self.cpu_s + self.imports_cpu_s

    @property
    def grid(self) -> str:
        """Bits and kind of grid, for a table's second column."""
        return "fp32" if self.bits == 32 else f"{self.bits} {'sym' if self.symmetric else 'asym'}"


def merge(rows: Sequence[Row]) -> Row:
    """Runs of one cell as one row: medians of times and memory, means of scores; the first failure if any failed."""
    failed = [row for row in rows if row.note]
    if failed:
        return failed[0]
    scores = [row.score for row in rows if row.score]
    means = Score(*(statistics.fmean(getattr(s, name) for s in scores) for name in ("perplexity", "kl", "top1")))
    seen = [s.perplexity for s in scores]
    middle = {name: statistics.median(getattr(row, name) for row in rows) for name in TIMED}
    return replace(rows[0], **middle, score=means, low=min(seen), high=max(seen))


TIMED = ("wall_s", "cpu_s", "imports_cpu_s", "peak_mb")


def document(sections: Iterable[tuple[str, list[Row]]], setting: str) -> str:
    """The whole page."""
    lines = [f"# Quantization against peers, {date.today()}", "", f"{machine()}; {setting}.", ""]
    for title, rows in sections:
        lines += [f"## {title}", "", *results(rows), "", *ratios(rows), ""]
    return "\n".join([*lines, *READING])


READING = [
    "Seconds are those of loading, calibrating and quantizing, measured inside each process after its imports; the third figure",
    "adds the CPU seconds of the imports. Ours include committing every block to disk; saving the final checkpoint is timed for",
    "nobody. Peak MB is the process's, imports and mapped files included. Perplexity and KL to the original are the judge's, on",
    "held-out text. A ratio below 1 is in our favour.",
]


def results(rows: list[Row]) -> list[str]:
    """The table of what was measured."""
    head = ["tool", "bits, grid", "perplexity", "KL", "top-1", "wall s", "CPU s", "with imports", "peak MB"]
    lines = [line(head), line(["---"] * 2 + ["---:"] * 7)]
    return lines + [line([row.name, row.grid, *cells(row)]) for row in rows]


def cells(row: Row) -> list[str]:
    """The figures of one row, or its note."""
    if row.note:
        return [row.note, *[""] * 6]
    score = row.score or Score(float("nan"), float("nan"), float("nan"))
    perplexity = figure(score.perplexity)
    if row.low and row.high and row.high > row.low:
        perplexity += f" ({figure(row.low)} to {figure(row.high)})"
    timed = [number(value, 1) for value in (row.wall_s, row.cpu_s, row.whole_cpu_s)]
    return [perplexity, f"{score.kl:.4f}", f"{score.top1:.3f}", *timed, number(row.peak_mb, 0)]


def ratios(rows: list[Row]) -> list[str]:
    """Ours divided by each peer's at the same bits and symmetry."""
    ours = [row for row in rows if row.tool == "ours" and not row.note]
    peers = [row for row in rows if row.tool not in ("ours", "original") and not row.note]
    pairs = [(o, p) for o in ours for p in peers if (o.bits, o.symmetric) == (p.bits, p.symmetric)]
    if not pairs:
        return ["No ratio: ours or every peer is missing."]
    head = ["ours / peer", "grid", "perplexity", "KL", "wall", "CPU", "peak"]
    lines = [line(head), line(["---"] * 2 + ["---:"] * 5)]
    return lines + [line([f"{o.label} / {p.name}", o.grid, *(f"{ratio:.2f}" for ratio in quotients(o, p))]) for o, p in pairs]


def quotients(ours: Row, peer: Row) -> list[float]:
    """Perplexity, KL, wall, CPU and peak of ours, each divided by the peer's."""
    return [a / b for a, b in zip(figures(ours), figures(peer), strict=True)]


def figures(row: Row) -> list[float]:
    """What a ratio is taken of; only for rows without a note."""
    assert row.score, "a row without a note was scored"
    return [row.score.perplexity, row.score.kl, row.wall_s or 0.0, row.cpu_s or 0.0, row.peak_mb or 0.0]


def machine() -> str:
    """The processor, its cores, Python and torch, in words."""
    import torch

    try:
        models = [x for x in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if x.startswith("model name")]
    except OSError:
        models = []
    name = models[0].split(":")[1].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def publish(page: str, save: Path | None, name: str) -> None:
    """Print a page, and write it as DATE-NAME.md into the folder that `--save` names, where it does."""
    print(page)
    if save:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{date.today()}-{name}.md").write_text(page.rstrip("\n") + "\n", "utf-8")


def line(values: Iterable[str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(values) + " |"


def head(*names: str) -> list[str]:
    """The two lines that open a table; its first column holds words, the others figures."""
    return [line(names), line(["---", *["---:"] * (len(names) - 1)])]


def figure(perplexity: float) -> str:
    """Three decimals below ten, else one."""
    return f"{perplexity:.3f}" if perplexity < 10 else f"{perplexity:.1f}"


def number(value: float | None, digits: int) -> str:
    """The number with `digits` decimals, or nothing."""
    return "" if value is None else f"{value:.{digits}f}"
