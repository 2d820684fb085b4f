"""Peers of a simulated swarm that send what they must not: told why, counted nowhere, and nobody's state hears of it.

The hostile peer is a real one whose messages are changed on their way out. Every scenario ends with equal states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from peer.p2p.chunk_store import CHUNK_METHOD
from peer.p2p.transport import Handler
from peer.rounds.catch_up import LOG_METHOD, STATE_METHOD
from peer.rounds.codec import CODECS
from peer.rounds.exchange_parts import tell_verdicts
from peer.rounds.planning import part_values
from swarm.digest import sha256
from swarm.errors import ProtocolError, VerificationError
from swarm.files import Kept
from swarm.proto.round_pb2 import ChunkReply, LogReply, PartResult, RoundMessage, StateReply
from tests.simulation.memory_transport import MemoryTransport
from tests.simulation.swarm_in_memory import SimulatedPeer, SimulatedSwarm
from tests.simulation.virtual_time import run

Change = Callable[[RoundMessage], None]
STRANGER = b"\x07" * 32


@dataclass
class Tampering:
    """What a hostile peer sent, and what it was told."""

    sent: int = 0
    refusals: list[VerificationError] = field(default_factory=list)
    averages: set[bytes] = field(default_factory=set)
    """digests of the averages that it sent"""


def tamper(peer: SimulatedPeer, kind: str, change: Change) -> Tampering:
    """From now on ``change`` is made to every message of ``kind`` that leaves ``peer``."""
    done = Tampering()
    honest_call = peer.transport.call

    async def call(to: bytes, method: str, request: Kept, **options: float) -> bytes:
        message = RoundMessage.FromString(request[:]) if method == "round" else RoundMessage()
        if message.WhichOneof("body") == kind:
            change(message)
            done.sent += 1
            request = message.SerializeToString()
        if message.average.encoded:
            done.averages.add(sha256(message.average.encoded))
        try:
            return await honest_call(to, method, request, **options)  # type: ignore[arg-type]
        except VerificationError as error:
            done.refusals.append(error)
            raise

    peer.transport.call = call  # type: ignore[assignment, method-assign]
    return done


async def start(folder: Path) -> SimulatedSwarm:
    swarm = SimulatedSwarm(folder)
    await swarm.start_seed()
    for name in ("v0", "v1", "v2"):
        await swarm.start_volunteer(name)
    await swarm.until_round(1, ["seed", "v0", "v1", "v2"])
    return swarm


def parts_since(swarm: SimulatedSwarm, first_round: int) -> list[PartResult]:
    commits = [committed for committed in swarm.peers["seed"].commits if committed.head.round >= first_round]
    assert len(commits) >= 2, "rounds were committed all the same"
    return [part for committed in commits for part in committed.record.parts]


# ---- contributions ------------------------------------------------------------------------------------------------


def _longer(message: RoundMessage) -> None:
    message.contribution.encoded += b"\0"


def _shorter(message: RoundMessage) -> None:
    message.contribution.encoded = message.contribution.encoded[:-1]


def _oversized(message: RoundMessage) -> None:
    message.contribution.encoded *= 100


def _not_a_number(message: RoundMessage) -> None:
    message.contribution.encoded = b"\xff" * len(message.contribution.encoded)


def _on_no_rung(message: RoundMessage) -> None:
    message.contribution.codec = "topk"
    message.contribution.encoded = CODECS["topk"].encode(np.ones(50_000, np.float32))


def _of_no_codec(message: RoundMessage) -> None:
    message.contribution.codec = "int8" * 1000


def _of_another_rung(message: RoundMessage) -> None:
    message.contribution.codec = "int4"


def _heavy(message: RoundMessage) -> None:
    message.contribution.weight_tokens = 10**12


def _of_another_state(message: RoundMessage) -> None:
    message.contribution.state_digest = sha256(b"another state")


def _to_another_part(message: RoundMessage) -> None:
    message.contribution.part += 1


def _of_the_round_before(message: RoundMessage) -> None:
    message.round -= 1


def _of_the_next_round(message: RoundMessage) -> None:
    message.round += 1


def _of_a_far_round(message: RoundMessage) -> None:
    message.round += 1000


def _of_another_shard(message: RoundMessage) -> None:
    message.shard += 1


def _without_a_body(message: RoundMessage) -> None:
    message.ClearField("contribution")


BAD_CONTRIBUTIONS: dict[str, tuple[Change, str]] = {
    "wrong shape, longer": (_longer, "bytes instead of"),
    "wrong shape, shorter": (_shorter, "bytes instead of"),
    "oversized": (_oversized, "bytes instead of"),
    "not a number": (_not_a_number, "no encoder writes"),
    "a rung that is not on the ladder": (_on_no_rung, "this run takes int8, int4, int2"),
    "a codec that does not exist": (_of_no_codec, "in the codec 'int8int8int8int8'; this run takes"),
    "the size of another rung": (_of_another_rung, "bytes instead of"),
    "a weight out of bounds": (_heavy, "more than the round allows"),
    "of another state": (_of_another_state, "another state"),
    "to a part of somebody else": (_to_another_part, "do not average"),
    "of the round before": (_of_the_round_before, "is committed here"),
    "of the next round": (_of_the_next_round, ""),
    "of a far round": (_of_a_far_round, ""),
    "of another shard": (_of_another_shard, ""),
    "without a body": (_without_a_body, "without a body"),
}
"""What is changed, and what the sender is told; nothing where it cannot be judged when it comes, or nobody is there."""


@pytest.mark.parametrize("case", BAD_CONTRIBUTIONS)
def test_a_bad_contribution_is_refused_by_name_and_counted_nowhere(tmp_path: Path, case: str) -> None:
    change, told = BAD_CONTRIBUTIONS[case]

    async def scenario() -> None:
        swarm = await start(tmp_path)
        bad = swarm.peers["v2"]
        done = tamper(bad, "contribution", change)
        first = swarm.peers["seed"].round + 2
        await swarm.until_round(first + 2, ["seed", "v0", "v1"])
        assert done.sent
        assert {told in str(refusal) for refusal in done.refusals} == ({True} if told else set())
        assert any(told in reason for c in bad.commits for reason in c.refused) == bool(told), "its person sees why"
        # What it averages itself holds its own contribution, which travelled nowhere.
        parts = [part for part in parts_since(swarm, first) if part.digest not in done.averages]
        counted = {share.peer_key for part in parts for share in part.shares}
        # Who of the others is in time for a round is the clock's affair.
        assert counted and counted <= {swarm.peers["v0"].key, swarm.peers["v1"].key}
        swarm.assert_equal_states()

    run(scenario())


# ---- averages -----------------------------------------------------------------------------------------------------


def _longer_average(message: RoundMessage) -> None:
    message.average.encoded += b"\0"


def _oversized_average(message: RoundMessage) -> None:
    message.average.encoded *= 100


def _average_of_a_stranger(message: RoundMessage) -> None:
    message.average.shares.add(peer_key=STRANGER, weight_tokens=1)


def _average_of_a_heavy_share(message: RoundMessage) -> None:
    message.average.shares[0].weight_tokens = 10**12


def _average_of_another_part(message: RoundMessage) -> None:
    message.average.part += 1


def _average_beyond_the_parts(message: RoundMessage) -> None:
    message.average.part = 1000


BAD_AVERAGES: dict[str, tuple[Change, str]] = {
    "wrong shape": (_longer_average, "bytes instead of"),
    "oversized": (_oversized_average, "bytes instead of"),
    "counts a stranger": (_average_of_a_stranger, "no contributor"),
    "a weight out of bounds": (_average_of_a_heavy_share, "weight out of bounds"),
    "of a part of somebody else": (_average_of_another_part, "does not average that part"),
    "of no part": (_average_beyond_the_parts, "does not average that part"),
    "of the round before": (_of_the_round_before, "is committed here"),
}


@pytest.mark.parametrize("case", BAD_AVERAGES)
def test_a_bad_average_is_refused_by_name_and_its_part_is_absent(tmp_path: Path, case: str) -> None:
    """What was trained for that part stays owed by everybody, and moves the anchor once somebody else averages it."""
    change, told = BAD_AVERAGES[case]

    async def scenario() -> None:
        swarm = await start(tmp_path)
        done = tamper(swarm.peers["v2"], "average", change)
        first = swarm.peers["seed"].round + 1
        await swarm.until_round(first + 2, ["seed", "v0", "v1"])
        assert done.refusals and all(told in str(refusal) for refusal in done.refusals)
        absent = [part for part in parts_since(swarm, first + 1) if not part.digest]
        assert absent and not any(part.digest in done.averages for part in parts_since(swarm, first))
        owed = swarm.peers["v0"].exchange.shard.owed(_values(swarm, absent[-1]))
        assert float(np.abs(owed).mean()) > 1e-4
        swarm.kill("v2")
        await swarm.until_round(swarm.peers["seed"].round + 4, ["seed", "v0", "v1"])
        assert all(part.digest for part in swarm.peers["seed"].commits[-1].record.parts)
        swarm.assert_equal_states()

    run(scenario())


def test_an_average_that_is_not_a_number_is_refused_by_name_and_never_committed(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)

        def change(message: RoundMessage) -> None:
            message.average.encoded = b"\xff" * len(message.average.encoded)

        done = tamper(swarm.peers["v2"], "average", change)
        first = swarm.peers["seed"].round + 1
        await swarm.until_round(first + 2, ["seed", "v0", "v1"])
        assert done.refusals and all("no encoder writes" in str(refusal) for refusal in done.refusals)
        assert not [part for part in parts_since(swarm, first) if part.digest in done.averages]
        absent = [part for part in parts_since(swarm, first) if not part.digest]
        shard = swarm.peers["v0"].exchange.shard
        assert np.isfinite(shard.anchor).all() and np.isfinite(shard.momentum.scales).all()
        assert float(np.abs(shard.owed(_values(swarm, absent[-1]))).mean()) > 1e-4
        swarm.assert_equal_states()

    run(scenario())


def _values(swarm: SimulatedSwarm, part: PartResult) -> slice:
    return part_values(part.first_slice, part.num_slices, swarm.num_values)


# ---- bytes that are no message, and floods --------------------------------------------------------------------------


def test_bytes_that_are_no_message_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        bad, victim = swarm.peers["v2"], swarm.peers["v0"]
        for method in ("round", CHUNK_METHOD, LOG_METHOD):
            with pytest.raises(ProtocolError):
                await bad.transport.call(victim.key, method, b"\xff" * 100, timeout_s=5)
        await swarm.until_round(swarm.peers["seed"].round + 1, ["seed", "v0", "v1", "v2"])
        swarm.assert_equal_states()

    run(scenario())


def test_a_flood_for_the_next_round_takes_bounded_memory(tmp_path: Path) -> None:
    """Twice what an honest round could send is kept, no more."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        bad, victim = swarm.peers["v2"], swarm.peers["v0"]
        message = RoundMessage(shard=0, round=victim.round + 2)
        message.contribution.encoded = bytes(20_000)
        for _ in range(300):
            message.round = victim.round + 2
            victim.exchange.on_message(bad.key, message, message.SerializeToString())
        kept = victim.exchange._early.size_bytes
        shard = victim.exchange.shard
        assert 0 < kept <= shard.round_bytes + (1 << 20)
        await swarm.until_round(victim.round + 2, ["seed", "v0", "v1", "v2"])
        swarm.assert_equal_states()

    run(scenario())


