"""Patterns of names that come out of a file, such as the targets of a quantization config: matched in linear time, or refused.

A stranger's regular expression can keep `re` busy for ever. Tools write few forms of them: literal text, escaped dots, ``.*``,
``\\d+``, classes such as ``[0-9]``, alternatives such as ``(q_proj|k_proj)``, the anchors. These are taken apart here and matched
by the set of all places that a beginning of the pattern reaches, which takes time in proportion to the name. All else is a
ModelError: what is repeated beyond a single character, looked around for or referred back to. Engines give a pattern that passes
to `re`, which goes back over every choice; so the choices are counted (`weight`), and there may be few.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, pairwise

from compress.errors import ModelError

MOST_TEXT, MOST_WEIGHT, MOST_WAYS = 20_000, 4, 64
DOT = "\0"  # a dot that is a dot, in `One.text`
CLASSES: dict[str, Callable[[str], bool]] = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace}


@dataclass(frozen=True)
class One:
    """One character of a kind; `least` times at least, and at most once unless `many`. text: the character, or "." for any."""

    fits: Callable[[str], bool]
    text: str = ""
    least: int = 1
    many: bool = False

    def reach(self, name: str, places: set[int]) -> set[int]:
        found = set() if self.least else set(places)
        for place in sorted(places):
            end = place
            while end < len(name) and self.fits(name[end]) and (self.many or end == place):
                end += 1
                if end in found and self.many:  # another place has gone on from here
                    break
                found.add(end)
        return found


@dataclass(frozen=True)
class Either:
    """One of several sequences; or, where `least` is 0, none. whole: whether it is the whole pattern."""

    ways: tuple[tuple[Part, ...], ...]
    least: int = 1
    whole: bool = False

    @cached_property
    def texts(self) -> list[str] | None:
        """The ways where all are text alone, "." being any character."""
        plain = all(isinstance(part, One) and part.text and part.least and not part.many for way in self.ways for part in way)
        return ["".join(part.text for part in way if isinstance(part, One)) for way in self.ways] if plain else None

    def reach(self, name: str, places: set[int]) -> set[int]:
        found = set() if self.least else set(places)
        if self.texts and not any("." in text for text in self.texts):  # a literal dot has a text of its own, see DOT
            whole = [text.replace(DOT, ".") for text in self.texts]
            return found | {p + len(text) for p in places for text in whole if name.startswith(text, p)}
        return found.union(*(reached(way, name, places) for way in self.ways))


@dataclass(frozen=True)
class Edge:
    """The beginning of a name, or its end."""

    last: bool

    def reach(self, name: str, places: set[int]) -> set[int]:
        return places & {len(name) if self.last else 0}


Part = One | Either | Edge


def reached(parts: tuple[Part, ...], name: str, places: set[int]) -> set[int]:
    for part in parts:
        places = part.reach(name, places) if places else places
    return places


def matches(pattern: str, name: str) -> bool:
    """Whether the beginning of a name is as the pattern says, as `re.match` has it; ModelError for a pattern that is refused."""
    return bool(reached(parsed(pattern), name, {0}))


@lru_cache(maxsize=1000)
def parsed(pattern: str) -> tuple[Part, ...]:
    """The parts of a pattern; ModelError for one that is refused."""
    said = f"'{re.sub(r'[^ -~]', '?', pattern)[:60]}' is no pattern that is read"
    if len(pattern) > MOST_TEXT:
        raise ModelError(f"{said}: it has {len(pattern):,} characters, and {MOST_TEXT:,} are the most")
    reader = Reader(pattern)
    try:
        parts = tuple(reader.sequence(whole=True))
        if reader.rest:
            raise ValueError("it has a ')' too many")
        if weight(parts) > MOST_WEIGHT:
            raise ValueError("it leaves too much open")
    except (ValueError, IndexError, RecursionError) as e:
        raise ModelError(f"{said} ({e or type(e).__name__}); name the modules one by one") from None
    return parts


def weight(parts: tuple[Part, ...]) -> float:
    """How much a pattern leaves open to be tried: what may repeat beyond a name's part counts 1, other choices half."""
    return sum(weight_of(part) for part in parts)


