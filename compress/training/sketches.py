"""Linear layers that keep less of their input x [N, d]: what they put out and the gradient at x are exact, that of W is
estimated.

    velora     (arXiv 2405.17991, algorithm 1)  x is cut into G groups of s = d/G numbers; of each its component z = x_s · v along
               one direction v [s] is kept, and x̂ = z v stands for x in  ∂W = scale · ∂yᵀ x̂. N G numbers, 1/s of x.
               v is the mean of all groups in the first batch, of length 1, and stays (section 3.2): it is state, kept on disk.
    wta_crs    (2305.15265, algorithm 1)  ∂W = Σ ∂y_i x_iᵀ over N tokens is estimated from k of them. With p_i the share that
               |x_i| has in their sum (|∂y_i| is not known yet; the paper remembers it from an earlier epoch, and a long text has
               one), the c likeliest are kept as they are, c minimising (1 - Σ_C p) / (k - c) (theorem 2), and k - c drawn from
               the others in proportion to p, each weighed with (1 - Σ_C p) / ((k - c) p_j). Its mean is ∂W.

The first is biased: what of x is not along v is not there. On data without a common mean its gradient has little to do with the
true one; it is cheap and exact forward, which is why it trains at all. Both save where *all* layers that read an x are of this
kind, so all linear layers of a block are; what norms, activation functions and attention keep is untouched, which is most of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.training.options import Velora, Way, WtaCrs


class Sketch(Protocol):
    """What is kept of x [N, d], and the gradient of W [out, d] that it gives with ∂y [N, out]."""

    def keep(self, name: str, x_nd: Tensor) -> tuple[Tensor, ...]: ...
    def slope(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor: ...


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, sketch: Sketch, name: str) -> Tensor:
        ctx.sketch = sketch
        ctx.save_for_backward(W, *sketch.keep(name, x.reshape(-1, x.shape[-1])))
        return nn.functional.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        W, *kept = ctx.saved_tensors
        dx = dy @ W if ctx.needs_input_grad[0] else None
        dy = dy.reshape(-1, dy.shape[-1])
        return dx, ctx.sketch.slope(dy, tuple(kept)), dy.sum(0) if ctx.needs_input_grad[2] else None, None, None


class OneDirection:
    """VeLoRA. directions: v, by layer; state."""

    def __init__(self, options: Velora):
        self.options = options
        self.directions: dict[str, Tensor] = {}

    def keep(self, name: str, x_nd: Tensor) -> tuple[Tensor, ...]:
        x_ngs = x_nd.unflatten(-1, (groups(self.options.groups, x_nd.shape[-1]), -1))
        if name not in self.directions:
            self.directions[name] = nn.functional.normalize(x_ngs.float().mean((0, 1)), dim=0).to(x_nd.dtype)
        v = self.directions[name]
        return x_ngs @ v, v

    def slope(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        z_ng, v = kept
        return (self.options.scale * (dy.T @ z_ng))[..., None].mul(v).flatten(1)


class SomeTokens:
    """WTA-CRS."""

    def __init__(self, options: WtaCrs):
        self.ratio = options.ratio
        self.generator: torch.Generator | None = None

    def keep(self, name: str, x_nd: Tensor) -> tuple[Tensor, ...]:
        sizes = torch.linalg.vector_norm(x_nd, dim=1, dtype=torch.float64)
        which, weights = winners(sizes, few(self.ratio, len(x_nd)), self.generator)
        return x_nd[which] * weights[:, None].to(x_nd.dtype), which

    def slope(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        rows, which = kept
        return dy[which].T @ rows


def groups(wished: int, d: int) -> int:
    """How many groups d numbers are cut into: as wished, or the next fewer that come out even."""
    return next(g for g in range(min(wished, d), 0, -1) if d % g == 0)


def few(ratio: float, count: int) -> int:
    return max(1, round(ratio * count))


def winners(sizes: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Which k of N tokens are kept, and the weights of what they give, [k] each, so that the sum over all is met in the mean.
    Where a size is no number, the first k: a loss is none either then, and the training ends."""
    p = (sizes.double() + 1e-30).cpu()
    if not bool(p.isfinite().all()):
        return torch.arange(k, device=sizes.device), torch.ones(k, dtype=p.dtype, device=sizes.device)
    p = p / p.sum()
    order = p.argsort(descending=True, stable=True)
    left = (1 - torch.cat([p.new_zeros(1), p[order[: k - 1]].cumsum(0)])).clamp(min=0)
    c = int((left / (k - torch.arange(k))).argmin())
    rest, mass = order[c:], float(left[c])
    drawn = rest[torch.multinomial(p[rest], k - c, replacement=True, generator=generator)]
    weights = torch.cat([p.new_ones(c), mass / ((k - c) * p[drawn])])
    return torch.cat([order[:c], drawn]).to(sizes.device), weights.to(sizes.device)


class Foreseen:
    """Keeps as many numbers as a sketch would, of tensors that have none."""

    def __init__(self, options: Way):
        self.options = options

    def keep(self, name: str, x_nd: Tensor) -> tuple[Tensor, ...]:
        count, d = x_nd.shape
        if isinstance(self.options, Velora):
            return (x_nd.new_empty(count, groups(self.options.groups, d)),)
        assert isinstance(self.options, WtaCrs)
        return x_nd.new_empty(few(self.options.ratio, count), d), x_nd.new_empty(
            few(self.options.ratio, count), dtype=torch.int64
        )

    def slope(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        raise AssertionError("nothing is trained on what is only foreseen")


def sketch_of(options: Way) -> OneDirection | SomeTokens | None:
    """Of a way to keep activations; None where it is about other tensors."""
    return OneDirection(options) if isinstance(options, Velora) else SomeTokens(options) if isinstance(options, WtaCrs) else None


def linear_layers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a block that this is about; experts in one tensor, and the transposed layers of GPT-2, keep their inputs."""
    yield from ((name, m) for name, m in block.named_modules() if type(m) is nn.Linear)


def install(block: nn.Module, path: str, sketch: Sketch) -> None:
    """Let the linear layers of a block keep sketches wherever their matrices learn."""
    for name, module in linear_layers(block):
        module.forward = _forward(module, f"{path}.{name}", sketch)


def _forward(module: Any, name: str, sketch: Sketch) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        W = module.weight
        if not (torch.is_grad_enabled() and W.requires_grad):
            return nn.functional.linear(x, W, module.bias)
        y: Tensor = _Linear.apply(x, W, module.bias, sketch, name)  # type: ignore[no-untyped-call]
        return y

    return forward
