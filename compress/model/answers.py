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
from transformers.utils.chat_template_utils import render_jinja_template

from compress.documents import one_line
from compress.errors import DataError, first_line

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them

Span = tuple[int, int]  # characters of a text: from which one on, and up to which
Answers = tuple[str, list[Span]]  # the text of a conversation, and the stretches of it that are answers

HOW = "give its chat template {% generation %} marks, or leave 'answers' out"


# --- which of them count ----------------------------------------------------------------------------------------------


def learnt_from(messages: Sequence[dict[str, Any]], where: str) -> list[int]:
    """The numbers, from 0, of the answers that the data lets be learnt from: not with `train: false`, nor with `weight: 0`."""
    return [i for i in answering(messages) if is_learnt(messages[i], f"message {i + 1}", where)]


def answering(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def is_learnt(message: dict[str, Any], which: str, where: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: 'train' of {which} is '{one_line(str(train), 40)}'; it is true or false")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise DataError(f"{where}: 'weight' of {which} is '{one_line(str(weight), 40)}'; it is 0 or 1")
    return train is not False and weight != 0


# --- what a template says; in the tokenizer's own process -------------------------------------------------------------


def answers_in(tokenizer: Any, messages: list[dict[str, Any]], wanted: Sequence[int]) -> Answers | str:
    """The text of a conversation, and the stretches of it that are the answers of these numbers; or why they cannot be told."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    if MARKS.search(tokenizer.get_chat_template()):
        return marked_ones(tokenizer, messages, wanted, text)
    spans = []
    for i in wanted:
        try:
            given = rendered(tokenizer, messages[:i], add_generation_prompt=True)[0]
            said = rendered(tokenizer, messages[: i + 1])[0]
        except Exception as e:  # a template may refuse what has no answer yet, or raise whatever Jinja does
            return f"the chat template fails on what stands before message {i + 1}: {one_line(first_line(e))}"
        if not text.startswith(said):  # behind a whole conversation some put the end of a text
            said = said.removesuffix(tokenizer.eos_token or "")
        if not said.startswith(given):
            return f"the chat template does not go on from its generation prompt in message {i + 1}"
        if not text.startswith(said):
            return f"the chat template writes message {i + 1}, or one before it, otherwise when others follow"
        spans.append((len(given), len(said)))
    return text, spans


def marked_ones(tokenizer: Any, messages: list[dict[str, Any]], wanted: Sequence[int], text: str) -> Answers | str:
    """What the template itself marks."""
    said, spans = rendered(tokenizer, messages, return_assistant_tokens_mask=True)
    answers = answering(messages)
    if said != text:
        return "the chat template writes something else when it is asked for its marks"
    if len(wanted) == len(answers):
        return text, spans
    if len(spans) != len(answers):
        return f"some do not count, and the chat template marks {len(spans)} stretches of text for {len(answers)} answers"
    return text, [span for i, span in zip(answers, spans, strict=True) if i in wanted]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[Span]]:
    """What a template makes of messages, which may be none, and what it marks, where it is asked for that."""
    if messages and "return_assistant_tokens_mask" not in options:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options), []
    special: dict[str, Any] = tokenizer.special_tokens_map
    found: Any = render_jinja_template([messages], chat_template=tokenizer.get_chat_template(), **special, **options)
    (text,), spans = found
    return text, spans[0] if spans else []


# --- from characters to tokens ----------------------------------------------------------------------------------------


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
