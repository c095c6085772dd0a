"""What llama.cpp does of gguf_vs_llamacpp.py, in an environment with llama-cpp-python and numpy.

    python llamacpp_child.py quantize IN.gguf OUT.gguf KIND IMATRIX.npz
    python llamacpp_child.py logits FILE.gguf WINDOWS.json OUT.npy
    python llamacpp_child.py judge FILE.gguf WINDOWS.json REFERENCE.npy OUT.json

Windows are evaluated one token at a time: with some builds several in a row end in a crash, for files of llama.cpp's own making
too.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ROWS = 32  # of logits compared at a time


def quantize(source: str, out: str, kind: str, importance: str) -> None:
    """llama.cpp's own file of a dense one, by the mean square of its matrices' inputs."""
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads()
    held = {name: np.ascontiguousarray(values, np.float32) for name, values in np.load(importance).items()}
    Entry, floats = llama_cpp.llama_model_imatrix_data, ctypes.POINTER(ctypes.c_float)
    entries = [Entry(name.encode(), values.ctypes.data_as(floats), values.size) for name, values in held.items()]
    wanted.imatrix = (Entry * (len(entries) + 1))(*entries)  # closed by an empty one
    if llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(wanted)):
        sys.exit(f"llama.cpp cannot quantize {source}")


def logits(file: str, windows: str, out: str) -> None:
    """The logits of all windows, fp32 [windows, tokens, vocabulary], in one file."""
    ids = json.loads(Path(windows).read_text("utf-8"))
    held = None
    for i, rows in enumerate(evaluated(file, ids)):
        if held is None:
            held = np.lib.format.open_memmap(out, "w+", np.float32, (len(ids), *rows.shape))
        held[i] = rows


def judge(file: str, windows: str, reference: str, out: str) -> None:
    """Perplexity of a file, and its KL to the reference."""
    ids, wanted = json.loads(Path(windows).read_text("utf-8")), np.load(reference, mmap_mode="r")
    kl = loss = same = count = 0.0
    for tokens, theirs, ours in zip(ids, wanted, evaluated(file, ids), strict=True):
        for i in range(0, len(tokens) - 1, ROWS):
            at = slice(i, min(i + ROWS, len(tokens) - 1))
            p, q = log_softmax(theirs[at]), log_softmax(ours[at])
            kl += float((np.exp(p) * (p - q)).sum())
            loss -= float(q[np.arange(len(q)), tokens[at.start + 1 : at.stop + 1]].sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(q)
    figures = {"kl": kl / count, "perplexity": math.exp(loss / count), "top1": same / count, "version": llama_cpp.__version__}
    Path(out).write_text(json.dumps(figures), "utf-8")


def evaluated(file: str, windows: list[list[int]]) -> Iterator[Any]:
    """The logits [tokens, vocabulary] of each window."""
    size = len(windows[0])
    both = {"n_threads": threads(), "n_threads_batch": threads()}
    model = llama_cpp.Llama(file, n_ctx=size, n_batch=size, logits_all=True, verbose=False, **both)
    for tokens in windows:
        model.reset()
        for token in tokens:
            model.eval([token])
        yield np.array(model.scores[:size])


def threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


def log_softmax(x: Any) -> Any:
    x = np.asarray(x, np.float32)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


if __name__ == "__main__":
    {"quantize": quantize, "logits": logits, "judge": judge}[sys.argv[1]](*sys.argv[2:])
