"""What the user is told of an ONNX artifact: beforehand, what each format becomes and costs; in its card, how to run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from compress.export.onnx.encode import NBits, kind_of, slots
from compress.formats import Coded, Dense, Factored, Format, Ggml, Int, LowRank, Served, numbers_of
from compress.state import State
from compress.state.graph import Site

ENGINES = "onnxruntime >= 1.24"  # earlier ones lack kernels: 1.23 has none for 2 bits, 1.22 no opset 23
NEWER = "onnxruntime >= 1.27"  # 1.26 looks up rows of 4 and 8 bits only
START = """\
```python
import numpy as np, onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
"""
USE_CACHED = (
    START
    + """\
ids = tokenizer("Once upon a time", return_tensors="np").input_ids.astype(np.int64)
inputs, outputs = session.get_inputs(), [o.name for o in session.get_outputs()]
dtype = np.float16 if "float16" in inputs[-1].type else np.float32
cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtype) for i in inputs if i.name.startswith("past_key_values.")}
text = ids
for _ in range(32):
    positions = np.arange(text.shape[1])[None, -ids.shape[1]:]
    given = {"input_ids": ids, "attention_mask": np.ones_like(text), "position_ids": positions}
    logits, *cache_now = session.run(outputs, {i.name: given[i.name] for i in inputs if i.name in given} | cache)
    cache = dict(zip(cache, cache_now))
    ids = logits[:, -1:].argmax(-1)
    text = np.concatenate([text, ids], 1)
print(tokenizer.decode(text[0]))
```"""
)
USE_PLAIN = (
    START
    + """\
text = tokenizer("Once upon a time", return_tensors="np").input_ids.astype(np.int64)
names = [i.name for i in session.get_inputs()]
for _ in range(32):
    given = {"input_ids": text, "attention_mask": np.ones_like(text), "position_ids": np.arange(text.shape[1])[None]}
    logits = session.run(None, {name: given[name] for name in names})[0]
    text = np.concatenate([text, logits[:, -1:].argmax(-1)], 1)
print(tokenizer.decode(text[0]))
```"""
)
USE_ONCE = (
    START
    + """\
ids = tokenizer("Once upon a time", return_tensors="np").input_ids.astype(np.int64)
(logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
print(tokenizer.decode(logits[0].argmax(-1)))
```"""
)


def describe(fmt: Format, sites: list[Site], level: int) -> str:
    """Which nodes a format becomes, in how many bytes a weight, and what is slow about them."""
    cost, base = cost_of(fmt, sites), numbers_of(fmt)
    more = ", and two products in full precision for the low-rank factors" if isinstance(fmt, LowRank) else ""
    if isinstance(base, Dense):
        return f"{fmt} stays as it is on disk ({cost}) and takes 4 bytes a weight in memory, where onnxruntime converts it"
    if not isinstance(base, Int):
        assert not isinstance(base, Coded | Ggml), "refused"
        return (f"{fmt} is stored as {kind_of(base.bits).lower()} codes ({cost}), which onnxruntime turns into a dense matrix as "
                f"it loads them: small on disk, 4 bytes a weight in memory, and no faster than fp32{more}")  # fmt: skip
    if isinstance(fmt, Served):
        return f"{fmt} becomes MatMulInteger of 8 bits, and a few operators in front that round each row of inputs ({cost})"
    form = NBits.of(base, sites[0].shape[1])
    held = f" (there is no kernel for {base.bits})" if form.bits != base.bits else ""
    return f"{fmt} becomes MatMulNBits of {form.bits} bits{held}, block {form.block} ({cost}){more}{slow(form, level)}"


def describe_factors(held: list[tuple[Site, Factored]], level: int) -> list[str]:
    """The same of products in place of matrices, by what their factors are stored in: what each of two products becomes."""
    said = []
    for stored in dict.fromkeys(fmt.factors for _, fmt in held):
        mine = [(site, fmt) for site, fmt in held if fmt.factors == stored]
        factors = [replace(s, shape=side) for s, fmt in mine for side in fmt.factor_shapes(s.shape).values()]
        said.append(
            f"{len(mine)} matrices become two products each, one after the other; of either, {describe(stored, factors, level)}"
        )
    return said


def describe_table(fmt: Format, site: Site) -> str:
    """The same of the token embedding, of which rows are looked up and nothing else."""
    cost, base = cost_of(fmt, [site]), numbers_of(fmt)
    if isinstance(base, Dense):
        return f"the embedding in {fmt} stays as it is on disk and in memory ({cost})"
    if not isinstance(base, Int):
        assert not isinstance(base, Coded | Ggml), "refused"
        return (f"the embedding in {fmt} is stored as {kind_of(base.bits).lower()} codes ({cost}), which onnxruntime turns into "
                "a dense table as it loads them: 4 bytes a weight in memory; integers stay packed")  # fmt: skip
    form = NBits.of(base, site.shape[1])
    held = f" (there is no kernel for {base.bits})" if form.bits != base.bits else ""
    newer = f"; 2 bits need {NEWER}" if form.bits == 2 else ""
    return (f"the embedding in {fmt} becomes GatherBlockQuantized of {form.bits} bits{held}, block {form.block} ({cost}): it "
            f"stays packed in memory, and only the rows that are asked for are decoded{newer}")  # fmt: skip


def engines(formats: Mapping[str, Format]) -> str:
    """What loads the artifact, for its card; `formats` by site."""
    embed = formats.get("embed")
    return NEWER if isinstance(embed, Int) and embed.bits == 2 else ENGINES


def cost_of(fmt: Format, sites: list[Site]) -> str:
    stored = sum(slot.nbytes for s in sites for slot in slots(fmt, s.shape, torch.bfloat16))
    return f"{stored / sum(s.numel for s in sites):.3f} bytes a weight"


def slow(form: NBits, level: int) -> str:
    """What makes onnxruntime unpack a matrix on every call, measured on CPU with 1.31."""
    if form.bits == 2 and form.block == 16:
        return "; 2 bits in blocks of 16 have no fast kernel on CPU, and are 10 times slower than fp32: use g32, g64 or g128"
    if form.bits != 4 and level != 4:
        return (
            f"; {form.bits} bits at accuracy_level {level} have no fast kernel on CPU, and are 10 times slower than fp32: use 4"
        )
    return ""


def warnings(formats: Iterable[Format], half: bool, dtype: torch.dtype) -> list[str]:
    """What to know before such a graph goes to a GPU, and of one in fp16, `half`, of a model in `dtype`."""
    found = []
    if any(isinstance(base, Int) and base.bits == 2 for base in map(numbers_of, formats)):
        found.append("onnxruntime's CUDA provider has kernels for 4 and 8 bits and may take 2 for 4: run this artifact on CPU")
    if half and dtype != torch.float16:
        found.append("a graph in fp16 loses what of scales and weights lies outside of its range, 6e-8 to 65504")
    return found


def use(cached: bool, state: State) -> str:
    """How to run the artifact, for its card."""
    if not state.graph.causal:
        return USE_ONCE
    return USE_CACHED if cached else USE_PLAIN
