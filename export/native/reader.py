"""A native artifact read back as the state that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compress.cache import merging
from compress.cache.policy import FILE, SERVED, check_belongs
from compress.errors import FormatError, ModelError
from compress.export.artifact import checks, files, skipped
from compress.export.artifact.config import METHOD, declared, formats, merging_of, policy_of
from compress.export.artifact.tensors import Placed, state_of
from compress.formats import Format
from compress.formats.sparsity import IN_CONFIGS, Sparsity, activation_of
from compress.model.attention import heads
from compress.model.model import Model, open_model
from compress.state import State
from compress.state.graph import Graph, Site
from compress.state.plan import check_fits

READER = "our reader of native artifacts, streamed"


def belonging(graph: Graph) -> set[str]:
    """The names of all tensors of a checkpoint in which nothing is quantized."""
    joined = {s.joined for s in graph if s.expert is not None}
    return joined | {s.weight for s in graph if not s.tied} | graph.parameters.keys()


def beside(graph: Graph, sparsity: Mapping[str, Sparsity]) -> set[str]:
    """The names of all thresholds and predictors."""
    return {f"{graph[name].stem}.{suffix}" for name, how in sparsity.items() for suffix in how.tensors(graph[name].shape)}


def is_artifact(folder: Path) -> bool:
    """Whether a folder's config says that it is a native artifact."""
    return declared(folder).get("quant_method") == METHOD


def open_artifact(folder: Path) -> Model:
    """The model of a native artifact, without its weights' meaning; ModelError for a version that we do not know."""
    files.contained(folder)
    formats(folder)
    files.shards(folder)
    model = open_model(str(folder), leave=None)
    del model.config.quantization_config
    return model


def read(folder: Path) -> State:
    """The state that a native artifact holds; ModelError where its files do not belong together."""
    model = open_artifact(folder)
    paths = files.shards(folder)
    files.check_marks(folder)
    files.check_index(folder, files.headers(paths)[1])
    by_stem = {s.stem: s for s in model.graph if not s.tied}
    stored: dict[str, Placed] = {}
    for module, fmt in formats(folder).items():
        if module not in by_stem:
            raise ModelError(f"{folder / 'config.json'}: gives a format to '{module}', which is no matrix of this model")
        stored[by_stem[module].name] = placed(by_stem[module], fmt, model, folder)
    sparsity = sparsity_of(folder, model, by_stem)
    check_names(folder, model, stored, sparsity)
    return with_serving(replace(state_of(model, stored), sparsity=sparsity), folder)


def with_serving(found: State, folder: Path) -> State:
    """With what the runtime is told besides; ModelError where that is of another model."""
    if policy := policy_of(folder):
        check_belongs(policy, {each.layer: (each.sliding, each.units, each.width) for each in heads(found)}, str(folder / FILE))
        found = replace(found, serving={SERVED: policy.json()})
    if merged := merging_of(folder):
        positions = getattr(found.config.get_text_config(), "max_position_embeddings", None)
        merging.check_belongs(merged, len(found.graph.blocks), positions, str(folder / merging.FILE))
        found = replace(found, serving={**found.serving, merging.MERGED: merged.told()})
    return found


def sparsity_of(folder: Path, model: Model, by_stem: Mapping[str, Site]) -> dict[str, Sparsity]:
    """Site -> how it is found what a token needs of it; ModelError where config, weights and model do
    not agree on that."""
    blocks = {stem: site for stem, site in by_stem.items() if site.block is not None and site.expert is None}
    said = skipped.of_weights(folder, model.checkpoint.specs)
    known = IN_CONFIGS.get(activation_of(model.config), "")
    skipped.check(said, lambda stem: blocks[stem].shape if stem in blocks else None, known, folder / "config.json")
    for module, each in said.items():
        wanted = {f"{module}.{suffix}": kind for suffix, kind in each.how.tensors(blocks[module].shape).items()}
        checks.require(folder, each.how, wanted, checks.in_specs(model.checkpoint.specs))
    return {site.name: said[site.stem].how for site in model.graph if site.stem in said and not site.tied}


def placed(site: Site, fmt: Format, model: Model, folder: Path) -> Placed:
    """Where a site's tensors lie; ModelError unless they are there as the format says."""
    try:
        check_fits(site, fmt, ())
        names = {suffix: f"{site.stem}.{suffix}" for suffix in fmt.tensors(site.shape)}
    except FormatError as e:
        raise ModelError(f"{folder / 'config.json'}: '{site.stem}': {e}") from None
    return Placed.of(site, fmt, model.checkpoint, names, model.scale_dtype)


def check_names(folder: Path, model: Model, stored: dict[str, Placed], sparsity: Mapping[str, Sparsity]) -> None:
    """ModelError for a tensor that neither the model nor config.json knows, or a matrix that is there twice or not at all."""
    known = belonging(model.graph) - {model.graph[n].weight for n in stored}
    known |= {name for site in stored.values() for name in site.names.values()}
    known |= beside(model.graph, sparsity)
    others = declared(folder).get("others", [])
    extra = sorted(model.checkpoint.specs.keys() - known - set(others if isinstance(others, list) else []))
    if extra:
        raise ModelError(f"{model.checkpoint.files[extra[0]]}: holds '{extra[0]}', which config.json does not account for; "
                         "config and weights do not belong together")  # fmt: skip
    for site in model.graph:
        held = site.name in stored or site.tied or site.weight in model.checkpoint or site.joined in model.checkpoint
        if not held:
            raise ModelError(f"{folder}: '{site.weight}' is packed, but config.json names no format for it")
