"""Peers behind routers that translate addresses, over real libp2p: found out by themselves, and reached by relay."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from scripts.netlab.lab import Lab, Link, why_no_nat

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(why_no_nat()), reason=str(why_no_nat()))]

EVERYWHERE, NOWHERE = "/ip4/0.0.0.0/tcp/4001", "/ip4/127.0.0.1/tcp/4001"
SEED, CONE, SYMMETRIC, PUBLIC, SHUT = range(5)
LARGE = 6 << 20  # more than one frame, and more than the 128 KiB after which p2pd's own relay ends a connection


class Peer:
    """A process in a namespace."""

    def __init__(self, lab: Lab, place: int, **options: Any) -> None:
        command = [*lab.inside(place), sys.executable, "-m", "tests.integration.nat_peer", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._told: dict[str, Any] | None = None

    @property
    def told(self) -> dict[str, Any]:
        if self._told is None:
            self._told = self._hear()
        return self._told

    @property
    def addresses(self) -> list[str]:
        return list(self.told["addresses"])

    def call(self, other: Peer, size: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        asked = {"key": other.told["key"], "addresses": other.addresses, "bytes": size}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told

    def end(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def peers() -> Iterator[list[Peer]]:
    """A seed peer; behind routers of both kinds; one that can be dialled; one that listens to itself alone."""
    links = [Link(), Link(nat="cone"), Link(nat="symmetric"), Link(), Link()]
    with Lab(links) as lab, ExitStack() as stack:

        def start(place: int, **options: Any) -> Peer:
            peer = Peer(lab, place, **options)
            stack.callback(peer.end)
            return peer

        seed = start(SEED, listen=[EVERYWHERE], relays=True)
        seeds = [address for address in seed.addresses if lab.address(SEED) in address]
        others = [start(place, listen=[EVERYWHERE], seeds=seeds) for place in (CONE, SYMMETRIC, PUBLIC)]
        yield [seed, *others, start(SHUT, listen=[NOWHERE], seeds=seeds)]


def test_a_peer_finds_out_by_itself_whether_it_can_be_dialled(peers: list[Peer]) -> None:
    """Those that cannot name the relay first, and never an address that means another machine elsewhere."""
    relay = f"/p2p/{peers[SEED].told['id']}/p2p-circuit/p2p/"
    for place in (CONE, SYMMETRIC, SHUT):
        assert relay in peers[place].addresses[0]
        assert not any("127.0.0.1" in address for address in peers[place].addresses)
    assert not any(relay in address for address in peers[PUBLIC].addresses)


@pytest.mark.parametrize(
    ("caller", "called"),
    [(CONE, PUBLIC), (SYMMETRIC, PUBLIC), (CONE, SYMMETRIC), (SYMMETRIC, CONE), (PUBLIC, SHUT), (SHUT, CONE)],
)
def test_large_calls_reach_every_peer(peers: list[Peer], caller: int, called: int) -> None:
    """Whole and unchanged; without the relay where one of the two can be dialled and the other dials."""
    answer = peers[caller].call(peers[called], LARGE)
    assert answer.get("right"), answer
    assert answer["direct"] or called != PUBLIC, answer
