"""What transformers asks to load a folder with packed matrices: quantizers for native artifacts and for compressed-tensors ones.

A quantizer here replaces modules by packed ones, whose buffers transformers then fills from the files; nothing is made dense.
Every name in the files is compared with every name in the model before a byte is read, so what transformers would only warn
of, and fill with random numbers, is an error. The weights of a native artifact have names that transformers does not look
for; the config's `transformers_weights` tells it, and is gone again before a model has the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import hub
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.cache.merging import Merging
from compress.cache.policy import Policy
from compress.errors import ModelError, one_line
from compress.export.artifact import files as artifact_files
from compress.export.artifact.config import merging_of, policy_of
from compress.export.runtime import reading, sparse
from compress.export.runtime.cache import follow
from compress.export.runtime.experts import ROLES, PackedExperts
from compress.export.runtime.linear import PackedEmbedding, PackedHead, PackedLinear, leaf_of, prepare
from compress.export.runtime.merging import merge_long
from compress.export.runtime.reading import Artifact, Matrix
from compress.formats import Rotated
from compress.state.checkpoint import OWN, OWN_INDEX


class DeclaredConfig(QuantizationConfigMixin):
    """A `quantization_config` as it stands in config.json."""

    def __init__(self, **declared: Any):
        self.__dict__.update(declared)


class Renamed(WeightRenaming):
    """Tensors of packed matrices: their names on disk to those of the modules' buffers, exactly."""

    __slots__ = ("table",)

    def __init__(self, table: Mapping[str, str]):
        super().__init__(source_patterns="", target_patterns="")
        self.table = table

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.table.get(source_key, source_key), None

    def was_used(self) -> bool:
        return False  # not to be undone when something else is saved


class PackedQuantizer(HfQuantizer):
    """What both kinds share. `artifact` is known by the time that the model is built."""

    requires_calibration = True
    artifact: Artifact
    policy: Policy | None = None  # of the cache, which goes with the folder, and with no model that is saved from it
    merging: Merging | None = None  # of long prompts; the same

    def validate_environment(self, *_: Any, device_map: Any = None, **options: Any) -> None:
        """Called with the map that was asked for, and again with the one that was found for it."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ModelError("packed matrices are not offloaded to disk; use more memory, or 'compress eval', which streams")

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        vars(model.config).pop("transformers_weights", None)
        names = Names(model)
        self.open([Path(file) for file in options["checkpoint_files"]], names)
        self.table = replace(model, self.artifact, names)
        sparse.check(model, self.artifact, lambda stem: path_of(names, stem))
        beside, self.sparse = sparse.hold(model, self.artifact.skipped, lambda stem: path_of(names, stem))
        self.table |= beside
        self.kept = {name for matrix in self.artifact.matrices.values() for name in matrix.names.values()} | beside.keys()
        check_names(model, self.artifact, self.table)
        tied = [name for name in model.all_tied_weights_keys if name.endswith(".weight")]
        packed_heads = [name for name in tied if isinstance(holder(model, name), PackedHead)]
        for name in packed_heads:
            del model.all_tied_weights_keys[name]  # there is no parameter to tie: they share a table

    def open(self, files: list[Path], names: Names) -> None:
        """Set `artifact`, unless it is known already."""

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        return [Renamed(self.table), *weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for tensors of a format, which stay as they are in a model of any dtype."""
        kept = converter.source_patterns[0] in self.kept
        return None if kept else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        plain = not (self.artifact.matrices or self.artifact.skipped or self.policy or self.merging)
        if plain:  # a model like any other from here on, to be trained
            self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        prepare(model)
        sparse.arrange(model, self.sparse)
        return model

    def is_serializable(self) -> bool:
        """So that what follows may tell a packed model from an adapter upon one."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        if not getattr(model, "_hf_peft_config_loaded", False):
            raise ModelError(
                "a packed model, or one with a policy of its cache or merged contexts, is not saved again: copy the folder that "
                "it was loaded from"
            )
        return None, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class NativeQuantizer(PackedQuantizer):
    """Loads native artifacts."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the config before files are looked for, so this is where their name can be said."""
        self.artifact = reading.open_native(local(config))
        several = len(self.artifact.paths) > 1
        if several and not (self.artifact.folder / OWN_INDEX).exists():
            raise ModelError(f"{self.artifact.folder}: has several weight files and no {OWN_INDEX}; export it again")
        config.transformers_weights = OWN_INDEX if several else self.artifact.paths[0].name
        self.policy, self.merging = policy_of(self.artifact.folder), merging_of(self.artifact.folder)
        return config

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **options)
        if self.policy:
            follow(model, self.policy)
        if self.merging:
            merge_long(model, self.merging)
        return model


