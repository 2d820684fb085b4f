"""What the coordinator remembers, in any database that SQLAlchemy speaks to. The door to sqlalchemy and alembic.

Peers and the log are here, what is published is in `coordinator.published`.

Decides when something is durable: every method that writes is one transaction, on disk when the method returns.
Leaves all judgement about what is written to its callers. Methods block; one thread at a time may write, and the
caller sees to that (`coordinator.service`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from coordinator.published import Published
from coordinator.tables import commits, contributions, peers, reports, run, seed_addresses
from swarm.errors import ConfigError, DiskFull, ResourceError, VerificationError

MIGRATIONS = Path(__file__).parent / "migrations"
MAX_REPORTS_PER_PEER = 1000
_BUSY_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """A peer, as admitted and as it last reported (zeros and empty digests until it did)."""

    key: bytes
    first_seen_unix_ms: int
    last_seen_unix_ms: int
    admitted_until_unix_ms: int = 0
    tokens: int = 0
    reported_unix_ms: int = 0
    round: int = 0
    state_digest: bytes = b""
    log_digest: bytes = b""
    tokens_per_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    device: str = ""
    leaving: bool = False
    first_shard: int = 0
    num_shards: int = 0
    service_tokens_per_s: float = 0.0
    shard_tokens_per_s: Sequence[float] = ()

    def span(self, num_shards: int) -> range:
        """The shards that it hosts, in a run of ``num_shards``."""
        return range(self.first_shard, self.first_shard + self.num_shards if self.num_shards else num_shards)

    def trains(self, shard: int) -> bool:
        """Whether it told how fast it trains ``shard``."""
        return 0 <= shard - self.first_shard < len(self.shard_tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """What a peer reports about itself. ``train_loss``, ``validation_loss``: nats per token, None where unknown."""

    reported_unix_ms: int
    round: int
    state_digest: bytes
    log_digest: bytes
    tokens_per_s: float
    bytes_sent: int
    bytes_received: int
    device: str
    leaving: bool
    train_loss: float | None
    validation_loss: float | None
    first_shard: int = 0
    num_shards: int = 0
    """of its span; 0: all from the first one on"""
    service_tokens_per_s: float = 0.0
    shard_tokens_per_s: Sequence[float] = ()
    """by each shard of its span, in order; none where it does not train"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """A recorded round. ``state_digest``: that it started from; ``log_digest``: of the log after it."""

    shard: int
    round: int
    record_digest: bytes
    state_digest: bytes
    log_digest: bytes
    total_tokens: int
    absent_parts: int
    recorded_unix_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCommit:
    """A round to record: its row, the serialised Commit, and the tokens that it credits each peer with."""

    row: RoundRow
    commit: bytes
    tokens: Mapping[bytes, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of one round, in nats per token: mean over peers of the training losses, median of the validation losses."""

    train: float | None
    validation: float | None


