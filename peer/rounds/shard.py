"""A shard's shared state and a replica's debt to it: anchor, outer momentum, error feedback.

Decides what a commit does to them; all arithmetic is `peer.rounds.outer`'s and the codec's. Pure numpy on the host, no
I/O; the callers keep it off the event loop.

Error feedback (docs/protocol.md): what a commit took (averaged, clipped or rejected) leaves only its encoding error
behind, what it did not take stays owed. What is owed lies in 8 bits (`peer.rounds.blocks`): each time it is booked,
each value is within one code of its block, and right on average over rounds, so that nothing is lost for good by a
replica that is left out of many. What an average loses by its encoding, its reducer owes (`peer.rounds.reducer_debt`).

Momentum and debt take a byte a value, and no step has more than a part of the shard in fp32: on the host there is no
second copy of anything (`swarm.memory_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from peer.rounds import blocks, reducer_debt
from peer.rounds.blocks import Blocks, tiles
from peer.rounds.codec import CODECS, Codec, Float32
from peer.rounds.outer import OuterStep, outer_step
from peer.rounds.paxos import Ballot, ballot_of
from peer.rounds.planning import num_slices, part_values
from peer.rounds.reducer_debt import ReducerDebt
from peer.rounds.robust import ROUNDING, Offer, judge, largest_mean, robust_mean, squared_norm
from peer.rounds.round_actions import Reduce
from peer.training.movement import Movement
from swarm import digest, schedule
from swarm.errors import DigestError, ProtocolError, SwarmError
from swarm.files import Kept
from swarm.proto.round_pb2 import Average, HandedOver, Part, PartResult, Record, Share
from swarm.run_spec import RunSpec

# A smaller share of its norm would be told as 0, which says that nothing was clipped.
SMALLEST_FACTOR = 1e-30


@dataclass(slots=True, kw_only=True)
class ReplicaSnapshot:
    """A replica between two inner steps, kept until its round is decided: each attempt of the round offers it."""

    movement: Movement
    """what is offered: the replica's movement since the anchor"""
    tokens: int
    """tokens trained since the last snapshot that a commit counted"""
    codec: str
    """rung in which every attempt of the round sends it"""
    ballots: set[Ballot] = field(default_factory=set)
    """attempts that it was offered to: a share of ours in another is that of our process before it was killed"""
    was_reset: bool = False
    """the replica was put back onto the anchor since: what it does now is not measured from this snapshot"""

    def offer_to(self, ballot: Ballot) -> tuple[int, str]:
        """(tokens, codec) under which an attempt gets it."""
        self.ballots.add(ballot)
        return self.tokens, self.codec


@dataclass(frozen=True, slots=True)
class Settling:
    """Whose offer a commit is booked for."""

    snapshot: ReplicaSnapshot
    me: bytes


