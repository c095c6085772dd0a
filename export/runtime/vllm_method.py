"""Native artifacts in vLLM: the config that config.json's `quant_method` selects, and the method of its linear layers.

vLLM joins q, k and v into one layer, and gate and up. Such a layer has a packed matrix for each of them, so they may differ in
format, or be dense. Tensor parallelism would split packed rows, and mixtures have layers of their own kind: both are refused.
Layers may differ in shape: that is the business of vllm_shapes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from compress.cache.merging import MERGED
from compress.cache.policy import DECLARED
from compress.errors import ModelError, one_line
from compress.export.artifact import config as artifact_config
from compress.export.artifact.skipped import sparsities_in
from compress.export.runtime import reading, vllm_shapes
from compress.export.runtime.linear import PackedLinear
from compress.formats import Dense, Float, Format, Served, numbers_of

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


@register_quantization_config(artifact_config.METHOD)
class NativeConfig(QuantizationConfig):  # type: ignore[misc]
    """A native artifact's formats, by module."""

    def __init__(self, formats: dict[str, Format]):
        super().__init__()
        self.formats = formats

    def get_name(self) -> str:
        return artifact_config.METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeConfig:
        if config.get(DECLARED):
            raise ModelError(
                "this artifact has a policy of the KV cache by head, which vLLM's paged cache cannot follow; use transformers"
            )
        if config.get(MERGED):
            raise ModelError("long prompts of this artifact are merged, which the vLLM plug-in does not do; use transformers")
        if sparse := sparsities_in(config):
            raise ModelError(f"tokens leave out a part of '{one_line(next(iter(sparse)))}', which the vLLM plug-in does not do; "
                             "use transformers")  # fmt: skip
        return cls(artifact_config.formats_in(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called before a model is built whose modules vLLM names otherwise than the checkpoint does."""
        self.formats = hf_to_vllm_mapper.apply_dict(self.formats)

    def maybe_update_config(self, model_name: str, *_: Any, **options: Any) -> None:
        """Called with the model's folder before anything is loaded: read it as every reader does."""
        if Path(model_name).is_dir():
            reading.open_native(Path(model_name))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        vllm_shapes.check()
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.formats):
            raise ModelError(f"'{prefix}' has packed experts, which the vLLM plug-in does not serve; use transformers")
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            if not isinstance(self.formats.get(prefix), Dense | None):
                raise ModelError(f"'{prefix}' is a packed embedding, which the vLLM plug-in does not serve; use transformers")
            return None
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        path, _, last = prefix.rpartition(".")
        names = [f"{path}.{part}" if path else part for part in self.packed_modules_mapping.get(last, [last])]
        formats = [self.formats.get(name) for name in names]
        if all(fmt is None or isinstance(fmt, Dense) for fmt in formats):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if any(fmt is not None and (isinstance(fmt, Served) or isinstance(numbers_of(fmt), Float)) for fmt in formats):
            raise ModelError(f"'{prefix}' has small floats or rounded inputs, which vLLM serves by kernels of its own: export "
                             "compressed_tensors for it, or use transformers")  # fmt: skip
        return PackedMethod([None if isinstance(fmt, Dense) else fmt for fmt in formats], prefix)


class PackedMethod(LinearMethodBase):  # type: ignore[misc]
    """The method of one layer: the format of each of the matrices that it joins, None for a dense one."""

    def __init__(self, formats: list[Format | None], prefix: str):
        self.formats, self.prefix = formats, prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        """Empty parameters of the names in the files; their loader keeps what it is given for each of the joined matrices."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ModelError(f"'{self.prefix}' is packed, which serves on one device; set tensor_parallel_size to 1")
        layer.compress_dtype, layer.compress_held = params_dtype, [{} for _ in self.formats]
        rows = output_partition_sizes if len(self.formats) > 1 else [output_size]  # what files join is one matrix
        head = isinstance(layer, ParallelLMHead)  # which vLLM rounds up
        layer.compress_built = [(None if head else n, input_size) for n in rows]
        for suffix in sorted({s for fmt in self.formats for s in suffixes(fmt)}):
            child, _, leaf = suffix.rpartition(".")
            if child and child not in layer._modules:
                layer.add_module(child, nn.Module())
            held: Any = nn.Parameter(torch.empty(0), requires_grad=False)
            held.weight_loader = loader(layer.compress_held, suffix)
            (layer.get_submodule(child) if child else layer).register_parameter(leaf, held)

    def process_weights_after_loading(self, layer: Any) -> None:
        """What was loaded as packed modules, repacked for the kernel where there is one."""
        matrices = nn.ModuleList()
        for fmt, held, built in zip(self.formats, layer.compress_held, layer.compress_built, strict=True):
            matrix = module_of(fmt, held, layer.compress_dtype, self.prefix)
            same_shape((matrix.out_features, matrix.in_features), built, self.prefix)
            matrices.append(matrix)
        for suffix in {s for fmt in self.formats for s in suffixes(fmt)}:
            child, _, leaf = suffix.rpartition(".")
            if child:
                layer._modules.pop(child, None)
            else:
                delattr(layer, leaf)
        del layer.compress_held
        layer.add_module("matrices", matrices)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]: the outputs of all matrices side by side."""
        found = [matrix(x) for matrix in layer.matrices]
        out = found[0] if len(found) == 1 else torch.cat(found, -1)
        return out if bias is None else out + bias


def suffixes(fmt: Format | None) -> list[str]:
    """The names of a matrix's tensors, whatever its shape."""
    return ["weight"] if fmt is None else list(fmt.tensors((1 << 16, 1 << 16)))


def loader(held: list[dict[str, Tensor]], suffix: str) -> Callable[..., None]:
    """A weight loader that keeps a tensor under its suffix for the matrix that vLLM names: q, k, v, or a number."""

    def load(_: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        held[shard if isinstance(shard, int) else SHARDS[shard]][suffix] = tensor.clone()

    return load


def same_shape(held: tuple[int, int], built: tuple[int | None, int], prefix: str) -> None:
    """ModelError for a matrix of another shape than vLLM reckons with: `built`, where None is whatever there is."""
    rows, columns = built
    if held != (rows or held[0], columns):
        raise ModelError(f"'{prefix}' is {list(held)}, and {[rows or held[0], columns]} by config.json; config and weights do "
                         "not belong together")  # fmt: skip


def module_of(fmt: Format | None, held: dict[str, Tensor], dtype: torch.dtype, prefix: str) -> nn.Linear:
    """One matrix of a layer; ModelError where a tensor of it was not in the files."""
    lost = next((s for s in suffixes(fmt) if s not in held), None)
    if lost:
        raise ModelError(f"'{prefix}': '{lost}' was not loaded; config and weights do not belong together")
    if fmt is None:
        n, k = held["weight"].shape
        plain = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
        plain.weight = nn.Parameter(held["weight"].to(dtype), requires_grad=False)
        return plain
    n, k = held["weight_shape"].tolist()
    scale = next((held[suffix].dtype for suffix in reading.SCALES if suffix in held), torch.bfloat16)
    found = PackedLinear(str(fmt), (n, k), dtype, False, scale)
    found.load_state_dict(held, assign=True)
    found.prepare()
    return found