class Store:
    """An opened, migrated database."""

    def __init__(self, url: str) -> None:
        """Open ``url`` (any SQLAlchemy URL) and bring its tables up to date.

        Raises `DiskFull`, `ResourceError`, and `ConfigError` for a URL or a database that cannot be used.
        """
        try:
            self._engine = _engine(url)
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"not a usable database URL: {error}", "give a SQLAlchemy URL") from error
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise
        self.published = Published(self._transaction)

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self) -> None:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self._transaction() as connection:
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except alembic.util.CommandError as error:
                raise ConfigError(f"the database is of a newer version: {error}", "update the program") from error

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError as error:
            raise VerificationError("the database holds another entry of this name already") from error
        except DBAPIError as error:
            if "full" in str(error.orig):
                raise DiskFull(
                    "the disk of the database is full", "make room; nothing that was acknowledged is lost"
                ) from error
            raise ResourceError(f"the database failed: {error.orig}", "look at its disk or server") from error

    # The run

    def bind_run(self, run_id: bytes, signed_spec: bytes, signed_genesis: bytes) -> None:
        """Make this the database of a run; `ConfigError` where it is that of another already."""
        row = {"run_id": run_id, "signed_spec": signed_spec, "signed_genesis": signed_genesis}
        with self._transaction() as connection:
            found = connection.execute(sa.select(run).limit(1)).first()
            if found is None:
                connection.execute(run.insert().values(row))
            elif dict(found._mapping) != row:
                raise ConfigError(
                    f"the database holds another run ({found.run_id.hex()[:12]}) or another start of this one",
                    "use another state folder for another run",
                )

    # Peers

    def admit(self, key: bytes, admitted_until_unix_ms: int, now_unix_ms: int, max_peers: int) -> None:
        """Write down that a peer is admitted; `ResourceError` where ``max_peers`` others are."""
        with self._transaction() as connection:
            if not _update_peer(
                connection, key, admitted_until_unix_ms=admitted_until_unix_ms, last_seen_unix_ms=now_unix_ms
            ):
                _make_room(connection, now_unix_ms, max_peers)
                row = PeerRow(
                    key=key,
                    first_seen_unix_ms=now_unix_ms,
                    last_seen_unix_ms=now_unix_ms,
                    admitted_until_unix_ms=admitted_until_unix_ms,
                )
                connection.execute(peers.insert().values(asdict(row)))

    def peer(self, key: bytes) -> PeerRow | None:
        with self._transaction() as connection:
            row = connection.execute(sa.select(peers).where(peers.c.key == key)).first()
        return PeerRow(**row._mapping) if row else None

    def newest_peers(self, limit: int) -> list[PeerRow]:
        """The peers heard from most recently."""
        query = sa.select(peers).order_by(peers.c.last_seen_unix_ms.desc(), peers.c.key).limit(limit)
        with self._transaction() as connection:
            return [PeerRow(**row._mapping) for row in connection.execute(query)]

    def report(self, key: bytes, report: ReportRow, now_unix_ms: int) -> None:
        """Write down a known peer's report and keep its newest `MAX_REPORTS_PER_PEER` rounds of losses."""
        latest = asdict(report)
        train_loss, validation_loss = latest.pop("train_loss"), latest.pop("validation_loss")
        with self._transaction() as connection:
            _update_peer(connection, key, last_seen_unix_ms=now_unix_ms, **latest)
            if train_loss is not None or validation_loss is not None:
                _add_losses(connection, key, report.round, train_loss, validation_loss)

    def losses(self, first_round: int, last_round: int) -> dict[int, Losses]:
        """What peers reported about rounds ``first_round`` to ``last_round``."""
        query = sa.select(reports).where(reports.c.round.between(first_round, last_round))
        train: dict[int, list[float]] = {}
        validation: dict[int, list[float]] = {}
        with self._transaction() as connection:
            for row in connection.execute(query):
                if row.num_train_losses:
                    train.setdefault(row.round, []).append(row.train_loss_sum / row.num_train_losses)
                if row.validation_loss is not None:
                    validation.setdefault(row.round, []).append(row.validation_loss)
        return {
            number: Losses(
                train=sum(train[number]) / len(train[number]) if number in train else None,
                validation=median(validation[number]) if number in validation else None,
            )
            for number in train.keys() | validation.keys()
        }

    def set_seed_addresses(self, key: bytes, addresses: Sequence[str], now_unix_ms: int) -> None:
        """Replace the addresses that one seed peer told."""
        with self._transaction() as connection:
            connection.execute(seed_addresses.delete().where(seed_addresses.c.peer_key == key))
            for position, address in enumerate(addresses):
                row = {"peer_key": key, "position": position, "address": address, "told_unix_ms": now_unix_ms}
                connection.execute(seed_addresses.insert().values(row))

    def seed_addresses(self, limit: int) -> list[str]:
        """Addresses of seed peers, newest first."""
        columns = seed_addresses.c
        query = sa.select(columns.address).order_by(columns.told_unix_ms.desc(), columns.peer_key, columns.position)
        with self._transaction() as connection:
            return list(connection.execute(query.limit(limit)).scalars())

    # The log

    def append(self, new: Sequence[NewCommit]) -> None:
        """Record commits and their contributions, all or none; `VerificationError` where a round has one."""
        with self._transaction() as connection:
            _record(connection, new)

    def replace_from(self, first_round: int, new: Sequence[NewCommit]) -> None:
        """Forget the rounds from ``first_round`` on with what they credited, and record ``new`` instead, at once."""
        with self._transaction() as connection:
            shard = new[0].row.shard
            credited = (contributions.c.shard == shard, contributions.c.round >= first_round)
            for row in connection.execute(sa.select(contributions).where(*credited)).all():
                _update_peer(connection, row.peer_key, tokens=peers.c.tokens - row.tokens)
            connection.execute(contributions.delete().where(*credited))
            connection.execute(commits.delete().where(commits.c.shard == shard, commits.c.round >= first_round))
            _record(connection, new)

    def commit(self, shard: int, round_number: int) -> bytes | None:
        """The serialised Commit of a round, None where it is not recorded."""
        found = self.commits(shard, round_number, 1)
        return found[0][1] if found and found[0][0] == round_number else None

    def commits(self, shard: int, first_round: int, limit: int) -> list[tuple[int, bytes]]:
        """(round, serialised Commit) from ``first_round`` on, in order."""
        columns = commits.c
        query = sa.select(columns.round, columns.commit).where(columns.shard == shard, columns.round >= first_round)
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(columns.round).limit(limit))
            return [(row.round, row.commit) for row in rows]

    def round(self, shard: int, round_number: int) -> RoundRow | None:
        found = self._rounds(shard, commits.c.round == round_number, 1)
        return found[0] if found else None

    def newest_rounds(self, shard: int, limit: int) -> list[RoundRow]:
        """The last ``limit`` recorded rounds, in order."""
        return self._rounds(shard, sa.true(), limit)[::-1]

    def _rounds(self, shard: int, where: sa.ColumnElement[bool], limit: int) -> list[RoundRow]:
        columns = [column for column in commits.c if column.name != "commit"]
        query = sa.select(*columns).where(commits.c.shard == shard, where)
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(commits.c.round.desc()).limit(limit))
            return [RoundRow(**row._mapping) for row in rows]

    def shares(self, shard: int, first_round: int, last_round: int) -> dict[int, dict[bytes, int]]:
        """Tokens that each peer contributed, by round."""
        columns = contributions.c
        query = sa.select(columns.round, columns.peer_key, columns.tokens).where(
            columns.shard == shard, columns.round.between(first_round, last_round)
        )
        shares: dict[int, dict[bytes, int]] = {}
        with self._transaction() as connection:
            for row in connection.execute(query.order_by(columns.round, columns.peer_key)):
                shares.setdefault(row.round, {})[row.peer_key] = row.tokens
        return shares


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """WAL with synchronous=FULL: a commit that returned survives a crash and a power cut (sqlite.org/pragma.html)."""
    connection.isolation_level = None  # we begin transactions ourselves, so that schema changes are in them too
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={int(_BUSY_TIMEOUT_S * 1000)}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _update_peer(connection: sa.Connection, key: bytes, **values: Any) -> bool:
    result = connection.execute(peers.update().where(peers.c.key == key).values(**values))
    return bool(result.rowcount)


