"""The round machine under schedules that hypothesis writes: faults where they hurt, invariants after each of them.

`scripts/test tests/simulation/test_schedules.py --hypothesis-profile=explore` takes 10,000 schedules, seven
minutes; the tests of every day take a few hundred, always the same ones.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from peer.rounds.paxos import NO_BALLOT, Ballot
from peer.rounds.planning import Candidate
from peer.rounds.round_actions import View
from swarm.digest import sha256
from swarm.log import gone_of
from tests.simulation.conftest import EXPLORE_PROFILE
from tests.simulation.machines import TRAINED_TOKENS, Machine, Machines, Waiting, records_of

SIZES = [(3, 1), (4, 3), (5, 5), (8, 7)]
EVERY_DAY_SCHEDULES = 80
STEPS = 12


class Schedule(RuleBasedStateMachine):
    """Crashes, losses, repetitions, reordering, delays, partitions one way and both; then peace, which must end."""

    size = 4
    voters = 3
    lease_s = 100_000.0

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.machines = Machines(self.size, self.voters, random.Random(seed), lease_s=self.lease_s)
        self.promised: dict[bytes, Ballot] = {}
        self.held: list[Waiting] = []

    @rule(events=st.integers(1, 150))
    def go_on(self, events: int) -> None:
        """So many things happen, in any order; nothing is lost but by chance."""
        for _ in range(events):
            if self.machines.waiting:
                self.machines.deliver(self.machines.rng.randrange(len(self.machines.waiting)), faults=True)

    @rule(seconds=st.integers(1, 40))
    def go_on_without_faults(self, seconds: int) -> None:
        """Whoever can hear each other makes progress, takeovers too."""
        for _ in range(5 * seconds):
            self.machines.go_on()

    @rule(chosen=st.integers(0, 7), lost=st.booleans(), seconds=st.integers(0, 40))
    def decide_and_fall_silent(self, chosen: int, lost: bool, seconds: int) -> None:
        """Somebody comes to know the result and is cut off before it told, with one more; the rest goes on."""
        for _ in range(1500):
            if self.machines.commits or not self.machines.waiting:
                break
            self.machines.deliver(self.machines.rng.randrange(len(self.machines.waiting)), faults=False)
        self.isolate_who_knows(chosen)
        if lost:
            self.machines.lose(1.0)
        self.go_on_without_faults(seconds)

    @rule(elapsed_s=st.sampled_from([0.1, 1.0, 4.0, 7.0, 20.0]))
    def wait(self, elapsed_s: float) -> None:
        self.machines.pass_time(elapsed_s)

    @rule(chosen=st.integers(0, 7))
    def crash(self, chosen: int) -> None:
        self.machines.crash(self._peer(chosen))

    @rule()
    def crash_everybody(self) -> None:
        for peer in self.machines.peers:
            self.machines.crash(peer)

    @rule(chosen=st.integers(0, 7), other=st.integers(0, 7))
    def hear_that_somebody_is_gone(self, chosen: int, other: int) -> None:
        """Whether it is or not: a way between two may be cut while both live."""
        self.machines.hear_that_it_is_gone(self._peer(chosen), self._peer(other).key)

    @rule(sides=st.lists(st.booleans(), min_size=8, max_size=8), one_way=st.booleans())
    def separate(self, sides: list[bool], one_way: bool) -> None:
        """A partition, one way or both."""
        named = list(zip(self.machines.peers, sides, strict=False))
        one = {peer.key for peer, side in named if side}
        other = {peer.key for peer, side in named if not side}
        self.machines.separate(one, other)
        if not one_way:
            self.machines.separate(other, one)

    @rule(chosen=st.integers(0, 7))
    def isolate_who_knows(self, chosen: int) -> None:
        """Whoever applied the round, and one more, is heard by nobody: the others must come to the same alone."""
        known = {peer.key for peer in self.machines.peers if peer.applied is not None} | {self._peer(chosen).key}
        self.machines.separate(known, {peer.key for peer in self.machines.peers} - known)

    @rule()
    def heal(self) -> None:
        self.machines.cut.clear()

    @rule(kind=st.sampled_from(["accept", "vote", "promise", "open", "average"]), chosen=st.integers(0, 7))
    def hold(self, kind: str, chosen: int) -> None:
        """All messages of a kind that are under way to somebody come much later, after everything else."""
        peer = self._peer(chosen)
        held = [item for item in self.machines.waiting if item.peer is peer and item.kind == kind]
        self.held = [*self.held, *held]
        self.machines.waiting = [item for item in self.machines.waiting if item not in held]

    @rule()
    def release(self) -> None:
        self.machines.waiting.extend(self.held)
        self.held = []

    @rule(share=st.sampled_from([0.3, 0.8, 1.0]))
    def lose(self, share: float) -> None:
        self.machines.lose(share)

    @invariant()
    def one_result(self) -> None:
        """No two commits of one round exist, whatever happened."""
        assert len(self.machines.commits) <= 1

    @invariant()
    def promises_are_kept(self) -> None:
        """What a voter's disk says never goes back, and what it accepted never lies above what it promised."""
        for peer in self.machines.peers:
            before = self.promised.get(peer.key, NO_BALLOT)
            assert before <= peer.durable.promised
            assert peer.durable.accepted <= peer.durable.promised
            self.promised[peer.key] = peer.durable.promised

    @invariant()
    def a_chosen_record_stays_chosen(self) -> None:
        """Where a majority of the voters' disks accepted a record in one ballot, only that record is ever applied."""
        voters = [peer for peer in self.machines.peers if peer.key in self.machines.head.voters]
        for peer in voters:
            same = [v for v in voters if (v.durable.accepted, v.durable.record) == _accepted(peer)]
            if peer.durable.record and 2 * len(same) > len(voters):
                assert self.machines.commits <= {sha256(peer.durable.record)}

    @invariant()
    def nobody_counts_for_more_than_it_trained(self) -> None:
        for record in records_of(self.machines):
            for part in record.parts:
                assert len({share.peer_key for share in part.shares}) == len(part.shares)
                assert all(share.weight_tokens == TRAINED_TOKENS for share in part.shares)

    def teardown(self) -> None:
        """Peace: first those who know the result keep it to themselves, then everybody must finish."""
        if not hasattr(self, "machines"):
            return
        self.release()
        self.machines.settle(60.0, tell=False)
        self.machines.settle()
        assert all(peer.applied is not None for peer in self.machines.peers), "the round did not end"
        self.one_result()
        self.nobody_counts_for_more_than_it_trained()

    def _peer(self, chosen: int) -> Machine:
        return self.machines.peers[chosen % len(self.machines.peers)]


