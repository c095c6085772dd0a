"""Export to `compressed-tensors` checkpoints: what vLLM serves and transformers loads.

The layout of tensors is that of formats.py (compressed-tensors >= 0.18, the dense bit stream); how the config spells each format
stands in artifact/schemes.py, what engines make of inputs that are rounded in serving.py. The config's targets are disjoint,
because engines disagree on which of two overlapping patterns wins: names, and anchored patterns that fit a module's path in the
model with its head, in the one without, which `AutoModel` loads, and under `model`, where vLLM puts it. The known limits, as of
compressed-tensors 0.20 and transformers 5.23, are told by `remarks`: asymmetric and Conv1D sites load in vLLM or through
our own reader, not in stock transformers; stock transformers reads all experts of a model with one scheme.

The factors of low-rank sites lie beside, as a PEFT adapter (adapter.py): the engines above load the quantized matrices alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.errors import ExportError
from compress.export.artifact.engines import EngineError
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
from compress.export.artifact.proof import FP32_TOLERANCE, TOLERANCE, prove, proven
from compress.export.artifact.schemes import Scheme, group_of
from compress.export.artifact.tensors import same_tensors, tensors, write_config
from compress.export.compressed_tensors import adapter, cache, serve, serving
from compress.export.compressed_tensors.engines import (
    RUNTIME,
    STOCK,
    STOCK_NAME,
    VLLM,
    engine,
    lacking,
    lost_without_head,
    stock_obstacles,
)
from compress.export.compressed_tensors.lint import JOINED, faults
from compress.export.compressed_tensors.reader import read
from compress.formats import Dense, Float, Format, Int, Served
from compress.formats.caches import CACHE
from compress.formats.engines import EngineName, refusal
from compress.model.model import Model, open_model
from compress.model.skeleton import auto_class, base_prefix
from compress.state import State
from compress.state.checkpoint import Layout
from compress.state.graph import Site

VLLM_PREFIX = "model"  # what vLLM calls the model in a model whose own name for it is another; it renames names, not patterns
NUMBERED = re.compile(r"(.+?)\.(\d+)\.(.+)")  # the path of a module in a numbered block
USE_VLLM = "```bash\nvllm serve THIS_FOLDER{flags}\n```"
USE_TRANSFORMERS = """\
```python
from transformers import {auto}
model = {auto}.from_pretrained("THIS_FOLDER")
```"""
USE_RUNTIME = """\
```python
from compress.export import runtime  # pip install compress-pipeline
model = runtime.load("THIS_FOLDER")
```"""
CACHED = "The figures are those of the model with its cache in 8 bits, as `serve.json` says."
USE_ADAPTER = "The low-rank corrections are a PEFT adapter in `adapter/`; without it the folder is the model uncorrected."
USE_PEFT = """\
```python
import torch
from peft import PeftModel
from transformers import {auto}
model = {auto}.from_pretrained("THIS_FOLDER")
model(torch.tensor([[0]]))  # the first pass unpacks the matrices, which PEFT needs to see
model = PeftModel.from_pretrained(model, "THIS_FOLDER/adapter")
```"""


class CompressedTensors(Exporter):
    """A safetensors checkpoint that vLLM serves and transformers loads; a plain one where nothing is quantized."""

    name: ClassVar[str] = "compressed_tensors"
    tells: ClassVar[frozenset[str]] = frozenset({CACHE})

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")
    engine: EngineName | None = Field(
        None, description="what is to serve it, such as vllm:sm90: formats that it does not run as measured are refused"
    )

    def check(self, state: State) -> None:
        refuse_free_shapes("compressed_tensors", state)
        refuse_sparse("compressed_tensors", state)
        adapter.check(state)
        formats = adapter.base_of(state).formats
        for name, fmt in formats.items():
            refuse_packed_table("compressed_tensors", state, name, fmt)
            way_for(CHECKS, "compressed_tensors", name, fmt)(state.graph[name], fmt)
            if self.engine and (why := refusal(self.engine, fmt)):
                raise ExportError(f"compressed_tensors: '{name}' has {fmt}, and {why}")
        for group in state.graph.fused():
            kinds = {str(formats.get(s.name, "as it is")) for s in group}
            if len(kinds) > 1:
                raise ExportError(split_group(group, formats))
        refuse_left_apart(state, formats)
        for site in state.graph:
            if site.aliases and site.name in serving.schemes(formats):
                modules = ", ".join((site.module, *site.aliases))
                raise ExportError(f"compressed_tensors: '{site.name}' is one matrix for {1 + len(site.aliases)} modules "
                                  f"({modules}), which engines load one by one; pin it to bf16")  # fmt: skip

    def remarks(self, state: State) -> list[str]:
        reasons = stock_obstacles(state)
        vllm = f" and {VLLM}" if state.graph.causal else ""  # others it serves in ways of their own: not tried, or not loaded
        said = [f"compressed_tensors loads in stock transformers (compressed-tensors >= 0.18){vllm}"]
        if headless(state.graph):
            said = ["compressed_tensors loads in stock transformers (compressed-tensors >= 0.18); the model predicts no tokens: "
                    "figures and proofs compare its last hidden states, times the embedding"]  # fmt: skip
        if reasons:
            said = [f"compressed_tensors: stock transformers cannot load it today: {'; '.join(reasons)}; it is written for "
                    f"our runtime{vllm}"]  # fmt: skip
        return said + beside(state) + serving.remarks(state)

    def layout(self, model: Model, state: State) -> Layout:
        specs = [spec for spec, _, _ in adapter.base_of(state).entries()]
        layout = Layout.of([*specs, *cache.specs(state)], self.shard_bytes)
        return Layout((*layout.files, adapter.weights_file(state))) if adapter.corrected(state) else layout

    def proof_bytes(self, state: State, layout: Files) -> int:
        """transformers unpacks every matrix."""
        return unpacked_bytes(state)

    def write(self, job: Job, folder: Path) -> None:
        self.check(job.state)
        base = adapter.base_of(job.state)
        serving.check_shared(base)
        beside = chain(cache.tensors(job.state), adapter.tensors(job.state))
        self.layout(job.model, job.state).write(folder, chain(tensors(base), beside))
        config = quantization_config(base, base_prefix(job.state.config)) if base.codes or CACHE in base.serving else None
        write_config(job, folder, config)
        if adapter.corrected(job.state):
            adapter.write_config(job.state, folder)
        carry_over(job.model.folder, folder, job.state.vocabulary)
        serve.write(job.state, folder)
        write_card(job, folder, USE_RUNTIME if stock_obstacles(job.state) else stock_use(job))

    def prove(self, job: Job, folder: Path) -> Proof:
        quantized = job.state.codes or CACHE in job.state.serving
        written = read(folder) if quantized else open_model(str(folder), leave=None).state
        same_tensors(job.state, written)
        cache.same(job.state, written)
        if quantized and (fault := next(faults(folder, {s.stem: s.module for s in written.graph}), None)):
            raise ExportError(f"compressed_tensors: {fault}; the artifact is not kept, please report this")
        return proven(job, written, lambda: in_engine(job, folder))


def in_engine(job: Job, folder: Path) -> Proof:
    """The proof in an engine, whose name goes into the card. Where there is none the artifact is kept: vLLM has its own code.

    With an adapter in fp32: engines add a product that we put in the matrix, and in 16 bits the two round differently. Small
    floats in bf16, in which stock transformers unpacks them.
    """
    adapted = bool(adapter.corrected(job.state))
    state, note = (replace(job.state, dtype=torch.float32), "compared in fp32") if adapted else (job.state, "")
    if serving.in_bf16(state):
        state, note = replace(state, dtype=torch.bfloat16), "compared in bf16"
    try:
        found = engine(folder, state, job.device)
        remark = "; ".join(filter(None, (found.remark, note)))
        proof = prove(job, found, FP32_TOLERANCE if adapted else TOLERANCE, remark, state)
    except EngineError:
        write_card(job, folder, None)
        raise
    name = found.name
    del found  # its memory, before the folder is loaded again
    if name.startswith(STOCK_NAME) and (lost := lost_without_head(folder, state)):
        raise ExportError(f"compressed_tensors: AutoModel, which embedders are loaded by, does not find '{lost[0]}' "
                          f"({len(lost)} missing); the artifact is not kept")  # fmt: skip
    if name == RUNTIME and not lacking(state):
        write_card(job, folder, USE_RUNTIME)
    return proof


def holds(site: Site, fmt: Any) -> None:
    """Anything will do."""


CHECKS: Mapping[type, Callable[[Site, Any], None]] = {Dense: holds, Int: holds, Float: serving.check, Served: serving.check}


# --- what is written -------------------------------------------------------------------------------------------------


def quantization_config(state: State, prefix: str) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per format, disjoint targets, everything else ignored.
    prefix: where a model with a head holds the one without."""
    formats = serving.schemes(state.formats)
    groups: dict[str, Any] = {}
    for i, fmt in enumerate(dict.fromkeys(formats.values())):
        mine = [state.graph[n] for n, f in formats.items() if f == fmt]
        groups[f"group_{i}"] = {"targets": targets(mine, prefix), **group_of(fmt)}
    layouts = dict.fromkeys(group["format"] for group in groups.values())
    layout = next(iter(layouts)) if len(layouts) == 1 else "mixed-precision" if layouts else "dense"
    found = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
             "config_groups": groups, "ignore": ignored(state, formats)}  # fmt: skip
    return found | ({"kv_cache_scheme": cache.scheme(state)} if CACHE in state.serving else {})


