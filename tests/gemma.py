"""Tiny models of Gemma's kind: norms that are not zero, and a vocabulary as Gemma's: bytes, runs of spaces and lines, pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.conftest import FAMILIES, make_model

SPACE = "\u2581"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
LINES, SPACES = ["\n" * n for n in range(1, 5)], [SPACE * n for n in range(2, 7)]
USER = [*LINES, *SPACES, "<table>"]
PIECES = [f"{SPACE}t", "he", "at", f"{SPACE}the", f"{SPACE}c", f"{SPACE}s", "on", "ed", f"{SPACE}cat", f"{SPACE}sat", f"{SPACE}m",
          f"{SPACE}mat", "ver", "er", "ir", "rd", "bird", "th", "ll"]  # fmt: skip
LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyzTI.,;:'0123456789é", SPACE})
SIZE = 384
TEXTS = ["The cat sat on the mat.", "the  cat   sat on a mat", "over the hills\n\nand\nthe sea", " it's 12:30",
         "naïve café 北京 😀", "x\t<table>a<table>", "two red birds  ", ""]  # fmt: skip

LOCAL, WIDE = "sliding_attention", "full_attention"
OTHER = {"num_hidden_layers": 3, "layer_types": [WIDE, LOCAL, WIDE], "final_logit_softcapping": 5.0,
         "rope_parameters": {LOCAL: {"rope_type": "default", "rope_theta": 500.0},
                             WIDE: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {}), "other windows": ("gemma3", OTHER), "no windows": ("gemma3", {"layer_types": [WIDE] * 2}),
    "a head of its own": ("gemma3", {"tie_word_embeddings": False}), "gemma2": ("gemma2", {}),
}  # fmt: skip


def joins(pieces: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make each of some tokens of two others."""
    return [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]


def gemma_tokenizer(folder: Path, spaces_added: bool = True, **changes: Any) -> Path:
    """Write it. spaces_added: whether runs of spaces are tokens of the user's own. changes: of tokenizer.json's `model`."""
    vocab = {t: i for i, t in enumerate([*SPECIAL, *USER, *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *LETTERS])}
    assert len(vocab) <= SIZE
    merges = joins([*LINES, *SPACES], vocab) + joins(PIECES, vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    own = [t for t in USER if spaces_added or t not in SPACES]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in own])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= changes
    path.write_text(json.dumps(content))
    return folder


def gemma(folder: Path, name: str = "gemma3", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model. Some norms are so small that one more than they are is rounded."""
    config = FAMILIES[name]()
    for key, value in ({"vocab_size": SIZE, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2} | changes).items():
        setattr(config, key, value)
    make_model(folder, config, dtype)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for key, held in tensors.items():
        if held.ndim == 1:
            size = 0.3 * 10 ** (-7 * torch.rand(held.shape, generator=generator))
            tensors[key] = (torch.randn(held.shape, generator=generator) * size).to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return gemma_tokenizer(folder)