# ---- donors ---------------------------------------------------------------------------------------------------------


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if data else data


def _lying_chunks(raw: bytes) -> bytes:
    reply = ChunkReply.FromString(raw)
    reply.data = _flipped(reply.data)
    return reply.SerializeToString()


def _lying_state(raw: bytes) -> bytes:
    reply = StateReply.FromString(raw)
    for index, chunk in enumerate(reply.anchor_chunks):
        reply.anchor_chunks[index] = _flipped(chunk)
    return reply.SerializeToString()


def _lying_log(raw: bytes) -> bytes:
    reply = LogReply.FromString(raw)
    for commit in reply.commits:
        commit.record = _flipped(commit.record)
    return reply.SerializeToString()


LIES = {
    "state chunks and averages with a flipped byte": (CHUNK_METHOD, _lying_chunks),
    "a state that the log does not name": (STATE_METHOD, _lying_state),
    "commits with a flipped byte": (LOG_METHOD, _lying_log),
    "nonsense for a state": (STATE_METHOD, lambda raw: b"\xff" * 50),
    "nonsense for a log": (LOG_METHOD, lambda raw: b"\xff" * 50),
}


@pytest.mark.parametrize("case", LIES)
def test_a_newcomer_takes_nothing_from_lying_donors_and_all_from_the_honest_one(tmp_path: Path, case: str) -> None:
    """Three of four donors lie."""
    method, lie = LIES[case]
    honest = "v2"

    async def scenario() -> None:
        swarm = await start(tmp_path)
        names = ["seed", "v0", "v1", "v2"]
        await swarm.until_round(6, names)
        lies = [_lie(swarm.peers[name].transport, method, lie) for name in names if name != honest]
        late = await swarm.start_volunteer("late")
        assert late.exchange.head.round >= 4, "it starts from a state of the run, not from genesis"
        assert any(lies), "a liar was asked"
        await swarm.until_round(swarm.peers[honest].round + 2, ["late", honest])
        await swarm.until(lambda: any(commit.counted for commit in late.commits), "it is counted", at_most_s=120)
        swarm.assert_equal_states()

    run(scenario())


