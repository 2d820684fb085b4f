"""Auditing a checkpoint: the signed log re-applied from an earlier state, and compared bit for bit.

Decides what an audit finds: equality, the first round whose result is not what the log says, or the range of rounds
that the archive lacks. All arithmetic is `peer.rounds.shard`'s, as it was when the run trained. Leaves the files to
`peer.rounds.archive`, and signatures and weights of the checkpoints to `peer.checkpoints.verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from peer.checkpoints.anchor import read_anchor
from peer.checkpoints.verify import Provenance, open_regular
from peer.rounds.archive import Archive, ShardArchive
from peer.rounds.codec import Float32
from peer.rounds.shard import Shard, StateBuffers, load_state, state_bytes
from peer.training.layout import slices_of
from swarm.errors import DataError, DigestError, NotFound, VerificationError
from swarm.log import LogHead
from swarm.manifest import CheckpointManifest
from swarm.proto.round_pb2 import Record

OnRound = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """``equal_to``: the last round whose state was found as signed, in every shard. ``differs_at``: the first one whose
    result is not what the log or the checkpoint names. ``missing``: first and last round of what the archive lacks.
    ``shard``: where that was found."""

    outcome: Literal["equal", "differs", "missing"]
    from_round: int
    to_round: int
    equal_to: int
    differs_at: int | None = None
    missing: tuple[int, int] | None = None
    shard: int = 0
    num_shards: int = 1

    @property
    def where(self) -> str:
        return f" of shard {self.shard}" if self.num_shards > 1 else ""

    def require_equal(self) -> None:
        """Raise `VerificationError` where a round differs, `NotFound` where rounds are missing."""
        if self.differs_at is not None:
            raise VerificationError(
                f"round {self.differs_at}{self.where} differs: its result is not what the signed log makes of round"
                f" {self.differs_at - 1}",
                "do not use this checkpoint, and show this to the run's organizers and witnesses",
            )
        if self.missing is not None:
            raise NotFound(
                f"the archive lacks rounds {self.missing[0]} to {self.missing[1]}{self.where}; up to round"
                f" {self.equal_to} all is equal",
                "bring the missing log or averages from another seed peer",
            )


def audit(
    archive: Archive, later: Provenance, earlier: tuple[Path, Provenance] | None, on_round: OnRound = lambda _: None
) -> AuditReport:
    """Re-apply the log of every shard from ``earlier`` (a verified checkpoint folder; None: the genesis) to ``later``.

    ``on_round`` hears of each round of each shard. Raises `VerificationError` where the archive's log is another than
    the checkpoints', or proves nothing, and `NotFound` where there is nothing to start from.
    """
    first = earlier[1].manifest.round if earlier is not None else 0
    last = later.manifest.round
    if not first < last:
        raise VerificationError(f"round {first} is not before round {last}", "name the earlier checkpoint with --from")
    if len(later.manifest.states) != later.spec.num_shards:
        raise VerificationError("the checkpoint has other shards than its run", "tell the run's organizers")
    anchor = None if earlier is None else _anchor_of(*earlier)
    reports = [
        _audit_shard(archive.shard(number), _Ends(later=later, earlier=earlier and earlier[1], anchor=anchor), on_round)
        for number in range(later.spec.num_shards)
    ]
    return gravest(reports)


def gravest(reports: Sequence[AuditReport]) -> AuditReport:
    """One report for all shards: the earliest difference, else the earliest gap; equal as far as every shard is."""
    equal_to = min(report.equal_to for report in reports)
    worst = min(
        reports,
        key=lambda report: (
            report.differs_at is None,
            report.differs_at or 0,
            report.missing is None,
            report.missing or (0, 0),
        ),
    )
    return replace(worst, equal_to=equal_to, num_shards=len(reports))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ends:
    """Between what an audit goes; ``anchor``: of the whole model at the earlier checkpoint."""

    later: Provenance
    earlier: Provenance | None
    anchor: Float32 | None


def _audit_shard(archive: ShardArchive, ends: _Ends, on_round: OnRound) -> AuditReport:
    last, earlier = ends.later.manifest.round, ends.earlier
    first = earlier.manifest.round if earlier is not None else 0
    shard = archive.first_state() if earlier is None else _state_of(archive, earlier.manifest, ends.anchor)
    replay = _Replay(shard, first, last)
    for record, head in archive.commits():
        if head.round == first and earlier is not None:
            _check_log(head, earlier.manifest)
        if first < head.round <= last:
            on_round(head.round)
            replay.take(archive, record)
        if head.round == last:
            _check_log(head, ends.later.manifest)
            return replay.report(bytes.fromhex(ends.later.manifest.states[archive.number].state_digest))
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

    def take(self, archive: ShardArchive, record: Record) -> None:
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
            shard=self._shard.index,
        )


def _anchor_of(folder: Path, provenance: Provenance) -> Float32:
    anchor = np.empty(provenance.manifest.anchor.num_values, "<f4")
    read_anchor(folder, provenance.manifest, open_regular, state_bytes(anchor))
    return anchor


def _state_of(archive: ShardArchive, manifest: CheckpointManifest, whole: Float32 | None) -> Shard:
    """A shard's state after an earlier checkpoint: its weights, and the momentum that the archive kept."""
    place = slices_of([state.num_values for state in manifest.states])[archive.number]
    buffers = StateBuffers(archive.num_values)
    if whole is None or len(buffers.anchor) != place.stop - place.start:
        raise DataError("the earlier checkpoint holds a model of another size than the run's")
    buffers.anchor[:] = whole[place]
    archive.read_momentum(manifest.round, buffers.views[1])
    expected = bytes.fromhex(manifest.states[archive.number].state_digest)
    try:
        return load_state(archive.spec, archive.number, buffers, expected)
    except DigestError as error:
        raise DigestError(f"the archive's momentum after round {manifest.round} is not that of the state") from error


def _check_log(head: LogHead, manifest: CheckpointManifest) -> None:
    if head.log_digest.hex() != manifest.states[head.shard].log_digest:
        raise VerificationError(
            f"round {head.round}: the archive's log is not the one that the checkpoint names",
            "it may be of another branch: look for incidents, and use the archive of another seed peer",
        )
