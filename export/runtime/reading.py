"""An artifact's folder, read before a byte is allocated: what config.json says, compared with the headers of the weight files.

Two kinds are read: native artifacts (export/native.py), and compressed-tensors folders of integers, `pack-quantized`. Every
check is here, for the runtime, the vLLM plug-in and `native.read`: versions, formats, names, dtypes and shapes of tensors,
the hashes of compress.json. What is wrong is a ModelError of one line. No path comes from a file, and a link is followed only
within the folder, or into the store of a hub cache that the folder is a snapshot of.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.checkpoint import HASHED_BYTES, INDEX, OWN, OWN_INDEX, SINGLE, Spec, read_header
from compress.errors import CompressError, FormatError, ModelError
from compress.formats import Dense, Format, Int, LowRank, parse

METHOD, VERSION = "compress", 1
MARK = "compress.json"  # in every artifact: which run and settings it comes from
_SCALES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_JSON = 100_000_000  # bytes


@dataclass(frozen=True)
class Matrix:
    """One packed matrix [N, K]: its format, the dtype of its scales, and what its tensors are called, by suffix."""

    format: Format
    shape: tuple[int, int]
    scale_dtype: torch.dtype
    names: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Artifact:
    """A folder whose config and headers agree.

    specs and files: every tensor, and where it is. matrices: those that are packed, by the name of their module on disk. others:
    tensors that belong to no module, such as buffers of older versions.
    """

    folder: Path
    paths: tuple[Path, ...]
    specs: Mapping[str, Spec] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)
    matrices: Mapping[str, Matrix] = field(repr=False)
    others: frozenset[str] = frozenset()


# --- the two kinds ---------------------------------------------------------------------------------------------------


def method(folder: Path) -> str | None:
    """What config.json calls the folder's quantization; None where there is none."""
    found = declared(folder).get("quant_method")
    return found if isinstance(found, str) else None


def open_native(folder: Path) -> Artifact:
    """A native artifact, its hashes compared up to `HASHED_BYTES`."""
    contained(folder)
    texts, paths = formats(folder), shards(folder)
    check_marks(folder, paths)
    specs, files = headers(paths)
    check_index(folder, files)
    packed = {stem: fmt for stem, fmt in texts.items() if not isinstance(fmt, Dense)}
    for stem, fmt in texts.items():
        if isinstance(fmt, Dense) and specs.get(f"{stem}.weight", Spec("", fmt.dtype, ())).dtype != fmt.dtype:
            raise ModelError(f"{folder}: '{stem}.weight' is not {fmt}, as config.json says; they do not belong together")
    others = declared(folder).get("others", [])
    known = frozenset(o for o in others if isinstance(o, str)) if isinstance(others, list) else frozenset[str]()
    return Artifact(folder, paths, specs, files, matrices(folder, packed, specs, files), known)


def open_packed(folder: Path, module_of: Callable[[str], str] = str) -> Artifact:
    """A compressed-tensors folder of integers; `module_of` gives the path in the module tree for a name on disk."""
    contained(folder)
    schemes, paths = integer_schemes(declared(folder)), plain_files(folder)
    check_marks(folder, paths)
    specs, files = headers(paths)
    found: dict[str, Format] = {}
    for name in specs:
        stem = name.removesuffix(".weight_packed")
        if stem != name:
            found[stem] = scheme_of((module_of(stem), stem), schemes, folder)
    return Artifact(folder, paths, specs, files, matrices(folder, found, specs, files))


def formats(folder: Path) -> dict[str, Format]:
    """Module on disk -> format, as a native artifact's config.json says; ModelError for a version that is not known."""
    return formats_in(declared(folder), folder / "config.json")


def formats_in(config: Mapping[str, Any], path: Path = Path("config.json")) -> dict[str, Format]:
    """The same from a `quantization_config`; `path` is for messages."""
    version, texts = config.get("format_version"), config.get("formats")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ModelError(f"{path}: format_version is {version!r}, and {VERSION} is the newest that is read here; "
                         "upgrade compress-pipeline")  # fmt: skip
    if not isinstance(texts, dict) or not all(isinstance(t, str) for t in texts.values()):
        raise ModelError(f"{path}: its quantization_config is broken: 'formats' is to map modules to formats")
    found = {}
    for module, text in texts.items():
        try:
            found[module] = parse(text)
        except FormatError as e:
            raise ModelError(f"{path}: '{one_line(module)}': {one_line(str(e))}") from None
        except ValueError:
            raise ModelError(f"{path}: '{one_line(module)}': '{one_line(text)[:40]}…' is no format") from None
    return found


