"""One call on one stream of bytes: frames, the status of a response, errors that cross the network.

Decides the format and its limits; leaves streams, peers and deadlines to `peer.p2p.network`. A request is its caller's
patience (milliseconds, 4 bytes) and a message; a response is a message whose first byte is a status. A message is a
sequence of `Frame`, each after its size (4 bytes, big-endian), closed by a size of 0. Sizes are checked before memory
is used for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from peer.p2p.transport import FRAME_BYTES, MAX_CALL_BYTES
from peer.p2p.uplink import SMALL_FRAME_BYTES, Pacer, UplinkMeter
from swarm import errors
from swarm.errors import NetworkError, ProtocolError, SwarmError
from swarm.files import Kept
from swarm.proto.round_pb2 import Frame

# A frame's tag and the length of its data.
_FRAME_OVERHEAD_BYTES = 16
# A piece of a request that is no larger stays in memory.
_SMALL_BYTES = 1 << 16
# Of a response that is handed over as it comes.
MAX_PART_BYTES = 1 << 18
_OK = 0
_ERROR = 1
_MAX_ERROR_CHARS = 512
_MAX_ERROR_BYTES = 8 * _MAX_ERROR_CHARS
_MAX_TIMEOUT_MS = (1 << 32) - 1


def _named_errors(base: type[SwarmError]) -> dict[str, type[SwarmError]]:
    found = {base.__name__: base} if base.__module__ == errors.__name__ else {}
    for subclass in base.__subclasses__():
        found |= _named_errors(subclass)
    return found


_ERRORS = _named_errors(SwarmError)


@dataclass(slots=True)
class Traffic:
    """Payload bytes since the start, and those that incoming calls hold now."""

    limit_bytes: int
    sent_bytes: int = 0
    received_bytes: int = 0
    held_bytes: int = 0
    pacer: Pacer = field(default_factory=lambda: Pacer(None))
    uplink: UplinkMeter = field(default_factory=UplinkMeter)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def hold(self, size: int) -> None:
        """Make room for ``size`` bytes of a request. Raises `NetworkError` where the peer is full."""
        if self.held_bytes + size > self.limit_bytes:
            raise NetworkError("busy: too much is being received at once")
        self.held_bytes += size

    def release(self, size: int) -> None:
        self.held_bytes -= size

    async def may_leave(self, size: int) -> None:
        """Wait until a frame of ``size`` bytes may be sent: in the order of asking, and who gives up took no time."""
        clock = asyncio.get_running_loop().time
        if size > SMALL_FRAME_BYTES and self.pacer.limit_bps is not None:
            async with self._turn:
                await asyncio.sleep(self.pacer.wait_s(clock()))
                self.pacer.leave(size, clock())
        else:
            self.pacer.leave(size, clock())


async def send_request(writer: asyncio.StreamWriter, request: Kept, timeout_s: float, traffic: Traffic) -> None:
    writer.write(min(max(int(timeout_s * 1000), 1), _MAX_TIMEOUT_MS).to_bytes(4, "big"))
    await _send(writer, request, traffic)


async def receive_timeout_s(reader: asyncio.StreamReader) -> float:
    """How long the caller will wait, in seconds."""
    return int.from_bytes(await reader.readexactly(4), "big") / 1000


async def send_response(writer: asyncio.StreamWriter, response: Kept, traffic: Traffic) -> None:
    """Send ``response``; what lies on disk goes in small frames, so that little of it is in memory."""
    most = FRAME_BYTES if isinstance(response, bytes) else _SMALL_BYTES
    await _send(writer, response, traffic, bytes([_OK]), most)


async def send_error(writer: asyncio.StreamWriter, error: SwarmError, traffic: Traffic) -> None:
    text = f"{type(error).__name__}\0{str(error)[:_MAX_ERROR_CHARS]}"
    await _send(writer, text.encode(), traffic, bytes([_ERROR]))


async def receive_response(reader: asyncio.StreamReader, max_bytes: int, traffic: Traffic) -> bytes:
    """The response, at most ``max_bytes``. Raises the peer's error, or `ProtocolError`."""
    message = await receive_message(reader, max_bytes + 1, traffic)
    if not message:
        raise ProtocolError("a response without a status")
    status = message.pop(0)
    traffic.received_bytes -= 1
    if status == _OK:
        return bytes(message)
    raise _failure(status, message[:_MAX_ERROR_BYTES])


