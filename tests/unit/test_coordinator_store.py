"""The SQLite store: the contract, and what only a file database can be asked."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from coordinator import tables
from coordinator.store import MIGRATIONS, Store
from swarm.errors import ConfigError, DiskFull, ResourceError
from tests.contract_store import StoreContract, new_commit


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'folder with 100%'}.sqlite"


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'db.sqlite'}"
    Store(url).close()
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        differences: Any = compare_metadata(MigrationContext.configure(connection), tables.metadata)
    engine.dispose()
    assert differences == []


def test_a_commit_is_on_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    """Every connection writes ahead and waits for the disk."""
    store = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    with store._transaction() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


def test_a_migration_that_breaks_off_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema changes are in the transaction, so a crash in the middle does not lock the folder for ever."""
    copy = tmp_path / "migrations"
    (copy / "versions").mkdir(parents=True)
    (copy / "env.py").write_text((MIGRATIONS / "env.py").read_text())
    first = (MIGRATIONS / "versions" / "0001_first.py").read_text()
    broken = first.replace("    _log()\n", "    _log()\n    raise ZeroDivisionError\n")
    (copy / "versions" / "0001_first.py").write_text(broken)
    url = f"sqlite:///{tmp_path / 'db.sqlite'}"
    monkeypatch.setattr("coordinator.store.MIGRATIONS", copy)
    with pytest.raises(ZeroDivisionError):
        Store(url)
    monkeypatch.undo()
    store = Store(url)
    store.append([new_commit(1)])
    store.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    Store(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigError, match="newer version"):
        Store(f"sqlite:///{path}")


def test_a_file_that_is_no_database_is_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "db.sqlite"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(ResourceError, match="not a database"):
        Store(f"sqlite:///{path}")


@pytest.mark.parametrize("url", ["nonsense", "nosuchdialect://host/db"], ids=["no url", "unknown database"])
def test_a_url_that_cannot_be_used_is_a_named_error(url: str) -> None:
    with pytest.raises(ConfigError, match="database URL"):
        Store(url)


def test_a_full_disk_is_a_named_error_and_loses_nothing(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    store.append([new_commit(1)])
    with store._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="full"):
        store.append([new_commit(number) for number in range(2, 1000)])
    assert store.commits(0, 1, 10) == [(1, b"commit 1")]
    store.close()