def targets(sites: list[Site], prefix: str) -> list[str]:
    """Modules outside of the blocks by their names, those within by anchored patterns; the experts of all blocks as one pattern
    over their names in the tree and on disk, since some engines go by the one and some by the other."""
    plain = [s.module for s in sites if s.expert is None]
    exact = [path for path in plain if not NUMBERED.match(path)]
    found = exact + [f"{pattern}$" for pattern in patterns([path for path in plain if NUMBERED.match(path)], prefix)]
    experts = [s for s in sites if s.expert is not None]
    paths = [p for s in experts for p in (s.module, s.stem.rsplit(".", 2)[0])]
    return found + [rf"{pattern}\..+$" for pattern in patterns(list(dict.fromkeys(paths)), prefix)]


def patterns(paths: list[str], prefix: str) -> list[str]:
    """The beginnings of patterns that fit these modules of numbered blocks and no others, with `prefix`, vLLM's, and without."""
    held = [rf"{re.escape(name)}\." for name in dict.fromkeys((prefix, VLLM_PREFIX)) if name]
    optional = f"(?:{'|'.join(held)})?"
    blocks: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        head, number, tail = NUMBERED.findall(path.removeprefix(f"{prefix}."))[0]
        blocks.setdefault((head, tail), []).append(number)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), numbers in blocks.items():
        tails.setdefault((head, tuple(dict.fromkeys(numbers))), []).append(tail)
    return [rf"re:^{optional}{re.escape(head)}\.({'|'.join(numbers)})\.({'|'.join(map(re.escape, rest))})"
            for (head, numbers), rest in tails.items()]  # fmt: skip


