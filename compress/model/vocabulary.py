"""A vocabulary with some of its tokens only: which have to stay, and the files beside the weights, rewritten for those.

`kept[new id] = old id`, ascending. Whoever cuts a vocabulary names the tokens of the texts that matter to him; to those come the
tokens without which the tokenizer would be another, and then this holds: *a text that was made of named tokens alone is made
of the same tokens by the smaller tokenizer*. What that takes depends on the kind of the tokenizer:

- WordPiece takes the longest token that fits, Unigram the best row of tokens, WordLevel whole words: what was the best of many is
  the best of fewer. Only the least likely token of Unigram has to stay, by which it weighs what it does not know.
- BPE makes a token by merges, each of which needs its two parts. The merges within a token are those that make it out of its
  characters alone (none of them crosses its ends, or it would not have become a token), so each named token is merged anew, and
  what comes up on the way stays too. Merges whose parts and result all stay are kept, in their order: at every moment the one
  that would have been next is still there, and the others were never taken.

Besides: special tokens, those that the chat template writes and those that configs name; and bytes where a tokenizer falls back
on them, so that it can still say everything.

Limits: the tokenizer is a tokenizer.json (files of other libraries are left out of what is written, they would be the old ones),
and its ids have to stay those of the rows when they close up, which is looked at when it is opened (tokenizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from compress.documents import json_mapping, one_line, read_text
from compress.errors import CompressError, ModelError, RecipeError

TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SOURCE_IDS = "tokenizer.source_ids.json"  # in an artifact: `kept`
OTHERS = {"vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"}  # vocabularies as other libraries hold them
OTHER_KINDS = {".model", ".tiktoken"}
NAMES_IDS = re.compile(r"(token_id|token_ids|token_index|suppress_tokens|bad_words_ids|forced_decoder_ids)$")
MOST_LIST = 100_000_000  # bytes

Kept = tuple[int, ...]  # new id -> old id
Number = Mapping[int, int]  # old id -> new id
Stamp = tuple[int, ...]  # of the files that something was read from


# --- which tokens stay -----------------------------------------------------------------------------------------------


def keep_list(path: Path) -> list[int]:
    """The ids of a list, one on a line; empty lines, and what follows a '#', count for nothing. RecipeError where it is none."""
    found = []
    for number, line in enumerate(read_text(path, MOST_LIST, RecipeError).removeprefix("\ufeff").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text and not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise RecipeError(f"{path}:{number}: '{one_line(text, 40)}' is no token id; give one whole number on a line")
        found += [int(text)] if text else []
    if not found:
        raise RecipeError(f"{path}: names no token; give their ids, one on a line")
    return found


def closed(folder: Path, named: Iterable[int], config: Mapping[str, Any]) -> Kept:
    """The tokens to keep where those in `named` are asked for, and `config` names others; ModelError where a tokenizer cannot be
    cut, or has no such token."""
    tokens = frozenset(named)
    return _closed(folder, tokens, frozenset(ids_in(config)), stamp(folder))


@lru_cache(maxsize=8)
def _closed(folder: Path, named: frozenset[int], configured: frozenset[int], _: Stamp) -> Kept:
    file = read_tokenizer(folder)
    with readable(folder):
        ids = ids_of(file)
        known = set(ids.values())
        odd = min(named - known, default=None)
        if odd is not None:
            raise ModelError(f"{folder / TOKENIZER}: has no token {odd}; leave it out of the list")
        kept = named | (configured & known) | (set(ids_in(optional(folder / GENERATION))) & known)
        kept |= {ids[text] for text in essential(folder, file) if text in ids} | set(template_ids(file.get("post_processor")))
        if file["model"]["type"] == "BPE":
            kept |= {ids[text] for text in merged_from(folder, file["model"], {t for t, i in ids.items() if i in kept})}
    return tuple(sorted(kept))


def essential(folder: Path, file: Mapping[str, Any]) -> Iterator[str]:
    """Tokens that stay whatever is asked for."""
    model = file["model"]
    templates = chat_templates(folder)
    for token in file.get("added_tokens") or ():
        if token.get("special") or token["content"] in templates:
            yield token["content"]
    if isinstance(model.get("unk_token"), str):
        yield model["unk_token"]
    if type(model.get("unk_id")) is int:
        yield model["vocab"][model["unk_id"]][0]
    if model["type"] == "Unigram":  # what is unknown counts as much less likely than this
        yield min(model["vocab"], key=lambda piece: piece[1])[0]
    if model.get("byte_fallback"):
        yield from (f"<0x{byte:02X}>" for byte in range(256))
    steps = json.dumps([file.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    if '"ByteLevel"' in steps:
        yield from ByteLevel.alphabet()
    if isinstance(file.get("padding"), dict):
        yield file["padding"].get("pad_token", "")


def merged_from(folder: Path, model: Mapping[str, Any], kept: set[str]) -> set[str]:
    """All tokens that come up while those in `kept` are merged out of their characters."""
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ModelError(f"{folder / TOKENIZER}: marks where words go on or end; how its tokens are merged is not known here")
    rank = {pair: i for i, pair in reversed(list(enumerate(pairs(model))))}
    return {part for token in kept if token in model["vocab"] for part in merging(token, rank)}


def merging(token: str, rank: Mapping[tuple[str, str], int]) -> set[str]:
    """What comes up while a token is merged; nothing where merges do not lead to it."""
    symbols, seen = list(token), set(token)
    while len(symbols) > 1:
        first = min(range(len(symbols) - 1), key=lambda i: rank.get((symbols[i], symbols[i + 1]), len(rank)))
        if (symbols[first], symbols[first + 1]) not in rank:
            return set()
        symbols[first : first + 2] = ["".join(symbols[first : first + 2])]
        seen.add(symbols[first])
    return seen


# --- the files ---------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, kept: Kept) -> Mapping[str, bytes | None]:
    """The files of a model's folder that are others with some tokens only, by name; None for one that has no place there then."""
    return _rewritten(folder, kept, stamp(folder))


