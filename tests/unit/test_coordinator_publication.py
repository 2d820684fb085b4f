"""Publication: which manifests get the publication key's signature."""

from __future__ import annotations

import dataclasses
import math
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Timestamp

from coordinator import incidents, publication, vouching, witnesses
from coordinator.contributions import Ledger
from coordinator.run import Run, open_run
from coordinator.store import Store
from coordinator.witnesses import ATTEST_WITHIN_MS
from peer.checkpoints import trusted
from swarm import governance, metadata, witness
from swarm.digest import join_subtrees, sha256
from swarm.errors import ConfigError, NotAdmitted, NotFound, ProtocolError, SignatureError, VerificationError
from swarm.identity import Identity
from swarm.proto.checkpoint_pb2 import Witnesses
from tests.coordinator_publishing import attest, attest_all, publish, request
from tests.coordinator_world import ANNA, BORIS, NOW_UNIX_MS, ORGANIZER, PUBLICATION, SEED, STRANGER, World


@pytest.fixture
def world(store: Store) -> World:
    """Three rounds are recorded, and all three replicas attested the last two."""
    made = World()
    Ledger(made.run, store).record(made.commits(3), NOW_UNIX_MS)
    attest_all(made, store, 2, 3)
    return made


@pytest.mark.parametrize("number", [2, 3], ids=["the next round is recorded", "the last recorded round"])
def test_an_honest_manifest_is_signed_by_the_publication_key(world: World, store: Store, number: int) -> None:
    payload = world.manifest(number)
    published = publish(world, store, payload)
    assert published.manifest.payload == payload
    assert published.manifest.signer == PUBLICATION.public_key
    assert published.verified(world.run_id, world.spec).round == number


