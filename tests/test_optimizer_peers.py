"""The same steps by other people's code, where it is installed: the same losses, to a thousandth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.training import options as said
from compress.training.choice import Learnt
from compress.training.moving import Optimizer
from compress.training.sketches import OneDirection, install

STEPS, D, RANK = 12, 32, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 4 * D, bias=False), nn.Tanh(), nn.Linear(4 * D, D, bias=False))


X = torch.randn(256, D, generator=torch.Generator().manual_seed(1)) + 0.5
Y = torch.randn(256, D, generator=torch.Generator().manual_seed(2)) * 0.1 + X.roll(1, 1)


def losses(model: nn.Module, step: Callable[[Tensor], None]) -> list[float]:
    found = []
    for _ in range(STEPS):
        loss = (model(X) - Y).square().mean()
        found.append(float(loss.detach()))
        step(loss)
    return found


def ours(by: said.Way, rate: Callable[[Tensor], float]) -> list[float]:
    model = net()
    learns = dict(model.named_parameters())
    known = [Learnt(n, tuple(p.shape), 0, True) for n, p in learns.items()]
    optimizer = Optimizer(by, learns, known, [1.0] * len(learns))

    def step(loss: Tensor) -> None:
        loss.backward()
        for name, p in learns.items():
            assert p.grad is not None
            optimizer.move(name, p.grad, rate(p.detach()))
            p.grad = None

    return losses(model, step)


def test_adalomo_is_that_of_pytorch_optimizer() -> None:
    peer = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer to compare with it")
    model = net()
    theirs = peer.AdaLOMO(model, lr=1e-2)
    other = losses(model, lambda loss: theirs.fused_backward(loss, 1e-2))
    mine = ours(said.AdaLomo(), lambda p: 1e-2 * float(p.norm()) / math.sqrt(p.numel()))
    assert other[-1] < 0.9 * other[0]
    assert mine == pytest.approx(other, abs=1e-3)


def test_galore_is_that_of_pytorch_optimizer() -> None:
    """Its scale is what ours is made so that a number moves by the rate: √(m/r)."""
    peer = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch-optimizer to compare with it")
    model = net()
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "rank": RANK, "update_proj_gap": 100,
                                     "scale": math.sqrt(D / RANK), "projection_type": "std"}]  # fmt: skip
    theirs = peer.GaLore(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8)

    def step(loss: Tensor) -> None:
        theirs.zero_grad()
        loss.backward()
        theirs.step()

    other = losses(model, step)
    assert other[-1] < 0.95 * other[0]
    assert ours(said.Galore(rank=RANK, gap=100), lambda p: 1e-3) == pytest.approx(other, abs=1e-3)


def test_velora_is_that_of_peft() -> None:
    """Forward, and every gradient, with the same direction."""
    peft = pytest.importorskip("peft.tuners.lora.velora", reason="pip install peft to compare with it")
    layer, sketch = nn.Linear(D, 24), OneDirection(said.Velora(groups=4, scale=0.5))
    block = nn.ModuleDict({"layer": layer})
    install(block, "block", sketch)
    x, dy = X.clone().requires_grad_(), torch.randn(256, 24)
    y = block["layer"](x)
    y.backward(dy)
    mine = [x.grad, layer.weight.grad, layer.bias.grad]
    other, W, bias = (t.detach().clone().requires_grad_() for t in (X, layer.weight, layer.bias))
    theirs = peft.VeloraFunction.apply(other, W, bias, sketch.directions["block.layer"], 4, 0.5)
    assert torch.equal(y, theirs)
    theirs.backward(dy)
    for one, two in zip(mine, (other.grad, W.grad, bias.grad), strict=True):
        torch.testing.assert_close(one, two)
    v = peft._normalize_projection(peft._reshape_to_grouped_subtokens(X, 4).mean((0, 1)))
    torch.testing.assert_close(sketch.directions["block.layer"], v)
