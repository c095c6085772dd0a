"""Code that lies in a model's folder, or is named there: it is never run, whatever asks for it.

A config may name classes of its own (`auto_map`), which transformers would fetch and execute. What such a model computes is
known to its own code alone; so it is refused, unless transformers has the classes that the config names itself, as is usual
with models that were published before transformers knew them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from compress.errors import CompressError, DataError, ModelError


def refuse_code(path: Path) -> None:
    """ModelError where a config.json asks for classes that transformers does not have."""
    config = mapping(path)
    named = config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING and all(hasattr(transformers, name) for name in names)
    if config.get("auto_map") and not known:
        raise refusal(ModelError, path, config["auto_map"])


def code_passed_over(folder: Path) -> list[str]:
    """What to know of a model whose config asks for code beside classes that transformers has."""
    config = mapping(folder / "config.json")
    if not config.get("auto_map"):
        return []
    return [f"the config of {folder} names code of its own (auto_map), which is not run and does not go along: the model is what "
            "transformers itself makes of it"]  # fmt: skip


def refuse_tokenizer_code(folder: Path) -> None:
    """DataError where a tokenizer_config.json asks for a class that transformers does not have."""
    path = folder / "tokenizer_config.json"
    config = mapping(path)
    asked, name = config.get("auto_map"), config.get("tokenizer_class")
    if isinstance(asked, dict):  # it may ask for a processor, which nobody needs here
        asked = asked.get("AutoTokenizer")
    if asked and not (isinstance(name, str) and known_tokenizer(name)):
        raise refusal(DataError, path, asked)


def known_tokenizer(name: str) -> bool:
    return any(tokenizer_class_from_name(n) is not None for n in (name, f"{name.removesuffix('Fast')}Fast"))


def refusal(kind: type[CompressError], path: Path, asked: Any) -> CompressError:
    """The one line, with the first class that is asked for."""
    while isinstance(asked, dict | list) and asked:
        asked = next((part for part in (asked.values() if isinstance(asked, dict) else asked) if part), "")
    name = "".join(c for c in str(asked)[:80] if c.isprintable())
    return kind(f"{path}: asks for custom code (auto_map: {name}), which is not supported; only models and tokenizers that "
                "transformers has itself are read")  # fmt: skip


def mapping(path: Path) -> Mapping[str, Any]:
    """A JSON mapping; empty where there is none, of which transformers says more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
