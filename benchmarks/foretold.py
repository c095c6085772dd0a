"""What `compress plan` said of memory and time, and where a run was at its peak."""

from __future__ import annotations

import re
from typing import Any

from memory import Peak

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "min": 60, "h": 3600}
FORETOLD = re.compile(r"peak memory about ([\d.]+) (\w+), in '(.+?)'; time about ([\d.]+) (\w+) on")


def read_plan(text: str) -> dict[str, Any]:
    """What a screen of `plan` foretells: bytes of each artifact, peak memory and the stage that has it, seconds."""
    match = FORETOLD.search(text)
    assert match, text
    peak, unit, stage, span, of = match.groups()
    sizes = {name: int(count.replace(",", "")) for name, count in re.findall(r"^(\w+): ([\d,]+) bytes in", text, re.M)}
    return {"bytes": sizes, "peak": float(peak) * UNITS[unit], "stage": stage, "seconds": float(span) * UNITS[of]}


def stage_at(text: str, peak: Peak) -> str:
    """The stage that a run was in at its peak, by what it had said until then."""
    until = text.encode()[: peak.at].decode(errors="ignore")
    said = re.findall(r"^(?:step \d+ of \d+: (\w+)|writing (\w+)|(evaluating).*)", until, re.M)
    return next(filter(None, said[-1])) if said else "measuring"


def stages(foretold: str, measured: str) -> str:
    """The stage of the peak, both where it was another than foretold."""
    return foretold if foretold == measured else f"{foretold}; measured in {measured}"
