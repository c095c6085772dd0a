"""Runs: keys, cache hits, resuming at the last finished block, and never a byte of somebody else's overwritten."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import pipeline
from compress.errors import RunError
from compress.export.artifact.place import UNFINISHED
from compress.export.compressed_tensors.exporter import CompressedTensors
from compress.passes import PASSES
from compress.passes.allocate import Allocate
from compress.passes.quantize import Quantize
from compress.run import RunFolder, Step, digest, first_difference, read_part, shorten, step_inputs, write_atomic
from compress.state import Fact
from tests.conftest import Project, contents, covered, rare

BLOCKS = 2  # commits of a run of the test recipe: a block and the head


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file or folder is touched."""
    found = [folder, *sorted(folder.rglob("*"))]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns, p.stat().st_size) for p in found}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def perturb(model: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    """Change one weight of a model."""
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 5] += 1.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, family: Any, text: Path) -> Path:
    """A folder in which the test recipe has been run without interruption; a copy of it lies in `kept` beside."""
    folder = tmp_path_factory.mktemp("ran") / "project"
    folder.mkdir()
    pipeline.run(Project.make(folder, family("llama", blocks=1), text))
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


@pytest.fixture
def finished(ran: Path, capsys: pytest.CaptureFixture[str]) -> Project:
    """A project whose recipe has been run."""
    shutil.rmtree(ran)
    shutil.copytree(ran.with_name("kept"), ran)
    return Project(ran, capsys)


@pytest.fixture
def fresh(finished: Project) -> Project:
    """The same project before its run."""
    shutil.rmtree(finished.out)
    return finished


# --- keys -------------------------------------------------------------------------------------------------------------


def test_equal_settings_are_a_hit_and_nothing_is_touched(finished: Project, monkeypatch: pytest.MonkeyPatch):
    steps, artifact = stamps(finished.out / "steps"), stamps(finished.artifact)
    evaluation = stamps(finished.out / "evaluation.json")
    monkeypatch.setattr(Step, "commit", None)
    again = finished.run()
    assert again.code == 0
    assert "step 1 of 1: quantize  (finished before)" in again.out
    assert "loaded again with transformers" in again.out
    assert (stamps(finished.out / "steps"), stamps(finished.artifact)) == (steps, artifact)
    assert stamps(finished.out / "evaluation.json") == evaluation


TEXT_CHANGED = "the calibration text, how it is cut into windows, or the vocabulary changed"
CHANGES: dict[str, tuple[Callable[[Project], Any], str]] = {
    "seed": (lambda p: p.edit("seed: 0", "seed: 3"), "seed 0 → 3"),
    "format": (lambda p: p.edit("int4:g32", "int3:g16"), "options.format int4:g32 → int3:g16"),
    "pin": (lambda p: p.edit('"lm_head": "int8:g32"', '"lm_head": "int6:g32"'), "options.pins.lm_head int8:g32 → int6:g32"),
    "damp": (lambda p: p.edit("- quantize:\n", "- quantize:\n      damp: 0.5\n"), "options.damp None → 0.5"),
    "windows": (lambda p: p.edit("sequences: 8", "sequences: 9"), TEXT_CHANGED),
    "text": (lambda p: p.text.write_text("x" + p.text.read_text()), TEXT_CHANGED),
    "weights": (lambda p: perturb(p.model), "the model's weights or config changed"),
    "config": (lambda p: (p.model / "config.json").write_text((p.model / "config.json").read_text().replace("1e-06", "1e-05")),
               "the model's weights or config changed"),
}  # fmt: skip


@pytest.mark.parametrize("change", covered(CHANGES, "format", "seed", "pin"))
def test_a_change_is_named_and_made_anew_and_the_old_is_kept(finished: Project, change: str):
    old_steps, old = names(finished.out / "steps"), contents(finished.artifact)
    before = contents(finished.out / "steps")
    edit, named = CHANGES[change]
    edit(finished)
    exported = change in ("format", "weights")  # to the end; what is named, and that it is run anew, shows before
    result = finished.run(*() if exported else ("export=[]",))
    assert result.code == 0, result.err
    assert f"step 1 differs from {old_steps[0]}: {named}; running it anew, the old step stays\n" in result.out
    assert len(names(finished.out / "steps")) == 2
    assert contents(finished.out / "steps").items() >= before.items()
    if not exported:
        assert contents(finished.artifact) == old
        return
    aside = finished.out / f"compressed_tensors-{json.loads(old['compress.json'])['key'][:6]}"
    assert contents(aside) == old
    assert contents(finished.artifact)["compress.json"] != old["compress.json"]


