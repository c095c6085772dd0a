"""Export to a GGUF file for llama.cpp: integers in its plain blocks, without loss, its own kinds of blocks as they are, and all
that it asks to know.

file.py has the container, blocks.py the blocks, metadata.py and tokenizer.py the keys. Beside the file lie
the source's config.json and tokenizer, for our reader and for transformers. The key ``compress.formats`` notes what a reader
cannot tell from blocks, as JSON:

    version   1
    dtype     what the model computes in
    formats   site -> format
    dtypes    parameter -> dtype where it is another than `dtype`: llama.cpp wants vectors in fp32, and has them so
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from compress.errors import ExportError
from compress.export.artifact.exporter import (
    INPUTS,
    Exporter,
    Files,
    Job,
    Proof,
    headless,
    refuse_free_shapes,
    refuse_sparse,
    state_bytes,
    way_for,
)
from compress.export.artifact.place import carry_over
from compress.export.artifact.proof import prove, proven
from compress.export.artifact.tensors import same_site, write_config
from compress.export.gguf import blocks
from compress.export.gguf.engine import engine
from compress.export.gguf.file import FILE, KINDS, File, Kind, Tensor, read_file
from compress.export.gguf.metadata import (
    DTYPES,
    FACTORS,
    NOTE,
    VERSION,
    Family,
    context,
    family_of,
    model_keys,
    order,
    rope_factors,
    tensor_name,
    vector,
    window,
)
from compress.export.gguf.reader import read
from compress.export.gguf.tokenizer import vocabulary
from compress.formats import Blocks, Dense, Format, Ggml, Int, Lattice, Packed, integers
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.checkpoint import Spec
from compress.state.graph import Site

IMPORTANCE = "imatrix.gguf"
USE = "```bash\nllama-cli -m model.gguf\n```"


class Gguf(Exporter):
    """One GGUF file for llama.cpp, holding exactly the run's weights."""

    name: ClassVar[str] = "gguf"
    tells: ClassVar[frozenset[str]] = frozenset({INPUTS})

    def check(self, state: State) -> None:
        refuse_sparse("gguf", state)
        if state.config.get_text_config() is not state.config:
            raise ExportError(f"gguf: '{state.graph.family}' is a language model within another, whose towers the file would "
                              "leave out; export native or compressed_tensors")  # fmt: skip
        family = family_of(state.graph.family)
        refuse_free_shapes("gguf", state)
        if headless(state.graph):
            raise ExportError("gguf: the model predicts no tokens, and how llama.cpp is to use it otherwise is not written; "
                              "export compressed_tensors or native instead")  # fmt: skip
        for name, fmt in state.formats.items():
            way_for(HELD, "gguf", name, fmt).check(state.graph[name], fmt)
        for site in state.graph:
            if not site.tied and tensor_name(site.weight, family) is None:
                raise ExportError(f"gguf: '{site.name}' ({site.weight}) has no place in llama.cpp's '{family.architecture}'")
        for name in state.graph.parameters:
            if tensor_name(name, family) is None:
                raise ExportError(f"gguf: '{name}' has no place in llama.cpp's '{family.architecture}'; export another kind")
        if model := source_of(state):
            file_of(model, state)

    def remarks(self, state: State) -> list[str]:
        formats = dict.fromkeys(integers(state.formats).values())
        held = {fmt: kind for fmt in formats if (kind := blocks.container(fmt))}
        how = "; ".join(f"{fmt} as {kind.name}, {blocks.bits(kind):g} bits per weight" for fmt, kind in held.items())
        said = [f"gguf is for llama.cpp, whose blocks hold {how}"] if how else []
        model = source_of(state)
        if model and (width := window(state.config)):
            said.append(f"gguf: llama.cpp has no sliding window of {width} tokens for '{state.graph.family}', so the file gives "
                        f"the model a context of {context(state.config)}")  # fmt: skip
        return said

    def grown(self, fmt: Format) -> float:
        if not isinstance(fmt, Int) or (kind := blocks.container(fmt)) is None:
            return 0.0
        own = fmt.bits + (0.0 if fmt.group is None else (16 + fmt.bits * (not fmt.symmetric)) / fmt.group)
        return max(0.0, blocks.bits(kind) - own)

    def layout(self, model: Model, state: State) -> File:
        return file_of(model, state)

    def proof_bytes(self, state: State, layout: Files) -> int:
        """transformers makes fp32 of everything, and holds what it reads."""
        return layout.tensor_bytes + state_bytes(state, 4)

    def write(self, job: Job, folder: Path) -> None:
        self.check(job.state)
        file_of(job.model, job.state).write(folder, contents(job.model, job.state))
        if measured := importance(job.state):
            measured.write(folder, importances(job.state))
        write_config(job, folder)
        carry_over(job.model.folder, folder, job.state.vocabulary)
        facts = {"library": "gguf", "tag": "gguf", "loads in": "llama.cpp, transformers (with gguf, dequantized)", "use": USE}
        (folder / "README.md").write_text(job.card(facts), encoding="utf-8")

    def prove(self, job: Job, folder: Path) -> Proof:
        header = file_of(job.model, job.state).header
        with (folder / FILE).open("rb") as file:
            held = file.read(len(header))
        if held != header:
            raise ExportError(f"{FILE}: its keys or its table of tensors are not what was to be written; please report this")
        written = read(folder)
        same_weights(job.state, written)
        factors = rope_factors(job.state.config)
        if factors is not None and not torch.equal(read_file(folder / FILE).read(FACTORS).view(torch.float32), factors):
            raise ExportError(f"'{FACTORS}' on disk is not what was to be written; please report this")
        if measured := importance(job.state):
            same_importance(job.state, folder / measured.name)
        return proven(job, written, lambda: prove(job, engine(folder, job.state, job.device)))


