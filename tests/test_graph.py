"""Sites are found by pattern, a wrong pattern is told the nearest right one, and groups that engines join are known."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from compress import errors
from compress.errors import MatchError
from compress.model.model import open_model
from compress.state import graph
from compress.state.graph import Graph, total


@pytest.fixture(scope="module")
def graphs(family: Any) -> Any:
    return lambda name: open_model(str(family(name))).graph


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.0.attn.q", ["layers.0.attn.q"]),
        ("layers.*.mlp.down", ["layers.0.mlp.down", "layers.1.mlp.down"]),
        ("layers.1.attn.*", ["layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v", "layers.1.attn.o"]),
        ("*.v", ["layers.0.attn.v", "layers.1.attn.v"]),
        ("*.layers.1.*.o_proj", ["layers.1.attn.o"]),
        ("model.layers.0.self_attn.k_proj", ["layers.0.attn.k"]),
        ("layers.[01].mlp.up", ["layers.0.mlp.up", "layers.1.mlp.up"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_a_pattern_names_sites_by_our_name_or_by_the_module_path(graphs: Any, pattern: str, found: list[str]) -> None:
    assert [s.name for s in graphs("llama").match(pattern)] == found


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layers.*.mlp.upp", "Nearest: 'layers.*.mlp.up' (2 sites)"),
        ("layers.*.attn.qq", "Nearest: 'layers.*.attn.q' (2 sites)"),
        ("lm_heads", "Nearest: 'lm_head' (1 site)"),
        ("*.upp", "Nearest: '*.up' (2 sites)"),
        ("layers.1.*.dwn", "Nearest: 'layers.1.*.down' (1 site)"),
        ("%", "Sites look like: embed, layers.*.attn.k"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told_the_nearest_right_one(graphs: Any, pattern: str, hint: str) -> None:
    with pytest.raises(MatchError) as caught:
        graphs("llama").match(pattern)
    assert str(caught.value).startswith(f"pattern '{pattern}' matched no site.")
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_pattern_that_an_error_proposes_matches(graphs: Any) -> None:
    for name in ("mixtral", "phi3", "gpt2"):
        graph: Graph = graphs(name)
        for site in graph:
            with pytest.raises(MatchError) as caught:
                graph.match(site.name + "x")
            assert graph.match(str(caught.value).split("Nearest: '")[1].split("'")[0])


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama", [("q", "k", "v"), ("gate", "up")]),
        ("roberta", [("q", "k", "v")]),
        ("phi3", []),
        ("gpt2", []),
        ("mixtral", [("q", "k", "v"), ("gate", "up", "down") * 4]),
    ],
)
def test_fused_names_what_an_engine_joins(graphs: Any, name: str, roles: list[tuple[str, ...]]) -> None:
    groups = graphs(name).fused()
    assert [tuple(sorted(s.role for s in g)) for g in groups] == [tuple(sorted(r)) for r in roles] * 2
    assert all(len({s.block for s in group}) == 1 for group in groups)


def test_linear_holds_what_lies_inside_blocks_and_total_counts_a_tied_matrix_once(graphs: Any) -> None:
    llama, qwen2 = graphs("llama"), graphs("qwen2")
    assert [s.name for s in llama if s not in llama.linear] == ["embed", "lm_head"]
    assert total(llama) - total(llama.linear) == 2 * 272 * 64
    assert total(qwen2) - total(qwen2.linear) == 272 * 64


def test_experts_pause_together_and_share_an_input_only_within_one_expert(graphs: Any) -> None:
    sites = {s.name: s for s in graphs("qwen3_moe").of_block(1)}
    gate, up, down, other = (sites[f"layers.1.experts.{n}"] for n in ("2.gate", "2.up", "2.down", "3.gate"))
    assert gate.input_key == up.input_key != down.input_key
    assert gate.input_key != other.input_key
    assert gate.stage == other.stage == "experts.in"
    assert down.stage == "experts.mid"
    assert (gate.joined, down.joined) == ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")


def test_structure_knows_no_tensors() -> None:
    """Neither graph.py nor what it imports of ours."""
    for module in (graph, errors):
        found = [n for n in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in found if isinstance(n, ast.ImportFrom)}
        assert not any("torch" in str(name) for name in names)
        assert {n for n in names if str(n).startswith("compress")} <= {"compress.errors"}
