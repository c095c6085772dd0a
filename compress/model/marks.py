"""Which tokens are special, or punctuation: those that end and part what others say."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from compress.model.tokenizer import tokenizer_of

SPACES = str.maketrans("", "", "\u0120\u2581\u010a \n")  # how vocabularies write a space or the end of a line
ENDS = ("<0x0A>",)  # other ways to write the end of a line


@dataclass(frozen=True)
class Marks:
    """Ids, ascending. special: of special tokens; every: of those, and of tokens that are punctuation or ends of lines alone."""

    special: tuple[int, ...]
    every: tuple[int, ...]


def marked(folder: Path, vocabulary: tuple[int, ...] | None = None) -> Marks:
    """Those of a folder's tokenizer, as a `vocabulary` of some of the tokens numbers them. DataError where there is none."""
    with tokenizer_of(folder) as tokenizer:
        special = set(tokenizer.special())
        every = special | {i for text, i in tokenizer.ids().items() if punctuation(text)}
    numbers = {old: new for new, old in enumerate(vocabulary)} if vocabulary is not None else {i: i for i in every}
    return Marks(*(tuple(sorted(numbers[i] for i in found if i in numbers)) for found in (special, every)))


def punctuation(text: str) -> bool:
    """Whether a token, as a vocabulary writes it, is punctuation or an end of a line and nothing else."""
    if text in ENDS or (text and set(text) <= set("\u010a\n")):
        return True
    bare = text.translate(SPACES)
    return bool(bare) and all(unicodedata.category(c).startswith("P") for c in bare)
