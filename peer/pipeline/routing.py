"""Routing: which replica of the next span gets a microbatch, and how long its answer is waited for.

Pure: time and chance are arguments. Decides from what was measured here: a replica gets microbatches in proportion to
the rate at which it answers, at random, so that replicas mix; one that failed or was late is avoided for a while, twice
as long each time (what fails meanwhile is the same failure), and tried again; one that is busy gets none for about half
a microbatch's time. Leaves who there is to the directory, and calls to `peer.pipeline.onward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of the estimate before, at each answer.
KEPT = 0.8
FIRST_AVOID_S = 1.0
# One that was started again is back at work after this at the latest; asking a dead one costs a failed dial.
MAX_AVOID_S = 15.0
MIN_BUSY_S = 0.02
MAX_BUSY_S = 2.0
# An answer is late after so many times what was expected and its usual deviation. A peer that dies closes its
# connections, so lateness finds only those that hang, while whoever is left for another has computed for nothing: at a
# factor of 2, four simulated spans of two replicas trained a tenth less.
LATE_DEVIATIONS = 4.0
LATE_FACTOR = 4.0
MIN_PATIENCE_S = 1.0
# Of the time there is, for a replica of which nothing is known while there are others. Shares multiply over the hops
# of a pipeline: at a half the seventh hop had a hundredth of the time, and deep pipelines never began.
UNKNOWN_SHARE = 0.9


@dataclass(slots=True)
class _Measured:
    """One replica as seen from here."""

    expected_s: float | None = None
    """from request to answer; None: it has not answered yet"""
    deviation_s: float = 0.0
    failures: int = 0
    """in a row"""
    failed_until_s: float = 0.0
    """what fails until then adds nothing"""
    avoided_until_s: float = 0.0


class Routes:
    """The replicas of one span. Times are of any clock that goes on evenly."""

    def __init__(self) -> None:
        self._replicas: dict[bytes, _Measured] = {}

    def know(self, peers: Iterable[bytes]) -> None:
        """Who hosts the span now; what was measured of the others is forgotten."""
        self._replicas = {peer: self._replicas.get(peer) or _Measured() for peer in sorted(peers)}

    def choose(self, now_s: float, draw: float) -> bytes | None:
        """A replica that is not avoided, by the share of its rate; ``draw`` from [0, 1). None: there is none."""
        weights = {
            peer: 1 / self._expected_s(peer) for peer, it in self._replicas.items() if it.avoided_until_s <= now_s
        }
        left = draw * sum(weights.values())
        for peer, weight in weights.items():
            left -= weight
            if left < 0:
                return peer
        return next(reversed(weights), None)

    def next_chance_s(self) -> float | None:
        """When the first of those that are avoided may be tried again; None where nobody hosts the span."""
        return min((it.avoided_until_s for it in self._replicas.values()), default=None)

    def patience_s(self, peer: bytes, left_s: float, now_s: float) -> float:
        """How long to wait for ``peer``: all the time that is left where no other can be asked before it is late."""
        measured = self._replicas.get(peer)
        if measured is None:
            return left_s
        if measured.expected_s is None:
            late_s = UNKNOWN_SHARE * left_s
        else:
            late_s = LATE_FACTOR * measured.expected_s + LATE_DEVIATIONS * measured.deviation_s
        late_s = min(left_s, max(MIN_PATIENCE_S, late_s))
        others = [p for p, it in self._replicas.items() if p != peer and it.avoided_until_s <= now_s + late_s]
        return late_s if others else left_s

    def answered(self, peer: bytes, elapsed_s: float) -> None:
        measured = self._replicas.get(peer)
        if measured is not None:
            self._learn(measured, elapsed_s)
            measured.failures, measured.failed_until_s, measured.avoided_until_s = 0, 0.0, 0.0

    def busy(self, peer: bytes, now_s: float) -> None:
        """It lives, and has no room now."""
        if peer in self._replicas:
            pause_s = min(max(self._expected_s(peer) / 2, MIN_BUSY_S), MAX_BUSY_S)
            self._replicas[peer].avoided_until_s = now_s + pause_s

    def failed(self, peer: bytes, now_s: float, waited_s: float = 0.0) -> None:
        """It did not answer, or not with what was wanted. ``waited_s``: where it was late."""
        measured = self._replicas.get(peer)
        if measured is None:
            return
        if measured.expected_s is not None and waited_s > measured.expected_s:
            self._learn(measured, waited_s)
        if now_s < measured.failed_until_s:
            # One that dies fails all that it was asked for, and that is one failure. But one that was busy in between
            # may be asked by now, and would be again at once.
            measured.avoided_until_s = max(measured.avoided_until_s, measured.failed_until_s)
            return
        measured.failures += 1
        avoid_s = min(MAX_AVOID_S, FIRST_AVOID_S * 2.0 ** min(measured.failures - 1, 10))
        measured.avoided_until_s = measured.failed_until_s = now_s + avoid_s

    def _expected_s(self, peer: bytes) -> float:
        """A replica that nothing is known of counts as the quickest: it is tried soon, and measured."""
        known = [it.expected_s for it in self._replicas.values() if it.expected_s is not None]
        own = self._replicas[peer].expected_s
        return max(1e-6, own if own is not None else min(known, default=1.0))

    @staticmethod
    def _learn(measured: _Measured, elapsed_s: float) -> None:
        if measured.expected_s is None:
            measured.expected_s, measured.deviation_s = elapsed_s, elapsed_s / 2
            return
        error_s = elapsed_s - measured.expected_s
        measured.expected_s += (1 - KEPT) * error_s
        measured.deviation_s += (1 - KEPT) * (abs(error_s) - measured.deviation_s)
