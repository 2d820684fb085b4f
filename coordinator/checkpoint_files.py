"""Published checkpoints on the organizer's disk: found, and served piece by piece to whoever reaches no peer.

Decides that only what the publication key signed is served, and how much at once: the coordinator's own calls come
first. The files are the seed peer's, which assembled them; nothing is copied. Leaves checking the
bytes to whoever asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm import manifest as manifests
from swarm.checkpoint_chunks import FileChunks
from swarm.errors import Busy, NotFound, ProtocolError, SwarmError
from swarm.manifest import CheckpointManifest
from swarm.publication import published_manifest
from swarm.run_spec import RunSpec

MAX_PIECE_BYTES = 1 << 20
MAX_READS_AT_ONCE = 4
MAX_FOLDERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFolder:
    """A checkpoint that is complete and signed."""

    path: Path
    manifest: CheckpointManifest


def published_folders(folder: Path, run_id: bytes, spec: RunSpec) -> Iterator[PublishedFolder]:
    """The signed checkpoints in ``folder``, oldest first; what is unfinished or of another run is passed over."""
    found = []
    for path in sorted(folder.glob("checkpoint-*"))[:MAX_FOLDERS]:
        try:
            manifest = published_manifest(path, run_id, spec)
        except (OSError, SwarmError):
            continue
        found.append(PublishedFolder(path=path, manifest=manifest))
    yield from sorted(found, key=lambda one: one.manifest.round)


class CheckpointFiles:
    """Pieces of the chunks of signed checkpoints in ``folder`` (None: there are none). Safe to use from threads."""

    def __init__(self, folder: Path | None, run_id: bytes, spec: RunSpec) -> None:
        self._folder, self._run_id, self._spec = folder, run_id, spec
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._chunks: dict[str, FileChunks] = {}
        self._reading = 0

    def piece(self, digest: bytes, offset: int, length: int) -> bytes:
        """At most ``length`` bytes of a chunk from ``offset`` on. Raises `NotFound`, `ProtocolError`, and
        `Busy` when too many ask at once."""
        if len(digest) != 32 or not 0 < length <= MAX_PIECE_BYTES or offset > manifests.FILE_CHUNK_BYTES:
            raise ProtocolError(f"a piece has at most {MAX_PIECE_BYTES} bytes of one chunk")
        with self._lock:
            if self._reading >= MAX_READS_AT_ONCE:
                raise Busy("busy: too many ask for chunks", "ask a peer or a mirror, or try again later")
            self._reading += 1
            self._look()
            sources = list(self._chunks.values())
        try:
            for source in sources:
                data = source.part(digest, offset, length)
                if data is not None:
                    return data
        finally:
            with self._lock:
                self._reading -= 1
        raise NotFound("the coordinator has no such chunk", "ask a peer or a mirror")

    def _look(self) -> None:
        """Take in what was published since: a folder's own time changes when one comes or goes, or is signed."""
        if self._folder is None:
            return
        try:
            with os.scandir(self._folder) as entries:
                folders = [entry for entry in entries if entry.name.startswith("checkpoint-")]
            seen = tuple(sorted(entry.stat(follow_symlinks=False).st_mtime_ns for entry in folders))
        except OSError:
            return
        if seen == self._seen:
            return
        self._seen = seen
        self._chunks = {
            one.path.name: FileChunks(one.path, one.manifest)
            for one in published_folders(self._folder, self._run_id, self._spec)
        }
