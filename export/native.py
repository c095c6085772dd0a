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

The reader asks for every tensor by name and shape, and for no tensor more; the runtime and it share their checks of a folder
(runtime/reading.py). No path comes from a file: the weights are what lies in the folder under the names above. Hashes (see
artifact.py) are compared up to `HASHED_BYTES`, which takes seconds; of larger artifacts the sizes are, and `sha256sum` does
the rest.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from pydantic import Field

from compress.checkpoint import OWN, Layout
from compress.errors import FormatError, ModelError
from compress.export.artifact import Exporter, Job, Proof, carry_over, sizes
from compress.export.engines import Engine, EngineError, Transformers
from compress.export.proof import FP32_TOLERANCE, TOLERANCE, prove, proven
from compress.export.runtime import reading
from compress.export.runtime.reading import METHOD, VERSION, declared, formats
from compress.export.tensors import Placed, formats_of, same_tensors, tensors, write_config
from compress.formats import Dense, Format, LowRank
from compress.graph import Graph, Site
from compress.model import Model, first_line, open_model
from compress.state import Fact, State

FACTORS_TOLERANCE = 5e-2  # of the largest logit, in 16 bits
READER = "our reader of native artifacts, streamed"
ENGINE = "compress runtime"
USE = """\
```python
import compress.export.runtime  # pip install compress-pipeline
from transformers import {auto}
model = {auto}.from_pretrained("THIS_FOLDER")
```"""
USE_VLLM = """\
```bash
vllm serve THIS_FOLDER  # where compress-pipeline is installed beside vLLM
```"""


class Native(Exporter):
    """Every format, as safetensors files that our runtime loads in transformers and vLLM."""

    name: ClassVar[str] = "native"

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")

    def check(self, state: State) -> None:
        """Everything can be held."""

    def remarks(self, state: State) -> list[str]:
        """What loads it."""
        where = ", and in vLLM where compress-pipeline is installed" if for_vllm(state) else ""
        return [f"native loads in transformers after 'import compress.export.runtime'{where}; other engines refuse it"]

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of([spec for spec, _, _ in state.entries()], self.shard_bytes, OWN)

    def write(self, job: Job, folder: Path) -> None:
        self.layout(job.model, job.state).write(folder, tensors(job.state))
        write_config(job.model, folder, quantization_config(job.state))
        carry_over(job.model.folder, folder)
        use = USE.format(auto="AutoModelForCausalLM" if job.state.graph.causal else "AutoModelForMaskedLM")
        facts = {"library": "transformers", "tag": METHOD, "loads in": "transformers with compress-pipeline", "use": use}
        if for_vllm(job.state):
            facts |= {"loads in": "transformers and vLLM with compress-pipeline", "use": f"{use}\n\n{USE_VLLM}"}
        (folder / "README.md").write_text(job.card(facts))

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        return proven(job, written, lambda: in_runtime(job, folder), 0.0 if job.device == "cpu" else TOLERANCE)


def for_vllm(state: State) -> bool:
    """Whether our plug-in serves it in vLLM: not masked models, not experts, and not a packed embedding."""
    formats = formats_of(state)
    served = isinstance(formats.get("embed"), Dense | None)
    return state.graph.causal and served and all(state.graph[name].expert is None for name in formats)


def in_runtime(job: Job, folder: Path) -> Proof:
    """The proof by the runtime. Where there are factors it adds a product that we put in the matrix, and in 16 bits the two round
    differently: a CPU compares in fp32, for which the kernels of a GPU have no code."""
    state = job.state
    if not any(isinstance(f, LowRank) for f in formats_of(state).values()):
        return prove(job, engine(folder, state, job.device))
    if job.device != "cpu":
        return prove(job, engine(folder, state, job.device), FACTORS_TOLERANCE)
    state = replace(state, dtype=torch.float32)
    return prove(job, engine(folder, state, job.device), FP32_TOLERANCE, "compared in fp32", state)


