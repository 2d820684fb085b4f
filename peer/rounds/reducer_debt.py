"""What a reducer's averages lost by their encoding, kept and added to its next averages of the same slices.

Decides when a loss is booked: once a commit holds the very average that lost it. An attempt that was not committed
changes nothing, and each attempt of a round starts from the same debt. Leaves averaging to `peer.rounds.shard`.

The debt belongs to slices, and stays with the peer that averaged them last: it is added when this peer averages them
again, and lost when it ends (docs/protocol.md). It is kept in int8, slice by slice, on disk where somebody has a place
for it: in memory it would take 1.02 bytes a value. What int8 loses is below a hundredth of it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peer.rounds.codec import CODECS, Float32
from peer.rounds.paxos import Ballot, ballot_of
from peer.rounds.planning import SLICE_VALUES
from swarm.files import Kept
from swarm.proto.round_pb2 import Record

KEPT = CODECS["int8"]
# Attempts of a round whose losses are remembered. Whoever opens more of them makes the oldest forgotten.
MAX_ATTEMPTS = 4


class ReducerDebt:
    def __init__(self) -> None:
        self.keep: Callable[[bytes], Kept] = lambda data: data
        """where it waits until it is added: in memory, unless somebody has a better place"""
        self._owed: dict[int, Kept] = {}
        """slice -> what is owed to it, encoded"""
        self._lost: dict[tuple[Ballot, int], tuple[bytes, dict[int, Kept]]] = {}
        """(attempt, first slice) -> (digest of the average, what it lost by slice): not committed yet"""

    @property
    def size_bytes(self) -> int:
        """What is kept between rounds."""
        return sum(map(len, self._owed.values()))

    def add_to(self, mean: Float32, first_slice: int) -> None:
        """Add what is owed to the values of ``mean``, which begins with a slice."""
        for index, place in _slices(first_slice, len(mean)):
            owed = self._owed.get(index)
            if owed is not None:
                with np.errstate(over="ignore"):  # the encoder refuses the result, as it does any infinity
                    mean[place] += KEPT.decode(owed[:], len(mean[place]))

    def note(self, ballot: Ballot, first_slice: int, digest: bytes, lost: Float32) -> None:
        """An average was made under ``ballot`` and encoded to bytes of ``digest``, which ``lost`` so much."""
        by_slice = {index: self.keep(KEPT.encode(lost[place])) for index, place in _slices(first_slice, len(lost))}
        self._lost[ballot, first_slice] = digest, by_slice
        newest = sorted({attempt for attempt, _ in self._lost})[-MAX_ATTEMPTS:]
        self._lost = {key: value for key, value in self._lost.items() if key[0] in newest}

    def settle(self, record: Record) -> None:
        """Book what the averages that ``record`` holds lost; the round is over for the others."""
        lost, self._lost = self._lost, {}
        for part in record.parts:
            digest, by_slice = lost.get((ballot_of(record.opened_by), part.first_slice), (b"", {}))
            if part.digest and part.digest == digest:
                self._owed.update(by_slice)


def _slices(first_slice: int, num_values: int) -> list[tuple[int, slice]]:
    """(number of a slice, its place in a vector that begins with ``first_slice``)."""
    starts = range(0, num_values, SLICE_VALUES)
    return [(first_slice + i, slice(at, min(at + SLICE_VALUES, num_values))) for i, at in enumerate(starts)]
