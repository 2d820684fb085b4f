"""The relay of a seed peer: who is reached through it, how much, and what hostile ends do to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest

from peer.p2p import relay
from peer.p2p.relay import RESERVATION_S, STOP, Relay, Stream
from swarm.errors import NotAdmitted, ProtocolError, ResourceError, SwarmError, Unreachable
from swarm.identity import peer_id_bytes
from swarm.proto.circuit_pb2 import CircuitHop, CircuitPeer, CircuitStop

ANNE, BERT, CLEO = (bytes([i]) * 32 for i in (1, 2, 3))
DONE, FULL, FAILED, NO_RESERVATION, MALFORMED = 100, 201, 203, 204, 400


async def pair() -> tuple[Stream, Stream]:
    """Both ends of a stream."""
    one, other = socket.socketpair()
    return await asyncio.open_connection(sock=one), await asyncio.open_connection(sock=other)


async def say(stream: Stream, message: CircuitHop | CircuitStop) -> None:
    raw = message.SerializeToString()
    stream[1].write(bytes([len(raw)]) + raw)
    await stream[1].drain()


async def hear(stream: Stream, size: int | None = None) -> bytes:
    return await asyncio.wait_for(stream[0].readexactly(size or (await stream[0].readexactly(1))[0]), 5)


class World:
    """A relay, and peers that accept connections as ``answer`` says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answer = CircuitStop(type=1, status=DONE)
        self.near: list[Stream] = []
        self.far: list[Stream] = []
        self.asked: list[CircuitStop] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.hosts: dict[bytes, str] = {}
        self.relay = Relay(self.open_stream, self.check, self.seen_at, lambda: self.now)

    def check(self, caller: bytes, proof: bytes) -> None:
        if proof != b"admitted":
            raise NotAdmitted("who are you")

    async def seen_at(self, peer: bytes) -> list[str]:
        return [f"/{self.hosts[peer]}/tcp/7"] if peer in self.hosts else []

    async def open_stream(self, peer: bytes, protocol: str, timeout_s: float) -> Stream:
        assert protocol == STOP
        if peer == CLEO:
            raise Unreachable("Cleo is away")
        ours, far = await pair()
        self.far.append(far)
        self.tasks.append(asyncio.create_task(self._shake_hands(far)))
        return ours

    async def _shake_hands(self, far: Stream) -> None:
        self.asked.append(CircuitStop.FromString(await hear(far)))
        await say(far, self.answer)

    async def dial(self, caller: bytes, target: bytes, kind: int = 1) -> tuple[int, Stream]:
        """What the relay says to somebody who dials, and the stream."""
        near, ours = await pair()
        self.near.append(near)
        self.tasks.append(asyncio.create_task(self.relay.on_hop(caller, *ours)))
        await say(near, CircuitHop(type=kind, peer=CircuitPeer(id=peer_id_bytes(target))))
        return CircuitHop.FromString(await hear(near)).status, near

    async def end(self) -> None:
        for stream in (*self.near, *self.far):
            stream[1].close()
        await asyncio.wait_for(asyncio.gather(*self.tasks), 5)


def check(scenario: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        world = World()
        try:
            await asyncio.wait_for(scenario(world), 20)
        finally:
            await world.end()
        assert not world.relay._taken, "every connection that ended is forgotten"

    asyncio.run(whole())


def test_bytes_pass_both_ways_until_one_end_closes() -> None:
    async def scenario(world: World) -> None:
        await world.relay.on_reserve(BERT, b"admitted")
        status, anne = await world.dial(ANNE, BERT)
        assert status == DONE and world.asked[0].peer.id == peer_id_bytes(ANNE), "Bert is told who it is"
        bert = world.far[0]
        anne[1].write(b"a" * (1 << 20))
        assert await hear(bert, 1 << 20) == b"a" * (1 << 20)
        bert[1].write(b"yes")
        assert await hear(anne, 3) == b"yes"
        bert[1].close()
        assert await asyncio.wait_for(anne[0].read(), 5) == b""
        assert world.relay.passed_bytes == (1 << 20) + 3

    check(scenario)


def test_only_who_is_admitted_and_asked_lately_is_reached() -> None:
    async def scenario(world: World) -> None:
        with pytest.raises(NotAdmitted):
            await world.relay.on_reserve(BERT, b"forged")
        with pytest.raises(ProtocolError):
            await world.relay.on_reserve(BERT, bytes(1 << 20))
        assert (await world.dial(ANNE, BERT))[0] == NO_RESERVATION
        await world.relay.on_reserve(BERT, b"admitted")
        world.now = RESERVATION_S - 1
        assert (await world.dial(ANNE, BERT))[0] == DONE
        world.now = RESERVATION_S
        assert (await world.dial(ANNE, BERT))[0] == NO_RESERVATION

    check(scenario)


def test_what_goes_wrong_is_told_and_ends() -> None:
    async def scenario(world: World) -> None:
        for peer in (ANNE, BERT, CLEO):
            await world.relay.on_reserve(peer, b"admitted")
        assert (await world.dial(ANNE, CLEO))[0] == FAILED, "away"
        assert (await world.dial(ANNE, BERT, kind=0))[0] == MALFORMED, "no reservations in libp2p's own way"
        assert (await world.dial(ANNE, ANNE))[0] == MALFORMED
        world.answer = CircuitStop(type=1, status=203)
        assert (await world.dial(ANNE, BERT))[0] == FAILED, "refused by the other end"

    check(scenario)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xff\xff\xff\x01", b"\x05\xff\xff\xff\xff\xff", b"\x00", b"\x03\x12\x01\x00"]
)
def test_nonsense_ends_the_stream(raw: bytes) -> None:
    async def scenario(world: World) -> None:
        anne, ours = await pair()
        world.near.append(anne)
        anne[1].write(raw)
        anne[1].write_eof()
        await asyncio.wait_for(world.relay.on_hop(ANNE, *ours), 5)
        assert await asyncio.wait_for(anne[0].read(), 5) == b""

    check(scenario)


