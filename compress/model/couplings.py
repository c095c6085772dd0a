"""What can be cut out of a model only together, and what the model is without it.

A neuron of an MLP is a column of down and a row of up and of gate; a group of heads is the columns of o that its query heads
make, their rows of q, and the rows of k and v that they share. A `Coupling` is all such units of one sublayer: which inputs of
its reader belong to each, and which rows of every other tensor. A norm over one head, a rotary pair and what lies in the residual
stream are not touched by either, and need no entry.

Which value of the config says how many there are is not listed by family: values that might are set in turn, the architecture is
built from the config, and its shapes are held against those that are wanted. What a family does not allow (a norm over all heads,
heads whose width is the model's divided by their number, an MLP of four times the model) shows in just that comparison, by the
tensor that it would change. Where layers are to differ, each is told its own value (see shapes.py), and the same is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.model.discover import discover
from compress.model.feeds import BY_HEAD, STACKED
from compress.model.names import anchor
from compress.model.skeleton import glance
from compress.shapes import of_layer, values_of, with_values
from compress.state import State
from compress.state.checkpoint import Spec
from compress.state.graph import Graph, Site
from compress.state.overlay import Bare

MLP, KV_GROUPS = "mlp", "kv_groups"
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "d_ff", "inner_dim")
BY_NUMBER_OF_HEADS = ("bloom", "mpt", "falcon")  # what a head attends to depends on its number among all


@dataclass(frozen=True, eq=False)
class Cut:
    """Where the units lie in one tensor: of dimension `dim`, unit u has the entries `rows[u]`."""

    dim: int
    rows: Tensor

    def left(self, length: int, kept: Tensor) -> Tensor:
        """The entries that stay, in their order, of `length` in all; what is no unit's stays."""
        stays = torch.ones(length, dtype=torch.bool)
        stays[self.rows.flatten()] = False
        stays[self.rows[kept].flatten()] = True
        return stays.nonzero().flatten()


@dataclass(frozen=True, eq=False)
class Coupling:
    """All units of one sublayer.

    kind: `mlp` or `kv_groups`. reader: the site that reads what they put out. columns [units, width]: its inputs by unit. cuts:
    by the name of every tensor in the checkpoint that loses entries with a unit, the reader's among them. obstacle: why none can
    go; empty where they can.
    """

    kind: str
    block: int
    reader: Site
    columns: Tensor
    cuts: Mapping[str, Cut]
    obstacle: str = ""

    @property
    def units(self) -> int:
        return len(self.columns)

    @property
    def producers(self) -> dict[str, Cut]:
        """The cuts of all tensors but the reader's."""
        return {name: cut for name, cut in self.cuts.items() if name != self.reader.weight}


def couplings(state: State) -> Iterator[Coupling]:
    """Those of every block, the attention's before the MLP's. Experts are none of these."""
    for block in state.graph.blocks:
        mates = {s.role: s for s in state.graph.of_block(block.index) if s.expert is None}
        if "o" in mates:
            yield _attention(state, mates)
        if "down" in mates:
            yield _mlp(state, mates)


def _with_bias(state: State, site: Site, rows: Tensor) -> dict[str, Cut]:
    """The rows of a matrix, and the same of its bias."""
    found = {site.weight: Cut(int(site.transposed), rows)}
    if f"{site.stem}.bias" in state.dense:
        found[f"{site.stem}.bias"] = Cut(0, rows)
    return found


def _reads(site: Site, columns: Tensor) -> dict[str, Cut]:
    return {site.weight: Cut(int(not site.transposed), columns)}


def _mlp(state: State, mates: Mapping[str, Site]) -> Coupling:
    down = mates["down"]
    width = down.shape[1]
    neurons = torch.arange(width)[:, None]
    cuts = _reads(down, neurons)
    obstacle = "" if mates.keys() & {"up", "gate_up"} else "the inputs of its down come from no matrix of the block"
    for role, rows in (("up", neurons), ("gate", neurons), ("gate_up", torch.cat([neurons, width + neurons], 1))):
        if role in mates:
            cuts |= _with_bias(state, mates[role], rows)
            if mates[role].shape[0] != width * rows.shape[1]:
                obstacle = f"'{mates[role].name}' has {mates[role].shape[0]} rows for {width} neurons"
    return Coupling(MLP, down.block or 0, down, neurons, cuts, obstacle)


