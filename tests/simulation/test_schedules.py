"""The round machine under every order of events that chance finds: one result, and always an end."""

from __future__ import annotations

import random

import pytest

from tests.simulation.machines import Machines, records_of

SCHEDULES = 120


@pytest.mark.parametrize(("size", "voters"), [(3, 1), (4, 3), (5, 5), (8, 7)])
def test_no_schedule_commits_two_results_and_every_schedule_ends(size: int, voters: int) -> None:
    """Losses, repetitions, reordering and crashes for a while; then peace, in which everybody must finish."""
    for seed in range(SCHEDULES):
        machines = Machines(size, voters, random.Random(seed))
        machines.chaos(300)
        machines.settle(60.0, tell=False)
        machines.settle()
        assert all(peer.applied is not None for peer in machines.peers), f"schedule {seed} did not end"
        assert len(machines.commits) == 1, f"schedule {seed}: {len(machines.commits)} different commits"


def test_a_schedule_without_faults_counts_every_contributor_in_every_part() -> None:
    machines = Machines(5, 3, random.Random(1))
    machines.settle()
    for record in records_of(machines):
        assert all(len(part.shares) == 4 for part in record.parts)
        assert record.total_tokens == 100 + 4 * 10
