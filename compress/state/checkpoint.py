"""safetensors files, read lazily and written as a stream.

A tensor that is read is a part of its file that is mapped, so it costs memory only while it is used. Where it lies is kept for as
long as the file is the same: the safetensors library would parse the whole header for each of thousands of experts. Writing is
ours too, because the library wants all tensors of a file in memory at once, while a run must be able to write a model larger
than memory tensor by tensor. A `Layout` fixes names, order, offsets and header before the first byte, so `plan` knows the exact
size of files that do not exist yet.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap
from pathlib import Path

import torch

from compress.documents import MOST_JSON, one_line, parse_json, read_bytes
from compress.errors import ModelError, RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OWN = "compress"  # weight files of our own formats: a name that no other tool takes for a model's
OWN_INDEX = f"{OWN}.safetensors.index.json"  # of several such files
SUMMED = 1 << 22  # numbers that are looked at at once: torch converts all of what it sums
HASHED_BYTES = 2 << 30  # a few seconds of hashing

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}

Rows = int | slice | list[int]  # along the first dimension


@dataclass(frozen=True)
class Spec:
    """Name, dtype and shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Spec]:
    """The tensors of one safetensors file; ModelError if it is missing, truncated or no such file."""
    return dict(header_of(path)[0])


def header_of(path: Path) -> tuple[dict[str, Spec], dict[str, int]]:
    """The same, and where in the file each of them begins."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe that nobody writes to would be waited for
        raise ModelError(f"{path}: is no regular file")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(path.stat().st_size - 8, 100_000_000):
                raise ModelError(f"{path}: truncated or not a safetensors file; download it again")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        specs = {n: Spec(n, DTYPES[t["dtype"]], tuple(t["shape"])) for n, t in header.items()}
        end = checked_end(specs, {n: t["data_offsets"] for n, t in header.items()})
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; is a shard missing?") from None
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, ModelError):
            raise
        raise ModelError(f"{path}: broken safetensors header ({e}); download it again") from None
    if path.stat().st_size != 8 + length + end:
        raise ModelError(f"{path}: holds {path.stat().st_size:,} bytes, its header says {8 + length + end:,}; "
                         "the file is truncated or damaged, download it again")  # fmt: skip
    return specs, {n: 8 + length + t["data_offsets"][0] for n, t in header.items()}


@lru_cache(maxsize=64)
def places_in(path: Path, same: tuple[int, ...]) -> tuple[dict[str, Spec], dict[str, int]]:
    """As `header_of`, of a file for as long as its stamp is the `same`."""
    return header_of(path)


def checked_end(specs: Mapping[str, Spec], offsets: Mapping[str, Sequence[int]]) -> int:
    """Where the last tensor ends; ValueError unless the tensors, by their shapes, fill the data one behind the other."""
    end = 0
    for name, (start, stop) in sorted(offsets.items(), key=lambda item: list(item[1])):
        if any(type(n) is not int or n < 0 for n in specs[name].shape) or start != end or stop - start != specs[name].nbytes:
            raise ValueError(f"'{name}' says {list(specs[name].shape)} at {start} to {stop}")
        end = stop
    return end


class Checkpoint:
    """The tensors of a folder with one `model.safetensors`, an index and shards, or files of our own formats; and of files
    `beside` them, such as an adapter's. Nothing stays open."""

    def __init__(self, folder: Path, beside: Sequence[Path] = ()):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for path in (*(within(folder, file) for file in weight_files(folder)), *beside):
            for name, spec in read_header(path).items():
                self.files[name], self.specs[name] = path, spec
        self._check_index()

    def _check_index(self) -> None:
        for name, file in (index_of(self.folder) or {}).items():
            if name not in self.specs:
                raise ModelError(
                    f"{self.folder / INDEX}: says that '{name}' is in {file}, which does not hold it; download it again"
                )

    @cached_property
    def _hashed(self) -> dict[Path, tuple[tuple[int, ...], str]]:
        """What a file was when it was hashed, and its hash; filled in by `fingerprint`."""
        return {}

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on CPU; ModelError naming the file when it cannot be read."""
        self._unchanged(self.files[name])
        return read_tensor(self.files[name], name)

    def read_finite(self, name: str) -> torch.Tensor:
        """As `read`; ModelError where the tensor holds a NaN or an infinity, or numbers whose squares are beyond fp32: every step
        sums squares, and of an infinite sum nothing good comes, nor does it say of which tensor it was."""
        return self._finite(name, self.read(name))

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        parts = tensor.flatten().split(SUMMED) if tensor.is_floating_point() else ()
        direct = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)  # others are no input of a norm in fp32
        squares = (torch.linalg.vector_norm(part if direct else part.float(), dtype=torch.float32) for part in parts)
        if not all(bool(square.isfinite()) for square in squares):
            raise ModelError(f"{self.files[name]}: '{name}' holds NaN or infinite values, or such of 1e19 and more; the model is "
                             "damaged")  # fmt: skip
        return tensor

    def read_rows(self, name: str, index: Rows) -> torch.Tensor:
        """A part along the first dimension, such as an expert of a 3-D tensor; no other is read."""
        self._unchanged(self.files[name])
        return self._finite(name, read_tensor(self.files[name], name, index))

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: of every byte up to `HASHED_BYTES`, of headers and evenly spread pages of larger models.

        From then on a tensor is only read from the bytes that were hashed: a file that was touched since is hashed again.
        """
        for path in sorted(set(self.files.values())):
            self._hashed[path] = stamp(path), self._hash(path)
        return hashlib.sha256("".join(known for _, known in self._hashed.values()).encode()).hexdigest()

    def _hash(self, path: Path) -> str:
        whole = sum(p.stat().st_size for p in set(self.files.values())) <= HASHED_BYTES
        size, digest = path.stat().st_size, hashlib.sha256()
        digest.update(f"{path.name}:{size}:{path.stat().st_mtime_ns if not whole else 0}".encode())
        with path.open("rb") as file:
            step = 1 << 20 if whole else max(4096, size // 256)
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(step if whole else 4096))
        return digest.hexdigest()

    def _unchanged(self, path: Path) -> None:
        """ModelError where a file is no longer the one whose hash is known, such as one that was replaced while a run goes on."""
        if path not in self._hashed or self._hashed[path][0] == stamp(path):
            return
        now, known = stamp(path), self._hashed[path][1]
        if self._hash(path) != known:
            raise ModelError(f"{path}: was changed while it was being read; finished blocks are kept, run again")
        self._hashed[path] = now, known


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to; of the four only the last cannot be set back."""
    try:
        held = path.stat()
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    return held.st_ino, held.st_size, held.st_mtime_ns, held.st_ctime_ns


def read_tensor(path: Path, name: str, index: Rows | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, or a part of it along the first dimension; ModelError naming the file."""
    try:
        specs, places = places_in(path, stamp(path))
        tensor = mapped(path, specs[name], places[name])
    except KeyError:
        raise ModelError(f"{path}: tensor '{name}' cannot be read (the file holds none of that name)") from None
    except (ModelError, OSError, ValueError) as e:
        reason = str(e).removeprefix(f"{path}: ")
        raise ModelError(f"{path}: tensor '{name}' cannot be read ({reason})") from None
    return tensor if index is None else tensor[index]


