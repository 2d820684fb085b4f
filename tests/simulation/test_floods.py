"""Floods that reach a replica's exchange, and quiet: neither costs memory, work or time without bound."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from peer.rounds.round import RoundMachine
from peer.rounds.shard import ReplicaSnapshot, Shard
from swarm.errors import ProtocolError
from swarm.proto.round_pb2 import Part, RoundMessage
from tests.simulation.swarm_in_memory import SimulatedPeer
from tests.simulation.test_rounds import start
from tests.simulation.virtual_time import run

NAMES = ["seed", "v0", "v1", "v2"]


def test_a_flood_of_openings_is_answered_with_few_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile leader opens the round again and again: only the newest attempt is worth the work."""
    encoded: list[int] = []
    encode = Shard.encode_measured

    def counting(shard: Shard, snapshot: ReplicaSnapshot, part: Part) -> tuple[bytes, tuple[float, float]]:
        encoded.append(1)
        return encode(shard, snapshot, part)

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(1, NAMES)
        for name in NAMES[1:]:
            trainer = swarm.peers[name].trainer
            assert trainer is not None
            trainer.tokens_per_step = 0
        await asyncio.sleep(10)
        victim, leader = swarm.peers["v0"], swarm.peers["seed"]
        assert victim.trainer is not None
        victim.trainer.tokens_trained += 10
        monkeypatch.setattr(Shard, "encode_measured", counting)
        for number in range(1, 300):
            message = opening(victim, number, leader.key)
            victim.exchange.on_message(leader.key, message, message.SerializeToString())
        assert len(victim.exchange._tasks) < 400
        await asyncio.sleep(5)
        assert 1 <= len(encoded) <= 5
        assert len(victim.exchange._tasks) <= 5

    run(scenario())


def opening(peer: SimulatedPeer, number: int, leader: bytes) -> RoundMessage:
    """The round that ``peer`` works towards, opened for it and the leader, who averages all of it."""
    head, shard = peer.exchange.head, peer.exchange.shard
    message = RoundMessage(round=head.round + 1)
    message.ballot.number, message.ballot.leader = number, leader
    message.open.log_digest, message.open.state_digest = head.log_digest, shard.state_digest
    message.open.members.add(peer_key=peer.key, contributes=True)
    message.open.members.add(peer_key=leader, contributes=False)
    message.open.parts.add(first_slice=0, num_slices=shard.num_slices, reducer=1)
    return message


def test_a_stranger_cannot_leave_messages_for_the_next_round(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(1, NAMES)
        exchange = swarm.peers["v0"].exchange
        for _ in range(100):
            message = RoundMessage(round=exchange.round + 1)
            message.contribution.encoded = bytes(1000)
            with pytest.raises(ProtocolError, match="do not know you"):
                exchange.on_message(b"?" * 32, message, message.SerializeToString())
        assert exchange._early.size_bytes == 0

    run(scenario())


@pytest.mark.parametrize("quiet", ["nobody trains", "nobody hears anybody"])
def test_in_a_quiet_minute_the_clock_is_looked_at_a_few_times_a_second(
    tmp_path: Path, quiet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: dict[int, int] = defaultdict(int)
    on_tick = RoundMachine.on_tick

    def counting(machine: RoundMachine, now: float) -> Any:
        ticks[id(machine)] += 1
        return on_tick(machine, now)

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(2, NAMES)
        for peer in swarm.peers.values():
            if quiet == "nobody trains" and peer.trainer is not None:
                peer.trainer.tokens_per_step = 0
            elif quiet != "nobody trains":
                swarm.network.blocked |= {(peer.key, other.key) for other in swarm.peers.values()}
        await asyncio.sleep(40)
        monkeypatch.setattr(RoundMachine, "on_tick", counting)
        await asyncio.sleep(60)
        assert 0 < sum(ticks.values()) <= len(NAMES) * 250

    run(scenario())
