"""Memory does not grow with depth: what a run holds is a block, not the model.

That sizes are known to the byte is tested in test_compressed_tensors.py for every family, and in test_checkpoint.py for files.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from compress import pipeline
from compress.state.checkpoint import Layout, Spec
from tests.conftest import GROUPED, IDS, ROOT, SMALL, make_tokenizer
from tests.cooking import recipe
from tests.nursery import Nursery

LINUX = Path("/proc/self/status").exists()
WIDTH, BLOCK_MB = 384, 3.4  # one block of the models below, in bf16
MEASURE = """
import ctypes, os, sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from compress import pipeline
from compress.model.model import open_model
from compress.model.stream import Stream

libc = ctypes.CDLL(None)
if hasattr(libc, "mallopt"):  # what is freed is given back at once: else glibc keeps of it what its own history wants
    for threshold in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        libc.mallopt(threshold, 1 << 16)
statm = os.open("/proc/self/statm", os.O_RDONLY)

def own():  # memory that belongs to this process alone, in MB; pages of mapped files do not
    resident, shared = os.pread(statm, 200, 0).split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE") / 2**20

class Watch(TorchDispatchMode):  # looks at every operation and file, not by the clock: a busy machine hides nothing
    most = 0.0

    def look(self, *_):
        self.most = max(self.most, own())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.look()
        return result

watch = Watch()
sys.addaudithook(watch.look)

def peak(work):
    work(2)  # warm up: imports, kernels, caches
    base = watch.most = own()
    with watch:
        work(14)
    return watch.most - base

def run(blocks):
    pipeline.run(Path(f"run{blocks}") / "recipe.yaml")

def forward(blocks):
    model = open_model(str(blocks))
    stream = Stream(model.state)
    batches = stream.start(model.state, [torch.ones(2, 64, dtype=torch.int64)])
    for block in model.graph.blocks:
        stream.advance(model.state, block.index, batches)
    next(stream.logits(model.state, batches))

print(peak(run), peak(forward))
"""


def deep_model(folder: Path, blocks: int) -> Path:
    """A llama of many wide blocks, written file by file without ever being whole in memory."""
    sizes = {**SMALL, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": blocks}
    config = transformers.LlamaConfig(**sizes, **GROUPED, **IDS, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    make_tokenizer(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    layout = Layout.of([Spec(n, torch.bfloat16, tuple(s)) for n, s in shapes.items()], 4_000_000)
    layout.write(folder, ((n, torch.randn(s, dtype=torch.bfloat16) * s[-1] ** -0.5) for n, s in shapes.items()))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="reads Linux's account of memory")
def test_memory_does_not_grow_with_depth(tmp_path: Path, nursery: Nursery) -> None:
    """Quantizing, writing and checking 14 blocks takes the memory of a few, and so does a forward pass; not of the model."""
    for blocks in (2, 14):
        source = deep_model(tmp_path / str(blocks), blocks)
        recipe(tmp_path / f"run{blocks}", source, method="rtn", clip="minmax", format="int4:g32")
    whole = sum(p.stat().st_size for p in (tmp_path / "14").glob("*.safetensors")) / 2**20
    assert whole > 13 * BLOCK_MB
    done = nursery.run(MEASURE, cwd=tmp_path)
    assert done.code == 0, done.err
    for peak in (float(x) for x in done.out.split()):
        assert peak < 6 * BLOCK_MB < whole / 2, done.out


PEAK = """
import sys
from pathlib import Path
from compress import pipeline
pipeline.run(Path(sys.argv[1]))
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)  # ru_maxrss would count the parent's
"""


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="reads Linux's account of memory")
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_planned_peak_is_near_the_real_one(text: Path, tmp_path: Path, method: str) -> None:
    """Not more than a third above what was said; mapped files and the imported libraries count."""
    source = deep_model(tmp_path / "model", 6)
    path = recipe(tmp_path / "run", source, text, exports=False, method=method, format="int4:g32")
    planned = pipeline.plan(path).largest.peak_bytes
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.33 * planned, (float(done.stdout) / 2**20, planned / 2**20)
