"""`memory:` of `distill`: gradients that are used up or replaced, runs that are stopped, what is foretold, chosen and refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.formats import parse
from compress.model.model import open_model
from compress.passes.allocate import Allocate
from compress.passes.distill import Distill
from compress.passes.lqlora import LqLora
from compress.passes.quantize import Quantize
from compress.state import State
from compress.training import memory, settings
from compress.training.choice import choose, learnt
from compress.training.gradients import Fused, Kept
from compress.training.loop import Schedule, Training
from compress.training.moving import Optimizer
from compress.training.optimizers import nbytes
from compress.training.options import OPTIMIZERS, Block, Lomo, Memory, ZerothOrder
from compress.training.student import Student
from compress.training.teacher import Live, Nobody
from compress.training.zeroth import Directions
from tests.conftest import GROUPED, IDS, SMALL, covered, make_model
from tests.pass_laws import TEXT, KilledError, attempt, killed_after
from tests.sharing import AcrossConfig, NormConfig
from tests.test_distill import pruned, trained


def training(
    state: State, memory_: Memory, words: Sequence[str] = ("all",), rank: int | None = None, teacher: Any = None
) -> Training:
    """One that learns from windows of a text, a few together."""
    p = Distill(train=tuple(words), rank=rank, rate=3e-3, batch=4, memory=memory_)
    choice = choose(state, words, rank)
    student = Student(state, choice, 0, keeps=memory_.keeps, streamed=memory_.weights == "streamed")
    optimizer, slopes = p.moving(state, student, memory_, 0)
    weights = {"ce": 1.0} if teacher is None else {"kl": 1.0}
    schedule = Schedule(8, 4, 1.0, 0, 1)
    return Training(student, teacher or Nobody(), TEXT, range(30), range(30, 34), weights, schedule, optimizer, slopes, 0,
                    lambda *_: None)  # fmt: skip


def after(one: Training, steps: int = 3) -> dict[str, Tensor]:
    """What has learnt in some steps."""
    for step in range(steps):
        one.step(step)
    return {n: p.detach().clone() for n, p in one.student.learns.items()}


def state_of(family: Any, name: str = "llama", **options: Any) -> State:
    return open_model(str(family(name, torch.float32, **options))).state


# --- gradients that are used up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", covered(OPTIMIZERS, "lomo", "adamw8bit"))
def test_fused_gradients_come_to_the_same_bits(family: Any, by: str) -> None:
    """LOMO's limit as well, which takes two ways back: but for how its norm is summed."""
    state = state_of(family)
    kept, fused = (after(training(state, Memory(optimizer=by, gradients=way))) for way in ("kept", "fused"))
    for name in kept:
        if by == "lomo":
            torch.testing.assert_close(kept[name], fused[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(kept[name], fused[name]), name
    start = training(state, Memory()).student.learns
    assert any(not torch.equal(kept[n], start[n]) for n in kept)


def test_a_matrix_of_two_blocks_moves_when_both_are_done(tmp_path: Path) -> None:
    """Used up as it comes from each, its gradient would move it twice; and it learns where nothing else does."""
    config = AcrossConfig(**SMALL, **GROUPED, **IDS, tie_word_embeddings=True)
    state = open_model(str(make_model(tmp_path, config, torch.float32))).state
    kept, fused = (after(training(state, Memory(gradients=way)), 2) for way in ("kept", "fused"))
    assert all(torch.equal(kept[name], fused[name]) for name in kept)
    alone = training(state, Memory(), ("layers.0.mlp.up",))
    assert alone.student.learns.keys() == {"layers.0.mlp.up:W_nk"}
    assert not torch.equal(after(alone, 1)["layers.0.mlp.up:W_nk"], state.reference(state.graph["layers.0.mlp.up"]))


@pytest.mark.parametrize("activations", covered(["kept", "checkpoint"], "checkpoint"))
def test_a_norm_of_two_blocks_or_of_a_block_and_the_head_moves_when_all_are_done(tmp_path: Path, activations: str) -> None:
    config = NormConfig(**SMALL, **GROUPED, **IDS, tie_word_embeddings=True)
    state = open_model(str(make_model(tmp_path, config, torch.float32))).state
    ways = [training(state, Memory(gradients=way, activations=activations)) for way in ("kept", "fused")]
    assert len([name for name in ways[0].student.learns if "norm" in name]) == 2
    kept, fused = (after(one, 2) for one in ways)
    assert all(torch.equal(kept[name], fused[name]) for name in kept)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_one_gradient_is_there_at_a_time(family: Any, name: str) -> None:
    """The largest tensor's; and where head and embedding share a table, that beside the largest of a block."""
    state = state_of(family, name)
    one, most = training(state, Memory(gradients="fused")), [0]
    learns = one.student.learns
    whole = sum(p.numel() for p in learns.values())
    for p in learns.values():
        p.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(q.grad.numel() for q in learns.values() if q.grad is not None))
        )
    one.step(0)
    inside = max(what.numel for what in learnt(state, one.student.choice) if what.block is not None)
    table = learns["embed:W_nk"].numel()
    norm = 64
    assert max(most) <= (table + inside + norm if name == "qwen2" else max(table + norm, inside)) < whole / 2
    assert memory.gradients(state, learnt(state, one.student.choice), Memory(gradients="fused")) in (max(most), max(most) - norm)
    assert all(p.grad is None for p in learns.values())


