"""Skeletons that were built before: one is built once for what a config says, and whoever asks gets a copy of his own.

A run asks for the same architecture about ten times, and takes apart what it gets (`stream.py`), so that one cannot serve all. A
copy is made in a third of the time in which transformers builds the model. Modules, parameters and buffers of a copy are its own.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

MOST, MOST_BUFFERS = 16, 64 << 20  # skeletons that are kept, and bytes of buffers of one of them
SHARED = (int, float, str, type(None), torch.dtype, torch.device, type, BuiltinFunctionType, FunctionType)

_LOCK = threading.Lock()
_KEPT: OrderedDict[bytes, Kept] = OrderedDict()


def key_of(kind: type, config: Any) -> bytes:
    """All that a config says, settings that are not saved included, and the class that is made of it."""
    return pickle.dumps((kind, config))


def hash_of(kind: type, config: Any) -> bytes:
    """The same in 32 bytes, for what is kept by a config as long as the process lasts."""
    return hashlib.sha256(key_of(kind, config)).digest()


def known(key: bytes, build: Callable[[], nn.Module]) -> nn.Module:
    """The model of that key, for the caller alone: a copy of the one that is kept, or what `build` makes."""
    kept = kept_under(key)
    return keep(key, build()) if kept is None else kept.copy()


def kept_under(key: bytes) -> Kept | None:
    """What is kept under a key, which is now the one that was asked for last."""
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
        return _KEPT.get(key)


def keep(key: bytes, model: nn.Module) -> nn.Module:
    """Keep a model, unless it was built without any memory, as in a rehearsal, or its buffers are large. Returns the caller's."""
    if torch.empty(0).is_meta or sum(b.nbytes for b in model.buffers()) > MOST_BUFFERS:
        return model
    try:
        kept = Kept(model)
        given = kept.copy()
    except Exception:  # an architecture may hold what cannot be copied; it is built each time
        return model
    with _LOCK:
        _KEPT[key] = kept
        while len(_KEPT) > MOST:
            _KEPT.popitem(last=False)
    return given


class Kept:
    """A skeleton that nobody changes. What its modules hold is sorted once, and most of it is plain: a copy is what `deepcopy`
    makes, in a fraction of the time.

    A function that was made for one module, and would go on to use it, is refused with a TypeError.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._parts = [(module, *sorted_out(module)) for module in model.modules()]

    def copy(self) -> nn.Module:
        memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module, _, _ in self._parts}
        memo.update((id(p), without_memory(p)) for p in self.model.parameters())
        for module, plain, rest in self._parts:
            own = memo[id(module)].__dict__
            own.update(plain)
            for name, value in rest:
                own[name] = duplicate(value, memo)
        made: nn.Module = memo[id(self.model)]
        return made


def sorted_out(module: nn.Module) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """What a module holds: what copies can share, in the order in which they have it, and all the rest."""
    held = vars(module)
    for value in held.values():
        if isinstance(value, FunctionType) and any(isinstance(c.cell_contents, nn.Module) for c in value.__closure__ or ()):
            raise TypeError(f"{value.__qualname__} belongs to one module")
    return held.copy(), [(name, value) for name, value in held.items() if not isinstance(value, SHARED)]


def without_memory(p: nn.Parameter) -> nn.Parameter:
    """Another parameter on the meta device, with the marks of the first."""
    made = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    made.__dict__.update(vars(p))
    return made


def duplicate(value: Any, memo: dict[int, Any]) -> Any:
    """As `deepcopy`, which takes long for small dictionaries and sets."""
    kind = type(value)
    if kind is OrderedDict and not value:  # hooks that nobody has set, eleven to a module
        return OrderedDict()
    if isinstance(value, SHARED):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is dict or kind is OrderedDict:
        made = memo[id(value)] = kind()
        for key, held in value.items():
            made[key] = duplicate(held, memo)
        return made
    return set(value) if kind is set and all(isinstance(v, str) for v in value) else deepcopy(value, memo)
