"""The record on a card: what the coordinator knows of who made a checkpoint, once and for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import membership, records
from coordinator.contributions import Ledger
from coordinator.store import Store
from swarm import energy, run_record
from swarm.digest import sha256
from swarm.errors import NotFound, ProtocolError, VerificationError
from swarm.run_record import RECORD_FILE, Contributor
from tests.coordinator_publishing import publish
from tests.coordinator_world import ANNA, BORIS, NOW_UNIX_MS, World

NOW = NOW_UNIX_MS


@pytest.fixture
def world(store: Store) -> World:
    """Two recorded rounds; Anna wants to be named, Boris does not."""
    made = World()
    membership.admit(made.run, store, made.admit_request(ANNA, name="Anna", agent="swarmtrain/1"), NOW)
    membership.admit(made.run, store, made.admit_request(BORIS, agent="swarmtrain/2"), NOW)
    later = NOW + 60_000
    report = made.report_request(ANNA, device="CPU, 2 threads", tokens_per_s=10.0, sent_unix_ms=later)
    membership.report(made.run, store, report, later)
    Ledger(made.run, store).record(made.commits(2), NOW)
    return made


def test_a_record_names_who_asked_for_it_and_estimates_what_can_be(world: World, store: Store) -> None:
    found = run_record.parse(records.get(world.run, store, 2))
    assert (found.round, found.num_peers) == (2, 2)
    assert found.contributors == (Contributor(name="Anna", tokens=200),)
    assert found.software == ("swarmtrain/1", "swarmtrain/2")
    (use,) = found.energy.devices
    assert (use.device, use.training_s, use.watts) == ("CPU, 2 threads", 20.0, 8.0)
    assert found.energy.unknown_tokens == 400  # Boris reported nothing


def test_a_rate_that_is_too_low_makes_nobody_train_for_longer_than_the_run_knows_it(world: World, store: Store) -> None:
    """At 1 token/s Anna's 200 tokens would have taken 200 s; she has been here for 90."""
    later = NOW + 90_000
    slow = world.report_request(ANNA, device="CPU, 2 threads", tokens_per_s=1.0, sent_unix_ms=later)
    membership.report(world.run, store, slow, later)
    (use,) = records.make(store, 2, 1).energy.devices
    assert use.training_s == 90.0


def test_reports_that_fit_into_no_estimate_do_not_stop_publication(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = world.report_request(BORIS, device="CPU, 2 threads", tokens_per_s=1e-300)
    membership.report(world.run, store, tiny, NOW)
    assert records.make(store, 2, 1).energy.unknown_tokens == 400
    monkeypatch.setattr(energy, "watts_of", lambda device: float("inf"))
    found = run_record.parse(records.get(world.run, store, 2))
    assert (found.energy.devices, found.energy.kwh, found.energy.unknown_tokens) == ((), 0.0, 600)


def test_a_record_is_made_once_also_over_a_restart(world: World, store: Store, tmp_path: Path) -> None:
    first = records.get(world.run, store, 2)
    membership.admit(world.run, store, world.admit_request(BORIS, name="Boris"), NOW)
    again = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    assert records.get(world.run, again, 2) == first
    again.close()


def test_who_asks_to_be_named_no_more_is_not(world: World, store: Store) -> None:
    membership.admit(world.run, store, world.admit_request(ANNA, name=""), NOW)
    assert records.make(store, 2, 1).contributors == ()


def test_there_is_no_record_of_a_round_that_is_not_recorded(world: World, store: Store) -> None:
    for number in (3, 2**63):
        with pytest.raises(NotFound):
            records.get(world.run, store, number)


@pytest.mark.parametrize("name", ["a|b", "<b>", " a", "x" * 65, "a\nb", "[a](b)", "\u202ea"])
def test_a_name_that_would_break_a_card_is_refused(world: World, store: Store, name: str) -> None:
    with pytest.raises(ProtocolError):
        membership.admit(world.run, store, world.admit_request(ANNA, name=name), NOW)


def test_a_manifest_with_another_record_is_not_published(world: World, store: Store) -> None:
    right = sha256(records.get(world.run, store, 2)).hex()

    def listing(digest: str) -> bytes:
        files = [{"name": RECORD_FILE, "size_bytes": 2, "sha256": digest, "chunks": ["0" * 64]}]
        return world.manifest(2, files=files)

    with pytest.raises(VerificationError, match="not the coordinator's"):
        publish(world, store, listing("a" * 64))
    with pytest.raises(NotFound):  # only witnesses lack
        publish(world, store, listing(right))
