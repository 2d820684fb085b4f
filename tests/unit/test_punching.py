"""Ways through two routers: who is introduced to whom, which addresses are tried, and what hostile ends get."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from peer.p2p import punching
from peer.p2p.punching import OPEN_METHOD, PUNCH_METHOD, TRY_AGAIN_S, Endpoint, Introducer, Puncher
from swarm.errors import NetworkError, NotAdmitted, ProtocolError, ResourceError, SwarmError, Unreachable

ANNE, BERT, SEED = (bytes([i]) * 32 for i in (1, 2, 3))
AT_ANNE, AT_BERT = "/ip4/45.77.1.2/tcp/4001", "/ip4/45.77.2.2/tcp/5001"
LISTENS = ("192.168.0.2", 4001)


@pytest.mark.parametrize(
    ("address", "is_tried"),
    [
        (AT_ANNE, True),
        ("/ip6/2606:4700::1/tcp/4001", True),
        ("/ip4/192.168.1.1/tcp/4001", False),
        ("/ip4/127.0.0.1/tcp/4001", False),
        ("/ip4/169.254.169.254/tcp/8080", False),
        ("/ip4/224.0.0.1/tcp/4001", False),
        ("/ip6/::1/tcp/4001", False),
        ("/ip6/fe80::1/tcp/4001", False),
        ("/ip6/fec0::1/tcp/4001", False),
        ("/ip6/::a00:1/tcp/4001", False),
        ("/ip6/::ffff:10.0.0.1/tcp/4001", False),
        ("/ip6/64:ff9b::a00:1/tcp/4001", False),
        ("/ip6/2002:a00:1::/tcp/4001", False),
        ("/ip6/2001:0:a00:1::1/tcp/4001", False),
        ("/ip6/2001:4860:4860::8888/tcp/4001", True),
        ("/ip4/45.77.1.2/tcp/22", False),
        ("/ip4/45.77.1.2/tcp/65536", False),
        ("/ip4/45.77.1.2/tcp/-4001", False),
        ("/ip6/45.77.1.2/tcp/4001", False),
        ("/ip4/45.77.1.2/udp/4001", False),
        ("/ip4/45.77.1.2/tcp/4001/ws", False),
        ("/dns/example.org/tcp/4001", False),
        ("/ip4/45.77.1.2", False),
        ("", False),
    ],
)
def test_only_public_addresses_and_unprivileged_ports_are_tried(address: str, is_tried: bool) -> None:
    end = Endpoint.parse(address)
    assert (end is not None) == is_tried
    assert end is None or str(end) == address


class Seed:
    """An introducer, what it sees, and what it asks of others."""

    def __init__(self) -> None:
        self.sees = {ANNE: ["/ip4/10.0.0.1/tcp/7", AT_ANNE], BERT: [AT_BERT]}
        self.kept = {BERT}
        self.asked: list[tuple[bytes, str, bytes]] = []
        self.answer: Callable[[], Awaitable[bytes]] = self._yes
        self.introducer = Introducer(self.check, self.kept.__contains__, self.seen_at, self.ask)

    async def _yes(self) -> bytes:
        return b""

    def check(self, caller: bytes, proof: bytes) -> None:
        if proof != b"admitted":
            raise NotAdmitted("who are you")

    async def seen_at(self, peer: bytes) -> list[str]:
        return self.sees[peer]

    async def ask(self, peer: bytes, method: str, request: bytes) -> bytes:
        self.asked.append((peer, method, request))
        return await self.answer()


def test_each_of_two_learns_where_the_other_is_seen() -> None:
    """The asked one is told before the asking one has its answer."""
    seed = Seed()
    assert asyncio.run(seed.introducer.on_punch(ANNE, BERT + b"admitted")) == AT_BERT.encode()
    assert seed.asked == [(BERT, OPEN_METHOD, ANNE + AT_ANNE.encode())]


@pytest.mark.parametrize(
    ("case", "request_", "change", "error"),
    [
        ("not admitted", BERT + b"forged", {}, NotAdmitted),
        ("an endless proof", BERT + bytes(5000), {}, ProtocolError),
        ("nobody is named", b"admitted", {}, ProtocolError),
        ("itself", ANNE + b"admitted", {}, ProtocolError),
        ("a peer that asked for no relay", BERT + b"admitted", {"kept": set()}, NetworkError),
        ("the caller is seen at home alone", BERT + b"admitted", {ANNE: ["/ip4/10.0.0.1/tcp/4001"]}, NetworkError),
        ("the other is connected by nothing", BERT + b"admitted", {BERT: []}, NetworkError),
    ],
)
def test_nobody_else_is_introduced(
    case: str, request_: bytes, change: dict[object, object], error: type[SwarmError]
) -> None:
    seed = Seed()
    if "kept" in change:
        seed.kept.clear()
    seed.sees.update({k: v for k, v in change.items() if isinstance(k, bytes) and isinstance(v, list)})
    with pytest.raises(error):
        asyncio.run(seed.introducer.on_punch(ANNE, request_))
    assert seed.asked == [], case


def test_introductions_under_way_are_bounded_for_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused; a peer that does not answer holds its place for a while only."""
    monkeypatch.setattr(punching, "PUNCH_S", 0.05)
    monkeypatch.setattr(punching, "MAX_PUNCHES_PER_PEER", 2)
    seed = Seed()

    async def never() -> bytes:
        await asyncio.Event().wait()
        return b""

    async def scenario() -> None:
        seed.answer = never
        asked = [seed.introducer.on_punch(ANNE, BERT + b"admitted") for _ in range(3)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NetworkError, NetworkError, ResourceError]
        seed.answer = seed._yes
        assert await seed.introducer.on_punch(ANNE, BERT + b"admitted") == AT_BERT.encode()

    asyncio.run(scenario())


