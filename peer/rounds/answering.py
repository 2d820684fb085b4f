"""What a peer answers to others, whichever of its shards they ask about.

Decides which replica a call is for; leaves what it is answered to the replica (`peer.rounds.member`), its round
(`peer.rounds.exchange`) and its leases (`peer.rounds.hearing`). Bytes by digest belong to no shard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError

from peer.p2p.chunk_store import CHUNK_METHOD
from peer.rounds.catch_up import LOG_METHOD, STATE_METHOD
from peer.rounds.exchange import ROUND_METHOD
from peer.rounds.hearing import PING_METHOD
from peer.rounds.member import Member
from peer.rounds.momenta import Momenta
from swarm.errors import NotFound, ProtocolError
from swarm.proto.round_pb2 import LogRequest, PingRequest, RoundMessage, StateReply, StateRequest


class _Request(Protocol):
    @property
    def shard(self) -> int: ...


R = TypeVar("R", bound=_Request)


async def answer_peers(members: Sequence[Member], momenta: Momenta | None = None) -> None:
    """Answer peers. Call before any member runs, and before telling anybody that we are here."""
    transport, chunks = members[0].parts.transport, members[0].parts.chunks
    answers = Answers(members, momenta)
    if momenta is not None:
        chunks.add_source(momenta)
    await transport.serve(ROUND_METHOD, answers.handle_round)
    await transport.serve(CHUNK_METHOD, chunks.handle_chunk)
    await transport.serve(LOG_METHOD, answers.handle_log)
    await transport.serve(STATE_METHOD, answers.handle_state)
    await transport.serve(PING_METHOD, answers.handle_ping)


class Answers:
    """The transport's handlers; each finds the replica by the shard that a request names."""

    def __init__(self, members: Sequence[Member], momenta: Momenta | None = None) -> None:
        self._momenta = momenta
        self._members = {member.parts.exchange.shard.index: member for member in members}

    async def handle_round(self, sender: bytes, request: bytes) -> bytes:
        """One `RoundMessage`; the answer is empty."""
        message = _read(RoundMessage, request, "a round message")
        self._of(message).parts.exchange.on_message(sender, message, request)
        return b""

    async def handle_log(self, caller: bytes, request: bytes) -> bytes:
        wanted = _read(LogRequest, request, "a request for the log")
        return self._of(wanted).answer_log(wanted).SerializeToString()

    async def handle_state(self, caller: bytes, request: bytes) -> bytes:
        wanted = _read(StateRequest, request, "a request for a state")
        ledger = self._of(wanted).parts.ledger
        if not wanted.momentum:
            return ledger.offer_state(wanted.after_round, wanted.first).SerializeToString()
        if self._momenta is None:
            return StateReply().SerializeToString()
        # Beside the event loop: the first who asks waits until the file is read, others are told to come back.
        return (await asyncio.to_thread(self._momenta.offer, wanted.after_round, wanted.shard)).SerializeToString()

    async def handle_ping(self, caller: bytes, request: bytes) -> bytes:
        ping = _read(PingRequest, request, "a ping")
        return self._of(ping).parts.exchange.hearing.on_ping(caller, ping.leaving).SerializeToString()

    def _of(self, request: _Request) -> Member:
        member = self._members.get(request.shard)
        if member is None:  # as where no peer runs: whoever moved to other shards is not waited for in this one
            raise NotFound(f"this peer does not host shard {request.shard}")
        return member


def _read(kind: type[R], request: bytes, what: str) -> R:
    try:
        message: R = kind.FromString(request)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise ProtocolError(f"{what} cannot be read") from error
    return message
