"""A vocabulary as llama.cpp reads it, from a tokenizer.json. Two kinds can be told exactly; anything else is refused.

`gpt2`: byte-level BPE, told by the pattern that splits text into words. `llama`: BPE with bytes as a fallback, as SentencePiece
makes it. llama.cpp has no merges in that kind: it joins the neighbours whose union has the best score. That is the same where
merges are ordered by what they make, and every way to make a token is among them, which is checked. Before that it looks for the
user's own tokens, the longest first, in a text whose spaces are spaces yet; so in these they are, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from compress.errors import ExportError
from compress.export.artifact.files import optional
from compress.model.vocabulary import numbers, smaller_settings, smaller_tokenizer, whole_tokenizer, with_new_ids

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Of all but pieces, which join.
SCORES = {NORMAL: None, UNKNOWN: 0.0, CONTROL: -1000.0, USER: -1000.0, UNUSED: -10000.0, BYTE: 0.0}
SPACE = "\u2581"
FILES, TEMPLATE = ("tokenizer.json", "tokenizer_config.json", "config.json"), "chat_template.jinja"
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
           r"|\s+")  # fmt: skip
WORDS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def vocabulary(folder: Path, size: int, kept: tuple[int, ...] | None = None) -> dict[str, Any]:
    """All keys of the tokenizer in a folder, for a model whose embedding has `size` rows; ExportError where it cannot be told.

    kept: the only tokens that are left of it, see `State`.
    """
    stats = tuple((folder / name).stat() if (folder / name).exists() else None for name in (*FILES, TEMPLATE))
    return dict(known_vocabulary(folder, size, kept, tuple(s and (s.st_ino, s.st_size, s.st_mtime_ns) for s in stats)))


@lru_cache(maxsize=1)
def known_vocabulary(folder: Path, size: int, kept: tuple[int, ...] | None, files: tuple[Any, ...]) -> dict[str, Any]:
    """The keys of a folder whose files are as `files` says: a run asks several times, and a large vocabulary takes seconds."""
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
        self.json, self.settings, self.config = (optional(folder / name) for name in FILES)
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
            typed = zip(tokens, types, strict=True)
            spelled = [text.replace(SPACE, " ") if kind == USER else text for text, kind in typed]
            found |= {"model": "llama", "pre": "default", "tokens": spelled, "scores": self.scores(tokens, types),
                      "add_space_prefix": self.space_prefix()}  # fmt: skip
        else:
            merges = [" ".join(pair) for pair in self.merges]
            found |= {"model": "gpt2", "pre": self.words(), **({"merges": merges} if merges else {})}
        named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
        template = self.settings.get("chat_template")
        if (self.folder / TEMPLATE).exists():
            template = (self.folder / TEMPLATE).read_text(encoding="utf-8")
        return named | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})

    def table(self) -> tuple[list[str], list[int]]:
        """Text and type of each token; what the vocabulary leaves out of the embedding's rows is unused."""
        tokens, types = [f"[PAD{i}]" for i in range(self.size)], [UNUSED] * self.size
        late = self.late_runs()
        kinds = {True: CONTROL, False: USER}
        added = {t["id"]: (t["content"], NORMAL if t["content"] in late else kinds[bool(t.get("special"))])
                 for t in self.json.get("added_tokens") or ()}  # fmt: skip
        plain = {i: (text, NORMAL) for text, i in self.model["vocab"].items()}
        for i, (text, kind) in (plain | added).items():
            if i >= self.size and i not in plain:
                continue  # small Gemmas have one of larger ones that see; without a row it is of no use
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

    @cached_property
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
        if kinds in (["Prepend", "Replace"], ["Replace"]) and marks_spaces(normal[-1]) and idle(before):
            return bool(kinds[0] == "Prepend")
        if not normal and [s["type"] for s in before] == ["Metaspace"] and not before[0].get("split", True):
            return bool(before[0].get("prepend_scheme", "always") != "never")
        kinds += [step["type"] for step in before]
        self.refuse(f"prepares text in a way that llama.cpp does not ({'+'.join(kinds) or 'spaces are not marked'})")

    def scores(self, tokens: list[str], types: list[int]) -> list[float]:
        """Minus the place of each piece: by its id, as in SentencePiece, or by merges where that is another order."""
        pieces = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}
        places = self.places(pieces)
        if list(places) == sorted(places, key=pieces.__getitem__):
            first = min(pieces.values(), default=0)
            places = {text: i - first for text, i in pieces.items()}
        kept = ((text, SCORES[kind]) for text, kind in zip(tokens, types, strict=True))
        return [float(-places.get(text, 0)) if score is None else score for text, score in kept]

    def places(self, pieces: Mapping[str, int]) -> dict[str, int]:
        """The order in which merges make pieces; ExportError where scores cannot tell it."""
        found: dict[str, int] = {}
        ways: Counter[str] = Counter()
        last = ""
        for made in (left + right for left, right in self.merges):
            if made not in pieces:
                continue  # llama.cpp finds it as a whole
            if made in found and made != last:
                self.refuse(f"makes '{made}' by merges that are not in a row, which the scores of llama.cpp cannot tell")
            found.setdefault(made, len(found) + 1)
            ways[made], last = ways[made] + 1, made
        for text in pieces:
            if ways[text] < sum(self.is_part(text[:i]) and self.is_part(text[i:]) for i in range(1, len(text))):
                self.refuse(f"has not every merge to '{text}', and llama.cpp would take any")
        return found

    def is_part(self, text: str) -> bool:
        """Whether llama.cpp may have this text before it joins it to another; characters it has without a token of their own."""
        return len(text) == 1 or text in self.model["vocab"]

    def late_runs(self) -> set[str]:
        """The user's own runs of spaces, where merges make any of them later than others: then they are pieces like others.

        The tokenizer looks for them before spaces are marked, and so never finds one as a whole.
        """
        if not self.model.get("byte_fallback"):
            return set()
        added = self.json.get("added_tokens") or ()
        own = {t["content"] for t in added}
        runs = {t["content"] for t in added if SPACE in t["content"] and not t.get("special") and not t.get("normalized")}
        made = [left + right for left, right in self.merges]
        first = next((i for i, text in enumerate(made) if text not in own), len(made))
        return runs if runs.intersection(made[first:]) else set()


def marks_spaces(step: dict[str, Any]) -> bool:
    return bool(step.get("content") == SPACE and step.get("pattern") == {"String": " "})


def idle(steps: list[dict[str, Any]]) -> bool:
    """Whether what splits text into words finds nothing to split by, spaces being marked."""
    return all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps)


def parts_of(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step, or none."""
    if not step:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]
