"""Vocabularies in a GGUF file: transformers makes a tokenizer of them that gives the source's tokens; others are refused."""

from __future__ import annotations

import heapq
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compress.errors import ExportError
from compress.export.gguf.file import FILE, KINDS, File
from compress.export.gguf.file import Tensor as Entry
from compress.export.gguf.metadata import rope_factors
from compress.export.gguf.tokenizer import SPACE, WORDS, vocabulary
from tests.conftest import FAMILIES

WORDS_SEEN = ["the cat sat on a mat", "seven red birds fly over the hills", "It's 1234 o'clock; they'll say: 'hello'!",
              "a  b\tc\n\nd"]  # fmt: skip
TEXTS = [*WORDS_SEEN, "  two spaces", "naïve café 北京 😀", ""]


def trained(folder: Path, words: Any, **options: Any) -> Path:
    """A byte-level BPE vocabulary with special tokens at its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = words, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS_SEEN * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    fast.save_pretrained(folder)
    return folder


def split(pattern: str) -> Any:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])


BYTE_LEVEL = {"gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
              "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
              **{name: lambda p=pattern: split(p) for pattern, name in WORDS.items()}}  # fmt: skip


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_vocabularies(tmp_path: Path, name: str) -> None:
    keys = vocabulary(trained(tmp_path, BYTE_LEVEL[name]()), 340)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", name)
    known = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(m) for m in known["merges"]]
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert {t: i for i, t in enumerate(tokens) if types[i] == 1} == known["vocab"]
    assert keys["tokenizer.ggml.bos_token_id"] == tokens.index("<s>")
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


def as_transformers_reads(folder: Path, keys: dict[str, Any], size: int, arch: str = "llama") -> Any:
    """The tokenizer that transformers makes of a file with these keys."""
    file = File({"general.architecture": arch, "general.name": "x", f"{arch}.vocab_size": size, **keys},
                (Entry("token_embd.weight", KINDS["F32"], (size, 1)),))  # fmt: skip
    folder.mkdir()
    file.write(folder, [torch.zeros(size, 1)])
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@pytest.mark.parametrize("name", ["gpt-2"])
def test_transformers_gives_the_same_tokens(tmp_path: Path, name: str) -> None:
    ours = transformers.AutoTokenizer.from_pretrained(trained(tmp_path / "a", BYTE_LEVEL[name]()))
    theirs = as_transformers_reads(tmp_path / "b", vocabulary(tmp_path / "a", 340), 340)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False), text


# --- SentencePiece ----------------------------------------------------------------------------------------------------

PIECES = ["th", "the", "he", "at", "cat", f"{SPACE}c", f"{SPACE}the", f"{SPACE}cat", "ir", "rd"]


def pieces(folder: Path, **changes: Any) -> Path:
    """A vocabulary as converted from SentencePiece: bytes, characters, pieces, and every merge that makes a piece."""
    letters = sorted({c for t in WORDS_SEEN for c in t if c.isalpha()} | {SPACE})
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *PIECES]
    vocab = {t: i for i, t in enumerate(texts)}
    every = [(p[:i], p[i:]) for p in PIECES for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, every, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        (content if key in content else content["model"])[key] = value
    path.write_text(json.dumps(content))
    return folder


def joined_by_score(text: str, keys: dict[str, Any]) -> list[int]:
    """How llama.cpp splits a text: of neighbours whose union is a token, those with the best score join first, from the left."""
    ids = {t: i for i, t in enumerate(keys["tokenizer.ggml.tokens"])}
    scores = keys["tokenizer.ggml.scores"]
    prefix = SPACE if keys["tokenizer.ggml.add_space_prefix"] else ""
    symbols: list[str | None] = list((prefix + text).replace(" ", SPACE))
    tick, heap = count(), []

    def neighbours(left: int, right: int) -> None:
        union = f"{symbols[left]}{symbols[right]}"
        if union in ids:
            heapq.heappush(heap, (-scores[ids[union]], left, next(tick), right, union))

    def after(i: int) -> int | None:
        return next((j for j in range(i + 1, len(symbols)) if symbols[j] is not None), None)

    for i in range(len(symbols) - 1):
        neighbours(i, i + 1)
    while heap:
        _, left, _, right, union = heapq.heappop(heap)
        if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != union or after(left) != right:
            continue
        symbols[left], symbols[right] = union, None
        before = next((j for j in range(left - 1, -1, -1) if symbols[j] is not None), None)
        if before is not None:
            neighbours(before, left)
        if (behind := after(left)) is not None:
            neighbours(left, behind)
    return [i for s in symbols if s for i in ([ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()])]


def test_scores_join_what_merges_do(tmp_path: Path) -> None:
    keys = vocabulary(pieces(tmp_path), 340)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.unknown_token_id"]) == (True, 0)
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [t for t in TEXTS if t]:
        assert joined_by_score(text, keys) == ours.encode(text, add_special_tokens=False), text


def test_a_real_vocabulary(assets: Path) -> None:
    folder = assets / "models" / "stories260K"
    keys = vocabulary(folder, 512)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    text = next((assets / "texts" / "stories-split").glob("*.txt")).read_text()
    for line in [line for line in text.splitlines() if line.strip()][:200]:
        assert joined_by_score(line, keys) == ours.encode(line, add_special_tokens=False)


def test_transformers_reads_the_real_vocabulary(assets: Path, tmp_path: Path) -> None:
    folder = assets / "models" / "stories260K"
    theirs = as_transformers_reads(tmp_path / "x", vocabulary(folder, 512), 512)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:2]:
        assert theirs.encode(text) == ours.encode(text)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), [
    ({"merges": [["t", "h"], ["h", "e"], ["th", "e"], ["a", "t"]]}, "has not every merge to 'the'"),
    ({"merges": [["t", "h"], ["th", "e"], ["h", "e"], ["t", "he"]]}, "makes 'the' by merges that are not in a row"),
    ({"normalizer": {"type": "NFKC"}}, r"prepares text in a way that llama.cpp does not \(NFKC\)"),
    ({"normalizer": None}, r"llama.cpp does not \(spaces are not marked\)"),
    ({"type": "Unigram"}, "is of the type Unigram, and only BPE is written"),
    ({"vocab": {"<unk>": 0}}, "has no token for the byte 0"),
    ({"added_tokens": [{"content": "x"}]}, r"is broken \(KeyError: 'id'\)"), ({"model": [1]}, r"is broken \(AttributeError"),
    ({"merges": [["a"]]}, r"is broken \(ValueError"),
])  # fmt: skip
def test_vocabularies_that_llama_cpp_cannot_tell(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        vocabulary(pieces(tmp_path, **change), 340)


def test_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"tokenizer.json: is not there, and a GGUF file holds the vocabulary"):
        vocabulary(tmp_path, 10)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has the token 300, and the model's embedding only 300 rows"):
        vocabulary(trained(tmp_path, BYTE_LEVEL["gpt-2"]()), 300)


def test_words_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"splits text in a way that is not known here \(Split\+ByteLevel\)"):
        vocabulary(trained(tmp_path, split(r"\d")), 340)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def test_factors_of_llama_3_are_those_of_transformers() -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    config.head_dim = 64
    found = rope_factors(config)
    assert found is not None
    theirs, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / found, theirs, rtol=1e-6)
    assert {1.0, 8.0} < set(found.tolist())
    assert rope_factors(FAMILIES["llama"]()) is None
