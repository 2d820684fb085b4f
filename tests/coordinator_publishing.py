"""What replicas and the seed peer of a `tests.coordinator_world.World` do to have a checkpoint published."""

from __future__ import annotations

from typing import Any

from coordinator import publication, witnesses
from coordinator.store import Store
from coordinator.witnesses import Hearing
from swarm.identity import Identity
from swarm.proto.common_pb2 import Signed
from swarm.publication import Publication
from tests.coordinator_world import ANNA, BORIS, NOW_UNIX_MS, SEED, World


def hearing_at(now_unix_ms: int = NOW_UNIX_MS) -> Hearing:
    return Hearing(now_unix_ms=now_unix_ms, silent_before_unix_ms=now_unix_ms - 1000)


def attest(world: World, store: Store, who: Identity, number: int, **changes: Any) -> None:
    """Admitted before."""
    store.admit(who.public_key, NOW_UNIX_MS + 10**9, NOW_UNIX_MS, 100)
    witnesses.attest(world.run, store, world.attest_request(who, number, **changes), NOW_UNIX_MS)


def attest_all(world: World, store: Store, *numbers: int) -> None:
    """All three replicas."""
    for number in numbers:
        for replica in (SEED, ANNA, BORIS):
            attest(world, store, replica, number)


def request(world: World, store: Store, signed: Signed, now_unix_ms: int = NOW_UNIX_MS) -> Publication:
    return publication.publish(world.run, store, signed, hearing_at(now_unix_ms))


def publish(world: World, store: Store, payload: bytes, now_unix_ms: int = NOW_UNIX_MS) -> Publication:
    """By the seed peer."""
    return request(world, store, SEED.sign("publish", world.run_id, payload), now_unix_ms)
