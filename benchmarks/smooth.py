"""What `smooth` is worth in front of rounding and of GPTQ: KL on held-out text with and without it, in one run.

python benchmarks/smooth.py --model MODEL --calibration TEXT --evaluation TEXT [--bits 4 3] [--bos] [--save DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from report import line, machine

import compress

METHODS = ("rtn", "gptq")


def measured(options: argparse.Namespace, passes: list[dict[str, Any]]) -> float:
    """KL (nats per token) of the original and what the passes make of it."""
    windows = {"length": options.length, "bos": options.bos}
    data = {"calibration": {"text": str(options.calibration.resolve()), "sequences": options.sequences, **windows},
            "evaluation": {"text": str(options.evaluation.resolve()), "sequences": options.judged, **windows}}  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        recipe = Path(work) / "recipe.yaml"
        content = {"model": str(options.model.resolve()), "out": f"{work}/run", "data": data, "passes": passes, "export": []}
        recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        kl: float = compress.run_recipe(recipe).scores["compressed"]["kl"]
    return kl


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each width and method."""
    found = [line(["bits", "method", "plain", "smooth", "smooth / plain"]), line(["---"] * 5)]
    for bits in options.bits:
        for method in METHODS:
            quantize = {"quantize": {"method": method, "format": f"int{bits}:g{options.group}"}}
            plain, smooth = measured(options, [quantize]), measured(options, [{"smooth": {}}, quantize])
            found.append(line([str(bits), method, f"{plain:.4f}", f"{smooth:.4f}", f"{smooth / plain:.2f}"]))
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--judged", type=int, default=16, help="windows to judge on")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bos", action="store_true", help="a begin-of-text token in front of every window, as Gemma wants it")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    what = (f"{options.model.resolve().name}, int:g{options.group}, {options.sequences} windows of {options.length} tokens "
            f"calibrated on, {options.judged} judged; KL in nats per token")  # fmt: skip
    page = "\n".join([f"# smooth in front of a quantizer, {date.today()}", "", what, "", machine(), "", *rows(options), ""])
    print(page)
    if options.save:
        (options.save / f"{date.today()}-smooth-{options.model.resolve().name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
