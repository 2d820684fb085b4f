"""``int4``: blocks of 64 values, each with one scale, and 4 bits a value: 4.25 in all.

Decides scale and codes; the packing is `peer.rounds.codec_blocks`'s.

    scale    the smallest level that is not below max|x| / 7
    code     round_half_even(x / scale), from -7 to 7, in two's complement
    decoded  code * scale: one multiplication of normal numbers, and exact

Every value is within ``scale * (0.5 + 2**-16)`` of what was encoded, and the scale at most ``2**-7`` above max|x| / 7.
A block whose scale would be below 2**-126 is written as zeros. The scale has 8 bits of precision and not
24: that pays for blocks half as long, and blocks of 64 err a tenth less than blocks of 128.

An encoder gives the largest value of a block a code of 7 or -7: a block without one, with a code of -8, or with codes
that are not 0 under a scale of 0, is refused. So what was decoded encodes to the same bytes.
"""

from __future__ import annotations

import math

import numpy as np

from peer.rounds.codec_blocks import (
    BlockCodec,
    BlockFormat,
    Bytes,
    Float32,
    Levels,
    Mask,
    check_finite,
    level_values,
    next_levels,
)

BLOCK_VALUES = 64
MAX_CODE = 7
# A block with one value of the norm, and half a step of error in each.
LARGEST_LOSS = math.sqrt(BLOCK_VALUES) * (0.5 + 2**-16) * (1 + 2**-7) / MAX_CODE
# 7 times the next level would overflow.
LARGEST_SCALE_LEVEL = int((np.finfo(np.float32).max / np.float32(MAX_CODE)).view(np.uint32) >> 16)
# Adding 1.5 * 2**23 rounds a small number to an integer, half to even, and leaves it in the low bits of the sum.
ROUNDER = np.float32(3 << 22)

IS_FULL, IS_OTHER, IS_UNUSED = 1, 2, 4


def _fit(blocks_BV: Float32) -> tuple[Levels, Bytes]:
    """(scales [B, 1], codes [B, V])."""
    work_BV = np.abs(blocks_BV)
    largest_B = work_BV.max(axis=1)  # NaN wins every maximum, so this one check sees every value
    check_finite(largest_B)
    levels_B = next_levels(largest_B / np.float32(MAX_CODE), LARGEST_SCALE_LEVEL)
    divisors_B = np.where(levels_B == 0, np.float32(1), level_values(levels_B))
    np.divide(blocks_BV, divisors_B[:, None], out=work_BV)
    np.add(work_BV, ROUNDER, out=work_BV)
    return levels_B[:, None], work_BV.view(np.uint32).astype(np.uint8) & np.uint8(15)


def _allowed(levels_B1: Levels, marks_B: Bytes) -> Mask:
    levels_B = levels_B1[:, 0]
    is_full_B = (levels_B <= LARGEST_SCALE_LEVEL) & (marks_B & np.uint8(IS_FULL | IS_UNUSED) == IS_FULL)
    allowed_B: Mask = np.where(levels_B == 0, marks_B == 0, is_full_B)
    return allowed_B


CODES = (0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)

INT4 = BlockCodec(
    BlockFormat(
        name="int4",
        block_values=BLOCK_VALUES,
        code_bits=4,
        weights=(CODES,),
        marks=tuple(
            IS_UNUSED if code == -8 else IS_FULL if abs(code) == MAX_CODE else IS_OTHER if code else 0 for code in CODES
        ),
        fit=_fit,
        allowed=_allowed,
    )
)
