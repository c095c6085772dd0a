"""The structure of a model, without its tensors.

A `Site` is one weight matrix that a pass may change; a `Block` is one repeated layer, the unit of streaming; a `Graph`
is all of them. Names are ours and the same for every architecture (``layers.3.attn.q``, ``layers.3.mlp.down``,
``layers.3.experts.7.up``, ``embed``, ``lm_head``), so that a recipe written for one family reads the same for the next.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from compress.errors import MatchError, nearest

ATTENTION = ("q", "k", "v", "qkv", "q_a", "q_b", "kv_a", "kv_b", "z", "o")
FUSED_ROLES = (
    ("q", "k", "v"),
    ("gate", "up"),
    ("q_a", "kv_a"),
    ("qkv", "z"),
)  # an engine such as vLLM joins these into one matrix


@dataclass(frozen=True)
class Site:
    """One weight matrix.

    name: ours, unique. role: what it computes (q k v qkv o gate up gate_up down embed head; q_a q_b kv_a kv_b where q, and k
    with v, go through a narrower vector; z, the gate of a linear attention). shape: (out, in).
    block: index of its block, None outside. input_key: sites of one block with equal keys read the same activations.
    module: path in the module tree. weight: name of its tensor in a checkpoint. transposed: stored as (in, out).
    expert: index within a 3-D tensor of experts, else None. tied: the site whose matrix this one shares, else None.
    aliases: further module paths that hold the same matrix.
    """

    name: str
    role: str
    shape: tuple[int, int]
    block: int | None
    input_key: str
    module: str
    weight: str
    transposed: bool = False
    expert: int | None = None
    tied: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stage(self) -> str:
        """Where a streamed block pauses for this site: its input, or that of all experts, which are visited together."""
        return self.input_key if self.expert is None else f"experts.{self.input_key.rpartition('.')[2]}"

    @property
    def joined(self) -> str:
        """The 3-D tensor that holds this expert's matrix where a checkpoint keeps all experts in one."""
        return f"{self.module}.{'down_proj' if self.role == 'down' else 'gate_up_proj'}"

    @property
    def stem(self) -> str:
        """The checkpoint's name of the module: `weight` without its last component."""
        return self.weight.rpartition(".")[0]


@dataclass(frozen=True)
class Norm:
    """A norm, x̂ (offset + weight) + bias.

    block: that it lies in, or None. weight, bias: names of its tensors in the checkpoint; a norm without a bias has None. offset:
    1 in Gemma, 0 elsewhere; None where it could not be told. centred: whether x̂ is x less its mean, as in LayerNorm.
    """

    block: int | None
    weight: str
    bias: str | None
    offset: float | None
    centred: bool = False


@dataclass(frozen=True)
class Feed:
    """A norm whose outputs, x̂ (offset + weight) + bias, matrices read directly.

    weight, bias, offset: as in `Norm`.
    readers: the sites that read it. others: tensors [.., in] of further matrices that do, such as a router's. obstacle: why no
    factor can go from it into its readers; empty where one can.
    """

    weight: str
    bias: str | None
    offset: float | None
    readers: tuple[str, ...]
    others: tuple[str, ...]
    obstacle: str


@dataclass(frozen=True)
class Block:
    """One repeated layer: its index, its module path, and the names of its sites in order of use."""

    index: int
    module: str
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """All sites and blocks of one model; frozen.

    family: transformers' ``model_type``. parameters: checkpoint name -> shape of every tensor that is no site.
    causal: whether the model predicts the next token. left: module paths of matrices in blocks that are no sites since nobody can
    tell what they compute, or since a recipe leaves them as they are. leave: the patterns by which it says so.
    """

    family: str
    blocks: tuple[Block, ...]
    sites: dict[str, Site]
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    causal: bool = True
    left: tuple[str, ...] = ()
    leave: tuple[str, ...] | None = None

    def __getitem__(self, name: str) -> Site:
        return self.sites[name]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites.values())

    def owner(self, site: Site) -> Site:
        """The site whose matrix this one has: itself, or the one that it shares."""
        return self.sites[site.tied] if site.tied else site

    def of_block(self, index: int) -> list[Site]:
        return [self.sites[name] for name in self.blocks[index].sites]

    def block_of(self, path: str) -> int | None:
        """The block that a module lies in, by its path; None outside of them."""
        return next((b.index for b in self.blocks if path.startswith(f"{b.module}.")), None)

    @cached_property
    def linear(self) -> list[Site]:
        """The matrices inside blocks: what a format applies to unless a pin says otherwise."""
        return [site for block in self.blocks for site in self.of_block(block.index)]

    def match(self, pattern: str) -> list[Site]:
        """Sites whose name or module path matches a shell pattern (``*`` crosses dots).

        Raises MatchError, naming the nearest pattern that would match, when there is none.
        """
        found = [s for s in self if matches(s, pattern)]
        if not found:
            raise MatchError(f"pattern '{pattern}' matched no site.{self._nearest(pattern)}")
        return found

    def _nearest(self, pattern: str) -> str:
        general = {".".join("*" if part.isdigit() else part for part in s.name.split(".")) for s in self}
        head, dot, _ = pattern.rpartition(".")
        same_head = {f"{head}{dot}{name.rpartition('.')[2]}" for name in general}
        near = nearest(pattern, general | set(self.sites) | {p for p in same_head if any(matches(s, p) for s in self)})
        if near is None:
            return f"  Sites look like: {', '.join(sorted(general)[:6])}"
        count = sum(matches(s, near) for s in self)
        return f"  Nearest: '{near}' ({count} site{'s' if count != 1 else ''})"

    def fused(self) -> list[tuple[Site, ...]]:
        """Groups of sites that serving engines join into one matrix: q,k,v; gate,up; all experts of one block."""
        groups: list[tuple[Site, ...]] = []
        for block in self.blocks:
            sites = self.of_block(block.index)
            dense = {s.role: s for s in sites if s.expert is None}
            groups += [tuple(dense[role] for role in roles) for roles in FUSED_ROLES if dense.keys() >= set(roles)]
            experts = tuple(s for s in sites if s.expert is not None)
            if experts:
                groups.append(experts)
        return groups


def matches(site: Site, pattern: str) -> bool:
    """Whether a shell pattern names this site, by our name or by its module path."""
    return fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.module, pattern)


def total(sites: Iterable[Site]) -> int:
    """Number of weights in these sites, tied ones once."""
    return sum(s.numel for s in sites if s.tied is None)
