"""The pass `edit`: plain surgery on a model, with no calibration and no loss beyond what is cut away.

What is kept lies where it lay, under the name that it has in the smaller model; only tables that lose some of their rows are
written. How layers go is in model/layers.py; which tokens a smaller vocabulary holds, and what becomes of the tokenizer, is in
model/vocabulary.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, StrictInt, ValidationInfo, field_validator
from torch import nn

from compress.documents import local_path
from compress.errors import CompressError, ModelError, RecipeError
from compress.manager import Context, Pass
from compress.model.discover import discover
from compress.model.layers import fewer
from compress.model.names import anchor, check_tensors, passed_over, same_parameters
from compress.model.skeleton import glance
from compress.model.vocabulary import NAMES_IDS, closed, cut_tokenizer, keep_list, numbers, with_new_ids
from compress.state import Aspect, Fact, State
from compress.state.overlay import Bare


class Edit(Pass):
    """Take layers away, or give a tied output head a matrix of its own."""

    name: ClassVar[str] = "edit"
    needs: ClassVar[Fact] = Fact.DENSE
    writes: ClassVar[Aspect] = Aspect.STRUCTURE | Aspect.WEIGHTS

    drop_layers: tuple[StrictInt, ...] = Field(
        (), description="numbers of the layers to take away, from 0; the others close the gap"
    )
    untie: bool = Field(False, description="give the output head, where it shares the embedding's matrix, a copy of its own")
    vocab: str | None = Field(
        None, description="path of a list of token ids, one on a line: the tokens to keep, and what they need"
    )

    @field_validator("vocab")
    @classmethod
    def _located(cls, path: str | None, info: ValidationInfo) -> str | None:
        base = (info.context or {}).get("base", Path())
        return None if path is None else os.path.abspath(base / local_path(path))

    def check(self, calibrated: bool, following: Sequence[Pass] = ()) -> None:
        if not self.drop_layers and not self.untie and self.vocab is None:
            raise RecipeError("'edit' names nothing to change; give it drop_layers, untie or vocab, or leave it out")

    def foresee(self, state: State) -> State:
        if state.plan is not None:
            raise RecipeError("an earlier step has planned formats for layers by their numbers; move 'edit' in front of it")
        if state.vocabulary is not None:
            raise RecipeError("an earlier step has cut the vocabulary; make one 'edit' of the two")
        if self.drop_layers:
            state = fewer(state, self._kept(state))
        if self.untie:
            state = untied(state)
        return state if self.vocab is None else with_tokens(state, self._tokens(state))

    def run(self, state: State, ctx: Context) -> State:
        foreseen = self.foresee(state)
        if self.vocab is None:
            return foreseen
        cut = {spec.name: spec for spec in foreseen.specs if spec != foreseen.dense.specs[spec.name]}
        rows = self._tokens(state)
        with cut_tokenizer(state.dense.folder, rows):
            pass  # it can be opened, and numbers its tokens like the rows
        tensors = {name: foreseen.dense.read(name)[list(rows)] for name in cut}
        count, known = len(rows), state.graph["embed"].shape[0]
        record = {"site": "embed", "notes": [f"{count:,} of {known:,} tokens kept"]}
        ctx.say(record)
        return foreseen.with_part(ctx.store.commit("vocabulary", dense=tensors, records=[record]))

    def _tokens(self, state: State) -> tuple[int, ...]:
        """The tokens that stay, by the ids that they have in the source."""
        assert self.vocab is not None
        folder = state.dense.folder
        if folder not in self._listed:
            try:
                named, rows = keep_list(Path(self.vocab)), state.graph["embed"].shape[0]
                self._listed[folder] = closed(folder, named, state.config.to_dict(), rows)
            except CompressError as e:
                raise type(e)(str(e), ("vocab",)) from None
        return self._listed[folder]

    @cached_property
    def _listed(self) -> dict[Path, tuple[int, ...]]:
        """What the list says, by the folder of the model: read once, so that a file that changes meanwhile changes nothing."""
        return {}

    def _kept(self, state: State) -> list[int]:
        """The numbers of the layers that stay."""
        count = len(state.graph.blocks)
        named = Counter(self.drop_layers)
        odd = next((i for i, times in named.items() if not 0 <= i < count or times > 1), None)
        if odd is not None:
            why = "is named twice" if 0 <= odd < count else f"is none of the layers, which are 0 to {count - 1}"
            raise RecipeError(f"layer {odd} {why}", ("drop_layers",))
        if len(named) == count:
            raise RecipeError(f"these are all {count} layers; keep one", ("drop_layers",))
        return [i for i in range(count) if i not in named]


def untied(state: State) -> State:
    """The state with a head that has a matrix of its own, which lies where the embedding's does."""
    config = deepcopy(state.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    head, embed = names_of_tables(state, config)
    specs, places = list(state.specs), {spec.name: spec.name for spec in state.specs}
    if head not in places:  # a file may hold an equal head, which was not read so far
        specs += [replace(spec, name=head) for spec in specs if spec.name == embed]
    places[head] = embed
    bias = f"{head.rpartition('.')[0]}.bias"
    same = next((paths for paths in same_parameters(glance(state.config)) if bias in paths), [])
    shared = next((name for name in same if name in places), None)
    if shared and bias not in places:  # a checkpoint may hold it under another module's name alone
        specs += [replace(spec, name=bias) for spec in specs if spec.name == shared]
        places[bias] = shared
    model = glance(config)
    graph = anchor(discover(model, config, state.graph.leave), Bare(state.dense.folder, specs), model)
    return replace(state, graph=graph, config=config, specs=tuple(specs), dense=state.dense.moved(places))


def names_of_tables(state: State, config: Any) -> tuple[str, str]:
    """The name of the head's own matrix once it has one, and the name of the embedding's."""
    head = state.graph.sites.get("lm_head")
    if head is None or head.tied is None:
        raise RecipeError("the output head has a matrix of its own already; leave 'untie' out", ("untie",))
    graph = discover(glance(config), config, state.graph.leave)
    if graph["lm_head"].tied:
        raise ModelError(f"'{state.graph.family}' ties its head to its embedding whatever the config says; it cannot be untied")
    return graph["lm_head"].weight, state.graph["embed"].weight


def with_tokens(state: State, kept: tuple[int, ...]) -> State:
    """The state with some tokens only. Which tables lose rows shows in the skeleton of the new config."""
    config, size = deepcopy(state.config), state.graph["embed"].shape[0]
    if hasattr(config.get_text_config(), "vocab_size_per_layer_input"):
        raise ModelError(f"'{state.graph.family}' looks tokens up in every layer; its vocabulary cannot be cut")
    if kept[-1] >= size:
        raise ModelError(f"the tokenizer has a token {kept[-1]}, the model only {size}; they do not belong together")
    number = numbers(kept)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in with_new_ids(part.to_dict(), number).items():
            if NAMES_IDS.search(name):
                setattr(part, name, value)
        if hasattr(part, "vocab_size"):
            part.vocab_size = len(kept)
    model = glance(config)
    graph = discover(model, config, state.graph.leave)
    tables = [m for p, m in model.named_modules() if isinstance(m, nn.Embedding) and p != graph["embed"].module]
    counted = any(table.padding_idx is not None for table in tables)
    if counted and config.pad_token_id != state.config.pad_token_id:
        raise ModelError("positions count from the number of the padding token, which would be another; keep all tokens below it")
    shapes = {**graph.parameters, **{s.weight: s.shape[::-1] if s.transposed else s.shape for s in graph}}
    specs = tuple(replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in state.specs)
    for ours, theirs in zip(specs, state.specs, strict=True):
        if ours.shape != theirs.shape and (theirs.shape[0], ours.shape) != (size, (len(kept), *theirs.shape[1:])):
            raise ModelError(f"with other tokens '{ours.name}' would not only lose rows; this vocabulary cannot be cut")
    extra = passed_over([spec.name for spec in specs], model)
    odd = next((spec.name for spec in specs if spec.name in extra and size in spec.shape), None)
    if odd is not None:
        raise ModelError(
            f"'{odd}', which transformers does not load, has a row for every token as well; its vocabulary cannot be cut"
        )
    anchored = anchor(graph, Bare(state.dense.folder, specs), model)
    check_tensors(anchored, Bare(state.dense.folder, specs))
    return replace(state, graph=anchored, config=config, specs=specs, vocabulary=kept)
