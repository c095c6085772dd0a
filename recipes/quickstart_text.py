"""The text on which the quickstart model is trained, calibrated and measured: stories, sums, lists, tables, journeys.

`text(seed, size)` is a pure function, so the committed text files can be made again to the byte.  Every word comes from
the lists of `quickstart_words.py`; nothing is read from anywhere else.  The documents are small worlds with a memory:
a name, an object or a number that appears early decides a word much later (an answer, a way back, a list in reverse).
A model that only counts words cannot guess those places, a trained one can, and a badly rounded one loses them first.

A document is one function `Dice -> str`, listed in `KINDS` with its weight.  A document holds no empty line; documents
are separated by one.
"""

from collections.abc import Callable

from quickstart_stories import ages, chain, letter, story, swaps
from quickstart_words import (
    COLOURS,
    COUNT,
    DAYS,
    FLOCK,
    FOODS,
    GOODS,
    MOODS,
    NAMES,
    PETS,
    PLACES,
    SPOTS,
    THINGS,
    TURNS,
    WEATHER,
    Dice,
    a,
    many,
    plural,
    series,
)

Kind = Callable[[Dice], str]

# --- lists and tables ----------------------------------------------------------------------------------------------


def shopping(d: Dice) -> str:
    who, goods = d.pick(NAMES), d.some(GOODS, d.between(3, 8))
    lines = [f"Shopping list of {who}", *(f"- {x}" for x in goods)]
    lines.append(f"{who} bought {series(goods)}. That makes {COUNT[len(goods)]} things.")
    if d.chance(0.7):
        lines.append(f"Backwards: {series(goods[::-1])}.")
    if d.chance(0.5):
        at = d.between(1, len(goods) - 1)
        lines.append(f"After {goods[at - 1]} comes {goods[at]}.")
    if d.chance(0.5):
        lines.append(f"The first is {goods[0]} and the last is {goods[-1]}.")
    return "\n".join(lines)


def table(d: Dice) -> str:
    people = d.some(NAMES, d.between(3, 5))
    rows = [(p, d.pick(PETS), d.pick(COLOURS), d.between(1, 9)) for p in people]
    lines = ["| name | pet | colour | cups |", *("| " + " | ".join(map(str, row)) + " |" for row in rows)]
    lines += [f"{p} has {a(pet)} and {many(cups, f'{colour} cup')}." for p, pet, colour, cups in d.some(rows, len(rows))]
    top = max(cups for *_, cups in rows)
    return "\n".join([*lines, "Most cups: " + series([p for p, *_, cups in rows if cups == top]) + "."])


def diary(d: Dice) -> str:
    skies = [d.pick(WEATHER[:4]) for _ in DAYS]
    lines = [f"{day}: {sky}" for day, sky in zip(DAYS, skies, strict=True)]
    for sky in d.some(sorted(set(skies)), min(2, len(set(skies)))):
        days = [day for day, s in zip(DAYS, skies, strict=True) if s == sky]
        lines.append(f"It was {sky} on {series(days)}. {sky.title()} days: {len(days)}.")
    return "\n".join([f"Weather at the {d.pick(PLACES)}", *lines])


def journey(d: Dice) -> str:
    stops = d.some(PLACES, d.between(3, 6))
    steps = [(d.pick(list(TURNS)), d.between(1, 9)) for _ in stops[1:]]
    there = [f"Go {n} {turn} to the {stop}." for (turn, n), stop in zip(steps, stops[1:], strict=True)]
    back = [f"Go {n} {TURNS[turn]} to the {stop}." for (turn, n), stop in zip(steps, stops, strict=False)][::-1]
    total = sum(n for _, n in steps)
    return "\n".join([f"The way from the {stops[0]}", *there, "The way back", *back, f"Each way is {total} miles."])


def dish(d: Dice) -> str:
    name = f"{d.pick(FOODS)} {d.pick(['soup', 'pie', 'salad', 'cake', 'stew'])}"
    n = d.between(2, 4)
    units = d.some(["cups", "spoons", "grams", "bowls", "pots"], n)
    parts = [(d.between(2, 10), unit, x) for unit, x in zip(units, d.some(GOODS[:9], n), strict=True)]
    steps = [f"{d.pick(['Add', 'Stir in', 'Mix in', 'Pour in'])} the {x}." for *_, x in parts]
    twice = [f"{2 * n} {unit} of {x}" for n, unit, x in parts]
    return "\n".join(
        [
            f"How to make {name}",
            *(f"* {n} {unit} of {x}" for n, unit, x in parts),
            " ".join(steps),
            f"For twice as much {name} take {series(twice)}.",
        ]
    )


