"""Whole rounds of a simulated swarm, healthy and hurt. Every test ends with equal state digests."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from peer.rounds.planning import leader_order
from swarm.errors import Unreachable
from swarm.files import Kept
from swarm.identity import Identity
from swarm.log import tokens_by_peer
from swarm.proto.round_pb2 import RoundMessage
from tests.simulation.memory_transport import MemoryTransport
from tests.simulation.swarm_in_memory import PHASES, SimulatedSwarm
from tests.simulation.virtual_time import run


async def start(folder: Path, volunteers: int = 3, **rounds: object) -> SimulatedSwarm:
    swarm = SimulatedSwarm(folder, **rounds)
    await swarm.start_seed()
    for index in range(volunteers):
        await swarm.start_volunteer(f"v{index}")
    return swarm


def test_healthy_rounds_commit_and_leave_all_replicas_equal(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        names = ["seed", "v0", "v1", "v2"]
        await swarm.until_round(6, names)
        swarm.assert_equal_states()
        record = swarm.peers["seed"].commits[-1].record
        contributors = {share.peer_key for part in record.parts for share in part.shares}
        assert contributors == {swarm.peers[name].key for name in names[1:]}, "all volunteers are in"
        assert all(part.digest for part in record.parts), "no part is absent"

    run(scenario())


def test_a_round_moves_the_anchor_by_the_weighted_average(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        before = swarm.first_anchors[0]
        await swarm.until_round(1, ["seed"])
        moved = swarm.peers["seed"].exchange.shard.anchor - before
        # the replicas of one round drift by noise of a known size; an average that averaged nothing would not move
        assert 0.0005 < float(np.abs(moved).mean()) < 0.05

    run(scenario())


def test_connections_come_before_the_round_and_the_lower_key_dials_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not connected to the leader is in no round, and of two peers only the lower key dials at once."""
    connect, dials, cut_off = MemoryTransport.connect, [], b"v2".ljust(32, b".")

    async def watched(self: MemoryTransport, peer: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        dials.append((asyncio.get_running_loop().time(), self.public_key, peer))
        if Identity(cut_off).public_key in (self.public_key, peer):
            raise Unreachable("no way")
        await connect(self, peer, addresses, timeout_s=timeout_s)

    monkeypatch.setattr(MemoryTransport, "connect", watched)

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(3, ["seed", "v0", "v1"])
        records = [commit.record for commit in swarm.peers["seed"].commits]
        contributors = {share.peer_key for record in records for part in record.parts for share in part.shares}
        assert contributors == {swarm.peers[name].key for name in ("v0", "v1")}
        first = {frozenset(dial[1:]): dial[1:] for dial in sorted(dials, reverse=True)}
        assert len(first) == 6 and all(source < target for source, target in first.values())

    run(scenario())


# A peer sends one promise and one vote per ballot; the other messages go to several.
MOMENTS = [(phase, nth) for phase in PHASES for nth in (1, 2) if nth == 1 or phase not in ("promise", "vote")]


@pytest.mark.parametrize(("phase", "nth"), MOMENTS)
@pytest.mark.parametrize("round_number", [3, 4])
def test_whoever_is_killed_in_a_phase_the_others_go_on_and_stay_equal(
    tmp_path: Path, round_number: int, phase: str, nth: int
) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path, volunteers=4)  # five voters, two of whom may be away
        victims = swarm.fail_at(None, round_number, phase, nth=nth)
        names = {"seed", "v0", "v1", "v2", "v3"}
        await swarm.until_round(2, sorted(names))
        await swarm.until(lambda: bool(victims), "the fault happened", at_most_s=120)
        await swarm.until_round(round_number + 3, sorted(names - set(victims)))
        await swarm.restart(victims[0])
        await swarm.until_round(swarm.peers["v0" if victims != ["v0"] else "v1"].round + 2, sorted(names))
        swarm.assert_equal_states()

    run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_random_kills_stalls_partitions_and_restarts_never_part_the_replicas(tmp_path: Path, seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        swarm = await start(tmp_path, volunteers=4)
        names = ["seed", "v0", "v1", "v2", "v3"]
        for _ in range(6):
            await asyncio.sleep(rng.uniform(1, 15))
            victim = rng.choice(names)
            fault = rng.choice(["kill", "stall", "mute", "one-way"])
            key = swarm.peers[victim].key
            others = [peer.key for name, peer in swarm.peers.items() if name != victim]
            if fault == "kill":
                swarm.kill(victim)
            elif fault == "stall":
                swarm.network.stalled.add(key)
            elif fault == "mute":
                swarm.network.blocked |= {(key, other) for other in others}
            else:
                swarm.network.blocked.add((key, rng.choice(others)))
            await asyncio.sleep(rng.uniform(1, 40))
            swarm.network.stalled.clear()
            swarm.network.blocked.clear()
            if fault == "kill":
                await swarm.restart(victim)
        reached = max(swarm.peers[name].round for name in names)
        assert reached >= 3, "rounds went on between the faults"
        await swarm.until_round(reached + 2, names)
        swarm.assert_equal_states()

    run(scenario())


def test_a_late_volunteer_joins_and_is_counted(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(6, ["seed"])
        late = await swarm.start_volunteer("late")
        reached = swarm.peers["seed"].round + 4
        await swarm.until_round(reached, ["seed", "late", "v0"])
        swarm.assert_equal_states()
        assert any(committed.counted for committed in late.commits)

    run(scenario())


def test_a_killed_volunteer_restarts_from_its_own_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(5, ["v0", "v1", "v2"])
        swarm.kill("v1")
        await swarm.until_round(8, ["seed", "v0", "v2"])
        restarted = await swarm.restart("v1")
        assert restarted.exchange.head.round >= 4, "it starts from its own newest state, not from genesis"
        await swarm.until_round(11, ["seed", "v0", "v1", "v2"])
        swarm.assert_equal_states()

    run(scenario())


def test_missed_rounds_are_fetched_from_several_holders(tmp_path: Path) -> None:
    """Whoever comes back does not take every part from the same uplink."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(5, ["v0", "v1", "v2"])
        swarm.kill("v1")
        await swarm.until_round(9, ["seed", "v0", "v2"])
        asked: set[bytes] = set()

        def note(sender: bytes, to: bytes, method: str, request: bytes) -> None:
            if method == "chunk" and sender == swarm.peers["v1"].key:
                asked.add(to)

        swarm.network.before_delivery.append(note)
        await swarm.restart("v1")
        await swarm.until_round(11, ["seed", "v0", "v1", "v2"])
        assert len(asked) >= 2

    run(scenario())


def test_a_stalled_volunteer_is_waited_for_only_so_long_and_catches_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(2, ["seed", "v0", "v1", "v2"])
        key = swarm.peers["v2"].key
        swarm.network.stalled.add(key)
        others = [peer.key for name, peer in swarm.peers.items() if name != "v2"]
        swarm.network.blocked |= {(key, other) for other in others}
        await swarm.until_round(5, ["seed", "v0", "v1"])
        swarm.network.stalled.clear()
        swarm.network.blocked.clear()
        await swarm.until_round(8, ["seed", "v0", "v1", "v2"])
        swarm.assert_equal_states()

    run(scenario())


def test_a_whole_swarm_that_died_restarts_from_its_disks(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        names = ["seed", "v0", "v1", "v2"]
        await swarm.until_round(5, names)
        for name in names:
            swarm.kill(name)
        committed = max(swarm.peers[name].round for name in names)
        for name in names:
            await swarm.restart(name)
        await swarm.until_round(committed + 3, names)
        swarm.assert_equal_states()

    run(scenario())


@pytest.mark.parametrize("hostile", ["nan", "wrong size", "other round", "huge weight"])
def test_a_hostile_contribution_is_left_out_and_harms_nobody(tmp_path: Path, hostile: str) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        bad = swarm.peers["v2"]
        machine_send = bad.transport.call

        async def call(peer: bytes, method: str, request: Kept, **options: object) -> bytes:
            from swarm.proto.round_pb2 import RoundMessage

            if method == "round":
                message = RoundMessage.FromString(request[:])
                if message.WhichOneof("body") == "contribution":
                    encoded = message.contribution.encoded
                    if hostile == "nan":
                        message.contribution.encoded = b"\xff" * len(encoded)
                    elif hostile == "wrong size":
                        message.contribution.encoded = encoded + b"\0"
                    elif hostile == "other round":
                        message.round += 1
                    else:
                        message.contribution.weight_tokens = 10**12
                    request = message.SerializeToString()
            return await machine_send(peer, method, request, **options)  # type: ignore[arg-type]

        bad.transport.call = call  # type: ignore[method-assign]
        await swarm.until_round(3, ["seed", "v0", "v1"])
        swarm.assert_equal_states()
        for committed in swarm.peers["seed"].commits:
            for part in committed.record.parts:
                if part.digest and bad.key in {share.peer_key for share in part.shares}:
                    # its own part is the one place where its contribution did not travel
                    assert len(part.shares) >= 1
        honest = swarm.peers["v0"].exchange.shard.anchor
        assert np.isfinite(honest).all() and float(np.abs(honest - swarm.first_anchors[0]).max()) < 1.0

    run(scenario())


@pytest.mark.parametrize("restarts", [False, True])
def test_a_volunteer_that_dies_after_its_contributions_arrived_is_not_waited_for(
    tmp_path: Path, restarts: bool
) -> None:
    """Nobody's message to it fails, so whoever waits for its average asks whether it lives, and lived then."""

    async def scenario() -> None:
        swarm = await start(tmp_path)  # the seed peer leads
        victims = swarm.fail_at("v0", 3, "average")
        await swarm.until(lambda: bool(victims), "the fault happened", at_most_s=120)
        died_at = asyncio.get_running_loop().time()
        if restarts:
            await swarm.restart("v0")
        await swarm.until_round(3, ["seed", "v1", "v2"])
        assert asyncio.get_running_loop().time() - died_at < 4.0, "the reduce timeout is 8 s"
        swarm.assert_equal_states()

    run(scenario())


@pytest.mark.parametrize("phase", ["prepare", "open", "accept", "commit"])
@pytest.mark.parametrize("others_too", [False, True])
def test_a_killed_leader_costs_two_seconds_not_its_timeouts(tmp_path: Path, phase: str, others_too: bool) -> None:
    """The voters that come next ask whether it lives, and the first of them that does takes over at once."""

    async def scenario() -> None:
        timeouts = {"reduce_timeout_s": 30.0, "takeover_timeout_s": 20.0}
        swarm = await start(tmp_path, volunteers=4, **timeouts)  # type: ignore[arg-type]
        names = {"seed", "v0", "v1", "v2", "v3"}
        victims = swarm.fail_at(None, 4, phase)
        await swarm.until(lambda: bool(victims), "the leader is killed", at_most_s=120)
        if others_too:  # the next in turn
            order = leader_order(swarm.peers["seed"].exchange.head, 4)
            victims.append(swarm.name_of(order[(order.index(swarm.peers[victims[0]].key) + 1) % len(order)]))
            swarm.kill(victims[1])
        died_at = asyncio.get_running_loop().time()
        await swarm.until_round(4, sorted(names - set(victims)))
        assert asyncio.get_running_loop().time() - died_at <= 3.0, "a look twice a second included"
        swarm.assert_equal_states()

    run(scenario())


def test_what_a_killed_process_contributed_is_not_taken_for_its_successors(tmp_path: Path) -> None:
    """A commit that counts the dead process's share leaves all that the new one trained meanwhile in its account."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        victims = swarm.fail_at("v0", 3, "average")  # its contributions are on their way
        await swarm.until(lambda: bool(victims), "the fault happened", at_most_s=120)
        successor = await swarm.restart("v0")
        await swarm.until(lambda: successor.round >= 3, "it applies the round", at_most_s=120)
        (committed,) = [committed for committed in successor.commits if committed.record.round == 3]
        assert successor.key in tokens_by_peer(committed.record), "the dead process is in the commit"
        assert not committed.counted
        booked = sum(tokens_by_peer(c.record)[successor.key] for c in successor.commits if c.counted)
        assert successor.trainer is not None
        assert successor.exchange.replica.tokens == successor.trainer.tokens - booked

    run(scenario())


def test_members_on_different_rungs_stay_equal_and_lose_nothing(tmp_path: Path) -> None:
    """Each takes the rung that its uplink carries in time; one average decodes alike for all of them."""

    async def scenario() -> None:
        swarm = SimulatedSwarm(
            tmp_path,
            tokens_per_round=12_000,
            wire_codec="int4",
            contribution_codecs=["int8", "int4", "int2", "topk"],
            outer={"momentum": 0.0},
        )
        sent: dict[bytes, list[str]] = defaultdict(list)

        def note(sender: bytes, to: bytes, method: str, request: bytes) -> None:
            message = RoundMessage.FromString(request) if method == "round" else RoundMessage()
            if message.contribution.weight_tokens and message.round > 2:  # the rounds before were not seen to begin
                sent[sender].append(message.contribution.codec)

        swarm.network.before_delivery.append(note)
        await swarm.start_seed()
        for name, upload_bps in (("fast", 10_000_000), ("slow", 350_000), ("slowest", 40_000)):
            await swarm.start_volunteer(name, upload_bps)
        names = ["seed", "fast", "slow", "slowest"]
        await swarm.until_round(8, names)
        swarm.assert_equal_states()
        assert {swarm.name_of(key): set(codecs) for key, codecs in sent.items()} == {
            "fast": {"int8"},
            "slow": {"int4"},
            "slowest": {"topk"},
        }
        for committed in swarm.peers["seed"].commits[2:]:
            counted = {share.peer_key for part in committed.record.parts for share in part.shares}
            assert counted == {swarm.peers[name].key for name in names[1:]}, "every rung is in the average"
        debts = {name: swarm.peers[name].exchange.shard for name in names[1:]}
        owed = {name: float(np.linalg.norm(shard.owed(slice(0, shard.num_values)))) for name, shard in debts.items()}
        assert owed["fast"] < owed["slow"] < owed["slowest"], "the thinner the rung, the more is owed"
        assert any(shard.reducer_debt.size_bytes for shard in debts.values()), "reducers owe what averages lost"

    run(scenario())


def test_what_averages_lost_is_handed_over_when_slices_change_hands(tmp_path: Path) -> None:
    """A volunteer more, and parts are split anew: who averaged a slice before hands over what it owes there."""

    async def scenario() -> None:
        swarm = SimulatedSwarm(tmp_path, wire_codec="int4")
        await swarm.start_seed()
        for name in ("v0", "v1", "v2"):
            await swarm.start_volunteer(name)
        names = ["seed", "v0", "v1", "v2"]
        await swarm.until_round(3, names)
        await swarm.start_volunteer("late")
        await swarm.until_round(swarm.peers["v0"].round + 4, [*names, "late"])
        reducers: dict[int, set[bytes]] = defaultdict(set)
        handed_over = 0
        for committed in swarm.peers["seed"].commits:
            for part in committed.record.parts:
                for index in range(part.first_slice, part.first_slice + part.num_slices):
                    assert set(part.handed_over_by) - {part.reducer} == set(part.handed_over_by)
                    handed_over += len(part.handed_over_by)
                    reducers[index] |= {part.reducer} - {b""}
                assert set(part.handed_over_by) <= {key for known in reducers.values() for key in known}
        assert handed_over
        swarm.assert_equal_states()

    run(scenario())
