"""GGUF files of ours beside those of llama.cpp's presets, at their exact size, all judged by llama.cpp.

    python benchmarks/gguf_vs_llamacpp.py --calibration TEXT --evaluation TEXT --llamacpp-python VENV/bin/python [--model DIR] \\
        [--work DIR] [--save DIR]

The model is Gemma 3 270M where `--model` names no other (see real_models.py). It is written densely first; llama.cpp makes its
files of that one, by an importance matrix: the mean square of every input on the calibration windows, which are those that ours
is solved on. Ours is allocated within the bytes of each of its files, table and head included, over `--types`. KL is that to the
dense file, on the same windows, one token at a time, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import memory
import numpy as np
import torch
from quantize_vs_peers import environment
from real_models import gemma, known_grid, tell
from report import figure, head, line, machine, publish

CHILD = Path(__file__).resolve().parent / "llamacpp_child.py"
LENGTH = 256
TYPES = ("iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k", "iq4_xs", "iq4_nl", "q4_k", "q4_1", "q5_k", "int5:g32",
         "q6_k", "int8:g32")  # fmt: skip
THEIRS = ("Q2_K", "Q3_K_M", "Q4_K_M")


def main() -> None:
    """Makes the files, judges them, prints the page, saves it if asked."""
    args = arguments()
    work = Path(args.work or tempfile.mkdtemp(prefix="gguf-vs-llamacpp-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        model, grid, windows = opened(args)
        (work / "windows.json").write_text(json.dumps(windows), "utf-8")
        dense = written("dense", [], model, args, work)
        seen(model, args, work / "imatrix.npz")
        files = {}
        for kind in args.theirs:
            files[f"llama.cpp, {kind}, with imatrix"] = path = work / f"{kind}.gguf"
            child(args, work, "quantize", dense, path, kind, work / "imatrix.npz")
            files[f"ours, within {kind}"] = written(f"ours-{kind}", within(path, model, args), model, args, work)
        figures = judged(args, work, dense, [dense, *files.values()])
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    page = "\n".join(document(["the original, dense", *files], figures, model.name, grid, args))
    publish(page, args.save, f"gguf-vs-llamacpp-{model.name}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder to use instead of Gemma 3 270M")
    parser.add_argument("--calibration", type=Path, required=True, help="a text, such as wiki.valid.raw of WikiText-2")
    parser.add_argument("--evaluation", type=Path, required=True, help="another, such as wiki.test.raw")
    parser.add_argument("--llamacpp-python", required=True, help="the python of an environment with llama-cpp-python")
    parser.add_argument("--sequences", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--judged", type=int, default=8, help="windows to judge on")
    parser.add_argument("--theirs", nargs="+", default=THEIRS, help="presets of llama.cpp")
    parser.add_argument("--types", nargs="+", default=TYPES, help="formats that ours chooses from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", help="keep files and logs here (default: a temporary folder)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-gguf-vs-llamacpp-MODEL.md")
    args = parser.parse_args()
    args.calibration, args.evaluation = args.calibration.resolve(), args.evaluation.resolve()
    return args


def opened(args: argparse.Namespace) -> tuple[Path, str, list[list[int]]]:
    """The model's folder, what is to be known of its weights, and the windows to judge on."""
    from compress.model.data import Windows, read
    from compress.model.model import open_model

    model = open_model(str(args.model.resolve() if args.model else gemma()), say=tell)
    asked = Windows(text=str(args.evaluation), sequences=args.judged, length=LENGTH, bos=True)
    ids = read(asked, model.folder, Path(), model.state.graph["embed"].shape[0]).ids
    return model.folder, known_grid(model), ids.tolist()


