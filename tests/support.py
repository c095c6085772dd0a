"""What each exporter holds, and which engine then computes the same: made by trying, printed by `python -m tests.support`.

A cell is the proof of a run: the artifact was written, loaded by the engine named, gave the run's logits within the tolerance of
`export/artifact/proof.py` and the run's greedy text. A dash is a refusal by `check`, before anything is computed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import transformers

from compress.errors import CompressError
from compress.export.artifact.exporter import Proof
from compress.export.table import EXPORTERS
from compress.formats import Dense, Factored, parse
from compress.model.model import open_model
from compress.passes.prune import Prune
from compress.report.page import pipes
from compress.state import State
from tests.conftest import FAMILIES, make_model, write_text
from tests.cooking import bake, factored

FORMATS = (*(f"int{b}:g32" for b in range(2, 9)), "int4:g64", "int4:channel", "int4:g32:asym", "int2:g32:asym", "nf4:g64",
           "nf3:g64", "nf4:g64:dq8x256", "nf8:g64", "lut4:g64", "lut3:g64:shared", "lut2:g64", "int4:g32+r4",
           "nf4:g64+r4", "int4:g32:r64", "lut3:g64:r32", "int8:channel/int8:token", "fp8:channel/fp8:token",
           "int4:g32/int8:token", "nvfp4/nvfp4", "mxfp4/mxfp8", "nvfp4", "ecq4", "ecq4:r32", "tcq3", "tcq3:r64", "iq4_nl", "q4_1",
           "lr16", "lr32:int8:channel", "lr32:int4:g32", "lr16:nf4:g64")  # fmt: skip
COMMON = "int4:g32"  # what families are tried with
FREE = {"mlp": {"layers.0.*": 0.5}}  # as `prune` leaves layers that differ in shape
SHAPED = ("llama", "qwen3", "gemma3", "phi3", "gpt2", "opt")
REFUSED = "-"


TAIL = """\
## Not run here

No GPU was at hand. So of what `compressed_tensors` writes, this is known from vLLM's sources (0.32) and not from a run: small
floats (`fp8`, `nvfp4`, `mxfp4`, `mxfp8`), rounded inputs other than `int8:token`, a cache of 8 bits, experts, integers of other
widths than 4 bits outside our plug-in, and any kernel of any GPU. Their numbers are proven in stock transformers on a CPU, and
each folder is held against what vLLM's loader asks for (`export/compressed_tensors/lint.py`). Which engine runs what is in the
table of [Export](export.md#engines).

Of our own runtime no kernel for CUDA has run on a GPU either: of integers, tables, rotations, entropy and trellis codes alike,
their source runs on a CPU by an emulator, and is compiled ([Runtime](runtime.md#cuda))."""


@cache
def opened(source: Path) -> State:
    return open_model(str(source)).state


def state_of(source: Path, form: str, free: bool = False) -> State:
    """A model with every matrix inside its blocks planned to be in one format."""
    state = Prune.model_validate(FREE).foresee(opened(source)) if free else opened(source)
    return state.promising({s.name: parse(form) for s in state.graph.linear})


def refusal(exporter: str, source: Path, form: str, free: bool = False) -> str | None:
    """Why an exporter does not take a model in a format; None where it does."""
    try:
        EXPORTERS[exporter]().check(state_of(source, form, free))
    except CompressError as e:
        return str(e)
    return None


def proven(exporter: str, source: Path, text: Path, form: str, folder: Path, free: bool = False) -> Proof:
    """The proof of one run."""
    if isinstance(fmt := parse(form), Factored):
        passes = factored(fmt.rank, None if isinstance(fmt.factors, Dense) else str(fmt.factors))
        return bake(folder, source, text, exporter, *passes).artifacts[exporter][1]
    method = "lqlora" if "+r" in form else "quantize"
    options = {"rank": parse(form).rank, "format": str(parse(form).base)} if method == "lqlora" else {"format": form}  # type: ignore[union-attr]
    first = [{"prune": FREE}] if free else []
    return bake(folder, source, text, exporter, *first, {method: {"method": "rtn", **options}}).artifacts[exporter][1]


def cell(exporter: str, source: Path, text: Path, form: str, free: bool = False) -> str:
    """What the table says of one exporter, model and format."""
    if refusal(exporter, source, form, free):
        return REFUSED
    with tempfile.TemporaryDirectory() as folder:
        proof = proven(exporter, source, text, form, Path(folder), free)
    return re.sub(r" [\d.]+\S*", "", proof.engine)


def rows(names: tuple[str, ...], pairs: Iterator[tuple[str, Path, str]], text: Path, free: bool = False) -> list[list[str]]:
    found = []
    for name, source, form in pairs:
        found.append([f"`{name}`", *(cell(exporter, source, text, form, free) for exporter in names)])
        print(" | ".join(found[-1]), file=sys.stderr, flush=True)
    return found


def shaped(name: str) -> str:
    """The row of a family whose layers differ in shape."""
    return f"{name}, by layer"


HEAD = """\
# What loads where

Printed by `python -m tests.support`, which runs a recipe for every cell on a tiny model: the engine named has loaded the artifact
and given the run's logits and greedy text (`export/artifact/proof.py`). A dash is a refusal, in `plan` already, that says what to
do instead. "our own reader" is ours, block by block: no engine at hand could load that one, and the run says why. What was tried
besides, in vLLM, GPTQModel and others, is told in the page of each exporter: [Export](export.md)."""


def page(folder: Path) -> str:
    """The whole page."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text, names = write_text(folder / "words.txt"), tuple(EXPORTERS)
    models = {name: make_model(folder / name, config()) for name, config in FAMILIES.items()}
    by_format = rows(names, ((form, models["llama"], form) for form in FORMATS), text)
    by_family = rows(names, ((name, models[name], COMMON) for name in models), text)
    by_layer = rows(names, ((shaped(name), models[name], COMMON) for name in SHAPED), text, free=True)
    return "\n\n".join([HEAD, "## Formats, on Llama", pipes(by_format, ["format", *names]),
                        f"## Families, in `{COMMON}`", pipes(by_family, ["family", *names]),
                        f"## Layers of different shapes, in `{COMMON}`", pipes(by_layer, ["family", *names]),
                        TAIL]) + "\n"  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print(page(Path(place)), end="")
