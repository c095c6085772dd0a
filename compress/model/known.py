"""Skeletons that were built before: one is built once for what a config says, and whoever asks gets a copy of his own.

A run asks for the same architecture about ten times, and takes apart what it gets (`stream.py`), so that one cannot serve all. A
copy is made in a third of the time in which transformers builds the model. Modules, parameters and buffers of a copy are its own.
"""

from __future__ import annotations

import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

MOST, MOST_BUFFERS = 8, 64 << 20  # skeletons that are kept, and bytes of buffers of one of them
PLAIN = (int, float, str, type(None), torch.dtype, torch.device, type, BuiltinFunctionType)

_LOCK = threading.Lock()
_KEPT: OrderedDict[bytes, nn.Module] = OrderedDict()


def key_of(kind: type, config: Any) -> bytes:
    """All that a config says, settings that are not saved included, and the class that is made of it."""
    return pickle.dumps((kind, config))


def known(key: bytes, build: Callable[[], nn.Module]) -> nn.Module:
    """The model of that key, for the caller alone: a copy of the one that is kept, or what `build` makes."""
    with _LOCK:
        kept = _KEPT.get(key)
        if kept is not None:
            _KEPT.move_to_end(key)
    return keep(key, build()) if kept is None else copied(kept)


def keep(key: bytes, model: nn.Module) -> nn.Module:
    """Keep a model, if its buffers are real, which in a rehearsal they are not, and small; returns one for the caller alone."""
    buffers = list(model.buffers())
    if any(b.is_meta for b in buffers) or sum(b.nbytes for b in buffers) > MOST_BUFFERS:
        return model
    try:
        given = copied(model)
    except Exception:  # an architecture may hold what cannot be copied; it is built each time
        return model
    with _LOCK:
        _KEPT[key] = model
        while len(_KEPT) > MOST:
            _KEPT.popitem(last=False)
    return given


def copied(model: nn.Module) -> nn.Module:
    """What `deepcopy` makes of a skeleton, in half of the time, as most of what modules hold is plain. Refused with a TypeError:
    functions that were made for one module, which would go on to use it."""
    modules = [(module, object.__new__(type(module))) for module in model.modules()]
    memo: dict[int, Any] = {id(old): new for old, new in modules}
    memo.update((id(p), _parameter(p)) for p in model.parameters())
    for old, new in modules:
        for name, value in vars(old).items():
            new.__dict__[name] = _value(value, memo)
    made: nn.Module = memo[id(model)]
    return made


def _parameter(p: nn.Parameter) -> nn.Parameter:
    """Another parameter without memory, with the marks of the first."""
    made = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
    made.__dict__.update(vars(p))
    return made


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """What a module holds, as its copy has it."""
    if isinstance(value, PLAIN):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (dict, OrderedDict):
        made = memo[id(value)] = type(value)()
        made.update((k, _value(v, memo)) for k, v in value.items())
        return made
    if type(value) is set and all(isinstance(v, str) for v in value):
        return set(value)
    if isinstance(value, FunctionType):
        if any(isinstance(cell.cell_contents, nn.Module) for cell in value.__closure__ or ()):
            raise TypeError(f"{value.__qualname__} belongs to one module")
        return value
    return deepcopy(value, memo)