class IntegerQuantizer(PackedQuantizer):
    """Loads compressed-tensors folders, and keeps them packed."""

    def open(self, files: list[Path], names: Names) -> None:
        self.artifact = reading.open_packed(files[0].parent, lambda stem: names.of(f"{stem}.weight")[0].removesuffix(".weight"))


def local(config: Any) -> Path:
    """The folder of a config; of a model on the hub, once its weights are there."""
    name, commit = str(config._name_or_path), getattr(config, "_commit_hash", None)
    if not name:  # a class that is no Auto class does not tell its config
        raise ModelError("which folder is loaded is told by transformers' Auto classes only: load it by one, such as "
                         "AutoModelForCausalLM or AutoModelForImageTextToText, or by compress.export.runtime.load")  # fmt: skip
    if Path(name).is_dir():
        return Path(name)
    options = {"revision": commit, "_raise_exceptions_for_missing_entries": False}
    index = hub.cached_file(name, OWN_INDEX, **options)
    if index:
        hub.get_checkpoint_shard_files(name, index, revision=commit)  # type: ignore[no-untyped-call]
    found = index or hub.cached_file(name, f"{OWN}-00001.safetensors", revision=commit)
    hub.cached_file(name, artifact_files.MARK, **options)
    return Path(str(found)).parent


# --- names on disk and in the model ----------------------------------------------------------------------------------


class Names:
    """What transformers calls a tensor of a checkpoint while it loads a model: the same renaming, on the same model."""

    def __init__(self, model: Any):
        conversions = conversion_mapping.get_model_conversion_mapping(model)
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.prefix, self.held = model.base_model_prefix, model.state_dict()

    def of(self, name: str) -> tuple[str, str | None]:
        """The name in the model, and the pattern of the converter that joins the tensor with others, if one does."""
        rename = core_model_loading.rename_source_key
        found, pattern = rename(name, self.renamings, self.converters, self.prefix, self.held)
        if found not in self.held and name in self.held:
            found, pattern = rename(name, [], [], self.prefix, self.held)
        return found, pattern

    def targets(self, found: str, pattern: str | None) -> list[str]:
        """All tensors of the model into which a converter puts what it was given under the name `found`."""
        first, *more = next((c.target_patterns for c in self.converters if pattern in c.source_patterns), [""])
        return [found, *(found.replace(first, other) for other in more)]

    def expert(self, stem: str, found: str, pattern: str) -> tuple[str, tuple[int, str]] | None:
        """The path of the experts, the number and the role of one expert's matrix; None where it is none."""
        path, _, leaf = found.rpartition(".")
        sources = next(c.source_patterns for c in self.converters if pattern in c.source_patterns)
        number = re.search(r"\.(\d+)\.[^.]+$", stem)
        if leaf not in ("gate_up_proj", "down_proj") or not number or len(sources) != (1 if leaf == "down_proj" else 2):
            return None
        return path, (int(number[1]), "down" if leaf == "down_proj" else ROLES[sources.index(pattern)])


