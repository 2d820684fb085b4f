"""The judge of a run under faults: whether survivors are equal, and whether what was trained is where it belongs.

Pure: it is handed what peers told of their commits. Every token moves every value of a replica by the same step, so
what an anchor must be follows: a process that had trained T1 tokens when a slice last took its movement, and T2 the
next time, brings exactly the movement of the tokens between, and the first time what its disk said that it owed, too;
and its account holds all tokens that it trained less those that commits credited. Leaves running and hurting peers to
others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

STEP = 2.0**-20
"""what a token moves each value by"""
LARGEST_ERROR = 1e-3
"""of an anchor's step in a round, relative: codecs round"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a process says once it holds a round applied and on its disk."""

    round: int
    at: float
    state_digest: str
    counted: bool
    parts: list[tuple[int, int, list[tuple[int, int]]]]
    """present parts of the record: (first slice, slices, [(peer, weight in tokens)])"""
    trained: int
    """tokens since the process started"""
    uncounted: int
    offered: int
    """of the tokens trained, those whose movement its last snapshot had"""
    anchor: list[float]
    """one value of each slice"""
    voters: list[int]


@dataclass(slots=True)
class Life:
    """One process of a peer, from its start to its end."""

    peer: int
    owed: list[float] = field(default_factory=list)
    """what it began with, of each slice, as a movement"""
    told: dict[int, Told] = field(default_factory=dict)
    credited: int = 0
    """tokens, by commits"""
    offered: int = 0
    """as it told last, if in no commit"""
    taken: list[int] = field(default_factory=list)
    """tokens whose movement each slice has taken"""
    ended_in: int | None = None
    """the round that was worked towards when it was killed"""


class Account:
    """Rounds in order; each is judged once everybody that is up has told it."""

    def __init__(self, num_slices: int) -> None:
        self._anchor = [0.0] * num_slices
        self._num_slices = num_slices
        self._digests: dict[int, str] = {}
        self._of_the_dead: dict[int, dict[int, list[int]]] = {}
        """round -> peer -> slices that took what a killed process had sent"""
        self.unequal = 0
        self.lost: list[str] = []

    def judge(self, number: int, lives: Sequence[Life]) -> None:
        """Count survivors beyond the largest equal group, and tokens or movement that went astray."""
        told = [(life, life.told[number]) for life in lives if number in life.told]
        groups = Counter(one.state_digest for _, one in told)
        self._digests[number], equal = groups.most_common(1)[0]
        self.unequal += len(told) - equal
        first = told[0][1]
        sharers = {peer: self._whose(peer, number, lives) for _, _, shares in first.parts for peer, _ in shares}
        self._move(number, first, sharers)
        for life, one in told:
            self._forget_debts(life, number)
            if one.uncounted != one.trained - life.credited:
                left = one.trained - life.credited
                self.lost.append(f"round {number}: {one.uncounted} tokens of peer {life.peer} wait instead of {left}")

    def late(self, life: Life, one: Told) -> None:
        """A round that was judged is told by a process that came to it later."""
        self.unequal += one.state_digest != self._digests[one.round]
        self._forget_debts(life, one.round)

    def _forget_debts(self, life: Life, number: int) -> None:
        """What its predecessor sent was taken with all that was owed: the debt that it began with is none any more."""
        slices = self._of_the_dead[number].get(life.peer, ())
        life.owed = [0.0 if place in slices else owed for place, owed in enumerate(life.owed)]

    def _whose(self, peer: int, number: int, lives: Sequence[Life]) -> Life | None:
        """Whose share it is: of the process that says so, or of the one that was killed before it could."""
        mine = [life for life in lives if life.peer == peer]
        said = [life for life in mine if number in life.told and life.told[number].counted]
        dead = [life for life in mine if number not in life.told and life.ended_in == number]
        return (said or dead or [None])[0]

    def _move(self, number: int, first: Told, sharers: dict[int, Life | None]) -> None:
        """Where the anchor must be now; a difference is told, and taken over, so that it is told once."""
        weights: dict[int, int] = {}
        self._of_the_dead[number] = {}
        for first_slice, count, shares in first.parts:
            total, moved = sum(weight for _, weight in shares), [0.0] * count
            for peer, weight in shares:
                life = sharers[peer]
                if life is None:
                    self.lost.append(f"round {number}: nobody says that it is the peer {peer} of the commit")
                    return
                weights[peer] = weight
                slices = range(first_slice, first_slice + count)
                for place, brought in enumerate(self._brought(life, number, slices)):
                    moved[place] += weight * brought
                if number not in life.told:
                    self._of_the_dead[number].setdefault(peer, []).extend(slices)
            for place in range(count):
                step = moved[place] / total
                error = first.anchor[first_slice + place] - self._anchor[first_slice + place] - step
                if abs(error) > LARGEST_ERROR * abs(step):
                    self.lost.append(
                        f"round {number}, slice {first_slice + place}: moved by {error:+.3e} besides {step:.3e}"
                    )
        self._anchor = list(first.anchor)
        for peer, weight in weights.items():
            life = sharers[peer]
            if life is not None:
                life.credited += weight

    def _brought(self, life: Life, number: int, slices: range) -> list[float]:
        """The movement of each of ``slices`` that a commit took of a process."""
        life.taken = life.taken or [0] * self._num_slices
        life.owed = life.owed or [0.0] * self._num_slices
        offered = life.told[number].offered if number in life.told else life.offered
        brought = [(offered - life.taken[place]) * STEP + life.owed[place] for place in slices]
        for place in slices:
            life.taken[place], life.owed[place] = offered, 0.0
        return brought
