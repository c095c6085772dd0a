"""Export in the layout of GPTQ checkpoints: what gptqmodel, vLLM and the model builder of onnxruntime-genai read.

A matrix of N outputs and K inputs, b bits, G groups, in a module M:

    M.qweight   int32 [K*b/32, N]   the codes of each output as one bit stream (see bitpack.py)
    M.qzeros    int32 [G, N*b/32]   the zero points of each group as one bit stream
    M.scales    fp16 [G, N]
    M.g_idx     int32 [K]           the group of each input, in order

The first three are the transposes of our own tensors (formats.py), and a weight is (code - zero point) * scale as there.
Where every format is symmetric, ``checkpoint_format`` is ``gptq``, and zero points are stored less one, as the first writer
of this layout did; else it is ``gptq_v2``, which stores them as they are. config.py writes and reads the config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.errors import ExportError
from compress.export.artifact import tensors as common
from compress.export.artifact.exporter import (
    Exporter,
    Files,
    Job,
    Proof,
    headless,
    refuse_free_shapes,
    refuse_packed_table,
    refuse_sparse,
    unpacked_bytes,
    way_for,
)
from compress.export.artifact.place import carry_over
from compress.export.artifact.proof import prove, proven
from compress.export.artifact.tensors import same_tensors, write_config
from compress.export.gptq.config import config_of
from compress.export.gptq.engines import GENAI, GPTQMODEL, VLLM, engine, engines
from compress.export.gptq.layout import BITS, shapes, turned
from compress.export.gptq.reader import read
from compress.formats import Dense, Int, integers
from compress.model.model import Model
from compress.state import State
from compress.state.checkpoint import Layout, Spec
from compress.state.graph import Site

TOLERANCE = 1e-1  # of the largest logit: gptqmodel's 4-bit kernel for CPUs rounds inside its sums
USE = {
    GPTQMODEL: '```python\nfrom gptqmodel import GPTQModel\nmodel = GPTQModel.load("THIS_FOLDER")\n```',
    VLLM: "```bash\nvllm serve THIS_FOLDER\n```",
    GENAI: "```bash\npython -m onnxruntime_genai.models.builder -i THIS_FOLDER -o ONNX_FOLDER -p int4 -e cpu "
           "--extra_options nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather\n```",
}  # fmt: skip


class Gptq(Exporter):
    """A safetensors checkpoint in the GPTQ layout, for gptqmodel, vLLM and onnxruntime-genai."""

    name: ClassVar[str] = "gptq"

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")

    def check(self, state: State) -> None:
        refuse_free_shapes("gptq", state)
        refuse_sparse("gptq", state)
        formats = state.formats
        if headless(state.graph):
            raise ExportError("gptq: the model predicts no tokens, and engines of this layout load such models with a head only; "
                              "export compressed_tensors or native instead")  # fmt: skip
        if any(site.expert is not None for site in state.graph):
            raise ExportError(f"gptq: '{state.graph.family}' has experts, which engines of this layout read each in its own way; "
                              "export compressed_tensors or native instead")  # fmt: skip
        for name, fmt in formats.items():
            refuse_packed_table("gptq", state, name, fmt)
            way_for(CHECKS, "gptq", name, fmt)(state.graph[name], fmt)
        if not integers(formats):
            raise ExportError("gptq: no matrix is to become integers; add a 'quantize' pass, or leave this exporter out")

    def remarks(self, state: State) -> list[str]:
        known = engines(state)
        taken = [engine for engine, why in known.items() if not why]
        return [f"gptq loads in {', '.join(taken) or 'no engine'}; scales become fp16, which is exact or an error",
                *(f"gptq: not in {engine}: {why}" for engine, why in known.items() if why)]  # fmt: skip

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of(list(specs(state)), self.shard_bytes)

    def proof_bytes(self, state: State, layout: Files) -> int:
        """transformers unpacks every matrix."""
        return unpacked_bytes(state)

    def write(self, job: Job, folder: Path) -> None:
        self.check(job.state)
        self.layout(job.model, job.state).write(folder, tensors(job.state))
        write_config(job, folder, config_of(job.state.graph, job.state.formats))
        carry_over(job.model.folder, folder, job.state.vocabulary)
        taken = [engine for engine, why in engines(job.state).items() if not why]
        ways = [USE[engine] for engine in taken if engine in USE]
        facts = {"library": "transformers", "tag": "gptq", "loads in": ", ".join(taken) or "compress", "use": "\n\n".join(ways)}
        (folder / "README.md").write_text(job.card(facts), encoding="utf-8")

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        return proven(job, written, lambda: prove(job, engine(folder, job.state, job.device), TOLERANCE))


def check_integers(site: Site, fmt: Int) -> None:
    """ExportError where a matrix has no form in this layout."""
    if fmt.bits not in BITS:
        raise ExportError(f"gptq: '{site.name}' has {fmt}, and engines of this layout read {', '.join(map(str, BITS))} bits; pin "
                          "it to one of these, or export compressed_tensors")  # fmt: skip
    if site.aliases:
        modules = ", ".join((site.module, *site.aliases))
        raise ExportError(f"gptq: '{site.name}' is one matrix for {1 + len(site.aliases)} modules ({modules}), which engines "
                          "load one by one; pin it to bf16")  # fmt: skip
    for side, what in zip(site.shape, ("outputs", "inputs"), strict=True):
        if side * fmt.bits % 32:
            fits = [f"{bits} bits" for bits in BITS if not any(length * bits % 32 for length in site.shape)]
            raise ExportError(f"gptq: '{site.name}' has {side} {what}, and their {fmt.bits}-bit codes do not fill words of 32 "
                              f"bits; pin it to {' or '.join([*fits[-1:], 'bf16'])}, or export compressed_tensors")  # fmt: skip


CHECKS: Mapping[type, Callable[[Site, Any], None]] = {Dense: lambda site, fmt: None, Int: check_integers}


def specs(state: State) -> Iterator[Spec]:
    """Every tensor that is written, in the source's order."""
    packed = integers(state.formats)
    for spec, site, suffix in state.entries():
        fmt = packed.get(site.name) if site else None
        if site is None or fmt is None:
            yield spec
        elif suffix == "weight_packed":
            yield from (Spec(f"{site.stem}.{s}", *kind) for s, kind in shapes(site, fmt).items())


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `specs`, one matrix at a time."""
    packed, held = integers(state.formats), dict[str, torch.Tensor]()
    v1 = all(fmt.symmetric for fmt in packed.values())
    for (_, site, suffix), (name, tensor) in zip(state.entries(), common.tensors(state), strict=True):
        fmt = packed.get(site.name) if site else None
        if site is None or fmt is None:
            yield name, tensor
            continue
        held[suffix] = tensor
        if held.keys() == fmt.tensors(site.shape).keys():
            yield from ((f"{site.stem}.{s}", t) for s, t in turned(site, fmt, held, v1).items())
            held = {}
