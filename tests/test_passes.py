"""Every pass keeps the laws of passes, and a pass that breaks its promise is told so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from compress import manager
from compress.errors import ContractError, OrderError
from compress.formats import parse
from compress.model.model import open_model
from compress.passes import PASSES
from compress.passes.allocate import Allocate
from compress.passes.lqlora import LqLora
from compress.passes.quantize import Quantize
from compress.state import Aspect, Fact, State
from compress.state.graph import Graph
from tests.conftest import covered, rare
from tests.pass_laws import attempt, check_pass, step_of

SOME = ["int2:g32", "int3:g32", "int4:g64"]
OPTIONS: dict[str, list[dict[str, Any]]] = {  # at least one set for every pass, each small enough for a tiny llama
    "quantize": [
        {"format": "int4:g32", "pins": {"lm_head": "int8:g32", "*.down": "int3:g64:asym"}},
        {"format": "int3:g32", "drift": 0, "order": "natural", "clip": "hessian", "pins": {"lm_head": "int4:channel"}},
        {"format": "int4:g32", "method": "rtn", "clip": "minmax", "pins": {"lm_head": "fp32", "layers.0.*": "bf16"}},
        {"format": "lut3:g32", "pins": {"*.down": "nf3:g64:dq8x16", "layers.0.*": "nf4:g32"}},
        {"format": "nvfp4/nvfp4", "pins": {"*.down": "int8:channel/int8:token", "*.o": "mxfp4/mxfp8", "lm_head": "fp8:channel"}},
        {"format": "int2:g32:r64", "pins": {"*.down": "lut3:g64:r128", "layers.0.*.o": "nf3:g64:r16", "lm_head": "int4:g32:r32"}},
        {"format": "ecq3", "pins": {"*.down": "ecq2.55:r64", "*.q": "q4_1", "*.o": "iq4_nl", "lm_head": "q5_1"}},
        {"format": "tcq3:l8", "pins": {"*.down": "tcq2.5:l8:r64", "*.q": "int3:g32", "lm_head": "bf16"}},
        {
            "format": "int2:g32",
            "method": "learned",
            "steps": 6,
            "pins": {"*.down": "lut3:g32", "*.q": "bf16", "*.o": "nf3:g64:dq8x16"},
        },
    ],
    "edit": [{"drop_layers": [0]}],
    "depth": [
        {"windows": 2},
        {"drop": 2, "unit": "sublayer", "keep_zeros": True, "windows": 2},
        {"unit": "sublayer", "windows": 2},
        {"metric": "angle"},
    ],
    "prune": [
        {"mlp": 0.5, "kv_groups": 0.5},
        {"mlp": 0.75, "method": "magnitude", "compensate": False},
        {"kv_groups": 0.5, "method": "wanda", "drift": 0},
        {"mlp": 0.5, "method": "flap"},
    ],
    "distill": [
        {"loss": {"ce": 1.0}, "rate": 0.2, "batch": 9, "checks": 2},
        {
            "loss": {"ce": 0.5, "hidden_cosine": 0.5},
            "teacher": "live",
            "train": ["layers.*.down", "norms"],
            "rate": 0.2,
            "batch": 1,
            "memory": {"optimizer": "adalomo", "gradients": "fused", "activations": "int8"},
        },
        {
            "loss": {"ce": 1.0},
            "train": "lora",
            "rank": 4,
            "rate": 0.2,
            "batch": 6,
            "checks": 3,
            "memory": {"activations": "kept"},
        },
    ],
    "smooth": [{"strength": 0.75}, {"pairs": "norms"}],
    "factorize": [
        {"rank": 0.75, "pins": {"*.down": 24, "layers.0.*.q": "full"}},
        {"rank": 0.5, "method": "svd", "pins": {"lm_head": 8}},
        {"rank": 0.6, "spread": "spectrum", "drift": 0, "pins": {"*.o": "full"}},
    ],
    "lqlora": [
        {"format": "int3:g32", "rank": 4, "rounds": 1, "pins": {"*.down": "int4:g32", "*.up": "lut2:g64+r8:int8:channel"}},
        {"format": "nf3:g64:dq8x16", "rank": 4, "init": "paper", "fisher": True, "clip": "minmax"},
        {"format": "int2:g32", "rank": 4, "rounds": 0, "method": "learned", "steps": 6},
    ],
    "importance": [{}],
    "kv_policy": [
        {"budget": "60 %", "context": 64, "continuation": 8, "dtype": ["bf16", "int8"]},
        {"budget": "50 %", "context": 64, "method": "uniform", "rules": ["snap"]},
        {"method": "fastgen", "recovery": 0.7},
        {"method": "fastgen", "budget": "80 %", "dtype": ["int8"]},
    ],
    "kv_cache": [{}, {"format": "fp8:head"}],
    "context_merge": [{"window": 64, "warmup": 0, "prefix": 2, "suffix": 4}],
    "sparsify": [
        {"windows": 2},
        {"kind": "teal", "allocate": False, "keep": "60 %"},
    ],
    "rotate": [{}, {"kind": "random", "heads": False}],
    "allocate": [
        {"budget": "3.5 bits", "formats": SOME, "trials": 2, "pins": {"lm_head": "int8:g32", "layers.1.*": {"min": "int3:g32"}}},
        {"budget": ["60 %", "4 bits"], "formats": SOME, "ranks": [0, 4], "metric": "output", "trials": 0},
        {"budget": "4 bits", "formats": [*SOME, "q4_1", "ecq3", "ecq3.5:r64"], "trials": 1, "together": "none"},
        {
            "budget": "2.5 bits",
            "formats": SOME,
            "structure": {"mlp": [0.5], "kv_groups": "all"},
            "constraints": {"parameters": "85 %"},
        },
        {
            "budget": "2.5 bits",
            "formats": SOME,
            "structure": {"mlp": [0.5]},
            "shapes": "free",
            "constraints": {"parameters": "<= 92 %"},
        },
    ],
}
FOLLOWING = {"allocate": (Quantize(), LqLora(rounds=0)), "smooth": (Quantize(format=parse("int3:g32"), method="rtn"),)}
CASES = [(name, options) for name, sets in OPTIONS.items() for options in sets]


def test_every_pass_is_tried() -> None:
    assert OPTIONS.keys() == PASSES.keys()


STOPPED = ("quantize", "distill", "importance")  # in every run: one that walks through blocks, one that trains, one that looks


def cases() -> Iterator[Any]:
    """Of the first options of a pass in every run; in the slow one of the others too, and the first are stopped everywhere: where
    a pass is stopped is no matter of its options."""
    for i, (name, options) in enumerate(CASES):
        first = options is OPTIONS[name][0]
        stopped = "nowhere" if first and name not in STOPPED else "once"
        yield pytest.param(name, options, stopped, id=f"{name}{i}", marks=() if first else pytest.mark.slow)
        if first:
            yield pytest.param(name, options, "everywhere", id=f"{name}{i}-everywhere", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "options", "stopped"), cases())
def test_the_laws_of_passes(family: Any, tmp_path: Path, name: str, options: dict[str, Any], stopped: str) -> None:
    check_pass(PASSES[name].model_validate(options), family("llama"), tmp_path, FOLLOWING.get(name, ()), stopped)


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["mixtral", "gpt2", "roberta"], "mixtral"))
def test_the_laws_hold_for_other_architectures(family: Any, tmp_path: Path, name: str) -> None:
    check_pass(Quantize(format=parse("int4:g32")), family(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", *(rare(name) for name in ("gpt2", "gemma2"))])
def test_allocation_holds_for_other_architectures(family: Any, tmp_path: Path, name: str) -> None:
    allocate = Allocate.model_validate({"budget": "3.5 bits", "formats": SOME, "trials": 1})
    check_pass(allocate, family(name, blocks=1), tmp_path, (Quantize(),))


def test_the_table_is_by_name() -> None:
    assert all(cls.name == name for name, cls in PASSES.items())


# --- promises ---------------------------------------------------------------------------------------------------------


class Liar(Quantize):
    """Says that it writes a plan, and writes weights as well."""

    name: ClassVar[str] = "liar"
    writes: ClassVar[Aspect] = Aspect.PLAN


class Shrinker(Quantize):
    """Takes a block away without saying so."""

    name: ClassVar[str] = "shrinker"

    def foresee(self, state: State) -> State:
        graph = state.graph
        sites = {n: s for n, s in graph.sites.items() if s.block != 1}
        return super().foresee(replace(state, graph=Graph(graph.family, graph.blocks[:1], sites, graph.parameters)))


def test_a_pass_that_writes_more_than_it_declares_is_told_so_and_its_author_is_addressed(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama")))
    with pytest.raises(ContractError, match=r"pass author: 'liar' declares writes=.*PLAN.* but also changed .*WEIGHTS"):
        attempt(Liar(format=parse("int4:g32"), method="rtn"), model, tmp_path)
    with pytest.raises(ContractError, match=r"pass author: 'shrinker' .* but also changed .*STRUCTURE"):
        manager.foresee([Shrinker(format=parse("int4:g32"))], model.state)


def test_a_broken_promise_ends_the_run_before_the_step_is_finished(family: Any, tmp_path: Path) -> None:
    model = open_model(str(family("llama")))
    liar = Liar(format=parse("int4:g32"), method="rtn")
    step = step_of(liar, model, tmp_path)
    with pytest.raises(ContractError):
        manager.fold([liar], model.state, lambda number, p: step)
    assert not step.finished


def test_a_step_that_needs_what_an_earlier_one_took_says_which(family: Any) -> None:
    twice = [Quantize(), Quantize()]
    with pytest.raises(OrderError) as caught:
        manager.check_order(twice)
    assert str(caught.value).startswith("step 2 'quantize' needs DENSE weights; step 1 'quantize' removed them.")
    assert caught.value.at == ("step", "1")
    with pytest.raises(OrderError, match="step 1 'quantize' needs DENSE weights; no earlier step gives it"):
        manager.check_order([Quantize()], Fact.QUANTIZED)


def test_randomness_is_the_sites_own(family: Any, tmp_path: Path) -> None:
    """The same for the same seed and site, whatever was drawn before; another for another."""
    model = open_model(str(family("llama")))
    context = step_of(Quantize(), model, tmp_path).context()
    draw = lambda c, name: float(__import__("torch").rand(1, generator=c.generator(model.graph[name])))  # noqa: E731
    first = draw(context, "layers.0.attn.q")
    draw(context, "layers.0.attn.k")
    assert draw(context, "layers.0.attn.q") == first
    assert draw(context, "layers.0.attn.k") != first
    assert draw(replace(context, seed=1), "layers.0.attn.q") != first
