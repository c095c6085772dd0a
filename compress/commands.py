"""What the six verbs do, in terms of the pipeline; each prints one screen."""

from __future__ import annotations

import argparse
import fnmatch
import glob
import importlib.util
import json
import os
import subprocess
import sys
import types
import typing
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from compress import bench, cached, evaluate, pipeline, timing
from compress.cache import merging
from compress.cache.merging import MERGED
from compress.documents import json_mapping
from compress.errors import CompressError, MatchError, ModelError, RecipeError, RunError, did_you_mean
from compress.export.artifact.engines import Engine, EngineError, dense
from compress.export.artifact.files import check_marks
from compress.export.artifact.tensors import bytes_on_disk
from compress.export.compressed_tensors import adapter
from compress.export.compressed_tensors import reader as compressed_reader
from compress.export.compressed_tensors.exporter import CompressedTensors
from compress.export.compressed_tensors.lint import faults
from compress.export.native.exporter import Native
from compress.export.table import EXPORTERS, KINDS, Kind
from compress.formats import Format
from compress.formats.caches import CACHE
from compress.model import data
from compress.model.gguf_source import SUFFIX
from compress.model.model import Model, open_model
from compress.model.vocabulary import source_ids
from compress.nodes import load_yaml
from compress.parts import read_part
from compress.passes import PASSES
from compress.planning import plan_command as plan_command
from compress.recipe import Recipe, load, schema
from compress.report import page
from compress.report.console import Console
from compress.report.report import shown, source_rows
from compress.run import ANALYSES, digest, is_run
from compress.state import State
from compress.state.plan import size

SHOWN_SITES = 40


class Measured(BaseModel):
    """A row of an error table: what one candidate for a site would cost and do."""

    model_config = ConfigDict(extra="allow")

    site: str
    format: str
    bytes: int
    output: float
    weight: float
    damage: float


def run_command(options: argparse.Namespace) -> None:
    console = Console()
    try:
        made = pipeline.run(options.recipe, options.overrides, options.out, options.until, options.device, console)
    finally:
        console.close()
    print(f"\n{made.report.summary()}\nreport: {made.out / 'report.html'}")


# --- eval and inspect ------------------------------------------------------------------------------------------------


def opened(path: Path) -> tuple[Model, State, Kind | None]:
    """A run's artifact, an artifact, or a model folder: its model, its state, and the kind of artifact it is."""
    if is_run(path):
        names = run_facts(path).get("artifacts")
        own = [name for name in names if name in EXPORTERS] if isinstance(names, list) else []
        if not own:
            raise ModelError(f"{path}: this run has no artifact yet; run its recipe to the end")
        path = path / own[0]
    if path.suffix.lower() == SUFFIX and path.is_file():
        model = open_model(str(path), say=tell)
        return model, model.state, None
    if not path.is_dir():
        raise ModelError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    kind = next((k for k in KINDS if k.is_artifact(path)), None)
    if kind:
        return kind.open_artifact(path), kind.read(path), kind
    check_marks(path)  # what is no kind of artifact may have been one
    model = open_model(str(path), leave=None)
    return model, model.state, None


def tell(line: str) -> None:
    """Say what takes long, where figures do not go."""
    print(line, file=sys.stderr, flush=True)


def engine_of(kind: Kind | None, model: Model, state: State, device: str) -> tuple[Engine | None, str]:
    """The engine that serves an artifact, and what a user should read of it; None where our own streamed reader has to do."""
    if kind is None:
        return None, "transformers' modules, streamed"
    try:
        engine = kind.engine(model.folder, state, device)
        engine.prefill(torch.zeros(1, 2, dtype=torch.int64))  # some fail only when they run
    except EngineError as e:
        return None, f"{kind.reader} ({e})"
    remark = getattr(engine, "remark", "")
    return engine, f"{engine.name} ({remark})" if remark else engine.name


