"""A recipe: YAML in which every node knows its file, line and column, checked against the classes of passes and exporters.

The tables of passes and exporters are arguments: this module knows no algorithm's name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compress.documents import local_path, one_line
from compress.errors import CompressError, RecipeError, did_you_mean
from compress.manager import Pass
from compress.model.data import Data
from compress.nodes import MOST_DEPTH, Loc, load_yaml, parse_yaml

Classes = Mapping[str, type[BaseModel]]  # of passes or exporters, by name


class Document(BaseModel):
    """What a recipe file may say."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="a local folder, a GGUF file, or a hub id, optionally id@revision")
    out: str | None = Field(None, description="the run folder; default: runs/ beside where you are, named like the recipe")
    seed: int = Field(0, ge=0, description="seed of everything random")
    leave: list[str] = Field([], description="patterns of module paths whose matrices no pass sees, and that stay as they are")
    data: Data = Field(
        Data(calibration=None, training=None, evaluation=None), description="texts to calibrate on, learn from, and evaluate on"
    )
    passes: list[dict[str, Any]] = Field([], description="what to do, in order: a list of {pass: options}")
    export: list[dict[str, Any]] = Field([], description="what to write: a list of {exporter: options}")

    @field_validator("model", "out")
    @classmethod
    def _a_path(cls, named: str | None) -> str | None:
        if named is not None:
            local_path(named)
        return named


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
        named = self.base / Path(self.document.out).expanduser() if self.document.out else Path("runs") / self.path.stem
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

    def resolved(self, base: Path | None = None, out: Path | None = None) -> str:
        """The recipe as YAML with every default written out.

        With `base`, paths are absolute, relative ones counted from it, so that the text means the same wherever it lies; `out` is
        then the run folder, where it is not the recipe's own.
        """
        full = self.document.model_dump(mode="json")
        if base is not None:
            full = anchored(full, base.resolve())
            full["out"] = os.path.abspath(out or self.out)
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
        if isinstance(value, str):
            path = base / Path(value).expanduser()
            if key in ("text", "jsonl") or (key == "model" and path.exists()):
                return os.path.normpath(path)
        return value

    return {k: v if k in ("passes", "export") else walk(v, k) for k, v in full.items()}


def load(path: Path, passes: Classes, exports: Classes, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `overrides` are ``quantize.format=int3:g64`` texts, checked the same way.

    Raises RecipeError with file, line and column.
    """
    places: dict[Loc, str] = {(): f"{path}:1:1"}
    raw = load_yaml(path, RecipeError, places)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}:1:1  a recipe is a mapping: {', '.join(Document.model_fields)}")
    for item in overrides:
        override(raw, item, places)
    return check(path, raw, passes, exports, places)


def check(path: Path, raw: dict[str, Any], passes: Classes, exports: Classes, places: Mapping[Loc, str]) -> Recipe:
    draft = Recipe(path, Document(model=""), (), (), places)
    document: Document = validated(Document, raw, (), "a recipe", draft)
    chosen = [item(passes, entry, ("passes", i), "pass", draft) for i, entry in enumerate(document.passes)]
    written = [item(exports, entry, ("export", i), "exporter", draft) for i, entry in enumerate(document.export)]
    names = [e.name for e in written]
    for i, name in enumerate(names):
        if name in names[:i]:  # both would write the same folder
            raise RecipeError(f"{draft.place(('export', i, name))}  exporter '{name}' is given twice; keep one")
    return Recipe(path, document, tuple(chosen), tuple(written), places)


def item(classes: Classes, entry: dict[str, Any], loc: Loc, kind: str, draft: Recipe) -> Any:
    """One ``{name: options}`` of a list, as an instance of its class."""
    if len(entry) != 1:
        names = ", ".join(map(str, entry)) or "nothing"
        raise RecipeError(f"{draft.place(loc)}  each item names one {kind}; this one holds {names}")
    name, options = next(iter(entry.items()))
    if name not in classes:
        known = ", ".join(classes)
        raise RecipeError(f"{draft.place((*loc, name))}  no {kind} '{name}'{did_you_mean(str(name), classes)}   known: {known}")
    if options is not None and not isinstance(options, dict):
        raise RecipeError(f"{draft.place((*loc, name))}  the options of '{name}' are a mapping, not {describe(options)}")
    return validated(classes[name], options or {}, (*loc, name), f"{kind} '{name}'", draft)


def validated(cls: type[BaseModel], raw: dict[str, Any], loc: Loc, what: str, draft: Recipe) -> Any:
    """An instance of `cls`; the first thing that pydantic dislikes becomes a RecipeError in our words."""
    try:
        return cls.model_validate(raw, context={"base": draft.base})
    except ValidationError as e:
        errors: list[dict[str, Any]] = [{**error, "loc": untagged(error["loc"])} for error in e.errors(include_url=False)]
        first, alike = errors[0], [error for error in errors if error["loc"] == errors[0]["loc"]]
        raise RecipeError(f"{draft.place((*loc, *first['loc']))}  {explain(first, cls, what, alike)}") from None


def untagged(loc: Loc) -> Loc:
    """A location without the type that pydantic tried, where an option may have several."""
    return loc[:-1] if len(loc) > 1 and re.fullmatch(r"(str|int|float|bool|(tuple|list|dict)\[.*\])", str(loc[-1])) else loc


WANTED = {"int": "a whole number", "float": "a number", "string": "text", "bool": "true or false", "list": "a list",
          "tuple": "a list", "dict": "a mapping", "model": "a mapping"}  # fmt: skip


def explain(error: Any, cls: type[BaseModel], what: str, alike: Sequence[Any] = ()) -> str:
    """What pydantic dislikes about one value, in our words: where, what, and what would be right. alike: the same of all types
    that the value could have."""
    kind, loc, given = str(error["type"]), error["loc"], error["input"]
    if kind == "invalid_key" or loc[-1:] == ("[key]",):
        return f"a key is text, not {describe(given)}; put it in quotes"
    name = label(loc)
    if kind == "extra_forbidden":
        owner = owner_of(cls, loc[:-1])
        known = list(owner.model_fields)
        holder = what if owner is cls else label(loc[:-1])
        return f"{holder} has no option '{loc[-1]}'{did_you_mean(str(loc[-1]), known)}   options: {', '.join(known)}"
    if kind == "missing":
        return f"{what} needs {name}: {owner_of(cls, loc[:-1]).model_fields[loc[-1]].description}"
    if kind == "value_error":
        return f"{name}: {error['ctx']['error']}" if loc else str(error["ctx"]["error"])
    if kind == "literal_error":
        near = did_you_mean(str(given), re.findall("'([^']*)'", error["ctx"]["expected"]))
        return f"{name} is {error['ctx']['expected']}, not {describe(given)}{near}"
    if loc[:1] in (("passes",), ("export",)) and len(loc) == 2:
        return f"{name} is written 'NAME: {{OPTION: VALUE}}'" + (f", here '{given}: {{}}'" if isinstance(given, str) else "")
    wanted = list(dict.fromkeys(filter(None, (wanted_of(str(other["type"])) for other in alike or [error]))))
    text = f"needs {' or '.join(wanted)}" if wanted_of(kind) else error["msg"].replace("Input should be", "must be")
    return f"{name} {text}, not {describe(given)}"


def wanted_of(kind: str) -> str | None:
    """What a value should have been, by the kind of pydantic's error."""
    return WANTED.get(kind.partition("_")[0]) if kind.endswith(("_type", "_parsing", "_from_float")) else None


def label(loc: Sequence[Any]) -> str:
    """A location's last part, for people: an option by its name, an item of a list by its number."""
    if loc and isinstance(loc[-1], int):
        return f"item {loc[-1] + 1} of '{loc[-2]}'"
    return f"'{loc[-1]}'" if loc else ""


def owner_of(cls: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The model class that a location inside `cls` lies in."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        for inner in [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                cls = inner
    return cls


def describe(value: Any) -> str:
    """A value for a message: in quotes, on one line, and no longer than a line."""
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value)) or f"'{one_line(str(value), 100)}'"


