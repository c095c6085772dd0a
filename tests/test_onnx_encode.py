"""Matrices as ONNX holds them: the way there and back is exact, and every node computes what the format says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from compress.errors import FormatError
from compress.export.onnx.encode import NBits, Slot, decode, encode, slots
from compress.export.onnx.nodes import Nodes, code_of, operators
from compress.formats import Dense, Format, Int, LowRank, numbers_of, parse
from compress.state.graph import Site
from tests.conftest import covered
from tests.laws import packed_tensors

INTEGERS = [f"int{b}:{g}{z}" for b in range(2, 9) for g in ("g16", "g32", "g48", "g96", "g256", "channel") for z in ("", ":asym")]
TABLES = ["nf2:g24", "nf3:g64", "nf4:g64", "nf8:g40", "nf3:g64:dq8x256", "nf4:g32:dq4x16:fp32", "nf2:g16:dq3x24:fp16",
          "nf8:g64:dq2x16", "lut2:g64", "lut3:g40", "lut4:g32:shared", "lut2:g256:shared"]  # fmt: skip
RANKED = ["int4:g32+r4", "int3:g32:asym+r3:int8:channel:asym", "int4:g16+r2:fp32", "nf3:g64:dq8x256+r4:nf4:g40:dq4x16",
          "lut4:g16+r1:fp16", "int8:g32+r4:lut3:g24", "int2:channel+r4:int3:g16:asym", "nf4:g64+r5:int5:g32"]  # fmt: skip
FACTORED = ["lr16", "lr7:fp32", "lr32:int4:g32", "lr17:int8:channel", "lr48:int3:g16:asym", "lr20:nf3:g40", "lr9:lut4:g16",
            "lr5:nf8:g64:dq8x256"]  # fmt: skip
DENSE = ["bf16", "fp16", "fp32"]
FORMS = [*INTEGERS, *TABLES, *RANKED, *FACTORED, *DENSE]
ROUNDED = [f for f in (*INTEGERS, *RANKED, *FACTORED) if f.startswith("int") or ":int" in f]
BLOCKS = ("g16", "g32", "g48", "g64", "g96", "g128", "g160", "g256", "channel")


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def inputs_of(fmt: Format) -> int:
    """Inputs that integer groups divide, and that leave a short last group where that is allowed."""
    base, factors = numbers_of(fmt), fmt.factors if isinstance(fmt, LowRank) else None
    k = 2 * base.group if isinstance(base, Int) and base.group else 200
    step = factors.group if isinstance(factors, Int) and factors.group else 1
    return -(-k // step) * step


# --- there and back ---------------------------------------------------------------------------------------------------


def same_after(fmt: Format, n: int, k: int) -> None:
    tensors = packed_tensors(fmt, weight(n, k))
    coded, wanted = encode(fmt, (n, k), tensors), slots(fmt, (n, k), torch.bfloat16)
    assert {s.name: s.nbytes for s in wanted} == {name: t.nbytes for name, t in coded.items()}
    again = decode(fmt, (n, k), coded)
    assert again.keys() == tensors.keys()
    for suffix, tensor in tensors.items():
        assert again[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(again[suffix], tensor), suffix


@pytest.mark.parametrize("form", covered(FORMS, *FORMS[::3]))
def test_every_format_comes_back(form: str) -> None:
    same_after(parse(form), 96, inputs_of(parse(form)))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), groups=st.integers(1, 5), short=st.integers(0, 15), form=st.sampled_from([
    "int2:g16", "int3:g48:asym", "int4:channel", "int5:g32:asym", "int6:channel:asym", "int7:g16", "int8:g64", "nf3:g16:dq3x16",
    "nf8:g24", "lut2:g16", "lut4:g40:shared"]))  # fmt: skip
def test_every_shape_comes_back(n: int, groups: int, short: int, form: str) -> None:
    fmt: Any = parse(form)
    width = fmt.group or 24
    ragged = form.endswith("channel") or not form.startswith("int")
    same_after(fmt, n, groups * width + (short if ragged else 0))


def test_blocks_are_as_large_as_kernels_are_fast() -> None:
    forms: Any = {text: NBits.of(parse(f"int4:{text}"), 3840) for text in BLOCKS}  # type: ignore[arg-type]
    assert {text: form.block for text, form in forms.items()} == {
        "g16": 16, "g32": 32, "g48": 16, "g64": 64, "g96": 32, "g128": 128, "g160": 32, "g256": 128, "channel": 128}  # fmt: skip
    assert all(form.repeats * form.block == int(text[1:]) for text, form in forms.items() if text != "channel")
    channel: Any = parse("int4:channel")
    assert NBits.of(channel, 1376) == NBits(4, 32, 43, 43)
    assert NBits.of(channel, 40) == NBits(4, 32, 2, 2)
    assert [NBits.of(parse(f"int{b}:g32"), 64).bits for b in range(2, 9)] == [2, 4, 4, 8, 8, 8, 8]  # type: ignore[arg-type]


def test_groups_that_no_block_divides() -> None:
    with pytest.raises(FormatError, match=r"blocks are of 16, 32, 64 or 128 inputs, and 24 is no multiple of 16"):
        NBits.of(parse("int4:g24"), 48)  # type: ignore[arg-type]


def test_symmetric_codes_lie_around_the_middle_of_their_container() -> None:
    fmt: Any = parse("int3:g16")
    coded = encode(fmt, (1, 16), fmt.pack(torch.arange(8, dtype=torch.uint8).repeat(1, 2), grid_of(fmt)))
    raw = coded["weight_codes"].flatten().tolist()
    assert [x for byte in raw for x in (byte & 15, byte >> 4)] == [4, 5, 6, 7, 8, 9, 10, 11] * 2


def grid_of(fmt: Any) -> Any:
    return fmt.fit(torch.tensor([[-1.0]]), torch.tensor([[1.0]]), torch.bfloat16)


@pytest.mark.parametrize("form", ["int3:g16", "int5:g16", "int3:g16:asym"])
def test_numbers_that_are_no_codes(form: str) -> None:
    fmt = parse(form)
    coded = encode(fmt, (2, 32), packed_tensors(fmt, weight(2, 32)))
    coded["weight_codes"][0, 0, 0] = 255
    with pytest.raises(FormatError, match=r"codes of [35] bits run from 0 to"):
        decode(fmt, (2, 32), coded)
    if ":asym" not in form:
        coded["weight_codes"][0, 0, 0] = 0
        with pytest.raises(FormatError, match="no codes of its format"):
            decode(fmt, (2, 32), coded)


# --- in onnxruntime ---------------------------------------------------------------------------------------------------


def run(fmt: Format, W: Tensor, x: Tensor, level: int = 1, dtype: str = "fp32", rows: bool = False) -> tuple[Tensor, Tensor]:
    """What the nodes of a matrix make of x, and the weight that it stands for."""
    shape = (int(W.shape[0]), int(W.shape[1]))
    tensors = packed_tensors(fmt, W)
    coded = {f"m.{suffix}": t for suffix, t in encode(fmt, shape, tensors).items()}
    listed = slots(fmt, shape, torch.bfloat16, "m.")
    nodes = Nodes(listed, dtype, level)
    role = "embed" if rows else "q"
    nodes.matrix(Site("s", role, shape, 0, "k", "m", "m.weight"), fmt, "x", "y", rows)
    number = nodes.compute
    given_as = TensorProto.INT64 if rows else number
    graph = helper.make_graph(
        nodes.take(), "g", [helper.make_tensor_value_info("x", given_as, ["a", "b"])],
        [helper.make_tensor_value_info("y", number, ["a", "b", "c"] if rows else ["a", "b"])],
        [initializer(slot, coded[slot.name]) for slot in listed] + list(nodes.constants.values()),
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=operators(), ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = x.numpy() if rows else x.numpy().astype(np.float16 if dtype == "fp16" else np.float32)
    return torch.from_numpy(session.run(None, {"x": fed})[0]).double(), fmt.dequantize(tensors, torch.float32).double()


def initializer(slot: Slot, tensor: Tensor) -> TensorProto:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return TensorProto(name=slot.name, data_type=code_of(slot.kind), dims=slot.shape, raw_data=raw)


def off(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("form", covered(FORMS, *FORMS[::3]))
def test_products_are_those_of_the_dequantized_matrix(form: str) -> None:
    fmt = parse(form)
    x = weight(3, inputs_of(fmt), 1)
    y, W = run(fmt, weight(96, inputs_of(fmt)), x)
    assert off(y, x.double() @ W.T) < 1e-5


@pytest.mark.parametrize("form", covered(ROUNDED, *ROUNDED[::3]))
def test_products_of_rounded_activations(form: str) -> None:
    fmt = parse(form)
    x = weight(3, inputs_of(fmt), 1)
    y, W = run(fmt, weight(96, inputs_of(fmt)), x, level=4)
    assert off(y, x.double() @ W.T) < 2e-2


@pytest.mark.parametrize("form", TABLES)
def test_tables_are_decoded_to_the_bit(form: str) -> None:
    """The product with the identity is the matrix itself."""
    fmt = parse(form)
    y, W = run(fmt, weight(96, 200), torch.eye(200))
    assert torch.equal(y, W.T)


@pytest.mark.parametrize("form", ["int4:g32", "int3:g48:asym", "int8:channel:asym", "int2:g32", "nf3:g64:dq8x256", "lut2:g64",
                                  "int4:g32+r4",
                                  "int4:channel", "nf4:g64+r5:int5:g32", "bf16", "fp32"])  # fmt: skip
def test_rows_of_an_embedding(form: str) -> None:
    fmt = parse(form)
    ids = torch.tensor([[3, 0, 95], [7, 7, 1]])
    k = 200 if form == "int4:channel" else inputs_of(fmt)
    y, W = run(fmt, weight(96, k), ids, rows=True)
    assert off(y, W[ids]) < 1e-6


@pytest.mark.parametrize("form", ["int4:g32", "int8:channel", "nf3:g64:dq8x256", "lut3:g40", "int4:g32+r4", "bf16", "lr8"])
def test_graphs_in_half_precision(form: str) -> None:
    fmt = parse(form)
    x = weight(3, inputs_of(fmt), 1)
    y, W = run(fmt, weight(96, inputs_of(fmt)), x, dtype="fp16")
    assert off(y, x.double() @ W.T) < 5e-3


def test_a_conv1d_stays_as_it_lies() -> None:
    """A dense matrix [in, out] is multiplied as it is; a quantized one is [out, in] in any case."""
    site = Site("s", "q", (24, 64), 0, "k", "m", "m.weight", transposed=True)
    nodes = Nodes([Slot("m.weight", "BFLOAT16", (64, 24))], "fp32", 4)
    nodes.matrix(site, None, "x", "y", rows=False)
    assert [n.op_type for n in nodes.take()] == ["Cast", "MatMul"]
    nodes = Nodes(slots(parse("int4:g32"), (24, 64), torch.bfloat16, "m."), "fp32", 4)
    nodes.matrix(site, parse("int4:g32"), "x", "y", rows=False)
    (_, node) = nodes.take()
    said = {a.name: a.i for a in node.attribute}
    assert said == {"K": 64, "N": 24, "bits": 4, "block_size": 32, "accuracy_level": 4}


def test_factors_are_two_products_and_never_the_matrix() -> None:
    site = Site("s", "q", (96, 64), 0, "k", "m", "m.weight", transposed=True)
    fmt = parse("lr32:int4:g32")
    nodes = Nodes(slots(fmt, (96, 64), torch.bfloat16, "m."), "fp32", 4)
    nodes.matrix(site, fmt, "x", "y", rows=False)
    products = [{a.name: a.i for a in n.attribute} for n in nodes.take() if n.op_type == "MatMulNBits"]
    assert [(p["N"], p["K"]) for p in products] == [(32, 64), (96, 32)]
    nodes = Nodes(slots(parse("lr8"), (96, 64), torch.bfloat16, "m."), "fp32", 4)
    nodes.matrix(site, parse("lr8"), "x", "y", rows=False)
    assert [n.op_type for n in nodes.take()] == ["Cast", "Transpose", "MatMul"] * 2


def test_a_matrix_with_two_users_is_made_once() -> None:
    nodes = Nodes([Slot("m.weight", "BFLOAT16", (24, 64))], "fp32", 4)
    site = Site("s", "head", (24, 64), None, "k", "m", "m.weight")
    for out in ("y", "z"):
        nodes.matrix(site, parse("bf16"), "x", out, rows=False)
    assert [n.op_type for n in nodes.take()] == ["Cast", "Transpose", "MatMul", "MatMul"]
    assert isinstance(parse("bf16"), Dense)


def test_bytes_of_slots() -> None:
    assert Slot("a", "UINT4", (3, 5)).nbytes == math.ceil(15 / 2)
    assert Slot("a", "BFLOAT16", (3, 5)).nbytes == 30
