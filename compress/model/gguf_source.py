"""A GGUF file as a source: made dense once by transformers, in the user's cache, and from then on a model like others.

    ~/.cache/compress/gguf/SHA256/source.json      what the folder was made of, and the bytes of its files
    ~/.cache/compress/gguf/SHA256/NAME/            a plain transformers model

The folder is made beside under a lock and renamed, so it is there whole or not at all. What the quantization of the file took
from the weights is gone: they lie near the grid of its types, so that a format of the same width finds them nearly as it would
leave them. A remark says so wherever figures are told.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers

from compress.documents import json_mapping, local_path, one_line
from compress.errors import ModelError, first_line
from compress.model.apart import Apart, Failed
from compress.model.gguf_header import read_header
from compress.model.gguf_keys import complete

SUFFIX, SOURCE, VERSION = ".gguf", "source.json", 2
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that lost nothing
TOKENIZING = 600.0  # seconds of CPU time for making a tokenizer
ELSE = "name the model that it was made from"
ROOM = 1.5  # bytes of memory for each byte of the dense model

Say = Callable[[str], None]


def silent(_: str) -> None:
    """For callers with nobody to tell."""


@dataclass(frozen=True)
class Source:
    """Where a model lies: its folder, the revision where it came from the hub, and what to know of its weights."""

    folder: Path
    revision: str | None = None
    remarks: tuple[str, ...] = ()


def source_of(name: str, base: Path, say: Say) -> Source | None:
    """The model that a GGUF file was made into, now or earlier; None where `name` is no such file."""
    path = gguf_file(name, base)
    return made(path, say) if path else None


def gguf_file(name: str, base: Path) -> Path | None:
    """The file that a model's name stands for, if that is a GGUF file; ModelError where it should be one and is not there."""
    if not name.lower().endswith(SUFFIX):
        return None
    try:
        path = base / local_path(name)
    except ValueError as e:
        raise ModelError(f"model {e}") from None
    if path.is_dir():
        return None
    if not path.is_file():
        raise ModelError(f"{path}: {'is no regular file' if path.exists() else 'no such file'}")
    return path


def made(path: Path, say: Say) -> Source:
    """The model that a file was made into; it is made now where it was not before."""
    place = place_of(path)
    with alone(place):
        if outdated(place):
            shutil.rmtree(place)
        if not place.exists():
            make(path, place, say)
        return held(path, place)


def made_before(path: Path) -> Source | None:
    """The model that a file was made into; None where it has to be made yet."""
    place = place_of(path)
    return held(path, place) if place.exists() and not outdated(place) else None


def outdated(place: Path) -> bool:
    """Whether a folder of the cache was made by a version of this program that knew less of what files say."""
    try:
        version = json_mapping(place / SOURCE, ModelError).get("version")
    except ModelError:
        return False
    return type(version) is int and version < VERSION


def place_of(path: Path) -> Path:
    with path.open("rb") as file:
        return cache() / hashlib.file_digest(file, "sha256").hexdigest()


def held(path: Path, place: Path) -> Source:
    """What a folder of the cache holds; ModelError where its files are not those that were written."""
    todo = "delete the folder, and it is made again"
    known = json_mapping(place / SOURCE, ModelError, todo)
    files, types = known.get("files"), known.get("types")
    if not isinstance(types, dict) or not isinstance(files, dict) or not files or not all(
        (place / name).is_file() and (place / name).stat().st_size == size for name, size in files.items()
    ):  # fmt: skip
        raise ModelError(f"{place}: holds no longer what was made of a GGUF file; {todo}")
    return Source(place / Path(next(iter(files))).parts[0], None, remarks(path, types))


def remarks(path: Path, types: dict[str, int]) -> tuple[str, ...]:
    """What to know of weights that were quantized before."""
    lossy = [f"{name} ({count:,})" for name, count in sorted(types.items(), key=lambda item: -item[1]) if name not in PLAIN]
    if not lossy:
        return ()
    return (f"{path.name} was quantized before: its matrices lie on the grid of {', '.join(lossy)}, so figures at about that "
            "width flatter; compare with the model that it was made from",)  # fmt: skip


