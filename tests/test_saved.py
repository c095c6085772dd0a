"""What is kept for the way back: bytes, files and sketches in place of tensors, against what they stand for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from compress.errors import RunError
from compress.model.model import open_model
from compress.training import memory
from compress.training.choice import choose
from compress.training.options import Checkpoint, Int8, Offload, Velora, Way, WtaCrs
from compress.training.saved import Bytes, File, Layout, Saver, View, in_bytes
from compress.training.sketches import OneDirection, Sketch, SomeTokens, install, winners
from compress.training.student import Student
from tests.conftest import IDS, SMALL, covered, make_tokenizer
from tests.pass_laws import TOKENS


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- a byte each --------------------------------------------------------------------------------------------------------


def through(t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A tensor, kept and given back."""
    saver = Saver(lambda flat, layout: in_bytes(flat, layout, generator))
    return saver.unpack(saver.pack(t))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.permutations(range(4)), st.booleans())
def test_any_tensor_comes_back_where_it_was(b: int, h: int, t: int, d: int, order: list[int], part: bool) -> None:
    whole = drawn(b, h, t, 2 * d).permute(order)
    x = whole[..., : max(1, whole.shape[-1] // 2)] if part else whole
    found = through(x)
    assert found.shape == x.shape
    span = float(x.max() - x.min()) if x.numel() else 0.0
    assert float((found - x).abs().max()) <= span / 255 + 1e-6
    file = File(None)
    saver = Saver(lambda flat, _: file.write(flat))
    assert torch.equal(saver.unpack(saver.pack(x)), x)


def test_heads_have_ranges_of_their_own() -> None:
    """Mesa's point: else the small ones drown in the range of the large ones."""
    sizes = torch.tensor([0.1, 0.5, 2.0, 8.0])
    x = (drawn(2, 64, 4, 32) * sizes[:, None]).transpose(1, 2)  # as projections leave it: heads beside each other
    found = through(x)
    own = (found - x).square().mean((0, 2, 3)).sqrt() / sizes
    flat = x.transpose(1, 2).reshape(-1)
    as_one = in_bytes(flat, Layout(1, flat.numel(), 1, 1), None)
    assert as_one is not None
    shared = (as_one.numbers() - flat).view(2, 64, 4, 32).square().mean((0, 1, 3)).sqrt() / sizes
    assert float(own.max()) < 0.015
    assert float(shared[0]) > 0.1


def test_rounding_is_right_in_the_mean() -> None:
    x, g = drawn(16, 256), torch.Generator().manual_seed(0)
    mean = sum(through(x, g) for _ in range(400)) / 400
    step = (x.amax(1) - x.amin(1)).max() / 255
    assert float((mean - x).abs().max()) < 0.15 * float(step)


def test_masks_and_statistics_are_left() -> None:
    mask = torch.zeros(1, 1, 64, 64).masked_fill(torch.ones(64, 64).triu(1) > 0, torch.finfo(torch.float32).min)
    saver = Saver(lambda flat, layout: in_bytes(flat, layout, None))
    saver.tokens = 512
    for t in (
        mask,
        drawn(2, 8, 256),
        drawn(300, 10),
        torch.arange(8192),
        drawn(1, 64).expand(512, 64),
        nn.Parameter(drawn(512, 64)),
    ):
        assert saver.pack(t) is t
    assert isinstance(saver.pack(drawn(2, 256, 64)), View)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full, /dev/full")
def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    """Where it happens, within autograd's hook, in a line that names the folder; so is a folder that nobody can write into."""
    file, x = File(tmp_path), torch.ones(8, 64, 64, requires_grad=True)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.number)
    os.close(full)
    saver = Saver(lambda flat, layout: file.write(flat))
    with pytest.raises(RunError, match=f"{tmp_path}: the disk is full"), saved_tensors_hooks(saver.pack, saver.unpack):
        x.exp()
    (tmp_path / "taken").touch()
    with pytest.raises(RunError, match="taken: cannot write"):
        File(tmp_path / "taken")


def test_an_address_that_is_used_again_is_another_tensor() -> None:
    saver = Saver(lambda flat, layout: in_bytes(flat, layout, None))
    kept = [saver.pack(torch.full((4, 512), float(i))) for i in range(50)]  # each is gone when the next is made
    assert [round(float(saver.unpack(k).mean())) for k in kept] == list(range(50))
    x = drawn(4, 512)
    first = saver.pack(x)
    x.add_(100)  # another version
    assert float((saver.unpack(saver.pack(x)) - x).abs().max()) < 1
    assert float((saver.unpack(first) + 100 - x).abs().max()) < 1


# --- a student ----------------------------------------------------------------------------------------------------------


def learnt_by(folder: Path, keeps: Sequence[Way], ids: Tensor, saver: Callable[[Saver], None] | None = None) -> Any:
    """What blocks put out and all gradients, by a student that keeps so."""
    state = open_model(str(folder)).state
    student = Student(state, choose(state, ("all",), None), 0, keeps=keeps)
    if saver is not None and student.saving.saver is not None:
        saver(student.saving.saver)
    student.begin(0)
    batch = student.forward(ids)
    with student.behind(state), student.holding_head():
        student.head(batch).float().logsumexp(-1).sum().backward()
    return batch.hidden.detach(), {n: p.grad for n, p in student.learns.items() if p.grad is not None}


def cosine(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in side.values()]) for side in (one, two))
    return float(nn.functional.cosine_similarity(a, b, 0))


