"""``topk``: of each chunk of 4096 values the 64 largest by magnitude, at 2 bits each (SparseLoCo, arXiv 2508.15706).

Decides which values are sent, and how their places are written. The values themselves are `peer.rounds.codec_int2`'s,
in blocks of the 64 of a chunk. 116 bytes a chunk: 0.227 bits a value, 141 times less than fp32.

    places   12 bits each, rising within a chunk, two in three bytes, little endian; the rest of the last byte is 0
    values   as ``int2`` in blocks of 64

The last chunk may be shorter, and has as many of its values as it can, up to 64. Of equal magnitudes those in front go
first. A chunk's squared error is at most its squared norm (plus 2**-252 a value, as in ``int2``); what is not sent is
owed in full.

Canonical: places rise within their chunk; where low is 0, the low ones are the first that are not high. Anything else
is refused, and what was decoded encodes to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from peer.rounds.codec_blocks import TILE_VALUES, Bytes, Float32, check_vector, refuse
from peer.rounds.codec_int2 import two_level_codec
from swarm.errors import ProtocolError

CHUNK_VALUES = 4096
KEPT_VALUES = 64

Places = npt.NDArray[np.int64]

VALUES = two_level_codec("topk", KEPT_VALUES)


def encoded_size(num_values: int) -> int:
    """Bytes of ``num_values`` values in ``topk``."""
    kept = _num_kept(num_values)
    return _places_size(kept) + VALUES.encoded_size(kept)


def encode(values: Float32) -> bytes:
    """``values`` (float32, one dimension) in ``topk``. Raises `SwarmError` where a value is not finite."""
    check_vector(values)
    places = np.empty(_num_kept(len(values)), np.int64)
    for chunks, kept in _tiles(len(values)):
        places[kept] = _largest(values[chunks], chunks)
    encoded = VALUES.encode(values[places])  # NaN and infinities are the largest of all: this refuses them
    decoded = VALUES.decode(encoded, len(places))
    if not decoded.all():
        places, decoded = _zeros_in_front(places, decoded, len(values))
        encoded = VALUES.encode(decoded)
    return _pack(places % CHUNK_VALUES).tobytes() + encoded


def decode(data: bytes | memoryview, num_values: int) -> Float32:
    """The float32 vector of ``num_values`` values in ``data``; `ProtocolError` for bytes that no encoder writes."""
    places, kept_values = _checked(data, num_values)
    decoded = np.zeros(num_values, np.float32)
    decoded[places] = kept_values
    return decoded


def check(data: bytes | memoryview, num_values: int) -> None:
    """Raise what `decode` would raise; the vector itself is not made."""
    _checked(data, num_values)


def spans(num_values: int, first: int, last: int) -> tuple[slice, ...]:
    """Where values ``first`` to ``last`` (excluded), whole chunks, lie among ``num_values``: places, then `int2`'s."""
    kept_first, kept_last, num_kept = _num_kept(first), _num_kept(last), _num_kept(num_values)
    end = _places_size(num_kept)
    values = VALUES.spans(num_kept, kept_first, kept_last)
    return (
        slice(_places_size(kept_first), _places_size(kept_last)),
        *(slice(end + span.start, end + span.stop) for span in values),
    )


def _checked(data: bytes | memoryview, num_values: int) -> tuple[Places, Float32]:
    """(places in the whole vector, their values) of ``data``."""
    if num_values < 0 or len(data) != encoded_size(num_values):
        raise ProtocolError(f"{len(data)} bytes do not hold {num_values} values in the codec topk")
    num_kept = _num_kept(num_values)
    end = _places_size(num_kept)
    kept_values = VALUES.decode(memoryview(data)[end:], num_kept)
    packed = np.frombuffer(data, np.uint8, end)
    places = _unpack(packed, num_kept)
    places += np.arange(num_kept) // KEPT_VALUES * CHUNK_VALUES
    # Every place is below 4096, so places that rise all along rise within each chunk.
    if (places[1:] <= places[:-1]).any() or (num_kept and places[-1] >= num_values):
        refuse("places")
    if num_kept % 2 and packed[-1] >> 4:
        refuse("places")
    if not kept_values.all() and (_zeros_in_front(places, kept_values, num_values)[0] != places).any():
        refuse("places of zeros")
    return places, kept_values


def _largest(values: Float32, chunks: slice) -> Places:
    """Places, in the whole vector, of what is kept of some chunks of one length."""
    length = min(CHUNK_VALUES, len(values))
    num_kept = min(KEPT_VALUES, length)
    # Numbers that are not negative are in the order of their bits, and integers are partitioned faster.
    bits_CV = np.abs(values).view(np.int32).reshape(-1, length)
    smallest_C1 = np.partition(bits_CV, length - num_kept, axis=1)[:, length - num_kept, None]
    places = np.flatnonzero(bits_CV >= smallest_C1)
    if len(places) != num_kept * len(bits_CV):
        above_CV, equal_CV = bits_CV > smallest_C1, bits_CV == smallest_C1
        room_C1 = num_kept - np.count_nonzero(above_CV, axis=1, keepdims=True)
        places = np.flatnonzero(above_CV | (equal_CV & (np.cumsum(equal_CV, axis=1) <= room_C1)))
    in_vector: Places = places + chunks.start
    return in_vector


def _zeros_in_front(places: Places, kept_values: Float32, num_values: int) -> tuple[Places, Float32]:
    """(places, values) with zeros at the first places of their chunk that have no other value."""
    new_places, new_values = places.copy(), kept_values.copy()
    for chunks, kept in _tiles(num_values):
        if not kept_values[kept].all():
            tile = np.zeros(chunks.stop - chunks.start, np.float32)
            tile[places[kept] - chunks.start] = kept_values[kept]
            new_places[kept] = _largest(tile, chunks)
            new_values[kept] = tile[new_places[kept] - chunks.start]
    return new_places, new_values


def _tiles(num_values: int) -> Iterator[tuple[slice, slice]]:
    """(values, which of the kept they are): whole chunks by the tile, then a shorter one by itself."""
    whole = num_values // CHUNK_VALUES * CHUNK_VALUES
    for first in range(0, whole, TILE_VALUES):
        last = min(first + TILE_VALUES, whole)
        yield slice(first, last), slice(_num_kept(first), _num_kept(last))
    if whole < num_values:
        yield slice(whole, num_values), slice(_num_kept(whole), _num_kept(num_values))


def _num_kept(num_values: int) -> int:
    whole, rest = divmod(num_values, CHUNK_VALUES)
    return KEPT_VALUES * whole + min(KEPT_VALUES, rest)


def _places_size(num_kept: int) -> int:
    return -(-num_kept * 3 // 2)


def _pack(places: Places) -> Bytes:
    pairs = np.zeros((-(-len(places) // 2), 2), "<u4")
    pairs.reshape(-1)[: len(places)] = places
    together = pairs[:, 0] | pairs[:, 1] << 12
    packed: Bytes = together.view(np.uint8).reshape(-1, 4)[:, :3].reshape(-1)
    return packed[: _places_size(len(places))]


def _unpack(packed: Bytes, num_kept: int) -> Places:
    triples = np.zeros((-(-num_kept // 2), 3), np.int64)
    triples.reshape(-1)[: len(packed)] = packed
    places = np.stack([triples[:, 0] | (triples[:, 1] & 15) << 8, triples[:, 1] >> 4 | triples[:, 2] << 4], axis=1)
    return places.reshape(-1)[:num_kept]
