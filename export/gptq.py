"""Export in the layout of GPTQ checkpoints: what gptqmodel, vLLM and the model builder of onnxruntime-genai read.

A matrix of N outputs and K inputs, b bits, G groups, in a module M:

    M.qweight   int32 [K*b/32, N]   the codes of each output as one bit stream (see bitpack.py)
    M.qzeros    int32 [G, N*b/32]   the zero points of each group as one bit stream
    M.scales    fp16 [G, N]
    M.g_idx     int32 [K]           the group of each input, in order

The first three are the transposes of our own tensors (formats.py), and a weight is (code - zero point) * scale as there.
Where every format is symmetric, ``checkpoint_format`` is ``gptq``, and zero points are stored less one, as the first writer
of this layout did; else it is ``gptq_v2``, which stores them as they are. gptq_config.py writes and reads the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from compress import bitpack
from compress.checkpoint import Checkpoint, Layout, Spec, weight_files
from compress.errors import ExportError, FormatError, ModelError
from compress.export import tensors as common
from compress.export.artifact import Exporter, Job, Proof, carry_over
from compress.export.gptq_config import Scheme, config_of
from compress.export.gptq_engines import GENAI, GPTQMODEL, VLLM, engine, engines
from compress.export.proof import prove, proven
from compress.export.runtime.reading import check_marks, contained, declared
from compress.export.tensors import Placed, formats_of, same_tensors, write_config
from compress.export.view import Seen, View, Viewed
from compress.formats import Dense, Int
from compress.graph import Site
from compress.model import Model, open_model
from compress.state import Fact, State

__all__ = ["READER", "Gptq", "engine", "is_artifact", "open_artifact", "read"]

READER = "our reader of GPTQ checkpoints, streamed"
BITS = (2, 3, 4, 8)
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
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
        formats = formats_of(state)
        if any(site.expert is not None for site in state.graph):
            raise ExportError(f"gptq: '{state.graph.family}' has experts, which engines of this layout read each in its own way; "
                              "export compressed_tensors or native instead")  # fmt: skip
        for name, fmt in formats.items():
            if isinstance(fmt, Int):
                check_site(state.graph[name], fmt)
            elif not isinstance(fmt, Dense):
                raise ExportError(f"gptq holds integers; '{name}' has {fmt}: export native instead, or use int formats only")
        if not any(isinstance(fmt, Int) for fmt in formats.values()):
            raise ExportError("gptq: no matrix is to become integers; add a 'quantize' pass, or leave this exporter out")

    def remarks(self, state: State) -> list[str]:
        known = engines(state)
        taken = [engine for engine, why in known.items() if not why]
        return [f"gptq loads in {', '.join(taken) or 'no engine'}; scales become fp16, which is exact or an error",
                *(f"gptq: not in {engine}: {why}" for engine, why in known.items() if why)]  # fmt: skip

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of(list(specs(state)), self.shard_bytes)

    def write(self, job: Job, folder: Path) -> None:
        self.check(job.state)
        self.layout(job.model, job.state).write(folder, tensors(job.state))
        write_config(job.model, folder, config_of(job.state.graph, formats_of(job.state)))
        carry_over(job.model.folder, folder)
        taken = [engine for engine, why in engines(job.state).items() if not why]
        ways = [USE[engine] for engine in taken if engine in USE]
        facts = {"library": "transformers", "tag": "gptq", "loads in": ", ".join(taken) or "compress", "use": "\n\n".join(ways)}
        (folder / "README.md").write_text(job.card(facts))

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        return proven(job, written, lambda: prove(job, engine(folder, job.state, job.device), TOLERANCE))


def check_site(site: Site, fmt: Int) -> None:
    """ExportError where a matrix has no form in this layout."""
    if site.role == "embed":
        raise ExportError(f"gptq: '{site.name}' has {fmt}, and engines of this layout look rows up in dense tables only; leave "
                          "it out of 'pins', or export native, onnx or gguf")  # fmt: skip
    if fmt.bits not in BITS:
        raise ExportError(f"gptq: '{site.name}' has {fmt}, and engines of this layout read {', '.join(map(str, BITS))} bits; pin "
                          "it to one of these, or export compressed_tensors")  # fmt: skip
    if site.aliases:
        modules = ", ".join((site.module, *site.aliases))
        raise ExportError(f"gptq: '{site.name}' is one matrix for {1 + len(site.aliases)} modules ({modules}), which engines "
                          "load one by one; pin it to bf16")  # fmt: skip
    for side, what in zip(site.shape, ("outputs", "inputs"), strict=True):
        if side * fmt.bits % 32:
            raise ExportError(f"gptq: '{site.name}' has {side} {what}, and their {fmt.bits}-bit codes do not fill words of 32 "
                              "bits; pin it to 8 bits or to bf16")  # fmt: skip


# --- what is written -------------------------------------------------------------------------------------------------


def shapes(site: Site, fmt: Int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of the tensors of a matrix."""
    (n, k), groups = site.shape, fmt.groups(site.shape[1])
    return {
        "qweight": (torch.int32, (bitpack.words(k, fmt.bits), n)),
        "qzeros": (torch.int32, (groups, bitpack.words(n, fmt.bits))),
        "scales": (torch.float16, (groups, n)),
        "g_idx": (torch.int32, (k,)),
    }


