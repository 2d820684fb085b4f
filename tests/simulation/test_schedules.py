"""The round machine under schedules that hypothesis writes: faults where they hurt, invariants after each of them.

`scripts/test tests/simulation/test_schedules.py --hypothesis-profile=explore` takes 10,000 schedules;
the tests of every day take a few hundred, always the same ones.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from peer.rounds.paxos import NO_BALLOT, Ballot
from swarm.digest import sha256
from tests.simulation.conftest import EXPLORE_PROFILE
from tests.simulation.machines import TRAINED_TOKENS, Machine, Machines, Waiting, records_of

SIZES = [(3, 1), (4, 3), (5, 5), (8, 7)]
EVERY_DAY_SCHEDULES = 80
STEPS = 12


class Schedule(RuleBasedStateMachine):
    """Crashes, losses, repetitions, reordering, delays, partitions one way and both; then peace, which must end."""

    size = 4
    voters = 3

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.machines = Machines(self.size, self.voters, random.Random(seed))
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


def _accepted(peer: Machine) -> tuple[Ballot, bytes]:
    return (peer.durable.accepted, peer.durable.record)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "voters"), SIZES)
def test_invariants_hold_after_every_fault(size: int, voters: int) -> None:
    """One result, promises kept, no contribution counted twice; and every schedule ends once there is peace."""
    explored = type("Schedule", (Schedule,), {"size": size, "voters": voters})
    exploring = settings.get_current_profile_name() == EXPLORE_PROFILE
    examples = settings().max_examples // len(SIZES) if exploring else EVERY_DAY_SCHEDULES
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
