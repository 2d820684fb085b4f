"""Leases: a table of who was heard when, and what a voter may then do."""

from __future__ import annotations

import pytest

from peer.rounds.leases import Leases
from swarm.log import LogHead

ME, A, B, C, D = (bytes([i]) * 32 for i in range(1, 6))
LEASE_S = 30.0


def head(*voters: bytes, round_number: int = 3) -> LogHead:
    return LogHead(
        run_id=b"r" * 20,
        shard=0,
        round=round_number,
        log_digest=bytes(32),
        voters=tuple(sorted(voters)),
        total_tokens=0,
    )


FIVE = head(ME, A, B, C, D)


def present(now: float = 0.0) -> Leases:
    """One of five voters, all of whom answered just now."""
    leases = Leases(ME, FIVE, LEASE_S, now)
    leases.standing(now)
    for voter in (A, B, C, D):
        leases.answered(voter, now)
    assert leases.standing(now).present
    return leases


def pass_time(leases: Leases, until: float, *, answering: tuple[bytes, ...] = (), since: float = 0.0) -> None:
    """Second by second; those who answer are heard as well."""
    now = since
    while now < until:
        now += 1.0
        for voter in answering:
            leases.heard(voter, now)
            leases.answered(voter, now)
        leases.standing(now)


def test_a_voter_that_just_started_votes_once_everybody_was_asked() -> None:
    """It may have slept or been declared gone: a majority's leases are not enough."""
    leases = Leases(ME, FIVE, LEASE_S, 0.0)
    assert not leases.standing(0.0).present
    assert set(leases.due(0.0)) == {A, B, C, D}
    leases.answered(A, 0.0)
    leases.answered(B, 0.0)
    assert not leases.standing(0.1).present
    for voter in leases.due(1.0):
        leases.failed(voter, 1.0) if voter in (C, D) else leases.answered(voter, 1.0)
    assert leases.standing(1.1).present


def test_a_voter_that_hears_of_later_rounds_catches_up_before_it_votes_but_not_for_ever() -> None:
    """One that claims to be further on keeps it out for a lease at most."""
    leases = Leases(ME, FIVE, LEASE_S, 0.0)
    since = 0.0
    while since < LEASE_S - 1:
        since += 1.0
        for voter in leases.due(since):
            leases.answered(voter, since, further_on=voter == D)
        assert not leases.standing(since).present
    pass_time(leases, LEASE_S + 2, answering=(A, B, C), since=since)
    assert leases.standing(LEASE_S + 2).present


@pytest.mark.parametrize(
    ("case", "answering", "present_after", "gone_after"),
    [
        ("all are heard", (A, B, C, D), True, ()),
        ("two of five fall silent: the majority decides as ever", (A, B), True, ()),
        ("three fall silent: they are gone", (A,), False, (B, C, D)),
        ("all fall silent", (), False, (A, B, C, D)),
    ],
)
def test_who_is_gone_when_a_lease_has_passed(
    case: str, answering: tuple[bytes, ...], present_after: bool, gone_after: tuple[bytes, ...]
) -> None:
    leases = present()
    pass_time(leases, LEASE_S - 1, answering=answering)
    assert leases.standing(LEASE_S - 1).gone(FIVE) == (), "their leases have not run out"
    pass_time(leases, LEASE_S + 1, answering=answering, since=LEASE_S - 1)
    standing = leases.standing(LEASE_S + 1)
    assert (standing.present, standing.gone(FIVE)) == (present_after, gone_after), case
    assert standing.may_decide(FIVE, gone_after)
    assert not standing.may_decide(FIVE, ()) or present_after


def test_a_holder_is_out_before_anybody_may_go_on_without_it() -> None:
    """It counts from when it asked, the others from when the question came: whatever the way took."""
    for way_s in (0.1, 5.0, 20.0):
        holder, grantor = present(), present()
        holder.answered(A, 1.0)
        grantor.heard(ME, 1.0 + way_s)
        pass_time(holder, LEASE_S + 1)
        assert holder.standing(LEASE_S + 1.0).held == {ME}
        pass_time(grantor, LEASE_S + 1 + way_s - 0.5, answering=())
    grantor = Leases(A, FIVE, LEASE_S, 0.0)
    pass_time(grantor, 21.0)
    grantor.heard(ME, 21.0)
    pass_time(grantor, LEASE_S + 20.5, since=21.0)
    assert ME not in grantor.standing(LEASE_S + 20.5).silent
    pass_time(grantor, LEASE_S + 21.5, since=LEASE_S + 20.5)
    assert ME in grantor.standing(LEASE_S + 21.5).silent


