"""How near to the speed of memory the packed products run, on a GPU, beside what others offer.

    python benchmarks/cuda_kernels.py [--out DIR] [--shapes 4096x4096 ...] [--tokens 1 8 16 64]

Every time is the median over replays of a CUDA graph, in which launch after launch reads another copy of the weights, more than
four L2 caches of them, so that weights come from memory as they do in a model; and the spread of the replays. `share` is that of
the speed at which this GPU copies, measured first: bytes of codes, scales, activations and results over the time. Of a rotated
matrix the time is that of all its launches, which turn activations before the product and, but for trellis codes, behind it.

Ours are checked against float64 before they are timed. Beside them, in the same way: torch in bf16, torch's own int4
(`aten._weight_int4pack_mm`), and bitsandbytes and humming-kernels where they can be imported; none of them is needed.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from compress.export.runtime.cuda import launch as cuda
from compress.formats import Ecq, Format, numbers_of, parse

SHAPES = ("4096x4096", "11008x4096", "8192x8192", "8192x28672")
FORMATS = ("int2:g128", "int3:g128", "int4:g128", "nf4:g64:dq8x256", "int4:g128:r128", "ecq3:r128", "tcq2", "tcq2:r128",
           "tcq3:r128", "tcq4:r128")  # fmt: skip
TOKENS = (1, 8, 16, 64)
REPLAYS, LAUNCHES = 9, 60
DTYPE = torch.bfloat16
Run = Callable[[], object]
Peer = tuple[str, int, Callable[[Tensor], list[Run]]]  # name, bytes of weights, what to run for an input


@dataclass(frozen=True)
class Time:
    """Microseconds a launch: the median, and the range of the replays over it."""

    micros: float
    spread: float


def main() -> int:
    """Prints the page, and writes it to a folder; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the page")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    page = "\n".join(lines(args.shapes, args.tokens)) + "\n"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        (args.out / f"kernels-{date.today()}-{name}.md").write_text(page, encoding="utf-8")
    return 0


def lines(shapes: list[str], tokens: list[int]) -> Iterator[str]:
    """The page, printed as it grows."""
    speed = copy_speed()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copies at {speed / 1e12:.2f} TB/s."
    for line in page(shapes, tokens, speed, device):
        print(line, flush=True)
        yield line


def page(shapes: list[str], tokens: list[int], speed: float, device: str) -> Iterator[str]:
    """A section for each shape, a row for each contestant and number of tokens."""
    yield from (f"# Packed products, {date.today()}", "", device, "")
    for shape in shapes:
        n, k = (int(side) for side in shape.split("x"))
        yield from (f"## {n} x {k}", "", "| what | tokens | µs | spread | share |", "| --- | --- | --- | --- | --- |")
        for contestant in CONTESTANTS:
            try:
                name, weights, runs = contestant(n, k)
                for m in tokens:
                    time = measure(runs(torch.randn(m, k, device="cuda", dtype=DTYPE)))
                    moved = weights + 2 * m * (n + k)
                    share = moved / (time.micros * 1e-6) / speed
                    yield f"| {name} | {m} | {time.micros:.2f} | {time.spread:.0%} | {share:.0%} |"
            except (ImportError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
                yield f"| {contestant.__name__} | | not run: {type(error).__name__}: {str(error).splitlines()[0][:80]} | | |"
            torch.cuda.empty_cache()
        yield ""


def measure(runs: list[Run]) -> Time:
    """The time of one launch, with `runs` one after the other in a graph, each on its own copy of the weights."""
    for run in runs[:3]:
        run()
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), max(1, LAUNCHES // len(runs))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(runs)))
    middle = statistics.median(times)
    return Time(middle, (max(times) - min(times)) / middle)


def copy_speed() -> float:
    """Bytes a second, read and written, of a copy of a gigabyte."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2 * source.nbytes / (measure([lambda: to.copy_(source)] * 8).micros * 1e-6)


def copies(nbytes: int) -> int:
    """How many copies of weights exceed four L2 caches."""
    return max(2, 4 * torch.cuda.get_device_properties(0).L2_cache_size // nbytes + 1)


def ours(text: str) -> Callable[[int, int], Peer]:
    """The packed kernel on a random matrix in a format, checked at every number of tokens."""

    def contestant(n: int, k: int) -> Peer:
        fmt = parse(text)
        tensors = random_tensors(fmt, n, k)
        parts = cuda.repack(fmt, (n, k), tensors, DTYPE)
        weights = sum(p.nbytes for p in parts)
        every = [parts] + [[p.clone() for p in parts] for _ in range(copies(weights) - 1)]
        W = cuda.dequantize(parts, fmt, (n, k), torch.float32)
        cuda.prepare([(fmt, (n, k), DTYPE)], "cuda", TOKENS)

        def runs(x: Tensor) -> list[Run]:
            y = cuda.linear(x, parts, None, fmt, (n, k)).double()
            exact = torch.cat([x.double() @ w.double().T for w in W.split(1024)], 1)
            error = float((y - exact).norm() / exact.norm())
            if not error < 5e-3:  # also for NaN
                raise RuntimeError(f"wrong by {error:.1e}")
            return [lambda p=p: cuda.linear(x, p, None, fmt, (n, k)) for p in every]  # type: ignore[misc]

        return text, weights, runs

    contestant.__name__ = text
    return contestant


def random_tensors(fmt: Format, n: int, k: int) -> dict[str, Tensor]:
    """Random codes and plausible scales, on the GPU: a format's tensors without a fit; of an entropy-coded one as decoded."""
    found = {}
    if isinstance(numbers_of(fmt), Ecq):
        found["weight_codes"] = torch.randint(-9, 10, (n, k), dtype=torch.int8, device="cuda")
    for name, (dtype, shape) in fmt.tensors((n, k)).items():
        if name == "weight_shape":
            found[name] = torch.tensor([n, k])
        elif name == "weight_step":
            found[name] = torch.randint(80, 96, shape, dtype=dtype, device="cuda")
        elif dtype == torch.int32:
            found[name] = torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=dtype, device="cuda")
        else:
            found[name] = (torch.rand(shape, device="cuda") * 0.02 + 0.001).to(dtype)
    return found


