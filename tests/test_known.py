"""Skeletons that are kept: a copy is the model that transformers builds, and what its owner does to it nobody else sees."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from compress.model import known
from compress.model.model import open_model
from compress.model.skeleton import built, glance, model_class, skeleton, with_logits
from tests.conftest import FAMILIES, covered


def told(model: nn.Module) -> dict[str, Any]:
    """All of a skeleton that anybody asks: modules with their plain attributes, parameters and who shares them, buffers."""
    modules = {path: (type(m), {k: v for k, v in vars(m).items() if isinstance(v, known.SHARED)}, sorted(vars(m)))
               for path, m in model.named_modules(remove_duplicate=False)}  # fmt: skip
    owners: dict[int, str] = {}
    parameters = {n: (owners.setdefault(id(p), n), p.shape, p.dtype, p.device, p.requires_grad, sorted(vars(p)))
                  for n, p in model.named_parameters(remove_duplicate=False)}  # fmt: skip
    buffers = {n: (b.dtype, b.device, b.tolist()) for n, b in model.named_buffers(remove_duplicate=False)}
    return {"modules": modules, "parameters": parameters, "buffers": buffers, "config": model.config.to_dict()}


def new(config: Any) -> nn.Module:
    return with_logits(built(model_class(config), deepcopy(config)))


@pytest.mark.parametrize("name", covered(FAMILIES, "llama", "gpt2", "mixtral"))
def test_a_copy_is_what_is_built(name: str) -> None:
    config = FAMILIES[name]()
    first, again = skeleton(config), skeleton(config)
    assert told(first) == told(again) == told(new(config))


def pieces(model: nn.Module) -> list[Any]:
    """Every module, parameter and buffer of a model."""
    return [*model.modules(), *model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3_moe", "roberta"])
def test_nothing_of_a_copy_is_anybody_elses(name: str) -> None:
    config = FAMILIES[name]()
    mine, other, before = skeleton(config), skeleton(config), told(new(config))
    assert not set(map(id, pieces(mine))) & set(map(id, pieces(other)))
    assert all(getattr(module, "config", mine.config) is mine.config for module in mine.modules())
    for buffer in mine.buffers():
        buffer.zero_().sub_(1) if buffer.is_floating_point() else buffer.zero_()
    for p in mine.parameters():
        p.requires_grad_()
    for module in list(mine.modules()):
        module.layer_idx, module.training = 77, True
        module.register_forward_hook(lambda *_: None)
        module._parameters.clear()
        module._modules.clear()
    mine.config.hidden_size = 1
    assert told(other) == told(skeleton(config)) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_who_only_looks_changes_nothing(family: Any, name: str) -> None:
    """A model is opened, its graph anchored in its weights, and what to know of it told."""
    model = open_model(str(family(name)))
    skeleton(model.config)
    seen = glance(model.config)
    before = told(seen)
    assert model.graph
    assert model.remarks is not None
    assert glance(model.config) is seen
    assert told(seen) == before


def test_what_no_architecture_depends_on_makes_no_other() -> None:
    config = FAMILIES["llama"]()
    skeleton(config)
    kept = list(known._KEPT)
    for name, value in (("_name_or_path", "elsewhere"), ("quantization_config", {"quant_method": "any"})):
        other = deepcopy(config)
        setattr(other, name, value)
        skeleton(other)
    assert list(known._KEPT) == kept
    for name, value in (("hidden_act", "relu"), ("head_dim", 32), ("_attn_implementation_internal", "eager")):
        other = deepcopy(config)
        setattr(other, name, value)
        assert told(skeleton(other)) == told(new(other)), name
    assert len(known._KEPT) > len(kept) or len(kept) == known.MOST


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_a_rehearsal_without_memory_nothing_is_kept(name: str) -> None:
    """Neither of a model that has buffers nor of one that has none."""
    config = FAMILIES[name]()
    config.initializer_range = 0.5  # of no other test
    with torch.device("meta"):
        assert all(b.is_meta for b in skeleton(config).buffers())
        assert all(b.is_meta for b in glance(config).buffers())
    assert told(skeleton(config)) == told(glance(config)) == told(new(config))


class Bound(nn.Module):
    """A module with a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.double = lambda: self.weight * 2
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)


def test_what_cannot_be_copied_is_built_each_time() -> None:
    with pytest.raises(TypeError, match="belongs to one module"):
        known.Kept(Bound())
    first, again = (known.known(b"bound", Bound) for _ in range(2))
    assert first is not again
    assert b"bound" not in known._KEPT


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "_KEPT", type(known._KEPT)())
    for size in range(known.MOST + 3):
        known.known(bytes([size]), lambda: nn.Linear(1, 1))
    assert list(known._KEPT) == [bytes([size]) for size in range(3, known.MOST + 3)]
    monkeypatch.setattr(known, "MOST_BUFFERS", 3)
    heavy = nn.Module()
    heavy.register_buffer("table", torch.zeros(1))
    assert known.known(b"heavy", lambda: heavy) is heavy
    assert b"heavy" not in known._KEPT
