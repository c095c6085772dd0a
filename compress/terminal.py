"""Standard output and error as a command finds them: closed, gone meanwhile, or of an encoding that lacks our characters.

Work goes on without a reader. A stream that was closed before we began, or whose reader goes away, swallows what is printed;
any other failure to print (a full disk) is kept and told when the work is done. Imports nothing heavy: help is quick.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Lenient:
    """A text stream on which writing never fails; `failure` is the first error that is worth telling."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.failure: OSError | None = None
        self._gone = False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def _try(self, act: Any) -> None:
        if self._gone:
            return
        try:
            act()
        except BrokenPipeError:
            self._end()
        except OSError as e:
            self.failure = e
            self._end()

    def _end(self) -> None:
        """Have what is still buffered, and what Python flushes when it ends, go nowhere."""
        self._gone = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_standard_files() -> None:
    """Have descriptors 0, 1 and 2 open, so that no file of ours gets one of them and is written to by what prints there."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free one, which is this


@contextmanager
def lenient() -> Iterator[Lenient]:
    """Inside, printing to standard output and error never fails; gives standard output, for its `failure`."""
    keep_standard_files()
    before = sys.stdout, sys.stderr
    for stream in before:  # a terminal that knows no arrows gets question marks, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    out, error = (Lenient(stream if stream is not None else io.StringIO()) for stream in before)
    sys.stdout, sys.stderr = out, error
    try:
        yield out
    finally:
        out.flush()
        error.flush()
        sys.stdout, sys.stderr = before
