"""A model in which some layers have no attention, or no MLP.

Whether a sublayer can go without a trace is seen as in layers.py: where zeros in its place leave a layer's hidden states as they
are. What goes with it is the norm that feeds nothing else, and one behind it. The config then gives the layer the least shape
that there is, one unit, and names the modules that are not there (`shapes.ABSENT`); so a stock transformers, which knows nothing
of the latter, stops at the former.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.errors import ModelError
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, without
from compress.model.discover import discover
from compress.model.feeds import feeds, norms, norms_behind
from compress.model.layers import sublayers
from compress.model.names import anchor, places
from compress.model.skeleton import glance
from compress.shapes import ABSENT, ATTENTION, NORM, values_of, with_values
from compress.state import State
from compress.state.graph import Feed, Norm, Site
from compress.state.overlay import Bare

PARTS = {KV_GROUPS: ("attn", "attention"), MLP: ("mlp", "MLP")}


def lacking(state: State, gone: Mapping[str, Collection[int]]) -> State:
    """The state without the sublayers of some kinds, by block; its other tensors lie where they lay. ModelError where one of them
    cannot go."""
    found = [c for c in couplings(state) if c.block in gone.get(c.kind, ())]
    check(state, found)
    modules, around = dict[int, dict[str, str]](), Norms.of(state)
    for c in found:
        modules.setdefault(c.block, {}).update(modules_of(state, c, around))
    config, gone_with = config_of(state, found, modules), names_in(state, modules)
    specs = tuple(spec for spec in state.specs if spec.name not in gone_with)
    model = glance(config)
    graph = anchor(discover(model, config, state.graph.leave), Bare(state.dense.folder, specs), model)
    dense = state.dense.moved({spec.name: spec.name for spec in specs})
    return replace(state, graph=graph, config=config, specs=specs, dense=dense)


def check(state: State, found: Sequence[Coupling]) -> None:
    """ModelError for a sublayer that zeros do not take away, or where no layer would have any of its kind."""
    try:
        fit = {unit.name for unit in sublayers(state)}
    except ModelError:
        fit = set()
    for c in found:
        part, word = PARTS[c.kind]
        if f"layers.{c.block}.{part}" not in fit:
            raise ModelError(f"layer {c.block} of '{state.graph.family}' does more with its {word} than add its outputs (a norm "
                             "over the sum, a bias, a scale), so it cannot go whole; keep at least 1", (c.kind,))  # fmt: skip
    for kind in {c.kind for c in found}:
        if sum(c.kind == kind for c in found) == sum(c.kind == kind for c in couplings(state)):
            raise ModelError(f"no layer would have an {PARTS[kind][1]}; keep at least one", (kind,))


@dataclass(frozen=True)
class Norms:
    """The norms of a model: by path, what those feed that feed something, and by site those that are given what it puts out.
    Of a model that cannot be followed the latter are not known."""

    known: Mapping[str, Norm]
    feeds: tuple[Feed, ...] = ()
    behind: Mapping[str, Norm] = field(default_factory=dict)

    @classmethod
    def of(cls, state: State) -> Norms:
        try:
            return cls(norms(state), tuple(feeds(state).values()), norms_behind(state))
        except ModelError:
            return cls(norms(state))


def modules_of(state: State, c: Coupling, around: Norms) -> dict[str, str]:
    """Path within the block -> what it is, of the modules that go with a sublayer."""
    block = f"{state.graph.blocks[c.block].module}."
    path = c.reader.module.removeprefix(block).rpartition(".")[0]
    if not path or "." in path or not all(site.module.startswith(f"{block}{path}.") for site in mates(state, c)):
        raise ModelError(f"layer {c.block} of '{state.graph.family}' has no module that is its {PARTS[c.kind][1]} alone, so that "
                         "cannot go whole; keep at least 1", (c.kind,))  # fmt: skip
    weights = set(norms_of(state, c, around))
    known = {p.removeprefix(block): n for p, n in around.known.items() if p.startswith(block)}
    beside = {p: NORM for p, norm in known.items() if norm.weight in weights and not p.startswith(f"{path}.")}
    return {path: ATTENTION if c.kind == KV_GROUPS else MLP} | beside


def mates(state: State, c: Coupling) -> list[Site]:
    """The sites of a sublayer."""
    part = f"layers.{c.block}.{PARTS[c.kind][0]}."
    return [site for site in state.graph.of_block(c.block) if site.name.startswith(part)]


def norms_of(state: State, c: Coupling, around: Norms) -> Iterator[str]:
    """The weights of the norms that have nothing to do without a sublayer: that feeds it alone, or is fed by it. Where that is
    not known they stay, and do no harm."""
    inside, behind = {site.name for site in mates(state, c)}, around.behind.get(c.reader.name)
    yield from (feed.weight for feed in around.feeds if feed.readers and inside >= set(feed.readers) and not feed.others)
    if behind is not None:
        yield behind.weight


def config_of(state: State, found: Sequence[Coupling], modules: Mapping[int, Mapping[str, str]]) -> Any:
    """The config that says which modules are not there, with one unit in their places."""
    config, small = state.config, [c for c in found if c.kind == MLP]
    if small:
        config = without(state, small, {MLP: {c.block: 1 for c in small}}).config
    text = config.get_text_config()
    values = values_of(config)
    for c in (c for c in found if c.kind == KV_GROUPS):
        if "num_key_value_heads" not in text.to_dict():
            raise ModelError(f"'{state.graph.family}' has no config of a layer without an attention; keep at least 1", (c.kind,))
        values[c.block] = values.get(c.block, {}) | {"num_attention_heads": 1, "num_key_value_heads": 1}
    for block, held in modules.items():
        values[block] = values.get(block, {}) | {ABSENT: {**values.get(block, {}).get(ABSENT, {}), **held}}
    changed = with_values(config, {})
    whole = changed.get_text_config()
    setattr(whole, ABSENT, {})
    if getattr(whole, "head_dim", None) is None and any(c.kind == KV_GROUPS for c in found):
        whole.head_dim = whole.hidden_size // whole.num_attention_heads
    return with_values(changed, values)


def names_in(state: State, modules: Mapping[int, Mapping[str, str]]) -> set[str]:
    """The tensors of the checkpoint that lie in modules."""
    paths = tuple(f"{state.graph.blocks[block].module}.{path}." for block, held in modules.items() for path in held)
    held = places(glance(state.config), (spec.name for spec in state.specs))
    return {name for path, name in held.items() if path.startswith(paths)}
