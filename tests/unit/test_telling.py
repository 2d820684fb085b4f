"""What a peer tells of itself and of the run: what its person sees, what others and the coordinator are told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from peer.runtime import Peer
from peer.training.between_steps import Stats
from swarm.cli import words
from swarm.identity import Identity
from swarm.proto.round_pb2 import Status
from tests.simulation.memory_transport import MemoryNetwork
from tests.unit.test_runtime import WITHIN_S, Transport, make_peer, make_state

ANNA, BORIS = b"a" * 32, b"b" * 32


def trains(tokens_per_s: float, could: float, **more: Any) -> Status:
    return Status(round=4, trains=True, tokens_per_s=tokens_per_s, service_tokens_per_s=could, **more)


def told_by(folder: Path, *statuses: dict[bytes, Status], speeds: dict[int, float] | None = None) -> dict[str, Any]:
    """What a peer of both shards says of the run where these are the others' statuses; ``speeds``: where it trains."""

    async def main() -> dict[str, Any]:
        peer = make_peer(folder, Transport(MemoryNetwork(), me := Identity(b"i" * 32)), me, make_state(2))
        for member, of_shard in zip(peer.hosted.members, statuses, strict=True):
            member.statuses = of_shard
        peer.words.shard_tokens_per_s, peer.words.trains = speeds or {}, speeds is not None
        return of(peer)

    return asyncio.run(asyncio.wait_for(main(), WITHIN_S))


def of(peer: Peer) -> dict[str, Any]:
    return peer.telling.of_shards(Stats(tokens=120, entered_later={1: 40}))


def test_what_passed_the_first_shard_is_told_apart_from_what_entered_later(tmp_path: Path) -> None:
    told = told_by(tmp_path, {}, {})
    assert (told["hosts"], told["first shard tokens"]) == ([0, 1], 80)


def test_each_shard_tells_its_replicas_their_speed_and_who_is_the_bottleneck(tmp_path: Path) -> None:
    """Anna holds the whole, Boris the second shard; what entered there is no further token of the run."""
    told = told_by(tmp_path, {ANNA: trains(10, 40)}, {ANNA: trains(12, 40), BORIS: trains(8, 9)}, speeds={0: 3, 1: 5})
    assert [(each["replicas"], each["tokens/s"], each["could tokens/s"]) for each in told["shards"]] == [
        (2, 13, 40),
        (3, 25, 49),
    ]
    assert told["run tokens/s"] == 13 and told["waits for"] == ""
    assert words.in_words("shards", told["shards"]) == (
        "0 here: round 0, 2 replicas, 13 tokens/s of 40 (bottleneck); 1 here: round 0, 3 replicas, 25 tokens/s of 49"
    )


def test_a_shard_without_a_replica_is_shown_and_waited_for_until_one_is_back(tmp_path: Path) -> None:
    """Who leaves, or only serves, is no replica."""
    gone = {ANNA: trains(10, 40, leaving=True), BORIS: Status(round=4)}
    told = told_by(tmp_path / "lacking", {ANNA: trains(0, 40)}, gone)
    assert told["waits for"] == "a replica of shard 1"
    shown = words.in_words("shards", told["shards"])
    assert shown == "0: round 0, 1 replicas, 0 tokens/s of 40; 1: round 0, no replica"
    assert [each["bottleneck"] for each in told["shards"]] == [False, True]
    back = told_by(tmp_path / "back", {ANNA: trains(9, 40)}, {BORIS: trains(9, 30)})
    assert back["waits for"] == "" and back["shards"][1]["replicas"] == 1
