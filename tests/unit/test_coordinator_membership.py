"""Admission and reports: tables of honest and hostile requests, against a real store and a fixed clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from coordinator import membership
from coordinator.run import Run
from coordinator.store import Losses, Store
from swarm.digest import sha256
from swarm.errors import ConfigError, NotAdmitted, ProtocolError, SignatureError, SwarmError
from swarm.identity import Identity, verify
from swarm.proto.common_pb2 import Admission, Signed
from tests.coordinator_world import (
    ANNA,
    BORIS,
    NOW_UNIX_MS,
    PUBLICATION,
    SEED,
    STRANGER,
    TOKEN,
    World,
    address_of,
    report_payload,
)

WITH_TOKEN = {"mode": "token", "token_sha256": sha256(TOKEN.encode()).hex()}
WITH_LIST = {"mode": "allow", "allow": [STRANGER.peer_id]}


@pytest.mark.parametrize(
    ("rule", "who", "token", "admitted"),
    [
        ({"mode": "open"}, STRANGER, "", True),
        (WITH_TOKEN, STRANGER, TOKEN, True),
        (WITH_TOKEN, STRANGER, TOKEN + " ", False),
        (WITH_TOKEN, STRANGER, "", False),
        (WITH_TOKEN, SEED, "", True),
        (WITH_LIST, STRANGER, "", True),
        (WITH_LIST, PUBLICATION, TOKEN, False),
        (WITH_LIST, SEED, "", True),
    ],
    ids=[
        "open run",
        "right token",
        "token with a space",
        "no token",
        "seed peer without token",
        "on the list",
        "not on the list",
        "seed peer not on the list",
    ],
)
def test_the_rule_of_the_spec_decides_who_is_admitted(
    store: Store, rule: dict[str, Any], who: Identity, token: str, admitted: bool
) -> None:
    world = World(admission=rule)
    request = world.admit_request(who, token=token)
    if not admitted:
        with pytest.raises(ConfigError, match="not admitted"):
            membership.admit(world.run, store, request, NOW_UNIX_MS)
        assert store.peer(who.public_key) is None
        return
    signed = membership.admit(world.run, store, request, NOW_UNIX_MS)
    admission = Admission.FromString(verify(signed, "admission", world.run_id, PUBLICATION.public_key))
    assert admission.peer_key == who.public_key
    assert admission.expires_unix_s == NOW_UNIX_MS // 1000 + 7 * 24 * 3600
    assert store.peer(who.public_key) is not None


def _flipped(signed: Signed) -> Signed:
    changed = bytes([signed.payload[0] ^ 1]) + signed.payload[1:]
    return Signed(signer=signed.signer, payload=changed, signature=signed.signature)


def _as_another(signed: Signed) -> Signed:
    return Signed(signer=ANNA.public_key, payload=signed.payload, signature=signed.signature)


BAD_ADMISSIONS: dict[str, tuple[Callable[[World], Signed], type[SwarmError]]] = {
    "flipped byte": (lambda world: _flipped(world.admit_request(STRANGER)), SignatureError),
    "signed by another": (lambda world: _as_another(world.admit_request(STRANGER)), SignatureError),
    "nothing signed": (lambda world: Signed(), SignatureError),
    "signed as a report": (
        lambda world: STRANGER.sign("report", world.run_id, world.admit_request(STRANGER).payload),
        SignatureError,
    ),
    "for another run": (
        lambda world: STRANGER.sign("admit", b"r" * 20, world.admit_request(STRANGER).payload),
        SignatureError,
    ),
    "not a message": (lambda world: STRANGER.sign("admit", world.run_id, b"\xff\xff"), ProtocolError),
    "too old": (lambda world: world.admit_request(STRANGER, sent_unix_ms=NOW_UNIX_MS - 300_001), ProtocolError),
    "from the future": (lambda world: world.admit_request(STRANGER, sent_unix_ms=NOW_UNIX_MS + 300_001), ProtocolError),
    "time of 2^64 - 1": (lambda world: world.admit_request(STRANGER, sent_unix_ms=2**64 - 1), ProtocolError),
    "agent too long": (lambda world: world.admit_request(STRANGER, agent="a" * 65), ProtocolError),
    "agent moves the cursor": (lambda world: world.admit_request(STRANGER, agent="\x1b[2J"), ProtocolError),
    "seed address of no seed peer": (
        lambda world: world.admit_request(STRANGER, seed_addresses=[address_of(STRANGER)]),
        NotAdmitted,
    ),
    "seed address of another": (
        lambda world: world.admit_request(SEED, seed_addresses=[address_of(ANNA)]),
        ProtocolError,
    ),
    "seed address too long": (
        lambda world: world.admit_request(SEED, seed_addresses=["/" + "a" * 256 + address_of(SEED)]),
        ProtocolError,
    ),
    "too many seed addresses": (
        lambda world: world.admit_request(SEED, seed_addresses=[address_of(SEED)] * 9),
        ProtocolError,
    ),
    "seed address with a line feed": (
        lambda world: world.admit_request(SEED, seed_addresses=["/\n" + address_of(SEED)]),
        ProtocolError,
    ),
}


@pytest.mark.parametrize("case", BAD_ADMISSIONS)
def test_a_bad_request_for_admission_is_refused_and_nothing_of_it_kept(store: Store, case: str) -> None:
    make, expected = BAD_ADMISSIONS[case]
    world = World()
    with pytest.raises(expected):
        membership.admit(world.run, store, make(world), NOW_UNIX_MS)
    assert store.newest_peers(10) == []
    assert store.seed_addresses(16) == []


def test_a_listed_peer_is_a_further_seed_peer_whatever_the_rule_of_admission(store: Store) -> None:
    """It is admitted and may tell where it is; another's addresses it may not tell."""
    world, own = World(admission=WITH_TOKEN), address_of(STRANGER)
    request = world.admit_request(STRANGER, seed_addresses=[own])
    membership.admit(world.run, store, request, NOW_UNIX_MS, seeds=(STRANGER.public_key,))
    assert store.seed_addresses(16) == [own]
    report = world.report_request(STRANGER, seed_addresses=[address_of(SEED)])
    with pytest.raises(ProtocolError):
        membership.report(world.run, store, report, NOW_UNIX_MS, seeds=(STRANGER.public_key,))


