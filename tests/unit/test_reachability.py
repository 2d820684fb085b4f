"""Where others reach a peer: what seed peers find by dialling back, and which relays it names."""

from __future__ import annotations

import asyncio
import itertools
import socket

import pytest

from peer.p2p.reachability import DIAL_BACK_METHOD, MAX_RELAYS, Reach, ask_within, dial_back, is_relayed, seeds_of
from peer.p2p.relay import RESERVATION_S, RESERVE_METHOD
from swarm.errors import DataError, ProtocolError, Unreachable
from swarm.identity import Identity, peer_id_of
from tests.simulation.virtual_time import run

OWN_END = "/p2p/" + Identity(b"o" * 32).peer_id
HOME = ("/ip4/127.0.0.1/tcp/4001" + OWN_END, "/ip4/192.168.0.2/tcp/4001" + OWN_END)
SEEDS = [Identity(bytes([i]) * 32) for i in range(1, 6)]


def addresses_of(number: int) -> tuple[str, ...]:
    end = "/p2p/" + SEEDS[number].peer_id
    return ("/ip4/127.0.0.1/tcp/7" + end, f"/ip4/198.51.100.{number}/tcp/7" + end)


ALL = {seed.public_key: addresses_of(number) for number, seed in enumerate(SEEDS)}


class Asked:
    """Seed peers whose answers a test sets; one without an answer is away."""

    def __init__(self, answers: dict[int, bytes]) -> None:
        self._answers = {SEEDS[number].public_key: answer for number, answer in answers.items()}
        self.asked: list[tuple[int, str, bytes]] = []

    async def __call__(self, seed: bytes, method: str, request: bytes) -> bytes:
        self.asked.append((next(i for i, s in enumerate(SEEDS) if s.public_key == seed), method, request))
        if seed not in self._answers:
            raise Unreachable("away")
        return self._answers[seed]


@pytest.mark.parametrize(
    ("case", "answers", "is_dialable", "first"),
    [
        ("dialled back from outside", {0: b"/ip4/203.0.113.5/tcp/4001"}, True, "/ip4/203.0.113.5/tcp/4001" + OWN_END),
        ("one of two reaches us", {0: b"", 1: b"/ip4/203.0.113.5/tcp/4001"}, True, "/ip4/203.0.113.5/tcp/4001"),
        ("nobody reaches us", {0: b"", 1: b""}, False, HOME[1]),
        ("another port than ours", {0: b"/ip4/203.0.113.5/tcp/22"}, False, HOME[1]),
        ("no address at all", {0: b"\xff\x00 nonsense"}, False, HOME[1]),
        ("all seed peers are away", {}, True, HOME[0]),
    ],
)
def test_a_peer_learns_whether_it_can_be_dialled(
    case: str, answers: dict[int, bytes], is_dialable: bool, first: str
) -> None:
    reach, asked = Reach(OWN_END), Asked(answers)
    asyncio.run(reach.look(HOME, ALL, asked))
    assert reach.is_dialable == is_dialable, case
    assert reach.addresses(HOME)[0].startswith(first), case
    assert {(method, request) for _, method, request in asked.asked} == {(DIAL_BACK_METHOD, b"\x0f\xa1")}


def test_who_cannot_be_dialled_names_relays_first_and_nobody_s_loopback() -> None:
    async def scenario() -> None:
        reach, asked = Reach(OWN_END), Asked({1: b"", 2: b"", 3: b"", 4: b""})
        await reach.look(HOME, dict(list(ALL.items())[1:]), asked)
        await reach.reserve(ALL, b"proof", asked)
        told = reach.addresses(HOME)
        relays = [f"/ip4/198.51.100.{i}/tcp/7/p2p/{SEEDS[i].peer_id}/p2p-circuit{OWN_END}" for i in (1, 2, 3)]
        assert told == (*relays, HOME[1]) and len(relays) == MAX_RELAYS
        assert is_relayed(told) and not is_relayed(HOME)
        assert (0, RESERVE_METHOD, b"proof") in asked.asked, "the first was asked, and was away"

    asyncio.run(scenario())


