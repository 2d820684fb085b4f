"""A shard's shared state and a replica's debt to it: anchor, outer momentum, error feedback.

Decides what a commit does to them; all arithmetic is `peer.rounds.outer`'s and the codec's. Pure numpy on the host, no
I/O; the callers keep it off the event loop.

Error feedback is exact (docs/protocol.md): what a commit counted leaves only its encoding error behind, what it did
not count stays owed in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from peer.rounds.codec import CODECS, Codec, Float32
from peer.rounds.outer import TILE_VALUES, outer_step, weighted_mean
from peer.rounds.planning import SLICE_VALUES, num_slices, part_values
from peer.rounds.round_actions import Reduce
from peer.training.movement import Movement
from swarm import digest, schedule
from swarm.errors import DigestError, ProtocolError, SwarmError
from swarm.proto.round_pb2 import OpenRound, Part, PartResult, Record, Share
from swarm.run_spec import RunSpec


@dataclass(slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica between two inner steps, kept until its round is decided: each attempt of the round offers it."""

    movement: Movement
    """what is offered: the replica's movement since the anchor"""
    tokens: int
    """tokens trained since the last snapshot that a commit counted"""
    was_reset: bool = False
    """the replica was put back onto the anchor since: what it does now is not measured from this snapshot"""


class Shard:
    """One shard's state of round ``round``. ``anchor``, ``momentum``, ``feedback``: float32 [num_values]."""

    def __init__(self, spec: RunSpec, index: int, anchor: Float32, momentum: Float32 | None = None) -> None:
        self.spec = spec
        self.index = index
        self.anchor = anchor
        self.momentum = momentum if momentum is not None else np.zeros_like(anchor)
        self.feedback: Float32 = np.zeros_like(anchor)
        self.codec: Codec = CODECS[spec.rounds.wire_codec]
        if SLICE_VALUES % self.codec.block_values:
            raise SwarmError(f"the blocks of codec {self.codec.name} do not divide a slice")
        self.state_digest = self.compute_digest()

    @property
    def num_values(self) -> int:
        return len(self.anchor)

    @property
    def num_slices(self) -> int:
        return num_slices(self.num_values)

    def part_size_bytes(self, first_slice: int, count: int) -> int:
        values = part_values(first_slice, count, self.num_values)
        return self.codec.encoded_size(max(0, values.stop - values.start))

    def check_part(self, first_slice: int, count: int, encoded: bytes) -> None:
        """Raise `ProtocolError` unless ``encoded`` decodes to finite values of these slices."""
        values = part_values(first_slice, count, self.num_values)
        self.codec.check(encoded, values.stop - values.start)

    def chunk_digests(self) -> tuple[list[bytes], list[bytes]]:
        """SHA-256 of every chunk of the anchor's and of the momentum's own bytes (little-endian fp32)."""
        return digest.chunk_digests(state_bytes(self.anchor)), digest.chunk_digests(state_bytes(self.momentum))

    def compute_digest(self) -> bytes:
        """The state digest, from memory."""
        return digest.state_digest(*self.chunk_digests())

    def offer(self, movement: Movement, tokens: int) -> ReplicaSnapshot | None:
        """A replica's ``movement`` since the anchor; None where it, with what is owed from before, is not finite."""
        if len(movement) != self.num_values:
            raise SwarmError("a movement of another length than the shard's")
        tiles = (slice(first, first + TILE_VALUES) for first in range(0, self.num_values, TILE_VALUES))
        if not all(np.isfinite(self._offered(movement, tile)).all() for tile in tiles):
            return None
        return ReplicaSnapshot(movement=movement, tokens=tokens)

    def encode(self, snapshot: ReplicaSnapshot, opened: OpenRound) -> list[bytes]:
        """The snapshot in the wire codec, part by part; nothing where no tokens were trained.

        A pure function: `settle` encodes again to know what was sent.
        """
        if snapshot.tokens == 0:
            return []
        return [self.codec.encode(self._offered(snapshot.movement, self._values(part))) for part in opened.parts]

    def reduce(self, work: Reduce) -> tuple[list[Share], bytes]:
        """Average what decodes, by tokens and in member order, and encode the average once.

        A contribution that does not decode to finite values is left out.
        """
        values = part_values(work.first_slice, work.num_slices, self.num_values)
        count = values.stop - values.start
        shares, decoded = [], []
        for share, encoded in work.contributions:
            try:
                vector = self.codec.decode(encoded, count)
            except SwarmError:
                continue
            shares.append(share)
            decoded.append(vector)
        if not shares:
            return [], b""
        try:
            return shares, self.codec.encode(weighted_mean(decoded, [share.weight_tokens for share in shares]))
        except SwarmError:
            return [], b""

    def apply(self, record: Record, parts: Mapping[bytes, bytes]) -> None:
        """Advance anchor and momentum by a committed round; the slices of absent parts stay as they are."""
        learning_rate = self.spec.outer.learning_rate
        momentum_factor = schedule.outer_momentum(self.spec.outer, record.round)
        for part in record.parts:
            gradient = self._decode(part, parts)
            if gradient is not None:
                values = self._values(part)
                outer_step(self.anchor[values], self.momentum[values], gradient, learning_rate, momentum_factor)
        self.state_digest = self.compute_digest()

    def settle(self, record: Record, parts: Mapping[bytes, bytes], snapshot: ReplicaSnapshot, me: bytes) -> bool:
        """Book what the commit counted of our offer; True where it counted any of it."""
        counted = False
        for part in record.parts:
            values = self._values(part)
            owed = self._offered(snapshot.movement, values)
            included = any(share.peer_key == me for share in part.shares)
            if included and self._decode(part, parts) is not None:
                counted = True
                owed = owed - self.codec.decode(self.codec.encode(owed), len(owed))
            self.feedback[values] = owed
        return counted

    def _offered(self, movement: Movement, values: slice) -> Float32:
        """Pseudo-gradient plus error feedback: made again whenever it is needed, as it would take 4 bytes a value."""
        return np.subtract(self.feedback[values], movement[values])

    def _values(self, part: Part | PartResult) -> slice:
        return part_values(part.first_slice, part.num_slices, self.num_values)

    def _decode(self, part: PartResult, parts: Mapping[bytes, bytes]) -> Float32 | None:
        """A part's average; None where it is absent. Bytes that do not decode are absent too, alike for everybody."""
        if not part.digest:
            return None
        values = self._values(part)
        try:
            return self.codec.decode(parts[part.digest], values.stop - values.start)
        except ProtocolError:
            return None


def state_bytes(vector: Float32) -> memoryview:
    """The bytes of a vector as they are hashed and sent: little-endian fp32, without a copy where possible."""
    return np.ascontiguousarray(vector, dtype="<f4").data.cast("B")


def load_state(spec: RunSpec, index: int, anchor: bytes, momentum: bytes, expected_digest: bytes) -> Shard:
    """A shard from a state's bytes, once they have the expected state digest."""
    if len(anchor) != len(momentum) or len(anchor) % 4:
        raise DigestError("a state whose anchor and momentum differ in size")
    shard = Shard(spec, index, np.frombuffer(anchor, "<f4").copy(), np.frombuffer(momentum, "<f4").copy())
    if shard.state_digest != expected_digest:
        raise DigestError(f"the state does not have the digest {expected_digest.hex()[:16]}")
    return shard
