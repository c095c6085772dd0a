"""Decoding with an ONNX artifact of 4 bits against the same model in fp32, in onnxruntime and in torch: tokens a second.

    python benchmarks/onnx_decode.py [--layers 22] [--formats int4:g32 int4:g64 int4:g128] [--threads 2] [--save DIR]

The model is that of memory.py: random weights in bf16, the shape of TinyLlama (1.1 billion parameters). Each format is rounded to
nearest, without data, and exported; the fp32 graph is the export of the model as it is. Torch runs stock transformers with the
dequantized weights of the first format, in fp32 and in bf16. All engines are loaded at once, which takes 15 GB; in every round
each reads the same prompt and then takes one token after the other, in an order that turns from round to round. A figure is the
median over rounds, with the least and the largest; a ratio is the median of the ratios within a round.

The bar: every format of 4 bits decodes 1.5 times as fast as the fp32 graph, and as torch in fp32. Below the full number of layers
the page says nothing about it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import LAYERS, made_model
from report import line, machine, publish

from compress import pipeline
from compress.export.artifact.engines import Engine, Transformers
from compress.export.onnx import reader
from compress.state import State

BAR = 1.5
DENSE = "onnxruntime fp32"


@dataclass(frozen=True)
class Speed:
    """What one engine did in each round: tokens a second while decoding, seconds for the prompt; bytes that a token reads."""

    name: str
    tokens: list[float]
    prompt: list[float]
    read: int

    def cells(self) -> list[str]:
        """Its line of the table."""
        spread = f"{median(self.tokens):.2f} ({min(self.tokens):.2f} to {max(self.tokens):.2f})"
        return [self.name, spread, f"{median(self.prompt):.2f}", f"{self.read / 1e9:.2f}"]


def main() -> None:
    """Makes the model and the artifacts, measures, prints the page; exit code 1 where the bar is missed."""
    args = arguments()
    torch.set_num_threads(args.threads)
    work = Path(tempfile.mkdtemp(prefix="onnx-", dir=args.work))
    try:
        model = made_model(work / "model", args.layers)
        engines = dict(loaders(model, args, work))
        speeds = measure({name: load() for name, load in engines.items()}, args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    page = document(speeds, args)
    publish(page, args.save, "onnx-decode")
    sys.exit(0 if args.layers < LAYERS or all(r >= BAR for _, _, r in ratios(speeds)) else 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look, which says nothing about the bar")
    parser.add_argument("--formats", nargs="+", default=["int4:g32", "int4:g64", "int4:g128"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens read before the first is generated")
    parser.add_argument("--new", type=int, default=16, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", help="where the model and the artifacts lie (default: the system's temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-onnx-decode.md")
    return parser.parse_args()


# --- engines ---------------------------------------------------------------------------------------------------------


def loaders(model: Path, args: argparse.Namespace, work: Path) -> list[tuple[str, Callable[[], Engine]]]:
    """Makes the artifacts; returns how to load each engine, by name."""
    dense, _ = exported(model, None, work / "dense")
    made = {form: exported(model, form, work / form.replace(":", "-")) for form in args.formats}
    state = made[args.formats[0]][1]
    found = [(DENSE, partial(session, dense)), *((f"onnxruntime {n}", partial(session, f)) for n, (f, _) in made.items())]
    kinds = (torch.float32, torch.bfloat16)
    return [*found, *((f"torch {str(kind)[6:]}", partial(stock, model, state, kind)) for kind in kinds)]


def exported(model: Path, form: str | None, out: Path) -> tuple[Path, State]:
    """An ONNX artifact of the model, every matrix of its blocks rounded to a format, and its state."""
    passes = [{"quantize": {"method": "rtn", "clip": "minmax", "format": form}}] if form else []
    recipe = {"model": str(model), "out": str(out), "passes": passes, "export": [{"onnx": {}}]}
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    started = time.perf_counter()
    done = pipeline.run(path)
    print(f"{form or 'as it is'}: made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return done.artifacts["onnx"][0], done.state


def session(folder: Path) -> Engine:
    """The artifact in onnxruntime."""
    return reader.engine(folder, reader.read(folder), "cpu")


@torch.no_grad()
def stock(folder: Path, state: State, dtype: torch.dtype) -> Engine:
    """Stock transformers with the dequantized matrices of a state."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    state = replace(state, dtype=dtype)
    for name in state.codes:
        model.get_submodule(state.graph[name].module).weight.copy_(state.weight(state.graph[name]))
    return Transformers(model, "transformers")


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(engines: dict[str, Engine], args: argparse.Namespace) -> list[Speed]:
    """Every engine in every round, after one that is not counted."""
    prompt = torch.randint(0, 256, (1, args.prompt), generator=torch.Generator().manual_seed(0))
    speeds = {name: Speed(name, [], [], engine.weight_bytes()) for name, engine in engines.items()}
    for round_ in range(-1, args.rounds):
        names = list(engines)[round_ % len(engines) :] + list(engines)[: round_ % len(engines)]
        for name in names:
            reading, decoding = once(engines[name], prompt, args.new)
            if round_ >= 0:
                speeds[name].prompt.append(reading)
                speeds[name].tokens.append(args.new / decoding)
    return list(speeds.values())


def once(engine: Engine, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to read a prompt, and to take `new` tokens more."""
    started = time.perf_counter()
    logits, cache = engine.prefill(prompt)
    reading = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(new):
        logits, cache = engine.step(logits[:, -1:].argmax(-1), cache)
    return reading, time.perf_counter() - started


def ratios(speeds: list[Speed]) -> list[tuple[str, str, float]]:
    """Each quantized artifact over the fp32 graph and over torch in fp32, the median over rounds."""
    ours = [s for s in speeds if s.name.startswith("onnxruntime") and s.name != DENSE]
    peers = [s for s in speeds if s.name in (DENSE, "torch float32")]
    return [(o.name, p.name, median(a / b for a, b in zip(o.tokens, p.tokens, strict=True))) for o in ours for p in peers]


def document(speeds: list[Speed], args: argparse.Namespace) -> str:
    """The page."""
    setting = f"{args.layers} layers, a prompt of {args.prompt} tokens, {args.new} more, {args.rounds} rounds"
    head = [f"# Decoding with ONNX, {date.today()}", "", f"{machine()}, {args.threads} threads; {setting}.", ""]
    table = [line(["engine", "tokens/s", "prompt s", "GB a token reads"]), line(["---", "---:", "---:", "---:"])]
    table += [line(speed.cells()) for speed in speeds]
    bar = [line(["ours", "peer", "ratio", "bar 1.5"]), line(["---", "---", "---:", "---"])]
    verdict = {True: "met", False: "MISSED"}
    rows = [line([o, p, f"{r:.2f}", verdict[r >= BAR] if args.layers >= LAYERS else ""]) for o, p, r in ratios(speeds)]
    return "\n".join([*head, *table, "", *bar, *rows])


if __name__ == "__main__":
    main()