def cache() -> Path:
    """Where models that were made of GGUF files lie."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(named) if os.path.isabs(named) else Path.home() / ".cache"  # as XDG has it, a relative path counts for nothing
    return home / "compress" / "gguf"


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Inside, no other process makes the same folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{place}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- making it -------------------------------------------------------------------------------------------------------


def make(path: Path, place: Path, say: Say) -> None:
    """Make the folder: beside, then renamed."""
    start = time.monotonic()
    types, weights = read_types(path)
    dtype = PLAIN.get(max(types, key=lambda name: types[name]), torch.bfloat16)
    check_room(path, weights * dtype.itemsize, place.parent)
    if os.isatty(2):  # elsewhere a mistake is one line, and that it takes long is told with its end
        say(f"{path.name}: is made dense in {str(dtype)[6:]}, once; this takes a while")
    beside = Path(f"{place}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
    try:
        folder = beside / path.stem
        folder.mkdir(parents=True)
        with by_itself(path) as source:
            write_model(source, folder, dtype)
            write_tokenizer(source, folder)
        files = {str(p.relative_to(beside)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        (beside / SOURCE).write_text(json.dumps({"version": VERSION, "types": types, "files": files}, indent=1), encoding="utf-8")
        for name in [*files, SOURCE]:
            with (beside / name).open("rb") as file:
                os.fsync(file.fileno())
            os.utime(beside / name, (0, 0))  # of large files a key holds this, and made again they are the same
        beside.rename(place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    say(f"{path.name}: made dense in {str(dtype)[6:]} in {time.monotonic() - start:.0f} s, once, and kept in {place}")


def read_types(path: Path) -> tuple[dict[str, int], int]:
    """The types of a file's matrices with how many have each, and the number of all weights; ModelError where it cannot be read
    here."""
    header = read_header(path)
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelError(f"{path}: to read GGUF needs {' and '.join(missing)}:  pip install 'compress-pipeline[gguf]'")
    from gguf import GGMLQuantizationType

    known = {int(kind): kind.name for kind in GGMLQuantizationType}
    if header.parts > 1:
        raise ModelError(f"{path}: is one of {header.parts} files; join them first, by llama.cpp's llama-gguf-split --merge")
    if not header.types:
        raise ModelError(f"{path}: holds no matrices; it is no model")
    if strange := [kind for kind in header.types if kind not in known]:
        raise ModelError(f"{path}: has tensors of type {strange[0]}, which the package gguf does not know; upgrade it")
    return {known[kind]: count for kind, count in header.types.items()}, header.weights


def check_room(path: Path, nbytes: int, where: Path) -> None:
    """ModelError where the dense model does not fit in memory, or on the disk of the cache."""
    free, memory = shutil.disk_usage(where).free, psutil.virtual_memory().available
    if nbytes > free:
        raise ModelError(f"{path}: takes {nbytes / 2**30:.1f} GiB when dense, {where} has {free / 2**30:.1f} left; make room, or "
                         "name another folder by XDG_CACHE_HOME")  # fmt: skip
    if ROOM * nbytes > memory:
        raise ModelError(f"{path}: to make it dense takes {ROOM * nbytes / 2**30:.1f} GiB of memory, {memory / 2**30:.1f} are "
                         f"free; {ELSE}")  # fmt: skip


@contextmanager
def by_itself(path: Path) -> Iterator[Path]:
    """The file in a folder with nothing else, for of what lies beside it transformers would believe some."""
    with TemporaryDirectory() as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        try:
            yield link
        except ModelError as e:
            raise ModelError(str(e).replace(str(link), str(path))) from e


def options(path: Path) -> dict[str, Any]:
    """What transformers is asked with."""
    return {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}


def write_model(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Config and weights, as transformers makes them of a file; ModelError where it cannot."""
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions would keep matrices packed
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    bars = nullcontext() if os.isatty(2) else redirect_stderr(io.StringIO())
    try:
        with bars:
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **dense, **options(path))
            model.config.__dict__.pop("quantization_config", None)
            completed(path, model.config)
            model.save_pretrained(folder)
    except ModelError:
        raise
    except OSError as e:
        raise e if e.errno is not None else failed(path, e) from e  # a full disk is told as such
    except Exception as e:  # transformers raises whatever the file makes it raise
        raise failed(path, e) from e


def write_tokenizer(path: Path, folder: Path) -> None:
    """The tokenizer's files, made in a process of its own, as tokenizers may end or block the one that they are in."""

    def save() -> None:
        transformers.AutoTokenizer.from_pretrained(path.parent, **options(path)).save_pretrained(folder)
        drop_invented(folder)

    _ = transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # imported here
    try:
        with Apart(save) as apart:
            apart.ask(TOKENIZING)
    except Failed as e:
        raise ModelError(f"{path}: transformers cannot read its tokenizer ({one_line(str(e))})") from None


def drop_invented(folder: Path) -> None:
    """Take tokens out of saved files that are behind the file's vocabulary: transformers' own readers of GGUF add
    the special tokens of the first model of a family."""
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    file, said = (json.loads(p.read_text(encoding="utf-8")) for p in (path, settings))
    vocabulary = file["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    odd = {t["content"] for t in file["added_tokens"] if t["content"] not in known and t["id"] >= len(known)}
    if not odd:
        return
    file["added_tokens"] = [t for t in file["added_tokens"] if t["content"] not in odd]
    said = {n: v for n, v in said.items() if n != "added_tokens_decoder" and not (isinstance(v, str) and v in odd)}
    path.write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
    settings.write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def write_config(path: Path, folder: Path) -> None:
    """config.json alone, of the file's header; ModelError where transformers cannot read it."""
    with by_itself(path) as source:
        try:
            config = transformers.AutoConfig.from_pretrained(source.parent, **options(source))
            completed(source, config)
            config.save_pretrained(folder)
        except ModelError:
            raise
        except Exception as e:
            raise failed(source, e) from e


def completed(path: Path, config: Any) -> None:
    """Put into a config what the file says and transformers does not read; ModelError where that cannot be."""
    try:
        complete(config, read_header(path).keys)
    except ModelError as e:
        raise e if str(path) in str(e) else ModelError(f"{path}: {e}") from None


def failed(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path}: transformers cannot read it ({one_line(first_line(error))}); name the model that it was made from"
    )
