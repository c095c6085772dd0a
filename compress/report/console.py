"""What a person sees while a run works: one line per site, and on a terminal a last line with what is left."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from compress.report.page import span
from compress.report.report import site_line


class Console:
    """Prints records as they come. On a terminal the last line shows progress and the time left, and is redrawn."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.quiet = quiet
        self.stream = stream or sys.stdout
        self.live = not quiet and self.stream.isatty()
        self._began = 0.0
        self._status = ""
        self._first = -1.0

    def say(self, record: dict[str, Any]) -> None:
        self.note(site_line(record))

    def note(self, line: str) -> None:
        if self.quiet:
            return
        self._clear()
        print(line, file=self.stream, flush=True)
        self._draw()

    def step(self, number: int, count: int, name: str, cached: bool, difference: str | None) -> None:
        if difference:
            self.note(difference)
        self._began, self._status = time.perf_counter(), ""
        self._first = -1.0
        self.note(f"step {number} of {count}: {name}{'  (finished before)' if cached else ''}")

    def progress(self, done: float, total: float, what: str) -> None:
        """Work goes on with `what`; `done` of `total` parts are behind. Parts taken from an earlier run do not count as speed."""
        if self._first < 0:
            self._first, self._began = done, time.perf_counter()
        left = ""
        if done > self._first:
            rate = (time.perf_counter() - self._began) / (done - self._first)
            left = f", about {span(rate * (total - done))} left"
        self._status = f"  {what}: {done:.0f} of {total:.0f}{left}"
        self._clear()
        self._draw()

    def close(self) -> None:
        self._clear()
        self._status = ""

    def _clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def _draw(self) -> None:
        if self.live and self._status:
            print(self._status, end="", file=self.stream, flush=True)
