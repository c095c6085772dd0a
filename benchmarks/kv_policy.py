"""What a policy of the KV cache costs: KL of text behind a prompt, and planted facts that are asked for after the prompt was
compressed.

Policies of equal bytes: `kv_policy` as it chooses by head, and one rule at one share for all heads, which is what StreamingLLM
(stream), H2O and SnapKV are; `heavy` is H2O with a recent part of eight tokens instead of a half. `fastgen` takes its rules by
the prompt: its T meets the budget in the mean over the calibration windows, and what it takes of a prompt that is judged may be
more or less. Bytes are those that the caches hold after the prompts, in the mean over all that are judged. Half of the
calibration windows have a planted fact that is asked for at their end, as the prompts that are judged have, with other codes and
other text around.

Text: windows of the evaluation text, the last 64 tokens of each read through the cache (compress/cached.py). Facts: "The secret
code of the blue house is dddddd." at some place in a prompt of the same length; the question comes behind the prompt. Digits
right: of the digits, each asked for behind the right ones before it, those that are the likeliest token. All policies get the
same keys, values and queries: the prompt is read once, in fp32, by the artifact's own cache (export/runtime/cache.py).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from report import line
from torch import Tensor
from variants import parser, publish, texts

from compress import pipeline
from compress.cache.policy import SERVED, Policy, Unit, plain_bytes, read
from compress.cache.rules import DTYPES
from compress.cached import prompt_of
from compress.export.runtime.cache import PolicyCache, PolicyLayer, follow
from compress.model.model import Model, open_model

COLOURS = ("blue", "red", "green", "white", "yellow", "black", "brown", "grey")
THINGS = ("house", "boat", "car", "school", "garden", "bridge", "tower", "shop")
POLICIES: dict[str, dict[str, Any]] = {
    "kv_policy": {},
    "fastgen": {"method": "fastgen"},
    **{name: {"method": "uniform", "rules": [name]} for name in ("stream", "h2o", "snap", "heavy")},
}


def facts(draw: random.Random) -> tuple[str, str]:
    """A question, which is the beginning of the fact, and its answer."""
    code = "".join(draw.choice("0123456789") for _ in range(6))
    return f" The secret code of the {draw.choice(COLOURS)} {draw.choice(THINGS)} is", f" {code}."


def filler(text: str, seed: int) -> Iterator[str]:
    """Words of a text from some place on."""
    words = text.split(" ")
    start = random.Random(seed).randrange(len(words) // 2)
    yield from (f" {word}" for word in words[start:])


def filled(tokenizer: Any, text: str, words: Iterator[str], count: int) -> str:
    """The text, longer by words until it has so many tokens."""
    while (short := count - length(tokenizer, text)) > 0:
        for _ in range(max(1, short // 2)):
            text += next(words)
    return text


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def planted(options: argparse.Namespace, tokenizer: Any) -> str:
    """A text to calibrate on: every second window of it has a fact, and at its end asks for it."""
    draw, words = random.Random(1), filler(options.calibration.read_text(encoding="utf-8"), 1)
    text, each = "", options.length - options.bos
    for window in range(options.sequences):
        start = window * each
        if window % 2:
            question, answer = facts(draw)
            text = filled(tokenizer, text, words, start + draw.randrange(each // 16, each // 2)) + question + answer
            text = filled(tokenizer, text, words, start + each - 2 - length(tokenizer, question + answer)) + question + answer
        text = filled(tokenizer, text, words, start + each)
    return filled(tokenizer, text, words, options.sequences * each + 600)  # behind the windows a reader wants some text more


def policies(options: argparse.Namespace, folder: Path, tokenizer: Any) -> Iterator[tuple[str, str, Any]]:
    """(budget, name, state) of every policy; they share what was measured."""
    text = folder / "calibration.txt"
    text.write_text(planted(options, tokenizer), encoding="utf-8")
    windows = {"text": str(text), "sequences": options.sequences, "length": options.length, "bos": options.bos}
    for budget in options.budgets:
        for name, chosen in POLICIES.items():
            context = {} if name == "fastgen" else {"context": options.length - 64}
            step = {"budget": budget, **context, **chosen}
            content = {"model": str(options.model.resolve()), "out": str(folder / "run"), "data": {"calibration": windows},
                       "passes": [{"kv_policy": step}], "export": []}  # fmt: skip
            (folder / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            yield budget, name, pipeline.run(folder / "recipe.yaml").state


class Reader:
    """A model whose prompts are read once for several policies."""

    def __init__(self, folder: Path, several: dict[Any, Policy]):
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        first = next(iter(several.values()))
        everything = [replace(layer, units=(Unit("full", 1000, "fp32"),) * len(layer.units)) for layer in first.layers]
        self.several = {None: replace(first, layers=tuple(everything), ladder=None), **several}
        self.took: dict[Any, list[int]] = {name: [] for name in self.several}  # bytes after each prompt
        follow(self.model, first)

    @torch.no_grad()
    def answers(self, prompt: Tensor, rest: Tensor, keep: int) -> dict[Any, Tensor]:
        """The last `keep` logits [keep, vocabulary] of what comes behind a prompt, by policy; under None with all entries."""
        caches = {name: PolicyCache(policy) for name, policy in self.several.items()}
        first = next(iter(caches.values()))
        for cache in caches.values():
            cache.see(prompt)
        for index, layer in enumerate(first.layers):
            others: list[Any] = [cache.layers[index] for cache in caches.values()]
            layer.read_prompt = read_by(others)  # type: ignore[union-attr,method-assign]
        self.model(prompt, past_key_values=first, logits_to_keep=1)
        for name, cache in caches.items():
            self.took[name].append(cache.nbytes)
        return {name: self.model(rest, past_key_values=cache, logits_to_keep=keep).logits[0] for name, cache in caches.items()}


def read_by(layers: list[PolicyLayer]) -> Any:
    """Reads a prompt into the layers of several caches."""

    def read_prompt(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
        for layer in layers:
            layer.seen, layer.is_initialized = key.shape[2], True
            PolicyLayer.read_prompt(layer, query, key, value, mask, scale)

    return read_prompt


Sums = dict[Any, list[float]]  # by policy: predictions, right ones, KL


def add(sums: Sums, found: dict[Any, Tensor], targets: Tensor | None = None) -> None:
    """Count logits [n, vocabulary]: right are those whose likeliest token is the target, or that of the plain cache."""
    p_nv = found[None].log_softmax(-1)
    for name, logits in found.items():
        q_nv = logits.log_softmax(-1)
        right = q_nv.argmax(-1) == (p_nv.argmax(-1) if targets is None else targets)
        for i, more in enumerate((len(q_nv), float(right.sum()), float((p_nv.exp() * (p_nv - q_nv)).sum()))):
            sums.setdefault(name, [0.0, 0.0, 0.0])[i] += more


def of_text(options: argparse.Namespace, reader: Reader, model: Model) -> Sums:
    """The last 64 tokens of every window."""
    sums: Sums = {}
    for window in texts(options, model, options.evaluation, options.judged).ids:
        prompt = prompt_of(len(window))
        found = reader.answers(window[None, :prompt], window[None, prompt:], len(window) - prompt)
        add(sums, {name: logits[:-1] for name, logits in found.items()})
        print("text", {name: f"{kl / count:.4f}" for name, (count, _, kl) in sums.items()}, flush=True)
    return sums


def of_facts(options: argparse.Namespace, reader: Reader, tokenizer: Any) -> Sums:
    """The digits of every planted fact."""
    sums, draw, text = Sums(), random.Random(2), options.evaluation.read_text(encoding="utf-8")
    for number in range(options.facts):
        question, answer = facts(draw)
        words, total = filler(text, 100 + number), prompt_of(options.length) - options.bos
        prompt = filled(tokenizer, "", words, draw.randrange(total // 16, total // 2)) + question + answer
        ids = tokenizer(filled(tokenizer, prompt, words, total), add_special_tokens=False)["input_ids"]
        first = [tokenizer.bos_token_id] if options.bos else []
        before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (question, answer.rstrip(".")))
        found = reader.answers(torch.tensor([[*first, *ids]]), torch.tensor([[*before, *after]]), len(after) + 1)
        add(sums, {name: logits[:-1] for name, logits in found.items()}, torch.tensor(after))
        print("facts", number, {name: f"{right / count:.2f}" for name, (count, right, _) in sums.items()}, flush=True)
    return sums


def rows(options: argparse.Namespace) -> list[str]:
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(options.model), open_model(str(options.model))
    with tempfile.TemporaryDirectory() as place:
        folder = options.work or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[Any, Policy] = {
            (budget, name): read(state.serving[SERVED], name) for budget, name, state in policies(options, folder, tokenizer)
        }
    reader = Reader(options.model, found)
    text, planted = of_text(options, reader, model), of_facts(options, reader, tokenizer)
    prompt, whole = prompt_of(options.length), next(iter(found.values()))
    plain = sum(plain_bytes(prompt, len(each.units), each.width, each.sliding, DTYPES[each.units[0].dtype].itemsize)
                for each in whole.layers)  # fmt: skip
    head = ["budget", "policy", "bytes", "KL of text", "same top token", "digits right", "KL of answers"]
    lines = [line(head), line(["---:", "---", *["---:"] * 5])]
    for key in reader.several:
        (count, same, kl), (digits, right, apart) = text[key], planted.get(key, [float("nan")] * 3)
        share = 1 if key is None else sum(reader.took[key]) / len(reader.took[key]) / plain
        lines.append(line([*(key or ("", "plain cache")), f"{share:.1%}", f"{kl / count:.4f}", f"{same / count:.1%}",
                           f"{right / digits:.2f}", f"{apart / digits:.3f}"]))  # fmt: skip
    return [*lines, "", f"{options.judged} windows and {options.facts} prompts with a fact, of {prompt} tokens each."]


def main() -> None:
    options = parser(__doc__, judged=16)
    options.add_argument("--budgets", nargs="+", default=["50 %", "25 %"])
    options.add_argument("--facts", type=int, default=50, help="prompts with a planted fact")
    options.add_argument("--work", type=Path, help="a folder that keeps what was measured for the next time")
    given = options.parse_args()
    publish("kv-policy", "Policies of the KV cache, at equal bytes", given, rows)


if __name__ == "__main__":
    main()