def specs(state: State) -> Iterator[Spec]:
    """Every tensor that is written, in the source's order."""
    formats = formats_of(state)
    for spec, site, suffix in state.entries():
        fmt = formats.get(site.name) if site else None
        if site is None or not isinstance(fmt, Int):
            yield spec
        elif suffix == "weight_packed":
            yield from (Spec(f"{site.stem}.{s}", *kind) for s, kind in shapes(site, fmt).items())


def tensors(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `specs`, one matrix at a time."""
    formats, held = formats_of(state), dict[str, torch.Tensor]()
    v1 = all(fmt.symmetric for fmt in formats.values() if isinstance(fmt, Int))
    for (_, site, suffix), (name, tensor) in zip(state.entries(), common.tensors(state), strict=True):
        fmt = formats.get(site.name) if site else None
        if site is None or not isinstance(fmt, Int):
            yield name, tensor
            continue
        held[suffix] = tensor
        if held.keys() == fmt.tensors(site.shape).keys():
            yield from ((f"{site.stem}.{s}", t) for s, t in turned(site, fmt, held, v1).items())
            held = {}


def turned(site: Site, fmt: Int, held: dict[str, torch.Tensor], v1: bool) -> dict[str, torch.Tensor]:
    """The tensors of this layout of a matrix in ours; ExportError where a scale is no fp16 number."""
    scales = held["weight_scale"].to(torch.float16)
    lost = (scales.float() != held["weight_scale"].float()).nonzero()
    if len(lost):
        value = float(held["weight_scale"][tuple(lost[0])])
        raise ExportError(f"gptq: '{site.name}' has a scale of {value:.4g}, which fp16 cannot hold exactly; export "
                          "compressed_tensors instead, or pin the matrix to bf16")  # fmt: skip
    zeros = held["weight_zero_point"].T if "weight_zero_point" in held else middle(site, fmt, v1)
    return {"qweight": held["weight_packed"].T.contiguous(), "qzeros": zeros.contiguous(), "scales": scales.T.contiguous(),
            "g_idx": group_index(site, fmt)}  # fmt: skip


def middle(site: Site, fmt: Int, v1: bool) -> torch.Tensor:
    """The zero points [G, N*b/32] of a symmetric matrix."""
    (n, k), value = site.shape, fmt.levels // 2 - v1
    return bitpack.pack(torch.full((fmt.groups(k), n), value, dtype=torch.uint8), fmt.bits)


def group_index(site: Site, fmt: Int) -> torch.Tensor:
    """The group of each input, int32 [K]."""
    k = site.shape[1]
    return torch.arange(k, dtype=torch.int32) // fmt.width(k)


# --- reading it back -------------------------------------------------------------------------------------------------


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a GPTQ checkpoint."""
    return declared(folder).get("quant_method") == "gptq"


def open_artifact(folder: Path) -> Model:
    """The model of a GPTQ checkpoint, its tensors seen as ours; ModelError where config and tensors disagree."""
    contained(folder)
    model = open_model(str(folder))
    checkpoint, scheme = model.checkpoint, Scheme.of(declared(folder), str(folder / "config.json"))
    del model.config.quantization_config
    modules = [name.removesuffix(".qweight") for name in checkpoint.specs if name.endswith(".qweight")]
    seen: dict[str, Seen] = {}
    for module in modules:
        seen |= {found.spec.name: found for found in seen_of(module, scheme, checkpoint, model.dtype)}
    theirs = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES}
    seen |= {name: Seen(spec, checkpoint.files[name], partial(checkpoint.read, name))
             for name, spec in checkpoint.specs.items() if name not in theirs}  # fmt: skip
    return Viewed(model.folder, model.config, model.name, view=View(folder, seen.values(), checkpoint.nbytes))


