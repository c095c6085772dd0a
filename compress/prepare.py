"""A recipe against its model: everything that can be checked before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from compress import manager
from compress.cache.merging import MERGED
from compress.cache.policy import SERVED
from compress.cached import prompt_of
from compress.errors import CompressError, DataError, ExportError, MatchError, RecipeError
from compress.export.artifact.carried import carried
from compress.export.artifact.exporter import INPUTS, Exporter
from compress.export.table import EXPORTERS
from compress.formats import Format
from compress.formats.caches import CACHE
from compress.model import data
from compress.model.gguf_source import Say, silent
from compress.model.model import Model, open_model
from compress.passes import PASSES
from compress.recipe import Recipe, load
from compress.run import digest
from compress.sampling import check
from compress.state import State
from compress.state.checkpoint import Layout

PROOF_TOKENS = (2, 64)  # windows and tokens on which an artifact's logits are compared
PROOF_LOGITS = 1 << 24  # numbers that these may be


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every claim has been checked against the model, before a weight is read.

    told: the records of its first steps, where these are known.
    """

    recipe: Recipe
    model: Model
    start: State
    foreseen: State
    told: tuple[Sequence[manager.Record], ...] = ()
    trained: Mapping[int, tuple[manager.Cost, str]] = field(default_factory=dict)  # by the number of a pass that trains
    asked: data.Tokens | None = None  # calibration windows that the model was asked for, see calibration.py

    @property
    def seed(self) -> int:
        return self.recipe.document.seed

    @property
    def exports(self) -> tuple[Exporter, ...]:
        return self.recipe.exports

    @property
    def settled(self) -> bool:
        """Whether the calibration windows are known: read, or asked of the model."""
        windows = self.recipe.document.data.calibration
        return windows is None or not windows.measured or self.asked is not None

    @property
    def calibration(self) -> data.Tokens | None:
        assert self.settled, "whoever needs calibration windows settles them before"
        return self.asked or self.pool

    @cached_property
    def pool(self) -> data.Tokens | None:
        """What is read for calibration: the windows, those to choose from, or what sampled ones begin with."""
        return self._tokens("calibration")

    @cached_property
    def evaluation(self) -> data.Tokens | None:
        return self._tokens("evaluation")

    @cached_property
    def training(self) -> data.Tokens | None:
        """What passes that train learn from."""
        return self.lessons or self.calibration

    @cached_property
    def lessons(self) -> data.Tokens | None:
        """What `data.training` names."""
        tokens = self._tokens("training")
        for i, p in enumerate(self.recipe.passes if tokens else ()):
            try:
                if p.trains and tokens:
                    p.check_text(tokens)
            except DataError as e:
                raise DataError(f"{self.recipe.place(('data', 'training'))}  {e}") from None
            except CompressError as e:
                raise self.recipe.located(e, "passes", i) from None
        return tokens

    def _tokens(self, which: str) -> data.Tokens | None:
        windows = getattr(self.recipe.document.data, which)
        if windows is None:
            return None
        try:
            data.check_length(windows.length, self.model.config)
            if isinstance(windows, data.Calibration) and windows.generate:
                check(self.start)
            reading = windows.reading
            if reading is None:
                return data.beginnings(self.model.folder, windows.sequences)
            vocabulary = self.foreseen.vocabulary
            return data.read(reading, self.model.folder, self.recipe.base, self.start.graph["embed"].shape[0], vocabulary)
        except CompressError as e:
            raise type(e)(f"{self.recipe.place(('data', which))}  {e}") from None

    @property
    def root_key(self) -> str:
        return digest(self.model.identity())


def prepare(path: Path, overrides: Sequence[str] = (), say: Say = silent) -> Prepared:
    """Read a recipe and check it: options, order, patterns, formats against shapes, exporters against formats."""
    recipe = load(path, PASSES, EXPORTERS, overrides)
    try:
        model = open_model(recipe.document.model, recipe.base, say, recipe.document.leave)
        _ = model.graph
    except CompressError as e:
        place = ("leave",) if isinstance(e, MatchError) else ("model",)
        raise type(e)(f"{recipe.place(place)}  {e}") from None
    start = model.state if model.has_weights else model.bare
    if recipe.exports and model.has_weights:
        carried(model.folder)  # whether all that goes along into artifacts can, before anything is computed
    try:
        manager.check_order(recipe.passes, start.facts)
    except CompressError as e:
        raise recipe.located(e) from None
    if recipe.document.data.training and not any(p.trains for p in recipe.passes):
        raise RecipeError(f"{recipe.place(('data', 'training'))}  no step learns from it; add 'distill', or leave it out")
    foreseen, trained = start, {}
    text = recipe.document.data.training or recipe.document.data.calibration
    for i, p in enumerate(recipe.passes):
        try:
            p.check(
                bool(recipe.document.data.calibration or (p.trains and recipe.document.data.training)), recipe.passes[i + 1 :]
            )
            if windows := recipe.document.data.calibration:
                p.check_windows(windows.length, foreseen)
        except CompressError as e:
            raise recipe.located(e, "passes", i) from None
        if p.decides and recipe.exports:
            p = p.beside_files(partial(beside, recipe, model, i, foreseen), partial(grown, recipe))
            recipe = replace(recipe, passes=(*recipe.passes[:i], p, *recipe.passes[i + 1 :]))
        try:
            outcomes = [manager.settle(p, foreseen, o) for o in p.outcomes(foreseen)] if p.decides else []
            before, foreseen = foreseen, manager.foresee([p], foreseen)
            if p.trains and text:
                trained[i] = p.trained(before, text.sequences, text.length)
        except CompressError as e:
            raise recipe.located(e, "passes", i) from None
        for outcome in outcomes:
            check_exports(recipe, followed(recipe, i + 1, outcome))
    check_exports(recipe, foreseen)
    check_evaluation(recipe, foreseen)
    return Prepared(recipe, model, start, foreseen, trained=trained)


