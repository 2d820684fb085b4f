"""Simulated swarms write and sync thousands of small files: they lie in memory where the machine offers it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

EXPLORE_PROFILE = "explore"
settings.register_profile(EXPLORE_PROFILE, max_examples=10_000)

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    base = str(MEMORY) if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=base, prefix="swarm-test-") as folder:
        yield Path(folder)
