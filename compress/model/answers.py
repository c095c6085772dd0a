"""Where the answers stand in a conversation: what a model has to say itself, and the end of its turn; all else is put before it.

A chat template may mark them, as `{% generation %}` (what transformers calls assistant tokens): then they are what it marks. Else
the template is asked. What it writes for the messages before an answer, with the generation prompt, is what the model is given;
what it writes for these and the answer has to begin with that, and the rest is the answer, with whatever closes it. The whole
conversation has to begin with both. A template for which that does not hold (some take the thoughts out of earlier turns) is
refused: a guess would teach a model to say what nobody said.

Where stretches of characters are known, a token is learnt when one of its characters is in them. transformers does the same,
except that of a last character that takes several tokens it marks the first alone.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from compress.documents import one_line
from compress.errors import DataError, first_line

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them

Span = tuple[int, int]  # characters of a text: from which one on, and up to which
Answers = tuple[str, list[Span]]  # the text of a conversation, and the stretches of it that are answers

HOW = "give its chat template {% generation %} marks, or leave 'answers' out"


# --- what a template says; in the tokenizer's own process -------------------------------------------------------------


def answering(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the messages that are answers, from 0."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def answers_in(tokenizer: Any, messages: list[dict[str, Any]]) -> Answers | str:
    """The text of a conversation with its answers, in order: one stretch for each, but where a template marks them as it sees
    fit; or why they cannot be told."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if MARKS.search(tokenizer.get_chat_template()):
        return marked_ones(tokenizer, messages, text)
    spans = []
    for i in answering(messages):
        try:
            given = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            said = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        except Exception as e:  # a template may refuse what has no answer yet, or raise whatever Jinja does
            return f"the chat template fails on the messages up to number {i + 1}: {one_line(first_line(e))}"
        if not text.startswith(said):  # behind a whole conversation some put the end of a text
            said = said.removesuffix(tokenizer.eos_token or "")
        if not said.startswith(given):
            return f"the chat template does not go on from its generation prompt in message {i + 1}"
        if not text.startswith(said):
            return f"the chat template writes message {i + 1}, or one before it, otherwise when others follow"
        spans.append((len(given), len(said)))
    return text, spans


def marked_ones(tokenizer: Any, messages: list[dict[str, Any]], text: str) -> Answers | str:
    """What the template itself marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template, special = tokenizer.get_chat_template(), tokenizer.special_tokens_map
    found: Any = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True, **special)
    (said,), (spans,) = found
    return (text, spans) if said == text else "the chat template writes something else when it is asked for its marks"


# --- which of them count ----------------------------------------------------------------------------------------------


def learnt_of(spans: Sequence[Span], messages: Sequence[dict[str, Any]], where: str) -> list[Span]:
    """The answers that are learnt from: without those of which the data says that they are not."""
    wanted = [is_learnt(messages[i], i + 1, where) for i in answering(messages)]
    if all(wanted):
        return list(spans)
    if len(spans) != len(wanted):
        raise DataError(f"{where}: some answers are not to be learnt from, and the chat template marks {len(spans)} stretches of "
                        f"text for {len(wanted)} answers, so which are whose is not known; leave the record out")  # fmt: skip
    return [span for span, is_wanted in zip(spans, wanted, strict=True) if is_wanted]


def is_learnt(message: dict[str, Any], number: int, where: str) -> bool:
    """Whether the data lets an answer be learnt from: not with `train: false`, nor with `weight: 0`."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: 'train' of message {number} is '{one_line(str(train), 40)}', neither true nor false")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise DataError(f"{where}: 'weight' of message {number} is '{one_line(str(weight), 40)}', neither 0 nor 1")
    return train is not False and weight != 0


def covered(starts: Sequence[int], ends: Sequence[int], spans: Sequence[Span]) -> array[int]:
    """1 for each token that stands for a character of some span, else 0. A token of no width stands where it begins."""
    first = torch.tensor(starts, dtype=torch.int64)
    last = torch.maximum(torch.tensor(ends, dtype=torch.int64), first + 1)
    size = max([*starts, *ends, *(end for _, end in spans)], default=0) + 1
    inside = torch.zeros(size + 1, dtype=torch.int64)  # of each character, the number of those before it that are in a span
    for start, end in spans:
        inside[start + 1 : end + 1] = 1
    before = inside.cumsum(0)
    return array("b", (before[last] > before[first]).to(torch.int8).numpy().tobytes())