def test_the_limit_of_all_gradients_is_that_of_torch(family: Any) -> None:
    """clip_grad_norm_ and SGD, on gradients that nobody used up."""
    state = state_of(family)
    one = training(state, Memory(optimizer={"lomo": {"clip": 0.01}}, gradients="fused"))
    other = training(state, Memory(optimizer="lomo"))
    grads: dict[str, Tensor] = {}
    other.optimizer.move = lambda name, g, share: grads.update({name: g.clone()})  # type: ignore[method-assign]
    other.step(0)
    for name, p in other.student.learns.items():
        p.grad = grads.get(name)
    ps = [p for p in other.student.learns.values() if p.grad is not None]
    assert float(torch.nn.utils.clip_grad_norm_(ps, 0.01)) > 0.01
    count = sum(p.numel() for p in other.student.learns.values())
    torch.optim.SGD([{"params": [p], "lr": other.optimizer.rates[n] * math.sqrt(count) / 0.01} for n, p in
                     other.student.learns.items()]).step()  # fmt: skip
    for name, p in after(one, 1).items():
        torch.testing.assert_close(p, other.student.learns[name].detach(), rtol=1e-5, atol=1e-6)


def test_blocks_that_sleep_have_neither_gradient_nor_state(family: Any) -> None:
    state = state_of(family, blocks=4)
    whole = training(state, Memory())
    inner = sum(what.numel for what in learnt(state, whole.student.choice) if what.block is not None)
    for select in ("cyclic", "gradnorm"):
        one = training(state, Memory(optimizer={"block": {"select": select, "interval": 2}}))
        before = {n: p.detach().clone() for n, p in one.student.learns.items()}
        after(one, 1)
        assert sum(p.numel() for p in one.student.learns.values() if p.requires_grad) == inner / 4
        moments = sum(t.numel() for kept in one.optimizer.state.values() for n, t in kept.items() if n != "step")
        assert moments == 2 * inner / 4
        changed = [n for n, p in one.student.learns.items() if not torch.equal(p, before[n])]
        assert set(changed) == set(one.optimizer.awake)
    assert one.optimizer.selection is not None
    assert one.optimizer.selection.visits.sum() == 1


def test_nothing_is_kept_of_blocks_in_front_of_what_learns(family: Any) -> None:
    state = state_of(family, blocks=4)
    saved = []
    for words in (("layers.0.*",), ("layers.3.*",)):
        one, found = training(state, Memory(activations="kept"), words), list[int]()

        def note(t: Tensor, found: list[int] = found) -> Tensor:
            found.append(t.numel())
            return t

        one.student.remaking.kept_as_notes = lambda _: torch.autograd.graph.saved_tensors_hooks(note, note)  # type: ignore
        one.student.forward(TEXT.ids[:2])
        saved.append(sum(found))
    assert saved[1] < 0.4 * saved[0]


# --- no gradients -------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Any, Sequence[str], int | None]] = {
    "weights": (None, ("all",), None),
    "scales and norms": (Quantize(format=parse("int4:g32"), method="rtn"), ("scales", "norms"), None),
    "codes": (Quantize(format=parse("int3:g32"), method="rtn"), ("layers.*",), None),
    "factors": (LqLora(format=parse("int3:g32"), rank=4, rounds=0), ("lora",), None),
}


@pytest.mark.parametrize("kind", ["lozo", "mezo"])
@pytest.mark.parametrize("case", covered(CASES, "weights"))
def test_the_direction_gone_is_the_direction_measured(family: Any, tmp_path: Path, case: str, kind: str) -> None:
    """In the step that begins a period as in others; between, everything is back where it was."""
    step, words, rank = CASES[case]
    source = open_model(str(family("llama", torch.float32)))
    state = source.state if step is None else attempt(step, source, tmp_path)
    lazy = {"lazy": 2} if kind == "lozo" else {}
    one = training(state, Memory(gradients={"zeroth_order": {"kind": kind, **lazy}}), words, rank)
    assert isinstance(one.slopes, Directions)
    learns, seen = one.student.learns, list[dict[str, Tensor]]()
    real = one.student.forward

    def forward(*args: Any) -> Any:
        seen.append({n: p.detach().clone() for n, p in learns.items()})
        found = real(*args)
        assert not found.hidden.requires_grad
        return found

    one.student.forward = forward  # type: ignore[method-assign]
    for number in range(3):
        before = {n: p.detach().clone() for n, p in learns.items()}
        one.step(number)
        forth, back = seen[-2:]
        for name, p in learns.items():
            sizes = one.optimizer.rates[name] / one.slopes.rate
            torch.testing.assert_close((forth[name] + back[name]) / 2, before[name], rtol=1e-5, atol=1e-5 * sizes)
            gone, measured = p.detach() - before[name], forth[name] - back[name]
            if float(gone.norm()) > 1e-4 * sizes:
                cosine = torch.nn.functional.cosine_similarity(gone.flatten().double(), measured.flatten().double(), 0)
                assert abs(float(cosine)) > 0.99, (name, number)
        assert all(p.grad is None for p in learns.values())
    directions = [(s["layers.0.mlp.down:W_nk"] - t["layers.0.mlp.down:W_nk"]) for s, t in zip(seen[::2], seen[1::2], strict=True)
                  if case == "weights" and kind == "lozo"]  # fmt: skip
    if directions:
        assert int(torch.linalg.matrix_rank(directions[0], rtol=1e-2)) == 2
        assert int(torch.linalg.matrix_rank(torch.cat(directions[:2]), rtol=1e-2)) == 2, "the same columns for two steps"
        assert int(torch.linalg.matrix_rank(torch.cat(directions), rtol=1e-2)) == 4


