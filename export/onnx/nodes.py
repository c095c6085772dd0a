"""Matrices as ONNX nodes: what stands in the graph where torch's had a Linear, Conv1D or Embedding.

Integers become MatMulNBits or, where rows are looked up, GatherBlockQuantized, and where inputs are rounded MatMulInteger; every
other format is turned into a dense matrix by standard operators, which onnxruntime does once, when it loads the graph. Scales and
dense matrices have on disk the 16 bits that the run gave them, with a Cast behind them, which is done at loading as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from compress.export.onnx.datafile import DATA, places
from compress.export.onnx.encode import NBits, Slot
from compress.formats import Dense, Factored, Format, Int, LowRank, Served
from compress.formats.codebooks import NF, DoubleQuant, Lut, lut_table, nf_table
from compress.state.graph import Site

MICROSOFT = "com.microsoft"
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
COMPUTE = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


class Nodes:
    """Nodes and constants as they are made. slots: the tensors of the data file; dtype: what is computed in."""

    def __init__(self, slots: Iterable[Slot], dtype: str, accuracy_level: int):
        self.slots: Mapping[str, Slot] = {slot.name: slot for slot in slots}
        self.compute, self.level = COMPUTE[dtype], accuracy_level
        self.made: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._known: dict[str, str] = {}
        self._count = 0

    def take(self) -> list[NodeProto]:
        """The nodes made since the last call."""
        made, self.made = self.made, []
        return made

    # --- matrices ---

    def matrix(self, site: Site, fmt: Format | None, x: str, out: str, rows: bool) -> None:
        """out = x Wᵀ or, of an embedding, the `rows` x of W; `fmt` is None for a matrix that is as the source has it."""
        (ROWS if rows else PRODUCTS)[type(fmt)](self, fmt, site, x, out)

    def product_of_dense(self, fmt: Dense | None, site: Site, x: str, out: str | None) -> str:
        W = self.number(dense_name(fmt, site))
        return self.op("MatMul", [x, W if site.transposed else self.turned(W)], out)

    def rows_of_dense(self, fmt: Dense | None, site: Site, x: str, out: str | None) -> str:
        """Converted behind, not in front: a table of rows is large."""
        return self.op("Cast", [self.op("Gather", [dense_name(fmt, site), x])], out, to=self.compute)

    def product_of_codes(self, fmt: NF | Lut, site: Site, x: str, out: str | None) -> str:
        return self.op("MatMul", [x, self.turned(self.decoded(fmt, site.shape, f"{site.stem}."))], out)

    def rows_of_codes(self, fmt: NF | Lut, site: Site, x: str, out: str | None) -> str:
        return self.op("Gather", [self.decoded(fmt, site.shape, f"{site.stem}."), x], out)

    def product_of_sum(self, fmt: LowRank, site: Site, x: str, out: str | None) -> str:
        product = PRODUCTS[type(fmt.base)](self, fmt.base, site, x, None)
        return self.op("Add", [product, self.correction(fmt, site, x, rows=False)], out)

    def rows_of_sum(self, fmt: LowRank, site: Site, x: str, out: str | None) -> str:
        rows = ROWS[type(fmt.base)](self, fmt.base, site, x, None)
        return self.op("Add", [rows, self.correction(fmt, site, x, rows=True)], out)

    def product_of_factors(self, fmt: Factored, site: Site, x: str, out: str | None) -> str:
        """x Aᵀ, and that times Bᵀ: a product for either, in its own nodes."""
        A, B = factor_sites(fmt, site)
        way = PRODUCTS[type(fmt.factors)]
        return way(self, fmt.factors, B, way(self, fmt.factors, A, x, None), out)

    def turned(self, W: str) -> str:
        return self.once(f"{W}.T", lambda: self.op("Transpose", [W], perm=[1, 0]))

    def product_of_integers(self, fmt: Int, site: Site, x: str, out: str | None) -> str:
        form, stem = NBits.of(fmt, site.shape[1]), f"{site.stem}."
        level = {"accuracy_level": self.level} if self.level else {}
        inputs = [x, f"{stem}weight_codes", self.block_scales(form, fmt, site), *zeros(fmt, stem)]
        return self.op("MatMulNBits", inputs, out, MICROSOFT, K=site.shape[1], N=site.shape[0], bits=form.bits,
                       block_size=form.block, **level)  # fmt: skip

    def product_of_bytes(self, fmt: Served, site: Site, x: str, out: str | None) -> str:
        """A product of integers, times the scale of each row of x and that of each output, in fp32."""
        codes, scale = self.once(f"{x}.bytes", lambda: self.bytes_of_rows(x)).split()
        W = self.turned(f"{site.stem}.weight")
        whole = self.op("Cast", [self.op("MatMulInteger", [codes, W, self.middle()])], to=FLOAT)
        each = self.reshape(self.number(f"{site.stem}.weight_scale", FLOAT), (site.shape[0],))
        last = self.op("Mul", [self.op("Mul", [whole, scale]), each], out if self.compute == FLOAT else None)
        return last if self.compute == FLOAT else self.op("Cast", [last], out, to=self.compute)

    def bytes_of_rows(self, x: str) -> str:
        """Each row of x in 8 bits, and its scale: the names of both. Codes are moved by 128 to have no sign: onnxruntime has fast
        kernels for a product of those with signed weights, and none for one of signed codes."""
        wide = x if self.compute == FLOAT else self.op("Cast", [x], to=FLOAT)
        most = self.op("ReduceMax", [self.op("Abs", [wide]), self.ints(-1)], keepdims=1)
        scale = self.op("Max", [self.op("Div", [most, self.floats("half", [127.5])]), self.floats("least", [1e-30])])
        codes = self.op("Round", [self.op("Div", [wide, scale])])
        moved = self.op("Add", [codes, self.floats("middle.8", [128.0])])
        kept = self.op("Clip", [moved, self.scalar("none", 0.0), self.scalar("most", 255.0)])
        return f"{self.op('Cast', [kept], to=TensorProto.UINT8)} {scale}"

    def middle(self) -> str:
        return self.constant("zero.8", np.array(128, np.uint8))

    def scalar(self, name: str, value: float) -> str:
        return self.constant(f"scalar.{name}", np.array(value, np.float32))

    def rows_of_integers(self, fmt: Int, site: Site, x: str, out: str | None) -> str:
        form, stem, (n, k) = NBits.of(fmt, site.shape[1]), f"{site.stem}.", site.shape
        flat = self.reshape(f"{stem}weight_codes", (n, form.blocks * form.block * form.bits // 8))
        inputs = [flat, x, self.block_scales(form, fmt, site), *zeros(fmt, stem)]
        exact = form.blocks * form.block == k
        y = self.op("GatherBlockQuantized", inputs, out if exact else None, MICROSOFT, bits=form.bits, block_size=form.block,
                    gather_axis=0, quantize_axis=1)  # fmt: skip
        return y if exact else self.first(y, k, -1, out)

    def block_scales(self, form: NBits, fmt: Int, site: Site) -> str:
        """The scales of all blocks, [N, B], of those of the groups."""
        scale, (n, groups) = self.number(f"{site.stem}.weight_scale"), (site.shape[0], fmt.groups(site.shape[1]))
        if form.repeats == 1:
            return scale

        def repeat() -> str:
            apart = self.reshape(scale, (n, groups, 1))
            wide = self.op("Expand", [apart, self.ints(n, groups, form.repeats)])
            return self.reshape(wide, (n, groups * form.repeats))

        return self.once(f"{scale}.blocks", repeat)

    def correction(self, fmt: LowRank, site: Site, x: str, rows: bool) -> str:
        """x Aᵀ Bᵀ, or the rows x of B, times A."""
        stem, (n, k) = f"{site.stem}.", site.shape
        plain = isinstance(fmt.factors, Dense)
        A = self.factor(fmt.factors, f"{stem}lora_A.", (fmt.rank, k))
        B = self.factor(fmt.factors, f"{stem}lora_B.", (fmt.rank, n))  # [N, r] where it is plain
        if rows:
            return self.op("MatMul", [self.op("Gather", [B if plain else self.turned(B), x]), A])
        return self.op("MatMul", [self.op("MatMul", [x, self.turned(A)]), self.turned(B) if plain else B])

    def factor(self, fmt: Int | NF | Lut | Dense, prefix: str, shape: tuple[int, int]) -> str:
        return self.number(f"{prefix}weight") if isinstance(fmt, Dense) else self.decoded(fmt, shape, prefix)

    # --- numbers of any format ---

    def number(self, name: str, to: int | None = None) -> str:
        """A stored tensor in the dtype that is computed in, or in `to`."""
        to = self.compute if to is None else to
        if code_of(self.slots[name].kind) == to:
            return name
        return self.once(f"{name}.{to}", lambda: self.op("Cast", [name], to=to))

    def decoded(self, fmt: Int | NF | Lut, shape: tuple[int, int], prefix: str) -> str:
        """The dense matrix [N, K] of codes, in fp32 until it is done."""
        return self.once(f"{prefix}dense", lambda: self._decoded(fmt, shape, prefix))

    def _decoded(self, fmt: Int | NF | Lut, shape: tuple[int, int], prefix: str) -> str:
        (n, k), groups, width = shape, fmt.groups(shape[1]), fmt.width(shape[1])
        level = STEPS[type(fmt)](self, fmt, (n, groups, width), prefix)
        scale = self.double_scales(fmt.double, prefix, n * groups) if fmt.double else self.number(f"{prefix}weight_scale", FLOAT)
        whole = self.reshape(self.op("Mul", [level, self.apart(scale, n, groups)]), (n, groups * width))
        whole = whole if groups * width == k else self.first(whole, k, 1)
        return whole if self.compute == FLOAT else self.op("Cast", [whole], to=self.compute)

    def apart(self, x: str, n: int, groups: int) -> str:
        return self.reshape(x, (n, groups, 1))

    def integer_steps(self, fmt: Int, split: tuple[int, int, int], prefix: str) -> str:
        """Codes less the zero point, `split` into groups, [N, G, width]."""
        codes = self.split_codes(FLOAT, split, prefix)
        middle = self.floats(f"middle.{fmt.bits}", [1 << (fmt.bits - 1)])
        zero = middle if fmt.symmetric else self.apart(self.number(f"{prefix}weight_zero_codes", FLOAT), *split[:2])
        return self.op("Sub", [codes, zero])

    def table_steps(self, fmt: NF | Lut, split: tuple[int, int, int], prefix: str) -> str:
        """What the table has for the codes."""
        codes = self.split_codes(INT32, split, prefix)
        return self.op("Gather", [self.levels(fmt, prefix), codes])

    def split_codes(self, number: int, split: tuple[int, int, int], prefix: str) -> str:
        """Converted first: no other operator takes uint4."""
        return self.reshape(self.op("Cast", [f"{prefix}weight_codes"], to=number), split)

    def levels(self, fmt: NF | Lut, prefix: str) -> str:
        if fmt.learned:
            return self.number(f"{prefix}weight_table", FLOAT)
        return self.floats(f"{type(fmt).__name__.lower()}{fmt.bits}", LEVELS[type(fmt)](fmt.bits).tolist())

    def double_scales(self, double: DoubleQuant, prefix: str, count: int) -> str:
        """code * top / (2**bits - 1) + offset, rounded after each step, as the format has it."""
        spans, block = self.slots[f"{prefix}weight_scale_top"].shape[0], double.block
        codes = self.reshape(self.op("Cast", [f"{prefix}weight_scale_codes"], to=FLOAT), (spans, block))
        top = self.reshape(self.number(f"{prefix}weight_scale_top", FLOAT), (spans, 1))
        most = self.floats(f"most.{double.bits}", [(1 << double.bits) - 1])
        share = self.op("Div", [self.op("Mul", [codes, top]), most])
        flat = self.reshape(self.op("Add", [share, f"{prefix}weight_scale_offset"]), (spans * block,))
        return flat if spans * block == count else self.first(flat, count, 0)

    # --- operators ---

    def op(self, kind: str, inputs: Sequence[str], out: str | None = None, domain: str = "", **attributes: Any) -> str:
        """A node; returns the name of its output."""
        if out is None:
            out, self._count = f"w{self._count}", self._count + 1
        self.made.append(helper.make_node(kind, inputs, [out], name=f"{kind}:{out}", domain=domain, **attributes))
        return out

    def once(self, key: str, make: Callable[[], str]) -> str:
        """What `make` gives, made only the first time that it is asked for."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self.op("Reshape", [x, self.ints(*shape)])

    def first(self, x: str, count: int, axis: int, out: str | None = None) -> str:
        """The first `count` of x along an axis."""
        return self.op("Slice", [x, self.ints(0), self.ints(count), self.ints(axis)], out)

    def ints(self, *values: int) -> str:
        return self.constant("ints." + ".".join(map(str, values)), np.array(values, np.int64))

    def floats(self, name: str, values: list[float]) -> str:
        return self.constant(name, np.array(values, np.float32))

    def constant(self, name: str, values: Any) -> str:
        name = f"compress.{name}"
        self.constants.setdefault(name, numpy_helper.from_array(values, name))
        return name


