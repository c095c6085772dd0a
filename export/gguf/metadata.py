"""The keys of a GGUF file that llama.cpp reads: what the model is. Its vocabulary is in tokenizer.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.errors import ExportError
from compress.export.gguf.file import Kind
from compress.export.gguf.gemma import gemma_keys
from compress.model.gguf_keys import PERIOD, WIDE

NOTE, VERSION = "compress.formats", 1
FACTORS = "rope_freqs.weight"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28,
    "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip  # llama.cpp's name for the commonest kind


_ALL = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BLOCK_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA_NAMES = BLOCK_NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
TIED_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}  # where llama.cpp knows no head of its own
OUTER_NAMES = TIED_NAMES | {"lm_head": "output"}


@dataclass(frozen=True)
class Family:
    """A `model_type` as llama.cpp knows it.

    permuted: whether rows of q and k change places, since its rotary embedding turns neighbours, not halves. biases: the modules
    that may have one. dense: as which `model_type` transformers reads the file. names, outer: of what is in a block, and outside
    of them. activation: what is between the matrices of an MLP. shift: what is added to the weights of norms, as Gemma multiplies
    by one more than they are.
    """

    architecture: str
    permuted: bool
    biases: tuple[str, ...]
    dense: str
    names: Mapping[str, str] = field(default_factory=lambda: BLOCK_NAMES)
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER_NAMES)
    activation: str = "silu"
    shift: int = 0


_GEMMA: dict[str, Any] = {
    "permuted": False, "biases": (), "names": GEMMA_NAMES, "activation": "gelu_pytorch_tanh", "shift": 1,
}  # fmt: skip
FAMILIES = {
    "llama": Family("llama", True, _ALL, "llama"),
    "mistral": Family("llama", True, (), "llama"),
    "qwen2": Family("qwen2", False, _ALL[:3], "qwen2"),
    "qwen3": Family("qwen3", False, (), "qwen3"),
    "gemma2": Family("gemma2", dense="gemma2", outer=TIED_NAMES, **_GEMMA),
    "gemma3_text": Family("gemma3", dense="gemma3_text", **_GEMMA),
}


def family_of(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ExportError(f"gguf: models of '{model_type}' are not written, only {', '.join(FAMILIES)}; export native or "
                          "compressed_tensors")  # fmt: skip
    return FAMILIES[model_type]


def tensor_name(name: str, family: Family) -> str | None:
    """llama.cpp's name of a parameter, by ours; None for what it has no place for."""
    module, _, ending = name.rpartition(".")
    parts = module.split(".")
    if "layers" in parts[:-2]:
        at = parts.index("layers")
        found = family.names.get(".".join(parts[at + 2 :]))
        if found is None or (ending == "bias" and found not in family.biases) or ending not in ("weight", "bias"):
            return None
        return f"blk.{parts[at + 1]}.{found}.{ending}"
    found = family.outer.get(parts[-1])
    return f"{found}.weight" if found and ending == "weight" else None


def order(name: str, family: Family, config: Any, rows: int) -> torch.Tensor | None:
    """Which of our rows stands in each row of the file, for q and k in a family whose rows change places."""
    if not family.permuted or name.split(".")[-2] not in ("attn_q", "attn_k"):
        return None
    half = head_size(config) // 2
    return torch.arange(rows).view(-1, 2, half).transpose(1, 2).reshape(-1)


def vector(data: torch.Tensor, name: str, family: Family) -> torch.Tensor:
    """A vector as it is in the file under llama.cpp's name: fp32, as it adds and multiplies by no others."""
    return data.float() + family.shift if is_shifted(name, family) else data.float()


def vector_back(data: torch.Tensor, name: str, family: Family, dtype: torch.dtype) -> torch.Tensor:
    """The vector that a file's was made of, in `dtype`: of a norm that is shifted, one that gives the same sum."""
    return (data - family.shift if is_shifted(name, family) else data).to(dtype)


def is_shifted(name: str, family: Family) -> bool:
    return bool(family.shift) and name.endswith("norm.weight")