def _attention(state: State, mates: Mapping[str, Site]) -> Coupling:
    """Groups of heads: the query heads that share keys and values, and these."""
    o, block = mates["o"], mates["o"].block or 0
    config = of_layer(state.config, block)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    family = config.model_type
    obstacle = f"what a head of '{family}' attends to depends on its number" if family in BY_NUMBER_OF_HEADS else ""
    if not mates.keys() >= {"q", "k", "v"} and "qkv" not in mates:
        obstacle = obstacle or "its queries, keys and values come from other matrices than q, k and v"
    if o.shape[1] % heads or heads % groups:
        obstacle = obstacle or f"{o.shape[1]} inputs of o do not divide into {heads} heads in {groups} groups"
    obstacle = obstacle or _normed_together(state, mates, {"q": heads, "k": groups})
    if obstacle:
        return Coupling(KV_GROUPS, block, o, torch.empty(0, 0, dtype=torch.int64), {}, obstacle)
    members = torch.arange(heads).view(groups, heads // groups)
    columns = spread(members, o.shape[1] // heads)
    cuts = _reads(o, columns)
    sinks = f"{o.stem.rpartition('.')[0]}.sinks"
    if sinks in state.dense:
        cuts[sinks] = Cut(0, members)
    if "qkv" in mates:
        rows, obstacle = _joined(mates["qkv"], family, members, o.shape[1] // heads)
        return Coupling(KV_GROUPS, block, o, columns, cuts | _with_bias(state, mates["qkv"], rows), obstacle)
    for role, of in (("q", members), ("k", torch.arange(groups)[:, None]), ("v", torch.arange(groups)[:, None])):
        each, rest = divmod(mates[role].shape[0], of.numel())
        if rest or (role == "q" and each * of.numel() != mates["k"].shape[0] * (heads // groups)):
            obstacle = (
                f"'{mates[role].name}' has {mates[role].shape[0]} rows for {of.numel()} heads, and more than queries in them"
            )
        cuts |= _with_bias(state, mates[role], spread(of, each))
    return Coupling(KV_GROUPS, block, o, columns, cuts, obstacle)


def _normed_together(state: State, mates: Mapping[str, Site], heads: Mapping[str, int]) -> str:
    """What hinders where one norm is over all heads of a block, as in OLMoE: with fewer of them it would be another."""
    home, shapes = mates["o"].stem.rpartition(".")[0], {spec.name: spec.shape for spec in state.specs}
    norms = {f"{home}.{role}_norm.weight": mates[role].shape[:1] for role, count in heads.items() if role in mates and count > 1}
    found = next((name for name, rows in norms.items() if shapes.get(name) == rows), None)
    return f"'{found}' is over all heads together" if found else ""


def _joined(qkv: Site, family: str, members: Tensor, width: int) -> tuple[Tensor, str]:
    """The rows of each group in a matrix that holds queries, keys and values; and what hinders."""
    groups, heads = len(members), members.numel()
    if qkv.shape[0] != (heads + 2 * groups) * width:
        return members, f"'{qkv.name}' has {qkv.shape[0]} rows for {heads} heads in {groups} groups"
    if family in STACKED:
        parts = [spread(members, width), *(spread(torch.arange(groups)[:, None] + heads + i * groups, width) for i in range(2))]
        return torch.cat(parts, 1), ""
    if family in BY_HEAD:
        return spread(members, 3 * width), ""
    return members, f"how '{family}' joins q, k and v is not known"


def spread(blocks: Tensor, width: int) -> Tensor:
    """Numbers of blocks [units, blocks] -> the entries of those blocks, each `width` long, [units, blocks * width]."""
    return (blocks[..., None] * width + torch.arange(width)).flatten(1)


# --- the model without some of them ----------------------------------------------------------------------------------


Counts = Mapping[str, int | Mapping[int, int]]


def without(state: State, found: Sequence[Coupling], counts: Counts) -> State:
    """The state as it will be with `counts` units of each kind, in every block or by block, of the couplings `found`; its tensors
    are those of before. Where all blocks come out alike the config says so in the plain way.

    Raises ModelError where the architecture has no such shape.
    """
    left = {(c.kind, c.block): _count(counts, c) for c in found}
    lengths = {name: cut for c in found for name, cut in _lost(c, left[c.kind, c.block]).items()}
    specs = tuple(_shorter(spec, *lengths[spec.name]) if spec.name in lengths else spec for spec in state.specs)
    config, why, done = state.config, "", set[str]()
    for kind in counts:
        mine = [c for c in found if c.kind == kind]
        done |= {name for c in mine for name in c.cuts}
        every = {c.block: left.get((kind, c.block), c.units) for c in couplings(state) if c.kind == kind}
        for changed in _configs(config, mine, every):
            why = _misfit(state, changed, specs, done)
            if not why:
                config = changed
                break
        else:
            raise ModelError(f"'{state.graph.family}' has no shape with {span(every)} of its {named(kind)}: "
                             f"{why or 'no value of its config says how many there are'}")  # fmt: skip
    model = glance(config)
    graph = anchor(discover(model, config, state.graph.leave), Bare(state.dense.folder, specs), model)
    return replace(state, graph=graph, config=config, specs=specs)


def _count(counts: Counts, c: Coupling) -> int:
    """How many units of a coupling are to stay."""
    wanted = counts.get(c.kind, c.units)
    return wanted if isinstance(wanted, int) else wanted.get(c.block, c.units)


def span(counts: Mapping[int, int]) -> str:
    """One number, or from where to where."""
    least, most = min(counts.values()), max(counts.values())
    return str(least) if least == most else f"{least} to {most}"


def named(kind: str) -> str:
    return {MLP: "neurons of an MLP", KV_GROUPS: "groups of heads"}[kind]


def _lost(c: Coupling, count: int) -> dict[str, tuple[int, int]]:
    """Name of a tensor -> its dimension that becomes shorter, and by how much."""
    return {name: (cut.dim, (c.units - count) * cut.rows.shape[1]) for name, cut in c.cuts.items()}


def _shorter(spec: Spec, dim: int, lost: int) -> Spec:
    shape = list(spec.shape)
    shape[dim] -= lost
    return replace(spec, shape=tuple(shape))


def _configs(config: Any, mine: Sequence[Coupling], counts: Mapping[int, int]) -> Iterator[Any]:
    """Configs that may be the one of a model with `counts` units by block, where some couplings of a kind lose some."""
    first = of_layer(config, mine[0].block)
    if mine[0].kind == KV_GROUPS:
        heads = first.num_attention_heads
        values = {"num_attention_heads": {block: heads // mine[0].units * count for block, count in counts.items()}}
        if getattr(first, "num_key_value_heads", None) is not None:
            values["num_key_value_heads"] = dict(counts)
        changed = _with(config, values)
        changed.get_text_config().head_dim = mine[0].reader.shape[1] // heads
        yield changed
        return
    for name in (n for n in WIDTHS if hasattr(first, n)):
        yield _with(config, {name: dict(counts)})


def _with(config: Any, values: Mapping[str, dict[int, int]]) -> Any:
    """A config with these values, by name and block; for all layers where all blocks that there are have the same."""
    own, known = values_of(config), config.get_text_config().attribute_map
    whole: dict[str, Any] = {}
    for name, wanted in ((known.get(name, name), wanted) for name, wanted in values.items()):
        held, alike = getattr(of_layer(config, min(wanted)), name), len(set(wanted.values())) == 1
        if isinstance(held, list | tuple):
            whole[name] = [wanted.get(i, n) if not alike else next(iter(wanted.values())) for i, n in enumerate(held)]
        elif alike:
            whole[name] = next(iter(wanted.values()))
            own = {layer: {n: v for n, v in found.items() if n != name} for layer, found in own.items()}
        else:
            own = {layer: own.get(layer, {}) | ({name: wanted[layer]} if layer in wanted else {}) for layer in own | wanted}
    changed = with_values(config, {})
    for name, value in whole.items():
        setattr(changed.get_text_config(), name, value)
    return with_values(changed, own)


def _misfit(state: State, config: Any, specs: Sequence[Spec], done: Collection[str]) -> str:
    """Why a config is not that of these shapes; empty where it is. Of what is to become shorter, only `done` counts by now."""
    try:
        validate(config)
        model = glance(config)
        graph = anchor(discover(model, config, state.graph.leave), Bare(state.dense.folder, state.specs), model)
    except ModelError as e:
        return str(e)
    wanted = {spec.name: spec.shape for spec in (*state.specs, *(s for s in specs if s.name in done))}
    for name, shape in shapes(graph).items():
        if name in wanted and tuple(shape) != tuple(wanted[name]):
            return f"'{name}' would be {list(shape)} there, not {list(wanted[name])}"
    return _scaled(glance(state.config), model)


def shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape, of every tensor that stands by itself there."""
    return {**graph.parameters, **{s.weight: s.shape[::-1] if s.transposed else s.shape for s in graph}}


def validate(config: Any) -> None:
    """ModelError where transformers would not save such a config."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        try:
            part.validate()
        except Exception as e:
            raise ModelError(str(e).strip().splitlines()[-1].strip()) from None


def _scaled(before: nn.Module, after: nn.Module) -> str:
    """Why attention would not be what it was: the numbers by which it scales."""
    others = dict(after.named_modules())
    for path, module in before.named_modules():
        for name in ("head_dim", "scaling", "scale_attn", "norm_factor"):
            mine, theirs = getattr(module, name, None), getattr(others.get(path), name, None)
            if isinstance(mine, int | float) and mine != theirs:
                return f"'{path}' would have {name} {theirs}, not {mine}"
    return ""
