"""The peak of a process's anonymous memory, and the seconds, of the clock and of the CPU, from here on; and a child that is asked
for them. Linux; no more than the standard library, for peers' environments."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any


def anonymous() -> int:
    """Bytes of memory that is no file's."""
    line = next(row for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if row.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def asked(command: list[str], job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What a child prints last, in JSON, of a job that it reads from its input; the end of its errors ends this run."""
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


class Meter(threading.Thread):
    """Looks for the peak a hundred times a second, until it is asked; bytes are those beyond what there was at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.peak = anonymous()
        self.begun, self.used, self.ended = time.perf_counter(), time.process_time(), threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.peak = max(self.peak, anonymous())

    def said(self) -> dict[str, float]:
        """The peak, and the seconds until now."""
        self.ended.set()
        self.join()
        clock, used = time.perf_counter() - self.begun, time.process_time() - self.used
        return {"peak": self.peak - self.first, "seconds": clock, "cpu": used}