# --- the model -------------------------------------------------------------------------------------------------------


def model_keys(config: Any, name: str, kinds: Counter[Kind]) -> dict[str, Any]:
    """The keys of a model; ExportError for what llama.cpp would compute otherwise."""
    family = family_of(config.model_type)
    has = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)
    if has != family.activation:
        raise ExportError(f"gguf: llama.cpp computes '{config.model_type}' with {family.activation}, and this model has {has}")
    head = head_size(config)
    keys = {
        "context_length": context(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head,
        "vocab_size": config.vocab_size,
        **(gemma_keys(config, family.architecture) if config.model_type in PERIOD else {}),
        **rope_keys(config),
    }
    general = {"architecture": family.architecture, "type": "model", "name": name, "quantization_version": 2,
               "file_type": FILE_TYPES[kinds.most_common(1)[0][0].name]}  # fmt: skip
    return {**{f"general.{k}": v for k, v in general.items()}, **{f"{family.architecture}.{k}": v for k, v in keys.items()}}


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window(config: Any) -> int | None:
    """The tokens that a layer looks back on, if any layer is limited and llama.cpp does not limit it."""
    if config.model_type in PERIOD:
        return None
    limited = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return int(limited) if limited else None


def context(config: Any) -> int:
    """The longest context that llama.cpp computes as the model was trained."""
    longest = int(config.max_position_embeddings)
    return min(longest, window(config) or longest)


def rope_keys(config: Any) -> dict[str, Any]:
    rope = rope_of(config)
    kind, keys = rope.get("rope_type", "default"), {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        return keys | yarn_keys(config, rope)
    if kind == "llama3" and family_of(config.model_type).architecture != "llama":
        raise ExportError(
            f"gguf: llama.cpp has no rotary embeddings of the type 'llama3' for '{config.model_type}'; export another kind"
        )
    if kind not in ("default", "llama3"):
        raise ExportError(f"gguf: rotary embeddings of the type '{kind}' are not written; export another kind")
    return keys


def yarn_keys(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of YaRN; ExportError for what llama.cpp has as a constant and the model has otherwise.

    From these both compute the same: the turns between which frequencies are blended, 32 and 1, with the range of dimensions made
    whole, and the factor 0.1 ln(factor) + 1 on what is turned.
    """
    factor, log = float(rope["factor"]), 0.1 * math.log(max(float(rope["factor"]), 1))
    mscale, every = (float(rope.get(key) or 0) for key in ("mscale", "mscale_all_dim"))
    scaled = (mscale * log + 1) / (every * log + 1) if mscale and every else log + 1
    given = rope.get("attention_factor")
    held = {"factor": (factor, max(factor, 1)), "attention_factor": (scaled if given is None else float(given), log + 1),
            "beta_fast": (rope.get("beta_fast") or 32, 32), "beta_slow": (rope.get("beta_slow") or 1, 1),
            "truncate": (rope.get("truncate", True), 1),
            "partial_rotary_factor": (rope.get("partial_rotary_factor") or 1, 1)}  # fmt: skip
    for name, (ours, theirs) in held.items():
        if not math.isclose(float(ours), theirs, rel_tol=1e-6):
            raise ExportError(f"gguf: the model's YaRN has {name} {ours:g}, and llama.cpp computes with {theirs:g}; export "
                              "another kind")  # fmt: skip
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }


def rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary embedding; of a Gemma 3 that of layers without a window."""
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "gemma3_text":
        found = found.get(WIDE, found)
    if "rope_theta" not in found:
        raise ExportError(
            "gguf: the config gives its layers different rotary embeddings, which are not written; export another kind"
        )
    return found


def rope_factors(config: Any) -> torch.Tensor | None:
    """What llama.cpp divides each rotary frequency by, fp32 [head / 2], in a model of Llama 3.1's kind; None in others.

    As in transformers: long waves are stretched by `factor`, short ones stay, and between the two it is blended.
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, factor, low, high, old = head_size(config), *(float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor",
                                                         "original_max_position_embeddings"))  # fmt: skip
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
