"""What is done to the peers of a round, from a seed alone: who is killed, stalled or cut off, when and for how long.

Pure: a fault names peers in an order of preference, and whoever carries it out takes the first of them that are up.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KILL, STALL, PARTITION, NONE = "kill", "stall", "partition", "none"
# How far into a round: before it opens, in any phase, or after it ended for some.
LATEST_S = 1.2
LONGEST_S = 3.0
SHARE_OF_TWO = 0.2
SHARE_OF_ONE_WAY = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """``at_s`` after the round's tokens were handed out, to the first ``count`` of ``order`` that are up.

    ``lasts_s``: until it is healed; of a kill, until the process is started again. ``one_way``: what they say is lost,
    and they hear everything.
    """

    kind: str
    at_s: float
    lasts_s: float
    order: tuple[int, ...]
    count: int = 1
    one_way: bool = False

    def __str__(self) -> str:
        way = " one way" if self.one_way else ""
        return f"{self.kind}{way} of {self.count} at {self.at_s:.2f} s for {self.lasts_s:.2f} s"


def plan(seed: int, rounds: int, peers: int, kinds: tuple[str, ...] = (KILL, STALL, PARTITION)) -> list[Fault]:
    """One fault for each round; the same for the same arguments."""
    rng = random.Random(seed)
    faults = []
    for _ in range(rounds):
        kind = rng.choice(kinds)
        faults.append(
            Fault(
                kind=kind,
                at_s=rng.uniform(0.0, LATEST_S),
                lasts_s=rng.uniform(0.1, LONGEST_S),
                order=tuple(rng.sample(range(peers), peers)),
                count=2 if rng.random() < SHARE_OF_TWO else 1,
                one_way=kind == PARTITION and rng.random() < SHARE_OF_ONE_WAY,
            )
        )
    return faults
