"""Numbers in 8 bits: blocks of int8 codes with one fp32 scale each, and rounding that is right on average.

Decides what a quantised vector is and how fp32 becomes one. Pure functions on torch tensors of any device; the caller
owns the memory and the noise (`peer.training.dither`). Leaves what is quantised, and when, to
`peer.training.int8_matrix`. (The wire has its own format, `peer.rounds.codec`: its bytes must be the same on every
machine, these need not be.)

A block is 256 values (the last may be shorter); its scale is max|x| / 127, a value is ``code * scale``.
Stochastic rounding takes the code below or above with probabilities that make the mean right: the expected value
differs from what was quantised by at most ``scale * 2**-14`` (the rounding of a quotient up to 127 in fp32, and 15
random bits). int8 weights need it: an inner step is often smaller than half a code, and rounding to the nearest would
drop it every time.
The noise that is added before rounding never reaches 1/2, so a value that was a code already keeps it.
A block whose scale would be below the smallest normal number (values under 1.5e-36) becomes zeros.
"""

from __future__ import annotations

import torch

from peer.rounds.codec import Float32
from peer.training.dither import random_noise
from peer.training.movement import BLOCK_VALUES, PackedEntry
from swarm.errors import SwarmError

MAX_CODE = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# 127 times it must not overflow.
LARGEST_SCALE = torch.finfo(torch.float32).max / MAX_CODE * (1 - 2**-22)


def num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)


def quantise_(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, noise: torch.Tensor | None) -> None:
    """Write ``values`` (fp32 [n], used as scratch: destroyed) as ``codes`` (int8 [n]) and ``scales`` (fp32 [blocks]).

    ``noise`` (int16 [n], in 2**-16 of a code) is added before rounding to the nearest code, half to even. Raises
    `SwarmError` where a value is not finite, before anything is written.
    """
    if values.dtype != torch.float32 or values.shape != codes.shape or len(scales) != num_blocks(len(values)):
        raise SwarmError("quantise takes one float32 vector, as many int8 codes, and a scale per block")
    largest = largest_of_blocks(values)
    # NaN and infinity both survive a maximum of magnitudes.
    if not bool(torch.isfinite(largest).all()):
        raise SwarmError("a weight is not finite and cannot be quantised")
    largest.div_(MAX_CODE).clamp_(max=LARGEST_SCALE)
    largest.masked_fill_(largest < SMALLEST_SCALE, 0.0)
    # Where the scale is 0 the factor must be 0 too, not infinite.
    scale_blocks_(values, largest.reciprocal().masked_fill_(largest == 0, 0.0))
    if noise is not None:
        values.add_(noise.to(torch.float32), alpha=2**-16)
    # Last, as nothing that may run out of memory may come between the two: new scales would stand above old codes.
    codes.copy_(values.round_().clamp_(-MAX_CODE, MAX_CODE))
    scales.copy_(largest)


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``code * scale`` in fp32, then rounded to ``dtype``: a fresh vector [n] on the same device."""
    if codes.device.type == "cpu":  # in two passes: a product of two types makes copies of both there
        values = codes.to(torch.float32)
        scale_blocks_(values, scales)
        return values if dtype == torch.float32 else values.to(dtype)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    whole = len(codes) // BLOCK_VALUES
    end = whole * BLOCK_VALUES
    rows = values[:end].view(whole, BLOCK_VALUES)
    torch.mul(codes[:end].view(whole, BLOCK_VALUES), scales[:whole, None], out=rows)  # one kernel, no fp32 copy
    if end < len(codes):
        torch.mul(codes[end:], scales[whole], out=values[end:])
    return values


def largest_of_blocks(values: torch.Tensor) -> torch.Tensor:
    """max|x| of every block."""
    whole = len(values) // BLOCK_VALUES
    end = whole * BLOCK_VALUES
    rows = values[:end].view(whole, BLOCK_VALUES)
    parts = [torch.maximum(rows.amax(1), rows.amin(1).neg_())] if whole else []
    if end < len(values):
        parts.append(values[end:].abs().amax().view(1))
    return torch.cat(parts) if parts else values.new_zeros(0)


def scale_blocks_(values: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply every block by its factor, in place."""
    whole = len(values) // BLOCK_VALUES
    end = whole * BLOCK_VALUES
    values[:end].view(whole, BLOCK_VALUES).mul_(factors[:whole, None])
    if end < len(values):
        values[end:].mul_(factors[whole])


def packed(values: Float32, generator: torch.Generator | None) -> PackedEntry:
    """``values`` (destroyed) in 8 bits, rounded stochastically; as they are without ``generator``."""
    if generator is None:
        return PackedEntry(values, None)
    codes, scales = torch.empty(len(values), dtype=torch.int8), torch.empty(num_blocks(len(values)))
    quantise_(torch.from_numpy(values), codes, scales, random_noise(len(values), generator))
    return PackedEntry(codes.numpy(), scales.numpy())
