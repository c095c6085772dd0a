"""The laws of a pass, as one battery: `check_pass` runs on every member of the table of passes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compress.errors import ExportError
from compress.export.artifact.exporter import Job
from compress.export.artifact.place import carry_over, place
from compress.export.artifact.proof import logits
from compress.export.artifact.tensors import tensors, write_config
from compress.export.table import EXPORTERS
from compress.formats import parse
from compress.manager import Context, Pass, foresee, settle
from compress.model.data import Tokens
from compress.model.model import Model, open_model
from compress.passes.quantize import Quantize
from compress.prepare import refuse_untold
from compress.run import Parts, Step, step_inputs
from compress.state import Aspect, Fact, State, Stored
from compress.state.checkpoint import Layout
from compress.state.overlay import Bare, Overlay
from compress.state.state import broken_promises, changed
from tests.conftest import contents

TOKENS = Tokens(torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(5)), "random bytes")
TEXT = Tokens(
    (256 * torch.rand(40, 32, generator=torch.Generator().manual_seed(6)) ** 4).long(), "bytes to learn from, most of them small"
)


def check_pass(p: Pass, source: Path, folder: Path, following: tuple[Pass, ...] = (), stopped: str = "once") -> None:
    """Every law of a pass, on one small model. Fails by assertion; writes into `folder`.

    It is stopped "everywhere", and exported by two exporters, or by one and "once" where a part is finished and others are not,
    or "nowhere": whatever was not finished is made a second time, and what was by the run that was stopped, so that this is the
    law of determinism too.
    """
    _check_options(p)
    source = lively(source, folder / "model")
    model = open_model(str(source))
    _check_foresight(p, model)
    before, files = model.state, contents(source)
    after = attempt(p, model, folder / "whole" / "steps", following)
    _check_promises(p, before, after, known(p, model, folder / "whole" / "steps", following))
    if Aspect.WEIGHTS in p.writes:
        ours, theirs = tensors_of(before), tensors_of(after)
        assert ours.keys() != theirs.keys() or any(not torch.equal(ours[k], theirs[k]) for k in ours), "it does something"
    _check_view(after)
    assert contents(source) == files, "a pass only reads its source"
    assert before == model.state, "a state is immutable"
    parts = parts_of(folder / "whole" / "steps")
    if not parts:
        _check_equal(after, attempt(p, model, folder / "again" / "steps", following), "deterministic")
    for commits in stops(parts, p.decides, stopped):
        again = resumed(p, model, folder / f"stopped{commits}" / "steps", commits, following)
        _check_equal(after, again, f"resumed after {commits} commits")
    if p.writes & ~Aspect.PLAN:
        _check_artifacts(model, after, folder, ("native", "compressed_tensors") if stopped == "everywhere" else ("native",))
    if p.writes & ~Aspect.PLAN and Fact.DENSE in after.facts:
        _check_composition(after, folder)


def lively(source: Path, folder: Path) -> Path:
    """A copy of a model in which no norm and no bias is all ones or zeros, so that a change of one is seen."""
    shutil.copytree(source, folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor.add_((0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def step_of(p: Pass, model: Model, folder: Path, following: tuple[Pass, ...] = ()) -> Step:
    def context_of(step: Step) -> Context:
        trained = {"source": model.state, "training": TEXT} if p.trains else {}
        return Context(0, TOKENS, "cpu", step, lambda record: None, lambda done, total, what: None, following, **trained)

    return Step.of(folder, 1, step_inputs(p, "root", TOKENS.hash, 0, following), context_of)


def attempt(p: Pass, model: Model, folder: Path, following: tuple[Pass, ...] = ()) -> State:
    """The state after the pass, from an empty run folder or from what one holds."""
    state, step = model.state, step_of(p, model, folder, following)
    after = settle(p, state, p.run(state, step.context()))
    made = tensors_of(after)
    step.finish(0.0, 0, after.plan)
    done = step.restore(lambda records: p.decided(state, p.foresee(state), records))
    assert done is not None
    restored = settle(p, state, done)
    _check_same(made, tensors_of(restored), "what is restored is what was made")
    assert (restored.facts, restored.plan, restored.history) == (after.facts, after.plan, after.history)
    return restored


class KilledError(Exception):
    """Stands for a kill, in this process."""


@contextmanager
def killed_after(commits: int) -> Iterator[None]:
    """Inside, whoever commits once more after so many times is killed."""
    left, commit = iter(range(commits)), Parts.commit

    def killing(*args: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KilledError
        return commit(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "commit", killing)
        yield


def killed_often(run: Callable[[], Any], times: int, seed: int) -> int:
    """Run something again and again, to be killed after some commits; how often it was."""
    generator, killed = random.Random(seed), 0
    for _ in range(times):
        try:
            with killed_after(generator.randrange(1, 6)):
                run()
        except KilledError:
            killed += 1
    return killed


def resumed(p: Pass, model: Model, folder: Path, commits: int, following: tuple[Pass, ...] = ()) -> State:
    """The state of a pass that was stopped at its next commit, of blocks or of parts of an analysis, after `commits` of them, and
    started again."""
    step = step_of(p, model, folder, following)
    with killed_after(commits), pytest.raises(KilledError):
        p.run(model.state, step.context())
    assert len(list(folder.parent.rglob("*.safetensors"))) == commits
    return attempt(p, model, folder, following)


def _check_options(p: Pass) -> None:
    cls = type(p)
    assert (cls.__doc__ or "").strip().splitlines()[0].endswith("."), "the first line of the docstring is the summary"
    for name, field in cls.model_fields.items():
        assert field.description, f"option '{name}' says what it means"
        assert not field.is_required(), f"option '{name}' has a default"
        with pytest.raises(ValidationError):
            setattr(p, name, getattr(p, name))
    with pytest.raises(ValidationError):
        cls.model_validate({"no_such_option": 1})
    written = p.model_dump(mode="json")
    for form in (written, json.loads(json.dumps(written)), yaml.safe_load(yaml.safe_dump(written, sort_keys=False))):
        again = cls.model_validate(form)
        assert again == p
        assert again.text() == p.text()
    assert p.text().startswith(f"{p.name}{{")
    assert set(cls.model_json_schema()["properties"]) == set(cls.model_fields)
    assert isinstance(p.needs | p.gives | p.breaks, Fact)
    assert isinstance(p.writes, Aspect)


def _check_foresight(p: Pass, model: Model) -> None:
    """What will be is known from a config alone; no weight is touched, for there is none."""
    start = model.state
    bare = replace(start, dense=Overlay(Bare(model.folder, start.specs)))
    foreseen = foresee([p], bare)
    assert foreseen.facts == (bare.facts & ~p.breaks) | p.gives
    assert foreseen.history == (p.text(),)
    assert not foreseen.dense.written, "only `run` makes tensors"
    assert not any(isinstance(c, Stored) for c in foreseen.codes.values()), "only `run` makes codes"
    assert foreseen == foresee([p], bare)
    cost = p.cost(foreseen, 1000)
    assert min(cost.model_flops, cost.exact_flops, cost.weights, cost.peak_bytes) >= 0


def known(p: Pass, model: Model, folder: Path, following: tuple[Pass, ...]) -> State:
    """The state as a finished step's records say that it was to become."""
    step, state = step_of(p, model, folder, following), model.state
    step.restore(lambda records: state)
    return settle(p, state, p.decided(state, p.foresee(state), step.records))


