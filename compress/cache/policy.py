"""A policy of the KV cache: for every KV head its rule, its share of the tokens, and what its entries are stored in.

As JSON, which `kv_policy.json` of an artifact is:

    version   1, and 2 where there is a ladder; a reader refuses a newer one
    context   tokens that `bytes` and the budget count
    bytes     what the entries take after so many tokens; `full`, what a plain cache takes
    marked    ids of special tokens and punctuation, where a rule asks for them
    layers    number, width of a head, sliding window or null, and the units in order: [rule, share, dtype]
    ladder    where heads take their rules by the prompt (ladder.py): recovery, T; frequent and local, shares; special, ids of
              special tokens; prompts, least, mean and most bytes that were measured. `bytes` is then that mean, and each unit is
              ["fastgen", 1, dtype]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compress.cache import rules
from compress.cache.ladder import Ladder
from compress.cache.rules import DTYPES, FASTGEN, MARKS, RULES, RUNGS, SPECIAL, count, entry_bytes, resident
from compress.errors import ModelError

FILE, VERSION = "kv_policy.json", 2
SERVED = "cache"  # where `State.serving` has it
DECLARED = "kv_policy"  # what a config's `quantization_config` then says is true


@dataclass(frozen=True)
class Unit:
    """What one KV head keeps: `share` in thousandths of the tokens seen; of a ladder, what it keeps at most."""

    rule: str
    share: int
    dtype: str

    def nbytes(self, tokens: int, width: int, sliding: int | None) -> int:
        return count(self.share, tokens, sliding) * entry_bytes(self.dtype, self.rule, width)


@dataclass(frozen=True)
class Layer:
    """The units of a layer, in the order of its KV heads. width: of a key. sliding: the layer's window, or None."""

    index: int
    width: int
    sliding: int | None
    units: tuple[Unit, ...]

    def nbytes(self, tokens: int) -> int:
        return sum(unit.nbytes(tokens, self.width, self.sliding) for unit in self.units)


@dataclass(frozen=True)
class Policy:
    """Of all layers that have a cache. marked: ids of special tokens and punctuation. context: tokens that its budget counts.
    ladder: where heads take their rules by the prompt; all units are then `FASTGEN`."""

    layers: tuple[Layer, ...]
    marked: tuple[int, ...]
    context: int
    full: int
    ladder: Ladder | None = None

    def nbytes(self, tokens: int) -> int:
        """Bytes of all entries of one row after a prompt of so many tokens, exactly; with a ladder, at most."""
        return sum(layer.nbytes(tokens) for layer in self.layers)

    @property
    def bytes(self) -> int:
        """The same at `context` tokens; with a ladder, the mean of what was measured."""
        return self.ladder.prompts[1] if self.ladder else self.nbytes(self.context)

    @property
    def marks(self) -> bool:
        """Whether a rule asks which token is which."""
        return any(unit.rule in MARKS for layer in self.layers for unit in layer.units)

    def kinds(self, ids: Tensor) -> Tensor:
        """Of tokens, which are special and which are punctuation, uint8: see `rules.PUNCTUATION`. Without a ladder special ones
        count as punctuation."""
        marked, special = (torch.tensor(x, dtype=ids.dtype, device=ids.device)
                           for x in (self.marked, self.ladder.special if self.ladder else ()))  # fmt: skip
        return torch.isin(ids, marked).byte().masked_fill_(torch.isin(ids, special), SPECIAL)

    def after_prompt(
        self, layer: Layer, unit: Unit, tokens: int, place_n: Tensor, seen: int, first: int, found: Mapping[str, Tensor],
        kind_t: Tensor | None, told: str | None = None,
    ) -> tuple[Unit, Tensor]:  # fmt: skip
        """What a unit keeps of a prompt of so many tokens: the unit, with the rule that it has from here on, and the places.
        place [N]: those that are there; the text starts at `first`. found: see `rules.scores`; kind [T]: see `kinds`; told: see
        `Ladder.chosen`."""
        if self.ladder is None:
            marked_t = None if kind_t is None else kind_t > 0
            return unit, rules.after_prompt(unit.rule, count(unit.share, tokens, layer.sliding), place_n, seen, found, marked_t)
        assert kind_t is not None, "a ladder asks for token ids"
        there = resident(tokens, layer.sliding)
        rung, kept_k = self.ladder.chosen(place_n, seen, first, there, found["all"][place_n], kind_t[place_n], told)
        return replace(unit, rule=rung), place_n[kept_k]

    def still(
        self, layer: Layer, unit: Unit, tokens: int, place_n: Tensor, seen: int, first: int, score_n: Tensor | None,
        kind_n: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Which of N entries a unit keeps when tokens have come: their indices. For the arguments see `rules.kept`."""
        if self.ladder and unit.rule in RUNGS[:-1]:
            assert kind_n is not None, "a ladder asks for token ids"
            return self.ladder.kept(unit.rule, place_n, seen, first, resident(tokens, layer.sliding), score_n, kind_n)
        many = count(unit.share, tokens, layer.sliding)
        return rules.kept(unit.rule, many, place_n, seen, first, score_n, None if kind_n is None else kind_n > 0)

    def json(self) -> dict[str, Any]:
        layers = [{"layer": each.index, "width": each.width, "sliding": each.sliding,
                   "units": [[u.rule, u.share / 1000, u.dtype] for u in each.units]} for each in self.layers]  # fmt: skip
        found = {"version": 1, "context": self.context, "bytes": self.bytes, "full": self.full, "marked": list(self.marked),
                 "layers": layers}  # fmt: skip
        if (by := self.ladder) is None:
            return found
        ladder = {"recovery": by.recovery, "frequent": by.frequent / 1000, "local": by.local / 1000,
                  "special": list(by.special), "prompts": list(by.prompts)}  # fmt: skip
        return {**found, "version": VERSION, "ladder": ladder}


def plain_bytes(tokens: int, heads: int, width: int, sliding: int | None, itemsize: int) -> int:
    """Bytes that a layer's plain cache takes after so many tokens."""
    return 2 * resident(tokens, sliding) * heads * width * itemsize


def read(document: Mapping[str, Any], where: str) -> Policy:
    """The policy that a JSON document holds; ModelError where it is none, or a newer one."""
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"{where}: version is {version!r}, and {VERSION} is the newest that is read here; "
                         "upgrade compress-pipeline")  # fmt: skip
    try:
        layers = tuple(_layer(each) for each in document["layers"])
        marked = tuple(_whole(i, most=1 << 31) for i in document["marked"])
        ladder = _ladder(document["ladder"]) if version > 1 else None
        found = Policy(layers, marked, _whole(document["context"]), _whole(document["full"]), ladder)
        if any((unit.rule == FASTGEN) != (ladder is not None) for layer in layers for unit in layer.units):
            raise ValueError("a ladder that no unit takes, or units that miss one")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ModelError(f"{where}: is no policy of a cache; it is damaged, copy or export it again") from None
    numbers = [layer.index for layer in layers]
    if numbers != sorted(set(numbers)) or not numbers:
        raise ModelError(f"{where}: names a layer twice, or none; it is damaged, copy or export it again")
    return found


