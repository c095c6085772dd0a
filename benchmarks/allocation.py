"""Spending a budget of bits over the matrices of a model: seconds and proven gaps of `allocate_core` on the paper's instance.

    python benchmarks/allocation.py [--plain] [--budgets 2.5 3.0] [--gap 1e-4] [--save DIR]

The instance is that of LQ-LoRA (arXiv 2311.12023): the 224 matrices of Llama-2-7B, each with 432 configurations of NormalFloat
with doubly quantized scales, b + b0/B0 + b1/(B0 B1) bits for a weight. Damages are the errors of each configuration, measured on
heavy-tailed synthetic weights (Student's t, 8 degrees of freedom), times the matrix's size, times a lognormal sensitivity.
Then the 560 matrices of a 70B model with 8 options, whose errors vary from matrix to matrix. Each also with two limits more, on
attention and on the first eighth, and with a curve of 200 budgets.

`--plain` puts HiGHS on the whole instance beside it, through the same scipy, at the same gap. The paper's solver is Gurobi
under a limit of 60 seconds, which is not free and not run here.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
from report import line, machine, publish
from scipy import optimize, sparse, special

from compress.passes.allocate_core import Item, Limit, Problem, frontier, solve

Floats = npt.NDArray[np.float64]
BUDGETS = (2.5, 2.75, 3.0, 3.5, 4.0)
CURVE = 200
SECONDS = 60.0  # the limit under which the paper solves


@dataclass(frozen=True)
class Model:
    """Sizes [I] of matrices, in weights, bits [J] of their options and damages [I, J]; which are attention, which come first."""

    name: str
    size_i: npt.NDArray[np.int64]
    bits_j: Floats
    damage_ij: Floats

    def problem(self, bits: float, limits: int = 1) -> Problem:
        """A budget of so many bits a weight, in bytes; then 0.3 less on attention, then 0.5 less on the first eighth."""
        i = np.arange(len(self.size_i))
        within = [np.ones_like(i), i % 7 < 4, i < len(i) // 8][:limits]
        use_ij = np.ceil(self.size_i[:, None] * self.bits_j / 8).astype(np.int64)
        items = [Item(str(n), self.damage_ij[n], np.stack([use_ij[n] * w[n] for w in within])) for n in i]
        room = [int((bits - less) * (self.size_i * w).sum() / 8) for w, less in zip(within, (0, 0.3, 0.5), strict=False)]
        return Problem(items, [Limit(n, r) for n, r in zip(("all", "attention", "first"), room, strict=False)])


def main() -> None:
    """Solves everything and prints the tables."""
    args = arguments()
    page = [f"# Allocation, {date.today()}", "", f"{machine()}; proven gap asked for: {args.gap:g}.", ""]
    for model in (paper_model(), large_model()):
        title = f"## {model.name}: {len(model.size_i)} matrices, {len(model.bits_j)} options"
        page += [title, "", *table(model, args), "", *curve(model), ""]
    publish("\n".join(page), args.save, "allocation")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="bits a weight")
    parser.add_argument("--gap", type=float, default=1e-4, help="relative gap to prove")
    parser.add_argument("--plain", action="store_true", help="also HiGHS on the whole instance")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-allocation.md")
    return parser.parse_args()


def table(model: Model, args: argparse.Namespace) -> list[str]:
    """A row for each budget with one limit, then one for the middle budget with three."""
    head = ["bits", "limits", "seconds", "damage", "bound", "gap", "left over"]
    head += ["plain s", "plain gap", "ours / plain: seconds", "damage"] if args.plain else []
    cases = [*((bits, 1) for bits in args.budgets), (args.budgets[len(args.budgets) // 2], 3)]
    return [line(head), line(["---:"] * len(head))] + [line(row(model.problem(*case), case, args)) for case in cases]


def row(problem: Problem, case: tuple[float, int], args: argparse.Namespace) -> list[str]:
    """What one instance took."""
    started = time.perf_counter()
    found = solve(problem, time_limit=SECONDS, gap=args.gap)
    seconds = time.perf_counter() - started
    left = " ".join(
        f"{100 * (limit.at_most - u) / limit.at_most:.4f}%" for limit, u in zip(problem.limits, found.used, strict=True)
    )
    cells = [
        f"{case[0]:g}",
        str(case[1]),
        f"{seconds:.2f}",
        f"{found.damage:.6g}",
        f"{found.bound:.6g}",
        f"{found.gap:.1e}",
        left,
    ]
    if args.plain:
        started = time.perf_counter()
        damage, gap = plain(problem, args.gap)
        took = time.perf_counter() - started
        cells += [f"{took:.1f}", f"{gap:.1e}", f"{seconds / took:.3f}", f"{found.damage / damage:.6f}"]
    return cells


def plain(problem: Problem, gap: float) -> tuple[float, float]:
    """Damage and gap by HiGHS on everything, scaled as a careful user would."""
    damage = np.concatenate([item.damage for item in problem.items])
    use = np.concatenate([item.use for item in problem.items], axis=1)
    room = np.array([limit.at_most for limit in problem.limits], float)
    one = sparse.block_diag([np.ones((1, len(item.damage))) for item in problem.items], format="csr")
    found = optimize.milp(
        damage / damage.max(),
        integrality=np.ones(len(damage)),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one, 1, 1), optimize.LinearConstraint(use / room[:, None], -np.inf, 1)],
        options={"time_limit": SECONDS, "mip_rel_gap": gap},
    )
    return (float("nan"), float("inf")) if found.x is None else (float(found.fun * damage.max()), float(found.mip_gap))


def curve(model: Model) -> list[str]:
    """The seconds of a curve of budgets, and how far its points can be from the best."""
    low, high = float(model.bits_j.min()) + 0.02, min(float(model.bits_j.max()), 8.0)
    budgets = [int(bits * model.size_i.sum() / 8) for bits in np.linspace(low, high, CURVE)]
    problem = model.problem(3.0)
    started = time.perf_counter()
    points = frontier(problem, budgets)
    seconds = time.perf_counter() - started
    gaps = [(p.damage - p.bound) / p.damage for p in points]
    return [
        f"A curve of {len(points)} budgets: {seconds:.2f} s; gap {np.median(gaps):.1e} in the middle, {max(gaps):.1e} at worst."
    ]


# --- instances -------------------------------------------------------------------------------------------------------


def paper_model(seed: int = 0) -> Model:
    """Llama-2-7B, with all configurations of the authors' code."""
    draw = np.random.default_rng(seed)
    configs = list(itertools.product((2, 3, 4, 8), (2, 3, 4, 8), (16, 16, 32), (16, 32, 64), (16, 64, 256)))
    bits = np.array([b + b0 / B0 + b1 / (B0 * B1) for b, b0, b1, B0, B1 in configs])
    weights = draw.standard_t(8, 1 << 18)
    errors = {(b, b0, B0, B1): error(weights, b, b0, B0, B1) for b, b0, _, B0, B1 in configs}
    error_j = np.array([errors[b, b0, B0, B1] for b, b0, _, B0, B1 in configs])
    size = np.tile(np.array([4096 * 4096] * 4 + [11008 * 4096] * 3), 32)
    return Model("Llama-2-7B", size, bits, np.outer(size * draw.lognormal(0, 1.2, len(size)), error_j))