class BranchSchedule(Schedule):
    """The same faults, and sleep, with leases that run out: a branch may begin, and only where one may.

    That nobody votes without somebody whom it heard within a lease is checked at every vote (`Machines._check_vote`).
    """

    lease_s = 20.0

    @rule(chosen=st.integers(0, 7), elapsed_s=st.sampled_from([3.0, 15.0, 45.0]))
    def sleep(self, chosen: int, elapsed_s: float) -> None:
        self.machines.sleep(self._peer(chosen), elapsed_s)

    @invariant()
    def one_result(self) -> None:
        """Two results are two branches: at most one is signed by a majority of all."""
        assert len(self.machines.commits - self.machines.branches) <= 1
        if self.machines.now < self.lease_s:
            assert len(self.machines.commits) <= 1

    @invariant()
    def a_chosen_record_stays_chosen(self) -> None:
        """Only while leases hold."""


def _accepted(peer: Machine) -> tuple[Ballot, bytes]:
    return (peer.durable.accepted, peer.durable.record)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "voters"), SIZES)
def test_invariants_hold_after_every_fault(size: int, voters: int) -> None:
    """One result, promises kept, no contribution counted twice; and every schedule ends once there is peace."""
    explore(type("Schedule", (Schedule,), {"size": size, "voters": voters}), EVERY_DAY_SCHEDULES)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "voters"), SIZES[1:3])
