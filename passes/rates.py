"""Errors of formats that differ by their rate alone, at every rate, from two of them that are solved.

An allocation wants many rates of entropy-coded integers and of trellis codes. What share d of the variance of normal numbers a
quantizer leaves at a rate is known: of entropy-coded integers, but for a constant, 4**-rate (an octave of the step costs a bit a
weight), of trellis codes what was measured (`trellis_core.DISTORTION`). Under GPTQ's feedback the weights are quantized and some
of what earlier inputs left, so the variance v is that of the weights, s, and a share k of the error: v = s + k d v, and the error
is d v = s d / (1 - k d). So 1 / error is a straight line over 1 / d. Errors at the lowest and the highest rate that are
asked for are measured, and those between them read off the line: within 3 % in a Llama of 7 million weights, from 1.5 to 5 bits.
Bytes are exact in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.errors import FormatError
from compress.formats import Coded, Ecq, Format, Rotated, Tcq, numbers_of, parse
from compress.manager import Record
from compress.passes.trellis_core import DISTORTION

# The rates that formats without one stand for.
ANY = {"ecq": [f"{h / 100:g}" for h in range(150, 501, 10)], "tcq": [f"{h / 2:g}" for h in range(3, 11)]}
FIGURES = ("output", "weight", "kl")


def expanded(texts: Sequence[str]) -> list[str]:
    """Formats with every rate in the place of `ecq`, `tcq:r128` and their like."""
    found = []
    for text in texts:
        kind, colon, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
        if kind not in ANY:
            found.append(text)
            continue
        every = [f"{kind}{rate}{colon}{rest}" for rate in ANY[kind]]
        found += [one for one in every if _is_format(one)] or every  # few states do not go with every rate
    return found


def _is_format(text: str) -> bool:
    try:
        parse(text)
    except FormatError:
        return False
    return True


def line_of(fmt: Format) -> str | None:
    """What formats have in common that differ by their rate; None for others."""
    numbers = numbers_of(fmt)
    if not isinstance(numbers, Coded):
        return None
    kind = f"tcq:l{numbers.size}" if isinstance(numbers, Tcq) else "ecq"
    return f"{kind}:r{fmt.block}" if isinstance(fmt, Rotated) else kind


def ends(formats: Sequence[Format]) -> list[Format]:
    """The formats that are to be solved: of those on a line the lowest rate and the highest."""
    lines: dict[str, list[Format]] = {}
    for fmt in formats:
        if line := line_of(fmt):
            lines.setdefault(line, []).append(fmt)
    kept = {end for members in lines.values() for end in (min(members, key=precision), max(members, key=precision))}
    return [fmt for fmt in formats if line_of(fmt) is None or fmt in kept]


def precision(fmt: Format) -> float:
    """1 / d at the rate of a format: its place on its line."""
    numbers = numbers_of(fmt)
    assert isinstance(numbers, Ecq | Tcq)
    return 4.0**numbers.rate if isinstance(numbers, Ecq) else 1 / DISTORTION[numbers.size][numbers.halves]


def between(formats: Sequence[Format], solved: Sequence[Record]) -> Iterator[Record]:
    """The records of one site's formats that were not solved, from those of the ends of their lines."""
    known = {parse(record["format"]): record for record in solved}
    for fmt in formats:
        if fmt in known:
            continue
        low, high = sorted((f for f in known if line_of(f) == line_of(fmt)), key=precision)
        share = (precision(fmt) - precision(low)) / (precision(high) - precision(low))
        figures = {name: _on_line(known[low][name], known[high][name], share) for name in FIGURES}
        yield {**known[low], "format": str(fmt), **figures}


def _on_line(low: float | None, high: float | None, share: float) -> float | None:
    """Between two figures by the line through their inverses; the larger one where there is none."""
    if low is None or high is None:
        return None
    if min(low, high) <= 0:
        return max(low, high)
    return 1 / ((1 - share) / low + share / high)