def eval_command(options: argparse.Namespace) -> None:
    if options.tasks:
        hand_over(options)
        return
    pipeline.check_device(options.device)
    model, state, kind = opened(options.what)
    windows, base = windows_of(options)
    data.check_length(windows.length, model.config)
    tokens = data.read(windows, model.folder, base, state.graph["embed"].shape[0])
    original = original_of(options)
    if original:
        state, tokens = as_of(original, model, state, tokens)
    engine, said = engine_of(kind, model, state, options.device)
    ask = (lambda ids: engine.prefill(ids)[0]) if engine else None
    _, scores = evaluate.compare(original.state if original else None, state, tokens, options.device, ask)
    through = pipeline.cache_scores(state, tokens, options.device, engine) if cached.policy_of(state) else None
    figures = evaluate.sizes(state, bytes_on_disk(model, state))
    known = list(dict.fromkeys((*model.remarks, *(original.remarks if original else ()))))
    if options.json:
        remarks = ({"cache": through.json()} if through else {}) | ({"remarks": known} if known else {})
        print(json.dumps({**scores.json(), **figures.json(), "text": tokens.place, "engine": said, **remarks}, indent=1))
        return
    rows = [["perplexity", shown(scores.perplexity, ".4f")],
            ["KL from the original (nats)", shown(scores.kl, ".5f")],
            ["same top token", shown(scores.agreement, ".2%")],
            ["weights on disk", size(figures.tensor_bytes)],
            ["bits per weight, linear layers", f"{figures.linear_bits:.3f}"],
            ["bits per weight, whole file", f"{figures.file_bits:.3f}"],
            *(cached.rows(through.json()) if through else [])]  # fmt: skip
    print(page.columns(rows, right=(1,)))
    by_source, head = source_rows({"compressed": scores.json()})
    if by_source:
        print("\n" + page.columns(by_source, head, right=range(1, len(head))))
    print(f"\n{scores.tokens:,} tokens of {tokens.place}, context {scores.length}; through {said}")
    for remark in known:
        print(f"note: {remark}")


def as_of(original: Model, model: Model, state: State, tokens: data.Tokens) -> tuple[State, data.Tokens]:
    """The state of an artifact, and tokens, as those of the model it was made from; ModelError where that has other tokens."""
    theirs, ours = (m.graph["embed"].shape[0] for m in (original, state))
    if theirs == ours:
        return state, tokens
    vocabulary = source_ids(model.folder, ours)
    if vocabulary is None or max(vocabulary) >= theirs:
        raise ModelError(f"{original.folder}: has another vocabulary than {model.folder}; KL needs the model it was made from")
    return replace(state, vocabulary=vocabulary), replace(tokens, ids=torch.tensor(vocabulary)[tokens.ids])


def bench_command(options: argparse.Namespace) -> None:
    if options.table is not None:
        timing.table_command(options, tell)
        return
    if options.batch is not None:
        raise RecipeError("--batch is for --table; engines are timed one token at a time")
    pipeline.check_device(options.device)
    model, state, kind = opened(options.what)
    if not state.graph.causal:
        raise ModelError(f"{options.what}: the model does not predict the next token; there is nothing to decode")
    original = original_of(options)
    if original is None:
        raise ModelError(f"{options.what}: its original is not known; name it with --against MODEL")
    learned = getattr(model.config, "max_position_embeddings", None) or options.prompt + options.new
    if options.prompt + options.new > learned:
        raise ModelError(f"{options.what}: has {learned} positions; lower --prompt {options.prompt} or --new {options.new}")
    try:
        engines = [dense(original, options.device)]
        engines.append(kind.engine(model.folder, state, options.device) if kind else dense(model, options.device))
        vocabulary = state.graph["embed"].shape[0]
        prompt = torch.randint(vocabulary, (1, options.prompt), generator=torch.Generator().manual_seed(0))
        with closing(Console(stream=sys.stderr)) as console:
            console.progress(0, options.repeats + 1, "turns")
            tick = lambda done: console.progress(done, options.repeats + 1, "turns")  # noqa: E731
            before, after = bench.measure(engines, prompt, options.new, options.repeats, tick)
    except EngineError as e:
        raise ModelError(f"{options.what}: {e}; no other engine can serve it here") from None
    if options.json:
        print(json.dumps(bench.json_of(before, after, options.prompt), indent=1))
        return
    print(page.columns(bench.rows(before, after, options.prompt), ["", "original", "this", "ratio"], right=(1, 2, 3)))
    print(f"\nmedian (and extremes) of {options.repeats} turns, batch 1, prompt {options.prompt}, {options.new} tokens decoded, "
          f"{torch.get_num_threads()} threads, {options.device}")  # fmt: skip


def windows_of(options: argparse.Namespace) -> tuple[data.Windows, Path]:
    if options.text:
        return data.Windows(text=os.path.abspath(options.text), sequences=options.sequences, length=options.length), Path()
    recipe = recipe_of(options.what)
    if recipe is None or recipe.document.data.evaluation is None:
        raise RecipeError(f"{options.what}: names no evaluation text; give one with --text FILE")
    return recipe.document.data.evaluation, recipe.base