def within(path: Path, model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The passes that make a file no larger than that of a path."""
    tied = json.loads((model / "config.json").read_text("utf-8")).get("tie_word_embeddings", True)
    allocate = {"budget": f"{path.stat().st_size / 2**20:.6f} MiB", "also": ["embed"] if tied else ["embed", "lm_head"],
                "formats": list(args.types)}  # fmt: skip
    return [{"allocate": allocate}, {"quantize": {}}]


@torch.no_grad()
def seen(model: Path, args: argparse.Namespace, out: Path) -> None:
    """The mean square of what every matrix in the blocks is given on the calibration windows, under llama.cpp's names."""
    import transformers

    from compress.export.gguf.metadata import family_of, tensor_name
    from compress.model.data import Windows, read

    dense = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    family, sums, count = family_of(dense.config.model_type), {}, 0

    def watch(name: str) -> Any:
        def add(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + given[0].double().square().flatten(0, -2).sum(0)

        return add

    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and (theirs := tensor_name(f"{name}.weight", family)):
            module.register_forward_pre_hook(watch(theirs))
    asked = Windows(text=str(args.calibration), sequences=args.sequences, length=LENGTH, bos=True)
    for window in read(asked, model, Path(), dense.config.vocab_size).ids:
        dense(window[None])
        count += len(window)
    np.savez(out, **{name: (total / count).float().numpy() for name, total in sums.items()})


def written(name: str, passes: list[dict[str, Any]], model: Path, args: argparse.Namespace, work: Path) -> Path:
    """The GGUF file that a recipe gives."""
    path, out = work / f"{name}.yaml", work / name
    text = {"text": str(args.calibration), "sequences": args.sequences, "length": LENGTH, "bos": True}
    recipe = {"model": str(model), "out": str(out), "data": {"calibration": text}, "passes": passes, "export": [{"gguf": {}}]}
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    measured = sorted(work.glob("ours-*/analyses"))
    if measured and not out.exists():  # what every budget asks for
        shutil.copytree(measured[0], out / "analyses")
    memory.compress(path, args.threads, "run", str(path))
    (file,) = (out / "gguf").glob("*.gguf")
    tell(f"{name}: {file.stat().st_size:,} bytes")
    return file


def child(args: argparse.Namespace, work: Path, *words: object) -> None:
    """llamacpp_child.py in llama.cpp's environment; its output stays in a log."""
    with (work / "llamacpp.log").open("a", encoding="utf-8") as log:
        command = [args.llamacpp_python, str(CHILD), *map(str, words)]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment(args.threads), cwd=work)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed; see {work / 'llamacpp.log'}")


def judged(args: argparse.Namespace, work: Path, dense: Path, files: list[Path]) -> list[dict[str, float]]:
    """Perplexity and KL of each file."""
    child(args, work, "logits", dense, work / "windows.json", work / "reference.npy")
    found = []
    for file in files:
        child(args, work, "judge", file, work / "windows.json", work / "reference.npy", work / "figures.json")
        figures = json.loads((work / "figures.json").read_text("utf-8"))
        tell(f"{file.parent.name}/{file.name}: KL {figures['kl']:.4f}")
        found.append({**figures, "bytes": file.stat().st_size})
    return found


def document(names: list[str], figures: list[dict[str, float]], model: str, grid: str, args: argparse.Namespace) -> Iterator[str]:
    """The page."""
    yield from [f"# GGUF beside llama.cpp, {model}, {date.today()}", "", f"{machine()}; {args.threads} thread(s).", ""]
    yield from [f"{args.sequences} windows of {LENGTH} tokens of {args.calibration.name} to calibrate on, {args.judged} of "
                f"{args.evaluation.name} to judge on, by llama-cpp-python {figures[0]['version']}. {grid}", ""]  # fmt: skip
    yield from head("file", "MB", "perplexity", "KL", "top-1")
    for name, each in zip(names, figures, strict=True):
        yield line([name, f"{each['bytes'] / 1e6:.1f}", figure(each["perplexity"]), f"{each['kl']:.4f}", f"{each['top1']:.3f}"])


if __name__ == "__main__":
    main()
