"""Instructions a weight in the main loop of the kernels, counted in machine code: what decides below 4 bits, and needs no GPU.

    python benchmarks/kernels_budget.py [--arch sm_90] [--tiles 1 2 4 8]

Compiles with nvcc and reads the code with cuobjdump: both on the path, or the latter from the wheels nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. The main loop is the one with the most tensor-core instructions; the part of it that delivers sums at the
end of a share of K, once in several units, is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.export.runtime.cuda import launch as cuda
from compress.export.runtime.cuda import nvrtc, rings
from compress.export.runtime.cuda.tiles import Base, Layout
from compress.formats import Tcq, parse

ROWS = ("int2:g128", "int2:g64:asym", "int3:g128", "int3:g128:asym", "int4:g128", "int4:g128:asym", "int4:g32:asym",
        "int4:channel", "int8:g128", "nf2:g64", "nf3:g64", "nf4:g64",
        "tcq1", "tcq2", "tcq2.5", "tcq3", "tcq4", "tcq5")  # fmt: skip
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_KERNELS = Path(nvrtc.__file__).parent / "kernels"


@dataclass(frozen=True)
class Code:
    """What a compiler says of a kernel, and its instructions by address."""

    registers: int
    spilled: int
    lines: list[tuple[int, str]]


def main() -> int:
    """Prints the table; 2 where a tool is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 2
    print("| format | " + " | ".join(f"{kind}, {8 * t} tokens" for t in args.tiles for kind in ("bf16", "fp16")) + " |")
    print("| --- |" + " --- |" * 2 * len(args.tiles))
    for text in ROWS:
        most = rings.TOKENS if isinstance(parse(text), Tcq) else 64  # of a launch
        counts = [
            f"{instructions(*variant(text, dtype, 8 * t), args.arch):.2f}" if 8 * t <= most else ""
            for t in args.tiles
            for dtype in (torch.bfloat16, torch.float16)
        ]
        print(f"| {text} | " + " | ".join(counts) + " |", flush=True)
    return 0


def variant(text: str, dtype: torch.dtype, rows: int) -> tuple[str, nvrtc.Defines]:
    """The kernel that multiplies, and its macros, for a format's text and a number of rows of x."""
    fmt = parse(text)
    if isinstance(fmt, Tcq):
        return "trellis_linear", rings.variant(fmt, dtype, rows)
    assert isinstance(fmt, Base)
    return "packed_linear", cuda.variant(Layout.of(fmt), dtype, rows)


def instructions(name: str, defines: nvrtc.Defines, arch: str) -> float:
    """Instructions a weight, of one lane, in the main loop."""
    lines = build(name, defines, arch).lines
    body = _loop(lines)
    work = [block for block in _blocks(body) if not any(re.search(r"\bSTS\b", text) for _, text in block)]
    products = sum("HMMA" in text for _, text in body)  # each is of eight weights a lane and of one tile of tokens
    return sum(map(len, work)) * dict(defines)["V_TILES"] / (8 * products)


def build(name: str, defines: nvrtc.Defines, arch: str) -> Code:
    """Compile kernels/<name>.cu with nvcc and disassemble it, where cuobjdump is at hand."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        macros = [f"-D{key}={value}" for key, value in defines]
        command = [
            "nvcc",
            "-std=c++17",
            "-cubin",
            f"-arch={arch}",
            "-Xptxas",
            "-v",
            *macros,
            "-o",
            str(out),
            str(_KERNELS / f"{name}.cu"),
        ]
        said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr
        numbers = [re.search(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        assert all(numbers), said
        return Code(*(int(n[1]) for n in numbers if n), _disassemble(out))


def missing() -> str | None:
    """What is not there to count with."""
    if shutil.which("nvcc") is None:
        return "counting needs nvcc on the path"
    return None if _tool("cuobjdump") else "counting needs cuobjdump: `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`"


def _tool(name: str) -> str | None:
    spec = importlib.util.find_spec("nvidia")
    places = [p for folder in (spec.submodule_search_locations or () if spec else ()) for p in Path(folder).glob(f"*/bin/{name}")]
    return shutil.which(name) or next((str(p) for p in places), None)


def _disassemble(cubin: Path) -> list[tuple[int, str]]:
    tool, disassembler = _tool("cuobjdump"), _tool("nvdisasm")
    if tool is None or disassembler is None:
        return []
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    text = subprocess.run(
        [tool, "--dump-sass", str(cubin)], capture_output=True, encoding="utf-8", check=True, env={**os.environ, "PATH": path}
    ).stdout
    return [(int(address, 16), line) for address, line in _LINE.findall(text)]


def _target(line: str) -> int | None:
    found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
    return int(found[1], 16) if found else None


def _loop(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The instructions from the target of a backward branch to it: of the loop with the most products, the smallest such."""
    loops = [
        [x for x in lines if start <= x[0] <= at] for at, text in lines if (start := _target(text)) is not None and start < at
    ]
    return max(loops, key=lambda body: (sum("HMMA" in text for _, text in body), -len(body)))


def _blocks(body: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The loop in stretches that are entered and left at their ends only."""
    targets = {_target(text) for _, text in body}
    blocks: list[list[tuple[int, str]]] = [[]]
    for at, text in body:
        if at in targets and blocks[-1]:
            blocks.append([])
        blocks[-1].append((at, text))
        if _target(text) is not None:
            blocks.append([])
    return blocks


if __name__ == "__main__":
    sys.exit(main())