def source_of(state: State) -> Model | None:
    """The model that a state was opened from; None where it has only a config."""
    return open_model(str(state.dense.folder), leave=state.graph.leave) if state.dense.files else None


def check_integers(site: Site, fmt: Int) -> None:
    """ExportError where the blocks of GGUF cannot hold a matrix in a format."""
    if blocks.container(fmt) is None:
        raise ExportError(f"gguf: '{site.name}' has {fmt}, whose differences take 9 bits; pin it to {Int(8, fmt.group)}")
    if fmt.width(site.shape[1]) % 32:
        raise ExportError(f"gguf: '{site.name}' has {fmt}, and GGUF has blocks of 32 inputs; pin it to groups of 32, 64 or 128, "
                          "or to bf16")  # fmt: skip


def same_weights(wanted: State, written: State) -> None:
    """ExportError naming the first matrix or vector that is not in the file as it should be."""
    family = family_of(wanted.graph.family)
    for name, stored in wanted.codes.items():
        if isinstance(stored.format, Int) and not stored.format.symmetric:
            ours, theirs = (state.codes[name].load().dequantize(torch.float32) for state in (wanted, written))
            if not torch.equal(ours, theirs):
                raise ExportError(f"'{name}': weights on disk differ from the run's; please report this")
        else:
            same_site(name, stored, written)
    there = {tensor_name(name, family): name for name in written.dense.specs}
    for entry in entries(wanted, family):
        if entry.site is None and entry.spec:
            ours, theirs = wanted.dense.read(entry.spec.name), written.dense.read(there[entry.tensor.name])
            same = (vector(x, entry.tensor.name, family) if len(x.shape) == 1 else x for x in (ours, theirs))
            if ours.dtype != theirs.dtype or not torch.equal(*same):
                raise ExportError(f"'{entry.spec.name}' on disk differs from the source's; please report this")


@dataclass(frozen=True)
class Held:
    """How a kind of format gets into the file: what is refused, the kind of its tensor (None: no blocks hold it), the bytes."""

    check: Callable[[Site, Any], None]
    kind: Callable[[Any], Kind | None]
    data: Callable[[Packed, Kind, str], torch.Tensor]


OWN = Held(lambda site, fmt: None, blocks.kind_of, lambda packed, kind, name: packed.tensors["weight_blocks"])
HELD: Mapping[type, Held] = {
    Dense: Held(
        lambda site, fmt: None, lambda fmt: KINDS[DTYPES[fmt.dtype]], lambda packed, kind, name: packed.tensors["weight"]
    ),
    Int: Held(check_integers, blocks.container, blocks.pack),
    Blocks: OWN,
    Lattice: OWN,
}


# --- importance ------------------------------------------------------------------------------------------------------


