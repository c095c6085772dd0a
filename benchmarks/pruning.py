"""What stays of a model when neurons of its MLPs go: KL on held-out text by method, with and without compensation, in one run.

python benchmarks/pruning.py --model MODEL --calibration TEXT --evaluation TEXT [--shares 0.75 0.5] [--bos] [--save DIR]

Seconds are those of the pass; a last row has what GPTQ takes on the same blocks. Torch-Pruning (https://pypi.org/p/torch-pruning)
stands beside where it can be imported, on models that call their MLP `mlp.gate_proj`: it prunes a model in memory, by the norms
of a neuron's weights or by weights times gradients on the calibration windows. Its result is judged as ours is.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import line
from transformers import AutoModelForCausalLM
from variants import outcome, parser, publish, texts

from compress.evaluate import compare
from compress.model.model import open_model

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("obs", {}),
    ("obs, no twin", {"drift": 0}),
    ("wanda, compensated", {"method": "wanda"}),
    ("obs, deleted", {"compensate": False}),
    ("wanda, deleted", {"method": "wanda", "compensate": False}),
    ("flap, deleted", {"method": "flap", "compensate": False}),
    ("magnitude, deleted", {"method": "magnitude", "compensate": False}),
)


TAYLOR_WINDOWS = 16  # for gradients of a whole model in memory


def rows(options: argparse.Namespace) -> list[str]:
    """A Markdown table, a row for each share and method; then what GPTQ takes."""
    found = [line(["neurons left", "method", "KL", "beside obs", "s of the pass"]), line(["---"] * 5)]

    def add(share: str, name: str, kl: float, first: float, seconds: float) -> None:
        found.append(line([share, name, f"{kl:.4f}", f"{kl / first:.2f}", f"{seconds:.0f}"]))
        print(found[-1], flush=True)

    for share in options.shares:
        first = 0.0
        for name, choice in (case for case in CASES if case[0] in (options.only or dict(CASES))):
            kl, seconds = ours(options, {"prune": {"mlp": share, **choice}})
            first = first or kl
            add(f"{share:.0%}", name, kl, first, seconds)
        for criterion in ("magnitude", "taylor") if importlib.util.find_spec("torch_pruning") else ():
            add(f"{share:.0%}", f"Torch-Pruning, {criterion}", *with_torch_pruning(options, share, criterion, first))
    kl, seconds = ours(options, {"quantize": {"method": "gptq", "format": "int4:g64"}})
    add("100%", "gptq, int4:g64", kl, first, seconds)
    return found


def ours(options: argparse.Namespace, step: dict[str, Any]) -> tuple[float, float]:
    """The KL of a pass, and the seconds it took."""
    made = outcome(options, [step])
    return made.scores["compressed"]["kl"], made.report.steps[0]["seconds"]


def with_torch_pruning(options: argparse.Namespace, share: float, criterion: str, first: float) -> tuple[float, float, float]:
    """KL, the KL it is compared with, and seconds, of a model that Torch-Pruning made."""
    source = open_model(str(options.model))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    removed(model, texts(options, source, options.calibration, options.sequences).ids, share, criterion)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        model.to(source.state.dtype).save_pretrained(folder)
        for name in source.checkpoint.folder.glob("tokenizer*"):
            (Path(folder) / name.name).write_bytes(name.read_bytes())
        scores = compare(source.state, open_model(folder).state, texts(options, source, options.evaluation, options.judged))[1]
    assert scores.kl is not None
    return scores.kl, first, seconds


def removed(model: Any, ids: torch.Tensor, share: float, criterion: str) -> None:
    """Prune the neurons of every MLP in place."""
    import torch_pruning

    layers = model.get_decoder().layers
    roots = [layer.mlp.gate_proj for layer in layers]
    mlps = {id(m) for layer in layers for m in layer.mlp.modules()}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding) and id(m) not in mlps]
    choose = torch_pruning.importance.GroupTaylorImportance() if criterion == "taylor" else (
        torch_pruning.importance.GroupMagnitudeImportance())  # fmt: skip
    pruner = torch_pruning.pruner.BasePruner(
        model,
        ids[:1],
        choose,
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(roots, 1 - share),
        ignored_layers=others,  # or it looks at every group of the model, which took it more than a quarter of an hour
        forward_fn=lambda m, x: m(x, use_cache=False).logits,
    )
    if criterion == "taylor":
        for window in ids[:TAYLOR_WINDOWS].split(1):
            model(window, labels=window, use_cache=False).loss.backward()
    pruner.step()
    model.zero_grad()
    model.config.get_text_config().intermediate_size = roots[0].out_features


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5], help="of the neurons of every MLP, that stay")
    options.add_argument(
        "--only", nargs="+", choices=dict(CASES), help="some of the methods; the first is what the others are beside"
    )
    publish("pruning", "Fewer neurons", options.parse_args(), rows)


if __name__ == "__main__":
    main()
