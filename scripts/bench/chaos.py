"""Rounds in which peers are killed, stalled and cut off: real processes, real libp2p, real disks.

    .venv/bin/python scripts/bench/chaos.py [--quick] [--seed N] [--rounds N] [--sides ours,kills,hivemind]

Five peers make rounds of a small shard. In each round one or two of them are killed (and start again from their own
disks), stalled with all their processes, or cut off, one way or both, for up to three seconds. The keys:

- ``unequal_survivors``: peers that held another state after a round than most; ``hangs``: rounds that the survivors did
  not end within the protocol's deadlines (`deadline_s`); ``lost``: tokens that left a peer's account without a commit
  that holds them, or movement that is neither in the anchor nor owed any more (`chaos_account`).
- ``kill_cost_s``: four peers on one loopback, a run's own timeouts (30 s and 20 s), a tenth of a million values:
  seconds from the opening of a round in which one is killed until the last survivor has it applied and on its disk,
  less the median of rounds in which nobody is hurt; median and worst. ``kill_to_opening_s``: where the kill came before
  the opening, how long that took.
- ``hivemind_...``: the same kills and stalls during all-reduces of hivemind's averager (`chaos_hivemind`).

Needs root for partitions: otherwise all peers share the loopback and nobody is cut off.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import chaos_kills
from chaos_faults import KILL, PARTITION, STALL, Fault, plan
from chaos_hivemind import LIMIT_S, HivemindSwarm, measure
from chaos_peer import Rules
from chaos_run import Run
from chaos_swarm import Setting, Stuck
from report import print_result

from peer.rounds.planning import SLICE_VALUES
from scripts.netlab.lab import Lab, Link, why_not

PEERS = 5
RULES = Rules(num_values=20 * SLICE_VALUES, tokens_per_round=10**6, reduce_timeout_s=6.0, takeover_timeout_s=3.0)
# A run's own timeouts: a dead peer must not cost them.
PLAIN_RULES = Rules(num_values=100_000, tokens_per_round=10**6, reduce_timeout_s=30.0, takeover_timeout_s=20.0)
LOOPBACK_PEERS = 4
HIVEMIND_PEERS, HIVEMIND_VALUES = 4, 1 << 20


def under_faults(lab: Lab | None, faults: list[Fault], seed: int, folder: Path) -> dict[str, Any]:
    """Our side of the table."""
    run = Run(Setting(lab=lab, folder=folder, peers=PEERS, rules=RULES), seed)
    failure = None
    done = 0
    try:
        run.begin()
        for done, fault in enumerate(faults, 1):
            run.hurt_round(fault)
            if done % 20 == 0:
                print(f"# {done} rounds in {time.monotonic() - run.began:.0f} s", flush=True)
        run.gather(PEERS)
        run.judge()
    except Stuck as stuck:
        failure = str(stuck)
        run.hangs += not failure.endswith("after a hang")
    finally:
        run.swarm.close()
    if failure or run.hangs or run.account.unequal or run.account.lost:
        print(f"# seed {seed}: {failure or 'not as it must be'}; what happened:")
        print("\n".join(f"#   {event}" for event in [*run.events, *run.account.lost]), flush=True)
    return {
        "rounds": run.judged,
        "faults": done,
        "unequal_survivors": run.account.unequal,
        "hangs": run.hangs,
        "lost": len(run.account.lost),
        "restarts": sum(life.ended_in is not None and life.ended_in <= run.judged for life in run.swarm.lives),
        "kinds": {kind: sum(fault.kind == kind for fault in faults[:done]) for kind in (KILL, STALL, PARTITION)},
        "seconds_under_faults": round(time.monotonic() - run.began, 1),
        **({"failure": failure} if failure else {}),
    }


def hivemind_side(lab: Lab | None, faults: list[Fault], folder: Path) -> dict[str, Any]:
    """The rival's side of the table, and its events."""
    swarm = HivemindSwarm(lab, HIVEMIND_PEERS, HIVEMIND_VALUES, folder)
    try:
        return measure(swarm, faults, lambda event: print(f"# {event}", flush=True))
    finally:
        swarm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds of each kind, under 60 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="rounds under faults")
    parser.add_argument("--sides", default="ours,kills,hivemind")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the laboratory is taken down
    sides = arguments.sides.split(",")
    rounds = arguments.rounds or (4 if arguments.quick else 200)
    kills, rival_rounds = (2, 2) if arguments.quick else (40, 30)
    started, load = time.monotonic(), os.getloadavg()[0]
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    reason = why_not()
    kinds = (KILL, STALL, PARTITION) if reason is None else (KILL, STALL)
    if reason is not None:
        print(f"# nobody is cut off, and all share the loopback: {reason}", flush=True)
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        lab = stack.enter_context(Lab([Link()] * PEERS)) if reason is None else None
        if "ours" in sides:
            figures |= under_faults(lab, plan(arguments.seed, rounds, PEERS, kinds), arguments.seed, folder / "ours")
        if "kills" in sides:
            loopback = Setting(
                lab=lab, together=True, folder=folder / "loopback", peers=LOOPBACK_PEERS, rules=PLAIN_RULES
            )
            figures |= chaos_kills.measure(Run(loopback, arguments.seed), kills, arguments.seed)
        if "hivemind" in sides:
            faults = [f for f in plan(arguments.seed, 10 * rival_rounds, HIVEMIND_PEERS, kinds) if f.kind != PARTITION]
            figures |= hivemind_side(lab, faults[:rival_rounds], folder)
    figures |= {"seed": arguments.seed, "load_before": round(load, 2), "load_after": round(os.getloadavg()[0], 2)}
    figures["seconds_of_the_benchmark"] = round(time.monotonic() - started, 1)
    settings = {
        "peers": PEERS,
        "values": RULES.num_values,
        "reduce_timeout_s": RULES.reduce_timeout_s,
        "takeover_timeout_s": RULES.takeover_timeout_s,
        "kill_cost": "4 peers on loopback, 100,000 values, timeouts of 30 and 20 s",
        "hivemind": f"{HIVEMIND_PEERS} peers, {HIVEMIND_VALUES} values; longer than {LIMIT_S:.0f} s is a hang",
    }
    print_result("chaos", figures, quick=arguments.quick, settings=settings)


if __name__ == "__main__":
    main()