def ignored(state: State, formats: Mapping[str, Scheme]) -> list[str]:
    """Modules that keep their weights: sites without a format, routers, and other matrices that are no site, or not even the
    model's, such as those of a layer that predicts further tokens."""
    graph = state.graph
    own = {s.weight for s in graph} | {s.joined for s in graph if s.expert is not None}
    further = {spec.name: spec.shape for spec in state.specs if spec.name not in own}
    left = [s for s in graph if s.name not in formats and s.role != "embed"]
    names = [p for s in left for p in ((s.stem,) if s.expert is not None else (s.module, *s.aliases))]
    others = [
        n.removesuffix(".weight")
        for n, shape in (graph.parameters | further).items()
        if n.endswith(".weight") and len(shape) == 2
    ]
    return list(dict.fromkeys([*names, *others]))


# --- what engines can do with it -------------------------------------------------------------------------------------


def split_group(group: tuple[Site, ...], formats: dict[str, Format]) -> str:
    texts = [str(formats.get(s.name, "as it is")) for s in group]
    some = range(len(group)) if len(group) <= 3 else sorted(map(texts.index, set(texts)))  # of many experts, one for each format
    shown = ", ".join(f"{group[i].name} {texts[i]}" for i in some)
    kind = "experts of one block" if group[0].expert is not None else ",".join(s.role for s in group)
    return (f"compressed_tensors: vLLM joins {kind} into one matrix and needs one format for them, here {shown}; "
            "pin them together")  # fmt: skip


def refuse_left_apart(state: State, formats: dict[str, Format]) -> None:
    """ExportError where a matrix that `leave` keeps out would be joined with one that is quantized."""
    for path in state.graph.left:
        stem, _, leaf = path.rpartition(".")
        mates = {f"{stem}.{name}" for names in JOINED if leaf in names for name in names}
        held = next((s for s in state.graph if s.module in mates and s.name in serving.schemes(formats)), None)
        if held is not None:
            raise ExportError(f"compressed_tensors: vLLM joins '{path}', which 'leave' keeps as it is, with '{held.name}', which "
                              f"has {formats[held.name]}; leave all that it joins, or export native instead")  # fmt: skip


def beside(state: State) -> list[str]:
    """What to know of the adapter, where there is one."""
    found = adapter.corrected(state)
    if not found:
        return []
    most = max(f.rank for f in found.values())
    return [f"compressed_tensors: the low-rank factors of {len(found)} matrices lie in {adapter.FOLDER}/ as a PEFT adapter; the "
            "folder without it is the quantized model uncorrected. PEFT applies it in transformers, after a first forward pass; "
            f"vLLM takes such adapters with --enable-lora and a --max-lora-rank of {most} or more (not tried)"]  # fmt: skip


def stock_use(job: Job) -> str:
    """How to load the artifact in stock transformers."""
    return (USE_PEFT if adapter.corrected(job.state) else USE_TRANSFORMERS).format(auto=auto_class(job.state.config))


def write_card(job: Job, folder: Path, use: str | None) -> None:
    """The model card, with vLLM and one way to load the artifact in transformers that is known to work, if there is one."""
    causal = job.state.graph.causal
    flags = "".join(f" {flag}" for flag in serve.flags(job.state))
    first = USE_ADAPTER if adapter.corrected(job.state) else USE_VLLM.format(flags=flags) if causal else None
    engines = {USE_RUNTIME: (VLLM, RUNTIME), None: (VLLM,)}.get(use, (STOCK, VLLM))
    loads = ", ".join(engine for engine in engines if engine != VLLM or causal) or "compress"
    kept = CACHED if CACHE in job.state.serving else None
    facts = {"library": "transformers", "tag": "compressed-tensors", "loads in": loads,
             "use": "\n\n".join(filter(None, (first, use, kept)))}  # fmt: skip
    (folder / "README.md").write_text(job.card(facts), encoding="utf-8")