def test_a_seed_peers_addresses_are_told_to_others(store: Store) -> None:
    world = World()
    membership.admit(world.run, store, world.admit_request(SEED, seed_addresses=[address_of(SEED, 1)]), NOW_UNIX_MS)
    assert store.seed_addresses(16) == [address_of(SEED, 1)]
    request = world.report_request(SEED, seed_addresses=[address_of(SEED, 2)])
    membership.report(world.run, store, request, NOW_UNIX_MS)
    assert store.seed_addresses(16) == [address_of(SEED, 2)]


def _admitted(store: Store) -> tuple[World, Run]:
    world = World()
    run = world.run
    membership.admit(run, store, world.admit_request(ANNA), NOW_UNIX_MS)
    return world, run


def test_an_admitted_peers_report_is_kept(store: Store) -> None:
    world, run = _admitted(store)
    membership.report(run, store, world.report_request(ANNA, leaving=True, validation_loss=2.5), NOW_UNIX_MS + 9)
    peer = store.peer(ANNA.public_key)
    assert peer is not None
    assert (peer.round, peer.tokens_per_s, peer.device, peer.leaving) == (1, 10.5, "cpu", True)
    assert peer.last_seen_unix_ms == NOW_UNIX_MS + 9
    assert store.losses(1, 1) == {1: Losses(train=3.0, validation=2.5)}


def test_a_report_without_losses_adds_none(store: Store) -> None:
    world, run = _admitted(store)
    membership.report(run, store, world.report_request(ANNA, train_loss=math.nan), NOW_UNIX_MS)
    assert store.losses(0, 10) == {}


def test_a_report_that_arrives_twice_counts_once(store: Store) -> None:
    """A retry after a lost answer, or an older report overtaken by a newer one, changes nothing."""
    world, run = _admitted(store)
    request = world.report_request(ANNA, train_loss=3.0)
    membership.report(run, store, request, NOW_UNIX_MS)
    membership.report(run, store, request, NOW_UNIX_MS)
    membership.report(run, store, world.report_request(ANNA, train_loss=9.0, sent_unix_ms=NOW_UNIX_MS - 1), NOW_UNIX_MS)
    assert store.losses(1, 1)[1].train == 3.0


