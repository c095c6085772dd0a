"""What reads a GPTQ checkpoint, as tried with gptqmodel 7.6, transformers 5.23, vLLM 0.32 and onnxruntime-genai 0.18."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import transformers

from compress.errors import first_line
from compress.export.artifact.engines import LOCAL, Engine, EngineError, Transformers
from compress.formats import Int, integers
from compress.model.skeleton import model_class
from compress.state import State
from compress.state.graph import FUSED_ROLES

GPTQMODEL, TRANSFORMERS = "gptqmodel >= 7", "transformers (with gptqmodel and optimum)"
VLLM, GENAI = "vLLM >= 0.32", "the model builder of onnxruntime-genai >= 0.18"
GROUPS = (None, 16, 32, 64, 128, 256)
FAMILIES = {  # that gptqmodel by itself does not load as transformers does
    "phi3": "it looks for gate_proj and up_proj, which are one matrix in 'phi3'",
    "gpt_neox": "it does not find the head of 'gpt_neox', and goes on with random numbers",
}


def engines(state: State) -> dict[str, str]:
    """Every engine, with why it does not take the foreseen artifact; an empty text where it does."""
    formats = integers(state.formats)
    groups = odd_groups(formats)
    return {GPTQMODEL: groups or FAMILIES.get(state.graph.family, ""), TRANSFORMERS: groups or mixture(state, formats),
            VLLM: vllm_obstacle(state, formats), GENAI: genai_obstacle(state, formats)}  # fmt: skip


def odd_groups(formats: dict[str, Int]) -> str:
    odd = next((f for f in formats.values() if f.group not in GROUPS), None)
    return f"{odd} has groups that are not 16, 32, 64, 128 or 256" if odd else ""


def mixture(state: State, formats: dict[str, Int]) -> str:
    """Why transformers, which passes over `dynamic`, does not load it."""
    outside = next((name for name in formats if state.graph[name].block is None), None)
    if outside:
        return f"'{outside}' is quantized, and it reads matrices in blocks alone"
    if any(site.transposed for site in state.graph):
        return f"'{state.graph.family}' keeps its matrices in Conv1D modules, whose code fails on packed ones"
    kinds = {str(formats.get(site.name, "as it is")) for site in state.graph.linear}
    return f"it takes one format for all matrices, and here are {', '.join(sorted(kinds))}" if len(kinds) > 1 else ""


def vllm_obstacle(state: State, formats: dict[str, Int]) -> str:
    odd = next((f for f in formats.values() if f.bits not in (4, 8) or not f.symmetric), None)
    return f"it takes symmetric formats of 4 and 8 bits, not {odd}" if odd else split(state, formats, FUSED_ROLES)


def genai_obstacle(state: State, formats: dict[str, Int]) -> str:
    """An asymmetric checkpoint it would read wrongly: it takes every zero point for one that is stored less one."""
    for fmt in formats.values():
        if fmt.bits == 3 or not fmt.symmetric or fmt.group not in GROUPS[1:]:
            return f"it takes symmetric formats of 2, 4 and 8 bits in groups of 16, 32, 64, 128 or 256, not {fmt}"
    left = next((site.name for site in state.graph.linear if site.name not in formats), next(iter(state.graph.left), None))
    return f"it takes no matrix in a block as it is, and '{left}' is" if left else split(state, formats, FUSED_ROLES[:1])


def split(state: State, formats: dict[str, Int], joined: tuple[tuple[str, ...], ...]) -> str:
    """Which matrices of those that an engine joins, by role, have different formats."""
    for group in state.graph.fused():
        kinds = {str(formats.get(site.name, "as it is")) for site in group}
        roles = tuple(site.role for site in group)
        if len(kinds) > 1 and roles in joined:
            return f"it joins {','.join(roles)} of a block, and in block {group[0].block} their formats differ"
    return ""


def engine(folder: Path, state: State, device: str) -> Engine:
    """transformers, through gptqmodel's kernels; EngineError where these are not installed, or do not take the artifact."""
    if why := engines(state)[TRANSFORMERS]:
        raise EngineError(f"transformers does not load it: {why}")
    missing = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if missing:
        raise EngineError(f"transformers needs {' and '.join(missing)} for it (pip install {' '.join(missing)})")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            model = model_class(config).from_pretrained(folder, dtype=state.dtype, device_map=device, **LOCAL)
    except Exception as e:  # gptqmodel raises whatever its kernels raise
        raise EngineError(f"transformers' {model_class(config).__name__} fails on it ({first_line(e)})") from e
    return Transformers(model, "transformers with gptqmodel")
