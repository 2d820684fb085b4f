"""Outages that outlast a lease, and those that do not: one log in the end, and nothing lost or counted twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from swarm.identity import peer_id_of
from swarm.log import gone_of
from tests.simulation.swarm_in_memory import SimulatedPeer, SimulatedSwarm
from tests.simulation.virtual_time import run

LEASE_S = 30.0
NAMES = ["seed", "v0", "v1", "v2", "v3"]


async def start(folder: Path, volunteers: int = 4) -> SimulatedSwarm:
    """Five replicas, all of them voters from the first commit on."""
    swarm = SimulatedSwarm(folder, lease_s=LEASE_S)
    await swarm.start_seed()
    for index in range(volunteers):
        await swarm.start_volunteer(f"v{index}")
    await swarm.until_round(4, ["seed", *(f"v{index}" for index in range(volunteers))])
    return swarm


def separate(swarm: SimulatedSwarm, one: list[str], other: list[str]) -> None:
    for a in one:
        for b in other:
            keys = swarm.peers[a].key, swarm.peers[b].key
            swarm.network.blocked |= {keys, keys[::-1]}


def assert_one_log(swarm: SimulatedSwarm, names: list[str]) -> None:
    """The same commits on every disk, and equal states after equal rounds, as they were told."""
    ledgers = [swarm.peers[name].exchange.parts.ledger for name in names]
    shortest = min(ledger.head.round for ledger in ledgers)
    assert len({ledger.heads[shortest].log_digest for ledger in ledgers}) == 1
    states: dict[bytes, set[bytes]] = {}
    for name in names:
        for told in swarm.peers[name].commits[-3:]:
            states.setdefault(told.head.log_digest, set()).add(told.state_digest)
    assert all(len(digests) == 1 for digests in states.values())


def written_incidents(peer: SimulatedPeer) -> list[dict[str, object]]:
    path = peer.exchange.parts.ledger.folder / "incidents"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def share_of(vector: np.ndarray, movement: np.ndarray) -> float:
    """How much of ``movement`` is in ``vector``: 1 where all of it is, 0 where it is unrelated."""
    return float(np.dot(vector, movement) / np.dot(movement, movement))


@pytest.mark.parametrize(
    ("minority", "slow", "losers"),
    [
        (["seed", "v0"], [], ["seed", "v0"]),
        (["seed", "v0"], ["v1", "v2", "v3"], ["v1", "v2", "v3"]),
        (["v0", "v1"], [], ["v0", "v1"]),
    ],
)
def test_a_partition_that_outlasts_the_lease_ends_with_one_branch(
    tmp_path: Path, minority: list[str], slow: list[str], losers: list[str]
) -> None:
    """More tokens win; losers record an incident, and one of them offers again what their branch moved."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        majority = [name for name in NAMES if name not in minority]
        separate(swarm, minority, majority)
        for name in slow:
            trainer = swarm.peers[name].trainer
            assert trainer is not None
            trainer.tokens_per_step = 10
        alone = swarm.peers[minority[0]]
        parted = asyncio.get_running_loop().time()
        before = alone.round + 1  # what was under way when they parted may still be decided alike
        await swarm.until(lambda: alone.round > before + 4 + len(slow), "the minority goes on", at_most_s=300)
        assert asyncio.get_running_loop().time() - parted > LEASE_S
        heads = {name: swarm.peers[name].exchange.head for name in NAMES}
        swarm.network.blocked.clear()
        await swarm.until(
            lambda: all(swarm.peers[name].incidents for name in losers), "the losers follow", at_most_s=120
        )
        reached = max(swarm.peers[name].round for name in NAMES)
        await swarm.until_round(reached + 3, NAMES)
        assert_one_log(swarm, NAMES)
        for name in NAMES:
            assert len(written_incidents(swarm.peers[name])) == len(swarm.peers[name].incidents) == (name in losers)
        check_offer(swarm, losers, heads[losers[0]].total_tokens)

    run(scenario())


def check_offer(swarm: SimulatedSwarm, losers: list[str], tokens_at_heal: int) -> None:
    """Exactly one of the losers owed the movement of their branch, and the winners' log has counted it."""
    incident = swarm.peers[losers[0]].incidents[0][0]
    ledger = swarm.peers[losers[0]].exchange.parts.ledger
    fork = swarm.anchors[ledger.heads[incident.fork_round].log_digest]
    owing = []
    for name in losers:
        told, owed = swarm.peers[name].incidents[0]
        assert told.lost.tokens >= tokens_at_heal and told.fork_round == incident.fork_round
        assert told.offered_by == incident.offered_by
        movement = swarm.anchors[bytes.fromhex(told.lost.log_digest)] - fork
        share = share_of(-owed, movement)
        if share > 0.5:
            owing.append(name)
            left = swarm.peers[name].exchange.shard.owed(slice(0, swarm.num_values))
            assert abs(share_of(-left, movement)) < 0.2, "it was counted since"
        else:
            assert abs(share) < 0.2
    assert [peer_id_of(swarm.peers[name].key) for name in owing] == [incident.offered_by]


