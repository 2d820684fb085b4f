"""The wire codecs: fp32 vectors to few bytes and back, as pure function pairs.

Decides which codecs there are. Each has its own module, which says its bytes, its error bound and what it refuses;
`peer.rounds.codec_blocks` has what the dense ones share. Leaves error feedback, weights and what is sent to whom to the
round. One outlier spoils its own block or chunk, never the vector.

    int8    8.125 bits a value     blocks of 256, one scale
    int4    4.25                   blocks of 64, one scale
    int2    2.25                   blocks of 128, two magnitudes
    topk    0.227                  64 of each 4096 values, two magnitudes

Rules of all: what is encoded must be finite; decoding multiplies by, or selects, numbers that are zero or normal, so
its bits are the same on every machine; bytes that no encoder writes are refused when they arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peer.rounds import codec_int4, codec_int8, codec_topk
from peer.rounds.codec_blocks import Float32
from peer.rounds.codec_int2 import INT2
from peer.rounds.codec_int4 import INT4
from swarm.files import Kept

__all__ = ["CODECS", "Codec", "Float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """A pure pair. ``decode(encode(x), len(x))`` has the error bound that the codec's module states."""

    name: str
    block_values: int
    """values that are encoded together: vectors are cut at multiples of it, or bytes change"""
    sparse: bool
    """most values are not sent at all: for contributions, never for averages"""
    encode: Callable[[Float32], bytes]
    """raises `SwarmError` where a value is not finite"""
    decode: Callable[[bytes | memoryview, int], Float32]
    """(data, num_values); raises `ProtocolError` for bytes that no encoder writes"""
    largest_loss: float
    """norm of what encoding loses, over the norm of what is encoded: it is never more"""
    check: Callable[[bytes | memoryview, int], None]
    """raises what `decode` would raise, at a fraction of its cost"""
    encoded_size: Callable[[int], int]
    """bytes of so many values"""
    spans: Callable[[int, int, int], tuple[slice, ...]]
    """(n, first, last): which bytes of n encoded values, one after another, are what `encode` makes of values first to
    last; ``first`` begins a block, ``last`` ends one or is n"""

    def cut(self, data: Kept, num_values: int, first: int, last: int) -> bytes:
        """What `encode` makes of values ``first`` to ``last`` (excluded), read from ``data`` without the rest of it."""
        return b"".join(data[span] for span in self.spans(num_values, first, last))


CODECS: dict[str, Codec] = {
    "int8": Codec(
        name="int8",
        block_values=codec_int8.BLOCK_VALUES,
        sparse=False,
        largest_loss=codec_int8.LARGEST_LOSS,
        encode=codec_int8.encode,
        decode=codec_int8.decode,
        check=codec_int8.check,
        encoded_size=codec_int8.encoded_size,
        spans=codec_int8.spans,
    ),
    "int4": Codec(
        name="int4",
        block_values=INT4.block_values,
        sparse=False,
        largest_loss=codec_int4.LARGEST_LOSS,
        encode=INT4.encode,
        decode=INT4.decode,
        check=INT4.check,
        encoded_size=INT4.encoded_size,
        spans=INT4.spans,
    ),
    "int2": Codec(
        name="int2",
        block_values=INT2.block_values,
        sparse=False,
        largest_loss=1.0,
        encode=INT2.encode,
        decode=INT2.decode,
        check=INT2.check,
        encoded_size=INT2.encoded_size,
        spans=INT2.spans,
    ),
    "topk": Codec(
        name="topk",
        block_values=codec_topk.CHUNK_VALUES,
        sparse=True,
        largest_loss=1.0,
        encode=codec_topk.encode,
        decode=codec_topk.decode,
        check=codec_topk.check,
        encoded_size=codec_topk.encoded_size,
        spans=codec_topk.spans,
    ),
}
"""densest first"""
