"""What the coordinator remembers of publication: checkpoints, attestations, incidents. Part of `coordinator.store`.

Every method is one transaction; the judgement about what is written is the callers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from coordinator.tables import (
    attestations,
    checkpoints,
    evaluations,
    incidents,
    introductions,
    online_metadata,
    peers,
    run_records,
)
from swarm.errors import ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """A published checkpoint; ``signed_manifest`` and ``signed_witnesses`` are serialised Signed."""

    round: int
    total_tokens: int
    size_bytes: int
    manifest_digest: bytes
    published_unix_ms: int
    signed_manifest: bytes
    signed_witnesses: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestationRow:
    """What a replica signed about a round; ``digest``: SHA-256 of the payload, ``signed``: serialised Signed."""

    round: int
    peer_key: bytes
    digest: bytes
    signed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """What somebody measured on a round's checkpoint; ``digest``: SHA-256 of the payload, ``signed``: serialised
    Signed, ``credited``: the signer is an organizer, a seed peer or a contributor."""

    round: int
    signer: bytes
    digest: bytes
    credited: bool
    told_unix_ms: int
    signed: bytes


@dataclass(frozen=True, slots=True)
class Room:
    """At most so many evaluations, of so many bytes together."""

    number: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What is kept of one checkpoint's evaluations: in all, of people without credit, of one person."""

    total: Room
    of_strangers: Room
    of_signer: Room


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentRow:
    """An incident under its name; ``attestations``: a serialised `Incident` with these alone."""

    name: str
    told_unix_ms: int
    text: str
    attestations: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """What a peer said of itself when it was admitted; no ``name``: it wants not to be named."""

    name: str
    agent: str


