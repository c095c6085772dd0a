"""The tables that plan, inspect, the report and the model card share, and the report itself as Markdown and as one HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from compress import cached
from compress.evaluate import Sizes, sizes
from compress.model.model import Model
from compress.recipe import Recipe
from compress.report import allocation
from compress.report.experts import starved
from compress.report.learning import Learning
from compress.report.page import Row, columns, html_table, number, pipes, span
from compress.report.shapes import Survivors
from compress.state import State
from compress.state.checkpoint import Layout
from compress.state.graph import Graph
from compress.state.plan import Forecast, size


def site_line(record: Mapping[str, Any]) -> str:
    """What became of one site, in one line."""
    if "format" not in record:
        return f"{record.get('site', '?'):<24} {'; '.join(record.get('notes', ()))}"
    text = f"{record['site']:<24} {record['format']:<14}"
    if record.get("error") is not None and "rounding" in record:
        text += f" error {record['error']:.2e}"
        if record["rounding"] is not None:
            ratio = record["error"] / record["rounding"] if record["rounding"] else 1.0
            text += f"  rounding {record['rounding']:.2e} ({ratio:4.0%})"
        damp = record["damping"]
        text += f"  damp {damp:.3g}" if damp is not None else "  damp -"
        text += f"  {record['seconds']:.2f} s"
    return text + "".join(f"  [{n}]" for n in record.get("notes", ()))


def encoded(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those records that tell of a site's format; others tell of what a pass did to dense tensors."""
    return [r for r in records if "format" in r]


def site_table(state: State, records: Sequence[Mapping[str, Any]]) -> tuple[list[Row], Row]:
    """One row per encoded site: format, bits, bytes, error, error of rounding."""
    rows: list[Row] = []
    for r in encoded(records):
        site = state.graph[r["site"]]
        rows.append([r["site"], r["format"], f"{8 * r['bytes'] / site.numel:.3f}", f"{r['bytes']:,}",
                     number(r.get("error")), number(r.get("rounding")), "; ".join(r.get("notes", ()))])  # fmt: skip
    return rows, ["site", "format", "bits", "bytes", "error", "rounding's", "notes"]


def score_rows(scores: Mapping[str, Any], before: Sizes, after: Sizes) -> list[Row]:
    """Before and after, one row a figure."""
    rows: list[Row] = [["weights on disk", size(before.tensor_bytes), size(after.tensor_bytes)],
                       ["bits per weight, linear layers", f"{before.linear_bits:.3f}", f"{after.linear_bits:.3f}"],
                       ["bits per weight, whole file", f"{before.file_bits:.3f}", f"{after.file_bits:.3f}"]]  # fmt: skip
    if not scores:
        return rows
    a, b = scores["original"], scores["compressed"]
    if a["perplexity"] is not None:
        rows.append([f"perplexity, context {a['length']}", f"{a['perplexity']:.4f}", f"{b['perplexity']:.4f}"])
    rows.append(["KL from the original (nats)", "0", f"{b['kl']:.5f}"])
    rows.append(["same top token as the original", "100 %", f"{b['agreement']:.2%}".replace("%", " %")])
    return rows + [[what, "-", figure] for what, figure in (cached.rows(scores["cache"]) if "cache" in scores else [])]


def source_rows(scores: Mapping[str, Any]) -> tuple[list[Row], Row]:
    """The figures on each source of the evaluation text, and what they are; no rows where there is one source alone."""
    after = scores["compressed"].get("sources", []) if scores else []
    before = scores["original"]["sources"] if after and "original" in scores else []
    rows: list[Row] = []
    for i, score in enumerate(after):
        perplexities = [shown(s["perplexity"], ".4f") for s in (*before[i : i + 1], score)]
        rows.append([score["source"], f"{score['tokens']:,}", *perplexities, shown(score["kl"], ".5f"),
                     shown(score["agreement"], ".2%").replace("%", " %")])  # fmt: skip
    perplexity = ["original's perplexity", "perplexity"] if before else ["perplexity"]
    return rows, ["source", "tokens", *perplexity, "KL (nats)", "same top token"]


def shown(figure: float | None, form: str) -> str:
    return "-" if figure is None else f"{figure:{form}}"