def check_names(model: Any, artifact: Artifact, table: Mapping[str, str]) -> None:
    """ModelError for a tensor of the files that the model has no place for, or one of the model that no file holds."""
    names, loaded = Names(model), set()
    passed = [re.escape(o) for o in artifact.others]
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), *passed, r"rotary_emb\.inv_freq"]
    for name, spec in artifact.specs.items():
        found, pattern = (table[name], None) if name in table else names.of(name)
        wanted = names.held.get(found)
        if wanted is None and not any(re.search(i, name) for i in ignored):
            raise ModelError(f"{artifact.files[name]}: holds '{one_line(name)}', which is no tensor of {type(model).__name__}")
        if wanted is not None:
            loaded.update(names.targets(found, pattern) if pattern else [found])
            same = tuple(wanted.shape) == spec.shape and wanted.is_floating_point() == spec.dtype.is_floating_point
            if pattern is None and not same:
                held, said = (f"{str(t.dtype)[6:]} {list(t.shape)}" for t in (spec, wanted))
                raise ModelError(f"{artifact.files[name]}: '{one_line(name)}' is {held}, the config says {said}; "
                                 "they do not belong together")  # fmt: skip
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} & loaded:
            loaded |= {target, source}
    spared = model._keys_to_ignore_on_load_missing or []
    lost = next((n for n in names.held if n not in loaded and not any(re.search(s, n) for s in spared)), None)
    if lost:
        raise ModelError(f"{artifact.folder}: the config asks for '{one_line(lost)}', which the weights do not hold")
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *passed}


# --- packed modules in a model ---------------------------------------------------------------------------------------


def replace(model: Any, artifact: Artifact, names: Names) -> dict[str, str]:
    """Put packed modules, without content, in the places of an artifact's matrices; name on disk -> name in the model."""
    table: dict[str, str] = {}
    experts: dict[str, dict[tuple[int, str], nn.Module]] = {}
    for stem, matrix in artifact.matrices.items():
        found, pattern = names.of(f"{stem}.weight")
        if found not in names.held:
            said = f"gives a format to '{one_line(stem)}', which is no matrix of this model"
            raise ModelError(f"{artifact.folder / 'config.json'}: {said}")
        place = names.expert(stem, found, pattern) if pattern else None
        if place:
            path, (number, role) = place
            experts.setdefault(path, {})[number, role] = packed_expert(matrix, names.held[found], role, stem)
            path = f"{path}.{role}.{number}"
        else:
            path = found.removesuffix(".weight")
            model.set_submodule(path, packed(model.get_submodule(path), matrix, stem))
            share(model, path, found)
        table |= {name: f"{path}.{leaf_of(suffix)}" for suffix, name in matrix.names.items()}
    for path, held in experts.items():
        model.set_submodule(path, complete(model.get_submodule(path), path, held, artifact, names, table))
    return table


def path_of(names: Names, stem: str) -> str:
    """The module that a stem on disk names."""
    found, joined = names.of(f"{stem}.weight")
    if found not in names.held or joined:
        raise ModelError(f"config.json leaves out a part of '{one_line(stem)}', which is no matrix of this model")
    return found.removesuffix(".weight")


def holder(model: Any, name: str) -> nn.Module:
    """The module that a tensor belongs to."""
    found: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return found


def share(model: Any, path: str, name: str) -> None:
    """Give the modules that share an embedding's matrix, which has been packed, its table; ModelError for others than a head."""
    table = model.get_submodule(path)
    tied = [(target, source) for target, source in model.all_tied_weights_keys.items() if name in (target, source)]
    for pair in tied:
        other = pair[0] if pair[1] == name else pair[1]
        place = other.removesuffix(".weight")
        head = model.get_submodule(place)
        if not isinstance(table, PackedEmbedding) or type(head).forward is not nn.Linear.forward:
            raise ModelError(f"'{one_line(path)}' is packed; how '{one_line(place)}' shares its matrix is not known here, use "
                             "'compress eval'")  # fmt: skip
        model.set_submodule(place, PackedHead(table, head.bias))


