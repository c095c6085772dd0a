"""What the config.json of an artifact says of its formats: the kind, and the format of every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.cache import merging, policy
from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.files import document, json_of
from compress.export.artifact.patterns import matches, parsed
from compress.formats import Format, parse

METHOD, VERSION = "compress", 1
PATTERN = "re:"  # how a target that is a pattern begins
PLAIN_LORA = {"use_dora": False, "use_rslora": False, "use_qalora": False, "lora_bias": False, "bias": "none",
              "modules_to_save": None, "alora_invocation_tokens": None, "layer_replication": None, "target_parameters": None,
              "trainable_token_indices": None, "exclude_modules": None, "layers_to_transform": None,
              "layers_pattern": None}  # fmt: skip


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


def policy_of(folder: Path) -> policy.Policy | None:
    """The policy of the KV cache that an artifact is to be run with; None where its config says of none. ModelError where there
    should be one, or there is one that the config does not know."""
    path = folder / policy.FILE
    if (declared(folder).get(policy.DECLARED) is True) != path.is_file():
        why = "is not asked for by" if path.is_file() else "is missing, and asked for by"
        raise ModelError(f"{path}: {why} config.json; they do not belong together, copy or export the folder again")
    return policy.read(document(path), str(path)) if path.is_file() else None


def merging_of(folder: Path) -> merging.Merging | None:
    """How an artifact has long prompts merged; None where its config says of none. ModelError as `policy_of` has it."""
    path, bias = folder / merging.FILE, folder / merging.BIAS
    said = declared(folder).get(merging.MERGED) is True
    for each in (path, bias):
        if said != each.is_file():
            why = "is missing, and asked for by" if said else "is not asked for by"
            raise ModelError(f"{each}: {why} config.json; they do not belong together, copy or export the folder again")
    return merging.read(document(path), merging.load_bias(bias), str(path)) if said else None


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


def lora_ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """Module -> rank of a PEFT adapter whose `adapter_config.json` says `config`. ValueError where a product is scaled; whatever
    else may be wrong with a config is a LookupError, TypeError or AttributeError besides."""
    ranks = {}
    for module in list(config["target_modules"]):
        rank = matched(config.get("rank_pattern") or {}, module, config["r"])
        if matched(config.get("alpha_pattern") or {}, module, config["lora_alpha"]) != rank:
            raise ValueError(f"scales '{module}' by another number than 1")
        ranks[module] = int(rank)
    return ranks


def beyond_lora(config: Mapping[str, Any]) -> str | None:
    """What of a PEFT adapter is more than W = Q + B A; None where it is that."""
    if config["peft_type"] != "LORA":
        return str(config["peft_type"])
    return next((f"{key}: {config[key]}" for key, none in PLAIN_LORA.items() if config.get(key, none) not in (none, None)), None)


def declared(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a folder's config.json; empty where there is none, or the file is no JSON mapping."""
    found = json_of(folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}