@pytest.mark.slow
def test_a_change_taken_back_finds_the_old_step(finished: Project, monkeypatch: pytest.MonkeyPatch):
    old = contents(finished.artifact)
    assert finished.run("quantize.format=int3:g32").code == 0
    steps = stamps(finished.out / "steps")
    monkeypatch.setattr(Step, "commit", None)
    again = finished.run()
    assert again.code == 0
    assert "(finished before)" in again.out
    assert stamps(finished.out / "steps") == steps
    assert contents(finished.artifact) == old


@pytest.mark.slow
def test_changes_to_and_fro_move_artifacts_aside_and_never_onto_another(finished: Project):
    old = contents(finished.artifact)
    for _ in range(2):
        assert finished.run("quantize.format=int3:g32").code == 0
        assert finished.run().code == 0
    assert contents(finished.artifact) == old


def test_a_project_that_was_moved_keeps_its_steps(finished: Project, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / "moved")
    assert "(finished before)" in Project(tmp_path / "moved", capsys).run().out


@pytest.mark.slow
def test_the_evaluation_text_is_no_part_of_a_step(finished: Project):
    finished.edit("sequences: 4", "sequences: 3")
    result = finished.run()
    assert result.code == 0
    assert "(finished before)" in result.out
    assert json.loads((finished.out / "evaluation.json").read_text())["compressed"]["tokens"] == 3 * 31


@pytest.mark.slow
def test_the_difference_is_to_the_last_finished_step(finished: Project):
    assert finished.run("quantize.damp=0.5").code == 0
    assert "options.damp 0.5 → 0.25" in finished.run("quantize.damp=0.25").out


def test_first_difference():
    old = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 0}
    assert first_difference(old, old) is None
    assert first_difference(old, {**old, "b": {"c": [1], "d": 3}, "a": 1}) == "b.d 2 → 3"
    assert first_difference(old, {"a": 1, "b": old["b"]}) == "gone 0 → None"
    assert first_difference(old, {**old, "new": 1}) == "new None → 1"
    assert shorten("x" * 30) == "x" * 12 + "…"


def test_a_step_is_another_where_code_gives_other_results(monkeypatch: pytest.MonkeyPatch):
    """Its own, and that of the passes behind it where it asks them: `allocate` measures with the very quantizer."""
    steps = Allocate(budget="3 bits"), Quantize()
    before = [digest(step_inputs(p, "root", None, 0, steps[i + 1 :])) for i, p in enumerate(steps)]
    monkeypatch.setattr(Quantize, "version", Quantize.version + 1)
    after = [digest(step_inputs(p, "root", None, 0, steps[i + 1 :])) for i, p in enumerate(steps)]
    assert not set(before) & set(after)


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_what_a_run_depends_on_is_written_down(finished: Project):
    record = json.loads((finished.out / "run.json").read_text())
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", record["weights"])
    assert record["data"].keys() == {"calibration", "evaluation"}
    step = json.loads(next((finished.out / "steps").glob("*/record.json")).read_text())
    assert step["made_of"]["data"] == record["data"]["calibration"]
    assert [s["site"] for s in step["sites"]][-1] == "lm_head"


# --- interruption -----------------------------------------------------------------------------------------------------


class Stop(KeyboardInterrupt):
    """Somebody pressed ^C here."""


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool = False) -> list[int]:
    """Let the `call`-th call of a function raise, before or after it did its work; returns the calls so far."""
    real, calls = getattr(owner, name), []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call and not after:
            raise Stop
        result = real(*arguments, **options)
        if len(calls) == call:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, stopping)
    return calls


@pytest.fixture
def clean(ran: Path) -> dict[str, bytes]:
    """The artifact of that run."""
    return contents(ran.with_name("kept") / "out" / "compressed_tensors")


