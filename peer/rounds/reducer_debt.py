"""What a reducer's averages lost by their encoding, kept and added to the next averages of the same slices.

Decides when a loss is booked (once a commit holds the very average that lost it), and what of another reducer's is
taken over. An attempt that was not committed changes nothing, and each attempt of a round starts from the same debt.
Leaves averaging to `peer.rounds.shard`.

The debt belongs to slices. Where this peer averages them again it adds it itself; where somebody else does, it goes to
that reducer beside our contribution, as far as it fits into the time that has, and is ours no longer once a commit says
whose losses are in the average. Lost is what a reducer owes when it ends (docs/protocol.md). Debt is kept and handed
over in int8, slice by slice, on disk where somebody has a place for it: in memory it would take 1.02 bytes a value.
What int8 loses is below a hundredth of it.

What is handed over is hearsay: it counts when the log names who hands it over as a reducer of these slices, and as far
as it is short: nobody judges where it points. And all that is added to a mean is together no longer than what its
encoding can lose at most. The rest stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from peer.rounds.codec import CODECS, Codec, Float32
from peer.rounds.paxos import Ballot, ballot_of
from peer.rounds.planning import SLICE_VALUES
from peer.rounds.round_actions import HandOver
from swarm.errors import ProtocolError
from swarm.files import Kept
from swarm.proto.round_pb2 import HandedOver, Record

KEPT = CODECS["int8"]
# Attempts of a round whose losses are remembered. Whoever opens more of them makes the oldest forgotten.
MAX_ATTEMPTS = 4
# Reducers of a slice that are remembered, the newest last: of whom else its losses come they are not taken.
MAX_REDUCERS = 8
# Of what an encoding can lose at most, how much others may hand over together: about twice what it usually loses.
SHARE_OF_OTHERS = 0.5

Piece = tuple[slice, Kept]
"""(where in the part, what is owed there)"""


class ReducerDebt:
    def __init__(self) -> None:
        self.me = b""
        """whose debt it is: public key"""
        self.keep: Callable[[bytes], Kept] = lambda data: data
        """where it waits until it is added: in memory, unless somebody has a better place"""
        self._owed: dict[int, Kept] = {}
        """slice -> what is owed to it, encoded"""
        self._lost: dict[tuple[Ballot, int], tuple[bytes, dict[int, Kept]]] = {}
        """(attempt, first slice) -> (digest of the average, what it lost by slice): not committed yet"""
        self._reducers: dict[int, tuple[bytes, ...]] = {}
        """slice -> who may still owe something to it, by the commits that were seen"""

    @property
    def size_bytes(self) -> int:
        """What is kept between rounds."""
        return sum(map(len, self._owed.values()))

    def add_to(self, values: Float32, first_slice: int, share: float = 1.0) -> None:
        """Add a share of what is owed to ``values``, which begin with a slice."""
        _add(values, self._pieces(first_slice, len(values)), share)

    def _pieces(self, first_slice: int, num_values: int) -> list[Piece]:
        return [(place, self._owed[i]) for i, place in _slices(first_slice, num_values) if i in self._owed]

    def owed_bytes(self, first_slice: int, num_slices: int) -> int:
        """What is owed to these slices takes so much to hand over."""
        return sum(len(self._owed[i]) for i in range(first_slice, first_slice + num_slices) if i in self._owed)

    def to_hand_over(self, first_slice: int, num_slices: int) -> HandOver | None:
        """What is owed to these slices, for whoever averages them now."""
        slices = tuple(i for i in range(first_slice, first_slice + num_slices) if i in self._owed)
        return HandOver(slices, self.keep(b"".join(self._owed[i][:] for i in slices))) if slices else None

    def make_good(
        self, mean: Float32, first_slice: int, handed_over: Sequence[tuple[bytes, HandOver]], codec: Codec
    ) -> tuple[list[bytes], float]:
        """Add to ``mean``, in place, what others owe to its slices, and we do, as far as that is not too long.

        Gives whose was taken, and which share of our own is left. ``codec``: of the average; together they are no
        longer than what it loses of the mean at most, so everybody can say how long an average may be.
        """
        room, taken, pieces = codec.largest_loss * _norm([mean]), list[bytes](), list[Piece]()
        lengths: dict[int, float] = {}  # of what is taken of each slice, at most
        for peer, what in handed_over:
            if all(peer in self._reducers.get(index, ()) for index in what.slices):
                theirs = _pieces_of(what, first_slice, len(mean))
                added = {place.start: _norm([_decoded((place, data))]) for place, data in theirs}
                with_theirs = lengths | {start: lengths.get(start, 0.0) + norm for start, norm in added.items()}
                if math.hypot(*with_theirs.values()) <= SHARE_OF_OTHERS * room:
                    lengths = with_theirs
                    pieces += theirs
                    taken.append(peer)
        room -= math.hypot(*lengths.values())
        norm = _norm(map(_decoded, self._pieces(first_slice, len(mean))))
        share = 1.0 if norm <= room else room / norm
        _add(mean, pieces)
        self.add_to(mean, first_slice, share)
        return taken, 1 - share

    def note(self, ballot: Ballot, first_slice: int, digest: bytes, lost: Float32) -> None:
        """An average was made under ``ballot`` and encoded to bytes of ``digest``, which ``lost`` so much."""
        by_slice = {index: self.keep(KEPT.encode(lost[place])) for index, place in _slices(first_slice, len(lost))}
        self._lost[ballot, first_slice] = digest, by_slice
        newest = sorted({attempt for attempt, _ in self._lost})[-MAX_ATTEMPTS:]
        self._lost = {key: value for key, value in self._lost.items() if key[0] in newest}

    def settle(self, record: Record) -> None:
        """Book what the averages that ``record`` holds lost, ours or taken over; the round is over for the others."""
        lost, self._lost = self._lost, {}
        for part in record.parts:
            if not part.digest:
                continue
            digest, by_slice = lost.get((ballot_of(record.opened_by), part.first_slice), (b"", {}))
            slices = range(part.first_slice, part.first_slice + part.num_slices)
            if part.digest == digest:
                self._owed.update(by_slice)
            elif self.me in (part.reducer, *part.handed_over_by):  # ours of a forgotten attempt: it is in there too
                for index in slices:
                    self._owed.pop(index, None)
            self._note_reducer(slices, part.reducer, {part.reducer, *part.handed_over_by})

    def _note_reducer(self, slices: range, reducer: bytes, done: set[bytes]) -> None:
        known: dict[tuple[bytes, ...], tuple[bytes, ...]] = {}  # one for all slices that are alike
        for index in slices:
            before = self._reducers.get(index, ())
            if before not in known:
                known[before] = (*(key for key in before if key not in done), reducer)[-MAX_REDUCERS:]
            self._reducers[index] = known[before]


def check_handed_over(first_slice: int, num_values: int, message: HandedOver) -> None:
    """Raise `ProtocolError` unless ``message`` holds values of slices of the part, as their keeper encodes them."""
    places = dict(_slices(first_slice, num_values))
    slices = message.slices[: len(places) + 1]
    if list(slices) != sorted(set(slices) & set(places)):
        raise ProtocolError("what is handed over is not of slices of this part, in order")
    counts = [places[index].stop - places[index].start for index in slices]
    sizes = [KEPT.encoded_size(count) for count in counts]
    if sum(sizes) != len(message.encoded):
        raise ProtocolError(f"{len(message.encoded)} bytes are handed over instead of {sum(sizes)}")
    encoded, at = memoryview(message.encoded), 0
    for count, size in zip(counts, sizes, strict=True):
        KEPT.check(encoded[at : at + size], count)
        at += size


def _pieces_of(handed_over: HandOver, first_slice: int, num_values: int) -> list[Piece]:
    pieces, places, at = list[Piece](), dict(_slices(first_slice, num_values)), 0
    for index in handed_over.slices:
        place = places[index]
        size = KEPT.encoded_size(place.stop - place.start)
        pieces.append((place, handed_over.encoded[at : at + size]))
        at += size
    return pieces


def _decoded(piece: Piece) -> Float32:
    place, encoded = piece
    return KEPT.decode(encoded[:], place.stop - place.start)


def _add(values: Float32, pieces: Iterable[Piece], share: float = 1.0) -> None:
    with np.errstate(over="ignore"):  # the encoder refuses the result, as it does any infinity
        for piece in pieces:
            values[piece[0]] += _decoded(piece) * np.float32(share)


def _norm(vectors: Iterable[Float32]) -> float:
    with np.errstate(over="ignore"):  # as above
        return math.sqrt(sum(float(np.dot(vector, vector)) for vector in vectors))


def _slices(first_slice: int, num_values: int) -> list[tuple[int, slice]]:
    """(number of a slice, its place in a vector that begins with ``first_slice``)."""
    starts = range(0, num_values, SLICE_VALUES)
    return [(first_slice + i, slice(at, min(at + SLICE_VALUES, num_values))) for i, at in enumerate(starts)]
