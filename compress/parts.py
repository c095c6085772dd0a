"""One file of a run folder: what a step has committed at once, with a hash of all of it.

A safetensors file whose metadata says what the tensors are: `codes`, site -> format and shape, the tensors under "site/suffix";
`dense`, the names of tensors of the checkpoint, under "dense/" + number; `serving`; `records`; and `sha256`, of the header
without this entry and of the data. It is compared whenever a part is read, so what is reused is what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from compress.errors import RunError
from compress.formats import Packed, parse
from compress.state import Stored
from compress.state.checkpoint import Spec, read_header
from compress.state.overlay import Written
from compress.state.state import Part

SUFFIX = ".safetensors"
CHUNK = 1 << 22


def part_bytes(
    codes: Mapping[str, Packed], dense: Mapping[str, torch.Tensor], records: Sequence[dict[str, Any]], serving: Mapping[str, Any]
) -> bytes:
    """The file of a part."""
    tensors = {f"{site}/{suffix}": t.contiguous() for site, p in codes.items() for suffix, t in p.tensors.items()}
    tensors |= {f"dense/{i}": t.contiguous().clone() for i, t in enumerate(dense.values())}  # a file has no shared storage
    notes = {"codes": {site: {"format": str(p.format), "shape": list(p.shape)} for site, p in codes.items()},
             "dense": list(dense), "serving": dict(serving), "records": list(records)}  # fmt: skip
    plain = save(tensors, metadata={name: json.dumps(value) for name, value in notes.items()})
    start = 8 + int.from_bytes(plain[:8], "little")
    header, data = json.loads(plain[8:start]), memoryview(plain)[start:]
    mark = hashlib.sha256(canonical(header))
    mark.update(data)
    header["__metadata__"]["sha256"] = mark.hexdigest()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def canonical(header: Mapping[str, Any]) -> bytes:
    """A header without the hash, in one spelling."""
    notes = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    return json.dumps({**header, "__metadata__": notes}, sort_keys=True).encode()


def read_part(path: Path) -> tuple[Part, list[dict[str, Any]]]:
    """What a part holds, and its records; RunError if the file is not, to the last bit, the one that was written."""
    try:
        notes = checked(path)
        specs = read_header(path)
        codes = {n: Stored(parse(t["format"]), (t["shape"][0], t["shape"][1]), path, f"{n}/") for n, t in notes["codes"].items()}
        dense = {name: Written(Spec(name, specs[key].dtype, specs[key].shape), path, key)
                 for name, key in ((name, f"dense/{i}") for i, name in enumerate(notes["dense"]))}  # fmt: skip
        return Part(codes, dense, notes["serving"]), notes["records"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise RunError(f"{path}: is damaged ({e}); delete this file and run again") from None


def checked(path: Path) -> dict[str, Any]:
    """The notes of a part, its hash compared; ValueError where that is another."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("cut short")
        header = json.loads(file.read(length))
        mark = hashlib.sha256(canonical(header))
        while data := file.read(CHUNK):
            mark.update(data)
    notes = header["__metadata__"]
    if notes["sha256"] != mark.hexdigest():
        raise ValueError("its hash is not that of its bytes")
    return {name: json.loads(text) for name, text in notes.items() if name != "sha256"}
