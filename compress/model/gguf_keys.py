"""What the keys of a GGUF file say of a model and transformers passes over: it has defaults in their place, those of one size.

Of every family: how rotary embeddings are scaled. Of a Gemma: which layers have a window and by which base they turn, caps on
logits, and by what queries are divided, which no key says; llama.cpp tells it by the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import ModelError

LOCAL, WIDE = "sliding_attention", "full_attention"
PERIOD = {"gemma2": 2, "gemma3_text": 6}  # of so many layers all but the last have a window, unless a key says otherwise
LARGEST = {"gemma2": 46, "gemma3_text": 62}  # layers of the size whose queries are divided by another number
BASE = 10000.0  # of a rotary embedding that no key gives one
SCALING = "rope.scaling."


def complete(config: Any, keys: Mapping[str, Any]) -> None:
    """Put it into a config that transformers made of a file's keys; ModelError where it has no place there."""
    begin = f"{keys.get('general.architecture')}."
    own = {key.removeprefix(begin): value for key, value in keys.items() if key.startswith(begin)}
    if config.model_type in PERIOD:
        complete_gemma(config, own)
    scale(config, {key.removeprefix(SCALING): value for key, value in own.items() if key.startswith(SCALING)})


def complete_gemma(config: Any, own: Mapping[str, Any]) -> None:
    """What makes this Gemma another than the one whose sizes are transformers' defaults."""
    config.query_pre_attn_scalar = divisor(config)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        setattr(config, cap, own.get(cap, getattr(config, cap)))
    config.layer_types = [LOCAL if limited else WIDE for limited in limits(config, own)]
    if config.model_type == "gemma3_text":
        bases = {LOCAL: own.get("rope.freq_base_swa", BASE), WIDE: own.get("rope.freq_base", BASE)}
        config.rope_parameters = {kind: {"rope_type": "default", "rope_theta": float(base)} for kind, base in bases.items()}


def divisor(config: Any) -> int:
    """The number by whose root llama.cpp divides the queries of a Gemma: it tells the largest one by its layers."""
    largest = config.num_hidden_layers == LARGEST[config.model_type]
    return int(config.hidden_size // config.num_attention_heads if largest else config.head_dim)


def periodic(period: int, count: int) -> list[bool]:
    """Which of so many layers have a window, where the last of every `period` has none."""
    return [i % period < period - 1 for i in range(count)]


def limits(config: Any, own: Mapping[str, Any]) -> list[bool]:
    """Which layers have a window: a key may list them, or say of how many the last has none."""
    count, said = config.num_hidden_layers, own.get("attention.sliding_window_pattern", PERIOD[config.model_type])
    if config.model_type == "gemma3_text" and not own.get("attention.sliding_window"):
        return [False] * count
    if isinstance(said, int):
        return [True] * count if said == 0 else periodic(said, count)
    if not isinstance(said, tuple) or len(said) != count:
        raise ModelError("its key attention.sliding_window_pattern is not of as many layers as it has; download it again")
    return [bool(limited) for limited in said]


def scale(config: Any, said: Mapping[str, Any]) -> None:
    """How rotary embeddings are scaled; in a Gemma 3 those of layers without a window."""
    kind, whole = said.get("type", "none"), getattr(config, "rope_parameters", None) or {}
    rope = whole.get(WIDE, whole)
    if kind == "none" or not isinstance(rope, dict) or rope.get("rope_type", "default") == kind:
        return
    known = {"linear": {"type", "factor"}, "yarn": {"type", "factor", "original_context_length"}}.get(kind, set())
    if not known or said.keys() - known - {"finetuned"} or not known <= said.keys():
        others = ", ".join(sorted(said.keys() - {"type"})) or "nothing"
        raise ModelError(f"its rotary embeddings are scaled as by '{kind}', with {others}, which is not read here; name the "
                         "model that it was made from")  # fmt: skip
    rope |= {"rope_type": kind, "factor": float(said["factor"])}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(said["original_context_length"])
