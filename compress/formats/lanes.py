"""The loops of the entropy coder, twice: over lanes at once in numpy, and one by one where numba is installed, to the same words.

rANS (arXiv 1311.2540): a lane's state x lies in [ONE, ONE**2). To code a symbol that has `count` of ONE places from `start` on,
x becomes x // count * ONE + x % count + start, after its low 16 bits have gone to the stream where it would grow too large;
decoding does the reverse, and takes the next word where x has become too small. Encoding goes backwards, so that decoding reads
the stream forwards: step after step, in each the lanes in their order.

In numpy a step costs some microseconds however few lanes there are, which makes five to ten million symbols a second of a large
matrix. The compiled loop makes ten times as many. numba is a wheel that brings its compiler; C++ through torch's loader would
need one on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

ONE = 1 << 16  # what the counts of a table sum to

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]


def encode(symbols: Bytes, tables: Bytes, counts: Ints, before: Ints) -> tuple[Ints, Words]:
    """The states of the lanes [L] and the words behind them, of symbols [T, L]; step t goes by table tables[t % len(tables)]."""
    x, written = np.full(symbols.shape[1], ONE, np.int64), []
    for t in range(len(symbols) - 1, -1, -1):
        table = tables[t % len(tables)]
        count, start = counts[table][symbols[t]], before[table][symbols[t]]
        full = x >= count << 16
        written.append((x[full] & 0xFFFF).astype(np.uint16))
        x[full] >>= 16
        high, low = np.divmod(x, count)
        x = (high << 16) + low + start
    return x, np.concatenate(written[::-1])


def decode(
    x: Ints, words: Words, tables: Bytes, counts: Ints, before: Ints, places: Bytes, steps: int
) -> tuple[Bytes, Ints, int]:
    """The symbols [T, L], the states behind them, which are those that encoding began with, and how many words were read; places
    [tables, ONE]: which symbol each place belongs to."""
    symbols, at, x = np.empty((steps, len(x)), np.uint8), 0, x.copy()
    for t in range(steps):
        table = tables[t % len(tables)]
        place = x & 0xFFFF
        found = symbols[t] = places[table][place]
        x = counts[table][found] * (x >> 16) + place - before[table][found]
        empty = np.flatnonzero(x < ONE)
        if len(empty):
            x[empty] = (x[empty] << 16) | words[at : at + len(empty)]
            at += len(empty)
    return symbols, x, at


def encode_one_by_one(symbols: Any, tables: Any, counts: Any, before: Any) -> Any:
    """As `encode`."""
    steps, lanes = symbols.shape
    x, words = np.full(lanes, 1 << 16, np.int64), np.empty(steps * lanes, np.uint16)
    at = words.size
    for t in range(steps - 1, -1, -1):
        table = tables[t % tables.size]
        for lane in range(lanes - 1, -1, -1):
            count, state = counts[table, symbols[t, lane]], x[lane]
            if state >= count << 16:
                at -= 1
                words[at] = state & 0xFFFF
                state >>= 16
            x[lane] = (state // count << 16) + state % count + before[table, symbols[t, lane]]
    return x, words[at:]


def decode_one_by_one(x: Any, words: Any, tables: Any, counts: Any, before: Any, places: Any, steps: int) -> Any:
    """As `decode`."""
    lanes, at = x.size, 0
    symbols, states = np.empty((steps, lanes), np.uint8), x.copy()
    for t in range(steps):
        table = tables[t % tables.size]
        for lane in range(lanes):
            state = states[lane]
            place = state & 0xFFFF
            found = places[table, place]
            symbols[t, lane] = found
            state = counts[table, found] * (state >> 16) + place - before[table, found]
            if state < 1 << 16:
                state = (state << 16) | words[at]
                at += 1
            states[lane] = state
    return symbols, states, at


LOOPS = encode_one_by_one, decode_one_by_one
SECONDS = {True: 1e-8, False: 6e-8}  # of a symbol: compiled, and in numpy
BYTES = {True: 140 << 20, False: 20 << 20}  # of tables, and of a compiler that stays in the process


@cache
def fastest() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both loops, compiled where there is a compiler: the extra `fast`. It is looked for when it is first needed."""
    try:
        import numba
    except ImportError:
        return encode, decode
    compiler: Any = numba.njit
    try:
        return tuple(compiler(cache=True, nogil=True, boundscheck=True)(f) for f in LOOPS)
    except RuntimeError:  # nowhere to keep what was compiled
        return tuple(compiler(nogil=True, boundscheck=True)(f) for f in LOOPS)


def takes(symbols: float) -> tuple[float, int]:
    """Seconds of coding so many symbols on this machine, and bytes that are held from then on, for estimates."""
    compiled = find_spec("numba") is not None
    return SECONDS[compiled] * symbols, BYTES[compiled] * (symbols > 0)
