"""A recipe against its model: everything that can be checked before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress import manager
from compress.errors import CompressError, DataError
from compress.export.artifact.carried import carried
from compress.export.artifact.exporter import Exporter
from compress.export.table import EXPORTERS
from compress.model import data
from compress.model.model import Model, open_model
from compress.passes import PASSES
from compress.recipe import Recipe, load
from compress.run import digest
from compress.state import State


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every claim has been checked against the model, before a weight is read."""

    recipe: Recipe
    model: Model
    start: State
    foreseen: State

    @property
    def seed(self) -> int:
        return self.recipe.document.seed

    @property
    def exports(self) -> tuple[Exporter, ...]:
        return self.recipe.exports

    @cached_property
    def calibration(self) -> data.Tokens | None:
        return self._tokens("calibration")

    @cached_property
    def evaluation(self) -> data.Tokens | None:
        return self._tokens("evaluation")

    def _tokens(self, which: str) -> data.Tokens | None:
        windows = getattr(self.recipe.document.data, which)
        if windows is None:
            return None
        try:
            check_length(windows.length, self.model.config)
            return data.read(windows, self.model.folder, self.recipe.base, self.start.graph["embed"].shape[0])
        except CompressError as e:
            raise type(e)(f"{self.recipe.place(('data', which))}  {e}") from None

    @property
    def root_key(self) -> str:
        return digest(self.model.identity())


def check_length(length: int, config: Any) -> None:
    """DataError where windows are longer than the positions that a model has learned (rotary positions have no such end)."""
    learned = getattr(config, "max_position_embeddings", None)
    if learned and config.model_type == "roberta":  # its positions start behind the padding token's
        learned -= config.pad_token_id + 1
    if learned is not None and length > learned and not hasattr(config, "rope_parameters"):
        raise DataError(f"windows of {length} tokens are longer than the {learned} positions that the model has; "
                        f"ask for length: {learned} or less")  # fmt: skip


def prepare(path: Path, overrides: Sequence[str] = ()) -> Prepared:
    """Read a recipe and check it: options, order, patterns, formats against shapes, exporters against formats."""
    recipe = load(path, PASSES, EXPORTERS, overrides)
    try:
        model = open_model(recipe.document.model, recipe.base)
        graph = model.graph
    except CompressError as e:
        raise type(e)(f"{recipe.place(('model',))}  {e}") from None
    if recipe.exports and model.has_weights:
        carried(model.folder)  # whether all that goes along into artifacts can, before anything is computed
    # A config without weights has no checkpoint; nothing that `plan` does reads one.
    start = model.state if model.has_weights else State(graph, None, model.dtype, tuple(model.specs))  # type: ignore[arg-type]
    try:
        manager.check_order(recipe.passes, start.facts)
    except CompressError as e:
        raise recipe.located(e) from None
    foreseen = start
    for i, p in enumerate(recipe.passes):
        try:
            p.check(recipe.document.data.calibration is not None, recipe.passes[i + 1 :])
            outcomes = p.outcomes(foreseen) if p.decides else ()
            foreseen = manager.foresee([p], foreseen)
        except CompressError as e:
            raise recipe.located(e, "passes", i) from None
        for outcome in outcomes:
            check_exports(recipe, outcome)
    check_exports(recipe, foreseen)
    return Prepared(recipe, model, start, foreseen)


def check_exports(recipe: Recipe, state: State) -> None:
    """ExportError, with its place in the recipe, where an exporter cannot hold a state."""
    for i, exporter in enumerate(recipe.exports):
        try:
            exporter.check(state)
        except CompressError as e:
            raise recipe.located(e, "export", i) from None
