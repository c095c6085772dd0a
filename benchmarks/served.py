"""What formats cost that engines multiply by: uniform ones, mixes of the bytes of uniform NVFP4, a cache of 8 bits; in one run.

python benchmarks/served.py --model MODEL --calibration TEXT --evaluation TEXT [--bos] [--only NAME ...] [--save DIR]
"""

from __future__ import annotations

import argparse
from typing import Any

from report import line
from variants import outcome, parser, publish

from compress import evaluate

FP8, NVFP4 = "fp8:channel/fp8:token", "nvfp4/nvfp4"
WEIGHTS = ["nvfp4", "fp8:channel", "mxfp4", "int2:g64", "int3:g64", "int3:g128", "int4:g128", "int5:g128", "int6:g128"]
BOTH = [NVFP4, FP8, "mxfp4/mxfp4", "int8:channel/int8:token", "int4:g128/int8:token", "int3:g64/int8:token"]
FLOATS = [NVFP4, FP8, "mxfp4/mxfp4", "mxfp8/mxfp8"]  # no integers


def uniform(fmt: str, **more: Any) -> list[dict[str, Any]]:
    return [{"quantize": {"format": fmt, **more}}]


def mix(formats: list[str], bits: str, engine: str) -> list[dict[str, Any]]:
    """At no more bits than NVFP4 takes, which has a few bytes for each matrix besides."""
    return [{"allocate": {"budget": bits, "formats": formats, "engine": engine}}, {"quantize": {}}]


CASES: dict[str, tuple[str, list[dict[str, Any]], str | None]] = {
    "int8": ("int8:channel/int8:token", uniform("int8:channel/int8:token"), None),
    "int8-smooth": ("the same behind smooth", [{"smooth": {}}, *uniform("int8:channel/int8:token")], "int8"),
    "fp8-rtn": (f"{FP8}, rtn", uniform(FP8, method="rtn"), None),
    "fp8": (FP8, uniform(FP8), "fp8-rtn"),
    "fp8-cache": (f"{FP8}, cache of fp8", [*uniform(FP8), {"kv_cache": {}}], "fp8"),
    "nvfp4-rtn": ("nvfp4, rounded", uniform("nvfp4", method="rtn", clip="minmax"), None),
    "nvfp4-rtn-mse": ("nvfp4, rounded, scales searched", uniform("nvfp4", method="rtn"), "nvfp4-rtn"),
    "nvfp4-minmax": ("nvfp4, GPTQ, scales not searched", uniform("nvfp4", clip="minmax"), "nvfp4-rtn"),
    "nvfp4": ("nvfp4", uniform("nvfp4"), "nvfp4-rtn"),
    "mix": ("mix of weights", mix(WEIGHTS, "4.5 bits", "vllm:sm80"), "nvfp4"),
    "nvfp4-inputs-rtn": (f"{NVFP4}, rounded", uniform(NVFP4, method="rtn", clip="minmax"), None),
    "nvfp4-inputs": (NVFP4, uniform(NVFP4), "nvfp4-inputs-rtn"),
    "mix-inputs": ("mix of weights and inputs", mix(BOTH, "4.5 bits", "vllm:sm100"), "nvfp4-inputs"),
    "mix-floats": ("mix of floats, 6 bits", mix(FLOATS, "6 bits", "vllm:sm100"), "nvfp4-inputs"),
}  # name -> what it is, its passes, and what its KL is divided by


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each case."""
    found = [line(["recipe", "bits a weight", "KL", "share of"]), line(["---"] * 4)]
    known: dict[str, float] = {}
    for name, (told, passes, beside) in CASES.items():
        if options.only and name not in options.only:
            continue
        done = outcome(options, passes)
        known[name] = done.scores["compressed"]["kl"]
        share = f"{known[name] / known[beside]:.2f} of {CASES[beside][0]}" if beside in known else ""  # type: ignore[index]
        bits = evaluate.sizes(done.state, 0).linear_bits
        found.append(line([told, f"{bits:.3f}", f"{known[name]:.5f}", share]))
        print(found[-1], flush=True)
    mixed = [options.only or list(CASES), WEIGHTS, BOTH]
    return [
        *found,
        "",
        *(f"{what}: {', '.join(of)}" for what, of in zip(("Cases", "Mix of weights", "of both"), mixed, strict=True)),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CASES, help="some of the cases")
    publish("served", "Formats that engines multiply by", options.parse_args(), rows)


if __name__ == "__main__":
    main()