class Volunteer:
    """A puncher, with what it is told and what it dials."""

    def __init__(self, key: bytes) -> None:
        self.listens: tuple[str, int] | None = LISTENS
        self.answer: bytes | SwarmError = AT_BERT.encode()
        self.asked: list[tuple[bytes, str, bytes]] = []
        self.dialled: list[tuple[bytes, str]] = []
        self.was_asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self.puncher = Puncher(key, lambda: self.listens, lambda peer: peer == SEED, self.ask, self.dial)

    async def ask(self, peer: bytes, method: str, request: bytes) -> bytes:
        self.asked.append((peer, method, request))
        self.was_asked.set()
        await self.may_answer.wait()
        if isinstance(self.answer, SwarmError):
            raise self.answer
        return self.answer

    async def dial(self, peer: bytes, address: str) -> None:
        self.dialled.append((peer, address))


def test_who_is_introduced_dials_the_address_that_it_is_told() -> None:
    """Calls that meet share one attempt, and only a seed peer is asked."""

    async def scenario() -> None:
        anne = Volunteer(ANNE)
        await asyncio.gather(*(anne.puncher.punch(BERT, (BERT, SEED), b"admitted") for _ in range(3)))
        assert anne.asked == [(SEED, PUNCH_METHOD, BERT + b"admitted")]
        assert anne.dialled == [(BERT, AT_BERT)]
        await anne.puncher.punch(BERT, (ANNE,), b"admitted")
        assert len(anne.asked) == 1
        assert anne.puncher.is_worth_it(BERT)

    asyncio.run(scenario())


@pytest.mark.parametrize("answer", [b"", b"\xff" * 100, b"/ip4/192.168.1.1/tcp/8080", Unreachable("away")])
def test_what_fails_is_left_to_the_relay_for_a_while(
    answer: bytes | SwarmError, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(punching, "_now", lambda: now)

    async def scenario() -> None:
        nonlocal now
        anne = Volunteer(ANNE)
        anne.answer = answer
        await anne.puncher.punch(BERT, (SEED,), b"")
        assert anne.dialled == [] and not anne.puncher.is_worth_it(BERT)
        assert anne.puncher.is_worth_it(SEED), "others are tried"
        now += TRY_AGAIN_S + 1
        assert anne.puncher.is_worth_it(BERT)

    asyncio.run(scenario())


def test_who_listens_to_nobody_outside_neither_tries_nor_is_opened() -> None:
    async def scenario() -> None:
        anne = Volunteer(ANNE)
        anne.listens = None
        assert not anne.puncher.is_worth_it(BERT)
        with pytest.raises(NetworkError):
            await anne.puncher.on_open(SEED, BERT + AT_BERT.encode())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("case", "caller", "request_", "error"),
    [
        ("a peer that is no relay", BERT, BERT + AT_BERT.encode(), NotAdmitted),
        ("an address at home", SEED, BERT + b"/ip4/192.168.1.1/tcp/8080", ProtocolError),
        ("nobody is named", SEED, AT_BERT.encode()[:10], ProtocolError),
        ("nonsense", SEED, b"\xff" * 500, ProtocolError),
    ],
)
def test_a_router_is_opened_for_nobody_else(
    case: str, caller: bytes, request_: bytes, error: type[SwarmError], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        anne = Volunteer(ANNE)
        with pytest.raises(error):
            await anne.puncher.on_open(caller, request_)
        assert not anne.puncher._opened, case

    asyncio.run(scenario())


def test_openings_are_bounded_and_of_two_that_dial_at_once_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower key dials: it refuses to be opened meanwhile, and the higher one lets it in."""

    async def hang(port: int, end: Endpoint) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(punching, "_connect_from", hang)
    monkeypatch.setattr(punching, "MAX_OPENING", 2)

    async def scenario() -> None:
        for me, other, refuses in ((ANNE, BERT, True), (BERT, ANNE, False)):
            volunteer = Volunteer(me)
            volunteer.may_answer.clear()
            trying = asyncio.create_task(volunteer.puncher.punch(other, (SEED,), b""))
            await asyncio.wait_for(volunteer.was_asked.wait(), 5)
            if refuses:
                with pytest.raises(NetworkError):
                    await volunteer.puncher.on_open(SEED, other + AT_BERT.encode())
            else:
                assert await volunteer.puncher.on_open(SEED, other + AT_BERT.encode()) == b""
            await volunteer.puncher.close()
            await trying
        anne = Volunteer(ANNE)
        for _ in range(2):
            await anne.puncher.on_open(SEED, BERT + AT_BERT.encode())
        with pytest.raises(ResourceError):
            await anne.puncher.on_open(SEED, BERT + AT_BERT.encode())
        await anne.puncher.close()
        assert not anne.puncher._opened

    asyncio.run(scenario())
