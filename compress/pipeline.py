"""From a recipe to artifacts: the one place, beside the command line, that joins passes and exporters.

`plan` tells what `run` will do and cost; `run` does it. Both are what the command line calls and what a program may call; a
recipe is checked against its model in prepare.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from compress import cached, calibration, evaluate, manager
from compress.cached import policy_of
from compress.documents import json_mapping
from compress.errors import RecipeError, RunError, first_line
from compress.export.artifact.carried import carried
from compress.export.artifact.exporter import Files, Job, Proof
from compress.export.artifact.files import sha256
from compress.export.artifact.place import place, refuse_foreign
from compress.manager import Context, Pass
from compress.model import data
from compress.model.attention import heads, plain
from compress.model.speed import computing
from compress.prepare import Prepared, check_exports, prepare, proof_tokens
from compress.recipe import Recipe
from compress.report import allocation, page, report
from compress.report.console import Console
from compress.run import MARK, RunFolder, Step, digest, read_record, step_inputs, versions, write_atomic
from compress.stages import Stage, largest, seconds, stages, too_large
from compress.state import State
from compress.state.checkpoint import Layout
from compress.state.plan import size

OPTION = 100  # characters of an option in a table of steps

# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What `run` would do. steps: (pass, options, status). layouts: exporter name -> exact files. largest: the stage that takes
    the most memory."""

    prepared: Prepared
    steps: list[tuple[str, str, str]]
    layouts: dict[str, Files]
    original: Layout
    largest: Stage
    seconds: float
    remarks: list[str] = field(default_factory=list)


def plan(
    path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    measure: bool = True,
    device: str = "cpu",
    console: Console | None = None,
) -> Planned:
    """What a run of the recipe will do, how large its result will be to the byte, and about how long it takes.

    What a pass decides by measuring (an allocation) is measured now and kept for the run; with `measure` false only what
    is known from before is used, else a guess.
    """
    console = console or Console(quiet=True)
    ready = prepare(path, overrides, console.note)
    out = out or ready.recipe.out
    if ready.model.has_weights:
        _ = ready.model.state, ready.pool, ready.lessons, ready.evaluation  # their mistakes are known now, not after hours
        RunFolder(out).refuse_foreign()
        ready = decided(windows_for(ready, out, measure, device, console), out, measure, device, console)
    remarks = list(ready.model.remarks)
    remarks += told_by_passes(ready)
    remarks += [r for e in ready.exports for r in e.remarks(ready.foreseen)]
    if not ready.model.has_weights:
        remarks.append(f"{ready.model.folder} holds no weights: sizes are those of the config in {str(ready.start.dtype)[6:]}")
    layouts = {e.name: e.layout(ready.model, ready.foreseen) for e in ready.exports}
    remarks += over_budget(ready.foreseen, layouts)
    todo = stages(ready, layouts)
    remarks += filter(None, [too_large(largest(todo))])
    return Planned(
        prepared=ready,
        steps=step_states(ready, out, device),
        layouts=layouts,
        original=Layout.of(ready.model.specs),
        largest=largest(todo),
        seconds=seconds(todo, ready.start.dtype),
        remarks=remarks,
    )


def told_by_passes(ready: Prepared) -> list[str]:
    """What passes say of the states that they will be given; those that decide, also what they have found."""
    state, found = ready.start, list[str]()
    for i, p in enumerate(ready.recipe.passes):
        records = ready.told[i] if i < len(ready.told) else ()
        foreseen = p.foresee(state)
        foreseen = p.decided(state, foreseen, records) if records else foreseen
        found += p.remarks(state, foreseen)
        found += [ready.trained[i][1]] if i in ready.trained else []
        known = state.graph.sites  # what was found of single matrices is told in the report
        found += [f"{r['site']}: {'; '.join(r['notes'])}" for r in records
                  if p.decides and r.get("notes") and r["site"] not in known]  # fmt: skip
        state = manager.settle(p, state, foreseen)
    return found


