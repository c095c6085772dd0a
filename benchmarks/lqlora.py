"""LQ-LoRA's published initialisation, normal floats without correction, and the closed form, at equal bits, on real models.

    python benchmarks/lqlora.py --assets ASSETS --save benchmarks/results

Every row is a recipe: formats allocated among LQ-LoRA's configurations (those on the hull below 4.3 bits), then quantized. `bits
of Q` is the paper's accounting, which leaves the factors out; `bits` counts everything. KL (nats per token) and perplexity are
on held-out text. Rows without correction are given both: the bits of Q of the others, and their bits with factors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from report import line, machine, publish

import compress
from compress.formats import LowRank, parse

HULL = ["nf2:g64:dq2x256", "nf2:g32:dq2x64", "nf2:g16:dq2x64", "nf2:g16:dq3x256", "nf3:g64:dq3x256", "nf3:g32:dq3x256",
        "nf3:g32:dq3x64", "nf3:g16:dq3x64", "nf4:g64:dq3x256", "nf4:g32:dq4x256"]  # fmt: skip
TABLES = ["lut2:g256", "lut2:g64", "lut3:g256", "lut3:g64", "lut4:g64"]
MODELS = {"stories260K-mlp192": ("stories-split/calibration.txt", "stories-split/evaluation.txt"),
          "ref-7m": ("c4/c4.utf8", "wikitext2-raw/wiki.test.raw")}  # fmt: skip
RANKS = {"stories260K-mlp192": 2, "ref-7m": 4}  # of widths 64 and 256; the paper's is 64 of 4096
NEAREST = {"method": "rtn", "clip": "minmax"}
WEIGHT: dict[str, Any] = {"metric": "weight", "trials": 0}


@dataclass(frozen=True)
class Row:
    """One way, at one budget."""

    name: str
    q_bits: float
    bits: float
    kl: float
    perplexity: float


def ways(q: float, factors: float, rank: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(name, passes) of each row: `q` bits for the quantized part, `factors` bits for the correction."""
    low = {"formats": HULL, "ranks": [rank], "budget": f"{q + factors} bits"}
    for name, bits in ((f"NF, {q} bits", q), ("NF, bits of the factors too", q + factors)):
        yield name, [{"allocate": {"formats": HULL, "budget": f"{bits} bits", **WEIGHT}}, {"quantize": NEAREST}]
    yield "LQ-LoRA, data-free", [{"allocate": {**low, **WEIGHT}}, {"lqlora": {"init": "paper", **NEAREST}}]
    yield (
        "LQ-LoRA, Fisher",
        [{"allocate": {**low, **WEIGHT, "metric": "kl"}}, {"lqlora": {"init": "paper", "fisher": True, **NEAREST}}],
    )
    yield "closed form, same formats", [{"allocate": {**low, "trials": 1}}, {"lqlora": {}}]
    free = {"formats": TABLES, "ranks": [0, rank // 2, rank], "factors": "int8:channel", "budget": f"{q + factors} bits"}
    yield "ranks and formats bought freely", [{"allocate": {**free, "trials": 1}}, {"lqlora": {}}]


def measured(assets: Path, model: str, passes: list[dict[str, Any]], folder: Path) -> tuple[Any, Any]:
    """The outcome of one recipe."""
    calibration, evaluation = (str(assets / "texts" / name) for name in MODELS[model])
    recipe = {"model": str(assets / "models" / model), "out": str(folder / "run"), "passes": passes,
              "data": {"calibration": {"text": calibration, "sequences": 64, "length": 256},
                       "evaluation": {"text": evaluation, "sequences": 80, "length": 256}}}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    made = compress.run_recipe(path)
    return made, made.scores["compressed"]


def rows(assets: Path, model: str, q: float, rank: int, folder: Path) -> Iterator[Row]:
    """Every way at one budget of one model."""
    factors = factor_bits(assets, model, rank)
    for name, passes in ways(q, factors, rank):
        made, scores = measured(assets, model, passes, folder)
        graph, formats = made.state.graph, made.state.plan.formats
        base = [formats[s.name].base if isinstance(formats[s.name], LowRank) else formats[s.name] for s in graph.linear]
        numel = sum(s.numel for s in graph.linear)
        q_bits = sum(8 * f.nbytes(s.shape) for f, s in zip(base, graph.linear, strict=True)) / numel
        row = Row(name, q_bits, made.report.after.linear_bits, scores["kl"], scores["perplexity"])
        print(model, row, flush=True)
        yield row


def factor_bits(assets: Path, model: str, rank: int) -> float:
    """Bits per weight that bf16 factors of `rank` add."""
    from compress.model.model import open_model

    linear = open_model(str(assets / "models" / model)).graph.linear
    fmt = LowRank(parse("int4:channel"), rank)  # type: ignore[arg-type]
    more = sum(fmt.nbytes(s.shape) - fmt.base.nbytes(s.shape) for s in linear)
    return 8 * more / sum(s.numel for s in linear)


def page(tables: dict[str, list[Row]]) -> str:
    """The whole page."""
    lines = [
        f"# LQ-LoRA and the closed form, {date.today()}",
        "",
        f"{machine()}; ranks {RANKS}, factors in bf16 unless bought.",
        "",
    ]
    for title, found in tables.items():
        head = ["way", "bits of Q", "bits", "KL", "perplexity"]
        lines += [f"## {title}", "", line(head), line(["---"] + ["---:"] * 4)]
        lines += [line([r.name, f"{r.q_bits:.3f}", f"{r.bits:.3f}", f"{r.kl:.4f}", f"{r.perplexity:.3f}"]) for r in found] + [""]
    return "\n".join(lines)


def main() -> None:
    """Run and print, or save, everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True, help="folder with models/ and texts/")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.5, 2.75, 3.0], help="bits of Q, as the paper counts")
    parser.add_argument("--save", type=Path, help="folder for a dated page")
    options = parser.parse_args()
    tables = {}
    for model in options.models:
        for q in options.bits:
            with tempfile.TemporaryDirectory() as folder:
                tables[f"{model}, {q} bits of Q"] = list(rows(options.assets, model, q, RANKS[model], Path(folder)))
    publish(page(tables), options.save, "lqlora")


if __name__ == "__main__":
    main()
