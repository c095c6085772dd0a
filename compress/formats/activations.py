"""What the inputs of a matrix are rounded to while it multiplies: the activation half of a format.

    int8:token  int4:token   a scale for each token, found when it comes
    fp8:token   fp8:g128     e4m3 numbers, a scale for each token, or for 128 inputs of it
    nvfp4                    e2m1 numbers in groups of 16, e4m3 scales, over one number that is the matrix's and is measured
    mxfp4  mxfp8             e2m1 or e4m3 numbers in groups of 32, scales that are powers of two

Engines round activations themselves, so what we measure is only worth something where the rule is theirs to the bit: the
divergence between two correct implementations of NVFP4, one of which divides by 6 in another dtype, is half of that to the
unquantized model. The rule here is that of compressed-tensors 0.20, which stock transformers runs: scales are found in the dtype
of the activations (amax over 127.5 for integers, 448 for e4m3, 6 for e2m1), a code is that of the quotient in that dtype, and
what is left is rounded to it once more. Two exceptions, which are the library's: NVFP4's scales meet the matrix's number in fp32,
and go on in it; MX takes the power of two at or below the largest magnitude, and the next one where its mantissa is 1.75 or more
(the OCP text always goes down, which costs a tenth of the divergence more). Kernels of GPUs differ in the last bit (vLLM's divide
integers by 127), so codes there are the same but for a few in a thousand.

A row is a token, whatever dimensions stand in front of it. compressed-tensors takes one scale for all where a matrix is given
two dimensions only, which no matrix inside the blocks of the models known here is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from compress.errors import FormatError, did_you_mean

E2M1_MAX, E4M3_MAX = 6.0, 448.0
E4M3 = torch.float8_e4m3fn
_E4M3_EPS = 0.125  # the scale that compressed-tensors gives to a group of zeros


@dataclass(frozen=True)
class Rule:
    """element: int4, int8, e2m1 or e4m3. group: inputs that share a scale; None: a token. scale: what it is kept in, the dtype
    of the activations, e4m3 over a measured number, or e8m0."""

    element: str
    group: int | None = None
    scale: str = "own"


RULES: dict[str, Rule] = {
    "int8:token": Rule("int8"),
    "int4:token": Rule("int4"),
    "fp8:token": Rule("e4m3"),
    "fp8:g128": Rule("e4m3", 128),
    "nvfp4": Rule("e2m1", 16, "e4m3"),
    "mxfp4": Rule("e2m1", 32, "e8m0"),
    "mxfp8": Rule("e4m3", 32, "e8m0"),
}
_MOST = {"int4": 7.5, "int8": 127.5, "e2m1": E2M1_MAX, "e4m3": E4M3_MAX}  # what the largest magnitude becomes
BIAS = {"e2m1": 2, "e4m3": 8}  # the exponent of an element's largest number


@dataclass(frozen=True)
class Activation:
    """How the inputs of a matrix are rounded, by its text: one of `RULES`."""

    text: str
    GLOBAL: ClassVar[str] = "input_global_scale"

    def __post_init__(self) -> None:
        if self.text not in RULES:
            raise FormatError(f"activations are one of {', '.join(RULES)}, not '{self.text}'{did_you_mean(self.text, RULES)}")

    def __str__(self) -> str:
        return self.text

    @cached_property
    def rule(self) -> Rule:
        return RULES[self.text]

    @property
    def measured(self) -> bool:
        """Whether a number of the matrix's own, found on calibration text, is part of it: see `divisor`."""
        return self.rule.scale == "e4m3"

    def check(self, inputs: int) -> None:
        """FormatError unless so many inputs fall into whole groups."""
        if self.rule.group and inputs % self.rule.group:
            raise FormatError(f"activations in {self}: groups of {self.rule.group} do not divide {inputs} inputs")

    def round(self, x: Tensor, divisor: Tensor | None = None) -> Tensor:
        """Activations [..., K] as the engine multiplies by them, in their own dtype. divisor: of `measured` ones, fp32 [1]."""
        rule, dtype = self.rule, x.dtype
        X = x.unflatten(-1, (-1, rule.group)) if rule.group else x
        scale = self._scale(X.abs().amax(-1, keepdim=True), divisor)
        made = rounded(X / scale, rule.element).to(scale.dtype) * scale
        return (made.flatten(-2) if rule.group else made).to(dtype)

    def _scale(self, most: Tensor, divisor: Tensor | None) -> Tensor:
        """The scales of groups or tokens with these largest magnitudes."""
        rule = self.rule
        if rule.scale == "e8m0":
            return power_of_two(most, BIAS[rule.element])
        scale = most / _MOST[rule.element]
        if rule.scale == "own":
            return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        assert divisor is not None, "it is measured where it is needed"
        kept = (divisor * scale.float()).clamp(max=E4M3_MAX).to(E4M3).float()
        return torch.where(kept == 0, _E4M3_EPS, kept) / divisor


def divisor(most: float, top: float = E4M3_MAX) -> float:
    """What scales of NVFP4 are multiplied by to become e4m3 numbers of up to `top`, where `most` is the largest magnitude that
    there is: an fp32 number, 1 where nothing is."""
    found = torch.tensor(top * E2M1_MAX) / torch.tensor(most, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    return float(found) if bool(found.isfinite()) else 1.0


def power_of_two(most: Tensor, bias: int) -> Tensor:
    """MX's scale for the largest magnitude of a group, in its dtype: the exponent of that, one more where its mantissa is 1.75
    or more, less `bias`; 2^-127 at least."""
    mantissa, exponent = torch.frexp(most.float())  # mantissa in [1/2, 1)
    exponent = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype) - bias
    exponent = torch.where(most == 0, -127, exponent).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent).to(most.dtype)
    return torch.where(scale == 0, 1.0, scale)  # in fp16, which has no such number


def rounded(x: Tensor, element: str) -> Tensor:
    """The nearest numbers of an element, ties to even, in the dtype of x."""
    if element == "e2m1":
        return to_e2m1(x)
    if element == "e4m3":
        return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).to(x.dtype)
    half = 8.0 if element == "int4" else 128.0
    return x.clamp(-half, half - 1).round_()


def to_e2m1(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even code: in steps of 0.5 below 2, of 1 below
    4, of 2 up to 6."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    size = x.abs()
    step = 0.5 * (1 + (size >= 2).to(x.dtype) + 2 * (size >= 4).to(x.dtype))
    return (x / step).round_().mul_(step)
