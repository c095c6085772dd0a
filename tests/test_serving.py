"""What engines are told, and what they would make of an artifact: their rules, rounded caches, serve.json, and the check of
folders for which there is no kernel here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.formats import parse
from compress.formats.engines import AS_MEASURED, ENGINES, WEIGHTS_ONLY, by_engine, made_of, refusal
from tests.cooking import refused

# --- which engine runs what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "made"), [
    ("int4:g128", "rrrrrr"), ("int3:g64", "rrrrr-"), ("int8:channel/int8:token", "rrrrrr"), ("int4:g64/int8:token", "rrrrr-"),
    ("int4:g128/fp8:token", "---r--"), ("int4:g64/fp8:token", "------"), ("fp8:channel/fp8:token", "ssrrrr"),
    ("fp8:channel", "rrrrr-"), ("nvfp4/nvfp4", "ssssr-"), ("nvfp4", "rrrrr-"), ("mxfp4/mxfp4", "-sssr-"), ("mxfp4", "-rrr--"),
    ("mxfp8/mxfp8", "ssssr-"), ("mxfp8", "------"), ("int8:g64/int8:token", "------"), ("nf4:g64", "------"), ("bf16", "rrrrrr"),
    ("int4:g64+r8", "rrrrrr"),
])  # fmt: skip
def test_the_table_of_engines(text: str, made: str) -> None:
    """r: as measured, s: weights only, -: not at all; engines in the order of the table."""
    fmt = parse(text)
    found = "".join({AS_MEASURED: "r", WEIGHTS_ONLY: "s"}.get(made_of(engine, fmt), "-") for engine in ENGINES)
    assert found == made
    for engine, letter in zip(ENGINES, made, strict=True):
        assert (refusal(engine, fmt) is None) == (letter == "r")


def test_of_several_formats_the_worst_counts() -> None:
    found = by_engine(map(parse, ["nvfp4/nvfp4", "int8:channel/int8:token", "bf16"]))
    assert found["vllm:sm100"] == AS_MEASURED
    assert found["vllm:sm90"] == WEIGHTS_ONLY
    assert found["vllm:cpu"].startswith("nvfp4/nvfp4: ")


@pytest.mark.parametrize(("engine", "options", "says"), [
    ("vllm:sm90", {"formats": ["nvfp4", "nvfp4/nvfp4"]}, "nvfp4/nvfp4: vllm:sm90 takes its inputs as they are .* use nvfp4$"),
    ("vllm:sm100", {"formats": ["int4:g64", "mxfp4"]}, "mxfp4: vllm:sm100 does not run it: vLLM rounds .* use mxfp4/mxfp4"),
    ("vllm:cpu", {"formats": ["int4:g64"], "pins": {"*.o": "int8:g64"}}, "int8:g64: vllm:cpu does not run it: .* 4 bits alone"),
    ("vllm:sm70", {}, "engine"),
])  # fmt: skip
def test_allocate_refuses_by_name_what_its_engine_does_not_serve(
    family: Any, text: Path, tmp_path: Path, engine: str, options: dict[str, Any], says: str
) -> None:
    passes = [{"allocate": {"budget": "6 bits", "engine": engine, **options}}, {"quantize": {}}]
    refused(tmp_path, family("llama"), text, passes, says)