def read(folder: Path) -> State:
    """The state that a GPTQ checkpoint holds; ModelError where its config and tensors disagree."""
    check_marks(folder, weight_files(folder))
    model, scheme = open_artifact(folder), Scheme.of(declared(folder), str(folder / "config.json"))
    stored = {}
    for site in model.graph:
        fmt = scheme.format(site.stem)
        if fmt and f"{site.stem}.weight_packed" in model.checkpoint:
            names = {suffix: f"{site.stem}.{suffix}" for suffix in fmt.tensors(site.shape)}
            stored[site.name] = Placed.of(site, fmt, model.checkpoint, names)
    return State(model.graph, model.checkpoint, model.dtype, facts=Fact.QUANTIZED).with_sites(stored)


def seen_of(module: str, scheme: Scheme, checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Seen]:
    """Our tensors of a module; ModelError unless those on disk are of the format that the config says."""
    fmt, rows, index = scheme.format(module), checkpoint.specs[f"{module}.qweight"].shape, checkpoint.specs.get(f"{module}.g_idx")
    path = checkpoint.files[f"{module}.qweight"]
    if fmt is None:
        raise ModelError(f"{path}: holds '{module}.qweight', but 'dynamic' leaves it as it is; config and weights do not belong "
                         "together")  # fmt: skip
    if len(rows) != 2 or index is None or len(index.shape) != 1:
        raise ModelError(f"{path}: '{module}' has a broken qweight or g_idx; the file is damaged")
    site = Site(module, "", (rows[1], index.shape[0]), None, "", module, f"{module}.weight")
    try:
        kinds, ours = shapes(site, fmt), fmt.tensors(site.shape, torch.float16 if dtype == torch.float16 else torch.bfloat16)
    except FormatError as e:
        raise ModelError(f"{path}: '{module}': {e}") from None
    for suffix, kind in kinds.items():
        spec = checkpoint.specs.get(f"{module}.{suffix}")
        if spec is None or (spec.dtype, spec.shape) != kind:
            found = "missing" if spec is None else common.text_of(spec.dtype, spec.shape)
            raise ModelError(f"{path}: '{module}.{suffix}' is {found}, {fmt} needs {common.text_of(*kind)}; config and weights "
                             "do not belong together")  # fmt: skip
    for suffix, (kept, shape) in ours.items():
        make = partial(back, site, fmt, scheme.v1, checkpoint, suffix, kept)
        yield Seen(Spec(f"{module}.{suffix}", kept, shape), path, make)


def back(site: Site, fmt: Int, v1: bool, checkpoint: Checkpoint, suffix: str, dtype: torch.dtype) -> torch.Tensor:
    """One of our tensors, scales in `dtype` where that is exact; ModelError where zero points or g_idx are not those of `fmt`."""
    if suffix == "weight_shape":
        return torch.tensor(site.shape)
    if suffix == "weight_scale":
        scales = checkpoint.read(f"{site.stem}.scales").T.contiguous()
        return scales.to(dtype) if torch.equal(scales.to(dtype).float(), scales.float()) else scales
    zeros = checkpoint.read(f"{site.stem}.qzeros")
    if suffix == "weight_zero_point":
        codes = bitpack.unpack(zeros, fmt.bits, site.shape[0]).add(v1).bitwise_and(fmt.levels - 1)
        return bitpack.pack(codes, fmt.bits).T.contiguous()
    file = checkpoint.files[f"{site.stem}.qweight"]
    if fmt.symmetric and not torch.equal(zeros, middle(site, fmt, v1)):
        raise ModelError(f"{file}: '{site.stem}.qzeros' is not that of {fmt}; config and weights do not belong together")
    if not torch.equal(checkpoint.read(f"{site.stem}.g_idx"), group_index(site, fmt)):
        raise ModelError(f"{file}: '{site.stem}.g_idx' is not in the order of inputs; only such groups are read")
    return checkpoint.read(f"{site.stem}.qweight").T.contiguous()