class Published:
    def __init__(self, transaction: Callable[[], AbstractContextManager[sa.Connection]]) -> None:
        self._transaction = transaction

    def add_checkpoint(self, row: CheckpointRow, online: Mapping[str, bytes]) -> None:
        """Publish a checkpoint with the metadata that names it; `VerificationError` where its round has one."""
        with self._transaction() as connection:
            connection.execute(checkpoints.insert().values(asdict(row)))
            _set_metadata(connection, online)

    def replace_checkpoints(self, rows: Sequence[CheckpointRow], online: Mapping[str, bytes]) -> None:
        """All checkpoints and the metadata anew: another key signs them."""
        with self._transaction() as connection:
            connection.execute(checkpoints.delete())
            for row in rows:
                connection.execute(checkpoints.insert().values(asdict(row)))
            _set_metadata(connection, online)

    def set_metadata(self, online: Mapping[str, bytes]) -> None:
        """Replace TUF files, by role."""
        with self._transaction() as connection:
            _set_metadata(connection, online)

    def metadata(self) -> dict[str, bytes]:
        """TUF files by role; none before the first start."""
        with self._transaction() as connection:
            return {row.role: row.content for row in connection.execute(sa.select(online_metadata))}

    def checkpoint(self, round_number: int) -> CheckpointRow | None:
        query = sa.select(checkpoints).where(checkpoints.c.round == round_number)
        with self._transaction() as connection:
            row = connection.execute(query).first()
        return CheckpointRow(**row._mapping) if row else None

    def newest_checkpoints(self, limit: int) -> list[CheckpointRow]:
        """Newest first."""
        query = sa.select(checkpoints).order_by(checkpoints.c.round.desc()).limit(limit)
        with self._transaction() as connection:
            return [CheckpointRow(**row._mapping) for row in connection.execute(query)]

    def introduce(self, peer_key: bytes, told: Introduction) -> None:
        """Write down what a peer says of itself now; peers that were forgotten are forgotten here, too."""
        forgotten = introductions.c.peer_key.not_in(sa.select(peers.c.key))
        with self._transaction() as connection:
            connection.execute(introductions.delete().where((introductions.c.peer_key == peer_key) | forgotten))
            connection.execute(introductions.insert().values(peer_key=peer_key, name=told.name, agent=told.agent))

    def introductions(self) -> dict[bytes, Introduction]:
        """By the peers' keys."""
        with self._transaction() as connection:
            rows = connection.execute(sa.select(introductions))
            return {row.peer_key: Introduction(name=row.name, agent=row.agent) for row in rows}

    def add_run_record(self, round_number: int, content: bytes) -> None:
        """Keep the record of a checkpoint; `VerificationError` where its round has one."""
        with self._transaction() as connection:
            connection.execute(run_records.insert().values(round=round_number, content=content))

    def run_record(self, round_number: int) -> bytes | None:
        query = sa.select(run_records.c.content).where(run_records.c.round == round_number)
        with self._transaction() as connection:
            found: bytes | None = connection.execute(query).scalar()
        return found

    def add_attestation(self, row: AttestationRow, most_per_peer: int) -> None:
        """Write down what a replica signed; what it said before changes nothing, nor does more than it may say."""
        columns = attestations.c
        mine = (columns.round == row.round, columns.peer_key == row.peer_key)
        with self._transaction() as connection:
            known = connection.execute(sa.select(columns.digest).where(*mine)).scalars().all()
            if row.digest not in known and len(known) < most_per_peer:
                connection.execute(attestations.insert().values(asdict(row)))

    def attestations(self, round_number: int, limit: int) -> list[AttestationRow]:
        columns = attestations.c
        query = sa.select(attestations).where(columns.round == round_number)
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(columns.peer_key, columns.digest).limit(limit))
            return [AttestationRow(**row._mapping) for row in rows]

    def add_evaluation(self, row: EvaluationRow, rooms: Rooms) -> None:
        """Keep what was measured; what was told before changes nothing. `ResourceError` where there is no room."""
        columns = evaluations.c
        is_known = (columns.round == row.round, columns.signer == row.signer, columns.digest == row.digest)
        with self._transaction() as connection:
            if connection.execute(sa.select(columns.digest).where(*is_known)).first() is not None:
                return
            if not _has_room(connection, row, rooms.of_signer, columns.signer == row.signer):
                raise ResourceError(f"you told as many evaluations of round {row.round} as are kept of one person")
            strangers = columns.credited.is_(False)
            if not _has_room(connection, row, rooms.total) or not (
                row.credited or _has_room(connection, row, rooms.of_strangers, strangers)
            ):
                raise ResourceError(f"round {row.round} has as many evaluations as are kept", "publish it elsewhere")
            connection.execute(evaluations.insert().values(asdict(row)))

    def evaluations(self, round_number: int, room: Room) -> list[EvaluationRow]:
        """Of one checkpoint, in the order in which they were told. Where there are more than ``room``, as many as fit:
        first those with credit."""
        columns = evaluations.c
        in_turn = (columns.told_unix_ms, columns.digest, columns.signer)
        so_far = sa.func.sum(sa.func.length(columns.signed)).over(
            order_by=(columns.credited.desc(), *in_turn), rows=(None, 0)
        )
        keys = (columns.round, columns.signer, columns.digest)
        sizes = sa.select(*keys, so_far.label("so_far")).where(columns.round == round_number).subquery()
        fits = sa.and_(*(sizes.c[key.name] == key for key in keys), sizes.c.so_far <= room.size_bytes)
        query = sa.select(evaluations).join(sizes, fits).order_by(columns.credited.desc(), *in_turn).limit(room.number)
        with self._transaction() as connection:
            rows = [EvaluationRow(**row._mapping) for row in connection.execute(query)]
        return sorted(rows, key=lambda row: (row.told_unix_ms, row.digest, row.signer))

    def evaluated_rounds(self, limit: int) -> dict[int, int]:
        """How many evaluations each checkpoint has, those without any left out; the newest ones, newest first."""
        column = evaluations.c.round
        query = sa.select(column, sa.func.count()).group_by(column).order_by(column.desc()).limit(limit)
        with self._transaction() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def tell_incident(self, row: IncidentRow, most: int) -> None:
        """Write down an incident in place of an earlier one of this name, and keep the newest ``most``."""
        with self._transaction() as connection:
            connection.execute(incidents.delete().where(incidents.c.name == row.name))
            connection.execute(incidents.insert().values(asdict(row)))
            newest_first = sa.select(incidents.c.name).order_by(incidents.c.told_unix_ms.desc(), incidents.c.name)
            for name in connection.execute(newest_first.offset(most)).scalars().all():
                connection.execute(incidents.delete().where(incidents.c.name == name))

    def newest_incidents(self, limit: int) -> list[IncidentRow]:
        """Newest first."""
        query = sa.select(incidents).order_by(incidents.c.told_unix_ms.desc(), incidents.c.name).limit(limit)
        with self._transaction() as connection:
            return [IncidentRow(**row._mapping) for row in connection.execute(query)]


def _has_room(connection: sa.Connection, row: EvaluationRow, room: Room, *of: sa.ColumnElement[bool]) -> bool:
    """Whether ``row`` fits beside what is kept of its round, or of that what fulfils ``of``."""
    kept = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(sa.func.length(evaluations.c.signed)), 0))
    number, size_bytes = connection.execute(kept.where(evaluations.c.round == row.round, *of)).one()
    return bool(number < room.number and size_bytes + len(row.signed) <= room.size_bytes)


def _set_metadata(connection: sa.Connection, online: Mapping[str, bytes]) -> None:
    connection.execute(online_metadata.delete())
    for role, content in online.items():
        connection.execute(online_metadata.insert().values(role=role, content=content))
