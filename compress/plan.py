"""BitPlan: which format each site is to have, and what that costs in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from compress.errors import CompressError, FormatError
from compress.formats import Dense, Format, parse
from compress.graph import Graph, Site


@dataclass(frozen=True)
class BitPlan:
    """Site name -> format, in the graph's order; a site that is not named stays as it is."""

    formats: Mapping[str, Format]

    @classmethod
    def of(cls, graph: Graph, default: Format, pins: Mapping[str, str], dtype: torch.dtype) -> BitPlan:
        """`default` for every matrix in a block, then each pin in order, the later one winning.

        A dense pin of the model's own `dtype` leaves its site as it is.

        Raises MatchError for a pattern that matches nothing and FormatError for a format
        that does not fit its matrix.
        """
        chosen: dict[str, Format] = {site.name: default for site in graph.linear}
        source: dict[str, tuple[str, ...]] = {name: ("format",) for name in chosen}
        for pattern, text in pins.items():
            at = ("pins", pattern)
            try:
                pinned = parse(text)
                sites = graph.match(pattern)
            except CompressError as e:
                raise type(e)(str(e), at) from None
            chosen |= {site.name: pinned for site in sites}
            source |= {site.name: at for site in sites}
        ordered = {s.name: chosen[s.name] for s in graph if s.name in chosen}
        for name, fmt in ordered.items():
            check_fits(graph[name], fmt, Dense(dtype), source[name])
        return cls({n: f for n, f in ordered.items() if f != Dense(dtype)})

    def quantized(self, graph: Graph) -> list[Site]:
        """The sites that get a grid."""
        return [graph[name] for name, fmt in self.formats.items() if not isinstance(fmt, Dense)]

    def bits(self, sites: Iterable[Site], dense_bytes: int = 2) -> float:
        """Average stored bits per weight over `sites`, scales and zero points counted."""
        sites = list(sites)
        stored = sum(self.nbytes(s, dense_bytes) for s in sites)
        return 8 * stored / sum(s.numel for s in sites)

    def nbytes(self, site: Site, dense_bytes: int) -> int:
        """Bytes of one site's tensors; `dense_bytes` per weight where it stays as it is."""
        fmt = self.formats.get(site.name)
        return site.numel * dense_bytes if fmt is None else fmt.nbytes(site.shape)


def check_fits(site: Site, fmt: Format, own: Format, at: tuple[str, ...]) -> None:
    """FormatError where a site cannot have a format, in words that name the site; `own` is the one it has."""
    if fmt != own and (site.role == "embed" or site.tied):
        why = f"shares its matrix with '{site.tied}'" if site.tied else "is a token embedding"
        raise FormatError(f"'{site.name}' {why}, which stays as it is: pin it to {own} or leave it out", at)
    try:
        fmt.check(site.shape)
    except FormatError as e:
        raise FormatError(f"'{site.name}': {e}  (or pin this site to another format)", at) from None
