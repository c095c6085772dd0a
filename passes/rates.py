"""Errors of entropy-coded formats at every rate, from two of them that are solved.

A rate may be any number, and an allocation wants many. Each octave of the step costs a bit a weight and four times the error, so
the logarithm of an error is nearly a straight line over the rate: those at the lowest and the highest rate that are asked for are
measured, and those between them read off the line. Bytes are exact in any case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from compress.formats import Ecq, Format, Rotated, numbers_of, parse
from compress.manager import Record

ANY = tuple(range(150, 501, 10))  # hundredths of a bit: what `ecq` alone stands for among formats
FIGURES = ("output", "weight", "kl")


def expanded(texts: Sequence[str]) -> list[str]:
    """Formats with every rate in the place of `ecq` and `ecq:r128`."""
    found = []
    for text in texts:
        kind, _, rotation = text.partition(":") if isinstance(text, str) else ("", "", "")
        found += [f"{Ecq(h)}{':' * bool(rotation)}{rotation}" for h in ANY] if kind == "ecq" else [text]
    return found


def line_of(fmt: Format) -> str | None:
    """What formats have in common that differ by their rate; None for others."""
    if not isinstance(numbers_of(fmt), Ecq):
        return None
    return f"ecq:r{fmt.block}" if isinstance(fmt, Rotated) else "ecq"


def ends(formats: Sequence[Format]) -> list[Format]:
    """The formats that are to be solved: of those on a line the lowest rate and the highest."""
    lines: dict[str, list[Format]] = {}
    for fmt in formats:
        if line := line_of(fmt):
            lines.setdefault(line, []).append(fmt)
    kept = {end for members in lines.values() for end in (min(members, key=rate_of), max(members, key=rate_of))}
    return [fmt for fmt in formats if line_of(fmt) is None or fmt in kept]


def rate_of(fmt: Format) -> float:
    numbers = numbers_of(fmt)
    assert isinstance(numbers, Ecq)
    return numbers.rate


def between(formats: Sequence[Format], solved: Sequence[Record]) -> Iterator[Record]:
    """The records of one site's formats that were not solved, from those of the ends of their lines."""
    known = {parse(record["format"]): record for record in solved}
    for fmt in formats:
        if fmt in known:
            continue
        low, high = sorted((f for f in known if line_of(f) == line_of(fmt)), key=rate_of)
        share = (rate_of(fmt) - rate_of(low)) / (rate_of(high) - rate_of(low))
        figures = {name: _on_line(known[low][name], known[high][name], share) for name in FIGURES}
        yield {**known[low], "format": str(fmt), **figures}


def _on_line(low: float | None, high: float | None, share: float) -> float | None:
    """Between two figures by the line through their logarithms; the larger one where there is none."""
    if low is None or high is None:
        return None
    if min(low, high) <= 0:
        return max(low, high)
    return math.exp((1 - share) * math.log(low) + share * math.log(high))
