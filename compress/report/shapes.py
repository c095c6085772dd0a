"""What is left of each layer, where layers differ in shape: a bar for its neurons and one for its groups of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compress.model.couplings import couplings, named
from compress.report.page import columns
from compress.state import State

WIDE, HIGH = 16, 60  # of a bar, in characters, and in the picture
Units = Mapping[int, int]  # block -> how many there are


@dataclass(frozen=True)
class Survivors:
    """kinds: kind -> units by block, of kinds that blocks differ in. whole: kind -> how many the original's widest layer has."""

    blocks: int
    kinds: Mapping[str, Units]
    whole: Mapping[str, int]

    @classmethod
    def of(cls, before: State, after: State) -> Survivors | None:
        """None where all layers have the same."""
        left, whole = units(after), units(before)
        kinds = {kind: held for kind, held in left.items() if len({held.get(b.index, 0) for b in after.graph.blocks}) > 1}
        same = all(len({held.get(b.index, 0) for b in before.graph.blocks}) > 1 and whole[kind] == held
                   for kind, held in kinds.items())  # fmt: skip
        if same:  # as the original's are, such as those of mixtures with a few plain layers
            return None
        return cls(len(after.graph.blocks), kinds, {kind: max(whole[kind].values()) for kind in kinds})

    def text(self) -> str:
        """A line for each layer."""
        rows = [[str(block), *(self._bar(kind, held.get(block, 0)) for kind, held in self.kinds.items())]
                for block in range(self.blocks)]  # fmt: skip
        return columns(rows, ["layer", *map(named, self.kinds)])

    def _bar(self, kind: str, count: int) -> str:
        full = round(WIDE * count / self.whole[kind])
        return f"{'█' * full}{'░' * (WIDE - full)} {count:,} of {self.whole[kind]:,}"

    def svg(self) -> str:
        """The same as a picture: layers across, a row of bars for each kind."""
        step, out = max(8, min(28, 900 // self.blocks)), []
        for row, (kind, held) in enumerate(self.kinds.items()):
            base = (row + 1) * (HIGH + 22)
            out.append(f"<text x=0 y={base - HIGH - 6}>{named(kind)}, of {self.whole[kind]:,}</text>")
            for block in range(self.blocks):
                count = held.get(block, 0)
                x, high = block * step, HIGH * count / self.whole[kind]
                out.append(f"<rect class=whole x={x} y={base - HIGH} width={step - 2} height={HIGH} />"
                           f"<rect class=left x={x} y={base - high:.1f} width={step - 2} height={high:.1f}>"
                           f"<title>layers.{block}: {count:,} of {self.whole[kind]:,} {named(kind)}</title></rect>")  # fmt: skip
        wide, high = max(self.blocks * step, 240), len(self.kinds) * (HIGH + 22) + 4
        return f"<svg class=shapes viewBox='0 0 {wide} {high}' role=img>{''.join(out)}</svg>"


def units(state: State) -> dict[str, dict[int, int]]:
    """Kind -> block -> how many units there are."""
    found: dict[str, dict[int, int]] = {}
    for c in couplings(state):
        if not c.obstacle:
            found.setdefault(c.kind, {})[c.block] = c.units
    return found
