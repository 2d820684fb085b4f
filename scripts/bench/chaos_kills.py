"""What a killed peer costs a round: rounds with a kill and rounds without in turns, on one loopback.

Every other victim leads the round; a quarter die before it opens, the others in any of its phases.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from averaging_ours import first_voters
from chaos_faults import KILL, Fault
from chaos_run import Run
from chaos_swarm import START_S

from peer.rounds.planning import leader_order
from swarm.log import LogHead

MAX_TRIES = 4
SHARE_OF_LEADERS = 0.5
SHARE_OF_EARLY = 0.25


class Kills:
    def __init__(self, run: Run, seed: int) -> None:
        self._run = run
        self._rng = random.Random(seed)
        self.healthy: list[float] = []
        self.killed: list[tuple[float, str]] = []
        """(seconds of the round, who died when)"""
        self.late_openings: list[float] = []
        """seconds from a kill to the opening of the round that it came before"""

    def healthy_round(self) -> None:
        run, swarm = self._run, self._run.swarm
        number = run.gather(run.setting.peers)
        run.train()
        swarm.wait(lambda: run.all_at(number, swarm.up), START_S, f"round {number}")
        self.healthy.append(swarm.ended(number) - swarm.opened[number])
        run.judge()

    def round_with_a_kill(self) -> None:
        """Counted where the kill came before the survivors had the round."""
        run, swarm, rng = self._run, self._run.swarm, self._rng
        number = run.gather(run.setting.peers)
        leads, early = rng.random() < SHARE_OF_LEADERS, rng.random() < SHARE_OF_EARLY
        order, at_s = self._order(number, leads), rng.uniform(0.0, statistics.median(self.healthy))
        run.train()
        since = time.monotonic()
        if not early:
            swarm.wait(lambda: number in swarm.opened, START_S, f"round {number} opens")
            since = swarm.opened[number]
        swarm.schedule(Fault(kind=KILL, at_s=at_s, lasts_s=0.1, order=order), since)
        over = lambda: not swarm.hurt and run.all_at(number, swarm.up)  # noqa: E731
        swarm.wait(over, 2 * START_S, f"round {number} with a kill")
        died_at, opened, ended = swarm.killed_at[order[0]], swarm.opened[number], swarm.ended(number)
        if died_at < opened:
            self.late_openings.append(opened - died_at)
        elif died_at < ended:
            who = f"{'leader' if leads else 'another'}, {died_at - opened:+.2f} s from the opening"
            self.killed.append((ended - opened, who))
        run.judge()

    def _order(self, number: int, leads: bool) -> tuple[int, ...]:
        """The victim first: whoever leads the round, or anybody else."""
        by_key = {self._run.swarm.key(peer): peer for peer in self._run.swarm.voters()}
        founders = first_voters([self._run.swarm.key(peer) for peer in range(self._run.setting.peers)])
        head = LogHead(
            run_id=b"",
            shard=0,
            round=number - 1,
            log_digest=b"",
            voters=tuple(by_key),
            total_tokens=0,
            founders=tuple(founders),
        )
        leader = by_key[leader_order(head, number)[0]]
        others = [peer for peer in range(self._run.setting.peers) if peer != leader]
        others = self._rng.sample(others, len(others))
        return (leader, *others) if leads else (*others, leader)

    def figures(self) -> dict[str, Any]:
        usual_s = statistics.median(self.healthy)
        for seconds, who in sorted(self.killed):
            print(f"# killed: {who}: a round of {seconds:.2f} s; healthy: {usual_s:.2f} s", flush=True)
        costs = [seconds - usual_s for seconds, _ in self.killed]
        return {
            "kill_cost_s": _median_and_worst(costs),
            "kills_within_a_round": len(costs),
            "kill_to_opening_s": _median_and_worst(self.late_openings),
            "healthy_round_s": round(usual_s, 3),
        }


def _median_and_worst(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"median": round(statistics.median(seconds), 3), "worst": round(max(seconds), 3)}


def measure(run: Run, kills: int, seed: int) -> dict[str, Any]:
    """``kills`` rounds that one came within, in turns with rounds without; a kill may come too late for its round."""
    measured = Kills(run, seed)
    try:
        run.begin()
        for _ in range(2):
            measured.healthy_round()
        measured.healthy.pop(0)  # the first round is among strangers
        for _ in range(MAX_TRIES * kills):
            if len(measured.killed) == kills:
                break
            measured.round_with_a_kill()
            measured.healthy_round()
    finally:
        run.swarm.close()
    return measured.figures()