def large_model(seed: int = 1) -> Model:
    """A 70B Llama, with 2.25 to 8.25 bits and errors that fall as 4^-bits, more or less."""
    draw = np.random.default_rng(seed)
    bits = np.array([2.25, 2.5, 3.25, 3.5, 4.25, 4.5, 6.25, 8.25])
    size = np.tile(np.array([8192 * 8192, 1024 * 8192, 1024 * 8192, 8192 * 8192] + [28672 * 8192] * 3), 80)
    error_ij = 4.0**-bits * draw.lognormal(0, 0.15, (len(size), len(bits)))
    return Model("a 70B Llama", size, bits, (size * draw.lognormal(0, 1.2, len(size)))[:, None] * error_ij)


def error(weights: Floats, b: int, b0: int, B0: int, B1: int) -> float:
    """Mean squared error of NormalFloat with `b` bits in blocks of B0, their scales in `b0` bits in groups of B1 blocks."""
    W = weights.reshape(-1, B1, B0)
    scale = np.abs(W).max(2)
    offset = scale.min()
    step = (scale - offset).max(1, keepdims=True) / (2**b0 - 1)
    scale = offset + np.rint((scale - offset) / step) * step
    levels = normal_float(b)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, W / scale[:, :, None])
    return float(np.square(levels[codes] * scale[:, :, None] - W).mean())


def normal_float(b: int) -> Floats:
    """The 2^b levels, quantiles of the normal distribution with an exact zero, as bitsandbytes places them."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    half = 2 ** (b - 1)
    quantiles = np.concatenate([np.linspace(1 - end, 0.5, half)[:-1], np.linspace(0.5, end, half + 1)])
    return np.asarray(special.ndtri(quantiles) / special.ndtri(end))


if __name__ == "__main__":
    main()
