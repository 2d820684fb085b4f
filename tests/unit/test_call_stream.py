"""The bytes of a call: what is sent arrives, and hostile bytes get a named error before memory is used for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import pytest

from peer.p2p import call_stream
from peer.p2p.call_stream import MAX_PART_BYTES, Traffic
from peer.p2p.transport import FRAME_BYTES
from peer.p2p.uplink import SMALL_FRAME_BYTES, Pacer
from swarm.errors import AlreadyRunning, NetworkError, ProtocolError, SwarmError
from swarm.files import Kept
from swarm.proto.round_pb2 import Frame

T = TypeVar("T")


class Sink:
    """As much of a StreamWriter as a call needs."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        return


def sent(send: Callable[[Any], Awaitable[None]]) -> bytes:
    sink = Sink()

    async def whole() -> None:
        await send(sink)

    asyncio.run(whole())
    return bytes(sink.data)


def received(raw: bytes, receive: Callable[[asyncio.StreamReader], Awaitable[T]]) -> T:
    async def whole() -> T:
        reader = asyncio.StreamReader()
        reader.feed_data(raw)
        reader.feed_eof()
        return await receive(reader)

    return asyncio.run(whole())


def traffic(limit_bytes: int = 1 << 30) -> Traffic:
    return Traffic(limit_bytes)


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, 3 * FRAME_BYTES + 7])
def test_a_request_and_its_deadline_arrive(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    payload = payload[:size]
    raw = sent(lambda writer: call_stream.send_request(writer, payload, 1.5, traffic()))

    async def receive(reader: asyncio.StreamReader) -> tuple[float, bytearray]:
        return await call_stream.receive_timeout_s(reader), await call_stream.receive_message(reader, size, traffic())

    assert received(raw, receive) == (1.5, payload)


@pytest.mark.parametrize("size", [0, FRAME_BYTES - 1, FRAME_BYTES, 2 * FRAME_BYTES])
def test_a_response_arrives_up_to_the_byte_that_is_allowed(size: int) -> None:
    raw = sent(lambda writer: call_stream.send_response(writer, bytes(size), traffic()))
    counted = traffic()
    assert received(raw, lambda reader: call_stream.receive_response(reader, size, counted)) == bytes(size)
    assert counted.received_bytes == size
    if size:
        with pytest.raises(ProtocolError):
            received(raw, lambda reader: call_stream.receive_response(reader, size - 1, traffic()))


async def parts_of(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    counted = traffic()
    parts = [part async for part in call_stream.response_parts(reader, max_bytes, counted)]
    assert counted.received_bytes == sum(map(len, parts)) and all(0 < len(part) <= MAX_PART_BYTES for part in parts)
    return b"".join(parts)


@pytest.mark.parametrize(
    "size", [0, 1, 125, 126, 127, 128, 16_381, 16_382, 16_383, FRAME_BYTES - 1, FRAME_BYTES, 2 * FRAME_BYTES + 7]
)
def test_a_response_in_parts_is_the_same_bytes_up_to_the_byte_that_is_allowed(size: int) -> None:
    payload = (bytes(range(256)) * (size // 256 + 1))[:size]
    raw = sent(lambda writer: call_stream.send_response(writer, payload, traffic()))
    assert received(raw, lambda reader: parts_of(reader, size)) == payload
    if size:
        with pytest.raises(ProtocolError):
            received(raw, lambda reader: parts_of(reader, size - 1))


def test_a_part_is_handed_over_before_its_frame_is_whole() -> None:
    raw = sent(lambda writer: call_stream.send_response(writer, bytes(FRAME_BYTES // 2), traffic()))

    async def first(reader: asyncio.StreamReader) -> bytes:
        async with aclosing(call_stream.response_parts(reader, FRAME_BYTES, traffic())) as parts:
            return await anext(parts)

    assert len(received(raw[:1000], first)) == 1000 - 4 - 4 - 1


@pytest.mark.parametrize(
    "field", [b"\x12\x02\x00a", b"\x0a\x03\x00a", b"\x0a\x82\x00\x00a", b"\x0a\x00", b"\x0a"], ids=repr
)
def test_parts_of_a_frame_that_is_not_plain_are_refused(field: bytes) -> None:
    with pytest.raises(ProtocolError):
        received(len(field).to_bytes(4, "big") + field + bytes(4), lambda reader: parts_of(reader, 1000))


def test_a_response_in_parts_that_is_cut_is_no_response() -> None:
    raw = sent(lambda writer: call_stream.send_response(writer, bytes(1000), traffic()))
    for end in (0, 3, 5, 9, 500, len(raw) - 1):
        with pytest.raises(asyncio.IncompleteReadError):
            received(raw[:end], lambda reader: parts_of(reader, 1000))


def test_a_response_in_parts_has_a_status() -> None:
    with pytest.raises(ProtocolError, match="without a status"):
        received(bytes(4), lambda reader: parts_of(reader, 1000))
    with pytest.raises(ProtocolError, match="unknown status 7"):
        received(framed(b"\x07abc") + bytes(4), lambda reader: parts_of(reader, 1000))
    with pytest.raises(AlreadyRunning, match="twice"):
        received(error_response(AlreadyRunning("twice")), lambda reader: parts_of(reader, 0x1000))


def error_response(error: SwarmError) -> bytes:
    return sent(lambda writer: call_stream.send_error(writer, error, traffic()))


def test_a_named_error_comes_back_as_itself() -> None:
    with pytest.raises(AlreadyRunning, match="twice"):
        received(
            error_response(AlreadyRunning("twice")),
            lambda reader: call_stream.receive_response(reader, 0x1000, traffic()),
        )


class Homemade(SwarmError):
    """A class that swarm.errors does not have."""


@pytest.mark.parametrize(
    ("case", "error", "expected"),
    [
        ("a class of no name here", Homemade("strange"), "strange"),
        ("control characters", NetworkError("a\x1b[2Jb\nc"), "a [2Jb c"),
        ("a very long text", NetworkError("x" * 10_000), "x" * 512),
    ],
)
def test_a_peers_error_is_made_harmless(case: str, error: SwarmError, expected: str) -> None:
    with pytest.raises(NetworkError) as caught:
        received(error_response(error), lambda reader: call_stream.receive_response(reader, 1 << 20, traffic()))
    assert type(caught.value) is NetworkError and str(caught.value) == expected


def framed(data: bytes) -> bytes:
    raw = Frame(data=data).SerializeToString()
    return len(raw).to_bytes(4, "big") + raw


END = bytes(4)
HOSTILE = [
    ("a frame of four gigabytes", b"\xff\xff\xff\xff"),
    ("a frame just too large", framed(bytes(FRAME_BYTES + 1))),
    ("more frames than allowed", framed(bytes(FRAME_BYTES)) * 3 + END),
    ("a frame that is no Frame", b"\0\0\0\4\xff\xff\xff\xff"),
    ("a frame without data", b"\0\0\0\2\x0a\x00" + END),
    ("no status", END),
    ("an unknown status", framed(b"\x07hello") + END),
]


@pytest.mark.parametrize("raw", [raw for _, raw in HOSTILE], ids=[name for name, _ in HOSTILE])
def test_a_hostile_response_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        received(raw, lambda reader: call_stream.receive_response(reader, 2 * FRAME_BYTES, traffic()))


@pytest.mark.parametrize("raw", [b"", b"\0\0", framed(b"\0hello"), framed(b"\0hello")[:-2]], ids=repr)
def test_a_stream_that_ends_early_is_noticed(raw: bytes) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        received(raw, lambda reader: call_stream.receive_response(reader, 100, traffic()))


def test_requests_that_are_too_much_together_are_refused() -> None:
    pieces: list[Kept] = []
    full = traffic(FRAME_BYTES + 10)
    raw = framed(bytes(FRAME_BYTES)) * 2 + END
    with pytest.raises(NetworkError, match="busy"):
        received(raw, lambda reader: call_stream.receive_request(reader, full, lambda data: data, pieces))
    assert full.held_bytes == sum(map(len, pieces)) == FRAME_BYTES, "the owner of the pieces releases them"


def test_large_pieces_of_a_request_wait_where_they_are_told_to_and_small_ones_in_memory() -> None:
    pieces: list[Kept] = []
    elsewhere: dict[int, bytes] = {}

    def keep(data: bytes) -> bytes:
        elsewhere[len(data)] = data
        return data

    raw = framed(bytes(FRAME_BYTES)) + framed(b"x" * 10) + END
    received(raw, lambda reader: call_stream.receive_request(reader, traffic(1 << 30), keep, pieces))
    assert [len(piece) for piece in pieces] == [FRAME_BYTES, 10] and list(elsewhere) == [FRAME_BYTES]


def test_who_gives_up_waiting_for_the_line_takes_no_time_of_it() -> None:
    """A peer that asks and hangs up again and again must not keep the others from sending."""

    async def main() -> None:
        counted = Traffic(1 << 30, pacer=Pacer(80_000))
        await counted.may_leave(1 << 20)  # 105 s of the line
        before = counted.pacer.wait_s(0.0)
        for _ in range(50):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(counted.may_leave(1 << 20), 0.0005)
        assert counted.pacer.wait_s(0.0) == before

    asyncio.run(main())


def test_a_small_frame_does_not_wait_behind_a_large_one_but_is_counted() -> None:
    """A vote must not take seconds because an average is on its way."""

    async def main() -> None:
        counted = Traffic(1 << 30, pacer=Pacer(1_000_000))
        await counted.may_leave(1 << 20)
        before = counted.pacer.wait_s(0.0)
        await asyncio.wait_for(counted.may_leave(SMALL_FRAME_BYTES), 0.5)
        assert counted.pacer.wait_s(0.0) > before > 1.0

    asyncio.run(main())