def torch_bf16(n: int, k: int) -> Peer:
    """Dense weights, by cuBLAS."""
    every = [torch.randn(n, k, device="cuda", dtype=DTYPE) for _ in range(copies(2 * n * k))]
    return "torch bf16", 2 * n * k, lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in every]  # type: ignore[misc]


def torch_int4(n: int, k: int) -> Peer:
    """The int4 kernel inside torch, groups of 128."""
    pairs = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=DTYPE)
    weights = packed.nbytes + scales.nbytes
    every = [packed.clone() for _ in range(copies(weights))]
    multiply = torch.ops.aten._weight_int4pack_mm
    return "aten._weight_int4pack_mm g128", weights, lambda x: [lambda w=w: multiply(x, w, 128, scales) for w in every]  # type: ignore[misc]


def bitsandbytes(n: int, k: int) -> Peer:
    """NF4 in blocks of 64, doubly quantized."""
    peer = importlib.import_module("bitsandbytes")
    W = torch.randn(n, k, device="cuda", dtype=DTYPE)
    weights = n * k // 2 + n * k // 64
    quantize = peer.functional.quantize_4bit
    every = [quantize(W, blocksize=64, quant_type="nf4", compress_statistics=True) for _ in range(copies(weights))]
    name = f"bitsandbytes {peer.__version__} nf4 b64"
    return name, weights, lambda x: [lambda w=w: peer.matmul_4bit(x, w[0].t(), quant_state=w[1]) for w in every]  # type: ignore[misc]


def humming(bits: int) -> Callable[[int, int], Peer]:
    """Integers in groups of 128 by humming-kernels."""

    def contestant(n: int, k: int) -> Peer:
        peer = importlib.import_module("humming.layer")
        W, weights, every = torch.randn(n, k, device="cuda", dtype=DTYPE), n * k * bits // 8 + n * k // 128 * 2, []
        for _ in range(copies(weights)):
            config = {"dtype": f"int{bits}", "group_size": 128}
            layer = peer.HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=DTYPE).cuda()
            layer.load_from_unquantized(W)
            layer.transform()
            every.append(layer)
        return f"humming int{bits} g128", weights, lambda x: [lambda w=w: w(x) for w in every]

    contestant.__name__ = f"humming int{bits}"
    return contestant


CONTESTANTS = (torch_bf16, *(ours(text) for text in FORMATS), torch_int4, bitsandbytes, *(humming(bits) for bits in (2, 3, 4)))

if __name__ == "__main__":
    sys.exit(main())
