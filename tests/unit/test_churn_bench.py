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
from pipeline_ours import ANSWERED, GATHERED, LEARNED, NOT_FINITE, NUM_COUNTS, READ
from pipeline_task import Task

LAB = SimpleNamespace(namespace=lambda peer: f"lab-{peer}", address=lambda peer: f"10.0.{peer}.1")


COUNTS = {"read": READ, "answered": ANSWERED, "not_finite": NOT_FINITE, "learned": LEARNED, "gathered": GATHERED}


def a_swarm(peers: int, replicas: int, folder: Path) -> churn_swarm.Swarm:
    return churn_swarm.Swarm(peers, Task(replicas=replicas), LAB, folder, start_s=4.0)  # type: ignore[arg-type]


def a_life(peer: int = 0, **counts: int) -> churn_swarm.Life:
    tally = [0] * NUM_COUNTS
    for name, number in counts.items():
        tally[COUNTS[name]] = number
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
    """But not what it had gathered for its next inner step."""
    killed: list[int] = []
    monkeypatch.setattr(churn_swarm.os, "kill", lambda pid, signal: killed.append(pid))
    swarm = a_swarm(2, 2, tmp_path)
    swarm.lives = {0: a_life(0, learned=512, gathered=64), 1: a_life(1, learned=192, gathered=64)}
    assert swarm.learned() == [576, 256]
    swarm.kill(0)
    swarm.kill(0)  # down already
    assert swarm.learned() == [512, 256] and killed == [0]
    assert swarm.num_up == 1
    swarm.lives[0] = a_life(0, learned=128)
    assert swarm.learned() == [640, 256]


@pytest.mark.parametrize(("up", "bound"), [((0, 1, 2, 3), 1.0), ((0, 1, 2), 0.5), ((0, 1), 0.5), ((0, 2), 0.0)])
def test_the_shard_with_the_fewest_living_replicas_bounds_the_rate(
    up: tuple[int, ...], bound: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two shards of two replicas; peers 0 and 2 host the first."""
    now_s = 100.0
    monkeypatch.setattr(churn_swarm.time, "monotonic", lambda: now_s)
    swarm = a_swarm(4, 2, tmp_path)
    swarm.lives = {peer: a_life(peer) for peer in up}
    now_s = 110.0
    swarm._bound()
    assert swarm.bound_s == pytest.approx(10 * bound)


def test_figures_are_medians_over_the_seeds_of_kills() -> None:
    rows = [{"mtbf_s": 20.0, "goodput": goodput, "bound": 0.9} for goodput in (0.7, 0.1, 0.6)]
    rows.append({"mtbf_s": 60.0, "goodput": 0.9, "bound": 0.95})
    keys = churn.keys_of(rows)
    assert keys["goodput_mtbf_20s"] == 0.6 and keys["goodput_mtbf_60s"] == 0.9 and keys["bound_mtbf_20s"] == 0.9