def test_a_relay_that_went_away_is_replaced_and_one_that_lives_is_kept() -> None:
    async def scenario() -> None:
        reach = Reach(OWN_END)
        reach.is_dialable = False
        await reach.reserve(ALL, b"", Asked({2: b"", 4: b""}))
        await reach.reserve(ALL, b"", Asked({0: b"", 1: b"", 3: b"", 4: b""}))
        names = [address.split("/")[2] for address in reach.addresses(())]
        assert names == ["198.51.100.4", "198.51.100.0", "198.51.100.1"]

    asyncio.run(scenario())


@pytest.mark.parametrize("living", [0, 7, 15])
def test_no_reservation_ends_while_all_other_seed_peers_are_silent(living: int) -> None:
    """The one that lives is found wherever it is in the list, and asked again in time."""
    seeds = {Identity(bytes([i]) * 32).public_key: (f"/ip4/198.51.100.{i}/tcp/7/p2p/x",) for i in range(1, 17)}
    alive, asked_at = list(seeds)[living], list[float]()

    async def ask(seed: bytes, method: str, request: bytes) -> bytes:
        if seed != alive:
            return await ask_within(asyncio.sleep(1000, b""))
        asked_at.append(asyncio.get_running_loop().time())
        return b""

    async def scenario() -> None:
        reach = Reach(OWN_END)
        reach.is_dialable = False
        began = asyncio.get_running_loop().time()
        await reach.reserve(seeds, b"", ask)
        keeping = asyncio.create_task(reach.keep_reserved(lambda: seeds, lambda: b"", ask))
        await asyncio.wait({keeping}, timeout=600)
        assert not keeping.done() and reach.addresses(()), "it is told all the while"
        times = [began, *asked_at, began + 600.0]
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < RESERVATION_S

    run(scenario())


def test_three_relays_are_enough_while_others_are_silent() -> None:
    """A start does not wait for the silent ones."""
    began: list[bytes] = []

    async def ask(seed: bytes, method: str, request: bytes) -> bytes:
        began.append(seed)
        return await ask_within(asyncio.sleep(1000 if seed in list(ALL)[:2] else 0.1, b""))

    async def scenario() -> None:
        reach = Reach(OWN_END)
        reach.is_dialable = False
        started = asyncio.get_running_loop().time()
        await reach.reserve(ALL, b"", ask)
        assert asyncio.get_running_loop().time() - started < 1 and len(began) == len(ALL)
        assert [address.split("/")[2] for address in reach.addresses(())] == [f"198.51.100.{i}" for i in (2, 3, 4)]

    run(scenario())


def test_only_the_caller_s_own_address_is_dialled_back() -> None:
    """The answer names where it was reached; nothing where the port is closed, and no other machine is asked."""

    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            request = port.to_bytes(2, "big")
            assert await dial_back(request, ["/ip4/127.0.0.1/tcp/50000"]) == f"/ip4/127.0.0.1/tcp/{port}".encode()
            assert await dial_back(request, ["/ip4/127.0.0.2/tcp/50000", "/dns/localhost/tcp/1", "", "/"]) == b""
            assert await dial_back(bytes(2), ["/ip4/127.0.0.1/tcp/50000"]) == b""
        assert await dial_back(request, ["/ip4/127.0.0.1/tcp/50000"]) == b""
        with pytest.raises(ProtocolError):
            await dial_back(b"127.0.0.1:22", ["/ip4/127.0.0.1/tcp/50000"])

    asyncio.run(scenario())


def test_seed_addresses_are_grouped_by_their_peer() -> None:
    told = [address for number in (1, 0) for address in addresses_of(number)]
    assert seeds_of(told) == {SEEDS[1].public_key: addresses_of(1), SEEDS[0].public_key: addresses_of(0)}
    with pytest.raises(DataError):
        seeds_of([f"/ip4/1.2.3.4/tcp/1/p2p/{peer_id_of(b'k' * 32)[:-4]}"])