def over_budget(state: State, layouts: Mapping[str, Files]) -> list[str]:
    """What to know where a budget of bytes is passed by an exporter whose containers are larger than the formats in them."""
    forecast = state.plan.forecast if state.plan else None
    found = []
    for limit in forecast.spent if forecast else ():
        whole = not limit.name.endswith("bits") and ":" not in limit.name  # of the file, not of some matrices or an average
        found += [f"{name} takes {size(files.nbytes)}, above the budget of {limit.name}: its blocks are larger than the formats"
                  for name, files in layouts.items() if whole and files.nbytes > limit.allowed]  # fmt: skip
    return found


def windows_for(ready: Prepared, out: Path, measure: bool, device: str, console: Console) -> Prepared:
    """The same with its calibration windows, where they are known; they are asked of the model if the first step decides by
    them, and that is to be measured."""
    passes = ready.recipe.passes
    if ready.settled or not (measure and passes and passes[0].decides):
        return calibration.recalled(ready, out, device)
    with RunFolder(out).held():
        return calibration.settled(ready, out, device, console)


def decided(ready: Prepared, out: Path, measure: bool, device: str, console: Console) -> Prepared:
    """The same with what its first passes decide, if nothing but deciding and finished steps stand before that."""
    if not ready.settled:  # no step can be finished then
        return ready
    steps = steps_of(ready, out, device, lambda step: context_of(ready, step, device, console))
    known = [step.finished or (p.decides and measure) for p, step in zip(ready.recipe.passes, steps, strict=True)]
    reach = known.index(False) if False in known else len(known)
    last = max((i + 1 for i, p in enumerate(ready.recipe.passes[:reach]) if p.decides), default=0)
    if not last:
        return ready
    if all(step.finished for step in steps[:last]):
        state = fold(ready, steps, last, Console(quiet=True))
        save_plan(state, out)
    else:
        with RunFolder(out).held():
            state = fold(ready, steps, last, console)
            save_plan(state, out)
    foreseen = manager.foresee(ready.recipe.passes[last:], state)
    check_exports(ready.recipe, foreseen)
    return replace(ready, foreseen=foreseen, told=tuple(step.records for step in steps[:last]))


def save_plan(state: State, out: Path) -> None:
    """What each site is to become, where a person finds it."""
    if state.plan:
        write_atomic(out / "plan.yaml", allocation.plan_yaml(state.plan).encode())


def step_states(ready: Prepared, out: Path, device: str) -> list[tuple[str, str, str]]:
    """(pass, options that are not default, whether it is cached) for every step."""
    rows = []
    for p, step in zip(ready.recipe.passes, make_steps(ready, out, device), strict=True):
        chosen = p.model_dump(mode="json", exclude_unset=True)
        options = ", ".join(f"{k} {page.brief(v, OPTION)}" for k, v in chosen.items())
        unknown = "to do" if ready.model.has_weights else "?"  # no step is finished that reads windows yet to be found
        status = unknown if step is None else "cached" if step.finished else "in part" if step.partial.exists() else "to do"
        rows.append((p.name, options, status))
    return rows


def make_steps(ready: Prepared, out: Path, device: str) -> list[Step | None]:
    """The steps with their keys; None where there are no weights, or no calibration windows yet, to take a key from."""
    if not (ready.model.has_weights and ready.settled):
        return [None] * len(ready.recipe.passes)
    return list(steps_of(ready, out, device, lambda _: None))


def steps_of(ready: Prepared, out: Path, device: str, context_of: Any) -> list[Step]:
    key = ready.root_key
    hashed = ready.calibration.hash if ready.calibration else None
    if ready.foreseen.vocabulary is not None:  # a file that no option holds decides on it
        hashed = digest(hashed, ready.foreseen.vocabulary)
    steps, computes = [], " ".join(str(computing(dtype, device))[6:] for dtype in (ready.start.dtype, torch.bfloat16))
    for number, p in enumerate(ready.recipe.passes, 1):
        read = (
            digest(hashed, ready.training.hash, [n for _, n in ready.training.sources]) if p.trains and ready.training else hashed
        )
        made_of = step_inputs(p, key, read, ready.seed, ready.recipe.passes[number:], computes)
        step = Step.of(out / "steps", number, made_of, context_of, ready.root_key)
        steps.append(step)
        key = step.key
    return steps


# --- run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run made: the last state, figures before and after, artifacts with their proofs."""

    out: Path
    state: State
    scores: dict[str, Any]
    artifacts: Mapping[str, tuple[Path, Proof]]
    report: report.Report


