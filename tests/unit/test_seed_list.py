"""Further seed peers: the organizer's list, and what is told of those that are on it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coordinator import seed_list
from coordinator.seed_list import FILE_NAME, MAX_SEED_PEERS, change, read
from coordinator.service import Service
from coordinator.store import Store
from swarm.errors import ConfigError, NotAdmitted
from swarm.identity import Identity
from swarm.proto import coordinator_pb2 as pb
from tests.coordinator_world import NOW_UNIX_MS, STRANGER, World, address_of

ANNA, BORIS = Identity(b"a" * 32), Identity(b"b" * 32)


def test_the_list_is_what_was_added_and_not_removed(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    assert read(None) == read(path) == ()
    assert change(path, [], []) == () and not path.exists()
    both = {ANNA.public_key, BORIS.public_key}
    assert set(change(path, [ANNA.peer_id, BORIS.peer_id, ANNA.peer_id], [])) == both == set(read(path))
    assert change(path, [], [ANNA.peer_id]) == (BORIS.public_key,) == read(path)


@pytest.mark.parametrize(
    ("add", "remove"),
    [
        (["not a peer id"], []),
        ([], [ANNA.peer_id]),
        ([ANNA.peer_id], [ANNA.peer_id]),
        ([Identity(i.to_bytes(32, "big")).peer_id for i in range(MAX_SEED_PEERS + 1)], []),
    ],
    ids=["no peer id", "was never there", "both at once", "too many"],
)
def test_a_senseless_change_is_refused_and_nothing_written(tmp_path: Path, add: list[str], remove: list[str]) -> None:
    with pytest.raises(ConfigError):
        change(tmp_path / FILE_NAME, add, remove)
    assert not (tmp_path / FILE_NAME).exists()


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=FILE_NAME):
        read(tmp_path / FILE_NAME)


def test_a_running_coordinator_follows_the_list(tmp_path: Path) -> None:
    """Who is added tells where it is, and everybody hears of it; who is removed is told of no more."""
    world, path = World(), tmp_path / seed_list.FILE_NAME
    store = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    service = Service(world.run, store, lambda: NOW_UNIX_MS / 1000, state_dir=tmp_path)
    request = pb.AdmitRequest(request=world.admit_request(STRANGER, seed_addresses=[address_of(STRANGER)]))

    async def scenario() -> None:
        with pytest.raises(NotAdmitted) as refused:
            await service.admit(request)
        assert STRANGER.peer_id in json.dumps(refused.value.advice)
        change(path, [STRANGER.peer_id], [])
        await service.admit(request)
        report = pb.ReportRequest(report=world.report_request(STRANGER, seed_addresses=[address_of(STRANGER)]))
        assert list((await service.report(report)).seed_addresses) == [address_of(STRANGER)]
        assert list((await service.get_run(pb.GetRunRequest())).seed_addresses) == [address_of(STRANGER)]
        change(path, [], [STRANGER.peer_id])
        assert not (await service.get_run(pb.GetRunRequest())).seed_addresses

    try:
        asyncio.run(scenario())
    finally:
        service.close()