def integer_schemes(config: Mapping[str, Any]) -> list[tuple[list[str], Int]]:
    """Targets and format of every group of a compressed-tensors config; ModelError for what is not packed integers."""
    try:
        if config.get("transform_config") or config.get("kv_cache_scheme"):
            raise ModelError("config.json: has a transform or a quantized cache, which the runtime does not know")
        return [(list(group["targets"]), integer_of(group, config)) for group in config["config_groups"].values()]
    except (LookupError, TypeError, AttributeError, FormatError) as e:
        why = f"{type(e).__name__}: {one_line(str(e))}"
        raise ModelError(f"config.json: its quantization_config is broken ({why})") from None


def integer_of(group: Mapping[str, Any], config: Mapping[str, Any]) -> Int:
    weights = group["weights"]
    kind, layout = weights.get("type"), group.get("format") or config.get("format")
    if kind != "int" or layout != "pack-quantized" or group.get("input_activations"):
        what = one_line(f"weights of type '{kind}' as '{layout}'")
        raise ModelError(f"config.json: has {what}; only pack-quantized integers are kept packed")
    channel = weights.get("strategy") == "channel"
    return Int(weights["num_bits"], None if channel else weights["group_size"], weights["symmetric"])


def scheme_of(names: tuple[str, str], schemes: list[tuple[list[str], Int]], folder: Path) -> Int:
    """The format of a module, by its path and its name on disk: a target that is a name goes before a pattern ("re:..."), and
    that before the class "Linear"."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target in names,
        lambda target: target.startswith("re:") and any(re.match(target[3:], n) for n in names),
        lambda target: target == "Linear",
    )
    try:
        for test in tests:
            for targets, fmt in schemes:
                if any(test(target) for target in targets):
                    return fmt
    except (re.error, TypeError, AttributeError) as e:
        raise ModelError(f"{folder / 'config.json'}: a target is no pattern ({one_line(str(e))})") from None
    raise ModelError(f"{folder}: '{one_line(names[1])}' is packed, but no target of config.json names it")


# --- files and headers -----------------------------------------------------------------------------------------------


def shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of a native artifact; ModelError where one is missing, or others lie beside them."""
    stray = next((name for name in (INDEX, SINGLE) if (folder / name).exists()), None)
    if stray:
        raise ModelError(f"{folder}: holds {stray} beside {OWN}-00001.safetensors; they do not belong together")
    paths = tuple(sorted(folder.glob(f"{OWN}-[0-9]*.safetensors")))
    wanted = [f"{OWN}-{i:05}.safetensors" for i in range(1, len(paths) + 1)] or [f"{OWN}-00001.safetensors"]
    if [p.name for p in paths] != wanted:
        names = ", ".join(p.name for p in paths[:3]) or "no weights"
        raise ModelError(f"{folder}: holds {names}, not {wanted[0]} and on; a weight file is missing")
    return tuple(within(folder, p) for p in paths)


def plain_files(folder: Path) -> tuple[Path, ...]:
    """The weight files of a stock checkpoint: one, or those that its index names."""
    index = folder / INDEX
    if not index.exists():
        return (within(folder, folder / SINGLE),)
    table = document(index).get("weight_map")
    names = sorted({n for n in table.values() if isinstance(n, str)}) if isinstance(table, dict) else []
    bad = next((n for n in names if Path(n).name != n or not n.endswith(".safetensors")), None)
    if bad or not names:
        raise ModelError(f"{index}: names '{one_line(bad or '')}', which is no weight file of this folder")
    return tuple(within(folder, folder / n) for n in names)


def contained(folder: Path) -> None:
    """ModelError where something in an artifact is a link that leads out of it: nothing there may have another file read."""
    for path in folder.rglob("*"):
        within(folder, path)


def within(folder: Path, path: Path) -> Path:
    """The path; ModelError where it is a link that leads out of the folder."""
    home, target = folder.resolve(), path.resolve()
    store = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if home not in target.parents and target.parent != store:
        raise ModelError(f"{path}: is a link out of the artifact; copy the file itself")
    return path


def headers(paths: Iterable[Path]) -> tuple[dict[str, Spec], dict[str, Path]]:
    """Every tensor and its file; ModelError for a damaged file, or a tensor that is there twice."""
    specs: dict[str, Spec] = {}
    files: dict[str, Path] = {}
    for path in paths:
        found = read_header(path)
        if specs.keys() & found.keys():
            raise ModelError(f"{path}: two weight files hold the same tensor; they do not belong together")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path}: broken safetensors header ({one_line(str(e))}); download it again") from None
        specs |= found
        files |= dict.fromkeys(found, path)
    return specs, files


def check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """ModelError where the index of a native artifact, by which transformers goes, names other files than those read here."""
    path = folder / OWN_INDEX
    if path.exists() and document(within(folder, path)).get("weight_map") != {name: file.name for name, file in files.items()}:
        raise ModelError(f"{path}: says something else than the weight files themselves; export it again")


