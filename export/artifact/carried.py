"""What of a model's folder goes along into an artifact: what a library needs beside weights, and what the licence asks for.

Tokenizer, generation config, chat templates, the small modules of sentence-transformers, licences and notices. Never weights of
the model, its config, or a card, which are written anew; never code, nor a pickle, which may hold some; nothing hidden; and
nothing that a link leads to outside of the folder: what lies there was not meant to be published.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from compress.errors import ExportError, one_line
from compress.export.artifact.files import MARK
from compress.model.vocabulary import SOURCE_IDS, rewritten
from compress.state.checkpoint import within

CARRIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying)", re.IGNORECASE)  # how the name of such a file begins
TEMPLATES, MODULES = "additional_chat_templates", "modules.json"
LIBRARY = "sentence_transformers."
CODE = {".py", ".pyc", ".so", ".dll", ".sh"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
MOST = 100_000_000  # bytes of a file in a subfolder


def carried(source: Path) -> list[str]:
    """The files that go along, by their paths within the folder; ModelError for a link that leads out of it, ExportError for a
    module that cannot go along."""
    names = [path.name for path in sorted(source.iterdir()) if goes_along(path)]
    for folder in subfolders(source):
        names += [path.relative_to(source).as_posix() for path in sorted(held_in(source, source / folder))]
    for name in names:
        within(source, source / name)
    return names


def carry_over(source: Path, folder: Path, vocabulary: tuple[int, ...] | None = None) -> None:
    """Copy them, those of the tokenizer as they are with the tokens in `vocabulary` only; a request for code, which stays behind,
    is taken out of what asks for it."""
    others = {} if vocabulary is None else rewritten(source, vocabulary)
    for name in subfolders(source):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in others.items():
        if content is not None:
            (folder / name).write_bytes(content)
    for name in carried(source):
        if name in others:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, folder / name)


def copy_file(source: Path, place: Path) -> None:
    """Copy one file, byte by byte; JSON that asks for code (`auto_map`) without that."""
    if source.suffix == ".json" and b'"auto_map"' in (data := source.read_bytes()):
        try:
            known = json.loads(data)
        except (ValueError, RecursionError):
            known = None
        if isinstance(known, dict) and known.pop("auto_map", None) is not None:
            place.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, place)


def goes_along(path: Path) -> bool:
    """Whether a file that lies beside the weights is carried over."""
    ours = (
        path.name.startswith(".")
        or path.name in ("config.json", MARK, SOURCE_IDS)
        or path.name.endswith((".index.json", "SOURCE.txt"))
    )
    wanted = path.suffix in CARRIED or (LEGAL.match(path.name) and path.suffix not in CODE | PICKLES)
    return bool(wanted) and not ours and path.is_file()


def subfolders(source: Path) -> list[str]:
    """The subfolders that a library looks into: more chat templates, and the modules behind a sentence embedder."""
    found = [name for _, name in modules(source) if name]
    return [name for name in dict.fromkeys([TEMPLATES, *found]) if (source / name).is_dir()]


def modules(source: Path) -> Iterator[tuple[str, str]]:
    """Class and subfolder of each module of sentence-transformers; ExportError for other code, or a path that leads away."""
    path = source / MODULES
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise ExportError(f"{path}: is no list of modules, as sentence-transformers writes it; mend or remove it")
    for part in found:
        kind, name = str(part.get("type", "")), str(part.get("path", ""))
        if not kind.startswith(LIBRARY):
            raise ExportError(f"{path}: asks for custom code ('{one_line(kind)}'), which does not go along into artifacts; "
                              "remove the file to compress the model without its modules")  # fmt: skip
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ExportError(f"{path}: names '{one_line(name)}', which is no folder within the model's; mend or remove it")
        yield kind, name


def held_in(source: Path, folder: Path) -> Iterator[Path]:
    """The files of a subfolder; ExportError for one that is too large to be beside a model, or a pickle without which it is
    nothing."""
    within(source, folder)
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.suffix not in CODE]
    for path in found:
        within(source, path)
        if path.suffix in PICKLES:
            if not any(p.suffix == ".safetensors" and p.parent == path.parent for p in found):
                raise ExportError(f"{path}: is a pickle, which may hold code and does not go along; save it as safetensors")
            continue
        if path.stat().st_size > MOST:
            raise ExportError(f"{path}: holds {path.stat().st_size:,} bytes, too much for what goes along with a model; move it")
        yield path
