"""Codes of 2 or 4 bits in blocks: what int4, int2 and the values of topk share.

Decides how levels and codes are packed, and how bytes are checked. Leaves to a `BlockFormat` which levels fit a block
best and which codes they get.

    levels   num_blocks x levels per block x 16 bits, little endian: the upper half of an fp32 number (bfloat16)
    codes    num_values x 2 or 4 bits, from the low end of each byte; the rest of the last byte is 0

A level is 0 or a normal number from 2**-126 to 2**127 * (2 - 2**-7): decoding never meets a subnormal number, which
some processors flush to zero. 8 significant bits times a code of 3 are exact in fp32, so decoding rounds nothing.
The last block may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from swarm.errors import ProtocolError, SwarmError

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]

LEVEL_BYTES = 2
SMALLEST_LEVEL = 0x0080
LARGEST_LEVEL = 0x7F7F
# Values that are worked on at once: 64 Ki of them stay in a core's second-level cache.
TILE_VALUES = 1 << 16
# How a byte says that its unused end is not 0; the other marks are the format's.
BAD_PADDING = 0x80
# Elements of as many float32 numbers as a byte has codes: one look-up per byte decodes all of them.
GROUPS: dict[int, Any] = {2: np.dtype(np.complex64), 4: np.dtype(np.complex128)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """How one block becomes levels and codes. A value decodes to the sum of ``weights[l][code] * level[l]``."""

    name: str
    block_values: int
    code_bits: int
    weights: tuple[tuple[int, ...], ...]
    """[levels per block][codes]; of a code's weights at most one is not 0"""
    marks: tuple[int, ...]
    """[codes]: bits below `BAD_PADDING` that say what is in a block; a block has those of all its codes"""
    fit: Callable[[Float32], tuple[Levels, Bytes]]
    """blocks [B, V] -> (levels [B, L], codes [B, V])"""
    allowed: Callable[[Levels, Bytes], Mask]
    """(levels [B, L], marks [B]) -> which of these blocks an encoder writes"""


