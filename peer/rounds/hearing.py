"""The edge of leases: asks peers whether they live, and notes who called and who answered.

Decides nothing; `peer.rounds.leases` does. Holds the clock: one that counts sleep, so that a voter whose machine slept
knows that its leases ran out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from peer.p2p.transport import Transport
from peer.rounds.leases import Leases, Standing
from swarm.errors import NetworkError, ProtocolError, Unreachable
from swarm.log import LogHead
from swarm.proto.round_pb2 import PingReply, PingRequest

PING_METHOD = "ping"
PING_TIMEOUT_S = 5.0


def clock_that_counts_sleep() -> float:
    """Seconds; on Linux CLOCK_BOOTTIME, elsewhere a monotonic clock that counts sleep by itself."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Hearing:
    def __init__(
        self, transport: Transport, head: LogHead, lease_s: float, clock: Callable[[], float] = clock_that_counts_sleep
    ) -> None:
        self._transport, self.clock = transport, clock
        self._head = head
        self._began = clock()
        self.leases = Leases(transport.public_key, head, lease_s, self._began)

    def begin(self, head: LogHead) -> None:
        """The round after ``head`` begins."""
        self._head = head
        self.leases.begin(head, self.clock())

    def standing(self) -> Standing:
        return self.leases.standing(self.clock())

    def heard(self, peer: bytes) -> None:
        self.leases.heard(peer, self.clock())

    def answered(self, peer: bytes, asked_at: float) -> None:
        """``peer`` answered a call that was made at ``asked_at`` by our clock."""
        self.leases.answered(peer, asked_at)

    def due(self) -> list[bytes]:
        """Voters whose lease has to be asked for now."""
        return self.leases.due(self.clock())

    async def ask(self, peer: bytes, waited_s: float = 0.0) -> bool:
        """Ask for the lease of ``peer``; True where it works towards a later round. Raises `SwarmError`.

        `Unreachable` also where another process answers than the one that we have waited for, ``waited_s`` long: it
        knows nothing of what is awaited.
        """
        asked_at = self.clock()
        try:
            raw = await self._call(peer, PingRequest(shard=self._head.shard))
        except NetworkError:
            self.leases.failed(peer, self.clock())
            raise
        try:
            reply = PingReply.FromString(raw)
        except DecodeError as error:
            raise ProtocolError("an answer to a ping cannot be read") from error
        further_on = reply.round > self._head.round + 1
        self.leases.answered(peer, asked_at, further_on)
        if 0 < reply.alive_ms < 1000 * waited_s:  # 0: it does not say
            raise Unreachable("the process that was waited for has ended, and another answers in its place")
        return further_on

    async def leave(self) -> None:
        """Vote no more, and tell the voters, so that they need not wait for our lease to run out."""
        self.leases.leave()
        request = PingRequest(leaving=True, shard=self._head.shard)
        tell = [self._call(voter, request) for voter in self._head.voters if voter != self._transport.public_key]
        await asyncio.gather(*tell, return_exceptions=True)  # whoever is not told waits for our lease to run out

    def on_ping(self, caller: bytes, leaving: bool) -> PingReply:
        """What a ping about this shard is answered."""
        if leaving:
            self.leases.left(caller)
        else:
            self.heard(caller)
        alive_ms = max(1, int(1000 * (self.clock() - self._began)))
        return PingReply(round=self._head.round + 1, alive_ms=alive_ms)

    async def _call(self, peer: bytes, request: PingRequest) -> bytes:
        raw = request.SerializeToString()
        return await self._transport.call(peer, PING_METHOD, raw, timeout_s=PING_TIMEOUT_S, max_response_bytes=64)
