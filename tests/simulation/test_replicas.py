"""A replica's life between rounds: attempts repeated, states saved, replicas reset and repaired, others slow."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.rounds.attempt import Attempt
from peer.rounds.catch_up import LOG_METHOD
from peer.rounds.shard import ReplicaSnapshot
from swarm import digest
from swarm.errors import DivergedError, Unreachable
from swarm.files import Kept
from swarm.log import tokens_by_peer
from swarm.proto.round_pb2 import LogReply, Part, RoundMessage, StateReply
from tests.simulation.swarm_in_memory import SimulatedPeer, SimulatedSwarm
from tests.simulation.test_hostile_peers import tamper
from tests.simulation.test_rounds import start
from tests.simulation.virtual_time import run

NAMES = ["seed", "v0", "v1", "v2"]


def record_offers(peer: SimulatedPeer) -> dict[int, dict[int, list[tuple[ReplicaSnapshot, bytes]]]]:
    """What ``peer`` encodes from now on: round -> ballot number -> [(snapshot, encoded part)]."""
    offers: dict[int, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
    encode = peer.exchange.shard.encode_measured

    def recording(snapshot: ReplicaSnapshot, part: Part) -> tuple[bytes, tuple[float, float]]:
        encoded, norms = encode(snapshot, part)
        attempt = peer.exchange._machine.attempt
        assert attempt is not None
        offers[peer.exchange.round][attempt.ballot[0]].append((snapshot, encoded))
        return encoded, norms

    peer.exchange.shard.encode_measured = recording  # type: ignore[method-assign]
    return offers


# ---- attempts, and what is counted ----------------------------------------------------------------------------------


def test_every_attempt_of_a_round_offers_the_same_snapshot(tmp_path: Path) -> None:
    """Training goes on between two attempts; what it adds belongs to the next round, whichever attempt is used."""

    async def scenario() -> None:
        swarm = await start(tmp_path, volunteers=4)
        await swarm.until_round(2, [*NAMES, "v3"])
        victims = swarm.fail_at(None, 4, "accept")  # averages are everywhere, and nobody has accepted them
        names = [*NAMES, "v3"]
        offers = {name: record_offers(swarm.peers[name]) for name in names[1:]}
        await swarm.until(lambda: bool(victims), "the fault happened", at_most_s=120)
        left = sorted(set(names) - set(victims))
        await swarm.until_round(6, left)
        swarm.assert_equal_states()
        for name in left[:-1] if "seed" not in left else left[1:]:
            peer = swarm.peers[name]
            attempts = list(offers[name][4].values())
            assert len(attempts) >= 2, "the round was opened again"
            assert len({snapshot.tokens for attempt in attempts for snapshot, _ in attempt}) == 1
            assert len({id(snapshot) for attempt in attempts for snapshot, _ in attempt}) == 1
            assert_counted_once(peer)

    run(scenario())


def assert_counted_once(peer: SimulatedPeer) -> None:
    """All that the commits counted of a volunteer, and what waits, is what it trained."""
    counted = sum(tokens_by_peer(committed.record).get(peer.key, 0) for committed in peer.commits)
    assert peer.trainer is not None
    assert counted + peer.exchange.replica.tokens == peer.trainer.tokens
    assert counted > 0


def test_tokens_above_what_a_contribution_may_weigh_wait_for_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attempt, "most_tokens", lambda attempt, contributor: 5)

    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(4, NAMES)
        peer = swarm.peers["v0"]
        weights = [tokens_by_peer(committed.record).get(peer.key, 0) for committed in peer.commits]
        assert max(weights) == 5 < peer.exchange.replica.tokens
        assert_counted_once(peer)

    run(scenario())


def test_a_commit_is_kept_in_one_form_whoever_dressed_it_up(tmp_path: Path) -> None:
    """Votes in another order, more holders and unknown fields change neither the log on disk nor its digest."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        for number, name in enumerate(NAMES):

            def change(message: RoundMessage, number: int = number) -> None:
                dress_up(message, number)

            tamper(swarm.peers[name], "commit", change)
        await swarm.until_round(5, NAMES)
        asked = dress_up_the_log(swarm.peers["seed"])
        await swarm.start_volunteer("late")
        await swarm.until_round(7, [*NAMES, "late"])
        assert asked, "the late volunteer took the log from the seed peer"
        logs = [
            [commit.SerializeToString() for commit in peer.exchange.parts.ledger.commits(1, 7)]
            for peer in swarm.peers.values()
        ]
        assert all(log == logs[0] for log in logs)
        swarm.assert_equal_states()

    run(scenario())


