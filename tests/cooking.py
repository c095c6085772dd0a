"""Recipes written by tests, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress import pipeline


def recipe(folder: Path, model: Path, text: Path | None = None, exports: Any = None, **options: Any) -> Path:
    """A recipe that quantizes `model` with `options` and, unless `exports` is False, exports it; calibrated on `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"calibration": {"text": str(text), "sequences": 6, "length": 32}} if text else {}
    content = {"model": str(model), "out": str(folder / "out"), "data": data, "passes": [{"quantize": options}],
               "export": [] if exports is False else [{"compressed_tensors": exports or {}}]}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def cook(folder: Path, model: Path, text: Path | None = None, exports: Any = None, **options: Any) -> pipeline.Outcome:
    return pipeline.run(recipe(folder, model, text, exports, **options))


def bake(
    folder: Path, model: Path, text: Path | None, exporter: str, *passes: dict[str, Any], **options: Any
) -> pipeline.Outcome:
    """A run of any passes, exported by one exporter with `options`; calibrated on `text` where there is one."""
    path = recipe(folder, model, text)
    content = yaml.safe_load(path.read_text()) | {"passes": list(passes), "export": [{exporter: options}]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)


def stories(
    assets: Path, folder: Path, passes: list[dict[str, Any]], calibration: int = 64, evaluation: int = 80, length: int = 256
) -> pipeline.Outcome:
    """A run of any passes on a small trained Llama; windows of `length` tokens of its own texts."""
    texts = assets / "texts" / "stories-split"
    data = {"calibration": {"text": str(texts / "calibration.txt"), "sequences": calibration, "length": length},
            "evaluation": {"text": str(texts / "evaluation.txt"), "sequences": evaluation, "length": length}}  # fmt: skip
    content = {"model": str(assets / "models" / "stories260K-mlp192"), "out": str(folder / "run"), "data": data, "passes": passes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)