BAD_VALUES: dict[str, dict[str, Any]] = {
    "infinite loss": {"train_loss": math.inf},
    "negative loss": {"validation_loss": -1.0},
    "loss beyond belief": {"train_loss": 1e7},
    "speed is NaN": {"tokens_per_s": math.nan},
    "negative speed": {"tokens_per_s": -1.0},
    "infinite speed": {"tokens_per_s": math.inf},
    "what it could do is NaN": {"service_tokens_per_s": math.nan},
    "what it could do is infinite": {"service_tokens_per_s": math.inf},
    "a shard's speed is NaN": {"num_shards": 1, "shard_tokens_per_s": [math.nan]},
    "a shard's speed is negative": {"num_shards": 1, "shard_tokens_per_s": [-1.0]},
    "more speeds than shards": {"num_shards": 1, "shard_tokens_per_s": [1.0, 1.0]},
    "speeds without a span": {"shard_tokens_per_s": [1.0]},
    "a span that begins after the last shard": {"first_shard": 1},
    "a span that goes beyond the last shard": {"num_shards": 2},
    "a span of 2^32 - 1 shards": {"num_shards": 2**32 - 1},
    "round of 2^64 - 1": {"round": 2**64 - 1},
    "bytes of 2^64 - 1": {"bytes_sent": 2**64 - 1},
    "short state digest": {"state_digest": b"s" * 31},
    "long log digest": {"log_digest": b"s" * 33},
    "device too long": {"device": "d" * 65},
    "device moves the cursor": {"device": "cpu\r"},
    "too old": {"sent_unix_ms": NOW_UNIX_MS - 300_001},
    "from the future": {"sent_unix_ms": NOW_UNIX_MS + 300_001},
    "seed address of no seed peer": {"seed_addresses": [address_of(STRANGER)]},
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_report_with_an_unbelievable_value_is_refused(store: Store, case: str) -> None:
    world = World(voters=(SEED,))
    run = world.run
    membership.admit(run, store, world.admit_request(STRANGER), NOW_UNIX_MS)
    before = store.peer(STRANGER.public_key)
    with pytest.raises((ProtocolError, NotAdmitted)):
        membership.report(run, store, world.report_request(STRANGER, **BAD_VALUES[case]), NOW_UNIX_MS)
    assert store.peer(STRANGER.public_key) == before
    assert store.losses(0, 100) == {}


def test_only_admitted_peers_report_and_only_until_their_admission_ends(store: Store) -> None:
    world, run = _admitted(store)
    with pytest.raises(ConfigError, match="only admitted"):
        membership.report(run, store, world.report_request(BORIS), NOW_UNIX_MS)
    later = NOW_UNIX_MS + 7 * 24 * 3600 * 1000
    with pytest.raises(ConfigError, match="only admitted"):
        membership.report(run, store, world.report_request(ANNA, sent_unix_ms=later), later)
    membership.admit(run, store, world.admit_request(ANNA, sent_unix_ms=later), later)
    membership.report(run, store, world.report_request(ANNA, sent_unix_ms=later), later)


def test_a_report_signed_by_another_key_is_refused(store: Store) -> None:
    world, run = _admitted(store)
    forged = STRANGER.sign("report", world.run_id, report_payload().SerializeToString())
    with pytest.raises(SignatureError):
        membership.report(run, store, _as_another(forged), NOW_UNIX_MS)


def test_an_incident_that_a_peer_tells_is_logged_and_text_that_is_none_is_refused(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The organizer reads it; it cannot move a terminal's cursor."""
    world = World()
    membership.admit(world.run, store, world.admit_request(ANNA), NOW_UNIX_MS)
    membership.report(world.run, store, world.report_request(ANNA, incident="two branches"), NOW_UNIX_MS)
    assert f"incident told by {ANNA.peer_id}: two branches" in caplog.text
    for text in ("\x1b[2J", "i" * 513):
        with pytest.raises(ProtocolError, match="incident"):
            membership.report(world.run, store, world.report_request(ANNA, incident=text), NOW_UNIX_MS)