class Shard:
    """One shard's state after a round. ``anchor``: float32 [num_values]; ``momentum``: as many values."""

    def __init__(self, spec: RunSpec, index: int, anchor: Float32, momentum: Blocks | None = None) -> None:
        self.spec = spec
        self.index = index
        self.anchor = anchor
        self.momentum = momentum if momentum is not None else Blocks(len(anchor))
        self.feedback: Blocks | None = None
        """what is owed; None until something is: a seed peer never owes"""
        self.reducer_debt = ReducerDebt()
        self.codec: Codec = CODECS[spec.rounds.wire_codec]
        """of averages"""
        self.too_long: list[PartResult] = []
        """parts of the newest commit that moved nothing, as no such average can be"""
        self._note_digests()

    @property
    def num_values(self) -> int:
        return len(self.anchor)

    @property
    def num_slices(self) -> int:
        return num_slices(self.num_values)

    def part_size_bytes(self, first_slice: int, count: int) -> int:
        values = part_values(first_slice, count, self.num_values)
        return self.codec.encoded_size(max(0, values.stop - values.start))

    @property
    def round_bytes(self) -> int:
        """What a round brings to one replica at most: contributions, what is owed, and averages."""
        contributions = max(CODECS[name].encoded_size(self.num_values) for name in self.spec.rounds.ladder)
        handed_over = reducer_debt.KEPT.encoded_size(self.num_values)
        return contributions + handed_over + self.codec.encoded_size(self.num_values)

    def check_contribution(self, first_slice: int, count: int, codec: str, encoded: bytes) -> None:
        """Raise `ProtocolError` unless ``codec`` is a rung, and ``encoded`` decodes to values of these slices."""
        if codec not in self.spec.rounds.ladder:
            ladder = ", ".join(self.spec.rounds.ladder)
            raise ProtocolError(f"a contribution in the codec {codec[:16]!r}; this run takes {ladder}")
        values = part_values(first_slice, count, self.num_values)
        num_values = values.stop - values.start
        expected = CODECS[codec].encoded_size(num_values)
        if len(encoded) != expected:
            raise ProtocolError(f"a contribution of {len(encoded)} bytes instead of {expected}")
        CODECS[codec].check(encoded, num_values)

    def check_handed_over(self, first_slice: int, count: int, message: HandedOver) -> None:
        """Raise `ProtocolError` unless ``message`` holds what may be owed to these slices."""
        values = part_values(first_slice, count, self.num_values)
        reducer_debt.check_handed_over(first_slice, values.stop - values.start, message)

    def check_part(self, first_slice: int, count: int, encoded: bytes) -> None:
        """Raise `ProtocolError` unless ``encoded`` decodes to finite values of these slices."""
        values = part_values(first_slice, count, self.num_values)
        self.codec.check(encoded, values.stop - values.start)

    def chunk_digests(self) -> tuple[list[bytes], list[bytes]]:
        """SHA-256 of every chunk of the anchor's own bytes (little-endian fp32) and of the momentum's."""
        anchor, momentum = self.state_bytes()
        return digest.chunk_digests(anchor), digest.chunk_digests(momentum)

    def state_bytes(self) -> tuple[memoryview, memoryview]:
        """Anchor and momentum as they are hashed and sent, without a copy."""
        return state_bytes(self.anchor), self.momentum.data.data

    def _note_digests(self) -> None:
        """State digest, and what it is made of, from memory."""
        anchor, momentum = map(digest.merkle_root, self.chunk_digests())
        self.anchor_digest, self.momentum_digest = anchor, momentum
        self.state_digest = digest.join_subtrees(anchor, momentum)

    def offer(self, movement: Movement, tokens: int, codec: str | None = None) -> ReplicaSnapshot | None:
        """A replica's ``movement`` since the anchor; None where it, with what is owed from before, is not finite.

        ``codec``: the rung in which it is sent; the densest where nothing is said.
        """
        if len(movement) != self.num_values:
            raise SwarmError("a movement of another length than the shard's")
        for tile in tiles(slice(0, self.num_values)):
            if not np.isfinite(self._offered(movement, tile)).all():
                return None
        return ReplicaSnapshot(movement=movement, tokens=tokens, codec=codec or self.spec.rounds.ladder[0])

    def encode(self, snapshot: ReplicaSnapshot, part: Part) -> bytes:
        """One part of the snapshot in its codec. A pure function: `settle` encodes again to know what was sent."""
        return self.encode_measured(snapshot, part)[0]

    def encode_measured(self, snapshot: ReplicaSnapshot, part: Part) -> tuple[bytes, tuple[float, float]]:
        """And what the norm of these bytes is at least and at most; anything where the run has no rule that asks."""
        values, codec = self._offered(snapshot.movement, self._values(part)), CODECS[snapshot.codec]
        if self.spec.robust.rule == "none":
            return codec.encode(values), (0.0, math.inf)
        with np.errstate(over="ignore"):
            squared = float(np.dot(values, values))
        norm = math.sqrt(squared if math.isfinite(squared) else squared_norm(values))
        least, most = max(0.0, 1 - codec.largest_loss), 1 + codec.largest_loss
        return codec.encode(values), (norm * least / ROUNDING, norm * most * ROUNDING)

    def reduce(self, work: Reduce) -> tuple[Average, bytes]:
        """Judge what decodes, average what is kept (`peer.rounds.robust`), and encode the average once.

        The average tells who is in it; its bytes are beside it. A contribution that does not decode to finite values is
        left out. No shares: nothing usable arrived. What earlier averages of these slices lost by their encoding is
        added, here or elsewhere.
        """
        values = part_values(work.first_slice, work.num_slices, self.num_values)
        count = values.stop - values.start
        useful = [item for item in work.contributions if _decodes(CODECS[item[1]], item[2], count)]
        if not useful:
            return Average(part=work.part), b""
        offers = [_part_offer(share, CODECS[codec], encoded, count) for share, codec, encoded in useful]
        verdicts = judge(offers, count, self.spec.robust)
        try:
            mean = robust_mean(offers, verdicts, count)
            taken, left = self.reducer_debt.make_good(mean, work.first_slice, work.handed_over, self.codec)
            encoded_average = self.codec.encode(mean)
        except SwarmError:
            return Average(part=work.part), b""
        mean -= self.codec.decode(encoded_average, count)
        self.reducer_debt.add_to(mean, work.first_slice, left)
        self.reducer_debt.note(work.ballot, work.first_slice, digest.sha256(encoded_average), lost=mean)
        average = Average(part=work.part, handed_over_by=taken)
        for (share, _, _), verdict in zip(useful, verdicts, strict=True):
            told = {"peer_key": share.peer_key, "weight_tokens": share.weight_tokens, "norm": verdict.norm}
            if verdict.is_dropped:
                average.rejections.add(cosine=verdict.cosine, min_cosine=verdict.min_cosine, **told)
            else:
                clipped_to = max(verdict.factor, SMALLEST_FACTOR) if verdict.factor < 1 else 0.0
                average.shares.add(clipped_to=clipped_to, **told)
        return average, encoded_average

    def apply(self, record: Record, parts: Mapping[bytes, Kept], replica: Settling | None = None) -> bool:
        """Advance anchor and momentum by a committed round; the slices of absent parts stay as they are.

        Books what the commit took of the offer of a ``replica``; True where it took any: averaged, clipped or rejected.
        """
        step = OuterStep(
            learning_rate=self.spec.outer.learning_rate,
            momentum_factor=schedule.outer_momentum(self.spec.outer, record.round),
            round=record.round,
        )
        taken, self.too_long = False, []
        for part in record.parts:
            gradient = self._decode(part, parts)
            is_present = gradient is not None
            if gradient is not None:
                outer_step(self.anchor, self.momentum, self._values(part).start, gradient, step)
                del gradient  # there is room for two parts in fp32
            if replica is not None:
                taken |= self._settle(record, part, replica, is_present=is_present)
        self.reducer_debt.settle(record)
        self._note_digests()
        return taken

    def _settle(self, record: Record, part: PartResult, replica: Settling, *, is_present: bool) -> bool:
        """What was clipped off or rejected is discarded, not owed again: a hostile or broken replica would offer it for
        ever.
        """
        snapshot, values = replica.snapshot, self._values(part)
        codec, offered = CODECS[snapshot.codec], ballot_of(record.opened_by) in snapshot.ballots
        owed = self._offered(snapshot.movement, values)
        judged = {*(share.peer_key for share in part.shares), *(r.peer_key for r in part.rejections)}
        counts = replica.me in judged and is_present
        if counts:
            # If not, it was taken from the process that was killed here, with all that was owed from before.
            owed -= codec.decode(codec.encode(owed), len(owed)) if offered else self.owed(values)
        if self.feedback is None:
            self.feedback = Blocks(self.num_values)
        self.feedback.write(values, owed, record.round)
        return counts and offered

    def owe(self, round_number: int, *movements: Movement) -> None:
        """Book movements that no commit has counted: they go into the next pseudo-gradient."""
        if self.feedback is None:
            self.feedback = Blocks(self.num_values)
        for tile in tiles(slice(0, self.num_values)):
            owed = self.owed(tile)
            for movement in movements:
                owed -= movement[tile]
            self.feedback.write(tile, owed, round_number)

    def become(self, other: Shard) -> None:
        """Take over the state of ``other``, in place; what is owed stays."""
        self.anchor[:], self.momentum.data[:] = other.anchor, other.momentum.data
        self.anchor_digest, self.momentum_digest = other.anchor_digest, other.momentum_digest
        self.state_digest = other.state_digest

    def owed(self, values: slice) -> Float32:
        """What no commit has counted yet of what was offered. ``values`` is made of whole blocks."""
        if self.feedback is None:
            return np.zeros(values.stop - values.start, np.float32)
        return self.feedback.read(values)

    def _offered(self, movement: Movement, values: slice) -> Float32:
        """Pseudo-gradient plus error feedback: made again whenever it is needed, as it would take 4 bytes a value."""
        offered = self.owed(values)
        for tile in tiles(values):
            offered[tile.start - values.start : tile.stop - values.start] -= movement[tile]
        return offered

    def _values(self, part: Part | PartResult) -> slice:
        return part_values(part.first_slice, part.num_slices, self.num_values)

    def _decode(self, part: PartResult, parts: Mapping[bytes, Kept]) -> Float32 | None:
        """A part's average; None where it is absent.

        Bytes that do not decode, and averages that are too long, are absent too, alike for everybody.
        """
        if not part.digest:
            return None
        values = self._values(part)
        try:
            average = self.codec.decode(parts[part.digest][:], values.stop - values.start)
        except SwarmError:
            return None
        if self._is_too_long(part, average):
            self.too_long.append(part)
            return None
        return average

    def _is_too_long(self, part: PartResult, average: Float32) -> bool:
        """Whether an average is longer than what its reducer says of the contributions allows; everybody's answer."""
        if self.spec.robust.rule == "none":
            return False
        is_sparse = any(CODECS[rung].sparse for rung in self.spec.rounds.ladder)
        longest = largest_mean(part, self.spec.robust, has_sparse_rungs=is_sparse)
        # What is owed is added, and the sum is encoded: each adds what encoding can lose at most.
        longest *= (1 + self.codec.largest_loss) ** 2
        return squared_norm(average) > longest * longest