def recipe_text(recipe: Recipe) -> str:
    """The recipe with its defaults, without the folder it was written to: the same for the same artifact."""
    full = yaml.safe_load(recipe.resolved())
    full.pop("out", None)
    text: str = yaml.safe_dump(full, sort_keys=False, allow_unicode=True)
    return text


@dataclass(frozen=True)
class Report:
    """Everything that the report shows."""

    title: str
    recipe: str
    state: State
    records: list[dict[str, Any]]
    scores: dict[str, Any]
    before: Sizes
    after: Sizes
    steps: list[dict[str, Any]]
    artifacts: list[dict[str, str]]
    warnings: list[str]
    survivors: Survivors | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: Model,
        state: State,
        records: list[dict[str, Any]],
        scores: dict[str, Any],
        steps: Sequence[Mapping[str, Any]],
        made: Mapping[str, Any],
        tensor_bytes: int,
    ) -> Report:
        artifacts = [{"name": name, "path": str(path), "proof": proof_line(proof)} for name, (path, proof) in made.items()]
        original = Layout.of(model.specs).tensor_bytes
        return cls(model.name, recipe.resolved(), state, records, scores, sizes(model.state, original),
                   sizes(state, tensor_bytes), [dict(s) for s in steps], artifacts,
                   [*model.source_remarks, *starved(state.graph, records, recipe.document.data.calibration)],
                   Survivors.of(model.state, state))  # fmt: skip

    @property
    def measured(self) -> str:
        kept = self.state.vocabulary
        among = f", among the {len(kept):,} tokens that were kept" if kept else ""
        return f"Measured on {self.scores['compressed']['tokens']:,} tokens of {self.scores['text']}{among}."

    @property
    def step_rows(self) -> list[Row]:
        return [[s["name"], span(s["seconds"]), size(s["peak_bytes"])] for s in self.steps]

    def summary(self) -> str:
        """One screen."""
        text = columns(score_rows(self.scores, self.before, self.after), ["", "original", "compressed"], right=(1, 2))
        rows, head = source_rows(self.scores)
        if rows:
            text += f"\n\n{columns(rows, head, right=range(1, len(head)))}"
        if self.scores:
            text += f"\n\n{self.measured}"
        text += "".join(f"\n{a['name']}: {a['path']}\n  {a['proof']}" for a in self.artifacts)
        return text + "".join(f"\nwarning: {line}" for line in self.warnings)

    @property
    def allocation(self) -> list[str]:
        """What was expected and tried, where formats were allocated, and what came of it."""
        forecast = self.state.plan.forecast if self.state.plan else None
        if forecast is None:
            return []
        came = [f"measured on the evaluation text: KL {self.scores['compressed']['kl']:.5f}"] if self.scores else []
        return [*allocation.summary(forecast), *came]

    def markdown(self) -> str:
        rows, head = site_table(self.state, self.records)
        parts = [f"# {self.title}, compressed",
                 pipes(score_rows(self.scores, self.before, self.after), ["", "original", "compressed"]),
                 *(f"**Warning:** {line}." for line in self.warnings),
                 "Errors are relative: tr(ΔHΔᵀ) / tr(WHWᵀ), H the Hessian of the inputs, or 1 where none were seen.",
                 pipes(rows, head), *self._others(), "## Steps", pipes(self.step_rows, ["step", "time", "peak memory"]),
                 "## Artifacts", *[f"- `{a['path']}`: {a['proof']}" for a in self.artifacts],
                 "## Recipe", f"```yaml\n{self.recipe}```"]  # fmt: skip
        if self.scores:
            by_source, head = source_rows(self.scores)
            parts[2:2] = [self.measured, *([pipes(by_source, head)] if by_source else [])]
        if self.allocation:
            at = parts.index("## Steps")
            parts[at:at] = ["## Allocation", "\n".join(f"- {line}" for line in self.allocation),
                            f"```\n{allocation.frontier_table(self.forecast)}\n```"]  # fmt: skip
        if self.survivors:
            at = parts.index("## Steps")
            parts[at:at] = ["## What is left of each layer", f"```\n{self.survivors.text()}\n```"]
        if self.trainings:
            at = parts.index("## Steps")
            parts[at:at] = ["## Training", *(f"{t.name}\n\n```\n{t.text()}\n```" for t in self.trainings)]
        return "\n\n".join(parts) + "\n"

    @property
    def trainings(self) -> list[Learning]:
        return Learning.of(self.records)

    def _others(self) -> list[str]:
        """What passes did to dense tensors, where they told of it."""
        told = [f"- {r['site']}: {'; '.join(r.get('notes', ()))}" for r in self.records if "format" not in r]
        return ["## Dense tensors", "\n".join(told)] if told else []

    @property
    def forecast(self) -> Forecast:
        assert self.state.plan is not None
        assert self.state.plan.forecast is not None
        return self.state.plan.forecast

    def _allocated(self) -> list[str]:
        if not self.allocation:
            return []
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.allocation)
        return ["<h2>Allocation</h2>", f"<ul>{lines}</ul>", allocation.svg(self.forecast)]

    def html(self) -> str:
        """One self-contained page: the figures, heat maps of bits and error over layers, steps, sites, recipe."""
        rows, head = site_table(self.state, self.records)
        bits = {r["site"]: 8 * r["bytes"] / self.state.graph[r["site"]].numel for r in encoded(self.records)}
        known = self.state.graph.sites  # of layers that were taken away later nothing is shown
        errors = {r["site"]: r["error"] for r in self.records if r.get("error") is not None and r["site"] in known}
        body = [f"<h1>{html.escape(self.title)}, compressed</h1>",
                html_table(score_rows(self.scores, self.before, self.after), ["", "original", "compressed"]),
                *([f"<p>{html.escape(self.measured)}</p>"] if self.scores else []),
                *([html_table(*source_rows(self.scores))] if source_rows(self.scores)[0] else []),
                *(f"<p><strong>Warning:</strong> {html.escape(line)}.</p>" for line in self.warnings),
                *self._allocated(),
                *(["<h2>What is left of each layer</h2>", self.survivors.svg()] if self.survivors else []),
                *(["<h2>Training</h2>", *(t.svg() for t in self.trainings)] if self.trainings else []),
                "<h2>Bits per weight</h2>", heat_map(self.state.graph, bits, "{:.2f}"),
                "<h2>Error of each matrix, relative, weighted by its inputs</h2>",
                heat_map(self.state.graph, errors, "{:.1e}", logarithmic=True),
                "<h2>Steps</h2>", html_table(self.step_rows, ["step", "time", "peak memory"]),
                "<h2>Artifacts</h2>",
                "".join(f"<p><code>{html.escape(a['path'])}</code><br>{html.escape(a['proof'])}</p>" for a in self.artifacts),
                "<details><summary>Every site</summary>", html_table(rows, head), "</details>",
                f"<details><summary>Recipe</summary><pre>{html.escape(self.recipe)}</pre></details>"]  # fmt: skip
        return PAGE.replace("{title}", html.escape(self.title)).replace("{body}", "\n".join(body))


