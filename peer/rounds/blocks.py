"""A flat vector in 8 bits that every machine computes alike: outer momentum, and what a replica owes.

Decides the bytes and their arithmetic; what is kept in them, and when it changes, is `peer.rounds.shard`'s. The wire
has codecs of its own, `peer.rounds.codec`, which forget everything between two rounds; this is what lasts.

Blocks of 256 values (the last may be shorter), each with one fp32 scale = max|x| / 127. The bytes, one after another:

    scales   num_blocks x fp32, little endian
    codes    num_values x int8, from -127 to 127

    write    code = round_half_even(x / scale + dither)          read   x = code * scale

The dither is between -1/2 and 1/2, and is a table's: it depends on the round and the value's place alone. So a value is
within one code (its scale) of what was written, and *right on average over rounds*, to 2**-15 of a code. Rounding to
the nearest is within half a code, but errs to the same side every time: a small value that is added every round is
dropped every round, and what shrinks by less than half a code never shrinks (docs/decisions/0011). 0 stays 0.

Every operation is one elementwise IEEE operation in fp32, rounded on its own. A block whose scale would be below the
smallest normal number (values under 1.5e-36) is written as zeros, and such scales are refused, so that reading never
makes a subnormal number.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from peer.rounds.codec import Float32
from swarm.errors import ProtocolError, SwarmError

BLOCK_VALUES = 256
SCALE_BYTES = 4
MAX_CODE = 127
SMALLEST_SCALE = np.finfo(np.float32).tiny
# One step below the quotient, which is rounded up: 127 times it would overflow.
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(MAX_CODE), np.float32(0))
# Work on pieces that stay in cache; a power of two, as the dither repeats itself after so many values.
TILE_VALUES = 1 << 16
# Odd: the dither of a place comes back after 65,536 rounds.
_ROTATION = 40503


def size_bytes(num_values: int) -> int:
    return SCALE_BYTES * num_blocks(num_values) + num_values


def num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK_VALUES)


def tiles(values: slice) -> Iterator[slice]:
    """``values`` cut into pieces of at most `TILE_VALUES`."""
    for first in range(values.start, values.stop, TILE_VALUES):
        yield slice(first, min(first + TILE_VALUES, values.stop))


class Blocks:
    """``num_values`` values; ``data``: their bytes (uint8), zeros where none are given."""

    def __init__(self, num_values: int, data: npt.NDArray[np.uint8] | None = None) -> None:
        self.num_values = num_values
        self.data = np.zeros(size_bytes(num_values), np.uint8) if data is None else data
        if self.data.dtype != np.uint8 or self.data.shape != (size_bytes(num_values),):
            raise ProtocolError(f"{self.data.nbytes} bytes do not hold {num_values} values in 8 bits")
        split = SCALE_BYTES * num_blocks(num_values)
        self.scales = self.data[:split].view("<f4")
        self.codes = self.data[split:].view(np.int8)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def read(self, values: slice) -> Float32:
        """A fresh float32 vector. ``values`` is made of whole blocks."""
        read = np.empty(values.stop - values.start, np.float32)
        for tile in tiles(values):
            self.read_tile(tile, read[tile.start - values.start : tile.stop - values.start])
        return read

    def read_tile(self, values: slice, out: Float32) -> None:
        """Into ``out``, of as many values."""
        blocks = self._blocks(values)
        whole = len(out) // BLOCK_VALUES * BLOCK_VALUES
        out[:] = self.codes[values]
        rows_BV = out[:whole].reshape(-1, BLOCK_VALUES)
        np.multiply(rows_BV, self.scales[blocks.start : blocks.start + len(rows_BV), None], out=rows_BV)
        if whole < len(out):
            np.multiply(out[whole:], self.scales[blocks.stop - 1], out=out[whole:])

    def write(self, values: slice, vector: Float32, round_number: int) -> None:
        """``vector`` into ``values``, which is made of whole blocks; the dither is that of ``round_number``."""
        scratch = np.empty(min(TILE_VALUES, len(vector)), np.float32)
        for tile in tiles(values):
            piece = vector[tile.start - values.start : tile.stop - values.start]
            self.write_tile(tile, piece, round_number, scratch[: len(piece)])

    def write_tile(self, values: slice, tile: Float32, round_number: int, scratch: Float32) -> None:
        """At most `TILE_VALUES` values, with ``scratch`` as long. Raises `SwarmError` where one is not finite."""
        blocks = self._blocks(values)
        whole = len(tile) // BLOCK_VALUES * BLOCK_VALUES
        np.abs(tile, out=scratch)
        scales = self.scales[blocks]
        largest = np.empty(len(scales), np.float32)
        scratch[:whole].reshape(-1, BLOCK_VALUES).max(axis=1, out=largest[: whole // BLOCK_VALUES])
        if whole < len(tile):
            largest[-1] = scratch[whole:].max()
        if not np.isfinite(largest).all():  # NaN wins every maximum, so this one check sees every value
            raise SwarmError("values to be kept in 8 bits are not finite numbers")
        np.minimum(largest / np.float32(MAX_CODE), LARGEST_SCALE, out=scales)
        scales[scales < SMALLEST_SCALE] = 0
        divisors = np.where(scales == 0, np.float32(1), scales)
        rows_BV = scratch[:whole].reshape(-1, BLOCK_VALUES)
        np.divide(tile[:whole].reshape(-1, BLOCK_VALUES), divisors[: len(rows_BV), None], out=rows_BV)
        if whole < len(tile):
            np.divide(tile[whole:], divisors[-1], out=scratch[whole:])
        start = (values.start + _ROTATION * round_number) % TILE_VALUES
        np.add(scratch, _DITHER[start : start + len(tile)], out=scratch)
        np.rint(scratch, out=scratch)
        self.codes[values] = scratch

    def clear(self, values: slice) -> None:
        """Zeros into ``values``, which is made of whole blocks."""
        self.scales[self._blocks(values)] = 0
        self.codes[values] = 0

    def check(self) -> None:
        """Raise `ProtocolError` for bytes that `write` never makes.

        A scale is 0 or a normal number that its codes cannot carry to infinity; no code is -128; the largest code of a
        block is 127, or 0 where its scale is 0.
        """
        fits = (self.scales >= SMALLEST_SCALE) & (self.scales <= LARGEST_SCALE)  # false for NaN
        if not (fits | (self.scales.view("<u4") == 0)).all():
            raise ProtocolError("values in 8 bits with a scale that no encoder writes")
        for tile in tiles(slice(0, self.num_values)):
            starts = np.arange(0, tile.stop - tile.start, BLOCK_VALUES)
            high = np.maximum.reduceat(self.codes[tile], starts)
            low = np.minimum.reduceat(self.codes[tile], starts)
            if low.min() < -MAX_CODE:
                raise ProtocolError("values in 8 bits with a code that no encoder writes")
            expected = np.where(self.scales[self._blocks(tile)] == 0, 0, MAX_CODE)
            if (np.maximum(high, -low) != expected).any():
                raise ProtocolError("values in 8 bits with a block whose codes do not fit its scale")

    def _blocks(self, values: slice) -> slice:
        if values.start % BLOCK_VALUES or (values.stop % BLOCK_VALUES and values.stop != self.num_values):
            raise SwarmError("values in 8 bits are read and written in whole blocks")
        return slice(values.start // BLOCK_VALUES, num_blocks(values.stop))


def _make_dither() -> Float32:
    """One tile's dither, twice, so that a tile may begin anywhere: integers mixed, 16,384 levels, 0 not among them.

    With so few levels the largest quotient, 127 and the rounding of a division, stays below 127.5 with any of them.
    """
    mixed = np.arange(TILE_VALUES, dtype=np.uint32)
    for factor, shift in ((2654435761, 15), (2246822519, 13), (3266489917, 16)):
        mixed *= np.uint32(factor)
        mixed ^= mixed >> np.uint32(shift)
    levels = (mixed >> np.uint32(18)).astype(np.float32)
    return np.tile((levels + np.float32(0.5)) * np.float32(2**-14) - np.float32(0.5), 2)


_DITHER = _make_dither()