def _part_offer(share: Share, codec: Codec, encoded: Kept, count: int) -> Offer:
    def decode(first: int, last: int) -> Float32:
        return codec.decode(codec.cut(encoded, count, first, last), last - first)

    return Offer(decode=decode, tokens=share.weight_tokens, rung=codec.name, is_sparse=codec.sparse)


def _decodes(codec: Codec, encoded: Kept, count: int) -> bool:
    try:
        codec.check(encoded[:], count)
    except SwarmError:
        return False
    return True


def state_bytes(vector: Float32) -> memoryview:
    """The bytes of a vector as they are hashed and sent: little-endian fp32, without a copy where possible."""
    return np.ascontiguousarray(vector, dtype="<f4").data.cast("B")


class StateBuffers:
    """Room for the bytes of a state of ``num_values`` values, in the place where the shard then keeps them."""

    def __init__(self, num_values: int) -> None:
        self.anchor = np.empty(num_values, "<f4")
        self.momentum = np.empty(blocks.size_bytes(num_values), np.uint8)

    @property
    def views(self) -> tuple[memoryview, memoryview]:
        """Anchor and momentum, to be filled."""
        return state_bytes(self.anchor), self.momentum.data


def load_state(spec: RunSpec, index: int, buffers: StateBuffers, expected_digest: bytes) -> Shard:
    """A shard from a state's bytes, once they have the expected state digest.

    Raises `DigestError` where they have not, and `ProtocolError` for momentum that no encoder writes: a majority of
    voters that signed such a state does not make it one.
    """
    momentum = Blocks(len(buffers.anchor), buffers.momentum)
    shard = Shard(spec, index, buffers.anchor.astype(np.float32, copy=False), momentum)
    if shard.state_digest != expected_digest:
        raise DigestError(f"the state does not have the digest {expected_digest.hex()[:16]}")
    momentum.check()
    return shard
