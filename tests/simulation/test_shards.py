"""Runs of several shards: every shard has rounds of its own, spread over the tokens of a round; none runs away.

Every test ends with equal state digests, shard by shard.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from swarm.errors import NetworkError, NotFound, ProtocolError
from swarm.log import tokens_by_peer
from swarm.proto.round_pb2 import LogRequest, PingRequest, Record, RoundMessage, StateRequest
from tests.simulation.swarm_in_memory import SimulatedSwarm
from tests.simulation.virtual_time import run

NAMES = ["seed", "v0", "v1", "v2"]


async def start(folder: Path, num_shards: int = 2, volunteers: int = 3, **rounds: object) -> SimulatedSwarm:
    swarm = SimulatedSwarm(folder, num_shards=num_shards, num_values=20_000, **rounds)
    await swarm.start_seed()
    for index in range(volunteers):
        await swarm.start_volunteer(f"v{index}")
    return swarm


def assert_none_ran_away(swarm: SimulatedSwarm) -> None:
    """Whenever a shard committed round r+2, all others had committed r."""
    for (shard, number), at_s in swarm.committed_at_s.items():
        for other in range(swarm.spec.num_shards):
            if number > 2:
                assert swarm.committed_at_s[other, number - 2] < at_s, f"shard {shard} round {number} before {other}"


@pytest.mark.parametrize("num_shards", [2, 3])
def test_all_shards_commit_rounds_and_leave_all_replicas_equal(tmp_path: Path, num_shards: int) -> None:
    """Each volunteer is counted in each shard, with about what it trained."""

    async def scenario() -> None:
        swarm = await start(tmp_path, num_shards)
        await swarm.until_round(6, NAMES)
        swarm.assert_equal_states()
        assert_none_ran_away(swarm)
        assert {shard for shard, _ in swarm.history} == set(range(num_shards))
        trained = swarm.peers["v0"].trainers[0].tokens
        for member in swarm.peers["seed"].members:
            ledger = member.parts.ledger
            commits = ledger.commits(1, ledger.head.round)
            counted = sum(tokens_by_peer(Record.FromString(c.record)).get(swarm.peers["v0"].key, 0) for c in commits)
            assert 0.7 * trained < counted <= trained

    run(scenario())


@pytest.mark.parametrize("num_shards", [2, 4])
def test_openings_are_spread_over_the_tokens_of_a_round(tmp_path: Path, num_shards: int) -> None:
    """From the second round on, the shards commit in turn, at least half of an even share apart."""

    async def scenario() -> None:
        swarm = await start(tmp_path, num_shards, tokens_per_round=24_000)
        await swarm.until_round(6, NAMES)
        order = sorted((at_s, key) for key, at_s in swarm.committed_at_s.items() if 2 <= key[1] <= 6)
        rounds_s = [swarm.committed_at_s[0, n + 1] - swarm.committed_at_s[0, n] for n in range(2, 6)]
        share_s = sum(rounds_s) / len(rounds_s) / num_shards
        apart_s = [later[0] - earlier[0] for earlier, later in itertools.pairwise(order)]
        assert [key[0] for _, key in order[: 4 * num_shards]] == [*range(num_shards)] * 4, order
        assert min(apart_s) > share_s / 2, (share_s, apart_s)
        swarm.assert_equal_states()

    run(scenario())


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_cannot_decide_holds_the_others_two_rounds_ahead_at_most(tmp_path: Path, shard: int) -> None:
    """And all go on when it can again."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(2, NAMES)
        stuck, silent = swarm.peers["seed"].rounds[shard], [True]

        def swallow(sender: bytes, to: bytes, method: str, request: bytes) -> None:
            if silent[0] and method == "round" and RoundMessage.FromString(request).shard == shard:
                raise NetworkError("silent")

        swarm.network.before_delivery.append(swallow)
        other = 1 - shard
        await swarm.until(lambda: swarm.trained("v0") > 40_000, "time passes", at_most_s=200)
        assert max(peer.rounds[shard] for peer in swarm.peers.values()) <= stuck + 1
        assert max(peer.rounds[other] for peer in swarm.peers.values()) <= stuck + 3
        silent[0] = False
        await swarm.until_round(stuck + 4, NAMES)
        assert_none_ran_away(swarm)
        swarm.assert_equal_states()

    run(scenario())


def test_a_killed_volunteer_comes_back_and_a_late_one_joins_in_every_shard(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(2, NAMES)
        victims = swarm.fail_at("v1", 4, "contribution")
        await swarm.until_round(5, ["seed", "v0", "v2"])
        assert victims == ["v1"]
        await swarm.restart("v1")
        await swarm.start_volunteer("late")
        names = [*NAMES, "late"]
        await swarm.until_round(max(swarm.peers["seed"].rounds) + 2, names)
        swarm.assert_equal_states()
        assert_none_ran_away(swarm)
        for shard, member in enumerate(swarm.peers["seed"].members):
            record = Record.FromString(member.parts.ledger.commits(member.parts.ledger.head.round, 1)[0].record)
            credited = set(tokens_by_peer(record))
            assert {swarm.peers["v1"].key, swarm.peers["late"].key} <= credited, f"shard {shard}"

    run(scenario())


def test_the_run_ends_with_every_shard_at_the_same_round(tmp_path: Path) -> None:
    """The first shard's tokens end it; the others follow it there, and nobody opens another round."""

    async def scenario() -> None:
        swarm = await start(tmp_path, 3, total_tokens=14_000)
        await swarm.until(
            lambda: swarm.peers["seed"].exchange.head.total_tokens >= 14_000, "the tokens are reached", at_most_s=200
        )
        last = swarm.peers["seed"].round
        await swarm.until_round(last, NAMES)
        trained = swarm.trained("v0")
        await swarm.until(lambda: swarm.trained("v0") > trained + 20_000, "time passes", at_most_s=200)
        assert {tuple(peer.rounds) for peer in swarm.peers.values()} == {(last, last, last)}
        swarm.assert_equal_states()

    run(scenario())


def test_a_call_about_a_shard_that_is_not_hosted_is_refused_by_name(tmp_path: Path) -> None:
    """Rounds, logs, states and leases alike."""

    async def scenario() -> None:
        swarm = await start(tmp_path, volunteers=1)
        asks = {
            "round": RoundMessage(shard=2, round=1),
            "log": LogRequest(shard=2, first_round=1, max_commits=1),
            "state": StateRequest(shard=2),
            "ping": PingRequest(shard=2),
        }
        seed, caller = swarm.peers["seed"], swarm.peers["v0"].transport
        for method, request in asks.items():
            with pytest.raises(NotFound, match="does not host shard 2"):
                await caller.call(seed.key, method, request.SerializeToString(), timeout_s=5)
            with pytest.raises(ProtocolError, match="cannot be read"):
                await caller.call(seed.key, method, b"\xff", timeout_s=5)

    run(scenario())
