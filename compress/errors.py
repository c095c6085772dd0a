"""What can go wrong, as one tree.

    CompressError(ValueError)       a user can mend it: one line, exit code 2
    ├── RecipeError                 the recipe's text: unknown key, wrong type, illegal value (file:line:column)
    │   ├── OrderError              a step needs what an earlier step took away
    │   └── MatchError              a pattern matches no site
    ├── ModelError                  the model's folder: missing, broken or unreadable files, unknown architecture
    ├── DataError                   calibration or evaluation text: missing, too short
    ├── FormatError                 a format's text, or a format that does not fit a matrix
    ├── RunError                    the run directory: in use, made by other settings, disk full
    ├── KernelError                 CUDA kernels that cannot be compiled, or do not run on this machine
    └── ExportError                 an artifact that the target cannot hold, or that does not prove itself

    ContractError(RuntimeError)     our mistake, or a pass author's: the message says so and a traceback is shown

Each message says where, what, and what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CompressError(ValueError):
    """A mistake that the user can mend.

    at: where in the options of a pass the mistake is, such as ``("pins", "*.v")``; the recipe knows its line.
    """

    def __init__(self, message: str, at: tuple[str, ...] = ()):
        super().__init__(message)
        self.at = at


class RecipeError(CompressError):
    """The recipe cannot be read as one."""


class OrderError(RecipeError):
    """A step needs a fact that does not hold when its turn comes."""


class MatchError(RecipeError):
    """A pattern matches no site of the model."""


class ModelError(CompressError):
    """The model cannot be read."""


class DataError(CompressError):
    """A text cannot be read, or is too short."""


class FormatError(CompressError):
    """A format is misspelt, or does not fit a matrix."""


class RunError(CompressError):
    """The run directory cannot be used, or cannot be written."""


class ExportError(CompressError):
    """An artifact cannot be written for its target, or failed its own check."""


class KernelError(CompressError):
    """The CUDA kernels cannot be compiled, or do not run on this machine."""


class ContractError(RuntimeError):
    """A pass broke its own promise; the message addresses its author."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, what is refused by somebody who knows only numbers is refused with the name of what they belong to in front."""
    try:
        yield
    except CompressError as e:
        raise type(e)(f"'{name}': {e}", e.at) from None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The member of `known` closest to `word` in spelling, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or an empty string when nothing is near."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else ""


def first_line(e: BaseException) -> str:
    """The first non-empty line of an exception's text."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # a heading, with what matters below it
        return " ".join(lines[:2])
    return lines[0] if lines else type(e).__name__


def one_line(text: str) -> str:
    """Text of a foreign file for a message: without control characters, at most 200 characters."""
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f]", " ", text)[:200]
