"""A replica's own part in an attempt: what counts as offered to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from peer.rounds.replica import Replica
from peer.rounds.round_actions import TakeSnapshot
from swarm.errors import DiskFull
from swarm.files import Kept
from swarm.identity import Identity
from swarm.proto.round_pb2 import Member, OpenRound, Part
from tests.unit.test_shard import make_shard

ME = Identity(b"m" * 32)
BALLOT = (1, ME.public_key)


async def at_once(work: Callable[[], Any]) -> Any:
    return work()


def full(data: bytes) -> Kept:
    raise DiskFull("no room")


@pytest.mark.parametrize(
    ("case", "keep", "is_wanted", "is_offered"),
    [
        ("whole", lambda data: data, True, True),
        ("a later attempt began", lambda data: data, False, False),
        ("no room for it", full, True, False),
    ],
)
def test_only_an_attempt_that_gets_a_contribution_counts_as_offered(
    case: str, keep: Callable[[bytes], Kept], is_wanted: bool, is_offered: bool
) -> None:
    """A share of ours in any other is that of our process before it was killed."""

    async def scenario() -> None:
        shard = make_shard()
        parts: Any = SimpleNamespace(shard=shard, trainer=None, identity=ME, run_blocking=at_once)
        opened = OpenRound(
            members=[Member(peer_key=ME.public_key, contributes=True)], parts=[Part(num_slices=shard.num_slices)]
        )
        snapshot = shard.offer(shard.anchor * 0 + 1, 5)
        assert snapshot is not None
        encoding = Replica(parts, asyncio.Lock()).encode(
            snapshot, TakeSnapshot(BALLOT, opened), keep, lambda: is_wanted, lambda codec, sizes: range(len(sizes))
        )
        (offered,) = await asyncio.gather(encoding, return_exceptions=True)
        assert (getattr(offered, "weight_tokens", 0) == 5) == is_offered, case
        assert snapshot.ballots == ({BALLOT} if is_offered else set()), case

    asyncio.run(scenario())
