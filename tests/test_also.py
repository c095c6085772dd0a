"""Embedding and head among what is allocated: a budget of the whole file, and damage as measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from compress import pipeline
from compress.errors import CompressError
from compress.model.model import open_model
from compress.passes.allocate import Allocate
from compress.passes.quantize import Quantize
from tests.conftest import IDS, make_model, rare
from tests.cooking import bake, recipe
from tests.pass_laws import check_pass

SOME = ["int2:g32", "int3:g32", "int4:g32", "int8:g32"]


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "also"), [rare("qwen2", ["embed"]), rare("gemma3", ["lm_head"]), ("llama", ["embed", "lm_head"])]
)
def test_a_budget_of_the_file_is_kept_with_the_table_in_it(
    family: Any, text: Path, tmp_path: Path, name: str, also: list[str]
) -> None:
    whole = (family(name) / "model.safetensors").stat().st_size
    budget = f"{0.3 * whole / 2**20:.4f} MiB"
    done = bake(tmp_path, family(name), text, "native", {"allocate": {"budget": budget, "formats": SOME, "also": also}},
                {"quantize": {}})  # fmt: skip
    assert size_of(done.artifacts["native"][0]) <= 0.3 * whole
    forecast = done.state.plan.forecast if done.state.plan else None
    assert forecast is not None
    named = {"embed", "lm_head"} if name == "llama" else {"embed"}
    assert named <= forecast.damage.keys()
    assert all(forecast.damage[site] > 0 for site in named)
    assert "native" in done.artifacts


@pytest.mark.slow
def test_more_bits_of_a_table_are_less_damage(family: Any, text: Path, tmp_path: Path) -> None:
    damages = []
    path = recipe(tmp_path, family("qwen2", torch.float32), text)
    content = yaml.safe_load(path.read_text()) | {"export": [{"native": {}}]}
    for fmt in ("int2:g32", "int3:g32", "int4:g32", "int8:g32"):
        allocate = {"budget": "8.6 bits", "formats": SOME, "also": ["embed"], "pins": {"embed": fmt}, "trials": 0}
        path.write_text(yaml.safe_dump(content | {"passes": [{"allocate": allocate}, {"quantize": {}}]}))
        plan = pipeline.plan(path).prepared.foreseen.plan
        assert plan is not None
        assert plan.forecast is not None
        assert str(plan.formats["embed"]) == fmt
        damages.append(plan.forecast.damage["embed"])
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 4 * damages[2] > 0


def test_what_lies_inside_is_not_named(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    with pytest.raises(CompressError, match="lies inside the blocks, which are allocated anyway; name embed or lm_head"):
        Allocate(also=("layers.*",)).foresee(state)
    with pytest.raises(CompressError, match="matched no site"):
        Allocate(also=("lm_haed",)).foresee(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", rare("llama")])
def test_the_laws_of_passes(family: Any, tmp_path: Path, name: str) -> None:
    allocate = Allocate.model_validate({"budget": "4 bits", "formats": SOME[:3], "also": ["embed", "lm_head"], "trials": 0})
    check_pass(allocate, family(name), tmp_path, (Quantize(),))


@pytest.mark.parametrize("options", [{"limits": {"lm_head": "3 bits"}}, {"pins": {"lm_head": {"max": "int2:g32"}}},
                                     {"pins": {"*": {"max": "int2:g32"}}}])  # fmt: skip
def test_either_name_of_a_shared_table_is_heard(family: Any, options: dict[str, Any]) -> None:
    state = open_model(str(family("qwen2"))).state
    allocate = Allocate.model_validate({"budget": "4 bits", "formats": SOME, "also": ["embed", "lm_head"], **options})
    plan = allocate.foresee(state).plan
    assert plan is not None
    assert str(plan.formats["embed"]) == "int2:g32"


def test_a_table_that_is_not_allocated_has_no_bounds(family: Any) -> None:
    state = open_model(str(family("llama"))).state
    with pytest.raises(CompressError, match="'embed' is not allocated; name it in 'also', or pin it to one format"):
        Allocate.model_validate({"budget": "4 bits", "formats": SOME, "pins": {"embed": {"max": "int2:g32"}}}).foresee(state)


def projected(folder: Path) -> Path:
    """A model that projects the rows that it looks up to another width."""
    return make_model(folder, transformers.OPTConfig(
        hidden_size=64, ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=272, max_position_embeddings=256, **IDS))  # fmt: skip


@pytest.mark.slow
def test_rows_that_are_projected(text: Path, tmp_path: Path) -> None:
    source = projected(tmp_path / "model")
    done = bake(tmp_path / "run", source, text, "native", {"allocate": {"budget": "4 bits", "formats": SOME}}, {"quantize": {}})
    assert done.artifacts["native"][1].engine == "compress runtime"
    allocate = {"budget": "4 bits", "formats": SOME, "also": ["embed"]}
    with pytest.raises(CompressError, match="projects the rows that it looks up"):
        bake(tmp_path / "also", source, text, "native", {"allocate": allocate}, {"quantize": {}})
