"""``int8``: blocks of 256 values, each with one scale, and 8 bits a value: 8.125 in all.

Decides its bytes, its error bound and what decoding refuses.

    scales   num_blocks x fp32, little endian: max|x| / 127
    codes    num_values x int8, from -127 to 127

    encode   code = round_half_even(x / scale)          decode   x = code * scale

The scale is fp32: fp16 would save 0.8 % of the bytes, and its range ends at 6e-8, above what pseudo-gradients can be.
Every value is within ``scale * (0.5 + 2**-16)`` of what was encoded (a half step, and the rounding of the division).
A block whose scale would be below the smallest normal fp32 number (values under 1.5e-36) is written as zeros, and a
decoder refuses such scales: so decoding never meets a subnormal number, which some processors flush to zero, and is
one IEEE multiplication of normal numbers: the same bits on every machine.

An encoder gives the largest value of a block a code of 127 or -127: a block without one, with a code of -128, or with
codes that are not 0 under a scale of 0, is refused. The last block may be shorter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from peer.rounds.codec_blocks import TILE_VALUES, Float32, check_finite, check_vector, refuse
from swarm.errors import ProtocolError

BLOCK_VALUES = 256
SCALE_BYTES = 4
MAX_CODE = 127
SMALLEST_SCALE = np.finfo(np.float32).tiny
# One step below the quotient, which is rounded up: 127 times it would overflow.
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(MAX_CODE), np.float32(0))
# A block with one value of the norm, and half a step of error in each.
LARGEST_LOSS = math.sqrt(BLOCK_VALUES) * (0.5 + 2**-16) / MAX_CODE
TILE_BLOCKS = TILE_VALUES // BLOCK_VALUES


def encoded_size(num_values: int) -> int:
    """Bytes of ``num_values`` values in ``int8``."""
    return SCALE_BYTES * _num_blocks(num_values) + num_values


def encode(values: Float32) -> bytes:
    """``values`` (float32, one dimension) in ``int8``. Raises `SwarmError` where a value is not finite."""
    check_vector(values)
    num_values, num_blocks = len(values), _num_blocks(len(values))
    # uint8, as the buffer is bytes in the end: scales in front, codes behind.
    encoded = np.empty(encoded_size(num_values), np.uint8)
    scales = encoded[: SCALE_BYTES * num_blocks].view("<f4")
    codes = encoded[SCALE_BYTES * num_blocks :].view(np.int8)
    whole = num_values // BLOCK_VALUES
    for first in range(0, whole, TILE_BLOCKS):
        last = min(first + TILE_BLOCKS, whole)
        span = slice(first * BLOCK_VALUES, last * BLOCK_VALUES)
        scales[first:last], tile = _encode_blocks(values[span].reshape(-1, BLOCK_VALUES))
        codes[span] = tile.reshape(-1)
    if whole < num_blocks:
        span = slice(whole * BLOCK_VALUES, num_values)
        scales[whole:], tile = _encode_blocks(values[span].reshape(1, -1))
        codes[span] = tile.reshape(-1)
    return encoded.tobytes()


def decode(data: bytes | memoryview, num_values: int) -> Float32:
    """The float32 vector of ``num_values`` values in ``data``.

    Raises `ProtocolError` for bytes that no encoder writes: another size, a scale that is negative, subnormal, not
    finite or too large for its codes, or a block whose largest code does not fit its scale.
    """
    num_blocks = _num_blocks(num_values)
    scales, codes = _checked(data, num_values)
    decoded = np.empty(num_values, np.float32)
    whole = num_values // BLOCK_VALUES
    for first in range(0, whole, TILE_BLOCKS):
        last = min(first + TILE_BLOCKS, whole)
        span = slice(first * BLOCK_VALUES, last * BLOCK_VALUES)
        tile = decoded[span].reshape(-1, BLOCK_VALUES)
        tile[:] = codes[span].reshape(-1, BLOCK_VALUES)
        np.multiply(tile, scales[first:last, None], out=tile)
    if whole < num_blocks:
        rest = slice(whole * BLOCK_VALUES, num_values)
        decoded[rest] = codes[rest]
        np.multiply(decoded[rest], scales[whole], out=decoded[rest])
    return decoded


def check(data: bytes | memoryview, num_values: int) -> None:
    """Raise what `decode` would raise; decode nothing."""
    _checked(data, num_values)


def spans(num_values: int, first: int, last: int) -> tuple[slice, ...]:
    """Where values ``first`` to ``last`` (excluded), whole blocks, lie among ``num_values``: scales and codes."""
    codes = SCALE_BYTES * _num_blocks(num_values)
    return slice(SCALE_BYTES * _num_blocks(first), SCALE_BYTES * _num_blocks(last)), slice(codes + first, codes + last)


def _checked(data: bytes | memoryview, num_values: int) -> tuple[Float32, npt.NDArray[np.int8]]:
    """(scales, codes) of ``data``, as views."""
    if num_values < 0 or len(data) != encoded_size(num_values):
        raise ProtocolError(f"{len(data)} bytes do not hold {num_values} values in the codec int8")
    num_blocks = _num_blocks(num_values)
    scales = np.frombuffer(data, "<f4", num_blocks).astype(np.float32, copy=False)
    codes = np.frombuffer(data, np.int8, num_values, SCALE_BYTES * num_blocks)
    _check_scales(scales)
    whole = num_values // BLOCK_VALUES
    largest = np.zeros(num_blocks, np.uint8)  # |-128| is 128 as a uint8, and fits no scale
    blocks = codes[: whole * BLOCK_VALUES].reshape(-1, BLOCK_VALUES)
    for first in range(0, whole, TILE_BLOCKS):
        tile = slice(first, min(first + TILE_BLOCKS, whole))
        np.max(np.abs(blocks[tile]).view(np.uint8), axis=1, out=largest[tile])
    if whole < num_blocks:
        largest[whole] = np.abs(codes[whole * BLOCK_VALUES :]).view(np.uint8).max()
    if not (largest == np.where(scales == 0, 0, MAX_CODE)).all():
        refuse("codes")
    return scales, codes


def _num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)


def _encode_blocks(blocks_BV: Float32) -> tuple[Float32, Float32]:
    """(scales of B blocks, codes as whole float32 numbers of shape [B, V])."""
    work_BV = np.abs(blocks_BV)
    largest_B = work_BV.max(axis=1)  # NaN wins every maximum, so this one check sees every value
    check_finite(largest_B)
    scales_B = np.minimum(largest_B / np.float32(MAX_CODE), LARGEST_SCALE)
    empty_B = scales_B < SMALLEST_SCALE
    divisors_B = np.where(empty_B, np.float32(1), scales_B)
    np.divide(blocks_BV, divisors_B[:, None], out=work_BV)
    np.rint(work_BV, out=work_BV)
    scales_B[empty_B] = 0
    return scales_B, work_BV


def _check_scales(scales: npt.NDArray[Any]) -> None:
    fits = (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)  # false for NaN
    if not (fits | (scales.view(np.uint32) == 0)).all():
        refuse("a scale")
