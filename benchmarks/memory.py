"""Peak memory of `compress run` on a model of 1.1 billion parameters, against the bytes of the model.

    python benchmarks/memory.py [--methods rtn gptq] [--layers 22] [--work DIR] [--model FOLDER] [--save DIR]

The claim: memory holds one block and the activations, whatever the model's size. The bar is 25 % of the model's bytes, plus the
activations, plus what Python with torch and transformers takes before it has read anything (measured, not assumed).

The model has random weights in bf16 and the shape of TinyLlama (2048 wide, 22 layers, MLP 5632, 32 heads of which 4 hold keys,
vocabulary 32000, untied); it is written shard by shard and deleted at the end. `--model` takes a folder with a tokenizer instead.

Two figures, since a mapped file counts as resident though the kernel may drop its pages at any moment: `anonymous` is the peak of
RssAnon, what the process itself allocated, polled; `resident` is VmHWM, mapped pages included. The bar is for `anonymous`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
MB = 2**20
POLL_SECONDS = 0.02
MEMORY = ("RssAnon", "VmHWM")
SHARE = 0.25  # of the model's bytes: the bar

HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY, LAYERS = 2048, 5632, 32, 4, 32000, 22


@dataclass(frozen=True)
class Peak:
    """What one process took: bytes allocated at most, bytes resident at most, seconds. at: bytes of its log when it had allocated
    most."""

    anonymous: int
    resident: int
    wall_s: float
    cpu_s: float
    at: int = 0


def main() -> None:
    """Makes the model, runs each method in a process of its own, prints the table; exit code 1 where the bar is missed."""
    args = arguments()
    if args.write_model:
        write_model(args.write_model, args.layers)
        return
    work = Path(tempfile.mkdtemp(prefix="memory-", dir=args.work))
    try:
        model = args.model or made_model(work / "model", args.layers)
        text = write_text(work / "text.txt", args.sequences * args.length)
        baseline = watch([sys.executable, "-c", "import transformers, compress.pipeline"], work / "baseline.log")
        peaks = {method: run(model, text, method, args, work) for method in args.methods}
        table = Table(weight_bytes(model), activation_bytes(model, args.sequences * args.length), baseline, peaks)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table.markdown())
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        stem = args.save / f"{date.today()}-memory"
        stem.with_suffix(".md").write_text(table.markdown() + "\n", "utf-8")
        stem.with_suffix(".json").write_text(json.dumps(asdict(table), indent=1) + "\n", "utf-8")
    sys.exit(0 if all(table.passes(peak) for peak in peaks.values()) else 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=("rtn", "gptq"), default=["rtn", "gptq"])
    parser.add_argument("--format", default="int4:g128")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look, which says nothing about the bar")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="also write and check the artifact, in the same process")
    parser.add_argument("--model", type=Path, help="a model folder to use instead of a random one")
    parser.add_argument("--work", help="where the model and the runs lie (default: the system's temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-memory.md and .json")
    parser.add_argument("--write-model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- measuring -------------------------------------------------------------------------------------------------------


def run(model: Path, text: Path, method: str, args: argparse.Namespace, work: Path) -> Peak:
    """The peak of one `compress run`; its log is shown where it fails."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "out": str(work / method),
        "passes": [{"quantize": {"method": method, "format": args.format}}],
        "export": [{"compressed_tensors": {}}] if args.export else [],
    }
    if method == "gptq":
        recipe["data"] = {"calibration": {"text": str(text), "sequences": args.sequences, "length": args.length}}
    path = work / f"{method}.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    _, peak = compress(path, args.threads, "run", str(path))
    shutil.rmtree(work / method, ignore_errors=True)
    return peak


class ChildError(SystemExit):
    """A command that failed; where nobody catches it, the end of its log is what the program ends with."""


def watch(command: list[str], log: Path, threads: int = 1) -> Peak:
    """Runs a command and polls its memory until it ends; ChildError where it fails."""
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    anonymous = resident = at = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        held = memory_of(process.pid)
        resident = max(resident, held.get("VmHWM", 0))
        if held.get("RssAnon", 0) > anonymous:
            anonymous, at = held["RssAnon"], log.stat().st_size
        time.sleep(POLL_SECONDS)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ChildError(f"{' '.join(command)} failed:\n{log.read_text('utf-8')[-3000:]}")
    seconds = time.perf_counter() - started
    return Peak(anonymous, resident or usage.ru_maxrss * 1024, seconds, usage.ru_utime + usage.ru_stime, at)


