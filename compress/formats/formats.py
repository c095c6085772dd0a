"""What a weight becomes on disk: frozen value objects that know codes, bytes and dequantization.

A format has a text form that round-trips, `parse(str(f)) == f`:

    int4:g128          4-bit integers, one scale for 128 inputs, symmetric
    int3:g64:asym      3-bit integers, a scale and a zero point for 64 inputs
    int8:channel       8-bit integers, one scale for each output
    nf3:g64:dq8x256    a table of levels, see codebooks.py; so do lut3:g64 and lut3:g64:shared
    ecq2.5             entropy-coded integers, 2.5 bits a weight with all that goes with them, see entropy.py
    tcq2.5             a trellis code of 2.5 bits a weight, see trellis.py; tcq2:l8 has fewer states
    q4_k iq4_xs        the types of llama.cpp's blocks, see superblocks.py; iq2_xs and its kin in lattice.py
    int2:g64:r128      any of int, nf, lut, ecq and tcq in rotated coordinates, inputs in blocks of 128, see rotated.py
    tcq3:ri128         the same of inputs alone, which is what an embedding takes
    int3:g64+r16       int, nf or lut, not rotated, plus a product of two factors of rank 16
    lr64 lr64:int4:g32 a product of two factors of rank 64 in place of the matrix, in bf16 or in int, nf or lut; see factors.py
    fp8:channel nvfp4 mxfp4 mxfp8   small floating-point numbers, see floats.py
    int8:channel/int8:token         with inputs rounded as well, see served.py
    bf16 fp16 fp32     no quantization

Two laws hold for every format. `nbytes(shape)` is exactly what the exporter writes for the matrix, scales and zero points
included. And a format knows nothing of calibration: rounding, GPTQ and every other solver drive the same `fit`, `encode`
and `decode`, so each format works under each solver.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import FormatError, did_you_mean
from compress.formats import bitpack
from compress.formats.activations import RULES, Activation
from compress.formats.codebooks import NF, DoubleQuant, Lut
from compress.formats.entropy import Ecq
from compress.formats.factors import Factored, LowRank
from compress.formats.floats import KINDS as FLOATS
from compress.formats.floats import Float
from compress.formats.ggml import KINDS, LATTICES
from compress.formats.grid import Can, Grid, Shape, Storage, restore
from compress.formats.ints import BITS, DENSE, Dense, Int
from compress.formats.lattice import Lattice
from compress.formats.rotated import BLOCKS, Rotated
from compress.formats.served import Rounding, Served
from compress.formats.superblocks import Blocks
from compress.formats.trellis import HALVES, SIZES, Tcq

Ggml = Blocks | Lattice  # types of llama.cpp's files
Coded = Ecq | Tcq  # without a grid: steps of inputs belong to the whole matrix
Numbers = Int | NF | Lut | Float | Coded | Ggml | Dense
Format = Numbers | LowRank | Factored | Rotated | Served


def base_of(fmt: Format) -> Numbers | Factored | Rotated | Served:
    """A format without its low-rank correction, if it has one."""
    return fmt.base if isinstance(fmt, LowRank) else fmt


def weight_of(fmt: Format) -> Format:
    """What a matrix is stored in, whatever its inputs are rounded to."""
    return fmt.weight if isinstance(fmt, Served) else fmt


def numbers_of(fmt: Format) -> Numbers:
    """What the numbers of a format are stored in: those of its quantized part, or of its two factors."""
    if isinstance(fmt, Served):
        return fmt.weight
    return fmt.base if isinstance(fmt, LowRank | Rotated) else fmt.factors if isinstance(fmt, Factored) else fmt


def integers(formats: Mapping[str, Format]) -> dict[str, Int]:
    """Those of some sites' formats that are plain integers: what most engines have kernels for."""
    return {name: fmt for name, fmt in formats.items() if isinstance(fmt, Int)}


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in a format: the tensors that are written, under the names of `format.tensors`."""

    format: Storage
    shape: Shape
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which `format.nbytes(shape)` predicted."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def inputs(self) -> Rounding | None:
        """What its inputs are rounded by where it multiplies; None where they are taken as they are."""
        return self.format.inputs(self.tensors) if isinstance(self.format, Served) else None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in `dtype`."""
        return self.format.dequantize(self.tensors, dtype)

    def rows(self, rows: slice | list[int], dtype: torch.dtype) -> Tensor:
        """Some rows of the weight in `dtype`; no others are decoded where the format can `GIVE_ROWS`."""
        if Can.GIVE_ROWS not in self.format.can:
            return self.dequantize(dtype)[rows]
        if isinstance(self.format, Ggml):
            return self.format.dequantize({"weight_blocks": self.tensors["weight_blocks"][rows]}, dtype)
        if isinstance(self.format, Rotated):
            turned = Packed(self.format.base, self.shape, self.tensors).rows(rows, torch.float32)
            return self.format.turn_back(turned, dtype)
        if isinstance(self.format, Tcq):
            return self.format.picked(self.tensors, torch.arange(self.shape[0])[rows], dtype)
        assert isinstance(self.format, Int)
        fmt, (n, k) = self.format, self.shape
        zero = None
        if not fmt.symmetric:
            zero = bitpack.unpack(self.tensors["weight_zero_point"].T, fmt.bits, n).T[rows].contiguous()
        codes = bitpack.unpack(self.tensors["weight_packed"][rows], fmt.bits, k)
        return restore(codes, Grid(self.tensors["weight_scale"][rows], zero), fmt, dtype)


