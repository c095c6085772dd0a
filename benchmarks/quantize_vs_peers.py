"""Quantizes one model through `compress` and through its peers, side by side in one run, and prints ratios.

    python benchmarks/quantize_vs_peers.py --assets ASSETS \\
        --llmcompressor-python VENV/bin/python --gptqmodel-python VENV/bin/python --save benchmarks/results

Two workloads. `stories` is a small real model at 4, 3 and 2 bits: held-out perplexity and KL to the original. `speed` is a
random Llama of 27 M parameters at 4 bits: wall time, CPU time, peak memory. Every tool gets the same weights, the same
calibration tokens and the same format, and runs in a process of its own environment with the same number of threads
(quantize_child.py says what is timed). One judge scores all of them (scoring.py). README.md beside this file says how to make
the peers' environments.

Figures of models this small are noisy: another draw of the calibration text moves perplexity by a per cent at 4 bits and by
several below, so `--draws` averages over some. A peer without an environment is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from report import Row, document, merge
from safetensors.torch import save_file
from scoring import Judge, UnfairWeightsError
from workloads import AssetsMissingError, Workload, redraw, speed, stories

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Variant:
    """One way to run one tool; `options` go to the tool as they are."""

    tool: str
    label: str
    symmetric: bool
    options: dict[str, Any] = field(default_factory=dict)


# Each tool as its defaults are; ours also without the second, unquantized stream, peers also at their best options.
VARIANTS = (
    Variant("ours", "gptq", True),
    Variant("ours", "gptq", False),
    Variant("ours", "gptq, drift 0", True, {"drift": 0.0}),
    Variant("ours", "learned", True, {"method": "learned"}),
    Variant("ours", "learned", False, {"method": "learned"}),
    Variant("llmcompressor", "GPTQ, default", True),
    Variant("llmcompressor", "GPTQ, act-order static", False, {"actorder": "static"}),
    Variant("llmcompressor", "GPTQ, act-order static, mse", False, {"actorder": "static", "observer": "memoryless_mse"}),
    Variant("gptqmodel", "GPTQ, default", True),
    Variant("gptqmodel", "GPTQ, mse", False, {"mse": 2.0}),
    Variant("gptqmodel", "GPTAQ, mse", False, {"mse": 2.0, "gptaq": {"alpha": 0.25}}),
    Variant("autoround", "50 iterations", True, {"iters": 50}),
    Variant("autoround", "50 iterations", False, {"iters": 50}),
)
TOOLS = tuple(dict.fromkeys(variant.tool for variant in VARIANTS))


def main() -> None:
    """Runs the workloads asked for, prints the page, saves it if asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    work = Path(args.work or tempfile.mkdtemp(prefix="quantize-vs-peers-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        sections = [(workload.title, measure(workload, args, work)) for workload in workloads(args, work)]
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    page = document(sections, f"{args.threads} thread(s), {args.repeats} run(s), {args.draws} draw(s) of the stories' text")
    print(page)
    if args.save:
        save(Path(args.save), page, sections)


def arguments() -> argparse.Namespace:
    """The command line; environments may also come from LLMCOMPRESSOR_PYTHON, GPTQMODEL_PYTHON and AUTOROUND_PYTHON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=("stories", "speed"), default=["stories", "speed"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    assets = os.environ.get("COMPRESS_ASSETS", HERE.parent.parent / "shared/assets")
    parser.add_argument("--assets", type=Path, default=assets, help="holds models/ and texts/ (or set COMPRESS_ASSETS)")
    for tool in TOOLS:
        default = sys.executable if tool == "ours" else os.environ.get(f"{tool.upper()}_PYTHON")
        parser.add_argument(f"--{tool}-python", default=default, help=f"the python of an environment with {tool}")
    parser.add_argument("--only", nargs="+", help="only variants of these labels, such as learned")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], help="stories: only these widths")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of every tool (1 or 2)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each cell, the tools taking turns; medians are shown")
    parser.add_argument("--draws", type=int, default=1, help="stories: calibration draws; the mean quality is shown")
    parser.add_argument("--work", help="keep models, logs and weights here (default: a temporary folder)")
    parser.add_argument("--save", metavar="DIR", help="also write DIR/DATE-quantize-vs-peers.md and .json")
    return parser.parse_args()


def workloads(args: argparse.Namespace, work: Path) -> Iterator[Workload]:
    """The workloads asked for; a missing assets folder ends the run with one line."""
    for name in args.workload:
        try:
            yield stories(args.assets, args.bits) if name == "stories" else speed(work)
        except AssetsMissingError as error:
            sys.exit(f"stories: {error}; or leave this workload out with --workload speed")


def measure(workload: Workload, args: argparse.Namespace, work: Path) -> list[Row]:
    """The original's row, then one for each variant at each width."""
    judge = Judge(workload.model, workload.evaluation)
    rows = [Row("original", "", 32, True, score=judge.original_score())]
    chosen = [v for v in VARIANTS if v.tool in args.tools and (not args.only or v.label in args.only)]
    draws = [redraw(workload, i, args.draws, work) for i in range(args.draws)] if workload.redraws else [workload]
    for bits in workload.bits:
        cells: list[list[Row]] = [[] for _ in chosen]
        for turn in [draw for _ in range(args.repeats) for draw in draws]:
            for variant, cell in zip(chosen, cells, strict=True):
                cell.append(one_run(turn, variant, bits, judge, args, work))
                print(progress(cell[-1]), file=sys.stderr, flush=True)
        rows += [merge(cell) for cell in cells]
    return rows


def one_run(workload: Workload, variant: Variant, bits: int, judge: Judge, args: argparse.Namespace, work: Path) -> Row:
    """Quantizes once with one tool and scores the result; what goes wrong becomes the row's note."""
    row = Row(variant.tool, variant.label, bits, variant.symmetric)
    python = getattr(args, f"{variant.tool}_python")
    if not python:
        return replace(row, note=f"not measured: no environment (--{variant.tool}-python)")
    out = Path(tempfile.mkdtemp(prefix=f"{workload.name}-{variant.tool}-{bits}-", dir=work))
    job = write_job(workload, variant, bits, out)
    if failure := run_child(python, job, args.threads):
        return replace(row, note=f"failed: {failure}")
    measured = json.loads((out / "measured.json").read_text("utf-8"))
    for unused in ("imports_wall_s", "imports_mb"):
        measured.pop(unused)
    try:
        score = judge.score(out / "weights.safetensors", bits, workload.group)
    except UnfairWeightsError as error:
        return replace(row, note=f"not comparable: {error}")
    return replace(row, **measured, score=score)


def write_job(workload: Workload, variant: Variant, bits: int, out: Path) -> Path:
    """The job's file and its tokens; see `Job` in quantize_child.py."""
    save_file({"tokens": workload.calibration}, out / "tokens.safetensors")
    job = {
        "tool": variant.tool,
        "model": str(workload.model),
        "tokens": str(out / "tokens.safetensors"),
        "text": str(workload.text),
        "sequences": workload.calibration.shape[0],
        "length": workload.calibration.shape[1],
        "bits": bits,
        "group": workload.group,
        "symmetric": variant.symmetric,
        "options": variant.options,
        "out": str(out),
        "bos": workload.bos,
    }
    path = out / "job.json"
    path.write_text(json.dumps(job, indent=1), "utf-8")
    return path


def run_child(python: str, job: Path, threads: int) -> str:
    """Runs the job in its own environment; returns what failed, '' if nothing did. The job's folder keeps the log."""
    log = job.parent / "log.txt"
    command = [python, str(HERE / "quantize_child.py"), str(job)]
    with log.open("w", encoding="utf-8") as out:
        try:
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=environment(threads), cwd=job.parent)
        except OSError as error:
            return f"{python}: {error.strerror}"
    if not done.returncode:
        return ""
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit {done.returncode}").replace("|", "/")[:160]


def environment(threads: int) -> dict[str, str]:
    """The environment of every child: one number of threads, no network."""
    number = str(threads)
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), number)
    fixed |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    fixed["PYTHONPATH"] = str(HERE.parent)  # this clone, installed or not
    fixed["GPTQMODEL_CPU_WORKERS"] = "2"  # GPTQModel loads no model on a machine of two cores with less
    return {**os.environ, **fixed}


def progress(row: Row) -> str:
    """One line for the terminal while the run goes on."""
    found = row.note or f"perplexity {row.score.perplexity:.4g}  CPU {row.cpu_s:.1f} s"  # type: ignore[union-attr]
    return f"{time.strftime('%H:%M:%S')}  {row.name:40} {row.grid:8} {found}"


def save(folder: Path, page: str, sections: list[tuple[str, list[Row]]]) -> None:
    """Writes the page and the rows, named by the day."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{date.today()}-quantize-vs-peers"
    stem.with_suffix(".md").write_text(page + "\n", "utf-8")
    rows = {title: [asdict(row) for row in section] for title, section in sections}
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