Way = Callable[[Nodes, Any, Site, str, str | None], str]  # a matrix's format, the matrix, x, the name of the result
PRODUCTS: Mapping[type, Way] = {
    NoneType: Nodes.product_of_dense,
    Dense: Nodes.product_of_dense,
    Int: Nodes.product_of_integers,
    NF: Nodes.product_of_codes,
    Lut: Nodes.product_of_codes,
    LowRank: Nodes.product_of_sum,
    Factored: Nodes.product_of_factors,
    Served: Nodes.product_of_bytes,
}
ROWS: Mapping[type, Way] = {
    NoneType: Nodes.rows_of_dense,
    Dense: Nodes.rows_of_dense,
    Int: Nodes.rows_of_integers,
    NF: Nodes.rows_of_codes,
    Lut: Nodes.rows_of_codes,
    LowRank: Nodes.rows_of_sum,
}
STEPS: Mapping[type, Callable[[Nodes, Any, tuple[int, int, int], str], str]] = {
    Int: Nodes.integer_steps,
    NF: Nodes.table_steps,
    Lut: Nodes.table_steps,
}
LEVELS: Mapping[type, Callable[[int], Tensor]] = {NF: nf_table, Lut: lut_table}


def factor_sites(fmt: Factored, site: Site) -> list[Site]:
    """The factors of a site as sites of their own: their shapes, and where their tensors lie."""
    shapes = fmt.factor_shapes(site.shape).items()
    return [replace(site, shape=side, weight=f"{site.stem}.{name}.weight", transposed=False) for name, side in shapes]


def dense_name(fmt: Dense | None, site: Site) -> str:
    return site.weight if fmt is None else f"{site.stem}.weight"


def zeros(fmt: Int, stem: str) -> list[str]:
    return [] if fmt.symmetric else [f"{stem}weight_zero_codes"]


def initializers(slots: Iterable[Slot]) -> list[TensorProto]:
    """The tensors of the data file as the graph names them."""
    found = []
    for slot, start in places(slots):
        tensor = TensorProto(name=slot.name, data_type=code_of(slot.kind), dims=slot.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", start), ("length", slot.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        found.append(tensor)
    return found


def serialized(model: Any) -> bytes:
    """The bytes of a graph, the same ones for the same graph."""
    return bytes(model.SerializeToString(deterministic=True))


def code_of(kind: str) -> int:
    """ONNX's number for a type."""
    return int(getattr(TensorProto, kind))


def operators() -> list[onnx.OperatorSetIdProto]:
    """The versions of operators that the nodes are of."""
    return [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