async def response_parts(reader: asyncio.StreamReader, max_bytes: int, traffic: Traffic) -> AsyncGenerator[bytes, None]:
    """The response as it comes, a frame in several parts. Raises the peer's error, or `ProtocolError`."""
    total, status = -1, None  # the status is not of the response
    while size := int.from_bytes(await reader.readexactly(4), "big"):
        rest = await _frame_bytes(reader, size)
        total += rest
        if total > max_bytes:
            raise ProtocolError(f"a message larger than the {max_bytes} bytes that were allowed")
        if status is None:
            status, rest = (await reader.readexactly(1))[0], rest - 1
            if status != _OK:
                raise _failure(status, await reader.readexactly(min(rest, _MAX_ERROR_BYTES)))
        while rest:
            part = await reader.read(min(rest, MAX_PART_BYTES))
            if not part:
                raise asyncio.IncompleteReadError(part, rest)
            rest -= len(part)
            traffic.received_bytes += len(part)
            yield part
    if status is None:
        raise ProtocolError("a response without a status")


async def _frame_bytes(reader: asyncio.StreamReader, size: int) -> int:
    """How many bytes of data follow in a frame of ``size`` bytes, once what stands before them was read."""
    length = next((size - n for n in (2, 3, 4) if 0 < size - n <= FRAME_BYTES and len(head(1, size - n)) == n), None)
    if length is None or await reader.readexactly(size - length) != head(1, length):
        raise ProtocolError("a frame cannot be read")
    return length


async def receive_message(reader: asyncio.StreamReader, max_bytes: int, traffic: Traffic) -> bytearray:
    """All frames of a message. Raises `ProtocolError` beyond ``max_bytes``, `asyncio.IncompleteReadError` if cut."""
    message = bytearray()
    await _receive(reader, max_bytes, traffic, message.extend)
    return message


async def receive_request(
    reader: asyncio.StreamReader, traffic: Traffic, keep: Callable[[bytes], Kept], pieces: list[Kept]
) -> None:
    """Append what a request is made of to ``pieces``; a frame that is not small waits where ``keep`` puts it.

    The bytes are counted in ``traffic.held_bytes``; whoever owns ``pieces`` releases them, also where this raises.
    """

    def take(data: bytes) -> None:
        piece = data if len(data) <= _SMALL_BYTES else keep(data)
        traffic.hold(len(data))
        pieces.append(piece)

    await _receive(reader, MAX_CALL_BYTES, traffic, take)


async def _receive(
    reader: asyncio.StreamReader, max_bytes: int, traffic: Traffic, take: Callable[[bytes], None]
) -> None:
    total = 0
    while size := int.from_bytes(await reader.readexactly(4), "big"):
        if size > FRAME_BYTES + _FRAME_OVERHEAD_BYTES or total + size > max_bytes + _FRAME_OVERHEAD_BYTES:
            raise ProtocolError(f"a message larger than the {max_bytes} bytes that were allowed")
        data = _parse_frame(await reader.readexactly(size))
        total += len(data)
        if total > max_bytes:
            raise ProtocolError(f"a message larger than the {max_bytes} bytes that were allowed")
        take(data)
        traffic.received_bytes += len(data)


async def _send(
    writer: asyncio.StreamWriter, payload: Kept, traffic: Traffic, prefix: bytes = b"", most: int = FRAME_BYTES
) -> None:
    start, frame_bytes = 0, traffic.pacer.frame_bytes(most)
    while prefix or start < len(payload):
        end = min(start + frame_bytes - len(prefix), len(payload))
        frame = Frame(data=prefix + payload[start:end]).SerializeToString()
        await traffic.may_leave(len(frame))
        writer.write(len(frame).to_bytes(4, "big"))
        writer.write(frame)
        await writer.drain()
        traffic.sent_bytes += end - start
        start, prefix = end, b""
    writer.write(bytes(4))
    await writer.drain()


def head(field_number: int, length: int) -> bytes:
    """What protobuf writes before a field of ``length`` bytes: its tag and, in groups of seven bits, its length."""
    written = bytearray([field_number << 3 | 2])
    while length >= 0x80:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*written, length])


def _parse_frame(raw: bytes) -> bytes:
    try:
        data = Frame.FromString(raw).data
    except DecodeError as error:
        raise ProtocolError("a frame cannot be read") from error
    if not 0 < len(data) <= FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(data)} bytes")
    return data


def _failure(status: int, message: bytes | bytearray) -> SwarmError:
    """What a response that is none says."""
    if status != _ERROR:
        return ProtocolError(f"a response of unknown status {status}")
    name, _, text = message.decode(errors="replace").partition("\0")
    # What a peer says may end on a terminal: nothing in it may move the cursor.
    text = "".join(c if c.isprintable() else " " for c in text[:_MAX_ERROR_CHARS])
    return _ERRORS.get(name, NetworkError)(text)
