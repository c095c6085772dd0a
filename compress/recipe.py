"""A recipe: YAML in which every node knows its file, line and column, checked against the classes of passes and exporters.

The tables of passes and exporters are arguments: this module knows no algorithm's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.data import Data
from compress.errors import CompressError, RecipeError, did_you_mean
from compress.manager import Pass

Loc = tuple[str | int, ...]
Table = Mapping[str, type[BaseModel]]


class Document(BaseModel):
    """What a recipe file may say."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="a local folder, or a hub id, optionally id@revision")
    out: str | None = Field(None, description="the run folder; default: runs/ beside where you are, named like the recipe")
    seed: int = Field(0, ge=0, description="seed of everything random")
    data: Data = Field(Data(calibration=None, evaluation=None), description="texts to calibrate and to evaluate on")
    passes: list[dict[str, Any]] = Field([], description="what to do, in order: a list of {pass: options}")
    export: list[dict[str, Any]] = Field([], description="what to write: a list of {exporter: options}")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `base` is the folder that relative paths in it count from."""

    path: Path
    document: Document
    passes: tuple[Pass, ...]
    exports: tuple[Any, ...]
    places: Mapping[Loc, str]

    @property
    def base(self) -> Path:
        return self.path.parent

    @property
    def out(self) -> Path:
        named = self.base / self.document.out if self.document.out else Path("runs") / self.path.stem
        return Path(os.path.normpath(named))

    def place(self, loc: Loc) -> str:
        """``file:line:column`` of the nearest node that encloses a location."""
        while loc and loc not in self.places:
            loc = loc[:-1]
        return self.places.get(loc, str(self.path))

    def located(self, error: CompressError, section: str = "passes", index: int = 0) -> CompressError:
        """The same error, its message opened by where in the recipe its cause stands."""
        if error.at[:1] == ("step",):
            return type(error)(f"{self.place(('passes', int(error.at[1])))}  {error}")
        name = next(iter(getattr(self.document, section)[index]))
        return type(error)(f"{self.place((section, index, name, *error.at))}  {error}")

    def resolved(self, base: Path | None = None) -> str:
        """The recipe as YAML with every default written out; with `base`, relative paths are made absolute from it."""
        full = self.document.model_dump(mode="json")
        if base is not None:
            full = anchored(full, base.resolve())
        full["passes"] = [{p.name: p.model_dump(mode="json")} for p in self.passes]
        full["export"] = [{e.name: e.model_dump(mode="json")} for e in self.exports]
        text: str = yaml.safe_dump(full, sort_keys=False, allow_unicode=True)
        return text


def anchored(full: dict[str, Any], base: Path) -> dict[str, Any]:
    """A document whose paths no longer depend on where the recipe lies; hub ids stay."""

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: walk(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        if isinstance(value, str) and (key in ("text", "jsonl", "out") or (key == "model" and (base / value).exists())):
            return os.path.normpath(base / value)
        return value

    return {k: v if k in ("passes", "export") else walk(v, k) for k, v in full.items()}


def load(path: Path, passes: Table, exports: Table, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are ``quantize.format=int3:g64`` texts, checked the same way.

    Raises RecipeError with file, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise RecipeError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is no UTF-8 text") from None
    places: dict[Loc, str] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = plain(node, (), places, path) if node else {}
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        spot = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{spot}  {e.problem or 'is no YAML'}") from None
    except yaml.YAMLError as e:
        raise RecipeError(f"{path}  is no YAML ({e})") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}:1:1  a recipe is a mapping: {', '.join(Document.model_fields)}")
    for item in overrides:
        override(raw, item, places)
    return check(path, raw, passes, exports, places)


def check(path: Path, raw: dict[str, Any], passes: Table, exports: Table, places: Mapping[Loc, str]) -> Recipe:
    draft = Recipe(path, Document(model=""), (), (), places)
    document: Document = validated(Document, raw, (), "a recipe", draft)
    chosen = [item(passes, entry, ("passes", i), "pass", draft) for i, entry in enumerate(document.passes)]
    written = [item(exports, entry, ("export", i), "exporter", draft) for i, entry in enumerate(document.export)]
    return Recipe(path, document, tuple(chosen), tuple(written), places)


def item(table: Table, entry: dict[str, Any], loc: Loc, kind: str, draft: Recipe) -> Any:
    """One ``{name: options}`` of a list, as an instance of its class."""
    if len(entry) != 1:
        names = ", ".join(map(str, entry)) or "nothing"
        raise RecipeError(f"{draft.place(loc)}  each item names one {kind}; this one holds {names}")
    name, options = next(iter(entry.items()))
    if name not in table:
        known = ", ".join(table)
        raise RecipeError(f"{draft.place((*loc, name))}  no {kind} '{name}'{did_you_mean(str(name), table)}   {kind}s: {known}")
    if options is not None and not isinstance(options, dict):
        raise RecipeError(f"{draft.place((*loc, name))}  the options of '{name}' are a mapping, not {describe(options)}")
    return validated(table[name], options or {}, (*loc, name), f"{kind} '{name}'", draft)


def validated(cls: type[BaseModel], raw: dict[str, Any], loc: Loc, what: str, draft: Recipe) -> Any:
    """An instance of `cls`; the first thing that pydantic dislikes becomes a RecipeError in our words."""
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise RecipeError(f"{draft.place((*loc, *first['loc']))}  {explain(first, cls, what)}") from None


def explain(error: Any, cls: type[BaseModel], what: str) -> str:
    name = str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        owner = owner_of(cls, error["loc"][:-1])
        known = list(owner.model_fields)
        holder = what if owner is cls else f"'{error['loc'][-2]}'"
        return f"{holder} has no option '{name}'{did_you_mean(name, known)}   options: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{what} needs '{name}': {owner_of(cls, error['loc'][:-1]).model_fields[name].description}"
    text = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", not {describe(error['input'])}"
    return f"'{name}': {text[0].lower()}{text[1:]}{given}" if name else text


def owner_of(cls: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The model class that a location inside `cls` lies in."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        for inner in [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                cls = inner
    return cls


def describe(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), f"'{value}'")


def plain(node: yaml.Node, loc: Loc, places: dict[Loc, str], path: Path) -> Any:
    """A YAML node as plain values; notes where each one stands. A key given twice is a RecipeError."""
    places[loc] = f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [plain(child, (*loc, i), places, path) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        out: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = scalar(key_node)
            inner = (*loc, key)
            if key in out:
                mark = key_node.start_mark
                raise RecipeError(f"{path}:{mark.line + 1}:{mark.column + 1}  '{key}' is given twice; keep one")
            out[key] = plain(value_node, inner, places, path)
            places[inner] = f"{path}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
        return out
    return scalar(node)


def scalar(node: yaml.Node) -> Any:
    constructor = yaml.SafeLoader("")
    return constructor.construct_object(node, deep=True)  # type: ignore[no-untyped-call]


def override(raw: dict[str, Any], text: str, places: dict[Loc, str]) -> None:
    """Apply ``a.b=value``: a pass or exporter by name, or a path from the top of the recipe."""
    path, equals, value = text.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {text}  is no NAME.OPTION=VALUE")
    target, loc = find(raw, parts, text)
    try:
        target[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}  the value is no YAML") from None
    places[(*loc, parts[-1])] = f"--set {path}"


def find(raw: dict[str, Any], parts: list[str], text: str) -> tuple[dict[str, Any], Loc]:
    """The mapping that an override writes into, and where it is."""
    for section in ("passes", "export"):
        hits = [(i, e) for i, e in enumerate(raw.get(section) or []) if isinstance(e, dict) and parts[0] in e]
        if len(hits) > 1:
            raise RecipeError(f"--set {text}  the recipe has {len(hits)} '{parts[0]}'; change the recipe instead")
        if hits and len(parts) > 1:
            i, entry = hits[0]
            entry[parts[0]] = entry[parts[0]] or {}
            return descend(entry, parts[:-1], (section, i), text)
    names = [n for s in ("passes", "export") for e in raw.get(s) or [] if isinstance(e, dict) for n in e]
    if parts[0] not in Document.model_fields:
        near = did_you_mean(parts[0], [*names, *Document.model_fields])
        raise RecipeError(f"--set {text}  the recipe has no '{parts[0]}'{near}")
    return descend(raw, parts[:-1], (), text)


def descend(target: Any, parts: list[str], loc: Loc, text: str) -> tuple[dict[str, Any], Loc]:
    for part in parts:
        target = target.setdefault(part, {})
        loc = (*loc, part)
        if not isinstance(target, dict):
            raise RecipeError(f"--set {text}  '{part}' holds no options")
    return target, loc


def schema(passes: Table, exports: Table) -> dict[str, Any]:
    """The JSON schema of a recipe, from the classes."""
    top = Document.model_json_schema()
    defs = top.setdefault("$defs", {})
    for section, table in (("passes", passes), ("export", exports)):
        choices = []
        for name, cls in table.items():
            inner = cls.model_json_schema()
            defs |= inner.pop("$defs", {})
            choices.append({"type": "object", "properties": {name: inner}, "required": [name], "additionalProperties": False})
        top["properties"][section]["items"] = {"anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **top}
