"""``int2``: blocks of 128 values, each with two magnitudes, and 2 bits a value: 2.25 in all.

Decides the magnitudes and who gets which; the packing is `peer.rounds.codec_blocks`'s.

    low, high   two levels: the mean magnitudes of the smaller and of the larger values of a block
    code        bit 0: high; bit 1: negative
    decoded     +-low or +-high: a number is selected, nothing is rounded

The cut between smaller and larger is at first the mean magnitude, and then twice halfway between the two means (Lloyd's
algorithm). Class means fit by least squares, so whatever the cut, the squared error of a block of V values is at most
``1 - (1 - 2**-16) / V`` of its squared norm (plus 2**-252 a value, where levels below 2**-126 become 0): what is owed
never grows by encoding. On Gaussian values the error is 0.34 of the norm. A single scale for levels of +-1/3 and +-1,
in blocks of 64, takes as many bits and errs as much or more (Laplace: 0.43, here 0.42; nine of ten values 0: 0.79, here
0.41).

Canonical: some value is low; high is 0 where none is high, else above low; a low of 0 has no sign. Anything else is
refused, and what was decoded encodes to the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from peer.rounds.codec_blocks import BlockCodec, BlockFormat, Bytes, Float32, Levels, Mask, check_finite, nearest_levels

BLOCK_VALUES = 128
CUTS = 3

IS_HIGH, IS_LOW, IS_NEGATIVE_LOW = 1, 2, 4


def two_level_codec(name: str, block_values: int) -> BlockCodec:
    """This codec with blocks of another length."""
    return BlockCodec(
        BlockFormat(
            name=name,
            block_values=block_values,
            code_bits=2,
            weights=((1, 0, -1, 0), (0, 1, 0, -1)),
            marks=(IS_LOW, IS_HIGH, IS_LOW | IS_NEGATIVE_LOW, IS_HIGH),
            fit=_fit,
            allowed=_allowed,
        )
    )


def _fit(blocks_BV: Float32) -> tuple[Levels, Bytes]:
    """(low and high [B, 2], codes [B, V])."""
    magnitudes_BV = np.abs(blocks_BV)
    with np.errstate(over="ignore"):
        total_B = np.einsum("bv->b", magnitudes_BV)
    if not np.isfinite(total_B).all():
        check_finite(magnitudes_BV.max(axis=1))
        # Finite, but their sum is not: the same in twice the bits.
        low_B, high_B, is_high_BV = _class_means(magnitudes_BV.astype(np.float64))
    else:
        low_B, high_B, is_high_BV = _class_means(magnitudes_BV)
    levels_B2 = nearest_levels(np.stack([low_B, high_B], axis=1))
    # One class alone is the low one: where all are high, or both means round to one level.
    levels_B2[:, 0] = np.where(is_high_BV.all(axis=1), levels_B2[:, 1], levels_B2[:, 0])
    is_one_class = levels_B2[:, 0] >= levels_B2[:, 1]
    levels_B2[is_one_class, 1] = 0
    if is_one_class.any():
        is_high_BV &= ~is_one_class[:, None]
    is_negative_BV = blocks_BV < 0
    if not levels_B2[:, 0].all():
        is_negative_BV &= is_high_BV | (levels_B2[:, :1] != 0)
    return levels_B2, is_high_BV.view(np.uint8) | is_negative_BV.view(np.uint8) << np.uint8(1)


def _class_means(magnitudes_BV: npt.NDArray[Any]) -> tuple[Float32, Float32, Mask]:
    """(mean of the smaller, mean of the larger [B], which are larger [B, V]); the mean of nobody is 0.

    Each class is summed by itself: the sum of equal levels is exact, and so is their mean.
    """
    kind = magnitudes_BV.dtype
    cut_B = np.einsum("bv->b", magnitudes_BV) / kind.type(magnitudes_BV.shape[1])
    for _ in range(CUTS):
        is_high_BV = magnitudes_BV > cut_B[:, None]
        one_if_high_BV = is_high_BV.astype(kind)
        num_high_B = np.einsum("bv->b", one_if_high_BV)
        high_B = np.einsum("bv,bv->b", magnitudes_BV, one_if_high_BV) / np.maximum(num_high_B, 1)
        num_low_B = kind.type(magnitudes_BV.shape[1]) - num_high_B
        low_B = np.einsum("bv,bv->b", magnitudes_BV, 1 - one_if_high_BV) / np.maximum(num_low_B, 1)
        cut_B = (low_B + high_B) / 2
    return low_B.astype(np.float32), high_B.astype(np.float32), is_high_BV


def _allowed(levels_B2: Levels, marks_B: Bytes) -> Mask:
    low_B, high_B = levels_B2[:, 0], levels_B2[:, 1]
    has_high = marks_B & IS_HIGH != 0
    fits = np.where(has_high, low_B < high_B, high_B == 0) & (marks_B & IS_LOW != 0)
    allowed_B: Mask = fits & ((low_B != 0) | (marks_B & IS_NEGATIVE_LOW == 0))
    return allowed_B


INT2 = two_level_codec("int2", BLOCK_VALUES)
