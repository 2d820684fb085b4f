"""Peers behind routers that connect directly where their routers let them, over real libp2p."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from scripts.netlab.lab import Lab, Link, why_no_nat
from tests.integration.test_nat_transport import EVERYWHERE, LARGE, Peer

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(why_no_nat()), reason=str(why_no_nat()))]

ANY_PORT = "/ip4/0.0.0.0/tcp/0"
SEED, CONE, OTHER_CONE, SYMMETRIC = range(4)
# Addresses that count as public: nobody is introduced at others.
NETWORK = "45.77"


def test_behind_cone_routers_peers_connect_directly_and_behind_symmetric_ones_by_relay() -> None:
    """What two cones say to each other does not pass the seed peer, both ways; what a symmetric one says does."""
    links = [Link(), Link(nat="cone"), Link(nat="cone"), Link(nat="symmetric")]
    with Lab(links, NETWORK) as lab, ExitStack() as stack:

        def start(place: int, **options: object) -> Peer:
            peer = Peer(lab, place, **options)
            stack.callback(peer.end)
            return peer

        def passed(caller: Peer, called: Peer) -> tuple[bool, int]:
            """Whether the connection is direct, and what the seed peer sent meanwhile."""
            before, _ = lab.wire_bytes(SEED)
            answer = caller.call(called, LARGE)
            assert answer.get("right"), answer
            return bool(answer["direct"]), lab.wire_bytes(SEED)[0] - before

        seed = start(SEED, listen=[EVERYWHERE], relays=True)
        seeds = [address for address in seed.addresses if lab.address(SEED) in address]
        places = (CONE, OTHER_CONE, SYMMETRIC)
        cone, other, symmetric = [start(place, listen=[ANY_PORT], seeds=seeds) for place in places]
        assert all(seed.told["id"] in peer.addresses[0] for peer in (cone, other, symmetric)), "nobody can dial them"
        for caller, called in ((cone, other), (other, cone)):
            is_direct, sent = passed(caller, called)
            assert is_direct and sent < LARGE / 20
        is_direct, sent = passed(symmetric, cone)
        assert not is_direct and sent > LARGE
