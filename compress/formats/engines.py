"""Which formats an engine multiplies by, and which it only stores: a table, so that what is measured is what will be served.

    vllm:sm75 ... vllm:sm100   vLLM on a GPU of CUDA's compute capability 7.5 (T4), 8.0 (A100), 8.9 (L40, RTX 4090), 9.0 (H100,
                               H200), 10.0 (B200)
    vllm:cpu                   vLLM on a CPU

A format `W/A` means two things: how weights are stored, and what inputs are rounded to. An engine without a kernel for the second
half loads the folder all the same, and multiplies by the inputs as they are: it computes something better than was measured, at
the speed of 16 bits. That is said, and refused where somebody names such an engine, because every figure of the run would be
of another model; the same weights without the second half are what it serves. The other way round there is one case: from
Blackwell on vLLM gives the inputs of `mxfp4` four bits whatever the config says.

The table is vLLM's own dispatch as its sources of version 0.32 have it (`compressed_tensors.py`, `kernels/linear/__init__.py`; of
integers alone `compressed_tensors_wNa16.py`). No GPU was at hand: of its rows, 4-bit integers and `int8:channel/int8:token` have
run, on a CPU. What its sources leave open is not known here, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from compress.formats.factors import LowRank
from compress.formats.floats import Float
from compress.formats.formats import Format, base_of, weight_of
from compress.formats.ints import Dense, Int
from compress.formats.served import Served

EngineName = Literal["vllm:sm75", "vllm:sm80", "vllm:sm89", "vllm:sm90", "vllm:sm100", "vllm:cpu"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
GPUS = ENGINES[:-1]
ADA, BLACKWELL = GPUS[2:], GPUS[4:]  # and later
AS_MEASURED, WEIGHTS_ONLY = "as measured", "weights only, inputs as they are"


@dataclass(frozen=True)
class Rule:
    """What vLLM makes of a scheme. runs: engines that compute what it says. stores: those that load it and take inputs as they
    are. why: what is to be known of others."""

    runs: tuple[EngineName, ...]
    stores: tuple[EngineName, ...] = ()
    why: Mapping[str, str] | None = None


BITS_ON_CPU = "vLLM's CPU kernel takes integers of 4 bits alone"
ROUNDS = "vLLM rounds the inputs of mxfp4 there whatever the config says; use mxfp4/mxfp4"
SCHEMES: Mapping[str, Rule] = {
    "int4": Rule(ENGINES),
    "int": Rule(GPUS, why={"vllm:cpu": BITS_ON_CPU}),
    "int8:channel/int8:token": Rule(ENGINES),
    "int/int8:token": Rule(GPUS),
    "int/int4:token": Rule(GPUS),
    "int4:g128/fp8:token": Rule(("vllm:sm90",)),
    "fp8:channel": Rule(GPUS),
    "fp8:channel/fp8:token": Rule((*ADA, "vllm:cpu"), GPUS[:2]),
    "nvfp4": Rule(GPUS),
    "nvfp4/nvfp4": Rule(BLACKWELL, GPUS[:4]),
    "mxfp4": Rule(GPUS[1:4], why={"vllm:sm100": ROUNDS}),
    "mxfp4/mxfp4": Rule(BLACKWELL, GPUS[1:4]),
    "mxfp8/mxfp8": Rule(BLACKWELL, GPUS[:4]),
}  # by the text of a format, or by that of integers of any width and group


def scheme_of(fmt: Int | Float | Served) -> str | None:
    """The row of `SCHEMES` that a format is in; None where there is none."""
    if isinstance(fmt, Int):
        return "int4" if fmt.bits == 4 else "int"
    if isinstance(fmt, Served) and isinstance(fmt.weight, Int) and fmt.weight.bits < 8 and str(fmt) not in SCHEMES:
        text = f"int/{fmt.input}"
    else:
        text = str(fmt)
    return text if text in SCHEMES else None


def made_of(engine: EngineName, fmt: Format) -> str:
    """What an engine makes of a matrix in a format: `AS_MEASURED`, `WEIGHTS_ONLY`, or why it does not run it."""
    if isinstance(fmt, Dense):
        return AS_MEASURED
    if isinstance(fmt, LowRank):
        return made_of(engine, fmt.base)
    if not isinstance(fmt, Int | Float | Served):
        return "vLLM itself has no such format"
    found = scheme_of(fmt)
    if found is None:
        return "no kernel of vLLM's is known that takes it"
    rule = SCHEMES[found]
    if engine in (*rule.runs, *rule.stores):
        return AS_MEASURED if engine in rule.runs else WEIGHTS_ONLY
    there = "on a CPU" if engine == "vllm:cpu" else "there"
    return (rule.why or {}).get(engine, f"no kernel of vLLM's is known that takes it {there}")


def refusal(engine: EngineName, fmt: Format) -> str | None:
    """Why an engine does not serve a format as it is measured, and what to do, in words that follow its text; None where it
    does."""
    made = made_of(engine, fmt)
    if made == AS_MEASURED:
        return None
    if made == WEIGHTS_ONLY:
        alone, first = weight_of(base_of(fmt)), next(e for e in ENGINES if made_of(e, fmt) == AS_MEASURED)
        todo = f"use {alone}" if made_of(engine, alone) == AS_MEASURED else f"name an engine from {first} on"
        return f"{engine} takes its inputs as they are and would serve another model than is measured; {todo}"
    return f"{engine} does not run it: {made}"


def by_engine(formats: Iterable[Format]) -> dict[str, str]:
    """Engine -> what it makes of a model in these formats: the worst of what it makes of each."""
    found: dict[str, str] = {}
    known = dict.fromkeys(formats)
    for engine in ENGINES:
        said = {str(fmt): made_of(engine, fmt) for fmt in known}
        odd = next((f"{text}: {made}" for text, made in said.items() if made not in (AS_MEASURED, WEIGHTS_ONLY)), None)
        found[engine] = odd or (WEIGHTS_ONLY if WEIGHTS_ONLY in said.values() else AS_MEASURED)
    return found
