"""What every tool is asked to quantize: a model folder, calibration windows, held-out windows.

Tokens are cut as `compress` cuts them: the whole text tokenized without special tokens, then windows that do not overlap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

# A window is 256 tokens in both workloads.
LENGTH = 256


@dataclass(frozen=True)
class Workload:
    """One model with its texts; `calibration` and `evaluation` are int64 tokens (windows, LENGTH)."""

    name: str
    title: str
    model: Path
    text: Path
    calibration: torch.Tensor
    evaluation: torch.Tensor
    group: int
    bits: tuple[int, ...]
    redraws: bool
    bos: bool = False  # a begin-of-text token in front of every window


class AssetsMissingError(FileNotFoundError):
    """The folder with the real model and texts is not there."""


def windows(text: str, tokenizer: Any, length: int = LENGTH, limit: int | None = None) -> torch.Tensor:
    """(n, length) int64: the text's tokens without special ones, cut into windows that do not overlap."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length if limit is None else min(limit, len(ids) // length)
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def stories(assets: Path, bits: Sequence[int] = (4, 3, 2)) -> Workload:
    """stories260K with its MLP padded to 192: five blocks of width 64, a real model, fp32 perplexity 4.988."""
    from transformers import AutoTokenizer

    model, texts = assets / "models/stories260K-mlp192", assets / "texts/stories-split"
    for needed in (model / "model.safetensors", texts / "calibration.txt", texts / "evaluation.txt"):
        if not needed.is_file():
            raise AssetsMissingError(f"the assets are absent: no {needed}; name their folder with --assets")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Workload(
        name="stories",
        title="stories: stories260K-mlp192, linear layers of the blocks, group 64, 64 windows of 256 tokens to calibrate",
        model=model,
        text=texts / "calibration.txt",
        calibration=windows((texts / "calibration.txt").read_text("utf-8"), tokenizer, limit=64),
        evaluation=windows((texts / "evaluation.txt").read_text("utf-8"), tokenizer),
        group=64,
        bits=tuple(bits),
        redraws=True,
    )


def speed(work: Path, sequences: int = 32, held_out: int = 8) -> Workload:
    """A random Llama of 27.4 M parameters in fp32 (512 wide, 8 blocks, MLP 1376, vocabulary 2048) on random tokens."""
    from transformers import AutoTokenizer

    model, text = work / "speed-model", work / "speed.txt"
    random_llama(model, vocab=2048)
    word_tokenizer(model, vocab=2048)
    ids = torch.randint(3, 2048, (sequences + held_out, LENGTH), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{i}" for i in ids[:sequences].flatten().tolist()), "utf-8")
    calibration = windows(text.read_text("utf-8"), AutoTokenizer.from_pretrained(model), limit=sequences)
    assert torch.equal(calibration, ids[:sequences]), "the word tokenizer must give back the tokens it was given"
    return Workload(
        name="speed",
        title=f"speed: random Llama of 27.4 M parameters, fp32, group 32, {sequences} windows of 256 random tokens",
        model=model,
        text=text,
        calibration=calibration,
        evaluation=ids[sequences:],
        group=32,
        bits=(4,),
        redraws=False,
    )


def redraw(workload: Workload, index: int, count: int, work: Path) -> Workload:
    """The workload with its calibration text turned by index/count of its length, so that other windows are cut."""
    from transformers import AutoTokenizer

    text = workload.text.read_text("utf-8")
    start = text.index(" ", index * len(text) // count) + 1 if index else 0
    path = work / f"{workload.name}-text-{index}.txt"
    path.write_text(text[start:] + text[:start], "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    cut = windows(path.read_text("utf-8"), tokenizer, limit=len(workload.calibration))
    return replace(workload, text=path, calibration=cut)


def random_llama(folder: Path, vocab: int) -> None:
    """Writes a seeded random Llama, so that every run of every tool reads the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def word_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a tokenizer whose word ``w17`` is token 17, for models that have no language."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = special | {f"w{i}": i for i in range(len(special), vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": 1 << 20,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
