"""A plan.yaml that a person wrote or edited, taken in place of an allocation."""

from __future__ import annotations

from pathlib import Path

from compress.errors import CompressError, MatchError, RecipeError
from compress.formats import Dense
from compress.nodes import load_yaml
from compress.state import State
from compress.state.plan import BitPlan


def read_plan(path: Path) -> dict[str, str]:
    """The `sites` of a plan.yaml; RecipeError in one line where it is none."""
    held = load_yaml(path)
    sites = held.get("sites") if isinstance(held, dict) else None
    if not isinstance(sites, dict) or not all(isinstance(v, str) for v in sites.values()):
        raise RecipeError(f"{path}: is no plan; it needs 'sites', a mapping from site to format")
    return {str(n): f for n, f in sites.items()}


def given_plan(state: State, sites: dict[str, str]) -> BitPlan:
    """A plan that a person wrote or edited; errors name the site."""
    for name in sites:
        if name not in state.graph.sites:
            try:
                state.graph.match(name)
            except MatchError as e:
                raise MatchError(str(e), ("plan",)) from None
    try:
        return BitPlan.of(state.graph, Dense(state.dtype), sites, state.dtype)
    except CompressError as e:
        raise type(e)(str(e), ("plan",)) from None
