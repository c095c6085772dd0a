"""serve.json: how to serve a compressed-tensors folder, for whoever starts the engine, a person or a script.

    schema         1
    quantization   what `--quantization` would say; engines find it in config.json by themselves
    vllm.flags     of `vllm serve`: the cache's dtype, layers whose cache stays as it is, the adapter
    vllm.engines   engine (formats/engines.py) -> "as measured", "weights only, inputs as they are", or why it does not run it
    transformers   dtype to load it in, where there is only one
    notes          what to know besides

The flags are those under which an engine computes what the run measured. So without `kv_cache` in the recipe there is no flag for
a smaller cache: vLLM would take `--kv-cache-dtype fp8` all the same, with scales of 1, and nobody has measured what it costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.export.compressed_tensors import adapter, serving
from compress.export.compressed_tensors.cache import SERVE, SKIP
from compress.formats.caches import CACHE
from compress.formats.engines import by_engine
from compress.model.caching import scales_of
from compress.state import State

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank may be


def written(state: State) -> dict[str, Any]:
    """The content of the file."""
    found: dict[str, Any] = {"schema": 1}
    if state.formats or CACHE in state.serving:
        found["quantization"] = "compressed-tensors"
    found["vllm"] = {"flags": flags(state), "engines": by_engine(state.formats.values())}
    if serving.in_bf16(state):
        found["transformers"] = {"dtype": "bfloat16"}
    return found | {"notes": [line.removeprefix("compressed_tensors: ") for line in serving.remarks(state)]}


def flags(state: State) -> list[str]:
    """What `vllm serve FOLDER` is to be given, to compute what was measured."""
    found, scales = [], scales_of(state)
    if scales:
        found += ["--kv-cache-dtype", "fp8"]
        if any(not each["rounded"] for each in scales.values()):
            found += [SKIP, "sliding_window"]
    if corrected := adapter.corrected(state):
        most = max(fmt.rank for fmt in corrected.values())
        rank = next((r for r in RANKS if r >= most), most)
        found += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"corrected=THIS_FOLDER/{adapter.FOLDER}"]
    return found


def write(state: State, folder: Path) -> None:
    (folder / SERVE).write_text(json.dumps(written(state), indent=1) + "\n", encoding="utf-8")
