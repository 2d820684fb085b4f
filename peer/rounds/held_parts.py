"""The bytes of a record's parts, as a round gathers them: which are here, and when the others are asked for.

Decides when an average that is wanted is fetched, and when it is waited for, as its reducer sends it to everybody.
Leaves to `peer.rounds.round` what they are wanted for. Pure: a `Fetch` is an action of the machine's.
"""

from __future__ import annotations

import math

from peer.rounds.attempt import Attempt
from peer.rounds.paxos import ballot_of
from peer.rounds.round_actions import Fetch, Outbox, RoundSettings
from swarm.files import Kept
from swarm.proto.round_pb2 import Record

UNDER_WAY = math.inf
LEAST_PATIENCE_S = 0.2
PATIENCE = 0.25
"""of the time since the round was opened: so much later than the leader's may an average of a living reducer come"""


class HeldParts:
    def __init__(self, settings: RoundSettings) -> None:
        self.settings = settings
        self.by_digest: dict[bytes, Kept] = {}
        self._fetching: dict[bytes, float] = {}
        """digest -> when to ask (again); `UNDER_WAY` while it is asked for"""
        self._missing_since: dict[bytes, float] = {}
        self._wanted: set[bytes] = set()

    def keep(self, digest: bytes, data: bytes) -> None:
        if digest not in self.by_digest:
            self.by_digest[digest] = self.settings.keep(data)

    def drop_all_but(self, record: Record | None) -> None:
        """Averages of the attempt before would pile up; a record that names them tells who has them on disk."""
        named = {part.digest for part in record.parts} if record is not None else set()
        self.by_digest = {digest: kept for digest, kept in self.by_digest.items() if digest in named}

    def ask_anew(self) -> None:
        """For another record: what is under way ends by itself."""
        self._fetching = {key: at for key, at in self._fetching.items() if at == UNDER_WAY}

    def on_fetched(self, digest: bytes, data: bytes | None, now: float) -> None:
        """The answer to a `Fetch`; None is tried again later."""
        self._fetching.pop(digest, None)
        if digest in self._wanted and data is not None:
            self.keep(digest, data)
        elif digest in self._wanted:
            self._fetching[digest] = now + self.settings.resend_s

    def wakeups(self) -> list[float]:
        return [at for key, at in self._fetching.items() if at < UNDER_WAY and key in self._wanted]

    def of(self, record: Record) -> dict[bytes, Kept]:
        """The bytes of every present part; all must be here."""
        return {part.digest: self.by_digest[part.digest] for part in record.parts if part.digest}

    def are_complete(
        self, record: Record, holders: tuple[bytes, ...], attempt: Attempt | None, now: float, out: Outbox
    ) -> bool:
        """Ask for the parts of ``record`` that are not here; True when all are."""
        complete = True
        self._wanted = set()
        for index, part in enumerate(record.parts):
            if not part.digest or part.digest in self.by_digest:
                continue
            complete = False
            self._wanted.add(part.digest)
            ask_at = self._fetching.setdefault(part.digest, self._expected_until(record, index, attempt, now))
            if ask_at > now:
                continue
            self._fetching[part.digest] = UNDER_WAY
            others = tuple(dict.fromkeys(holder for holder in holders if holder != self.settings.me))
            out.actions.append(Fetch(part.digest, part.size_bytes, others))
        return complete

    def _expected_until(self, record: Record, index: int, attempt: Attempt | None, now: float) -> float:
        """Until when a part is not asked for, as its reducer sends it to everybody, and just to the leader sooner."""
        if attempt is None or attempt.ballot != ballot_of(record.opened_by) or index >= len(attempt.open.parts):
            return now
        if attempt.reducer_of(index) in attempt.unreachable:
            return now
        since = self._missing_since.setdefault(record.parts[index].digest, now)
        return since + max(LEAST_PATIENCE_S, PATIENCE * (since - attempt.opened_at))
