"""Export as ONNX: a graph that onnxruntime runs with packed weights, and a file of weights beside it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import psutil
import torch
from pydantic import Field

from compress.errors import ExportError, FormatError
from compress.export.artifact import proof
from compress.export.artifact.engines import EngineError
from compress.export.artifact.exporter import (
    Exporter,
    Files,
    Job,
    Proof,
    headless,
    refuse_blocks,
    refuse_ours,
    refuse_sparse,
    state_bytes,
)
from compress.export.artifact.place import carry_over
from compress.export.artifact.tensors import same_site, write_config
from compress.export.onnx import datafile
from compress.export.onnx.datafile import GRAPH, METHOD, VERSION, DataLayout
from compress.export.onnx.encode import NBits, slots
from compress.export.onnx.words import describe, describe_factors, describe_table, engines, use, warnings
from compress.formats import Factored, Float, Format, Int, Served, numbers_of
from compress.model.model import Model
from compress.state import State
from compress.state.checkpoint import tensor_bytes
from compress.state.graph import Site

UNTRACED = {"falcon": "its heads share one key, which torch.onnx does not know in its Attention",
            "modernbert": "its tables of rotary embeddings are not as onnxruntime wants them"}  # fmt: skip
EXACT = {"fp32": 1e-3, "fp16": 3e-2}  # of the largest logit, where activations are not rounded
LOOSE = 0.2  # where they are, to 8 bits in front of every matrix: kernels do that each in their own way
FLIPPED = 0.05  # where they are rounded by the format: in one way, but a sum's last bit may move the next code
WIDE = 1024  # outputs, and groups of inputs, of a matrix large enough that bytes which are not full are nothing
GRAPH_BYTES = (5000, 6500)  # of the graph: of any, and for each block; of a Llama, others differ little


class Onnx(Exporter):
    """A graph with packed matrices for onnxruntime, on CPU and, with 4 and 8 bits, on CUDA."""

    name: ClassVar[str] = "onnx"

    kv_cache: bool = Field(True, description="keys and values of past tokens go in and out, so that text is generated fast")
    dtype: Literal["fp32", "fp16"] = Field("fp32", description="what the graph computes in")
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(4, description="of integers: 4 rounds activations to 8 bits, 1 does not")

    def check(self, state: State) -> None:
        refuse(state)
        refuse_sparse("onnx", state)
        for name, fmt in state.formats.items():
            refuse_ours("onnx", name, fmt)
            refuse_blocks("onnx", name, fmt)
            refuse_served(name, fmt)
            base, shape = numbers_of(fmt), state.graph[name].shape
            try:
                for _, inputs in fmt.factor_shapes(shape).values() if isinstance(fmt, Factored) else (shape,):
                    if isinstance(base, Int):
                        NBits.of(base, inputs)
            except FormatError as e:
                raise ExportError(f"onnx cannot hold '{name}': {e}; use g32, g64 or g128") from None

    def remarks(self, state: State) -> list[str]:
        kinds: dict[Format, list[Site]] = {}
        formats, ranks = state.formats, {n: f for n, f in state.formats.items() if isinstance(f, Factored)}
        for name, fmt in formats.items():
            if state.graph[name].role != "embed" and name not in ranks:
                kinds.setdefault(fmt, []).append(state.graph[name])
        graph = GRAPH_BYTES[0] + len(state.graph.blocks) * GRAPH_BYTES[1]
        size = f"the graph adds about {graph // 1000:,} kB to the size above, and takes about 2 seconds a block to make"
        said = [describe(fmt, sites, self.accuracy_level) for fmt, sites in kinds.items()]
        said += describe_factors([(state.graph[n], f) for n, f in ranks.items()], self.accuracy_level)
        said += [describe_table(fmt, state.graph[name]) for name, fmt in formats.items() if state.graph[name].role == "embed"]
        known = dict.fromkeys(formats.values())
        return [f"onnx: {text}" for text in (*said, *warnings(known, self.dtype == "fp16", state.dtype), size)]

    def grown(self, fmt: Format) -> float:
        """Of integers, whose codes lie in numbers of 2, 4 or 8 bits, and whose zeros one for each block."""
        if not isinstance(fmt, Int):
            return 0.0
        shape = (WIDE, WIDE * (fmt.group or 1))
        try:
            held = sum(slot.nbytes for slot in slots(fmt, shape, torch.bfloat16))
        except FormatError:  # groups that no block is of, which `check` refuses
            return 0.0
        return max(0.0, 8 * (held - fmt.nbytes(shape)) / prod(shape))

    def layout(self, model: Model, state: State) -> DataLayout:
        return datafile.layout(state)

    def proof_seconds(self, state: State) -> float:
        """The model is traced, and the graph made smaller by rules that look at its nodes again and again."""
        blocks = len(state.graph.blocks)
        return super().proof_seconds(state) + 4.0 + 0.5 * blocks + 0.11 * blocks**2

    def proof_bytes(self, state: State, layout: Files) -> int:
        """onnxruntime has codes as they are read, and packed anew for its kernels; what is dense in fp32, several times."""
        packed = sum(fmt.nbytes(state.graph[name].shape) for name, fmt in state.formats.items())
        dense = state_bytes(state, 1) - sum(state.graph[name].numel for name in state.formats)
        return 4 * packed + 12 * dense

    def write(self, job: Job, folder: Path) -> None:
        from compress.export.onnx import graph
        from compress.export.onnx.nodes import serialized

        self.check(job.state)
        cached = self.kv_cache and job.state.graph.causal
        made = graph.build(job.state, cached, self.dtype, self.accuracy_level)
        (folder / GRAPH).write_bytes(serialized(made))
        datafile.write(folder, datafile.layout(job.state).file, datafile.tensors(job.state))
        write_config(job, folder, quantization_config(job.state))
        carry_over(job.model.folder, folder, job.state.vocabulary)
        least = engines(job.state.formats)
        facts = {"library": "onnxruntime", "tag": "onnx", "loads in": least, "use": use(cached, job.state)}
        (folder / "README.md").write_text(job.card(facts), encoding="utf-8")

    def prove(self, job: Job, folder: Path) -> Proof:
        import onnx

        from compress.export.onnx import reader

        try:
            onnx.checker.check_model(folder / GRAPH)
        except onnx.checker.ValidationError as e:
            raise ExportError(f"onnx: its checker refuses the graph ({str(e).splitlines()[0]}); please report this") from None
        written = reader.read(folder)
        same(job.state, written)
        return proof.proven(job, written, lambda: self._run(job, folder))

    def _run(self, job: Job, folder: Path) -> Proof:
        """The proof in onnxruntime, if it fits into memory. What onnxruntime does not run is not kept: nothing else would."""
        from compress.export.onnx.session import bytes_in_memory

        needed = bytes_in_memory(job.state, 4) * 1.5  # packed anew for its kernels, beside what was read
        if needed > psutil.virtual_memory().available:
            why = f"onnxruntime would need {needed / 2**30:.1f} GiB of memory"
            return Proof(proof.OURS, 0.0, f"every tensor compared, and the graph checked; not run: {why}")
        try:
            return self._in_session(job, folder)
        except EngineError as e:
            raise ExportError(f"onnx: {e}; the artifact is not kept") from e

    def _in_session(self, job: Job, folder: Path) -> Proof:
        """Exactly first, where only the order of sums differs; then as it will run. In fp32, as the graph computes."""
        from compress.export.onnx.session import Session

        state = replace(job.state, dtype=torch.float32)
        if any(isinstance(f, Served) for f in job.state.formats.values()):
            remark = f"against the run's model in fp32, within {FLIPPED:.0%} of the largest logit, as a last bit may move a code"
            return proof.prove(job, Session(folder, job.state), FLIPPED, remark, state)
        integers = any(isinstance(numbers_of(f), Int) for f in job.state.formats.values())
        if not integers or self.accuracy_level < 2:
            return proof.prove(job, Session(folder, job.state), EXACT[self.dtype], "against the run's model in fp32", state)
        exact = proof.prove(job, Session(folder, job.state, level=1), EXACT[self.dtype], state=state)
        remark = (f"against the run's model in fp32, within {LOOSE:.0%} of the largest logit, as activations are rounded; the "
                  f"difference is {exact.difference:.2g} where they are not")  # fmt: skip
        return proof.prove(job, Session(folder, job.state), LOOSE, remark, state)


def refuse_served(name: str, fmt: Format) -> None:
    """ExportError for small floats and rounded inputs that onnxruntime has no kernels for on a CPU."""
    if isinstance(fmt, Served) and fmt.bytes_of_codes and numbers_of(fmt) == Int(8, None) and str(fmt.input) == "int8:token":
        return
    if isinstance(fmt, Served) or isinstance(numbers_of(fmt), Float):
        instead = (
            "int4:g128, whose inputs accuracy_level: 4 rounds to 8 bits" if isinstance(numbers_of(fmt), Int) else "int8:channel"
        )
        raise ExportError(f"onnx: '{name}' has {fmt}, which onnxruntime has no kernels for; use int8:channel/int8:token or "
                          f"{instead}, or export compressed_tensors or native instead")  # fmt: skip


def refuse(state: State) -> None:
    """ExportError for an architecture that cannot be traced."""
    family, reason = state.graph.family, UNTRACED.get(state.graph.family)
    if headless(state.graph):
        reason = "it predicts no tokens, and graphs of other outputs are not written"
    if state.config.get_text_config() is not state.config:
        reason = "it is a language model within another, whose towers a graph of tokens would leave out"
    if any(site.expert is not None for site in state.graph) or any(path.endswith("experts") for path in state.graph.left):
        reason = "its experts are chosen by data, token by token, which torch.onnx cannot trace"
    if reason:
        raise ExportError(f"onnx: '{family}' is left out: {reason}; export compressed_tensors or native instead")


def quantization_config(state: State) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    sites = {state.graph[name]: fmt for name, fmt in state.formats.items()}
    return {"quant_method": METHOD, "format_version": VERSION, "formats": {s.stem: str(f) for s, f in sites.items()},
            "shapes": {s.stem: list(s.shape) for s in sites}}  # fmt: skip


def same(wanted: State, written: State) -> None:
    """ExportError naming the first site, or other parameter, that is not on disk as the run has it."""
    for name, stored in wanted.codes.items():
        same_site(name, stored, written)
    kept = [s.weight for s in wanted.graph if not s.tied and s.name not in wanted.formats]
    for name in [*kept, *wanted.graph.parameters]:
        if name not in written.dense or not same_bytes(wanted.dense.read(name), written.dense.read(name)):
            raise ExportError(f"'{name}' on disk differs from the source's; please report this")


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_bytes(a) == tensor_bytes(b)