def test_more_witnesses_than_researchers_take_are_cut_to_as_many_as_are_needed(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a large run could publish nothing: two of the three that attested are enough here."""
    attestation = world.attest_request(SEED, 2).ByteSize()
    monkeypatch.setattr(witness, "MAX_WITNESSES_BYTES", 3 * attestation)
    published = publish(world, store, world.manifest(2))
    quorum = witness.parse_witnesses(published.witnesses, world.run_id, PUBLICATION.public_key)
    assert (len(quorum.attestations), len(quorum.replicas)) == (2, 3)
    assert published.verified(world.run_id, world.spec).round == 2


def test_the_same_manifest_gets_the_same_answer(world: World, store: Store) -> None:
    first = publish(world, store, world.manifest(2))
    assert publish(world, store, world.manifest(2)) == first
    assert len(store.published.newest_checkpoints(10)) == 1


def test_a_round_is_published_once(world: World, store: Store) -> None:
    publish(world, store, world.manifest(2))
    other_file = [{"name": "config.json", "size_bytes": 2, "sha256": sha256(b"[]").hex(), "chunks": ["1" * 64]}]
    with pytest.raises(VerificationError, match="another manifest"):
        publish(world, store, world.manifest(2, files=other_file))


BAD_MANIFESTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "of another run": ({"run_id": "0" * 40}, VerificationError, "another run"),
    "of another name": ({"run_name": "other"}, VerificationError, "another run"),
    "other data": ({"data_manifest_digest": "0" * 64}, VerificationError, "other data"),
    "round not recorded": ({"round": 4}, NotFound, "not recorded"),
    "round of 2^64": ({"round": 2**64}, VerificationError, "believable"),
    "other tokens": ({"total_tokens": 601}, VerificationError, "tokens"),
    "other log": ({"log_digest": "0" * 64}, VerificationError, "log digest"),
    "other state": ({"state_digest": "0" * 64}, VerificationError, "state"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_that_the_log_contradicts_is_refused(world: World, store: Store, case: str) -> None:
    changes, expected, message = BAD_MANIFESTS[case]
    with pytest.raises(expected, match=message):
        publish(world, store, world.manifest(2, **changes))
    assert store.published.newest_checkpoints(10) == []


def test_bytes_that_are_no_manifest_are_refused(world: World, store: Store) -> None:
    with pytest.raises(VerificationError, match="not JSON"):
        publish(world, store, b"\xff")


def test_only_a_seed_peer_publishes(world: World, store: Store) -> None:
    payload = world.manifest(2)
    with pytest.raises(SignatureError, match="only a seed peer"):
        request(world, store, STRANGER.sign("publish", world.run_id, payload))
    forged = STRANGER.sign("publish", world.run_id, payload)
    forged.signer = SEED.public_key
    with pytest.raises(SignatureError, match="does not verify"):
        request(world, store, forged)


def test_checkpoints_are_listed_and_found(world: World, store: Store) -> None:
    second, third = (publish(world, store, world.manifest(number)) for number in (2, 3))
    infos = publication.list_checkpoints(store).checkpoints
    assert [(info.round, info.total_tokens, info.size_bytes) for info in infos] == [(3, 900, 2), (2, 600, 2)]
    assert infos[0].manifest_digest == sha256(third.manifest.payload)
    assert math.isnan(infos[0].validation_loss)
    assert publication.get_checkpoint(world.run, store, 0) == third
    assert publication.get_checkpoint(world.run, store, 2) == second


@pytest.mark.parametrize("number", [0, 1, 2**64 - 1])
def test_a_checkpoint_that_is_not_there_is_not_found(store: Store, number: int) -> None:
    with pytest.raises(NotFound):
        publication.get_checkpoint(World().run, store, number)


OTHER_ANCHOR = {
    "anchor_digest": b"a" * 32,
    "momentum_digest": b"m" * 32,
    "state_digest": join_subtrees(b"a" * 32, b"m" * 32),
}


@pytest.fixture
def bare(store: Store) -> World:
    """A round is recorded; nobody has attested it."""
    made = World()
    Ledger(made.run, store).record(made.commits(1), NOW_UNIX_MS)
    return made


def test_a_checkpoint_waits_for_more_than_half_of_the_live_replicas(bare: World, store: Store) -> None:
    for replica, wanted in ((None, "0 of 2"), (SEED, "1 of 3")):
        if replica is not None:
            attest(bare, store, replica, 1)
        with pytest.raises(NotFound, match=f"{wanted} live replicas attested its state, 2 are needed"):
            publish(bare, store, bare.manifest(1))
    attest(bare, store, BORIS, 1)
    quorum = Witnesses.FromString(publish(bare, store, bare.manifest(1)).witnesses.payload)
    assert {signed.signer for signed in quorum.attestations} == {SEED.public_key, BORIS.public_key}
    assert set(quorum.replicas) == {SEED.public_key, ANNA.public_key, BORIS.public_key}


def test_the_seed_peer_alone_is_witness_enough_where_nobody_else_lives(bare: World, store: Store) -> None:
    later = NOW_UNIX_MS + 2000
    attest(bare, store, SEED, 1)
    assert len(Witnesses.FromString(publish(bare, store, bare.manifest(1), later).witnesses.payload).replicas) == 1


def test_a_replica_that_is_heard_but_never_attests_is_not_waited_for_for_ever(bare: World, store: Store) -> None:
    later = NOW_UNIX_MS + ATTEST_WITHIN_MS + 1
    attest(bare, store, SEED, 1)
    store.admit(ANNA.public_key, later + 1, later, 100)
    with pytest.raises(NotFound, match="1 of 2"):
        publish(bare, store, bare.manifest(1), later - 1)
    assert publish(bare, store, bare.manifest(1), later)


def test_strangers_to_the_log_are_no_witnesses(bare: World, store: Store) -> None:
    for who in (SEED, STRANGER):
        attest(bare, store, who, 1)
    with pytest.raises(NotFound, match="1 of 3"):
        publish(bare, store, bare.manifest(1))


def test_what_strangers_say_is_not_kept_and_raises_no_incident(bare: World, store: Store) -> None:
    attest(bare, store, SEED, 1)
    for who in (STRANGER, ORGANIZER):
        attest(bare, store, who, 1, **OTHER_ANCHOR)
    assert [row.peer_key for row in store.published.attestations(1, 10)] == [SEED.public_key]
    assert incidents.newest(store) == []


def test_a_replica_that_says_the_same_in_several_ways_counts_once(bare: World, store: Store) -> None:
    unknown_fields = (b"\xa2\x06\x01a", b"\xa2\x06\x01b")  # a reader passes over them
    attest(bare, store, BORIS, 1)
    for added in unknown_fields:
        payload = bare.attestation(1).SerializeToString() + added
        witnesses.attest(bare.run, store, BORIS.sign("attestation", bare.run_id, payload), NOW_UNIX_MS)
    assert len(store.published.attestations(1, 10)) == 3
    store.admit(ANNA.public_key, NOW_UNIX_MS + 10**9, NOW_UNIX_MS, 100)
    with pytest.raises(NotFound, match="1 of 2"):
        publish(bare, store, bare.manifest(1))
    attest(bare, store, ANNA, 1)
    published = publish(bare, store, bare.manifest(1))
    assert published.verified(bare.run_id, bare.spec).round == 1


def test_a_publication_that_researchers_would_refuse_is_not_stored(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(witnesses, "gather", lambda *_: Witnesses(round=2, manifest_digest=b"d" * 32))
        with pytest.raises(VerificationError, match="another manifest"):
            publish(world, store, world.manifest(2))
    assert publish(world, store, world.manifest(2)).verified(world.run_id, world.spec).round == 2


def test_replicas_that_signed_another_state_are_no_witnesses_and_the_incident_names_them(
    bare: World, store: Store
) -> None:
    attest(bare, store, SEED, 1)
    assert incidents.newest(store) == []
    for replica in (ANNA, BORIS):
        attest(bare, store, replica, 1, **OTHER_ANCHOR)
    with pytest.raises(NotFound, match="1 of 3"):
        publish(bare, store, bare.manifest(1))
    (incident,) = incidents.newest(store)
    assert "round 1: witnesses disagree" in incident.text
    for name in (SEED.peer_id, ANNA.peer_id, BORIS.peer_id, OTHER_ANCHOR["state_digest"].hex()):
        assert name in incident.text
    assert len(incident.attestations) == 3


def test_a_replica_that_says_two_things_is_named_too(bare: World, store: Store) -> None:
    for _ in range(2):
        attest(bare, store, ANNA, 1)
    assert incidents.newest(store) == []
    attest(bare, store, ANNA, 1, layout_digest=b"l" * 32)
    assert incidents.newest(store)[0].text.count(ANNA.peer_id) == 2


BAD_ATTESTATIONS: dict[str, tuple[Identity, dict[str, Any], type[Exception]]] = {
    "a state that is not made of its subtrees": (ANNA, {"state_digest": b"s" * 32}, ProtocolError),
    "a digest of a wrong length": (ANNA, {"log_digest": b"l"}, ProtocolError),
    "a round that is not recorded": (ANNA, {"round": 2}, NotFound),
    "a round of 2^64": (ANNA, {"round": 2**64 - 1}, NotFound),
    "another shard": (ANNA, {"shard": 1}, NotFound),
    "by nobody admitted": (BORIS, {}, NotAdmitted),
}


@pytest.mark.parametrize(("who", "changes", "error"), BAD_ATTESTATIONS.values(), ids=BAD_ATTESTATIONS.keys())
def test_a_bad_attestation_is_refused(
    bare: World, store: Store, who: Identity, changes: dict[str, Any], error: type[Exception]
) -> None:
    store.admit(ANNA.public_key, NOW_UNIX_MS + 1000, NOW_UNIX_MS, 100)
    with pytest.raises(error):
        witnesses.attest(bare.run, store, bare.attest_request(who, 1, **changes), NOW_UNIX_MS)
    assert store.published.attestations(1, 10) == []


def test_an_attestation_of_another_run_is_refused(bare: World, store: Store) -> None:
    payload = bare.attestation(1).SerializeToString()
    with pytest.raises(SignatureError):
        witnesses.attest(bare.run, store, ANNA.sign("attestation", b"x" * 20, payload), NOW_UNIX_MS)


def _client(world: World, run: Run, store: Store, folder: Path, now_unix_ms: int = NOW_UNIX_MS) -> trusted.Trusted:
    source = trusted.files_source(vouching.current_files(run, store, now_unix_ms))
    return trusted.refresh(folder, world.run_id, world.spec, source)


def test_the_metadata_names_each_published_checkpoint_and_its_witnesses(
    world: World, store: Store, tmp_path: Path
) -> None:
    for number in (2, 3):
        published = publish(world, store, world.manifest(number))
        found = _client(world, world.run, store, tmp_path / "trusted")
        assert found.newest_round == number and found.check(published).round == number


def test_a_day_later_the_timestamp_is_signed_anew(world: World, store: Store) -> None:
    day_ms = 24 * 3600 * 1000
    now = int(time.time() * 1000)
    vouching.open_metadata(world.run, store, now)
    first = vouching.current_files(world.run, store, now)
    assert vouching.current_files(world.run, store, now + day_ms // 2) == first
    later = vouching.current_files(world.run, store, now + day_ms + 1000)
    assert {name for name in first if later[name] != first[name]} == {"timestamp.json"}


def test_an_earlier_round_that_is_published_after_the_last_leaves_the_metadata_of_an_ended_run(
    bare: World, store: Store
) -> None:
    Ledger(bare.run, store).record([bare.commit(tokens=bare.spec.total_tokens)], NOW_UNIX_MS)
    expiries = []
    for number in (2, 1):
        attest_all(bare, store, number)
        publish(bare, store, bare.manifest(number))
        raw = vouching.current_files(bare.run, store, NOW_UNIX_MS)["timestamp.json"]
        expiries.append(metadata.read(raw, Timestamp).signed.expires)
    assert expiries[0] == expiries[1]


def test_after_a_change_of_keys_everything_is_signed_anew_and_clients_follow(
    world: World, store: Store, tmp_path: Path
) -> None:
    old = publish(world, store, world.manifest(2))
    _client(world, world.run, store, tmp_path / "trusted")
    before, new_key = world.source.offline, STRANGER
    said = governance.describe(before.roots[-1])
    after = dataclasses.replace(said, version=2, publication_key=new_key.public_key)
    change = governance.propose(world.run_id, after, 2, datetime.now(timezone.utc))
    offline = governance.adopt(world.run_id, before, governance.sign(change, ORGANIZER))
    with pytest.raises(ConfigError, match="publication key"):
        open_run(dataclasses.replace(world.source, offline=offline))
    run = open_run(dataclasses.replace(world.source, offline=offline, publisher=new_key))
    vouching.open_metadata(run, store, NOW_UNIX_MS)
    renewed = publication.get_checkpoint(run, store, 2)
    assert renewed.manifest.payload == old.manifest.payload and renewed.manifest.signer == new_key.public_key
    found = _client(world, run, store, tmp_path / "trusted")
    assert found.check(renewed).round == 2
    assert found.check(old).round == 2, "what lies on mirrors and disks with the old signature stays good"
    withdrawn = dataclasses.replace(found, checkpoints={})
    with pytest.raises(SignatureError, match="replaced"):
        withdrawn.check(old)