def check_evaluation(recipe: Recipe, state: State) -> None:
    """DataError, with its place in the recipe, where evaluation windows are too short for what a state is judged by."""
    windows = recipe.document.data.evaluation
    if windows and SERVED in state.serving:
        try:
            prompt_of(windows.length)
        except CompressError as e:
            raise type(e)(f"{recipe.place(('data', 'evaluation', 'length'))}  {e}") from None


def followed(recipe: Recipe, first: int, state: State) -> State:
    """The state at the end of the passes from one on, foreseen; CompressError with its place in the recipe."""
    for i, p in enumerate(recipe.passes[first:], first):
        try:
            state = manager.foresee([p], state)
        except CompressError as e:
            raise recipe.located(e, "passes", i) from None
    return state


def beside(recipe: Recipe, model: Model, number: int, before: State) -> int:
    """Bytes that artifacts hold beyond what is counted of matrices, whatever a pass decides."""
    p = recipe.passes[number]
    try:
        outcomes = [manager.settle(p, before, o) for o in p.outcomes(before)]
    except CompressError as e:
        raise recipe.located(e, "passes", number) from None
    found = (beyond(recipe, model, followed(recipe, number + 1, outcome)) for outcome in outcomes)
    return max((nbytes for nbytes in found if nbytes is not None), default=0)


def grown(recipe: Recipe, fmt: Format) -> float:
    """Bits a weight that the containers of some exporter take beyond a format's own."""
    bits: float = max(exporter.grown(fmt) for exporter in recipe.exports)
    return bits


def beyond(recipe: Recipe, model: Model, state: State) -> int | None:
    """Bytes that the largest artifact asked for takes beyond a checkpoint in our own form, of a state at the end of the recipe;
    None where one of the exporters cannot hold it, which is told elsewhere."""
    own = Layout.of([spec for spec, _, _ in state.entries()]).nbytes
    own += sum(int(state.graph[name].numel * grown(recipe, fmt) / 8) for name, fmt in state.formats.items())
    try:
        for exporter in recipe.exports:
            exporter.check(state)
        return max(0, *(int(e.layout(model, state).nbytes) - own for e in recipe.exports))
    except CompressError:
        return None


def proof_tokens(vocabulary: int) -> tuple[int, int]:
    """Windows, and tokens of each, to prove an artifact on: fewer where logits of a large vocabulary would take much memory."""
    windows, length = PROOF_TOKENS
    return windows, max(16, min(length, PROOF_LOGITS // (windows * vocabulary)))


def check_exports(recipe: Recipe, state: State) -> None:
    """ExportError, with its place in the recipe, where an exporter cannot hold a state."""
    for i, exporter in enumerate(recipe.exports):
        try:
            for name in state.serving:  # nothing is left out in silence
                refuse_untold(exporter, name)
            exporter.check(state)
        except CompressError as e:
            raise recipe.located(e, "export", i) from None


# What `State.serving` may say under a name of its own: why other exporters cannot hold it, and what to do. Other names are sites.
TOLD = {
    SERVED: ("a policy of the KV cache, and no engine of its layout follows one", "export native, or leave 'kv_policy' out"),
    MERGED: (
        "the biases by which a context is merged, and no engine of its layout does that",
        "export native, or leave 'context_merge' out",
    ),
    CACHE: (
        "the scales of a cache, and no engine of its layout takes them",
        "export compressed_tensors, or leave 'kv_cache' out",
    ),
}
SITES = ("what an engine must know of '{name}', nor a tool of llama.cpp's, as 'importance' measures it",
         "export gguf, or leave that step out")  # fmt: skip


def refuse_untold(exporter: Exporter, name: str) -> None:
    """ExportError where an exporter has no place for what an engine, or a tool, must know beside weights."""
    if (name if name in TOLD else INPUTS) not in exporter.tells:
        what, todo = TOLD.get(name, SITES)
        raise ExportError(f"{exporter.name} has no place for {what.format(name=name)}; {todo}")
