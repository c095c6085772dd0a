"""Low-rank factors as a PEFT LoRA adapter, in the folder `adapter/` beside the quantized matrices that they correct.

PEFT adds B A x to what a module gives, scaled by alpha / r. Ours is W = Q + B A, so alpha is r for every module. Modules are
named in full. PEFT also takes a name for every module that ends with it, which a full path does to none but itself; in the
patterns of ranks, which are regular expressions, it is anchored.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from compress.errors import CompressError, ExportError, ModelError, first_line, one_line
from compress.export.artifact.config import beyond_lora, lora_ranks
from compress.export.artifact.engines import EngineError
from compress.export.artifact.files import optional
from compress.export.artifact.tensors import Placed
from compress.formats import Dense, LowRank, formats
from compress.state import State, Stored
from compress.state.checkpoint import Checkpoint, File, Spec
from compress.state.graph import Site
from compress.state.overlay import Overlay
from compress.state.state import Part

FOLDER = "adapter"
WEIGHTS = f"{FOLDER}/adapter_model.safetensors"
CONFIG = f"{FOLDER}/adapter_config.json"
SUFFIXES = ("lora_A.weight", "lora_B.weight")


def corrected(state: State) -> dict[str, LowRank]:
    """The sites that have factors, with their formats."""
    return {name: fmt for name, fmt in state.formats.items() if isinstance(fmt, LowRank)}


def base_of(state: State) -> State:
    """The state as it is without factors: every matrix in the format of its quantized part."""
    return replace(state, codes={n: replace(c, format=formats.base_of(c.format)) for n, c in state.codes.items()})


def check(state: State) -> None:
    """ExportError where PEFT has no form for a site's factors."""
    found = corrected(state)
    for name, fmt in found.items():
        if not isinstance(fmt.factors, Dense):
            raise ExportError(f"compressed_tensors: '{name}' has {fmt}, and a PEFT adapter keeps factors in 16 or 32 bits; write "
                              f"{fmt.base}+r{fmt.rank}, or export native instead")  # fmt: skip
        if state.graph[name].expert is not None:
            raise ExportError(f"compressed_tensors: '{name}' has {fmt}, and PEFT has no adapter for single experts; pin it to "
                              f"{fmt.base}, or export native instead")  # fmt: skip
    flipped = {state.graph[name].transposed for name in found}
    if len(flipped) > 1:
        raise ExportError("compressed_tensors: a PEFT adapter is for Conv1D modules or for Linear modules, and the low-rank "
                          "sites are of both; pin those outside the blocks to formats without a rank")  # fmt: skip


# --- what is written -------------------------------------------------------------------------------------------------


def tensor_name(site: Site, suffix: str) -> str:
    return f"base_model.model.{site.module}.{suffix}"


def weights_file(state: State) -> File:
    """The adapter's weights as they will be, in the graph's order."""
    specs = []
    for name, fmt in corrected(state).items():
        kinds = fmt.tensors(state.graph[name].shape)
        specs += [Spec(tensor_name(state.graph[name], s), *kinds[s]) for s in SUFFIXES]
    return File(WEIGHTS, tuple(specs))


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors, one matrix at a time."""
    for name in corrected(state):
        held = state.codes[name].load().tensors
        yield from ((tensor_name(state.graph[name], s), held[s]) for s in SUFFIXES)


def write_config(state: State, folder: Path) -> None:
    """adapter_config.json, as PEFT 0.21 reads it."""
    found = {state.graph[name]: fmt.rank for name, fmt in corrected(state).items()}
    most = max(found.values())
    ranks = {f"^{re.escape(site.module)}": rank for site, rank in found.items() if rank != most}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if state.graph.causal else None, "base_model_name_or_path": "..",
              "inference_mode": True, "r": most, "lora_alpha": most, "rank_pattern": ranks, "alpha_pattern": ranks,
              "target_modules": [site.module for site in found], "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": any(site.transposed for site in found), "init_lora_weights": True, "use_rslora": False,
              "use_dora": False, "modules_to_save": None}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- reading it back -------------------------------------------------------------------------------------------------


def present(folder: Path) -> bool:
    """Whether an adapter of ours lies in an artifact."""
    return (folder / CONFIG).exists() or (folder / WEIGHTS).exists()


def read(folder: Path, state: State) -> State:
    """The state of the quantized matrices with their factors; ModelError for an adapter that does not belong to them."""
    config = optional(folder / CONFIG)
    checkpoint = Checkpoint(folder, [folder / WEIGHTS])
    try:
        beyond = beyond_lora(config)
        ranks = {} if beyond else lora_ranks(config)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ModelError(f"{folder / CONFIG}: is broken ({type(e).__name__}: {first_line(e)})") from None
    if beyond:
        raise ModelError(f"{folder / CONFIG}: only plain LoRA is read, not {one_line(beyond)}")
    sites = {s.module: s for s in state.graph if s.expert is None}
    stored: dict[str, Stored] = {}
    for module, rank in ranks.items():
        site = sites.get(module)
        base = state.codes.get(site.name) if site else None
        if site is None or not isinstance(base, Placed):
            raise ModelError(f"{folder / CONFIG}: '{module}' is no quantized matrix of this model; it is another's adapter")
        stored[site.name] = placed(site, base, rank, checkpoint)
    held = {tensor_name(state.graph[n], s) for n in stored for s in SUFFIXES}
    extra = next((n for n, path in checkpoint.files.items() if path == folder / WEIGHTS and n not in held), None)
    if extra:
        raise ModelError(f"{folder / WEIGHTS}: holds '{extra}', which adapter_config.json does not name")
    return replace(state, dense=Overlay(checkpoint, state.dense.names)).with_part(Part(stored))


def placed(site: Site, base: Placed, rank: int, checkpoint: Checkpoint) -> Placed:
    """A site with its quantized part where it was, and its factors in the adapter."""
    names = {s: tensor_name(site, s) for s in SUFFIXES}
    spec = checkpoint.specs.get(names[SUFFIXES[0]])
    try:
        # anything that is no quantized format, or no float, LowRank and Dense themselves refuse
        fmt = LowRank(base.format, rank, Dense(spec.dtype if spec else torch.bfloat16))  # type: ignore[arg-type]
        fmt.check(site.shape)
    except CompressError as e:
        raise ModelError(f"{checkpoint.folder / WEIGHTS}: '{site.module}': {e}") from None
    return Placed.of(site, fmt, checkpoint, {**base.names, **names})


# --- PEFT itself -----------------------------------------------------------------------------------------------------


def installed() -> bool:
    return find_spec("peft") is not None


def apply(model: nn.Module, folder: Path, sites: int) -> nn.Module:
    """A loaded model with the adapter on; EngineError where PEFT fails, or corrects another number of modules.

    Stock transformers unpacks the matrices in the first forward pass, and PEFT asks modules for them, so one goes before.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
            found: nn.Module = peft.PeftModel.from_pretrained(model, folder / FOLDER).eval()
    except Exception as e:  # an adapter on packed modules is a path that few versions have tried
        raise EngineError(f"PEFT fails on the adapter ({first_line(e)})") from e
    count = sum(isinstance(m, LoraLayer) for m in found.modules())
    if count != sites:
        raise EngineError(f"PEFT corrects {count} modules, not {sites}")
    return found
