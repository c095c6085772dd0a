"""kill -9, anywhere: the next run goes on, and its artifact is byte for byte that of a run that nobody disturbed.

A kill is staged in a child of one process that has imported everything and run once (`WARDEN`), so that it costs a fork and
not the time that imports take. The warden numbers the moments at which a run touches the disk: before every open for
writing, rename, removal, new folder, fsync and write, and half-way through every write of tensors. At the moment it is told,
the child kills itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Project, contents
from tests.nursery import Nursery

WARDEN = r'''
import contextlib, io, json, os, signal, sys
from compress.cli import main

EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile", "fcntl.flock"}

def run(arguments, at):
    """In a child: the command, killed at moment `at`, or left alone where it is 0. Returns the wait status."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        count = os.read(reading, 8)
        os.close(reading)
        return os.waitpid(pid, 0)[1], int.from_bytes(count, "little")
    moments = 0
    def moment(*_):
        nonlocal moments
        moments += 1
        if moments == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def audit(event, args):
        if event in EVENTS or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
            moment()
    fsync, write = os.fsync, os.write
    def halves(descriptor, data):
        moment()
        if at and moments + 1 == at:
            write(descriptor, data[: len(data) // 2])
        moment()
        return write(descriptor, data)
    os.fsync = lambda d: (moment(), fsync(d))[1]
    os.write = halves
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(audit)
    code = main(arguments)
    write(writing, moments.to_bytes(8, "little"))
    os._exit(code)

with contextlib.redirect_stdout(io.StringIO()):
    assert main(sys.argv[1:]) == 0  # imports what a run imports
for line in sys.stdin:
    arguments, at = json.loads(line)
    status, moments = run(arguments, at)
    print(json.dumps([status, moments]), flush=True)
'''


class Warden:
    """A process that runs commands in children of its own and can kill them at a chosen moment."""

    def __init__(self, nursery: Nursery, *warm_up: Any) -> None:
        (reading, self._stdin), (self._stdout, writing) = os.pipe(), os.pipe()
        self._nursery = nursery
        self._pid = nursery.start(WARDEN, *warm_up, files=(reading, writing, 2), cwd=ROOT, TOKENIZERS_PARALLELISM="false")
        os.close(reading)
        os.close(writing)

    def __call__(self, *arguments: Any, at: int = 0) -> tuple[int, int]:
        """(wait status, moments passed) of a command, killed at moment `at`; 0 lets it live."""
        os.write(self._stdin, (json.dumps([[str(a) for a in arguments], at]) + "\n").encode())
        status, moments = json.loads(os.read(self._stdout, 1000))
        return status, moments

    def killed(self, *arguments: Any, at: int) -> None:
        assert self(*arguments, at=at)[0] == signal.SIGKILL, "the run ended before its moment came"

    def close(self) -> None:
        os.close(self._stdin)
        os.close(self._stdout)
        assert self._nursery.wait(self._pid)[0] == 0


@pytest.fixture(scope="module")
def warden(tiny: Path, nursery: Nursery) -> Iterator[Warden]:
    made = Warden(nursery, "run", tiny, "--out", tiny.parent / "warm")
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, family: Any, text: Path) -> Path:
    """The test recipe, its model and its text."""
    return Project.make(tmp_path_factory.mktemp("tiny"), family("llama"), text)


@pytest.fixture(scope="module")
def clean(warden: Warden, tiny: Path) -> tuple[dict[str, bytes], int]:
    """The artifact of an undisturbed run, and how many moments that run has."""
    out = tiny.parent / "clean"
    status, moments = warden("run", tiny, "--out", out)
    assert status == 0
    assert moments > 50
    return contents(out / "compressed_tensors"), moments


def test_three_kills_and_the_same_bytes(warden: Warden, tiny: Path, clean: tuple[dict[str, bytes], int], tmp_path: Path):
    whole, moments = clean
    rng = random.Random(4)
    for _ in range(3):
        warden.killed("run", tiny, "--out", tmp_path / "out", at=rng.randint(1, moments // 3))
        assert not (tmp_path / "out" / "compressed_tensors").exists()
    assert warden("run", tiny, "--out", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out" / "compressed_tensors") == whole


@pytest.mark.slow
def test_kills_around_a_quantized_embedding(warden: Warden, tiny: Path, tmp_path: Path):
    """The walk goes on from the embedding that was finished; compressed_tensors would refuse it."""
    recipe = tiny.with_name("embedding.yaml")
    recipe.write_text(tiny.read_text().replace('"lm_head"', '"embed"').replace("compressed_tensors", "native"))
    status, moments = warden("run", recipe, "--out", tmp_path / "clean")
    assert status == 0
    for at in (15, 20, 25, moments // 3):
        warden.killed("run", recipe, "--out", tmp_path / "out", at=at)
    assert warden("run", recipe, "--out", tmp_path / "out")[0] == 0
    assert contents(tmp_path / "out" / "native") == contents(tmp_path / "clean" / "native")


@pytest.mark.slow
def test_a_kill_releases_the_lock(warden: Warden, tiny: Path, clean: tuple[dict[str, bytes], int], tmp_path: Path):
    """Two kills at the last moment before the artifact is there: the second run could start, so the lock was free."""
    for _ in range(2):
        warden.killed("run", tiny, "--out", tmp_path / "out", at=12)
    assert (tmp_path / "out" / ".lock").exists()
    assert warden("run", tiny, "--out", tmp_path / "out")[0] == 0


@pytest.mark.slow
def test_a_kill_at_every_moment(warden: Warden, tiny: Path, clean: tuple[dict[str, bytes], int], tmp_path: Path):
    whole, moments = clean
    for at in range(1, moments + 1):
        out = tmp_path / f"out{at}"
        warden.killed("run", tiny, "--out", out, at=at)
        if (out / "compressed_tensors").exists():  # whole or not at all
            assert contents(out / "compressed_tensors") == whole
        status, _ = warden("run", tiny, "--out", out)
        assert status == 0, at
        assert contents(out / "compressed_tensors") == whole, at
        assert [p.name for p in out.rglob("*") if ".partial" in p.name] == [], at
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_kill_while_another_artifact_is_replaced(warden: Warden, tiny: Path, tmp_path: Path):
    """At every moment from the old artifact's to the new one's, one of the two is there, whole."""
    first = ["run", tiny, "--set", "quantize.method=rtn"]
    second = [*first, "--set", "seed=1"]
    out = tmp_path / "out"
    assert warden(*first, "--out", out)[0] == 0
    old = contents(out / "compressed_tensors")
    shutil.copytree(out, tmp_path / "kept")
    _, moments = warden(*second, "--out", out)
    new = contents(out / "compressed_tensors")
    assert old["compress.json"] != new["compress.json"]
    for at in range(moments * 2 // 3, moments + 1):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        warden.killed(*second, "--out", out, at=at)
        held = [contents(p) for p in out.glob("compressed_tensors*") if not p.name.endswith(".partial")]
        assert old in held, at
        assert warden(*second, "--out", out)[0] == 0
        assert contents(out / "compressed_tensors") == new, at


@pytest.mark.slow
def test_twenty_kills_at_random_times_of_the_quickstart(tmp_path: Path):
    """The command as users run it, killed after a random time, again and again; each folder that is finished is compared."""
    rng = random.Random(20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress", "run", str(ROOT / "recipes" / "quickstart.yaml"), "--out"]
    start = time.monotonic()
    subprocess.run([*command, tmp_path / "clean"], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    length = time.monotonic() - start
    whole = contents(tmp_path / "clean" / "compressed_tensors")
    kills, folders, out = 0, 1, tmp_path / "out1"
    while kills < 20 or out.exists():
        with subprocess.Popen([*command, out], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(rng.uniform(0, 0.7 * length) if kills < 20 else None)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                continue
        assert process.returncode == 0
        assert contents(out / "compressed_tensors") == whole
        folders += 1
        out = tmp_path / f"out{folders}"