def check_belongs(policy: Policy, model: Mapping[int, Sequence[int | None]], where: str) -> None:
    """ModelError where a policy is of other layers than a model has: layer -> its sliding window, and, where they are known, its
    KV heads and their width."""
    layers = {layer.index: layer for layer in policy.layers}
    for index in sorted(layers.keys() | model.keys()):
        layer, has = layers.get(index), model.get(index)
        said = None if layer is None else (layer.sliding, len(layer.units), layer.width)[: None if has is None else len(has)]
        if has is None or said != tuple(has):
            raise ModelError(f"{where}: says of layer {index} {_told(said)}, and the model has {_told(has)}; they do not belong "
                             "together, copy or export the folder again")  # fmt: skip


def _told(has: Sequence[int | None] | None) -> str:
    """What a layer's cache is, in words."""
    if has is None:
        return "nothing"
    window, *heads = has
    return (f"{heads[0]} heads of {heads[1]} and " if heads else "") + (f"a window of {window}" if window else "no window")


def _layer(held: Mapping[str, Any]) -> Layer:
    sliding = None if held["sliding"] is None else _whole(held["sliding"], 2)
    units = tuple(_unit(*each) for each in held["units"])
    if not units:
        raise ValueError("a layer without heads")
    return Layer(_whole(held["layer"]), _whole(held["width"], 1), sliding, units)


def _unit(rule: Any, share: Any, dtype: Any) -> Unit:
    if rule not in (*RULES, FASTGEN) or dtype not in DTYPES:
        raise ValueError("no unit")
    return Unit(rule, max(1, round(_share(share) * 1000)), dtype)


def _ladder(held: Mapping[str, Any]) -> Ladder:
    special, prompts = tuple(_whole(i, most=1 << 31) for i in held["special"]), tuple(map(_whole, held["prompts"]))
    least, mean, most = prompts
    frequent, local = (max(1, round(_share(held[name]) * 1000)) for name in ("frequent", "local"))
    return Ladder(_share(held["recovery"]), special, (least, mean, most), frequent, local)


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ValueError("no share")
    return float(value)


def _whole(value: Any, least: int = 0, most: int = 1 << 62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("no whole number")
    return value
