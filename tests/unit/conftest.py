"""What many unit tests start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A coordinator's database, with nothing in it."""
    opened = Store(f"sqlite:///{tmp_path / 'db.sqlite'}")
    yield opened
    opened.close()
