"""A relay, kept by seed peers: connections to peers that nobody can dial, passed on byte by byte.

Speaks the relay's side of libp2p's circuit protocol, so that every p2pd dials through it. Decides who may be reached
this way (whoever asked a moment ago and showed that it is admitted), how many connections there are at once, and how
few of them whoever showed nothing may have: researchers dial too. Leaves streams to `peer.p2p.network`. What passes is
encrypted between the two ends. Why p2pd's own relay is not used: docs/decisions/0019.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from google.protobuf.message import DecodeError

from peer.p2p.passing import Stream, pass_both_ways
from swarm.errors import NetworkError, ProtocolError, ResourceError, SwarmError
from swarm.identity import peer_id_bytes, public_key_of_bytes
from swarm.proto.circuit_pb2 import CircuitHop, CircuitPeer, CircuitStop

HOP, STOP = "/libp2p/circuit/relay/0.2.0/hop", "/libp2p/circuit/relay/0.2.0/stop"
RESERVE_METHOD = "reserve"
# A peer that wants to be reached asks again every 15 s.
RESERVATION_S = 60.0
MAX_RESERVATIONS = 4096
# Each takes two sockets here and two connections' streams in p2pd.
MAX_CIRCUITS, MAX_CIRCUITS_PER_PEER = 256, 96
# Requests that have yet to become a connection: in all, by key.
MAX_REQUESTS, MAX_REQUESTS_PER_PEER = 256, 32
# Of both, for callers that showed no admission lately: in all, and by the address that they call from. Connections by
# key, too.
MAX_STRANGERS, MAX_STRANGERS_PER_HOST, MAX_PER_STRANGER = 64, 16, 4
MAX_PROOF_BYTES = 4096
_MAX_MESSAGE_BYTES = 4096
_SHAKE_HANDS_S = 10.0
# libp2p says something every 30 s.
SILENCE_S = 120.0
_CONNECT, _HOP_STATUS = 1, 2
_STOP_CONNECT, _STOP_STATUS = 0, 1
_DONE, _FULL, _FAILED, _NO_RESERVATION, _MALFORMED = 100, 201, 203, 204, 400

M = TypeVar("M", CircuitHop, CircuitStop)
Seats = dict[Hashable, int]
"""what a connection counts towards, with how many there may be"""
logger = logging.getLogger(__name__)


class Relay:
    """``open_stream`` opens a stream of a protocol to a peer; ``check`` raises for a caller whose proof is none.

    ``seen_at``: the multiaddrs from which a peer is connected to us.
    """

    def __init__(
        self,
        open_stream: Callable[[bytes, str, float], Awaitable[Stream]],
        check: Callable[[bytes, bytes], None],
        seen_at: Callable[[bytes], Awaitable[list[str]]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_stream, self._check, self._seen_at, self._clock = open_stream, check, seen_at, clock
        self._reserved_until: dict[bytes, float] = {}
        self._taken: Counter[Hashable] = Counter()
        self.passed_bytes = 0

    async def on_reserve(self, caller: bytes, proof: bytes) -> bytes:
        """Let the caller be reached through us for a while. Raises what ``check`` does, and `ResourceError`."""
        if len(proof) > MAX_PROOF_BYTES:
            raise ProtocolError(f"a proof of {len(proof)} bytes")
        self._check(caller, proof)
        now = self._clock()
        self._reserved_until = {peer: until for peer, until in self._reserved_until.items() if until > now}
        if caller not in self._reserved_until and len(self._reserved_until) >= MAX_RESERVATIONS:
            raise ResourceError("this relay is full", "another seed peer may have room")
        self._reserved_until[caller] = now + RESERVATION_S
        return b""

    def is_kept(self, peer: bytes) -> bool:
        """Whether ``peer`` is reached through us now."""
        return self._reserved_until.get(peer, 0.0) > self._clock()

    async def on_hop(self, caller: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request for a connection, until either end closes it. Never raises: nobody would look."""
        try:
            is_stranger = not self.is_kept(caller)
            with self._taking(_request_seats(caller, is_stranger)):
                strange_host = _host(await self._seen_at(caller)) if is_stranger else None
                with self._taking(_strange_seats("request", strange_host)):
                    hop = await asyncio.wait_for(_receive(reader, CircuitHop), _SHAKE_HANDS_S)
            target = public_key_of_bytes(hop.peer.id)
            seats = _seats(caller, target, strange_host)
            refusal = self._refusal(caller, target, hop.type, seats)
            if refusal is not None:
                return await _send(writer, CircuitHop(type=_HOP_STATUS, status=refusal))
            with self._taking(seats):
                await self._connect(caller, target, (reader, writer))
        except (OSError, EOFError, asyncio.TimeoutError, SwarmError) as error:
            logger.debug("a relayed connection ended early: %r", error)
        finally:
            writer.close()

    @contextmanager
    def _taking(self, seats: Seats) -> Iterator[None]:
        """Raises `ResourceError` where there is no room."""
        if self._is_full(seats):
            raise ResourceError("this relay is full", "another seed peer may have room")
        self._taken.update(list(seats))
        try:
            yield
        finally:
            self._taken.subtract(list(seats))
            self._taken = +self._taken  # without those at 0

    def _is_full(self, seats: Seats) -> bool:
        return any(self._taken[seat] >= most for seat, most in seats.items())

    def _refusal(self, caller: bytes, target: bytes, kind: int, seats: Seats) -> int | None:
        if kind != _CONNECT or caller == target:
            return _MALFORMED
        if not self.is_kept(target):
            return _NO_RESERVATION
        return _FULL if self._is_full(seats) else None

    async def _connect(self, caller: bytes, target: bytes, near: Stream) -> None:
        try:
            far = await asyncio.wait_for(self._ask(caller, target), _SHAKE_HANDS_S)
        except (OSError, EOFError, asyncio.TimeoutError, SwarmError) as error:
            logger.debug("no relayed connection: %r", error)
            return await _send(near[1], CircuitHop(type=_HOP_STATUS, status=_FAILED))
        try:
            # No limit is named: libp2p keeps connections with limits for small things only.
            await _send(near[1], CircuitHop(type=_HOP_STATUS, status=_DONE))
            await pass_both_ways(near, far, SILENCE_S, self._count)
        finally:
            far[1].close()

    async def _ask(self, caller: bytes, target: bytes) -> Stream:
        """A stream to ``target`` on which it agreed to talk with ``caller``."""
        reader, writer = await self._open_stream(target, STOP, _SHAKE_HANDS_S)
        try:
            await _send(writer, CircuitStop(type=_STOP_CONNECT, peer=CircuitPeer(id=peer_id_bytes(caller))))
            answer = await _receive(reader, CircuitStop)
            if (answer.type, answer.status) != (_STOP_STATUS, _DONE):
                raise NetworkError(f"the peer refuses a relayed connection: {answer.status}")
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _count(self, size: int) -> None:
        self.passed_bytes += size