UNKNOWN_FIELD = b"\xba\x06\x04junk"
"""field 103, four bytes: no message of ours has it"""


def dress_up(message: RoundMessage, number: int) -> None:
    commit = message.commit
    votes = list(commit.votes)[::-1]
    del commit.votes[:]
    commit.votes.extend(votes)
    commit.holders.extend(bytes([number]) * 32 for _ in range(3))
    commit.MergeFromString(UNKNOWN_FIELD)


def dress_up_the_log(peer: SimulatedPeer) -> list[bytes]:
    honest = peer.transport._handlers[LOG_METHOD]
    asked: list[bytes] = []

    async def handler(caller: bytes, request: bytes) -> bytes:
        reply = LogReply.FromString(await honest(caller, request))
        for commit in reply.commits:
            commit.MergeFromString(UNKNOWN_FIELD)
            commit.holders.append(b"h" * 32)
        asked.append(caller)
        return reply.SerializeToString()

    peer.transport._handlers[LOG_METHOD] = handler
    return asked


# ---- replicas that go wrong -----------------------------------------------------------------------------------------


def test_a_replica_whose_memory_went_wrong_says_so_and_joins_again_with_the_state_of_the_others(tmp_path: Path) -> None:
    """Although its newest state on disk is the wrong one, and it has written that itself."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        broken = swarm.peers["v1"]
        await swarm.until_round(3, ["v1"])
        broken.exchange.shard.anchor[0] += 1.0
        task = broken.tasks[0]
        await swarm.until(task.done, "it noticed", at_most_s=60)
        assert isinstance(task.exception(), DivergedError)
        assert StateReply.FromString((tmp_path / "v1" / "shard-0" / "state-4").read_bytes()).round == 4
        assert len(swarm.history[0, 4]) == 2, "the wrong state was told"
        swarm.kill("v1")
        again = await swarm.restart("v1")
        reached = swarm.peers["seed"].round + 3
        await swarm.until_round(reached, NAMES)
        await swarm.until(lambda: any(c.counted for c in again.commits), "it is counted again", at_most_s=60)
        assert all(len(digests) == 1 for (_, number), digests in swarm.history.items() if number != 4)

    run(scenario())


def test_a_replica_that_was_reset_after_its_offer_keeps_no_movement_from_before(tmp_path: Path) -> None:
    """What it had offered counts; what it does since is measured from the anchor, not from the offer."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        peer = swarm.peers["v0"]
        await swarm.until_round(2, ["v0"])
        landed = record_landings(peer)
        resets = reset_at_contribution(swarm, peer, 4)
        await swarm.until_round(6, NAMES)
        assert len(resets) == 1
        assert [(number, kept) for number, kept, _ in landed if number in (4, 5, 6)] == [
            *((4, True), (4, False), (5, False), (6, True))  # round 3 landed; reset; round 4 landed; round 5
        ]
        assert all(size == 0 for _, kept, size in landed if not kept)
        assert {c.head.round: c.counted for c in peer.commits}[4]
        swarm.assert_equal_states()

    run(scenario())


def record_landings(peer: SimulatedPeer) -> list[tuple[int, bool, float]]:
    """(round that begins, movement is kept, largest movement afterwards) for every landing from now on."""
    landed: list[tuple[int, bool, float]] = []
    trainer = peer.trainer
    assert trainer is not None
    land = trainer.land

    async def recording(anchor: np.ndarray, snapshot: np.ndarray | None, round_number: int) -> None:
        await land(anchor, snapshot, round_number)
        landed.append((round_number, snapshot is not None, float(np.abs(trainer.moved).max())))

    trainer.land = recording  # type: ignore[method-assign]
    return landed


