"""The keys that only a Gemma has: caps on logits, and which layers look back how far. Constants of llama.cpp are checked."""

from __future__ import annotations

import math
from typing import Any

from compress.errors import ExportError
from compress.model.gguf_keys import BASE, LOCAL, PERIOD, WIDE, divisor, periodic


def gemma_keys(config: Any, architecture: str) -> dict[str, Any]:
    """The keys of a model; ExportError for what llama.cpp would compute otherwise."""
    check_scale(config)
    if getattr(config, "use_bidirectional_attention", False):
        raise ExportError(f"gguf: the model looks ahead (use_bidirectional_attention), and llama.cpp's '{architecture}' does not")
    return {**caps(config, architecture), **windows(config, architecture)}


def check_scale(config: Any) -> None:
    """ExportError where llama.cpp divides queries by another number than the model."""
    theirs = divisor(config)
    if not math.isclose(config.query_pre_attn_scalar, theirs, rel_tol=1e-6):
        raise ExportError(f"gguf: the model divides queries by the root of {config.query_pre_attn_scalar:g} "
                          f"(query_pre_attn_scalar), and llama.cpp by that of {theirs}; export another kind")  # fmt: skip


def caps(config: Any, architecture: str) -> dict[str, float]:
    """What bounds the logits: in Gemma 2 those of attention and of the head, in Gemma 3 those of the head, if any."""
    attention, final = (getattr(config, f"{which}_logit_softcapping", None) for which in ("attn", "final"))
    if architecture == "gemma2" and not (attention and final):
        raise ExportError("gguf: llama.cpp caps the logits of a Gemma 2 and of its attention, and this model has no "
                          f"{'final' if attention else 'attn'}_logit_softcapping; export another kind")  # fmt: skip
    if architecture == "gemma3" and attention:
        raise ExportError(f"gguf: the model has an attn_logit_softcapping of {attention:g}, and llama.cpp none for a Gemma 3; "
                          "export another kind")  # fmt: skip
    found = {"attn_logit_softcapping": attention, "final_logit_softcapping": final}
    return {key: float(value) for key, value in found.items() if value}


def windows(config: Any, architecture: str) -> dict[str, Any]:
    """Which layers have a sliding window, how wide it is, and by which base they turn."""
    limited = [kind == LOCAL for kind in config.layer_types]
    if architecture == "gemma3" and not any(limited):
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": int(config.sliding_window or config.max_position_embeddings)}
    if limited != periodic(PERIOD[config.model_type], len(limited)):
        keys["attention.sliding_window_pattern"] = limited
    return keys | (local_rope(config) if architecture == "gemma3" else {})


def local_rope(config: Any) -> dict[str, float]:
    """The rotary embedding of layers with a window; ExportError where it is scaled, or that of the others is as by YaRN."""
    local, wide = (config.rope_parameters[kind] for kind in (LOCAL, WIDE))
    for what, rope, known in (("with", local, ("default",)), ("without", wide, ("default", "linear"))):
        if (kind := rope.get("rope_type", "default")) not in known:
            raise ExportError(f"gguf: llama.cpp has no rotary embeddings of the type '{kind}' in layers {what} a window; export "
                              "another kind")  # fmt: skip
    base = float(local["rope_theta"])
    return {} if base == BASE else {"rope.freq_base_swa": base}