def compress(recipe: Path, threads: int, verb: str, *options: str) -> tuple[str, Peak]:
    """A command of a recipe: what it printed, which is kept beside the recipe, and what it took."""
    log = recipe.with_suffix(f".{verb}.log")
    peak = watch([sys.executable, "-m", "compress", verb, *options], log, threads)
    return log.read_text("utf-8"), peak


def memory_of(pid: int) -> dict[str, int]:
    """RssAnon of a process, resident memory that no file backs, and VmHWM, the most that was ever resident; empty once it has
    gone. (ru_maxrss would start at its parent's peak.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines) if name in MEMORY}


# --- reporting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Everything measured, and the bar it is held against. Sizes in bytes."""

    model: int
    activations: int
    baseline: Peak
    peaks: dict[str, Peak]

    @property
    def bar(self) -> float:
        """The anonymous memory that a run may take."""
        return SHARE * self.model + self.activations + self.baseline.anonymous

    def passes(self, peak: Peak) -> bool:
        """Whether a run stays below the bar."""
        return peak.anonymous <= self.bar

    def markdown(self) -> str:
        """The page."""
        lines = [f"# Memory, {date.today()}", ""]
        lines += [f"Model {self.model / MB:.0f} MB; activations {self.activations / MB:.0f} MB; bar {self.bar / MB:.0f} MB "
                  f"(25 % of the model, the activations, the baseline)."]  # fmt: skip
        lines += ["", "| process | anonymous MB | above baseline | of the model | resident MB | wall s | CPU s | bar |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |", self.line("imports only", self.baseline)]
        return "\n".join([*lines, *(self.line(f"run, {name}", peak) for name, peak in self.peaks.items())])

    def line(self, name: str, peak: Peak) -> str:
        """One process's line."""
        above = peak.anonymous - self.baseline.anonymous
        verdict = "" if peak is self.baseline else "met" if self.passes(peak) else "MISSED"
        return (f"| {name} | {peak.anonymous / MB:.0f} | {above / MB:.0f} | {above / self.model:.1%} | {peak.resident / MB:.0f} "
                f"| {peak.wall_s:.0f} | {peak.cpu_s:.0f} | {verdict} |")  # fmt: skip


def weight_bytes(model: Path) -> int:
    """Bytes of a model's safetensors files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def activation_bytes(model: Path, tokens: int) -> int:
    """Two copies of the hidden states of all tokens and one of the MLP's neurons, 16 bits each: what a block must hold."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    return tokens * 2 * (2 * config["hidden_size"] + config["intermediate_size"])


# --- the model -------------------------------------------------------------------------------------------------------


def made_model(folder: Path, layers: int) -> Path:
    """The random model, written by another process so that this one never imports torch."""
    command = [sys.executable, str(Path(__file__).resolve()), "--write-model", str(folder), "--layers", str(layers)]
    subprocess.run(command, check=True)
    return folder


def write_model(folder: Path, layers: int, shard_bytes: int = 300 * MB) -> None:
    """Writes shards, index, config and tokenizer; holds one shard at a time."""
    import torch
    from safetensors.torch import save_file
    from workloads import word_tokenizer

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    plan = list(shards(layers, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(plan, 1):
        file = f"model-{number:05}-of-{len(plan):05}.safetensors"
        save_file({n: random_tensor(shape, generator) for n, shape in names.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    (folder / "config.json").write_text(json.dumps(config(layers), indent=1), "utf-8")
    word_tokenizer(folder, VOCABULARY)


def shards(layers: int, shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensor names and shapes, gathered into shards of at most `shard_bytes` in bf16."""
    held: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes(layers):
        nbytes = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        if held and size + nbytes > shard_bytes:
            yield held
            held, size = {}, 0
        held[name] = shape
        size += nbytes
    yield held


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the model."""
    kv = KV_HEADS * HIDDEN // HEADS
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (kv, HIDDEN)),
            ("self_attn.v_proj", (kv, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (MLP, HIDDEN)),
            ("mlp.up_proj", (MLP, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, MLP)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def random_tensor(shape: tuple[int, ...], generator: Any) -> Any:
    """bf16: normal with deviation 0.02 for a matrix, ones for a norm."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def config(layers: int) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_text(path: Path, tokens: int) -> Path:
    """Words of the word tokenizer, each a token, seeded; an existing tokenizer cuts them into more."""
    import random

    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(tokens)), "utf-8")
    return path


if __name__ == "__main__":
    main()
