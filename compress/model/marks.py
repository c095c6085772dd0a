"""Which tokens are special, or punctuation: those that end and part what others say."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from compress.model.tokenizer import tokenizer_of

SPACES = str.maketrans("", "", "\u0120\u2581\u010a \n")  # how vocabularies write a space or the end of a line
ENDS = ("<0x0A>",)  # other ways to write the end of a line


def marked(folder: Path, vocabulary: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The ids of all special tokens and of those that are punctuation or ends of lines alone, ascending; as a `vocabulary` of
    some of the tokens numbers them. DataError where the folder has no tokenizer."""
    with tokenizer_of(folder) as tokenizer:
        found = {*tokenizer.special(), *(i for text, i in tokenizer.ids().items() if punctuation(text))}
    if vocabulary is None:
        return tuple(sorted(found))
    return tuple(new for new, old in enumerate(vocabulary) if old in found)


def punctuation(text: str) -> bool:
    """Whether a token, as a vocabulary writes it, is punctuation or an end of a line and nothing else."""
    if text in ENDS or (text and set(text) <= set("\u010a\n")):
        return True
    bare = text.translate(SPACES)
    return bool(bare) and all(unicodedata.category(c).startswith("P") for c in bare)