def mapped(path: Path, spec: Spec, start: int) -> torch.Tensor:
    """The tensor that begins at a byte of a file. What is written to it stays in memory."""
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=spec.dtype)
    before = start % ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        held = mmap(file.fileno(), before + spec.nbytes, offset=start - before, access=ACCESS_COPY)
    return torch.frombuffer(held, dtype=spec.dtype, count=prod(spec.shape), offset=before).view(spec.shape)


def within(folder: Path, path: Path, what: str = "model's folder") -> Path:
    """The path; ModelError where it is a link that leads out of the folder, and not into the store of a hub cache that the folder
    is a snapshot of: what lies behind would be published as a part of `what`."""
    home, target = folder.resolve(), path.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in target.parents and target.parent != store:
        raise ModelError(f"{path}: is a link out of the {what}; copy the file itself")
    return path


def index_of(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, as the index of a folder says; None where there is none, ModelError where it is none."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        table = parse_json(read_bytes(path, MOST_JSON, ModelError))["weight_map"]
        return {str(name): str(file) for name, file in table.items()}
    except ModelError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise ModelError(f"{path}: broken index ({one_line(str(e))}); download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model; ModelError says what was found instead."""
    table = index_of(folder)
    if table is not None:
        names = sorted(set(table.values()))
        if foreign := next((name for name in names if Path(name).name != name), None):
            raise ModelError(f"{folder / INDEX}: names '{foreign[:80]}', which is no file of this folder; download it again")
        if (folder / SINGLE).exists() and SINGLE not in names:
            raise ModelError(f"{folder}: holds {SINGLE}, and other weights that {INDEX} names, and engines differ in which they "
                             "read; take one of them away")  # fmt: skip
        return [folder / name for name in names]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if own := sorted(folder.glob(f"{OWN}-[0-9]*.safetensors")):
        return own
    found = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".gguf", ".safetensors"})
    hint = f"found only {', '.join(found[:3])}" if found else "found no weights"
    raise ModelError(f"{folder}: {hint}; needs {SINGLE} or {INDEX}  (save_pretrained writes it; 'plan' works without)")