IDS_ = TOKENS.ids[:4, :32]


@pytest.mark.parametrize("keeps", [(Int8(),), (Checkpoint(), Int8()), (Offload(),), (Checkpoint(), Offload())], ids=str)
@pytest.mark.parametrize("name", covered(["llama", "gpt2"], "llama"))
def test_forward_passes_are_exact_and_gradients_are_near(family: Any, name: str, keeps: Sequence[Way]) -> None:
    folder = family(name, torch.float32)
    (hidden, plain), (other, found) = (learnt_by(folder, way, IDS_) for way in ((), keeps))
    assert torch.equal(hidden, other)
    assert plain.keys() == found.keys()
    if isinstance(keeps[-1], Offload):
        assert all(torch.equal(plain[n], found[n]) for n in plain)
    else:
        assert 0.999 < cosine(plain, found) < 1


def test_large_attention_scores_do_no_harm(tmp_path: Path) -> None:
    """Probabilities that are computed anew from rounded keys, and the exact sum of exponentials, would be off by factors."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "num_attention_heads": 2}, **IDS))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(80)
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    plain, found = (learnt_by(tmp_path, way, IDS_)[1] for way in ((), (Int8(),)))
    assert cosine(plain, found) > 0.99


def test_a_byte_is_at_most_26_hundredths_of_fp32(family: Any) -> None:
    """Of every storage that is kept so, each counted once, though most are saved several times."""
    kept, storages = list[Bytes](), dict[int, tuple[Tensor, int]]()

    def spy(saver: Saver) -> None:
        keep, pack = saver.keep, saver.pack

        def keeping(flat: Tensor, layout: Layout) -> Any:
            kept.append(keep(flat, layout))  # type: ignore[arg-type]
            return kept[-1]

        def packing(t: Tensor) -> Any:
            found = pack(t)
            if found is not t:
                storages[t.untyped_storage()._cdata] = t, t.untyped_storage().nbytes()
            return found

        saver.keep, saver.pack = keeping, packing  # type: ignore[method-assign]

    learnt_by(family("llama", torch.float32), (Int8(),), TOKENS.ids[:4], spy)
    assert sum(k.nbytes for k in kept) <= 0.26 * sum(n for _, n in storages.values())


@pytest.mark.parametrize("way", [Int8(), Velora(groups=4), WtaCrs()], ids=lambda w: type(w).__name__)
def test_what_is_kept_is_foretold(family: Any, way: Way) -> None:
    """But for a mask and the repeated keys that go with it: tensors without numbers do not say that none is needed."""
    state = open_model(str(family("llama", torch.float32))).state
    student = Student(state, choose(state, ("all",), None), 0, keeps=(way,))
    storages: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage()._cdata] = t
        return t

    saver, student.saving.saver = student.saving.saver, None
    student.remaking.kept_as_notes = lambda _: nullcontext()  # type: ignore[method-assign,assignment]
    student.begin(0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        student.forward(IDS_)
    own = {p.untyped_storage()._cdata for p in student.learns.values()}
    total = 0
    for t in (t for key, t in storages.items() if key not in own):
        flat = torch.empty(0).set_(t.untyped_storage()) if t.is_floating_point() else t
        smaller = saver is not None and memory.worth(flat, IDS_.numel()) and t.dim() != 4  # type: ignore[arg-type]
        packed = saver.pack(flat.view(-1, 32)) if smaller and saver is not None else t
        total += packed.of.nbytes if isinstance(packed, View) else t.untyped_storage().nbytes()
    assert sum(memory.saved_by_block(state, *IDS_.shape, torch.float32, way)) == pytest.approx(total, rel=0.3)


# --- sketches -----------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Linear layers side by side."""

    def __init__(self, count: int, d: int = 32, out: int = 24):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(d, out) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def gradients(model: Layers, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """What comes out, all gradients (x's among them), and bytes saved for the way back beside parameters'."""
    leaf, storages = x.clone().requires_grad_(), dict[int, Tensor]()
    inner = leaf * 1.0

    def note(t: Tensor) -> Tensor:
        storages[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = model(inner)
    y.backward(dy)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    found = {n: p.grad for n, p in [*model.named_parameters(), ("x", leaf)] if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return y.detach(), found, sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)


@pytest.mark.parametrize("sketch", [OneDirection(Velora(groups=4)), SomeTokens(WtaCrs(ratio=0.25))], ids=["velora", "wta_crs"])
def test_sketches_are_exact_but_for_weights(sketch: Sketch) -> None:
    torch.manual_seed(0)
    model, x, dy = Layers(2), drawn(2, 64, 32), drawn(2, 64, 24, seed=1)
    y, plain, saved = gradients(model, x, dy)
    install(model, "block", sketch)
    other, found, less = gradients(model, x, dy)
    assert torch.equal(y, other)
    for name in plain:
        if "weight" not in name:
            torch.testing.assert_close(plain[name], found[name])
    assert saved == x.nbytes
    each = 128 * 4 * 4 + 8 * 4 if isinstance(sketch, OneDirection) else 32 * (32 * 4 + 8)
    assert less == 2 * each


def test_one_number_of_a_group_is_that_along_the_direction() -> None:
    sketch, x, dy = OneDirection(Velora(groups=4, scale=0.5)), drawn(64, 32) + 1, drawn(64, 24, seed=1)
    z, v = sketch.keep("layer", x)
    assert float(v.norm()) == pytest.approx(1)
    torch.testing.assert_close(v, nn.functional.normalize(x.view(64, 4, 8).mean((0, 1)), dim=0))
    estimate = (z[..., None] * v).reshape(64, 32)
    torch.testing.assert_close(sketch.slope(dy, (z, v)), 0.5 * dy.T @ estimate)
    sketch.keep("layer", -x)
    assert torch.equal(sketch.directions["layer"], v), "that of the first batch stays"
    whole = OneDirection(Velora(groups=32))
    torch.testing.assert_close(whole.slope(dy, whole.keep("layer", x)), dy.T @ x)
    assert len(OneDirection(Velora(groups=7)).keep("layer", x)[0][0]) == 4, "the next fewer that come out even"


def test_a_sibling_that_holds_the_input_leaves_nothing_to_save() -> None:
    torch.manual_seed(0)
    model, x, dy = Layers(2), drawn(2, 64, 32), drawn(2, 64, 24, seed=1)
    saved = gradients(model, x, dy)[2]
    install(model.layers[:1], "block", OneDirection(Velora(groups=4)))
    assert gradients(model, x, dy)[2] > saved


@pytest.mark.slow
def test_winners_are_right_in_the_mean_and_closer_than_without_them() -> None:
    """Against plain column-row sampling, and the largest alone, which are wrong in the mean."""
    g = torch.Generator().manual_seed(0)
    x = drawn(256, 8).abs() * torch.randn(256, 1, generator=g).mul(1.5).exp()
    dy, k = drawn(256, 6, seed=2).abs(), 64
    exact = dy.T @ x
    p = x.norm(dim=1) / x.norm(dim=1).sum()
    ours, plain = [], []
    for _ in range(1000):
        which, weights = winners(x.norm(dim=1), k, g)
        assert len(which) == k
        ours.append(dy[which].T @ (x[which] * weights[:, None].float()))
        drawn_ = torch.multinomial(p, k, replacement=True, generator=g)
        plain.append(dy[drawn_].T @ (x[drawn_] / (k * p[drawn_])[:, None]))
    size = exact.norm()
    error, other = (torch.stack(side) - exact for side in (ours, plain))
    spread, wider = (float(side.square().sum((1, 2)).mean().sqrt() / size) for side in (error, other))
    assert float(error.mean(0).norm() / size) < 4 * spread / 1000**0.5
    assert spread < 0.8 * wider
    largest = x.norm(dim=1).topk(k).indices
    assert float((dy[largest].T @ x[largest] - exact).norm() / size) > 8 * spread / 1000**0.5
