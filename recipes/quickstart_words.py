"""The words, the little grammar and the dice of the quickstart text.  All word lists are our own.

`Dice` draws from `random.random()` alone, the one generator whose sequence Python promises to keep for a seed, so the
text does not change with the version of Python.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SHE = "Ada Bela Clara Dina Elsa Flora Greta Hana Ines Juna Kira Lila Mira Nora Olga Petra Rosa Suri Tessa Vera".split()
HE = ("Abel Boris Carlo Davi Emil Felix Gusto Hugo Ivan Jonas Karl Leo Milo Niko Oskar Pablo Rafi Simon Tomas Viktor").split()
NAMES = SHE + HE
TRADES = "baker potter gardener sailor tailor painter teacher fisher carpenter weaver farmer clockmaker beekeeper".split()
PETS = "cat dog goat parrot rabbit hedgehog donkey turtle goose pony".split()
PET_NAMES = "Pip Button Biscuit Pepper Clover Moss Tinker Dot Waffle Acorn Bramble Pickle".split()
COLOURS = "red blue green yellow white black orange purple grey brown".split()
LOOKS = "small round shiny old heavy copper wooden silver painted striped tiny golden".split()
THINGS = "lantern kettle drum kite whistle basket compass umbrella violin mirror spoon teapot ladder bell hat key".split()
SPOTS = [
    "under the bridge",
    "behind the mill",
    "in the hollow tree",
    "below the stairs",
    "beside the well",
    "on the roof",
    "inside the clock",
    "near the harbour",
    "in the barn",
    "between two rocks",
    "under a pile of leaves",
    "behind the bakery",
]
PLACES = "harbour mill forest market library island meadow lighthouse village castle valley orchard".split()
FOODS = "plum apple pear nut cherry carrot bun pancake dumpling turnip lemon fig".split()
GOODS = (
    "bread butter honey milk salt rice tea flour cheese soap candles string paper pepper beans oats jam ink nails wool"
).split()
FLOCK = "duck crow sheep frog snail bee lamb goat swan fox owl hen".split()
WEATHER = "sunny rainy windy foggy snowy cloudy".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = ["morning", "afternoon", "evening", "night"]
MOODS = "happy proud tired curious calm hungry sleepy brave".split()
TURNS = {"north": "south", "south": "north", "east": "west", "west": "east"}
COUNT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()


class Dice:
    """A seeded source of choices that gives the same sequence on every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[self.between(0, len(items) - 1)]

    def some(self, items: Sequence[T], n: int) -> list[T]:
        """n different items, in random order."""
        rest = list(items)
        return [rest.pop(self.between(0, len(rest) - 1)) for _ in range(n)]

    def chance(self, p: float) -> bool:
        return self._random() < p


def he(name: str) -> str:
    return "she" if name in SHE else "he"


def his(name: str) -> str:
    return "her" if name in SHE else "his"


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def many(n: int, noun: str) -> str:
    """`many(3, "cherry")` is "three cherries"; it knows the nouns of this file only."""
    return f"{COUNT[n]} {plural(noun) if n != 1 else noun}"


def plural(noun: str) -> str:
    if noun == "sheep":
        return noun
    if noun.endswith("x"):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("rry") else noun + "s"


def series(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
