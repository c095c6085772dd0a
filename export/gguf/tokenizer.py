"""A vocabulary as llama.cpp reads it, from a tokenizer.json. Two kinds can be told exactly; anything else is refused.

`gpt2`: byte-level BPE, told by the pattern that splits text into words. `llama`: BPE with bytes as a fallback, as SentencePiece
makes it. llama.cpp has no merges in that kind: it joins the neighbours whose union has the best score. That is the same where
merges are ordered by what they make, and every way to make a token is among them, which is checked.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import ExportError
from compress.export.artifact.files import optional
from compress.model.vocabulary import numbers, smaller_settings, smaller_tokenizer, whole_tokenizer, with_new_ids

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
           r"|\s+")  # fmt: skip
WORDS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def vocabulary(folder: Path, size: int, kept: tuple[int, ...] | None = None) -> dict[str, Any]:
    """All keys of the tokenizer in a folder, for a model whose embedding has `size` rows; ExportError where it cannot be told.

    kept: the only tokens that are left of it, see `State`.
    """
    try:
        return Vocabulary(folder, size, kept).keys()
    except ExportError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise ExportError(f"gguf: {folder / 'tokenizer.json'}: is broken ({type(e).__name__}: {e})") from None


class Vocabulary:
    """A tokenizer.json with what its neighbours say of special tokens."""

    def __init__(self, folder: Path, size: int, kept: tuple[int, ...] | None = None):
        self.folder, self.size = folder, size
        names = ("tokenizer.json", "tokenizer_config.json", "config.json")
        self.json, self.settings, self.config = (optional(folder / name) for name in names)
        if kept is not None:
            number = numbers(kept)
            self.json, self.settings = (
                smaller_tokenizer(whole_tokenizer(folder)[0], number),
                smaller_settings(self.settings, number),
            )
            self.config = with_new_ids(self.config, number)
        self.model: dict[str, Any] = self.json.get("model") or {}
        if not self.json:
            self.refuse("is not there, and a GGUF file holds the vocabulary; save it with transformers' save_pretrained")
        if self.model.get("type", "BPE") != "BPE" or "merges" not in self.model:
            self.refuse(f"is of the type {self.model.get('type')}, and only BPE is written")

    def refuse(self, why: str) -> NoReturn:
        raise ExportError(f"gguf: {self.folder / 'tokenizer.json'}: {why}")

    def keys(self) -> dict[str, Any]:
        """All keys; ExportError for a tokenizer that cannot be told."""
        tokens, types = self.table()
        found: dict[str, Any] = {"tokens": tokens, "token_type": types, **self.special(tokens)}
        if self.model.get("byte_fallback"):
            found |= {"model": "llama", "scores": self.scores(tokens, types), "add_space_prefix": self.space_prefix()}
        else:
            merges = [" ".join(pair) for pair in self.merges()]
            found |= {"model": "gpt2", "pre": self.words(), **({"merges": merges} if merges else {})}
        named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
        template = self.settings.get("chat_template")
        if (self.folder / "chat_template.jinja").exists():
            template = (self.folder / "chat_template.jinja").read_text(encoding="utf-8")
        return named | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})

    def table(self) -> tuple[list[str], list[int]]:
        """Text and type of each token; what the vocabulary leaves out of the embedding's rows is unused."""
        tokens, types = [f"[PAD{i}]" for i in range(self.size)], [UNUSED] * self.size
        added = {t["id"]: (t["content"], CONTROL if t.get("special") else USER) for t in self.json.get("added_tokens") or ()}
        plain = {i: (text, NORMAL) for text, i in self.model["vocab"].items()}
        for i, (text, kind) in (plain | added).items():
            if i >= self.size:
                self.refuse(f"has the token {i}, and the model's embedding only {self.size} rows")
            tokens[i], types[i] = text, kind
        if self.model.get("byte_fallback"):
            for byte in range(256):
                if f"<0x{byte:02X}>" not in self.model["vocab"]:
                    self.refuse(f"has no token for the byte {byte}, which llama.cpp needs")
                types[self.model["vocab"][f"<0x{byte:02X}>"]] = BYTE
            unknown = self.model["vocab"].get(self.model.get("unk_token"))
            if unknown is not None:
                types[unknown] = UNKNOWN
        return tokens, types

    def merges(self) -> list[tuple[str, str]]:
        return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in self.model["merges"]]  # type: ignore[misc]

    # --- special tokens ----------------------------------------------------------------------------------------------

    def special(self, tokens: list[str]) -> dict[str, Any]:
        """Which tokens begin, end and pad a text, and whether encoding adds the first two."""
        ids = {text: i for i, text in enumerate(tokens)}
        config = self.config
        found: dict[str, Any] = {}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            said = self.settings.get(f"{ours}_token")
            text = said.get("content") if isinstance(said, dict) else said
            number = ids.get(text, config.get(f"{ours}_token_id")) if text else config.get(f"{ours}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if type(number) is int and 0 <= number < self.size:
                found[f"{theirs}_token_id"] = number
        return found | self.template()

    def template(self) -> dict[str, bool]:
        processor = self.json.get("post_processor") or {}
        parts = [p for p in processor.get("processors", [processor]) if p.get("type") == "TemplateProcessing"]
        items = [list(item) for item in parts[0]["single"]] if parts else []
        kinds = [item[0] for item in items] or ["Sequence"]
        return {"add_bos_token": kinds[0] == "SpecialToken", "add_eos_token": kinds[-1] == "SpecialToken"}

    # --- byte-level BPE ----------------------------------------------------------------------------------------------

    def words(self) -> str:
        """llama.cpp's name for how text is split into words."""
        if (self.json.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
            self.refuse(f"normalizes text by {self.json['normalizer']['type']}, which llama.cpp does not")
        steps = parts_of(self.json.get("pre_tokenizer"), "pretokenizers")
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
        if pattern not in WORDS:
            self.refuse(
                f"splits text in a way that is not known here ({'+'.join(kinds) or 'none'}), and llama.cpp needs its name"
            )
        return WORDS[pattern]

    # --- SentencePiece -----------------------------------------------------------------------------------------------

    def space_prefix(self) -> bool:
        """Whether a space is put before a text; ExportError where spaces are not marked as SentencePiece does."""
        normal = parts_of(self.json.get("normalizer"), "normalizers")
        before = parts_of(self.json.get("pre_tokenizer"), "pretokenizers")
        kinds = [step["type"] for step in normal]
        if not before and kinds in (["Prepend", "Replace"], ["Replace"]) and normal[-1].get("content") == SPACE:
            return bool(kinds[0] == "Prepend")
        if not normal and [s["type"] for s in before] == ["Metaspace"] and not before[0].get("split", True):
            return bool(before[0].get("prepend_scheme", "always") != "never")
        kinds += [step["type"] for step in before]
        self.refuse(f"prepares text in a way that llama.cpp does not ({'+'.join(kinds) or 'spaces are not marked'})")

    def scores(self, tokens: list[str], types: list[int]) -> list[float]:
        """Minus the place of each token in the order in which merges make them."""
        places: dict[str, int] = {}
        ways: Counter[str] = Counter()
        last = ""
        for left, right in self.merges():
            made = left + right
            if made in places and made != last:
                self.refuse(f"makes '{made}' by merges that are not in a row, which the scores of llama.cpp cannot tell")
            places.setdefault(made, len(places) + 1)
            ways[made], last = ways[made] + 1, made
        known = self.model["vocab"]
        for text, kind in zip(tokens, types, strict=True):
            possible = sum(text[:i] in known and text[i:] in known for i in range(1, len(text))) if kind == NORMAL else 0
            if ways[text] < possible:
                self.refuse(f"has not every merge to '{text}', and llama.cpp would take any")
        return [float(-places.get(text, 0)) for text in tokens]


def parts_of(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step, or none."""
    if not step:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]