def factor_of(module: nn.Embedding) -> float | None:
    """What an embedding multiplies the rows by that it looks up; None where it does something else with them."""
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    held: Any = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    if not isinstance(held, float | int):
        return None
    whole: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # a model is built on meta, in its own dtype
    rows, ids = torch.rand(3, 4, **whole), torch.arange(3, device="cpu")
    buffers = {name: torch.tensor(float(held), **whole) for name in module._buffers}
    trial = copy(module)
    trial.__dict__ = {**module.__dict__, "padding_idx": None, "_parameters": {"weight": nn.Parameter(rows)}, "_buffers": buffers}
    return float(held) if torch.equal(trial(ids), rows * held) else None


def packed(module: nn.Module, matrix: Matrix, stem: str) -> nn.Module:
    """The packed module in the place of a Linear, of GPT-2's Conv1D, or an embedding; ModelError for others."""
    factor = factor_of(module) if isinstance(module, nn.Embedding) else None
    if not isinstance(module, Conv1D) and type(module).forward is not nn.Linear.forward and factor is None:
        raise ModelError(f"'{one_line(stem)}' is packed, but is a {type(module).__name__}, which the runtime keeps dense; use "
                         "'compress eval'")  # fmt: skip
    weight: Any = module.weight
    shape = tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)
    same_shape(stem, shape, matrix)
    if isinstance(module, nn.Embedding) and isinstance(matrix.format, Rotated) and not matrix.format.inputs_only:
        raise ModelError(f"'{one_line(stem)}' is an embedding in {matrix.format}, and rows that are mixed are not looked up")
    if isinstance(module, nn.Embedding):
        padding = module.padding_idx
        return PackedEmbedding(str(matrix.format), matrix.shape, weight.dtype, padding, matrix.scale_dtype, factor or 1.0)
    return PackedLinear(str(matrix.format), matrix.shape, weight.dtype, module.bias is not None, matrix.scale_dtype)


def packed_expert(matrix: Matrix, joined: torch.Tensor, role: str, stem: str) -> PackedLinear:
    """One matrix of one expert, where `joined` [experts, out, in] holds those of all: gate above up."""
    _, rows, columns = joined.shape if joined.ndim == 3 else (0, 0, 0)
    same_shape(stem, (rows if role == "down" else rows // 2, columns), matrix)
    return PackedLinear(str(matrix.format), matrix.shape, joined.dtype, False, matrix.scale_dtype)


def same_shape(stem: str, shape: tuple[int, ...], matrix: Matrix) -> None:
    if shape != matrix.shape:
        said = f"{list(matrix.shape)}, the config says {list(shape)}"
        raise ModelError(f"'{one_line(stem)}' is {said}; they do not belong together")


def complete(
    stock: Any, path: str, held: dict[tuple[int, str], nn.Module], artifact: Artifact, names: Names, table: dict[str, str]
) -> PackedExperts:
    """All experts of a block, those that are dense on disk as Linears; `table` is told of the latter."""
    parameters = {n: p for n, p in stock.named_parameters()}
    if set(parameters) != {"gate_up_proj", "down_proj"} or not getattr(stock, "is_concatenated", True):
        raise ModelError(f"'{path}' has packed experts, and {type(stock).__name__} is not known here; use 'compress eval'")
    for name in artifact.specs.keys() - table.keys():
        found, pattern = names.of(name)
        place = names.expert(name.removesuffix(".weight"), found, pattern) if pattern else None
        if place and place[0] == path:
            number, role = place[1]
            _, rows, columns = names.held[found].shape
            dtype, size = names.held[found].dtype, rows if role == "down" else rows // 2
            held[number, role] = nn.Linear(columns, size, bias=False, device="meta", dtype=dtype)
            table[name] = f"{path}.{role}.{number}.weight"
    count = len(parameters["down_proj"])
    lost = next((f"{e}.{role}" for e in range(count) for role in ROLES if (e, role) not in held), None)
    if lost or len(held) != len(ROLES) * count:
        raise ModelError(f"{artifact.folder}: '{path}' has {count} experts, and the files hold others; expert {lost} is missing")
    return PackedExperts(stock, held)
