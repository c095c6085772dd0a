"""The documents of the quickstart text that are told: stories with questions, letters, swaps, chains, comparisons."""

from itertools import pairwise

from quickstart_words import (
    COLOURS,
    COUNT,
    DAYS,
    FLOCK,
    FOODS,
    LOOKS,
    MOODS,
    NAMES,
    PET_NAMES,
    PETS,
    PLACES,
    SPOTS,
    THINGS,
    TIMES,
    TRADES,
    WEATHER,
    Dice,
    a,
    he,
    his,
    many,
    plural,
    series,
)

Fact = tuple[str, str]  # a question and its answer
Scene = tuple[str, list[Fact]]


def story(d: Dice) -> str:
    hero, friend = d.some(NAMES, 2)
    scenes = [opening, *d.some([hide, share, wander, lend, feed], d.between(2, 4)), ending]
    told = [scene(d, hero, friend) for scene in scenes]
    facts = [fact for _, more in told for fact in more]
    asked = d.some(facts, d.between(2, 4))
    return "\n".join([line for line, _ in told] + [f"Question: {ask}\nAnswer: {answer}." for ask, answer in asked])


def opening(d: Dice, hero: str, friend: str) -> Scene:
    trade, other = d.some(TRADES, 2)
    place, pet, called, colour = (d.pick(x) for x in (PLACES, PETS, PET_NAMES, COLOURS))
    start = d.pick(["Once there was", "Long ago there lived", "Far away there was"])
    line = (
        f"{start} {a(trade)} called {hero}. {he(hero).title()} had {a(colour)} house near the {place}, {a(pet)} "
        f"named {called}, and a good friend, {friend} the {other}."
    )
    return line, [
        (f"What was the {pet} called?", called),
        (f"Who was the {trade}?", hero),
        (f"Who was the {other}?", friend),
        (f"What colour was the house of {hero}?", colour),
        (f"What kind of animal was {called}?", a(pet)),
    ]


def ending(d: Dice, hero: str, friend: str) -> Scene:
    mood = d.pick(MOODS)
    return f"In the end {hero} was {mood}, and so was {friend}.", [(f"How was {hero} in the end?", mood)]


def hide(d: Dice, hero: str, friend: str) -> Scene:
    thing, spot, time = f"{d.pick(LOOKS)} {d.pick(THINGS)}", d.pick(SPOTS), d.pick(TIMES)
    line = (
        f"One {time} {hero} hid {a(thing)} {spot}. {friend} looked for the {thing} all day, but nobody had seen it. "
        f"At last {he(friend)} looked {spot}, and there it was, the {thing}!"
    )
    return line, [
        (f"Where was the {thing}?", spot),
        (f"What did {hero} hide?", a(thing)),
        (f"Who found the {thing}?", friend),
    ]


def share(d: Dice, hero: str, friend: str) -> Scene:
    food, had = d.pick(FOODS), d.between(3, 12)
    gave = d.between(1, had - 1)
    line = (
        f"{hero} had {many(had, food)} in {his(hero)} bag. {he(hero).title()} gave {COUNT[gave]} of them to {friend}, "
        f"and then {hero} had {many(had - gave, food)} left."
    )
    return line, [
        (f"How many {plural(food)} did {hero} have left?", COUNT[had - gave]),
        (f"How many {plural(food)} did {friend} get?", COUNT[gave]),
    ]


def wander(d: Dice, hero: str, friend: str) -> Scene:
    first, second = d.some(PLACES, 2)
    sky = d.pick(WEATHER)
    line = (
        f"It was {a(sky)} day. {hero} and {friend} walked from the {first} to the {second}, and because it was so {sky}"
        f" they soon walked from the {second} back to the {first}."
    )
    return line, [("What was the weather?", sky), ("Where did the walk begin?", f"at the {first}")]


def lend(d: Dice, hero: str, friend: str) -> Scene:
    thing, other = d.some(THINGS, 2)
    line = (
        f'"May I borrow your {thing}?" asked {friend}. "Yes," said {hero}, "if I may borrow your {other}." So {friend} '
        f"took the {thing} and {hero} took the {other}."
    )
    return line, [(f"Who took the {thing}?", friend), (f"Who took the {other}?", hero)]


def feed(d: Dice, hero: str, friend: str) -> Scene:
    beast, food = d.pick(FLOCK), d.pick(FOODS)
    n = d.between(2, 9)
    line = (
        f"By the gate they met {many(n, beast)}. Every {beast} wanted {a(food)}, so {friend} cut {many(n, food)}, "
        f"one for each {beast}, and the {plural(beast)} were glad."
    )
    return line, [
        (f"How many {plural(beast)} were there?", COUNT[n]),
        (f"What did the {plural(beast)} eat?", plural(food)),
    ]


def letter(d: Dice) -> str:
    writer, reader = d.some(NAMES, 2)
    thing, place, day, trade = f"{d.pick(COLOURS)} {d.pick(THINGS)}", d.pick(PLACES), d.pick(DAYS), d.pick(TRADES)
    return (
        f"Dear {reader},\nI am at the {place} with the {trade}. On {day} I lost my {thing}. Have you seen it?\n"
        f"Your friend {writer}\nDear {writer},\nI am sorry that you lost your {thing} on {day}. "
        f"Ask the {trade}, and look once more at the {place}.\nYour friend {reader}"
    )


def swaps(d: Dice) -> str:
    people = d.some(NAMES, 3)
    holds = dict(zip(people, d.some(THINGS, 3), strict=True))
    lines = ["At first " + series([f"{p} has the {holds[p]}" for p in people]) + "."]
    for _ in range(d.between(1, 4)):
        x, y = d.some(people, 2)
        holds[x], holds[y] = holds[y], holds[x]
        lines.append(f"{x} and {y} swap. Now {x} has the {holds[x]} and {y} has the {holds[y]}.")
    return "\n".join([*lines, "At last " + series([f"{p} has the {holds[p]}" for p in people]) + "."])


def chain(d: Dice) -> str:
    beasts = d.some(FLOCK + PETS, d.between(3, 6))
    past = d.pick(["woke", "followed", "chased", "greeted"])
    lines, tail = [], f"the {beasts[0]}"
    for first, second in pairwise(beasts):
        tail = f"the {second} that {past} {tail}"
        lines.append(f"The {second} {past} the {first}. This is {tail}.")
    return "\n".join(lines)


def ages(d: Dice) -> str:
    people = d.some(NAMES, d.between(3, 5))
    more, most, least = d.pick(
        [("older", "oldest", "youngest"), ("taller", "tallest", "shortest"), ("faster", "fastest", "slowest")]
    )
    lines = [f"{x} is {more} than {y}." for x, y in pairwise(people)]
    x, y = sorted(d.some(range(len(people)), 2))
    return " ".join(lines) + (
        f" So {people[x]} is {more} than {people[y]}.\nThe {most} is {people[0]}. "
        f"The {least} is {people[-1]}. In order: {series(people)}."
    )