def test_directions_find_the_way_down(family: Any) -> None:
    """A few scales, learnt from what a student says when they are as they were."""
    state = state_of(family)
    student = Student(state, choose(state, ("norms",), None), 0)
    learns = {n: p for n, p in student.learns.items() if "input" in n}
    optimizer = Optimizer(Lomo(), learns, learnt(state, student.choice), [0.01] * len(learns))
    wanted = {n: p.detach() + 0.3 for n, p in learns.items()}
    slopes = Directions(optimizer, ZerothOrder(kind="mezo"), 0.01, 0)

    def look() -> float:
        return sum(float((p.detach() - wanted[n]).square().sum()) for n, p in learns.items())

    start = look()
    for number in range(300):
        slopes.step(number, 1.0, look, look)
    assert look() < 0.2 * start


# --- stopped, and gone on ------------------------------------------------------------------------------------------------

STOPPED: list[dict[str, Any]] = [
    *({"optimizer": by, "gradients": "fused"} for by in OPTIMIZERS if by not in ("adamw", "block", "galore")),
    {"optimizer": {"galore": {"gap": 2}}, "activations": ["checkpoint", "int8"]},
    *({"optimizer": {"block": {"select": how, "interval": 2}}} for how in ("gradnorm", "random")),
    {"gradients": "zeroth_order"},
    {"gradients": {"zeroth_order": {"kind": "mezo"}}},
    {"activations": "int8"},
    {"activations": "velora"},
    {"activations": "wta_crs", "gradients": "fused"},
    {"activations": "offload"},
]


@pytest.mark.slow
@pytest.mark.parametrize("number", covered(range(len(STOPPED)), 8), ids=lambda n: str(STOPPED[n]))
def test_a_training_that_was_stopped_comes_to_the_same_bytes(family: Any, tmp_path: Path, number: int) -> None:
    """In the middle of it, with whatever it remembers."""
    source, state = pruned(family, tmp_path / "p")
    p = Distill(
        loss={"ce": 1.0}, train=("layers.*", "norms"), rate=3e-3, batch=2, checks=3, tokens=3 * 64, memory=STOPPED[number]
    )
    whole = trained(p, source, state, tmp_path / "whole")
    with killed_after(6), pytest.raises(KilledError):
        trained(p, source, state, tmp_path / "cut")
    again = trained(p, source, state, tmp_path / "cut")
    for spec in whole.specs:
        assert torch.equal(whole.dense.read(spec.name), again.dense.read(spec.name)), spec.name


@pytest.mark.slow
def test_damage_of_an_allocation_says_where_to_learn(family: Any, tmp_path: Path) -> None:
    source = open_model(str(family("llama")))
    state = attempt(
        Allocate(budget="3.0 bits", formats=("int2:g32", "int4:g32"), metric="weight"),
        source,
        tmp_path / "a",
        (Quantize(method="rtn"),),
    )  # type: ignore[arg-type]
    found = settings.damage(state)
    assert found is not None
    assert state.plan is not None
    assert state.plan.forecast is not None
    assert set(found) == {0, 1}
    one = training(state, Memory(optimizer={"block": {"select": "damage"}}))
    one.step(0)
    assert one.optimizer.selection is not None
    assert one.optimizer.selection.chosen == {max(found, key=lambda b: found[b])}
    assert isinstance(one.optimizer.by, Block)


def test_the_whole_is_one_of_several(family: Any) -> None:
    """A student that keeps gradients has a Kept, one that uses them up a Fused; a teacher is asked as ever."""
    state = state_of(family)
    assert isinstance(training(state, Memory()).slopes, Kept)
    assert isinstance(training(state, Memory(gradients="fused")).slopes, Fused)
    teacher = Live(state, TEXT, None, "cpu")
    one = training(state, Memory(optimizer="adalomo", gradients="fused"), teacher=teacher)
    assert one.step(0) == pytest.approx(0, abs=1e-5)
    assert nbytes({}) == 0