def _request_seats(caller: bytes, is_stranger: bool) -> Seats:
    seats: Seats = {"request": MAX_REQUESTS, ("request", caller): MAX_REQUESTS_PER_PEER}
    return seats | ({"request of a stranger": MAX_STRANGERS} if is_stranger else {})


def _strange_seats(kind: str, host: str | None) -> Seats:
    """``host``: None of who is no stranger."""
    return {} if host is None else {(kind, "at", host): MAX_STRANGERS_PER_HOST}


def _seats(caller: bytes, target: bytes, strange_host: str | None) -> Seats:
    seats: Seats = {"all": MAX_CIRCUITS, caller: MAX_CIRCUITS_PER_PEER, target: MAX_CIRCUITS_PER_PEER}
    if strange_host is not None:
        seats |= {"strangers": MAX_STRANGERS, caller: MAX_PER_STRANGER} | _strange_seats("circuit", strange_host)
    return seats


def _host(seen_at: list[str]) -> str:
    """The address that a caller has for itself: of IPv6 the network, as homes get whole ones. "" where none is seen."""
    for address in seen_at:
        try:
            host = ipaddress.ip_address([*address.split("/"), "", ""][2])
        except ValueError:
            continue
        return str(host) if host.version == 4 else str(ipaddress.ip_network((host, 64), strict=False))
    return ""


async def _send(writer: asyncio.StreamWriter, message: CircuitHop | CircuitStop) -> None:
    raw = message.SerializeToString()
    writer.write(bytes([len(raw)]) + raw)  # a varint: ours are shorter than 128 bytes
    await writer.drain()


async def _receive(reader: asyncio.StreamReader, kind: type[M]) -> M:
    size = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        size |= (byte & 0x7F) << shift
        shift += 7
        if size > _MAX_MESSAGE_BYTES or shift > 14:
            raise ProtocolError("a message of the relay that is too long")
        if byte < 0x80:
            break
    try:
        return kind.FromString(await reader.readexactly(size))
    except DecodeError as error:
        raise ProtocolError("a message of the relay cannot be read") from error