def test_connections_and_reservations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_CIRCUITS_PER_PEER", 2)
    monkeypatch.setattr(relay, "MAX_RESERVATIONS", 2)

    async def scenario(world: World) -> None:
        await world.relay.on_reserve(BERT, b"admitted")
        await world.relay.on_reserve(ANNE, b"admitted")
        with pytest.raises(ResourceError):
            await world.relay.on_reserve(CLEO, b"admitted")
        await world.relay.on_reserve(BERT, b"admitted")
        assert [(await world.dial(ANNE, BERT))[0] for _ in range(3)] == [DONE, DONE, FULL]
        world.now = RESERVATION_S + 1
        await world.relay.on_reserve(CLEO, b"admitted")

    check(scenario)


@pytest.mark.parametrize(
    ("case", "limits", "hosts", "accepted"),
    [
        ("in all", {"MAX_STRANGERS": 3}, ["ip4/45.77.0.1", "ip4/45.77.0.2"], 3),
        ("one key", {"MAX_PER_STRANGER": 3}, ["ip4/45.77.0.1"], 3),
        ("keys at one address", {"MAX_STRANGERS_PER_HOST": 3}, ["ip4/45.77.0.1"] * 4, 3),
        ("keys in one home", {"MAX_STRANGERS_PER_HOST": 3}, [f"ip6/2606:4700::{i}" for i in range(1, 5)], 3),
        ("keys in different homes", {"MAX_STRANGERS_PER_HOST": 1}, [f"ip6/2606:{i}::1" for i in range(1, 5)], 4),
    ],
)
def test_strangers_cannot_fill_the_relay(
    case: str, limits: dict[str, int], hosts: list[str], accepted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever showed an admission gets through all the same."""
    for name, most in limits.items():
        monkeypatch.setattr(relay, name, most)

    async def scenario(world: World) -> None:
        for peer in (ANNE, BERT):
            await world.relay.on_reserve(peer, b"admitted")
        world.hosts = {bytes([100 + number]) * 32: host for number, host in enumerate(hosts)}
        callers = list(world.hosts) * (4 // len(hosts))
        answers = [(await world.dial(caller, BERT))[0] for caller in callers]
        assert answers.count(DONE) == accepted and answers.count(FULL) == 4 - accepted, case
        assert (await world.dial(ANNE, BERT))[0] == DONE

    check(scenario)


def test_requests_that_say_nothing_are_bounded_for_each_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is closed at once, and another caller's is answered."""
    monkeypatch.setattr(relay, "MAX_REQUESTS_PER_PEER", 2)

    async def scenario(world: World) -> None:
        await world.relay.on_reserve(BERT, b"admitted")
        ends = [await pair() for _ in range(3)]
        for near, ours in ends:
            world.near.append(near)
            world.tasks.append(asyncio.create_task(world.relay.on_hop(ANNE, *ours)))
        assert await asyncio.wait_for(ends[2][0][0].read(), 5) == b""
        assert (await world.dial(CLEO, BERT))[0] == DONE

    check(scenario)


@pytest.mark.parametrize(
    ("limit", "hosts"),
    [
        ("MAX_STRANGERS", ["ip4/45.77.0.1", "ip4/45.77.0.2", "ip4/45.77.0.3"]),
        ("MAX_STRANGERS_PER_HOST", ["ip4/45.77.0.1"] * 3),
    ],
)
def test_strangers_that_say_nothing_leave_room_for_requests_of_the_admitted(
    limit: str, hosts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many keys they have: one more stranger is closed at once."""
    monkeypatch.setattr(relay, limit, 2)

    async def scenario(world: World) -> None:
        for peer in (ANNE, BERT):
            await world.relay.on_reserve(peer, b"admitted")
        world.hosts = {bytes([100 + number]) * 32: host for number, host in enumerate(hosts)}
        ends = [await pair() for _ in hosts]
        for stranger, (near, ours) in zip(world.hosts, ends, strict=True):
            world.near.append(near)
            world.tasks.append(asyncio.create_task(world.relay.on_hop(stranger, *ours)))
        assert await asyncio.wait_for(ends[-1][0][0].read(), 5) == b""
        assert not any(near[0].at_eof() for near, _ in ends[:-1]), "the others may still say something"
        assert (await world.dial(ANNE, BERT))[0] == DONE

    check(scenario)


def test_a_connection_on_which_nobody_says_anything_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on which either end goes on talking stays."""
    monkeypatch.setattr(relay, "SILENCE_S", 0.3)

    async def scenario(world: World) -> None:
        await world.relay.on_reserve(BERT, b"admitted")
        _, anne = await world.dial(ANNE, BERT)
        _, cleo = await world.dial(CLEO, BERT)
        silent = asyncio.create_task(cleo[0].read())
        talks = 0
        while not silent.done():
            anne[1].write(b".")
            await hear(world.far[0], 1)
            await asyncio.wait({silent}, timeout=0.05)
            talks += 1
        assert silent.result() == b"" and talks > 2

    check(scenario)


def test_an_end_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_SHAKE_HANDS_S", 0.1)

    async def scenario(world: World) -> None:
        anne, ours = await pair()
        world.near.append(anne)
        with contextlib.suppress(SwarmError):
            await asyncio.wait_for(world.relay.on_hop(ANNE, *ours), 5)
        assert await asyncio.wait_for(anne[0].read(), 5) == b""

    check(scenario)