def matrices(
    folder: Path, packed: Mapping[str, Format], specs: Mapping[str, Spec], files: Mapping[str, Path]
) -> dict[str, Matrix]:
    """The packed matrices; ModelError for a tensor that is missing or not what its format asks for."""
    shapes = read_shapes(packed, specs, files, folder)
    found = {}
    for stem, fmt in packed.items():
        scale = specs.get(f"{stem}.weight_scale")
        dtype = scale.dtype if scale and scale.dtype in _SCALES else torch.bfloat16
        found[stem] = matrix(folder, stem, fmt, shapes, dtype, specs)
    return found


def matrix(
    folder: Path, stem: str, fmt: Format, shapes: Mapping[str, tuple[int, int]], scale: torch.dtype, specs: Mapping[str, Spec]
) -> Matrix:
    """One matrix whose tensors are all there as its format says."""
    n, k = shapes[f"{stem}.weight_shape"]
    try:
        wanted = fmt.tensors((n, k), scale)
    except CompressError as e:
        raise ModelError(f"{folder / 'config.json'}: '{one_line(stem)}': {e}") from None
    for suffix, (dtype, shape) in wanted.items():
        spec = specs.get(f"{stem}.{suffix}")
        if spec is None or (spec.dtype, spec.shape) != (dtype, shape):
            held = "missing" if spec is None else f"{str(spec.dtype)[6:]} {list(spec.shape)}"
            raise ModelError(f"{folder}: '{one_line(stem)}.{suffix}' is {held}, {fmt} needs {str(dtype)[6:]} {list(shape)}; "
                             "config and weights do not belong together")  # fmt: skip
    sides = {"lora_A.weight_shape": (fmt.rank, k), "lora_B.weight_shape": (fmt.rank, n)} if isinstance(fmt, LowRank) else {}
    for suffix, side in sides.items():
        if suffix in wanted and shapes[f"{stem}.{suffix}"] != side:
            said = list(shapes[f"{stem}.{suffix}"])
            raise ModelError(f"{folder}: '{one_line(stem)}.{suffix}' says {said}, not {list(side)}; the file is damaged")
    return Matrix(fmt, (n, k), scale, {suffix: f"{stem}.{suffix}" for suffix in wanted})


def read_shapes(
    packed: Iterable[str], specs: Mapping[str, Spec], files: Mapping[str, Path], folder: Path
) -> dict[str, tuple[int, int]]:
    """What the `weight_shape` tensors say, of matrices and of quantized factors."""
    found: dict[str, tuple[int, int]] = {}
    wanted: dict[Path, list[str]] = {}
    for stem in packed:
        if f"{stem}.weight_shape" not in specs:
            raise ModelError(f"{folder}: '{one_line(stem)}.weight_shape' is missing, though config.json gives '{one_line(stem)}' "
                             "a format; config and weights do not belong together")  # fmt: skip
        for name in (f"{stem}.weight_shape", f"{stem}.lora_A.weight_shape", f"{stem}.lora_B.weight_shape"):
            if name in specs:
                wanted.setdefault(files[name], []).append(name)
    for path, names in wanted.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                held = file.get_tensor(name).tolist() if specs[name].shape == (2,) else []
                if len(held) != 2 or not all(isinstance(x, int) and 0 < x < 1 << 31 for x in held):
                    raise ModelError(f"{path}: '{name}' says {held}, which is no shape of a matrix; the file is damaged")
                found[name] = (held[0], held[1])
    return found


def check_marks(folder: Path, paths: Iterable[Path]) -> None:
    """ModelError for a file that is not the one that was written, by its size and, where that takes seconds, its hash."""
    note, paths = json_of(folder / MARK), tuple(paths)
    hashes, noted = note.get("sha256"), note.get("sizes")
    small = sum(path.stat().st_size for path in paths) <= HASHED_BYTES
    for path in (*paths, folder / "config.json"):
        held = path.stat().st_size
        name = path.relative_to(folder).as_posix()
        size = noted.get(name, held) if isinstance(noted, dict) and path in paths else held
        whole = hashes.get(name) if isinstance(hashes, dict) and small else None
        if size != held or (whole is not None and whole != sha256(path)):
            raise ModelError(f"{path}: is not the file that was written (see {MARK}); it is damaged, copy it again")


# --- JSON and hashes -------------------------------------------------------------------------------------------------


def declared(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's config.json; empty where there is none, or the file is no JSON mapping."""
    found = json_of(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}


def json_of(path: Path) -> dict[str, Any]:
    """A JSON mapping; empty where the file is absent, damaged, or holds something else."""
    try:
        return document(path)
    except ModelError:
        return {}


def document(path: Path) -> dict[str, Any]:
    """A JSON mapping; ModelError where the file is absent, damaged, or holds something else."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        found = json.loads(path.read_text())
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: is no JSON ({one_line(str(e))})") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: is no JSON mapping")
    return found


def sha256(file: Path) -> str:
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def one_line(text: str) -> str:
    """Text of a foreign file for a message: without control characters, at most 200 characters."""
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f]", " ", text)[:200]
