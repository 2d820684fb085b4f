"""Rounds of a swarm under faults, one after the other, and the judgement of each.

Decides when a round begins, ends and hangs; leaves what a fault is to `chaos_faults`, carrying it out to `chaos_swarm`
and what must hold to `chaos_account`.
"""

from __future__ import annotations

import random
import time

from chaos_account import Account
from chaos_faults import Fault
from chaos_swarm import START_S, Setting, Stuck, Swarm

from peer.rounds.exchange import CONTROL_TIMEOUT_S
from peer.rounds.planning import num_slices

# Of a round's tokens: any three peers bring enough, and how much each brings differs.
LEAST_SHARE, MOST_SHARE = 0.36, 0.44


def deadline_s(fault: Fault, setting: Setting) -> float:
    """What a round may take: an attempt that fails, every voter's turn, another attempt, and a control message.

    A fault may take the majority away until it is healed, or started again.
    """
    rules = setting.rules
    rounds_s = 2 * rules.reduce_timeout_s + setting.peers * rules.takeover_timeout_s + CONTROL_TIMEOUT_S
    return fault.at_s + fault.lasts_s + rounds_s


class Run:
    """Our side: rounds under faults, and the judgement of each."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.events: list[str] = []
        self.began = time.monotonic()
        self.swarm = Swarm(setting, self.note)
        self.account = Account(num_slices(setting.rules.num_values))
        self.swarm.on_told = lambda life, told: self.account.late(life, told) if told.round <= self.judged else None
        self.judged = 0
        self.hangs = 0
        self._rng = random.Random(seed)

    def note(self, event: str) -> None:
        self.events.append(f"{time.monotonic() - self.began:8.2f} s  {event}")

    def begin(self) -> None:
        for peer in range(self.setting.peers):
            self.swarm.start(peer, anew=True)
            self.swarm.wait(lambda p=peer: p in self.swarm.up, START_S, f"peer {peer} starts")  # type: ignore[misc]

    def reached(self) -> int:
        return max(self.swarm.reached(peer) for peer in self.swarm.up)

    def all_at(self, number: int, peers: list[int]) -> bool:
        return all(self.swarm.reached(peer) >= number for peer in peers)

    def gather(self, peers: int) -> int:
        """Until so many are up and stand at one round; the next one."""
        ready = lambda: len(self.swarm.up) >= peers and self.all_at(self.reached(), self.swarm.up)  # noqa: E731
        self.swarm.wait(ready, START_S, "everybody is back")
        return self.reached() + 1

    def train(self) -> None:
        for peer in self.swarm.up:
            share = self._rng.uniform(LEAST_SHARE, MOST_SHARE)
            self.swarm.train(peer, int(share * self.setting.rules.tokens_per_round))

    def hurt_round(self, fault: Fault) -> None:
        """One round with its fault; what did not end in time is a hang, and gets as long again."""
        number = self.gather(self.setting.peers - 1)
        self.note(f"round {number}: {fault}")
        self.train()
        self.swarm.schedule(fault, time.monotonic())
        limit_s = deadline_s(fault, self.setting)
        over = lambda: not self.swarm.hurt and self.all_at(number, self.swarm.well)  # noqa: E731
        try:
            self.swarm.wait(over, limit_s, f"round {number}")
        except Stuck as stuck:
            self.hangs += 1
            self.note(f"HANG {stuck}; reached {[(p, self.swarm.reached(p)) for p in self.swarm.up]}")
            self.swarm.wait(over, 2 * limit_s, f"round {number}, after a hang")
        self.judge()

    def judge(self) -> None:
        """All rounds that everybody who is up has told."""
        while self.all_at(self.judged + 1, self.swarm.up):
            self.judged += 1
            before = (self.account.unequal, len(self.account.lost))
            self.account.judge(self.judged, self.swarm.lives)
            if before != (self.account.unequal, len(self.account.lost)):
                self.note(f"WRONG in round {self.judged}: {self.account.lost[before[1] :][:3]}")
