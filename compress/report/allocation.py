"""An allocation for people: which matrix gets what, what damage to expect, what other budgets buy; as text, SVG and YAML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import yaml

from compress.report.page import columns
from compress.state.graph import Graph
from compress.state.plan import BitPlan, Forecast, Latency, Point, per_step, size

UNIT = {"kl": "KL by gradients (nats per token)", "output": "relative error of outputs",
        "weight": "squared error of weights", "guess": "guessed damage, in no unit"}  # fmt: skip
WIDE, HIGH = 64, 12  # of the plot, in characters
SHOWN = 12  # points of the frontier in a table


def figure(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}"


def grid(plan: BitPlan, graph: Graph, own: str) -> str:
    """Layers down, roles across: formats (several where experts differ), and the damage that each layer adds."""
    roles = list(dict.fromkeys(s.role for s in graph.linear))
    damage = plan.forecast.damage if plan.forecast else {}
    shape = plan.forecast.structure if plan.forecast else {}
    rows = []
    for block in graph.blocks:
        sites = graph.of_block(block.index)
        cells = []
        for role in roles:
            texts = dict.fromkeys(str(plan.formats.get(s.name, own)) for s in sites if s.role == role)
            cells.append(", ".join(texts) if len(texts) < 3 else f"{len(texts)} formats")
        of_shape = sum(cost for name, cost in shape.items() if name.startswith(f"layers.{block.index}."))
        rows.append([str(block.index), *cells, figure(sum(damage.get(s.name, 0.0) for s in sites) + of_shape) if damage else ""])
    outside = [s for s in graph if s.block is None and s.name in plan.formats]
    text = columns(rows, ["layer", *roles, "damage"], right=(len(roles) + 1,))
    return text + "".join(f"\n{s.name}: {plan.formats[s.name]}" for s in outside)


def summary(f: Forecast) -> list[str]:
    """What is known of the choice itself, a line each."""
    best = f.trials[0].predicted if f.trials else f.total
    other = "" if math.isclose(best, f.total) else f"; the predicted optimum, which a trial passed over, has {figure(best)}"
    lines = [f"expected damage {figure(f.total)}, {UNIT[f.metric]}{other}; "
             f"no allocation is predicted to go below {figure(f.bound)} (gap {f.gap:.1%}, {f.method})"]  # fmt: skip
    for s in f.spent:
        saves = f"one KiB more would save about {figure(1024 * s.price)}" if s.price else "more would save nothing"
        lines.append(f"{s.name}: uses {s.used:,} of {s.allowed:,} bytes; {saves}")
    if f.latency:
        lines.append(pace(f.latency))
    for t in f.trials:
        what = "the optimum" if not t.differs else f"another, different in {t.differs} sites"
        taken = "  <- taken" if t.chosen else ""
        lines.append(f"tried {what}: predicted {figure(t.predicted)}, measured {figure(t.measured)}{taken}")
    return lines + [f"note: {note}" for note in f.notes]


def pace(t: Latency) -> str:
    """What is expected of the time that a token takes, beside that of the model as it is."""
    line = (f"latency: {1e3 * t.expected:.4g} ms {per_step(t.batch)} expected in matrices, "
            f"{1e3 * t.original:.4g} ms as the model is ({t.expected / t.original if t.original else 1.0:.1%})")  # fmt: skip
    if t.allowed is None:
        return line
    saves = f"one ms more would save about {figure(t.price)}" if t.price else "more would save nothing"
    return f"{line}; allowed {1e3 * t.allowed:.4g} ms, {saves}"


def frontier_table(f: Forecast) -> str:
    """Bits, bytes and damage at a dozen budgets."""
    step = max(1, math.ceil(len(f.frontier) / SHOWN))
    rows = [[f"{p.bits:.2f}", f"{p.bytes:,}", figure(p.damage)] for p in f.frontier[::step]]
    return columns(rows, ["bits", "bytes", "expected damage"], right=(0, 1, 2))


def logarithms(points: Sequence[Point]) -> list[float]:
    least = min((p.damage for p in points if p.damage > 0), default=1.0)
    return [math.log10(max(p.damage, least)) for p in points]


def plot(f: Forecast) -> str:
    """Damage (logarithmic) over bytes, in characters; ● is the choice."""
    points = [*f.frontier, Point(0.0, f.used, f.total)]
    xs, ys = [p.bytes for p in points], logarithms(points)
    left, low = min(xs), min(ys)
    wide, high = max(xs) - left or 1, max(ys) - low or 1.0
    canvas = [[" "] * WIDE for _ in range(HIGH)]
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        row, column = round((HIGH - 1) * (1 - (y - low) / high)), round((WIDE - 1) * (x - left) / wide)
        canvas[row][column] = "●" if i == len(points) - 1 else "·"
    labels = [f"{10 ** max(ys):.2g}", *[""] * (HIGH - 2), f"{10**low:.2g}"]
    lines = [f"{label:>8} │{''.join(row).rstrip()}" for label, row in zip(labels, canvas, strict=True)]
    return "\n".join([*lines, f"{'':8} └{'─' * WIDE}", f"{'':10}{size(left)}{size(max(xs)):>{WIDE - len(size(left))}}"])


def svg(f: Forecast) -> str:
    """The same as a picture: a line through the frontier, a dot for the choice, rings for what was measured."""
    points, w, h, pad = f.frontier, 640, 260, 46
    tried = [(Point(0.0, f.used, t.predicted), Point(0.0, f.used, t.measured)) for t in f.trials]
    ys = logarithms([*points, *(p for pair in tried for p in pair)])
    left, right, low, high = points[0].bytes, points[-1].bytes, min(ys), max(ys)

    def at(p: Point) -> str:
        x = pad + (w - 2 * pad) * (p.bytes - left) / ((right - left) or 1)
        y = pad + (h - 2 * pad) * (high - math.log10(max(p.damage, 10**low))) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    def dot(p: Point, style: str, text: str) -> str:
        x, _, y = at(p).partition(",")
        return f"<circle cx={x} cy={y} r=5 {style}><title>{html.escape(text)}</title></circle>"

    marks = [dot(measured, "class=ring", f"measured {figure(measured.damage)}") for _, measured in tried]
    marks += [dot(p, "class=point", f"{p.bits:.2f} bits: {figure(p.damage)}") for p in points]
    chosen = dot(Point(0.0, f.used, f.total), "class=chosen", f"the choice: {f.used:,} bytes, expected {figure(f.total)}")
    axis = (f"<text x={pad} y={h - 12}>{size(left)}, {points[0].bits:.2f} bits</text>"
            f"<text x={w - pad} y={h - 12} text-anchor=end>{size(right)}, {points[-1].bits:.2f} bits</text>"
            f"<text x=4 y={pad - 14}>{html.escape(UNIT[f.metric])}, logarithmic</text>"
            f"<text x=4 y={pad + 4}>{10**high:.2g}</text><text x=4 y={h - pad}>{10**low:.2g}</text>")  # fmt: skip
    line = f"<polyline points='{' '.join(at(p) for p in points)}'/>"
    return f"<svg class=frontier viewBox='0 0 {w} {h}' role=img>{axis}{line}{''.join(marks)}{chosen}</svg>"


def plan_yaml(plan: BitPlan) -> str:
    """The plan as a person may edit it; ``allocate: {plan: plan.yaml}`` takes it as it is."""
    head = ["# site: format. Edit a copy at will, then: allocate: {plan: COPY.yaml}"]
    if plan.forecast:
        head += [f"# {line}" for line in summary(plan.forecast)]
    known = {"table": plan.forecast.table} if plan.forecast and plan.forecast.table else {}
    sites = {n: str(f) for n, f in plan.formats.items()}
    return "\n".join(head) + "\n" + yaml.safe_dump({"sites": sites, **known}, sort_keys=False)
