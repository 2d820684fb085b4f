"""The coordinator of a run of several shards: a log for each, manifests that all of them bear out, who trains what."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from coordinator import contributions, incidents, membership, records, witnesses
from coordinator.contributions import Ledger, ledger_of
from coordinator.published import Introduction
from coordinator.service import Service
from coordinator.store import Store
from swarm import digest, manifest, witness
from swarm.errors import NotFound, ProtocolError, VerificationError
from swarm.identity import Identity
from swarm.log import LogHead
from swarm.proto import coordinator_pb2 as pb
from swarm.proto.checkpoint_pb2 import Attestation, ShardReplicas, Witnesses
from tests.coordinator_publishing import publish
from tests.coordinator_world import (
    ANNA,
    BORIS,
    NOW_UNIX_MS,
    NOW_UNIX_S,
    PUBLICATION,
    SEED,
    World,
    state_digest_after,
    subtrees_after,
)


def test_each_shard_has_a_log_of_its_own_and_its_next_round_is_wanted(store: Store) -> None:
    world = World(num_shards=3)
    service = Service(world.run, store, lambda: NOW_UNIX_S)

    async def scenario() -> None:
        wanted = []
        for shard, count in ((0, 3), (1, 2)):
            commits, _ = world.commits_of(shard, count)
            request = pb.RecordCommitsRequest(commits=commits)
            wanted.append((await service.record_commits(request)).next_round_wanted)
        assert wanted == [4, 3]
        await service.admit(pb.AdmitRequest(request=world.admit_request(ANNA)))
        reply = await service.report(pb.ReportRequest(report=world.report_request(ANNA)))
        assert (reply.next_round_wanted, list(reply.of_other_shards)) == (4, [3, 1])
        progress = await service.get_progress(pb.GetProgressRequest())
        assert [shard.round for shard in progress.shards] == [3, 2, 0]
        assert (progress.round, progress.total_tokens) == (0, 0), "what all shards have committed"

    asyncio.run(scenario())
    assert [Ledger(world.run, store, shard).head.round for shard in range(3)] == [3, 2, 0], "after a restart, too"


def test_commits_of_a_shard_that_is_none_or_of_two_shards_at_once_are_refused(store: Store) -> None:
    world = World(num_shards=2)
    ledgers = [Ledger(world.run, store, shard) for shard in range(2)]
    with pytest.raises(ProtocolError, match="a commit of shard 2; the run has 2"):
        ledger_of(ledgers, world.commits_of(2, 1)[0])
    first, second = world.commits_of(0, 1)[0], world.commits_of(1, 2)[0][1:]
    with pytest.raises(ProtocolError, match="cannot follow"):
        ledger_of(ledgers, [*first, *second]).record([*first, *second], NOW_UNIX_MS)
    assert [ledger.head.round for ledger in ledgers] == [0, 0]


def recorded(world: World, store: Store, count: int = 3) -> list[list[LogHead]]:
    """The heads of both shards after as many rounds."""
    heads = []
    for shard in range(2):
        commits, of_shard = world.commits_of(shard, count)
        Ledger(world.run, store, shard).record(commits, NOW_UNIX_MS)
        heads.append(of_shard)
    world.heads = heads[0]
    return heads


def manifest_of(world: World, heads: list[list[LogHead]], number: int = 2, **changes: Any) -> bytes:
    anchor, momentum = subtrees_after(number)
    shards = [
        {
            "state_digest": state_digest_after(number).hex(),
            "log_digest": of_shard[number].log_digest.hex(),
            "anchor_digest": anchor.hex(),
            "momentum_digest": momentum.hex(),
            "num_values": 50,
        }
        for of_shard in heads
    ]
    for shard, name, value in changes.pop("wrong", ()):
        shards[shard][name] = value
    over = {
        name: digest.over_shards([bytes.fromhex(str(shard[name])) for shard in shards]).hex()
        for name in ("state_digest", "log_digest", "anchor_digest", "momentum_digest")
    }
    whole = {"digest": over.pop("anchor_digest"), "momentum_digest": over.pop("momentum_digest")}
    parameters = [{"name": "a.weight", "shape": [100]}]
    return world.manifest(
        number, **{"shards": shards, **over, "anchor": {**whole, "parameters": parameters}, **changes}
    )


def attest(world: World, store: Store, who: Identity, payload: bytes, shards: tuple[int, ...] = (0, 1)) -> None:
    """``who`` holds these shards of the checkpoint."""
    store.admit(who.public_key, NOW_UNIX_MS + 10**9, NOW_UNIX_MS, 100)
    for attestation in witness.attestations_of(manifest.parse(payload)):
        if attestation.shard in shards:
            signed = who.sign("attestation", world.run_id, attestation.SerializeToString())
            witnesses.attest(world.run, store, signed, NOW_UNIX_MS)


def test_a_manifest_that_every_log_bears_out_is_signed(store: Store) -> None:
    world = World(num_shards=2)
    payload = manifest_of(world, recorded(world, store))
    for replica in (SEED, ANNA, BORIS):
        attest(world, store, replica, payload)
    published = publish(world, store, payload)
    assert published.manifest.payload == payload
    assert len(published.verified(world.run_id, world.spec).states) == 2


def test_each_shard_needs_a_quorum_of_its_own(store: Store) -> None:
    """Three attested the first shard, and only one the second, which is too few until another one does."""
    world = World(num_shards=2)
    payload = manifest_of(world, recorded(world, store))
    attest(world, store, SEED, payload)
    for replica in (ANNA, BORIS):
        attest(world, store, replica, payload, shards=(0,))
    with pytest.raises(NotFound, match="1 of 3 live replicas attested its state, 2 are needed"):
        publish(world, store, payload)
    attest(world, store, ANNA, payload, shards=(1,))
    published = publish(world, store, payload)
    published.verified(world.run_id, world.spec)

    quorum = Witnesses.FromString(published.witnesses.payload)
    first_only = [signed for signed in quorum.attestations if Attestation.FromString(signed.payload).shard == 0]
    del quorum.attestations[:]
    quorum.attestations.extend(first_only)
    cut = PUBLICATION.sign("witnesses", world.run_id, quorum.SerializeToString())
    with pytest.raises(VerificationError, match="0 of 3 live replicas are witnesses"):
        dataclasses.replace(published, witnesses=cut).verified(world.run_id, world.spec)


def test_who_attested_one_shard_is_not_waited_for_at_another_that_it_does_not_host(store: Store) -> None:
    world = World(num_shards=2)
    payload = manifest_of(world, recorded(world, store))
    attest(world, store, SEED, payload)
    for who in (ANNA, BORIS):
        attest(world, store, who, payload, shards=(0,))
        membership.report(world.run, store, world.report_request(who, first_shard=0, num_shards=1), NOW_UNIX_MS)
    quorum = Witnesses.FromString(publish(world, store, payload).witnesses.payload)
    assert [len(shard.places) for shard in quorum.shards] == [3, 1]


def test_a_quorum_names_the_replicas_of_each_shard_and_counts_these_alone(store: Store) -> None:
    """One of each shard alone is too few where the quorum says that two held it."""
    world = World(num_shards=2)
    payload = manifest_of(world, recorded(world, store))
    for who, shards in ((SEED, (0, 1)), (ANNA, (0,)), (BORIS, (0,))):
        attest(world, store, who, payload, shards=shards)
    signed = [item for item, _ in witnesses._kept(world.run, store, 2)]
    keys = sorted(who.public_key for who in (SEED, ANNA, BORIS))

    def problem(*places: list[int]) -> str:
        made = Witnesses(
            round=2,
            replicas=keys,
            attestations=signed,
            shards=[ShardReplicas(places=of_shard) for of_shard in places],
        )
        try:
            witness.check_quorum(made, world.run_id, world.spec.checkpoints, manifest.parse(payload))
        except (ProtocolError, VerificationError) as error:
            return str(error)
        return ""

    seed = keys.index(SEED.public_key)
    assert problem([0, 1, 2], [seed]) == ""
    assert "shard 1: 1 of 2 live replicas" in problem([0, 1, 2], sorted({seed, (seed + 1) % 3}))
    assert "shard 1: 0 of 1 live replicas" in problem([0, 1, 2], [(seed + 1) % 3])
    assert "a shard without a replica" in problem([0, 1, 2], [])
    assert "the replicas of 1 shards" in problem([0, 1, 2])


def test_a_quorum_is_bounded_by_the_replicas_of_each_shard_and_not_by_those_of_all(store: Store) -> None:
    world = World(num_shards=2)
    payload = manifest_of(world, recorded(world, store))
    signers = (SEED, ANNA)
    for who in signers:
        attest(world, store, who, payload)
    signed = [item for item, _ in witnesses._kept(world.run, store, 2)]
    keys = [*(who.public_key for who in signers), *(number.to_bytes(32, "big") for number in range(2 * 256))]
    rules = world.spec.checkpoints.model_copy(update={"witness_share": 0.0})

    def check(replicas: list[bytes], *shards: list[int]) -> None:
        named = [ShardReplicas(places=places) for places in shards]
        made = Witnesses(round=2, replicas=replicas, attestations=signed, shards=named)
        witness.check_quorum(made, world.run_id, rules, manifest.parse(payload))

    check(keys[:257], list(range(200)), [0, 1, *range(200, 257)])
    for replicas, shards in ((keys[:257], []), (keys[:257], [[*range(257)], [0, 1]]), (keys[:513], [[0, 1], [0, 1]])):
        with pytest.raises(ProtocolError, match="more than 256 replicas of a shard"):
            check(replicas, *shards)


def test_witnesses_of_one_shard_that_disagree_are_an_incident_and_other_shards_are_not_compared(store: Store) -> None:
    world = World(num_shards=2)
    heads = recorded(world, store)
    attest(world, store, SEED, manifest_of(world, heads))
    assert incidents.newest(store) == []
    other = digest.sha256(b"another anchor"), subtrees_after(2)[1]
    wrong = [(1, "anchor_digest", other[0].hex()), (1, "state_digest", digest.join_subtrees(*other).hex())]
    attest(world, store, ANNA, manifest_of(world, heads, wrong=wrong))
    (incident,) = incidents.newest(store)
    assert incident.text.startswith("round 2, shard 1: witnesses disagree") and len(incident.attestations) == 2


def test_an_attestation_of_a_shard_that_is_none_is_refused(store: Store) -> None:
    world = World(num_shards=2)
    recorded(world, store)
    store.admit(ANNA.public_key, NOW_UNIX_MS + 10**9, NOW_UNIX_MS, 100)
    for shard in (2, 2**32 - 1):
        with pytest.raises(NotFound, match="not recorded"):
            witnesses.attest(world.run, store, world.attest_request(ANNA, 2, shard=shard), NOW_UNIX_MS)


WRONG = [
    ("another log of the second shard", {"wrong": [(1, "log_digest", "0" * 64)]}, "log digest"),
    ("another state of the second shard", {"wrong": [(1, "state_digest", "0" * 64)]}, "state"),
    ("as if the run had one shard", {"shards": [], "state_digest": "0" * 64}, "manifest of 1 shards; the run has 2"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_manifest_that_one_log_contradicts_is_refused(store: Store, changes: dict[str, Any], message: str) -> None:
    world = World(num_shards=2)
    with pytest.raises(VerificationError, match=message):
        publish(world, store, manifest_of(world, recorded(world, store), **changes))


def test_a_round_that_one_shard_has_not_committed_is_not_published_yet(store: Store) -> None:
    world = World(num_shards=2)
    commits, heads = world.commits_of(1, 3)
    world.heads = world.commits_of(0, 3)[1]
    Ledger(world.run, store, 0).record(world.commits_of(0, 3)[0], NOW_UNIX_MS)
    Ledger(world.run, store, 1).record(commits[:1], NOW_UNIX_MS)
    with pytest.raises(NotFound, match="not recorded yet"):
        publish(world, store, manifest_of(world, [world.heads, heads]))


def test_progress_tells_who_trains_each_shard_and_counts_nobody_twice(store: Store) -> None:
    """Anna holds the whole model, Boris the second shard; the seed peer trains nothing, the silent neither."""
    world = World(num_shards=2, voters=(SEED,))
    heads = [of_shard[-1] for of_shard in recorded(world, store)]
    for who in (SEED, ANNA, BORIS):
        membership.admit(world.run, store, world.admit_request(who), NOW_UNIX_MS)
    spans: dict[Any, dict[str, Any]] = {
        SEED: {"num_shards": 2},
        ANNA: {"num_shards": 2, "service_tokens_per_s": 40.0, "shard_tokens_per_s": [10.0, 12.0]},
        BORIS: {"first_shard": 1, "num_shards": 1, "service_tokens_per_s": 9.0, "shard_tokens_per_s": [8.0]},
    }
    for who, span in spans.items():
        membership.report(world.run, store, world.report_request(who, **span), NOW_UNIX_MS)
    reply = contributions.progress(world.run, heads, store, NOW_UNIX_MS)
    told = [(shard.replicas, shard.tokens_per_s, shard.service_tokens_per_s) for shard in reply.shards]
    assert told == [(1, 10.0, 40.0), (2, 20.0, 49.0)]
    assert reply.tokens_per_s == 10.0, "what passed the first shard: each token once, wherever else it was trained"
    (boris,) = [peer for peer in reply.peers if peer.peer_key == BORIS.public_key]
    assert (boris.first_shard, boris.num_shards, boris.service_tokens_per_s) == (1, 1, 9.0)
    assert {peer.peer_key: peer.tokens for peer in reply.peers if peer.tokens} == {
        ANNA.public_key: 300,
        BORIS.public_key: 600,
    }, "what both shards credit, over two"
    assert records.make(store, 3, num_shards=2).num_peers == 2
    store.published.introduce(BORIS.public_key, Introduction(name="Boris", agent="test/1"))
    (named,) = records.make(store, 3, num_shards=2).contributors
    assert (named.name, named.tokens) == ("Boris", 600), "on a card, too"
    later = contributions.progress(world.run, heads, store, NOW_UNIX_MS + 61_000)
    assert [shard.replicas for shard in later.shards] == [0, 0] and later.tokens_per_s == 0


def test_the_total_of_a_whole_model_and_two_spans_counts_each_token_once(store: Store) -> None:
    """Anna reads 100 tokens/s and trains 30 more from the second shard on, of the 80 that Boris reads."""
    world = World(num_shards=2, voters=(SEED,))
    heads = [of_shard[-1] for of_shard in recorded(world, store)]
    stranger = Identity(b"d" * 32)
    spans = {
        ANNA: {"num_shards": 2, "tokens_per_s": 130.0, "shard_tokens_per_s": [100.0, 130.0]},
        BORIS: {"num_shards": 1, "tokens_per_s": 80.0, "shard_tokens_per_s": [80.0]},
        stranger: {"first_shard": 1, "num_shards": 1, "tokens_per_s": 50.0, "shard_tokens_per_s": [50.0]},
    }
    for who, span in spans.items():
        membership.admit(world.run, store, world.admit_request(who), NOW_UNIX_MS)
        membership.report(world.run, store, world.report_request(who, **span), NOW_UNIX_MS)
    reply = contributions.progress(world.run, heads, store, NOW_UNIX_MS)
    assert [shard.tokens_per_s for shard in reply.shards] == [180.0, 180.0] and reply.tokens_per_s == 180.0