def _lie(transport: MemoryTransport, method: str, change: Callable[[bytes], bytes]) -> list[bytes]:
    """The answers of ``method`` are changed on their way out; the list is filled with who asked."""
    honest: Handler = transport._handlers[method]
    asked: list[bytes] = []

    async def handler(caller: bytes, request: bytes) -> bytes:
        asked.append(caller)
        return change(await honest(caller, request))

    transport._handlers[method] = handler
    return asked


# ---- contributions that are well formed ------------------------------------------------------------------------------


def test_a_replica_that_moves_the_other_way_is_rejected_and_told_and_owes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = SimulatedSwarm(tmp_path)
        await swarm.start_seed()
        names = ["v0", "v1", "v2", "v3", "v4"]
        for name in names:
            await swarm.start_volunteer(name)
            trainer = swarm.peers[name].trainer
            assert trainer is not None
            trainer._rng = np.random.default_rng(7)  # they learn alike
        bad = swarm.peers["v4"]
        trainer = bad.trainer
        assert trainer is not None
        honest_snapshot = trainer.snapshot

        async def snapshot() -> tuple[np.ndarray, int]:
            moved, tokens = await honest_snapshot()
            return -moved, tokens

        trainer.snapshot = snapshot  # type: ignore[method-assign]
        await swarm.until_round(6, ["seed", *names])
        swarm.assert_equal_states()
        told = [committed for committed in bad.commits if tell_verdicts(committed, bad.key).get("rejected")]
        assert told and not any(committed.counted for committed in told)
        assert not any(tell_verdicts(c, swarm.peers["v0"].key).get("rejected") for c in bad.commits)
        rejected = [p for c in told for p in c.record.parts if bad.key in {r.peer_key for r in p.rejections}]
        assert rejected and not any(bad.key in {share.peer_key for share in part.shares} for part in rejected)
        # Were it owed, it would grow from round to round.
        assert (
            float(np.abs(bad.exchange.shard.owed(slice(0, swarm.num_values))).max())
            < float(np.abs(trainer.moved).max()) + 1e-2
        )

    run(scenario())
