"""The kernels' own source, compiled for this CPU: what nvrtc.launch would start on a GPU runs in kernel_shim/emu.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.cuda import nvrtc
from compress.formats import Format
from tests.conftest import ROOT

SHIM, KERNELS = ROOT / "tests/kernel_shim", ROOT / "export/runtime/cuda/kernels"
WRITTEN = {"packed_linear": (4, 8), "dequantize": (4,), "low_rank": (2,), "turn_inputs": (2, 3), "turn_outputs": (2,),
           "trellis_linear": (4, 6), "trellis_dequantize": (3,)}  # arguments: results, poisoned before a run  # fmt: skip
MACROS = {"packed_linear": "LINEAR"}  # others: the name in capitals
Variant = tuple[str, nvrtc.Defines]
Need = tuple[Format, tuple[int, int], torch.dtype]


def variants(needs: Iterable[Need], tokens: Sequence[int]) -> set[Variant]:
    """What cuda.prepare would compile; it is the only list of variants there is."""
    found: set[Variant] = set()
    load = nvrtc.load
    try:
        nvrtc.load = lambda name, defines, _: found.add((name, defines))  # type: ignore[assignment, func-returns-value, return-value]
        cuda.prepare(needs, "cpu", tokens)
    finally:
        nvrtc.load = load
    return found


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be compiled for this CPU."""
    if shutil.which("g++") is None:
        return "no g++"
    source = "#include <ucontext.h>\n_Float16 half;\n"
    probe = subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], input=source, text=True, capture_output=True)
    return None if probe.returncode == 0 else "g++ lacks C++20, _Float16 or ucontext"


def once(
    folders: pytest.TempPathFactory, needs: Callable[[bool], list[Need]], tokens: Sequence[int]
) -> Callable[[bool], Emulator]:
    """get(slow) -> the kernels of what is needed then, compiled when it is first asked for."""

    @functools.cache
    def get(slow: bool) -> Emulator:
        return Emulator(folders.mktemp("kernels"), variants(needs(slow), tokens))

    return get


class Emulator:
    """Stands in for nvrtc.launch with some variants; `seed` chooses the order of blocks."""

    def __init__(self, folder: Path, wanted: Iterable[Variant]):
        lines = [
            f"{MACROS.get(name, name.upper())}({','.join(str(value) for _, value in defines)})\n"
            for name, defines in sorted(wanted)
        ]
        (folder / "variants.inc").write_text("".join(lines))
        library = folder / "kernels.so"
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        places = [f"-I{p}" for p in (SHIM, KERNELS, folder)]
        subprocess.run(["g++", *flags, *places, str(SHIM / "variants.cpp"), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.seed = 0

    def launch(
        self,
        name: str,
        defines: nvrtc.Defines,
        grid: tuple[int, int],
        shared: int,
        args: Sequence[nvrtc.Argument],
        device: torch.device,
    ) -> None:
        """Run a kernel to its end; fails on an access outside of the arguments' memory."""
        self.library.begin(shared)
        for a in args:
            if isinstance(a, Tensor):
                self.library.know(ctypes.c_void_p(a.data_ptr()), ctypes.c_ulonglong(a.nbytes))
        for i in WRITTEN[name]:
            if isinstance(written := args[i], Tensor):
                written.fill_(torch.nan)
        values = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(None if a is None else a.data_ptr()) for a in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        faults = getattr(self.library, "_".join([name, *(str(value) for _, value in defines)]))(*grid, self.seed, pointers)
        assert not faults, f"{name} {dict(defines)}: {faults} accesses outside of its memory"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Emulator:
        """Let launches run here, on tensors of the CPU, as long as `monkeypatch` lasts."""
        monkeypatch.setattr(nvrtc, "launch", self.launch)
        monkeypatch.setattr(cuda, "_has_kernels", lambda t: True)
        return self
