"""Seconds that a decode step spends in each matrix, by shape and format: the table that `allocate` limits latency by.

What is timed is the module that serves a matrix: our runtime's where it is packed, torch's Linear in the model's dtype where it
is not, on one token, or a batch of them. Weights are random, for no time depends on them.

A real model is larger than a processor's caches, so its weights come from memory; a matrix that is multiplied with again and
again does not. So every call gets the next slice of one store of random weights, and comes back to the first when the store is
used up: what is read has not been read for as many bytes as the store has. These are 256 MiB, or the last level of the caches
where that is larger (and known, on Linux), at most 1 GiB; but no more than the weights of the model, for where these stay in a
cache, so does this.

Entries are timed by turns, each for some milliseconds, so that a machine which is busy for a while slows all of them. The first
turn does not count. A time is the median of the turns, beside the extremes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from compress import manager
from compress.errors import CompressError, ModelError, RecipeError
from compress.export.runtime.linear import PackedLinear
from compress.export.table import EXPORTERS
from compress.formats import Dense, Ecq, Format, numbers_of
from compress.model.model import Model, open_model
from compress.nodes import load_yaml
from compress.passes import PASSES
from compress.passes.allocate import Allocate
from compress.passes.latency import KIND, Entry, LatencyTable, Shape, cpu_name, visits
from compress.recipe import Recipe, load
from compress.report import page
from compress.report.console import Console
from compress.run import versions, write_atomic
from compress.state import State

LEAST, MOST = 1 << 28, 1 << 30  # bytes of the store
ALIGNED = 64  # bytes that slices begin at multiples of
TURN, CALLS = 0.02, 100  # seconds of a turn of one entry, and at most so many calls


class Store:
    """Random weights, handed out slice after slice, round and round: of each dtype `size` bytes, or what one slice needs."""

    def __init__(self, size: int):
        self.size = size
        self.held: dict[torch.dtype, Tensor] = {}
        self.at: dict[torch.dtype, int] = {}

    def take(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The next numbers of a dtype: any integers, or floats a little above zero."""
        n, step = math.prod(shape), ALIGNED // dtype.itemsize
        if dtype not in self.held or len(self.held[dtype]) < n:
            self.held[dtype] = drawn(dtype, max(n, -(-self.size // dtype.itemsize)))
            self.at[dtype] = 0
        if self.at[dtype] + n > len(self.held[dtype]):
            self.at[dtype] = 0
        start = self.at[dtype]
        self.at[dtype] = -(-(start + n) // step) * step
        return self.held[dtype][start : start + n].view(tuple(shape))


def drawn(dtype: torch.dtype, count: int) -> Tensor:
    """Random numbers, none of which is so small that a processor takes longer over it."""
    if dtype.is_floating_point and dtype.itemsize == 1:  # which torch draws none of
        return torch.empty(count).uniform_(0.01, 0.02).to(dtype)
    if dtype.is_floating_point:
        return torch.empty(count, dtype=dtype).uniform_(0.01, 0.02)
    whole = torch.empty(count * dtype.itemsize, dtype=torch.uint8).random_()
    return whole.view(dtype)


@dataclass
class Timer:
    """One shape in one format. found: seconds of a call, by turns."""

    shape: Shape
    format: Format
    dtype: torch.dtype
    scale_dtype: torch.dtype
    x: Tensor
    store: Store
    found: list[float] = field(default_factory=list)
    calls: int = 1

    def __post_init__(self) -> None:
        out, width = self.shape
        self.module: nn.Module = (
            nn.Linear(width, out, bias=False, dtype=self.dtype, device="meta")
            if isinstance(self.format, Dense)
            else PackedLinear(str(self.format), self.shape, self.dtype, scale_dtype=self.scale_dtype)
        )
        if isinstance(self.module, PackedLinear) and isinstance(numbers := numbers_of(self.format), Ecq):
            self.module.decode(numbers)  # as it is once it is loaded

    def fill(self) -> None:
        """Give the module its next weights."""
        for module in self.module.modules():
            for name, t in module.named_buffers(recurse=False):
                module._buffers[name] = self.store.take(t.dtype, t.shape)
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(self.store.take(p.dtype, p.shape), requires_grad=False)

    def call(self) -> float:
        """Seconds of one call, on weights that it has not seen of late."""
        self.fill()
        start = time.perf_counter()
        self.module(self.x)
        return time.perf_counter() - start

    def warm(self) -> None:
        """What a first call prepares, and how many calls a turn takes."""
        quickest = min(self.call() for _ in range(3))
        self.calls = max(1, min(CALLS, round(TURN / quickest)))

    def turn(self) -> None:
        self.found.append(sum(self.call() for _ in range(self.calls)) / self.calls)

    def entry(self) -> Entry:
        return Entry(
            shape=self.shape, format=str(self.format), seconds=median(self.found), least=min(self.found), most=max(self.found)
        )


def measure(
    pairs: Sequence[tuple[Shape, Format]], state: State, batch: int, turns: int, tick: Callable[[int], None]
) -> LatencyTable:
    """Time every pair on `batch` tokens, `turns` times by turns after a first that does not count.

    `tick` is told how many turns are done.
    """
    often = visits(state, 1)
    weights = sum(s.numel * (often[s.name] > 0) for s in state.graph) * state.dtype.itemsize
    store, inputs = Store(min(weights, max(LEAST, min(MOST, last_cache())))), dict[int, Tensor]()
    for (_, width), _ in pairs:
        inputs.setdefault(width, torch.rand(batch, 1, width).to(state.dtype))
    timers = [Timer(shape, fmt, state.dtype, state.scale_dtype, inputs[shape[1]], store) for shape, fmt in pairs]
    with torch.no_grad():
        for turn in range(turns + 1):
            for timer in timers:
                timer.turn() if turn else timer.warm()
            tick(turn + 1)
    return LatencyTable(
        kind=KIND, compress=versions()["compress-pipeline"], cpu=cpu_name(), threads=torch.get_num_threads(), batch=batch,
        dtype=str(Dense(state.dtype)), turns=turns, entries=tuple(t.entry() for t in timers),
    )  # fmt: skip


def last_cache() -> int:
    """Bytes of the largest cache, where the system tells; else 0."""
    found = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            found = max(found, 1024 * int(file.read_text(encoding="utf-8").strip().removesuffix("K")))
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def table_command(options: argparse.Namespace, tell: Callable[[str], None]) -> None:
    """`bench RECIPE --table FILE`: measure all that the recipe's `allocate` could choose, and write it."""
    refuse_idle(options)
    path: Path = options.table
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RecipeError(f"--table {path}: is {'a folder' if path.is_dir() else 'in no folder that there is'}; name a file")
    recipe, number = choosing(options.what)
    model, state, pairs = asked(recipe, number, tell)
    with closing(Console(stream=sys.stderr)) as console:
        console.progress(0, options.repeats + 1, "turns")
        tick = lambda done: console.progress(done, options.repeats + 1, "turns")  # noqa: E731
        table = measure(pairs, state, options.batch or 1, options.repeats, tick)
    write_atomic(path, (json.dumps(table.model_dump(mode="json"), indent=1) + "\n").encode())
    print(json.dumps(table.model_dump(mode="json"), indent=1) if options.json else shown(table, model, path))


def refuse_idle(options: argparse.Namespace) -> None:
    """RecipeError for a flag that is about engines."""
    usual = {"--against": (options.against, None), "--device": (options.device, "cpu"), "--prompt": (options.prompt, 128),
             "--new": (options.new, 32)}  # fmt: skip
    idle = next((flag for flag, (given, default) in usual.items() if given != default), None)
    if idle:
        raise RecipeError(f"{idle} is for engines, and --table times matrices on the CPU; leave it out")


def choosing(path: Path) -> tuple[Recipe, int]:
    """The recipe, and which of its steps allocates. The table that it names may not be there yet, and is not read."""
    if not path.is_file():
        raise RecipeError(f"{path}: is no recipe; --table times what the 'allocate' of a recipe could choose")
    raw = load_yaml(path, RecipeError)
    listed: Any = raw.get("passes") if isinstance(raw, dict) else None
    allocates = any(isinstance(p, dict) and Allocate.name in p for p in listed or ()) if isinstance(listed, list) else False
    recipe = load(path, PASSES, EXPORTERS, [f"{Allocate.name}.latency=null"] if allocates else [])
    number = next((i for i, p in enumerate(recipe.passes) if isinstance(p, Allocate)), None)
    if number is None:
        raise RecipeError(f"{path}: has no 'allocate', and --table times what that could choose; add one")
    return recipe, number


def asked(recipe: Recipe, number: int, tell: Callable[[str], None]) -> tuple[Model, State, list[tuple[Shape, Format]]]:
    """The model, its state in front of the step that allocates, and what that could choose."""
    try:
        model = open_model(recipe.document.model, recipe.base, tell, recipe.document.leave)
        state = model.state if model.has_weights else model.bare
    except CompressError as e:
        raise type(e)(f"{recipe.place(('model',))}  {e}") from None
    if not state.graph.causal:
        raise ModelError(f"{model.folder}: the model does not predict the next token; there is nothing to decode")
    for i, p in enumerate(recipe.passes[: number + 1]):
        try:
            if isinstance(p, Allocate):
                return model, state, list(p.timed(state))
            state = manager.foresee([p], state)
        except CompressError as e:
            raise recipe.located(e, "passes", i) from None
    raise AssertionError("the last of these allocates")


def shown(table: LatencyTable, model: Model, path: Path) -> str:
    """The table for people."""
    rows = [
        [f"{e.shape[0]}x{e.shape[1]}", e.format, *(f"{1e3 * x:.4g}" for x in (e.seconds, e.least, e.most))] for e in table.entries
    ]
    head = page.columns(rows, ["shape", "format", "ms", "least", "most"], right=(2, 3, 4))
    where = f"median of {table.turns} turns, {table.dtype}, {table.threads} threads, {table.cpu}"
    return (f"{head}\n\n{model.name}: a decode step of batch {table.batch} in each matrix, {where}\n"
            f"{path}: name it in the recipe, allocate: {{latency: {path.name}}}")  # fmt: skip