@pytest.mark.parametrize("after", covered([False, True], True))
def test_a_run_stopped_at_any_block_goes_on_from_the_last_finished_one(
    fresh: Project, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, after: bool
):
    for call in (1, BLOCKS):  # from nothing finished to everything finished
        shutil.rmtree(fresh.out, ignore_errors=True)
        with monkeypatch.context() as patch:
            stop_at(patch, Step, "commit", call, after)
            stopped = fresh.run()
        assert stopped.code == 130
        assert stopped.err == "\ncompress: interrupted; the same command goes on from the last finished block\n"
        assert not fresh.artifact.exists()
        assert "in part" in fresh.plan().out or (call == 1 and not after)
        kept = contents(fresh.out / "steps")
        assert len(kept) == call - 1 + after
        with monkeypatch.context() as patch:
            commits = stop_at(patch, Step, "commit", 99)
            assert fresh.run().code == 0
        assert len(commits) == BLOCKS - len(kept)
        assert contents(fresh.artifact) == clean
        assert list((fresh.out / "steps").glob("*.partial")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "after"), [
    (Step, "finish", False), rare(CompressedTensors, "write", False), rare(CompressedTensors, "prove", True),
    rare(Step, "finish", True),
    rare(CompressedTensors, "write", True),
    rare(CompressedTensors, "prove", False),
])  # fmt: skip
def test_a_run_stopped_behind_the_blocks_repeats_none(
    fresh: Project, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool
):
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, 1, after)
        assert fresh.run().code == 130
    assert not fresh.artifact.exists()
    with monkeypatch.context() as patch:
        commits = stop_at(patch, Step, "commit", 99)
        assert fresh.run().code == 0
    assert not commits
    assert contents(fresh.artifact) == clean


