"""Export to `compressed-tensors` checkpoints, format ``pack-quantized``: what vLLM serves and transformers loads.

The layout of tensors is that of formats.py (compressed-tensors >= 0.18, the dense bit stream). The config names every target
by its exact module path, because engines disagree on which of two overlapping patterns wins. The known limits, as of
compressed-tensors 0.20 and transformers 5.23, are told by `remarks`: asymmetric and Conv1D sites load in vLLM or through
our own reader, not in stock transformers; stock transformers reads all experts of a model with one scheme.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import transformers
from pydantic import Field

from compress.checkpoint import Layout, Spec, tensor_bytes
from compress.errors import ExportError, ModelError
from compress.export.artifact import Exporter, Job, Proof, carry_over, json_of
from compress.formats import Dense, Format, Int
from compress.graph import Graph, Site
from compress.model import Model, first_line, model_class, open_model
from compress.state import Fact, State, Stored
from compress.stream import Stream

TOLERANCE = 2e-2  # of the largest logit: kernels of different shape round differently in 16-bit models
ENGINES = "vLLM >= 0.31 (2 to 8 bits; 0.25 to 0.30: symmetric)"


class CompressedTensors(Exporter):
    """A quantized safetensors checkpoint that vLLM serves and transformers loads."""

    name: ClassVar[str] = "compressed_tensors"

    shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="largest size of one safetensors file")

    def check(self, state: State) -> None:
        formats = formats_of(state)
        for group in state.graph.fused():
            kinds = {str(formats.get(s.name, "as it is")) for s in group}
            if len(kinds) > 1:
                raise ExportError(split_group(group, formats))
        for site in state.graph:
            if site.aliases and isinstance(formats.get(site.name), Int):
                modules = ", ".join((site.module, *site.aliases))
                raise ExportError(f"compressed_tensors: '{site.name}' is one matrix for {1 + len(site.aliases)} modules "
                                  f"({modules}), which engines load one by one; pin it to bf16")  # fmt: skip

    def remarks(self, state: State) -> list[str]:
        reasons = stock_obstacles(state)
        if not reasons:
            return [f"compressed_tensors loads in stock transformers (compressed-tensors >= 0.18) and {ENGINES}"]
        return [f"compressed_tensors: stock transformers cannot load it today: {'; '.join(reasons)}; it is written for {ENGINES} "
                "and 'compress eval'"]  # fmt: skip

    def layout(self, model: Model, state: State) -> Layout:
        return Layout.of([spec for spec, _, _ in entries(model, state)], self.shard_bytes)

    def write(self, job: Job, folder: Path) -> None:
        self.check(job.state)
        self.layout(job.model, job.state).write(folder, tensors(job.model, job.state))
        config = json.loads((job.model.folder / "config.json").read_text())
        config["quantization_config"] = quantization_config(job.state)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        carry_over(job.model.folder, folder)
        (folder / "README.md").write_text(job.card({"loads in": engines(stock_obstacles(job.state))}))

    def prove(self, job: Job, folder: Path) -> Proof:
        written = read(folder)
        same_tensors(job.state, written)
        if job.tokens is None:
            return Proof("our own reader", 0.0, "every code compared; no text in the recipe to compare logits on")
        ours = logits(job.state, job.model.config, job.tokens, job.device)
        obstacles = stock_obstacles(job.state)
        needed = sum(s.numel for s in job.state.graph) * job.state.dtype.itemsize * 1.5
        if not obstacles and needed > psutil.virtual_memory().available:
            obstacles = [f"the dense model needs {needed / 2**30:.1f} GiB of memory"]
        if not obstacles:
            try:
                return compared(ours, stock_logits(folder, job.tokens, job.state.graph), "transformers")
            except EngineError as e:  # vLLM has its own code for the architecture, so the artifact is kept; its card says so
                obstacles = [str(e)]
                (folder / "README.md").write_text(job.card({"loads in": engines(obstacles)}))
        theirs = logits(written, job.model.config, job.tokens, job.device)
        return compared(ours, theirs, "our own reader", f"not proven in stock transformers: {'; '.join(obstacles)}")


# --- what is written -------------------------------------------------------------------------------------------------


def formats_of(state: State) -> dict[str, Format]:
    return dict(state.plan.formats) if state.plan else {}


def entries(model: Model, state: State) -> Iterator[tuple[Spec, Site | None, str]]:
    """Every tensor to write, in the source's order: its spec, its site where it changes, and the suffix within the site."""
    formats = formats_of(state)
    scale = torch.float16 if state.dtype == torch.float16 else torch.bfloat16
    by_weight = {s.weight: s for s in state.graph if s.name in formats}
    joined: dict[str, list[Site]] = {}
    for site in state.graph:
        if site.expert is not None:
            joined.setdefault(site.joined, []).append(site)
    for spec in model.specs:
        sites = [by_weight[spec.name]] if spec.name in by_weight else []
        if any(s.name in formats for s in joined.get(spec.name, ())):
            sites = joined[spec.name]
        if not sites:
            yield spec, None, ""
        for site in sites:
            yield from site_entries(site, formats.get(site.name), spec.dtype, scale)