def importance(state: State) -> File | None:
    """The file of an importance matrix as llama.cpp's tools read it; None where nothing was measured.

    For a tensor T of the model, T.in_sum2 [1, inputs] has the sums of squares, T.counts [1, 1] the number of tokens.
    """
    if not state.serving:
        return None
    said, family = next(iter(state.serving.values())), family_of(state.graph.family)
    keys = {"general.type": "imatrix", "imatrix.datasets": ["calibration"], "imatrix.chunk_count": said.get("windows", 1),
            "imatrix.chunk_size": said.get("length", 1)}  # fmt: skip
    tensors = []
    for name in state.serving:
        site, kind = state.graph[name], KINDS["F32"]
        there = tensor_name(site.weight, family)
        tensors += [Tensor(f"{there}.in_sum2", kind, (1, site.shape[1])), Tensor(f"{there}.counts", kind, (1, 1))]
    return File(keys, tuple(tensors), IMPORTANCE)


def importances(state: State) -> Iterator[torch.Tensor]:
    """The tensors of that file, in order."""
    for said in state.serving.values():
        tokens = said["windows"] * said["length"]
        yield torch.tensor(said["squares"]) * tokens
        yield torch.tensor([float(tokens)])


def same_importance(state: State, path: Path) -> None:
    """ExportError where the file holds other numbers."""
    found, wanted = read_file(path), importances(state)
    for name in found.tensors:
        if not torch.equal(found.read(name).view(torch.float32).flatten(), next(wanted)):
            raise ExportError(f"{path.name}: '{name}' on disk is not what was measured; please report this")


# --- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, and what it is made of: a site, or one of the source's own tensors, or neither."""

    tensor: Tensor
    site: Site | None = None
    spec: Spec | None = None


def entries(state: State, family: Family) -> Iterator[Entry]:
    """The tensors made of the source's, in its order; what the model does not use is left out."""
    formats = state.formats
    used = state.graph.parameters.keys() | {site.weight for site in state.graph if not site.tied}
    done: set[str] = set()
    for spec, site, _ in state.entries():
        if site is None and spec.name in used:
            yield Entry(Tensor(str(tensor_name(spec.name, family)), kind_of(spec.dtype, spec.shape), spec.shape), spec=spec)
        elif site is not None and site.name not in done:
            done.add(site.name)
            fmt = formats[site.name]
            kind = HELD[type(fmt)].kind(fmt)
            assert kind, f"check() has let {fmt} pass"
            yield Entry(Tensor(str(tensor_name(site.weight, family)), kind, site.shape), site)


def kind_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Kind:
    """Matrices stay as they are; llama.cpp adds and multiplies by vectors in fp32 only."""
    return KINDS[DTYPES[dtype] if len(shape) > 1 else "F32"]


def every_entry(state: State) -> list[Entry]:
    """All tensors of the file, in order."""
    found = list(entries(state, family_of(state.graph.family)))
    factors = rope_factors(state.config)
    return found if factors is None else [Entry(Tensor(FACTORS, KINDS["F32"], tuple(factors.shape))), *found]


def file_of(model: Model, state: State) -> File:
    """The file to be; ExportError for a config or a tokenizer that llama.cpp has no keys for."""
    found = every_entry(state)
    rows = state.graph["embed"].shape[0]
    keys = model_keys(state.config, model.folder.name, Counter(e.tensor.kind for e in found if len(e.tensor.shape) > 1))
    note = {NOTE: json.dumps(noted(state, found))}
    return File({**keys, **vocabulary(model.folder, rows, state.vocabulary), **note}, tuple(entry.tensor for entry in found))


def noted(state: State, found: list[Entry]) -> dict[str, Any]:
    """What `compress.formats` says."""
    formats = {name: str(fmt) for name, fmt in state.formats.items() if isinstance(fmt, Int | Ggml)}
    others = {e.tensor.name: str(e.spec.dtype)[6:] for e in found if e.spec and e.spec.dtype != state.dtype}
    return {"version": VERSION, "dtype": str(state.dtype)[6:], "formats": formats, "dtypes": others}


def contents(model: Model, state: State) -> Iterator[torch.Tensor]:
    """The bytes of every tensor of the file, in order, one at a time."""
    family = family_of(state.graph.family)
    for entry in every_entry(state):
        kind = entry.tensor.kind
        if entry.site is not None:
            packed = state.codes[entry.site.name].load()
            data = HELD[type(packed.format)].data(packed, kind, entry.site.name)
        elif entry.spec is not None:
            data = state.dense.read_finite(entry.spec.name)
            data = data if len(data.shape) > 1 else vector(data, entry.tensor.name, family)
        else:
            factors = rope_factors(state.config)
            assert factors is not None, "the one tensor that is not the source's"
            data = factors
        rows = order(entry.tensor.name, family, state.config, len(data))
        yield data if rows is None else data[rows]
