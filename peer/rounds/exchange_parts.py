"""What an exchange is built from, and what it tells: the seams between rounds, training and whoever watches."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.fetch import fetch_chunk
from peer.p2p.spill import Spill
from peer.p2p.transport import Transport
from peer.rounds.codec import Float32
from peer.rounds.hearing import clock_that_counts_sleep
from peer.rounds.ladder import Uplink, choose_rung
from peer.rounds.ledger import Ledger
from peer.rounds.mending import Incident
from peer.rounds.round import RoundMachine
from peer.rounds.round_actions import Fetch, RoundSettings
from peer.rounds.shard import Shard
from peer.training.movement import Movement
from swarm import schedule
from swarm.averages import AVERAGE_CONTEXT
from swarm.errors import SwarmError
from swarm.files import Kept
from swarm.identity import Identity
from swarm.log import VOTE_CONTEXT, LogHead
from swarm.proto.round_pb2 import Record, RoundMessage

MAX_EARLY_MESSAGES = 256
MAX_REASONS = 8

log = logging.getLogger(__name__)


class Trainer(Protocol):
    """What a round asks of a replica under training; both happen between two inner steps."""

    async def snapshot(self) -> tuple[Movement, int]:
        """(movement since the anchor, which stays as it is; tokens trained since the start)"""
        ...

    async def land(self, anchor: Float32, snapshot: Movement | None, round_number: int) -> None:
        """Weights become ``anchor`` plus the movement since ``snapshot`` (None: just the anchor).

        The next round is ``round_number``. ``anchor`` is only read until the call returns.
        """
        ...

    @property
    def tokens(self) -> int:
        """Tokens trained since the start."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What happened in a round, for whoever watches."""

    record: Record
    head: LogHead
    state_digest: bytes
    counted: bool
    """our contribution is in it"""
    refused: tuple[str, ...] = ()
    """why reducers refused parts of our contribution when they arrived"""
    disputed: tuple[str, ...] = ()
    """what of the record is false, and who signed it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeParts:
    """What an exchange is built from; ``trainer`` is None on a seed peer."""

    identity: Identity
    transport: Transport
    shard: Shard
    ledger: Ledger
    chunks: ChunkStore
    founders: tuple[bytes, ...]
    trainer: Trainer | None
    run_blocking: Callable[[Callable[[], Any]], Awaitable[Any]]
    on_commit: Callable[[Committed], Awaitable[None]]
    on_incident: Callable[[Incident], None] = lambda incident: None
    lease_clock: Callable[[], float] = clock_that_counts_sleep


class Lookout:
    """Who is asked whether it lives: whoever is awaited at two looks in a row. In a short round nobody is."""

    EVERY_S = 0.25
    AFTER_A_QUESTION_S = 1.0

    def __init__(self) -> None:
        self._awaited: set[bytes] = set()
        self._look_at = 0.0

    def asks(self, awaited: Callable[[], dict[bytes, float]], now: float) -> dict[bytes, float]:
        """Who is asked now, and for how long it is awaited; after a question comes no other for a second.

        ``awaited``: peers, and since when something is expected of them.
        """
        if now < self._look_at:
            return {}
        since = awaited()
        asked = {peer: now - at for peer, at in since.items() if peer in self._awaited}
        self._awaited = set(since)
        self._look_at = now + (self.AFTER_A_QUESTION_S if asked else self.EVERY_S)
        return asked


class EarlyMessages:
    """What others said of the next round while we are in this one: on disk, within bounds."""

    def __init__(self, spill: Spill) -> None:
        self._spill = spill
        self._kept: list[tuple[bytes, Kept]] = []

    @property
    def size_bytes(self) -> int:
        return sum(len(kept) for _, kept in self._kept)

    def keep(self, sender: bytes, request: bytes, room_bytes: int) -> None:
        """Keep a message as it came, unless there are too many or they would take more than ``room_bytes``."""
        if len(self._kept) < MAX_EARLY_MESSAGES and self.size_bytes + len(request) <= room_bytes:
            self._kept.append((sender, self._spill.put(request)))

    def take(self) -> Iterator[tuple[bytes, RoundMessage]]:
        """All of them, in the order in which they came; none is kept any longer."""
        kept, self._kept = self._kept, []
        for sender, request in kept:
            yield sender, RoundMessage.FromString(request[:])


class Refusals:
    """Why reducers refused what we contributed to a round: each reason once, for a person to see."""

    def __init__(self) -> None:
        self._reasons: dict[str, None] = {}

    def hear(self, message: RoundMessage, reason: str) -> None:
        log.info("round %d: refused: %s", message.round, reason)
        if message.HasField("contribution") and len(self._reasons) < MAX_REASONS:
            self._reasons[reason] = None

    def take(self) -> tuple[str, ...]:
        reasons, self._reasons = tuple(self._reasons), {}
        return reasons


def round_settings(parts: ExchangeParts, head: LogHead, spill: Spill) -> RoundSettings:
    """What the round after ``head`` goes by, as the replica of ``parts`` sees it."""
    shard, rounds = parts.shard, parts.shard.spec.rounds
    return RoundSettings(
        me=parts.identity.public_key,
        head=head,
        founders=parts.founders,
        state_digest=shard.state_digest,
        num_slices=shard.num_slices,
        codec=shard.codec.name,
        part_size_bytes=shard.part_size_bytes,
        round_bytes=shard.round_bytes,
        check_contribution=shard.check_contribution,
        check_handed_over=shard.check_handed_over,
        check_part=shard.check_part,
        sign_vote=lambda payload: parts.identity.sign(VOTE_CONTEXT, head.run_id, payload),
        sign_average=lambda payload: parts.identity.sign(AVERAGE_CONTEXT, head.run_id, payload),
        round_tokens=schedule.tokens_of_round(rounds, head.round + 1),
        max_weight_tokens=schedule.max_weight_tokens(rounds, head.round + 1),
        max_members=rounds.max_members,
        may_vote=head.round == parts.ledger.head.round,  # not while replaying what is decided
        reduce_timeout_s=rounds.reduce_timeout_s,
        takeover_timeout_s=rounds.takeover_timeout_s,
        keep=spill.put,
    )


def uplink_of(shard: Shard, machine: RoundMachine, num_members: int, round_s: float | None) -> Uplink:
    """What this member's upload in the round of ``machine`` meets, by its uplink as it announces it.

    ``round_s``: seconds since the round began; None where that was not seen.
    """
    offered = {candidate.key: candidate.upload_bps for candidate in machine.view.candidates}
    return Uplink(
        upload_bps=offered.get(machine.settings.me),
        num_values=shard.num_values,
        num_members=num_members,
        # All shards of a run share the uplink, one after the other.
        round_s=None if round_s is None else round_s / shard.spec.num_shards,
        timeout_s=machine.settings.reduce_timeout_s / 2,
    )


def choose_codec(shard: Shard, round_number: int, uplink: Uplink) -> str:
    """The rung in which this member contributes."""
    codec, why = choose_rung(shard.spec.rounds.ladder, uplink)
    log.debug("round %d: %s", round_number, why)
    return codec


def tell_verdicts(committed: Committed, me: bytes) -> dict[str, str]:
    """What reducers refused, rejected or clipped of the contribution of ``me``, and why, for people."""
    record = committed.record
    rejected = [rejection for part in record.parts for rejection in part.rejections if rejection.peer_key == me]
    shares = [share for part in record.parts for share in part.shares if share.peer_key == me]
    clipped = [share.clipped_to for share in shares if share.clipped_to > 0]
    told = {"refused": "; ".join(committed.refused)} if committed.refused else {}
    if committed.disputed:
        told["disputed"] = "; ".join(committed.disputed)
    if rejected:
        worst = min(rejected, key=lambda rejection: rejection.cosine)
        told["rejected"] = (
            f"{len(rejected)} of {len(rejected) + len(shares)} parts point elsewhere than the others' do; discarded "
            f"(cosine {worst.cosine:.2f}, at least {worst.min_cosine:.2f} is wanted)"
        )
    if clipped:
        told["clipped"] = (
            f"{len(clipped)} of {len(shares)} parts were longer than the median; what was left is {min(clipped):.0%} "
            "or more, the rest is discarded"
        )
    return told


async def obtain(parts: ExchangeParts, wanted: Fetch, holders: Sequence[bytes], timeout_s: float) -> bytes | None:
    """A part, from this disk or from whoever of ``holders`` has it; None where it is not to be had yet."""
    data: bytes | None = await parts.run_blocking(lambda: parts.chunks.get(wanted.digest))
    if data is not None:
        return data
    try:
        return await fetch_chunk(parts.transport, wanted.digest, wanted.size_bytes, holders, timeout_s=timeout_s)
    except SwarmError as error:
        log.debug("shard %d: a part is not to be had yet: %s", parts.shard.index, error)
        return None
