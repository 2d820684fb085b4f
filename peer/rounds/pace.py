"""The pace of a run's shards: whose turn it is to open a round.

Pure. Decides that the openings of the shards are spread over the tokens of a round, so that neither uplinks nor
replicas meet all rounds at once; and that no shard opens round r+2 before every shard committed r, so that "round r"
is a state of the whole model that all replicas pass. Leaves who leads, and what a round is, to `peer.rounds.round`.

The first shard opens whenever its tokens are reached, and ends the run. Each other one follows it round by round, an
even share of a round after the one before; for that it opens a little before its own tokens are reached, or it could
never make up for a delay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from swarm import schedule
from swarm.run_spec import Rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A shard: the round that it works towards, and the tokens that those who stand there trained towards it."""

    round: int
    tokens: int


def tokens_wanted(rounds: Rounds, shard: int, num_shards: int, round_number: int) -> int:
    """Tokens from which on a shard may open a round: those of the round, or a little less where it follows another."""
    tokens = schedule.tokens_of_round(rounds, round_number)
    return tokens if shard == 0 else tokens - tokens // (2 * num_shards)


def may_open(rounds: Rounds, shard: int, standings: Sequence[Standing]) -> tuple[bool, str]:
    """Whether it is the turn of ``shard`` to open the round that it works towards, and why."""
    mine, num_shards = standings[shard], len(standings)
    wanted = tokens_wanted(rounds, shard, num_shards, mine.round)
    if mine.tokens < wanted:
        return False, f"{mine.tokens} of {wanted} tokens are trained"
    behind = [number for number, standing in enumerate(standings) if standing.round < mine.round - 1]
    if behind:
        return False, f"shard {behind[0]} has not committed round {mine.round - 2}"
    if shard == 0:
        return True, "its tokens are trained"
    first = standings[0]
    if first.round <= mine.round:
        return False, f"shard 0 has not committed round {mine.round}"
    apart = schedule.tokens_of_round(rounds, first.round) * shard // num_shards
    is_late = first.round > mine.round + 1 or mine.tokens >= 2 * schedule.tokens_of_round(rounds, mine.round)
    if first.tokens < apart and not is_late:
        return False, f"{first.tokens} of {apart} tokens since round {mine.round} of shard 0"
    return True, "it follows shard 0"


class Pace:
    """Where the shards of a run stand, as this peer sees it: noted by their members, read by all of them."""

    def __init__(self, num_shards: int = 1) -> None:
        self._standings = [Standing(round=1, tokens=0)] * num_shards

    @property
    def num_shards(self) -> int:
        return len(self._standings)

    def note(self, shard: int, standing: Standing) -> None:
        self._standings[shard] = standing

    def may_open(self, rounds: Rounds, shard: int) -> tuple[bool, str]:
        return may_open(rounds, shard, self._standings)