@pytest.mark.parametrize("minority", [["seed", "v0"], ["v0", "v1"]])
def test_a_partition_shorter_than_the_lease_makes_no_branch(tmp_path: Path, minority: list[str]) -> None:
    """The majority goes on, the others wait and catch up: one commit per round, no incident."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        separate(swarm, minority, [name for name in NAMES if name not in minority])
        await asyncio.sleep(LEASE_S - 3)
        swarm.network.blocked.clear()
        reached = max(swarm.peers[name].round for name in NAMES)
        await swarm.until_round(reached + 3, NAMES)
        swarm.assert_equal_states()
        assert_one_log(swarm, NAMES)
        assert not any(written_incidents(peer) for peer in swarm.peers.values())

    run(scenario())


def test_when_the_majority_dies_for_good_the_rest_goes_on_and_who_comes_back_catches_up(tmp_path: Path) -> None:
    """Three of five voters at once, the seed peer among them; a commit without them is no incident."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        for name in ("seed", "v0", "v1"):
            swarm.kill(name)
        reached = swarm.peers["v2"].round
        died = asyncio.get_running_loop().time()
        await swarm.until_round(reached + 3, ["v2", "v3"])
        waited_s = asyncio.get_running_loop().time() - died
        assert LEASE_S - 3 < waited_s < LEASE_S + 30
        ledger = swarm.peers["v2"].exchange.parts.ledger
        commits = ledger.commits(1, ledger.head.round)
        without = [gone_of(commit, head) for commit, head in zip(commits, ledger.heads, strict=False)]
        assert [len(gone) for gone in without if gone] == [3], "one commit is without three; then others are voters"
        for name in ("seed", "v0"):
            await swarm.restart(name)
        await swarm.until_round(swarm.peers["v2"].round + 3, ["seed", "v0", "v2", "v3"])
        swarm.assert_equal_states()
        assert not any(written_incidents(peer) for peer in swarm.peers.values())

    run(scenario())


def test_voters_that_leave_cleanly_are_not_waited_for(tmp_path: Path) -> None:
    """Three of five say that they go, and vote no more: the rest goes on at once."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        left = asyncio.get_running_loop().time()
        await asyncio.gather(*(swarm.peers[name].exchange.hearing.leave() for name in ("seed", "v0", "v1")))
        for name in ("seed", "v0", "v1"):
            swarm.kill(name)
        await swarm.until_round(swarm.peers["v2"].round + 2, ["v2", "v3"])
        assert asyncio.get_running_loop().time() - left < LEASE_S
        assert not any(written_incidents(peer) for peer in swarm.peers.values())

    run(scenario())


def test_a_small_swarm_outlives_its_seed_peer(tmp_path: Path) -> None:
    """Below five voters it decides alone; when it is gone for a lease, the volunteers go on, and it follows later."""

    async def scenario() -> None:
        swarm = await start(tmp_path, volunteers=2)
        swarm.kill("seed")
        reached = swarm.peers["v0"].round
        await swarm.until_round(reached + 3, ["v0", "v1"])
        await swarm.restart("seed")
        await swarm.until_round(swarm.peers["v0"].round + 3, ["seed", "v0", "v1"])
        swarm.assert_equal_states()

    run(scenario())


def test_a_volunteer_without_a_network_decides_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """It trains on; what it trained is counted once it is back."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        alone = swarm.peers["v3"]
        separate(swarm, ["v3"], NAMES[:-1])
        await asyncio.sleep(3 * LEASE_S)
        reached = alone.round
        assert swarm.peers["seed"].round > reached + 5
        waiting = alone.exchange.replica.tokens
        assert waiting > 3 * LEASE_S * 900
        swarm.network.blocked.clear()
        await swarm.until(lambda: alone.exchange.replica.tokens < waiting / 2, "it is counted", at_most_s=120)
        swarm.assert_equal_states()
        assert not alone.incidents

    run(scenario())


def test_a_loser_that_restarts_after_it_followed_stands_where_the_others_stand(tmp_path: Path) -> None:
    """Its disk holds the winners' log alone, and no state of the branch that it gave up."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        separate(swarm, ["seed", "v0"], ["v1", "v2", "v3"])
        before = swarm.peers["v0"].round + 1
        await swarm.until(lambda: swarm.peers["v0"].round > before + 4, "the minority goes on", at_most_s=300)
        swarm.network.blocked.clear()
        await swarm.until(lambda: bool(swarm.peers["v0"].incidents), "it follows", at_most_s=120)
        swarm.kill("v0")
        restarted = await swarm.restart("v0")
        await swarm.until_round(restarted.round + 4, NAMES)
        assert_one_log(swarm, NAMES)
        assert not restarted.incidents, "nothing is left to be given up"

    run(scenario())


def test_a_voter_whose_machine_slept_is_no_voter_until_it_has_caught_up(tmp_path: Path) -> None:
    """Its clock counts the sleep; the others went on, and it takes their commits before it votes."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        sleeper = swarm.peers["v3"]
        swarm.slept_s["v3"] = 10 * LEASE_S
        standing = sleeper.exchange.hearing.standing()
        assert not standing.present and not standing.silent
        await swarm.until(lambda: sleeper.exchange.hearing.standing().present, "it is back", at_most_s=30)
        await swarm.until_round(sleeper.round + 3, NAMES)
        swarm.assert_equal_states()

    run(scenario())
