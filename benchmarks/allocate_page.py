"""The rows that allocate_vs_peers.py gathers, and the page that it prints of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from allocate_child import VARIANTS
from report import figure, head, line, machine, number

ROWS = ("ours", "uniform", "autoround", "modelopt")
SLACK = 0.02  # bits that our format spends on a matrix's shape, at most; peers' bits do not count it, and a format may fail by it


@dataclass(frozen=True)
class Row:
    """One result.

    budget: None for a uniform format. bits: what it really takes. predicted: the damage that ours foresaw.
    bytes: of the tensors of these layers in the files that the tool writes; None where nobody looked, or it writes none.
    """

    model: str
    tool: str
    label: str
    budget: float | None
    bits: float = 0.0
    bytes: int | None = None
    kl: float = 0.0
    perplexity: float = 0.0
    cpu_s: float | None = None
    wall_s: float | None = None
    peak_mb: float | None = None
    predicted: float | None = None
    note: str = ""
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its file."""
        budget = f"-{self.budget}" if self.budget else ""
        return f"{self.model}-{self.tool}-{self.label}{budget}".replace(":", "_").replace(" ", "-")


READING = """
KL is KL(original || quantized) in nats a token, perplexity exp of the mean loss, both of plain transformers in fp32 on held-out
text, each tool's dequantized weights put in. Bits are the average over the linear layers of the blocks, 16-bit scales and zero
points counted; bytes are those of these layers' tensors in the files that the tool writes. CPU seconds are those of loading,
measuring, allocating and quantizing; of ours the first budget pays for the others. `predicted` is in its metric's own units.
A ratio below 1 is in our favour. Models are small: a few per cent are noise.
""".strip()


def document(work: Path, cases: Iterable[str], threads: int) -> tuple[str, dict[str, Any]]:
    """The whole page, of all that the work folder holds of these cases, and its figures."""
    rows = [Row(**json.loads(file.read_text("utf-8"))) for file in sorted(work.glob("*.row.json"))]
    lines = [f"# Allocation against peers, {date.today()}", "", f"{machine()}; {threads} thread(s).", ""]
    raw: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
    for name in cases:
        mine = [row for row in rows if row.model == name]
        if mine:
            original = json.loads((work / f"{name}.original.json").read_text("utf-8"))
            lines += [f"## {name}, perplexity {figure(original['perplexity'])}", "", *results(mine), "", *ratios(mine), ""]
        if (file := work / f"{name}.singles.json").exists():
            raw[f"{name} singles"] = found = json.loads(file.read_text("utf-8"))
            lines += [f"## {name}, {len(found)} single replacements: rank correlation of predicted and measured damage", ""]
            lines += [*rank_table(found), ""]
    return "\n".join([*lines, READING]), raw


def results(rows: list[Row]) -> list[str]:
    """The table of what was measured, uniform formats first."""
    lines = head("row", "budget", "bits", "bytes on disk", "KL", "perplexity", "predicted", "CPU s")
    for row in sorted(rows, key=lambda r: (r.budget or 0.0, r.bits if r.budget is None else 0.0, ROWS.index(r.tool), r.label)):
        figures = [f"{row.bits:.3f}", f"{row.bytes:,}" if row.bytes else "", f"{row.kl:.4f}", figure(row.perplexity)]
        figures += [number(row.predicted, 4), number(row.cpu_s, 0)]
        lines.append(line([f"{row.tool} {row.label}", number(row.budget, 1), *([row.note, *[""] * 5] if row.note else figures)]))
    return lines


def ratios(rows: list[Row]) -> list[str]:
    """KL of each row of ours divided by that of the best uniform format within the budget and by each peer's."""
    done = [row for row in rows if not row.note]
    columns = sorted({f"{row.tool} {row.label}" for row in done if row.tool in VARIANTS})
    lines = head("KL of ours", "budget", "/ best uniform", f"with {SLACK} bits more", *(f"/ {c}" for c in columns))
    for row in sorted((r for r in done if r.tool == "ours"), key=lambda r: (r.budget or 0.0, r.label)):
        theirs = {f"{r.tool} {r.label}": r.kl for r in done if r.budget == row.budget}
        uniform = [best_uniform(done, (row.budget or 0.0) + slack) for slack in (0.0, SLACK)]
        cells = [f"{row.kl / best.kl:.2f} ({best.label})" if best else "" for best in uniform]
        cells += [f"{row.kl / theirs[c]:.2f}" if c in theirs else "" for c in columns]
        lines.append(line([row.label, number(row.budget, 1), *cells]))
    return lines


def best_uniform(rows: Iterable[Row], budget: float) -> Row | None:
    """The uniform row with the least KL among those whose true bits keep to the budget."""
    return min((r for r in rows if r.tool == "uniform" and r.bits <= budget + 1e-9), key=lambda r: r.kl, default=None)


def rank_table(found: list[dict[str, Any]]) -> list[str]:
    """Spearman's rank correlation of each metric's predictions with the measured KL, over all formats and for each alone."""
    from scipy.stats import spearmanr

    formats = dict.fromkeys(s["format"] for s in found)
    parts = {"all": found} | {fmt: [s for s in found if s["format"] == fmt] for fmt in formats}
    lines = head("metric", *parts)
    for metric in found[0]["predicted"]:
        pairs = [([s["predicted"][metric] for s in part], [s["kl"] for s in part]) for part in parts.values()]
        lines.append(line([metric, *(f"{spearmanr(*pair).statistic:.3f}" for pair in pairs)]))
    return lines