def recipe_of(path: Path) -> Recipe | None:
    """The resolved recipe of a run folder, or of the run folder that an artifact lies in."""
    for folder in (path, Path(os.path.realpath(path)).parent):
        file = folder / "recipe.resolved.yaml"
        if is_run(folder) and file.exists():
            try:
                return load(file, PASSES, EXPORTERS)
            except RecipeError as e:
                raise RunError(f"{e}; the run folder is damaged, run its recipe again, which writes this file anew") from None
    return None


def run_facts(folder: Path) -> dict[str, Any]:
    """What the run.json of a run folder says."""
    return json_mapping(folder / "run.json", RunError)


def original_of(options: argparse.Namespace) -> Model | None:
    """The model to compare with; ModelError where it is that of a run and has changed since."""
    if options.against:
        return open_model(str(options.against), say=tell, leave=None)
    recipe = recipe_of(options.what)
    if recipe is None:
        return None
    model = open_model(recipe.document.model, recipe.base, tell, recipe.document.leave)
    folder = next(f for f in (options.what, Path(os.path.realpath(options.what)).parent) if is_run(f))
    if digest(model.identity()) != run_facts(folder).get("root"):
        raise ModelError(
            f"{model.folder}: is no longer the model that {folder} was made from; name what to compare with: --against"
        )
    return model


def hand_over(options: argparse.Namespace) -> None:
    """Let lm-eval measure tasks through transformers, which our runtime has taught to load native artifacts."""
    if importlib.util.find_spec("lm_eval") is None:
        raise CompressError("--tasks needs lm-eval:  pip install lm-eval")
    model, _, kind = opened(options.what)
    if kind and kind.name not in (CompressedTensors.name, Native.name):
        raise CompressError(f"{model.folder}: --tasks goes through transformers, which does not load this kind of artifact; "
                            "export compressed_tensors or native as well")  # fmt: skip
    corrected = f",peft={model.folder / adapter.FOLDER}" if adapter.present(model.folder) else ""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model.folder}{corrected}", "--tasks", options.tasks,
                 "--device", options.device]  # fmt: skip
    program = "import compress.export.runtime; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    code = subprocess.run([sys.executable, "-c", program, *arguments], check=False).returncode
    if code:
        raise CompressError(f"lm-eval ended with exit code {code}")


def table_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of the error table that a run's plan.yaml names; RunError where there is none, or it is damaged."""
    plan = run / "plan.yaml"
    known = load_yaml(plan, RunError) if plan.exists() else {}
    noted = known.get("table") if isinstance(known, dict) else None
    found = list(run.glob(f"{ANALYSES}/tables-*/{glob.escape(noted)}.safetensors")) if isinstance(noted, str) and noted else []
    if not found:
        raise RunError(f"{run}: holds no error table; it is measured by 'plan' or 'run' of a recipe with 'allocate'")
    rows = read_part(found[-1])[1]
    try:
        return [Measured.model_validate(row).model_dump() for row in rows]
    except ValueError:
        raise RunError(f"{found[-1]}: is no error table; delete this file and run again") from None


def error_table(options: argparse.Namespace) -> None:
    """The table that the allocation in the run's plan.yaml was made from: what each candidate would cost and do."""
    rows = table_rows(options.what)
    wanted = [r for r in rows if options.site is None or fnmatch.fnmatchcase(r["site"], options.site)]
    if not wanted:
        known = sorted({r["site"] for r in rows})
        raise MatchError(f"'{options.site}' is in no row of the table{did_you_mean(options.site, known)}")
    if options.json:
        print(json.dumps(wanted, indent=1))
        return
    figures = [[page.number(r[k]) for k in ("output", "weight", "damage")] for r in wanted]
    shown = [[r["site"], r["format"], f"{r['bytes']:,}", *f] for r, f in zip(wanted, figures, strict=True)]
    print(page.columns(shown, ["site", "format", "bytes", "error of outputs", "of weights", "damage"], right=(2, 3, 4, 5)))