def reset_at_contribution(swarm: SimulatedSwarm, peer: SimulatedPeer, round_number: int) -> list[asyncio.Task[None]]:
    """Reset ``peer`` when its first contribution to a round is on its way."""
    resets: list[asyncio.Task[None]] = []

    def check(sender: bytes, to: bytes, method: str, request: bytes) -> None:
        if resets or sender != peer.key or method != "round":
            return
        message = RoundMessage.FromString(request)
        if (message.round, message.WhichOneof("body")) == (round_number, "contribution"):
            resets.append(asyncio.ensure_future(peer.exchange.reset_replica()))

    swarm.network.before_delivery.append(check)
    return resets


# ---- whatever takes long --------------------------------------------------------------------------------------------


def record_statuses(peer: SimulatedPeer) -> list[float]:
    """When ``peer`` publishes its status, from now on."""
    told: list[float] = []
    publish = peer.transport.publish

    async def recording(key: str, value: bytes, *, lifetime_s: float) -> None:
        told.append(asyncio.get_running_loop().time())
        await publish(key, value, lifetime_s=lifetime_s)

    peer.transport.publish = recording  # type: ignore[method-assign]
    return told


def slow_log(peer: SimulatedPeer) -> list[str]:
    """Nobody tells it of a commit, and whoever it asks for the log takes as long as a call may."""
    asked: list[str] = []
    call = peer.transport.call

    async def slow(to: bytes, method: str, request: Kept, **options: float) -> bytes:
        if method == LOG_METHOD:
            asked.append(method)
            await asyncio.sleep(15)
        return await call(to, method, request, **options)  # type: ignore[arg-type]

    peer.transport.call = slow  # type: ignore[assignment, method-assign]
    return asked


def slow_dials(peer: SimulatedPeer) -> list[str]:
    """Whoever it dials is behind a firewall that swallows everything."""
    asked: list[str] = []

    async def connect(to: bytes, addresses: tuple[str, ...], *, timeout_s: float) -> None:
        asked.append("connect")
        await asyncio.sleep(15)
        raise Unreachable("no answer")

    peer.transport.connect = connect  # type: ignore[method-assign]
    peer.member._connected.clear()
    return asked


@pytest.mark.parametrize("slow", [slow_log, slow_dials])
def test_a_replica_tells_its_status_while_it_waits_for_others(
    tmp_path: Path, slow: Callable[[SimulatedPeer], list[str]]
) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        await swarm.until_round(2, NAMES)
        peer = swarm.peers["v0"]

        def cut_off(sender: bytes, to: bytes, method: str, request: bytes) -> None:
            if to == peer.key and method == "round":
                raise Unreachable("cut off")

        swarm.network.before_delivery.append(cut_off)
        asked, told = slow(peer), record_statuses(peer)
        await asyncio.sleep(40)
        assert asked and len(told) >= 30
        assert max(np.diff(told)) < 2.0, "a status lives 6 s, and is told every second"

    run(scenario())


def test_a_replica_takes_part_in_the_next_round_while_its_state_is_written(tmp_path: Path) -> None:
    """And what is written is the state of its round all the same, however long that takes."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        peer = swarm.peers["v0"]
        blocking = peer.exchange._blocking
        saving: list[int] = []
        began: list[tuple[int, int]] = []

        async def slow(work: Callable[[], Any]) -> Any:
            if "save" in getattr(work, "__code__", run.__code__).co_names and peer.exchange.head.round == 4:
                began.append((peer.round, peer.exchange._machine.settings.round))
                saving.append(1)
                await asyncio.sleep(30)
                saving.pop()
            return await blocking(work)

        peer.exchange._blocking = slow  # type: ignore[method-assign]
        await swarm.until_round(3, ["seed"])
        offers = record_offers(peer)
        await swarm.until(lambda: bool(saving), "it saves", at_most_s=60)
        await swarm.until(lambda: bool(offers[5]), "it offers to the next round", at_most_s=20)
        assert saving, "meanwhile"
        written = tmp_path / "v0" / "shard-0" / "state-4"
        await swarm.until(written.exists, "it is written", at_most_s=60)
        reply = StateReply.FromString(written.read_bytes())
        assert {digest.state_digest(reply.anchor_chunks, reply.momentum_chunks)} == swarm.history[0, 4]
        assert began[0] == (4, 5)
        await swarm.until_round(swarm.peers["seed"].round + 2, NAMES)
        swarm.assert_equal_states()

    run(scenario())
