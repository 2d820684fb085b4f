"""Publication: which manifests get the publication key's signature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import publication
from coordinator.contributions import Ledger
from coordinator.store import Store
from swarm import manifest
from swarm.digest import sha256
from swarm.errors import NotFound, SignatureError, VerificationError
from swarm.proto.common_pb2 import Signed
from tests.coordinator_world import NOW_UNIX_MS, PUBLICATION, SEED, STRANGER, World


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    yield opened
    opened.close()


@pytest.fixture
def world(store: Store) -> World:
    made = World()
    Ledger(made.run, store).record(made.commits(3), NOW_UNIX_MS)
    return made


def _publish(world: World, store: Store, payload: bytes) -> Signed:
    return publication.publish(world.run, store, SEED.sign("publish", world.run_id, payload), NOW_UNIX_MS)


@pytest.mark.parametrize("number", [2, 3], ids=["the next round is recorded", "the last recorded round"])
def test_an_honest_manifest_is_signed_by_the_publication_key(world: World, store: Store, number: int) -> None:
    payload = world.manifest(number)
    signed = _publish(world, store, payload)
    assert signed.payload == payload
    assert manifest.parse_signed(signed, world.run_id, PUBLICATION.public_key).round == number


def test_the_same_manifest_gets_the_same_answer(world: World, store: Store) -> None:
    first = _publish(world, store, world.manifest(2))
    assert _publish(world, store, world.manifest(2)) == first
    assert len(store.newest_checkpoints(10)) == 1


def test_a_round_is_published_once(world: World, store: Store) -> None:
    _publish(world, store, world.manifest(2))
    other_file = [{"name": "config.json", "size_bytes": 2, "sha256": sha256(b"[]").hex(), "chunks": ["1" * 64]}]
    with pytest.raises(VerificationError, match="another manifest"):
        _publish(world, store, world.manifest(2, files=other_file))


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
        _publish(world, store, world.manifest(2, **changes))
    assert store.newest_checkpoints(10) == []


def test_bytes_that_are_no_manifest_are_refused(world: World, store: Store) -> None:
    with pytest.raises(VerificationError, match="not JSON"):
        _publish(world, store, b"\xff")


def test_only_a_seed_peer_publishes(world: World, store: Store) -> None:
    payload = world.manifest(2)
    with pytest.raises(SignatureError, match="only a seed peer"):
        publication.publish(world.run, store, STRANGER.sign("publish", world.run_id, payload), NOW_UNIX_MS)
    forged = STRANGER.sign("publish", world.run_id, payload)
    forged.signer = SEED.public_key
    with pytest.raises(SignatureError, match="does not verify"):
        publication.publish(world.run, store, forged, NOW_UNIX_MS)


def test_checkpoints_are_listed_and_found(world: World, store: Store) -> None:
    second, third = (_publish(world, store, world.manifest(number)) for number in (2, 3))
    infos = publication.list_checkpoints(store).checkpoints
    assert [(info.round, info.total_tokens, info.size_bytes) for info in infos] == [(3, 900, 2), (2, 600, 2)]
    assert infos[0].manifest_digest == sha256(third.payload)
    assert math.isnan(infos[0].validation_loss)
    assert publication.get_checkpoint(store, 0).manifest == third
    assert publication.get_checkpoint(store, 2).manifest == second


@pytest.mark.parametrize("number", [0, 1, 2**64 - 1])
def test_a_checkpoint_that_is_not_there_is_not_found(store: Store, number: int) -> None:
    with pytest.raises(NotFound):
        publication.get_checkpoint(store, number)
