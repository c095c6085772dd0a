"""The verb `plan`: of a recipe what it will do and cost; of a model alone what each width would cost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress import evaluate, pipeline
from compress.errors import FormatError, ModelError, RecipeError
from compress.export.artifact.files import check_marks
from compress.export.native.exporter import Native
from compress.export.table import KINDS
from compress.formats import Dense, parse
from compress.model.bare import bare_model, names_model
from compress.model.data import Windows
from compress.model.model import Model
from compress.passes.quantize import Quantize
from compress.report import allocation, page
from compress.report.console import Console
from compress.report.shapes import Survivors
from compress.run import is_run
from compress.stages import BASELINE_BYTES
from compress.state import State
from compress.state.checkpoint import Layout
from compress.state.plan import BitPlan, size

WIDTHS = (*(f"int{bits}:g{group}" for bits in range(2, 9) for group in (64, 128)),
          "lut2:g64", "lut3:g64", "lut4:g64", "nf3:g64", "nf4:g64")  # fmt: skip


def plan_command(options: argparse.Namespace) -> None:
    if names_model(options.recipe):
        for flag, given in (("--set", options.overrides), ("--out", options.out), ("--no-measure", options.no_measure)):
            if given:
                raise RecipeError(f"{flag} is for a recipe, and '{options.recipe}' is a model; write a recipe for it")
        plan_model(options.recipe)
        return
    console = Console(stream=sys.stderr)
    try:
        planned = pipeline.plan(options.recipe, options.overrides, options.out, not options.no_measure, options.device, console)
    finally:
        console.close()
    ready = planned.prepared
    rows = [[str(i), *row] for i, row in enumerate(planned.steps, 1)]
    print(page.columns(rows, ["", "step", "options", "state"]))
    graph, bits = ready.foreseen.graph, ready.foreseen.plan
    if bits and bits.forecast:
        print("\n" + allocated(bits, ready.foreseen))
    if survivors := Survivors.of(ready.start, ready.foreseen):
        print("\n" + survivors.text())
    print()
    print(page.columns(format_rows(ready.foreseen), ["format", "sites", "weights", "bytes"], right=(1, 2, 3)))
    linear = evaluate.sizes(ready.foreseen, 0).linear_bits
    changed = len(ready.foreseen.codes)
    print(f"\n{len(graph.sites)} sites, {changed} change; {linear:.3f} bits per weight in linear layers; "
          f"original {size(planned.original.nbytes)}")  # fmt: skip
    for name, layout in planned.layouts.items():
        share = layout.nbytes / planned.original.nbytes
        print(f"{name}: {layout.nbytes:,} bytes in {len(layout.files)} file{'s' * (len(layout.files) > 1)}"
              f" ({size(layout.nbytes)}, {share:.0%} of the original; "
              f"{evaluate.sizes(ready.foreseen, layout.tensor_bytes).file_bits:.3f} bits per weight)")  # fmt: skip
    most = planned.largest
    print(f"peak memory about {size(most.peak_bytes)}, in '{most.name}'; time about {page.span(planned.seconds)} on this "
          "machine's CPU")  # fmt: skip
    for remark in planned.remarks:
        print(f"note: {remark}")


def allocated(bits: BitPlan, state: State) -> str:
    """The allocation, what is expected of it, and what other budgets would buy."""
    f = bits.forecast
    assert f is not None
    parts = [allocation.grid(bits, state.graph, str(Dense(state.dtype)))]
    if f.measured:
        parts += ["\n".join(allocation.summary(f)), allocation.frontier_table(f), allocation.plot(f)]
    else:
        parts += ["This allocation is a guess, shape and formats: every weight counts alike until 'plan' or 'run' measures\n"
                  "damage on the model's weights. What fits the budget is exact."]  # fmt: skip
        parts += [allocation.pace(f.latency)] if f.latency else []
    return "\n\n".join(parts)


def format_rows(state: State) -> list[list[str]]:
    formats = state.formats
    groups: dict[str, list[Any]] = {}
    for site in state.graph:
        if site.tied is None:
            groups.setdefault(str(formats.get(site.name, "as it is")), []).append(site)
    rows = []
    for text, sites in groups.items():
        stored = sum(formats[s.name].nbytes(s.shape) if s.name in formats else s.numel * state.dtype.itemsize for s in sites)
        rows.append([text, str(len(sites)), f"{sum(s.numel for s in sites):,}", f"{stored:,}"])
    return rows


# --- a model alone ---------------------------------------------------------------------------------------------------


def plan_model(path: Path) -> None:
    """Print what each width would cost, from the config alone."""
    if is_run(path):
        raise ModelError(f"{path}: is a run folder; plan its recipe, or the model that it is made of")
    if path.is_dir():
        if any(kind.is_artifact(path) for kind in KINDS):
            raise ModelError(f"{path}: is compressed already; name the original model")
        check_marks(path)
    with TemporaryDirectory() as folder:
        model = bare_model(str(path), Path(folder))
        start = model.state if model.has_weights else model.bare
        print(survey(model, start))
    for remark in model.remarks:
        print(f"note: {remark}")


def survey(model: Model, start: State) -> str:
    """The table, and what it is of."""
    tables = [site.name for site in start.graph if site.role in ("embed", "head") and not site.tied]
    rows, unfit = [], []
    for text in WIDTHS:
        try:
            rows.append([text, *cost_of(model, start, text, [])])
        except FormatError as e:
            unfit.append((text, str(e)))
            continue
        try:
            rows[-1] += cost_of(model, start, text, tables)[1:]
        except FormatError:  # the table has another width than the blocks
            rows[-1] += ["-"] * 3
    head = ["format", "bits", "file", "", "bits of it", "all packed", "", "bits of it"]
    graph, count = start.graph, sum(site.numel for site in start.graph if not site.tied)
    one = ", which embedding and head share" if any(site.tied for site in graph) else ""
    lines = [page.columns(rows, head, right=range(1, len(head))) if rows else "none of the usual widths fits this model", "",
             f"{model.name}: {graph.family}, {len(graph.blocks)} blocks, {count:,} weights in matrices, "
             f"{size(Layout.of(model.specs).nbytes)} in {str(start.dtype)[6:]}",
             "bits are per weight, of the linear layers and of the whole file; files are as 'native' writes them",
             f"all packed: {' and '.join(tables)}{one}, in the format too, by pins"]  # fmt: skip
    lines += [memory(start, rows[0][0])] if rows else []
    if unfit:
        lines.append(f"left out: {', '.join(text for text, _ in unfit)}; {unfit[0][1].partition('  (')[0]}")
    return "\n".join(lines)


def cost_of(model: Model, start: State, text: str, tables: list[str]) -> list[str]:
    """Bits per weight of linear layers; bytes of the file, the same for people, bits per weight. `tables` have the format too."""
    foreseen = Quantize(format=parse(text), pins=dict.fromkeys(tables, text)).foresee(start)
    layout = Native().layout(model, foreseen)
    found = evaluate.sizes(foreseen, layout.tensor_bytes)
    return [f"{found.linear_bits:.3f}", f"{layout.nbytes:,}", size(layout.nbytes), f"{found.file_bits:.3f}"]


def memory(start: State, text: str) -> str:
    """The memory that a run takes, which hangs little on the format."""
    windows = Windows(text="-")
    ways = ((Quantize(format=parse(text)), windows.sequences * windows.length,
             f"gptq on {windows.sequences} windows of {windows.length:,} tokens"),
            (Quantize(method="rtn", format=parse(text)), 0, "rounding without data"))  # fmt: skip
    peaks = [BASELINE_BYTES + step.cost(step.foresee(start), tokens).peak_bytes for step, tokens, _ in ways]
    return "memory of a run: " + ", ".join(f"{how} about {size(peak)}" for (_, _, how), peak in zip(ways, peaks, strict=True))
