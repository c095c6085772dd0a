"""Foreign code that can be ended: a forked child that answers requests, each within a limit of time and of memory.

Tokenizers are compiled code that follows files which anybody may have written. They raise what is no Exception, print to
standard error by themselves, abort, and can be made to search for hours inside one call, where Python cannot stop them. In a
child all of that is one answer: what was wrong. A fork takes a few milliseconds, a fresh interpreter that imports transformers
three seconds, and that is why it is a fork; the child touches no torch, whose threads do not survive one. Its memory is its own:
what a long text takes is given back when the child ends.

Time is counted as CPU time of the child, so that a busy machine is no reason; a child that waits for something is ended later.
The kernel holds the limit, so a child outlives a killed parent by no more than that.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import first_line

MEMORY = 8 << 30  # bytes that a child may have beyond its parent's
PATIENCE = 5  # seconds on the clock for each second of CPU time


class Failed(Exception):  # noqa: N818  told to the user by whoever asked, in an error of theirs
    """The child could not answer; the text says why."""


class Apart:
    """A child in which `serve` answers; a context. Requests and answers are plain values."""

    def __init__(self, serve: Callable[..., Any]):
        self._serve = serve

    def __enter__(self) -> Apart:
        self._pipe, theirs = Pipe()
        self._child = os.fork()
        if not self._child:
            self._pipe.close()
            answer_all(theirs, self._serve)
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._reap(signal.SIGKILL)

    def ask(self, seconds: float, *request: Any) -> Any:
        """What the child answers. Failed where its code fails, does not end within the time, or takes the child down."""
        try:
            self._pipe.send((seconds, request))
            if not self._pipe.poll(seconds * PATIENCE):
                self._reap(signal.SIGKILL)
                raise Failed(f"did not end within {seconds * PATIENCE:.0f} s")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise Failed(died(self._reap(), seconds)) from None
        if not good:
            raise Failed(answer)
        return answer

    def _reap(self, how: int = 0) -> int:
        """End the child by a signal, if any, and learn how it ended; once."""
        child, self._child = self._child, 0
        if not child:
            return 0
        if how:
            os.kill(child, how)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def died(code: int, seconds: float) -> str:
    """Why a child is gone, for people."""
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"did not end within {seconds:.0f} s of CPU time, or took too much memory"
    return f"ended the process, {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def answer_all(pipe: Connection, serve: Callable[..., Any]) -> NoReturn:
    """Answer until the parent closes the pipe. Nothing of the parent's runs behind this, not even what runs at exit."""
    try:
        gc.disable()  # what lies around is the parent's to end
        faulthandler.disable()  # it may write to a copy of standard error
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # a panic prints, and a question would wait for an answer
            os.dup2(nowhere, descriptor)
        limit(resource.RLIMIT_CORE, 0)
        with suppress(OSError, ValueError):  # Linux alone tells
            used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            limit(resource.RLIMIT_AS, used + MEMORY)
        while True:
            seconds, request = pipe.recv()
            limit(resource.RLIMIT_CPU, int(sum(os.times()[:2]) + seconds) + 1)
            pipe.send(answered(serve, request))
    except BaseException:  # such as the end of the pipe
        os._exit(0)


def answered(serve: Callable[..., Any], request: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, the answer), or (False, what was wrong)."""
    try:
        return True, serve(*request)
    except MemoryError:
        return False, "took too much memory"
    except BaseException as e:  # a panic of Rust code is no Exception
        return False, first_line(e)


def limit(what: int, soft: int) -> None:
    """Set a limit of this process, if the system lets us."""
    hard = resource.getrlimit(what)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(what, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
