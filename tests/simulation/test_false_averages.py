"""Reducers and leaders that say what is not so of an average: bounded, and with their names under it.

The hostile peer is a real one whose messages are changed, and signed again with its own key, on their way out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peer.rounds.codec import CODECS
from peer.rounds.planning import part_values
from swarm import averages
from swarm.proto.round_pb2 import PartResult, Record, RoundMessage
from tests.simulation.swarm_in_memory import SimulatedPeer, SimulatedSwarm
from tests.simulation.test_hostile_peers import Tampering, start, tamper
from tests.simulation.virtual_time import run

Change = Callable[[RoundMessage], None]
HONEST = ["seed", "v0", "v1"]


def _scale(message: RoundMessage, factor: float) -> None:
    num_values = len(message.average.encoded) * 256 // 260
    for count in range(num_values, num_values + 260):  # the last block may be short
        if CODECS["int8"].encoded_size(count) == len(message.average.encoded):
            break
    values = CODECS["int8"].decode(message.average.encoded, count)
    message.average.encoded = CODECS["int8"].encode(values * np.float32(factor))


def _longer(message: RoundMessage) -> None:
    _scale(message, 1000)


def _longer_out_of_false_norms(message: RoundMessage) -> None:
    _scale(message, 1000)
    for share in message.average.shares:
        share.norm *= 1000


def _turned_around(message: RoundMessage) -> None:
    _scale(message, -1)


def _heavier(message: RoundMessage) -> None:
    for share in message.average.shares:
        share.weight_tokens += 1


def _unsigned(message: RoundMessage) -> None:
    message.average.signature = b""


def lie_as_a_reducer(swarm: SimulatedSwarm, liar: SimulatedPeer, change: Change) -> Tampering:
    """``liar`` changes the averages that it sends to others, and signs them."""

    def changed(message: RoundMessage) -> None:
        attempt = liar.exchange._machine.attempt
        if message.average.shares and attempt is not None:
            change(message)
            if message.average.signature:
                payload = averages.payload(attempt.opened, attempt.result(message.average, message.average.encoded))
                signed = liar.identity.sign(averages.AVERAGE_CONTEXT, swarm.spec.run_id, payload)
                message.average.signature = signed.signature

    return tamper(liar, "average", changed)


def lied_parts(swarm: SimulatedSwarm, done: Tampering) -> list[tuple[Record, PartResult]]:
    """Parts of commits that hold what the liar sent."""
    records = [committed.record for committed in swarm.peers["seed"].commits]
    return [(record, part) for record in records for part in record.parts if part.digest in done.averages]


def incidents(peer: SimulatedPeer) -> list[dict[str, str]]:
    path = peer.exchange.parts.ledger.folder / "incidents"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_average_that_is_longer_than_its_contributions_allow_moves_nothing_and_is_an_incident(
    tmp_path: Path,
) -> None:
    """Alike on every replica; what was trained for it stays owed; an incident holds the liar's signature."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        done = lie_as_a_reducer(swarm, swarm.peers["v2"], _longer)
        await swarm.until(lambda: len(lied_parts(swarm, done)) > 3, "it is committed", at_most_s=120)
        await swarm.until_round(swarm.peers["seed"].round + 1, HONEST)
        swarm.assert_equal_states()
        shard = swarm.peers["v0"].exchange.shard
        assert float(np.abs(shard.anchor).max()) < 10, "a thousand times a movement is far more"
        _, part = lied_parts(swarm, done)[-1]
        place = part_values(part.first_slice, part.num_slices, swarm.num_values)
        assert float(np.abs(shard.owed(place)).mean()) > 1e-4
        for name in HONEST:
            written = incidents(swarm.peers[name])
            assert {line["reducer"] for line in written} == {swarm.peers["v2"].identity.peer_id}
            assert any("longer than" in line["why"] and line["signature"] for line in written)

    run(scenario())


LIES: dict[str, tuple[Change, str]] = {
    "a long average, and norms to match": (_longer_out_of_false_norms, "with the norm"),
    "more tokens than were trained": (_heavier, "tokens instead of"),
}


@pytest.mark.parametrize("case", LIES)
def test_who_is_in_an_average_with_other_figures_than_its_own_says_so(tmp_path: Path, case: str) -> None:
    """Refused by each of them when it comes, an incident where it is committed all the same; states stay equal."""
    change, why = LIES[case]

    async def scenario() -> None:
        swarm = await start(tmp_path)
        done = lie_as_a_reducer(swarm, swarm.peers["v2"], change)
        await swarm.until(lambda: len(lied_parts(swarm, done)) > 1, "it is committed", at_most_s=120)
        await swarm.until_round(swarm.peers["seed"].round + 1, HONEST)
        swarm.assert_equal_states()
        assert any(why in str(refusal) for refusal in done.refusals)
        for name in ("v0", "v1"):
            written = incidents(swarm.peers[name])
            assert any(why in line["why"] for line in written)
            assert any(why in told for commit in swarm.peers[name].commits for told in commit.disputed)

    run(scenario())


def test_an_average_that_its_reducer_did_not_sign_is_never_committed(tmp_path: Path) -> None:
    async def scenario() -> None:
        swarm = await start(tmp_path)
        done = lie_as_a_reducer(swarm, swarm.peers["v2"], _unsigned)
        first = swarm.peers["seed"].round + 1
        await swarm.until_round(first + 2, HONEST)
        assert done.refusals and all("signature" in str(refusal) for refusal in done.refusals)
        assert not lied_parts(swarm, done)
        swarm.assert_equal_states()

    run(scenario())


def test_an_average_that_points_elsewhere_is_not_noticed_and_has_a_name_under_it(tmp_path: Path) -> None:
    """What is not stopped yet: nobody recomputes averages. All replicas still hold one state."""

    async def scenario() -> None:
        swarm = await start(tmp_path)
        liar = swarm.peers["v2"]
        done = lie_as_a_reducer(swarm, liar, _turned_around)
        await swarm.until(lambda: len(lied_parts(swarm, done)) > 1, "it is committed", at_most_s=120)
        await swarm.until_round(swarm.peers["seed"].round + 1, HONEST)
        swarm.assert_equal_states()
        for record, part in lied_parts(swarm, done):
            assert part.reducer == liar.key
            averages.check_signature(swarm.spec.run_id, record, part)
        assert not any(incidents(swarm.peers[name]) for name in HONEST)

    run(scenario())
