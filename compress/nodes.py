"""YAML in which every value knows its line and column, read within limits.

The text is composed into nodes and turned into plain values here, so that whatever a YAML library would raise, recurse into or
expand without end is a located error instead. Limits hold before anything is built: of bytes, of depth, and of nodes with
aliases counted as often as they are used (a few lines of aliases of aliases would else fill any memory).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress.documents import one_line, read_bytes
from compress.errors import CompressError, RecipeError

Loc = tuple[str | int, ...]
MOST_BYTES, MOST_NODES, MOST_DEPTH, MOST_DIGITS = 4_000_000, 200_000, 50, 100
HINTS = {
    r"character '\t' that cannot start": "; indent with spaces, YAML allows no tabs",
    "mapping values are not allowed": "; put a text that holds ': ' in quotes",
    "another document": "; a recipe is one document",
}
VALUES = ("str", "int", "float", "bool", "null", "timestamp")
TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """Composes nodes within the limits; `yaml.MarkedYAMLError` at the node that passes one."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.count = 0
        self.sizes: dict[int, int] = {}  # nodes below each node, aliases expanded
        self.open: list[int] = [0]  # of the nodes being composed: how many lie below so far

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        alias = self.check_event(yaml.AliasEvent)
        if len(self.open) > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"is nested deeper than {MOST_DEPTH} levels", problem_mark=mark)
        self.open.append(1)
        node: yaml.Node | None = super().compose_node(parent, index)
        below = self.open.pop()
        if alias:
            if id(node) not in self.sizes:
                raise yaml.MarkedYAMLError(problem="is nested without end: an alias of what it stands in", problem_mark=mark)
            below = self.sizes[id(node)]
        else:
            self.sizes[id(node)] = below
        self.open[-1] += below
        if sum(self.open) > MOST_NODES:
            raise yaml.MarkedYAMLError(problem=f"holds more than {MOST_NODES:,} values, aliases expanded", problem_mark=mark)
        return node


def load_yaml(path: Path, error: type[CompressError] = RecipeError, places: dict[Loc, str] | None = None) -> Any:
    """The value of a YAML file; `places` learns where each part stands. An `error`, located, where it cannot be read."""
    data = read_bytes(path, MOST_BYTES, error)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line, column = data.count(b"\n", 0, e.start) + 1, e.start - data.rfind(b"\n", 0, e.start)
        raise error(f"{path}:{line}:{column}  is no UTF-8 text") from None
    return parse_yaml(text, path, error, {} if places is None else places)


def parse_yaml(text: str, path: Path, error: type[CompressError], places: dict[Loc, str]) -> Any:
    """As `load_yaml`, of a text; None where it holds nothing."""
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        return plain(node, (), places, path) if node else None
    except yaml.MarkedYAMLError as e:
        raise error(f"{spot(path, e.problem_mark or e.context_mark)}  {problem(e)}") from None
    except yaml.reader.ReaderError as e:
        line, column = text.count("\n", 0, e.position) + 1, e.position - text.rfind("\n", 0, e.position)
        raise error(f"{path}:{line}:{column}  is no YAML (the character U+{ord(text[e.position]):04X} is not allowed)") from None
    except (yaml.YAMLError, RecursionError, ValueError) as e:  # of the library itself: \U00FFFFFF, %YAML 999…9
        raise error(f"{spot(path, loader and loader.get_mark())}  is no YAML ({one_line(str(e))})") from None


def spot(path: Path, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)


def problem(e: yaml.MarkedYAMLError) -> str:
    """What the YAML parser says, with where the construct began and what to do, if we know."""
    text = one_line(e.problem or "is no YAML", 400)
    if e.context and e.context_mark and e.problem_mark and e.context_mark.line != e.problem_mark.line:
        text += f", {one_line(e.context)} from line {e.context_mark.line + 1} on"
    return text + next((hint for part, hint in HINTS.items() if part in text), "")


def wrong(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def plain(node: yaml.Node, loc: Loc, places: dict[Loc, str], path: Path) -> Any:
    """A YAML node as plain values; notes where each one stands. A key given twice is a mistake."""
    places[loc] = spot(path, node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return scalar(node)
    if node.tag != TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map"):
        raise wrong(node, f"'{one_line(node.tag.removeprefix(TAG), 40)}' is no tag for a list or mapping here; leave it out")
    if isinstance(node, yaml.SequenceNode):
        return [plain(child, (*loc, i), places, path) for i, child in enumerate(node.value)]
    out: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
            raise wrong(key_node, "a key is a word; lists, mappings and '<<' are none")
        key = scalar(key_node)
        if key in out:
            raise wrong(key_node, f"'{one_line(str(key), 80)}' is given twice; keep one")
        out[key] = plain(value_node, (*loc, key), places, path)
        places[(*loc, key)] = spot(path, key_node.start_mark)
    return out


def scalar(node: yaml.ScalarNode) -> Any:
    """A single value: text, number, true or false, nothing, or a date."""
    kind = node.tag.removeprefix(TAG)
    if kind not in VALUES:
        raise wrong(node, f"could not determine a constructor for the tag '{one_line(node.tag, 80)}'")
    if kind != "str" and len(node.value) > MOST_DIGITS:
        raise wrong(node, f"a number has at most {MOST_DIGITS} characters; put a text in quotes")
    if kind == "str":
        return whole(node)
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except ValueError as e:  # such as the 40th of May
        raise wrong(node, f"'{one_line(node.value, 80)}': {one_line(str(e))}; put it in quotes") from None
    except Exception:  # the library looks before it leaps only where it chose the tag itself: !!bool foo, !!int ""
        raise wrong(node, f"'{one_line(node.value, 80)}' is no {kind}; leave the tag out") from None


def whole(node: yaml.ScalarNode) -> str:
    """A text without NUL, its characters whole: JSON writes an emoji as two escapes, which YAML takes for two characters."""
    text: str = node.value
    if "\0" in text:  # no path can hold one
        raise wrong(node, "a text holds a NUL character")
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise wrong(node, "a text holds half a character (a lone surrogate)") from None
