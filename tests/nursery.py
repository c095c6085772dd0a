"""Processes that need not import torch and transformers, which takes seconds of CPU time.

Before anything of `compress` is imported, pytest's process, which has those two, forks a nursery: it waits for orders and forks
again for every child that a test wants. A child runs a program as `python -c` would, in a folder and an environment of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = "import runpy; runpy.run_module('compress', run_name='__main__', alter_sys=True)"


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (minus the signal that killed it), what it said, CPU seconds, and its peak in bytes."""

    code: int
    out: str
    err: str
    seconds: float
    peak: int


class Nursery:
    """The process that children are forked from."""

    def __init__(self) -> None:
        self._line, there = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._line.close()
            serve(there)
            os._exit(0)
        there.close()

    def start(self, program: str, *arguments: Any, files: tuple[int, int, int], cwd: Path, **env: str) -> int:
        """Start a child on open files for stdin, stdout and stderr; its process id."""
        order = {"program": program, "arguments": [str(a) for a in arguments], "cwd": str(cwd), "env": {**os.environ, **env}}
        pid: int = self._ask(order, files)
        return pid

    def wait(self, pid: int) -> tuple[int, float, int]:
        """Exit code, CPU seconds and peak of a child that was started."""
        code, seconds, peak = self._ask({"wait": pid})
        return code, seconds, peak

    def run(self, program: str, *arguments: Any, cwd: Path, **env: str) -> Ended:
        """A child from its start to its end."""
        with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            files = (nothing.fileno(), out.fileno(), err.fileno())
            code, seconds, peak = self.wait(self.start(program, *arguments, files=files, cwd=cwd, **env))
            out.seek(0)
            err.seek(0)
            return Ended(code, out.read(), err.read(), seconds, peak)

    def close(self) -> None:
        self._line.close()
        os.waitpid(self._pid, 0)

    def _ask(self, order: Mapping[str, Any], files: tuple[int, ...] = ()) -> Any:
        send(self._line, order, files)
        return receive(self._line)[0]


def send(line: socket.socket, message: Any, files: tuple[int, ...] = ()) -> None:
    data = json.dumps(message).encode()
    socket.send_fds(line, [len(data).to_bytes(8, "big")], files)
    line.sendall(data)


def receive(line: socket.socket) -> tuple[Any, list[int]]:
    """The next message and the files that came with it; (None, []) when nobody is there any more."""
    head, files, _, _ = socket.recv_fds(line, 8, 3)
    if not head:
        return None, []
    with line.makefile("rb", buffering=0) as stream:
        data = b""
        while len(data) < int.from_bytes(head, "big"):
            data += stream.read(int.from_bytes(head, "big") - len(data))
    return json.loads(data), files


def serve(line: socket.socket) -> None:
    while True:
        order, files = receive(line)
        if order is None:
            return
        if "wait" in order:
            _, status, usage = os.wait4(order["wait"], 0)
            unit = 1 if sys.platform == "darwin" else 1024
            send(line, [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit])
            continue
        pid = os.fork()
        if pid == 0:
            line.close()
            live(order, files)
        for file in files:
            os.close(file)
        send(line, pid)


def live(order: Mapping[str, Any], files: list[int]) -> None:
    """In a child: become what was ordered. Does not return."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = ["-c", *order["arguments"]]
    sys.path.insert(0, order["cwd"])
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    code: Any = 1
    try:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            traceback.print_exc()
        os._exit(code if isinstance(code, int) else 1)