def proof_line(proof: Any) -> str:
    text = f"loaded again with {proof.engine}: largest difference of a logit {proof.difference:.2g}"
    text += f", {proof.greedy} greedy tokens the same" if proof.greedy else ""
    return f"{text} ({proof.remark})" if proof.remark else text


def heat_map(graph: Graph, values: Mapping[str, float], form: str, logarithmic: bool = False) -> str:
    """Layers across, roles down, one coloured cell a site (the mean over experts); a legend says the range."""
    cells: dict[tuple[str, int], list[float]] = {}
    for name, value in values.items():
        site = graph[name]
        if site.block is not None:
            cells.setdefault((site.role, site.block), []).append(value)
    if not cells:
        return "<p>nothing to show</p>"
    means = {k: sum(v) / len(v) for k, v in cells.items()}
    scale = {k: math.log10(max(v, 1e-12)) if logarithmic else v for k, v in means.items()}
    low, high = min(scale.values()), max(scale.values())
    roles = list(dict.fromkeys(graph[n].role for n in values if graph[n].block is not None))
    out = ["<div class=scroll><table class=heat><tr><th></th>", *(f"<th>{b.index}</th>" for b in graph.blocks), "</tr>"]
    for role in roles:
        out.append(f"<tr><th>{role}</th>")
        for b in graph.blocks:
            if (role, b.index) not in means:
                out.append("<td class=none title='as it is'></td>")
                continue
            share = (scale[role, b.index] - low) / (high - low) if high > low else 0.0
            shown = form.format(means[role, b.index])
            out.append(f"<td style='--s:{share:.3f}' title='layers.{b.index} {role}: {shown}'>{shown}</td>")
        out.append("</tr>")
    return "".join(out) + "</table></div>"