def run(
    path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    until: str | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Outcome:
    """Run a recipe, resuming what its folder holds. `until`: stop after this step, by number or pass name."""
    console = console or Console(quiet=True)
    ready = prepare(path, overrides, console.note)
    last = last_step(ready.recipe, until)
    check_device(device)
    out = out or ready.recipe.out
    _ = (
        ready.model.state,
        ready.pool,
        ready.lessons,
        ready.evaluation,
    )  # what can fail by itself does so before anything is written
    for exporter in ready.exports:
        refuse_foreign(out / exporter.name)
    with RunFolder(out).held():
        for remark in ready.model.remarks:
            console.note(f"note: {remark}")
        write_atomic(out / "recipe.resolved.yaml", ready.recipe.resolved(ready.recipe.base, out).encode())
        ready = calibration.settled(ready, out, device, console)
        write_atomic(out / "run.json", json.dumps(run_record(ready), indent=1).encode())
        return execute(ready, out, last, device, console)


def run_record(ready: Prepared, artifacts: Sequence[str] = ()) -> dict[str, Any]:
    """What run.json says: what the run is made of, and which artifacts are its own, once they are proven."""
    hashes = {n: t.hash for n, t in (("calibration", ready.calibration), ("evaluation", ready.evaluation)) if t}
    return {"folder": MARK, "versions": dict(versions()), "seed": ready.seed, "model": ready.model.name,
            "revision": ready.model.revision, "weights": ready.model.checkpoint.fingerprint, "root": ready.root_key,
            "data": hashes, "artifacts": list(artifacts)}  # fmt: skip


def last_step(recipe: Recipe, until: str | None) -> int:
    """How many steps to run; RecipeError where `until` names none of them."""
    if until is None:
        return len(recipe.passes)
    names = [p.name for p in recipe.passes]
    numbers = {str(i): i for i in range(1, len(names) + 1)}
    if until in numbers:
        return numbers[until]
    if until not in names:
        raise RecipeError(f"--until {until}: the recipe's steps are {', '.join(f'{i} {n}' for i, n in enumerate(names, 1))}")
    return names.index(until) + 1


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()  # some devices can be named, and hold nothing
    except Exception as e:  # whatever the module of a device raises, or that there is none
        raise RecipeError(f"--device {device}: {first_line(e)}") from None


def context_of(ready: Prepared, step: Step, device: str, console: Console) -> Context:
    """What the pass of one step may use."""
    trains = ready.recipe.passes[step.number - 1].trains
    return Context(ready.seed, ready.calibration, device, step, console.say, console.progress, ready.recipe.passes[step.number :],
                   ready.start, ready.training if trains else None)  # fmt: skip


def fold(ready: Prepared, steps: Sequence[Step], last: int, console: Console) -> State:
    """The state after the first `last` passes, each restored or run."""

    def open_step(number: int, p: Pass) -> Step:
        step = steps[number - 1]
        console.step(number, len(ready.recipe.passes), p.name, step.finished, step.difference())
        return step

    return manager.fold(ready.recipe.passes[:last], ready.start, open_step)


@dataclass(frozen=True)
class Folded:
    """What the passes made. key: of the step that the state comes from. records: what they told of sites. steps: what the record
    of each says."""

    state: State
    key: str
    records: list[manager.Record]
    steps: list[dict[str, Any]]


def execute(ready: Prepared, out: Path, last: int, device: str, console: Console) -> Outcome:
    """The passes, then figures and artifacts where all of them ran, then the report."""
    made = folded(ready, out, last, device, console)
    whole = last == len(ready.recipe.passes)
    scores = scored(ready.start, made, ready.evaluation, out, device, console) if whole and ready.evaluation else {}
    artifacts = exported(ready, made, scores, out, device, console) if whole else {}
    sheet = report.Report.of(ready.recipe, ready.model, made.state, made.records, scores, made.steps, artifacts,
                             result_bytes(ready, made.state))  # fmt: skip
    write_atomic(out / "report.md", sheet.markdown().encode())
    write_atomic(out / "report.html", sheet.html().encode())
    write_atomic(out / "run.json", json.dumps(run_record(ready, tuple(artifacts)), indent=1).encode())
    return Outcome(out, made.state, scores, artifacts, sheet)


def folded(ready: Prepared, out: Path, last: int, device: str, console: Console) -> Folded:
    """The first `last` passes, restored or run."""
    steps = steps_of(ready, out, device, lambda step: context_of(ready, step, device, console))
    state = fold(ready, steps, last, console)
    save_plan(state, out)
    records = [r for step in steps[:last] for r in step.records]
    told = [{"name": s.folder.name, **(read_record(s.folder) or {})} for s in steps[:last]]  # read by the fold already
    return Folded(state, steps[last - 1].key if last else ready.root_key, records, told)


def result_bytes(ready: Prepared, state: State) -> int:
    """Bytes of the tensors as the first exporter lays them out; as they are where nothing is exported."""
    layouts: list[Files] = [e.layout(ready.model, state) for e in ready.exports]
    return layouts[0].tensor_bytes if layouts else sum(spec.nbytes for spec, _, _ in state.entries())


def scored(start: State, made: Folded, tokens: data.Tokens, out: Path, device: str, console: Console) -> dict[str, Any]:
    """Figures of the original and of the result, from evaluation.json where the same ones were measured before."""
    mark = digest(made.key, tokens.hash, [windows for _, windows in tokens.sources])
    file = out / "evaluation.json"
    known = scores_of(file)
    policy = policy_of(made.state)
    if known.get("key") == mark and ("cache" in known) == (policy is not None):
        return known
    console.note("evaluating the original and the result")
    before, after = evaluate.compare(start, made.state, tokens, device)
    assert before is not None, "there is an original to compare with"
    scores = {"key": mark, "text": tokens.place, "original": before.json(), "compressed": after.json()}
    if policy:
        scores["cache"] = cache_scores(made.state, tokens, device).json()
    write_atomic(file, json.dumps(scores, indent=1).encode())
    return scores


def cache_scores(state: State, tokens: data.Tokens, device: str, engine: cached.Asked | None = None) -> cached.CacheScores:
    """Figures of a state's cache, against a plain one of the same model."""
    full = plain(heads(state), cached.prompt_of(tokens.ids.shape[1]), state.dtype.itemsize)
    return cached.through_cache(state, tokens, full, device, engine)


def scores_of(file: Path) -> dict[str, Any]:
    """What an evaluation.json says; empty where it is absent or damaged, for then the figures are measured again."""
    try:
        known = json_mapping(file, RunError)
        before, after = (TypeAdapter(evaluate.Scores).validate_python(known[n]) for n in ("original", "compressed"))
        pairs = [(before, after), *zip(before.sources, after.sources, strict=True)]
        compared = all(None not in (a.kl, a.agreement) and (b.perplexity is None) == (a.perplexity is None)
                       and b.source == a.source for b, a in pairs)  # fmt: skip
        TypeAdapter(cached.CacheScores | None).validate_python(known.get("cache"))
        return known if compared and isinstance(known["text"], str) else {}
    except (ValueError, LookupError, TypeError):
        return {}


def exported(
    ready: Prepared, made: Folded, scores: dict[str, Any], out: Path, device: str, console: Console
) -> dict[str, tuple[Path, Proof]]:
    """Every artifact of the recipe, with its proof."""
    tokens = ready.evaluation or ready.calibration
    windows, length = proof_tokens(made.state.graph["embed"].shape[0])
    sample = None if tokens is None else made.state.ids(tokens.ids[:windows, :length])
    beside = [[name, sha256(ready.model.folder / name)] for name in carried(ready.model.folder)] if ready.exports else []
    found = {}
    for exporter in ready.exports:
        console.note(f"writing {exporter.name}")
        manager.give_back(made.state)
        size = exporter.layout(ready.model, made.state).tensor_bytes
        card = report.card_writer(ready.recipe, ready.model, made.state, made.records, scores, size)
        key = digest(made.key, exporter.name, exporter.model_dump(mode="json"), scores.get("key"), beside)
        job = Job(ready.model, made.state, sample, key, card, device)
        found[exporter.name] = place(exporter, job, out / exporter.name, console.note)
    return found
