"""Formats that engines multiply by, written by `compress` and by llm-compressor, loaded by stock transformers: KL, bytes, time.

python benchmarks/served_vs_peers.py --model MODEL --calibration TEXT --evaluation TEXT --llmcompressor-python VENV/bin/python \\
    [--bos] [--only NAME ...] [--work DIR] [--save DIR]

Both tools get the same windows, quantize the linear layers of the blocks and nothing else, and write compressed-tensors folders.
One judge (stock transformers with compressed-tensors, in this environment, `compress` not imported) loads the original and every
folder in one dtype, inputs rounded as the folder says, and compares logits on held-out windows. With `--work` a folder keeps what
was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meter import asked

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One folder: the scheme that it is compared under, who writes it, how, and the dtype that it is judged in."""

    scheme: str
    tool: str
    told: str
    steps: list[Any]  # passes of ours; (kind, options) of llm-compressor's modifiers
    dtype: str = "float32"


def quantized(fmt: str, **more: Any) -> dict[str, Any]:
    return {"quantize": {"format": fmt, **more}}


INT8, FP8, NVFP4 = "int8:channel/int8:token", "fp8:channel/fp8:token", "nvfp4/nvfp4"
SMOOTHED = ["smooth", {"smoothing_strength": 0.8}]
# llm-compressor's own table smooths Gemma 3's gate and up by the norm behind attention, which is not the one that feeds them.
GEMMA = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"],
]
MAPPED = ["smooth", {"smoothing_strength": 0.8, "mappings": GEMMA}]
CASES = {
    "int8-theirs": Case("W8A8", "llmcompressor", "SmoothQuant 0.8 and GPTQ", [SMOOTHED, ["gptq", {"scheme": "W8A8"}]]),
    "int8-theirs-mapped": Case("W8A8", "llmcompressor", "the same, Gemma's norms named", [MAPPED, ["gptq", {"scheme": "W8A8"}]]),
    "int8-theirs-plain": Case("W8A8", "llmcompressor", "GPTQ", [["gptq", {"scheme": "W8A8"}]]),
    "int8": Case("W8A8", "ours", "smooth and GPTQ", [{"smooth": {}}, quantized(INT8)]),
    "int8-plain": Case("W8A8", "ours", "GPTQ", [quantized(INT8)]),
    "fp8-theirs": Case("FP8 dynamic", "llmcompressor", "rounded", [["round", {"scheme": "FP8_DYNAMIC"}]]),
    "fp8-rtn": Case("FP8 dynamic", "ours", "rounded", [quantized(FP8, method="rtn")]),
    "fp8": Case("FP8 dynamic", "ours", "GPTQ", [quantized(FP8)]),
    "nvfp4-theirs": Case("NVFP4", "llmcompressor", "rounded", [["round", {"scheme": "NVFP4"}]], "bfloat16"),
    "nvfp4-theirs-gptq": Case("NVFP4", "llmcompressor", "GPTQ", [["gptq", {"scheme": "NVFP4"}]], "bfloat16"),
    "nvfp4": Case("NVFP4", "ours", "GPTQ", [quantized(NVFP4)], "bfloat16"),
}  # of each scheme the first is llm-compressor's own recipe: what ours is divided by


