"""What is left of a text several windows long when it is merged: loss of the tokens behind it, facts hidden in it, memory.

Text: windows of `times` x `window` tokens of the evaluation text; the next 256 tokens are read behind each, given

    merged       the text, merged by the biases of the pass (its own affixes)
    no bias      the same with biases of zero: tokens that are near win
    last chunk   the last tokens of the text, as many as the merged cache holds; `half a chunk`: half of them
    last window  the last `window` tokens
    all          the whole text as it is, which is extrapolation where the model knows fewer positions

Loss is in nats per token, perplexity its exponential. Facts: "The secret code of the blue house is dddddd." at some place in a
prompt of the same length, whose last tokens ask for it and are the suffix of every chunk. Digits right: of the digits, each asked
for behind the right ones before it, those that are the likeliest token. Memory: the most that was held between two levels
(`Merged.nbytes`: keys, values, hidden states of all chunks) beside the cache of the whole text.

`--length` is that of the calibration windows, at least half a window. The model is read in fp32.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import report
import torch
import transformers
import yaml
from kv_policy import facts, filled, filler
from report import line
from torch import Tensor
from variants import parser

from compress import pipeline
from compress.cache.merging import MERGED, Merging, told
from compress.export.runtime.merging import merge_context, merge_long
from compress.model.data import Windows, read
from compress.model.model import open_model

BEHIND = 256
Sums = dict[str, list[float]]  # by way: predictions, right ones, loss


def merging_of(options: argparse.Namespace, folder: Path) -> Merging:
    """What the pass measures."""
    windows = {"text": str(options.calibration.resolve()), "sequences": options.sequences, "length": options.length,
               "bos": options.bos}  # fmt: skip
    step: dict[str, Any] = {"window": options.window, "warmup": options.warmup}
    content = {"model": str(options.model.resolve()), "out": str(folder / "run"), "data": {"calibration": windows},
               "passes": [{"context_merge": step}], "export": []}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return told(pipeline.run(folder / "recipe.yaml").state.serving[MERGED])


class Reader:
    """A model that reads a prompt in every way."""

    def __init__(self, options: argparse.Namespace, merging: Merging):
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.merging, self.bos = merging, options.bos
        self.flat = replace(merging, bias=tuple((0.0,) * merging.chunk for _ in merging.bias))
        self.peak = self.whole = 0
        merge_long(self.model, merging)

    @torch.no_grad()
    def answers(self, prompt: Tensor, rest: Tensor, suffix: int | None = None) -> dict[str, Tensor]:
        """Logits [n, vocabulary] of all n tokens `rest` [1, n] behind a prompt [1, t], by way."""
        found, first = {}, prompt[:, : int(self.bos)]
        for name, merging in (("merged", self.merging), ("no bias", self.flat)):
            self.model.context_merge = merging
            merged = merge_context(self.model, prompt, suffix=suffix)
            self.peak = max(self.peak, merged.nbytes)
            behind = self.model(rest, past_key_values=merged.past_key_values).logits
            found[name] = torch.cat([merged.logits, behind[:, :-1]], 1)[0]
        half, chunk, window = self.merging.chunk // 2, self.merging.chunk, self.merging.window
        ways = {"half a chunk": half, "last chunk": chunk, "last window": window, "all": prompt.shape[1]}
        for name, many in ways.items():
            short = prompt if many == prompt.shape[1] else torch.cat([first, prompt[:, len(first[0]) - many :]], 1)
            out = self.model(short, logits_to_keep=1)
            cache = out.past_key_values
            self.whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            found[name] = torch.cat([out.logits, self.model(rest, past_key_values=cache).logits[:, :-1]], 1)[0]
        return found


def add(sums: Sums, found: dict[str, Tensor], targets: Tensor) -> None:
    """Count logits [n, vocabulary] of targets [n]."""
    for name, logits in found.items():
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        for i, more in enumerate((len(targets), float((logits.argmax(-1) == targets).sum()), float(loss))):
            sums.setdefault(name, [0.0, 0.0, 0.0])[i] += more


def of_text(options: argparse.Namespace, reader: Reader) -> Sums:
    """The tokens behind every text."""
    sums, total = Sums(), options.times * options.window
    if not options.judged:
        return sums
    windows = Windows(text=str(options.evaluation.resolve()), sequences=options.judged, length=total + BEHIND, bos=options.bos)
    vocabulary = open_model(str(options.model)).state.graph["embed"].shape[0]
    for ids in read(windows, options.model, Path(), vocabulary).ids:
        add(sums, reader.answers(ids[None, :total], ids[None, total:]), ids[total:])
        print("text", {name: f"{loss / count:.4f}" for name, (count, _, loss) in sums.items()}, flush=True)
    return sums


def prompts(options: argparse.Namespace, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A prompt with a fact in it, the question behind it, and the digits; as ids [1, t]."""
    draw, text = random.Random(2), options.evaluation.read_text(encoding="utf-8")
    ids = lambda words: tokenizer(words, add_special_tokens=False)["input_ids"]  # noqa: E731
    for number in range(options.facts):
        question, answer = facts(draw)
        words, total = filler(text, 100 + number), options.times * options.window - options.bos - len(ids(question))
        prompt = filled(tokenizer, "", words, draw.randrange(total // 16, total - total // 16)) + question + answer
        first = [tokenizer.bos_token_id] if options.bos else []
        whole = [*first, *ids(filled(tokenizer, prompt, words, total))]
        yield tuple(torch.tensor([x]) for x in (whole, ids(question), ids(answer.rstrip("."))))  # type: ignore[misc]


def of_facts(options: argparse.Namespace, reader: Reader, tokenizer: Any) -> Sums:
    """The digits of every planted fact."""
    sums = Sums()
    for number, (prompt, question, digits) in enumerate(prompts(options, tokenizer)):
        found = reader.answers(torch.cat([prompt, question], 1), digits, suffix=question.shape[1])
        add(sums, found, digits[0])
        print("facts", number, {name: f"{right / count:.2f}" for name, (count, right, _) in sums.items()}, flush=True)
    return sums


def rows(options: argparse.Namespace) -> list[str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as place:
        folder = options.work or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        merging = merging_of(options, folder)
    reader = Reader(options, merging)
    text, planted = of_text(options, reader), of_facts(options, reader, tokenizer)
    lines = [line(["the text is read", "loss", "perplexity", "digits right"]), line(["---", *["---:"] * 3])]
    for name in text or planted:
        (count, _, loss), (digits, right, _) = (s.get(name, [float("nan")] * 3) for s in (text, planted))
        perplexity = float(torch.tensor(loss / count).exp())
        lines.append(line([name, f"{loss / count:.4f}", f"{perplexity:.2f}", f"{right / digits:.2f}"]))
    total = options.times * options.window
    said = (
        f"{options.judged} texts and {options.facts} prompts with a fact, of {total:,} tokens, {options.times} windows of "
        f"{options.window}; chunks of {merging.chunk}, warm-up {merging.warmup} of {merging.layers} layers. At most "
        f"{reader.peak:,} bytes between layers, {reader.peak / reader.whole:.1%} of a plain cache of the text."
    )
    return [*lines, "", said]


def main() -> None:
    options = parser(__doc__, judged=24)
    options.add_argument("--window", type=int, default=512)
    options.add_argument("--warmup", type=int, help="layers before the first merge, where it is not to be the pass's own choice")
    options.add_argument("--times", type=int, default=4, help="windows that a text has")
    options.add_argument("--facts", type=int, default=0, help="prompts with a planted fact")
    options.add_argument("--work", type=Path, help="a folder that keeps what was measured for the next time")
    given = options.parse_args()
    model = given.model.resolve().name
    told = f"{model}, biases of {given.sequences} windows of {given.length} tokens"
    page = [f"# Merged contexts, {date.today()}", "", told, "", report.machine(), "", *rows(given), ""]
    report.publish("\n".join(page), given.save, f"context-merge-{model}")


if __name__ == "__main__":
    main()