def quantization_config(state: State) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    formats = {state.graph[name].stem: str(fmt) for name, fmt in formats_of(state).items()}
    config: dict[str, Any] = {"quant_method": METHOD, "format_version": VERSION, "formats": formats}
    known = belonging(state.graph)
    others = [spec.name for spec, site, _ in state.entries() if site is None and spec.name not in known]
    return config | ({"others": others} if others else {})


def belonging(graph: Graph) -> set[str]:
    """The names of all tensors of a checkpoint in which nothing is quantized."""
    joined = {s.joined for s in graph if s.expert is not None}
    return joined | {s.weight for s in graph if not s.tied} | graph.parameters.keys()


# --- running it -----------------------------------------------------------------------------------------------------


def engine(folder: Path, state: State, device: str) -> Engine:
    """The artifact in our runtime, in the state's dtype; EngineError where that cannot load it."""
    from compress.export.runtime import load

    needed = sum(size for name, size in sizes(folder).items() if name.endswith(".safetensors"))
    if needed > psutil.virtual_memory().available:
        raise EngineError(f"the packed model needs {needed / 2**30:.1f} GiB of memory")
    try:
        with redirect_stderr(io.StringIO()):
            return Transformers(load(folder, device, state.dtype), ENGINE)
    except ModelError as e:
        raise EngineError(first_line(e)) from e


# --- reading it back -------------------------------------------------------------------------------------------------


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a native artifact."""
    return declared(folder).get("quant_method") == METHOD


def open_artifact(folder: Path) -> Model:
    """The model of a native artifact, without its weights' meaning; ModelError for a version that we do not know."""
    reading.contained(folder)
    formats(folder)
    reading.shards(folder)
    model = open_model(str(folder))
    del model.config.quantization_config
    return model


def read(folder: Path) -> State:
    """The state that a native artifact holds; ModelError where its files do not belong together."""
    model = open_artifact(folder)
    paths = reading.shards(folder)
    reading.check_marks(folder, paths)
    reading.check_index(folder, reading.headers(paths)[1])
    by_stem = {s.stem: s for s in model.graph if not s.tied}
    state = State(model.graph, model.checkpoint, model.dtype, facts=Fact.QUANTIZED)
    stored: dict[str, Placed] = {}
    for module, fmt in formats(folder).items():
        if module not in by_stem:
            raise ModelError(f"{folder / 'config.json'}: gives a format to '{module}', which is no matrix of this model")
        stored[by_stem[module].name] = placed(by_stem[module], fmt, state, folder)
    check_names(folder, state, stored)
    return state.with_sites(stored)


def placed(site: Site, fmt: Format, state: State, folder: Path) -> Placed:
    """Where a site's tensors lie; ModelError unless they are there as the format says."""
    try:
        names = {suffix: f"{site.stem}.{suffix}" for suffix in fmt.tensors(site.shape)}
    except FormatError as e:
        raise ModelError(f"{folder / 'config.json'}: '{site.stem}': {e}") from None
    return Placed.of(site, fmt, state.checkpoint, names, state.scale_dtype)


def check_names(folder: Path, state: State, stored: dict[str, Placed]) -> None:
    """ModelError for a tensor that neither the model nor config.json knows, or a matrix that is there twice or not at all."""
    known = belonging(state.graph) - {state.graph[n].weight for n in stored}
    known |= {name for site in stored.values() for name in site.names.values()}
    others = declared(folder).get("others", [])
    extra = sorted(state.checkpoint.specs.keys() - known - set(others if isinstance(others, list) else []))
    if extra:
        raise ModelError(f"{state.checkpoint.files[extra[0]]}: holds '{extra[0]}', which config.json does not account for; "
                         "config and weights do not belong together")  # fmt: skip
    for site in state.graph:
        held = site.name in stored or site.tied or site.weight in state.checkpoint or site.joined in state.checkpoint
        if not held:
            raise ModelError(f"{folder}: '{site.weight}' is packed, but config.json names no format for it")