def test_branches_begin_only_where_leases_ran_out(size: int, voters: int) -> None:
    """One result of a majority, nobody declared gone who was heard; and every schedule ends once there is peace."""
    explore(type("Schedule", (BranchSchedule,), {"size": size, "voters": voters}), EVERY_DAY_SCHEDULES // 4)


def explore(explored: type[Schedule], every_day: int) -> None:
    exploring = settings.get_current_profile_name() == EXPLORE_PROFILE
    examples = -(-settings().max_examples // (len(SIZES) + 2)) if exploring else every_day
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        explored,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not exploring,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_schedule_without_faults_counts_every_contributor_in_every_part() -> None:
    """Nobody is left out where nothing goes wrong."""
    machines = Machines(5, 3, random.Random(1))
    machines.settle()
    for record in records_of(machines):
        assert all(len(part.shares) == 4 for part in record.parts)
        assert record.total_tokens == 100 + 4 * TRAINED_TOKENS


# ---- named cases ----------------------------------------------------------------------------------------------------

LEASE_S = 20.0


def five_voters(seed: int = 1) -> Machines:
    """Six replicas, five of them voters, whose leases are granted."""
    machines = Machines(6, 5, random.Random(seed), lease_s=LEASE_S)
    hold_votes(machines)
    go_on(machines, 4.0)
    assert not machines.commits
    return machines


def hold_votes(machines: Machines) -> None:
    """Nobody gets to vote, so that a round lasts as long as the test wants: accepts are lost from here on."""
    machines.lost_kinds = {"accept"}


def go_on(machines: Machines, seconds: float) -> None:
    until = machines.now + seconds
    while machines.now < until:
        machines.go_on()


def die(machines: Machines, peers: list[Machine]) -> None:
    """For good: nothing of them is heard again, and nothing reaches them."""
    for peer in peers:
        peer.asleep = True


def test_when_the_majority_dies_for_good_the_rest_goes_on_once_its_leases_ran_out() -> None:
    machines = five_voters()
    voters = [machines.peer(key) for key in machines.head.voters]
    die(machines, voters[:3])
    machines.lost_kinds = set()
    go_on(machines, LEASE_S - 2)
    assert not machines.commits, "their leases hold"
    go_on(machines, 60.0)
    assert len(machines.commits) == len(machines.branches) == 1
    living = [peer for peer in machines.peers if peer not in voters[:3]]
    assert all(peer.applied is not None for peer in living)
    commit = voters[3].applied.commit  # type: ignore[union-attr]
    assert gone_of(commit, machines.head) == tuple(sorted(peer.key for peer in voters[:3]))


def test_both_sides_of_a_partition_without_a_majority_wait_a_lease_and_then_are_branches() -> None:
    """Two, two and one of five: nobody decides before; the one that hears of no other replica never does."""
    machines = five_voters()
    peers = machines.peers
    sides = [peers[1:3], [peers[3], peers[5]], [peers[4]], [peers[0]]]  # the last of all trains nothing
    for side in sides:
        keys = {peer.key for peer in side}
        machines.separate(keys, {peer.key for peer in machines.peers} - keys)
    machines.lost_kinds = set()
    go_on(machines, LEASE_S - 2)
    assert not machines.commits, "nobody has a majority, and leases hold"
    for side in (*sides[2:], sides[0], sides[1]):
        hears_of(machines, side)
    go_on(machines, 60.0)
    assert [all(peer.applied is not None for peer in side) for side in sides] == [True, True, False, False]
    assert len(machines.branches) == len(machines.commits) == 2


def hears_of(machines: Machines, side: list[Machine]) -> None:
    """The directory of a side names that side alone."""
    for peer in side:
        assert peer.machine is not None
        candidates = tuple(Candidate(key=p.key, trains=p.trains, upload_bps=1) for p in side)
        peer.machine.view = View(candidates=candidates, ready=True)


def test_what_the_rest_had_accepted_before_it_is_a_branch_is_what_the_branch_commits() -> None:
    """The majority may have committed it: then there is no fork at all."""
    machines = Machines(6, 5, random.Random(2), lease_s=LEASE_S)
    voters = [machines.peer(key) for key in machines.head.voters]
    machines.lost_kinds = {"vote", "commit"}
    until = machines.now + 30.0
    while machines.now < until and not all(voter.durable.record for voter in voters[3:]):
        machines.go_on()
    accepted = {voter.durable.record for voter in voters[3:]}
    assert len(accepted) == 1 and accepted != {b""}
    die(machines, voters[:3])
    machines.lost_kinds = set()
    go_on(machines, LEASE_S + 60.0)
    assert machines.commits == {sha256(accepted.pop())}


def test_voters_that_slept_past_their_leases_do_not_vote_on_waking_but_take_what_the_others_did() -> None:
    """Three of five wake at once; with each other's leases they would be a majority, but the other two were asked."""
    machines = five_voters()
    voters = [machines.peer(key) for key in machines.head.voters]
    sleepers = voters[:3]
    die(machines, sleepers)
    machines.lost_kinds = set()
    go_on(machines, LEASE_S + 60.0)
    assert len(machines.branches) == 1
    for peer in sleepers:
        peer.asleep = False
    machines.waiting = [item for item in machines.waiting if item.peer not in sleepers or item.sender is None]
    for _ in range(
        75
    ):  # nobody tells them, and each other's leases are soon granted: they hear that others are further on
        machines.go_on()
        assert len(machines.commits) == 1, "they voted for another result"
    machines.settle()
    assert all(peer.applied is not None for peer in machines.peers) and len(machines.commits) == 1


def test_a_voter_that_restarts_during_an_outage_waits_a_whole_lease_again() -> None:
    """What it granted is not on disk, so it takes everybody to have been heard when it starts."""
    machines = five_voters()
    voters = [machines.peer(key) for key in machines.head.voters]
    die(machines, voters[:3])
    machines.lost_kinds = set()
    go_on(machines, LEASE_S - 4)
    machines.crash(voters[4])
    go_on(machines, LEASE_S - 2)
    assert not machines.commits, "the restarted voter's word still binds it"
    go_on(machines, 60.0)
    assert len(machines.branches) == 1