def child(python: str, kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """What a child says."""
    from quantize_vs_peers import environment

    return asked([python, str(HERE / "served_child.py"), kind], job, environment(1))


class Bench:
    """The windows of both texts, and a folder to work in."""

    def __init__(self, options: argparse.Namespace, work: Path):
        import torch
        from variants import texts

        from compress.model.model import open_model

        self.options, self.work = options, work
        source = open_model(str(options.model))
        self.stems = [site.stem for site in source.state.graph.linear]
        for name, text, count in (
            ("calibration", options.calibration, options.sequences),
            ("judged", options.evaluation, options.judged),
        ):
            torch.save(texts(options, source, text, count).ids, work / f"{name}.pt")

    def written(self, name: str, case: Case) -> dict[str, Any]:
        """Seconds, peak and bytes of a case, whose folder is there afterwards; measured once in a work folder."""
        from allocate_child import stored_bytes

        file = self.work / f"{name}.json"
        if not file.exists():
            said = self._ours(name, case) if case.tool == "ours" else self._theirs(name, case)
            file.write_text(json.dumps({**said, "bytes": stored_bytes(self.folder(name, case), self.stems)}, indent=1), "utf-8")
        return json.loads(file.read_text("utf-8"))  # type: ignore[no-any-return]

    def folder(self, name: str, case: Case) -> Path:
        return self.work / name / "run" / "compressed_tensors" if case.tool == "ours" else self.work / name

    def _ours(self, name: str, case: Case) -> dict[str, Any]:
        from variants import recipe_of

        place = self.work / name
        place.mkdir(exist_ok=True)
        content = recipe_of(self.options, case.steps, place)
        del content["data"]["evaluation"]
        for file, exports in (("recipe", []), ("exporting", [{"compressed_tensors": {}}])):
            (place / f"{file}.json").write_text(json.dumps({**content, "export": exports}), "utf-8")
        return child(sys.executable, "ours", {file: str(place / f"{file}.json") for file in ("recipe", "exporting")})

    def _theirs(self, name: str, case: Case) -> dict[str, Any]:
        job = {"model": str(self.options.model.resolve()), "ids": str(self.work / "calibration.pt"), "steps": case.steps,
               "out": str(self.work / name)}  # fmt: skip
        return child(self.options.llmcompressor_python, "llmcompressor", job)

    def judged(self, cases: dict[str, Case], dtype: str) -> dict[str, float]:
        """KL of the folders that are judged in a dtype."""
        folders = {name: str(self.folder(name, case)) for name, case in cases.items() if case.dtype == dtype}
        job = {
            "model": str(self.options.model.resolve()),
            "ids": str(self.work / "judged.pt"),
            "dtype": dtype,
            "folders": folders,
        }
        return child(sys.executable, "judge", job) if folders else {}


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each case."""
    from report import head, line

    with tempfile.TemporaryDirectory() as place:
        work = (options.work or Path(place)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work)
        cases = {name: case for name, case in CASES.items() if not options.only or name in options.only}
        said = {}
        for name, case in cases.items():
            said[name] = bench.written(name, case)
            print(f"{name}: {said[name]['cpu_s']:.0f} CPU s", file=sys.stderr, flush=True)
        scores = {dtype: bench.judged(cases, dtype) for dtype in ("float32", "bfloat16")}
    found = head("folder", "bytes of the layers", "KL", "share", "CPU s", "share", "peak, MB")
    first: dict[str, tuple[float, float]] = {}
    for name, case in cases.items():
        kl, cpu = scores[case.dtype][name], said[name]["cpu_s"]
        base = first.setdefault(case.scheme, (kl, cpu))
        shares = [f"{x / y:.2f}" for x, y in zip((kl, cpu), base, strict=True)]
        tool = {"ours": "compress", "llmcompressor": f"llm-compressor {said[name]['version']}"}[case.tool]
        cells = [f"{case.scheme}, {tool}: {case.told}", f"{said[name]['bytes']:,}", f"{kl:.5f}", shares[0]]
        found.append(line([*cells, f"{cpu:.0f}", shares[1], f"{said[name]['peak_mb']:,.0f}"]))
    return [*found, "", READING]


READING = """
KL(original || folder), both by stock transformers in one dtype: fp32, NVFP4 in bf16. Shares are of the first row of a scheme;
below 1 is in our favour. CPU seconds are those of loading, calibrating and quantizing, imports and saving apart; ours
commit every block to disk.
""".strip()


def main() -> None:
    from variants import parser, publish

    options = parser(__doc__)
    options.add_argument(
        "--llmcompressor-python", required=True, help="the interpreter of an environment that has llm-compressor"
    )
    options.add_argument("--only", nargs="+", choices=CASES, help="some of the folders")
    options.add_argument("--work", type=Path, help="keep folders and figures here and go on from them")
    publish("served-vs-peers", "Formats that engines multiply by, beside llm-compressor", options.parse_args(), rows)


if __name__ == "__main__":
    main()