class BlockCodec:
    def __init__(self, form: BlockFormat) -> None:
        self.name = form.name
        self.block_values = form.block_values
        self._form = form
        self._per_byte = 8 // form.code_bits
        self._num_levels = len(form.weights)
        codes = np.arange(256)[:, None] >> (np.arange(self._per_byte) * form.code_bits) & ((1 << form.code_bits) - 1)
        group = GROUPS[self._per_byte]
        self._weights = [np.array(w, np.float32)[codes].view(group).reshape(256) for w in form.weights]
        marks = np.array(form.marks, np.uint8)[codes]
        # [codes in use of the byte][byte]: a last byte that is not full has an end that must be 0.
        self._marks = [
            np.bitwise_or.reduce(marks[:, :used], axis=1)
            | np.where(codes[:, used:].any(axis=1), BAD_PADDING, 0).astype(np.uint8)
            for used in range(self._per_byte + 1)
        ]

    def encoded_size(self, num_values: int) -> int:
        """Bytes of ``num_values`` values."""
        return LEVEL_BYTES * self._num_levels * self._num_blocks(num_values) + -(-num_values // self._per_byte)

    def encode(self, values: Float32) -> bytes:
        """``values`` (float32, one dimension) in bytes. Raises `SwarmError` where a value is not finite."""
        check_vector(values)
        encoded = np.empty(self.encoded_size(len(values)), np.uint8)
        levels, packed = self._split(encoded, len(values))
        for blocks, rows, span in self._tiles(len(values)):
            levels[blocks], codes = self._form.fit(values[span].reshape(rows, -1))
            packed[self._bytes(span)] = self._pack(codes.reshape(-1))
        return encoded.tobytes()

    def decode(self, data: bytes | memoryview, num_values: int) -> Float32:
        """The float32 vector of ``num_values`` values in ``data``; `ProtocolError` for bytes that no encoder writes."""
        self.check(data, num_values)
        level_bits, packed = self._split(np.frombuffer(data, np.uint8), num_values)
        levels = level_values(level_bits)
        decoded = np.empty(-(-num_values // self._per_byte) * self._per_byte, np.float32)
        groups = decoded.view(GROUPS[self._per_byte])
        scratch = np.empty(min(TILE_VALUES, len(decoded)), np.float32)
        for blocks, rows, span in self._tiles(num_values):
            here = self._bytes(span)
            first_weights, *other_weights = self._weights
            # "clip" only because "raise" would copy: a byte is always within the 256 entries.
            np.take(first_weights, packed[here], out=groups[here], mode="clip")
            tile = decoded[span].reshape(rows, -1)
            np.multiply(tile, levels[blocks, :1], out=tile)
            for level, weights in enumerate(other_weights, start=1):
                more = scratch[: len(packed[here]) * self._per_byte]
                np.take(weights, packed[here], out=more.view(groups.dtype), mode="clip")
                term = more[: tile.size].reshape(rows, -1)
                np.multiply(term, levels[blocks, level : level + 1], out=term)
                np.add(tile, term, out=tile)
        return decoded[:num_values]

    def check(self, data: bytes | memoryview, num_values: int) -> None:
        """Raise what `decode` would raise; decode nothing."""
        if num_values < 0 or len(data) != self.encoded_size(num_values):
            raise ProtocolError(f"{len(data)} bytes do not hold {num_values} values in the codec {self.name}")
        levels, packed = self._split(np.frombuffer(data, np.uint8), num_values)
        if not num_values:
            return
        if not ((levels == 0) | ((levels >= SMALLEST_LEVEL) & (levels <= LARGEST_LEVEL))).all():
            refuse("a scale")
        marks = np.take(self._marks[self._per_byte], packed, mode="clip")
        marks[-1] = self._marks[(num_values - 1) % self._per_byte + 1][packed[-1]]
        whole, block_bytes = num_values // self.block_values, self.block_values // self._per_byte
        block_marks = np.empty(len(levels), np.uint8)
        whole_marks = marks[: whole * block_bytes].reshape(whole, block_bytes)
        np.bitwise_or.reduce(whole_marks, axis=1, out=block_marks[:whole])
        block_marks[whole:] = np.bitwise_or.reduce(marks[whole * block_bytes :])
        if not ((block_marks & BAD_PADDING == 0) & self._form.allowed(levels, block_marks)).all():
            refuse("codes")

    def spans(self, num_values: int, first: int, last: int) -> tuple[slice, ...]:
        """Where values ``first`` to ``last`` (excluded), whole blocks, lie among ``num_values``: levels and codes."""
        size = LEVEL_BYTES * self._num_levels
        end, codes = size * self._num_blocks(num_values), self._bytes(slice(first, last))
        levels = slice(size * self._num_blocks(first), size * self._num_blocks(last))
        return levels, slice(end + codes.start, end + codes.stop)

    def _num_blocks(self, num_values: int) -> int:
        return -(-num_values // self.block_values)

    def _split(self, encoded: Bytes, num_values: int) -> tuple[Levels, Bytes]:
        """(levels, packed codes) as views."""
        end = LEVEL_BYTES * self._num_levels * self._num_blocks(num_values)
        return encoded[:end].view("<u2").reshape(-1, self._num_levels), encoded[end:]

    def _tiles(self, num_values: int) -> Iterator[tuple[slice, int, slice]]:
        """(blocks, how many, their values): whole blocks by the tile, then a shorter one by itself."""
        whole, step = num_values // self.block_values, TILE_VALUES // self.block_values
        for first in range(0, whole, step):
            last = min(first + step, whole)
            yield slice(first, last), last - first, slice(first * self.block_values, last * self.block_values)
        if num_values % self.block_values:
            yield slice(whole, whole + 1), 1, slice(whole * self.block_values, num_values)

    def _bytes(self, span: slice) -> slice:
        return slice(span.start // self._per_byte, -(-span.stop // self._per_byte))

    def _pack(self, codes: Bytes) -> Bytes:
        rest = -len(codes) % self._per_byte
        whole = np.concatenate([codes, np.zeros(rest, np.uint8)]) if rest else codes
        # The codes of one byte are the bytes of one word: shift each onto the ones before it.
        words = whole.view(f"<u{self._per_byte}")
        together = words | words >> 4 if self._per_byte == 2 else words | words >> 6 | words >> 12 | words >> 18
        packed: Bytes = together.astype(np.uint8)
        return packed


def check_vector(values: Float32) -> None:
    """Raise `SwarmError` unless ``values`` is one float32 vector."""
    if values.ndim != 1 or values.dtype != np.float32:
        raise SwarmError(f"the codec takes one float32 vector, not {values.dtype} of shape {values.shape}")


def check_finite(largest: Float32) -> None:
    """Raise `SwarmError` unless the largest magnitudes of some values, and so all of them, are finite."""
    if not np.isfinite(largest).all():
        raise SwarmError(
            "values to be sent are not finite numbers", "training diverged here; leave, and join again with the anchor"
        )


def refuse(what: str) -> NoReturn:
    raise ProtocolError(f"encoded values hold {what} that no encoder writes")


def level_values(levels: Levels) -> Float32:
    """Levels as float32 numbers."""
    return (levels.astype(np.uint32) << 16).view(np.float32)


def nearest_levels(magnitudes: Float32) -> Levels:
    """Levels nearest to non-negative numbers (ties to even), 0 below the smallest level, the largest above it."""
    bits = magnitudes.view(np.uint32)
    return _within_range((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16)


def next_levels(magnitudes: Float32, largest: int = LARGEST_LEVEL) -> Levels:
    """Levels not below non-negative numbers, but 0 below the smallest level and ``largest`` above that."""
    return _within_range((magnitudes.view(np.uint32) + np.uint32(0xFFFF)) >> 16, largest)


def _within_range(levels: npt.NDArray[Any], largest: int = LARGEST_LEVEL) -> Levels:
    return np.where(levels < SMALLEST_LEVEL, 0, np.minimum(levels, largest)).astype(np.uint16)
