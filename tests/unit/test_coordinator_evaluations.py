"""Evaluations that are told to a run: who may, how many are kept, and which of them the next card carries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator import evaluations, publication, records
from coordinator.contributions import Ledger
from coordinator.published import Room, Rooms
from coordinator.store import Store
from peer.checkpoints.card import model_card, read_card
from swarm import evaluation, run_record
from swarm.digest import sha256
from swarm.errors import NotAdmitted, NotFound, ProtocolError, ResourceError, SignatureError, VerificationError
from swarm.evaluation import Result
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.proto.coordinator_pb2 import TellEvaluationRequest
from tests.coordinator_publishing import attest_all, publish
from tests.coordinator_world import ANNA, BORIS, NOW_UNIX_MS, ORGANIZER, SEED, STRANGER, TOKEN, World, identity
from tests.unit.test_card import facts

NOW = NOW_UNIX_MS


@pytest.fixture
def world(store: Store) -> World:
    return published_world(store)


def published_world(store: Store, admission: Any = None) -> World:
    """Three rounds are recorded, of which the second is published; Anna and Boris contributed."""
    made = World(admission=admission or {})
    Ledger(made.run, store).record(made.commits(3), NOW)
    attest_all(made, store, 2)
    publish(made, store, made.manifest(2))
    return made


def tell(world: World, store: Store, who: Identity, token: str = "", **changes: Any) -> Signed:
    signed = world.evaluation_by(who, 2, **changes)
    evaluations.tell(world.run, store, TellEvaluationRequest(evaluation=signed, token=token), NOW)
    return signed


def test_what_was_told_is_given_back_as_it_was_signed(world: World, store: Store) -> None:
    signed = [tell(world, store, who, seed=number) for number, who in enumerate((ANNA, BORIS, ORGANIZER, ANNA))]
    assert tell(world, store, ANNA, seed=0) == signed[0]  # told again: kept once
    found = list(evaluations.of_round(store, 2).evaluations)
    assert sorted(item.SerializeToString() for item in found) == sorted(item.SerializeToString() for item in signed)
    assert evaluations.of_round(store, 3).evaluations == evaluations.of_round(store, 2**64 - 1).evaluations == []
    (listed,) = publication.list_checkpoints(store).checkpoints
    assert listed.num_evaluations == 4


def test_an_evaluation_that_is_not_of_a_published_checkpoint_is_refused_by_name(world: World, store: Store) -> None:
    cases: dict[str, tuple[dict[str, Any], type[Exception]]] = {
        "a round without a checkpoint": ({"round": 3}, NotFound),
        "a round beyond the database": ({"round": 2**63}, NotFound),
        "another manifest": ({"manifest_digest": "a" * 64}, VerificationError),
        "another run": ({"run_id": "a" * 40}, VerificationError),
        "too large": ({"asked": tuple("x" * 128 for _ in range(1000))}, ProtocolError),
    }
    for changes, error in cases.values():
        with pytest.raises(error):
            tell(world, store, ANNA, **changes)
    forged = world.evaluation_by(ANNA, 2)
    forged.signer = BORIS.public_key
    with pytest.raises(SignatureError):
        evaluations.tell(world.run, store, TellEvaluationRequest(evaluation=forged), NOW)
    assert store.published.evaluated_rounds(9) == {}


def test_only_whom_the_run_admits_and_organizers_may_tell(store: Store) -> None:
    world = published_world(store, {"mode": "token", "token_sha256": sha256(TOKEN.encode()).hex()})
    for token in ("", "wrong", "x" * 129):
        with pytest.raises((NotAdmitted, ProtocolError)):
            tell(world, store, STRANGER, token)
    tell(world, store, STRANGER, TOKEN)
    tell(world, store, ORGANIZER)
    tell(world, store, SEED)
    assert store.published.evaluated_rounds(9) == {2: 3}


def test_invented_keys_crowd_no_contributor_out(world: World, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = Rooms(total=Room(4, 9999), of_strangers=Room(2, 9999), of_signer=Room(2, 9999))
    monkeypatch.setattr(evaluations, "ROOMS", rooms)
    tell(world, store, identity(10))
    tell(world, store, identity(11))
    with pytest.raises(ResourceError, match="as many evaluations as are kept"):
        tell(world, store, identity(12))
    tell(world, store, ANNA, seed=1)
    tell(world, store, ANNA, seed=2)
    with pytest.raises(ResourceError, match="you told as many"):
        tell(world, store, ANNA, seed=3)
    with pytest.raises(ResourceError, match="as many evaluations as are kept"):
        tell(world, store, BORIS)


def test_what_is_kept_of_a_checkpoint_has_a_bound_in_bytes(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one key, of keys without credit, and in all: few large evaluations fill it as many small ones do."""
    large = {"asked": tuple("x" * 100 for _ in range(50))}
    size_bytes = len(world.evaluation_by(ANNA, 2, seed=9, **large).SerializeToString())
    fits = [Room(99, size_bytes * number + size_bytes // 2) for number in (1, 2, 4)]
    monkeypatch.setattr(evaluations, "ROOMS", Rooms(of_signer=fits[0], of_strangers=fits[1], total=fits[2]))
    for who, refused in ((identity(10), False), (identity(11), False), (identity(12), True), (ANNA, False)):
        if refused:
            with pytest.raises(ResourceError, match="as many evaluations as are kept"):
                tell(world, store, who, seed=9, **large)
        else:
            tell(world, store, who, seed=9, **large)
    with pytest.raises(ResourceError, match="you told as many"):
        tell(world, store, ANNA, seed=8, **large)
    assert tell(world, store, ANNA, seed=9, **large)  # told again
    tell(world, store, BORIS, seed=9, **large)
    with pytest.raises(ResourceError, match="as many evaluations as are kept"):
        tell(world, store, ORGANIZER, seed=9, **large)


def test_of_more_than_may_be_kept_as_much_is_read_as_fits_and_those_with_credit_first(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a database from before there was a bound."""
    strangers = [tell(world, store, identity(number), seed=number) for number in range(10, 14)]
    credited = tell(world, store, ANNA, seed=1)
    size_bytes = max(len(item.SerializeToString()) for item in [*strangers, credited])
    for room in (Room(99, 3 * size_bytes), Room(3, 99 * size_bytes)):
        monkeypatch.setattr(evaluations, "ROOMS", Rooms(total=room, of_strangers=room, of_signer=room))
        found = list(evaluations.of_round(store, 2).evaluations)
        assert len(found) == 3 and credited in found
        assert sorted(found, key=lambda item: sha256(item.payload)) == found, "told at once: by their digests"


def test_the_next_card_carries_whole_evaluations_of_those_who_are_known(world: World, store: Store) -> None:
    """Under the round that they are of; strangers' and trials are left to the leaderboard."""
    tell(world, store, ANNA)
    tell(world, store, STRANGER, results=(Result(task="stranger", metric="acc", value=1.0, num_samples=1),))
    trial = (Result(task="trial", metric="acc", value=0.875, num_samples=1),)
    tell(world, store, ANNA, results=trial, limit=1)
    record = run_record.parse(records.get(world.run, store, 3))
    assert run_record.parse(records.get(world.run, store, 2)).evaluations == ()  # of itself nothing is known yet
    told = replace(facts(record=record), run_id=world.run_id, round=3)
    card = model_card(told)
    results = read_card(card)["model-index"][0]["results"]  # type: ignore[index]
    assert [item["dataset"]["name"] for item in results] == ["tiny, measured on round 2"]
    assert [item["metrics"][0]["value"] for item in results] == [0.25]
    assert "Of the earlier checkpoint of round 2" in card and ANNA.peer_id in card
    assert "stranger" not in card and "0.875" not in card


def test_a_record_with_another_peers_name_under_an_evaluation_is_refused(world: World, store: Store) -> None:
    signed = tell(world, store, ANNA)
    signed.signer = BORIS.public_key
    for text in (evaluation.encode(signed), "no base64!", "aGVsbG8="):
        record = run_record.parse(records.get(world.run, store, 3)).model_copy(update={"evaluations": (text,)})
        with pytest.raises(VerificationError):
            model_card(replace(facts(record=record), run_id=world.run_id))


def test_a_record_carries_a_bounded_number_of_evaluations(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        tell(world, store, ANNA, seed=seed)
    monkeypatch.setattr(evaluations, "MAX_IN_RECORD", 2)
    assert len(evaluations.for_record(world.run, store, 3)) == 2
    monkeypatch.setattr(evaluations, "MAX_RECORD_BYTES", 100)
    assert evaluations.for_record(world.run, store, 3) == ()


def test_nobody_crowds_another_contributor_off_the_card(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by telling often, nor by telling much."""
    often = [tell(world, store, ANNA, seed=seed) for seed in range(5)]
    late = tell(world, store, BORIS)
    size_bytes = len(evaluation.encode(late))
    monkeypatch.setattr(evaluations, "MAX_OF_SIGNER", 3)
    carried = evaluations.for_record(world.run, store, 3)
    assert evaluation.encode(late) in carried[:2] and len(carried) == 4
    monkeypatch.setattr(evaluations, "MAX_IN_RECORD", 2)
    assert evaluation.encode(late) in evaluations.for_record(world.run, store, 3)
    monkeypatch.setattr(evaluations, "MAX_IN_RECORD", 32)
    monkeypatch.setattr(evaluations, "MAX_RECORD_BYTES", size_bytes * 5 // 2)
    carried = evaluations.for_record(world.run, store, 3)
    assert evaluation.encode(late) in carried and len({*carried} & {*map(evaluation.encode, often)}) == 1


def test_an_evaluation_that_does_not_fit_keeps_no_later_one_off_the_card(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = tell(world, store, ANNA, asked=tuple("x" * 100 for _ in range(50)))
    small = tell(world, store, BORIS)
    monkeypatch.setattr(evaluations, "MAX_RECORD_BYTES", len(evaluation.encode(large)))
    assert evaluations.for_record(world.run, store, 3) == (evaluation.encode(small),)
