"""Auditing a checkpoint: the signed log re-applied from an earlier state, and compared bit for bit.

Decides what an audit finds: equality, the first round whose result is not what the log says, or the range of rounds
that the archive lacks. All arithmetic is `peer.rounds.shard`'s, as it was when the run trained. Leaves the files to
`peer.rounds.archive`, and signatures and weights of the checkpoints to `peer.checkpoints.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peer.checkpoints.anchor import read_anchor
from peer.checkpoints.verify import Provenance, open_regular
from peer.rounds.archive import SHARD, Archive
from peer.rounds.shard import Shard, StateBuffers, load_state
from swarm.errors import DigestError, NotFound, VerificationError
from swarm.log import LogHead
from swarm.proto.round_pb2 import Record

OnRound = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """``equal_to``: the last round whose state was found as signed. ``differs_at``: the first one whose result is not
    what the log or the checkpoint names. ``missing``: first and last round of what the archive lacks."""

    outcome: Literal["equal", "differs", "missing"]
    from_round: int
    to_round: int
    equal_to: int
    differs_at: int | None = None
    missing: tuple[int, int] | None = None

    def require_equal(self) -> None:
        """Raise `VerificationError` where a round differs, `NotFound` where rounds are missing."""
        if self.differs_at is not None:
            raise VerificationError(
                f"round {self.differs_at} differs: its result is not what the signed log makes of round"
                f" {self.differs_at - 1}",
                "do not use this checkpoint, and show this to the run's organizers and witnesses",
            )
        if self.missing is not None:
            raise NotFound(
                f"the archive lacks rounds {self.missing[0]} to {self.missing[1]}; up to round {self.equal_to} all is"
                " equal",
                "bring the missing log or averages from another seed peer",
            )


def audit(
    archive: Archive, later: Provenance, earlier: tuple[Path, Provenance] | None, on_round: OnRound = lambda _: None
) -> AuditReport:
    """Re-apply the log from ``earlier`` (a verified checkpoint folder; None: the genesis) to the checkpoint ``later``.

    Raises `VerificationError` where the archive's log is another than the checkpoints', or proves nothing, and
    `NotFound` where there is nothing to start from.
    """
    first = earlier[1].manifest.round if earlier is not None else 0
    last = later.manifest.round
    if not first < last:
        raise VerificationError(f"round {first} is not before round {last}", "name the earlier checkpoint with --from")
    shard = archive.first_state() if earlier is None else _state_of(archive, *earlier)
    replay = _Replay(shard, first, last)
    for record, head in archive.commits():
        if head.round == first and earlier is not None:
            _check_log(head, earlier[1])
        if first < head.round <= last:
            on_round(head.round)
            replay.take(archive, record)
        if head.round == last:
            _check_log(head, later)
            return replay.report(bytes.fromhex(later.manifest.state_digest))
    return replay.report(None)


class _Replay:
    """Where the re-applied state stands, and what was found on the way."""

    def __init__(self, shard: Shard, first: int, last: int) -> None:
        self._shard, self._first, self._last = shard, first, last
        self._applied = self._equal_to = first
        self._seen = first
        self._differs_at: int | None = None
        self._gap: list[int] = []
        self._gap_is_over = False

    def take(self, archive: Archive, record: Record) -> None:
        self._seen = record.round
        if self._differs_at is not None or self._gap_is_over:
            return
        parts = archive.parts_of(record)
        if parts is None:
            self._gap.append(record.round)
        elif self._gap:
            self._gap_is_over = True  # nothing after a gap can be re-applied
        elif record.state_digest != self._shard.state_digest:
            self._differs_at = self._applied
        else:
            self._equal_to = self._applied
            self._shard.apply(record, parts)
            self._applied = record.round

    def report(self, state_digest: bytes | None) -> AuditReport:
        """``state_digest``: of the later checkpoint; None where the log ends before it."""
        differs_at, gap = self._differs_at, (self._gap[0], self._gap[-1]) if self._gap else None
        if differs_at is None and state_digest is None and not self._gap_is_over:
            gap = (self._gap[0] if self._gap else self._seen + 1, self._last)
        if differs_at is None and gap is None:
            if self._shard.state_digest == state_digest:
                self._equal_to = self._last
            else:
                differs_at = self._last
        return AuditReport(
            outcome="differs" if differs_at is not None else "missing" if gap is not None else "equal",
            from_round=self._first,
            to_round=self._last,
            equal_to=self._equal_to,
            differs_at=differs_at,
            missing=None if differs_at is not None else gap,
        )


def _state_of(archive: Archive, folder: Path, provenance: Provenance) -> Shard:
    """The state after an earlier checkpoint: its weights, and the momentum that the archive kept."""
    manifest = provenance.manifest
    buffers = StateBuffers(archive.num_values)
    anchor, momentum = buffers.views
    read_anchor(folder, manifest, open_regular, anchor)
    archive.read_momentum(manifest.round, momentum)
    try:
        return load_state(provenance.spec, SHARD, buffers, bytes.fromhex(manifest.state_digest))
    except DigestError as error:
        raise DigestError(f"the archive's momentum after round {manifest.round} is not that of the state") from error


def _check_log(head: LogHead, provenance: Provenance) -> None:
    if head.log_digest.hex() != provenance.manifest.log_digest:
        raise VerificationError(
            f"round {head.round}: the archive's log is not the one that the checkpoint names",
            "it may be of another branch: look for incidents, and use the archive of another seed peer",
        )
