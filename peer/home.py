"""A peer's folders on disk, and the lock that keeps a second process off the same key.

HOME/peer.key              the identity, locked while a peer runs (the lock ends with the process, however it ends)
HOME/runs/RUN_ID/chunks    blobs by digest
                /shard-0   the ledger
                /tokens    token shards
                /removals.sig  the newest removal list
                /checkpoint-R
                /tmp       sockets
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from swarm import keyfiles
from swarm.errors import AlreadyRunning
from swarm.identity import Identity


@dataclass(frozen=True, slots=True)
class Home:
    folder: Path

    @property
    def key_path(self) -> Path:
        return self.folder / "peer.key"

    def run_folder(self, run_id: bytes) -> Path:
        folder = self.folder / "runs" / run_id.hex()
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@contextmanager
def locked_identity(home: Home) -> Iterator[Identity]:
    """The peer's identity, for one process at a time. Raises `AlreadyRunning` where another process uses it."""
    identity = keyfiles.load_or_create(home.key_path)
    descriptor = os.open(home.key_path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"another process already runs with the key {home.key_path}",
                "stop it first, or give this one another --home",
            ) from error
        yield identity
    finally:
        os.close(descriptor)
