"""What solving matrices takes, for estimates: operations, steps, memory. Counted from shapes; see compress/stages.py.

A matrix has N outputs and K inputs. Constants are what the solver was measured to take on one thread, as operations of a large
product would take as long: its own products have few rows, and wait for memory half of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compress.formats import Rotated
from compress.passes.rows import CHUNK, at_once
from compress.state.graph import Site

SOLVING = 12.0  # operations for each weight and input: feedback 1, sweep 2, refit 2, three losses 3, and half as much again
MEASURING = 3.0  # of rounding to nearest: two losses 2, and half as much again
RETARGETING = 6.0  # two triangular solutions and a product with the drift 4, and half as much again
FACTORING = 2.0  # operations, in fp32, for K³ of a Hessian, which is factored in fp64
ORDERING = 6.0  # times that an entry of it is read or written before and behind that
EIGEN_SECONDS = 2e-10  # of a symmetric eigenproblem of side m in fp64, in units of m³, on one core: half of it is no product
ROUNDED = 9  # copies of the outputs in hand where nothing is fed back


@dataclass(frozen=True)
class Solving:
    """Operations, and inputs that are rounded one after the other."""

    flops: float
    steps: float


def solving(shapes: Iterable[tuple[int, int]]) -> Solving:
    """GPTQ of some matrices (N, K), some outputs at a time."""
    known = list(shapes)
    return Solving(
        SOLVING * sum(1.0 * n * k * k for n, k in known),
        2.0 * sum(k * -(-n // at_once(k)) for n, k in known),  # feedback, and a sweep
    )


def rounding(shapes: Iterable[tuple[int, int]]) -> Solving:
    """Rounding some matrices to nearest: its errors are measured with Hessians, which is all that takes products."""
    return Solving(MEASURING * sum(1.0 * n * k * k for n, k in shapes), 0.0)


ADDED = ("o", "down")  # roles whose outputs are, as a rule, added to a residual stream


def joined(sites: Sequence[Site]) -> list[tuple[int, int]]:
    """The shapes of what is solved as one, since it has the same inputs."""
    rows, inputs = Counter[tuple[int | None, str]](), dict[tuple[int | None, str], int]()
    for s in sites:
        rows[s.block, s.input_key] += s.shape[0]
        inputs[s.block, s.input_key] = s.shape[1]
    return [(n, inputs[key]) for key, n in rows.items()]


def seen_bytes(sites: Sequence[Site], corrects: bool = False) -> int:
    """Memory for what is summed up while the inputs of one stage are seen: its Hessians; where drift is corrected, its sum and
    the weights that it is multiplied with."""
    hessians, drifts, added = 0, 0, are_added(sites)
    for n, k in joined(sites):
        hessians += 4 * k * k
        drifts = max(drifts, drift_bytes(n, k, added) + 4 * n * k * (added or 2 * n < k))
    return hessians + drifts * corrects


def turned(formats: Iterable[tuple[Site, object]]) -> dict[tuple[int | None, str, int], int]:
    """The inputs of Hessians that are turned as well, by block, input and side of the rotation."""
    return {(s.block, s.input_key, f.block): s.shape[1] for s, f in formats if isinstance(f, Rotated)}


def stage_bytes(sites: Sequence[Site], corrects: bool = False, turns: bool = False) -> int:
    """Memory for solving one stage: every Hessian in fp32; of one of them the factor, the weights as they are and in fp32, and
    what the solver holds for the outputs that it has in hand. Where drift is corrected also its sum, and the weights as they are
    moved. Where a format turns one more Hessian and its factor, and the weights turned."""
    shapes, found, added = joined(sites), [0], are_added(sites)
    for n, k in shapes:
        drift = drift_bytes(n, k, added) + 4 * n * k if corrects else 0
        found.append(max(6 * k * k, 4 * k * k + matrix_bytes(n * k) + drift))
        if turns:
            found.append(4 * n * k + max(14 * k * k + 4 * n * k, 12 * k * k + matrix_bytes(n * k)) + drift)
    return 4 * sum(k * k for _, k in shapes) + max(found)


def are_added(sites: Sequence[Site]) -> bool:
    """Whether what the sites of a stage put out may be added to a residual stream (see `Drift`)."""
    return any(s.role in ADDED and s.expert is None for s in sites)


def drift_bytes(outputs: int, inputs: int, added: bool) -> int:
    """Memory for the sum of drift of a stage (see `Drift`)."""
    return 4 * inputs * (outputs if added or 2 * outputs < inputs else inputs)


def matrix_bytes(numel: int, copies: int = 10) -> int:
    """Memory for solving a matrix: the weights, their codes and what they become, and so many copies, in fp32, of the outputs in
    hand."""
    return 7 * numel + 4 * copies * min(numel, CHUNK)