# --- overrides --------------------------------------------------------------------------------------------------------


def override(raw: dict[str, Any], text: str, places: dict[Loc, str]) -> None:
    """Apply ``a.b=value``: a pass or exporter by name, or a path from the top of the recipe."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise RecipeError(f"--set {text}  is not NAME.OPTION=VALUE")
    if path.count(".") > MOST_DEPTH:
        raise RecipeError(f"--set {path[:40]}…  names an option more than {MOST_DEPTH} levels deep")
    target, loc = find(raw, path, text, places)
    try:
        target[loc[-1]] = parse_yaml(value, Path(), RecipeError, {})
    except RecipeError:
        raise RecipeError(f"--set {text}  the value is no YAML") from None
    for old in [place for place in places if place[: len(loc)] == loc]:
        del places[old]
    places[loc] = f"--set {path}"


def find(raw: dict[str, Any], path: str, text: str, places: dict[Loc, str]) -> tuple[dict[Any, Any], Loc]:
    """The mapping that an override writes into, and the location of what it writes."""
    name = path.partition(".")[0]
    items = [(s, i, e) for s in ("passes", "export") for i, e in enumerate(listed(raw.get(s))) if isinstance(e, dict)]
    hits = [(section, i, entry) for section, i, entry in items if name in entry]
    if len(hits) > 1:
        raise RecipeError(f"--set {text}  the recipe has {len(hits)} '{name}'; change the recipe instead")
    if hits:
        parts = path.split(".", 2)  # what follows the option is one key: a pattern holds dots
        if len(parts) == 1:
            raise RecipeError(f"--set {text}  name an option of '{name}': {name}.OPTION=VALUE")
        section, i, entry = hits[0]
        entry[name] = {} if entry[name] is None else entry[name]
        return descend(entry, parts, (section, i), text, places)
    if name not in Document.model_fields:
        near = did_you_mean(name, [*(n for _, _, e in items for n in map(str, e)), *Document.model_fields])
        raise RecipeError(f"--set {text}  the recipe has no '{name}'{near}")
    return descend(raw, path.split("."), (), text, places)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def descend(target: Any, parts: list[str], loc: Loc, text: str, places: dict[Loc, str]) -> tuple[dict[Any, Any], Loc]:
    """Walk to the mapping that holds the last part, making those that are not there."""
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target, loc = target[part], (*loc, part)
        places.setdefault(loc, f"--set {text.partition('=')[0]}")
        if not isinstance(target, dict):
            name = "; name one of its entries: NAME.OPTION=VALUE" if isinstance(target, list) else ""
            raise RecipeError(f"--set {text}  '{part}' holds no options{name}")
    return target, (*loc, parts[-1])


def schema(passes: Classes, exports: Classes) -> dict[str, Any]:
    """The JSON schema of a recipe, from the classes."""
    top = Document.model_json_schema()
    defs = top.setdefault("$defs", {})
    for section, classes in (("passes", passes), ("export", exports)):
        choices = []
        for name, cls in classes.items():
            inner = cls.model_json_schema()
            defs |= inner.pop("$defs", {})
            choices.append({"type": "object", "properties": {name: inner}, "required": [name], "additionalProperties": False})
        top["properties"][section]["items"] = {"anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **top}