def _check_promises(p: Pass, before: State, after: State, foreseen: State) -> None:
    assert not changed(before, after) & ~p.writes
    assert foreseen == foresee([p], before) or p.decides
    assert broken_promises(foreseen, after) == []
    assert (after.facts, after.history) == (foreseen.facts, foreseen.history)
    assert after.plan == foreseen.plan or p.decides
    for name, stored in after.codes.items():
        site = after.graph[name]
        assert stored.shape == site.shape
        assert stored.load().nbytes == stored.format.nbytes(site.shape)
        weight = after.weight(site)
        assert weight.dtype == after.dtype
        assert weight.isfinite().all()


def _check_view(state: State) -> None:
    """Every tensor of a checkpoint of the state can be read, with the dtype and shape that it says, and the model runs on it."""
    for spec in state.specs:
        tensor = state.dense.read_finite(spec.name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
    assert {s.weight for s in state.graph if s.expert is None and not s.tied} | state.graph.parameters.keys() <= {
        spec.name for spec in state.specs
    }
    assert logits(state, [TOKENS.ids[:1]], "cpu")[0].isfinite().all()


def _check_artifacts(model: Model, state: State, folder: Path, kinds: tuple[str, ...]) -> None:
    """What the pass alone leaves is written and proves itself, in every kind that can hold it."""
    made = []
    for name in kinds:
        exporter = EXPORTERS[name]()
        with suppress(ExportError):
            for said in state.serving:
                refuse_untold(exporter, said)
            exporter.check(state)
            made.append(name)
    assert "native" in made or state.serving
    for name in made:
        proof = place(EXPORTERS[name](), Job(model, state, TOKENS.ids[:2], "key", lambda facts: ""), folder / name)[1]
        assert proof.difference >= 0


def _check_composition(state: State, folder: Path) -> None:
    """Law 0: quantizing what a pass leaves gives what quantizing a checkpoint gives that was saved after it."""
    quantize = Quantize(format=parse("int4:g32"))
    state = replace(state, plan=None, facts=Fact.DENSE, serving={})  # no checkpoint holds what engines are told besides
    dense = folder / "dense"
    dense.mkdir()
    job = Job(open_model(str(state.dense.folder)), state, None, "key", lambda facts: "")
    keep_dense(job, dense)
    saved = open_model(str(dense)).state
    ours, theirs = (quantize.run(s, step_of(quantize, open_model(str(dense)), folder / f"composed{i}").context())
                    for i, s in enumerate((state, saved)))  # fmt: skip
    _check_same(tensors_of(ours), tensors_of(theirs), "[p, quantize] is quantizing what was saved after p")
    (a,), (b,) = (logits(s, [TOKENS.ids[:2]], "cpu") for s in (ours, theirs))
    assert torch.equal(a, b), "[p, quantize] is quantizing what was saved after p"


def keep_dense(job: Job, folder: Path) -> None:
    """The checkpoint of a dense state, whatever its shapes."""
    Layout.of(job.state.specs).write(folder, tensors(job.state))
    write_config(job, folder)
    carry_over(job.model.folder, folder, job.state.vocabulary)


def stops(parts: int, decides: bool, stopped: str) -> list[int]:
    """After how many commits a pass is stopped that makes so many parts; analyses have too many to stop after each."""
    every = list(range(min(parts, 2) if decides else parts))
    once = every[-1:] if decides else every[1:2] or every
    return {"everywhere": every, "once": once, "nowhere": []}[stopped]


def parts_of(folder: Path) -> int:
    """How many parts a whole run of a pass commits."""
    return len(list(folder.parent.rglob("*.safetensors")))


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """Every tensor of the state: codes, and all that is dense."""
    codes = {f"{n}/{k}": t for n, stored in state.codes.items() for k, t in stored.load().tensors.items()}
    return codes | {spec.name: state.dense.read(spec.name) for spec in state.specs}


def _check_equal(one: State, other: State, law: str) -> None:
    assert one.plan == other.plan, law
    _check_same(tensors_of(one), tensors_of(other), law)


def _check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], law: str) -> None:
    assert one.keys() == other.keys(), law
    assert [k for k in one if not torch.equal(one[k], other[k])] == [], law
