"""Export in our own form: every format that there is, as plain safetensors, which our runtime loads in transformers and vLLM.

A matrix in a module M has the tensors `M.<suffix>` that its format lists (docs/formats.md); everything else is the source's.
The files are compress-00001.safetensors and on, not model.safetensors: without the runtime, transformers only warns of a
`quant_method` that it does not know, and would go on with random weights; without a file of the name that it looks for, it stops.
Where there are several, compress.safetensors.index.json says for the runtime which tensor is in which.

config.json is the source's, with a `quantization_config`:

    quant_method     "compress"
    format_version   1; a reader refuses a newer one
    formats          module -> text of its format, for every matrix that is not as the source has it
    others           tensors that belong to no matrix and no parameter, such as buffers; absent where there are none
    kv_policy        true where kv_policy.json says which entries the KV cache keeps (compress/cache/policy.py); else absent
    sparsity         module -> what a token leaves out by it: `by`, a text of formats/sparsity.py; `rows` and `columns`, the
                     modules of which it does not read these; absent where every token reads all. Thresholds and predictors are
                     tensors `M.<suffix>` too

The reader asks for every tensor by name and shape, and for no tensor more; the runtime and it share their checks of a folder
(artifact/files.py). No path comes from a file: the weights are what lies in the folder under the names above. Hashes (see
artifact/place.py) are compared up to `HASHED_BYTES` of weights, which takes seconds; of larger artifacts the sizes are, and
`sha256sum` does the rest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field

from compress.cache import merging
from compress.cache.merging import MERGED
from compress.cache.policy import DECLARED, FILE, SERVED
from compress.errors import ExportError
from compress.export.artifact.config import METHOD, VERSION
from compress.export.artifact.engines import Transformers
from compress.export.artifact.exporter import Exporter, Files, Job, Proof
from compress.export.artifact.place import carry_over
from compress.export.artifact.proof import FP32_TOLERANCE, TOLERANCE, logits, mismatch, prove, proven
from compress.export.artifact.skipped import Skipped
from compress.export.artifact.tensors import same_tensors, tensors, write_config
from compress.export.native.engine import engine
from compress.export.native.reader import belonging, beside, read
from compress.formats import Dense, Factored, Float, LowRank, Rotated, Served, numbers_of
from compress.model.attention import Following
from compress.model.model import Model
from compress.model.skeleton import auto_class
from compress.shapes import ATTENTION, layers_without
from compress.state import State
from compress.state.checkpoint import OWN, Layout

FACTORS_TOLERANCE = 5e-2  # of the largest logit, in 16 bits
USE = """\
```python
import compress.export.runtime  # pip install compress-pipeline
from transformers import {auto}
model = {auto}.from_pretrained("THIS_FOLDER")
```"""
USE_VLLM = """\
```bash
vllm serve THIS_FOLDER  # where compress-pipeline is installed beside vLLM{where}
```"""


class Native(Exporter):
    """Every format, as safetensors files that our runtime loads in transformers and vLLM."""

    name: ClassVar[str] = "native"
    tells: ClassVar[frozenset[str]] = frozenset({SERVED, MERGED})

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")

    def check(self, state: State) -> None:
        """Everything can be held."""

    def remarks(self, state: State) -> list[str]:
        """What loads it."""
        where = f", and in vLLM where compress-pipeline is installed{wants(state)}" if for_vllm(state) else ""
        return [f"native loads in transformers after 'import compress.export.runtime'{where}; other engines refuse it"]

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of([spec for spec, _, _ in state.entries()], self.shard_bytes, OWN)

    def proof_bytes(self, state: State, layout: Files) -> int:
        """Memory of an engine that unpacks one matrix at a time; in fp32, what is dense is not mapped, but copied."""
        if not in_fp32(state) or state.dtype == torch.float32:
            return super().proof_bytes(state, layout)
        dense = sum(prod(spec.shape) for spec, site, _ in state.entries() if site is None)
        return super().proof_bytes(replace(state, dtype=torch.float32), layout) + 4 * dense

    def write(self, job: Job, folder: Path) -> None:
        self.layout(job.model, job.state).write(folder, tensors(job.state))
        write_config(job, folder, quantization_config(job.state))
        carry_over(job.model.folder, folder, job.state.vocabulary)
        if SERVED in job.state.serving:
            (folder / FILE).write_text(json.dumps(job.state.serving[SERVED]) + "\n", encoding="utf-8")
        if MERGED in job.state.serving:
            held = merging.told(job.state.serving[MERGED])
            (folder / merging.FILE).write_text(json.dumps(held.json()) + "\n", encoding="utf-8")
            held.save(folder)
        use = USE.format(auto=auto_class(job.state.config))
        facts = {"library": "transformers", "tag": METHOD, "loads in": "transformers with compress-pipeline", "use": use}
        if for_vllm(job.state):
            served = USE_VLLM.format(where=wants(job.state))
            facts |= {"loads in": "transformers and vLLM with compress-pipeline", "use": f"{use}\n\n{served}"}
        (folder / "README.md").write_text(job.card(facts), encoding="utf-8")

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        if dict(written.serving) != dict(job.state.serving):
            raise ExportError(f"{FILE} or {merging.FILE} on disk is not what was decided; please report this")
        if dict(written.sparsity) != dict(job.state.sparsity):
            raise ExportError("config.json says of other matrices what tokens leave out, than the run does; please report this")
        return proven(job, written, lambda: in_runtime(job, folder), 0.0 if job.device == "cpu" else TOLERANCE)


def for_vllm(state: State) -> bool:
    """Whether our plug-in serves it in vLLM: not masked models, not experts, not a packed embedding, not a policy of the cache
    nor merged contexts, not models of which tokens leave out a part; nor small floats and rounded inputs, for which vLLM has
    kernels of its own."""
    formats = state.formats
    if SERVED in state.serving or MERGED in state.serving or state.sparsity:
        return False
    if any(isinstance(fmt, Served) or isinstance(numbers_of(fmt), Float) for fmt in formats.values()):
        return False
    served = isinstance(formats.get("embed"), Dense | None)
    return state.graph.causal and served and all(state.graph[name].expert is None for name in formats)


def wants(state: State) -> str:
    """What else our plug-in needs to serve it, as words that follow others."""
    return f" and vLLM has code of its own for '{state.graph.family}'" if layers_without(state.config, ATTENTION) else ""


def in_runtime(job: Job, folder: Path) -> Proof:
    """The proof by the runtime, on a CPU in fp32. It sums products in other orders than we do, multiplies by factors where we
    multiply by what they make, and turns activations where we turn matrices; in 16 bits the two round differently, and what
    they make of that grows with the model: logits of Gemma 3 270M by 2.5 % of the largest. Where tokens leave out neurons,
    rounding may put one on the other side of its threshold. Not where inputs are rounded: there the two do the same, and in fp32
    the last bit of a sum would move a code. The kernels of a GPU have no code for fp32."""
    state = job.state
    if SERVED in state.serving:
        return through_cache(job, engine(folder, replace(state, dtype=torch.float32), job.device))
    if job.device != "cpu" or not in_fp32(state):
        return prove(job, engine(folder, state, job.device), FACTORS_TOLERANCE if otherwise(state) else TOLERANCE)
    state = replace(state, dtype=torch.float32)
    return prove(job, engine(folder, state, job.device), FP32_TOLERANCE, "compared in fp32", state)


def otherwise(state: State) -> bool:
    """Whether the runtime does not multiply by matrices as they are, but by factors, turned activations, or some of the rows."""
    return bool(state.sparsity) or any(isinstance(f, LowRank | Factored | Rotated) for f in state.formats.values())


def in_fp32(state: State) -> bool:
    """Whether a CPU proves it in fp32, see `in_runtime`."""
    rounded = any(isinstance(f, Served) for f in state.formats.values())
    return SERVED in state.serving or otherwise(state) or not rounded


def through_cache(job: Job, served: Transformers) -> Proof:
    """The proof where the cache has a policy: of the weights with a plain cache; then bytes of the cache after a prompt, to the
    byte, and logits of what follows, which our stream computes with masks in place of a cache. In fp32: in 16 bits what attention
    gives is summed up otherwise, and the entry that is kept last may be another. Rules that heads took by the prompt must be the
    ones that they should, up to rounding."""
    assert job.tokens is not None
    state, model = replace(job.state, dtype=torch.float32), cast(Any, served.model)
    policy, model.kv_policy = model.kv_policy, None
    proof = prove(job, served, FP32_TOLERANCE, "compared in fp32", state)
    model.kv_policy = policy
    prompt = job.tokens.shape[1] // 2
    _, cache = served.prefill(job.tokens[:, :prompt])
    see = Following(policy, prompt, [job.tokens], cache.rules)
    (ours,) = logits(state, [job.tokens], job.device, see)
    wanted = sum(see.nbytes) if policy.ladder else len(job.tokens) * policy.nbytes(prompt)
    if cache.nbytes != wanted:
        raise ExportError(
            f"the cache takes {cache.nbytes:,} bytes after {prompt} tokens, not the {wanted:,} of its policy; please report"
        )
    theirs, _ = served.step(job.tokens[:, prompt:], cache)
    difference = float((ours[:, prompt:] - theirs).abs().max())
    if not difference <= FP32_TOLERANCE * float(ours.abs().max()):
        raise mismatch(served.name, difference, ours, " behind a prompt, through the cache")
    return replace(proof, difference=max(proof.difference, difference))


def quantization_config(state: State) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    formats = {state.graph[name].stem: str(fmt) for name, fmt in state.formats.items()}
    config: dict[str, Any] = {"quant_method": METHOD, "format_version": VERSION, "formats": formats}
    known = belonging(state.graph) | beside(state.graph, state.sparsity)
    others = [spec.name for spec, site, _ in state.entries() if site is None and spec.name not in known]
    config |= {DECLARED: True} if SERVED in state.serving else {}
    config |= {MERGED: True} if MERGED in state.serving else {}
    skipped = {state.graph[name].stem: said.text() for name, said in left_out(state).items()}
    return config | ({"others": others} if others else {}) | ({"sparsity": skipped} if skipped else {})


def left_out(state: State) -> dict[str, Skipped]:
    """Site -> what a token leaves out by it, in the modules on disk."""
    found = {}
    for name, how in state.sparsity.items():
        site = state.graph[name]
        mates = {s.role: s.stem for s in state.graph.of_block(site.block or 0)}
        if how.kind == "teal":
            found[name] = Skipped(how, (), (site.stem,))
            continue
        rows = [site.stem] if how.kind == "predictor" or how.joined else []
        rows += [mates["up"]] if site.role == "gate" else []
        found[name] = Skipped(how, tuple(rows), (mates["down"],))
    return found