def inspect_command(options: argparse.Namespace) -> None:
    if options.errors:
        error_table(options)
        return
    model, state, _ = opened(options.what)
    sites = list(state.graph) if options.site is None else state.graph.match(options.site)
    rows: list[dict[str, Any]] = []
    for s in sites:
        fmt = state.format(s)
        stored = fmt.nbytes(s.shape) if fmt else 0 if s.tied else s.numel * state.dtype.itemsize
        rows.append({"site": s.name, "role": s.role, "shape": list(s.shape), "format": str(fmt or "as it is"),
                     "bytes": stored, "bits": round(8 * stored / s.numel, 4), "tensor": s.weight})  # fmt: skip
    if options.json:
        print(json.dumps({"sites": rows, "tensor_bytes": bytes_on_disk(model, state)}, indent=1))
        return
    shown = rows if options.site else rows[:SHOWN_SITES]
    table = [[r["site"], f"{r['shape'][0]}x{r['shape'][1]}", r["format"], f"{r['bits']:.3f}", f"{r['bytes']:,}"] for r in shown]
    print(page.columns(table, ["site", "shape", "format", "bits", "bytes"], right=(3, 4)))
    if len(shown) < len(rows):
        print(f"… {len(rows) - len(shown)} more; name a site or a pattern to see it")
    counts = f"{len(state.graph.blocks)} blocks, {len(state.graph.sites)} sites"
    print(f"\n{state.graph.family}, {counts}, {size(bytes_on_disk(model, state))} of tensors")
    if CACHE in state.serving:
        said = state.serving[CACHE]
        print(f"cache: {said['format']}, {said['layers']} layers, scales of {len(said['scales'])} attentions")
    if policy := cached.policy_of(state):
        hangs = f", by the prompt, which at T {policy.ladder.recovery:g} had this in the mean" if policy.ladder else ""
        print(f"cache: a policy of {len(policy.layers)} layers; at {policy.context:,} tokens {size(policy.bytes)} of "
              f"{size(policy.full)}{hangs}")  # fmt: skip
    if MERGED in state.serving:
        merged = merging.told(state.serving[MERGED])
        print(f"context: merged beyond {merged.window:,} tokens, chunks of {merged.chunk:,}, {merged.warmup} layers before")
    for how, count in Counter(map(str, state.sparsity.values())).items():
        print(f"sparsity: {how}, of {count} {'matrix' if count == 1 else 'matrices'}")
    for remark in [*model.remarks, *map("for vLLM: {}".format, said_by_lint(state))]:
        print(f"note: {remark}")
    if len(sites) == 1:
        print(histogram(state, sites[0]))


def said_by_lint(state: State) -> list[str]:
    """What the check of a compressed-tensors folder finds; nothing of others."""
    folder = state.dense.folder
    return list(faults(folder, {s.stem: s.module for s in state.graph})) if compressed_reader.is_artifact(folder) else []


def histogram(state: State, site: Any, bins: int = 21, width: int = 50) -> str:
    """The distribution of one site's weights, as text."""
    weight = state.weight(site).float()
    limit = float(weight.abs().max()) or 1.0
    counts = weight.histc(bins, -limit, limit).int().tolist()
    top = max(counts)
    edges = [limit * (2 * (i + 0.5) / bins - 1) for i in range(bins)]
    lines = [f"{e:+.4f}  {'█' * round(width * c / top)} {c:,}" for e, c in zip(edges, counts, strict=True)]
    return f"\n{site.name}: mean {float(weight.mean()):+.3g}, std {float(weight.std()):.3g}\n" + "\n".join(lines)


# --- passes ----------------------------------------------------------------------------------------------------------


def passes_command(options: argparse.Namespace) -> None:
    if options.schema:
        print(json.dumps(schema(PASSES, EXPORTERS), indent=1))
        return
    known = {**PASSES, **EXPORTERS}
    if options.name is None:
        rows = [[name, "pass", summary(cls)] for name, cls in PASSES.items()]
        rows += [[name, "exporter", summary(cls)] for name, cls in EXPORTERS.items()]
        print(page.columns(rows))
        return
    if options.name not in known:
        raise RecipeError(f"no pass '{options.name}'{did_you_mean(options.name, known)}   known: {', '.join(known)}")
    cls = known[options.name]
    print(f"{options.name}: {summary(cls)}\n")
    rows = []
    for name, field in cls.model_fields.items():
        default = page.brief(field.default) if field.default is not None else "-"
        rows.append([name, type_text(field.annotation), default, field.description or ""])
    print(page.columns(rows, ["option", "type", "default", "meaning"]))


def summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def type_text(kind: Any) -> str:
    """A field's type as a person would say it."""
    if typing.get_origin(kind) is typing.Annotated:
        return type_text(typing.get_args(kind)[0])
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if kind == Format:
            return "format"
        return " | ".join(dict.fromkeys(type_text(a) for a in typing.get_args(kind) if a is not type(None)))
    if typing.get_origin(kind) in (dict, tuple):
        return "mapping" if typing.get_origin(kind) is dict else f"list of {type_text(typing.get_args(kind)[0])}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(kind, "__name__", str(kind)), getattr(kind, "__name__", str(kind))
    )