_INT = re.compile(r"int(\d+):(?:g(\d+)|channel)(:asym)?", re.ASCII)
_NF = re.compile(r"nf(\d+):g(\d+)(?::dq(\d+)x(\d+)(?::(bf16|fp16|fp32))?)?", re.ASCII)
_LUT = re.compile(r"lut(\d+):g(\d+)(:shared)?", re.ASCII)
_ROTATED = re.compile(r"([^+]+):r(i?)(\d+)", re.ASCII)
_ECQ = re.compile(r"ecq(\d(?:\.\d{1,2})?)", re.ASCII)
_TCQ = re.compile(r"tcq(\d+(?:\.[05])?)(?::l(\d+))?", re.ASCII)
_LOW_RANK = re.compile(r"([^+]+)\+r(\d+)(?::([^+]+))?", re.ASCII)
_FACTORED = re.compile(r"lr(\d+)(?::((?!lr\d)[^+]+))?", re.ASCII)
_USUAL = [
    *(f"int{b}:{g}{a}" for b in BITS for g in ("g32", "g64", "g128", "g256", "channel") for a in ("", ":asym")),
    *(f"nf{b}:g64{d}" for b in NF.WIDTHS for d in ("", ":dq8x256", ":dq8x256:fp32")),
    *(f"lut{b}:g64{s}" for b in Lut.WIDTHS for s in ("", ":shared")),
    *(f"{kind}:g64:r{r}" for kind in ("int2", "int3", "int4", "int8", "lut2", "lut3", "lut4", "nf3", "nf4") for r in BLOCKS),
    *(f"ecq{rate}{r}" for rate in ("2", "2.25", "2.5", "3", "3.5", "4") for r in ("", ":r128", ":ri128")),
    *(f"tcq{halves / 2:g}{r}" for halves in HALVES for r in ("", ":r128", ":ri128")),
    *(f"{base}+r{r}" for base in ("int3:g64", "int4:g64", "nf3:g64:dq8x256") for r in (16, 64)),
    *(f"lr{r}{f}" for r in (16, 64, 256) for f in ("", ":int8:channel", ":int4:g64")),
    *KINDS,
    *LATTICES,
    *FLOATS,
    *(f"{w}/{a}" for w in (*FLOATS, "int8:channel", "int4:g128") for a in RULES),
    *DENSE,
]
_ALLOWED = (
    "int<2..8>:g<16..256>[:asym], int<2..8>:channel[:asym], nf<2,3,4,8>:g<16..256>[:dq<2,3,4,8>x<16..4096>[:fp16|:fp32]], "
    "lut<2..4>:g<16..256>[:shared], ecq<1.00..6.00>, tcq<1..5>[:l10|:l8], <any of these six>:r[i]<16,32,64,128,256>, "
    "<int, nf or lut>+r<rank>[:<format of factors>], lr<rank>[:<format of factors>], "
    + ", ".join((*KINDS, *LATTICES, *FLOATS, f"<int without :asym, or any of these four>/<{'|'.join(RULES)}>", *DENSE))
)


def parse(text: str) -> Format:
    """The format that `text` names; FormatError says what is allowed and the nearest right text."""
    weight, served, inputs = text.partition("/")
    if served:
        return Served(parse(weight), Activation(inputs))  # type: ignore[arg-type]  # Served itself refuses others
    if text in FLOATS:
        return Float(text)
    if found := _LOW_RANK.fullmatch(text):
        base, rank, factors = found.groups()
        # what the types do not allow here, LowRank itself refuses
        return LowRank(parse(base), int(rank), parse(factors or "bf16"))  # type: ignore[arg-type]
    if found := _FACTORED.fullmatch(text):
        return Factored(int(found[1]), parse(found[2] or "bf16"))  # type: ignore[arg-type]
    if found := _ROTATED.fullmatch(text):
        return Rotated(parse(found[1]), int(found[3]), found[2] == "i")  # type: ignore[arg-type]  # Rotated itself refuses others
    if found := _ECQ.fullmatch(text):
        return Ecq(round(100 * float(found[1])))
    if text in KINDS:
        return Blocks(text)
    if text in LATTICES:
        return Lattice(text)
    if found := _TCQ.fullmatch(text):
        return Tcq(round(2 * float(found[1])), int(found[2] or SIZES[0]))
    if text in DENSE:
        return Dense(DENSE[text])
    if found := _INT.fullmatch(text):
        bits, group, asym = found.groups()
        return Int(int(bits), int(group) if group else None, asym is None)
    if found := _NF.fullmatch(text):
        bits, group, *double = found.groups()
        return NF(int(bits), int(group), _double(*double) if double[0] else None)
    if found := _LUT.fullmatch(text):
        return Lut(int(found[1]), int(found[2]), found[3] is not None)
    raise FormatError(f"unknown format '{text}'{did_you_mean(text, _USUAL)}   allowed: {_ALLOWED}")


def _double(bits: str, block: str, top: str | None) -> DoubleQuant:
    return DoubleQuant(int(bits), int(block), DENSE[top or "bf16"])