@dataclass(frozen=True)
class File:
    """One safetensors file as it will be: its name, maybe in a subfolder, its tensors in order, its header's bytes."""

    name: str
    specs: tuple[Spec, ...]

    @cached_property
    def header(self) -> bytes:
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self.specs:
            table[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape),
                                "data_offsets": [offset, offset + spec.nbytes]}  # fmt: skip
            offset += spec.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Layout:
    """All files of a checkpoint to be: known to the byte before anything is written."""

    files: tuple[File, ...]

    @classmethod
    def of(cls, specs: Sequence[Spec], shard_bytes: int = 5_000_000_000, stem: str = "") -> Layout:
        """Tensors in the given order, a new shard before one would pass `shard_bytes`.

        The files are named as transformers does, or, with a `stem`, stem-00001.safetensors and on.
        """
        shards: list[list[Spec]] = [[]]
        size = 0
        for spec in specs:
            if shards[-1] and size + spec.nbytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(spec)
            size += spec.nbytes
        if stem:
            return cls(tuple(File(f"{stem}-{i:05}.safetensors", tuple(s)) for i, s in enumerate(shards, 1)))
        if len(shards) == 1:
            return cls((File(SINGLE, tuple(shards[0])),))
        n = len(shards)
        return cls(tuple(File(f"model-{i + 1:05}-of-{n:05}.safetensors", tuple(s)) for i, s in enumerate(shards)))

    @property
    def index(self) -> tuple[str, bytes] | None:
        """The name and the bytes of the index file, or None where there are no shards that need one."""
        name, shards = INDEX, [file for file in self.files if file.name.startswith("model-")]
        if not shards:
            name, shards = OWN_INDEX, [file for file in self.files if file.name.startswith(f"{OWN}-")]
        if not shards or (name == OWN_INDEX and len(shards) == 1):
            return None
        weight_map = {spec.name: file.name for file in shards for spec in file.specs}
        table = {"metadata": {"total_size": sum(s.nbytes for f in shards for s in f.specs)}, "weight_map": weight_map}
        return name, json.dumps(table, indent=1).encode()

    @property
    def tensor_bytes(self) -> int:
        return sum(spec.nbytes for file in self.files for spec in file.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers and index included."""
        return sum(file.nbytes for file in self.files) + (len(self.index[1]) if self.index else 0)

    def write(self, folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the files from a stream of (name, tensor) in the layout's own order, one tensor in memory at a time."""
        stream = iter(tensors)
        for file in self.files:
            (folder / file.name).parent.mkdir(exist_ok=True)
            with (folder / file.name).open("wb") as out:
                write_all(out.fileno(), file.header, folder)
                for spec in file.specs:
                    name, tensor = next(stream)
                    assert (name, tensor.dtype, tuple(tensor.shape)) == (spec.name, spec.dtype, spec.shape), (
                        f"expected {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}"
                    )
                    write_all(out.fileno(), tensor_bytes(tensor), folder)
                os.fsync(out.fileno())
        assert next(stream, None) is None, "more tensors than the layout has room for"
        if self.index:
            name, data = self.index
            (folder / name).write_bytes(data)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous on CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def write_all(descriptor: int, data: bytes | memoryview, place: Path) -> None:
    """Write every byte; a full disk becomes a RunError that says so."""
    view = memoryview(data)
    try:
        while len(view):
            view = view[os.write(descriptor, view[: 1 << 26]) :]
    except OSError as e:
        raise disk_error(e, place) from None


def disk_error(e: OSError, place: Path) -> RunError:
    """What an OSError while writing means to the user."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{place}: the disk is full; free some space and run again, finished blocks are kept")
    return RunError(f"{place}: cannot write ({e.strerror})")
