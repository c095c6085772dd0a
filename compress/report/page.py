"""Tables and figures as text, Markdown and HTML: what every printed page is made of."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def span(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 2 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def brief(value: Any, most: int | None = None) -> str:
    """An option's value on one line, of at most so many characters."""
    text = str(value)
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(str, value))}]"
    return text if most is None or len(text) <= most else f"{text[:most]}…"


def columns(rows: Sequence[Row], head: Row | None = None, right: Sequence[int] = ()) -> str:
    """Rows as aligned text; columns whose index is in `right` are flush right."""
    table = [list(r) for r in ([head] if head else []) + list(rows)]
    if not table:
        return ""
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
             for r in table]  # fmt: skip
    if head:
        lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def pipes(rows: Sequence[Row], head: Row) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2e}"


def html_table(rows: Sequence[Row], head: Row) -> str:
    def line(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(r, "td") for r in rows) + "</table>"