@lru_cache(maxsize=2)
def _rewritten(folder: Path, kept: Kept, _: Stamp) -> Mapping[str, bytes | None]:
    number = numbers(kept)
    found: dict[str, bytes | None] = {p.name: None for p in folder.iterdir() if p.name in OTHERS or p.suffix in OTHER_KINDS}
    with readable(folder):
        changes: dict[str, Callable[[dict[str, Any], Number], dict[str, Any]]] = {
            TOKENIZER: smaller_tokenizer, SETTINGS: smaller_settings, GENERATION: with_new_ids}  # fmt: skip
        for name, change in changes.items():
            if held := optional(folder / name):
                found[name] = as_json(change(held, number))
    found[SOURCE_IDS] = as_json(list(kept))
    return found


def numbers(kept: Kept) -> Number:
    return {old: new for new, old in enumerate(kept)}


def smaller_tokenizer(file: dict[str, Any], number: Number) -> dict[str, Any]:
    """A tokenizer.json with the tokens that have a new number."""
    model = dict(file["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [piece for i, piece in enumerate(model["vocab"]) if i in number]
        model["unk_id"] = None if model.get("unk_id") is None else number[model["unk_id"]]
    else:
        model["vocab"] = {t: number[i] for t, i in sorted(model["vocab"].items(), key=lambda item: item[1]) if i in number}
    if model["type"] == "BPE":
        held = model["vocab"]
        whole = zip(model["merges"], pairs(model), strict=True)
        model["merges"] = [merge for merge, (a, b) in whole if a in held and b in held and a + b in held]
    added = [{**token, "id": number[token["id"]]} for token in file.get("added_tokens") or () if token["id"] in number]
    smaller = {
        **file,
        "added_tokens": added,
        "model": model,
        "post_processor": renumbered_template(file.get("post_processor"), number),
    }
    if isinstance(file.get("padding"), dict):
        smaller["padding"] = {**file["padding"], "pad_id": number.get(file["padding"].get("pad_id"), 0)}
    return smaller


def smaller_settings(settings: dict[str, Any], number: Number) -> dict[str, Any]:
    """A tokenizer_config.json in which added tokens have their new numbers; it asks for no code."""
    found = {name: value for name, value in settings.items() if name != "auto_map"}
    if isinstance(added := settings.get("added_tokens_decoder"), dict):
        found["added_tokens_decoder"] = {str(number[int(i)]): token for i, token in added.items() if int(i) in number}
    return found


def renumbered_template(processor: Any, number: Number) -> Any:
    """A post_processor whose tokens have their new numbers."""
    if isinstance(processor, list):
        return [renumbered_template(part, number) for part in processor]
    if not isinstance(processor, dict):
        return processor
    found = {name: renumbered_template(value, number) for name, value in processor.items()}
    if isinstance(ids := processor.get("ids"), list):
        found["ids"] = [number[i] for i in ids]
    for name in ("sep", "cls"):
        if isinstance(pair := processor.get(name), list):
            found[name] = [pair[0], number[pair[1]]]
    return found


def with_new_ids(config: Mapping[str, Any], number: Number) -> dict[str, Any]:
    """A config, or a generation config, whose token ids are new ones; those that are gone are left out of lists."""
    return {name: new_ids(value, number) if NAMES_IDS.search(str(name)) else value for name, value in config.items()}


def new_ids(value: Any, number: Number) -> Any:
    if isinstance(value, list | tuple):
        return [new_ids(v, number) for v in value if not is_id(v) or v in number]
    return number.get(value, value) if is_id(value) else value


def source_ids(folder: Path, size: int) -> Kept | None:
    """The ids that an artifact's tokens have in the model it was made from; None where they are the same."""
    path = folder / SOURCE_IDS
    if not path.exists():
        return None
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or len(ids) != size or not all(map(is_id, ids)) or len(set(ids)) < size:
        raise ModelError(f"{path}: is to hold an id for each of the model's {size:,} tokens; the file is damaged")
    return tuple(ids)


# --- what a tokenizer.json says ------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokenizer.json of a folder; ModelError where there is none, or it is of a kind that cannot be cut."""
    path = folder / TOKENIZER
    if not path.exists():
        raise ModelError(f"{path}: is not there, and a vocabulary is cut by it; save it with transformers' save_pretrained")
    file = json_mapping(path, ModelError)
    kind = file["model"].get("type", "BPE") if isinstance(file.get("model"), dict) else None
    if kind not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise ModelError(
            f"{path}: is of the type {one_line(str(kind), 40)}, which is not known here; its vocabulary cannot be cut"
        )
    file["model"]["type"] = kind
    return file


def ids_of(file: Mapping[str, Any]) -> dict[str, int]:
    """Text of every token -> its id."""
    vocabulary = file["model"]["vocab"]
    plain = {piece[0]: i for i, piece in enumerate(vocabulary)} if file["model"]["type"] == "Unigram" else dict(vocabulary)
    return plain | {token["content"]: token["id"] for token in file.get("added_tokens") or ()}


def pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]  # type: ignore[misc]


def template_ids(processor: Any) -> Iterator[int]:
    """Tokens that a post_processor puts around every text."""
    if isinstance(processor, list):
        for part in processor:
            yield from template_ids(part)
    if isinstance(processor, dict):
        yield from processor["ids"] if isinstance(processor.get("ids"), list) else ()
        yield from (processor[name][1] for name in ("sep", "cls") if isinstance(processor.get(name), list))
        yield from template_ids(list(processor.values()))


def ids_in(config: Mapping[str, Any]) -> Iterator[int]:
    """Token ids that a config names, in whatever it nests."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ids_in(value)
        elif NAMES_IDS.search(str(name)):
            yield from filter(is_id, value if isinstance(value, list | tuple) else [value])


def chat_templates(folder: Path) -> str:
    """The text of all chat templates, which write tokens by their names."""
    held = optional(folder / SETTINGS).get("chat_template") or ()
    texts = [held] if isinstance(held, str) else [str(part.get("template")) for part in held]
    return "".join([*texts, *(path.read_text(encoding="utf-8") for path in template_files(folder))])


def template_files(folder: Path) -> list[Path]:
    found = [*folder.glob("*.jinja"), *(folder / "additional_chat_templates").glob("*.jinja")]
    return sorted(path for path in found if path.is_file())


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Inside, what trips over a tokenizer's files becomes a ModelError in one line."""
    try:
        yield
    except CompressError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, OSError, RecursionError) as e:
        why = f"{type(e).__name__}: {one_line(str(e), 100)}"
        raise ModelError(f"{folder / TOKENIZER}: it, or a file beside it, is broken ({why})") from None


def is_id(value: Any) -> bool:
    return type(value) is int


def optional(path: Path) -> dict[str, Any]:
    return json_mapping(path, ModelError) if path.exists() else {}


def as_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()


def stamp(folder: Path) -> Stamp:
    """Changes when a file does that is read here."""
    files = [folder / TOKENIZER, folder / SETTINGS, folder / GENERATION, *template_files(folder)]
    return tuple(n for file in files if file.exists() for n in (file.stat().st_size, file.stat().st_mtime_ns))
