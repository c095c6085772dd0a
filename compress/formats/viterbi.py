"""The best path through a trellis whose ends meet: the search of a trellis code, in numpy, and compiled where numba is installed.

The trellis is that of a shift register of L bits (QTIP, arXiv 2406.11235): a step moves b new bits in at the low end, and the
state after it, s, stands for the value code[s]. Of the 2**L states after a step, 2**b lead to the same edge, s mod 2**(L - b'),
b' the bits of the step behind; so costs live on edges,

    m'[j] = min over t < 2**b' of  m[s >> b] + (x - code[s])**2,   s = t << (L - b') | j,

which is 2**L multiplications a step whatever b is (Viterbi). Paths are rings: the first step comes from the edge at which the
last one ends, so no state need be stored. The exact search would try every edge at the seam. Here a free search of `SEEN` steps
before the seam and as many behind it finds the one that the path goes through, and a second one goes around with that edge at
both ends. At 2 bits, 4096 states and 256 steps this loses nothing that can be measured against a free search of all steps.

No back pointers are kept: costs of all steps are, and on the way back the best of 2**b' states is looked for again. So the loops
are sums, products and minima in fp32, in an order that both ways have, and a path is the same from either, on any machine.

Compiled, the inner loops run over edges that lie one after the other: values are laid out by their b low bits first (`turned`),
and the minimum over t is taken by halves. That is as quick as vector instructions by hand. Lanes over rings instead take a
third longer, and matrices with few outputs do not fill them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]
SEEN = 64  # steps on each side of the seam by which the edge there is chosen
FAR = 1e30  # the cost of an edge that a path must not come from
RINGS = 16  # searched at a time by numpy, so that they stay in cache
SECONDS = {True: (2.5e-7, 3e-10), False: (2.5e-6, 4e-9)}  # of a step of a ring, and of every state in it: compiled, and in numpy
BYTES = {True: 150 << 20, False: 64 << 20}  # of a compiler that stays in the process, and of all that numpy has in hand


class Trellis:
    """A trellis of values [2**L], fp32, in which even and odd steps have so many `bits`, to be searched by so many threads."""

    def __init__(self, code: Tensor, bits: tuple[int, int], threads: int = 1):
        self.code, self.bits, self.size = code.cpu().numpy(), bits, len(code).bit_length() - 1
        self._compiled = fastest()
        self._turned = turned(self.code, bits) if self._compiled else None
        self._pool = ThreadPoolExecutor(threads) if self._compiled and threads > 1 else None

    def search(self, x_rt: Tensor) -> Tensor:
        """The states [R, T], int32, of the best rings for targets [R, T]. T is even."""
        x, found = x_rt.cpu().contiguous().numpy(), np.empty(x_rt.shape, np.int32)
        if self._compiled is None:
            for i in range(0, len(x), RINGS):
                found[i : i + RINGS] = together(x[i : i + RINGS], self.code, self.bits)
        elif self._pool and len(x) > 1:
            list(self._pool.map(self._one, x[:, None], found[:, None]))
        else:
            self._one(x, found)
        return torch.from_numpy(found).to(x_rt.device)

    def _one(self, x: Floats, found: Ints) -> None:
        assert self._compiled is not None
        self._compiled(x, self._turned, self.size, *self.bits, seen(x.shape[1]), found)


def seen(steps: int) -> int:
    """How many steps on each side of the seam of a ring of so many are searched freely: an even number."""
    return min(SEEN, steps // 4 * 2)


# --- in numpy --------------------------------------------------------------------------------------------------------


def together(x_rt: Floats, code: Floats, bits: tuple[int, int]) -> Ints:
    """As `Trellis.search`, all rings at once."""
    (rings, steps), near = x_rt.shape, seen(x_rt.shape[1])
    across, around = [(steps - near + n) % steps for n in range(2 * near)], range(steps)
    m = np.zeros((rings, len(code) >> bits[0]), np.float32)
    costs = _forward(m, x_rt, code, bits, across)
    seam = _back(costs[-1].argmin(1), costs, x_rt, code, bits, across, near)[0]
    m[:] = FAR
    m[np.arange(rings), seam] = 0.0
    return _back(seam, _forward(m, x_rt, code, bits, around), x_rt, code, bits, around, 0)[1]


def _forward(m: Floats, x_rt: Floats, code: Floats, bits: tuple[int, int], steps: Sequence[int]) -> list[Floats]:
    """Costs of edges [R, edges], before every step and behind the last."""
    costs, rings = [m], len(m)
    values = [code.reshape(1 << bits[1 - odd], -1, 1 << bits[odd]) for odd in (0, 1)]  # by what is dropped, kept, and new
    for at in steps:
        d = values[at % 2] - x_rt[:, at, None, None, None]
        d *= d
        d += costs[-1].reshape(rings, len(values[at % 2]), -1, 1)
        costs.append(d.min(1).reshape(rings, -1))
    return costs


def _back(
    edge: Ints, costs: list[Floats], x_rt: Floats, code: Floats, bits: tuple[int, int], steps: Sequence[int], until: int
) -> tuple[Ints, Ints]:
    """The edges [R] before step number `until`, and the states [R, steps] from there to `edge`."""
    found, ring = np.empty(x_rt.shape, np.int32), np.arange(len(x_rt))
    firsts = [np.arange(0, len(code), len(code) >> bits[1 - odd]) for odd in (0, 1)]  # the states that lead to the edge 0
    for n in range(len(steps) - 1, until - 1, -1):
        at = steps[n]
        states = firsts[at % 2] + edge[:, None]
        d = code[states] - x_rt[:, at, None]
        d *= d
        d += costs[n][ring[:, None], states >> bits[at % 2]]
        state = states[ring, d.argmin(1)]
        found[:, at] = state
        edge = state >> bits[at % 2]
    return edge, found


# --- compiled --------------------------------------------------------------------------------------------------------


def turned(code: Any, bits: tuple[int, int]) -> Any:
    """Values [2, 2**L] of even and odd steps, those whose low `bits` are alike one after the other."""
    return np.stack([np.ascontiguousarray(code.reshape(-1, 1 << new).T).reshape(-1) for new in bits])


def one_by_one(x_rt: Any, turned: Any, size: int, even: int, odd: int, near: int, found: Any) -> None:
    """As `Trellis.search`, into `found`; size: L, near: `seen`."""
    steps, edges = x_rt.shape[1], 1 << (size - min(even, odd))
    m, best, spare = np.empty((steps + 1, edges), np.float32), np.empty(edges, np.float32), np.empty(edges, np.float32)
    for ring in range(len(x_rt)):
        edge = 0
        for closed in range(2):
            first, count = (0, steps) if closed else (steps - near, 2 * near)
            m[0, :] = 1e30 if closed else 0.0
            m[0, edge] = 0.0
            for n in range(count):
                at = (first + n) % steps
                x, new, dropped = x_rt[ring, at], (odd if at % 2 else even), (even if at % 2 else odd)
                width, least = 1 << (size - new), 1 << (size - new - dropped)
                half = width // 2
                m_low, m_high, behind = m[n, :half], m[n, half:width], m[n + 1]
                for c in range(1 << new):
                    low = turned[at % 2, c * width : c * width + half]
                    high = turned[at % 2, c * width + half : (c + 1) * width]
                    for i in range(half):
                        d, e = low[i] - x, high[i] - x
                        u, v = d * d + m_low[i], e * e + m_high[i]
                        best[i] = u if u < v else v
                    left = half
                    while left > least:
                        left //= 2
                        below, above = best[:left], best[left : 2 * left]
                        for i in range(left):
                            u, v = below[i], above[i]
                            spare[i] = u if u < v else v
                        best, spare = spare, best
                    for i in range(least):
                        behind[i << new | c] = best[i]
            if not closed:
                edge = int(np.argmin(m[count, : 1 << (size - even)]))
            for n in range(count - 1, -1 if closed else near - 1, -1):
                at = (first + n) % steps
                x, new, dropped = x_rt[ring, at], (odd if at % 2 else even), (even if at % 2 else odd)
                least_cost, state = np.float32(np.inf), edge
                for t in range(1 << dropped):
                    s = t << (size - dropped) | edge
                    d = turned[at % 2, (s & ((1 << new) - 1)) << (size - new) | s >> new] - x
                    u = d * d + m[n, s >> new]
                    if u < least_cost:
                        least_cost, state = u, s
                found[ring, at] = state
                edge = state >> new


@cache
def fastest() -> Callable[..., Any] | None:
    """The loops, compiled where there is a compiler: the extra `fast`. It is looked for when it is first needed."""
    try:
        import numba
    except ImportError:
        return None
    compiler: Any = numba.njit
    try:
        return compiler(cache=True, nogil=True)(one_by_one)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep what was compiled
        return compiler(nogil=True)(one_by_one)  # type: ignore[no-any-return]


def takes(steps: float, states: int, threads: int) -> tuple[float, int]:
    """Seconds of so many steps of rings on this machine, and bytes that are held from then on, for estimates."""
    compiled = find_spec("numba") is not None
    step, state = SECONDS[compiled]
    return (step + state * states) * steps / (threads if compiled else 1), BYTES[compiled]
