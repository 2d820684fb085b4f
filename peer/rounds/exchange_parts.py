"""What an exchange is built from, and what it tells: the seams between rounds, training and whoever watches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from peer.p2p.chunk_store import ChunkStore
from peer.p2p.transport import Transport
from peer.rounds.codec import Float32
from peer.rounds.ledger import Ledger
from peer.rounds.shard import Shard
from peer.training.movement import Movement
from swarm.identity import Identity
from swarm.log import LogHead
from swarm.proto.round_pb2 import Record


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