@pytest.mark.slow
def test_a_run_in_part_is_no_hit_for_other_settings(project: Project, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(patch, Step, "commit", 2)
        assert project.run().code == 130
    other = project.run("quantize.damp=0.5")
    assert other.code == 0
    with monkeypatch.context() as patch:
        commits = stop_at(patch, Step, "commit", 99)
        assert project.run().code == 0
    assert len(commits) == BLOCKS - 1  # and the part is still there when the settings come back


# --- until ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", covered(["1", "quantize"], "1"))
def test_until_stops_after_a_step(project: Project, until: str):
    assert project("run", project.recipe, "--until", until).code == 0
    assert len(names(project.out / "steps")) == 1
    # the recipe's last step is its only one: what follows it is done too
    assert project.artifact.exists()


@pytest.mark.slow
def test_until_before_the_last_step_exports_nothing(project: Project, monkeypatch: pytest.MonkeyPatch):
    """With a second pass, that may follow quantization, behind the first."""

    class Idle(Quantize):
        """Nothing."""

        name = "idle"
        needs = Fact.QUANTIZED
        breaks = Fact.NONE

        def foresee(self, state: Any) -> Any:
            return state

        def run(self, state: Any, ctx: Any) -> Any:
            return state

    monkeypatch.setitem(PASSES, "idle", Idle)
    project.edit("export:", "  - idle: {}\nexport:")
    assert project("run", project.recipe, "--until", "quantize").code == 0
    assert len(names(project.out / "steps")) == 1
    assert not project.artifact.exists()
    assert not (project.out / "evaluation.json").exists()
    whole = project.run()
    assert "step 1 of 2: quantize  (finished before)" in whole.out
    assert project.artifact.exists()
    assert project("run", project.recipe, "--until", "3").line == "--until 3: the recipe's steps are 1 quantize, 2 idle"
    assert project("run", project.recipe, "--until", "idel").line == "--until idel: the recipe's steps are 1 quantize, 2 idle"
    assert project("run", project.recipe, "--until", "0").line.startswith("--until 0: the recipe's steps are")


# --- folders that are not ours ----------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(project: Project):
    project.out.mkdir()
    (project.out / "thesis.txt").write_text("years of work")
    assert project.run().line == f"{project.out}: holds files that no run made; choose another folder with --out"
    assert contents(project.out) == {"thesis.txt": b"years of work"}


def test_a_folder_of_somebody_elses_steps_is_refused(project: Project):
    (project.out / "steps").mkdir(parents=True)
    (project.out / "report.md").write_text("years of work")
    assert project.run().line == f"{project.out}: holds files that no run made; choose another folder with --out"
    assert project("inspect", project.out).line.startswith(f"{project.out}: no config.json")
    assert contents(project.out) == {"report.md": b"years of work"}


def test_what_another_run_measured_may_be_brought(project: Project):
    """Copied to where a run is to begin; anything else beside or inside of it is somebody's."""
    part = project.out / "analyses" / "errors-0123456789ab"
    part.mkdir(parents=True)
    (part / "table.json").write_text("{}")
    notes = project.out / "analyses" / "notes"
    notes.mkdir()
    assert project.run().line == f"{project.out}: holds files that no run made; choose another folder with --out"
    notes.rmdir()
    assert project.run().code == 0
    assert (part / "table.json").exists()


THEIRS = ["plan.yaml", "run.json", "report.html", "report.md", "recipe.resolved.yaml", "evaluation.json", "steps/a", "thesis.tex"]


@pytest.mark.parametrize("lock", [b"theirs", b"", b"made by somebody"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_folder_with_somebody_elses_lock_and_names_like_ours_is_refused(project: Project, lock: bytes, verb: str):
    (project.out / "steps").mkdir(parents=True)
    for name in (".lock", *THEIRS):
        (project.out / name).write_bytes(lock if name == ".lock" else b"years of work")
    before = stamps(project.out)
    assert project(verb, project.recipe).line == f"{project.out}: holds files that no run made; choose another folder with --out"
    assert stamps(project.out) == before
    assert project("inspect", project.out).code == 2


def test_a_folder_of_names_like_ours_without_a_lock_is_refused(project: Project):
    (project.out / "steps").mkdir(parents=True)
    for name in THEIRS:
        (project.out / name).write_text("years of work")
    before = stamps(project.out)
    assert project.run().line == f"{project.out}: holds files that no run made; choose another folder with --out"
    assert stamps(project.out) == before


@pytest.mark.parametrize("place", [".", "model"])
def test_the_folder_of_the_model_or_the_one_around_it_is_refused(project: Project, place: str):
    before = contents(project.folder)
    out = project.folder / place
    assert project.run(out=out).line == f"{out}: holds files that no run made; choose another folder with --out"
    assert contents(project.folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", covered([0, 5], 5))
def test_a_run_that_was_stopped_while_it_marked_its_folder_goes_on(project: Project, size: int):
    with RunFolder(project.out).held():
        pass
    whole = (project.out / ".lock").read_bytes()
    shutil.rmtree(project.out)
    project.out.mkdir()
    (project.out / ".lock").write_bytes(whole[:size])
    assert project.run("quantize.method=rtn").code == 0
    assert (project.out / ".lock").read_bytes() == whole


@pytest.mark.slow
def test_a_link_to_a_folder_is_that_folder_and_one_to_nowhere_is_refused(project: Project):
    (project.folder / "disk").mkdir()
    project.out.symlink_to("disk")
    assert project.run("quantize.method=rtn").code == 0
    assert (project.folder / "disk" / "compressed_tensors").is_dir()
    nowhere = project.folder / "nowhere"
    nowhere.symlink_to("absent")
    assert project.run(out=nowhere).line == f"{nowhere}: cannot write (File exists)"


@pytest.mark.parametrize("name", ["run.json.tmp", "report.md.tmp", "plan.yaml.tmp", ".lock"])
def test_a_link_among_a_runs_files_is_not_written_through(finished: Project, name: str):
    precious = finished.folder / "precious"
    precious.write_text("years of work")
    (finished.out / name).unlink(missing_ok=True)
    (finished.out / name).symlink_to(precious)
    result = finished.run()
    assert precious.read_text() == "years of work"
    assert result.code == 0 or result.line == f"{finished.out / name}: is a link, and is to be the run's own file; remove it"


def test_a_run_folder_that_lost_its_lock_file_is_still_one(finished: Project):
    (finished.out / ".lock").unlink()
    assert "(finished before)" in finished.run().out


@pytest.mark.slow
def test_an_empty_folder_is_taken(project: Project):
    project.out.mkdir()
    assert project.run("quantize.method=rtn").code == 0


def test_a_file_in_the_place_of_the_run_folder_is_refused(project: Project):
    project.out.write_text("years of work")
    assert project.run().line == f"{project.out}: is a file, not a folder; choose another with --out"
    assert project.run(out=project.out / "deeper").line == f"{project.out / 'deeper'}: cannot write (Not a directory)"
    assert project.out.read_text() == "years of work"


@pytest.mark.parametrize("make", [rare(lambda p: p.mkdir()), lambda p: p.write_text("years of work")])
def test_something_else_in_the_place_of_the_artifact_is_refused(project: Project, make: Any):
    assert project("run", project.recipe, "--set", "export=[]").code == 0
    make(project.artifact)
    before = stamps(project.artifact)
    line = project.run().line
    assert line == f"{project.artifact}: exists and is no artifact of this tool; move it away or choose another --out"
    assert stamps(project.artifact) == before


@pytest.mark.parametrize("make", [
    rare(lambda p: p.write_text("years of work")), rare(lambda p: (p.mkdir(), (p / "thesis.txt").write_text("years of work"))),
    lambda p: (p.mkdir(), (p / "compress.json").write_text("{}")), lambda p: p.symlink_to("steps"),
])  # fmt: skip
def test_something_else_where_the_artifact_is_written_first_is_refused_and_stays(project: Project, make: Any):
    assert project("run", project.recipe, "--set", "export=[]").code == 0
    place = project.artifact.with_name("compressed_tensors.partial")
    make(place)
    before = stamps(project.out / "steps"), stamps(place)
    assert project.run().line.startswith(
        f"{place}: exists, and an artifact is to be written there before it gets its name; move it"
    )
    assert (stamps(project.out / "steps"), stamps(place)) == before


@pytest.mark.slow
def test_what_a_killed_run_left_of_an_artifact_is_written_anew(finished: Project, clean: dict[str, bytes]):
    place = finished.artifact.with_name("compressed_tensors.partial")
    for stage in ("", UNFINISHED):
        shutil.rmtree(finished.artifact)
        place.mkdir()
        if stage:
            (place / stage).touch()
            (place / "half").write_text("x")
        assert finished.run().code == 0
        assert contents(finished.artifact) == clean
        assert not place.exists()


def test_files_that_a_user_put_beside_an_artifact_are_kept(finished: Project):
    (finished.artifact / "notes.txt").write_text("mine")
    assert finished.run().code == 0  # it is still the artifact that was written
    assert (finished.artifact / "notes.txt").read_text() == "mine"
    key = json.loads((finished.artifact / "compress.json").read_text())["key"]
    assert finished.run("quantize.damp=0.5").code == 0
    assert (finished.out / f"compressed_tensors-{key[:6]}" / "notes.txt").read_text() == "mine"
    assert finished.run().code == 0
    assert (finished.artifact / "notes.txt").read_text() == "mine"


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(finished: Project):
    before = contents(finished.out)
    with RunFolder(finished.out).held():
        line = finished.run("quantize.damp=0.5").line
        assert line == f"{finished.out}: another run is using it; wait, or choose another folder with --out"
    assert contents(finished.out) == before
    assert finished.run().code == 0


@pytest.mark.slow
def test_the_lock_goes_when_a_run_fails(project: Project, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(patch, Step, "commit", 1)
        assert project.run().code == 130
    assert project.run().code == 0


def test_a_disk_that_knows_no_locks(project: Project, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert project.run().line == f"{project.out}: cannot be locked (Function not implemented); choose a local folder with --out"


# --- damage -----------------------------------------------------------------------------------------------------------


def the_step(project: Project) -> Path:
    return next((project.out / "steps").iterdir())


@pytest.mark.slow
def test_a_damaged_block_is_named_and_can_be_mended(finished: Project, clean: dict[str, bytes]):
    shutil.rmtree(finished.artifact)
    block = the_step(finished) / "block-0000.safetensors"
    whole = block.read_bytes()
    for damage in (b"", whole[:100], whole[:-1], b"\xff" * len(whole), whole[:60] + b"\xff" * 8 + whole[68:]):
        block.write_bytes(damage)
        line = finished.run().line
        assert re.fullmatch(rf"{re.escape(str(block))}: is damaged \(.*\); delete this file and run again", line)
    block.unlink()
    step = the_step(finished)
    assert finished.run().line == f"{step}: its files are damaged or missing; delete this folder and run again"
    shutil.rmtree(step)
    assert finished.run().code == 0
    assert contents(finished.artifact) == clean


@pytest.mark.slow
def test_a_damaged_record_is_named(finished: Project):
    step = the_step(finished)
    for data in (b"", b"{", b"[]", b"{}", b"\xff", b'{"made_of": 1}', b'{"made_of": {}, "sites": [3]}'):
        (step / "record.json").write_bytes(data)
        assert finished.run().line == f"{step}: its files are damaged or missing; delete this folder and run again"
    assert finished.run("quantize.damp=0.5").code == 0  # and another step does not stumble over it


GAPS: dict[str, tuple[str, bytes | None, str]] = {
    "an artifact's weights": ("compressed_tensors/model.safetensors", b"x", "compressed_tensors"),
    "an artifact's weights gone": ("compressed_tensors/model.safetensors", None, "compressed_tensors"),
    "an artifact's mark": ("compressed_tensors/compress.json", b"{", "compressed_tensors"),
    "an artifact's mark without fields": ("compressed_tensors/compress.json", b"{}", "compressed_tensors"),
}
FLIPPED = ["README.md", "config.json", "generation_config.json", "model.safetensors", "serve.json", "tokenizer.json",
           "tokenizer_config.json"]  # fmt: skip


@pytest.mark.parametrize("name", covered(FLIPPED, "model.safetensors"))
def test_a_bit_that_flipped_in_an_artifact_is_noticed_by_the_next_run(finished: Project, clean: dict[str, bytes], name: str):
    assert {*FLIPPED, "compress.json"} == clean.keys()
    path = finished.artifact / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    made = finished.run()
    assert made.code == 0, made.err
    said = f"{path}: is not the file that was written (see compress.json); moved aside to compressed_tensors-damaged, and written"
    assert said in made.out
    assert contents(finished.artifact) == clean
    assert (finished.out / "compressed_tensors-damaged" / name).read_bytes() == data
    assert "moved aside" not in finished.run().out


@pytest.mark.slow
def test_an_artifact_that_was_damaged_where_it_lies_aside_does_not_come_back(finished: Project, clean: dict[str, bytes]):
    assert finished.run("quantize.damp=0.5").code == 0
    aside = finished.out / f"compressed_tensors-{json.loads(clean['compress.json'])['key'][:6]}"
    (aside / "tokenizer.json").write_bytes(clean["tokenizer.json"][:-1])
    assert finished.run().code == 0
    assert contents(finished.artifact) == clean


@pytest.mark.parametrize("name", covered(GAPS, "an artifact's weights", "an artifact's mark"))
def test_a_damaged_artifact_is_no_hit(finished: Project, clean: dict[str, bytes], name: str):
    """It is named, or written anew."""
    file, data, named = GAPS[name]
    path = finished.out / file
    path.unlink() if data is None else path.write_bytes(data)
    result = finished.run()
    assert named in result.line if result.code else contents(finished.artifact) == clean


@pytest.mark.parametrize("data", [b"{", b"[]"])
def test_a_damaged_evaluation_is_made_anew(finished: Project, data: bytes):
    whole = (finished.out / "evaluation.json").read_bytes()
    (finished.out / "evaluation.json").write_bytes(data)
    assert finished.run().code == 0
    assert (finished.out / "evaluation.json").read_bytes() == whole


def test_a_second_run_keeps_the_report(finished: Project):
    before = (finished.out / "report.md").read_text()
    assert finished.run().code == 0
    assert (finished.out / "report.md").read_text() == before


def test_a_step_folder_without_record_is_made_anew(finished: Project):
    (the_step(finished) / "record.json").unlink()
    assert finished.run().code == 0
    assert (the_step(finished) / "record.json").exists()


def test_a_file_of_other_origin_is_no_block(tmp_path: Path):
    path = tmp_path / "block-0000.safetensors"
    odd = '{"a": {"format": "int99", "shape": [1, 1]}}'
    for notes in (None, {"sites": "[]"}, {"sites": "{", "records": "[]"}, {"sites": odd}):
        save_file({"a": torch.zeros(1)}, path, metadata=notes)
        with pytest.raises(RunError, match="delete this file and run again"):
            read_part(path)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError) as caught:
        write_atomic(path, b"new")
    assert str(caught.value) == f"{tmp_path}: the disk is full; free some space and run again, finished blocks are kept"
    assert contents(tmp_path) == {"a.json": b"old"}
