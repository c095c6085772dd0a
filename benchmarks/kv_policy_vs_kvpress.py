"""Policies of the KV cache beside kvpress' methods, at the same share, on the same windows: KL of what is read behind a prompt.

kvpress runs in an environment of its own (kvpress_child.py), by its own code. Each side's KL is to the same model with its own
full cache, in fp32: how far what is dropped moves the next token. Shares are of a plain cache's bytes after the prompt: ours is
what the budget asks for, with places, scores and marks counted, entries in the model's own dtype; kvpress' is of entries, in
fp32, and it stores nothing else.

Held: what the cache holds after a prompt, of a plain one in the same dtype. Methods of kvpress that choose by head drop nothing:
they mask; what is not masked is in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import kv_policy
import transformers
from report import line
from variants import parser, publish, texts

from compress.cache.policy import SERVED, Policy, plain_bytes, read
from compress.cache.rules import DTYPES
from compress.cached import prompt_of
from compress.model.model import open_model

HERE = Path(__file__).parent


def theirs(options: argparse.Namespace, windows: list[list[int]], folder: Path) -> dict[str, Any]:
    """What kvpress makes of the windows."""
    shares = [float(text.removesuffix("%")) / 100 for text in options.budgets]
    job = {"model": str(options.model.resolve()), "windows": windows, "prompt": prompt_of(options.length), "shares": shares}
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [options.kvpress_python, str(HERE / "kvpress_child.py"), str(folder / "job.json"), str(folder / "theirs.json")]
    subprocess.run(command, env=environment, check=True)
    made: dict[str, Any] = json.loads((folder / "theirs.json").read_text("utf-8"))
    return made


def plain(policy: Policy, tokens: int, itemsize: int) -> int:
    """Bytes of a plain cache of numbers of so many bytes."""
    return sum(plain_bytes(tokens, len(layer.units), layer.width, layer.sliding, itemsize) for layer in policy.layers)


def rows(options: argparse.Namespace) -> list[str]:
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(options.model), open_model(str(options.model))
    windows, prompt = texts(options, model, options.evaluation, options.judged).ids, prompt_of(options.length)
    with tempfile.TemporaryDirectory() as place:
        folder = options.work or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        peer = theirs(options, windows.tolist(), folder)
        found = {(budget, name): read(state.serving[SERVED], name)
                 for budget, name, state in kv_policy.policies(options, folder, tokenizer)}  # fmt: skip
    reader = kv_policy.Reader(options.model, found)
    sums = kv_policy.of_text(options, reader, model)
    lines = [
        line(["share", "tool", "method", "KL", "same top token", "held"]),
        line(["---:", "---", "---", "---:", "---:", "---:"]),
    ]
    one = next(iter(found.values()))
    whole, full = plain(one, prompt, DTYPES[one.layers[0].units[0].dtype].itemsize), plain(one, prompt, 4) * len(windows)
    for budget in options.budgets:
        for (of, name), (count, same, kl) in ((key, value) for key, value in sums.items() if key):
            took = sum(reader.took[of, name]) / len(reader.took[of, name]) / whole
            if of == budget:
                lines.append(line([budget, "compress", name, f"{kl / count:.4f}", f"{same / count:.1%}", f"{took:.1%}"]))
        share = float(budget.removesuffix("%")) / 100
        lines += [of_peer(budget, row, full) for row in peer["rows"] if row["share"] == share]
    versions = ", ".join(f"{tool} {peer[tool]}" for tool in ("kvpress", "transformers", "torch"))
    return [
        *lines,
        "",
        f"{len(windows)} windows, {prompt} tokens each a prompt, {options.length - prompt} behind it; {versions}.",
    ]


def of_peer(budget: str, row: dict[str, Any], whole: int) -> str:
    if "failed" in row:
        return line([budget, "kvpress", row["press"], f"failed: {row['failed']}", "", ""])
    held, kept = row["held"] / whole, row["kept"] / whole
    told = f"{held:.1%}" if held == kept else f"{held:.1%} ({kept:.1%})"
    return line([budget, "kvpress", row["press"], f"{row['kl'] / row['count']:.4f}", f"{row['same'] / row['count']:.1%}", told])


def main() -> None:
    options = parser(__doc__, judged=24)
    options.add_argument("--kvpress-python", required=True, help="python of an environment with kvpress")
    options.add_argument("--budgets", nargs="+", default=["50 %", "25 %"])
    options.add_argument("--work", type=Path, help="a folder that keeps what was measured for the next time")
    publish("kv-policy-vs-kvpress", "The KV cache beside kvpress, at equal shares", options.parse_args(), rows)


if __name__ == "__main__":
    main()