def test_a_voter_that_slept_is_out_and_declares_nobody_gone() -> None:
    """On waking it cannot know whether the others were silent, and they may have gone on without it."""
    leases = present()
    woke = 10 * LEASE_S
    standing = leases.standing(woke)
    assert not standing.present and standing.held == {ME} and not standing.silent
    assert not standing.may_decide(FIVE, ()) and not standing.may_decide(FIVE, (A, B, C, D))
    pass_time(leases, woke + LEASE_S + 1, since=woke)
    assert leases.standing(woke + LEASE_S + 1).silent == {A, B, C, D}


def test_a_short_nap_changes_nothing() -> None:
    """Leases that are still good stay so."""
    leases = present()
    assert leases.standing(LEASE_S / 2).present
    assert leases.standing(LEASE_S / 2).held == {ME, A, B, C, D}


def test_a_new_voter_has_a_whole_lease_from_the_commit_that_names_it() -> None:
    """Nobody had a reason to hear it before."""
    leases = Leases(ME, head(ME, A, B), LEASE_S, 0.0)
    pass_time(leases, 100.0, answering=(A, B))
    leases.begin(head(ME, C, D, round_number=4), 100.0)
    assert leases.standing(100.0).silent == frozenset()
    pass_time(leases, 100.0 + LEASE_S, since=100.0)
    assert leases.standing(100.0 + LEASE_S).silent == {C, D}


def test_leases_go_on_from_round_to_round() -> None:
    """A commit neither renews the lease of a voter that stays nor takes ours away."""
    leases = present()
    pass_time(leases, 20.0)
    leases.begin(head(ME, A, B, C, D, round_number=4), 20.0)
    assert leases.standing(20.0).present
    pass_time(leases, LEASE_S + 1, since=20.0)
    assert leases.standing(LEASE_S + 1).silent == {A, B, C, D}


def test_a_voter_that_says_it_leaves_is_gone_at_once_and_back_when_it_calls() -> None:
    leases = present()
    for voter in (B, C, D):
        leases.left(voter)
    assert leases.standing(1.0).gone(FIVE) == (B, C, D)
    leases.heard(C, 2.0)
    assert leases.standing(2.0).gone(FIVE) == ()


def test_a_voter_that_left_votes_no_more() -> None:
    leases = present()
    leases.leave()
    standing = leases.standing(1.0)
    assert not standing.may_decide(FIVE, ()) and not standing.may_decide(FIVE, (A, B, C, D))
    assert leases.due(1.0) == []


def test_a_voter_that_decides_alone_needs_nobody() -> None:
    """The only one, and the founder of a small swarm once it has asked the others."""
    assert Leases(ME, head(ME), LEASE_S, 0.0).standing(0.0).present
    small = LogHead(
        run_id=b"r" * 20, shard=0, round=3, log_digest=bytes(32), voters=(ME, A, B), total_tokens=0, founders=(ME,)
    )
    leases = Leases(ME, small, LEASE_S, 0.0)
    leases.standing(0.0)
    for voter in leases.due(0.0):
        leases.failed(voter, 0.0)
    pass_time(leases, 3 * LEASE_S)
    standing = leases.standing(3 * LEASE_S)
    assert standing.present and standing.gone(small) == ()


def test_what_was_heard_long_before_the_leases_of_a_majority_were_held_again_is_no_catching_up() -> None:
    """Who could not be reached then may be reached now, and further on."""
    leases = Leases(ME, FIVE, LEASE_S, 0.0)
    for voter in (C, D):
        leases.failed(voter, 1.0)
    pass_time(leases, 9.0)
    for voter in (A, B):
        leases.answered(voter, 9.0)
    assert not leases.standing(9.0).present
    assert set(leases.due(9.1)) == {C, D}
    for voter in (C, D):
        leases.failed(voter, 9.2)
    assert leases.standing(9.2).present


def test_voters_are_asked_when_a_third_of_a_lease_has_passed_and_those_alone_who_answer_seldom() -> None:
    """Calls of a round renew leases: nobody else is asked."""
    leases = present()
    leases.answered(A, 5.0)
    assert set(leases.due(9.0)) == set()
    assert set(leases.due(11.0)) == {B, C, D}
    assert leases.due(11.5) == [], "once a second"
    assert set(leases.due(16.0)) == {A, B, C, D}
