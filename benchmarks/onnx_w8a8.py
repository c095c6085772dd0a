"""Products of bytes in onnxruntime, as the onnx exporter writes `int8:channel/int8:token`, beside fp32: time and error.

    python benchmarks/onnx_w8a8.py [--shape 4096x1024] [--rows 1 32] [--save DIR]

One thread, one matrix, all graphs by turns; each figure is the median of `--repeats` calls after one that does not count, of
processor time. The error is that of the outputs relative to fp32, with products added in 32 bits (`session.x64quantprecision`),
and as CPUs without VNNI do it by themselves.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from report import line, machine, publish

from compress.export.onnx.encode import slots
from compress.export.onnx.nodes import Nodes, operators
from compress.export.onnx.session import PRECISE
from compress.formats import Served, parse
from compress.formats.grid import plain

W8A8 = "int8:channel/int8:token"
Graph = tuple[list[Any], dict[str, np.ndarray]]  # nodes from x to y, and what they hold


def main() -> None:
    """Measures, prints the table."""
    args = arguments()
    torch.set_num_threads(1)
    n, k = map(int, args.shape.split("x"))
    W_nk = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    sessions = {"fp32": session(dense(W_nk), n, k), W8A8: session(bytes_of(W_nk), n, k),
                "the same, sums of 16 bits": session(bytes_of(W_nk), n, k, precise=False)}  # fmt: skip
    setting = f"{machine()}; {cpu()}; onnxruntime {ort.__version__}; one thread, a matrix of {args.shape}."
    page = [f"# Products of bytes in onnxruntime, {date.today()}", "", setting, "",
            line(["rows", "graph", "milliseconds", "fp32 / this", "error"]), line(["---"] * 5)]  # fmt: skip
    for rows in args.rows:
        x = np.random.default_rng(rows).standard_normal((rows, k), np.float32)
        wanted = x @ W_nk.numpy().T
        times = {name: by_turns for name, by_turns in timed(sessions, x, args.repeats).items()}
        for name, took in times.items():
            (y,) = sessions[name].run(None, {"x": x})
            error = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
            ratio = f"{median(times['fp32']) / median(took):.2f}"
            page.append(line([str(rows), name, f"{1000 * median(took):.3f}", ratio, f"{error:.4f}"]))
    publish("\n".join(page), args.save, "onnx-w8a8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x1024", help="outputs x inputs")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write DIR/DATE-onnx-w8a8.md")
    return parser.parse_args()


def timed(sessions: dict[str, Any], x: np.ndarray, repeats: int) -> dict[str, list[float]]:
    """Seconds of processor time of each session's calls, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(repeats + 1):
        for name, held in sessions.items():
            start = time.process_time()
            held.run(None, {"x": x})
            times[name] += [time.process_time() - start] if turn else []
    return times


def dense(W_nk: torch.Tensor) -> Graph:
    return [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": W_nk.T.contiguous().numpy()}


def bytes_of(W_nk: torch.Tensor) -> Graph:
    """What the exporter writes for a matrix in W8A8."""
    fmt = parse(W8A8)
    assert isinstance(fmt, Served)
    held = fmt.held(fmt.weight.pack(*plain(W_nk, fmt.weight)))
    nodes = Nodes(slots(fmt, tuple(W_nk.shape), torch.float32, "m."), "fp32", 4)
    site: Any = SimpleNamespace(stem="m", shape=tuple(W_nk.shape), transposed=False)
    nodes.product_of_bytes(fmt, site, "x", "y")
    found = {"m.weight": held["weight"].numpy(), "m.weight_scale": held["weight_scale"].float().numpy()}
    return nodes.take(), found | {name: onnx.numpy_helper.to_array(t) for name, t in nodes.constants.items()}


def session(graph: Graph, n: int, k: int, precise: bool = True) -> Any:
    """A graph in onnxruntime, on one thread."""
    made, held = graph
    ends = [onnx.helper.make_tensor_value_info(name, 1, [None, size]) for name, size in (("x", k), ("y", n))]
    tensors = [onnx.numpy_helper.from_array(t, name) for name, t in held.items()]
    whole = onnx.helper.make_graph(made, "g", ends[:1], ends[1:], tensors)
    model = onnx.helper.make_model(whole, opset_imports=operators(), ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(PRECISE, "1" if precise else "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def cpu() -> str:
    """Whether the processor has instructions that multiply bytes and add in 32 bits."""
    place = Path("/proc/cpuinfo")
    known = place.read_text(encoding="utf-8") if place.exists() else ""
    return "with VNNI" if "vnni" in known else "without VNNI"


if __name__ == "__main__":
    main()
