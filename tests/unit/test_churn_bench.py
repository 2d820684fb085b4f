"""The churn benchmark: when whom is killed, and what is counted over the lives of a peer."""

from __future__ import annotations

import itertools
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import churn
import churn_swarm
from pipeline_ours import ANSWERED, LEARNED, NOT_FINITE, NUM_COUNTS, READ
from pipeline_task import Task

LAB = SimpleNamespace(namespace=lambda peer: f"lab-{peer}", address=lambda peer: f"10.0.{peer}.1")


def a_life(peer: int = 0, **counts: int) -> churn_swarm.Life:
    tally = [0] * NUM_COUNTS
    for name, number in counts.items():
        tally[{"read": READ, "answered": ANSWERED, "not_finite": NOT_FINITE, "learned": LEARNED}[name]] = number
    process = SimpleNamespace(pid=0, join=lambda: None)
    pipe = SimpleNamespace(close=lambda: None)
    return churn_swarm.Life(peer, tally, process, pipe, 0.0, is_up=True)


def test_kills_come_at_the_mean_distance_asked_for_and_hit_everybody() -> None:
    """Exponential distances: their mean and their deviation are the same."""
    kills = churn.kill_times(20.0, 20_000.0, 8, seed=1)
    distances = [after - before for (before, _), (after, _) in itertools.pairwise(kills)]
    assert 18 < statistics.mean(distances) < 22
    assert 17 < statistics.stdev(distances) < 23
    assert {peer for _, peer in kills} == set(range(8))
    assert kills == churn.kill_times(20.0, 20_000.0, 8, seed=1)


def test_a_microbatch_that_was_read_and_came_to_nothing_is_lost() -> None:
    """Also one whose loss was no number: nobody learned from it."""
    assert churn.lost([a_life(read=9, answered=9), a_life(read=9, answered=7, not_finite=1)]) == 2


def test_what_a_killed_peer_had_learned_still_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And it comes back after the time that imports take."""
    killed: list[int] = []
    monkeypatch.setattr(churn_swarm.os, "kill", lambda pid, signal: killed.append(pid))
    swarm = churn_swarm.Swarm(2, Task(replicas=2), LAB, tmp_path)  # type: ignore[arg-type]
    swarm.lives = {0: a_life(0, learned=512), 1: a_life(1, learned=256)}
    swarm.kill(0)
    swarm.kill(0)  # down already
    assert swarm.learned() == [512, 256] and killed == [0]
    assert swarm.num_up == 1
    swarm.lives[0] = a_life(0, learned=128)
    assert swarm.learned() == [640, 256]
