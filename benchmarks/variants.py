"""One model, one text to calibrate on and one to judge on, and several lists of passes: KL of each. The frame of smooth.py,
pruning.py, damping.py, distill.py and joint.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import report
import yaml
from report import machine

import compress
from compress.model.data import Tokens, Windows, read
from compress.model.model import Model


def measured(options: argparse.Namespace, passes: list[dict[str, Any]]) -> float:
    """KL (nats per token) of the original and what the passes make of it."""
    return outcome(options, passes).scores["compressed"]["kl"]  # type: ignore[no-any-return]


def outcome(options: argparse.Namespace, passes: list[dict[str, Any]], work: Path | None = None) -> Any:
    """The run itself. A folder `work` keeps what was measured for the next."""
    with tempfile.TemporaryDirectory() as place:
        folder = work or Path(place)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(options, passes, folder), sort_keys=False), encoding="utf-8")
        return compress.run_recipe(recipe)


def recipe_of(options: argparse.Namespace, passes: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The recipe of the passes, run in a folder."""
    windows = {"length": options.length, "bos": options.bos}
    data = {"calibration": {"text": str(options.calibration.resolve()), "sequences": options.sequences, **windows},
            "evaluation": {"text": str(options.evaluation.resolve()), "sequences": options.judged, **windows}}  # fmt: skip
    if any("distill" in step for step in passes):
        data["training"] = {"text": str(options.calibration.resolve()), "sequences": options.training, **windows}
    return {"model": str(options.model.resolve()), "out": f"{folder}/run", "data": data, "passes": passes, "export": []}


def texts(options: argparse.Namespace, source: Model, text: Path, count: int) -> Tokens:
    """The windows that a run reads from a text."""
    windows = Windows(text=str(text.resolve()), sequences=count, length=options.length, bos=options.bos)
    return read(windows, options.model, Path(), source.state.graph["embed"].shape[0])


def parser(doc: str | None, judged: int = 32) -> argparse.ArgumentParser:
    """The options of all of them."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", type=Path, required=True)
    found.add_argument("--calibration", type=Path, required=True)
    found.add_argument("--evaluation", type=Path, required=True)
    found.add_argument("--sequences", type=int, default=32, help="windows to calibrate on")
    found.add_argument("--judged", type=int, default=judged, help="windows to judge on")
    found.add_argument("--length", type=int, default=256)
    found.add_argument("--bos", action="store_true", help="a begin-of-text token in front of every window, as Gemma wants it")
    found.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-NAME-MODEL.md")
    return found


def publish(name: str, title: str, options: argparse.Namespace, rows: Callable[[argparse.Namespace], list[str]]) -> None:
    """Print a page of a table, and save it where that is asked for."""
    model = options.model.resolve().name
    what = (f"{model}, {options.sequences} windows of {options.length} tokens calibrated on, {options.judged} judged; "
            "KL in nats per token")  # fmt: skip
    page = "\n".join([f"# {title}, {date.today()}", "", what, "", machine(), "", *rows(options), ""])
    report.publish(page, options.save, f"{name}-{model}")
