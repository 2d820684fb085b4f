"""The ladder of a run's contribution codecs: how thin a member encodes so that its upload takes its share of a round.

Decides the rung, and what else goes with the contribution within that time. Pure: uplinks and times are arguments.
Leaves the ladder itself to the run spec, how fast an uplink is to whoever measures it, and what a rung leaves owed to
`peer.rounds.shard`.

Equal time, not equal bytes: the slower an uplink, the thinner what it carries. What a rung leaves out is owed and comes
later, so a thin rung costs time and not movement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peer.rounds.codec import CODECS

# A commit lands within a quarter of a round of its snapshot; contributions have half of that, averages the other half.
UPLOAD_SHARE = 1 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplink:
    """What a member's upload of one contribution meets."""

    upload_bps: int | None
    """bits per second; None: not known"""
    num_values: int
    num_members: int
    """of the opened round, ourselves included"""
    round_s: float | None
    """seconds that a round takes; None: no round has been seen from its beginning"""
    timeout_s: float
    """after that reducers wait no longer"""

    @property
    def budget_s(self) -> float:
        """Seconds that the upload may take."""
        return self.timeout_s if self.round_s is None else min(self.timeout_s, UPLOAD_SHARE * self.round_s)

    def upload_s(self, codec: str) -> float:
        """Seconds that it takes. Every member averages a part, and what it averages itself does not travel."""
        sent_bytes = CODECS[codec].encoded_size(self.num_values) * (self.num_members - 1) / self.num_members
        return self._takes_s(sent_bytes)

    def fit_beside(self, codec: str, sizes_bytes: Sequence[int], turn: int) -> frozenset[int]:
        """Which of several things may be sent beside the contribution in ``codec`` ("": there is none) in its time.

        Beginning with another one each ``turn``, so that each has its own.
        """
        left_s = self.budget_s - (self.upload_s(codec) if codec else 0.0)
        chosen = set[int]()
        for index in ((turn + offset) % len(sizes_bytes) for offset in range(len(sizes_bytes))):
            took_s = self._takes_s(sizes_bytes[index])
            if took_s <= left_s:
                left_s -= took_s
                chosen.add(index)
        return frozenset(chosen)

    def _takes_s(self, sent_bytes: float) -> float:
        if self.upload_bps is None or not sent_bytes:
            return 0.0
        return 8 * sent_bytes / self.upload_bps if self.upload_bps > 0 else float("inf")


def choose_rung(ladder: Sequence[str], uplink: Uplink) -> tuple[str, str]:
    """(codec, why): the densest rung of ``ladder`` (densest first) that fits, else the thinnest."""
    for codec in ladder:
        took_s = uplink.upload_s(codec)
        if took_s <= uplink.budget_s:
            return codec, f"{codec} takes {took_s:.1f} s of {uplink.budget_s:.1f} s"
    thinnest = ladder[-1]
    return thinnest, f"even {thinnest} takes {uplink.upload_s(thinnest):.1f} s of {uplink.budget_s:.1f} s"
