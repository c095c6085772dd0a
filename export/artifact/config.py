"""What the config.json of an artifact says of its formats: the kind, and the format of every matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.files import json_of
from compress.export.artifact.patterns import matches, parsed
from compress.formats import Format, Int, parse

METHOD, VERSION = "compress", 1
PATTERN = "re:"  # how a target that is a pattern begins


def method(folder: Path) -> str | None:
    """What config.json calls the folder's quantization; None where there is none."""
    found = declared(folder).get("quant_method")
    return found if isinstance(found, str) else None


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


def integer_schemes(config: Mapping[str, Any], path: Path = Path("config.json")) -> list[tuple[list[str], Int]]:
    """Targets and format of every group of a compressed-tensors config; ModelError for what is not packed integers, or a
    target that is a pattern which is not read. `path` is for messages."""
    check_patterns(config, path)
    try:
        if config.get("transform_config") or config.get("kv_cache_scheme"):
            raise ModelError(f"{path}: has a transform or a quantized cache, which is not read here")
        return [(list(group["targets"]), integer_of(group, config, path)) for group in config["config_groups"].values()]
    except (LookupError, TypeError, AttributeError, FormatError) as e:
        why = f"{type(e).__name__}: {one_line(str(e))}"
        raise ModelError(f"{path}: its quantization_config is broken ({why})") from None


def integer_of(group: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Int:
    """The format of one group; ModelError for weights that are no packed integers, or whose scales are shared in another way."""
    weights = group["weights"]
    kind, layout = weights.get("type"), group.get("format") or config.get("format")
    if kind != "int" or layout != "pack-quantized" or group.get("input_activations") or group.get("output_activations"):
        what = one_line(f"weights of type '{kind}' as '{layout}'")
        raise ModelError(f"{path}: has {what}; only pack-quantized integers are read, with activations as they are")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    order = weights.get("actorder")
    if strategy not in ("channel", "group") or order not in (None, False, "static", "weight"):
        what = one_line(f"strategy '{strategy}', actorder '{order}'")
        raise ModelError(f"{path}: has {what}; only a scale for each group in the order of inputs, or for each output, is read")
    whole = type(weights["num_bits"]) is int and (strategy == "channel" or type(size) is int)
    if type(weights["symmetric"]) is not bool or not whole:
        raise TypeError("num_bits and group_size are to be integers, symmetric true or false")
    return Int(weights["num_bits"], None if strategy == "channel" else size, weights["symmetric"])


def scheme_of(names: tuple[str, str], schemes: list[tuple[list[str], Int]], folder: Path) -> Int:
    """The format of a module, by its path and its name on disk: a target that is a name goes before a pattern ("re:..."), and
    that before the class "Linear"."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target in names,
        lambda target: target.startswith(PATTERN) and any(matches(target.removeprefix(PATTERN), n) for n in names),
        lambda target: target == "Linear",
    )
    for test in tests:
        for targets, fmt in schemes:
            if any(test(target) for target in targets):
                return fmt
    raise ModelError(f"{folder}: '{one_line(names[1])}' is packed, but no target of config.json names it")


def check_patterns(config: Mapping[str, Any], path: Path = Path("config.json")) -> None:
    """ModelError where a list of targets, or of what is left out, holds a pattern that is not read, or something else than names:
    engines would give it to `re`."""
    groups = config.get("config_groups")
    held = [group.get("targets") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    for names in (*held, config.get("ignore") or []):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{path}: a target is no pattern and no name: targets and ignore are to be lists of texts")
        for name in names:
            if name.startswith(PATTERN):
                try:
                    parsed(name.removeprefix(PATTERN))
                except ModelError as e:
                    raise ModelError(f"{path}: a target, {e}") from None


def matched(patterns: Mapping[str, int], module: str, default: int) -> int:
    """The value that PEFT takes for a module out of patterns, which are to fit a whole name or what follows a dot in it. All are
    looked at, as PEFT gives each to `re`."""
    found = [value for pattern, value in patterns.items() if matches(rf"(.*\.)?({pattern})$", module)]
    return found[0] if found else default


def declared(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's config.json; empty where there is none, or the file is no JSON mapping."""
    found = json_of(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}
