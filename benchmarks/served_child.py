"""One folder of formats that engines multiply by, or the judge of such folders: run by served_vs_peers.py in an environment.

    python served_child.py llmcompressor | ours | judge  < JOB.json

The meter runs from before the model is loaded until its weights are quantized. Saving is timed for nobody: ours is a second run
that finds its steps finished. The judge is stock transformers with compressed-tensors, which rounds weights and activations by
its own code; nothing of `compress` is imported there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize_child import Meter

BATCH, ROWS = 4, 256  # windows at a time; rows of log-probabilities at a time, since vocabularies may be wide


def llmcompressor(job: dict[str, Any]) -> dict[str, Any]:
    """`oneshot` with the modifiers of the job, one sequence a batch (its default); saves a compressed folder."""
    import llmcompressor
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    kinds = {"smooth": SmoothQuantModifier, "gptq": GPTQModifier, "round": QuantizationModifier}
    meter = Meter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    recipe = []
    for kind, options in job["steps"]:
        targets = {} if kind == "smooth" else {"targets": "Linear", "ignore": ["lm_head"]}
        recipe.append(kinds[kind](**targets, **options))
    ids = torch.load(job["ids"])
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    data = {"dataset": Dataset.from_list(rows), "max_seq_length": ids.shape[1], "num_calibration_samples": len(rows)}
    oneshot(model=model, recipe=recipe, shuffle_calibration_samples=False, **data)
    measured = meter.stop(llmcompressor.__version__)
    model.save_pretrained(job["out"], save_compressed=True)
    return asdict(measured)


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """`compress run` of the job's recipe, then again with the exporter."""
    import compress
    from compress import pipeline

    meter = Meter()
    pipeline.run(Path(job["recipe"]))
    measured = meter.stop(getattr(compress, "__version__", "of this clone"))
    pipeline.run(Path(job["exporting"]))
    return asdict(measured)


def judge(job: dict[str, Any]) -> dict[str, float]:
    """KL(original || folder) in nats a token of every folder, on the same windows and in the same dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"])).eval()

    ids, original = torch.load(job["ids"]), load(job["model"])
    models = {name: load(folder) for name, folder in job["folders"].items()}
    found = dict.fromkeys(models, 0.0)
    with torch.inference_mode():
        for some in ids.split(BATCH):
            mine = original(some, use_cache=False).logits[:, :-1].flatten(0, 1)
            for name, model in models.items():
                theirs = model(some, use_cache=False).logits[:, :-1].flatten(0, 1)
                for rows in zip(mine.split(ROWS), theirs.split(ROWS), strict=True):
                    p, q = (part.float().log_softmax(-1) for part in rows)
                    found[name] += (p.exp() * (p - q)).sum().item() / ids[:, 1:].numel()
    return found


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"llmcompressor": llmcompressor, "ours": ours, "judge": judge}

if __name__ == "__main__":
    said = KINDS[sys.argv[1]](json.load(sys.stdin))
    print(json.dumps(said), flush=True)
