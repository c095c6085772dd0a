"""Spends one budget of bits through `compress`, uniformly, and through peers that allocate; one judge, in one run; prints ratios.

    python benchmarks/allocate_vs_peers.py --assets ASSETS --save benchmarks/results \\
        --autoround-python VENV/bin/python --modelopt-python VENV/bin/python

Small real models, 64 windows of 256 tokens to calibrate on, 80 others to judge by, where the texts have so many. A budget is an
average over the linear layers of the blocks, scales counted; head and embeddings stay as they are. The rows:

    ours        `allocate` and `quantize`, over plain integers (INT), those and look-up tables (ALL), integers and tables in
                rotated coordinates (ROTATED), trellis codes (TRELLIS) or entropy-coded integers (CODED); by GPTQ, or `learned`
    uniform     `quantize` alone with one format everywhere; for a budget the best of those that keep to it
    autoround   AutoScheme over symmetric or asymmetric integers of 2, 3, 4 and 8 bits, in groups of 64; also behind its
                Hadamard rotation and AWQ
    modelopt    AutoQuantize over symmetric integers of these widths and groups

`--singles` measures, instead, how well each metric ranks single replacements: one matrix in one format, the rest as it was.
Parts can be run by themselves: with `--work` a folder keeps what was measured, and the page has all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from allocate_child import VARIANTS, stored_bytes
from allocate_page import ROWS, Row, document
from quantize_child import cpu_seconds
from quantize_vs_peers import environment
from safetensors.torch import load_file
from scoring import Judge, Score, UnfairWeightsError, most_values
from workloads import LENGTH, windows

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this clone, installed or not
METRICS = ("kl", "output", "weight")
INT = ("int2:g64", "int2:channel", "int3:g64", "int3:channel", "int4:channel", "int4:g64", "int8:channel")
ROTATED = tuple(f"{kind}{bits}:g64:r128" for kind in ("int", "lut") for bits in (2, 3, 4))
LISTS = {
    "INT": INT,
    "ALL": (*INT, "lut2:g64", "lut2:g256", "lut3:g64", "lut3:g256", "lut4:g64"),
    "ROTATED": ROTATED,
    "TRELLIS": ("tcq:r128",),
    "CODED": ("ecq:r128",),
}
UNIFORM = ("int2:g64", "int2:g32", "int2:g16", "int3:channel", "int3:g64", "int3:g32", "int3:g16", "int4:channel")
OWN = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # a config's dtype -> the format that leaves a matrix as it is


@dataclass(frozen=True)
class Case:
    """One model with its texts, and how many windows of each are read; a short text has fewer."""

    name: str
    model: Path
    calibration: Path
    evaluation: Path
    counts: tuple[int, int]

    def calibrating(self) -> torch.Tensor:
        """The windows that every tool gets."""
        return self.windows(self.calibration, self.counts[0])

    def judging(self) -> torch.Tensor:
        """Those that it is judged by."""
        return self.windows(self.evaluation, self.counts[1])

    def windows(self, text: Path, limit: int) -> torch.Tensor:
        """(limit, LENGTH) int64 tokens of a text."""
        from transformers import AutoTokenizer

        return windows(text.read_text("utf-8"), AutoTokenizer.from_pretrained(self.model), limit=limit)


CASES = {
    "stories": ("models/stories260K-mlp192", "texts/stories-split/calibration.txt", "texts/stories-split/evaluation.txt"),
    "ref-7m": ("models/ref-7m", "texts/c4/c4.utf8", "texts/wikitext2-raw/wiki.test.raw"),
    "ref-7m-wikitext": ("models/ref-7m", "texts/wikitext2-raw/wiki.valid.raw", "texts/wikitext2-raw/wiki.test.raw"),
    "ref-7m-stories": ("models/ref-7m", "texts/stories-split/calibration.txt", "texts/stories-split/evaluation.txt"),
}


class MixedJudge(Judge):
    """The judge for weights whose layers differ in width."""

    def layers(self, weights: Mapping[str, torch.Tensor], grids: Mapping[str, tuple[int, int]]) -> Score:
        """Score of the original with these layers put in, after checking each against its (bits, group)."""
        for name, (bits, group) in grids.items():
            if bits < 9 and (most := most_values(weights[name], group)) > 1 << bits:
                raise UnfairWeightsError(f"{name}: a group holds {most} values, {bits} bits allow {1 << bits}")
        try:
            self._put({**self.original, **{name: w.float() for name, w in weights.items()}})
            return self._score()
        finally:
            self._put(self.original)


def main() -> None:
    """Measures what is asked for, prints the page of all that the work folder holds, saves it if asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    work = Path(args.work or tempfile.mkdtemp(prefix="allocate-vs-peers-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        for case in cases(args):
            if args.singles:
                keep(work / f"{case.name}.singles.json", singles(case, args, work))
            else:
                measure(case, args, work)
        page, raw = document(work, CASES, args.threads)
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    print(page)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        (args.save / f"{date.today()}-allocate-vs-peers.md").write_text(page + "\n", "utf-8")
        keep(args.save / f"{date.today()}-allocate-vs-peers.json", raw)


def arguments() -> argparse.Namespace:
    """The command line; environments may also come from AUTOROUND_PYTHON and MODELOPT_PYTHON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared/assets")
    parser.add_argument("--assets", type=Path, default=assets, help="holds models/ and texts/ (or set COMPRESS_ASSETS)")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[2.5, 3.0, 3.5, 4.0], help="bits, scales counted")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=ROWS, help="of " + ",".join(ROWS))
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="ours: only these")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS), help="ours: only these candidates")
    parser.add_argument("--methods", nargs="+", choices=("gptq", "learned"), default=["gptq"], help="ours: only these")
    parser.add_argument("--variants", nargs="+", help="peers: only these, such as iters50")
    for tool in VARIANTS:
        default = os.environ.get(f"{tool.upper()}_PYTHON")
        parser.add_argument(f"--{tool}-python", default=default, help=f"the python of an environment with {tool}")
    parser.add_argument("--windows", nargs=2, type=int, default=[64, 80], help="of 256 tokens, to calibrate on and to judge by")
    parser.add_argument("--singles", action="store_true", help="single replacements instead, for --metrics over INT")
    parser.add_argument("--single-sites", type=int, default=35, help="of these many matrices, drawn")
    parser.add_argument("--single-windows", type=int, default=16, help="on these many of the windows to judge by")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of every tool")
    parser.add_argument("--work", help="keep results, logs and weights here and go on from them (default: a temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-allocate-vs-peers.md and .json")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The models asked for; a missing file ends the run with one line."""
    for name in args.models:
        paths = [args.assets / path for path in CASES[name]]
        if missing := [path for path in paths if not path.exists()]:
            sys.exit(f"{name}: no {missing[0]}; name the folder of the assets with --assets")
        yield Case(name, *paths, tuple(args.windows))


def keep(file: Path, value: Any) -> None:
    """Writes a value as JSON."""
    file.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


# --- measuring ----------------------------------------------------------------------------------------------------------


def measure(case: Case, args: argparse.Namespace, work: Path) -> None:
    """Measures every row asked for that the work folder does not hold, and leaves each there."""
    judge = MixedJudge(case.model, case.judging())
    keep(work / f"{case.name}.original.json", asdict(judge.original_score()))
    for row in wanted(case, args):
        file = work / f"{row.key}.row.json"
        if not file.exists() or json.loads(file.read_text("utf-8"))["note"]:
            row = peer(row, case, judge, args, work) if row.tool in VARIANTS else ours(row, case, judge, work)
            keep(file, asdict(row))
            tell(f"{row.key:40} {row.note or f'{row.bits:.3f} bits  KL {row.kl:.4f}'}")


def tell(text: str) -> None:
    """One line for the terminal while the run goes on."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def wanted(case: Case, args: argparse.Namespace) -> Iterator[Row]:
    """The rows asked for, not measured yet."""
    if "uniform" in args.rows:
        yield from (Row(case.name, "uniform", fmt, None) for fmt in UNIFORM)
    if "ours" in args.rows:
        ways = {"gptq": "", "learned": " learned"}
        for label in (f"{metric} {name}{ways[way]}" for metric in args.metrics for name in args.lists for way in args.methods):
            yield from (Row(case.name, "ours", label, budget) for budget in args.budgets)
    for tool in (tool for tool in VARIANTS if tool in args.rows):
        for label in (v for v in VARIANTS[tool] if not args.variants or v in args.variants):
            yield from (Row(case.name, tool, label, budget) for budget in args.budgets)


def ours(row: Row, case: Case, judge: MixedJudge, work: Path) -> Row:
    """Allocated or uniform by `compress`. All budgets of one label share a run folder, so the first pays for the measuring."""
    passes: list[dict[str, Any]] = [{"quantize": {"format": row.label}}]
    if row.tool == "ours":
        metric, name, *method = row.label.split()
        options = {"budget": f"{row.budget} bits", "formats": LISTS[name], "metric": metric}
        passes = [{"allocate": options}, {"quantize": {"method": "learned"} if method else {}}]
    out, cpu, wall = work / replace(row, budget=None).key, cpu_seconds(), time.perf_counter()
    outcome = run_recipe(case, passes, out)
    row = replace(row, cpu_s=cpu_seconds() - cpu, wall_s=time.perf_counter() - wall)
    state = outcome.state
    run_recipe(case, passes, out, export=[{"native": {}}])  # finds its steps finished; writing is timed for nobody
    row = replace(row, bytes=stored_bytes(out / "native", [site.stem for site in state.graph.linear]))
    formats = {site.stem: str(state.format(site)) for site in state.graph.linear}
    weights = {site.stem: state.weight(site) for site in state.graph.linear}
    score = judge.layers(weights, {name: grid(text, weights[name].shape[1]) for name, text in formats.items()})
    predicted = state.plan.forecast.total if state.plan.forecast else None
    bits = outcome.report.after.linear_bits
    return replace(row, bits=bits, kl=score.kl, perplexity=score.perplexity, predicted=predicted, layers=formats)


def run_recipe(
    case: Case, passes: list[dict[str, Any]], out: Path, until: str | None = None, export: Sequence[dict[str, Any]] = ()
) -> Any:
    """`compress run` of these passes in the folder `out`."""
    import compress

    data = {"calibration": {"text": str(case.calibration), "sequences": len(case.calibrating()), "length": LENGTH}}
    recipe = {"model": str(case.model), "out": str(out), "seed": 0, "data": data, "passes": passes, "export": list(export)}
    path = out.with_name(f"{out.name}.yaml")
    keep(path, recipe)  # JSON is YAML
    return compress.run_recipe(path, until=until)


def grid(text: str, inputs: int) -> tuple[int, int]:
    """(bits, group) of a format by its text; a matrix left dense has 16 bits, and so, here, have those that no grid holds."""
    found = re.fullmatch(r"(?:int|lut)(\d+):(?:g(\d+)|channel)", text)
    return (int(found[1]), min(int(found[2] or inputs), inputs)) if found else (16, inputs)


def peer(row: Row, case: Case, judge: MixedJudge, args: argparse.Namespace, work: Path) -> Row:
    """Allocated by a peer in its own environment; what goes wrong becomes the row's note."""
    out, python = work / row.key, getattr(args, f"{row.tool}_python")
    if not (out / "result.json").exists():
        failure = run_child(python, write_job(row, case, out), args.threads) if python else f"no --{row.tool}-python"
        if failure:
            return replace(row, note=f"not measured: {failure}")
    result = json.loads((out / "result.json").read_text("utf-8"))
    stored = load_file(out / "weights.safetensors")
    weights = {name: stored[f"{name}.weight"] for name in judge.linears}
    grids = {name: (layer["bits"], 64) for name, layer in result["layers"].items()}
    try:
        score = Score(**result["score"]) if result["score"] else judge.layers(weights, grids)
    except UnfairWeightsError as error:
        return replace(row, note=f"not comparable: {error}")
    figures = {name: result[name] for name in ("bits", "bytes", "cpu_s", "wall_s", "peak_mb")}
    return replace(row, kl=score.kl, perplexity=score.perplexity, layers=result["layers"], **figures)


def write_job(row: Row, case: Case, out: Path) -> Path:
    """The job's file and its tokens; see `Job` in allocate_child.py."""
    out.mkdir(exist_ok=True)
    files = {name: str(out / f"{name}.pt") for name in ("tokens", "judged")}
    torch.save(case.calibrating(), files["tokens"])
    torch.save(case.judging(), files["judged"])
    job = {"tool": row.tool, "model": str(case.model), **files, "bits": row.budget}
    keep(out / "job.json", {**job, "options": VARIANTS[row.tool][row.label], "out": str(out)})
    return out / "job.json"


def run_child(python: str, job: Path, threads: int) -> str:
    """Runs the job in its own environment; returns what failed, '' if nothing did. The job's folder keeps the log."""
    log = job.parent / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        command = [python, str(HERE / "allocate_child.py"), str(job)]
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment(threads), cwd=job.parent)
        except OSError as error:
            return f"{python}: {error.strerror}"
    if not done.returncode:
        return ""
    last = (log.read_text("utf-8", errors="replace").strip() or f"exit {done.returncode}").splitlines()[-1]
    return last.replace("|", "/")[:160]


# --- single replacements ------------------------------------------------------------------------------------------------


def singles(case: Case, args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """For sites and formats of INT: what each metric predicts of the one replacement, and the KL that it really causes."""
    foreseen = {metric: predictions(case, metric, work) for metric in args.metrics}
    names = sorted({site for table in foreseen.values() for site, _ in table})
    judge = MixedJudge(case.model, case.windows(case.evaluation, args.single_windows))
    found = []
    for site in random.Random(0).sample(names, min(len(names), args.single_sites)):
        for fmt in INT:
            kl = single(case, site, fmt, judge, work)
            predicted = {metric: table[site, fmt] for metric, table in foreseen.items()}
            found.append({"site": site, "format": fmt, "kl": kl, "predicted": predicted})
        tell(f"{case.name} {site}")
    return found


def predictions(case: Case, metric: str, work: Path) -> dict[tuple[str, str], float]:
    """(site, format) -> damage, as the forecast tells it of a plan in which everything is pinned to this format."""
    table = {}
    for fmt in INT:
        options = {"budget": "16 bits", "formats": INT, "metric": metric, "pins": {"layers.*": fmt}, "trials": 0}
        outcome = run_recipe(case, [{"allocate": options}, {"quantize": {}}], work / f"{case.name}-singles", until="allocate")
        table |= {(site, fmt): d for site, d in outcome.state.plan.forecast.damage.items()}
    return table


def single(case: Case, site: str, fmt: str, judge: MixedJudge, work: Path) -> float:
    """KL with one matrix quantized alone, the rest as it was."""
    out = work / f"{case.name}-single"
    shutil.rmtree(out, ignore_errors=True)
    own = OWN[json.loads((case.model / "config.json").read_text("utf-8"))["dtype"]]
    state = run_recipe(case, [{"quantize": {"format": own, "pins": {site: fmt}, "drift": 0}}], out).state
    return judge.layers({state.graph[site].stem: state.weight(state.graph[site])}, {}).kl


if __name__ == "__main__":
    main()