def card_writer(
    recipe: Recipe, model: Model, state: State, records: Sequence[Mapping[str, Any]], scores: Mapping[str, Any], tensor_bytes: int
) -> Callable[[Mapping[str, Any]], str]:
    """A function from what the exporter adds to the text of the model card: the same bytes for the same run.

    The exporter adds `library` and `tag` for the hub, `loads in`, and `use`: Markdown that says how to load it.
    """

    def card(extra: Mapping[str, Any]) -> str:
        before = sizes(model.state, Layout.of(model.specs).tensor_bytes)
        after = sizes(state, tensor_bytes)
        rows, head = site_table(state, records)
        formats = sorted({r["format"] for r in encoded(records)})
        name = model.folder.name if model.revision is None else model.name
        parts = [f"---\nlibrary_name: {extra['library']}\ntags:\n- {extra['tag']}\n- quantized\n---",
                 f"# {name}, quantized", f"Made from `{name}` with compress. Formats: {', '.join(formats) or 'none'}.",
                 pipes(score_rows(scores, before, after), ["", "original", "this"]),
                 *(f"{remark}." for remark in model.source_remarks),
                 *([f"Perplexity and KL on {scores['compressed']['tokens']:,} tokens, windows of "
                    f"{scores['compressed']['length']}."] if scores else []),
                 *([pipes(*source_rows(scores))] if source_rows(scores)[0] else []),
                 "## Use", f"Loads in: {extra['loads in']}.", extra["use"],
                 "## Damage, matrix by matrix",
                 "Errors are relative and weighted by the inputs' Hessian, tr(ΔHΔᵀ) / tr(WHWᵀ), beside those of plain rounding.",
                 pipes(rows, head), "## Recipe", f"```yaml\n{recipe_text(recipe)}```"]  # fmt: skip
        return "\n\n".join(parts) + "\n"

    return card


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{title}, compressed</title><style>
:root{color-scheme:light dark;--ink:#1d2330;--paper:#fff;--line:#d8dce4;--cold:#e8f1fb;--hot:#d9622b}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ee;--paper:#14171d;--line:#333a47;--cold:#1e3148;--hot:#d0602f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:left}td+td{text-align:right}
.scroll{overflow-x:auto}.heat td,.heat th{padding:.2rem .35rem;text-align:center;font-size:.75rem;border:1px solid var(--paper)}
.heat td{background:color-mix(in oklab,var(--hot) calc(var(--s)*100%),var(--cold))}.heat td.none{background:none}
.frontier{max-width:44rem;width:100%;font:12px system-ui,sans-serif;fill:currentColor}
.frontier polyline{fill:none;stroke:currentColor}.frontier .point{opacity:.4}
.learning{max-width:40rem;width:100%;font:12px system-ui,sans-serif;fill:currentColor}
.learning polyline{fill:none;stroke:currentColor}.learning .loss{opacity:.35}.learning .held{stroke:var(--hot);stroke-width:2}
.learning .check{fill:var(--hot)}.learning .kept{fill:none;stroke:var(--hot);stroke-width:2}
.shapes{max-width:56rem;width:100%;font:12px system-ui,sans-serif;fill:currentColor}
.shapes .whole{fill:var(--line)}.shapes .left{fill:var(--hot)}
.frontier .chosen{fill:var(--hot)}.frontier .ring{fill:none;stroke:var(--hot);stroke-width:2}
pre,code{font:13px/1.45 ui-monospace,monospace}details{margin:1rem 0}summary{cursor:pointer}
</style><body>{body}</body></html>
"""
