"""The ledger and the view of progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest

from coordinator import contributions, membership
from coordinator.contributions import Ledger
from coordinator.store import Store
from swarm.errors import ConfigError, ProtocolError, SignatureError, SwarmError, VerificationError
from swarm.proto.round_pb2 import Commit
from tests.coordinator_world import ANNA, BORIS, NOW_UNIX_MS, SEED, STRANGER, World, state_digest_after


def test_consecutive_commits_are_recorded_and_the_next_one_is_wanted(store: Store) -> None:
    world = World()
    ledger = Ledger(world.run, store)
    assert ledger.record([], NOW_UNIX_MS) == 1
    assert ledger.record(world.commits(2), NOW_UNIX_MS) == 3
    assert ledger.record(world.commits(1), NOW_UNIX_MS) == 4
    assert ledger.head == world.heads[3]


def test_recording_again_changes_nothing(store: Store) -> None:
    world = World()
    ledger = Ledger(world.run, store)
    commits = world.commits(3)
    ledger.record(commits[:2], NOW_UNIX_MS)
    assert ledger.record(commits, NOW_UNIX_MS) == 4
    assert ledger.record(commits, NOW_UNIX_MS) == 4
    assert {peer.key: peer.tokens for peer in store.newest_peers(9)} == {ANNA.public_key: 300, BORIS.public_key: 600}


def test_the_head_is_rebuilt_from_the_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "_REPLAY_COMMITS", 2)
    world = World()
    Ledger(world.run, store).record(world.commits(5), NOW_UNIX_MS)
    again = Ledger(world.run, store)
    assert again.head == world.heads[5]
    assert again.record(world.commits(1), NOW_UNIX_MS) == 7


def test_a_damaged_database_is_noticed_at_the_start(store: Store) -> None:
    world = World()
    Ledger(world.run, store).record(world.commits(3), NOW_UNIX_MS)
    with store._transaction() as connection:
        connection.exec_driver_sql("UPDATE commits SET [commit] = (SELECT [commit] FROM commits WHERE round = 1)")
    with pytest.raises(ConfigError, match="damaged at round 2"):
        Ledger(world.run, store)


BAD_COMMITS: dict[str, tuple[Callable[[World], list[Commit]], type[SwarmError]]] = {
    "too few votes": (lambda world: [world.commit(signers=[SEED])], VerificationError),
    "no votes": (lambda world: [world.commit(signers=[])], VerificationError),
    "one voter twice": (lambda world: [world.commit(signers=[SEED, SEED])], VerificationError),
    "votes of strangers": (lambda world: [world.commit(signers=[STRANGER] * 3)], SignatureError),
    "a gap": (lambda world: world.commits(3)[1:], ProtocolError),
    "one commit twice": (lambda world: world.commits(1) * 2, ProtocolError),
    "not a record": (lambda world: [Commit(record=b"\xff")], ProtocolError),
    "empty": (lambda world: [Commit()], VerificationError),
    "a record of many megabytes": (lambda world: [Commit(record=b"\0" * (513 << 10))], ProtocolError),
    "too many holders": (lambda world: [_with_holders(world.commit(), 65)], ProtocolError),
    "too many at once": (lambda world: world.commits(1025), ProtocolError),
    "tokens beyond 2^63": (lambda world: [world.commit(tokens=2**62)], ProtocolError),
    "a good one and a bad one": (lambda world: [world.commit(), world.commit(signers=[])], VerificationError),
}


def _with_holders(commit: Commit, count: int) -> Commit:
    commit.holders.extend([b"h" * 32] * count)
    return commit


@pytest.mark.parametrize("case", BAD_COMMITS)
def test_commits_that_do_not_prove_themselves_are_refused_and_nothing_recorded(store: Store, case: str) -> None:
    make, expected = BAD_COMMITS[case]
    world = World()
    ledger = Ledger(world.run, store)
    with pytest.raises(expected):
        ledger.record(make(world), NOW_UNIX_MS)
    assert ledger.next_round_wanted == 1
    assert store.commits(0, 0, 10) == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_branch_of_fewer_tokens_is_refused_as_an_incident(
    store: Store, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    world = World()
    ledger = Ledger(world.run, store)
    ledger.record(world.commits(3), NOW_UNIX_MS)
    conflicting = world.commit(tokens=99, head=world.heads[number - 1])
    with caplog.at_level(logging.ERROR), pytest.raises(VerificationError, match="split"):
        ledger.record([conflicting], NOW_UNIX_MS)
    assert f"round {number} was decided twice" in caplog.text
    assert ledger.head == world.heads[3]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_branch_of_more_tokens_takes_the_place_of_the_recorded_one(
    store: Store, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """With its contributions; what rounds given up were credited is taken back. It is an incident all the same."""
    world, other = World(), World()
    ledger = Ledger(world.run, store)
    common = world.commits(number - 1)
    ledger.record([*common, *world.commits(4 - number)], NOW_UNIX_MS)
    other.heads = world.heads[:number]
    branch = [other.commit(tokens=1000), other.commit()]
    with caplog.at_level(logging.ERROR):
        assert ledger.record([*common, *branch], NOW_UNIX_MS) == number + 2
    assert f"incident: round {number} was decided twice" in caplog.text
    assert ledger.head == other.heads[-1] == Ledger(world.run, store).head
    tokens = 100 * (number - 1) + 1000 + 100
    assert {peer.key: peer.tokens for peer in store.newest_peers(9)} == {
        ANNA.public_key: tokens,
        BORIS.public_key: 2 * tokens,
    }
    assert ledger.record([other.commit()], NOW_UNIX_MS) == number + 3


def test_a_branch_that_does_not_prove_itself_to_its_end_changes_nothing(store: Store) -> None:
    world, other = World(), World()
    ledger = Ledger(world.run, store)
    ledger.record(world.commits(3), NOW_UNIX_MS)
    with pytest.raises(VerificationError, match="majority"):
        ledger.record([other.commit(tokens=1000), other.commit(signers=[SEED])], NOW_UNIX_MS)
    assert ledger.head == world.heads[3] == Ledger(world.run, store).head


def test_a_forged_second_result_is_refused_without_an_incident(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    ledger = Ledger(world.run, store)
    ledger.record(world.commits(3), NOW_UNIX_MS)
    forged = world.commit(tokens=999, signers=[SEED], head=world.heads[1])
    with pytest.raises(VerificationError, match="majority"):
        ledger.record([forged], NOW_UNIX_MS)
    assert caplog.text == ""


def test_progress_tells_rounds_losses_shares_and_peers(store: Store) -> None:
    world = World()
    run = world.run
    ledger = Ledger(run, store)
    ledger.record(world.commits(2), NOW_UNIX_MS)
    for who, loss in [(ANNA, 2.0), (BORIS, 4.0)]:
        membership.admit(run, store, world.admit_request(who), NOW_UNIX_MS)
        membership.report(run, store, world.report_request(who, train_loss=loss), NOW_UNIX_MS)
    reply = contributions.progress(run, [ledger.head], store, NOW_UNIX_MS)
    assert (reply.name, reply.round, reply.total_tokens, reply.target_tokens) == ("test-run", 2, 600, 100_000)
    first, second = reply.rounds
    assert (first.round, first.total_tokens, first.train_loss, first.absent_parts) == (1, 300, 3.0, 1)
    assert math.isnan(first.validation_loss) and math.isnan(second.train_loss)
    assert first.state_digest == state_digest_after(0)
    assert {share.peer_key: share.weight_tokens for share in second.shares} == {
        ANNA.public_key: 100,
        BORIS.public_key: 200,
    }
    assert {peer.peer_key: (peer.tokens, peer.device) for peer in reply.peers} == {
        ANNA.public_key: (200, "cpu"),
        BORIS.public_key: (400, "cpu"),
    }


def test_progress_of_a_run_that_has_not_begun_is_empty(store: Store) -> None:
    world = World()
    reply = contributions.progress(world.run, [Ledger(world.run, store).head], store, NOW_UNIX_MS)
    assert (reply.round, list(reply.rounds), list(reply.peers)) == (0, [], [])


def test_progress_shows_the_newest_rounds_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "MAX_ROUNDS_SHOWN", 2)
    world = World()
    ledger = Ledger(world.run, store)
    ledger.record(world.commits(5), NOW_UNIX_MS)
    assert [row.round for row in contributions.progress(world.run, [ledger.head], store, NOW_UNIX_MS).rounds] == [4, 5]
