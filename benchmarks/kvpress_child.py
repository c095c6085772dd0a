"""What kvpress does of kv_policy_vs_kvpress.py, in an environment with kvpress and torch.

    python kvpress_child.py JOB.json OUT.json

The job: `model`, a folder; `windows`, token ids; `prompt`, how many of each are the prompt; `shares`, of the entries that stay.
Prompts are read inside a press, as kvpress' own pipeline does; what comes behind is read through the cache that this leaves, at
the positions that it has in the window: in one pass, and where entries are masked a few tokens at a time, since kvpress masks by
a key that all queries miss, and for those of many tokens there may be none. Each share's KL is to the same model with its full
cache, in fp32.

Bytes are those of the keys and values that the cache holds after a prompt. Presses that choose by head (AdaKV) leave all of them
there and mask those that are dropped; `kept` is what is not masked. Options are kvpress' defaults, where no others are named.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers

FEW = 8  # tokens
PRESSES: dict[str, Any] = {
    "StreamingLLM": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "SnapKV": lambda ratio: kvpress.SnapKVPress(ratio),
    "SnapKV, window 32, pool 7": lambda ratio: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=7),
    "AdaKV(SnapKV)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "ExpectedAttention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "AdaKV(ExpectedAttention)": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)),
    "TOVA": lambda ratio: kvpress.TOVAPress(ratio),
    "KeyDiff": lambda ratio: kvpress.KeyDiffPress(ratio),
}


def masked(model: Any) -> int:
    """How many entries of a prompt are there and masked."""
    found = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
    return sum(0 if indices is None else len(indices[0]) for indices in found)


def behind(model: Any, window: torch.Tensor, prompt: int, press: Any) -> tuple[torch.Tensor, int, int]:
    """Logits [n, vocabulary] of what comes behind a prompt; bytes of the cache after it, and how many of them are masked."""
    cache = transformers.DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model(window[:, :prompt], past_key_values=cache, logits_to_keep=1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    entry = 2 * cache.layers[0].keys.shape[-1] * cache.layers[0].keys.itemsize
    gone = entry * masked(model)
    parts = torch.arange(prompt, window.shape[1])[None].split(FEW if gone else window.shape[1], 1)
    found = [model(window[:, some[0]], past_key_values=cache, position_ids=some).logits[0] for some in parts]
    return torch.cat(found)[:-1], held, gone


@torch.no_grad()
def measured(job: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each share and press, summed over the windows."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    rows: dict[tuple[float, str], dict[str, Any]] = {}
    for ids in job["windows"]:
        window = torch.tensor([ids])
        p_nv = model(window).logits[0, job["prompt"] : -1].log_softmax(-1)
        for share in job["shares"]:
            for name, press in PRESSES.items():
                row = rows.setdefault((share, name), {"share": share, "press": name, "count": 0, "kl": 0.0, "same": 0,
                                                      "held": 0, "kept": 0})  # fmt: skip
                if "failed" in row:
                    continue
                try:
                    logits, held, gone = behind(model, window, job["prompt"], press(1 - share))
                except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
                    row["failed"] = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                    continue
                q_nv = logits.log_softmax(-1)
                row["count"] += len(q_nv)
                row["kl"] += float((p_nv.exp() * (p_nv - q_nv)).sum())
                row["same"] += int((p_nv.argmax(-1) == q_nv.argmax(-1)).sum())
                row["held"] += held
                row["kept"] += held - gone
    return list(rows.values())


def main() -> None:
    job, out = Path(sys.argv[1]), Path(sys.argv[2])
    rows = measured(json.loads(job.read_text("utf-8")))
    made = {"kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}
    out.write_text(json.dumps(made), "utf-8")


if __name__ == "__main__":
    main()