def _make_room(connection: sa.Connection, now_unix_ms: int, max_peers: int) -> None:
    """Forget peers whose admission ended and that never contributed, once the table is full."""
    count = sa.select(sa.func.count()).select_from(peers)
    if connection.execute(count).scalar_one() < max_peers:
        return
    idle = (peers.c.admitted_until_unix_ms < now_unix_ms, peers.c.tokens == 0)
    connection.execute(reports.delete().where(reports.c.peer_key.in_(sa.select(peers.c.key).where(*idle))))
    connection.execute(peers.delete().where(*idle))
    if connection.execute(count).scalar_one() >= max_peers:
        raise ResourceError(f"the run has {max_peers} peers, its limit", "try again tomorrow")


def _add_losses(
    connection: sa.Connection, key: bytes, round_number: int, train_loss: float | None, validation_loss: float | None
) -> None:
    mine = reports.c.peer_key == key
    this = (mine, reports.c.round == round_number)
    added = {"train_loss_sum": train_loss or 0.0, "num_train_losses": int(train_loss is not None)}
    changed: dict[str, Any] = {name: reports.c[name] + value for name, value in added.items()}
    if validation_loss is not None:
        changed["validation_loss"] = validation_loss
    if connection.execute(reports.update().where(*this).values(**changed)).rowcount:
        return
    row = {"peer_key": key, "round": round_number, **added, "validation_loss": validation_loss}
    connection.execute(reports.insert().values(row))
    rounds = sa.select(reports.c.round).where(mine).order_by(reports.c.round.desc())
    oldest_kept = connection.execute(rounds.offset(MAX_REPORTS_PER_PEER - 1).limit(1)).scalar()
    if oldest_kept is not None:
        connection.execute(reports.delete().where(mine, reports.c.round < oldest_kept))


def _record(connection: sa.Connection, new: Sequence[NewCommit]) -> None:
    for item in new:
        connection.execute(commits.insert().values(**asdict(item.row), commit=item.commit))
        for key, tokens in item.tokens.items():
            _credit(connection, item.row, key, tokens)


def _credit(connection: sa.Connection, row: RoundRow, key: bytes, tokens: int) -> None:
    entry = {"shard": row.shard, "round": row.round, "peer_key": key, "tokens": tokens}
    connection.execute(contributions.insert().values(entry))
    if not _update_peer(connection, key, tokens=peers.c.tokens + tokens):
        peer = PeerRow(
            key=key, first_seen_unix_ms=row.recorded_unix_ms, last_seen_unix_ms=row.recorded_unix_ms, tokens=tokens
        )
        connection.execute(peers.insert().values(asdict(peer)))
