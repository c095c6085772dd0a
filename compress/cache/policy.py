"""A policy of the KV cache: for every KV head its rule, its share of the tokens, and what its entries are stored in.

As JSON, which `kv_policy.json` of an artifact is:

    version   1; a reader refuses a newer one
    context   tokens that `bytes` and the budget count
    bytes     what the entries take after so many tokens; `full`, what a plain cache takes
    marked    ids of special tokens and punctuation, where a rule asks for them
    layers    number, width of a head, sliding window or null, and the units in order: [rule, share, dtype]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.cache.rules import DTYPES, MARKS, RULES, count, entry_bytes, resident
from compress.errors import ModelError

FILE, VERSION = "kv_policy.json", 1
SERVED = "cache"  # where `State.serving` has it
DECLARED = "kv_policy"  # what a config's `quantization_config` then says is true


@dataclass(frozen=True)
class Unit:
    """What one KV head keeps: `share` in thousandths of the tokens seen."""

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
    """Of all layers that have a cache. marked: ids of special tokens and punctuation. context: tokens that its budget counts."""

    layers: tuple[Layer, ...]
    marked: tuple[int, ...]
    context: int
    full: int

    def nbytes(self, tokens: int) -> int:
        """Bytes of all entries of one row after a prompt of so many tokens, exactly."""
        return sum(layer.nbytes(tokens) for layer in self.layers)

    @property
    def marks(self) -> bool:
        """Whether a rule asks which token is which."""
        return any(unit.rule in MARKS for layer in self.layers for unit in layer.units)

    def json(self) -> dict[str, Any]:
        layers = [{"layer": each.index, "width": each.width, "sliding": each.sliding,
                   "units": [[u.rule, u.share / 1000, u.dtype] for u in each.units]} for each in self.layers]  # fmt: skip
        return {"version": VERSION, "context": self.context, "bytes": self.nbytes(self.context), "full": self.full,
                "marked": list(self.marked), "layers": layers}  # fmt: skip


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
        found = Policy(layers, marked, _whole(document["context"]), _whole(document["full"]))
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
    if rule not in RULES or dtype not in DTYPES or type(share) not in (int, float) or not 0 < share <= 1:
        raise ValueError("no unit")
    return Unit(rule, max(1, round(share * 1000)), dtype)


def _whole(value: Any, least: int = 0, most: int = 1 << 62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("no whole number")
    return value
