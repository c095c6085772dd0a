"""What the config.json of an artifact says of its formats: the kind, and the format of every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.cache import merging, policy
from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.files import document, json_of
from compress.export.artifact.patterns import matches, parsed
from compress.formats import Format, parse
from compress.formats.sparsity import Sparsity

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


@dataclass(frozen=True)
class Skipped:
    """What a token leaves out by one matrix. rows: modules whose rows of silent neurons are not read; columns: those whose
    columns are not."""

    how: Sparsity
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def text(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"by": str(self.how), "rows": list(self.rows), "columns": list(self.columns)}


def sparsities(folder: Path) -> dict[str, Skipped]:
    """Module on disk -> what a token leaves out by it, as a native artifact's config.json says; empty where none does."""
    return sparsities_in(declared(folder), folder / "config.json")


def sparsities_in(config: Mapping[str, Any], path: Path = Path("config.json")) -> dict[str, Skipped]:
    """The same from a `quantization_config`; ModelError where it is not as we write it."""
    held, found = config.get("sparsity", {}), dict[str, Skipped]()
    if not isinstance(held, dict):
        raise ModelError(f"{path}: its quantization_config is broken: 'sparsity' is to map modules to what they leave out")
    for module, said in held.items():
        names = [said.get(key) for key in ("rows", "columns")] if isinstance(said, dict) else []
        if len(names) != 2 or not all(isinstance(n, list) and all(isinstance(m, str) for m in n) for n in names):
            raise ModelError(f"{path}: 'sparsity' of '{one_line(module)}' is broken: it is to say by, rows and columns")
        try:
            found[module] = Skipped(Sparsity.parse(str(said.get("by"))), tuple(said["rows"]), tuple(said["columns"]))
        except FormatError as e:
            raise ModelError(f"{path}: '{one_line(module)}': {one_line(str(e))}") from None
    return found


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
