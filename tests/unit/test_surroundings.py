"""What is concluded from the statuses of shards elsewhere: whom to ask, how far they are, when the run is over."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from peer.rounds.pace import Pace, Standing
from peer.rounds.statuses import StatusRules, sign_status, status_key
from peer.surroundings import Surroundings, SurroundingsParts, standing_of
from swarm.identity import Identity
from swarm.proto.round_pb2 import Status
from tests.simulation.memory_transport import MemoryNetwork
from tests.unit.small_models import small_spec

SPEC = small_spec("llama").model_copy(update={"num_shards": 3, "total_tokens": 1000})
ME, SEED, *OTHERS = (Identity(bytes([number]) * 32) for number in range(1, 6))
NOW_S = 1e9


def status(shard: int, number: int = 1, **fields: Any) -> Status:
    words = {"trains": True, "sent_unix_ms": int(NOW_S * 1000), "addresses": ["/ip4/1.2.3.4/tcp/5"], **fields}
    return Status(shard=shard, round=number, log_digest=b"l" * 32, state_digest=b"s" * 32, **words)


def seen(*told: tuple[Identity, Status]) -> tuple[Surroundings, Pace]:
    """What a peer that hosts nothing sees of these statuses, all of whose signers need no admission."""
    network, pace = MemoryNetwork(), Pace(3)
    rules = StatusRules(
        run_id=SPEC.run_id,
        publication_key=b"p" * 32,
        founders=(SEED.public_key, *(other.public_key for other in OTHERS)),
        lifetime_s=10.0,
    )

    async def main() -> Surroundings:
        for signer, said in told:
            transport = (
                network.join(signer) if signer.public_key not in network.peers else network.peers[signer.public_key]
            )
            await transport.publish(status_key(said.shard), sign_status(signer, SPEC.run_id, said), lifetime_s=60)
        parts = SurroundingsParts(
            transport=network.join(ME), spec=SPEC, rules=rules, clock=lambda: NOW_S, me=ME.public_key, pace=pace
        )
        surroundings = Surroundings(parts, ())
        await surroundings.look()
        # Everybody was a founder so far, as those need no admission.
        surroundings._parts = replace(parts, rules=replace(rules, founders=(SEED.public_key,)))
        return surroundings

    return asyncio.run(main()), pace


def test_asked_are_those_who_host_the_shard_train_it_and_stay() -> None:
    """Wherever their span begins: it may be entered at each of its shards."""
    whole, begins, leaving, other = OTHERS[0], OTHERS[1], OTHERS[2], SEED
    surroundings, _ = seen(
        (whole, status(0)),
        (whole, status(1)),
        (begins, status(1)),
        (leaving, status(1, leaving=True)),
        (other, status(1, trains=False)),
    )
    addresses = ("/ip4/1.2.3.4/tcp/5",)
    assert surroundings.hosts(1) == {begins.public_key: addresses, whole.public_key: addresses}
    assert surroundings.hosts(0) == {whole.public_key: ("/ip4/1.2.3.4/tcp/5",)}
    assert surroundings.lacking == [2]


def test_admitted_is_whoever_has_a_status_in_any_shard() -> None:
    surroundings, _ = seen((OTHERS[0], status(2)))
    assert surroundings.is_admitted(OTHERS[0].public_key) and not surroundings.is_admitted(OTHERS[1].public_key)


STANDINGS = [
    ("nobody", {}, Standing(round=1, tokens=0)),
    ("the newest, and the tokens of those who stand there", {b"a": (3, 5), b"b": (4, 7), b"c": (4, 2)}, (4, 9)),
    ("a seed peer before who says to be far ahead", {b"seed": (3, 0), b"a": (3, 5), b"liar": (900, 7)}, (3, 5)),
    ("a seed peer before who says to be behind", {b"seed": (3, 0), b"liar": (1, 5)}, (3, 0)),
]


@pytest.mark.parametrize(("told", "expected"), [case[1:] for case in STANDINGS], ids=[case[0] for case in STANDINGS])
def test_where_a_shard_stands(told: dict[bytes, tuple[int, int]], expected: Any) -> None:
    statuses = {peer: status(1, number, tokens=tokens) for peer, (number, tokens) in told.items()}
    number, tokens = (expected.round, expected.tokens) if isinstance(expected, Standing) else expected
    assert standing_of(statuses, [b"seed"]) == Standing(round=number, tokens=tokens)


def test_the_run_is_over_when_a_seed_peer_says_so_and_nobody_else() -> None:
    said = status(0, 8, committed_tokens=1000)
    assert seen((OTHERS[0], said))[0].end_round() is None
    assert seen((SEED, status(0, 8, committed_tokens=999)))[0].end_round() is None
    assert seen((SEED, said))[0].end_round() == 7


def test_the_pace_is_told_where_the_other_shards_stand() -> None:
    _, pace = seen((SEED, status(0, 4)), (OTHERS[0], status(0, 4, tokens=77)))
    assert pace._standings[0] == Standing(round=4, tokens=77)
