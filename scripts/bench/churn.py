"""Churn: what is left of a pipeline's goodput while its peers are killed at random and come back.

    .venv/bin/python scripts/bench/churn.py [--quick]

Four shards of two replicas, each peer a process with its libp2p in a namespace of its own, under one CPU quota. Any of
them is killed by SIGKILL, the times between two kills drawn from an exponential distribution whose mean is that between
failures of the whole swarm; a peer comes back as `churn_swarm` says. Goodput: tokens of inner steps, the mean over
shards, and those gathered for the next one at a window's ends; what a killed replica had gathered is not in it. It is
compared with the mean of the quiet windows, before, between and after. ``bound``: what is left where the shard with the
fewest living replicas sets the pace, and nothing else is lost. Medians over seeds of kills. Needs root.

``microbatches_lost``: of those that the sources which live at the end have read since they began (each is asked for
again until it is answered), how many were neither answered nor have a loss. Last line: one JSON object.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import dataclasses
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from churn_swarm import Life, Swarm, import_s
from pipeline_ours import ANSWERED, READ, preload
from pipeline_task import Task, remove_quotas
from quality_setting import read_text
from report import print_result

from scripts.netlab.lab import Lab, Link, why_not

SHARDS, REPLICAS = 4, 2
FULL = Task(hidden=128, replicas=REPLICAS, cpu_share=0.22)
SHORT = Task(hidden=64, heads=2, layers=4, length=64, replicas=REPLICAS, cpu_share=0.22, step_microbatches=4)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Seconds of the windows; ``arms``: (mean time between failures, seconds), each with every one of ``seeds``."""

    warm_up_s: float
    quiet_s: float
    seeds: int
    arms: tuple[tuple[float, float], ...]


PLAN = Plan(warm_up_s=10.0, quiet_s=35.0, seeds=3, arms=((60.0, 160.0), (20.0, 150.0)))
QUICK_PLAN = Plan(warm_up_s=4.0, quiet_s=5.0, seeds=1, arms=((3.0, 12.0),))


def kill_times(mtbf_s: float, seconds: float, peers: int, seed: int) -> list[tuple[float, int]]:
    """(when, whom) within a window of so many seconds."""
    rng = random.Random(f"{seed} {mtbf_s}")
    kills: list[tuple[float, int]] = []
    at_s = rng.expovariate(1 / mtbf_s)
    while at_s < seconds:
        kills.append((at_s, rng.randrange(peers)))
        at_s += rng.expovariate(1 / mtbf_s)
    return kills


def window(swarm: Swarm, seconds: float, kills: list[tuple[float, int]]) -> tuple[float, float]:
    """Tokens of inner steps a second, the mean over shards; and the bound of what is left of a quiet window's."""
    began_s, before, bounded_s = time.monotonic(), swarm.learned(), swarm.bound_s
    for at_s, peer in kills:
        swarm.run(began_s + at_s - time.monotonic())
        swarm.kill(peer)
    swarm.run(began_s + seconds - time.monotonic())
    learned, took_s = sum(swarm.learned()) - sum(before), time.monotonic() - began_s
    return learned / SHARDS / took_s, (swarm.bound_s - bounded_s) / took_s


def lost(lives: list[Life]) -> int:
    return sum(life.tally[READ] - life.tally[ANSWERED] for life in lives)


def measure(swarm: Swarm, plan: Plan) -> dict[str, Any]:
    peers = SHARDS * REPLICAS
    swarm.start_all()
    swarm.run(plan.warm_up_s)
    quiet, rows = [window(swarm, plan.quiet_s, [])[0]], []
    print(f"{'':24} {'tokens/s':>9} {'kills':>6} {'bound':>6}\n{'quiet':24} {quiet[0]:9,.0f}", flush=True)
    for seed in range(plan.seeds):
        for mtbf_s, seconds in plan.arms:
            kills = kill_times(mtbf_s, seconds, peers, seed)
            tokens_per_s, bound = window(swarm, seconds, kills)
            print(f"{f'a failure in {mtbf_s:.0f} s':24} {tokens_per_s:9,.0f} {len(kills):6} {bound:6.2f}", flush=True)
            row = {"tokens_per_s": round(tokens_per_s, 1), "kills": len(kills), "bound": round(bound, 3)}
            rows.append({"mtbf_s": mtbf_s, "seed": seed} | row)
            swarm.wait(lambda: swarm.num_up == peers, 60.0)
            swarm.run(plan.warm_up_s)
        quiet.append(window(swarm, plan.quiet_s, [])[0])
        print(f"{'quiet':24} {quiet[-1]:9,.0f}", flush=True)
    for row in rows:
        row["goodput"] = round(row["tokens_per_s"] / statistics.mean(quiet), 3)
    lives = swarm.drain()
    back_s = sorted(swarm.return_seconds)
    return keys_of(rows) | {
        "microbatches_lost": lost(lives),
        "microbatches_read": sum(life.tally[READ] for life in lives),
        "quiet_tokens_per_s": [round(rate, 1) for rate in quiet],
        "windows": rows,
        "seconds_to_return": {"median": round(statistics.median(back_s), 2), "worst": round(back_s[-1], 2)}
        if back_s
        else None,
    }


def keys_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over seeds."""
    keys = {}
    for mtbf_s in sorted({row["mtbf_s"] for row in rows}, reverse=True):
        of = [row for row in rows if row["mtbf_s"] == mtbf_s]
        for figure in ("goodput", "bound"):
            keys[f"{figure}_mtbf_{mtbf_s:.0f}s"] = statistics.median(row[figure] for row in of)
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one rate of failures, under 60 s")
    options = parser.parse_args()
    reason = why_not()
    if reason is not None:
        raise SystemExit(f"no laboratory: {reason}")
    task, plan = (SHORT, QUICK_PLAN) if options.quick else (FULL, PLAN)
    start_s = import_s(1 if options.quick else 3)
    # Once, as peers are forked; and a volunteer who comes back does not read all data again.
    read_text()
    preload(task)
    with tempfile.TemporaryDirectory() as folder, Lab([Link()] * (SHARDS * REPLICAS)) as lab:
        swarm = Swarm(SHARDS * REPLICAS, task, lab, Path(folder), start_s)
        try:
            figures = measure(swarm, plan)
        finally:
            swarm.close()
            remove_quotas()
    settings = dataclasses.asdict(task) | dataclasses.asdict(plan) | {"start_s": round(start_s, 2)}
    print_result("churn", figures, quick=options.quick, settings=settings)


if __name__ == "__main__":
    main()