def site_entries(site: Site, fmt: Format | None, dtype: torch.dtype, scale: torch.dtype) -> Iterator[tuple[Spec, Site, str]]:
    if fmt is None:  # one expert left dense beside quantized ones
        yield Spec(site.weight, dtype, site.shape), site, "weight"
        return
    for suffix, (kind, shape) in fmt.tensors(site.shape, scale).items():
        flip = site.transposed and suffix == "weight"
        yield Spec(f"{site.stem}.{suffix}", kind, shape[::-1] if flip else shape), site, suffix


def tensors(model: Model, state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `entries`, one at a time."""
    held: tuple[str, dict[str, torch.Tensor]] = ("", {})
    for spec, site, suffix in entries(model, state):
        if site is None:
            yield spec.name, state.checkpoint.read(spec.name)
            continue
        if held[0] != site.name:
            stored = state.changed.get(site.name)
            held = site.name, dict(stored.load().tensors) if stored else {"weight": state.original(site)}
        tensor = held[1][suffix]
        yield spec.name, tensor.T.contiguous() if site.transposed and suffix == "weight" else tensor


def scheme(fmt: Int) -> dict[str, Any]:
    """A format as compressed-tensors' QuantizationArgs spell it."""
    return {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric, "dynamic": False,
            "strategy": "channel" if fmt.group is None else "group", "group_size": fmt.group}  # fmt: skip


def quantization_config(state: State) -> dict[str, Any]:
    """The `quantization_config` of config.json: one group per format, disjoint targets, everything else ignored."""
    formats = {n: f for n, f in formats_of(state).items() if isinstance(f, Int)}
    groups: dict[str, Any] = {}
    for i, fmt in enumerate(dict.fromkeys(formats.values())):
        mine = [state.graph[n] for n, f in formats.items() if f == fmt]
        groups[f"group_{i}"] = {"targets": targets(mine), "weights": scheme(fmt), "format": "pack-quantized",
                                "input_activations": None, "output_activations": None}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": groups, "ignore": ignored(state.graph, formats)}  # fmt: skip


def targets(sites: list[Site]) -> list[str]:
    """Exact module paths; the experts of all blocks as one anchored pattern over their names in the tree and on disk, since
    some engines go by the one and some by the other."""
    exact = [s.module for s in sites if s.expert is None]
    experts = [s for s in sites if s.expert is not None]
    if not experts:
        return exact
    paths = {p for s in experts for p in (s.module, s.stem.rsplit(".", 2)[0])}
    split = [re.split(r"\.(\d+)\.", path, maxsplit=1) for path in sorted(paths)]
    head, tails = re.escape(split[0][0]), "|".join(dict.fromkeys(re.escape(tail) for _, _, tail in split))
    numbers = "|".join(dict.fromkeys(str(s.block) for s in experts))
    return [*exact, rf"re:^{head}\.({numbers})\.({tails})\..+$"]


def ignored(graph: Graph, formats: dict[str, Int]) -> list[str]:
    """Modules that keep their weights: sites without a format, routers, and other matrices that are no site."""
    left = [s for s in graph if s.name not in formats and s.role != "embed"]
    names = [p for s in left for p in ((s.stem,) if s.expert is not None else (s.module, *s.aliases))]
    others = [n.removesuffix(".weight") for n, shape in graph.parameters.items() if n.endswith(".weight") and len(shape) == 2]
    return [n for n in dict.fromkeys([*names, *others]) if n != graph["embed"].stem]


# --- what engines can do with it -------------------------------------------------------------------------------------


def split_group(group: tuple[Site, ...], formats: dict[str, Format]) -> str:
    texts = [str(formats.get(s.name, "as it is")) for s in group]
    some = range(len(group)) if len(group) <= 3 else sorted(map(texts.index, set(texts)))  # of many experts, one for each format
    shown = ", ".join(f"{group[i].name} {texts[i]}" for i in some)
    kind = "experts of one block" if group[0].expert is not None else ",".join(s.role for s in group)
    return (f"compressed_tensors: vLLM joins {kind} into one matrix and needs one format for them, here {shown}; "
            "pin them together")  # fmt: skip


def stock_obstacles(state: State) -> list[str]:
    """Why stock transformers cannot load the artifact; empty when it can."""
    formats = {n: f for n, f in formats_of(state).items() if isinstance(f, Int)}
    found = []
    if any(not f.symmetric for f in formats.values()):
        found.append("asymmetric formats (compressed-tensors 0.18 to 0.20 does not load their zero points)")
    if any(state.graph[n].transposed for n in formats):
        found.append(f"'{state.graph.family}' keeps its matrices in Conv1D modules, which compressed-tensors passes over: what "
                     "loads has random weights in their place")  # fmt: skip
    experts = {str(formats.get(s.name)) for s in state.graph if s.expert is not None}
    if len(experts) > 1:
        found.append("experts of different formats (it reads all experts with one)")
    return found


def engines(obstacles: list[str]) -> str:
    return ENGINES if obstacles else f"transformers (with compressed-tensors >= 0.18), {ENGINES}"


# --- reading it back -------------------------------------------------------------------------------------------------


def declared(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's config.json; empty where there is none, or the file is no JSON mapping."""
    found = json_of(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a compressed-tensors checkpoint."""
    return declared(folder).get("quant_method") == "compressed-tensors"


def read(folder: Path) -> State:
    """The state that a pack-quantized folder holds; ModelError where its config and tensors disagree."""
    model = open_artifact(folder)
    try:
        groups = list(declared(folder)["config_groups"].values())
        schemes = [(list(group["targets"]), int_of(group["weights"], folder)) for group in groups]
        stored = {site.name: stored_at(site, schemes, model) for site in model.graph
                  if f"{site.stem}.weight_packed" in model.checkpoint}  # fmt: skip
    except (LookupError, TypeError, AttributeError, re.error) as e:
        raise ModelError(f"{folder / 'config.json'}: its quantization_config is broken ({type(e).__name__}: {e})") from None
    state = State(model.graph, model.checkpoint, model.dtype, facts=Fact.QUANTIZED)
    return state.with_sites(stored)


def stored_at(site: Site, schemes: list[tuple[list[str], Int]], model: Model) -> Stored:
    """Where a packed site lies, in the format that a target names; ModelError if its tensors are not of that format."""
    fmt = next((f for names, f in schemes if any(hits(site, t) for t in names)), None)
    if fmt is None:
        raise ModelError(f"{model.folder}: '{site.stem}' is packed, but no target of config.json names it")
    for suffix, (_, shape) in fmt.tensors(site.shape).items():
        spec = model.checkpoint.specs.get(f"{site.stem}.{suffix}")
        if spec is None or spec.shape != shape:
            found = "missing" if spec is None else list(spec.shape)
            raise ModelError(f"{model.folder}: '{site.stem}.{suffix}' is {found}, {fmt} needs {list(shape)}; "
                             "config and weights do not belong together")  # fmt: skip
    return Stored(model.checkpoint.files[f"{site.stem}.weight_packed"], f"{site.stem}.", fmt, site.shape)


def open_artifact(folder: Path) -> Model:
    model = open_model(str(folder))
    del model.config.quantization_config
    return model


def int_of(weights: dict[str, Any], folder: Path) -> Int:
    if weights.get("type") != "int":
        raise ModelError(f"{folder}: holds weights of type '{weights.get('type')}'; only int can be read")
    return Int(weights["num_bits"], weights.get("group_size"), weights["symmetric"])


def hits(site: Site, target: str) -> bool:
    names = (site.module, site.stem)
    if target.startswith("re:"):
        return any(re.match(target[3:], n) for n in names)
    return target in names


def same_tensors(wanted: State, written: State) -> None:
    """ExportError naming the first site whose codes, or other tensor whose bytes, are not on disk as they should be."""
    for name, stored in wanted.changed.items():
        ours, theirs = stored.load().tensors, {}
        if isinstance(stored.format, Dense):
            theirs = {"weight": written.original(written.graph[name])}
        elif name in written.changed:
            theirs = dict(written.changed[name].load().tensors)
        for suffix, tensor in ours.items():
            if suffix not in theirs or not torch.equal(tensor, theirs[suffix]):
                raise ExportError(f"'{name}': {suffix} on disk differs from the run's; please report this")
    before, after = wanted.checkpoint, written.checkpoint
    sites = [wanted.graph[n] for n in formats_of(wanted)]
    replaced = {s.weight for s in sites} | {s.joined for s in sites if s.expert is not None}
    for name in before.specs:
        if name not in replaced and (name not in after or tensor_bytes(before.read(name)) != tensor_bytes(after.read(name))):
            raise ExportError(f"'{name}' on disk differs from the source's; please report this")


def logits(state: State, config: Any, tokens: torch.Tensor, device: str) -> torch.Tensor:
    """The logits of a state, streamed, fp32 [b, t, vocabulary]."""
    stream = Stream(state, config, device)
    batches = stream.start(state, [tokens])
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    return next(stream.logits(state, batches)).float().cpu()


class EngineError(Exception):
    """An engine's own code failed on the artifact; the message says how."""


def stock_logits(folder: Path, tokens: torch.Tensor, graph: Graph) -> torch.Tensor:
    """The logits of the artifact as stock transformers loads it; its progress bars are not shown.

    Experts run in its plain loop: the grouped product that it prefers rounds differently, which may send a token elsewhere.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    loop = {"experts_implementation": "eager"} if any(s.expert is not None for s in graph) else {}
    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():
            model = model_class(config).from_pretrained(folder, local_files_only=True, **loop).eval()
            out: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    except Exception as e:  # some architectures read a module's `weight`, which a packed module lacks
        raise EngineError(f"transformers' {model_class(config).__name__} fails on it ({first_line(e)})") from e
    return out.float()


def compared(ours: torch.Tensor, theirs: torch.Tensor, engine: str, remark: str = "") -> Proof:
    """The proof, or an ExportError where the engine's logits are not the run's."""
    difference = float((ours - theirs).abs().max())
    if not math.isfinite(difference) or difference > TOLERANCE * float(ours.abs().max()):
        raise ExportError(f"{engine} loads the artifact, but its logits differ from the run's by {difference:.3g} "
                          f"(largest logit {float(ours.abs().max()):.3g}); the artifact is not kept")  # fmt: skip
    return Proof(engine, difference, remark)
