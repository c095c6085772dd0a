"""Recipes written by tests, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from compress import pipeline
from compress.errors import CompressError
from compress.export.native import reader
from compress.export.runtime import load
from compress.formats import LowRank, parse
from compress.model.model import open_model


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


def several(folder: Path, model: Path, text: Path | None, *exporters: str, **options: Any) -> pipeline.Outcome:
    """A run of `quantize` with several exporters; evaluated where there is a text."""
    path = recipe(folder, model, text, **options)
    content = yaml.safe_load(path.read_text()) | {"export": [{name: {}} for name in exporters]}
    if text:
        content["data"]["evaluation"] = {"text": str(text), "sequences": 4, "length": 32}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)


def bake(
    folder: Path, model: Path, text: Path | None, exporters: str, *passes: dict[str, Any], **options: Any
) -> pipeline.Outcome:
    """A run of any passes, exported by one exporter with `options`, or by several of which one word each is given."""
    path = recipe(folder, model, text)
    content = yaml.safe_load(path.read_text()) | {"passes": list(passes), "export": [{e: options} for e in exporters.split()]}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)


def refused(folder: Path, model: Path, text: Path, passes: list[dict[str, Any]], says: str) -> None:
    """Such passes are refused by `plan`, in one line that says so."""
    path = recipe(folder, model, text, exports=False)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": passes}))
    with pytest.raises(CompressError, match=says) as caught:
        pipeline.plan(path)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, AssertionError)


def multiplies_as_its_matrices_do(folder: Path, tolerance: float) -> None:
    """Every packed module of a native artifact gives the product with the matrix that its tensors stand for, of its largest."""
    state, model = reader.read(folder), load(folder, dtype=torch.float32)
    for site in state.graph.linear:
        module = model.get_submodule(site.module)
        W = state.codes[site.name].load().dequantize(torch.float32)
        assert torch.equal(module.weight, W)
        x = torch.randn(3, W.shape[1])
        y = torch.nn.functional.linear(x.double(), W.double())
        assert float((module(x) - y).abs().max()) <= tolerance * float(y.abs().max())


def table_is_served(folder: Path, done: pipeline.Outcome) -> dict[str, Any]:
    """The embedding of a native artifact, which is its head too, gives the rows of its matrix, and logits by it. Its record."""
    state, model = reader.read(folder), load(folder, dtype=torch.float32)
    site, packed = state.graph["embed"], state.codes["embed"].load()
    assert packed.nbytes == packed.format.nbytes(site.shape)
    W, ids = packed.dequantize(torch.float32), torch.tensor([[1, 5, 5, site.shape[0] - 1]])
    table, head, x = model.get_input_embeddings(), model.get_output_embeddings(), torch.randn(3, site.shape[1])
    assert torch.equal(table(ids), W[ids])
    assert torch.equal(packed.rows(ids[0].tolist(), torch.float32), W[ids[0]])
    torch.testing.assert_close(head(x), x @ W.T, rtol=0, atol=1e-5 * float((x @ W.T).abs().max()))
    assert [p.data_ptr() for p in head.parts] == [p.data_ptr() for p in table.parts]
    (step,) = (done.out / "steps").iterdir()
    return next(r for r in json.loads((step / "record.json").read_text())["sites"] if r["site"] == "embed")


def steps(text: str, **options: Any) -> dict[str, Any]:
    """The quickest pass that gives this format to every matrix inside the blocks."""
    fmt = parse(text)
    if isinstance(fmt, LowRank):
        ranked = {"format": str(fmt.base), "rank": fmt.rank, "factors": str(fmt.factors), "rounds": 0}
        return {"lqlora": {"method": "rtn", "clip": "minmax", **ranked, **options}}
    return {"quantize": {"method": "rtn", "clip": "minmax", "format": text, **options}}


def factored(rank: Any, text: str | None = None, **pins: Any) -> list[dict[str, Any]]:
    """The quickest passes that put two factors in place of every matrix inside the blocks, and give them a format."""
    made = [{"factorize": {"method": "svd", "rank": rank, "pins": pins}}]
    return made + ([{"quantize": {"method": "rtn", "clip": "minmax", "format": text}}] if text else [])


KINDS = (
    "int3:g64:asym", "nf3:g32:dq8x16", "lut2:g64", "int4:channel", "lut3:g32:shared", "int4:g32+r4", "fp16", "nf4:g64",
    "nf3:g32+r4:int8:channel", "int2:g16", "int8:channel", "bf16", "int5:g64:asym", "nf8:g32:dq8x256", "int7:g32",
    "nf4:g64:dq3x16:fp32", "lut4:g32", "int5:channel:asym+r1", "nf2:g32", "int8:g16:asym", "lut3:g48", "lut2:g32+r4:fp32",
    "lut2:g64:shared", "int3:g32", "nf4:g64+r2:int8:channel", "int3:g32:r32", "int3:g64+r4",
)  # fmt: skip


def medley(model: Path, first: int, **pins: str) -> dict[str, Any]:
    """A step that gives the matrices inside the blocks of a model the formats of KINDS by turns, from the `first` on."""
    names = [s.name for s in open_model(str(model)).graph.linear]
    return steps("int4:g32+r4", pins={name: KINDS[(first + i) % len(KINDS)] for i, name in enumerate(names)} | pins)


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
