"""Folders of sparse models: what config.json says of sparsity is believed as far as weights and model agree, without a note of
ours too; and the reader and the runtime refuse the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.export.artifact.proof import logits
from compress.export.native import reader
from compress.export.runtime import load
from compress.formats.sparsity import THRESHOLD
from tests.cooking import bake


@pytest.mark.slow
def test_a_damaged_sparsity_is_told_in_a_line(family: Any, text: Path, tmp_path: Path) -> None:
    made = bake(tmp_path, family("llama"), text, "native", {"sparsify": {"allocate": False}})
    folder = made.artifacts["native"][0]
    (folder / "compress.json").unlink()
    path, good = folder / "config.json", json.loads((folder / "config.json").read_text())
    held = good["quantization_config"]["sparsity"]
    stem = next(iter(held))
    for said, match in (
        (held | {stem: {"by": "cats:sing", "rows": [], "columns": []}}, "unknown sparsity"),
        (held | {stem: {"by": "predictor:r4", "rows": [], "columns": []}}, "sparsity_"),
        (held | {"model.layers.9.mlp.gate_proj": {"by": "cats:silu", "rows": [], "columns": []}}, "no matrix of this model"),
        (held | {stem: {"by": "cats:silu", "rows": ["../up"], "columns": []}}, "no matrix of this model"),
        (held | {stem: {"by": "cats:silu"}}, "is broken"),
        ([], "is broken"),
        ({}, "does not account for"),
        (held | {stem: held[stem] | {"by": "cats:relu"}}, "chooses by relu, and the model's neurons have silu"),
        (held | {stem: {"by": "teal", "rows": [], "columns": [stem]}}, "sparsity_threshold' is float32|one kind is exported"),
        (held | {stem: held[stem] | {"rows": ["model.layers.1.mlp.up_proj"]}}, "which is not beside it"),
        (held | {stem: held[stem] | {"rows": [stem]}}, "rows that do not go with cats"),
        (held | {stem: held[stem] | {"rows": ["model.layers.0.mlp.down_proj"]}}, "rows of a matrix that is not"),
        (held | {stem: held[stem] | {"columns": []}}, "columns of matrices that are not"),
        (held | {"lm_head": {"by": "teal", "rows": [], "columns": ["lm_head"]}}, "no matrix of this model's blocks"),
    ):
        others = [f"{module}.{THRESHOLD}" for module in held]  # naming them as nobody's does not help
        config = good["quantization_config"] | {"sparsity": said, "others": others}
        path.write_text(json.dumps(good | {"quantization_config": config}))
        refused_by_all(folder, match)


def refused_by_all(folder: Path, match: str) -> None:
    """The reader, by which `eval` goes, and the runtime refuse a folder in a line that says so."""
    for read in (lambda: logits(reader.read(folder), [torch.zeros(1, 4, dtype=torch.long)], "cpu"), lambda: load(folder)):
        with pytest.raises(ModelError, match=match) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_thresholds_that_are_none_are_refused_by_name(family: Any, text: Path, tmp_path: Path) -> None:
    made = bake(tmp_path, family("llama"), text, "native", {"sparsify": {"allocate": False}})
    folder = made.artifacts["native"][0]
    (folder / "compress.json").unlink()
    (path,) = folder.glob("*.safetensors")
    good = load_file(path)
    name = next(n for n in good if n.endswith(THRESHOLD))
    for spoilt, match in (
        (good[name] * math.nan, "holds NaN, infinite or negative values"),
        (good[name].index_fill(0, torch.tensor([3]), -1.0), "holds NaN, infinite or negative values"),
        (good[name][:-1], "is float32 .*needs float32"),
        (good[name].bfloat16(), "is bfloat16 .*needs float32"),
    ):
        save_file(good | {name: spoilt.contiguous()}, path)
        refused_by_all(folder, f"'{name}' {match}")
