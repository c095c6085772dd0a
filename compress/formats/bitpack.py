"""b-bit codes <-> 32-bit words: the only file that shifts bits.

The layout is that of compressed-tensors' `pack-quantized` (>= 0.18): along the last dimension the codes form one dense
bit stream, lowest bit first. Code i takes bits i*b ... i*b+b-1 of the row; word j holds bits 32*j ... 32*j+31, so a code
may straddle two words. The last word is padded with zero bits.

Eight codes of b bits fill exactly b bytes, whatever b is. Both directions therefore work on bytes, in periods of eight
codes, and view four bytes as one word. The view needs a little-endian machine, as safetensors does too.

Codes whose widths differ, or that are read together with what lies behind them, are written by `place` and read by `windows`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import FormatError

PERIOD = 8  # codes; a period fills exactly `bits` bytes
_WORD = 32  # bits; four periods fill exactly `bits` words
_LOW = (1 << _WORD) - 1

assert sys.byteorder == "little", "packed words are read as bytes, which needs a little-endian machine"


def words(n: int, bits: int) -> int:
    """The number of 32-bit words that hold `n` codes of `bits` bits."""
    return -(-n * bits // _WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes [..., n] into int32 words [..., words(n, bits)].

    `codes` has an integer dtype and values in [0, 2**bits); any leading dimensions. Raises FormatError for another width
    than 1..8, another dtype, or a code that does not fit.
    """
    _check_width(bits)
    if codes.dtype.is_floating_point or codes.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise FormatError(f"codes must be integers, not {codes.dtype}; encode the weights first")
    _check_range(codes, bits)
    *lead, n = codes.shape
    periods = -(-n // _WORD) * (_WORD // PERIOD)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, periods * PERIOD - n))
    out = torch.zeros((*lead, periods, bits), dtype=torch.uint8, device=codes.device)
    _fill(padded.view(*lead, periods, PERIOD), out, bits)
    return out.view(*lead, periods * bits).view(torch.int32)[..., : words(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes [..., n], uint8, of the words [..., words(n, bits)] that `pack` made.

    Raises FormatError for another width than 1..8, another dtype than int32, or the wrong number of words.
    """
    _check_width(bits)
    if packed.dtype != torch.int32:
        raise FormatError(f"packed words must be int32, not {packed.dtype}")
    if packed.shape[-1] != words(n, bits):
        raise FormatError(f"{n} codes of {bits} bits take {words(n, bits)} words a row, but the tensor has {packed.shape[-1]}")
    lead = packed.shape[:-1]
    periods = -(-n // PERIOD)
    raw = packed.contiguous().view(torch.uint8)
    short = max(0, periods * bits - raw.shape[-1])  # the last period may end in codes that are not there
    raw = torch.nn.functional.pad(raw, (0, short))[..., : periods * bits]
    codes = torch.empty((*lead, periods, PERIOD), dtype=torch.uint8, device=packed.device)
    _spill(raw.unflatten(-1, (periods, bits)), codes, bits)
    return codes.view(*lead, periods * PERIOD)[..., :n]


def place(codes: Tensor, at: Tensor, words: int) -> Tensor:
    """Words int32 [..., words] in which code i of `codes` [..., n], int64, lies from bit `at[i]` on. Codes do not overlap."""
    wide = torch.zeros(*codes.shape[:-1], words + 1, dtype=torch.int64, device=codes.device)
    shifted = codes << at % _WORD
    wide.index_add_(-1, at // _WORD, shifted & _LOW)
    wide.index_add_(-1, at // _WORD + 1, shifted >> _WORD)
    return wide[..., :words].to(torch.int32)


def windows(packed: Tensor, following: Tensor, at: Sequence[int], bits: int) -> Tensor:
    """Int32 [N, periods, len(at)]: the `bits` bits from each of the bits `at` on, of words [N, periods, words] with the word
    that follows each; a window lies in two words at most."""
    wide = (packed.long() & _LOW) | following.long() << _WORD
    found = torch.empty(*wide.shape[:2], len(at), dtype=torch.int32, device=packed.device)
    for i, first in enumerate(at):
        word, shift = divmod(first, _WORD)
        found[:, :, i] = (wide[:, :, word] >> shift).bitwise_and_((1 << bits) - 1)
    return found


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FormatError(f"a code takes 1 to 8 bits, not {bits}")


def _check_range(codes: Tensor, bits: int) -> None:
    if codes.numel() == 0 or (codes.dtype == torch.uint8 and bits == 8):
        return
    low, high = (int(x) for x in torch.aminmax(codes))
    if low < 0 or high >= 1 << bits:
        raise FormatError(f"codes of {bits} bits run from 0 to {(1 << bits) - 1}; these run from {low} to {high}")


def _fill(codes: Tensor, out: Tensor, bits: int) -> None:
    """OR the codes [..., P, 8] into the zeroed bytes [..., P, bits]."""
    for i in range(PERIOD):
        byte, shift = divmod(i * bits, 8)
        out[..., byte] |= codes[..., i] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= codes[..., i] >> (8 - shift)


def _spill(raw: Tensor, codes: Tensor, bits: int) -> None:
    """Write the codes [..., P, 8] held by the bytes [..., P, bits]."""
    mask = (1 << bits) - 1
    for i in range(PERIOD):
        byte, shift = divmod(i * bits, 8)
        value = raw[..., byte] >> shift
        if shift + bits > 8:
            value |= raw[..., byte + 1] << (8 - shift)
        codes[..., i] = value.bitwise_and_(mask)
