"""A model's config.json before transformers sees it: JSON within limits, so that nothing built from it hangs or fills memory.

Counts of layers, experts and labels are loops in somebody's code, and a page of JSON may ask for any number of them. Widths are
not limited, since parameters of a skeleton take no memory; what does, tables of positions and the like, is sized by a rehearsal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.documents import kind, one_line, parse_json, read_bytes
from compress.errors import CompressError, ModelError, first_line

MOST_BYTES = 64 << 20  # of a config.json; an artifact's, which names every matrix of many experts, has a tenth of that
MOST_DEPTH = 40
MOST_LAYERS, MOST_COUNTED, MOST_TABLES = 4096, 65_536, 1 << 30
LAYERS = re.compile(r"(layers?|blocks?|depths?)$")
COUNTED = re.compile(r"^(n|num|_num)_.*(experts?|labels|heads?|groups?|codebooks|streams|stages?)(_per_\w+)?$")


def checked_config(path: Path) -> dict[str, Any]:
    """What a config.json says; ModelError where it is no JSON mapping, or asks for more than any model has."""
    try:
        config = parse_json(read_bytes(path, MOST_BYTES, ModelError))
    except ModelError:
        raise
    except ValueError as e:
        raise ModelError(f"{path}: transformers cannot read it (no JSON: {one_line(str(e))}); download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: transformers cannot read it ({kind(config)}, where a mapping is needed); download it again")
    if not isinstance(config.get("model_type", ""), str):
        raise ModelError(f"{path}: 'model_type' is {kind(config['model_type'])}, not a name")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path}: 'architectures' is {kind(names)} where a list of names is needed")
    layers = experts = 1
    for name, value in values(config, path):
        if isinstance(value, float) and math.isnan(value):
            raise ModelError(f"{path}: '{name}' is NaN; the file is damaged")
        if type(value) is int and LAYERS.search(name) and value > MOST_LAYERS:
            raise ModelError(f"{path}: '{name}' is {short(value)}; at most {MOST_LAYERS:,} layers are read")
        if type(value) is int and COUNTED.search(name) and value > MOST_COUNTED:
            raise ModelError(f"{path}: '{name}' is {short(value)}; at most {MOST_COUNTED:,} are read")
        layers = max(layers, value) if type(value) is int and LAYERS.search(name) else layers
        experts = max(experts, value) if type(value) is int and "expert" in name else experts
    if layers * experts > 1 << 20:
        raise ModelError(f"{path}: {layers:,} layers of {experts:,} experts each are more than are read")
    return config


def values(config: Any, path: Path, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every single value of a config, with the name that it stands under; those of lists under the list's."""
    if depth > MOST_DEPTH:
        raise ModelError(f"{path}: is nested deeper than {MOST_DEPTH} levels; the file is damaged")
    if isinstance(config, dict):
        for key, value in config.items():
            yield from values(value, path, one_line(key, 60), depth + 1)
    elif isinstance(config, list):
        for value in config:
            yield from values(value, path, name, depth + 1)
    else:
        yield name, config


def short(number: int) -> str:
    """A number that may have thousands of digits."""
    return f"{number:,}" if abs(number) < 10**18 else "a number of more than 18 digits"


def rehearse(build: Callable[[], nn.Module], path: Path) -> None:
    """Build a skeleton without any memory, and refuse it with a ModelError where its tables would take too much of it.

    What cannot be built without memory is left to the building itself.
    """
    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # some architectures look into their tables while they make them
        return
    tables = sum(b.nbytes for b in model.buffers())
    if tables > MOST_TABLES:
        raise ModelError(f"{path}: asks for tables of {tables:,} bytes beside the weights; no model has so many positions")


@contextmanager
def believed(path: Path, doing: str) -> Iterator[None]:
    """Inside, whatever a config makes foreign code or ours raise is a ModelError that names the file."""
    try:
        yield
    except CompressError as e:
        if str(path.parent) in str(e):  # it names a file already
            raise
        raise ModelError(f"{path}: {e}") from e
    except Exception as e:
        raise ModelError(f"{path}: {doing} ({one_line(first_line(e))})") from e