def weight_of(part: Part) -> float:
    if isinstance(part, One):
        return (1 if part.fits(".") else 0.5) if part.many else 0.5 * (1 - part.least)
    if isinstance(part, Edge):
        return 0
    if len(part.ways) == 1 or part.whole:
        return max(map(weight, part.ways)) + 0.5 * (1 - part.least)
    if part.texts is None:
        raise ValueError("it chooses between more than plain texts")
    return clash(part.texts) + 0.5 * (1 - part.least)


def clash(texts: list[str]) -> float:
    """Of alternatives, 0 where at most one can fit at any place."""
    if len(set(texts)) < len(texts):
        raise ValueError("it offers the same text twice")
    if not any("." in text for text in texts):
        ordered = sorted(texts)
        return 0.5 * any(after.startswith(text) for text, after in pairwise(ordered))
    if len(texts) > MOST_WAYS:
        raise ValueError(f"it has more than {MOST_WAYS} alternatives with open places")
    return float(any(all(x == y or "." in (x, y) for x, y in zip(a, b, strict=False)) for a, b in combinations(texts, 2)))


class Reader:
    """Takes a pattern apart, from left to right; ValueError or IndexError for what is none of the forms."""

    def __init__(self, rest: str):
        self.rest = rest

    def take(self) -> str:
        first, self.rest = self.rest[0], self.rest[1:]
        return first

    def sequence(self, whole: bool = False) -> Iterator[Part]:
        """Parts until a group, or the pattern, ends. Alternatives are one part."""
        ways: list[list[Part]] = [[]]
        while self.rest and self.rest[0] != ")":
            if self.rest[0] == "|":
                self.take()
                ways.append([])
            else:
                ways[-1].append(self.part())
        yield from ways[0] if len(ways) == 1 else [Either(tuple(map(tuple, ways)), whole=whole)]

    def part(self) -> Part:
        first = self.take()
        if first in "^$":
            return Edge(first == "$")
        if first == "(":
            return self.group()
        if first in "*+?{}":
            raise ValueError(f"'{first}' has nothing before it that can be repeated")
        if first == "[":
            return self.counted(self.klass(), "")
        if first == "\\":
            escaped = self.rest[0]
            return self.counted(self.escaped(), "" if escaped in CLASSES else DOT if escaped == "." else escaped)
        return self.counted(any_of(first), first)

    def counted(self, fits: Callable[[str], bool], text: str) -> One:
        if not self.rest or self.rest[0] not in "*+?{":
            return One(fits, text)
        sign = self.take()
        if sign != "?" and self.rest.startswith("?"):  # as few as will do: the same names
            self.take()
        if sign == "{" or (self.rest and self.rest[0] in "*+?"):
            raise ValueError("it counts in a way that is not known here")
        return One(fits, text, int(sign == "+"), sign != "?")

    def group(self) -> Either:
        if self.rest.startswith("?:"):
            self.rest = self.rest[2:]
        elif self.rest.startswith("?"):
            raise ValueError("it looks around, or names a group")
        inner = tuple(self.sequence())
        if not self.rest or self.take() != ")":
            raise ValueError("a group has no end")
        optional = self.rest.startswith("?")
        self.rest = self.rest[optional:]
        if self.rest and self.rest[0] in "*+?{":
            raise ValueError("it repeats a group")
        return Either((inner,), int(not optional))

    def escaped(self) -> Callable[[str], bool]:
        kind = self.take()
        if kind in CLASSES:
            return CLASSES[kind]
        if kind.isalnum():
            raise ValueError(f"'\\{kind}' is not known here")
        return kind.__eq__

    def klass(self) -> Callable[[str], bool]:
        """A class of characters in brackets."""
        negated = self.rest.startswith("^")
        self.rest = self.rest[negated:]
        tests: list[Callable[[str], bool]] = []
        while not tests or self.rest[0] != "]":
            first = self.take()
            if first == "\\":
                tests.append(self.escaped())
            elif self.rest[0] == "-" and self.rest[1] != "]":
                self.take()
                tests.append(between(first, self.take()))
            else:
                tests.append(first.__eq__)
        self.take()
        return lambda c: any(test(c) for test in tests) != negated


def any_of(character: str) -> Callable[[str], bool]:
    return (lambda c: c != "\n") if character == "." else character.__eq__


def between(first: str, last: str) -> Callable[[str], bool]:
    if first == "[" or "\\" in (first, last):
        raise ValueError("a class of characters is not known here")
    return lambda c: first <= c <= last
