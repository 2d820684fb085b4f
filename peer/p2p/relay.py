"""A relay, kept by seed peers: connections to peers that nobody can dial, passed on byte by byte.

Speaks the relay's side of libp2p's circuit protocol, so that every p2pd dials through it. Decides who may be reached
this way (whoever asked a moment ago and showed that it is admitted), and how many connections there are at once.
Leaves streams to `peer.p2p.network`. What passes is encrypted between the two ends. Why p2pd's own relay is not used:
docs/decisions/0019.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import DecodeError

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
MAX_PROOF_BYTES = 4096
_MAX_MESSAGE_BYTES = 4096
_PIECE_BYTES = 1 << 18
_SHAKE_HANDS_S = 10.0
_CONNECT, _HOP_STATUS = 1, 2
_STOP_CONNECT, _STOP_STATUS = 0, 1
_DONE, _FULL, _FAILED, _NO_RESERVATION, _MALFORMED = 100, 201, 203, 204, 400

M = TypeVar("M", CircuitHop, CircuitStop)
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
logger = logging.getLogger(__name__)


class Relay:
    """``open_stream`` opens a stream of a protocol to a peer; ``check`` raises for a caller whose proof is none."""

    def __init__(
        self,
        open_stream: Callable[[bytes, str, float], Awaitable[Stream]],
        check: Callable[[bytes, bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_stream, self._check, self._clock = open_stream, check, clock
        self._reserved_until: dict[bytes, float] = {}
        self._circuits: Counter[bytes] = Counter()
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

    async def on_hop(self, caller: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one request for a connection, until either end closes it. Never raises: nobody would look."""
        try:
            hop = await asyncio.wait_for(_receive(reader, CircuitHop), _SHAKE_HANDS_S)
            target = public_key_of_bytes(hop.peer.id)
            if (refusal := self._refusal(caller, target, hop.type)) is not None:
                return await _send(writer, CircuitHop(type=_HOP_STATUS, status=refusal))
            self._circuits.update((caller, target))
            try:
                await self._connect(caller, target, (reader, writer))
            finally:
                self._circuits.subtract((caller, target))
                self._circuits = +self._circuits  # without those at 0
        except (OSError, EOFError, asyncio.TimeoutError, SwarmError) as error:
            logger.debug("a relayed connection ended early: %r", error)
        finally:
            writer.close()

    def _refusal(self, caller: bytes, target: bytes, kind: int) -> int | None:
        if kind != _CONNECT or caller == target:
            return _MALFORMED
        if self._reserved_until.get(target, 0.0) <= self._clock():
            return _NO_RESERVATION
        most = max(self._circuits[caller], self._circuits[target])
        if most >= MAX_CIRCUITS_PER_PEER or sum(self._circuits.values()) >= 2 * MAX_CIRCUITS:
            return _FULL
        return None

    async def _connect(self, caller: bytes, target: bytes, near: Stream) -> None:
        try:
            far = await asyncio.wait_for(self._ask(caller, target), _SHAKE_HANDS_S)
        except (OSError, EOFError, asyncio.TimeoutError, SwarmError) as error:
            logger.debug("no relayed connection: %r", error)
            return await _send(near[1], CircuitHop(type=_HOP_STATUS, status=_FAILED))
        try:
            # No limit is named: libp2p keeps connections with limits for small things only.
            await _send(near[1], CircuitHop(type=_HOP_STATUS, status=_DONE))
            ways = {asyncio.create_task(self._pass_on(*way)) for way in ((near[0], far[1]), (far[0], near[1]))}
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
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

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE_BYTES):
                writer.write(data)
                self.passed_bytes += len(data)
                await writer.drain()


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