def spelling(d: Dice) -> str:
    words = d.some(THINGS + PLACES + PETS, d.between(2, 4))
    lines = [f"{word}: {'-'.join(word)}. Backwards: {'-'.join(word[::-1])}. Letters: {len(word)}." for word in words]
    return "\n".join(["Spelling", *lines])


# --- numbers -------------------------------------------------------------------------------------------------------


def sums(d: Dice) -> str:
    lines = []
    for _ in range(d.between(4, 8)):
        x, y = (d.between(0, 10 ** d.pick([1, 1, 2]) - 1) for _ in "xy")
        lines.append(f"{x} + {y} = {x + y}" if d.chance(0.7) else f"{x + y} - {x} = {y}")
    return "\n".join(["Sums", *lines])


def columns(d: Dice) -> str:
    """An addition worked from the right, one column a line, so that each line needs one small step only."""
    x, y = d.between(10, 999), d.between(10, 999)
    lines, carry = [f"{x} + {y}"], 0
    for place, power in (("ones", 1), ("tens", 10), ("hundreds", 100)):
        p, q = x // power % 10, y // power % 10
        total = p + q + carry
        lines.append(f"{place}: {p} + {q} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    return "\n".join([*lines, f"{x} + {y} = {x + y}"])


def counting(d: Dice) -> str:
    beast, start, step, n = d.pick(FLOCK), d.between(0, 20), d.pick([1, 2, 3, 5, 10]), d.between(5, 9)
    line = ", ".join(str(start + step * i) for i in range(n))
    words = d.between(2, 6)
    seen = ", ".join(many(i, beast) for i in range(1, words + 1))
    down = ", ".join(COUNT[i] for i in range(words, -1, -1))
    return f"Count by {step}: {line}.\nI see {seen}. There are {many(words, beast)}.\nDown again: {down}."


def agreement(d: Dice) -> str:
    lines = []
    for _ in range(d.between(3, 5)):
        noun, other, n, mood = d.pick(FLOCK), d.pick(THINGS), d.between(1, 4), d.pick(MOODS)
        which, near = (noun, plural(other)) if n == 1 else (plural(noun), other)
        state = f"is {mood}, and it has" if n == 1 else f"are {mood}, and they have"
        lines.append(f"The {which} {d.pick(SPOTS)} with the {near} {state} {many(n, 'friend')}.")
    return "\n".join(lines)


def prices(d: Dice) -> str:
    who, goods = d.pick(NAMES), d.some(GOODS, d.between(2, 4))
    cost = {x: d.between(1, 9) for x in goods}
    total, lines = 0, [", ".join(f"{x} {cost[x]}" for x in goods)]
    for x in d.some(goods, len(goods)):
        total += cost[x]
        lines.append(f"{who} buys {x} for {cost[x]}, that makes {total}.")
    paid = total + d.between(0, 9)
    return "\n".join(["Prices", *lines, f"{who} pays {paid} and gets {paid - total} back."])


KINDS: list[tuple[Kind, int]] = [
    (story, 8),
    (letter, 2),
    (swaps, 3),
    (chain, 2),
    (ages, 2),
    (shopping, 3),
    (table, 3),
    (diary, 2),
    (journey, 3),
    (dish, 2),
    (spelling, 2),
    (sums, 3),
    (columns, 3),
    (counting, 2),
    (agreement, 2),
    (prices, 2),
]
BAG: list[Kind] = [kind for kind, weight in KINDS for _ in range(weight)]


def documents(seed: int, size: int) -> list[str]:
    """Documents of at least `size` characters together."""
    d, done, out = Dice(seed), 0, []
    while done < size:
        out.append(d.pick(BAG)(d))
        done += len(out[-1]) + 2
    return out


def text(seed: int, size: int) -> str:
    """Documents separated by one empty line, `size` characters or a little more."""
    return "\n\n".join(documents(seed, size)) + "\n"
