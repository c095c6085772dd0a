"""What engines make of small floats and of rounded inputs: which they take, on what hardware, and what the user should know.

As of vLLM 0.32, compressed-tensors 0.20 and transformers 5.23. vLLM joins q, k, v and gate, up into one matrix each and takes one
global scale for it, the largest, whether they differ or not: they are one by construction here (`Float.bound`), which
`check_shared` makes sure of before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compress.errors import ExportError
from compress.export.artifact.schemes import Scheme
from compress.formats import Float, Format, Int, Served, weight_of
from compress.state import State
from compress.state.graph import Site

MULTIPLE = 16  # of inputs and outputs that the kernels for small floats want
SCALES = ("weight_global_scale", "input_global_scale")


def schemes(formats: Mapping[str, Format]) -> dict[str, Scheme]:
    """Those of some sites' formats that have a group in the config."""
    return {name: fmt for name, fmt in formats.items() if isinstance(fmt, Int | Float | Served)}


def check(site: Site, fmt: Float | Served) -> None:
    """ExportError for a matrix that no engine of this layout takes in a format."""
    if site.expert is not None:
        raise ExportError(f"compressed_tensors: '{site.name}' has {fmt}, and how engines join experts in such formats is not "
                          "tried here; pin experts to int formats, or export native instead")  # fmt: skip
    if site.block is None:
        raise ExportError(f"compressed_tensors: '{site.name}' has {fmt}, and engines take only int formats outside the blocks; "
                          "pin it to int8:channel or bf16")  # fmt: skip
    if isinstance(weight_of(fmt), Float) and any(n % MULTIPLE for n in site.shape):
        raise ExportError(f"compressed_tensors: '{site.name}' has {fmt} and {site.shape[0]} x {site.shape[1]} weights, and "
                          f"kernels for it want multiples of {MULTIPLE}; pin it to int8:channel or bf16")  # fmt: skip


def fmt_of(fmt: Format) -> str:
    """The text of the stored half."""
    return str(weight_of(fmt))


def check_shared(state: State) -> None:
    """ExportError where matrices that engines join have global scales that differ."""
    for group in state.graph.fused():
        held = [state.codes[s.name].load().tensors for s in group if s.name in state.codes]
        for suffix in SCALES:
            if len({float(tensors[suffix]) for tensors in held if suffix in tensors}) > 1:
                names = ", ".join(s.name for s in group)
                raise ExportError(f"compressed_tensors: {names} have different values of '{suffix}', and vLLM takes one for all; "
                                  "quantize them in one step")  # fmt: skip


def in_bf16(state: State) -> bool:
    """Whether stock transformers can load an artifact in bf16 only, and the state is of another dtype."""
    return state.dtype != torch.bfloat16 and any(fmt_of(f) in ("nvfp4", "mxfp4", "mxfp8") for f in state.formats.values())


def remarks(state: State) -> list[str]:
    """What to know of the engines of each scheme, before the run."""
    texts = {str(f) for f in state.formats.values()}
    weights = {fmt_of(f) for f in state.formats.values()}
    said = []
    if in_bf16(state):
        said.append("stock transformers unpacks nvfp4, mxfp4 and mxfp8 to bf16 only: load it with dtype=torch.bfloat16")
    if "int8:channel/int8:token" in texts:
        said.append("on x86 CPUs without VNNI, vLLM's integer kernel adds pairs of products in 16 bits, which overflow: its "
                    "numbers are not those of this run; its kernels for GPUs are exact")  # fmt: skip
    if any(t.startswith("int4:") and t.endswith("/fp8:token") for t in texts):
        said.append("vLLM serves int4 weights with fp8 inputs on GPUs of capability 9.0 alone, in groups of 128")
    if any("/nvfp4" in t or "/mxfp4" in t for t in texts):
        said.append("inputs of four bits are rounded on GPUs from Blackwell (capability 10.0) on; older ones multiply by the "
                    "inputs as they are, so figures measured there are not those of this run")  # fmt: skip
    if weights & {"nvfp4", "mxfp4", "mxfp8"}:
        said.append("vLLM has no CPU kernel for nvfp4, mxfp4 and mxfp8")
    return [f"compressed_tensors: {line}" for line in said]
