"""Export in our own form: every format that there is, as plain safetensors, read back by `compress eval` and by `native.read`.

A matrix in a module M has the tensors `M.<suffix>` that its format lists (docs/formats.md); everything else is the source's.
The files are compress-00001.safetensors and on, not model.safetensors: transformers only warns of a `quant_method` that it does
not know, and would go on with random weights; without a file of the name that it looks for, it stops.

config.json is the source's, with a `quantization_config`:

    quant_method     "compress"
    format_version   1; a reader refuses a newer one
    formats          module -> text of its format, for every matrix that is not as the source has it
    others           tensors that belong to no matrix and no parameter, such as buffers; absent where there are none

The reader asks for every tensor by name and shape, and for no tensor more. No path comes from a file: the weights are what lies
in the folder under the names above. Hashes (see artifact.py) are compared up to `HASHED_BYTES`, which takes seconds; of larger
artifacts the sizes are, and `sha256sum` does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from compress.checkpoint import HASHED_BYTES, OWN, Layout, read_header, weight_files
from compress.errors import FormatError, ModelError
from compress.export.artifact import Exporter, Job, Proof, carry_over, mark, sha256, sizes
from compress.export.tensors import (
    TOLERANCE,
    Placed,
    compared,
    declared,
    formats_of,
    logits,
    same_tensors,
    tensors,
    write_config,
)
from compress.formats import Format, parse
from compress.graph import Graph, Site
from compress.model import Model, open_model
from compress.state import Fact, State

METHOD, VERSION = "compress", 1
READER = "our reader of native artifacts, streamed"
USE = """\
```bash
compress eval THIS_FOLDER --text FILE
```

Other tools do not know these formats; `compress.export.native.read` gives the matrices back."""


class Native(Exporter):
    """Every format, as safetensors files that only compress reads."""

    name: ClassVar[str] = "native"

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")

    def check(self, state: State) -> None:
        """Everything can be held."""

    def remarks(self, state: State) -> list[str]:
        return ["native is read by 'compress eval' and 'compress inspect' alone; transformers and vLLM refuse it"]

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of([spec for spec, _, _ in state.entries()], self.shard_bytes, OWN)

    def write(self, job: Job, folder: Path) -> None:
        self.layout(job.model, job.state).write(folder, tensors(job.state))
        write_config(job.model, folder, quantization_config(job.state))
        carry_over(job.model.folder, folder)
        facts = {"library": METHOD, "tag": METHOD, "loads in": "compress", "use": USE}
        (folder / "README.md").write_text(job.card(facts))

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        if job.tokens is None:
            return Proof("our own reader", 0.0, "every tensor compared; no text in the recipe to compare logits on")
        ours, theirs = (logits(s, job.model.config, job.tokens, job.device) for s in (job.state, written))
        return compared(ours, theirs, "our own reader", tolerance=0.0 if job.device == "cpu" else TOLERANCE)


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


# --- reading it back -------------------------------------------------------------------------------------------------


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a native artifact."""
    return declared(folder).get("quant_method") == METHOD


def open_artifact(folder: Path) -> Model:
    """The model of a native artifact, without its weights' meaning; ModelError for a version that we do not know."""
    formats(folder)
    model = open_model(str(folder))
    del model.config.quantization_config
    return model


def read(folder: Path) -> State:
    """The state that a native artifact holds; ModelError where its files do not belong together."""
    model = open_artifact(folder)
    check_files(folder, model)
    by_stem = {s.stem: s for s in model.graph if not s.tied}
    state = State(model.graph, model.checkpoint, model.dtype, facts=Fact.QUANTIZED)
    stored: dict[str, Placed] = {}
    for module, fmt in formats(folder).items():
        if module not in by_stem:
            raise ModelError(f"{folder / 'config.json'}: gives a format to '{module}', which is no matrix of this model")
        stored[by_stem[module].name] = placed(by_stem[module], fmt, state, folder)
    check_names(folder, state, stored)
    return state.with_sites(stored)


def formats(folder: Path) -> dict[str, Format]:
    """Module -> format, as config.json says."""
    path, config = folder / "config.json", declared(folder)
    version, texts = config.get("format_version"), config.get("formats")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"{path}: format_version is {version!r}, and {VERSION} is the newest that is read here; "
                         "upgrade compress-pipeline")  # fmt: skip
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise ModelError(f"{path}: its quantization_config is broken: 'formats' is to map modules to formats")
    found = {}
    for module, text in texts.items():
        try:
            found[module] = parse(text)
        except FormatError as e:
            raise ModelError(f"{path}: '{module}': {e}") from None
        except ValueError:
            raise ModelError(f"{path}: '{module}': '{text[:40]}…' is no format") from None
    return found


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


def check_files(folder: Path, model: Model) -> None:
    """ModelError for a weight file that is missing, doubled, or not the one that was written."""
    paths = weight_files(folder)
    names = [path.name for path in paths]
    wanted = [f"{OWN}-{i:05}.safetensors" for i in range(1, len(names) + 1)]
    if names != wanted:
        raise ModelError(f"{folder}: holds {', '.join(names[:3])}, not {wanted[0]} and on; a weight file is missing")
    if sum(len(read_header(path)) for path in paths) != len(model.checkpoint.specs):
        raise ModelError(f"{folder}: two weight files hold the same tensor; they do not belong together")
    note, held = mark(folder), sizes(folder)
    hashes, noted = note.get("sha256"), note.get("sizes")
    small = sum(held[name] for name in names) <= HASHED_BYTES
    for path in paths:
        size = noted.get(path.name, held[path.name]) if isinstance(noted, dict) else held[path.name]
        whole = hashes.get(path.name) if isinstance(hashes, dict) and small else None
        if size != held[path.name] or (whole is not None and whole != sha256(path)):
            raise ModelError(f"{path}: is not the file that was written (see compress.json); it is damaged, copy it again")
